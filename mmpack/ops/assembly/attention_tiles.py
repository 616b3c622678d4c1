"""Attention tiles from segment offsets, on the device.

Two launches: one program walks through the segments and splits them into tiles (short segments are joined
greedily); then each tile finds its position by counting the tiles before it, since n^2 parallel comparisons are
faster than a sort. Not measured on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmpack.ops.arguments import check_indices, on_its_device
from mmpack.types import TILE

# S = segments, n = tiles
BLOCK_CUT = 32  # tiles of a long segment written at once
BLOCK_N = 64  # tiles ranked per program
BLOCK_M = 64  # tiles compared with at once


@triton.jit
def _store_tiles(tiles_ptr, place, begin, end, segment_begin, segment_end, mask):
    tl.store(tiles_ptr + 4 * place, begin, mask=mask)
    tl.store(tiles_ptr + 4 * place + 1, end, mask=mask)
    tl.store(tiles_ptr + 4 * place + 2, segment_begin, mask=mask)
    tl.store(tiles_ptr + 4 * place + 3, segment_end, mask=mask)


@triton.jit(do_not_specialize=["S"])
def _cut_tiles_kernel(tiles_ptr, offsets_ptr, S, TILE: tl.constexpr, BLOCK_CUT: tl.constexpr):
    """Tiles in reading order."""
    count = 0
    joined_begin = tl.load(offsets_ptr)  # start of short segments to be joined
    begin = joined_begin
    for s in range(S):
        end = tl.load(offsets_ptr + s + 1)
        fits = end - joined_begin <= TILE
        closes = (fits == 0) & (joined_begin < begin)
        _store_tiles(tiles_ptr, count, joined_begin, begin, joined_begin, begin, closes)
        count += closes.to(tl.int32)
        is_long = end - begin > TILE
        num_tiles = tl.where(is_long, tl.cdiv(end - begin, TILE), 0)
        for first in range(0, num_tiles, BLOCK_CUT):
            n = first + tl.arange(0, BLOCK_CUT)
            rows = begin + n * TILE
            last = tl.minimum(rows + TILE, end)
            _store_tiles(tiles_ptr, count + n, rows, last, begin, end, n < num_tiles)
        count += num_tiles
        joined_begin = tl.where(fits, joined_begin, tl.where(is_long, end, begin))
        begin = end
    _store_tiles(tiles_ptr, count, joined_begin, begin, joined_begin, begin, joined_begin < begin)


@triton.jit
def _work(tiles_ptr, place, n, CAUSAL: tl.constexpr):
    """The number of keys that a tile attends to; -1 after the last tile."""
    last = tl.load(tiles_ptr + 4 * place + (1 if CAUSAL else 3), mask=place < n, other=-1)
    return last - tl.load(tiles_ptr + 4 * place + 2, mask=place < n, other=0)


@triton.jit(do_not_specialize=["n"])
def _rank_tiles_kernel(
    out_ptr, tiles_ptr, n, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Sort tiles by work, most first; stable."""
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    work = _work(tiles_ptr, place, n, CAUSAL)
    rank = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, n, BLOCK_M):
        other = first + tl.arange(0, BLOCK_M)
        others = _work(tiles_ptr, other, n, CAUSAL)
        is_before = (others[None, :] > work[:, None]) | (
            (others[None, :] == work[:, None]) & (other[None, :] < place[:, None])
        )
        rank += tl.sum(is_before.to(tl.int32), axis=1)
    for column in tl.static_range(4):
        value = tl.load(tiles_ptr + 4 * place + column, mask=place < n)
        tl.store(out_ptr + 4 * rank + column, value, mask=place < n)


@on_its_device
def attention_tiles_fwd(offsets, num_tiles, causal):
    """(n, 4) in two launches; arguments are not checked again."""
    cut_n4, tiles_n4 = offsets.new_empty(2, num_tiles, 4)
    if num_tiles:
        _cut_tiles_kernel[(1,)](
            cut_n4, offsets, len(offsets) - 1, TILE=TILE, BLOCK_CUT=BLOCK_CUT, num_warps=1
        )
        _rank_tiles_kernel[(triton.cdiv(num_tiles, BLOCK_N),)](
            tiles_n4,
            cut_n4,
            num_tiles,
            CAUSAL=causal,
            BLOCK_N=BLOCK_N,
            BLOCK_M=BLOCK_M,
            num_warps=4,
        )
    return tiles_n4


@torch.library.custom_op("mmpack::attention_tiles", mutates_args=())
def _attention_tiles(offsets: Tensor, num_tiles: int, causal: bool) -> Tensor:
    return attention_tiles_fwd(offsets, num_tiles, causal)


@_attention_tiles.register_fake
def _(offsets, num_tiles, causal):
    return offsets.new_empty(num_tiles, 4)


def attention_tiles(offsets: Tensor, num_tiles: int, *, causal: bool) -> Tensor:
    """(n, 4) int32 tiles for `varlen_attention`, as in `mmpack.Pack.tiles`: attention rows `[begin, end)` and the
    `[begin, end)` of their segment, most work first.

    Args:
        offsets: (S + 1,) int32 segment offsets, ascending from 0. Not checked.
        num_tiles: n, which the host computes from the same offsets (`mmpack.packing.compact.compact`). Not
            checked; a wrong number writes out of bounds.
        causal: work is the keys up to a tile's end, instead of all keys of its segment.

    Raises:
        ValueError: offsets are not flat int32, the device cannot run kernels, or n is negative.
    """
    check_indices({"offsets": offsets}, offsets.device)
    if num_tiles < 0:
        raise ValueError(f"num_tiles must not be negative, got {num_tiles}")
    return _attention_tiles(offsets, num_tiles, causal)
