"""Rows with pretraining documents -> parts of text and images.

A document is one text with images in it: the field `text` (or the one a mapping calls `prompt`), or a
conversation with text in the assistant's turn only, the form used for trainers that only read conversations.
"""

from __future__ import annotations

from typing import Any

from mmpack.data.content_parts import MARKERS, Part, parts_of
from mmpack.data.conversations import chat_turns
from mmpack.data.row_fields import Fields, detect_fields
from mmpack.data.row_keys import LOSS_KEYS, part_keys
from mmpack.errors import RowError, names


def document_of(row: dict[str, Any], fields: Fields | None, unread: set[str]) -> list[Part]:
    """The parts of a row's document; `fields` is None without a mapping. Keys of turns and parts that are not read
    are added to `unread`.

    Raises:
        RowError: the row has no document, an empty one, one with a video, or other text beside it.
    """
    spoken_or_written = _spoken if _is_chat(row, fields) else _written
    parts = [_unless_video(p) for p in spoken_or_written(row, fields, unread)]
    if not any(not isinstance(part, str) or part.strip() for part in parts):
        raise RowError("the document is empty", "drop the row")
    return parts


def document_columns(row: dict[str, Any], fields: Fields | None) -> frozenset[str]:
    """The columns of a row that `document_of` reads, and those of its images."""
    text = "prompt" if fields and fields.formatting == "alpaca" else "messages"
    if fields is not None:
        images = fields.columns["images"]
        beside = {images, "image"} if images == "images" else {images}
        return frozenset((fields.columns[text], *beside))
    columns = ("conversations", "messages") if _is_chat(row, None) else ("text",)
    used = next((column for column in columns if row.get(column) is not None), columns[0])
    return frozenset((used, "images", "image"))


def has_row_fields(content: Any, are_documents: bool) -> bool:
    """Whether the JSON beside an image is a row by its fields, and not about the image."""
    if not isinstance(content, dict):
        return False
    if are_documents:
        return any(content.get(key) is not None for key in ("text", "conversations", "messages"))
    try:
        detect_fields(content)
        return True
    except RowError:
        return False


def _is_chat(row: dict[str, Any], fields: Fields | None) -> bool:
    if fields is not None:
        return fields.formatting != "alpaca"
    return row.get("text") is None and ("conversations" in row or "messages" in row)


def _unless_video(part: Part) -> Part:
    """Refuse a video; `<video>` in a text is literal text, for example HTML."""
    if isinstance(part, str) or part.kind != "video":
        return part
    if part.value is not None:
        raise RowError("the document has a video", "remove it; documents can only have images")
    return MARKERS["video"]


def _written(row: dict[str, Any], fields: Fields | None, unread: set[str]) -> list[Part]:
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
    part_keys(row[column], "the document", unread)
    return parts_of(row[column], "the document")


def _spoken(row: dict[str, Any], fields: Fields | None, unread: set[str]) -> list[Part]:
    turns = chat_turns(row, fields, unread)
    if any(turn.tool_calls for turn in turns):
        raise RowError(
            "the document has tool calls", "for conversations use --stage sft (stage='sft')"
        )
    if any(turn.thought for turn in turns):
        raise RowError(
            "the document has a thought (reasoning_content, thinking)",
            "for conversations use --stage sft (stage='sft')",
        )
    turns = [turn for turn in turns if any(turn.parts)]
    if [turn.role for turn in turns] not in ([], ["assistant"]):
        roles = " ".join(turn.role for turn in turns)
        raise RowError(
            f"{len(turns)} turns have content (roles: {roles:.80}), only the assistant's may",
            "for conversations use --stage sft (stage='sft')",
        )
    marks = " or ".join(sorted(LOSS_KEYS))
    if turns and turns[0].loss != "default":
        raise RowError(
            f"the document's turn is marked as one without loss ({marks})", "drop the row"
        )
    if turns and turns[0].weight != 1:
        raise RowError(
            f"the document's turn has a weight ({marks})", "move it to the row's 'weight'"
        )
    return turns[0].parts if turns else []
