"""Rows on disk -> Sample.

Reads what LLaMA-Factory reads: ShareGPT rows (`conversations` of `from`/`value`) and OpenAI rows
(`messages` of `role`/`content`) whose text holds one `<image>` per file in `images`, as a JSON
array or as JSON lines. A row is checked here, where its number is known; what leaves this file has
its images in place, so nothing downstream counts markers again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmpack.types import BadRow, ImageRef, Message, Sample

MARKER = "<image>"

# LLaMA-Factory's defaults for what dataset_info.json leaves out.
_COLUMNS = {"messages": "conversations", "images": "images", "system": "system"}
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
}
_OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


def read_samples(
    path: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    mapping: dict[str, Any] | None = None,
    media_dir: str | os.PathLike[str] | None = None,
    bad_rows: list[BadRow] | None = None,
) -> Iterator[Sample]:
    """Read the samples of a .json or .jsonl file.

    The fields come from, in this order: `mapping`; the entry `dataset` of the `dataset_info.json`
    at or in `path`; the entry of a `dataset_info.json` beside the file that names the file; the
    fields of each row (`conversations` or `messages`, `from`/`value` or `role`/`content`).

    Args:
        path: a data file; with `dataset`, a folder with a `dataset_info.json`, or that file.
        dataset: name of an entry in `dataset_info.json` (LLaMA-Factory's format).
        mapping: such an entry itself: `{"formatting": ..., "columns": {...}, "tags": {...}}`.
            A column or tag it leaves out keeps LLaMA-Factory's documented default.
        media_dir: folder of relative image paths; the data file's folder by default.
        bad_rows: if given, unusable rows are appended here and reading goes on.

    Yields:
        One `Sample` per usable row, in order. Rows count from 0.

    Raises:
        ValueError: a row cannot be used and `bad_rows` is None, or the file as a whole cannot be
            read. The message names file, row and counts, and says what to do.
    """
    path = Path(path)
    if dataset is not None:
        if mapping is not None:
            raise ValueError("pass dataset= or mapping=, not both")
        path, mapping = _named_dataset(path, dataset)
    elif mapping is None:
        mapping = _mapping_beside(path)
    if mapping is not None:
        _check_mapping(mapping, path)
    folder = os.path.abspath(media_dir if media_dir is not None else path.parent)
    for number, row in _rows(path):
        try:
            yield sample_from_row(
                row, mapping=mapping, media_dir=folder, source=path.name, number=number
            )
        except ValueError as error:
            if bad_rows is None:
                raise ValueError(f"row {number} of {path.name}: {error}") from None
            bad_rows.append(BadRow(path.name, number, str(error)))


def sample_from_row(
    row: Any, *, mapping: dict[str, Any] | None, media_dir: str, source: str, number: int
) -> Sample:
    """One row -> Sample. The `ValueError` of an unusable row does not name the row."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, got {type(row).__name__}")
    columns, tags = _fields(row, mapping)
    turns = row.get(columns["messages"])
    if turns is None:
        raise ValueError(f"no field {columns['messages']!r}; the row has {sorted(row)}")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{columns['messages']!r} must be a list of turns, got {turns!r:.80}")
    for media in ("videos", "audios"):
        if row.get(media):
            raise ValueError(f"{media} are not supported yet")

    turns = [_turn(turn, tags, position) for position, turn in enumerate(turns)]
    system = row.get(columns["system"])
    if system and turns[0][0] != "system":  # a system turn outranks the column, as upstream
        turns.insert(0, ("system", system))
    _check_order([role for role, _ in turns])
    messages = _place_images(
        turns, _image_paths(row.get(columns["images"]), columns["images"]), media_dir
    )
    return Sample(messages=messages, source=source, row=number)


def _fields(
    row: dict[str, Any], mapping: dict[str, Any] | None
) -> tuple[dict[str, str], dict[str, str]]:
    if mapping is not None:
        tags = _OPENAI_TAGS if mapping.get("formatting") == "openai" else _TAGS
        columns = {**_COLUMNS, **(mapping.get("columns") or {})}
        return columns, {**tags, **(mapping.get("tags") or {})}
    columns = dict(_COLUMNS)
    if "conversations" not in row and "messages" in row:
        columns["messages"] = "messages"
    turns = row.get(columns["messages"])
    first = turns[0] if isinstance(turns, list) and turns else None
    return columns, _OPENAI_TAGS if isinstance(first, dict) and "role" in first else _TAGS


