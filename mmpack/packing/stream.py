"""PackStream: packs from a source that is read once and may be larger than memory or disk.

A buffer of a few hundred encoded samples (ids and image references, no pixels) is refilled as samples leave it,
and each pack is chosen from it (`mmpack.packing.stream_select`). Samples enter as others leave, so no pack waits
for a window to fill. On each shard, the packs depend only on the source's order, `buffer`, the capacities and
`seed`; the state is a few hundred row numbers.

Workers run ahead of the step that consumes their packs, so a stream does not know how far training is. Each pack
carries its shard's state after it, `PackSamples.resume`, and `consume` makes that the stream's state.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from mmpack.data.chunks import chunks
from mmpack.data.encoder import Encoder
from mmpack.data.file_formats import Row
from mmpack.data.readers import RowReader, log_unread
from mmpack.errors import BadRow, RowError, Skip, counted, counting, refuse
from mmpack.packing import overflow
from mmpack.packing.cost import costs_of
from mmpack.packing.pack_samples import PackSamples
from mmpack.packing.pack_source import PackSource
from mmpack.packing.stream_select import choose, hashed
from mmpack.packing.stream_source import SourceRows
from mmpack.types import EncodedSample, Sample

_CHUNK = 16  # rows encoded in one call; small, so that a pack waits for few
_ADVICE = (
    "rows are dealt by number, so some would be lost and others repeated; the source must give every "
    "worker of every rank all rows in one order: remove its own split (WebDataset: nodesplitter=None), "
    "seed its shuffle, open files when it is iterated"
)
_log = logging.getLogger(__name__)


class PackStream(PackSource, IterableDataset[PackSamples]):
    """Packs of a source, in the source's order: an item is the samples of one pack, for `PackCollator`.

    Under Trainer: `Trainer(train_dataset=stream, ...)` and `PackingCallback(stream).attach(trainer)`, with
    `TrainingArguments(max_steps=..., accelerator_config={"dispatch_batches": False})`. The callback assigns each
    rank its shard, repeats the source endlessly, and keeps the stream's state in checkpoints. Elsewhere, for
    example with a `DataLoader`, pass each consumed batch's `resume` to `consume`.

    Args:
        source: an iterable of rows as in `Encoder.read` (such as a `datasets.IterableDataset`), of `Sample`s or of
            `EncodedSample`s; or a function that returns one (`lambda: encoder.read(path)`). An iterator only lasts
            for one pass.
        encoder: an `Encoder`, or a transformers Qwen-VL processor; None for `EncodedSample`s. Each worker counts
            the rows that `on_error` skips.
        capacity: maximum tokens per pack.
        cost: the config of the model to train; packs then cost the same, as far as the buffer allows.
        buffer: number of samples to choose from.
        patch_capacity: maximum vision patches per pack.
        on_overflow: what to do with a sample longer than a pack: "error"; "drop" or "truncate" it with
            a warning in the log; "split" (documents only).
        seed: decides between samples that fit equally well.

    Attributes:
        on_bad_image, max_bad, media_folders, source_weights: as in `PackedDataset`; `media_folders` is the encoder's
            `media_dir`, if given.
        endless: start another pass over the source when one ends; `PackingCallback` sets it.

    Raises:
        ValueError: an option is invalid; while iterating, also in workers: a row cannot be used.
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[], Iterable[Any]],
        encoder: Any,
        capacity: int,
        cost: Any = None,
        *,
        buffer: int = 200,
        patch_capacity: int | None = None,
        on_overflow: overflow.OnOverflow = "error",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if capacity < 1 or buffer < 1 or (patch_capacity is not None and patch_capacity < 1):
            raise ValueError(
                f"capacity, patch_capacity and buffer must be positive, got {capacity}, "
                f"{patch_capacity} and {buffer}"
            )
        overflow.check_choice(on_overflow)
        self.source, self.capacity, self.buffer, self.seed = source, capacity, buffer, seed
        self.patch_capacity, self.on_overflow = patch_capacity, on_overflow
        self._config = cost
        self._encoder = None if encoder is None else Encoder.of(encoder, cost)
        if self._encoder is not None:
            overflow.check_split(on_overflow, self._encoder.stage)
            how = self._encoder.on_error
            if isinstance(how, list) or (isinstance(how, Skip) and how.into is not None):
                raise ValueError(
                    "a stream's rows are read in workers, so on_error cannot collect bad rows in a list; use "
                    "on_error='skip', which warns of each"
                )
            (self._group,) = self._encoder.groups(iter(()))  # for its media folders
            if self._encoder.media_dir is not None:
                self._media = self._group.folders
        self.endless = False
        self._rank, self._world = 0, 1
        self._first_pass = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._workers, self._next = 0, 0
        self._consumed: dict[int, dict[str, Any]] = {}  # state by worker of this rank

    def __repr__(self) -> str:
        return f"PackStream(packs of {self.capacity:,} tokens, rank {self._rank} of {self._world})"

    def shard(self, rank: int, num_ranks: int) -> PackStream:
        """Assign this process its part of the source; returns the stream.

        Rows are dealt round-robin to the workers of all ranks, and each worker reads all rows; with a
        `datasets.IterableDataset` that has enough shards, each worker reads only its own. The source must not
        split itself by rank, see `check_ranks`. It may split itself by worker; it is not shown any workers.
        """
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must be from 0 to {num_ranks - 1}, got {rank}")
        self._rank, self._world = rank, num_ranks
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass over the source with which the next iteration begins. An endless stream counts passes
        itself."""
        if not self.endless:
            self._first_pass[0] = epoch

    def consume(self, resume: bytes) -> None:
        """Record that a step has consumed the pack or batch that carried this state.

        Raises:
            ValueError: two workers read different rows.
        """
        place = json.loads(resume)
        self._workers = place.pop("workers")
        worker = place.pop("worker")
        for other, seen in self._consumed.items():
            if seen["pass"] == place["pass"] and seen.get("rows", place["rows"]) != place["rows"]:
                raise ValueError(
                    f"worker {worker} reads other rows of the source than worker {other}: {_ADVICE}"
                )
        self._consumed[worker] = place
        self._next = (worker + 1) % self._workers

    def check_ranks(self) -> None:
        """Compare the rows read by the ranks of `torch.distributed`'s default group. All ranks must call it after
        each has consumed a batch; `PackingCallback` does after the first step.

        Raises:
            ValueError: two ranks read different rows; raised on all ranks.
        """
        ranks: list[dict[int, int]] = [{}] * dist.get_world_size()
        own = {place["pass"]: place["rows"] for place in self._consumed.values() if "rows" in place}
        dist.all_gather_object(ranks, own)
        for rank, seen in enumerate(ranks):
            for other, known in enumerate(ranks[:rank]):
                if any(known[n] != rows for n, rows in seen.items() if n in known):
                    raise ValueError(
                        f"rank {rank} reads other rows of the source than rank {other}: {_ADVICE}"
                    )

    def state_dict(self) -> dict[str, Any]:
        """The state of training in this rank's part: row numbers and sums, for JSON."""
        return {
            "made of": self._settings(),
            "workers": self._workers,
            "next": self._next,
            "consumed": {str(worker): place for worker, place in self._consumed.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration continue from a state. The source must give the same rows, and the stream's
        settings and the numbers of ranks and workers must be the same.

        Raises:
            ValueError: the state is from another stream. While iterating: the number of workers or the rows
                differ.
        """
        now, then = self._settings(), state["made of"]
        changed = [name for name in now if now[name] != then.get(name)]
        if changed:
            words = ", ".join(f"{name} was {then.get(name)} and is {now[name]}" for name in changed)
            raise ValueError(f"the state is from another stream: {words}")
        self._workers, self._next = state["workers"], state["next"]
        self._consumed = {int(worker): place for worker, place in state["consumed"].items()}

    def _settings(self) -> dict[str, Any]:
        names = ("capacity", "patch_capacity", "buffer", "on_overflow", "seed", "source_weights")
        costed = self._config is not None
        settings = {name: getattr(self, name) for name in names}
        return {**settings, "cost": costed, "rank": self._rank, "ranks": self._world}

    def __iter__(self) -> Iterator[PackSamples]:
        info = get_worker_info()
        number, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None:  # the tokenizer would hang in a fork, which lacks its threads
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if self._consumed and workers != self._workers:
            raise ValueError(
                f"the state was saved with {counted(self._workers, 'worker')}, there are {workers}; continue with "
                "the same number (dataloader_num_workers)"
            )
        # DataLoader takes its first batch from worker 0, which must be the next worker in the state.
        worker = (number + self._next) % workers if self._consumed else number
        place = self._consumed.get(worker)
        first = int(self._first_pass)
        if place is not None and place["pass"] < first:
            place = None
        shard = _Shard(self, self._rank * workers + worker, self._world * workers)
        while shard.begin(first if place is None else place["pass"], place):
            for samples in shard.packs():
                resume = json.dumps({"worker": worker, "workers": workers, **shard.place()})
                yield self._item(samples, resume.encode())
            first, place = shard.number_of_pass + 1, None
            if not (self.endless and shard.num_entered):
                return


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


class _Shard:
    """One worker's pass over its rows: the buffer, and the choice of packs from it."""

    def __init__(self, stream: PackStream, index: int, num_shards: int) -> None:
        self._stream = stream
        self._index, self._num_shards = index, num_shards
        self._tokens = self._cost = 0  # sums over all samples so far, in all passes
        self._encoder = stream._encoder
        if self._encoder is not None:
            self._reader = RowReader(self._encoder, stream._group)
            self._on_error = counting(self._encoder.on_error)
            self._told = set[str]()  # unread fields named in the log

    def begin(self, number_of_pass: int, place: dict[str, Any] | None) -> bool:
        """Go to the start of a pass, or to a state in it."""
        self.number_of_pass = number_of_pass
        self.num_entered = self._num_packs = 0
        self._buffer: list[_Entry] = []
        self._next = (0, 0)  # row and part that come next
        if place is None:
            self._rows = self._source(None, 0)
            self._entries = self._read(set(), (0, 0))
            return True
        self._tokens, self._cost = place["tokens"], place["cost"]
        self._num_packs, self.num_entered = place["packs"], place["entered"]
        self._next = (place["next"][0], place["next"][1])
        held = [(row, part) for row, part, _ in place["buffer"]]
        for snapshot in (place["source"], None) if place["source"] else (None,):
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
        stream, shard = self._stream, (self._index, self._num_shards)
        return SourceRows(stream.source, self.number_of_pass, shard, stream._world, begin, checksum)

    def place(self) -> dict[str, Any]:
        """The shard's state, for JSON."""
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
            "source": self._rows.snapshot(oldest),
        }

    def packs(self) -> Iterator[list[EncodedSample]]:
        """Yield the samples of each pack until the pass ends."""
        while True:
            for entry in islice(self._entries, self._stream.buffer - len(self._buffer)):
                self._buffer.append(entry)
                self._next = (entry.row, entry.part + 1)
                self.num_entered += 1
                self._tokens += entry.sizes[0]
                self._cost += entry.sizes[1]
            if not self._buffer:
                return
            chosen = self._choose()
            samples = [self._buffer[place].sample for place in chosen]
            taken = set(chosen)
            self._buffer = [e for place, e in enumerate(self._buffer) if place not in taken]
            self._num_packs += 1
            yield samples

    def _choose(self) -> list[int]:
        is_ending = len(self._buffer) < self._stream.buffer
        tokens, cost, patches = np.array([e.sizes for e in self._buffer], dtype=np.int64).T
        limits = (self._stream.capacity, self._stream.patch_capacity or np.iinfo(np.int64).max >> 1)
        seed = zlib.crc32(repr((self._stream.seed, self._index, self.number_of_pass)).encode())
        keys = hashed(
            [(e.row << 16) + e.part for e in self._buffer], (seed << 32) + self._num_packs
        )
        return choose(tokens, cost, patches, limits, (self._tokens, self._cost), keys, is_ending)

    def _read(self, held: set[tuple[int, int]], begin: tuple[int, int]) -> Iterator[_Entry]:
        """Samples that fit a pack: those in `held`, then all from `begin` on."""
        rows = {row for row, _ in held}
        wanted = ((n, item) for n, item in self._rows if n >= begin[0] or n in rows)
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
            config = self._stream._config
            costs = tokens if config is None or not samples else costs_of(samples, config).tolist()
            for (number, place, piece), size, cost in zip(fitting, tokens, costs):
                yield _Entry(number, place, piece, (size, cost, piece.num_patches))

    def _encoded(self, rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, EncodedSample]]:
        for chunk in chunks(rows, _CHUNK):
            samples: list[tuple[int, Sample]] = []
            for number, item in chunk:
                if isinstance(item, EncodedSample):
                    yield number, item
                    continue
                if self._encoder is None:
                    raise ValueError(
                        "rows and samples need an encoder; pass an Encoder or a processor as encoder"
                    )
                if isinstance(self._on_error, Skip):
                    self._on_error.saw("reading")
                found = [item] if isinstance(item, Sample) else self._samples(number, item)
                samples += [(number, sample) for sample in found]
            if self._encoder is not None:
                encoded = self._encoder.encode_chunk([s for _, s in samples], self._on_error)
                yield from ((samples[place][0], sample) for place, sample in encoded)

    def _samples(self, number: int, row: Any) -> list[Sample]:
        try:
            samples = self._reader.samples(Row("the stream", number, row))
            log_unread("the stream", self._reader.unread, self._told)
            return samples
        except RowError as error:
            refuse(BadRow("the stream", number, error.error, error.advice, row), self._on_error)
            return []

    def _fitted(self, number: int, sample: EncodedSample) -> list[EncodedSample]:
        """The parts of the sample to pack: the sample, truncated, split, or nothing."""
        stream = self._stream
        limits = (stream.capacity, stream.patch_capacity)
        name = f"row {number} of the stream has {sample.num_tokens:,} tokens and "
        name += f"{sample.num_patches:,} patches, too many for a pack"
        if stream.on_overflow == "error":
            if overflow.is_too_long(sample.num_tokens, sample.num_patches, *limits):
                raise ValueError(f"{name}; {overflow.TOO_LONG_ADVICE}")
            return [sample]
        try:
            fitting = overflow.fit_sample(sample, *limits, stream.on_overflow)
        except RowError as error:
            raise ValueError(f"row {number} of the stream: {error}") from None
        if not fitting:
            _log.warning("dropped: %s", name)
        elif stream.on_overflow == "truncate" and fitting[0] is not sample:
            _log.warning("cut: %s; %s tokens of it are kept", name, f"{fitting[0].num_tokens:,}")
        return fitting
