"""The kernels of `assemble_sequence`; what they compute is described there."""

import triton
import triton.language as tl

from mmpack.ops.assembly.offsets import last_at_or_before

# T = tokens, S = segments, I = images and videos, n = compact ids, R = runs of one id


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
    grid_place_ptr,
    grid_position_ptr,
    feature_offsets_ptr,
    input_ids_ptr,
    offsets_ptr,
    markers_ptr,
    grid_thw_ptr,
    shown_ptr,
    S,
    I,
    video_id,
    MERGE: tl.constexpr,
    LOG_I: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """For each grid: its first token, and the M-RoPE positions that the grids before it take beyond one per
    marker. For each grid that shows something for the first time: its first feature, and the first place in
    `feature_token`. For each segment: its first token and its first grid."""
    stills, still_places = 0, 0
    for first in range(0, I, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        t, h, w = _features(grid_thw_ptr, i, i < I, MERGE)
        marker = tl.load(markers_ptr + i, mask=i < I, other=0)
        is_video = tl.load(input_ids_ptr + marker, mask=i < I, other=0) == video_id
        is_new = tl.load(shown_ptr + 3 * i, mask=i < I, other=-1) == i
        times = tl.load(shown_ptr + 3 * i + 2, mask=i < I, other=0)
        still = tl.where(is_new & (is_video == 0), t * h * w, 0)
        stills += tl.sum(still, axis=0)
        still_places += tl.sum(still * times, axis=0)
    # Sums over previous grids: of tokens and positions, of the features of stills and videos, of their places.
    tokens, positions = 0, 0
    features_0, features_1, places_0, places_1 = 0, stills, 0, still_places
    for first in range(0, I, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        t, h, w = _features(grid_thw_ptr, i, i < I, MERGE)
        marker = tl.load(markers_ptr + i, mask=i < I, other=0)
        is_video = tl.load(input_ids_ptr + marker, mask=i < I, other=0) == video_id
        is_new = tl.load(shown_ptr + 3 * i, mask=i < I, other=-1) == i
        times = tl.load(shown_ptr + 3 * i + 2, mask=i < I, other=0)
        count = t * h * w
        still = tl.where(is_new & (is_video == 0), count, 0)
        clip = tl.where(is_new & is_video, count, 0)
        more = tl.where(i < I, count - 1, 0)
        wider = tl.where(i < I, tl.maximum(h, w) - 1, 0)
        tokens_before = tokens + tl.cumsum(more, axis=0) - more
        feature = tl.where(
            is_video,
            features_1 + tl.cumsum(clip, axis=0) - clip,
            features_0 + tl.cumsum(still, axis=0) - still,
        )
        place = tl.where(
            is_video,
            places_1 + tl.cumsum(clip * times, axis=0) - clip * times,
            places_0 + tl.cumsum(still * times, axis=0) - still * times,
        )
        position = positions + tl.cumsum(wider, axis=0) - wider
        tl.store(grid_token_ptr + i, marker + tokens_before, mask=i < I)
        tl.store(grid_feature_ptr + i, feature, mask=i < I)
        tl.store(grid_place_ptr + i, place, mask=i < I)
        tl.store(grid_position_ptr + i, position, mask=i < I)
        tokens += tl.sum(more, axis=0)
        features_0 += tl.sum(still, axis=0)
        features_1 += tl.sum(clip, axis=0)
        places_0 += tl.sum(still * times, axis=0)
        places_1 += tl.sum(clip * times, axis=0)
        positions += tl.sum(wider, axis=0)
    tl.store(feature_offsets_ptr + features_1, places_1)  # behind the last feature
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
    feature_offsets_ptr,
    token_of_id_ptr,
    input_ids_ptr,
    offsets_ptr,
    markers_ptr,
    grid_thw_ptr,
    temporal_step_ptr,
    shown_ptr,
    cu_seqlens_ptr,
    first_grid_ptr,
    grid_token_ptr,
    grid_feature_ptr,
    grid_place_ptr,
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
    shown = tl.load(shown_ptr + 3 * grid, mask=is_behind, other=0)
    turn = tl.load(shown_ptr + 3 * grid + 1, mask=is_behind, other=0)
    times = tl.load(shown_ptr + 3 * grid + 2, mask=is_behind, other=0)
    feature = tl.load(grid_feature_ptr + shown, mask=is_behind, other=0) + within
    tl.store(feature_index_ptr + t, tl.where(is_feature, feature, -1), mask=is_token)
    start = tl.load(grid_place_ptr + shown, mask=is_behind, other=0) + within * times
    is_inside = is_token & is_feature
    tl.store(feature_token_ptr + start + turn, t, mask=is_inside)
    tl.store(feature_offsets_ptr + feature, start, mask=is_inside & (turn == 0))

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
