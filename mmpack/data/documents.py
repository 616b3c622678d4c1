"""Rows with pretraining documents -> parts of text and images.

A document is one text with images in it: the field `text` (or the one a mapping calls `prompt`), or a
conversation with text in the assistant's turn only, the form used for trainers that only read conversations.
"""

from __future__ import annotations

from typing import Any

from mmpack.data.content_parts import MARKERS, Part, parts_of
from mmpack.data.conversations import chat_turns
from mmpack.data.row_fields import Fields
from mmpack.errors import RowError, names


def document_of(row: dict[str, Any], fields: Fields | None) -> list[Part]:
    """The parts of a row's document; `fields` is None without a mapping.

    Raises:
        RowError: the row has no document, an empty one, one with a video, or other text beside it.
    """
    is_chat = fields is not None and fields.formatting != "alpaca"
    if fields is None:
        is_chat = row.get("text") is None and ("conversations" in row or "messages" in row)
    parts = [_unless_video(p) for p in (_spoken if is_chat else _written)(row, fields)]
    if not any(not isinstance(part, str) or part.strip() for part in parts):
        raise RowError("the document is empty", "drop the row")
    return parts


def _unless_video(part: Part) -> Part:
    """Refuse a video; `<video>` in a text is literal text, for example HTML."""
    if isinstance(part, str) or part.kind != "video":
        return part
    if part.value is not None:
        raise RowError("the document has a video", "remove it; documents can only have images")
    return MARKERS["video"]


def _written(row: dict[str, Any], fields: Fields | None) -> list[Part]:
    column = "text"
    if fields is not None:
        column = fields.columns["prompt"]
        beside = [fields.columns[name] for name in ("query", "response", "history", "system")]
        also = [name for name in beside if row.get(name)]
        if also:
            raise RowError(
                f"the row has {names(also)} beside the document in {column!r}",
                "a document is one text; for instructions use --stage sft (stage='sft')",
            )
    if row.get(column) is None:
        raise RowError(
            f"no field {column!r}; the row has {names(row)}",
            "rename the field, or map it as the prompt in a dataset_info.json",
        )
    return parts_of(row[column], "the document")


def _spoken(row: dict[str, Any], fields: Fields | None) -> list[Part]:
    turns = [turn for turn in chat_turns(row, fields) if any(turn.parts) or turn.tool_calls]
    if any(turn.tool_calls for turn in turns):
        raise RowError(
            "the document has tool calls", "for conversations use --stage sft (stage='sft')"
        )
    if [turn.role for turn in turns] not in ([], ["assistant"]):
        roles = " ".join(turn.role for turn in turns)
        raise RowError(
            f"{len(turns)} turns have content (roles: {roles:.80}), only the assistant's may",
            "for conversations use --stage sft (stage='sft')",
        )
    return turns[0].parts if turns else []
