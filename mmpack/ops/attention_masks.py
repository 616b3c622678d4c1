"""Masks of a pack, for attention that takes masks rather than offsets.

`block_mask` is FlexAttention's (arXiv 2412.05496): one launch, a program a row of 128 x 128 blocks, which
compares the first and the last segment of every block and writes the blocks there are in order; no T x T
mask is ever made.
`dense_mask` is one: T^2 bytes, 64 MiB at 8,192 tokens and 1 GiB at 32,768, written once. Not measured on
a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmpack.ops.checks import check_indices, on_its_device

# T = tokens, S = segments, B = blocks of T
BLOCK = 128  # FlexAttention's default
BLOCK_Q = 16  # rows of a dense mask that a program writes
BLOCK_KV = 1024  # and columns


@triton.jit
def _write_ordered(count_ptr, indices_ptr, row, column, B, is_listed):
    """How many columns of a row are listed; their numbers, then the numbers of all others."""
    listed = (is_listed & (column < B)).to(tl.int32)
    up_to = tl.cumsum(listed, axis=0)
    count = tl.sum(listed, axis=0)
    place = tl.where(listed != 0, up_to - 1, count + column - up_to)
    tl.store(count_ptr + row, count)
    tl.store(indices_ptr + row.to(tl.int64) * B + place, column, mask=column < B)


@triton.jit(do_not_specialize=["T", "B"])
def _block_mask_kernel(
    partial_count_ptr,
    partial_indices_ptr,
    full_count_ptr,
    full_indices_ptr,
    segment_ids_ptr,
    T,
    B,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_B)
    row_first = tl.load(segment_ids_ptr + row * BLOCK)
    row_last = tl.load(segment_ids_ptr + tl.minimum(row * BLOCK + BLOCK, T) - 1)
    in_blocks = column < B
    first = tl.load(segment_ids_ptr + column * BLOCK, mask=in_blocks, other=0)
    end = tl.minimum(column * BLOCK + BLOCK, T)
    last = tl.load(segment_ids_ptr + end - 1, mask=in_blocks, other=0)
    # Blocks are of the pack's rows: between two there is a segment both have, or none is shared.
    seen = (first <= row_last) & (last >= row_first)
    full = (first == row_last) & (last == row_first) & (column * BLOCK + BLOCK <= T)
    full &= row * BLOCK + BLOCK <= T  # torch fills the last block up with what sees nothing
    if CAUSAL:
        seen &= column <= row
        full &= column < row
    _write_ordered(partial_count_ptr, partial_indices_ptr, row, column, B, seen & (full == 0))
    _write_ordered(full_count_ptr, full_indices_ptr, row, column, B, full)


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
def block_mask_fwd(segment_ids_T, causal):
    """(partial blocks (B,), which (B, B), full blocks (B,), which (B, B)); the argument is checked."""
    T = len(segment_ids_T)
    B = triton.cdiv(T, BLOCK)
    out = _empty_blocks(segment_ids_T)
    if B:
        _block_mask_kernel[(B,)](
            *out,
            segment_ids_T,
            T,
            B,
            CAUSAL=causal,
            BLOCK=BLOCK,
            BLOCK_B=triton.next_power_of_2(B),
            num_warps=4,
        )
    return out


@on_its_device
def dense_mask_fwd(segment_ids_T, causal, dtype):
    """(T, T); the arguments are checked."""
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


def _empty_blocks(segment_ids):
    B = (len(segment_ids) + BLOCK - 1) // BLOCK
    return [segment_ids.new_empty(shape) for shape in ((B,), (B, B), (B,), (B, B))]


@torch.library.custom_op("mmpack::block_mask", mutates_args=())
def _block_mask(segment_ids: Tensor, causal: bool) -> list[Tensor]:
    return block_mask_fwd(segment_ids, causal)


@_block_mask.register_fake
def _(segment_ids, causal):
    return _empty_blocks(segment_ids)


@torch.library.custom_op("mmpack::dense_mask", mutates_args=())
def _dense_mask(segment_ids: Tensor, causal: bool, dtype: torch.dtype) -> Tensor:
    return dense_mask_fwd(segment_ids, causal, dtype)


@_dense_mask.register_fake
def _(segment_ids, causal, dtype):
    return segment_ids.new_empty(len(segment_ids), len(segment_ids), dtype=dtype)


def block_mask(cu_seqlens: Tensor, num_tokens: int, *, causal: bool = True):
    """The BlockMask with which `flex_attention` keeps the segments of a pack apart: what torch's
    `create_block_mask` makes of the same rule, without its T x T mask.

    Args:
        cu_seqlens: (S + 1,) int32, from 0 to `num_tokens`. Its values are not checked.
        num_tokens: T.
        causal: a token sees the past of its segment and itself; else all of it.

    Returns:
        A `torch.nn.attention.flex_attention.BlockMask` of 128 x 128 blocks for one row of T tokens, all
        heads alike.

    Raises:
        ValueError: cu_seqlens are not flat int32 on a device kernels run on.
    """
    from torch.nn.attention.flex_attention import BlockMask

    segment_ids_T = _segment_ids(cu_seqlens, num_tokens)
    blocks = _block_mask(segment_ids_T, causal)

    def mask_mod(b, h, q, kv):
        same = segment_ids_T[q] == segment_ids_T[kv]
        return same & (q >= kv) if causal else same

    return BlockMask.from_kv_blocks(
        *(tensor[None, None] for tensor in blocks),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(num_tokens, num_tokens),
    )


def dense_mask(
    cu_seqlens: Tensor, num_tokens: int, *, causal: bool = True, dtype: torch.dtype = torch.bool
) -> Tensor:
    """(1, 1, T, T): which tokens see which, for attention that takes a 4-D mask, as transformers' "sdpa"
    and "eager" do.

    Args:
        cu_seqlens, num_tokens, causal: as in `block_mask`.
        dtype: bool, true where a token sees another; or a floating dtype, 0 there and its lowest number
            elsewhere, to be added to scores.

    Raises:
        ValueError: cu_seqlens are not flat int32 on a device kernels run on, or another dtype.
    """
    if dtype != torch.bool and not dtype.is_floating_point:
        raise ValueError(f"a mask is bool or floating, got {dtype}")
    return _dense_mask(_segment_ids(cu_seqlens, num_tokens), causal, dtype)[None, None]


def _segment_ids(cu_seqlens, num_tokens):
    check_indices({"cu_seqlens": cu_seqlens}, cu_seqlens.device)
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True, out_int32=True)
