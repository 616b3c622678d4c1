"""The only file that touches pixels: header size, decode, resize, patches, normalisation.

Pixels stay uint8 until the collator. `normalize_patches(load_patches(image))` equals transformers'
`Qwen2VLImageProcessorPil` bit for bit: transparency is put on white, EXIF rotation is not applied,
the resize is Pillow's bicubic on RGB, and the normalisation follows its float64/float32 roundings.
JPEGs are decoded whole: Pillow's `draft` is faster, and gives other pixels.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmpack import _native
from mmpack.errors import RowError
from mmpack.types import ImageRef
from mmpack.vision import BICUBIC, VisionSpec, check_aspect_ratio

Patches = NDArray[np.uint8]
_TAIL = 1 << 12  # bytes; cameras write a little after a JPEG's end

if TYPE_CHECKING:
    from PIL.Image import Image


def probe(image: ImageRef, *, decode: bool = False) -> tuple[int, int]:
    """(height, width) in pixels of an image that can be trained on.

    Reads the header, and for JPEG and PNG whether the file ends where it should; `decode` decodes
    all of it, which alone finds damage in the middle.

    Raises:
        RowError: no image Pillow can read, cut or damaged, over Pillow's limit of pixels
            (decompression bombs; checked before decoding), or an aspect ratio above 200.
    """
    with _open(image) as opened:
        width, height = opened.size
        try:
            check_aspect_ratio(height, width)
        except RowError as error:
            raise RowError(f"image {image.path}: {error.error}", error.advice) from None
        if decode or _looks_cut(image, opened.format):
            _decode(image, opened)
    return height, width


def load_patches(
    image: ImageRef,
    grid_thw: tuple[int, int, int] | NDArray[np.integer],
    vision: VisionSpec,
    out: Patches | None = None,
) -> Patches:
    """Decode and resize one image to its planned grid.

    Args:
        out: (h * w, C * p * p) uint8, contiguous: where to write; new memory by default.

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
        p, m = vision.patch_size, vision.merge_size
        size = (grid_w * p, grid_h * p)
        pixels = _resized_rgb(_decode(image, opened), size, vision.resizer)
    if out is None:
        out = np.empty((grid_h * grid_w, vision.patch_values), dtype=np.uint8)
    _native.patchify(pixels, p, m, out)
    return out


def normalize_patches(
    pixels: Patches, vision: VisionSpec, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """uint8 still patches (P, C * p * p) -> transformers' `pixel_values` (P, C * t * p * p) float32,
    written to `out` where it is given.

    A still image fills every one of its t frames. A byte has 256 values, so each channel is a
    table of 256 floats made with transformers' own roundings: x / 255 in float64, cast to
    float32, then (x - mean) / std in float32.
    """
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean = np.array(vision.image_mean, dtype=np.float32)[:, None]
    std = np.array(vision.image_std, dtype=np.float32)[:, None]
    table = (scaled - mean) / std  # (C, 256)

    frames = vision.temporal_patch_size
    if out is None:
        out = np.empty((len(pixels), frames * vision.patch_values), dtype=np.float32)
    _native.normalize(np.ascontiguousarray(pixels), table, frames, out)
    return out


def encoded_bytes(image: ImageRef) -> bytes:
    """An image held in memory as bytes that decode to the same RGB pixels (PNG for pictures)."""
    if isinstance(image.data, bytes):
        return image.data
    buffer = io.BytesIO()
    _to_rgb(image.data).save(buffer, format="PNG")
    return buffer.getvalue()


def _open(image: ImageRef) -> Image:
    from PIL import Image, UnidentifiedImageError  # here: `import mmpack` stays light

    if isinstance(image.data, Image.Image):
        return image.data.copy()  # the caller closes what it gets
    try:
        return Image.open(image.path if image.data is None else io.BytesIO(image.data))
    except FileNotFoundError:
        raise RowError(f"image {image.path} does not exist", "mend the path") from None
    except UnidentifiedImageError:
        raise RowError(
            f"image {image.path} is not an image Pillow can read", "replace it"
        ) from None
    except Image.DecompressionBombError as error:
        raise RowError(f"image {image.path} is too large: {error}", "shrink it") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise RowError(f"image {image.path} cannot be opened: {error}", "replace it") from None


def _decode(image: ImageRef, opened: Image) -> Image:
    try:
        opened.load()
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise RowError(f"image {image.path} cannot be decoded: {error}", "replace it") from None
    return opened


def _looks_cut(image: ImageRef, format: str | None) -> bool:
    """Whether a file lacks its format's end marker in its last bytes."""
    end = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(format or "")
    if end is None:
        return False
    if image.data is not None:
        return end not in image.data[-_TAIL:]
    with open(image.path, "rb") as file:
        file.seek(0, io.SEEK_END)
        file.seek(max(0, file.tell() - _TAIL))
        return end not in file.read()


def _resized_rgb(image: Image, size: tuple[int, int], resizer: str) -> Patches:
    """(height, width, 3) uint8. The channels of a grey image are one, seen three times."""
    is_grey = image.mode == "L" and image.info.get("transparency") is None
    if not is_grey:
        image = _to_rgb(image)
    if image.size == size:
        pixels = np.asarray(image)
    elif resizer == "torch":
        pixels = _resized_by_torch(image, size)
    else:
        pixels = np.asarray(image.resize(size, resample=BICUBIC))
    return np.broadcast_to(pixels[:, :, None], (*pixels.shape, 3)) if is_grey else pixels


def _resized_by_torch(image: Image, size: tuple[int, int]) -> Patches:
    """The antialiased bicubic resize of bytes that torchvision calls, and with it transformers' image
    processors where torchvision is installed; one pass over all channels."""
    import torch

    pixels = torch.from_numpy(np.array(image))
    planes = pixels.unflatten(1, (pixels.shape[1], 1)) if pixels.ndim == 2 else pixels
    resized = torch.nn.functional.interpolate(
        planes.permute(2, 0, 1)[None], size[::-1], mode="bicubic", antialias=True
    )
    return resized[0].permute(1, 2, 0).reshape(size[1], size[0], *pixels.shape[2:]).numpy()


def _to_rgb(image: Image) -> Image:
    """RGB as transformers' `convert_to_rgb` makes it: transparency composited onto white."""
    from PIL import Image

    if "A" in image.getbands() or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
