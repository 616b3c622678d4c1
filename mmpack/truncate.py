"""Cut an encoded sample to a length, at a text token and never inside an image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mmpack.types import EncodedSample, Int64


def truncate_sample(
    sample: EncodedSample, capacity: int, patch_capacity: int | None = None
) -> EncodedSample:
    """Cut a sample at a text token so that it fits.

    An image run (`<|vision_start|>`, its placeholders, `<|vision_end|>`) is never cut: one that
    does not fit whole is removed with everything after it, its image too. The result may have
    lost its whole answer: check `is_supervised`.
    """
    vision = sample.vision
    is_marker, width, patches = token_sizes(sample)
    fits = width.cumsum() <= capacity
    if patch_capacity is not None:
        fits &= patches.cumsum() <= patch_capacity
    cut = int(fits.sum())  # both sums only grow: the tokens that fit come first
    if cut == len(fits):
        return sample
    # Inside `start marker end`, the cut moves to before `start`.
    if cut and sample.input_ids[cut] == vision.vision_end_token_id and is_marker[cut - 1]:
        cut -= 1
    if cut and is_marker[cut] and sample.input_ids[cut - 1] == vision.vision_start_token_id:
        cut -= 1
    num_images = int(is_marker[:cut].sum())
    return replace(
        sample,
        input_ids=sample.input_ids[:cut],
        labels=sample.labels[:cut],
        grid_thw=sample.grid_thw[:num_images],
        images=sample.images[:num_images],
    )


def token_sizes(sample: EncodedSample) -> tuple[np.ndarray, Int64, Int64]:
    """Of each of a sample's n ids: whether it is a marker, the tokens and the patches it becomes."""
    vision = sample.vision
    is_marker = sample.input_ids == vision.image_token_id
    width = np.ones(len(sample.input_ids), dtype=np.int64)
    width[is_marker] = vision.num_features(sample.grid_thw)
    patches = np.zeros_like(width)
    patches[is_marker] = sample.grid_thw.astype(np.int64).prod(axis=-1)
    return is_marker, width, patches
