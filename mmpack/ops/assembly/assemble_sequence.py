"""A pack's sequence from its compact samples, on the device; equal to `mmpack.reference.assemble`, bit for bit.

Compact samples have one marker per image and a few bytes per token, while a finished pack has sixty bytes per
token. The host knows the sizes, so nothing synchronizes with the device:

- `_outline_kernel`, one program: prefix sums over the grids give the first token, feature and M-RoPE position of
  each image.
- `_assemble_sequence_kernel`, one program per block of tokens: finds each token's segment and image by binary
  search in these sums, then writes the token and its indices.
- `torch.sort` orders the text by id; `_text_runs_kernel`, one program, splits it into runs.
- `mmpack.ops.assembly.attention_tiles`.

Moving the bytes, about 56 per token, takes less than a microsecond; launches dominate. Not measured on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmpack.ops.arguments import check_indices, on_its_device
from mmpack.ops.assembly.attention_tiles import attention_tiles_fwd
from mmpack.ops.assembly.offsets import last_at_or_before, search_steps
from mmpack.types import MAX_RUN

# T = tokens, F = features, S = segments, I = images and videos, n = compact ids, R = runs of one id
BLOCK_I = 256  # grids or segments summed at once by the outline
BLOCK_T = 256  # tokens per program
BLOCK_X = 2048  # sorted text tokens split into runs at once


@triton.jit
def _features(grid_thw_ptr, i, is_grid, MERGE: tl.constexpr):
    """(t, h, w) of a grid in features."""
    t = tl.load(grid_thw_ptr + 3 * i, mask=is_grid, other=0)
    h = tl.load(grid_thw_ptr + 3 * i + 1, mask=is_grid, other=0) // MERGE
    w = tl.load(grid_thw_ptr + 3 * i + 2, mask=is_grid, other=0) // MERGE
    return t, h, w


@triton.jit(do_not_specialize=["S", "I", "video_id"])
def _outline_kernel(
    cu_seqlens_ptr,
    first_grid_ptr,
    grid_token_ptr,
    grid_feature_ptr,
    grid_position_ptr,
    input_ids_ptr,
    offsets_ptr,
    markers_ptr,
    grid_thw_ptr,
    S,
    I,
    video_id,
    MERGE: tl.constexpr,
    LOG_I: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """For each grid: its first token, its first feature, and the M-RoPE positions that the grids before it take
    beyond one per marker. For each segment: its first token and its first grid."""
    stills = 0
    for first in range(0, I, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        t, h, w = _features(grid_thw_ptr, i, i < I, MERGE)
        marker = tl.load(markers_ptr + i, mask=i < I, other=0)
        is_video = tl.load(input_ids_ptr + marker, mask=i < I, other=0) == video_id
        stills += tl.sum(tl.where(is_video, 0, t * h * w), axis=0)
    tokens, features, positions = 0, 0, 0  # sums over previous grids; features only over stills
    for first in range(0, I, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        t, h, w = _features(grid_thw_ptr, i, i < I, MERGE)
        marker = tl.load(markers_ptr + i, mask=i < I, other=0)
        is_video = tl.load(input_ids_ptr + marker, mask=i < I, other=0) == video_id
        count = t * h * w
        still = tl.where(is_video, 0, count)
        more = tl.where(i < I, count - 1, 0)
        wider = tl.where(i < I, tl.maximum(h, w) - 1, 0)
        tokens_before = tokens + tl.cumsum(more, axis=0) - more
        stills_before = features + tl.cumsum(still, axis=0) - still
        all_before = tokens_before + i  # features of all previous grids
        feature = tl.where(is_video, stills + all_before - stills_before, stills_before)
        position = positions + tl.cumsum(wider, axis=0) - wider
        tl.store(grid_token_ptr + i, marker + tokens_before, mask=i < I)
        tl.store(grid_feature_ptr + i, feature, mask=i < I)
        tl.store(grid_position_ptr + i, position, mask=i < I)
        tokens += tl.sum(more, axis=0)
        features += tl.sum(still, axis=0)
        positions += tl.sum(wider, axis=0)
    tl.store(grid_token_ptr + I, tokens)  # behind the last grid: what all of them take
    tl.store(grid_position_ptr + I, positions)
    tl.debug_barrier()
    for first in range(0, S + 1, BLOCK_I):
        s = first + tl.arange(0, BLOCK_I)
        offset = tl.load(offsets_ptr + s, mask=s <= S, other=0)
        grid = last_at_or_before(markers_ptr, I, offset - 1, LOG_I) + 1
        # Tokens added by the grids before it: a grid's first token minus its marker.
        inside = (s <= S) & (grid < I)
        token = tl.load(grid_token_ptr + grid, mask=s <= S, other=0)
        shift = token - tl.load(markers_ptr + grid, mask=inside, other=0)
        tl.store(cu_seqlens_ptr + s, offset + shift, mask=s <= S)
        tl.store(first_grid_ptr + s, grid, mask=s <= S)


@triton.jit(do_not_specialize=["T", "S", "I"])
def _assemble_sequence_kernel(
    input_ids_out_ptr,
    position_ids_ptr,
    segment_ids_ptr,
    feature_index_ptr,
    feature_token_ptr,
    token_of_id_ptr,
    input_ids_ptr,
    offsets_ptr,
    markers_ptr,
    grid_thw_ptr,
    temporal_step_ptr,
    cu_seqlens_ptr,
    first_grid_ptr,
    grid_token_ptr,
    grid_feature_ptr,
    grid_position_ptr,
    T,
    S,
    I,
    MERGE: tl.constexpr,
    LOG_S: tl.constexpr,
    LOG_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = t < T
    segment = last_at_or_before(cu_seqlens_ptr, S + 1, tl.minimum(t, T - 1), LOG_S)
    begin = tl.load(cu_seqlens_ptr + segment)
    compact_begin = tl.load(offsets_ptr + segment)
    grid = last_at_or_before(grid_token_ptr, I, t, LOG_I)
    is_behind = grid >= 0  # at or after a grid's first token
    marker = tl.load(markers_ptr + grid, mask=is_behind, other=0)
    token = tl.load(grid_token_ptr + grid, mask=is_behind, other=0)
    frames, height, width = _features(grid_thw_ptr, grid, is_behind, MERGE)
    within = t - token
    is_feature = is_behind & (within < frames * height * width)

    # The position in the compact ids; for a feature, its marker.
    after = marker + 1 + within - frames * height * width
    place = tl.where(is_feature, marker, tl.where(is_behind, after, t))
    token_id = tl.load(input_ids_ptr + place, mask=is_token, other=0)
    tl.store(input_ids_out_ptr + t, token_id.to(tl.int64), mask=is_token)
    tl.store(segment_ids_ptr + t, segment, mask=is_token)
    tl.store(token_of_id_ptr + place, t, mask=is_token & (is_feature == 0))
    feature = tl.load(grid_feature_ptr + grid, mask=is_behind, other=0) + within
    tl.store(feature_index_ptr + t, tl.where(is_feature, feature, -1), mask=is_token)
    tl.store(feature_token_ptr + feature, t, mask=is_token & is_feature)

    # M-RoPE: one position per compact token, plus the extra positions of previous grids in the segment.
    grids = tl.where(is_feature, grid, grid + 1)
    wider = tl.load(grid_position_ptr + grids)
    wider -= tl.load(grid_position_ptr + tl.load(first_grid_ptr + segment))
    position = place - compact_begin + wider
    frame_size = tl.maximum(height * width, 1)
    step = tl.load(temporal_step_ptr + grid, mask=is_feature, other=0.0)
    at_t = ((within // frame_size).to(tl.float32) * step).to(tl.int32)
    at_h = within % frame_size // tl.maximum(width, 1)
    at_w = within % tl.maximum(width, 1)
    tl.store(position_ids_ptr + t, (t - begin).to(tl.int64), mask=is_token)
    for axis in tl.static_range(3):
        at = at_t if axis == 0 else at_h if axis == 1 else at_w
        value = position + tl.where(is_feature, at, 0)
        tl.store(position_ids_ptr + (axis + 1) * T + t, value.to(tl.int64), mask=is_token)


@triton.jit(
    do_not_specialize=["num_text", "R"],
    do_not_specialize_on_alignment=["sorted_ids_ptr", "sorted_places_ptr"],
)
def _text_runs_kernel(
    text_order_ptr,
    text_id_offsets_ptr,
    id_start_ptr,
    sorted_ids_ptr,
    sorted_places_ptr,
    token_of_id_ptr,
    num_text,
    R,
    MAX_RUN: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Split text that is sorted by id into runs of one id and at most MAX_RUN tokens."""
    runs, ids = 0, 0  # before this block
    for first in range(0, num_text, BLOCK_X):
        x = first + tl.arange(0, BLOCK_X)
        is_text = x < num_text
        place = tl.load(sorted_places_ptr + x, mask=is_text, other=0)
        token = tl.load(token_of_id_ptr + place, mask=is_text, other=0)
        tl.store(text_order_ptr + x, token, mask=is_text)
        token_id = tl.load(sorted_ids_ptr + x, mask=is_text, other=-1)
        before = tl.load(sorted_ids_ptr + x - 1, mask=is_text & (x > 0), other=-1)
        is_new = (is_text & (token_id != before)).to(tl.int32)
        number = ids + tl.cumsum(is_new, axis=0) - 1  # index of its id, from 0
        tl.store(id_start_ptr + number, x, mask=is_new != 0)
        tl.debug_barrier()
        start = tl.load(id_start_ptr + number, mask=is_text, other=0)
        begins = is_text & ((x - start) % MAX_RUN == 0)
        run = runs + tl.cumsum(begins.to(tl.int32), axis=0) - 1
        tl.store(text_id_offsets_ptr + run, x, mask=begins)
        runs += tl.sum(begins.to(tl.int32), axis=0)
        ids += tl.sum(is_new, axis=0)
    tl.store(text_id_offsets_ptr + R, num_text)