def _turn(turn: Any, tags: dict[str, str], position: int) -> tuple[str, str]:
    role_tag, content_tag = tags["role_tag"], tags["content_tag"]
    if not isinstance(turn, dict) or role_tag not in turn or content_tag not in turn:
        has = sorted(turn) if isinstance(turn, dict) else type(turn).__name__
        raise ValueError(f"turn {position} needs {role_tag!r} and {content_tag!r}, it has {has}")
    roles = {
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["system_tag"]: "system",
    }
    role, content = turn[role_tag], turn[content_tag]
    if not isinstance(role, str) or role not in roles:
        raise ValueError(f"turn {position} has the unknown role {role!r}; known: {sorted(roles)}")
    if not isinstance(content, str):
        raise ValueError(
            f"the text of turn {position} must be a string, got {type(content).__name__}"
        )
    if roles[role] == "assistant" and not content.strip():
        raise ValueError(f"the assistant's text in turn {position} is empty: nothing to learn")
    return roles[role], content


def _check_order(roles: Sequence[str]) -> None:
    spoken = roles[1:] if roles[0] == "system" else roles
    for position, role in enumerate(spoken):
        expected = "assistant" if position % 2 else "user"
        if role != expected:
            raise ValueError(
                f"turns must alternate user, assistant, ... after an optional system turn; "
                f"found {role!r} where {expected!r} should speak ({' '.join(roles)})"
            )
    if not spoken or spoken[-1] != "assistant":
        raise ValueError(f"the last turn must be the assistant's ({' '.join(roles)})")


def _image_paths(images: Any, column: str) -> list[str]:
    if images is None:
        return []
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise ValueError(f"{column!r} must be a list of paths, got {images!r:.80}")
    return images


def _place_images(
    turns: Sequence[tuple[str, str]], paths: Sequence[str], media_dir: str
) -> tuple[Message, ...]:
    markers = sum(text.count(MARKER) for _, text in turns)
    if markers != len(paths):
        if markers < len(paths):
            advice = "add a marker or drop the extra image"
        else:
            advice = "add the missing image or remove a marker"
        raise ValueError(f"{markers} {MARKER} markers but {len(paths)} images; {advice}")
    images = (ImageRef(os.path.join(media_dir, path)) for path in paths)
    messages = []
    for role, text in turns:
        first, *rest = text.split(MARKER)
        content: list[str | ImageRef] = [first]
        for text_after in rest:
            content += [next(images), text_after]
        # An image needs no empty text around it; an empty turn keeps its one empty text.
        kept = tuple(part for part in content if part != "") or ("",)
        messages.append(Message(role, kept))
    return tuple(messages)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: not a .json or .jsonl file")
    try:
        if path.suffix == ".jsonl":
            yield from _json_lines(path)
        else:
            yield from enumerate(_json_array(path))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    with path.open(encoding="utf-8-sig") as lines:
        for line_number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"line {line_number} of {path.name} is not JSON: {error}"
                ) from None
            yield number, row
            number += 1


def _json_array(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        advice = (
            "; one object a line? rename the file to .jsonl" if error.msg == "Extra data" else ""
        )
        raise ValueError(f"{path.name} is not a JSON array: {error}{advice}") from None
    if not isinstance(rows, list):
        has = f"an object with {sorted(rows)}" if isinstance(rows, dict) else type(rows).__name__
        raise ValueError(f"{path.name} must hold a JSON array of rows, it holds {has}")
    return rows


def _named_dataset(path: Path, dataset: str) -> tuple[Path, dict[str, Any]]:
    info_path = path if path.suffix == ".json" else path / "dataset_info.json"
    info = _load_info(info_path)
    if dataset not in info:
        raise ValueError(f"no dataset {dataset!r} in {info_path}; it has {sorted(info)}")
    mapping = info[dataset]
    if "file_name" not in mapping:
        raise ValueError(
            f"dataset {dataset!r} of {info_path} has no file_name; only files are read"
        )
    return info_path.parent / mapping["file_name"], mapping


def _mapping_beside(path: Path) -> dict[str, Any] | None:
    info_path = path.parent / "dataset_info.json"
    if not info_path.is_file() or info_path == path:
        return None
    entries = _load_info(info_path).values()
    named = [entry for entry in entries if entry.get("file_name") == path.name]
    return named[0] if len(named) == 1 else None


def _load_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(info, dict) or not all(isinstance(entry, dict) for entry in info.values()):
        raise ValueError(f"{path} must map dataset names to entries")
    return info


def _check_mapping(mapping: dict[str, Any], path: Path) -> None:
    is_chat = "messages" in (mapping.get("columns") or {})
    formatting = mapping.get("formatting", "sharegpt" if is_chat else "alpaca")
    if formatting not in ("sharegpt", "openai"):
        raise ValueError(f"{path.name} is {formatting!r} rows; supported: sharegpt, openai")
