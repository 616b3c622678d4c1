"""One worker's part of a `PackStream`: its rows, encoded; the buffer; the choice of packs from it."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from mmpack.data.chunks import chunks
from mmpack.data.encoder import Encoder
from mmpack.data.file_formats import Row
from mmpack.data.readers import RowGroup, RowReader, log_unread
from mmpack.errors import BadRow, OnError, RowError, counted
from mmpack.packing import overflow
from mmpack.packing.cost import costs_of
from mmpack.packing.left_out import ShardErrors
from mmpack.packing.stream_select import choose, hashed
from mmpack.packing.stream_source import SourceRows
from mmpack.types import EncodedSample, Sample

_CHUNK = 16  # rows encoded in one call; small, so that a pack waits for few
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the shards of a stream have in common; the attributes are those of `PackStream`."""

    source: Any
    encoder: Encoder | None
    group: RowGroup | None  # of the encoder: fields and media folders of rows
    on_error: OnError
    cost: Any
    capacity: int
    patch_capacity: int | None
    buffer: int
    on_overflow: overflow.OnOverflow
    seed: int
    num_ranks: int


@dataclass(frozen=True)
class _Entry:
    """A sample in the buffer: number `part` of a row's samples."""

    row: int
    part: int
    sample: EncodedSample
    sizes: tuple[int, int, int]  # tokens, cost, patches

    @property
    def check(self) -> int:
        return zlib.crc32(self.sample.input_ids.tobytes())


