"""The head and its loss in one: weighted cross entropy of `hidden @ weight.T`, whose logits are never whole.

The vocabulary is cut into chunks of C columns. The forward adds each chunk's logits (L, C) to the rows'
log-sum-exps; the backward computes a chunk's logits again, overwrites them with their gradient and multiplies by
it. So a chunk's part of the weight is read once per pass, and its gradient is one product over all rows, written
to its place and rounded once, without an accumulator. (Chunks of *rows*, as in Liger (arXiv 2410.10989), TRL and
torch's `linear_cross_entropy`, read the weight once per chunk and add their gradients of it: in float32 that takes
4 V D bytes.) Only the gradient of the hidden states is added up over chunks, in float32. Four products instead of
three.

Peak memory beyond the arguments and the gradients returned, in bytes, with s bytes per number of the inputs, at
most

    forward   s L C + 4 min(L C, CHUNK) + 100 L
    backward  s L C + 4 min(L C, CHUNK) + 100 L + 4 L D    the last: the sum

with C of `columns_per_chunk`: 1/32 of the vocabulary, or more for few rows. For float64, 4 is 8; for float32 and
float64 the backward lacks the second and the last term; kernels lack the second. On a CPU, bf16 factors of the sum
are cast: there CHUNK is no limit, and the backward takes 4 C D more. Logits that are kept take s L V. Not measured
on a GPU yet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpack.ops.supervised_cross_entropy import (
    check_weights,
    denominator,
    implementation,
    row_losses,
    row_scales,
    row_state,
    row_weights,
    weighted_sum,
)

# L = supervised rows, D = hidden size, V = vocabulary, C = columns of a chunk of it
CHUNKS = 32  # of a vocabulary: a chunk of 152k words has 4,864, enough for each product to be limited by FLOPs
LEAST = 1 << 20  # logits of a chunk of a small batch: 2 MiB in bf16
COLUMNS = 256  # a chunk is a multiple of this


def columns_per_chunk(L: int, V: int) -> int:
    """C, the columns of a chunk; V if all logits are but one chunk."""
    columns = max(-(-V // CHUNKS), -(-LEAST // max(1, L)))
    return max(1, min(V, -(-columns // COLUMNS) * COLUMNS))


def add_product(sum_LD, a_LC, b_CD):
    """Add a product to a float32 or float64 sum without rounding it to the factors' dtype first: TRL found that to
    bias training (https://github.com/huggingface/trl, `kernels/chunked_logprob.py`)."""
    if a_LC.is_cuda and a_LC.dtype != sum_LD.dtype:
        torch.addmm(sum_LD, a_LC, b_CD, out_dtype=sum_LD.dtype, out=sum_LD)
    else:
        sum_LD.addmm_(a_LC.to(sum_LD.dtype), b_CD.to(sum_LD.dtype))


def supervised_linear_cross_entropy_fwd(hidden_LD, weight_VD, labels_L, weights_L, impl):
    """(weighted sum of the rows' losses, log-sum-exp of each row (L,), the rows' losses (L,)), in the dtype of the
    weights."""
    lse_L, target_L = row_state(weights_L)
    part = implementation(impl, hidden_LD)
    C = columns_per_chunk(len(hidden_LD), len(weight_VD))
    for first, weight_CD in zip(range(0, len(weight_VD), C), weight_VD.split(C)):
        part.cross_entropy_fwd(F.linear(hidden_LD, weight_CD), labels_L, lse_L, target_L, first)
    losses_L = row_losses(weights_L, lse_L, target_L)
    return weighted_sum(weights_L, lse_L, target_L), lse_L, losses_L


def supervised_linear_cross_entropy_bwd(
    hidden_LD, weight_VD, labels_L, weights_L, lse_L, factor, needs_hidden, needs_weight, impl
):
    """(gradient of the hidden states, gradient of the weight); one that is not needed is empty."""
    scale_L = row_scales(weights_L, factor)
    part = implementation(impl, hidden_LD)
    C = columns_per_chunk(len(hidden_LD), len(weight_VD))
    dhidden = torch.zeros_like(hidden_LD if needs_hidden else hidden_LD[:0], dtype=lse_L.dtype)
    dweight = weight_VD.new_empty(weight_VD.shape if needs_weight else (0,))
    for first, weight_CD in zip(range(0, len(weight_VD), C), weight_VD.split(C)):
        dlogits_LC = F.linear(hidden_LD, weight_CD)
        part.cross_entropy_bwd(dlogits_LC, labels_L, scale_L, lse_L, first)
        if needs_weight:
            torch.mm(dlogits_LC.T, hidden_LD, out=dweight[first : first + C])
        if needs_hidden:
            add_product(dhidden, dlogits_LC, weight_CD)
        del dlogits_LC  # before the next chunk's
    return dhidden.to(hidden_LD.dtype), dweight


@torch.library.custom_op("mmpack::supervised_linear_cross_entropy", mutates_args=())
def _supervised_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return supervised_linear_cross_entropy_fwd(hidden, weight, labels, weights, impl)


@_supervised_linear_cross_entropy.register_fake
def _(hidden, weight, labels, weights, impl):
    return weights.new_empty(()), torch.empty_like(weights), torch.empty_like(weights)


@torch.library.custom_op("mmpack::supervised_linear_cross_entropy_bwd", mutates_args=())
def _supervised_linear_cross_entropy_bwd(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    lse: Tensor,
    factor: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return supervised_linear_cross_entropy_bwd(
        hidden, weight, labels, weights, lse, factor, needs_hidden, needs_weight, impl
    )


@_supervised_linear_cross_entropy_bwd.register_fake
def _(hidden, weight, labels, weights, lse, factor, needs_hidden, needs_weight, impl):
    dhidden = hidden.new_empty(hidden.shape if needs_hidden else (0, hidden.shape[1]))
    return dhidden, weight.new_empty(weight.shape if needs_weight else (0,))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, dtotal, dlse, dlosses):
    needs = ctx.needs_input_grad[:2]
    gradients = _supervised_linear_cross_entropy_bwd(*ctx.saved_tensors, dtotal, *needs, ctx.impl)
    dhidden, dweight = (g if needed else None for g, needed in zip(gradients, needs))
    return dhidden, dweight, None, None, None


_supervised_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def supervised_linear_cross_entropy(
    hidden_LD: Tensor,
    weight_VD: Tensor,
    labels_L: Tensor,
    num_items: Tensor | float | None = None,
    *,
    weights_L: Tensor | None = None,
    impl: str = "auto",
    losses_L: Tensor | None = None,
) -> Tensor:
    """`supervised_cross_entropy(hidden @ weight.T, ...)` without the logits; a scalar, float32 or float64.

    Differentiable in the hidden states and the weight, as often as wanted; two calls give the same bits. In
    autocast, both are cast as `F.linear` would.

    Args:
        hidden_LD: (L, D), any floating dtype, what the head is given in rows that have a label.
        weight_VD: (V, D), of the same dtype, the head's weight. A bias is not supported.
        labels_L, num_items, weights_L, losses_L: as in `supervised_cross_entropy`.
        impl: "torch", "triton" (our kernels within a chunk, but for float64), or "auto": torch, until the kernels
            are measured on a GPU. The products are torch's.

    Raises:
        ValueError: shapes or dtypes do not match, an unknown `impl`, or a device that does not run kernels.
    """
    device = hidden_LD.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_LD, weight_VD = hidden_LD.to(dtype), weight_VD.to(dtype)
    if hidden_LD.ndim != 2 or weight_VD.ndim != 2 or hidden_LD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden must be (L, D) and weight (V, D), got {tuple(hidden_LD.shape)} and "
            f"{tuple(weight_VD.shape)}"
        )
    if hidden_LD.dtype != weight_VD.dtype:
        raise ValueError(
            f"hidden and weight must have one dtype, got {hidden_LD.dtype} and {weight_VD.dtype}"
        )
    if labels_L.shape != hidden_LD.shape[:1]:
        raise ValueError(
            f"labels must be ({len(hidden_LD)},), one per row, got {tuple(labels_L.shape)}"
        )
    check_weights(weights_L, labels_L)
    implementation(impl, hidden_LD)
    hidden_LD, labels_L = hidden_LD.contiguous(), labels_L.contiguous()
    dtype = torch.promote_types(hidden_LD.dtype, torch.float32)
    weights_L = row_weights(labels_L, weights_L, dtype)
    num_items = denominator(num_items, weights_L)
    total, _, losses = _supervised_linear_cross_entropy(
        hidden_LD, weight_VD, labels_L, weights_L, impl
    )
    if losses_L is not None:
        losses_L.copy_(losses.detach())
    return total / num_items
