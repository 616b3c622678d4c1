"""[EncodedSample] -> Pack: the samples of one bin become one flat row.

The only door to assembly. `impl="reference"` runs the specification in `mmpack.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from mmpack import images
from mmpack.errors import BadImageError
from mmpack.types import EncodedSample, Int32, Int64, Pack


def assemble(
    samples: Sequence[EncodedSample],
    *,
    pixels: bool = True,
    impl: Literal["reference"] = "reference",
    empty: Callable[..., images.Patches] = np.empty,
) -> Pack:
    """Expand, concatenate and index the samples of one pack, and decode their images.

    Args:
        samples: at least one; all encoded with the same `VisionSpec`.
        pixels: decode the images; without, `Pack.pixels` is None.
        impl: which implementation; there is one so far.
        empty: makes the array the pixels are decoded into, called as `numpy.empty`.

    Returns:
        The pack. Segment s is `samples[s]`; images are in marker order.

    Raises:
        ValueError: no samples or different specs.
        BadImageError: an image cannot be decoded to its planned grid; names file and row.
    """
    if impl != "reference":
        raise ValueError(f"impl must be 'reference', got {impl!r}")
    if not samples:
        raise ValueError("a pack needs at least one sample")
    if any(sample.vision != samples[0].vision for sample in samples):
        raise ValueError("the samples of a pack were encoded with different VisionSpecs")
    for sample in samples:
        markers = int((sample.input_ids == sample.vision.image_token_id).sum())
        if markers != len(sample.grid_thw):
            raise ValueError(
                f"{_where(sample)}: {markers} image markers, {len(sample.grid_thw)} grids"
            )
    from mmpack import reference  # here: planning does not need torch

    pack = reference.assemble(samples)
    return replace(pack, pixels=_load_pixels(samples, pack, empty)) if pixels else pack


def _load_pixels(
    samples: Sequence[EncodedSample], pack: Pack, empty: Callable[..., images.Patches]
) -> images.Patches:
    vision = pack.vision
    pixels = empty((len(pack.vision_position_ids), vision.patch_values), dtype=np.uint8)
    end = 0
    for segment, sample in enumerate(samples):
        if len(sample.images) != len(sample.grid_thw):
            raise ValueError(
                f"{_where(sample)}: {len(sample.grid_thw)} grids but {len(sample.images)} images to "
                "decode; pass pixels=False"
            )
        for image, grid in zip(sample.images, sample.grid_thw):
            begin, end = end, end + int(grid.prod())
            try:
                images.load_patches(image, grid, vision, out=pixels[begin:end])
            except ValueError as error:
                bad = BadImageError(f"{_where(sample)}: {error}")
                bad.segment = segment
                raise bad from None
    return pixels


def _where(sample: EncodedSample) -> str:
    return f"row {sample.row} of {sample.source}"


def concatenate(packs: Sequence[Pack]) -> Pack:
    """Several packs as one, segments and images in order.

    Raises:
        ValueError: the packs have different specs.
    """
    if len(packs) == 1:
        return packs[0]
    if any(pack.vision != packs[0].vision for pack in packs):
        raise ValueError("the packs of a batch were made with different VisionSpecs")
    from mmpack import reference

    tokens = _starts([len(pack.input_ids) for pack in packs])
    features = _starts([len(pack.feature_token) for pack in packs])
    patches = _starts([len(pack.vision_position_ids) for pack in packs])
    input_ids = np.concatenate([pack.input_ids for pack in packs])
    feature_index = np.concatenate(
        [np.where(p.feature_index < 0, -1, p.feature_index + n) for p, n in zip(packs, features)]
    ).astype(np.int32)
    text_order, text_id_offsets = reference.text_by_id(input_ids, feature_index)
    cu_seqlens = _join_offsets([pack.cu_seqlens for pack in packs], tokens)
    vision_cu_seqlens = _join_offsets([pack.vision_cu_seqlens for pack in packs], patches)
    pixels = [pack.pixels for pack in packs if pack.pixels is not None]
    return Pack(
        input_ids=input_ids,
        labels=np.concatenate([pack.labels for pack in packs]),
        position_ids=np.concatenate([pack.position_ids for pack in packs], axis=1),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(pack.max_seqlen for pack in packs),
        segment_ids=reference.segment_ids(cu_seqlens),
        tiles=reference.attention_tiles(cu_seqlens, causal=True),
        feature_index=feature_index,
        feature_token=_shift([pack.feature_token for pack in packs], tokens),
        text_order=text_order,
        text_id_offsets=text_id_offsets,
        supervised_index=_shift([pack.supervised_index for pack in packs], tokens),
        grid_thw=np.concatenate([pack.grid_thw for pack in packs]),
        vision_cu_seqlens=vision_cu_seqlens,
        vision_max_seqlen=max(pack.vision_max_seqlen for pack in packs),
        vision_segment_ids=reference.segment_ids(vision_cu_seqlens),
        vision_tiles=reference.attention_tiles(vision_cu_seqlens, causal=False),
        vision_position_ids=np.concatenate([pack.vision_position_ids for pack in packs]),
        pixels=np.concatenate(pixels) if len(pixels) == len(packs) else None,
        vision=packs[0].vision,
    )


def _starts(sizes: Sequence[int]) -> Int64:
    return np.cumsum([0, *sizes[:-1]])


def _shift(arrays: Sequence[Int32], by: Int64) -> Int32:
    shifted: Int64 = np.concatenate([array + n for array, n in zip(arrays, by)])
    return shifted.astype(np.int32)


def _join_offsets(offsets: Sequence[Int32], starts: Int64) -> Int32:
    rest = [array[1:] for array in offsets]
    return np.concatenate([[0], _shift(rest, starts)]).astype(np.int32)
