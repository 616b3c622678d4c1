"""THE SPECIFICATION: defines what mmpack computes, in slow and clear code.

Every fast version is tested against this file and does not import it; only `mmpack.packing.assemble` and
`mmpack.hf` can run it, on request. Shapes: T tokens in a pack, S segments, I images, U distinct images, P patches,
F features, M placeholders, D hidden size, H heads, K head dim, L supervised tokens, C channels, p patch side, E
hidden size of the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from mmpack.types import IGNORE, MAX_RUN, TILE, EncodedSample, Float32, Int32, Int64, Pack
from mmpack.vision_spec import VisionSpec

# (first token of a run of placeholders, its grid, the first marker that shows the same)
_Run = tuple[int, tuple[int, int, int], int]


def assemble(
    samples: Sequence[EncodedSample], first_shown: Sequence[int] | Int32 | None = None
) -> Pack:
    """Expand, concatenate and index the samples of a pack, without pixels.

    Positions equal those of transformers' `Qwen2VLModel.get_rope_index` for each sample by itself; row 0 is the
    position in the segment, from which transformers separates segments. Grids are ordered images first, then
    videos, so that one call of the tower processes both. An image or a video that several markers show is encoded
    once: the grids of distinct ones, their patches and features have the order of the first markers.

    Args:
        first_shown: (I,) the number of the first marker that shows the same, for each marker
            (`mmpack.packing.shared_images.first_shown`); None: all show something else.
    """
    vision = samples[0].vision
    markers = (vision.image_token_id, vision.video_token_id)
    input_ids: list[int] = []
    labels: list[int] = []
    positions: list[tuple[int, int, int, int]] = []
    cu_seqlens = [0]
    runs: tuple[list[_Run], list[_Run]] = ([], [])  # images, videos

    for sample in samples:
        begin = len(input_ids)
        steps = sample.temporal_step
        if steps is None:
            steps = np.ones(len(sample.grid_thw), dtype=np.float32)
        grid_of_marker = zip(sample.grid_thw.tolist(), steps)
        position = 0  # M-RoPE position of the next token
        for token_id, label in zip(sample.input_ids.tolist(), sample.labels.tolist()):
            here = len(input_ids) - begin  # text position
            if token_id not in markers:
                input_ids.append(token_id)
                labels.append(label if here else IGNORE)  # nothing predicts a segment's first token
                positions.append((here, position, position, position))
                position += 1
                continue
            grid, step = next(grid_of_marker)
            number = len(runs[0]) + len(runs[1])
            kind = runs[markers.index(token_id)]
            first = number if first_shown is None else int(first_shown[number])
            kind.append((len(input_ids), tuple(grid), first))
            for n, (t, h, w) in enumerate(_feature_places(grid, vision)):
                input_ids.append(token_id)
                labels.append(IGNORE)
                t = int(np.float32(t) * step)  # like transformers: in float32, truncated
                positions.append((here + n, position + t, position + h, position + w))
            position += max(grid[1], grid[2]) // vision.merge_size
        cu_seqlens.append(len(input_ids))

    ids = np.array(input_ids, dtype=np.int64)
    ordered = [*runs[0], *runs[1]]
    distinct = list(dict.fromkeys(first for _, _, first in ordered))
    grids = {first: grid for _, grid, first in ordered}
    vision_grids = [grids[first] for first in distinct]
    feature_token: list[int] = []
    feature_offsets = [0]
    for one in distinct:
        starts = [start for start, _, first in ordered if first == one]
        for n in range(len(_feature_places(grids[one], vision))):
            feature_token += [start + n for start in starts]
            feature_offsets.append(len(feature_token))
    features = np.full(len(ids), -1, dtype=np.int32)
    for feature, (begin, end) in enumerate(pairwise(feature_offsets)):
        features[feature_token[begin:end]] = feature
    text_order, text_id_offsets = text_by_id(ids, features)
    frames = [h * w for t, h, w in vision_grids for _ in range(t)]
    vision_cu_seqlens = list(accumulate(frames, initial=0))
    return Pack(
        input_ids=ids,
        labels=np.array(labels, dtype=np.int64),
        position_ids=np.array(positions, dtype=np.int64).reshape(-1, 4).T.copy(),
        cu_seqlens=np.array(cu_seqlens, dtype=np.int32),
        max_seqlen=max(b - a for a, b in pairwise(cu_seqlens)),
        segment_ids=segment_ids(cu_seqlens),
        tiles=attention_tiles(cu_seqlens, causal=True),
        feature_index=features,
        feature_token=np.array(feature_token, dtype=np.int32),
        feature_offsets=np.array(feature_offsets, dtype=np.int32),
        text_order=text_order,
        text_id_offsets=text_id_offsets,
        supervised_index=np.flatnonzero(np.array(labels[1:]) != IGNORE).astype(np.int32),
        grid_thw=np.array([grid for _, grid, _ in ordered], dtype=np.int64).reshape(-1, 3),
        num_images=len(runs[0]),
        vision_index=np.array([distinct.index(first) for *_, first in ordered], dtype=np.int32),
        vision_grid_thw=np.array(vision_grids, dtype=np.int64).reshape(-1, 3),
        vision_cu_seqlens=np.array(vision_cu_seqlens, dtype=np.int32),
        vision_max_seqlen=max(frames, default=0),
        vision_segment_ids=segment_ids(vision_cu_seqlens),
        vision_tiles=attention_tiles(vision_cu_seqlens, causal=False),
        vision_position_ids=_patch_places(vision_grids, vision),
        pixels=None,
        video_pixels=None,
        vision=vision,
    )


def loss_weights(samples: Sequence[EncodedSample], reduction: str) -> Float32:
    """(L,) the weight of each supervised row of a pack.

    A token's own weight is that of its row times that of its turn times that of its source. With the reduction
    "sample", the weights of a sample with n supervised tokens are divided by n, so that samples count equally;
    with "sqrt" by the square root of n. The n of a piece of a split document is the document's.
    """
    weights: list[float] = []
    for sample in samples:
        markers = (sample.vision.image_token_id, sample.vision.video_token_id)
        own = np.ones(len(sample.labels)) if sample.weights is None else sample.weights
        rows = [
            float(weight)
            for token, label, weight in list(zip(sample.input_ids, sample.labels, own))[1:]
            if label != IGNORE and token not in markers
        ]
        n = sample.of_document or len(rows)
        by = {"token": 1, "sample": n, "sqrt": n**0.5}[reduction]
        weights += [weight / by for weight in rows]
    return np.array(weights, dtype=np.float32)


def text_by_id(input_ids: Int64, feature_index: Int32) -> tuple[Int32, Int32]:
    """(text_order, text_id_offsets): text tokens sorted by id, then by position, and split into runs of one id and
    at most MAX_RUN tokens. With these, the embedding table's gradient is a sum in fixed order, without a sort on
    the device, and a frequent id is split over several programs."""
    text = [t for t in range(len(input_ids)) if feature_index[t] < 0]
    order = sorted(text, key=lambda t: input_ids[t])  # a stable sort
    starts: list[int] = []
    for n, t in enumerate(order):
        is_new = n == 0 or input_ids[t] != input_ids[order[n - 1]]
        if is_new or n - starts[-1] == MAX_RUN:
            starts.append(n)
    return np.array(order, dtype=np.int32), np.array([*starts, len(order)], dtype=np.int32)


def segment_ids(offsets: Sequence[int] | Int32) -> Int32:
    """(T,) the segment of each token."""
    return np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))


def attention_tiles(offsets: Sequence[int] | Int32, *, causal: bool) -> Int32:
    """(n, 4) tiles: attention rows `[begin, end)` and the `[begin, end)` of their segment, for segments
    `[offsets[s], offsets[s + 1])`. A tile is at most TILE rows of one segment, or several whole segments that fit
    into TILE rows together and count as one. Most work first: the number of keys up to the end of a causal tile,
    or of the segment."""
    tiles: list[tuple[int, int, int, int]] = []
    joined = [0, 0]  # rows of short segments to be joined

    def close() -> None:
        begin, end = joined
        if begin < end:
            tiles.append((begin, end, begin, end))

    for begin, end in pairwise(int(offset) for offset in offsets):
        if end - joined[0] <= TILE:
            joined[1] = end
            continue
        close()
        joined = [begin, end]
        if end - begin > TILE:
            tiles += [(row, min(row + TILE, end), begin, end) for row in range(begin, end, TILE)]
            joined = [end, end]
    close()
    tiles.sort(key=lambda tile: (tile[2] - tile[1]) if causal else (tile[2] - tile[3]))  # stable
    return np.array(tiles, dtype=np.int32).reshape(-1, 4)


def _feature_places(grid: Sequence[int], vision: VisionSpec) -> list[tuple[int, int, int]]:
    """(t, h, w) of each feature of a grid, in reading order."""
    frames, rows, columns = grid[0], grid[1] // vision.merge_size, grid[2] // vision.merge_size
    return [(t, h, w) for t in range(frames) for h in range(rows) for w in range(columns)]


def _patch_places(grids: Sequence[Sequence[int]], vision: VisionSpec) -> Int64:
    """(P, 2) row and column of each patch, in merge order: the patches of one feature are adjacent."""
    m = vision.merge_size
    places = [
        (row * m + i, column * m + j)
        for frames, height, width in grids
        for _ in range(frames)
        for row in range(height // m)
        for column in range(width // m)
        for i in range(m)
        for j in range(m)
    ]
    return np.array(places, dtype=np.int64).reshape(-1, 2)


def embed_features(
    input_ids: torch.Tensor,
    feature_index: torch.Tensor,
    weight_VD: torch.Tensor,
    features_FD: torch.Tensor,
) -> torch.Tensor:
    """(T, D): the feature at tokens with `feature_index` >= 0, else the token's row of the table."""
    text = weight_VD[input_ids]
    if not len(features_FD):
        return text
    features = features_FD[feature_index.clamp_min(0).long()]
    return torch.where(feature_index[:, None] >= 0, features, text)


