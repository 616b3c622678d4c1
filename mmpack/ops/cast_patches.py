"""uint8 patches -> their values minus 128 in a floating dtype, in rows that a matrix product reads at full width.

    out[p, n] = x[p, n] - 128    for n < N
                0                for N <= n < W, the next multiple of 8

Products on tensor cores read rows 16 bytes at a time, 8 numbers of bf16. A still patch of 14 pixels has N = 588
values, 1,176 bytes; W is 592. Integers of magnitude up to 128 are exact in bf16 and half. One program writes ROWS
rows, which lie behind each other, so columns need no padding to a power of two.

Bytes per patch in bf16, one launch: N + 2 W, 1,772 at 14 pixels; torch's flip and cast move 5 N, 2,940. Not
measured on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmpack.ops.arguments import check_device, on_its_device

# P = patches, N = values of a patch, W = N rounded up to a multiple of 8
ROWS = 8  # patches per program
BLOCK = 1024  # values at once: 128 threads x 8, 16 bytes of bf16 each


@triton.jit(do_not_specialize=["P"])
def _cast_patches_fwd_kernel(
    out_ptr,
    patches_ptr,
    P,
    N: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    out_ptr += first.to(tl.int64) * W
    patches_ptr += first.to(tl.int64) * N
    values = tl.minimum(P - first, ROWS) * W
    for start in tl.static_range(0, ROWS * W, BLOCK):
        at = start + tl.arange(0, BLOCK)
        row, column = at // W, at % W
        is_value = (at < values) & (column < N)
        # Not `other=128`: Triton 3.6 and 3.7 fill a vector of int8 with the sign of a negative one.
        x = tl.load(patches_ptr + row * N + column, mask=is_value, other=0)
        shifted = tl.where(is_value, x.to(tl.float32) - 128.0, 0.0)
        tl.store(out_ptr + at, shifted.to(out_ptr.dtype.element_ty), mask=at < values)


def padded_width(N):
    """W: N rounded up to a multiple of 8."""
    return -(-N // 8) * 8


@on_its_device
def cast_patches_fwd(patches_PN, dtype):
    """(P, W) in one launch; arguments are not checked again."""
    P, N = patches_PN.shape
    out_PW = patches_PN.new_empty(P, padded_width(N), dtype=dtype)
    if P and N:
        _cast_patches_fwd_kernel[(triton.cdiv(P, ROWS),)](
            out_PW,
            patches_PN.contiguous(),
            P,
            N=N,
            W=out_PW.shape[1],
            ROWS=ROWS,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return out_PW


@torch.library.custom_op("mmpack::cast_patches", mutates_args=())
def _cast_patches(patches: Tensor, dtype: torch.dtype) -> Tensor:
    return cast_patches_fwd(patches, dtype)


@_cast_patches.register_fake
def _(patches, dtype):
    return patches.new_empty(len(patches), padded_width(patches.shape[1]), dtype=dtype)


def cast_patches(patches_PN: Tensor, dtype: torch.dtype) -> Tensor:
    """(P, W) values minus 128 in `dtype`, zeros from column N on; W is N rounded up to a multiple of 8. Has no
    gradient.

    Args:
        patches_PN: (P, N) uint8.
        dtype: floating.

    Raises:
        ValueError: the patches are not uint8 (P, N), the dtype is not floating, or the device cannot run kernels.
    """
    if patches_PN.dtype != torch.uint8 or patches_PN.ndim != 2 or not dtype.is_floating_point:
        raise ValueError(
            f"patches must be uint8 (P, N) and the dtype floating, got {patches_PN.dtype} "
            f"{tuple(patches_PN.shape)} and {dtype}"
        )
    check_device(patches_PN.device)
    return _cast_patches(patches_PN, dtype)
