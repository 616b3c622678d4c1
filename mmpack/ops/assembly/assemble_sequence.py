"""A pack's sequence from its compact samples, on the device; equal to `mmpack.reference.assemble`, bit for bit.

Compact samples have one marker per image and a few bytes per token, while a finished pack has sixty bytes per
token. The host knows the sizes, so nothing synchronizes with the device:

- `_outline_kernel`, one program: prefix sums over the grids give the first token and M-RoPE position of each
  image, and the first feature of what it shows.
- `_assemble_sequence_kernel`, one program per block of tokens: finds each token's segment and image by binary
  search in these sums, then writes the token and its indices.
- `torch.sort` orders the text by id; `_text_runs_kernel`, one program, splits it into runs.
- `mmpack.ops.assembly.attention_tiles`.

Moving the bytes, about 56 per token, takes less than a microsecond; launches dominate. Not measured on a GPU yet.
"""

import torch
import triton
from torch import Tensor

from mmpack.ops.arguments import check_indices, on_its_device
from mmpack.ops.assembly.assemble_sequence_kernels import (
    _assemble_sequence_kernel,
    _outline_kernel,
    _text_runs_kernel,
)
from mmpack.ops.assembly.attention_tiles import attention_tiles_fwd
from mmpack.ops.assembly.offsets import search_steps
from mmpack.types import MAX_RUN

# T = tokens, F = features, M = placeholders, S = segments, I = images and videos, n = compact ids, R = runs of one
# id
BLOCK_I = 256  # grids or segments summed at once by the outline
BLOCK_T = 256  # tokens per program
BLOCK_X = 2048  # sorted text tokens split into runs at once


@on_its_device
def assemble_sequence_fwd(
    input_ids, offsets, markers, grid_thw_I3, temporal_step, shown_I3, sizes, video_id, merge_size
):
    """The tensors of `assemble_sequence`, in its order; arguments are not checked again."""
    T, M, F, R, num_tiles = sizes
    S, I, n = len(offsets) - 1, len(markers), len(input_ids)
    out = _empty(input_ids, T, M, F, R, num_tiles, S)
    ids_T, position_ids, cu_seqlens, segment_ids, _, *features, text_order, text_id_offsets = out
    if not T:
        for one in (cu_seqlens, features[2], text_id_offsets):
            one.zero_()
        return out
    first_grid, *of_grids = (offsets.new_empty(k) for k in (S + 1, I + 1, I, I, I + 1))
    token_of_id = offsets.new_empty(n)
    outline = (cu_seqlens, first_grid, *of_grids)
    log_i, log_s = search_steps(I), search_steps(S + 1)
    _outline_kernel[(1,)](
        *outline,
        features[2],
        input_ids,
        offsets,
        markers,
        grid_thw_I3,
        shown_I3,
        S,
        I,
        video_id,
        MERGE=merge_size,
        LOG_I=log_i,
        BLOCK_I=BLOCK_I,
        num_warps=4,
    )
    _assemble_sequence_kernel[(triton.cdiv(T, BLOCK_T),)](
        ids_T,
        position_ids,
        segment_ids,
        *features,
        token_of_id,
        input_ids,
        offsets,
        markers,
        grid_thw_I3,
        temporal_step,
        shown_I3,
        *outline,
        T,
        S,
        I,
        MERGE=merge_size,
        LOG_S=log_s,
        LOG_I=log_i,
        BLOCK_T=BLOCK_T,
        num_warps=4,
    )
    keys = input_ids.index_fill(0, markers.long(), -1)  # markers first, then text by id
    sorted_ids, places = keys.sort(stable=True)
    _text_runs_kernel[(1,)](
        text_order,
        text_id_offsets,
        offsets.new_empty(T - M),
        sorted_ids[I:],
        places[I:],
        token_of_id,
        T - M,
        R,
        MAX_RUN=MAX_RUN,
        BLOCK_X=BLOCK_X,
        num_warps=8,
    )
    out[4] = attention_tiles_fwd(cu_seqlens, num_tiles, True)
    return out


def _empty(input_ids, T, M, F, R, num_tiles, S):
    shapes = ((num_tiles, 4), (T,), (M,), (F + 1,), (T - M,), (R + 1,))
    return [
        input_ids.new_empty(T, dtype=torch.int64),
        input_ids.new_empty(4, T, dtype=torch.int64),
        input_ids.new_empty(S + 1),
        input_ids.new_empty(T),
        *(input_ids.new_empty(shape) for shape in shapes),
    ]