class _Repeat(torch.autograd.Function):
    """Rows, each several times. The gradient of a row is the sum over its copies, in their order; that of
    `index_select` has no fixed order on CUDA."""

    @staticmethod
    def forward(
        ctx: Any, features_FD: torch.Tensor, index_M: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(offsets)
        return features_FD.index_select(0, index_M)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (offsets,), (grad_MD,) = ctx.saved_tensors, grads
        every = torch.arange(len(grad_MD), dtype=offsets.dtype, device=offsets.device)
        summed = torch.nn.functional.embedding_bag(
            every, grad_MD, offsets, mode="sum", include_last_offset=True
        )
        return summed, None, None


def repeat_features(
    features_FD: torch.Tensor,
    feature_index: torch.Tensor,
    feature_token: torch.Tensor,
    feature_offsets: torch.Tensor,
) -> torch.Tensor:
    """(M, D) the feature of each placeholder, in the order of `feature_token`. Deterministic: the gradient of a
    feature is the sum over its placeholders, in their order."""
    index_M = feature_index.index_select(0, feature_token)
    repeated: torch.Tensor = _Repeat.apply(features_FD, index_M, feature_offsets)  # type: ignore[no-untyped-call]
    return repeated


def insert_features(
    embeds_TD: torch.Tensor, features_MD: torch.Tensor, feature_token: torch.Tensor
) -> torch.Tensor:
    """(T, D) embeddings with row `feature_token[m]` replaced by row m of the features. Out of place, because the
    output of a frozen embedding may be a leaf that requires grad (LoRA with checkpointing).

    Equal to transformers' `masked_scatter` of the features into the placeholders.
    """
    return embeds_TD.index_copy(0, feature_token.long(), features_MD)


def add_features(
    hidden_TD: torch.Tensor, features_MD: torch.Tensor, feature_token: torch.Tensor
) -> torch.Tensor:
    """(T, D) hidden states with row m of the features added to row `feature_token[m]`, out of place: one level of
    Qwen3-VL's deepstack (transformers' `_deepstack_process`)."""
    return hidden_TD.index_add(0, feature_token, features_MD)


def patch_embed(
    stills: torch.Tensor,
    video: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
) -> torch.Tensor:
    """(P1 + P2, E) hidden states of uint8 patches, stills (P1, C * p * p) before video (P2, C * t * p * p): pixels
    / 255, minus the channel's mean, divided by its std, times the weight (E, C, t, p, p) of the patch convolution.
    A still is repeated in each frame."""
    channels, frames = weight.shape[1:3]
    patches = stills.unflatten(1, (channels, 1, -1)).expand(-1, -1, frames, -1)
    if video is not None:
        patches = torch.cat([patches, video.unflatten(1, (channels, frames, -1))])
    mean_C, std_C = (weight.new_tensor(x)[:, None, None] for x in (mean, std))
    pixel_values = (patches.to(weight.dtype) / 255 - mean_C) / std_C
    return torch.nn.functional.linear(pixel_values.flatten(1), weight.flatten(1), bias)


def apply_mrope(
    q_THK: torch.Tensor,
    k: torch.Tensor,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    sections: Sequence[int],
    interleaved: bool = False,
    attention_scaling: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k (T, heads, K), rotated by angles from positions (3, T) in t, h, w, or (2, T) in h, w.

    Of the R = 2 * sum(sections) rotary channels, channel i of the first half and channel i of the second half are
    rotated by position * frequency; `rotary_axes` gives the row of the position. A tower's sections share one list
    of frequencies; text has one frequency per channel. Angles are float32, as in transformers; the rotation is in
    float32, or in float64 for float64 inputs. Channels from R on are unchanged.
    """
    axes = rotary_axes(sections, interleaved)
    angles = position_ids[axes].T.float() * inv_freq.float().repeat(len(axes) // len(inv_freq))
    cos, sin = (attention_scaling * x[:, None] for x in (angles.cos(), angles.sin()))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        first, second, rest = x.split([len(axes), len(axes), x.shape[-1] - 2 * len(axes)], dim=-1)
        a, b = first.to(exact), second.to(exact)
        rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        return torch.cat([rotated.to(x.dtype), rest], dim=-1)

    return rotate(q_THK), rotate(k)


def rotary_axes(sections: Sequence[int], interleaved: bool) -> list[int]:
    """The row of positions for each frequency. Qwen2-VL: one section after another; Qwen3-VL: t, h, w alternating
    until the sections of h and w are used up, then t."""
    if not interleaved:
        return [axis for axis, length in enumerate(sections) for _ in range(length)]
    return [i % 3 if i < 3 * sections[i % 3] else 0 for i in range(sum(sections))]


def varlen_attention(
    q_THK: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: Sequence[int],
    *,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """(T, H, K): attention within each segment `[offsets[s], offsets[s + 1])`.

    k and v may have fewer heads than q (GQA). Sums are in float32, or in float64 for float64 inputs.
    """
    dtype = torch.promote_types(q_THK.dtype, torch.float32)
    parts = []
    for begin, end in pairwise(int(offset) for offset in offsets):
        q_s, k_s, v_s = (x[begin:end].transpose(0, 1).to(dtype) for x in (q_THK, k, v))
        k_s, v_s = (x.repeat_interleave(len(q_s) // len(x), dim=0) for x in (k_s, v_s))
        scores = q_s @ k_s.transpose(1, 2) * scale
        if causal:
            future = torch.ones(end - begin, end - begin, dtype=torch.bool, device=q_s.device).triu(
                1
            )
            scores = scores.masked_fill(future, -torch.inf)
        parts.append((scores.softmax(dim=2) @ v_s).transpose(0, 1).to(q_THK.dtype))
    return torch.cat(parts) if parts else q_THK


def supervised_cross_entropy(
    logits_LV: torch.Tensor,
    labels_L: torch.Tensor,
    num_items: float | None = None,
    weights_L: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum over rows of weight * -log(softmax(logits)[label]), divided by `num_items` or, if None, by the sum
    of the weights; 0 counts as 1. A row without a label (-100) or of weight 0 adds nothing, whatever its
    logits."""
    weights = torch.ones(len(labels_L)) if weights_L is None else weights_L
    kept = [n for n in range(len(labels_L)) if labels_L[n] != IGNORE and weights[n] != 0]
    total = logits_LV.new_zeros((), dtype=torch.promote_types(logits_LV.dtype, torch.float32))
    for n in kept:
        total = total - weights[n] * logits_LV[n].to(total.dtype).log_softmax(0)[labels_L[n]]
    return total / ((sum(float(weights[n]) for n in kept) if num_items is None else num_items) or 1)


def supervised_linear_cross_entropy(
    hidden_LD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_L: torch.Tensor,
    num_items: float | None = None,
    weights_L: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of a head (V, D) on hidden states (L, D)."""
    return supervised_cross_entropy(hidden_LD @ weight_VD.T, labels_L, num_items, weights_L)
