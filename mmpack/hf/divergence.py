"""Ends a diverged run: checks on the device in every step, reads the result when Trainer logs or saves.

Trainer's `logging_nan_inf_filter` synchronizes with the device in every batch and drops losses that are not finite
from the log: a run whose weights are all NaN logs 0.0 and ends successfully.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmpack.hf.mmpack_dict import MmpackDict

_NEVER = 1 << 62
_MICRO, _RANK = 32, 16  # bits under the step in a mark: (step, batch of the step, rank)


class DivergedError(ValueError):
    """A loss, a gradient or a weight is NaN or infinite."""


class Divergence:
    """Records on the device the first step whose loss, gradients or weights were NaN or infinite.

    Recording launches a few small kernels and reads the gradients once, without synchronization.

    Args:
        device: where the marks are kept.
        rank: this process's rank.
    """

    def __init__(self, device: torch.device, rank: int) -> None:
        # One mark for losses, one for gradients and weights. Smaller is earlier.
        self._marks = torch.full((2,), _NEVER, dtype=torch.int64, device=device)
        self._rank = rank

    def note_loss(self, loss: torch.Tensor, step: int, batch: int) -> None:
        """Record the loss of a step's batch, a scalar on any device."""
        self._mark(0, loss, step << _MICRO | batch << _RANK | self._rank)

    def note(self, tensors: Iterable[torch.Tensor], step: int) -> None:
        """Record a step's gradients, or the weights after it; each rank records its own shards."""
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        local = [t.detach() for t in local if t.is_floating_point() and t.numel()]
        if local:
            self._mark(1, get_total_norm(local), step << _MICRO)

    def _mark(self, place: int, value: torch.Tensor, mark: int) -> None:
        mine = self._marks[place]
        is_bad = ~value.detach().isfinite().all().to(mine.device, non_blocking=True)
        mine.masked_fill_(is_bad & (mine == _NEVER), mark)

    def first(self) -> tuple[int, int | None, int | None] | None:
        """(step, batch in the step, rank) of the first mark over all ranks, or None. Batch and rank are None if
        no loss showed it. A collective; waits for the device."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._marks, dist.ReduceOp.MIN)
        loss, other = (int(mark) for mark in self._marks.cpu())
        if min(loss, other) == _NEVER:
            return None
        if other >> _MICRO < loss >> _MICRO:
            return other >> _MICRO, None, None
        low = (1 << _RANK) - 1
        return loss >> _MICRO, loss >> _RANK & low, loss & low


class DivergenceWatch:
    """`PackingCallback`'s part: records every batch and step of a run, and ends a diverged run.

    Args:
        data: describes a step's packs for the error (`PackKeeper`, `StreamKeeper`).
    """

    def __init__(self, data: Any) -> None:
        self._data = data
        self._first: Divergence | None = None
        self._losses: list[torch.Tensor] = []
        self._num_batches = 0  # recorded in this step
        self._is_in_step = False

    def begin(self, model: nn.Module, args: TrainingArguments) -> Any:
        """Begin a run; returns the handle of the hook on the model."""
        self._first = Divergence(args.device, args.process_index)
        self._is_in_step = False
        return model.register_forward_hook(self._take, with_kwargs=True)

    def begin_step(self) -> None:
        """Treat the following batches as training batches."""
        self._losses.clear()
        self._num_batches, self._is_in_step = 0, True

    def end_step(self) -> None:
        """Ignore the following batches, which are not training's."""
        self._is_in_step = False

    def _take(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook; torch.compile traces it."""
        loss = getattr(output, "loss", None)
        if self._is_in_step and loss is not None and kwargs.get("mmpack") is not None:
            self._losses.append(loss.detach())

    def note_batches(self, packs: Sequence[MmpackDict], step: int) -> None:
        """Record a step's finished batches; `packs` are their `mmpack` dicts."""
        assert self._first is not None
        for number, pack in enumerate(packs, self._num_batches):
            self._data.note_place(step, number, pack)
        for number, loss in enumerate(self._losses, self._num_batches):
            self._first.note_loss(loss, step, number)
        self._num_batches += len(packs)
        self._losses.clear()

    def note_gradients(self, model: nn.Module, step: int) -> None:
        """Record the gradients that the optimizer is about to use."""
        assert self._first is not None
        self._first.note([p.grad for p in model.parameters() if p.grad is not None], step)

    def check(self, model: nn.Module | None, step: int) -> None:
        """Read the marks of all ranks. Given a model, check its weights too, which the last update may have
        broken after the last loss.

        Raises:
            DivergedError: training has diverged; names the step and its rows.
        """
        assert self._first is not None
        if model is not None:
            self._first.note(model.parameters(), step)
        found = self._first.first()
        if found is not None:
            raise DivergedError(
                "training has diverged: the loss, a gradient or a weight is NaN or infinite, first in step "
                f"{found[0]} ({self._data.place_of(*found)}); no checkpoint was written since. Inspect the rows "
                "(mmpack inspect), lower learning_rate or raise warmup_steps, and resume from the last "
                "checkpoint: --resume_from_checkpoint last"
            )
        self._data.forget_places()


class LastCallback(TrainerCallback):
    """The last callback in Trainer's list, called after all others have requested logs, evaluations and saves."""

    def __init__(self, check: Callable[..., None]) -> None:
        self._check = check

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._check(args, state, control, model)

    on_epoch_end = on_step_end
