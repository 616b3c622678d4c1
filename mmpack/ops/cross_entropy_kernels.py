"""Triton kernels of the cross entropy: 2 bytes read per bf16 logit in the forward, 2 read and 2 written in the
backward, in place. One program per row, which goes over the row's columns once.

The columns may be a part of the vocabulary: the forward adds a part to a row's log-sum-exp, and the backward needs
no other part. Sums are float32.
"""

import triton
import triton.language as tl

from mmpack.ops.arguments import on_its_device

# L = supervised rows, C = columns of this part of the vocabulary
BLOCK_C = 4096  # columns at once: 256 threads x 16 two-byte logits (32 bytes)
NUM_WARPS = 8


@triton.jit(do_not_specialize=["first"])
def _cross_entropy_fwd_kernel(
    lse_ptr,
    target_ptr,
    logits_ptr,
    labels_ptr,
    stride,
    C,
    first,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride
    top = -3.0e38  # finite, so that a block of minus infinity is no NaN
    total = 0.0
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        x = tl.load(logits_ptr + offs_c, mask=offs_c < C, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
        top = higher
    lse = top + tl.log(total)
    before = tl.load(lse_ptr + row)  # of the columns before
    top = tl.maximum(before, lse)
    tl.store(lse_ptr + row, top + tl.log(tl.exp(before - top) + tl.exp(lse - top)))
    label = tl.load(labels_ptr + row) - first
    inside = (label >= 0) & (label < C)
    target = tl.load(logits_ptr + label, mask=inside, other=0.0).to(tl.float32)
    tl.store(target_ptr + row, target, mask=inside)


@triton.jit(do_not_specialize=["first"])
def _cross_entropy_bwd_kernel(
    logits_ptr,
    labels_ptr,
    scale_ptr,
    lse_ptr,
    stride,
    C,
    first,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride
    label = tl.load(labels_ptr + row) - first
    scale = tl.load(scale_ptr + row)
    lse = tl.load(lse_ptr + row)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        x = tl.load(logits_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        gradient = scale * (tl.exp(x - lse) - tl.where(offs_c == label, 1.0, 0.0))
        gradient = tl.where(scale == 0, 0.0, gradient)  # whatever the logits
        tl.store(logits_ptr + offs_c, gradient.to(logits_ptr.dtype.element_ty), mask=mask_c)


@on_its_device
def cross_entropy_fwd(logits_LC, labels_L, lse_L, target_L, first):
    """Add columns `[first, first + C)` to the rows' log-sum-exp, and note the logit of each label among them."""
    L, C = logits_LC.shape
    if L and C:
        _cross_entropy_fwd_kernel[(L,)](
            lse_L, target_L, logits_LC, labels_L, logits_LC.stride(0), C, first,
            BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
        )  # fmt: skip


@on_its_device
def cross_entropy_bwd(logits_LC, labels_L, scale_L, lse_L, first):
    """Overwrite the logits with scale * (softmax - one-hot), rounded once; with 0 where the scale is 0."""
    L, C = logits_LC.shape
    if L and C:
        _cross_entropy_bwd_kernel[(L,)](
            logits_LC, labels_L, scale_L, lse_L, logits_LC.stride(0), C, first,
            BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
        )  # fmt: skip