@on_its_device
def assemble_sequence_fwd(
    input_ids, offsets, markers, grid_thw_I3, temporal_step, sizes, video_id, merge_size
):
    """The tensors of `assemble_sequence`, in its order; arguments are not checked again."""
    T, F, R, num_tiles = sizes
    S, I, n = len(offsets) - 1, len(markers), len(input_ids)
    out = _empty(input_ids, T, F, R, num_tiles, S)
    ids_T, position_ids, cu_seqlens, segment_ids, _, feature_index, feature_token, *text = out
    if not T:
        text[1].zero_()
        return [*out[:2], cu_seqlens.zero_(), *out[3:]]
    first_grid, *of_grids = (offsets.new_empty(k) for k in (S + 1, I + 1, I, I + 1))
    token_of_id = offsets.new_empty(n)
    outline = (cu_seqlens, first_grid, *of_grids)
    log_i, log_s = search_steps(I), search_steps(S + 1)
    _outline_kernel[(1,)](
        *outline,
        input_ids,
        offsets,
        markers,
        grid_thw_I3,
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
        feature_index,
        feature_token,
        token_of_id,
        input_ids,
        offsets,
        markers,
        grid_thw_I3,
        temporal_step,
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
        *text,
        offsets.new_empty(T - F),
        sorted_ids[I:],
        places[I:],
        token_of_id,
        T - F,
        R,
        MAX_RUN=MAX_RUN,
        BLOCK_X=BLOCK_X,
        num_warps=8,
    )
    out[4] = attention_tiles_fwd(cu_seqlens, num_tiles, True)
    return out


