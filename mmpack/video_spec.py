"""Frames of a video -> which are taken, their time and their pixel budget, in integers and one rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack.errors import RowError
from mmpack.families import video_rule

BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


@dataclass(frozen=True, kw_only=True)
class VideoSpec:
    """What a video processor and a model's config say about videos: frames, pixel budget, time.

    Attributes:
        min_pixels, max_pixels: the area a frame is resized into, in pixels; with `budgets_clip` the area
            of all sampled frames together.
        fps: frames sampled a second.
        min_frames, max_frames: of a sampled video; a shorter file gives all it has.
        budgets_clip: Qwen3-VL's video processor: the budget is the whole clip's, and the frames are
            spread from the first to the last.
        tokens_per_second: Qwen2.5-VL: M-RoPE positions a second of video. None: a position a temporal
            patch.
        has_timestamps: Qwen3-VL: every temporal patch is a run of placeholders of its own, behind its
            time as text.
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
                f"a video's min_pixels must be positive and at most max_pixels, got min_pixels="
                f"{self.min_pixels} and max_pixels={self.max_pixels}"
            )
        if not (self.fps > 0 and 0 < self.min_frames <= self.max_frames):
            raise ValueError(
                f"fps must be positive and min_frames positive and at most max_frames, got "
                f"fps={self.fps}, min_frames={self.min_frames} and max_frames={self.max_frames}"
            )

    @classmethod
    def from_parts(cls, video_processor: Any, config: Any = None) -> VideoSpec:
        """Read the spec off a transformers Qwen-VL video processor, and the model's config, which alone
        knows how Qwen2.5-VL's positions follow time.

        Raises:
            ValueError: the processor does something that mmpack does not, or is of no family it knows.
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
        if getattr(video_processor, "cap_pixels_per_frame", None):
            raise ValueError(
                "the video processor has cap_pixels_per_frame=True, mmpack computes False only"
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
        """Which of a file's frames are taken, ascending; equal to transformers' `sample_frames`.

        Args:
            num_frames, fps: the file's.
            multiple: frames in a patch. An odd one out is filled up with the last frame.

        Raises:
            RowError: fewer frames than a patch has.
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
        # torch.arange's roundings: float32 of a product in float64, then cut
        places = (np.arange(math.ceil(num_frames / step)) * step).astype(np.float32)
        index = places.astype(np.int64)
        return index[index < num_frames]

    def timestamps(self, index: NDArray[np.int64], fps: float, multiple: int) -> list[str]:
        """The text before every temporal patch: the mean of its first and last frame's times."""
        padded = [*index.tolist(), *[int(index[-1])] * (-len(index) % multiple)]
        times = [frame / fps for frame in padded]
        means = [(times[n] + times[n + multiple - 1]) / 2 for n in range(0, len(times), multiple)]
        return [f"<{mean:.1f} seconds>" for mean in means]


def check_num_frames(num_frames: int, multiple: int) -> None:
    """Refuse what is no video.

    Raises:
        RowError: fewer frames than a patch has.
    """
    if num_frames < multiple:
        raise RowError(
            f"a video of {num_frames} frames, it takes at least {multiple}", "give it as an image"
        )


def is_rate(fps: Any) -> bool:
    """Whether that can be a video's frames a second."""
    return type(fps) in (int, float) and 1e-3 <= fps <= 1e4


def expect(kind: str, processor: Any, name: str, value: Any, cast: Any = None) -> None:
    """Refuse a processor that does something else than mmpack."""
    got = getattr(processor, name, value)
    if cast is not None:
        got, value = cast(got), cast(value)
    if got != value:
        raise ValueError(
            f"the {kind} processor has {name}={got}, mmpack computes {name}={value} only"
        )
