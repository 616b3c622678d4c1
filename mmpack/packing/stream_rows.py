"""The rows of one source of a stream that a worker has: read, encoded, fitted to a pack."""

from __future__ import annotations

import logging
import sys
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any

from mmpack.data.chunks import chunks
from mmpack.data.encoder import Encoder
from mmpack.data.file_formats import Row
from mmpack.data.readers import RowReader
from mmpack.data.row_keys import log_unread
from mmpack.data.row_outcomes import outcomes
from mmpack.errors import BadRow, OnError, RowError, Skip
from mmpack.packing import overflow
from mmpack.packing.cost import costs_of
from mmpack.packing.left_out import ShardErrors
from mmpack.packing.loss_weights import MIX_MARK
from mmpack.packing.row_sources import RowSource
from mmpack.packing.stream_files import DataFiles, FileError, FileRow
from mmpack.packing.stream_source import SourceRows
from mmpack.types import EncodedSample, Sample

_CHUNK = 16  # rows encoded in one call; small, so that a pack waits for few
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the shards of a stream have in common; the attributes are those of `PackStream`."""

    sources: tuple[RowSource, ...]
    on_error: OnError
    cost: Any
    capacity: int
    patch_capacity: int | None
    buffer: int
    on_overflow: overflow.OnOverflow
    seed: int
    num_ranks: int


@dataclass(frozen=True)
class Entry:
    """A sample in the buffer: number `part` of a row's samples."""

    source: int
    number_of_pass: int
    row: int
    part: int
    sample: EncodedSample
    sizes: tuple[int, int, int]  # tokens, cost, patches

    @property
    def key(self) -> tuple[int, int, int, int, int]:
        """What identifies it in a state."""
        check = zlib.crc32(self.sample.input_ids.tobytes())
        return self.source, self.number_of_pass, self.row, self.part, check


