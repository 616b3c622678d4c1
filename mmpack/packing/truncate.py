"""Truncates an encoded sample, at a text token and never inside an image or a video."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mmpack.data.videos import num_grids as num_grids_of
from mmpack.types import EncodedSample, Int64


def truncate_sample(
    sample: EncodedSample, capacity: int, patch_capacity: int | None = None
) -> EncodedSample:
    """Cut a sample at a text token so that it fits.

    An image's run (`<|vision_start|>`, placeholders, `<|vision_end|>`) is never cut, nor is a video's, including
    its timestamps: a run that does not fit completely is removed with its image and everything after it. The
    result may have no answer left: check `is_supervised`.
    """
    vision, ids = sample.vision, sample.input_ids
    is_marker, width, patches = token_sizes(sample)
    fits = width.cumsum() <= capacity
    if patch_capacity is not None:
        fits &= patches.cumsum() <= patch_capacity
    cut = int(fits.sum())  # both sums only grow: the tokens that fit come first
    if cut == len(fits):
        return sample
    # Inside a run, move the cut to before its outermost start.
    opened = np.cumsum(ids == vision.vision_start_token_id) - np.cumsum(
        ids == vision.vision_end_token_id
    )
    while cut and opened[cut - 1] > 0:
        cut -= 1
    num_grids = int(is_marker[:cut].sum())
    counts = [num_grids_of(ref, vision) for ref in sample.media]
    num_refs = int((np.cumsum(counts) <= num_grids).sum())
    return replace(
        sample,
        input_ids=ids[:cut],
        labels=sample.labels[:cut],
        weights=None if sample.weights is None else sample.weights[:cut],
        grid_thw=sample.grid_thw[:num_grids],
        media=sample.media[:num_refs],
        temporal_step=None if sample.temporal_step is None else sample.temporal_step[:num_grids],
    )


def token_sizes(sample: EncodedSample) -> tuple[np.ndarray, Int64, Int64]:
    """For each of a sample's n ids: (whether it is a marker, its expanded tokens, its patches)."""
    vision, ids = sample.vision, sample.input_ids
    is_marker = (ids == vision.image_token_id) | (ids == vision.video_token_id)
    width = np.ones(len(ids), dtype=np.int64)
    width[is_marker] = vision.num_features(sample.grid_thw)
    patches = np.zeros_like(width)
    patches[is_marker] = sample.grid_thw.astype(np.int64).prod(axis=-1)
    return is_marker, width, patches
