"""Size and sampling of one image or video, given in its row: the keys of Qwen's `qwen-vl-utils`, with their
meaning.

A value that the row leaves out comes from the processor's settings (`VisionSpec`, `VideoSpec`), or, where a
processor has no such setting, from `qwen-vl-utils` 0.0.14, whose `smart_resize`, `smart_nframes` and
`calculate_video_frame_range` these functions follow. Values that it would ignore or clip without a word are
refused, except a `video_end` after the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack.errors import RowError

# Features (merged patches) of an image, a frame, and a whole video; defaults of `qwen-vl-utils`.
_IMAGE_FEATURES = (4, 16384)
_FRAME_FEATURES = (128, 768)
_VIDEO_FEATURES = 128_000 * 0.9
_MAX_RATIO = 200

SIZE_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width", "total_pixels")
SAMPLING_KEYS = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end")
IMAGE_KEYS = SIZE_KEYS[:4]
VIDEO_KEYS = SIZE_KEYS + SAMPLING_KEYS
_MOST = {"resized_height": 1 << 16, "resized_width": 1 << 16, "nframes": 1 << 24}


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaOptions:
    """Options of one image or video. None: the processor's setting.

    Attributes:
        min_pixels, max_pixels: limits of the resized area in pixels; of a video, of each frame.
        resized_height, resized_width: the size to resize to, rounded to whole features (`smart_resize`).
        total_pixels: of a video: limit of the area of all its sampled frames, two frames counting as one.
        fps: frames sampled per second of a video file.
        nframes: frames sampled, rounded to an even number.
        min_frames, max_frames: limits of the number of frames sampled by rate.
        video_start, video_end: seconds; frames outside are not sampled.

    Raises:
        RowError: a value has another type, is out of range, or contradicts another; the message names its key.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    total_pixels: int | None = None
    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    video_start: float | None = None
    video_end: float | None = None

    def __post_init__(self) -> None:
        for key in VIDEO_KEYS:
            value = getattr(self, key)
            if value is None:
                continue
            if key in ("fps", "video_start", "video_end"):
                low, high = (1e-3, 1e4) if key == "fps" else (0.0, 1e9)
                if type(value) not in (int, float) or not low <= value <= high:
                    raise RowError(
                        f"{key!r} must be a number from {low:g} to {high:,.0f}, got {value!a:.40}",
                        "fix the row",
                    )
                object.__setattr__(self, key, float(value))
                continue
            if isinstance(value, float) and value.is_integer():  # a column with gaps holds floats
                value = int(value)
                object.__setattr__(self, key, value)
            most = _MOST.get(key, 1 << 40)
            if type(value) is not int or not 1 <= value <= most:
                raise RowError(
                    f"{key!r} must be a whole number from 1 to {most:,}, got {value!a:.40}",
                    "fix the row",
                )
        self._check_pairs()

    def _check_pairs(self) -> None:
        if (self.resized_height is None) != (self.resized_width is None):
            raise RowError("'resized_height' and 'resized_width' need each other", "give both")
        sides = sorted(side for side in (self.resized_height, self.resized_width) if side)
        if sides and sides[1] > _MAX_RATIO * sides[0]:
            raise RowError(
                f"'resized_height' {self.resized_height} and 'resized_width' {self.resized_width} differ by more "
                f"than {_MAX_RATIO} times",
                "fix them",
            )
        by_size = ("min_pixels", "max_pixels", "total_pixels")
        self._exclude(("resized_height",), by_size)
        self._exclude(("nframes",), ("fps", "min_frames", "max_frames"))
        for low, high in (("min_pixels", "max_pixels"), ("min_frames", "max_frames")):
            _check_order(low, getattr(self, low), high, getattr(self, high))
        start, end = self.video_start, self.video_end
        if start is not None and end is not None and start >= end:
            raise RowError(f"'video_start' {start:g} is not before 'video_end' {end:g}", "fix them")

    def _exclude(self, keys: tuple[str, ...], others: tuple[str, ...]) -> None:
        given = [key for key in (*keys, *others) if getattr(self, key) is not None]
        if len(given) > 1 and given[0] in keys:
            raise RowError(f"{given[0]!r} and {given[1]!r} contradict each other", "keep one")

    @property
    def given(self) -> dict[str, int | float]:
        """The values that are not None."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {key: value for key, value in values.items() if value is not None}

    @property
    def has_size(self) -> bool:
        """Whether the size of the image or frame depends on it."""
        return any(getattr(self, key) is not None for key in SIZE_KEYS)

    @property
    def has_sampling(self) -> bool:
        """Whether the sampled frames depend on it."""
        return any(getattr(self, key) is not None for key in SAMPLING_KEYS)

    def image_size(
        self, height: int, width: int, factor: int, limits: tuple[int, int]
    ) -> tuple[int, int]:
        """(height, width) in pixels to which an image is resized.

        Args:
            factor: side of a feature in pixels.
            limits: the processor's (min_pixels, max_pixels). A `max_pixels` below both lowers the minimum to that
                of `qwen-vl-utils`.

        Raises:
            RowError: the limits contradict each other.
        """
        if self.resized_height is not None and self.resized_width is not None:
            smallest, largest = (features * factor**2 for features in _IMAGE_FEATURES)
            return _smart_resize(self.resized_height, self.resized_width, factor, smallest, largest)
        lowest, highest = limits
        if self.max_pixels is not None and self.max_pixels < lowest:
            lowest = _IMAGE_FEATURES[0] * factor**2
        lowest = self.min_pixels or lowest
        highest = self.max_pixels or highest
        _check_order("min_pixels", lowest, "max_pixels", highest)
        return _smart_resize(height, width, factor, lowest, highest)

    def frame_size(
        self,
        height: int,
        width: int,
        factor: int,
        num_frames: int,
        limits: tuple[int, int] | None,
        multiple: int,
    ) -> tuple[int, int]:
        """(height, width) in pixels to which a video's frames are resized.

        Args:
            factor: side of a feature in pixels.
            num_frames: sampled frames.
            limits: the processor's (min_pixels, max_pixels) of a frame; None: it limits whole videos.
            multiple: frames per patch.

        Raises:
            RowError: the limits contradict each other.
        """
        if self.resized_height is not None:
            return self.image_size(height, width, factor, (1, 1))
        smallest, largest = limits or tuple(n * factor**2 for n in _FRAME_FEATURES)
        lowest = self.min_pixels or smallest
        total = self.total_pixels or _VIDEO_FEATURES * factor**2
        frames = math.ceil(num_frames / multiple) * multiple
        highest = max(min(largest, total / frames * multiple), int(lowest * 1.05))
        highest = min(self.max_pixels or highest, highest)
        _check_order("min_pixels", lowest, "max_pixels", highest)
        return _smart_resize(height, width, factor, lowest, highest)

    def frame_range(self, num_frames: int, fps: float) -> tuple[int, int]:
        """(first, last) frame between `video_start` and `video_end`.

        Raises:
            RowError: there are fewer than two.
        """
        seconds = num_frames / fps
        first, last = 0, num_frames - 1
        if self.video_start is not None:
            first = math.ceil(min(self.video_start, seconds) * fps)
        if self.video_end is not None:
            last = min(math.floor(min(self.video_end, seconds) * fps), last)
        if first >= last and (self.video_start is not None or self.video_end is not None):
            raise RowError(
                f"'video_start' {self.video_start or 0:g} and 'video_end' "
                f"{seconds if self.video_end is None else self.video_end:g} leave fewer than two of the video's "
                f"{num_frames:,} frames ({seconds:.2f} seconds)",
                "fix them; they are in seconds",
            )
        return first, last

    def sample(
        self, num_frames: int, fps: float, video: Any, multiple: int
    ) -> tuple[NDArray[np.int64], int]:
        """(indices of the sampled frames of a file, ascending; number of frames between the first and the last one
        that could be sampled).

        Args:
            num_frames, fps: the file's frames and frames per second.
            video: the `VideoSpec`, whose fps, min_frames and max_frames are the defaults.
            multiple: frames per patch.

        Raises:
            RowError: the range has too few frames, or `nframes` is more than it has.
        """
        first, last = self.frame_range(num_frames, fps)
        found = last - first + 1
        key = "nframes"
        if self.nframes is not None:
            count = round(self.nframes / multiple) * multiple
        else:
            least, most = self.min_frames or video.min_frames, self.max_frames or video.max_frames
            _check_order("min_frames", least, "max_frames", most)
            least = math.ceil(least / multiple) * multiple
            most = math.floor((self.max_frames or min(most, found)) / multiple) * multiple
            wanted = min(min(max(found / fps * (self.fps or video.fps), least), most), found)
            count = math.floor(wanted / multiple) * multiple
            key = "max_frames" if most < multiple <= found else "fps"
        if not multiple <= count <= found:
            raise RowError(
                f"{key!r} samples {count:,} of {found:,} frames, {multiple} to {found:,} can be",
                "change it, or the range",
            )
        index: NDArray[np.int64] = np.linspace(first, last, count, dtype=np.float32).round()
        return index.astype(np.int64), found


def _check_order(low: str, lowest: float | None, high: str, highest: float | None) -> None:
    if lowest is not None and highest is not None and lowest > highest:
        raise RowError(
            f"{low!r} {lowest:,} is more than {high!r} {highest:,.0f} (of the row or of the processor)",
            f"give {low!r} and {high!r} together",
        )


def _smart_resize(
    height: int, width: int, factor: int, smallest: float, largest: float
) -> tuple[int, int]:
    """`smart_resize` of `qwen-vl-utils`; a side is at least one feature."""
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > largest:
        shrink = math.sqrt(height * width / largest)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < smallest:
        grow = math.sqrt(smallest / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width
