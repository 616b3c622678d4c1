"""PackStream: packs from a source that is read once and may be larger than memory or disk.

A buffer of a few hundred encoded samples (ids and image references, no pixels) is refilled as samples leave it,
and each pack is chosen from it (`mmpack.packing.stream_shard`). Samples enter as others leave, so no pack waits
for a window to fill. On each shard, the packs depend only on the source's order, `buffer`, the capacities and
`seed`; the state is a few hundred row numbers.

Workers run ahead of the step that consumes their packs, so a stream does not know how far training is. Each pack
carries its shard's state after it, `PackSamples.resume`, and `consume` makes that the stream's state.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from mmpack.errors import (
    BadRow,
    OnError,
    Skip,
    check_on_error,
    count_reason,
    counted,
    counting,
    integer,
    pack_limits,
)
from mmpack.packing import overflow
from mmpack.packing.left_out import BadRowFile, as_line
from mmpack.packing.loss_weights import MIX_MARK
from mmpack.packing.pack_samples import PackSamples
from mmpack.packing.pack_source import PackSource
from mmpack.packing.row_sources import on_error_of, row_sources
from mmpack.packing.stream_rows import Recipe
from mmpack.packing.stream_shard import Shard
from mmpack.vision_spec import VisionSpec

_log = logging.getLogger(__name__)
_ADVICE = (
    "rows are dealt by number, so some would be lost and others repeated; the source must give every "
    "worker of every rank all rows in one order: remove its own split (WebDataset: nodesplitter=None), "
    "seed its shuffle, open files when it is iterated"
)
_STATE = (
    "made of",
    "workers",
    "next",
    "consumed",
    "images",
)  # what a state has; of a worker; of a source
_PLACE = ("pass", "buffer", "tokens", "cost", "drawn", "packs", "entered", "sources")
_SOURCE = ("pass", "rows", "next", "entries", "rows before", "errors", "source")


class PackStream(PackSource, IterableDataset[PackSamples]):
    """Packs of a source, in the source's order: an item is the samples of one pack, for `PackCollator`.

    Under Trainer: `Trainer(train_dataset=stream, ...)` and `PackingCallback(stream).attach(trainer)`, with
    `TrainingArguments(max_steps=..., accelerator_config={"dispatch_batches": False})`. The callback assigns each
    rank its shard, repeats the source endlessly, and keeps the stream's state in checkpoints. Elsewhere, for
    example with a `DataLoader`, pass each consumed batch's `resume` to `consume`.

    Args:
        source: an iterable of rows as in `Encoder.read` (such as a `datasets.IterableDataset`), of `Sample`s or of
            `EncodedSample`s; or a function that returns one (`lambda: encoder.read(path)`). An iterator only lasts
            for one pass. Or paths of data files (`"shards/train-{000..123}.tar"`), as in `Encoder.read`: with at
            least as many files as workers of all ranks, each reads only its own. A mixture is a dict, name ->
            (source, weight): weights are shares of tokens, a source that ends begins again, and the stream has no
            end.
        encoder: an `Encoder`, or a transformers Qwen-VL processor; None for `EncodedSample`s. Of a mixture also a
            dict, name -> encoder, so that each source has its own stage.
        capacity: maximum tokens per pack.
        cost: the config of the model to train; packs then cost the same, as far as the buffer allows.
        buffer: number of samples to choose from.
        patch_capacity: maximum vision patches per pack.
        on_overflow: what to do with a sample longer than a pack: "error"; "drop" or "truncate" it with
            a warning in the log; "split" (documents only).
        seed: decides between samples that fit equally well.
        on_error: what to do with a row that cannot be used; by default what the encoder's `on_error` says; if
            those of a mixture's encoders differ, it must be given. "raise" ends the stream. "skip" (or a `Skip`)
            leaves the row out, up to a share of a worker's rows. A list: without a limit; bad rows are appended to
            it. A tar file that is cut off or damaged is one bad row, after its good ones. A list gets rows, and
            `bad_rows_file` too, as their pack is made in this process, or, if it is made in a `DataLoader` worker,
            when it is consumed (`consume`).

    Attributes:
        on_bad_image, max_bad, media_folders, source_weights: as in `PackedDataset`; `media_folders` is the
            encoder's `media_dir`, if given, and with data files as in `mmpack pack`; in a mixture, each source has
            its own.
        bad_rows_file: a file that lists rows left out by `on_error` and `on_bad_image`, one per line of JSON; a
            resumed run lists each once. With several ranks, each has its own, with `-RANK-of-RANKS` in its name.
            None: no file; `PackingCallback` then sets `bad_rows.jsonl` in Trainer's `output_dir`.
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
        on_error: OnError | None = None,
    ) -> None:
        super().__init__()
        capacity, patch_capacity = pack_limits(capacity, patch_capacity)
        buffer, seed = integer(buffer, "buffer"), integer(seed, "seed")
        if capacity < 1 or buffer < 1 or (patch_capacity is not None and patch_capacity < 1):
            raise ValueError(
                f"capacity, patch_capacity and buffer must be positive, got {capacity}, "
                f"{patch_capacity} and {buffer}"
            )
        overflow.check_choice(on_overflow)
        self.source, self.capacity, self.buffer, self.seed = source, capacity, buffer, seed
        self.patch_capacity, self.on_overflow = patch_capacity, on_overflow
        self._config = cost
        self._row_sources = row_sources(source, encoder, cost, on_overflow)
        encoders = [one.encoder for one in self._row_sources if one.encoder is not None]
        if on_error is None:
            on_error = on_error_of(self._row_sources)
        has_folders = any(one.media_dir is not None for one in encoders)
        if has_folders or any(one.has_files for one in self._row_sources):
            folders = {
                one.name: None
                if one.group is None or not (has_folders or one.has_files)
                else one.group.folders
                for one in self._row_sources
            }
            if "" in folders:  # no mixture
                self._media = folders[""]
            else:
                self._media_of = folders
        check_on_error(on_error or "raise")
        self.on_error: OnError = "raise" if on_error is None else counting(on_error)
        self.bad_rows_file: str | os.PathLike[str] | None = None
        self._file: BadRowFile | None = None
        self._images = [0, 0, 0]  # samples consumed, those with images or videos, those dropped
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
        split itself by rank, see `check_ranks`. It may split itself by worker; it is not shown any workers. Ranks
        that share packs (`ContextGroup`) get one part: `shard(rank // size, num_ranks // size)`.
        """
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must be from 0 to {num_ranks - 1}, got {rank}")
        self._rank, self._world = rank, num_ranks
        return self

    @property
    def vision(self) -> VisionSpec | None:
        """The spec that rows are encoded with; None: the source holds encoded samples."""
        encoder = self._row_sources[0].encoder  # a mixture's have the same spec
        return None if encoder is None else encoder.vision

    @property
    def num_bad_rows(self) -> int:
        """Rows that `on_error` left out of this rank's part, up to the packs consumed so far, in all passes and
        also before the run was resumed."""
        sources = [one for place in self._consumed.values() for one in place["sources"]]
        return sum(sum(one["errors"]["reasons"].values()) for one in sources)

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass over the source with which the next iteration begins. An endless stream counts passes
        itself."""
        if not self.endless:
            self._first_pass[0] = integer(epoch, "epoch")

    def consume(self, resume: bytes) -> None:
        """Record that a step has consumed the pack or batch that carried this state.

        Raises:
            ValueError: two workers read different rows.
        """
        place = json.loads(resume)
        self._list(place.pop("left out", ()))
        images = zip(self._images, place.pop("images", (0, 0, 0)))
        self._images = [before + new for before, new in images]
        self._workers = place.pop("workers")
        worker = place.pop("worker")
        for other, seen in self._consumed.items():
            both = [
                ({a["rows"], b["rows"]} - {None}, a["pass"] == b["pass"])
                for a, b in zip(seen["sources"], place["sources"])
            ]
            if any(is_same_pass and len(rows) > 1 for rows, is_same_pass in both):
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
        ranks: list[dict[tuple[int, int], int]] = [{}] * dist.get_world_size()
        places = [enumerate(place["sources"]) for place in self._consumed.values()]
        own = {
            (n, one["pass"]): one["rows"]
            for place in places
            for n, one in place
            if one["rows"] is not None
        }
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
            "images": self._images,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration continue from a state. The source must give the same rows, and the stream's
        settings and the numbers of ranks and workers must be the same.

        Raises:
            ValueError: the state is from another stream or has another format. While iterating: the number of
                workers or the rows differ.
        """
        _check_format(state)
        now, then = self._settings(), state["made of"]
        changed = [name for name in {**now, **then} if now.get(name) != then.get(name)]
        if changed:
            words = ", ".join(f"{n} was {then.get(n)} and is {now.get(n)}" for n in changed)
            raise ValueError(f"the state is from another stream: {words}")
        self._workers, self._next = state["workers"], state["next"]
        self._consumed = {int(worker): place for worker, place in state["consumed"].items()}
        self._images = state["images"]
        self._dropped.restore(self._images)

    def _sources(self) -> Iterable[str] | None:
        return [f"{one.name}{MIX_MARK}" for one in self._row_sources if one.name] or None

    def _settings(self) -> dict[str, Any]:
        names = ("capacity", "patch_capacity", "buffer", "on_overflow", "seed", "source_weights")
        costed = self._config is not None
        settings = {name: getattr(self, name) for name in names}
        # In their order, by which the state has them; as JSON has it.
        mixture = [[one.name, float(one.weight)] for one in self._row_sources if one.name]
        own = {"mixture": mixture, "cost": costed, "rank": self._rank, "ranks": self._world}
        return {**settings, **own}

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
        shard = Shard(self._recipe(), self._rank * workers + worker, self._world * workers)
        while shard.begin(first if place is None else place["pass"], place):
            for entries in shard.packs():
                bad_rows = shard.take_bad_rows()
                resume = {"worker": worker, "workers": workers, **shard.place()}
                if bad_rows:
                    left_out = [as_line(bad, number) for number, bad in bad_rows]
                    if info is None:
                        self._list(left_out, [bad for _, bad in bad_rows])
                    else:  # the process that trains lists them
                        resume["left out"] = left_out
                samples = [one.sample for one in entries]
                passes = [one.number_of_pass for one in entries]
                yield self._item(samples, json.dumps(resume).encode(), passes)
            if alone := shard.take_bad_rows():  # the pass had no pack that could carry them
                if info is None:
                    lines = [as_line(bad, number) for number, bad in alone]
                    self._list(lines, [bad for _, bad in alone])
                else:
                    _log.warning(
                        "worker %d left out all of its rows, %s, and has no pack to list them with; the first: %s",
                        number,
                        f"{len(alone):,}",
                        alone[0][1],
                    )
            first, place = shard.number_of_pass + 1, None
            if not (self.endless and shard.num_entered):
                return

    def _recipe(self) -> Recipe:
        return Recipe(
            sources=self._row_sources,
            on_error=self.on_error,
            cost=self._config,
            capacity=self.capacity,
            patch_capacity=self.patch_capacity,
            buffer=self.buffer,
            on_overflow=self.on_overflow,
            seed=self.seed,
            num_ranks=self._world,
        )

    def _list(self, lines: Sequence[dict[str, Any]], bad_rows: Sequence[BadRow] = ()) -> None:
        """List rows that were left out, in the list and the file. `bad_rows`: the same rows with their
        contents."""
        names = ("source", "row", "error", "advice", "content")
        rows = bad_rows or [BadRow(**{name: line[name] for name in names}) for line in lines]
        into = self.on_error.into if isinstance(self.on_error, Skip) else self.on_error
        if isinstance(into, list):
            into.extend(rows)
        if isinstance(self.on_error, Skip):
            self.on_error.num_bad += len(rows)
            for bad in rows:
                count_reason(self.on_error.reasons, bad.error)
        if lines and self.bad_rows_file is not None:
            path = Path(self.bad_rows_file)
            if self._world > 1:
                part = f"-{self._rank:05d}-of-{self._world:05d}"
                path = path.with_name(path.stem + part + path.suffix)
            if self._file is None or self._file.path != path:
                self._file = BadRowFile(path)
            self._file.write(lines)


def _check_format(state: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: something is missing in a state.
    """
    lacks = [name for name in _STATE if name not in state]
    for place in () if lacks else state["consumed"].values():
        lacks = lacks or [name for name in _PLACE if name not in place]
        for source in () if lacks else place["sources"]:
            lacks = lacks or [name for name in _SOURCE if name not in source]
    if lacks:
        raise ValueError(
            f"the state is of another version of mmpack, or no stream's: it lacks {', '.join(map(repr, lacks))}; "
            "continue with the version that saved it, or start from the checkpoint's weights"
        )
