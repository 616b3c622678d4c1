"""The 4-D mask of a pack, for attention that takes masks instead of offsets: T^2 bytes, 64 MiB for 8,192 tokens
and 1 GiB for 32,768, written once. Not measured on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmpack.ops.arguments import check_indices, on_its_device

# T = tokens, S = segments
BLOCK_Q = 16  # rows of the mask per program
BLOCK_KV = 1024  # columns of the mask per program


@triton.jit
def _dense_mask_kernel(
    mask_ptr,
    segment_ids_ptr,
    T,
    HIDDEN: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    kv = tl.program_id(1) * BLOCK_KV + tl.arange(0, BLOCK_KV)
    of_q = tl.load(segment_ids_ptr + q, mask=q < T, other=-1)
    of_kv = tl.load(segment_ids_ptr + kv, mask=kv < T, other=-1)
    sees = of_q[:, None] == of_kv[None, :]
    if CAUSAL:
        sees &= q[:, None] >= kv[None, :]
    if HIDDEN == 0:
        value = sees.to(tl.uint8)
    else:
        value = tl.where(sees, 0.0, HIDDEN)
    place = q.to(tl.int64)[:, None] * T + kv[None, :]
    is_inside = (q < T)[:, None] & (kv < T)[None, :]
    tl.store(mask_ptr + place, value.to(mask_ptr.dtype.element_ty), mask=is_inside)


@on_its_device
def dense_mask_fwd(segment_ids_T, causal, dtype):
    """(T, T); arguments are not checked again."""
    T = len(segment_ids_T)
    out = segment_ids_T.new_empty(T, T, dtype=dtype)
    if T:
        _dense_mask_kernel[(triton.cdiv(T, BLOCK_Q), triton.cdiv(T, BLOCK_KV))](
            out.view(torch.uint8) if dtype == torch.bool else out,
            segment_ids_T,
            T,
            HIDDEN=torch.finfo(dtype).min if dtype.is_floating_point else 0,
            CAUSAL=causal,
            BLOCK_Q=BLOCK_Q,
            BLOCK_KV=BLOCK_KV,
            num_warps=4,
        )
    return out


@torch.library.custom_op("mmpack::dense_mask", mutates_args=())
def _dense_mask(segment_ids: Tensor, causal: bool, dtype: torch.dtype) -> Tensor:
    return dense_mask_fwd(segment_ids, causal, dtype)


@_dense_mask.register_fake
def _(segment_ids, causal, dtype):
    return segment_ids.new_empty(len(segment_ids), len(segment_ids), dtype=dtype)


def dense_mask(
    cu_seqlens: Tensor, num_tokens: int, *, causal: bool = True, dtype: torch.dtype = torch.bool
) -> Tensor:
    """(1, 1, T, T) attention mask of a pack, for attention that takes a 4-D mask, such as transformers' "sdpa" and
    "eager".

    Args:
        cu_seqlens: (S + 1,) int32, from 0 to `num_tokens`. Its values are not checked.
        num_tokens: T.
        causal: a token sees its segment up to itself; else its whole segment.
        dtype: bool, true where a token sees another; or a floating dtype, 0 there and its lowest value elsewhere,
            to be added to scores.

    Raises:
        ValueError: cu_seqlens are not flat int32, the device cannot run kernels, or the dtype is neither bool nor
            floating.
    """
    if dtype != torch.bool and not dtype.is_floating_point:
        raise ValueError(f"dtype must be bool or floating, got {dtype}")
    return _dense_mask(_segment_ids(cu_seqlens, num_tokens), causal, dtype)[None, None]


def _segment_ids(cu_seqlens, num_tokens):
    check_indices({"cu_seqlens": cu_seqlens}, cu_seqlens.device)
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True, out_int32=True)
