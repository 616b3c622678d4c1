"""Rows on disk -> Sample.

Rows are checked here, where the row number is known: fields, roles and turns (`mmpack.data.conversations`), the
number and positions of images and videos, and that each is a readable file inside the media folders
(`mmpack.data.media_paths`, `mmpack.data.images`, `mmpack.data.videos`). Every `Sample` that is returned can be
encoded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple

from mmpack.data import images, videos
from mmpack.data.chunks import chunks
from mmpack.data.content_parts import MARKERS, MediaPart
from mmpack.data.conversations import Turn, turns_of
from mmpack.data.dataset_info import (
    DataFile,
    Mapping,
    RowLimit,
    folders_of,
    limits_by_files,
    named_files,
    row_limits,
)
from mmpack.data.documents import document_columns, document_of, has_row_fields
from mmpack.data.file_formats import Row, memory_rows, read_rows
from mmpack.data.media_keys import entry_of, with_options
from mmpack.data.media_paths import DATA_URIS, MediaFolders
from mmpack.data.remote_roots import DataPath
from mmpack.data.row_fields import Fields, detect_fields, mapped_fields
from mmpack.data.row_keys import (
    ROW_KEYS,
    ROW_WEIGHT_KEYS,
    UnreadFields,
    is_absent,
    log_unread,
    refuse_pictures,
    unread_keys,
)
from mmpack.data.row_media import (
    count_advice,
    is_given,
    media_parts,
    media_values,
    prepend_markers,
)
from mmpack.data.row_outcomes import chunk_size, outcomes
from mmpack.data.row_weights import row_weight
from mmpack.data.tar_shards import SUFFIX, TarSample
from mmpack.data.tool_calls import tools_of
from mmpack.errors import (
    BadRow,
    OnError,
    RowError,
    Skip,
    check_on_error,
    counted,
    counting,
    refuse,
)
from mmpack.types import Media, Message, Sample

_log = logging.getLogger("mmpack")
_PathLike = str | os.PathLike[str]


class RowGroup(NamedTuple):
    """The rows of one file, the names of their fields, and their media folders."""

    rows: Iterable[Row]
    fields: Fields | None  # None: detected per row
    folders: MediaFolders
    file: DataPath | None = None  # None: rows in memory
    limit: RowLimit | None = None  # of the rows that are planned

    @property
    def name(self) -> str:
        """The file's name, as in errors."""
        return "rows" if self.file is None else self.file.name


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Settings for reading rows as samples with `read`. An `Encoder` is a `Reader` with a tokenizer.

    Attributes:
        stage: "sft": rows are conversations. "pretrain": rows are documents, with `text` that contains `<image>`
            markers, and `images`; a mapping names the text as in LLaMA-Factory, `"columns": {"prompt": "text"}`. A
            conversation with text in the assistant's turn only is also a document.
        mapping: names of fields: an entry of LLaMA-Factory's `dataset_info.json`
            (`{"formatting": ..., "columns": {...}, "tags": {...}}`), or names of entries, if the data is the
            folder with that file. By default the entry for the data file in a `dataset_info.json` beside it, else
            detected per row: `conversations` with `from`/`value`, `messages` with `role`/`content`,
            `instruction`/`input`/`output`, `prompt`/`completion`, `query`/`response`, or `texts` of
            `user`/`assistant`.
        media_dir: folders, or URLs, that images and videos may be in; a relative path must be in one of them
            only. Default: the data file's folder, or the folder of the `dataset_info.json` with its entry (rows
            in memory: the current folder). An entry's own `media_dir` comes before them. The value "data:" allows
            data URIs.
        on_error: for a row that cannot be used: "raise" an error; "skip" it with a warning, up to 5 % of all rows
            once there are 1,000 (`mmpack.Skip(max_bad=...)` for another share); a list: leave the row out and
            append it to the list, without a limit. Reading and encoding share a `Skip`.
        missing_marker: for a row with images but no `<image>`: "refuse" it, or "prepend" one marker per image to
            the first turn (like LLaMA-Factory's inference engines); likewise for videos and `<video>`.
        verify: check the "header" of images and videos and that images are not cut, or "decode" them completely.

    Raises:
        ValueError: an option has another value.
    """

    stage: Literal["sft", "pretrain"] = "sft"
    mapping: Mapping = None
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
        check_on_error(self.on_error)

    def read(
        self, data: _PathLike | Sequence[_PathLike] | Iterable[dict[str, Any]]
    ) -> Iterator[Sample]:
        """Read samples from data files or rows in memory.

        Args:
            data: a file (.json, .jsonl, .csv, .parquet, .arrow, .tar; the first three also with .gz or .zst), its
                URL (`s3://`, `https://`, ...), a folder of files of one type, a name with `*` or `{00..99}`, a
                list of these, or an iterable of rows (dicts), such as a `datasets.Dataset`.

        Yields:
            One `Sample` per usable row, in order. Rows are numbered from 0 in each file. A document is one message
            with the role "document". Fields that are not read are named in the log, once per file.

        Raises:
            ValueError: a row cannot be used and `on_error` is "raise", too many were skipped, or a file cannot
                be read. The message gives file, row, counts and advice.
        """
        return self.read_groups(_told_limits(self.groups(data)))

    def groups(self, data: Any) -> Iterator[RowGroup]:
        """The files that `read` reads, one group per file; rows are read lazily."""
        given = self.media_dir
        folders = [given] if isinstance(given, (str, os.PathLike)) else list(given or [])
        mapping = self.mapping
        if isinstance(data, (str, os.PathLike)):
            data = [data]
        elif not isinstance(data, (list, tuple)) or not all(
            isinstance(d, (str, os.PathLike)) for d in data
        ):
            if not isinstance(mapping, (dict, NoneType)):
                raise ValueError(
                    "rows in memory have no dataset_info.json; pass the entry itself as mapping"
                )
            here = DataFile(Path("rows in memory"), mapping, Path("."))
            (limit,) = row_limits([here])
            limit = None if limit is None else limit._replace(files="rows")
            fields, inside = _fields(mapping, "the rows"), folders_of(here, folders)
            yield RowGroup(memory_rows(data), fields, inside, limit=limit)
            return
        files = named_files(data, mapping)
        for file, limit in zip(files, row_limits(files)):
            fields = _fields(file.entry, file.path.name)
            inside = folders_of(file, folders)
            yield RowGroup(read_rows(file.path), fields, inside, file.path, limit)

    def read_groups(
        self, groups: Iterable[RowGroup], told: set[str] | None = None
    ) -> Iterator[Sample]:
        """Like `read`, for callers that need the groups, too. Fields of a file that are not read are named in the
        log at its end, except those in `told`, to which they are added."""
        on_error = counting(self.on_error)
        of_shards = set[str]()  # fields of tar files, of which there can be thousands
        for group in groups:
            reader = RowReader(self, group)
            for chunk in chunks(group.rows, chunk_size(reader)):
                for row, found in outcomes(reader, chunk):
                    if isinstance(on_error, Skip):
                        on_error.saw("reading")
                    if isinstance(found, RowError):
                        place, path = (row.source, row.number), str(group.file or "")
                        bad = BadRow(*place, found.error, found.advice, row.content, path)
                        refuse(bad, on_error)
                    else:
                        yield from found
            is_shard = told is None and group.name.endswith(SUFFIX)
            log_unread(group.name, reader.unread, of_shards if is_shard else told)


def _told_limits(groups: Iterable[RowGroup]) -> Iterator[RowGroup]:
    """Warn of limits that are for plans and do not apply to rows that are only read."""
    for group in groups:
        if group.limit is not None:
            _log.warning(
                "all rows of %s are read; num_samples and max_samples of its entry apply when packs are planned",
                group.name,
            )
        yield group


class RowReader:
    """Turns the rows of one file into samples; holds their fields, media folders and options.

    Attributes:
        folders: that images and videos may be in.
        unread: number of rows with each field that is not read, so far.
        waits: whether images may be in object storage; `samples` then may run in several threads.
    """

    def __init__(self, reader: Reader, group: RowGroup) -> None:
        self._fields = group.fields
        self._unnamed = set[str]()  # columns a row may have that its mapping does not name
        if group.fields is not None and reader.stage == "sft":
            self._unnamed.update(group.fields.unnamed)
        self.folders = group.folders
        self.waits = group.folders.are_remote
        self._prepends = reader.missing_marker == "prepend"
        self._decode = reader.verify == "decode"
        self._are_documents = reader.stage == "pretrain"
        self.unread = UnreadFields()
        self._file = lru_cache(maxsize=1 << 16)(self._locate)  # rows can share images

    def samples(self, row: Row) -> list[Sample]:
        """The samples of a row: one, or several if it is a list of rows (the nesting of Qwen's fine-tuning code).

        Raises:
            RowError: the row cannot be used; the message has no file or row number.
        """
        if row.error is not None:
            raise row.error
        nested = row.content if isinstance(row.content, list) and row.content else [row.content]
        try:
            return [self._sample(content, row) for content in nested]
        except RowError as error:
            if row.tar is None:
                raise
            raise RowError(f"{error.error} (sample {row.tar.place})", error.advice) from None

    def _sample(self, content: Any, row: Row) -> Sample:
        if row.tar is not None:
            is_row = self._fields is not None or has_row_fields(content, self._are_documents)
            content = row.tar.content(content, is_row, self._are_documents, self.unread.count)
        if not isinstance(content, dict):
            raise RowError(f"a row must be an object, got {type(content).__name__}", "fix the row")
        fields, columns, read = self._columns(content)
        for media in ("videos", "video", "audios", "audio")[0 if self._are_documents else 2 :]:
            value = content.get(columns.get(media, media))
            if value is not None and not is_absent(value):
                advice = (
                    "remove it; documents can only have images"
                    if self._are_documents
                    else "remove it; conversations can only have images and videos"
                )
                raise RowError(f"the row has {media!r}", advice)
        weight = row_weight(content, read)
        keys = unread_keys(content, read | ROW_WEIGHT_KEYS, ROW_KEYS, "the row")
        if keys:
            self.unread.count(str(key)[:60] for key in keys)
        for column in [name for name in tuple(self._unnamed) if content.get(columns[name])]:
            self._unnamed.discard(column)
            _log.warning(
                "the mapping of %s does not name the column %r, which row %d has; it is read",
                row.source,
                columns[column],
                row.number,
            )
        unread = set[str]()
        if fields is None or self._are_documents:
            turns = [Turn("document", document_of(content, fields, unread))]
        else:
            turns = turns_of(content, fields, unread)
        if unread:
            self.unread.count(unread)
        tools = () if self._are_documents else tools_of(content.get(columns["tools"]))
        values = {kind: media_values(content, columns, kind) for kind in MARKERS}
        if row.tar is not None:
            row.tar.fill(values, any(map(is_given, media_parts(turns))), self._are_documents)
        if keys and not any(values.values()) and not any(map(is_given, media_parts(turns))):
            refuse_pictures(content, keys, "the row")
        if fields is not None and fields.formatting == "pairs":
            prepend_markers(turns, values)
        messages = self.place_media(turns, values, row.tar)
        if row.tar is not None:
            self.unread.count(row.tar.unused(messages))
        return Sample(messages, row.source, row.number, tools, weight)

    def _columns(
        self, content: dict[str, Any]
    ) -> tuple[Fields | None, dict[str, str], frozenset[str]]:
        """(names of the row's fields, its columns, those that are read); documents may have no fields."""
        fields = self._fields
        if self._are_documents:
            return fields, fields.columns if fields else {}, document_columns(content, fields)
        if fields is None:
            try:
                fields = detect_fields(content)
            except RowError:
                unread_keys(content, frozenset(), ROW_KEYS, "the row")  # a better reason, if any
                raise
        return fields, fields.columns, fields.read

    def place_media(
        self, turns: list[Turn], values: dict[str, list[Any]], tar: TarSample | None = None
    ) -> tuple[Message, ...]:
        """Turns as messages, with each marker replaced by its image or video from `values`, a list per kind; of a
        sample in a tar file, names are those of its members.

        Raises:
            RowError: the number of markers differs from the number of images or videos, or one of them is
                unusable.
        """
        if self._prepends:
            prepend_markers(turns, values)
        parts = media_parts(turns)
        for kind, listed in values.items():
            markers = sum(part.kind == kind and not is_given(part) for part in parts)
            if markers != len(listed):
                raise RowError(
                    f"{markers:,} {MARKERS[kind]} marker{'s' * (markers != 1)} but {counted(len(listed), kind)}",
                    count_advice(turns, kind, markers, len(listed)),
                )
        remaining = {kind: iter(listed) for kind, listed in values.items()}
        messages = []
        for turn in turns:
            content: list[str | Media] = []
            for part in turn.parts:
                if isinstance(part, MediaPart):
                    value, options = part.value, part.options
                    if value is None:
                        value, own = entry_of(next(remaining[part.kind]), part.kind)
                        if own is not None and options is not None:
                            raise RowError(
                                f"{part.kind} {value!a:.80} has options in its part and in its list",
                                "keep one",
                            )
                        options = options or own
                    value = value if tar is None else tar.named(value, part.kind)
                    is_path = isinstance(value, str) and not value.startswith(DATA_URIS)
                    locate = self._file if is_path else self._locate
                    content.append(with_options(locate(value, part.kind), options))
                elif content and isinstance(content[-1], str):
                    content[-1] += part
                else:
                    content.append(part)
            # Empty texts around images are dropped; an empty turn keeps one.
            kept = tuple(part for part in content if part != "") or (("",) if content else ())
            content = [*turn.thought, *kept]
            messages.append(
                Message(turn.role, tuple(content), turn.tool_calls, turn.loss, turn.weight)
            )
        return tuple(messages)

    def _locate(self, value: Any, kind: str) -> Media:
        if kind == "video":
            video = self.folders.locate_video(value)
            return videos.probe(video, decode=self._decode, folders=self.folders)
        image = self.folders.locate(value)
        return images.probed(image, decode=self._decode, folders=self.folders)


def limits_of(groups: Iterable[RowGroup]) -> dict[str, tuple[int, int]]:
    """The limits of the groups, as `limits_by_files`."""
    return limits_by_files([(group.name, group.limit) for group in groups])


def media_folders(groups: Iterable[RowGroup]) -> list[str]:
    """The media folders of all groups, without duplicates."""
    found = (name for group in groups for name in group.folders.names if name != DATA_URIS)
    return list(dict.fromkeys(found))


def _fields(mapping: dict[str, Any] | None, source: str) -> Fields | None:
    if mapping is None:
        return None
    fields = mapped_fields(mapping)
    if fields.kept:
        _log.warning(
            "the mapping of %s leaves fields out; using defaults %s", source, ", ".join(fields.kept)
        )
    return fields