class Shard:
    """One worker's pass over its rows: the buffer, and the choice of packs from it.

    Attributes:
        number_of_pass: the pass it is in.
        num_entered: samples that entered the buffer in this pass.
    """

    def __init__(self, recipe: Recipe, index: int, num_shards: int) -> None:
        self._recipe = recipe
        self._index, self._num_shards = index, num_shards
        self._tokens = self._cost = 0  # sums over all samples so far, in all passes
        self._num_rows = 0  # of the passes before this one
        self._rows: SourceRows | None = None
        self._next = (0, 0)
        self._errors = ShardErrors(recipe.on_error)
        self._told = set[str]()  # unread fields named in the log
        if recipe.encoder is not None and recipe.group is not None:
            self._reader = RowReader(recipe.encoder, recipe.group)

    def begin(self, number_of_pass: int, place: dict[str, Any] | None) -> bool:
        """Go to the start of a pass, or to a state in it."""
        self.number_of_pass = number_of_pass
        self.num_entered = self._num_packs = 0
        self._buffer: list[_Entry] = []
        if place is None:
            if self._rows is not None:
                self._num_rows += self._rows.num_own(self._next[0])
            self._next = (0, 0)  # row and part that come next
            self._rows = self._source(None, 0)
            self._errors.begin(0)
            self._entries = self._read(set(), (0, 0))
            return True
        self._tokens, self._cost = place["tokens"], place["cost"]
        self._num_packs, self.num_entered = place["packs"], place["entered"]
        self._next = (place["next"][0], place["next"][1])
        held = [(row, part) for row, part, _ in place["buffer"]]
        self._num_rows = place["rows before"]
        for snapshot in (place["source"], None) if place["source"] else (None,):
            self._errors.begin(self._next[0], place["errors"])
            self._rows = self._source(snapshot, place.get("rows", 0) if snapshot else 0)
            self._entries = self._read(set(held), self._next)
            self._buffer = list(islice(self._entries, len(held)))
            found = [(entry.row, entry.part, entry.check) for entry in self._buffer]
            if found == [tuple(entry) for entry in place["buffer"]]:
                return True
        raise ValueError(
            f"the source does not give the same rows as before: of {counted(len(held), 'buffered sample')} "
            f"{sum(f not in found for f in map(tuple, place['buffer']))} differ; use the same data and shuffle "
            "with the same seed"
        )

    def _source(self, begin: tuple[int, Any] | None, checksum: int) -> SourceRows:
        recipe, shard = self._recipe, (self._index, self._num_shards)
        number = self.number_of_pass
        return SourceRows(recipe.source, number, shard, recipe.num_ranks, begin, checksum)

    def take_bad_rows(self) -> list[BadRow]:
        """The bad rows before the shard's position that were not returned before; `place` counts them."""
        return self._errors.take(self._next[0])

    def place(self) -> dict[str, Any]:
        """The shard's state, for JSON."""
        assert self._rows is not None
        oldest = self._buffer[0].row if self._buffer else self._next[0]
        return {
            "pass": self.number_of_pass,
            "rows": self._rows.checksum,
            "next": self._next,
            "buffer": [(entry.row, entry.part, entry.check) for entry in self._buffer],
            "tokens": self._tokens,
            "cost": self._cost,
            "packs": self._num_packs,
            "entered": self.num_entered,
            "rows before": self._num_rows,
            "errors": self._errors.state(self._num_rows + self._rows.num_own(self._next[0])),
            "source": self._rows.snapshot(oldest),
        }

    def packs(self) -> Iterator[list[EncodedSample]]:
        """Yield the samples of each pack until the pass ends."""
        while True:
            self._fill(self._recipe.buffer)
            if not self._buffer:
                return
            chosen = self._choose()
            samples = [self._buffer[place].sample for place in chosen]
            taken = set(chosen)
            self._buffer = [e for place, e in enumerate(self._buffer) if place not in taken]
            self._num_packs += 1
            if not self._buffer:  # bad rows at the end of the pass belong to its last pack
                self._fill(1)
            yield samples

    def _fill(self, size: int) -> None:
        """Let samples enter until the buffer has `size`, or the pass ends."""
        for entry in islice(self._entries, size - len(self._buffer)):
            self._buffer.append(entry)
            self._next = (entry.row, entry.part + 1)
            self.num_entered += 1
            self._tokens += entry.sizes[0]
            self._cost += entry.sizes[1]
        if len(self._buffer) < size:
            self._next = max(self._next, (self._last_row + 1, 0))

    def _choose(self) -> list[int]:
        is_ending = len(self._buffer) < self._recipe.buffer
        tokens, cost, patches = np.array([e.sizes for e in self._buffer], dtype=np.int64).T
        limits = (self._recipe.capacity, self._recipe.patch_capacity or np.iinfo(np.int64).max >> 1)
        seed = zlib.crc32(repr((self._recipe.seed, self._index, self.number_of_pass)).encode())
        keys = hashed(
            [(e.row << 16) + e.part for e in self._buffer], (seed << 32) + self._num_packs
        )
        return choose(tokens, cost, patches, limits, (self._tokens, self._cost), keys, is_ending)

    def _read(self, held: set[tuple[int, int]], begin: tuple[int, int]) -> Iterator[_Entry]:
        """Samples that fit a pack: those in `held`, then all from `begin` on."""
        assert self._rows is not None
        self._last_row = -1
        wanted = self._wanted(self._rows, {row for row, _ in held}, begin[0])
        last, part = -1, 0
        for group in chunks(self._encoded(wanted), _CHUNK):
            fitting = []
            for number, sample in group:
                last, part = number, part if number == last else 0
                for piece in self._fitted(number, sample):
                    if (number, part) >= begin or (number, part) in held:
                        fitting.append((number, part, piece))
                    part += 1
            samples = [piece for _, _, piece in fitting]
            tokens = [sample.num_tokens for sample in samples]
            config = self._recipe.cost
            costs = tokens if config is None or not samples else costs_of(samples, config).tolist()
            for (number, place, piece), size, cost in zip(fitting, tokens, costs):
                yield _Entry(number, place, piece, (size, cost, piece.num_patches))

    def _wanted(self, rows: SourceRows, held: set[int], first: int) -> Iterator[tuple[int, Any]]:
        """The rows `held`, and all from `first` on."""
        for number, item in rows:
            self._last_row = number
            if number >= first or number in held:
                self._errors.saw(number)
                yield number, item

    def _encoded(self, rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, EncodedSample]]:
        encoder = self._recipe.encoder
        for chunk in chunks(rows, _CHUNK):
            samples: list[tuple[int, Sample]] = []
            for number, item in chunk:
                if isinstance(item, EncodedSample):
                    yield number, item
                    continue
                if encoder is None:
                    raise ValueError(
                        "rows and samples need an encoder; pass an Encoder or a processor as encoder"
                    )
                found = [item] if isinstance(item, Sample) else self._samples(number, item)
                samples += [(number, sample) for sample in found]
            if encoder is not None:
                yield from self._encode(encoder, samples, dict(chunk))

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
            content = None if isinstance(items[number], Sample) else items[number]
            self._errors.leave_out(number, replace(bad, content=content))
        yield from ((samples[place][0], sample) for place, sample in encoded.items())

    def _samples(self, number: int, row: Any) -> list[Sample]:
        try:
            samples = self._reader.samples(Row("the stream", number, row))
            log_unread("the stream", self._reader.unread, self._told)
            return samples
        except RowError as error:
            bad = BadRow("the stream", number, error.error, error.advice, row)
            self._errors.leave_out(number, bad)
            return []

    def _fitted(self, number: int, sample: EncodedSample) -> list[EncodedSample]:
        """The parts of the sample to pack: the sample, truncated, split, or nothing."""
        recipe = self._recipe
        limits = (recipe.capacity, recipe.patch_capacity)
        name = f"row {number} of the stream has {sample.num_tokens:,} tokens and "
        name += f"{sample.num_patches:,} patches, too many for a pack"
        if recipe.on_overflow == "error":
            if overflow.is_too_long(sample.num_tokens, sample.num_patches, *limits):
                raise ValueError(f"{name}; {overflow.TOO_LONG_ADVICE}")
            return [sample]
        try:
            fitting = overflow.fit_sample(sample, *limits, recipe.on_overflow)
        except RowError as error:
            self._errors.leave_out(number, BadRow("the stream", number, error.error, error.advice))
            return []
        if not fitting:
            _log.warning("dropped: %s", name)
        elif recipe.on_overflow == "truncate" and fitting[0] is not sample:
            _log.warning("cut: %s; %s tokens of it are kept", name, f"{fitting[0].num_tokens:,}")
        return fitting
