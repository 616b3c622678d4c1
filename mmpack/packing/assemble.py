"""[EncodedSample] -> Pack: the samples of one bin become one flat row.

The only door to assembly. `impl="reference"` runs the specification in `mmpack.reference`; by default
the C++ core writes the same arrays, bit for bit (`csrc/assembler.h`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmpack import _native
from mmpack.data import images, videos
from mmpack.data.media_paths import MediaFolders
from mmpack.errors import BadImageError
from mmpack.types import (
    PACK_ARRAYS,
    TILE,
    CompactPack,
    EncodedSample,
    Float32,
    ImageRef,
    Int32,
    Int64,
    Pack,
)
from mmpack.vision_spec import VisionSpec


class Joined(NamedTuple):
    """Samples one after the other, as the core reads them."""

    input_ids: Int32  # (n,)
    labels: Int32  # (n,)
    offsets: Int32  # (S + 1,)
    grid_thw: Int32  # (I, 3)
    temporal_step: Float32  # (I,)
    grid_offsets: Int32  # (S + 1,)
    image_id: int
    video_id: int
    merge_size: int


class Size(NamedTuple):
    """What they take in a pack."""

    tokens: int
    features: int
    frames: int
    patches: int
    images: int
    image_patches: int


def assemble(
    samples: Sequence[EncodedSample],
    *,
    pixels: bool = True,
    impl: Literal["native", "reference"] = "native",
    empty: Callable[..., Any] = np.empty,
    folders: MediaFolders | None = None,
) -> Pack:
    """Expand, concatenate and index the samples of one pack, and decode their images and videos.

    Args:
        samples: at least one; all encoded with the same `VisionSpec`.
        pixels: decode images and videos; without, `Pack.pixels` and `Pack.video_pixels` are None.
        impl: "native", or "reference" for the specification; the packs are equal.
        empty: makes the arrays that the core and the decoder write, called as `numpy.empty`.
        folders: where files of images and videos must lie when they are opened, links followed; None:
            anywhere.

    Returns:
        The pack. Segment s is `samples[s]`; images are in marker order, then videos.

    Raises:
        ValueError: no samples, different specs, or a sample whose arrays contradict each other.
        BadImageError: an image or a video cannot be decoded to its planned grid, or lies outside of
            `folders`; names file and row.
    """
    if impl not in ("native", "reference"):
        raise ValueError(f"impl must be 'native' or 'reference', got {impl!r}")
    joined, size = join(samples)
    if impl == "native":
        pack = _assemble_native(joined, size, samples[0].vision, empty)
    else:
        from mmpack import reference  # here: planning does not need torch

        pack = reference.assemble(samples)
    if not pixels:
        return pack
    stills, clips = load_pixels(samples, size, empty, folders)
    return replace(pack, pixels=stills, video_pixels=clips)


def join(samples: Sequence[EncodedSample]) -> tuple[Joined, Size]:
    """The samples one after the other, and the size of their pack.

    Raises:
        ValueError: as `assemble`.
    """
    if not samples:
        raise ValueError("a pack needs at least one sample")
    vision = samples[0].vision
    if any(sample.vision is not vision and sample.vision != vision for sample in samples):
        raise ValueError("the samples of a pack were encoded with different VisionSpecs")
    joined = _concatenate(samples)
    try:
        return joined, Size(*_native.measure(*joined))
    except ValueError as error:
        if len(samples) == 1:
            raise ValueError(f"{_where(samples[0])}: {error}") from None
        for sample in samples:  # which of them?
            join([sample])
        raise


def _concatenate(samples: Sequence[EncodedSample]) -> Joined:
    vision = samples[0].vision
    num_ids = [len(sample.input_ids) for sample in samples]
    num_grids = [len(sample.grid_thw) for sample in samples]
    for sample, n in zip(samples, num_ids):
        if len(sample.labels) != n:
            raise ValueError(f"{_where(sample)}: {len(sample.labels)} labels, {n} input_ids")
    steps = np.ones(sum(num_grids), dtype=np.float32)
    for sample, begin in zip(samples, accumulate(num_grids, initial=0)):
        if sample.temporal_step is not None:
            steps[begin : begin + len(sample.temporal_step)] = sample.temporal_step
    return Joined(
        np.concatenate([sample.input_ids for sample in samples]),
        np.concatenate([sample.labels for sample in samples]),
        np.array([*accumulate(num_ids, initial=0)], dtype=np.int32),
        np.concatenate([sample.grid_thw for sample in samples]),
        steps,
        np.array([*accumulate(num_grids, initial=0)], dtype=np.int32),
        vision.image_token_id,
        vision.video_token_id,
        vision.merge_size,
    )


def _assemble_native(
    joined: Joined,
    size: Size,
    vision: VisionSpec,
    empty: Callable[..., Any],
) -> Pack:
    T, F, frames, P, num_images, _ = size
    S, I = len(joined.offsets) - 1, len(joined.grid_thw)
    shapes = {
        "T": (T,),
        "4, T": (4, T),
        "S + 1": (S + 1,),
        "F": (F,),
        "T - F": (T - F,),
        "T - F + 1": (T - F + 1,),
        "I, 3": (I, 3),
        "frames + 1": (frames + 1,),
        "P": (P,),
        "P, 2": (P, 2),
        "most_tiles(T, S), 4": (S + T // TILE, 4),
        "most_tiles(P, frames), 4": (frames + P // TILE, 4),
    }
    out: dict[str, Any] = {
        name: empty(shapes[extents], dtype) for name, (dtype, extents) in PACK_ARRAYS.items()
    }
    supervised, runs, tiles, vision_tiles, max_seqlen, vision_max_seqlen = _native.assemble(
        *joined, out
    )
    out["supervised_index"] = out["supervised_index"][:supervised]
    out["text_id_offsets"] = out["text_id_offsets"][: runs + 1]
    out["tiles"] = out["tiles"][:tiles]
    out["vision_tiles"] = out["vision_tiles"][:vision_tiles]
    return Pack(
        **out,
        num_images=num_images,
        max_seqlen=max_seqlen,
        vision_max_seqlen=vision_max_seqlen,
        pixels=None,
        video_pixels=None,
        vision=vision,
    )


def load_pixels(
    samples: Sequence[EncodedSample],
    size: Size,
    empty: Callable[..., Any],
    folders: MediaFolders | None = None,
) -> tuple[images.Patches, images.Patches]:
    """Patches of the images and of the videos, decoded into what `empty` makes.

    Raises:
        BadImageError: as `assemble`.
    """
    vision, num_stills = samples[0].vision, size.image_patches
    num_clips = size.patches - num_stills
    values = vision.patch_values
    stills: images.Patches = empty((num_stills, values), dtype=np.uint8)
    clips: images.Patches = empty((num_clips, vision.temporal_patch_size * values), dtype=np.uint8)
    still = clip = 0  # the next one's first patch
    for segment, sample in enumerate(samples):
        grids = iter(sample.grid_thw)
        counts = [videos.num_grids(ref, vision) for ref in sample.media]
        if sum(counts) != len(sample.grid_thw):
            raise ValueError(
                f"{_where(sample)}: {len(sample.grid_thw)} grids but {len(sample.media)} images and "
                "videos to decode; pass pixels=False"
            )
        for ref, count in zip(sample.media, counts):
            grid_thw = np.array([next(grids) for _ in range(count)])
            patches = int(grid_thw.prod(axis=1).sum())
            try:
                if isinstance(ref, ImageRef):
                    out = stills[still : still + patches]
                    images.load_patches(ref, grid_thw[0], vision, out, folders)
                    still += patches
                else:
                    out = clips[clip : clip + patches]
                    videos.load_patches(ref, grid_thw, vision, out, folders)
                    clip += patches
            except ValueError as error:
                bad = BadImageError(f"{_where(sample)}: {error}")
                bad.segment = segment
                raise bad from None
    return stills, clips


def _where(sample: EncodedSample) -> str:
    return f"row {sample.row} of {sample.source}"


def check_specs(packs: Sequence[Pack | CompactPack]) -> None:
    """Raises:
    ValueError: no packs, or packs with different specs.
    """
    if not packs:
        raise ValueError("a batch needs at least one pack")
    if any(pack.vision != packs[0].vision for pack in packs):
        raise ValueError("the packs of a batch were made with different VisionSpecs")


def concatenate(packs: Sequence[Pack]) -> Pack:
    """Several packs as one, segments in order, images in order before videos in order.

    Raises:
        ValueError: no packs, or packs with different specs.
    """
    check_specs(packs)
    if len(packs) == 1:
        return packs[0]
    tokens = _starts([len(pack.input_ids) for pack in packs])
    grids = [pack.num_images for pack in packs]
    patches = [pack.num_image_patches for pack in packs]
    features = [n // packs[0].vision.merge_size ** 2 for n in patches]
    frames = [int(np.searchsorted(pack.vision_cu_seqlens, n)) for pack, n in zip(packs, patches)]
    input_ids = np.concatenate([pack.input_ids for pack in packs])
    feature_token = _images_first(
        [pack.feature_token + n for pack, n in zip(packs, tokens)], features
    ).astype(np.int32)
    feature_index = np.full(len(input_ids), -1, dtype=np.int32)
    feature_index[feature_token] = np.arange(len(feature_token), dtype=np.int32)
    text_order, text_id_offsets = _native.text_by_id(input_ids, feature_index)
    cu_seqlens = _join_offsets([pack.cu_seqlens for pack in packs], tokens)
    lengths = _images_first([np.diff(pack.vision_cu_seqlens) for pack in packs], frames)
    vision_cu_seqlens = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    pixels = [pack.pixels for pack in packs if pack.pixels is not None]
    clips = [pack.video_pixels for pack in packs if pack.video_pixels is not None]
    return Pack(
        input_ids=input_ids,
        labels=np.concatenate([pack.labels for pack in packs]),
        position_ids=np.concatenate([pack.position_ids for pack in packs], axis=1),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(pack.max_seqlen for pack in packs),
        segment_ids=_segment_ids(cu_seqlens),
        tiles=_native.attention_tiles(cu_seqlens, causal=True),
        feature_index=feature_index,
        feature_token=feature_token,
        text_order=text_order,
        text_id_offsets=text_id_offsets,
        supervised_index=_shift([pack.supervised_index for pack in packs], tokens),
        grid_thw=_images_first([pack.grid_thw for pack in packs], grids),
        num_images=sum(grids),
        vision_cu_seqlens=vision_cu_seqlens,
        vision_max_seqlen=max(pack.vision_max_seqlen for pack in packs),
        vision_segment_ids=_segment_ids(vision_cu_seqlens),
        vision_tiles=_native.attention_tiles(vision_cu_seqlens, causal=False),
        vision_position_ids=_images_first([pack.vision_position_ids for pack in packs], patches),
        pixels=np.concatenate(pixels) if len(pixels) == len(packs) else None,
        video_pixels=np.concatenate(clips) if len(clips) == len(packs) else None,
        vision=packs[0].vision,
    )


def _images_first(arrays: Sequence[NDArray[Any]], num_images: Sequence[int]) -> NDArray[Any]:
    """Arrays whose first rows are images' and whose rest are videos' as one such array."""
    images = [array[:n] for array, n in zip(arrays, num_images)]
    return np.concatenate([*images, *(array[n:] for array, n in zip(arrays, num_images))])


def _starts(sizes: Sequence[int]) -> Int64:
    return np.cumsum([0, *sizes[:-1]])


def _shift(arrays: Sequence[Int32], by: Int64) -> Int32:
    shifted: Int64 = np.concatenate([array + n for array, n in zip(arrays, by)])
    return shifted.astype(np.int32)


def _join_offsets(offsets: Sequence[Int32], starts: Int64) -> Int32:
    rest = [array[1:] for array in offsets]
    return np.concatenate([[0], _shift(rest, starts)]).astype(np.int32)


def _segment_ids(offsets: Int32) -> Int32:
    return np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
