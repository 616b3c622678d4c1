"""Boxes and points of an original picture -> what the Qwen-VL families are trained to write.

Qwen2.5-VL writes pixels of the resized picture, Qwen2-VL and Qwen3-VL thousandths of its width and height.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack.vision_spec import VisionSpec


def resized_boxes(
    boxes: Any, size: tuple[int, int], grid: tuple[int, int, int], vision: VisionSpec
) -> NDArray[np.int64]:
    """Boxes in pixels of the resized picture, as Qwen2.5-VL writes them.

    As `convert_to_qwen25vl_format` of Qwen's fine-tuning code (`qwen-vl-finetune/tools/process_bbox.ipynb`): each
    coordinate is scaled by the resized side over the original side, rounded to the nearest integer (half to even)
    and limited to 0 and side - 1.

    Args:
        boxes: (N, 4) boxes x1, y1, x2, y2 or (N, 2) points x, y, in pixels of the picture as it is stored, x from
            its left and y from its top edge.
        size: (height, width) of that picture in pixels; EXIF rotation is not applied.
        grid: its (t, h, w) in patches: `vision.image_grid(*size)`, or a row of `EncodedSample.grid_thw`.
        vision: the spec that the grid was computed with.

    Returns:
        (N, 4) or (N, 2) int64.

    Raises:
        ValueError: the boxes have another shape, are not finite or lie outside the picture.
    """
    _, grid_h, grid_w = (int(side) for side in grid)
    sides = np.array([grid_w, grid_h]) * vision.patch_size
    return _scaled(boxes, size, sides, sides - 1)


def relative_boxes(boxes: Any, size: tuple[int, int], scale: int = 1000) -> NDArray[np.int64]:
    """Boxes in thousandths of the picture's width and height, as Qwen2-VL and Qwen3-VL write them. They do not
    depend on how the picture is resized.

    Args:
        boxes: (N, 4) boxes x1, y1, x2, y2 or (N, 2) points x, y, in pixels of the picture as it is stored.
        size: (height, width) of that picture in pixels; EXIF rotation is not applied.
        scale: the number that stands for the whole width or height.

    Returns:
        (N, 4) or (N, 2) int64 from 0 to `scale`, rounded to the nearest integer (half to even).

    Raises:
        ValueError: the boxes have another shape, are not finite or lie outside the picture.
    """
    return _scaled(boxes, size, np.array([scale, scale]), np.array([scale, scale]))


def _scaled(
    boxes: Any, size: tuple[int, int], sides: NDArray[Any], most: NDArray[Any]
) -> NDArray[np.int64]:
    """Coordinates of a picture of `size` in one with the sides (width, height), limited to `most`."""
    given = np.asarray(boxes, dtype=np.float64)
    given = given.reshape(0, 4) if given.shape == (0,) else given
    if given.ndim != 2 or given.shape[1] not in (2, 4):
        raise ValueError(
            f"boxes must be (N, 4), or points (N, 2), got shape {given.shape}; pass a list of boxes"
        )
    height, width = size
    original = np.array([width, height], dtype=np.float64)
    pairs = given.reshape(len(given), given.shape[1] // 2, 2)
    inside = ((pairs >= 0) & (pairs <= original)).all(axis=(1, 2))  # NaN is outside
    if not inside.all():
        number = int(np.flatnonzero(~inside)[0])
        raise ValueError(
            f"box {number} {given[number].tolist()} is outside the picture of {width} x {height} pixels; boxes "
            "are x1, y1, x2, y2 in its pixels, before EXIF rotation"
        )
    scaled = np.rint(pairs * (sides / original)).astype(np.int64)
    clipped: NDArray[np.int64] = np.clip(scaled, 0, most).reshape(given.shape)
    return clipped
