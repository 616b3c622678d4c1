"""The only file that decodes images: header size, decoding, patches (by `resize.py`), normalization.

Pixels stay uint8 until the collator. `normalize_patches(load_patches(image))` equals transformers'
`Qwen2VLImageProcessorPil` bit for bit: transparency is composited onto white, EXIF rotation is not applied,
pixels are those of Pillow's bicubic filter in RGB, and normalization has the same float64/float32 rounding.
JPEGs are decoded in full resolution: Pillow's `draft` is faster, but gives different pixels.

An image file named in a row is not trusted. Pillow may only open `FORMATS`, whatever the file's suffix: its
PostScript reader starts Ghostscript. Images in memory come from the caller and are trusted.
"""

from __future__ import annotations

import functools
import io
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mmpack import _native
from mmpack.data.media_paths import MediaFolders, open_media
from mmpack.data.remote_files import RemoteError, error_words
from mmpack.data.remote_objects import HEADER, identity_of
from mmpack.data.remote_roots import is_remote
from mmpack.data.resize import write_resized
from mmpack.errors import RowError
from mmpack.types import ImageRef
from mmpack.vision_spec import VisionSpec, check_aspect_ratio

Patches = NDArray[np.uint8]
# Pillow's format names. Each is decoded in this process, by a library made for untrusted files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO", "JPEG2000", "PPM")
_TAIL = 1 << 12  # bytes; cameras append a little data after a JPEG's end
_WEBP_HEADER = 30  # bytes, including the size

if TYPE_CHECKING:
    from PIL.Image import Image

# glibc returns the MiBs that Pillow frees per image to the system, so the next image causes page faults, until one
# freed block raises its threshold (32 MiB at most). So allocate and free one; nothing is written to it. Packs of
# 4,096 tokens in a worker: 2,000 faults, not 9,400; 120 ms instead of 136 as floats, 81 ms instead of 97 as bytes.
np.empty(31 << 20, dtype=np.uint8)


def probe(image: ImageRef, *, decode: bool = False) -> tuple[int, int]:
    """(height, width) in pixels of an image, checked to be usable.

    Reads the header and, for JPEG and PNG, checks that the end of the file is there. `decode` decodes the whole
    image; only this finds damage in the middle.

    Raises:
        RowError: it is not an image of `FORMATS`, is cut or damaged, has more pixels than Pillow's limit
            (decompression bombs; checked before decoding), or an aspect ratio above 200.
    """
    size = None if decode else _webp_size(image)
    return _size(image, None, decode) if size is None else _checked(image, size)


def probed(
    image: ImageRef, *, decode: bool = False, folders: MediaFolders | None = None
) -> ImageRef:
    """The image with its size, as `probe`, and of an object in object storage also its version.

    Args:
        folders: those that a row's image is in; of an object they must contain it.

    Raises:
        RowError: as `probe`, or an object cannot be read.
    """
    if image.data is not None or not is_remote(image.path):
        return replace(image, size=probe(image, decode=decode))
    with open_media(
        image.path, "image", folders, HEADER, member=image.member, version=image.version
    ) as file:
        version = image.version or str(identity_of(file))
        is_webp = image.short_name[-5:].lower() == ".webp" and not decode
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        size = _webp_header_size(file.read(_WEBP_HEADER), length) if is_webp else None
        file.seek(0)
        size = _size(image, file, decode) if size is None else _checked(image, size)
    return replace(image, size=size, version=version)


def _size(image: ImageRef, file: BinaryIO | None, decode: bool) -> tuple[int, int]:
    """`probe`, by Pillow; `file` is its file if that is open."""
    with _open(image, file=file) as opened:
        width, height = opened.size
        _checked(image, (height, width))
        if decode or _looks_cut(opened):
            _decode(image, opened)
    return height, width


def load_patches(
    image: ImageRef,
    grid_thw: tuple[int, int, int] | NDArray[np.integer],
    vision: VisionSpec,
    out: Patches | None = None,
    folders: MediaFolders | None = None,
) -> Patches:
    """Decode one image and resize it to its planned grid.

    Args:
        out: (h * w, C * p * p) uint8, contiguous: the output; allocated by default.
        folders: folders that must contain the file, links resolved; None: any folder.

    Returns:
        (h * w, C * p * p) uint8: one row per patch, in Qwen's merge order (blocks of merge x merge patches in
        reading order, patches within a block in reading order).

    Raises:
        ValueError: the file cannot be decoded, is outside `folders`, or its size has changed since planning.
    """
    _, grid_h, grid_w = (int(n) for n in grid_thw)
    with _open(image, folders) as opened:
        width, height = opened.size
        if vision.image_grid(height, width, image.options) != (1, grid_h, grid_w):
            raise ValueError(
                f"image {image.name} is now {width} x {height} pixels, but was planned as a grid of "
                f"{grid_h} x {grid_w} patches; pack the data again"
            )
        if out is None:
            out = np.empty((grid_h * grid_w, vision.patch_values), dtype=np.uint8)
        write_frame(_decode(image, opened), (grid_h, grid_w), vision, out)
    return out


