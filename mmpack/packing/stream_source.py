"""The rows that a stream reads: of every source all of them, in every worker and rank.

`PackStream` deals rows by their number, so every worker of every rank must count the same rows. Many sources
give a DataLoader worker a part instead (a `datasets` stream inside a generator, WebDataset, torch's own
recipe). They ask torch which worker they are in, as late as for a row: while they run, torch answers that there
are no workers. The rank has too many names to be hidden (variables of launchers, torch.distributed, a list that
was cut before), and hiding it in the process that trains would hide it from training. So `checksum` says
which rows came first, and `PackStream` compares it between workers and between ranks.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch.utils.data._utils.worker as torch_worker

_FIRST = 16  # rows in the checksum: no more than are read before the first pack is made
_SNAPSHOT = 64  # rows between two states of a source that has them
# Parts of a `datasets` stream that give the same rows whatever files they read. Others (take, skip, interleave)
# count rows: with a part of the files they choose other rows.
_BY_ROW = {
    "ExamplesIterable",
    "ArrowExamplesIterable",
    "RebatchedArrowExamplesIterable",
    "SelectColumnsIterable",
    "VerticallyConcatenatedMultiSourcesExamplesIterable",
    "MappedExamplesIterable",
    "FilteredExamplesIterable",
    "BufferShuffledExamplesIterable",
    "RepeatExamplesIterable",
    "FormattedExamplesIterable",
    "ShuffledDataSourcesExamplesIterable",  # of datasets 4
    "ShuffledDataSourcesArrowExamplesIterable",
}


@contextmanager
def no_workers() -> Iterator[None]:
    """While this is open, torch says that the process is no DataLoader worker.

    It sets the one variable that `get_worker_info` reads, under whatever name a source has imported the
    function. It must not be open across a `yield`: who gets the value has to know its worker.
    """
    info = torch_worker._worker_info
    torch_worker._worker_info = None
    try:
        yield
    finally:
        torch_worker._worker_info = info


class SourceRows:
    """One pass of a shard over its source; iterating gives (number, row) of the shard's own rows.

    Args:
        source: what `PackStream` was given.
        number_of_pass: for sources that have `set_epoch`.
        shard: (index of the shard, how many there are).
        num_ranks: how many ranks the shards belong to.
        begin: (rows read before, state of the source there), or None for the start of the pass. Only
            a `datasets.IterableDataset` has states.
        checksum: of the first rows, where `begin` says that they have been read before.

    Attributes:
        checksum: of the first rows of the source, equal in every shard and rank. Where a
            `datasets.IterableDataset` gives each shard files of its own, of what shuffles them.
    """

    def __init__(
        self,
        source: Any,
        number_of_pass: int,
        shard: tuple[int, int],
        num_ranks: int,
        begin: tuple[int, Any] | None = None,
        checksum: int = 0,
    ) -> None:
        self._source, self._number_of_pass, self._num_ranks = source, number_of_pass, num_ranks
        self._own, self._of = shard
        self._begin = begin
        self._snapshots = [] if begin is None else [begin]
        self.checksum = checksum

    def snapshot(self, row: int) -> tuple[int, Any] | None:
        """The last state of the source before `row`; those before it are forgotten."""
        usable = [snapshot for snapshot in self._snapshots if snapshot[0] <= row]
        self._snapshots = [*usable[-1:], *self._snapshots[len(usable) :]]
        return usable[-1] if usable else None

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        with no_workers():
            rows, state = self._open()
        start = 0 if self._begin is None else self._begin[0]
        for number, row in enumerate(_read(rows), start):
            if number < _FIRST and not self._has_own_files:
                self.checksum = zlib.crc32(_text(row), self.checksum)
            if number % self._of == self._own:
                yield number, row
            if state is not None and (number + 1) % _SNAPSHOT == 0:
                with no_workers():
                    self._snapshots.append((number + 1, state()))

    def _open(self) -> tuple[Iterator[Any], Callable[[], Any] | None]:
        """(rows from `begin` on, what gives the source's state or None)."""
        source = self._source() if callable(self._source) else self._source
        if hasattr(source, "set_epoch"):
            source.set_epoch(self._number_of_pass)
        self._has_own_files = False
        if not (hasattr(source, "num_shards") and hasattr(source, "iter")):
            return iter(source), None
        # a datasets.IterableDataset
        part = getattr(source, "_distributed", None)  # what split_dataset_by_node leaves
        if part is not None and part.world_size > 1 and self._num_ranks > 1:
            raise ValueError(
                f"the source is the part of rank {part.rank} of {part.world_size}, and the stream would "
                f"deal that part to {self._num_ranks} ranks; leave split_dataset_by_node out"
            )
        parts = list(_parts(getattr(source, "_ex_iterable", None)))
        is_dealt_by_file = part is None and all(map(_is_by_row, parts))
        self._has_own_files = is_dealt_by_file and source.num_shards >= self._of
        if self._has_own_files:  # without a seed, each rank shuffles them differently
            states = [repr(p.generator.bit_generator.state) for p in parts if _is_shuffled(p)]
            self.checksum = zlib.crc32(_text([source.num_shards, *states]))
        source = source.shard(*((self._of, self._own) if self._has_own_files else (1, 0)))
        if self._has_own_files:
            self._own, self._of = 0, 1
        source.set_epoch(self._number_of_pass)  # `shard` made a new one, whose state is its own
        if self._begin is not None:
            source.load_state_dict(self._begin[1])
        rows = ({k: v[0] for k, v in batch.items()} for batch in source.iter(batch_size=1))
        return rows, source.state_dict


def _read(rows: Iterator[Any]) -> Iterator[Any]:
    """The rows; torch knows its workers again whenever one is given."""
    while True:
        with no_workers():
            try:
                row = next(rows)
            except StopIteration:
                return
        yield row


def _parts(examples: Any) -> Iterator[Any]:
    """What a `datasets` stream is made of."""
    yield examples
    inner = [getattr(examples, "ex_iterable", None), *getattr(examples, "ex_iterables", [])]
    for part in inner:
        if part is not None:
            yield from _parts(part)


def _is_by_row(part: Any) -> bool:
    counts = getattr(part, "with_indices", False) or getattr(part, "drop_last_batch", False)
    return type(part).__name__ in _BY_ROW and not counts


def _is_shuffled(part: Any) -> bool:
    return isinstance(getattr(part, "generator", None), np.random.Generator)


def _text(row: Any) -> bytes:
    """What a row says, the same in every process."""
    try:
        return json.dumps(row, skipkeys=True, default=_plain).encode()
    except (ValueError, RecursionError):  # contains itself, or is too deep: the reader will say so
        return b""


def _plain(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return zlib.crc32(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return zlib.crc32(value.tobytes())
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return type(value).__name__