def _empty(input_ids, T, F, R, num_tiles, S):
    shapes = ((num_tiles, 4), (T,), (F,), (T - F,), (R + 1,))
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
    sizes: list[int],
    video_id: int,
    merge_size: int,
) -> list[Tensor]:
    return assemble_sequence_fwd(
        input_ids, offsets, markers, grid_thw, temporal_step, sizes, video_id, merge_size
    )


@_assemble_sequence.register_fake
def _(input_ids, offsets, markers, grid_thw, temporal_step, sizes, video_id, merge_size):
    return _empty(input_ids, *sizes, len(offsets) - 1)


_NAMES = (
    "input_ids",
    "position_ids",
    "cu_seqlens",
    "segment_ids",
    "tiles",
    "feature_index",
    "feature_token",
    "text_order",
    "text_id_offsets",
)


def assemble_sequence(
    input_ids: Tensor,
    offsets: Tensor,
    markers: Tensor,
    grid_thw: Tensor,
    temporal_step: Tensor,
    sizes: tuple[int, int, int, int],
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
        sizes: (T, F, R, n): tokens, features, runs and tiles of the pack.
        video_id: the marker id of videos, whose features come after those of images.
        merge_size: patches per side of a feature.

    Returns:
        By name `input_ids` (T,) and `position_ids` (4, T) int64, `cu_seqlens` (S + 1,), `segment_ids`
        (T,), `tiles` (n, 4), `feature_index` (T,), `feature_token` (F,), `text_order` (T - F,) and
        `text_id_offsets` (R + 1,) int32: the fields of `mmpack.Pack`.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    I = len(markers)
    flat = {"input_ids": input_ids, "offsets": offsets, "markers": markers}
    check_indices({**flat, "grid_thw": grid_thw.flatten()}, input_ids.device)
    if grid_thw.shape != (I, 3):
        raise ValueError(f"grid_thw must be {(I, 3)} for {I} markers, got {tuple(grid_thw.shape)}")
    if (temporal_step.dtype, temporal_step.shape) != (torch.float32, (I,)):
        raise ValueError(
            f"temporal_step must be float32 {(I,)}, got {temporal_step.dtype} "
            f"{tuple(temporal_step.shape)}"
        )
    T, F, R, num_tiles = sizes
    if min(T, F, R, num_tiles) < 0 or T - F != len(input_ids) - I or not len(offsets):
        raise ValueError(
            f"sizes do not match: {len(input_ids)} input_ids with {I} markers and {len(offsets) - 1} segments, "
            f"but {T} tokens, {F} features, {R} runs and {num_tiles} tiles"
        )
    tensors = (x.contiguous() for x in (input_ids, offsets, markers, grid_thw, temporal_step))
    out = _assemble_sequence(*tensors, list(sizes), video_id, merge_size)
    return dict(zip(_NAMES, out))
