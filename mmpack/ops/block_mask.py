"""FlexAttention's BlockMask (arXiv 2412.05496) of a pack, from segment offsets.

torch's `create_block_mask` evaluates the mask for every pair of tokens. Here the first and last segment of each
block of 128 tokens decide which blocks see each other: (B, B) integers for B blocks, no T x T mask, no
synchronization with the device. About twenty torch ops per step, in plain torch because `impl="flex"` also runs
without Triton.
"""

import torch
from torch import Tensor

# T = tokens, S = segments, B = blocks of T
BLOCK = 128  # rows and columns of a block, FlexAttention's default


def block_mask(cu_seqlens: Tensor, num_tokens: int, *, causal: bool = True):
    """The BlockMask that restricts `flex_attention` to a pack's segments; equal to torch's `create_block_mask` for
    the same mask.

    Args:
        cu_seqlens: (S + 1,) int32, from 0 to `num_tokens`. Its values are not checked.
        num_tokens: T.
        causal: a token sees its segment up to itself; else its whole segment.

    Returns:
        A `torch.nn.attention.flex_attention.BlockMask` of 128 x 128 blocks for one row of T tokens, the same for
        all heads.

    Raises:
        ValueError: cu_seqlens are not flat int32.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1:
        raise ValueError(
            f"cu_seqlens must be flat int32, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    segment_T = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    first = torch.arange(0, num_tokens, BLOCK, device=cu_seqlens.device)
    first_segment_B = segment_T[first]
    last_segment_B = segment_T[(first + BLOCK).clamp_max(num_tokens) - 1]
    places = torch.arange(len(first), device=cu_seqlens.device)
    row_B1, column_1B = places[:, None], places[None, :]
    # Blocks and segments are intervals of rows, so two blocks share a segment if their segment ranges overlap.
    seen_BB = (first_segment_B[:, None] <= last_segment_B) & (
        last_segment_B[:, None] >= first_segment_B
    )
    whole_BB = (first_segment_B[:, None] == last_segment_B) & (
        last_segment_B[:, None] == first_segment_B
    )
    if causal:
        seen_BB &= column_1B <= row_B1
        whole_BB &= column_1B < row_B1
    is_full = first + BLOCK <= num_tokens  # torch pads the last block with rows that see nothing
    whole_BB &= is_full[None, :] & is_full[:, None]

    def mask_mod(b, h, q, kv):
        same = segment_T[q] == segment_T[kv]
        return same & (q >= kv) if causal else same

    return BlockMask.from_kv_blocks(
        *_listed(seen_BB & ~whole_BB),
        *_listed(whole_BB),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(num_tokens, num_tokens),
    )


def _listed(mask_BB: Tensor) -> tuple[Tensor, Tensor]:
    """(number of blocks per row; block indices, those in the mask first, in order)."""
    order_BB = torch.argsort(mask_BB.int(), dim=1, descending=True, stable=True)
    return mask_BB.sum(1, dtype=torch.int32)[None, None], order_BB.int()[None, None]
