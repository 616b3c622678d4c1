"""PackCallback: what a stock Trainer does not tell a packed data set."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmpack.dataset import PackedDataset


class PackCallback(TrainerCallback):
    """Other packs every epoch, and as many on every rank: `Trainer(callbacks=[PackCallback(train)])`.

    - At Trainer's construction the data set is padded with empty packs to a multiple of the ranks
      times the packs of a batch. Else accelerate repeats packs of the epoch's start, which are then
      trained on twice.
    - At an epoch's start its number is written where every worker reads it. accelerate calls
      `set_epoch` only where a sampler does not have one, and workers that live on
      (`dataloader_persistent_workers`) never hear of it.

    Without the callback training is right on one process, with the same packs every epoch.
    """

    def __init__(self, dataset: PackedDataset) -> None:
        self.dataset = dataset

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.dataset.pad_to(args.world_size * args.train_batch_size)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A run resumed within an epoch begins with its fraction; a finished one is a whole number.
        self.dataset.set_epoch(int((state.epoch or 0.0) + 1e-6))
