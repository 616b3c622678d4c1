"""The content of a turn -> texts, images and videos in reading order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mmpack.data.media_keys import described
from mmpack.data.row_values import short, text_of
from mmpack.errors import RowError
from mmpack.media_options import MediaOptions

MARKERS = {"image": "<image>", "video": "<video>"}
_SPLIT = re.compile(f"({'|'.join(MARKERS.values())})")


@dataclass(frozen=True, slots=True)
class MediaPart:
    """An image or a video at its position in a turn; `value` None: the next one in the row's list."""

    value: Any = None
    kind: str = "image"
    options: MediaOptions | None = None


Part = str | MediaPart


def parts_of(content: Any, where: str) -> list[Part]:
    """The text, images and videos of a turn. In a string, `<image>` and `<video>` are markers. In OpenAI content
    parts, images and videos are separate parts and `<image>` in a text is literal text."""
    if isinstance(content, str):
        kinds = {marker: kind for kind, marker in MARKERS.items()}
        pieces = _SPLIT.split(text_of(content, where))  # alternates text and markers
        return [MediaPart(kind=kinds[p]) if p in kinds else p for p in pieces]
    if not isinstance(content, list):
        raise RowError(f"the text of {where} must be a string, got {short(content)}", "fix the row")
    return [_content_part(part, where) for part in content]


def _content_part(part: Any, where: str) -> Part:
    if isinstance(part, str):
        return text_of(part, where)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        text = part.get("text")
        return text_of(text if text is not None else part.get("value"), where)
    medium = next((m for m in MARKERS if kind in (m, f"{m}_url")), None)
    if medium is not None:
        try:
            value, options = described(part, medium)
        except RowError as error:
            raise RowError(f"{where}: {error.error}", error.advice) from None
        return MediaPart(value, medium, options)
    raise RowError(
        f"{where} has a content part of type {short(kind)}", "use text, image or video parts"
    )
