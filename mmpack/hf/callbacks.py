"""PackingCallback: epochs, resuming, checks and log values that a stock Trainer lacks for packs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mmpack.families import FAMILIES
from mmpack.hf.attention_share import AttentionShare, chosen_layers
from mmpack.hf.batch_hook import BatchHook
from mmpack.hf.checkpoint_files import STREAM_FILE, begin_writing, checkpoint_folder, write_list
from mmpack.hf.checkpoints import PackKeeper, WeightKeeper, check_checkpoint, check_unfinished
from mmpack.hf.compat import callbacks_of, has_scaler
from mmpack.hf.context_ranks import ALONE, check_known, count_once, join_group, seen_in_group
from mmpack.hf.divergence import DivergenceWatch, LastCallback
from mmpack.hf.evaluation import Evaluation
from mmpack.hf.fit import check_fit
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.hf.model_parts import find_inner
from mmpack.hf.rank_choice import agree_on_ops
from mmpack.hf.stream_state import StreamKeeper
from mmpack.hf.throughput import PackCounter, TrainedCosts
from mmpack.hf.trainer_checks import (
    check_arguments,
    check_collator,
    check_evaluation,
    check_trainer,
    tell_batch_size,
    tell_unseen,
    tell_weights,
)
from mmpack.hf.weight_count import WeightCount
from mmpack.packing.dataset import PackedDataset
from mmpack.packing.even_packs import EvenPacks
from mmpack.packing.stream import PackStream

_log = logging.getLogger(__name__)


class PackingCallback(TrainerCallback):
    """Connects a packed data set or stream to a stock Trainer: `PackingCallback(dataset).attach(trainer)`.

    - Trains on a new plan every epoch and on equally many packs on every rank: in Trainer, an `EvenPacks` with
      empty packs at its end replaces the data set. accelerate would repeat packs from the start instead.
    - Sets the epoch where every DataLoader worker reads it; accelerate's `set_epoch` does not reach persistent
      workers.
    - Resumes with the packs that would have come next and with the checkpoint's weights
      (`mmpack.hf.checkpoints`) and ops, which are the same on all ranks (`mmpack.hf.rank_choice`).
    - Ends a run whose loss, gradients or weights are not finite, naming the step and its rows, before anything
      is logged or saved (`mmpack.hf.divergence`). Disables `logging_nan_inf_filter`, which hides such losses.
    - Refuses data that was encoded for another model (token ids, patches, normalization).
    - Lists a checkpoint's files and sizes last, so that incomplete ones are detected
      (`mmpack.hf.checkpoint_files`).
    - Makes `eval_loss` the mean over all supervised tokens (`mmpack.hf.evaluation`).
    - Gives ranks that share packs (`patch_model(context=...)`) the same ones (`mmpack.hf.context_ranks`).
    - Divides the loss by the sum of its weights (`mmpack.hf.weight_count`); Trainer counts labels.
    - Adds `pack/` values to the log beside the loss: utilization, tokens/s, imbalance, TFLOP/s, MFU, attention
      to images, the loss of each source. "What the log says" in docs/trainer.md defines them.

    It does not synchronize with the device and draws no random numbers; ranks communicate only when they log or
    save, and to compare packs that they share. A compiled model stays one graph, but where attention is recorded.

    A `PackStream` is sharded over ranks and repeated until `max_steps`; Trainer's epochs do not apply. Checkpoints
    hold each rank's position, as of the last optimizer step, in `mmpack_stream_RANK.json`.

    `Trainer(callbacks=[PackingCallback(dataset)])` also works, with a warning: reporters get no `pack/` values
    (the console and `log_history` do), logs and checkpoints that a later callback requests are not checked for
    divergence, and empty packs are appended to `dataset` itself.

    Args:
        dataset: the training data.
        attention_every: record `pack/image_attention` every this many optimizer steps, for the next log; None:
            never. Needs a patched model.
        attention_layers: text layers to record, from 0; by default the middle and the last one.

    Raises:
        ValueError: `attention_every` is below 1. When training begins: the model is not patched or lacks a layer,
            the data was encoded for another model, or the checkpoint to resume from is incomplete, finished, or
            has other packs or weights. During training: the run has diverged.
    """

    def __init__(
        self,
        dataset: PackedDataset | PackStream,
        *,
        attention_every: int | None = None,
        attention_layers: Sequence[int] | None = None,
    ) -> None:
        if attention_every is not None and attention_every < 1:
            raise ValueError(f"attention_every must be positive, got {attention_every}")
        if attention_every is None and attention_layers is not None:
            raise ValueError("attention_layers does not apply without attention_every; pass both")
        self.dataset = dataset
        self.attention_every = attention_every
        self.attention_layers = attention_layers
        self._stream: StreamKeeper | None = None
        self._data: StreamKeeper | PackKeeper
        if isinstance(dataset, PackStream):
            self._data = self._stream = StreamKeeper(dataset)
        else:
            self._data = PackKeeper(dataset)
        self._weights: WeightKeeper | None = None
        self._waiting: list[MmpackDict] = []  # a stream's batches in the current step
        self._hooks: list[Any] = []
        self._batches = BatchHook()
        self._trainer: Trainer | None = None  # the one it is attached to
        self._last = LastCallback(self._before_saving)
        self._divergence = DivergenceWatch(self._data)
        self._evaluation: Evaluation | None = None
        self._group = ALONE  # the ranks that share packs with this one

    def __repr__(self) -> str:
        return f"PackingCallback({self.dataset!r})"

    def attach(self, trainer: Trainer) -> PackingCallback:
        """Add the callback to a Trainer before it trains; returns the callback.

        If `trainer.train_dataset` is the callback's data set, an `EvenPacks` replaces it; if it wraps the data
        set, the empty packs are appended to the data set itself.

        Raises:
            ValueError: the Trainer already has a `PackingCallback`, or see the class.
        """
        if any(isinstance(one, PackingCallback) for one in callbacks_of(trainer)):
            raise ValueError(
                "the Trainer already has a PackingCallback; attach one, and pass none in "
                "Trainer(callbacks=[...])"
            )
        check_trainer(trainer, self.dataset)
        WeightCount(trainer)
        self._group = join_group(trainer, self.dataset, self.attention_every is not None)
        even = self._prepare(trainer.args, trainer.model)
        if self._evaluation is not None:
            self._evaluation.tell(trainer.eval_dataset)
        check_evaluation(trainer.eval_dataset, trainer.args)
        if trainer.train_dataset is self.dataset:
            trainer.train_dataset = even
        elif isinstance(even, EvenPacks):
            even.dataset.append_empty_packs(even.multiple)
        self._trainer = trainer
        self._take_places()
        return self

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Trainer calls this only for its `callbacks` argument, so the callback is not attached."""
        even = self._prepare(args, model)
        if isinstance(even, EvenPacks):
            even.dataset.append_empty_packs(even.multiple)
        if args.should_log:
            _log.warning(
                "PackingCallback in Trainer(callbacks=[...]) runs after the reporters, which get no pack/ values, "
                "and appended empty packs to the data set; use PackingCallback(dataset).attach(trainer)"
            )

    def _prepare(self, args: TrainingArguments, model: nn.Module | None) -> EvenPacks | PackStream:
        """Set the arguments that Trainer reads when it trains; returns the data to train on."""
        check_arguments(args)
        args.logging_nan_inf_filter = False
        if args.should_log:
            size, capacity = args.train_batch_size, self.dataset.capacity
            tell_batch_size("per_device_train_batch_size", size, capacity)
        if model is not None:
            self._evaluation = Evaluation(model, args)
        if isinstance(model, PreTrainedModel):  # PEFT adapters have their own files
            self._weights = WeightKeeper(model)
        return self._data.prepare(args, self._group)

    def _take_places(self) -> None:
        """Put the callback first in Trainer's list, before reporters, and `LastCallback` last, after all others
        have requested logs, evaluations and checkpoints."""
        if self._trainer is not None:
            callbacks = callbacks_of(self._trainer)
            others = [one for one in callbacks if one not in (self, self._last)]
            callbacks[:] = [self, *others, self._last]

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        loader: Any = kwargs.get("train_dataloader")
        check_collator(getattr(loader, "collate_fn", None), model)
        check_known(model, self._group)
        if args.should_log:
            tell_weights(model)
        if state.global_step and checkpoint_folder(args, state).is_dir():
            # the stream checks for its own file
            own = "" if self._stream is None else STREAM_FILE.format(rank=args.process_index)
            check_checkpoint(checkpoint_folder(args, state), own)
        self._data.on_train_begin(args, state, loader)
        self._waiting.clear()
        if state.global_step:
            if self._weights is not None:
                self._weights.check(model)
            check_unfinished(state)
        agree_on_ops(model, args, state, self.dataset.capacity)
        self._take_places()
        self._remove_hooks()
        base = find_inner(model)
        share = None
        if self.attention_every is not None:
            share = AttentionShare(chosen_layers(model, base, self.attention_layers))
        is_costed = base is not None and base.config.model_type in FAMILIES
        if is_costed and isinstance(self.dataset, PackedDataset):
            check_fit(base, self.dataset)
        costs = TrainedCosts(model, base) if is_costed else None
        self._batches.begin(PackCounter(costs, share, self._group.size))
        self._hooks = [
            model.register_forward_pre_hook(self._batches, with_kwargs=True, prepend=True),
            self._divergence.begin(model, args),
        ]

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._remove_hooks()
        if self._stream is not None:
            seen = seen_in_group(self._batches.counter.losses.seen, self._group)
            tell_unseen(self.dataset.source_weights, seen)
        if (
            self._weights is not None
            and args.load_best_model_at_end
            and state.best_model_checkpoint
        ):
            assert model is not None
            self._weights.check(model)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._data.on_epoch_begin(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        every = self.attention_every
        self._batches.is_watched = every is not None and (state.global_step + 1) % every == 0
        self._batches.is_in_step = True
        self._divergence.begin_step()
        self._batches.counter.begin_step()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._divergence.note_batches(self._batches.packs, state.global_step + 1)
        self._count()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        if not has_scaler(optimizer):
            self._divergence.note_gradients(model, state.global_step + 1)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._batches.is_in_step = False
        self._divergence.note_batches(self._batches.packs, state.global_step)
        self._divergence.end_step()
        self._count()
        self._batches.counter.end_step()
        if self._stream is not None:
            self._stream.consume(self._waiting)
            self._waiting.clear()
        if self._trainer is None:
            self._before_saving(args, state, control, model)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self._trainer is None:
            self._before_saving(args, state, control, model)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._trainer is not None:
            check_trainer(self._trainer, self.dataset)
        if self._evaluation is not None:
            self._evaluation.count(eval_dataloader)

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if self._evaluation is not None:
            self._evaluation.correct(metrics)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._batches.counter.pause()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._stream is not None:
            self._stream.on_save(args, state)
        write_list(checkpoint_folder(args, state), args.should_save)
        self._batches.counter.pause()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None:
            return
        count_once(self._group, logs, *state.log_history[-1:])
        if self._evaluation is not None:
            self._evaluation.correct(logs, *state.log_history[-1:])
        if "loss" not in logs or not self._batches.counter.num_batches:
            return  # the log of an evaluation or the summary, or no pack was counted
        capacity = self.dataset.capacity * state.train_batch_size  # every batch is full
        values = self._batches.counter.pop(capacity, self._data.left_out(), args.device)
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)  # Trainer copies the log before it calls callbacks

    def _before_saving(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any
    ) -> None:
        """End a diverged run before it logs, evaluates or saves, which all ranks do in the same step.

        Raises:
            DivergedError: the run has diverged.
        """
        is_last = control.should_save or control.should_training_stop
        if is_last or control.should_log or control.should_evaluate:
            self._divergence.check(model if is_last else None, state.global_step)
        if control.should_save and args.should_save:
            begin_writing(checkpoint_folder(args, state))

    def _count(self) -> None:
        """Count the batches that the hook kept."""
        if self._stream is not None:
            self._waiting += self._batches.packs
        self._batches.counter.count(self._batches.packs)
        self._batches.packs.clear()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
