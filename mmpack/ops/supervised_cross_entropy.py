"""Weighted cross entropy over the supervised rows, without a float32 copy of the logits.

transformers casts all logits to float32 and keeps the cast, its softmax and its gradient: 12 bytes per logit, in
addition to 2 for bf16. Here rows are processed in chunks, and the backward overwrites the logits with their
gradient: 2 bytes per logit, plus one chunk. Similar to Liger (arXiv 2410.10989), but in plain torch: the head's
products cost a thousand times more FLOPs, so a kernel could only save bytes.

Bytes per bf16 logit: forward 2 read, backward 2 read and 2 written. Not measured on a GPU yet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# L = supervised rows, V = vocabulary
CHUNK = 1 << 24  # logits per chunk, 64 MiB in float32
IGNORE = -100


def _chunks(*tensors):
    rows = max(1, CHUNK // max(1, tensors[0].shape[1]))
    return zip(*(tensor.split(rows) for tensor in tensors))


def row_weights(labels_L, weights_L, dtype):
    """(L,) the weight of each row's loss; 0 for a row without a label."""
    is_supervised = labels_L != IGNORE
    return is_supervised.to(dtype) if weights_L is None else is_supervised * weights_L.to(dtype)


def denominator(num_items, weights_L):
    """`num_items` on the weights' device, or their sum if it is None; 1 for 0."""
    if num_items is None:
        num_items = weights_L.sum()
    if isinstance(num_items, Tensor):
        num_items = num_items.to(weights_L.device, weights_L.dtype, non_blocking=True)
        return num_items + (num_items == 0)
    return num_items or 1


def supervised_cross_entropy_fwd(logits_LV, labels_L, weights_L, losses_L=None):
    """(weighted sum of the rows' losses, log-sum-exp of each row (L,)), in the dtype of the weights. The rows' losses
    without weights are written to `losses_L`."""
    dtype = weights_L.dtype
    total, lse_L = weights_L.new_zeros(()), torch.empty_like(weights_L)
    losses_L = torch.empty_like(weights_L) if losses_L is None else losses_L
    rows = (logits_LV, labels_L, weights_L, lse_L, losses_L)
    for logits, labels, weights, lse, kept in _chunks(*rows):
        target = torch.where(weights != 0, labels, 0)[:, None]
        torch.logsumexp(logits.to(dtype), dim=1, out=lse)
        losses = lse - logits.gather(1, target)[:, 0].to(dtype)
        total = total + torch.where(weights != 0, weights * losses, 0.0).sum()
        kept.copy_(torch.where(weights != 0, losses, 0.0))
    return total, lse_L


def supervised_cross_entropy_bwd(logits_LV, labels_L, weights_L, lse_L, factor):
    """Overwrite the logits with factor * weight * (softmax - one-hot), rounded once."""
    for logits, labels, weights, lse in _chunks(logits_LV, labels_L, weights_L, lse_L):
        weights = weights[:, None]
        target = torch.where(weights != 0, labels[:, None], 0)
        gradient = (logits.to(lse.dtype) - lse[:, None]).exp_()
        gradient.scatter_add_(1, target, torch.full_like(target, -1.0, dtype=lse.dtype))
        logits.copy_(torch.where(weights != 0, gradient.mul_(weights * factor), 0.0))
    return logits_LV


class SupervisedCrossEntropyFunction(torch.autograd.Function):
    """Cross entropy whose backward overwrites the logits with their gradient; torch refuses a second backward."""

    @staticmethod
    def forward(ctx, logits_LV, labels_L, weights_L, num_items, losses_L):
        total, lse_L = supervised_cross_entropy_fwd(logits_LV, labels_L, weights_L, losses_L)
        ctx.save_for_backward(logits_LV, labels_L, weights_L, lse_L)
        ctx.num_items = num_items
        return total / num_items

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        logits_LV, *rows = ctx.saved_tensors
        gradient = supervised_cross_entropy_bwd(logits_LV.detach(), *rows, dloss / ctx.num_items)
        return gradient, None, None, None, None


def supervised_cross_entropy(
    logits_LV: Tensor,
    labels_L: Tensor,
    num_items: Tensor | float | None = None,
    *,
    weights_L: Tensor | None = None,
    losses_L: Tensor | None = None,
) -> Tensor:
    """The weighted sum of the rows' cross entropies divided by `num_items`; a scalar, float32 or float64.

    Equal to transformers' `ForCausalLMLoss` for rows and labels that are already shifted. **The backward
    overwrites the logits**; read them before.

    Args:
        logits_LV: (L, V), any floating dtype.
        labels_L: (L,) int64 ids; -100 marks a row without loss.
        num_items: sum of the weights of the whole optimizer step's supervised tokens (without weights their
            number, as counted by Trainer), a number or a scalar tensor; None: the sum over these rows. 0 counts as
            1, so that a batch without supervised rows has loss 0.
        weights_L: (L,) float32 or float64, finite and not negative; None: all 1. A row of weight 0 is one without
            loss: it adds nothing, whatever its logits.
        losses_L: (L,) in the loss's dtype, overwritten with the rows' cross entropies without weights, for logs; 0
            for a row without loss.

    Raises:
        ValueError: shapes or the dtype of the weights do not match.
        RuntimeError: on a second backward through the same loss, by torch.
    """
    if logits_LV.ndim != 2 or labels_L.shape != logits_LV.shape[:1]:
        raise ValueError(
            f"logits must be (L, V) and labels (L,), got {tuple(logits_LV.shape)} and "
            f"{tuple(labels_L.shape)}"
        )
    if weights_L is not None and (
        weights_L.shape != labels_L.shape or weights_L.dtype not in (torch.float32, torch.float64)
    ):
        raise ValueError(
            f"weights must be ({len(labels_L)},) float32 or float64, one per row, got "
            f"{tuple(weights_L.shape)} {weights_L.dtype}"
        )
    dtype = torch.promote_types(logits_LV.dtype, torch.float32)
    weights_L = row_weights(labels_L, weights_L, dtype)
    num_items = denominator(num_items, weights_L)
    if torch.compiler.is_compiling():
        # the compiler fuses the casts, and cannot mutate in a backward
        logits_LV = torch.where(weights_L[:, None] != 0, logits_LV.to(dtype), 0.0)
        rows_L = F.cross_entropy(logits_LV, labels_L, reduction="none")
        if losses_L is not None:
            losses_L.copy_(torch.where(weights_L != 0, rows_L.detach(), 0.0))
        return (rows_L * weights_L).sum() / num_items
    return SupervisedCrossEntropyFunction.apply(logits_LV, labels_L, weights_L, num_items, losses_L)
