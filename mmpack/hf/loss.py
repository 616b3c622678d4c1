"""The loss of a packed batch, installed as the model's `loss_function`.

A packed batch holds the supervised rows (`logits_to_keep`) and their targets (`shift_labels`). Logits are (1, L,
V), or (1, 1, 1) if the head has already summed the losses (`mmpack.hf.head`). The loss is the sum over L rows
divided by the supervised tokens of the whole optimizer step, which Trainer counts over micro-batches and ranks;
else by those of the batch's pack, of which ranks may share the rows (context parallelism). Other batches get the
model's own loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmpack.hf.compat import forward_hooks, own_loss, remove_hook, remove_own_loss
from mmpack.hf.head import bind_head, has_no_logits, reset_targets, unbind_heads
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.hf.model_parts import PATCH
from mmpack.hf.op_choice import impl_for
from mmpack.ops.supervised_cross_entropy import (
    denominator,
    empty_losses,
    row_weights,
    supervised_cross_entropy,
)

_HOOKS = "_mmpack_loss_hooks"


class PackedLoss:
    """`supervised_cross_entropy` for packed batches, `stock` for all others."""

    def __init__(self, stock: Callable[..., torch.Tensor]) -> None:
        self.stock = stock

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | float | None = None,
        shift_labels: torch.Tensor | None = None,
        mmpack: MmpackDict | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        weights = None
        if mmpack is not None and "loss_weight_bits" in mmpack:
            if num_items_in_batch is not None and not mmpack.get("is_counted"):
                raise ValueError(
                    "the batch has weights of the loss, but num_items_in_batch is not their sum; use "
                    "PackingCallback(dataset).attach(trainer), or in a loop of your own "
                    "num_items_in_batch=mmpack.hf.loss_denominator(batches)"
                )
            weights = mmpack["loss_weight_bits"].view(torch.float32).to(logits.device)
            if shift_labels is None:  # full_logits
                rows = mmpack["supervised_index"]
                logits, shift_labels = logits[:, rows], labels[:, rows + 1]
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
        over = mmpack.get("context")
        if over is not None and num_items_in_batch is None:
            num_items_in_batch = over["weight"]  # of the whole pack
        labels_L = shift_labels.reshape(-1).to(logits.device)
        if has_no_logits(logits):
            weights_L = row_weights(labels_L, weights, logits.dtype)
            return logits.sum() / denominator(num_items_in_batch, weights_L)
        take = mmpack.get("take_losses")
        losses = None if take is None else empty_losses(labels_L, logits)
        loss = supervised_cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            labels_L,
            num_items_in_batch,
            weights_L=weights,
            impl="triton" if impl_for(mmpack, "loss", logits.dtype) == "triton" else "auto",
            losses_L=losses,
        )
        if take is not None:
            take(losses)
        return loss


def install_loss(base: nn.Module, model: nn.Module) -> None:
    """Install the packed loss on every module of `model` with a head over `base`, unless a user has set its loss;
    and bind the forward of `mmpack.hf.head` on the head.

    Also sets `accepts_loss_kwargs`; otherwise Trainer averages micro-batches as if they had equally many
    supervised tokens. It reads the attribute before the forward's signature, and Qwen2.5-VL and Qwen3-VL set it to
    False.
    """
    for head in _heads(base, model):
        if own_loss(head) is None:
            head.loss_function = PackedLoss(head.loss_function)
        head.accepts_loss_kwargs = True
        bind_head(head.get_output_embeddings())
        before = head.register_forward_pre_hook(_before, with_kwargs=True)
        after = head.register_forward_hook(_after)
        setattr(head, _HOOKS, (before.id, after.id))


def remove_loss(base: nn.Module, model: nn.Module) -> None:
    """Undo `install_loss`; a loss that the user has set since is kept."""
    for head in _heads(base, model):
        if isinstance(own_loss(head), PackedLoss):
            remove_own_loss(head)
        vars(head).pop("accepts_loss_kwargs", None)
        for hook_id in vars(head).pop(_HOOKS, ()):
            remove_hook(head, hook_id)
        unbind_heads(head)


def _heads(base: nn.Module, model: nn.Module) -> list[Any]:
    return [
        module
        for module in model.modules()
        if getattr(module, "model", None) is base and hasattr(module, "loss_function")
    ]


def _before(
    head: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: says that the head is to score a packed batch in training, and the loss's `impl`. Refuses
    weights that TRL's forward would ignore.

    Refuses Trainer's label smoothing and `compute_loss_func`, which remove the labels and expect the logits of
    every token: with logits of supervised rows they would fail or be wrong."""
    state, pack = reset_targets(head.get_output_embeddings()), kwargs.get("mmpack")
    if pack is None:
        return None
    if kwargs.get("fused_lm_head") and "loss_weight_bits" in pack:
        if not any(getattr(hook, "applies_weights", False) for hook in forward_hooks(head)):
            raise ValueError(
                "the batch has weights of the loss, which TRL's SFTTrainer does not apply; use "
                "mmpack.integrations.trl.PackedSFTTrainer, or train without weights and with "
                "loss_reduction='token'"
            )
    patch = getattr(head.model, PATCH)
    pack = {**pack, "impl": patch.impl, "tuned": patch.choice}
    if "shift_labels" in kwargs and head.training:
        if kwargs.get("labels") is None:
            raise ValueError(
                "the batch has no labels: label_smoothing_factor or compute_loss_func removed them, but a packed "
                "batch has logits of supervised tokens only. Leave out label_smoothing_factor (transformers does "
                "not shift these models' labels for it); for compute_loss_func, pass "
                "PackCollator(full_logits=True)"
            )
        if state and torch.is_grad_enabled() and isinstance(own_loss(head), PackedLoss):
            pack["head"] = (state, kwargs["shift_labels"])
    return args, {**kwargs, "mmpack": pack}


def _after(head: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: an output whose losses the head has summed has no logits."""
    reset_targets(head.get_output_embeddings())
    if isinstance(output, tuple):
        has_none = len(output) > 1 and has_no_logits(output[1])
        return (output[0], *output[2:]) if has_none else None
    if has_no_logits(getattr(output, "logits", None)):
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})
    return None
