"""PackingCallback: what a stock Trainer does not tell a packed data set, and what it does not log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mmpack.families import FAMILIES
from mmpack.hf.attention_share import AttentionShare, chosen_layers
from mmpack.hf.checkpoint_files import STREAM_FILE, begin_writing, checkpoint_folder, write_list
from mmpack.hf.checkpoints import PackKeeper, WeightKeeper, check_checkpoint, check_unfinished
from mmpack.hf.divergence import DivergenceWatch
from mmpack.hf.evaluation import Evaluation
from mmpack.hf.fit import check_fit
from mmpack.hf.model_parts import find_inner
from mmpack.hf.stream_state import StreamKeeper
from mmpack.hf.throughput import Seen, TrainedCosts, peak_tflops
from mmpack.hf.trainer_frames import LastCallback, callers, take_places
from mmpack.packing.dataset import EvenPacks, PackedDataset
from mmpack.packing.stream import PackStream


class PackingCallback(TrainerCallback):
    """Other packs every epoch, as many on every rank, and what they do in the Trainer's log:
    `Trainer(callbacks=[PackingCallback(train)])`.

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
      printed, in `log_history` and in every reporter (TensorBoard, W&B), before which the callback steps
      in Trainer's list as training begins:

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
        self._waiting: list[dict[str, Any]] = []  # batches of a step that is not over
        self._hooks: list[Any] = []
        self._share: AttentionShare | None = None
        self._is_in_step = False
        self._is_watched = False
        self._costs: TrainedCosts | None = None
        self._packs: list[dict[str, Any]] = []
        self._seen = Seen()
        self._last = LastCallback(self._before_saving)
        self._divergence = DivergenceWatch(self._data)
        self._evaluation: Evaluation | None = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        args.logging_nan_inf_filter = False
        even = self._data.on_init_end(args)
        trainer = callers(self)[1]
        if getattr(trainer, "train_dataset", None) is self.dataset:
            trainer.train_dataset = even
        elif isinstance(even, EvenPacks):  # in something of the user's
            even.dataset.append_empty_packs(even.multiple)
        if model is not None:
            self._evaluation = Evaluation(model, args)
        if isinstance(model, PreTrainedModel):  # adapters around one (PEFT) have files of their own
            self._weights = WeightKeeper(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        resumed = callers(self, "resume_from_checkpoint")[2]
        if isinstance(resumed, str):
            own = "" if self._stream is None else STREAM_FILE.format(rank=args.process_index)
            check_checkpoint(resumed, own)  # the stream looks for its file itself
        self._data.on_train_begin(args, state, kwargs.get("train_dataloader"))
        self._waiting.clear()
        if state.global_step:
            if self._weights is not None:
                self._weights.check(model)
            check_unfinished(state)
        take_places(self, self._last)
        self._remove_hooks()
        base = find_inner(model)
        if self.attention_every is not None:
            self._share = AttentionShare(chosen_layers(model, base, self.attention_layers))
        is_costed = base is not None and base.config.model_type in FAMILIES
        if is_costed and isinstance(self.dataset, PackedDataset):
            check_fit(base, self.dataset)
        self._costs = TrainedCosts(model, base) if is_costed else None
        self._hooks = [
            model.register_forward_pre_hook(self._take, with_kwargs=True, prepend=True),
            self._divergence.begin(model, args),
        ]
        self._is_in_step = False
        self._packs.clear()
        self._seen = Seen()

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
        self._seen.flops.append(0)
        if self._share is not None:
            self._share.begin()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._divergence.note_batches(self._packs, state.global_step + 1)
        self._count()
        if self._share is not None:
            self._share.begin()

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
        if getattr(optimizer, "scaler", None) is None:  # float16's leaves a step that overflows out
            self._divergence.note_gradients(model, state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._is_in_step = False
        self._divergence.note_batches(self._packs, state.global_step)
        self._divergence.end_step()
        self._count()
        self._seen.mark = time.perf_counter()
        if self._stream is not None:
            self._stream.consume(self._waiting)
            self._waiting.clear()

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
        self._seen.pause()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._stream is not None:
            self._stream.on_save(args, state)
        write_list(checkpoint_folder(args, state), args.should_save)
        self._seen.pause()

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
        if "loss" not in logs or not self._seen.num_batches:
            return  # an evaluation's log, a summary's, or no pack was seen
        capacity = self.dataset.capacity * state.train_batch_size  # padded: every batch is full
        values = self._values(capacity, args.device)
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
        if self._share is None or not self._is_watched:
            return None
        return args, {**kwargs, "mmpack": {**pack, "watch": self._share.take}}

    def _count(self) -> None:
        """Add up the batches the hook kept."""
        seen = self._seen
        if self._stream is not None:
            self._waiting += self._packs
        for pack in self._packs:
            tokens, supervised = np.diff(pack["offsets"]), np.diff(pack["supervised_offsets"])
            grids = np.array(pack["grid_thw"], dtype=np.int64).reshape(-1, 3)
            images = np.array(pack["grid_offsets"])
            patches = np.diff(np.concatenate([[0], grids.prod(axis=1).cumsum()])[images])
            is_useful = supervised > 0
            seen.num_batches += 1
            seen.tokens += int(tokens[is_useful].sum())
            seen.supervised += int(supervised.sum())
            seen.patches += int(patches[is_useful].sum())
            if self._costs is not None:
                flops = self._costs.of(tokens, supervised, grids, images)
                seen.useful_flops += int(flops[is_useful].sum())
                seen.flops[-1] += int(flops.sum())
        self._packs.clear()

    def _values(self, capacity: int, device: torch.device) -> dict[str, float]:
        seen, self._seen = self._seen, Seen()
        seconds = self._seen.start - seen.start - seen.paused
        seen.dropped = self.dataset.num_dropped_segments
        mine = (seen, self._share.pop() if self._share is not None else None)
        ranks: list[Any] = [mine]
        if dist.is_available() and dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, mine)
        every = [rank for rank, _ in ranks]
        room = capacity * sum(rank.num_batches for rank in every)
        values = {
            "utilization": sum(rank.tokens for rank in every) / room,
            "tokens_per_second": sum(rank.tokens for rank in every) / seconds,
            "supervised_tokens_per_second": sum(rank.supervised for rank in every) / seconds,
            "patches_per_second": sum(rank.patches for rank in every) / seconds,
        }
        if self._costs is not None:
            steps = np.array([rank.flops for rank in every])  # (ranks, steps)
            values["flops_max_over_mean"] = steps.max(axis=0).sum() / steps.mean(axis=0).sum()
            tflops = sum(rank.useful_flops for rank in every) / seconds / len(every) / 1e12
            values["tflops"] = tflops
            peak = peak_tflops(device)
            if peak is not None:
                values["mfu"] = tflops / peak
        if self._share is not None:
            for layer, (mass, rows) in zip(self._share.layers, sum(share for _, share in ranks)):
                if rows:
                    values[f"image_attention/layer_{layer}"] = mass / rows
        dropped = sum(rank.dropped for rank in every)
        if dropped:
            values["dropped_segments"] = dropped
        return {f"pack/{name}": float(value) for name, value in values.items()}

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