class SourceReader:
    """A worker's rows of one source.

    Args:
        recipe: the stream's.
        number: of the source in the recipe.
        shard: (index of the worker's shard, number of shards).

    Attributes:
        number_of_pass: the pass it is in.
        position: row and part that come next.
        num_entries: entries of this pass so far.
    """

    def __init__(self, recipe: Recipe, number: int, shard: tuple[int, int]) -> None:
        self._recipe, self._number, self._shard = recipe, number, shard
        self.one = recipe.sources[number]
        self.number_of_pass = self.num_entries = 0
        self.position = (0, 0)
        self._num_rows = 0  # of the passes before this one
        self._rows: SourceRows | None = None
        self._checksum: int | None = None  # of the first rows; None: none was read yet
        self._errors = ShardErrors(recipe.on_error)
        self._ended: list[tuple[int, BadRow]] = []  # pass and bad row, of passes that ended
        self._told = set[str]()  # unread fields named in the log
        self._readers: dict[int, RowReader] = {}  # of the file that is read now; 0: no file

    def begin(self, number_of_pass: int) -> None:
        """Go to the start of a pass."""
        if self._rows is not None:
            self._num_rows += self._rows.num_own(self.position[0])
            self._ended += self._take()
        self.number_of_pass, self.position, self.num_entries = number_of_pass, (0, 0), 0
        self._errors.begin(0)
        self._checksum = None
        self._rows = self._open(None, 0)
        self._entries = self._read(self._rows, set(), (0, 0))

    def resume(self, state: dict[str, Any], held: Collection[tuple[int, ...]]) -> list[Entry]:
        """Go to a state. `held`: keys of entries in the buffer.

        Returns:
            The entries with these passes, rows and parts, as the source gives them now.
        """
        self.number_of_pass = state["pass"]
        self.position = (state["next"][0], state["next"][1])
        self._num_rows, self.num_entries = state["rows before"], state["entries"]
        self._checksum = state["rows"]
        found: list[Entry] = []
        for number in sorted({one[1] for one in held if one[1] != self.number_of_pass}):
            self._errors.begin(sys.maxsize)  # they were counted
            places = {(one[2], one[3]) for one in held if one[1] == number}
            rows = self._open(None, 0, number)
            again = self._read(rows, places, (sys.maxsize, 0), number)
            found += islice(again, len(places))
        current = [one for one in held if one[1] == self.number_of_pass]
        places = {(one[2], one[3]) for one in current}
        for snapshot in (state["source"], None) if state["source"] else (None,):
            self._errors.begin(self.position[0], state["errors"])
            self._rows = self._open(snapshot, (state["rows"] or 0) if snapshot else 0)
            self._entries = self._read(self._rows, places, self.position)
            last = list(islice(self._entries, len(current)))
            if [one.key for one in last] == current:
                break
        return found + last

    def next_entry(self) -> Entry | None:
        """The next sample; None: the pass has ended, and the position is after its last row."""
        entry = next(self._entries, None)
        assert self._rows is not None
        self._checksum = self._rows.checksum
        if entry is None:
            self.position = max(self.position, (self._last_row + 1, 0))
            return None
        self.position = (entry.row, entry.part + 1)
        self.num_entries += 1
        return entry

    def take_bad_rows(self) -> list[tuple[int, BadRow]]:
        """(pass, bad row) of those before the position that were not returned before; `state` counts them."""
        ended, self._ended = self._ended, []
        return ended + self._take()

    def _take(self) -> list[tuple[int, BadRow]]:
        taken = self._errors.take(self.position[0])
        return [(self.number_of_pass, bad) for bad in taken]

    def state(self, oldest: int) -> dict[str, Any]:
        """The position and counts, for JSON. `oldest`: the first row of this pass in the buffer."""
        assert self._rows is not None
        return {
            "pass": self.number_of_pass,
            "rows": self._checksum,
            "next": self.position,
            "entries": self.num_entries,
            "rows before": self._num_rows,
            "errors": self._errors.state(self._num_rows + self._rows.num_own(self.position[0])),
            "source": self._rows.snapshot(oldest),
        }

    def _open(
        self, begin: tuple[int, Any] | None, checksum: int, number: int | None = None
    ) -> SourceRows:
        number = self.number_of_pass if number is None else number
        ranks, on_error = self._recipe.num_ranks, self._recipe.on_error
        max_bad = on_error.max_bad if isinstance(on_error, Skip) else None
        return SourceRows(self.one.source, number, self._shard, ranks, begin, checksum, max_bad)

    def _read(
        self,
        rows: SourceRows,
        held: set[tuple[int, int]],
        begin: tuple[int, int],
        number_of_pass: int | None = None,
    ) -> Iterator[Entry]:
        """Samples that fit a pack: those in `held`, then all from `begin` on."""
        of_pass = self.number_of_pass if number_of_pass is None else number_of_pass
        self._last_row = -1
        wanted = self._wanted(rows, {row for row, _ in held}, begin[0])
        last, part = -1, 0
        for group in chunks(self._encoded(wanted), _CHUNK):
            fitting = []
            for number, item, sample in group:
                last, part = number, part if number == last else 0
                for piece in self._fitted(number, item, sample):
                    if (number, part) >= begin or (number, part) in held:
                        fitting.append((number, part, piece))
                    part += 1
            samples = [piece for _, _, piece in fitting]
            tokens = [sample.num_tokens for sample in samples]
            config = self._recipe.cost
            costs = tokens if config is None or not samples else costs_of(samples, config).tolist()
            for (number, place, piece), size, cost in zip(fitting, tokens, costs):
                sizes = (size, cost, piece.num_patches)
                if self.one.name and piece.source != self.one.rows_name:
                    piece = replace(piece, source=f"{self.one.name}{MIX_MARK}{piece.source}")
                yield Entry(self._number, of_pass, number, place, piece, sizes)

    def _wanted(self, rows: SourceRows, held: set[int], first: int) -> Iterator[tuple[int, Any]]:
        """The rows `held`, and all from `first` on."""
        for number, item in rows:
            self._last_row = number
            if number >= first or number in held:
                self._errors.saw(number)
                yield number, item

    def _encoded(self, rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any, EncodedSample]]:
        """(number, item of the source, sample) of each sample."""
        encoder = self.one.encoder
        for chunk in chunks(rows, _CHUNK):
            samples: list[tuple[int, Sample]] = []
            read = self._samples(chunk)
            encoded = [(number, one) for number, one in chunk if isinstance(one, EncodedSample)]
            for number, item in chunk:
                if isinstance(item, EncodedSample):
                    continue
                if encoder is None:
                    raise ValueError(
                        "rows and samples need an encoder; pass an Encoder or a processor as encoder"
                    )
                found = [item] if isinstance(item, Sample) else next(read)
                samples += [(number, sample) for sample in found]
            items = dict(chunk)
            if encoder is not None:
                encoded += self._encode(encoder, samples, items)
            encoded.sort(key=lambda one: one[0])  # a position is after all before it
            yield from ((number, items[number], sample) for number, sample in encoded)

    def _encode(
        self, encoder: Encoder, samples: list[tuple[int, Sample]], items: dict[int, Any]
    ) -> Iterator[tuple[int, EncodedSample]]:
        bad_rows: list[BadRow] = []
        inputs = [sample for _, sample in samples]
        encoded = dict(encoder.encode_chunk(inputs, bad_rows))
        left = [place for place in range(len(samples)) if place not in encoded]
        for bad in bad_rows:
            origin = (bad.source, bad.row)
            place = next(n for n in left if (inputs[n].source, inputs[n].row) == origin)
            left.remove(place)
            number = samples[place][0]
            item = items[number]
            content = item.row.content if isinstance(item, FileRow) else item
            content = None if isinstance(content, Sample) else content
            self._errors.leave_out(number, replace(bad, content=content, path=self._path(item)))
        yield from ((samples[place][0], sample) for place, sample in encoded.items())

    def _samples(self, chunk: Sequence[tuple[int, Any]]) -> Iterator[list[Sample]]:
        """The samples of each item that is a row."""
        numbered = [
            (number, item if isinstance(item, FileRow) else FileRow(0, self._row(number, item)))
            for number, item in chunk
            if not isinstance(item, (Sample, EncodedSample))
        ]
        for file, of_file in groupby(numbered, key=lambda one: one[1].file):
            numbers, items = zip(*of_file)
            reader = self._reader_of(file)
            found_rows = outcomes(reader, [item.row for item in items])
            for number, item, (row, found) in zip(numbers, items, found_rows):
                if isinstance(found, RowError):
                    place, path = (row.source, row.number), self._path(item)
                    bad = BadRow(*place, found.error, found.advice, row.content, path)
                    self._errors.leave_out(number, bad, of_file=isinstance(found, FileError))
                    yield []
                else:
                    log_unread(row.source, reader.unread, self._told)
                    yield found

    def _row(self, number: int, content: Any) -> Row:
        return Row(self.one.rows_name, number, content)

    def _reader_of(self, file: int) -> RowReader:
        if file not in self._readers:
            one = self.one
            assert one.encoder is not None and one.group is not None
            group = one.source.groups[file] if isinstance(one.source, DataFiles) else one.group
            self._readers = {file: RowReader(one.encoder, group)}
        return self._readers[file]

    def _path(self, item: Any) -> str:
        """The path of a row's data file; empty: the source is no files."""
        is_of_file = isinstance(item, FileRow) and isinstance(self.one.source, DataFiles)
        return str(self.one.source.groups[item.file].file) if is_of_file else ""

    def _fitted(self, number: int, item: Any, sample: EncodedSample) -> list[EncodedSample]:
        """The parts of the sample to pack: the sample, truncated, split, or nothing."""
        recipe = self._recipe
        limits = (recipe.capacity, recipe.patch_capacity)
        # Numbers of data files' rows are of one worker.
        place = (sample.source, sample.row) if self.one.has_files else (self.one.rows_name, number)
        name = f"row {place[1]} of {place[0]} has {sample.num_tokens:,} tokens and "
        name += f"{sample.num_patches:,} patches, too many for a pack"
        if recipe.on_overflow == "error":
            if overflow.is_too_long(sample.num_tokens, sample.num_patches, *limits):
                raise ValueError(f"{name}; {overflow.TOO_LONG_ADVICE}")
            return [sample]
        try:
            fitting = overflow.fit_sample(sample, *limits, recipe.on_overflow)
        except RowError as error:
            bad = BadRow(*place, error.error, error.advice, path=self._path(item))
            self._errors.leave_out(number, bad)
            return []
        if not fitting:
            _log.warning("dropped: %s", name)
        elif recipe.on_overflow == "truncate" and fitting[0] is not sample:
            _log.warning("cut: %s; %s tokens of it are kept", name, f"{fitting[0].num_tokens:,}")
        return fitting
