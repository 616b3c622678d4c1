"""Rows on disk -> Sample.

A row is checked here, where its number is known: its fields, roles and turns
(`mmpack.data.conversations`), its images' and videos' places and counts, that each is a readable file inside
the media folder (`mmpack.data.media_paths`, `mmpack.data.images`, `mmpack.data.videos`). What leaves this file can be encoded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mmpack.data import images, videos
from mmpack.data.conversations import (
    MARKERS,
    Fields,
    MediaPart,
    Turn,
    detect_fields,
    mapped_fields,
    structured,
    turns_of,
)
from mmpack.data.documents import document_of
from mmpack.data.file_bytes import require_file
from mmpack.data.file_formats import (
    Row,
    data_files,
    memory_rows,
    parse_json,
    read_rows,
)
from mmpack.data.limits import MAX_ROW
from mmpack.data.media_paths import DATA_URIS, MediaFolders
from mmpack.errors import BadRow, OnError, RowError, Skip, counting, names, refuse
from mmpack.types import Media, Message, Sample

_log = logging.getLogger("mmpack")
_PathLike = str | os.PathLike[str]


class RowGroup(NamedTuple):
    """The rows of one file, how their fields are named, and where their images may lie."""

    rows: Iterable[Row]
    fields: Fields | None  # None: each row tells
    folders: MediaFolders
    file: Path | None = None  # None: rows in memory


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How rows become samples: `read`. `Encoder` is one that has a tokenizer too.

    Attributes:
        stage: "sft": rows are conversations. "pretrain": rows are documents, which have `text` with `<image>`
            markers and `images`; a mapping names the text as LLaMA-Factory does, `"columns": {"prompt":
            "text"}`, and a conversation with all in the assistant's turn is a document too.
        mapping: how fields are named: an entry of LLaMA-Factory's `dataset_info.json`
            (`{"formatting": ..., "columns": {...}, "tags": {...}}`), or the name of one, the data then
            being the folder with that file. Without it, the entry of a `dataset_info.json` beside
            the file that names the file; else each row's own fields decide: `conversations` of
            `from`/`value`, `messages` of `role`/`content`, or `instruction`/`input`/`output`.
        media_dir: the folders images and videos may lie in; relative paths are looked up in the first. By
            default the data file's folder (for rows in memory: the current one). The entry "data:"
            admits data URIs.
        on_error: what to do with a row that cannot be used: "raise"; "skip" it with a warning, as long as
            at most 5 % of 1,000 rows or more are bad (`mmpack.Skip(max_bad=...)`: another share); a
            list: leave it out and append it there, however many. Reading and encoding share a `Skip`.
        missing_marker: images but no `<image>` anywhere in the row: "refuse" it, or "prepend" as
            many markers to the first turn as there are images (what LLaMA-Factory's inference
            engines do); the same for videos and `<video>`.
        verify: how images and videos are looked at: their "header", and that an image is not cut; or
            "decode" them whole.

    Raises:
        ValueError: an option has none of these values.
    """

    stage: Literal["sft", "pretrain"] = "sft"
    mapping: str | dict[str, Any] | None = None
    media_dir: _PathLike | Sequence[_PathLike] | None = None
    on_error: OnError = "raise"
    missing_marker: Literal["refuse", "prepend"] = "refuse"
    verify: Literal["header", "decode"] = "header"

    def __post_init__(self) -> None:
        for name, choices in (
            ("stage", ("sft", "pretrain")),
            ("missing_marker", ("refuse", "prepend")),
            ("verify", ("header", "decode")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be {choices[0]!r} or {choices[1]!r}, got {value!r}")
        if not isinstance(self.on_error, (list, Skip)) and self.on_error not in ("raise", "skip"):
            raise ValueError(
                f"on_error must be 'raise', 'skip', a Skip or a list, got {self.on_error!r}"
            )

    def read(
        self, data: _PathLike | Sequence[_PathLike] | Iterable[dict[str, Any]]
    ) -> Iterator[Sample]:
        """Read the samples of data files, or of rows in memory.

        Args:
            data: a file (.json, .jsonl, .csv, .parquet, .arrow; the first three also .gz or .zst), a
                folder of files of one type, several of these, or any iterable of rows (dicts; a
                `datasets.Dataset` is one).

        Yields:
            One `Sample` per usable row, in order. Rows count from 0 in each file. A document is one message,
            whose role is "document".

        Raises:
            ValueError: a row cannot be used and `on_error` is "raise", too many were skipped, or a file cannot
                be read. The message names file, row and counts, and says what to do.
        """
        return self.read_groups(self.groups(data))

    def groups(self, data: Any) -> Iterator[RowGroup]:
        """What `read` reads, file by file; no row is read yet."""
        given = self.media_dir
        folders = [given] if isinstance(given, (str, os.PathLike)) else list(given or [])
        if isinstance(data, (str, os.PathLike)):
            data = [data]
        elif not isinstance(data, (list, tuple)) or not all(
            isinstance(d, (str, os.PathLike)) for d in data
        ):
            fields = _fields(self.mapping, None)
            yield RowGroup(memory_rows(data), fields, _media_folders(folders, "."))
            return
        files, mapping = _files(data, self.mapping)
        for file in files:
            yield RowGroup(
                read_rows(file), _fields(mapping, file), _media_folders(folders, file.parent), file
            )

    def read_groups(self, groups: Iterable[RowGroup]) -> Iterator[Sample]:
        """`read` for who looks at the groups too."""
        on_error = counting(self.on_error)
        for group in groups:
            reader = RowReader(self, group)
            for row in group.rows:
                if isinstance(on_error, Skip):
                    on_error.saw("reading")
                try:
                    samples = reader.samples(row)
                except RowError as error:
                    bad = BadRow(row.source, row.number, error.error, error.advice, row.content)
                    refuse(bad, on_error)
                    continue
                yield from samples


class RowReader:
    """What the rows of one file share: their fields, where images lie, the policies."""

    def __init__(self, reader: Reader, group: RowGroup) -> None:
        self._fields = group.fields
        self._folders = group.folders
        self._prepends = reader.missing_marker == "prepend"
        self._decode = reader.verify == "decode"
        self._are_documents = reader.stage == "pretrain"
        self._file = lru_cache(maxsize=1 << 16)(self._locate)  # rows share pictures

    def samples(self, row: Row) -> list[Sample]:
        """The samples of a row: one, or several where it is a list of rows (as Qwen's own
        fine-tuning code nests them).

        Raises:
            RowError: the row cannot be used; the error does not name it.
        """
        if row.error is not None:
            raise row.error
        nested = row.content if isinstance(row.content, list) and row.content else [row.content]
        return [self._sample(content, row) for content in nested]

    def _sample(self, content: Any, row: Row) -> Sample:
        if not isinstance(content, dict):
            raise RowError(f"a row must be an object, got {type(content).__name__}", "mend the row")
        if self._are_documents:
            columns = self._fields.columns if self._fields else {}
            unread: tuple[str, ...] = ("videos", "audios", "video", "audio")
        else:
            fields = self._fields or detect_fields(content)
            columns = fields.columns
            unread = ("audios", "audio")
        for media in unread:
            if content.get(columns.get(media, media)):
                advice = (
                    "of documents images are read"
                    if self._are_documents
                    else "images and videos are read"
                )
                raise RowError(f"the row has {media}", advice)
        if self._are_documents:
            turns: list[Turn] = [("document", document_of(content, self._fields))]
        else:
            turns = turns_of(content, fields)
        values = {kind: _media_values(content, columns, kind) for kind in MARKERS}
        messages = self.place_media(turns, values)
        return Sample(messages=messages, source=row.source, row=row.number)

    def place_media(self, turns: list[Turn], values: dict[str, list[Any]]) -> tuple[Message, ...]:
        """Turns as messages with their images and videos, `values` by kind, in place.

        Raises:
            RowError: as many markers as images or videos there are not, or one cannot be used.
        """
        for kind, listed in values.items():
            pictures = [
                part
                for _, parts in turns
                for part in parts
                if isinstance(part, MediaPart) and part.kind == kind
            ]
            markers = sum(picture.value is None for picture in pictures)
            if listed and not pictures and self._prepends:
                first = next(parts for role, parts in turns if role != "system")
                first[:0] = [MediaPart(kind=kind)] * len(listed)
                markers = len(listed)
            if markers != len(listed):
                raise RowError(
                    f"{markers} {MARKERS[kind]} markers but {len(listed)} {kind}s",
                    _count_advice(turns, kind, markers, len(listed)),
                )
        remaining = {kind: iter(listed) for kind, listed in values.items()}
        messages = []
        for role, parts in turns:
            content: list[str | Media] = []
            for part in parts:
                if isinstance(part, MediaPart):
                    value = next(remaining[part.kind]) if part.value is None else part.value
                    is_path = isinstance(value, str) and not value.startswith(DATA_URIS)
                    locate = self._file if is_path else self._locate
                    content.append(locate(value, part.kind))
                elif content and isinstance(content[-1], str):
                    content[-1] += part
                else:
                    content.append(part)
            # An image needs no empty text around it; an empty turn keeps its one empty text.
            messages.append(Message(role, tuple(part for part in content if part != "") or ("",)))
        return tuple(messages)

    def _locate(self, value: Any, kind: str) -> Media:
        if kind == "video":
            return videos.probe(self._folders.locate_video(value), decode=self._decode)
        image = self._folders.locate(value)
        return replace(image, size=images.probe(image, decode=self._decode))


def _media_values(row: dict[str, Any], columns: dict[str, str], kind: str) -> list[Any]:
    """The row's images or videos as a list, however they are given."""
    column = columns.get(f"{kind}s", f"{kind}s")
    value = structured(row.get(column))
    if column == f"{kind}s":  # `image` is LLaVA's and Qwen's own name for it
        other = structured(row.get(kind))
        if value and other:
            raise RowError(f"the row has both '{kind}s' and '{kind}'", "keep one of them")
        value = value or other
    if value is None or (isinstance(value, str) and value == ""):
        return []
    return value if isinstance(value, list) else [value]


def _count_advice(turns: Sequence[Turn], kind: str, markers: int, num_values: int) -> str:
    text = "".join(part for _, parts in turns for part in parts if isinstance(part, str))
    short = "img" if kind == "image" else kind
    spellings = (f"<{short}", f"<{kind}", f"[{kind}]", f"<|{kind}")
    if markers == 0 and any(near in text.lower() for near in spellings):
        return f"the marker is spelt {MARKERS[kind]}"
    if markers < num_values:
        return f"add a marker or drop the extra {kind}"
    return (
        f"add the missing {kind} or remove a marker; one meant as text can stand in a content part"
    )


def _files(
    data: Sequence[_PathLike], mapping: str | dict[str, Any] | None
) -> tuple[list[Path], dict[str, Any] | None]:
    """The data files at these paths, and their mapping itself where it was the name of one."""
    if isinstance(mapping, str):
        if len(data) != 1:
            raise ValueError(
                f"the entry {mapping!r} is looked up in one folder, got {len(data)} paths"
            )
        path, mapping = _named_entry(Path(data[0]), mapping)
        data = [path]
    return [file for path in data for file in data_files(path)], mapping


def media_folders(groups: Iterable[RowGroup]) -> list[str]:
    """Where the images and videos of groups may lie, all together."""
    found = (name for group in groups for name in group.folders.names if name != DATA_URIS)
    return list(dict.fromkeys(found))


def _media_folders(folders: Sequence[_PathLike], default: _PathLike) -> MediaFolders:
    named = [folder for folder in folders if folder != DATA_URIS]
    return MediaFolders(folders if named else [default, *folders])


def _fields(mapping: str | dict[str, Any] | None, file: Path | None) -> Fields | None:
    if isinstance(mapping, str):
        raise ValueError("rows in memory have no dataset_info.json; pass the entry itself")
    if mapping is None and file is not None:
        mapping = _entry_beside(file)
    if mapping is None:
        return None
    fields = mapped_fields(mapping)
    if fields.kept:
        name = file.name if file else "the rows"
        _log.warning("the mapping of %s leaves fields out; kept %s", name, ", ".join(fields.kept))
    return fields


def _named_entry(path: Path, name: str) -> tuple[Path, dict[str, Any]]:
    info_path = path if path.suffix == ".json" else path / "dataset_info.json"
    info = _read_info(info_path)
    if not isinstance(info, dict) or not isinstance(info.get(name), dict):
        has = names(info) if isinstance(info, dict) else type(info).__name__
        raise ValueError(f"no dataset {name!r} in {info_path}; it has {has}")
    file_name = info[name].get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise ValueError(f"dataset {name!r} of {info_path} has no file_name; only files are read")
    return info_path.parent / file_name, info[name]


def _entry_beside(file: Path) -> dict[str, Any] | None:
    """The entry of a dataset_info.json beside the file that names it; `datasets` has a file of that
    name too, which names none."""
    info_path = file.parent / "dataset_info.json"
    if not os.path.lexists(info_path):
        return None
    info = _read_info(info_path)
    entries = info.values() if isinstance(info, dict) else []
    named = [e for e in entries if isinstance(e, dict) and e.get("file_name") == file.name]
    return named[0] if len(named) == 1 else None


def _read_info(path: Path) -> Any:
    require_file(path)
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_ROW).decode("utf-8-sig")
        return parse_json(text)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
