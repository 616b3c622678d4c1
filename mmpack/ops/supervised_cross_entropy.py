"""Cross entropy over the supervised rows, without a float32 copy of the logits.

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


def supervised_cross_entropy_fwd(logits_LV, labels_L):
    """(sum of the rows' losses, log-sum-exp of each row (L,)), float32, or float64 for float64 logits."""
    dtype = torch.promote_types(logits_LV.dtype, torch.float32)
    total = torch.zeros((), dtype=dtype, device=logits_LV.device)
    lse_L = torch.empty(len(logits_LV), dtype=dtype, device=logits_LV.device)
    for logits, labels, lse in _chunks(logits_LV, labels_L, lse_L):
        is_supervised = labels != IGNORE
        target = torch.where(is_supervised, labels, 0)[:, None]
        torch.logsumexp(logits.to(dtype), dim=1, out=lse)
        losses = lse - logits.gather(1, target)[:, 0].to(dtype)
        total = total + torch.where(is_supervised, losses, 0.0).sum()
    return total, lse_L


def supervised_cross_entropy_bwd(logits_LV, labels_L, lse_L, factor):
    """Overwrite the logits with factor * (softmax - one-hot), rounded once."""
    for logits, labels, lse in _chunks(logits_LV, labels_L, lse_L):
        is_supervised = (labels != IGNORE)[:, None]
        target = torch.where(is_supervised, labels[:, None], 0)
        gradient = (logits.to(lse.dtype) - lse[:, None]).exp_()
        gradient.scatter_add_(1, target, torch.full_like(target, -1.0, dtype=lse.dtype))
        logits.copy_(torch.where(is_supervised, gradient.mul_(factor), 0.0))
    return logits_LV


class SupervisedCrossEntropyFunction(torch.autograd.Function):
    """Cross entropy whose backward overwrites the logits with their gradient; torch refuses a second backward."""

    @staticmethod
    def forward(ctx, logits_LV, labels_L, num_items):
        total, lse_L = supervised_cross_entropy_fwd(logits_LV, labels_L)
        ctx.save_for_backward(logits_LV, labels_L, lse_L)
        ctx.num_items = num_items
        return total / num_items

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        logits_LV, labels_L, lse_L = ctx.saved_tensors
        gradient = supervised_cross_entropy_bwd(
            logits_LV.detach(), labels_L, lse_L, dloss / ctx.num_items
        )
        return gradient, None, None


def supervised_cross_entropy(
    logits_LV: Tensor, labels_L: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """The sum of the rows' cross entropies divided by `num_items`; a scalar, float32 or float64.

    Equal to transformers' `ForCausalLMLoss` for rows and labels that are already shifted. **The backward
    overwrites the logits**; read them before.

    Args:
        logits_LV: (L, V), any floating dtype.
        labels_L: (L,) int64 ids; -100 marks a row without loss.
        num_items: supervised tokens of the whole optimizer step, as counted by Trainer, an int or a scalar tensor;
            None: the number of these rows with a loss. 0 counts as 1, so that a batch without supervised rows
            has loss 0.

    Raises:
        ValueError: shapes do not match.
        RuntimeError: on a second backward through the same loss, by torch.
    """
    if logits_LV.ndim != 2 or labels_L.shape != logits_LV.shape[:1]:
        raise ValueError(
            f"logits must be (L, V) and labels (L,), got {tuple(logits_LV.shape)} and "
            f"{tuple(labels_L.shape)}"
        )
    if num_items is None:
        num_items = (labels_L != IGNORE).sum()
    if isinstance(num_items, Tensor):
        num_items = num_items.to(logits_LV.device, non_blocking=True).clamp_min(1)
    else:
        num_items = max(1, num_items)
    if torch.compiler.is_compiling():
        # the compiler fuses the casts, and cannot mutate in a backward
        dtype = torch.promote_types(logits_LV.dtype, torch.float32)
        return F.cross_entropy(logits_LV.to(dtype), labels_L, reduction="sum") / num_items
    return SupervisedCrossEntropyFunction.apply(logits_LV, labels_L, num_items)
