"""The only file that touches pixels: header size, decode, resize, patches, normalisation.

Pixels stay uint8 until the collator. `normalize_patches(load_patches(image))` equals transformers'
`Qwen2VLImageProcessorPil` bit for bit: transparency is put on white, EXIF rotation is not applied,
the resize is Pillow's bicubic on RGB, and the normalisation follows its float64/float32 roundings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmpack.types import ImageRef
from mmpack.vision import BICUBIC, VisionSpec

Patches = NDArray[np.uint8]

if TYPE_CHECKING:
    from PIL.Image import Image


def image_size(image: ImageRef) -> tuple[int, int]:
    """(height, width) in pixels, from the file's header; nothing is decoded.

    Raises:
        ValueError: the file is missing or is no image Pillow can read.
    """
    with _open(image) as opened:
        width, height = opened.size
    return height, width


def load_patches(
    image: ImageRef, grid_thw: tuple[int, int, int] | NDArray[np.integer], vision: VisionSpec
) -> Patches:
    """Decode and resize one image to its planned grid.

    Returns:
        (h * w, C * p * p) uint8: one row a patch, in Qwen's merge order (blocks of
        merge x merge patches in reading order, patches of a block in reading order).

    Raises:
        ValueError: the file cannot be decoded, or no longer has the size it was planned with.
    """
    _, grid_h, grid_w = (int(n) for n in grid_thw)
    with _open(image) as opened:
        width, height = opened.size
        if vision.image_grid(height, width) != (1, grid_h, grid_w):
            raise ValueError(
                f"image {image.path} is now {width} x {height} pixels, it was planned as a grid of "
                f"{grid_h} x {grid_w} patches; pack the data again"
            )
        try:
            rgb = _to_rgb(opened)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"image {image.path} cannot be decoded: {error}") from None
    p, m = vision.patch_size, vision.merge_size
    pixels = np.asarray(rgb.resize((grid_w * p, grid_h * p), resample=BICUBIC))
    blocks = pixels.reshape(grid_h // m, m, p, grid_w // m, m, p, 3)
    patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # (block row, block col, m, m, C, p, p)
    return np.ascontiguousarray(patches).reshape(grid_h * grid_w, 3 * p * p)


def normalize_patches(pixels: Patches, vision: VisionSpec) -> NDArray[np.float32]:
    """uint8 still patches (P, C * p * p) -> transformers' `pixel_values` (P, C * t * p * p) float32.

    A still image fills every one of its t frames. A byte has 256 values, so each channel is a
    table of 256 floats made with transformers' own roundings: x / 255 in float64, cast to
    float32, then (x - mean) / std in float32.
    """
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean = np.array(vision.image_mean, dtype=np.float32)[:, None]
    std = np.array(vision.image_std, dtype=np.float32)[:, None]
    table = (scaled - mean) / std  # (C, 256)

    num_patches, channels, frames = len(pixels), len(table), vision.temporal_patch_size
    values = pixels.reshape(num_patches, channels, 1, -1)
    out = np.empty((num_patches, channels, frames, values.shape[-1]), dtype=np.float32)
    for channel in range(channels):
        out[:, channel] = table[channel][values[:, channel]]
    return out.reshape(num_patches, -1)


def _open(image: ImageRef) -> Image:
    from PIL import Image, UnidentifiedImageError  # here: `import mmpack` stays light

    try:
        return Image.open(image.path)
    except FileNotFoundError:
        raise ValueError(f"image {image.path} does not exist") from None
    except UnidentifiedImageError:
        raise ValueError(f"image {image.path} is not an image Pillow can read") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {image.path} cannot be opened: {error}") from None


def _to_rgb(image: Image) -> Image:
    """RGB as transformers' `convert_to_rgb` makes it: transparency composited onto white."""
    from PIL import Image

    if "A" in image.getbands() or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
