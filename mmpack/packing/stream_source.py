"""Reads a stream's source, so that every worker of every rank sees all rows.

`PackStream` deals rows by number, so every worker of every rank must count the same rows. Many sources give each
DataLoader worker only a part (a `datasets` stream inside a generator, WebDataset, torch's own recipe). They ask
torch for their worker, some of them for each row; while they run, torch answers that there are no workers. The
rank cannot be hidden: it has too many sources (launchers' variables, torch.distributed, lists cut earlier), and
hiding it would also hide it from training. So `checksum` identifies the first rows, and `PackStream` compares it
between workers and ranks.
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

from mmpack.packing.stream_files import DataFiles

_FIRST = 16  # rows in the checksum; at least this many are read before the first pack
_SNAPSHOT = 64  # rows between two saved states of a source that has states
# Stages of a `datasets` stream that can read a part of the files. Others (take, skip, interleave) count rows, so
# with a part of the files they would choose other rows.
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
    "ShuffledDataSourcesExamplesIterable",  # datasets 4
    "ShuffledDataSourcesArrowExamplesIterable",
}


@contextmanager
def no_workers() -> Iterator[None]:
    """Make torch report that this process is not a DataLoader worker.

    Sets the variable that `get_worker_info` reads, so it works for any name under which a source imported the
    function. It must not stay active across a `yield`: the consumer needs to know its worker.
    """
    info = torch_worker._worker_info
    torch_worker._worker_info = None
    try:
        yield
    finally:
        torch_worker._worker_info = info


class SourceRows:
    """One shard's pass over a source; iterating yields (row number, row) of the shard's own rows.

    Args:
        source: the `source` of `PackStream`.
        number_of_pass: for sources with `set_epoch`.
        shard: (index of the shard, number of shards).
        num_ranks: number of ranks.
        begin: (rows read before, the source's state at that point), or None for the start of the pass. Only a
            `datasets.IterableDataset` and `DataFiles` have states.
        checksum: checksum of the first rows, if `begin` is after them.
        max_bad: the share of the bytes of data files that may be lost to damage; None: any.

    Attributes:
        checksum: checksum of the source's first rows, equal in every shard and rank. If a
            `datasets.IterableDataset` gives each shard its own files, checksum of the shuffle state; of
            `DataFiles`, of names and sizes.
    """

    def __init__(
        self,
        source: Any,
        number_of_pass: int,
        shard: tuple[int, int],
        num_ranks: int,
        begin: tuple[int, Any] | None = None,
        checksum: int = 0,
        max_bad: float | None = None,
    ) -> None:
        self._source, self._number_of_pass, self._num_ranks = source, number_of_pass, num_ranks
        self._own, self._of = shard
        self._begin, self._max_bad = begin, max_bad
        self._snapshots = [] if begin is None else [begin]
        self.checksum = checksum

    def snapshot(self, row: int) -> tuple[int, Any] | None:
        """The last saved state at or before `row`; older states are discarded."""
        usable = [snapshot for snapshot in self._snapshots if snapshot[0] <= row]
        self._snapshots = [*usable[-1:], *self._snapshots[len(usable) :]]
        return usable[-1] if usable else None

    def num_own(self, before: int) -> int:
        """The number of the shard's own rows with a number below `before`."""
        return len(range(self._own, before, self._of))

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        with no_workers():
            rows, state = self._open()
        start = 0 if self._begin is None else self._begin[0]
        for number, row in enumerate(_read(rows), start):
            if number < _FIRST and self._sums_rows:
                self.checksum = zlib.crc32(_text(row), self.checksum)
            if number % self._of == self._own:
                yield number, row
            if state is not None and (number + 1) % _SNAPSHOT == 0:
                with no_workers():
                    self._snapshots.append((number + 1, state()))

    def _open(self) -> tuple[Iterator[Any], Callable[[], Any] | None]:
        """(rows from `begin` on, a function that returns the source's state, or None)."""
        source = self._source() if callable(self._source) else self._source
        if hasattr(source, "set_epoch"):
            source.set_epoch(self._number_of_pass)
        self._sums_rows = True
        if isinstance(source, DataFiles):
            self._sums_rows, self.checksum = False, source.checksum
            part = (0, 1)
            if len(source) >= self._of:
                part, self._own, self._of = (self._own, self._of), 0, 1
            files = source.rows(part, self._begin and self._begin[1], self._max_bad)
            return files, files.state
        if not (hasattr(source, "num_shards") and hasattr(source, "iter")):
            return iter(source), None
        # a datasets.IterableDataset
        split = getattr(source, "_distributed", None)  # set by split_dataset_by_node
        if split is not None and split.world_size > 1 and self._num_ranks > 1:
            raise ValueError(
                f"the source is already split for rank {split.rank} of {split.world_size}, and the stream would "
                f"deal that part to {self._num_ranks} ranks; remove split_dataset_by_node"
            )
        parts = list(_parts(getattr(source, "_ex_iterable", None)))
        is_dealt_by_file = split is None and all(map(_is_by_row, parts))
        self._sums_rows = not (is_dealt_by_file and source.num_shards >= self._of)
        if not self._sums_rows:  # without a seed, each rank shuffles them differently
            states = [repr(p.generator.bit_generator.state) for p in parts if _is_shuffled(p)]
            self.checksum = zlib.crc32(_text([source.num_shards, *states]))
        source = source.shard(*((1, 0) if self._sums_rows else (self._of, self._own)))
        if not self._sums_rows:
            self._own, self._of = 0, 1
        source.set_epoch(self._number_of_pass)  # `shard` returned a new source
        if self._begin is not None:
            source.load_state_dict(self._begin[1])
        rows = ({k: v[0] for k, v in batch.items()} for batch in source.iter(batch_size=1))
        return rows, source.state_dict


def _read(rows: Iterator[Any]) -> Iterator[Any]:
    """The rows, with torch's worker restored at each `yield`."""
    while True:
        with no_workers():
            try:
                row = next(rows)
            except StopIteration:
                return
        yield row


def _parts(examples: Any) -> Iterator[Any]:
    """All stages of a `datasets` stream."""
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
    """A row as bytes that are the same in every process."""
    try:
        return json.dumps(row, skipkeys=True, default=_plain).encode()
    except (ValueError, RecursionError):  # cyclic or too deep: the reader reports it
        return b""


def _plain(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return zlib.crc32(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return zlib.crc32(value.tobytes())
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return type(value).__name__
