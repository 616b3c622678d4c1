"""The hook with which `PackingCallback` sees a training batch before the model does."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.hf.throughput import PackCounter


class BatchHook:
    """A forward pre-hook that keeps the `mmpack` dicts of a step's batches, and gives the model the functions to
    which the loss and, in steps that record it, attention report.

    torch.compile traces it; reading the integers here would make them constants of the graph.

    Attributes:
        counter: what they report to.
        packs: the dicts since the list was cleared.
        is_in_step: whether batches are training's. is_watched: whether attention is recorded.
    """

    def __init__(self) -> None:
        self.counter = PackCounter()
        self.packs: list[MmpackDict] = []
        self.is_in_step = self.is_watched = False

    def begin(self, counter: PackCounter) -> None:
        """Begin a run."""
        self.counter, self.is_in_step = counter, False
        self.packs.clear()

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        pack = kwargs.get("mmpack")
        if pack is None or not self.is_in_step:
            return None
        self.packs.append(pack)
        told = {**pack, "take_losses": self.counter.losses.take}
        if self.is_watched and self.counter.share is not None:
            told["watch"] = self.counter.share.take
        return args, {**kwargs, "mmpack": told}
