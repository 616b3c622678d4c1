"""A stream in a stock Trainer: shards it over ranks, and saves and restores its state in checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments

from mmpack.errors import counted
from mmpack.hf.checkpoint_files import KEY, STREAM_FILE, checkpoint_folder
from mmpack.hf.checkpoints import reduction_of
from mmpack.hf.compat import base_loader, take_whole
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.packing.context_group import ContextGroup
from mmpack.packing.stream import PackStream


class StreamKeeper:
    """`PackingCallback`'s part for a `PackStream`: tells it which packs this rank has consumed."""

    def __init__(self, stream: PackStream) -> None:
        self.stream = stream
        self._ranks, self._group = 1, ContextGroup(0, 1)
        self._is_compared = False
        self._places: dict[tuple[int, int], MmpackDict] = {}  # since the last check
        self._rank = 0
        self._reduction: str | None = None

    def prepare(self, args: TrainingArguments, group: ContextGroup) -> PackStream:
        """Shard the stream over groups of ranks that share packs, and disable Trainer's way of resuming, which
        assembles and discards all earlier packs.

        Raises:
            ValueError: accelerate would split batches.
        """
        if args.accelerator_config.dispatch_batches is not False:
            raise ValueError(
                "accelerate would split the batches of a stream; pass "
                'TrainingArguments(accelerator_config={"dispatch_batches": False})'
            )
        args.ignore_data_skip = True
        self._ranks, self._group = args.world_size, group
        self._rank = args.process_index
        self.stream.shard(self._rank // group.size, self._ranks // group.size).endless = True
        if group.rank:
            self.stream.bad_rows_file = None  # its group's first rank lists them
        elif self.stream.bad_rows_file is None and args.output_dir is not None:
            self.stream.bad_rows_file = Path(args.output_dir) / "bad_rows.jsonl"
        return self.stream

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, dataloader: Any) -> None:
        """Load the state of a resumed run, and keep accelerate from sharding the stream again.

        Raises:
            ValueError: the checkpoint has no state of the stream.
        """
        shard: Any = getattr(dataloader, "dataset", None)
        if args.world_size > 1 and shard is not self.stream:
            # accelerate's IterableDatasetShard, which drops the other ranks' shares
            if getattr(shard, "dataset", None) is not self.stream:
                raise ValueError(
                    "Trainer's train_dataset is not the stream passed to PackingCallback; pass the same one"
                )
            take_whole(shard)
        # A new DataLoader iterator draws a number from torch's generator, and a resumed run starts one more.
        self._reduction = reduction_of(dataloader)
        base_loader(dataloader).generator = torch.Generator().manual_seed(args.seed)
        if not state.global_step:
            return
        then = state.stateful_callbacks.get(KEY, {})
        before = then.get("loss reduction", self._reduction)
        if before != self._reduction:
            raise ValueError(
                f"the checkpoint was trained with loss_reduction {before!r}, this run has {self._reduction!r}; "
                "use the same, or start from its weights (mmpack train --model, from_pretrained) instead of "
                "resuming"
            )
        ranks, size = then.get("ranks", args.world_size), then.get("context size", 1)
        groups = args.world_size // self._group.size
        if ranks // size != groups:
            unit = "rank" if size == self._group.size == 1 else "group"
            raise ValueError(
                f"the stream's state was saved on {counted(ranks // size, unit)}, this run has {groups}, and "
                f"every {unit} buffers rows of its own; resume on {ranks // size}, or use a PackedDataset"
            )
        rank = args.process_index
        if size != self._group.size:  # one of the ranks that had this group's rows
            rank = rank // self._group.size * size
        path = checkpoint_folder(args, state) / STREAM_FILE.format(rank=rank)
        if path.exists():
            self.stream.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        elif not self.stream.state_dict()["consumed"]:
            raise ValueError(
                f"{path} is missing, so the stream's position is unknown; resume with the same output_dir, or "
                "load the state yourself: stream.load_state_dict(...)"
            )

    def on_epoch_begin(self, state: TrainerState) -> None:
        """Record in the state how many ranks save their position, and the loss."""
        state.stateful_callbacks[KEY] = {
            "ranks": self._ranks,
            "context size": self._group.size,
            "is a stream": True,
            "loss reduction": self._reduction,
        }

    def consume(self, batches: Iterable[MmpackDict]) -> None:
        """Record the batches of a step as consumed; after the first step, compare what the ranks read.

        Raises:
            ValueError: workers or ranks read different rows.
        """
        for batch in batches:
            if "resume" in batch:
                self.stream.consume(batch["resume"])
        if self._ranks > 1 and not self._is_compared:
            self.stream.check_ranks()
        self._is_compared = True

    def note_place(self, step: int, batch: int, pack: MmpackDict) -> None:
        """Keep the origin of a step's batch until the loss is checked."""
        self._places[step, batch] = pack

    def forget_places(self) -> None:
        """Forget the origins; the loss was checked."""
        self._places.clear()

    def place_of(self, step: int, batch: int | None, rank: int | None) -> str:
        """The origin of a step's packs in words, as far as this rank knows it."""
        if batch is None or rank is None:
            return "in an unknown pack"
        place = self._places.get((step, batch))
        if rank != self._rank or place is None or "resume" not in place:
            return f"a pack of rank {rank}; see that rank's message"
        found = json.loads(place["resume"])
        rows = " and ".join(str(one["next"][0]) for one in found["sources"])
        return (
            f"pack {found['packs'] - 1} of pass {found['pass']}, from rows before {rows}; rank {rank}, worker "
            f"{found['worker']}"
        )

    def left_out(self) -> dict[str, int]:
        """What this rank has left out so far, for the log."""
        stream = self.stream
        return {"dropped_segments": stream.num_dropped_segments, "bad_rows": stream.num_bad_rows}

    def on_save(self, args: TrainingArguments, state: TrainerState) -> None:
        path = checkpoint_folder(args, state) / STREAM_FILE.format(rank=args.process_index)
        path.parent.mkdir(parents=True, exist_ok=True)  # each machine may have its own disk
        written = path.with_suffix(".tmp")
        written.write_text(json.dumps(self.stream.state_dict()), encoding="utf-8")
        written.replace(path)
