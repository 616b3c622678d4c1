"""Frames of a video -> sampled frames, their times and their pixel budget, from integers and a frame rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack.errors import RowError, counted
from mmpack.families import video_rule

BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


@dataclass(frozen=True, kw_only=True)
class VideoSpec:
    """Video settings of a video processor and a model's config: sampling, pixel budget, time.

    Attributes:
        min_pixels, max_pixels: limits of a resized frame's area in pixels; with `budgets_clip`, of the area of all
            sampled frames together.
        fps: frames sampled per second.
        min_frames, max_frames: limits of the number of sampled frames; a shorter file gives all its frames.
        budgets_clip: Qwen3-VL's video processor: the budget is for the whole clip, and sampled frames span it from
            first to last.
        tokens_per_second: Qwen2.5-VL: M-RoPE positions per second of video. None: one position per temporal patch.
        has_timestamps: Qwen3-VL: each temporal patch has its own run of placeholders, after its time as text.
    """

    min_pixels: int
    max_pixels: int
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    budgets_clip: bool = False
    tokens_per_second: float | None = None
    has_timestamps: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"a video's min_pixels must be positive and at most its max_pixels, got min_pixels="
                f"{self.min_pixels} and max_pixels={self.max_pixels}"
            )
        if not (0 < self.fps < math.inf and 0 < self.min_frames <= self.max_frames):
            raise ValueError(
                f"fps must be a positive number and min_frames positive and at most max_frames, got "
                f"fps={self.fps}, min_frames={self.min_frames} and max_frames={self.max_frames}"
            )

    @classmethod
    def from_parts(cls, video_processor: Any, config: Any = None) -> VideoSpec:
        """Make the spec of a transformers Qwen-VL video processor and the model's config, which defines how
        Qwen2.5-VL's positions follow time.

        Raises:
            ValueError: the processor has a setting that mmpack does not support, or an unknown class.
        """
        expected = {
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "rescale_factor": 1 / 255,
            "resample": BICUBIC,
            "num_frames": None,
        }
        for name, value in expected.items():
            expect("video", video_processor, name, value)
        expect_numbers("video", video_processor)
        if getattr(video_processor, "cap_pixels_per_frame", None):
            raise ValueError(
                "the video processor has cap_pixels_per_frame=True, mmpack only supports False"
            )
        size = video_processor.size
        tower = getattr(config, "vision_config", None)
        name = getattr(video_processor, "video_processor_type", type(video_processor).__name__)
        rule = video_rule(name)
        return cls(
            min_pixels=int(size["shortest_edge"]),
            max_pixels=int(size["longest_edge"]),
            fps=float(getattr(video_processor, "fps", None) or cls.fps),
            min_frames=int(video_processor.min_frames),
            max_frames=int(video_processor.max_frames),
            budgets_clip=rule.budgets_clip,
            tokens_per_second=getattr(tower, "tokens_per_second", None),
            has_timestamps=rule.has_timestamps,
        )

    def sample(self, num_frames: int, fps: float, multiple: int) -> NDArray[np.int64]:
        """Indices of the sampled frames of a file, ascending; equal to transformers' `sample_frames`.

        Args:
            num_frames, fps: the file's frames and frames per second.
            multiple: frames per patch. An incomplete patch is filled with the last frame.

        Raises:
            RowError: the file has fewer frames than a patch.
        """
        check_num_frames(num_frames, multiple)
        wanted = num_frames / fps * self.fps
        if self.budgets_clip:
            count = min(max(int(wanted), self.min_frames), self.max_frames, num_frames)
            spread: NDArray[np.int64] = np.linspace(0, num_frames - 1, count).round().astype(int)
            return spread
        most = min(self.max_frames, num_frames) // multiple * multiple
        wanted = min(max(wanted, self.min_frames), most, num_frames)
        count = max(math.floor(wanted / multiple), 1) * multiple
        step = num_frames / count
        # torch.arange's rounding: a float64 product, rounded to float32, truncated
        places = (np.arange(math.ceil(num_frames / step)) * step).astype(np.float32)
        index = places.astype(np.int64)
        return index[index < num_frames]

    def timestamps(self, index: NDArray[np.int64], fps: float, multiple: int) -> list[str]:
        """The text before each temporal patch: the mean time of its first and last frame."""
        padded = [*index.tolist(), *[int(index[-1])] * (-len(index) % multiple)]
        times = [frame / fps for frame in padded]
        means = [(times[n] + times[n + multiple - 1]) / 2 for n in range(0, len(times), multiple)]
        return [f"<{mean:.1f} seconds>" for mean in means]


def check_num_frames(num_frames: int, multiple: int) -> None:
    """Refuse a video that is too short.

    Raises:
        RowError: it has fewer frames than a patch.
    """
    if num_frames < multiple:
        raise RowError(
            f"the video has {counted(num_frames, 'frame')}, at least {multiple} are needed",
            "give it as an image",
        )


def is_rate(fps: Any) -> bool:
    """Whether a value can be a video's frames per second."""
    return type(fps) in (int, float) and 1e-3 <= fps <= 1e4


def expect_numbers(kind: str, processor: Any) -> None:
    """Refuse a processor without numbers for its limits, patches and normalization, such as null in its file."""
    counts = ("patch_size", "merge_size", "temporal_patch_size", "min_frames", "max_frames")
    known = {name: getattr(processor, name) for name in counts if hasattr(processor, name)}
    for edge in ("shortest_edge", "longest_edge"):
        known[f"size[{edge!r}]"] = processor.size[edge]
    for name, value in known.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 1:
            raise _not_numbers(kind, name, value, "a positive integer")
    mean = getattr(processor, "image_mean", ())
    for name in ("image_mean", "image_std"):
        values = getattr(processor, name, ())  # a video processor without them has the images'
        is_list = isinstance(values, (list, tuple)) and len(values) == len(mean)
        if not is_list or not all(isinstance(one, (int, float)) for one in values):
            raise _not_numbers(kind, name, values, "a number for each channel")
        if name == "image_std" and not all(one > 0 for one in values):
            raise _not_numbers(kind, name, values, "a number above 0 for each channel")


def _not_numbers(kind: str, name: str, value: Any, needed: str) -> ValueError:
    return ValueError(
        f"the {kind} processor has {name}={value!a:.40}, not {needed}; fix it in its file, "
        f"{'video_' if kind == 'video' else ''}preprocessor_config.json or processor_config.json"
    )


def expect(kind: str, processor: Any, name: str, value: Any, cast: Any = None) -> None:
    """Refuse a processor whose setting differs from the one that mmpack supports."""
    got = getattr(processor, name, value)
    if cast is not None:
        got, value = cast(got), cast(value)
    if got != value:
        raise ValueError(
            f"the {kind} processor has {name}={got}, mmpack only supports {name}={value}"
        )
