"""PackStream: packs of a source that is read once, larger than memory or disk.

A buffer of some hundred encoded samples (ids and image references, no pixels) is refilled as samples
leave it, and each pack is chosen from it (`mmpack.packing.stream_select`): as many samples come in as go out, so no
pack waits for a window to fill. What comes out is a pure function of the source's order, `buffer`,
the capacities and `seed`, on every shard; where it stands is a few hundred row numbers.

Workers are ahead of the step that consumes their packs, so a stream cannot know where training is. Each
pack carries where its shard stands after it, `PackSamples.resume`, and `consume` makes that the state.
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
from mmpack.data.readers import RowReader
from mmpack.errors import BadRow, RowError, Skip, counting, refuse
from mmpack.packing.cost import costs_of
from mmpack.packing.overflow import OnOverflow, fit_sample, is_too_long
from mmpack.packing.pack_samples import PackSamples
from mmpack.packing.pack_source import PackSource
from mmpack.packing.stream_select import choose, hashed
from mmpack.packing.stream_source import SourceRows
from mmpack.types import EncodedSample, Sample

_CHUNK = 16  # rows encoded in one call: small, so that no pack waits for many
_ADVICE = (
    "rows are dealt by their number, so some would be lost and others come twice; the source must "
    "give every worker of every rank all rows in one order: leave its own split out "
    "(WebDataset: nodesplitter=None), seed its shuffle, open files when it is iterated"
)
_log = logging.getLogger(__name__)


class PackStream(PackSource, IterableDataset[PackSamples]):
    """Packs of a source, in the order it gives rows: an item is the samples of one, for `PackCollator`.

    Under Trainer: `Trainer(train_dataset=stream, ...)` and `PackingCallback(stream).attach(trainer)`, with
    `TrainingArguments(max_steps=..., accelerator_config={"dispatch_batches": False})`; the callback
    gives every rank its shard, passes over the source without end, and keeps the stream's state in
    the checkpoints. Elsewhere, in a `DataLoader` say, pass each consumed batch's `resume` to `consume`.

    Args:
        source: an iterable of rows as `Encoder.read` takes them, of `Sample`s (`lambda:
            encoder.read(path)`) or of `EncodedSample`s; or a function that returns one. A
            `datasets.IterableDataset` is one. An iterator can be passed over once.
        encoder: an `Encoder`, or a transformers Qwen-VL processor; None for `EncodedSample`s. Rows that its
            `on_error` skips are counted by each worker.
        capacity: tokens a pack may hold.
        cost: the config of the model to train: packs then cost the same, as far as the buffer allows.
        buffer: samples to choose from.
        patch_capacity: vision patches a pack may hold.
        on_overflow: what becomes of a sample longer than a pack: "error"; "drop" it with a warning in
            the log; "truncate"; "split", for documents.
        seed: decides between samples where several would do.

    Attributes:
        on_bad_image, max_bad, media_folders: as of `PackedDataset`; `media_folders` is the encoder's `media_dir`
            where that is given.
        endless: begin another pass over the source where one ends; `PackingCallback` sets it.

    Raises:
        ValueError: options that make no sense; from a worker too, a row that cannot be used.
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
        on_overflow: OnOverflow = "error",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if capacity < 1 or buffer < 1 or (patch_capacity is not None and patch_capacity < 1):
            raise ValueError(
                f"capacity, patch_capacity and buffer must be positive, got {capacity}, "
                f"{patch_capacity} and {buffer}"
            )
        if on_overflow not in ("error", "drop", "truncate", "split"):
            raise ValueError(
                f"on_overflow must be 'error', 'drop', 'truncate' or 'split', got {on_overflow!r}"
            )
        self.source, self.capacity, self.buffer, self.seed = source, capacity, buffer, seed
        self.patch_capacity, self.on_overflow = patch_capacity, on_overflow
        self._config = cost
        self._encoder = None if encoder is None else Encoder.of(encoder, cost)
        if self._encoder is not None:
            how = self._encoder.on_error
            if isinstance(how, list) or (isinstance(how, Skip) and how.into is not None):
                raise ValueError(
                    "the rows of a stream are read in workers, and a list of bad rows stays there; "
                    "on_error='skip' warns of each"
                )
            (self._group,) = self._encoder.groups(iter(()))  # where images of rows may lie
            if self._encoder.media_dir is not None:
                self._media = self._group.folders
        self.endless = False
        self._rank, self._world = 0, 1
        self._first_pass = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._workers, self._next = 0, 0
        self._consumed: dict[int, dict[str, Any]] = {}  # by worker, as one process counts them

    def shard(self, rank: int, num_ranks: int) -> PackStream:
        """Give this process its part of the source; returns the stream.

        Rows are dealt in turn to the workers of all ranks, each of which reads them all; of a
        `datasets.IterableDataset` with enough shards each worker reads some. The source must not split
        itself by rank, see `check_ranks`; by worker it may, it is not told of workers.
        """
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must be from 0 to {num_ranks - 1}, got {rank}")
        self._rank, self._world = rank, num_ranks
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass over the source that the next iteration begins with. An endless stream
        counts passes itself."""
        if not self.endless:
            self._first_pass[0] = epoch

    def consume(self, resume: bytes) -> None:
        """Note that a step has consumed the pack, or the batch, that carried this.

        Raises:
            ValueError: a worker read other rows than another one.
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
        """Compare what the ranks read, of `torch.distributed`'s default group; all of them call it, once
        each has consumed a batch. `PackingCallback` does after the first step.

        Raises:
            ValueError: a rank reads other rows than another one, on all ranks.
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
        """Where training is, in this rank's part: row numbers and sums, as JSON holds them."""
        return {
            "made of": self._settings(),
            "workers": self._workers,
            "next": self._next,
            "consumed": {str(worker): place for worker, place in self._consumed.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken, with a source that gives the same rows again, an
        equal stream and as many ranks and workers; the next iteration does.

        Raises:
            ValueError: another stream's state. While iterating: another number of workers, or rows that
                are not those of then.
        """
        now, then = self._settings(), state["made of"]
        changed = [name for name in now if now[name] != then.get(name)]
        if changed:
            words = ", ".join(f"{name} was {then.get(name)} and is {now[name]}" for name in changed)
            raise ValueError(f"the state is of another stream: {words}")
        self._workers, self._next = state["workers"], state["next"]
        self._consumed = {int(worker): place for worker, place in state["consumed"].items()}

    def _settings(self) -> dict[str, Any]:
        names = ("capacity", "patch_capacity", "buffer", "on_overflow", "seed")
        costed = self._config is not None
        settings = {name: getattr(self, name) for name in names}
        return {**settings, "cost": costed, "rank": self._rank, "ranks": self._world}

    def __iter__(self) -> Iterator[PackSamples]:
        info = get_worker_info()
        number, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None:  # threads of the tokenizer's would be missing in a fork, and it hangs
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if self._consumed and workers != self._workers:
            raise ValueError(
                f"the state was saved with {self._workers} workers, there are {workers}; only as many "
                "continue identically"
            )
        # DataLoader asks worker 0 first; that is to be the worker whose turn it was.
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
    """A sample in the buffer: the `part`th of a row."""

    row: int
    part: int
    sample: EncodedSample
    sizes: tuple[int, int, int]  # tokens, cost, patches

    @property
    def check(self) -> int:
        return zlib.crc32(self.sample.input_ids.tobytes())


class _Shard:
    """One pass of one worker over its rows: the buffer, and what chooses from it."""

    def __init__(self, stream: PackStream, index: int, num_shards: int) -> None:
        self._stream = stream
        self._index, self._num_shards = index, num_shards
        self._tokens = self._cost = 0  # of all samples so far, in every pass
        self._encoder = stream._encoder
        if self._encoder is not None:
            self._reader = RowReader(self._encoder, stream._group)
            self._on_error = counting(self._encoder.on_error)

    def begin(self, number_of_pass: int, place: dict[str, Any] | None) -> bool:
        """Stand at the start of a pass, or at a place in it."""
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
            f"the source does not give the rows it gave before: of {len(held)} samples that waited for "
            f"their pack {sum(f not in found for f in map(tuple, place['buffer']))} are others now; a "
            "shuffle must be the same again"
        )

    def _source(self, begin: tuple[int, Any] | None, checksum: int) -> SourceRows:
        stream, shard = self._stream, (self._index, self._num_shards)
        return SourceRows(stream.source, self.number_of_pass, shard, stream._world, begin, checksum)

    def place(self) -> dict[str, Any]:
        """Where the shard stands, as JSON holds it."""
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
        """The samples of pack after pack, until the pass is over."""
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
        """Samples that fit: those held, then all from `begin` on."""
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
                    raise ValueError("rows and samples need an Encoder, or a processor")
                if isinstance(self._on_error, Skip):
                    self._on_error.saw("reading")
                found = [item] if isinstance(item, Sample) else self._samples(number, item)
                samples += [(number, sample) for sample in found]
            if self._encoder is not None:
                encoded = self._encoder.encode_chunk([s for _, s in samples], self._on_error)
                yield from ((samples[place][0], sample) for place, sample in encoded)

    def _samples(self, number: int, row: Any) -> list[Sample]:
        try:
            return self._reader.samples(Row("the stream", number, row))
        except RowError as error:
            refuse(BadRow("the stream", number, error.error, error.advice, row), self._on_error)
            return []

    def _fitted(self, number: int, sample: EncodedSample) -> list[EncodedSample]:
        """The sample as it can be packed: itself, cut, in pieces, or nothing."""
        stream = self._stream
        limits = (stream.capacity, stream.patch_capacity)
        name = f"row {number} of the stream has {sample.num_tokens:,} tokens and "
        name += f"{sample.num_patches:,} patches, too many for a pack"
        if stream.on_overflow == "error":
            if is_too_long(sample.num_tokens, sample.num_patches, *limits):
                raise ValueError(
                    f"{name}; raise the capacity, or choose to drop, truncate or split"
                )
            return [sample]
        try:
            fitting = fit_sample(sample, *limits, stream.on_overflow)
        except RowError as error:
            raise ValueError(f"row {number} of the stream: {error}") from None
        if not fitting:
            _log.warning("dropped: %s", name)
        return fitting
