"""PackingCallback: what a stock Trainer does not tell a packed data set, and what it does not log."""

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
from mmpack.hf.checkpoint_files import STREAM_FILE, begin_writing, checkpoint_folder, write_list
from mmpack.hf.checkpoints import PackKeeper, WeightKeeper, check_checkpoint, check_unfinished
from mmpack.hf.compat import callbacks_of, has_scaler
from mmpack.hf.divergence import DivergenceWatch, LastCallback
from mmpack.hf.evaluation import Evaluation
from mmpack.hf.fit import check_fit
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.hf.model_parts import find_inner
from mmpack.hf.stream_state import StreamKeeper
from mmpack.hf.throughput import PackCounter, TrainedCosts
from mmpack.packing.dataset import EvenPacks, PackedDataset
from mmpack.packing.stream import PackStream

_log = logging.getLogger(__name__)


class PackingCallback(TrainerCallback):
    """Other packs every epoch, as many on every rank, and what they do in the Trainer's log:
    `PackingCallback(dataset).attach(trainer)`, before it trains.

    `Trainer(callbacks=[PackingCallback(dataset)])` does the same but for this, of which it warns once: reporters,
    which Trainer calls before, get no `pack/` values (they are printed and in `log_history`); a log or checkpoint
    that a later callback asks for is not checked for divergence; empty packs are put into `dataset` itself.

    - Trainer trains on the data set with empty packs behind it, a multiple of the ranks times the packs of
      a batch (`mmpack.packing.dataset.EvenPacks` takes its place in Trainer; itself it stays as it is). Else
      accelerate repeats packs of the epoch's start, which are then trained on twice.
    - At an epoch's start its number is written where every worker reads it. accelerate calls
      `set_epoch` only where a sampler does not have one, and workers that live on
      (`dataloader_persistent_workers`) never hear of it.
    - A resumed run continues with the packs that would have come next, whose order is the plan's, and with
      the checkpoint's weights (`mmpack.hf.checkpoints`).
    - A run whose loss, gradients or weights are no numbers any more ends with an error that names the step
      and its rows, before it is logged or saved (`mmpack.hf.divergence`). `logging_nan_inf_filter`, which
      hides it and asks the device in every batch, is switched off.
    - Data of another model (token ids, patches, normalisation) is refused as training begins.
    - Where it saves, a list of the checkpoint's files and their sizes is written last, so that a torn one is
      told (`mmpack.hf.checkpoint_files`).
    - `eval_loss` is the mean over the supervised tokens of the whole set, whatever the packs, the batches and
      the ranks (`mmpack.hf.evaluation`); Trainer's is a mean over batches.
    - Where Trainer logs the loss, these stand beside it, over the steps since the last time and all ranks;
      printed, in `log_history` and in every reporter (TensorBoard, W&B):

    | name | unit | what |
    | --- | --- | --- |
    | `pack/utilization` | 0 to 1 | useful tokens over the capacity of the packs |
    | `pack/tokens_per_second` | tokens/s | useful tokens |
    | `pack/supervised_tokens_per_second` | tokens/s | tokens with a loss |
    | `pack/patches_per_second` | patches/s | useful patches into the vision tower |
    | `pack/flops_max_over_mean` | 1 or more | FLOPs of the busiest rank over the mean rank's, the steps' \
maxima summed over their means summed: at 1.25 ranks compute 80 % of the time, if that goes as FLOPs |
    | `pack/tflops` | 10^12 FLOP/s | a device's useful model FLOPs |
    | `pack/mfu` | 0 to 1 | that over the device's dense bf16 peak, where it is in `mmpack.hf.throughput` |
    | `pack/dropped_segments` | segments | left out so far because of bad images, where there were any |
    | `pack/image_attention/layer_N` | 0 to 1 | attention mass of supervised rows on the images before \
them, mean over heads and sampled rows (`mmpack.hf.attention_share`) |

    Useful is a segment with a supervised token: not what `PackCollator(pad_to=)` fills up and not an
    empty pack. FLOPs are `mmpack.packing.cost.sample_flops`'s: matrix products, no recomputation. A part of
    the model without a trained parameter counts as frozen; a language model that is trained through
    adapters (LoRA) counts no gradients of weights, a vision tower so trained is counted whole.
    Seconds are wall clock, waiting for data too, but without evaluation and saving.

    A step costs the callback some arithmetic on host integers that come with the batch, and one pass over
    the gradients: no question to the device, no random number. Ranks exchange a few numbers at logging and saving alone. A compiled
    model stays one graph, except in steps whose attention is looked at.

    Of a `PackStream` every rank gets its own part, which is passed over without end until `max_steps`
    (Trainer's epochs mean nothing here), and checkpoints hold where each rank stands, in
    `mmpack_stream_RANK.json`: `trainer.train(resume_from_checkpoint=True)` continues with the packs that
    would have come next. What is consumed is noted at the end of each optimizer step.

    Args:
        dataset: the training data.
        attention_every: log `pack/image_attention` from every so many optimizer steps' packs, at the
            next log; None: not at all. It needs a patched model.
        attention_layers: text layers to look at, from 0; by default the middle and the last one.

    Raises:
        ValueError: `attention_every` is below 1; as training begins: the model is not patched or has no
            such layers; the data is of another model; the run is resumed from a checkpoint that is not whole,
            of other packs or weights, or is finished; while it runs: it has diverged.
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
        self._waiting: list[MmpackDict] = []  # a stream's batches of a step that is not over
        self._hooks: list[Any] = []
        self._is_in_step = False
        self._is_watched = False
        self._packs: list[MmpackDict] = []
        self._counter = PackCounter()
        self._trainer: Trainer | None = None  # that it is attached to
        self._last = LastCallback(self._before_saving)
        self._divergence = DivergenceWatch(self._data)
        self._evaluation: Evaluation | None = None

    def attach(self, trainer: Trainer) -> PackingCallback:
        """Join the callbacks of a Trainer that has been made, before it trains; returns the callback.

        Where `trainer.train_dataset` is the callback's data set, an `EvenPacks` of it takes its place; where it is
        something around it, the data set itself gets the empty packs.

        Raises:
            ValueError: the Trainer has a `PackingCallback`; see the class.
        """
        if any(isinstance(one, PackingCallback) for one in callbacks_of(trainer)):
            raise ValueError(
                "the Trainer has a PackingCallback; attach one, and pass none in Trainer(callbacks=[...])"
            )
        even = self._prepare(trainer.args, trainer.model)
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
        """Called by Trainer for those of its `callbacks` alone, so the callback is not attached."""
        even = self._prepare(args, model)
        if isinstance(even, EvenPacks):
            even.dataset.append_empty_packs(even.multiple)
        if args.should_log:
            _log.warning(
                "PackingCallback in Trainer(callbacks=[...]) is called after the reporters, which get no pack/ values, "
                "and has put empty packs into the data set itself; PackingCallback(dataset).attach(trainer)"
            )

    def _prepare(self, args: TrainingArguments, model: nn.Module | None) -> EvenPacks | PackStream:
        """Set what a Trainer reads when it trains; returns what it is to train on."""
        args.logging_nan_inf_filter = False
        if model is not None:
            self._evaluation = Evaluation(model, args)
        if isinstance(model, PreTrainedModel):  # adapters around one (PEFT) have files of their own
            self._weights = WeightKeeper(model)
        return self._data.prepare(args)

    def _take_places(self) -> None:
        """Stand first in the Trainer's list, where reporters come later, and have one that stands last, when all
        others have asked for logs, evaluations and checkpoints."""
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
        if state.global_step and checkpoint_folder(args, state).is_dir():
            # the stream looks for its own file itself
            own = "" if self._stream is None else STREAM_FILE.format(rank=args.process_index)
            check_checkpoint(checkpoint_folder(args, state), own)
        self._data.on_train_begin(args, state, kwargs.get("train_dataloader"))
        self._waiting.clear()
        if state.global_step:
            if self._weights is not None:
                self._weights.check(model)
            check_unfinished(state)
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
        self._counter = PackCounter(costs, share)
        self._hooks = [
            model.register_forward_pre_hook(self._take, with_kwargs=True, prepend=True),
            self._divergence.begin(model, args),
        ]
        self._is_in_step = False
        self._packs.clear()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._remove_hooks()
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
        self._is_watched = every is not None and (state.global_step + 1) % every == 0
        self._is_in_step = True
        self._divergence.begin_step()
        self._counter.begin_step()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._divergence.note_batches(self._packs, state.global_step + 1)
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
        self._is_in_step = False
        self._divergence.note_batches(self._packs, state.global_step)
        self._divergence.end_step()
        self._count()
        self._counter.end_step()
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
        self._counter.pause()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._stream is not None:
            self._stream.on_save(args, state)
        write_list(checkpoint_folder(args, state), args.should_save)
        self._counter.pause()

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
        if self._evaluation is not None:
            self._evaluation.correct(logs, *state.log_history[-1:])
        if "loss" not in logs or not self._counter.num_batches:
            return  # an evaluation's log, a summary's, or no pack was seen
        capacity = self.dataset.capacity * state.train_batch_size  # padded: every batch is full
        values = self._counter.pop(capacity, self.dataset.num_dropped_segments, args.device)
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)  # a copy, made before callbacks are called

    def _before_saving(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any
    ) -> None:
        """End a run that has diverged, before it is logged, evaluated or saved; ranks agree on these.

        Raises:
            DivergedError: it has.
        """
        is_last = control.should_save or control.should_training_stop
        if is_last or control.should_log or control.should_evaluate:
            self._divergence.check(model if is_last else None, state.global_step)
        if control.should_save and args.should_save:
            begin_writing(checkpoint_folder(args, state))

    def _take(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The hook: keeps a training batch's dict, and asks attention to call back. torch.compile traces
        it; reading the integers here would tie a graph to them."""
        pack = kwargs.get("mmpack")
        if pack is None or not self._is_in_step:
            return None
        self._packs.append(pack)
        if not self._is_watched or self._counter.share is None:
            return None
        return args, {**kwargs, "mmpack": {**pack, "watch": self._counter.share.take}}

    def _count(self) -> None:
        """Add up the batches the hook kept."""
        if self._stream is not None:
            self._waiting += self._packs
        self._counter.count(self._packs)
        self._packs.clear()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