def write_frame(
    picture: Image, grid_hw: tuple[int, int], vision: VisionSpec, out: Patches, frame: int = 0
) -> None:
    """Resize a picture to `grid_hw` patches and write it as frame number `frame` of the patches `out`, (h * w,
    C * frames * p * p) uint8, contiguous."""
    is_grey = picture.mode == "L" and picture.info.get("transparency") is None
    picture = picture if is_grey else _to_rgb(picture)
    write_resized(picture, grid_hw, vision.patch_size, vision.merge_size, out, frame)


@contextmanager
def decoded(image: ImageRef, folders: MediaFolders | None = None) -> Iterator[Image]:
    """Open and decode an image; `folders` as in `load_patches`.

    Raises:
        RowError: it cannot be read.
    """
    with _open(image, folders) as opened:
        yield _decode(image, opened)


def normalize_patches(
    pixels: Patches, vision: VisionSpec, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """uint8 patches of images (P, C * p * p) or videos (P, C * t * p * p) -> transformers' `pixel_values`
    (P, C * t * p * p) float32, written to `out` if given.

    An image is repeated in each of its t frames. A byte has 256 values, so each channel uses a table of 256
    floats, computed with transformers' rounding: x / 255 in float64, cast to float32, then (x - mean) / std in
    float32.
    """
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean = np.array(vision.image_mean, dtype=np.float32)[:, None]
    std = np.array(vision.image_std, dtype=np.float32)[:, None]
    table = (scaled - mean) / std  # (C, 256)

    values = vision.temporal_patch_size * vision.patch_values
    frames = values // pixels.shape[1]
    if out is None:
        out = np.empty((len(pixels), values), dtype=np.float32)
    _native.normalize(np.ascontiguousarray(pixels), table, frames, out)
    return out


def encoded_bytes(image: ImageRef) -> bytes:
    """Encode an image in memory as bytes that decode to the same RGB pixels (PNG for PIL images)."""
    if isinstance(image.data, bytes):
        return image.data
    buffer = io.BytesIO()
    _to_rgb(image.data).save(buffer, format="PNG")
    return buffer.getvalue()


def thumbnail(picture: Image | NDArray[np.uint8], side: int) -> bytes:
    """A picture as a JPEG of at most `side` x `side` pixels, without EXIF, comment or color profile.

    Args:
        picture: a decoded image, or (height, width, 3) uint8.
    """
    from PIL import Image

    pixels = picture if isinstance(picture, np.ndarray) else np.asarray(_to_rgb(picture))
    small = Image.fromarray(pixels)  # carries no metadata
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()


@contextmanager
def _open(
    image: ImageRef, folders: MediaFolders | None = None, file: BinaryIO | None = None
) -> Iterator[Image]:
    from PIL import Image, UnidentifiedImageError  # here: `import mmpack` stays light

    if isinstance(image.data, Image.Image):
        yield image.data  # the caller closes it
        return
    given = file if image.data is None else io.BytesIO(image.data)
    with given or open_media(
        image.path, "image", folders, member=image.member, version=image.version
    ) as content:
        try:
            with _strict():
                opened = Image.open(content, formats=_formats())
        except UnidentifiedImageError:
            raise RowError(
                f"image {image.name} is in none of the formats {', '.join(_formats())}",
                "save it in one of them, or replace it",
            ) from None
        except Image.DecompressionBombError as error:
            raise RowError(f"image {image.name} is too large: {error}", "shrink it") from None
        except (RemoteError, RowError) as error:
            raise _unread(image, error) from None
        except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error, ...
            raise RowError(f"image {image.name} cannot be opened: {error}", "replace it") from None
        with opened:
            yield opened


@functools.cache
def _formats() -> tuple[str, ...]:
    """The `FORMATS` that the installed Pillow supports."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


_reading_strictly = threading.Lock()
_num_strict = 0  # threads inside `_strict`
_was_lenient = False


@contextmanager
def _strict() -> Iterator[None]:
    """Make Pillow raise for cut or damaged images even if the process has set `ImageFile.LOAD_TRUNCATED_IMAGES`,
    as training scripts do; missing bytes would become grey pixels. Pillow has no per-call option, so the global is
    changed and then restored."""
    from PIL import ImageFile

    global _num_strict, _was_lenient
    with _reading_strictly:
        if not _num_strict:
            _was_lenient = ImageFile.LOAD_TRUNCATED_IMAGES
            if _was_lenient:
                ImageFile.LOAD_TRUNCATED_IMAGES = False
        _num_strict += 1
    try:
        yield
    finally:
        with _reading_strictly:
            _num_strict -= 1
            if not _num_strict and _was_lenient:
                ImageFile.LOAD_TRUNCATED_IMAGES = True


def _decode(image: ImageRef, opened: Image) -> Image:
    try:
        with _strict():
            opened.load()
    except (RemoteError, RowError) as error:
        raise _unread(image, error) from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise RowError(f"image {image.name} cannot be decoded: {error}", "replace it") from None
    return opened


def _unread(image: ImageRef, error: RemoteError | RowError) -> RowError:
    """The error for an object that could be read in part."""
    if isinstance(error, RowError):
        return error
    what, advice = error_words(error)
    return RowError(f"image {image.name} {what}", advice)


def _looks_cut(opened: Image) -> bool:
    """Whether a newly opened file lacks its format's end marker in its last bytes."""
    end = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(opened.format or "")
    file = getattr(opened, "fp", None)
    if end is None or file is None:
        return False
    position = file.tell()
    file.seek(max(0, file.seek(0, io.SEEK_END) - _TAIL))
    is_cut = end not in file.read()
    file.seek(position)  # where the decoder continues
    return is_cut


def _checked(image: ImageRef, size: tuple[int, int]) -> tuple[int, int]:
    """The size, if its aspect ratio is allowed."""
    try:
        check_aspect_ratio(*size)
    except RowError as error:
        raise RowError(f"image {image.name}: {error.error}", error.advice) from None
    return size


def most_pixels() -> float:
    """Pillow's pixel limit, above which an image counts as a decompression bomb."""
    from PIL.Image import MAX_IMAGE_PIXELS

    return math.inf if MAX_IMAGE_PIXELS is None else 2 * MAX_IMAGE_PIXELS


def _webp_size(image: ImageRef) -> tuple[int, int] | None:
    """`_webp_header_size` of an image in memory or in a file."""
    if isinstance(image.data, bytes):
        return _webp_header_size(image.data[:_WEBP_HEADER], len(image.data))
    if image.data is None and image.short_name[-5:].lower() == ".webp":
        try:
            with open_media(image.path, "image", buffering=0, member=image.member) as file:
                header, length = file.read(_WEBP_HEADER), file.seek(0, os.SEEK_END)
                return _webp_header_size(header, length)
        except OSError:
            return None
    return None


def _webp_header_size(header: bytes, length: int) -> tuple[int, int] | None:
    """(height, width) of a WebP image with a single chunk, from the beginning of its `length` bytes; None for
    anything else.

    Pillow reads the whole WebP file and creates a decoder to learn its size: 752 us, against 10 us here
    (benchmarks/LOG.md). The checks are those of libwebp's `WebPGetFeatures` for such files (RFC 9649, RFC 6386
    section 9.1).
    """
    if len(header) < _WEBP_HEADER or header[:4] != b"RIFF" or header[8:12] != b"WEBP":
        return None
    riff_bytes, chunk_bytes = (int.from_bytes(header[at : at + 4], "little") for at in (4, 16))
    if riff_bytes != 12 + chunk_bytes + chunk_bytes % 2 or length != 8 + riff_bytes:
        return None
    if header[12:16] == b"VP8 ":
        frame = int.from_bytes(header[20:23], "little")  # inter 1, profile 3, shown 1, length 19
        if frame & 0b11001 != 0b10000 or header[23:26] != b"\x9d\x01\x2a":
            return None
        if frame >> 5 >= chunk_bytes:
            return None
        width, height = (int.from_bytes(header[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    elif header[12:16] == b"VP8L" and header[20] == 0x2F:
        bits = int.from_bytes(header[21:25], "little")  # width 14, height 14, alpha 1, version 3
        if bits >> 29:
            return None
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        return None
    from PIL.Image import MAX_IMAGE_PIXELS

    is_small = MAX_IMAGE_PIXELS is None or width * height <= MAX_IMAGE_PIXELS
    return (height, width) if 0 < width * height and is_small else None


def _to_rgb(image: Image) -> Image:
    """Convert to RGB like transformers' `convert_to_rgb`: transparency is composited onto white."""
    from PIL import Image

    if "A" in image.getbands() or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
