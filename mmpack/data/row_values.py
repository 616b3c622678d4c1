"""Values in rows: checked texts, lists and objects written as JSON text, and their short form in errors."""

from __future__ import annotations

from typing import Any

from mmpack.data.file_formats import parse_json
from mmpack.errors import RowError


def structured(value: Any) -> Any:
    """Parse a list or object that a flat file (CSV) holds as JSON text; other values are returned unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


def text_of(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise RowError(f"the text of {where} must be a string, got {short(text)}", "fix the row")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"the text of {where} has half a character (a lone surrogate) at character {error.start}",
            "fix the row",
        ) from None
    return text


def short(value: Any) -> str:
    """A value for an error message, shortened."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!a:.80}"
