"""Packs that the device assembles: the samples of one bin, joined but not expanded.

The host decodes pixels and settles what it must know (labels, sizes, offsets); the rest of a pack is
left to `mmpack.ops.assembly.assemble_sequence`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmpack import _native
from mmpack.data.media_paths import MediaFolders
from mmpack.packing.assemble import Joined, Size, check_specs, join, load_pixels
from mmpack.types import CompactPack, EncodedSample, Int32, Int64
from mmpack.vision_spec import VisionSpec


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """What the host must know of a compact pack; letters and fields as of `mmpack.Pack`.

    Attributes:
        labels, supervised_index, cu_seqlens, vision_cu_seqlens, max_seqlen, vision_max_seqlen: the pack's.
        markers: (I,) int32 places of the markers in the compact ids.
        grid_thw, num_images, vision: the pack's.
        num_features, num_runs, num_tiles, num_vision_tiles: lengths of what the device makes.
    """

    labels: Int64
    supervised_index: Int32
    cu_seqlens: Int32
    vision_cu_seqlens: Int32
    markers: Int32
    grid_thw: Int64
    num_images: int
    vision: VisionSpec
    max_seqlen: int
    vision_max_seqlen: int
    num_features: int
    num_runs: int
    num_tiles: int
    num_vision_tiles: int


def compact(
    samples: Sequence[EncodedSample],
    *,
    pixels: bool = True,
    empty: Callable[..., Any] = np.empty,
    folders: MediaFolders | None = None,
) -> CompactPack:
    """Join the samples of one pack, and decode their images and videos; `mmpack.packing.assemble` without what it
    expands, with its arguments and errors."""
    joined, size = join(samples)
    stills, clips = load_pixels(samples, size, empty, folders) if pixels else (None, None)
    return CompactPack(*joined[:6], stills, clips, samples[0].vision)


def concatenate_compact(packs: Sequence[CompactPack]) -> CompactPack:
    """Several packs as one, segments in order.

    Raises:
        ValueError: no packs, or packs with different specs.
    """
    check_specs(packs)
    if len(packs) == 1:
        return packs[0]
    arrays = {
        name: np.concatenate([getattr(pack, name) for pack in packs])
        for name in ("input_ids", "labels", "grid_thw", "temporal_step")
    }
    lengths = [np.diff(pack.offsets) for pack in packs]
    num_grids = [np.diff(pack.grid_offsets) for pack in packs]
    for name, counts in {"offsets": lengths, "grid_offsets": num_grids}.items():
        arrays[name] = np.concatenate([[0], *counts]).cumsum().astype(np.int32)
    for name in ("pixels", "video_pixels"):
        parts = [getattr(pack, name) for pack in packs]
        arrays[name] = None if any(part is None for part in parts) else np.concatenate(parts)
    return CompactPack(**arrays, vision=packs[0].vision)


def outline(pack: CompactPack, empty: Callable[..., Any] = np.empty) -> Outline:
    """What the host must know of the pack; `empty` makes its arrays, called as `numpy.empty`.

    Raises:
        ValueError: the pack's arrays contradict each other.
    """
    vision = pack.vision
    joined = Joined(
        pack.input_ids,
        pack.labels,
        pack.offsets,
        pack.grid_thw,
        pack.temporal_step,
        pack.grid_offsets,
        vision.image_token_id,
        vision.video_token_id,
        vision.merge_size,
    )
    size = Size(*_native.measure(*joined))
    T, F = size.tokens, size.features
    out = {
        "labels": empty((T,), np.int64),
        "supervised_index": empty((T - F,), np.int32),  # with room to spare
        "cu_seqlens": empty((len(pack.offsets),), np.int32),
        "vision_cu_seqlens": empty((size.frames + 1,), np.int32),
        "markers": empty((len(pack.grid_thw),), np.int32),
    }
    supervised, runs, tiles, vision_tiles, max_seqlen, vision_max_seqlen = _native.outline(
        *joined, out
    )
    out["supervised_index"] = out["supervised_index"][:supervised]
    is_video = pack.input_ids[out["markers"]] == vision.video_token_id
    return Outline(
        **out,
        grid_thw=pack.grid_thw[np.argsort(is_video, kind="stable")].astype(np.int64),
        num_images=size.images,
        vision=vision,
        max_seqlen=max_seqlen,
        vision_max_seqlen=vision_max_seqlen,
        num_features=F,
        num_runs=runs,
        num_tiles=tiles,
        num_vision_tiles=vision_tiles,
    )
