"""What a stock Trainer does not do for a stream: its shards, and its state in the checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments

from mmpack.hf.checkpoint_files import KEY, STREAM_FILE, checkpoint_folder
from mmpack.hf.compat import base_loader, take_whole
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.packing.stream import PackStream


class StreamKeeper:
    """`PackingCallback`'s part for a `PackStream`: `stream` is told what a rank has consumed."""

    def __init__(self, stream: PackStream) -> None:
        self.stream = stream
        self._ranks = 1
        self._is_compared = False
        self._places: dict[tuple[int, int], MmpackDict] = {}  # since it was last looked at
        self._rank = 0

    def prepare(self, args: TrainingArguments) -> PackStream:
        """Give the rank its part. The state replaces Trainer's way to resume, which is to make all
        packs again and throw them away.

        Raises:
            ValueError: accelerate would cut batches apart.
        """
        if args.accelerator_config.dispatch_batches is not False:
            raise ValueError(
                "accelerate cuts the batches of a stream apart; pass "
                'TrainingArguments(accelerator_config={"dispatch_batches": False})'
            )
        args.ignore_data_skip = True
        self._ranks = args.world_size
        self._rank = args.process_index
        self.stream.shard(args.process_index, args.world_size).endless = True
        return self.stream

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, dataloader: Any) -> None:
        """Load the state of a resumed run, and keep accelerate from sharding what is sharded.

        Raises:
            ValueError: the checkpoint has no state of the stream.
        """
        shard: Any = getattr(dataloader, "dataset", None)
        if args.world_size > 1 and shard is not self.stream:
            # accelerate's IterableDatasetShard, which leaves out every other rank's share
            if getattr(shard, "dataset", None) is not self.stream:
                raise ValueError(
                    "the training data set is not the stream PackingCallback was given"
                )
            take_whole(shard)
        # A DataLoader that begins takes a number from torch's generator; a resumed run begins one more.
        base_loader(dataloader).generator = torch.Generator().manual_seed(args.seed)
        if not state.global_step:
            return
        ranks = state.stateful_callbacks.get(KEY, {}).get("ranks", args.world_size)
        if ranks != args.world_size:
            raise ValueError(
                f"the stream's state is of {ranks} ranks, there are {args.world_size}: rows are dealt to ranks, "
                f"which hold some hundred each; resume on {ranks}, or pack a data set that can be indexed"
            )
        path = self._path(args, state)
        if path.exists():
            self.stream.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        elif not self.stream.state_dict()["consumed"]:
            raise ValueError(
                f"{path} is not there, so where the stream stood is not known; resume from this "
                "output_dir, or load the state yourself: stream.load_state_dict(...)"
            )

    def on_epoch_begin(self, state: TrainerState) -> None:
        """Leave in the state how many ranks' files belong to a checkpoint."""
        state.stateful_callbacks[KEY] = {"ranks": self._ranks, "is a stream": True}

    def consume(self, batches: Iterable[MmpackDict]) -> None:
        """Note the batches of a step; after the first one, compare what the ranks read.

        Raises:
            ValueError: workers or ranks read other rows than each other.
        """
        for batch in batches:
            if "resume" in batch:
                self.stream.consume(batch["resume"])
        if self._ranks > 1 and not self._is_compared:
            self.stream.check_ranks()
        self._is_compared = True

    def note_place(self, step: int, batch: int, pack: MmpackDict) -> None:
        """Keep where a batch of a step comes from until the loss was looked at."""
        self._places[step, batch] = pack

    def forget_places(self) -> None:
        """It was looked at."""
        self._places.clear()

    def place_of(self, step: int, batch: int | None, rank: int | None) -> str:
        """Where a step's packs come from, in words, as far as this rank knows."""
        if batch is None or rank is None:
            return "it is not known in which pack"
        place = self._places.get((step, batch))
        if rank != self._rank or place is None or "resume" not in place:
            return f"a pack of rank {rank}, whose message has its place"
        found = json.loads(place["resume"])
        return (
            f"pack {found['packs'] - 1} of pass {found['pass']}, of rows before {found['next'][0]}; "
            f"rank {rank}, worker {found['worker']}"
        )

    def on_save(self, args: TrainingArguments, state: TrainerState) -> None:
        path = self._path(args, state)
        path.parent.mkdir(parents=True, exist_ok=True)  # on another machine than rank 0's
        written = path.with_suffix(".tmp")
        written.write_text(json.dumps(self.stream.state_dict()), encoding="utf-8")
        written.replace(path)

    def _path(self, args: TrainingArguments, state: TrainerState) -> Path:
        return checkpoint_folder(args, state) / STREAM_FILE.format(rank=args.process_index)
