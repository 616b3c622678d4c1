"""A run whose loss is no number any more: noted on the device in every step, read where Trainer logs or saves.

Trainer's own filter (`logging_nan_inf_filter`) asks the device in every batch whether the loss is a number,
and leaves one that is not out of the log: a run whose weights are all NaN logs 0.0 and ends well.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

_NEVER = 1 << 62
_MICRO, _RANK = 32, 16  # bits under the step in a mark: (step, batch of the step, rank)


class DivergedError(ValueError):
    """A loss, a gradient or a weight is NaN or infinite."""


class Divergence:
    """The first step of a run whose loss, gradients or weights were NaN or infinite.

    Noting costs a few small kernels and, of gradients, one pass over them; nothing is asked.

    Args:
        device: where the marks lie.
        rank: this process's.
    """

    def __init__(self, device: torch.device, rank: int) -> None:
        # Of a loss, and of gradients or weights. Smaller is earlier.
        self._marks = torch.full((2,), _NEVER, dtype=torch.int64, device=device)
        self._rank = rank

    def note_loss(self, loss: torch.Tensor, step: int, batch: int) -> None:
        """Take down the loss of a step's batch, a scalar on any device."""
        self._mark(0, loss, step << _MICRO | batch << _RANK | self._rank)

    def note(self, tensors: Iterable[torch.Tensor], step: int) -> None:
        """Take down a step's gradients, or the weights after it; of shards each rank its own."""
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        local = [t.detach() for t in local if t.is_floating_point() and t.numel()]
        if local:
            self._mark(1, get_total_norm(local), step << _MICRO)

    def _mark(self, place: int, value: torch.Tensor, mark: int) -> None:
        mine = self._marks[place]
        is_bad = ~value.detach().isfinite().all().to(mine.device, non_blocking=True)
        mine.masked_fill_(is_bad & (mine == _NEVER), mark)

    def first(self) -> tuple[int, int | None, int | None] | None:
        """(step, batch of the step, rank) of the first one over all ranks, which must all ask; batch and rank
        are None where no loss shows it. None: there is none. It waits for the device."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._marks, dist.ReduceOp.MIN)
        loss, other = (int(mark) for mark in self._marks.cpu())
        if min(loss, other) == _NEVER:
            return None
        if other >> _MICRO < loss >> _MICRO:
            return other >> _MICRO, None, None
        low = (1 << _RANK) - 1
        return loss >> _MICRO, loss >> _RANK & low, loss & low


def diverged(step: int, place: str) -> DivergedError:
    """The error of a run that diverged in a step.

    Args:
        place: its packs and rows, in words.
    """
    return DivergedError(
        f"training has diverged: the loss, a gradient or a weight is NaN or infinite, first in step {step} "
        f"({place}); no checkpoint was written since. Look at the rows (mmpack inspect), lower learning_rate or "
        "lengthen warmup_steps, and go on from the last checkpoint: --resume_from_checkpoint last"
    )
