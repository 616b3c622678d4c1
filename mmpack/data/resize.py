"""A picture resized as Pillow resizes it, bit for bit, straight into patches, by `csrc/resize.h`.

Pillow's result depends on the order of its two passes, because the bytes between them are rounded; the order has
changed between versions. So the installed Pillow is asked once per process, with a few tiny pictures. Where none
of the known orders gives its pixels, Pillow itself resizes, after a warning.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmpack import _native
from mmpack.video_spec import BICUBIC

if TYPE_CHECKING:
    from PIL.Image import Image

Bytes = NDArray[np.uint8]
Size = tuple[int, int]  # (height, width)
VerticalFirst = Callable[[Size, Size], bool]


def write_resized(
    picture: Image, grid_hw: Size, patch: int, merge: int, out: Bytes, frame: int = 0
) -> None:
    """Resize a picture with Pillow's bicubic filter and write it as one frame of patches.

    Args:
        picture: decoded, of mode RGB, or L, whose channel is repeated.
        grid_hw: patches down and across, multiples of `merge`.
        patch: side of a patch in pixels.
        out: (h * w, 3 * frames * patch * patch) uint8, contiguous; other frames are left as they are.

    Raises:
        ValueError: a side is longer than 2^20 pixels, or `out` has another size.
    """
    rule = installed_order()
    if rule is None:
        size = (grid_hw[1] * patch, grid_hw[0] * patch)
        resized = np.asarray(picture.resize(size, resample=BICUBIC))
        channels = resized if resized.ndim == 3 else resized[:, :, None]
        _native.patchify(
            np.broadcast_to(channels, (*resized.shape[:2], 3)), patch, merge, out, frame
        )
        return
    if not out.flags.c_contiguous:  # reshape would make a copy
        raise ValueError("patches must be contiguous")
    grid_h, grid_w = grid_hw
    vertical_first = rule((picture.height, picture.width), (grid_h * patch, grid_w * patch))
    by_place = out.reshape(grid_h, grid_w, 3, -1)
    _native.resize(pixels_of(picture), patch, merge, by_place, frame, vertical_first)


def pixels_of(picture: Image) -> Bytes:
    """Read-only (height, width, 4) of an RGB picture, the fourth byte unused, or (height, width) of a grey one.

    Pillow's own memory, if it can export it: Pillow from 13 on, pictures up to 16 MiB. Else a copy.
    """
    width, height = picture.size
    if exports_memory():
        try:
            return _native.arrow_pixels(*picture.__arrow_c_array__(), height, width)
        except ValueError:  # a picture in several blocks of memory
            pass
    is_grey = picture.mode == "L"
    pixels = np.frombuffer(picture.tobytes("raw", "L" if is_grey else "RGBX"), dtype=np.uint8)
    return pixels.reshape((height, width) if is_grey else (height, width, 4))


@functools.cache
def exports_memory() -> bool:
    """Whether the installed Pillow's Arrow interface can be used. Before 13 it crashes on grey pictures (seen with
    12.0.0) and takes rows for contiguous that are not."""
    from PIL import __version__

    return int(__version__.split(".")[0]) >= 13


def _never(size: Size, out_size: Size) -> bool:
    return False


def _shrinks_more_in_height(size: Size, out_size: Size) -> bool:
    """The vertical pass comes first where the height loses more than twice the rows that the width loses
    columns."""
    rows, columns = size[0] - out_size[0], size[1] - out_size[1]
    return rows > 0 and rows > 2 * columns


# Pillow up to 12, and from 13 on.
ORDERS: tuple[VerticalFirst, ...] = (_shrinks_more_in_height, _never)
_ASKED = [  # (height, width), to 28 x 28: on both sides of the rule
    *((48, 38), (49, 38), (20, 5), (28, 5), (29, 5), (30, 28), (90, 70)),
]


@functools.cache
def installed_order() -> VerticalFirst | None:
    """The order of passes with which mmpack's resize equals the installed Pillow's; None: there is none."""
    from PIL import __version__

    for rule in ORDERS:
        if all(_equals_pillow(size, mode, rule) for size in _ASKED for mode in ("RGB", "L")):
            return rule
    warnings.warn(
        f"mmpack's resize does not equal that of Pillow {__version__}; Pillow resizes the images, which is "
        "slower; install a Pillow release from 10 to 13",
        stacklevel=2,
    )
    return None


def _equals_pillow(size: Size, mode: str, vertical_first: VerticalFirst) -> bool:
    from PIL import Image

    values = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture = Image.fromarray(values).convert(mode)
    patch = np.empty((1, 1, 3, 28 * 28), dtype=np.uint8)
    _native.resize(pixels_of(picture), 28, 1, patch, 0, vertical_first(size, (28, 28)))
    expected = np.asarray(picture.resize((28, 28), resample=BICUBIC).convert("RGB"))
    return np.array_equal(patch.reshape(3, 28, 28), expected.transpose(2, 0, 1))
