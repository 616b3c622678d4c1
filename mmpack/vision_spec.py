"""Image size -> patch grid -> number of tokens, in integers.

A Qwen2-VL image becomes a grid of square patches whose size depends only on the image's height and width. So the
packed length of a sample is known from image headers, before any pixel is decoded. All planning depends on this
file agreeing exactly with transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack.errors import RowError
from mmpack.media_options import MediaOptions
from mmpack.video_spec import BICUBIC, VideoSpec, check_num_frames, expect, expect_numbers

MAX_ASPECT_RATIO = 200  # transformers' smart_resize refuses more


@dataclass(frozen=True, slots=True, eq=False)
class SampledFrames:
    """The frames sampled of a video.

    Attributes:
        index: (n,) int64 indices in the file or list, ascending.
        fps: frames per second of the file or list.
        num_frames: frames that they were sampled from.
    """

    index: NDArray[np.int64]
    fps: float
    num_frames: int


@dataclass(frozen=True, kw_only=True)
class VisionSpec:
    """Settings of an image processor and a tokenizer for images: patches, pixel budget, token ids.

    Take it from the processor you train with, `VisionSpec.from_processor(processor)`;
    `dataclasses.replace(spec, max_pixels=...)` changes the budget.

    Attributes:
        min_pixels, max_pixels: limits of a resized image's area in pixels. There is no default, because
            `max_pixels` differs by a factor of 12 between published Qwen2-VL configurations.
        patch_size: side of a patch in pixels.
        merge_size: side, in patches, of the square that is merged into one feature (one token).
        temporal_patch_size: frames per patch; an image is repeated.
        image_mean, image_std: normalization of the channels, after division by 255.
        video: settings for videos; None: videos are not supported.
        image_token_id, video_token_id, vision_start_token_id, vision_end_token_id: ids of
            `<|image_pad|>`, `<|video_pad|>`, `<|vision_start|>` and `<|vision_end|>`.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    video: VideoSpec | None = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"min_pixels must be positive and at most max_pixels, got min_pixels={self.min_pixels} and "
                f"max_pixels={self.max_pixels}; change --min-pixels (min_pixels) or --max-pixels (max_pixels)"
            )

    @classmethod
    def from_processor(cls, processor: Any, config: Any = None) -> VisionSpec:
        """Make the spec of a transformers Qwen-VL processor (`processor.image_processor`,
        `processor.video_processor`, `processor.tokenizer`).

        Args:
            config: the model's config; needed for Qwen2.5-VL's videos, whose positions in time depend on it.

        Raises:
            ValueError: the processor has a setting that mmpack does not support (another resampling, no rescaling,
                ...), or its tokenizer lacks a vision token.
        """
        video_processor = getattr(processor, "video_processor", None)
        if config is None and "second_per_grid_ts" in getattr(processor, "model_input_names", ()):
            video_processor = None  # positions in time need the config
        return cls.from_parts(
            processor.image_processor, processor.tokenizer, video_processor, config
        )

    @classmethod
    def from_parts(
        cls, image_processor: Any, tokenizer: Any, video_processor: Any = None, config: Any = None
    ) -> VisionSpec:
        """Like `from_processor`, from a processor's parts; without a video processor, videos are not supported."""
        expected = {
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "rescale_factor": 1 / 255,
            "resample": BICUBIC,
        }
        for name, value in expected.items():
            expect("image", image_processor, name, value)
        expect_numbers("image", image_processor)
        video = None
        if video_processor is not None:
            video = VideoSpec.from_parts(video_processor, config)
            for name in ("patch_size", "merge_size", "temporal_patch_size"):
                expect("video", video_processor, name, getattr(image_processor, name))
            for name in ("image_mean", "image_std"):
                expect("video", video_processor, name, getattr(image_processor, name), list)
        size = image_processor.size
        return cls(
            min_pixels=int(size["shortest_edge"]),
            max_pixels=int(size["longest_edge"]),
            patch_size=int(image_processor.patch_size),
            merge_size=int(image_processor.merge_size),
            temporal_patch_size=int(image_processor.temporal_patch_size),
            image_mean=tuple(image_processor.image_mean),
            image_std=tuple(image_processor.image_std),
            video=video,
            image_token_id=_token_id(tokenizer, "<|image_pad|>"),
            video_token_id=_token_id(tokenizer, "<|video_pad|>"),
            vision_start_token_id=_token_id(tokenizer, "<|vision_start|>"),
            vision_end_token_id=_token_id(tokenizer, "<|vision_end|>"),
        )

    @property
    def patch_values(self) -> int:
        """Values in one image patch, C * p * p."""
        return len(self.image_mean) * self.patch_size**2

    def smart_resize(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels to which an image is resized; both are multiples of patch * merge.

        Equal to transformers' `smart_resize` for every size, including its rounding.

        Raises:
            ValueError: the aspect ratio is above 200.
        """
        check_aspect_ratio(height, width)
        factor = self.patch_size * self.merge_size
        return _resized(height, width, factor, self.min_pixels, self.max_pixels)

    def image_grid(
        self, height: int, width: int, options: MediaOptions | None = None
    ) -> tuple[int, int, int]:
        """(t, h, w) in patches of an image of `height` x `width` pixels.

        Raises:
            ValueError: the aspect ratio is above 200, or the image's own `options` contradict the spec.
        """
        if options is None:
            new_height, new_width = self.smart_resize(height, width)
        else:
            factor, limits = self.patch_size * self.merge_size, (self.min_pixels, self.max_pixels)
            check_aspect_ratio(height, width)
            new_height, new_width = options.image_size(height, width, factor, limits)
        return 1, new_height // self.patch_size, new_width // self.patch_size

    def video_grid(
        self, num_frames: int, height: int, width: int, options: MediaOptions | None = None
    ) -> tuple[int, int, int]:
        """(t, h, w) in patches of a video with `num_frames` sampled frames; equal to transformers' video
        processor.

        Raises:
            RowError: the video has fewer frames than a patch or an aspect ratio above 200, the spec has no
                `video`, or the video's own `options` contradict it.
        """
        video, multiple = self.video_spec, self.temporal_patch_size
        check_num_frames(num_frames, multiple)
        factor = self.patch_size * self.merge_size
        patches = -(-num_frames // multiple)
        if options is not None and options.has_size:
            check_aspect_ratio(height, width)
            limits = None if video.budgets_clip else (video.min_pixels, video.max_pixels)
            new_height, new_width = options.frame_size(
                height, width, factor, num_frames, limits, multiple
            )
            return patches, new_height // self.patch_size, new_width // self.patch_size
        frames, counted = 1, 1
        if video.budgets_clip:
            frames, counted = num_frames, round(num_frames / multiple) * multiple
            if min(height, width) < factor:
                scale = max(factor / height, factor / width)
                height, width = int(height * scale), int(width * scale)
        check_aspect_ratio(height, width)
        new_height, new_width = _resized(
            height, width, factor, video.min_pixels, video.max_pixels, frames, counted
        )
        return patches, new_height // self.patch_size, new_width // self.patch_size

    @property
    def video_spec(self) -> VideoSpec:
        """`video`, checked to be given.

        Raises:
            RowError: it is None.
        """
        if self.video is None:
            raise RowError(
                "the VisionSpec has no video settings",
                "make it from a processor with a video processor; for Qwen2.5-VL also pass --config (config): "
                "Encoder.from_processor(processor, model.config)",
            )
        return self.video

    def frame_times(
        self, num_frames: int, fps: float | None, is_list: bool, options: MediaOptions | None = None
    ) -> SampledFrames:
        """The frames sampled of a video. A list of frames is already sampled, at the spec's rate unless `fps` is
        given.

        Raises:
            RowError: the video has too few frames, its own `options` cannot be met, or a list has more than
                `max_frames`.
        """
        video, multiple = self.video_spec, self.temporal_patch_size
        fps = fps or video.fps
        if not is_list and options is not None and options.has_sampling:
            check_num_frames(num_frames, multiple)
            index, found = options.sample(num_frames, fps, video, multiple)
            return SampledFrames(index, fps, found)
        if not is_list:
            return SampledFrames(video.sample(num_frames, fps, multiple), fps, num_frames)
        check_num_frames(num_frames, multiple)
        if num_frames > video.max_frames:
            raise RowError(
                f"a list of {num_frames} frames, at most {video.max_frames} are allowed",
                "leave frames out, or raise --video-max-frames (max_frames)",
            )
        return SampledFrames(np.arange(num_frames), fps, num_frames)

    def temporal_step(self, frames: SampledFrames) -> float:
        """M-RoPE positions from one temporal patch of a video to the next, a float32.

        As in Qwen2.5-VL's processor and `get_rope_index`: tokens per second times `second_per_grid_ts`, a float32
        tensor there.
        """
        per_second = self.video_spec.tokens_per_second
        if per_second is None:
            return 1.0
        seconds = self.temporal_patch_size / (len(frames.index) / frames.num_frames * frames.fps)
        return float(np.float32(per_second) * np.float32(seconds))

    def num_features(self, grid_thw: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """(I,) features (tokens) of each grid in `grid_thw` (I, 3)."""
        patches: NDArray[np.int64] = grid_thw.astype(np.int64).prod(axis=-1)
        return patches // self.merge_size**2


def _resized(
    height: int,
    width: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    frames: int = 1,
    counted: int = 1,
) -> tuple[int, int]:
    """transformers' `smart_resize`; for a clip, the area covers `frames` frames, or `counted` after rounding to
    whole temporal patches."""
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if counted * new_height * new_width > max_pixels:
        shrink = math.sqrt((frames * height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif counted * new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def check_aspect_ratio(height: int, width: int) -> None:
    """Refuse sizes that transformers' `smart_resize` refuses.

    Raises:
        RowError: a side is 0, or more than 200 times the other.
    """
    if min(height, width) < 1:
        raise RowError(f"{width} x {height} pixels is not an image size", "replace it")
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise RowError(
            f"{width} x {height} pixels is an aspect ratio of {ratio:.0f}, at most {MAX_ASPECT_RATIO} is allowed",
            "crop or drop the image",
        )


def _token_id(tokenizer: Any, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or token_id == getattr(tokenizer, "unk_token_id", None):
        raise ValueError(f"the tokenizer has no token {token}; use a Qwen-VL tokenizer")
    return int(token_id)
