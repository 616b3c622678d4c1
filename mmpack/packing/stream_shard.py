"""One worker's part of a `PackStream`: the buffer, and the choice of packs from it.

In a mixture, the next sample comes from the source that has the fewest tokens per weight so far. So after every
sample, each source's tokens are within one longest row of its share, and packs follow, up to what waits in the
buffer. A source that ends begins another pass.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from mmpack.errors import BadRow, counted
from mmpack.packing.stream_rows import Entry, Recipe, SourceReader
from mmpack.packing.stream_select import choose, hashed


class Shard:
    """A worker's part of a stream.

    Attributes:
        number_of_pass: the pass it is in; 0 in a mixture, whose sources have passes of their own.
        num_entered: samples that entered the buffer in this pass.
    """

    def __init__(self, recipe: Recipe, index: int, num_shards: int) -> None:
        self._recipe, self._index = recipe, index
        numbers = range(len(recipe.sources))
        self._readers = [SourceReader(recipe, number, (index, num_shards)) for number in numbers]
        self._is_mixture = bool(recipe.sources[0].name)
        self._tokens = self._cost = 0  # sums over all samples so far, in all passes
        self._drawn = [0] * len(recipe.sources)  # tokens of each source

    def begin(self, number_of_pass: int, place: dict[str, Any] | None) -> bool:
        """Go to the start of a pass, or to a state in it."""
        self.number_of_pass = number_of_pass
        self.num_entered = self._num_packs = 0
        self._buffer: list[Entry] = []
        if place is None:
            for reader in self._readers:
                reader.begin(number_of_pass)
            return True
        self._tokens, self._cost = place["tokens"], place["cost"]
        self._drawn = list(place["drawn"])  # the state stays as it is
        self._num_packs, self.num_entered = place["packs"], place["entered"]
        held = [tuple(entry) for entry in place["buffer"]]
        found: dict[tuple[int, ...], Entry] = {}
        for number, (reader, state) in enumerate(zip(self._readers, place["sources"])):
            entries = reader.resume(state, [one for one in held if one[0] == number])
            found |= {entry.key: entry for entry in entries}
        missing = sum(one not in found for one in held)
        if missing:
            raise ValueError(
                f"the source does not give the same rows as before: of {counted(len(held), 'buffered sample')} "
                f"{missing} differ; use the same data and shuffle with the same seed"
            )
        self._buffer = [found[one] for one in held]
        return True

    def take_bad_rows(self) -> list[tuple[int, BadRow]]:
        """(pass, bad row) of those before the shard's position that were not returned before; `place` counts
        them."""
        return [bad for reader in self._readers for bad in reader.take_bad_rows()]

    def place(self) -> dict[str, Any]:
        """The shard's state, for JSON."""
        states = []
        for number, reader in enumerate(self._readers):
            key = (number, reader.number_of_pass)
            rows = [one.row for one in self._buffer if (one.source, one.number_of_pass) == key]
            states.append(reader.state(rows[0] if rows else reader.position[0]))
        return {
            "pass": self.number_of_pass,
            "buffer": [entry.key for entry in self._buffer],
            "tokens": self._tokens,
            "cost": self._cost,
            "drawn": list(self._drawn),
            "packs": self._num_packs,
            "entered": self.num_entered,
            "sources": states,
        }

    def packs(self) -> Iterator[list[Entry]]:
        """Yield the entries of each pack until the pass ends; those of a mixture do not end."""
        while True:
            self._fill(self._recipe.buffer)
            if not self._buffer:
                return
            chosen = self._choose()
            entries = [self._buffer[place] for place in chosen]
            taken = set(chosen)
            self._buffer = [e for place, e in enumerate(self._buffer) if place not in taken]
            self._num_packs += 1
            if not self._buffer:  # bad rows at the end of the pass belong to its last pack
                self._fill(1)
            yield entries

    def _fill(self, size: int) -> None:
        """Let samples enter until the buffer has `size`, or the pass ends."""
        while len(self._buffer) < size:
            number = self._number_of_next()
            reader = self._readers[number]
            entry = reader.next_entry()
            if entry is None and not self._is_mixture:
                return
            if entry is None:
                self._begin_again(reader)
                continue
            self._buffer.append(entry)
            self.num_entered += 1
            self._tokens += entry.sizes[0]
            self._cost += entry.sizes[1]
            self._drawn[number] += entry.sizes[0]

    def _number_of_next(self) -> int:
        """The source that has the fewest tokens per weight so far."""
        sources = self._recipe.sources
        return min(range(len(sources)), key=lambda n: (self._drawn[n] / sources[n].weight, n))

    def _begin_again(self, reader: SourceReader) -> None:
        if not reader.num_entries:
            if reader.number_of_pass and isinstance(reader.one.source, Iterator):
                raise ValueError(
                    f"the source {reader.one.name!r} of the mixture is an iterator, which has ended and cannot "
                    "begin again; pass a list, a data set, or a function that returns one"
                )
            raise ValueError(
                f"the source {reader.one.name!r} of the mixture gives this worker no samples in a pass; every "
                "worker of every rank needs some, so use fewer, leave the source out, or pack it "
                "(PackedDataset.mixed)"
            )
        reader.begin(reader.number_of_pass + 1)

    def _choose(self) -> list[int]:
        is_ending = len(self._buffer) < self._recipe.buffer
        tokens, cost, patches = np.array([e.sizes for e in self._buffer], dtype=np.int64).T
        limits = (self._recipe.capacity, self._recipe.patch_capacity or np.iinfo(np.int64).max >> 1)
        seed = zlib.crc32(repr((self._recipe.seed, self._index, self.number_of_pass)).encode())
        keys = hashed([_number(entry) for entry in self._buffer], (seed << 32) + self._num_packs)
        return choose(tokens, cost, patches, limits, (self._tokens, self._cost), keys, is_ending)


def _number(entry: Entry) -> int:
    """A number of an entry, for its hash; of a stream that is no mixture, of row and part."""
    mixed = (entry.source << 56) + (entry.number_of_pass << 48 if entry.source else 0)
    return (mixed + (entry.row << 16) + entry.part) % 2**64
