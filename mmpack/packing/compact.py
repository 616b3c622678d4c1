"""Packs for assembly on the device: the samples of one bin, joined but not expanded.

The host computes the values it needs (labels, sizes, offsets); `mmpack.ops.assembly.assemble_sequence` computes
the rest of a pack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmpack import _native
from mmpack.packing.assemble import join
from mmpack.types import EncodedSample, Float32, Int32, Int64
from mmpack.vision_spec import VisionSpec


@dataclass(frozen=True, slots=True, eq=False)
class CompactPack:
    """The concatenated samples of one pack, not expanded, and the values of the pack that the host needs.

    Attributes:
        input_ids: (n,) int32, with one marker per grid.
        offsets: (S + 1,) int32 offsets of the samples in `input_ids`.
        marker_thw: (I, 3) int32 grids of the markers, in their order.
        temporal_step: (I,) float32 M-RoPE positions from one temporal patch of a grid to the next.
        grid_offsets: (S + 1,) int32 offsets of the samples in `marker_thw`.
        shown: (I, 3) int32, for each marker: the first marker that shows the same image or video, how many before
            it show it, and how many do in all.
        markers: (I,) int32 positions of the markers in `input_ids`.
        labels, supervised_index, cu_seqlens, vision_cu_seqlens, max_seqlen, vision_max_seqlen, grid_thw,
            num_images, vision_grid_thw, vision: as in `mmpack.Pack`, expanded.
        num_placeholders, num_features, num_runs, num_tiles, num_vision_tiles: lengths of the arrays that the
            device makes.
    """

    input_ids: Int32
    offsets: Int32
    marker_thw: Int32
    temporal_step: Float32
    grid_offsets: Int32
    shown: Int32
    markers: Int32
    labels: Int64
    supervised_index: Int32
    cu_seqlens: Int32
    vision_cu_seqlens: Int32
    max_seqlen: int
    vision_max_seqlen: int
    grid_thw: Int64
    num_images: int
    vision_grid_thw: Int64
    vision: VisionSpec
    num_placeholders: int
    num_features: int
    num_runs: int
    num_tiles: int
    num_vision_tiles: int


def compact(samples: Sequence[EncodedSample], empty: Callable[..., Any] = np.empty) -> CompactPack:
    """Join the samples of one pack without expanding them or decoding pixels; arguments and errors as in
    `mmpack.assemble`."""
    joined, size = join(samples)
    vision = samples[0].vision
    T, M = size.tokens, size.placeholders
    out = {
        "labels": empty((T,), np.int64),
        "supervised_index": empty((T - M,), np.int32),  # an upper bound, cut below
        "cu_seqlens": empty((len(joined.offsets),), np.int32),
        "vision_cu_seqlens": empty((size.frames + 1,), np.int32),
        "markers": empty((len(joined.grid_thw),), np.int32),
    }
    supervised, runs, tiles, vision_tiles, max_seqlen, vision_max_seqlen = _native.outline(
        *joined, out
    )
    out["supervised_index"] = out["supervised_index"][:supervised]
    is_video = joined.input_ids[out["markers"]] == vision.video_token_id
    order = np.argsort(is_video, kind="stable")  # images first
    is_new = joined.first_shown == np.arange(len(joined.first_shown))
    marker_thw = joined.grid_thw.astype(np.int64)
    return CompactPack(
        input_ids=joined.input_ids,
        offsets=joined.offsets,
        marker_thw=joined.grid_thw,
        temporal_step=joined.temporal_step,
        grid_offsets=joined.grid_offsets,
        shown=_shown(joined.first_shown),
        **out,
        max_seqlen=max_seqlen,
        vision_max_seqlen=vision_max_seqlen,
        grid_thw=marker_thw[order],
        num_images=size.images,
        vision_grid_thw=marker_thw[order[is_new[order]]],
        vision=vision,
        num_placeholders=M,
        num_features=size.features,
        num_runs=runs,
        num_tiles=tiles,
        num_vision_tiles=vision_tiles,
    )


def _shown(first_shown: Int32) -> Int32:
    """`CompactPack.shown`."""
    order = np.argsort(first_shown, kind="stable")
    grouped = first_shown[order]
    turn = np.empty_like(first_shown)
    turn[order] = np.arange(len(order)) - np.searchsorted(grouped, grouped)
    times = np.bincount(first_shown, minlength=len(first_shown))[first_shown]
    return np.stack([first_shown, turn, times], axis=1).astype(np.int32)
