"""The head of a packed batch in training: the loss of its rows instead of their logits.

A forward bound on the head, a bare `nn.Linear`, computes `supervised_linear_cross_entropy`. It is inside the head,
because FSDP2 has the whole weight only there, and its result is the head's output, because FSDP2 gathers the
weight for the backward when that needs the output's gradient. The outer model's pre-hook says that it is to, the
inner model's hands it the targets; the installed loss (`mmpack.hf.loss`) divides. torch.compile does not trace the
hooks of the outermost model, and takes the shapes of tensors that it finds on a module for constants.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from mmpack.hf.compat import all_hooks, is_sharded
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.hf.op_choice import compute_dtype, impl_for
from mmpack.ops.supervised_cross_entropy import empty_losses
from mmpack.ops.supervised_linear_cross_entropy import (
    columns_per_chunk,
    supervised_linear_cross_entropy,
)

_STATE = "_mmpack_head"
_SHARDING = ("deepspeed.", "torch.distributed.fsdp.")  # whose hooks do not touch the output


class _Head:
    """What a head's next forward scores; None: it returns logits. No dataclass: FSDP2 would look for tensors in
    it."""

    def __init__(self) -> None:
        # labels, weights, the batch's dict
        self.targets: tuple[torch.Tensor, torch.Tensor | None, MmpackDict] | None = None


def head_forward(self: Any, rows: torch.Tensor) -> torch.Tensor:
    """The forward to bind on a head: the weighted sum of the rows' losses, (1, 1, 1), where that pays, else
    logits."""
    state = vars(self).get(_STATE)
    targets, weight = None, self.weight
    if state is not None:
        targets, state.targets = state.targets, None
    if (
        targets is None
        or rows.shape[:-1] != targets[0].shape
        or rows.dtype != weight.dtype
        and not torch.is_autocast_enabled(rows.device.type)
        or not _is_bare(self, weight)
        or not pays(rows.shape[1], weight.shape[0], weight.shape[1], weight.requires_grad)
    ):
        logits: torch.Tensor = type(self).forward(self, rows)
        return logits
    labels, weights, pack = targets
    take = pack.get("take_losses")
    losses = None if take is None else empty_losses(labels[0], rows)
    total = supervised_linear_cross_entropy(
        rows[0],
        weight,
        labels[0].to(rows.device),
        1,
        weights_L=None if weights is None else weights.to(rows.device),
        impl="triton" if impl_for(pack, "head", compute_dtype(rows)) == "triton" else "auto",
        losses_L=losses,
    )
    if take is not None:
        take(losses)
    return total.view(1, 1, 1)


def pays(num_rows: int, vocabulary: int, hidden_size: int, is_trained: bool) -> bool:
    """Whether a head's logits take more memory than one chunk of them and, if it is trained, than its gradient."""
    is_large = columns_per_chunk(num_rows, vocabulary) < vocabulary
    return is_large and (num_rows > hidden_size or not is_trained)


def has_no_logits(logits: torch.Tensor | None) -> bool:
    """Whether a head's output is the sum of its rows' losses."""
    return logits is not None and logits.shape == (1, 1, 1)


def _is_bare(linear: nn.Linear, weight: Any) -> bool:
    """Whether nobody looks at the logits, and the weight is whole and of numbers."""
    return (
        linear.bias is None
        and type(weight) in (torch.Tensor, nn.Parameter)
        and not is_sharded(weight)
        and all(getattr(hook, "__module__", "").startswith(_SHARDING) for hook in all_hooks(linear))
    )


def bind_head(linear: Any) -> None:
    """Bind `head_forward` on a model's head, unless it is more than an `nn.Linear` or has another forward."""
    is_linear = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
    if is_linear and "forward" not in vars(linear):
        linear.forward = MethodType(head_forward, linear)
        setattr(linear, _STATE, _Head())


def unbind_heads(model: nn.Module) -> None:
    """Undo `bind_head` in a model and its wrappers' copies of a head."""
    for module in model.modules():
        if vars(module).pop(_STATE, None) is not None:
            if getattr(vars(module).get("forward"), "__func__", None) is head_forward:
                del module.forward


def reset_targets(linear: Any) -> _Head | None:
    """Take back targets that a head has not used; returns its state, None if it has none."""
    state: _Head | None = None if linear is None else vars(linear).get(_STATE)
    if state is not None:
        state.targets = None
    return state


def give_targets(pack: MmpackDict) -> None:
    """Hand the head the targets of a packed batch, if the outer model's hook wants a loss from it."""
    if "head" in pack:
        state, labels = pack["head"]
        bits = pack.get("loss_weight_bits")
        state.targets = (labels, None if bits is None else bits.view(torch.float32), pack)
