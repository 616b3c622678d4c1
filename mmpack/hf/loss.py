"""The loss of a packed batch, put where transformers asks for it: the model's `loss_function`.

A packed batch brings the rows whose prediction counts (`logits_to_keep`) and what they predict
(`shift_labels`), so logits are (1, L, V) and the loss is a sum over L rows divided by the supervised
tokens of the whole optimizer step, which Trainer counts over micro-batches and ranks. Any other batch
gets the loss the model had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmpack.ops.supervised_cross_entropy import supervised_cross_entropy


class PackedLoss:
    """`supervised_cross_entropy` for packed batches, `stock` for all others."""

    def __init__(self, stock: Callable[..., torch.Tensor]) -> None:
        self.stock = stock

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        mmpack: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if mmpack is None or shift_labels is None:
            if shift_labels is not None:
                kwargs["shift_labels"] = shift_labels
            return self.stock(
                logits=logits,
                labels=labels,
                vocab_size=vocab_size,
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )
        rows_LV = logits.reshape(-1, logits.shape[-1])
        return supervised_cross_entropy(
            rows_LV, shift_labels.reshape(-1).to(rows_LV.device), num_items_in_batch
        )


def install(base: nn.Module, model: nn.Module) -> list[nn.Module]:
    """Give every model of `model` that has a head over `base` the packed loss; returns them. One whose
    loss a user has set keeps it.

    It says `accepts_loss_kwargs` too: without, Trainer averages micro-batches as if they held equally
    many supervised tokens (it reads the attribute before the forward's signature; Qwen2.5-VL and
    Qwen3-VL have it False).
    """
    heads = [
        module
        for module in model.modules()
        if getattr(module, "model", None) is base and hasattr(module, "loss_function")
    ]
    for head in heads:
        if "_loss_function" not in vars(head):
            head.loss_function = PackedLoss(head.loss_function)
        head.accepts_loss_kwargs = True
    return heads


def remove(heads: list[nn.Module]) -> None:
    """Take `install` back; a loss the user has set since stays."""
    for head in heads:
        if isinstance(vars(head).get("_loss_function"), PackedLoss):
            del head._loss_function
        vars(head).pop("accepts_loss_kwargs", None)
