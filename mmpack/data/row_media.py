"""The images and videos in a row's columns, and advice where they do not match its markers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mmpack.data.content_parts import MARKERS, MediaPart
from mmpack.data.conversations import Turn
from mmpack.data.row_values import structured
from mmpack.errors import RowError, a_kind


def media_values(row: dict[str, Any], columns: dict[str, str], kind: str) -> list[Any]:
    """The row's images or videos as a list, in whichever form the row has them."""
    column = columns.get(f"{kind}s", f"{kind}s")
    values = _as_list(row.get(column), kind)
    if column == f"{kind}s":  # `image` is LLaVA's and Qwen's own name for it
        other = _as_list(row.get(kind), kind)
        if values and other:
            raise RowError(f"the row has both '{kind}s' and '{kind}'", "keep one of the fields")
        return values or other
    return values


def _as_list(value: Any, kind: str) -> list[Any]:
    if value is None:
        return []
    value = structured(value)
    if isinstance(value, str) and value == "":
        return []
    if not isinstance(value, list):
        return [value]
    nulls = [place for place, one in enumerate(value) if one is None]
    if nulls and len(nulls) < len(value):
        raise RowError(
            f"{kind} {nulls[0]} of {len(value)} in the row is null",
            f"remove it and its {MARKERS[kind]}, or give the {kind}",
        )
    return [] if nulls else value


def count_advice(turns: Sequence[Turn], kind: str, markers: int, num_values: int) -> str:
    """What to do where a row has more or fewer markers than images or videos."""
    text = "".join(part for turn in turns for part in turn.parts if isinstance(part, str))
    short = "img" if kind == "image" else kind
    spellings = (f"<{short}", f"<{kind}", f"[{kind}]", f"<|{kind}")
    if markers < num_values and MARKERS[kind] in text:  # in a string it would be a marker
        return (
            f"{MARKERS[kind]} inside a text part is literal text; in content parts, {a_kind(kind)} is a part of "
            f"its own: "
            f'{{"type": "{kind}"}}'
        )
    if markers == 0 and any(near in text.lower() for near in spellings):
        return f"write markers as {MARKERS[kind]}"
    if markers < num_values:
        return f"add a marker or drop the extra {kind}"
    return (
        f"add the missing {kind} or remove a marker; to keep a literal {MARKERS[kind]} in the text, write the "
        "message as OpenAI content parts"
    )


def media_parts(turns: Iterable[Turn]) -> list[MediaPart]:
    """The images and videos of turns, in order."""
    return [part for turn in turns for part in turn.parts if isinstance(part, MediaPart)]


def is_given(part: MediaPart) -> bool:
    """Whether an image or video is in the turn itself, not in the row's list."""
    return part.value is not None


def prepend_markers(turns: Sequence[Turn], values: dict[str, list[Any]]) -> None:
    """Put markers in front of the first turn for images, and for videos, if the turns have none."""
    kinds = {part.kind for part in media_parts(turns)}
    first = next(t.parts for t in turns if t.role not in ("system", "developer"))
    for kind, listed in values.items():
        if kind not in kinds:
            first[:0] = [MediaPart(kind=kind)] * len(listed)
