"""Weighted cross entropy over the supervised rows, without a float32 copy of the logits.

transformers casts all logits to float32 and keeps the cast, its softmax and its gradient: 12 bytes per logit, in
addition to 2 for bf16. Here the backward overwrites the logits with their gradient: 2 bytes per logit, plus, in
torch, one chunk in float32. Similar to Liger (arXiv 2410.10989).

Bytes moved per bf16 logit: kernels 6 (forward 2 read, backward 2 read and 2 written); torch's ops about 40,
transformers' about 48 (computed). Not measured on a GPU yet, so "auto" means torch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# L = supervised rows, V = vocabulary, C = columns of a part of the vocabulary
CHUNK = 1 << 24  # logits at once in float32, 64 MiB
IGNORE = -100
IMPLEMENTATIONS = ("auto", "torch", "triton")


class Torch:
    """`cross_entropy_kernels` in torch."""

    @staticmethod
    def cross_entropy_fwd(logits_LC, labels_L, lse_L, target_L, first):
        """Add columns `[first, first + C)` to the rows' log-sum-exp, and note the logit of each label among
        them."""
        dtype = lse_L.dtype
        for logits, labels, lse, target in _chunks(logits_LC, labels_L, lse_L, target_L):
            index, inside = _columns(labels, first, logits.shape[1])
            found = logits.gather(1, index)[:, 0].to(dtype)
            target.copy_(torch.where(inside, found, target))
            top = logits.amax(1, keepdim=True).to(dtype)
            if logits.dtype == dtype:
                powers = (logits - top).exp_()
            else:
                powers = logits.to(dtype).sub_(top).exp_()
            torch.logaddexp(lse, top[:, 0] + powers.sum(1).log_(), out=lse)

    @staticmethod
    def cross_entropy_bwd(logits_LC, labels_L, scale_L, lse_L, first):
        """Overwrite the logits with scale * (softmax - one-hot), rounded once; with 0 where the scale is 0."""
        for logits, labels, scale, lse in _chunks(logits_LC, labels_L, scale_L, lse_L):
            index, inside = _columns(labels, first, logits.shape[1])
            gradient = logits.to(lse.dtype).sub_(lse[:, None]).exp_()
            gradient.scatter_add_(1, index, -inside.to(lse.dtype)[:, None])
            gradient.mul_(scale[:, None]).masked_fill_((scale == 0)[:, None], 0.0)
            if gradient.dtype != logits.dtype:
                logits.copy_(gradient)


def _chunks(*tensors):
    rows = max(1, CHUNK // max(1, tensors[0].shape[1]))
    return zip(*(tensor.split(rows) for tensor in tensors))


def _columns(labels, first, C):
    """((L, 1) the label's column among `[first, first + C)`, (L,) whether it is there)."""
    index = labels - first
    inside = (index >= 0) & (index < C)
    return torch.where(inside, index, 0)[:, None], inside


def implementation(impl, logits):
    """`Torch` or the kernels' module, by `impl`; always torch for float64, for columns that are not adjacent
    and on the meta device, where a kernel has nothing to read."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    is_plain = logits.dtype != torch.float64 and logits.stride(-1) == 1 and not logits.is_meta
    if impl != "triton" or not is_plain:
        return Torch
    from mmpack.ops import cross_entropy_kernels  # late: Triton may be missing
    from mmpack.ops.arguments import check_device

    check_device(logits.device)
    return cross_entropy_kernels


def row_state(weights_L):
    """((L,) log-sum-exp of no columns, (L,) no target yet), in the dtype of the weights. A label outside the
    vocabulary stays NaN, and so does the loss."""
    return torch.full_like(weights_L, -torch.inf), torch.full_like(weights_L, torch.nan)


def row_weights(labels_L: Tensor, weights_L: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(L,) the weight of each row's loss; 0 for a row without a label."""
    is_supervised = labels_L != IGNORE
    return is_supervised.to(dtype) if weights_L is None else is_supervised * weights_L.to(dtype)


def weighted_sum(weights_L, lse_L, target_L):
    """The sum of the rows' losses; rows of weight 0 add nothing, whatever their logits."""
    return torch.where(weights_L != 0, weights_L * (lse_L - target_L), 0.0).sum()


def row_losses(weights_L, lse_L, target_L):
    """(L,) the rows' losses, without their weights; 0 for a row without loss."""
    return torch.where(weights_L != 0, lse_L - target_L, 0.0)


def empty_losses(labels_L: Tensor, inputs: Tensor) -> Tensor:
    """(L,) a `losses_L` for the loss of these logits or hidden states."""
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    return torch.empty(len(labels_L), dtype=dtype, device=inputs.device)


def row_scales(weights_L, factor):
    """(L,) the factor of each row's gradient."""
    return torch.where(weights_L != 0, weights_L * factor, 0.0)


def denominator(num_items: Tensor | float | None, weights_L: Tensor) -> Tensor | float:
    """`num_items` on the weights' device, or the sum of the weights if it is None; 1 for 0."""
    if num_items is None:
        num_items = weights_L.sum()
    if isinstance(num_items, Tensor):
        num_items = num_items.to(weights_L.device, weights_L.dtype, non_blocking=True)
        return num_items + (num_items == 0)
    return num_items or 1


def check_weights(weights_L, labels_L):
    """Refuse weights that are not one float32 or float64 per row."""
    if weights_L is not None and (
        weights_L.shape != labels_L.shape or weights_L.dtype not in (torch.float32, torch.float64)
    ):
        raise ValueError(
            f"weights must be ({len(labels_L)},) float32 or float64, one per row, got "
            f"{tuple(weights_L.shape)} {weights_L.dtype}"
        )


def supervised_cross_entropy_fwd(logits_LV, labels_L, weights_L, impl, losses_L=None):
    """(weighted sum of the rows' losses, log-sum-exp of each row (L,)), in the dtype of the weights. Without
    weights, the rows' losses are written to `losses_L`."""
    lse_L, target_L = row_state(weights_L)
    implementation(impl, logits_LV).cross_entropy_fwd(logits_LV, labels_L, lse_L, target_L, 0)
    if losses_L is not None:
        losses_L.copy_(row_losses(weights_L, lse_L, target_L))
    return weighted_sum(weights_L, lse_L, target_L), lse_L


def supervised_cross_entropy_bwd(logits_LV, labels_L, weights_L, lse_L, factor, impl):
    """Overwrite the logits with factor * weight * (softmax - one-hot), rounded once."""
    scale_L = row_scales(weights_L, factor)
    implementation(impl, logits_LV).cross_entropy_bwd(logits_LV, labels_L, scale_L, lse_L, 0)
    return logits_LV


class SupervisedCrossEntropyFunction(torch.autograd.Function):
    """Cross entropy whose backward overwrites the logits with their gradient; torch refuses a second backward."""

    @staticmethod
    def forward(ctx, logits_LV, labels_L, weights_L, num_items, impl, losses_L):
        total, lse_L = supervised_cross_entropy_fwd(logits_LV, labels_L, weights_L, impl, losses_L)
        ctx.save_for_backward(logits_LV, labels_L, weights_L, lse_L)
        ctx.num_items, ctx.impl = num_items, impl
        return total / num_items

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        logits_LV, *rows = ctx.saved_tensors
        factor = dloss / ctx.num_items
        gradient = supervised_cross_entropy_bwd(logits_LV.detach(), *rows, factor, ctx.impl)
        return gradient, None, None, None, None, None


def supervised_cross_entropy(
    logits_LV: Tensor,
    labels_L: Tensor,
    num_items: Tensor | float | None = None,
    *,
    weights_L: Tensor | None = None,
    impl: str = "auto",
    losses_L: Tensor | None = None,
) -> Tensor:
    """The weighted sum of the rows' cross entropies divided by `num_items`; a scalar, float32 or float64.

    Equal to transformers' `ForCausalLMLoss` for rows and labels that are already shifted. **The backward
    overwrites the logits**; read them before.

    Args:
        logits_LV: (L, V), any floating dtype.
        labels_L: (L,) int64 ids; -100 marks a row without loss. An id that is not below V makes the loss NaN.
        num_items: sum of the weights of the whole optimizer step's supervised tokens (without weights their
            number, as counted by Trainer), a number or a scalar tensor; None: the sum over these rows. 0 counts as
            1, so that a batch without supervised rows has loss 0.
        weights_L: (L,) float32 or float64, finite and not negative; None: all 1. A row of weight 0 is one without
            loss: it adds nothing, whatever its logits.
        impl: "torch", "triton" (our kernels, but for float64 and columns that are not adjacent), or "auto": torch,
            until the kernels are measured on a GPU. Not used in a compiled graph, which fuses torch's cross
            entropy.
        losses_L: (L,) in the loss's dtype, overwritten with the rows' cross entropies without weights, for logs; 0
            for a row without loss.

    Raises:
        ValueError: shapes or the dtype of the weights do not match, an unknown `impl`, or a device that does not
            run kernels.
        RuntimeError: on a second backward through the same loss, by torch.
    """
    if logits_LV.ndim != 2 or labels_L.shape != logits_LV.shape[:1]:
        raise ValueError(
            f"logits must be (L, V) and labels (L,), got {tuple(logits_LV.shape)} and "
            f"{tuple(labels_L.shape)}"
        )
    check_weights(weights_L, labels_L)
    implementation(impl, logits_LV)
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
    rows = (labels_L.contiguous(), weights_L)
    return SupervisedCrossEntropyFunction.apply(logits_LV, *rows, num_items, impl, losses_L)
