"""`mmpack check`: reads a data set as training would, and counts its contents."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmpack.data.chunks import chunks
from mmpack.data.encoder import Encoder
from mmpack.data.file_formats import Row, rows_or_error
from mmpack.data.media_paths import MediaFolders, open_media
from mmpack.data.readers import Reader, RowGroup, RowReader
from mmpack.data.remote_roots import DataPath, RemotePath, is_remote
from mmpack.data.row_keys import UnreadByFile, UnreadFields
from mmpack.data.row_outcomes import outcomes
from mmpack.data.special_tokens import TypedTokens
from mmpack.errors import BadRow, RowError
from mmpack.packing.image_units import UnitSizes, units_of
from mmpack.packing.plan import padded_utilization, plan_packs
from mmpack.packing.sample_images import ImageNumbers, SampleImages, patches_in
from mmpack.types import EncodedSample, ImageRef, Int32, Sample

CAPACITIES = (2048, 4096, 8192, 16384, 32768)
_SAMPLED = 4096  # bytes


@dataclass
class CheckedRow:
    """The result of checking one row."""

    source: str
    row: int | None  # None: the file itself
    group: str  # the row's own `source` field, or its file
    fields: tuple[str, ...] = ()  # names, without null and empty fields
    samples: list[Sample] = field(default_factory=list)
    encoded: list[EncodedSample] = field(default_factory=list)
    typed: list[TypedTokens] = field(default_factory=list)  # of each sample, with a tokenizer
    bad: BadRow | None = None
    digest: bytes | None = None  # of its content; None: unknown
    folders: MediaFolders | None = None  # that its images are in
    unread: UnreadFields | None = (
        None  # fields that are not read, counted over all rows of its file
    )


def check_rows(groups: Iterable[RowGroup], reader: Reader) -> Iterator[CheckedRow]:
    """Read every row of every file and, given an `Encoder`, encode it.

    A file that cannot be read yields one `CheckedRow` without a number; reading continues with the next file.
    """
    for group in groups:
        row_reader = RowReader(reader, group)
        for chunk in chunks(rows_or_error(group.rows)):
            rows = [row for row in chunk if isinstance(row, Row)]
            checked = [_checked(*found, row_reader) for found in outcomes(row_reader, rows)]
            ends = [one for one in chunk if isinstance(one, ValueError)]  # the last, if any
            checked += [CheckedRow("", None, "", bad=BadRow("", -1, str(end))) for end in ends]
            if isinstance(reader, Encoder):
                _encode(checked, reader)
            yield from checked


def _checked(row: Row, found: list[Sample] | RowError, reader: RowReader) -> CheckedRow:
    is_object = isinstance(row.content, dict)
    name = row.content.get("source") if is_object else None
    fields = [key for key, value in row.content.items() if value or value == 0] if is_object else []
    group = name if isinstance(name, str) else row.source
    checked = CheckedRow(row.source, row.number, group, tuple(str(key)[:40] for key in fields))
    checked.unread = reader.unread
    if row.error is None:
        checked.digest = _digest(row)
    if isinstance(found, RowError):
        checked.bad = BadRow(row.source, row.number, found.error, found.advice, row.content)
    else:
        checked.samples, checked.folders = found, reader.folders
    return checked


def _digest(row: Row) -> bytes | None:
    """A digest of a row, equal for equal fields in any order; files of images and videos count by their paths. Of
    a tar file: for equal fields and texts, and images and videos as `_sampled`, in any shard and under any key.
    None: the row is nested too deeply, or an image in memory or in a tar file cannot be read."""
    try:
        content = row.content
        if row.tar is not None:
            media = [(extension, _sampled(ref)) for extension, ref in row.tar.media]
            content = [content, row.tar.text, media]
        text = json.dumps(content, sort_keys=True, default=_in_digest)
    except (TypeError, ValueError, RecursionError, OSError, SyntaxError):
        return None
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _sampled(ref: ImageRef) -> tuple[int, bytes]:
    """The length of a member of a tar file, and the bytes in its middle; others of that length are hardly equal
    there. In object storage, where each would be a request, its name."""
    assert ref.member is not None
    if is_remote(ref.path):
        return ref.member.length, ref.member.name.encode()
    with open_media(ref.path, "image", member=ref.member) as file:
        file.seek(ref.member.length // 2)
        return ref.member.length, file.read(_SAMPLED)


def _in_digest(value: Any) -> str:
    """Values without a JSON type: bytes and images by a digest of their content, others by repr."""
    if isinstance(value, (bytes, bytearray)) or hasattr(value, "tobytes"):
        data = value if isinstance(value, (bytes, bytearray)) else value.tobytes()
        return hashlib.blake2b(data, digest_size=12).hexdigest()
    return repr(value)


def _encode(checked: list[CheckedRow], encoder: Encoder) -> None:
    by_row = {row.row: row for row in checked}
    bad_rows: list[BadRow] = []
    samples = [sample for row in checked for sample in row.samples]
    for place, encoded in encoder.encode_chunk(samples, bad_rows):
        by_row[encoded.row].encoded.append(encoded)
        by_row[encoded.row].typed.append(encoder.typed_in(samples[place]))
    for bad in bad_rows:
        by_row[bad.row].bad = bad


class Summary:
    """Statistics of a data set, counted row by row.

    Attributes:
        num_rows, bad_rows: number of rows, and the refused rows.
        groups: per source: `rows`, `refused`, `images`, and the `tokens` of each usable row.
        fields: number of rows per field (not null or empty).
        roles, turns: number of turns per role; number of rows per number of user turns.
        images_per_row: number of rows per number of images.
        num_videos, video_frames: number of videos, and the frames of each before sampling.
        image_uses: name -> number of uses, without images in memory.
        weights: those of the loss other than 1, of rows and turns. num_weighted: number of rows with any.
        typed_text, typed_ids: number of each special token in rows that stays text, and that becomes its id.
        lengths: (tokens or, without a tokenizer, characters, source, row) of each usable row.
        same_content: names of files with equal content (with `hash_files`).
        num_again: number of rows equal to an earlier row. again: the first of them, and the earlier row.
        twice: data files that are the same file, named twice or linked.
    """

    def __init__(self, hash_files: bool = False) -> None:
        self.num_rows = 0
        self.num_images = 0
        self.num_videos = 0
        self.video_frames: list[int] = []
        self.bad_rows: list[BadRow] = []
        self.groups: dict[str, dict[str, Any]] = defaultdict(
            lambda: {"rows": 0, "refused": 0, "images": 0, "tokens": []}
        )
        self.fields: Counter[str] = Counter()
        self.roles: Counter[str] = Counter()
        self.turns: Counter[int] = Counter()
        self.images_per_row: Counter[int] = Counter()
        self.image_uses: Counter[str] = Counter()
        self.image_sizes: list[tuple[int, int]] = []
        self.weights: list[float] = []
        self.num_weighted = 0
        self.typed_text: Counter[str] = Counter()
        self.typed_ids: Counter[str] = Counter()
        self.lengths: list[tuple[int, str, int]] = []
        self.has_tokens = False
        self._numbers = ImageNumbers(lambda data: hashlib.blake2b(data, digest_size=16).digest())
        self._ids: list[list[int]] = []  # of the images of each row with tokens
        self._grids: list[Int32] = []
        self.num_again = 0
        self.again: tuple[str, str] | None = None
        self.twice: list[tuple[str, str]] = []
        self._unread: dict[int, tuple[str, UnreadFields]] = {}  # by the counter's id: one per file
        self._seen: dict[bytes, int] = {}  # digest of a row -> file number << 40 | row number
        self._files: dict[str, int] = {}
        self._hash_files = hash_files
        self._by_content: dict[bytes, set[str]] = defaultdict(set)

    def add(self, checked: CheckedRow) -> None:
        """Count one row."""
        if checked.bad is not None:
            self.bad_rows.append(checked.bad)
        if checked.row is None:
            return
        self.num_rows += 1
        self._add_digest(checked)
        if checked.unread is not None:
            self._unread.setdefault(id(checked.unread), (checked.source, checked.unread))
        self.fields.update(checked.fields)
        group = self.groups[checked.group]
        group["rows"] += 1
        if checked.bad is not None:
            group["refused"] += 1
            return
        for sample in checked.samples:
            self.roles.update(message.role for message in sample.messages)
            self.turns[sum(message.role == "user" for message in sample.messages)] += 1
            self.images_per_row[len(sample.images)] += 1
            self.num_images += len(sample.images)
            group["images"] += len(sample.images)
            weights = [sample.weight, *(message.weight for message in sample.messages)]
            weights = [weight for weight in weights if weight != 1]
            self.weights += weights
            self.num_weighted += bool(weights)
            self.num_videos += len(sample.videos)
            self.video_frames += [video.num_frames for video in sample.videos]
            for image in sample.images:
                self._add_image(image, checked.folders)
        for typed in checked.typed:
            self.typed_text.update(typed.text)
            self.typed_ids.update(typed.ids)
        for encoded in checked.encoded:
            self.has_tokens = True
            group["tokens"].append(encoded.num_tokens)
            self.lengths.append((encoded.num_tokens, encoded.source, encoded.row))
            self._ids.append(self._numbers.of(encoded))
            self._grids.append(encoded.grid_thw)
        if not checked.encoded:
            for sample in checked.samples:
                characters = sum(
                    len(p) for m in sample.messages for p in m.content if isinstance(p, str)
                )
                self.lengths.append((characters, sample.source, sample.row))

    def add_files(self, files: Iterable[DataPath | None]) -> None:
        """Find data files that are the same file; None: rows in memory."""
        first: dict[Any, str] = {}
        for file in files:
            try:
                found = None if file is None or isinstance(file, RemotePath) else os.stat(file)
            except OSError:  # reading will report it
                continue
            if file is None:
                continue
            place = file if found is None else (found.st_dev, found.st_ino)
            if place in first:
                self.twice.append((str(file), first[place]))
            first.setdefault(place, str(file))

    def _add_digest(self, checked: CheckedRow) -> None:
        if checked.digest is None or checked.row is None:
            return
        file = self._files.setdefault(checked.source, len(self._files))
        earlier = self._seen.get(checked.digest)
        if earlier is None:
            self._seen[checked.digest] = file << 40 | checked.row
            return
        self.num_again += 1
        if self.again is None:
            source = list(self._files)[earlier >> 40]
            named = f"row {earlier & (1 << 40) - 1} of {source}"
            self.again = (f"row {checked.row} of {checked.source}", named)

    def _add_image(self, image: ImageRef, folders: MediaFolders | None) -> None:
        if image.size is not None:
            self.image_sizes.append(image.size)
        if image.data is not None:
            return
        if self._hash_files and image.name not in self.image_uses:
            digest = hashlib.sha256()
            with open_media(
                image.path, "image", folders, member=image.member, version=image.version
            ) as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
            self._by_content[digest.digest()].add(image.name)
        self.image_uses[image.name] += 1

    @property
    def unread(self) -> list[tuple[str, UnreadFields]]:
        """For each file that has them: its fields that are not read, and the number of rows with each."""
        found = UnreadByFile()
        for source, fields in self._unread.values():
            found.add(source, fields)
        return list(found.items())

    @property
    def num_usable(self) -> int:
        refused: int = sum(group["refused"] for group in self.groups.values())
        return self.num_rows - refused

    @property
    def same_content(self) -> list[list[str]]:
        return [sorted(paths) for paths in self._by_content.values() if len(paths) > 1]

    def longest(self, count: int = 5) -> list[tuple[int, str, int]]:
        """The longest rows, (length, source, row)."""
        return sorted(self.lengths, reverse=True)[:count]

    def histogram(self) -> dict[int, int]:
        """Number of rows by length, in powers of two: upper bound -> rows."""
        counts = Counter(max(16, 1 << (length - 1).bit_length()) for length, _, _ in self.lengths)
        return dict(sorted(counts.items()))

    def by_capacity(self) -> list[dict[str, Any]]:
        """For common capacities: number of packs, utilization, and rows that are too long; if rows show the same
        images, patches that enter the vision tower: of all rows, with each image once per pack, and so with
        `--group-images`."""
        tokens = np.array([length for length, _, _ in self.lengths], dtype=np.int64)
        images = self.images
        table: list[dict[str, Any]] = []
        for capacity in CAPACITIES:
            fits = tokens <= capacity
            fitting, shown = tokens[fits], images.of_samples(fits)
            plan = plan_packs(fitting, capacity)
            table.append(
                {
                    "capacity": capacity,
                    "packs": plan.num_packs,
                    "utilization": round(plan.utilization, 4),
                    "too_long": len(tokens) - len(fitting),
                }
            )
            if len(np.unique(images.ids)) < len(images.ids):
                unit = units_of(shown, UnitSizes(fitting, capacity))
                in_rows, in_packs = patches_in(plan, shown)
                _, grouped = patches_in(plan_packs(fitting, capacity, unit=unit), shown)
                table[-1]["patches"] = {"rows": in_rows, "packs": in_packs, "grouped": grouped}
        return table

    @property
    def images(self) -> SampleImages:
        """The images and videos of the usable rows, in their order, if tokens were counted."""
        grids = np.concatenate([np.empty((0, 3), dtype=np.int32), *self._grids])
        ids = np.array([one for of_row in self._ids for one in of_row], dtype=np.int64)
        return SampleImages(ids, grids, np.cumsum([0, *map(len, self._ids)]))

    def as_dict(self) -> dict[str, Any]:
        """The figures of the table, for JSON."""
        used = self.image_uses.values()
        figures: dict[str, Any] = {
            "rows": self.num_rows,
            "usable": self.num_usable,
            "refused": self.num_rows - self.num_usable,
            "images": self.num_images,
            "videos": self.num_videos,
            "image_files": len(self.image_uses),
            "image_files_used_again": sum(count > 1 for count in used),
            "rows_again": self.num_again,
            "files_twice": len(self.twice),
            "fields": dict(self.fields),
            "unread": [{"file": source, "fields": dict(fields)} for source, fields in self.unread],
            "turns_by_role": dict(self.roles),
            "rows_by_images": {str(n): count for n, count in sorted(self.images_per_row.items())},
        }
        if self.weights:
            figures["rows_weighted"] = self.num_weighted
            figures["weights"] = [min(self.weights), max(self.weights)]
        if self._hash_files:
            figures["equal_image_files"] = sum(len(paths) - 1 for paths in self.same_content)
        if self.has_tokens:
            tokens = np.array([length for length, _, _ in self.lengths])
            figures["typed_text"] = dict(self.typed_text)
            figures["typed_ids"] = dict(self.typed_ids)
            figures["tokens"] = int(tokens.sum())
            figures["tokens_median"] = int(np.median(tokens))
            figures["tokens_p99"] = int(np.percentile(tokens, 99))
            figures["tokens_longest"] = int(tokens.max())
            figures["rows_by_tokens"] = {str(n): count for n, count in self.histogram().items()}
            figures["padded_utilization"] = round(padded_utilization(tokens), 4)
            figures["by_capacity"] = self.by_capacity()
        return figures


def bad_row_line(bad: BadRow) -> dict[str, Any]:
    """A refused row for `--bad`."""
    return {
        "file": bad.source,
        "row": bad.row if bad.row >= 0 else None,
        "error": bad.error,
        "advice": bad.advice,
        "content": bad.content,
    }


def row_line(checked: CheckedRow) -> dict[str, Any]:
    """A row for `--json`."""
    bad = checked.bad
    line: dict[str, Any] = {"file": checked.source, "row": checked.row, "ok": bad is None}
    line["error"], line["advice"] = (None, None) if bad is None else (bad.error, bad.advice)
    if bad is None:
        line["images"] = sum(len(sample.images) for sample in checked.samples)
        line["videos"] = sum(len(sample.videos) for sample in checked.samples)
        if checked.encoded:
            line["tokens"] = sum(encoded.num_tokens for encoded in checked.encoded)
    return line