@torch.library.custom_op("mmpack::assemble_sequence", mutates_args=())
def _assemble_sequence(
    input_ids: Tensor,
    offsets: Tensor,
    markers: Tensor,
    grid_thw: Tensor,
    temporal_step: Tensor,
    shown: Tensor,
    sizes: list[int],
    video_id: int,
    merge_size: int,
) -> list[Tensor]:
    return assemble_sequence_fwd(
        input_ids, offsets, markers, grid_thw, temporal_step, shown, sizes, video_id, merge_size
    )


@_assemble_sequence.register_fake
def _(input_ids, offsets, markers, grid_thw, temporal_step, shown, sizes, video_id, merge_size):
    return _empty(input_ids, *sizes, len(offsets) - 1)


_NAMES = (
    "input_ids",
    "position_ids",
    "cu_seqlens",
    "segment_ids",
    "tiles",
    "feature_index",
    "feature_token",
    "feature_offsets",
    "text_order",
    "text_id_offsets",
)


def assemble_sequence(
    input_ids: Tensor,
    offsets: Tensor,
    markers: Tensor,
    grid_thw: Tensor,
    temporal_step: Tensor,
    shown: Tensor,
    sizes: tuple[int, int, int, int, int],
    *,
    video_id: int,
    merge_size: int = 2,
) -> dict[str, Tensor]:
    """Expand concatenated samples, with one marker per image or video, into a packed sequence.

    Tensor values are not checked, because that would synchronize with the device; `mmpack.packing.compact.compact`
    makes and checks matching arguments.

    Args:
        input_ids: (n,) int32, not negative.
        offsets: (S + 1,) int32 offsets of the samples in `input_ids`.
        markers: (I,) int32 positions of the markers in `input_ids`, ascending.
        grid_thw: (I, 3) int32 patches of each image and video; height and width are multiples of `merge_size`.
        temporal_step: (I,) float32 M-RoPE positions from one temporal patch to the next.
        shown: (I, 3) int32, of each marker: the first marker that shows the same, how many before it show it, and
            how many do in all (`CompactPack.shown`).
        sizes: (T, M, F, R, n): tokens, placeholders, features, runs and tiles of the pack.
        video_id: the marker id of videos, whose features come after those of images.
        merge_size: patches per side of a feature.

    Returns:
        By name `input_ids` (T,) and `position_ids` (4, T) int64, `cu_seqlens` (S + 1,), `segment_ids`
        (T,), `tiles` (n, 4), `feature_index` (T,), `feature_token` (M,), `feature_offsets` (F + 1,), `text_order`
        (T - M,) and `text_id_offsets` (R + 1,) int32: the fields of `mmpack.Pack`.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    I = len(markers)
    flat = {"input_ids": input_ids, "offsets": offsets, "markers": markers}
    of_markers = {"grid_thw": grid_thw, "shown": shown}
    flat |= {name: tensor.flatten() for name, tensor in of_markers.items()}
    check_indices(flat, input_ids.device)
    for name, tensor in of_markers.items():
        if tensor.shape != (I, 3):
            raise ValueError(f"{name} must be {(I, 3)} for {I} markers, got {tuple(tensor.shape)}")
    if (temporal_step.dtype, temporal_step.shape) != (torch.float32, (I,)):
        raise ValueError(
            f"temporal_step must be float32 {(I,)}, got {temporal_step.dtype} "
            f"{tuple(temporal_step.shape)}"
        )
    T, M, F, R, num_tiles = sizes
    if min(T, M, F, R, num_tiles) < 0 or F > M or T - M != len(input_ids) - I or not len(offsets):
        raise ValueError(
            f"sizes do not match: {len(input_ids)} input_ids with {I} markers and {len(offsets) - 1} segments, "
            f"but {T} tokens, {M} placeholders, {F} features, {R} runs and {num_tiles} tiles"
        )
    tensors = (input_ids, offsets, markers, grid_thw, temporal_step, shown)
    out = _assemble_sequence(*(x.contiguous() for x in tensors), list(sizes), video_id, merge_size)
    return dict(zip(_NAMES, out))
