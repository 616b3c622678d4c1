"""Size and sampling given for one image or video, and the keys a picture can be named with.

The numbers in `IMAGES` and `VIDEOS` are what `fetch_image` and `fetch_video` of qwen-vl-utils 0.0.14 gave (its wheel on
PyPI, the file `vision_process.py`, executed once with frames of no content and the range and sampling of its decord
reader): (options, side of a patch, what is there, indices, (height, width), frames sampled per second).
"""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from test_assemble import same
from test_video_files import film

from mmpack import Encoder, PackedDataset, Reader, RowError, VideoSpec, VisionSpec, assemble
from mmpack.cli.main import main
from mmpack.data import images, videos
from mmpack.media_options import MediaOptions
from mmpack.packing.prompt import render_prompt
from mmpack.store.encoded_store import open_store, write_store
from mmpack.types import ImageRef, VideoRef

IMAGES = [
    ({"max_pixels": 50176}, 14, (560, 840), (168, 252)),
    ({"max_pixels": 50176}, 16, (560, 840), (160, 256)),
    ({"min_pixels": 200704, "max_pixels": 401408}, 14, (100, 75), (532, 392)),
    ({"min_pixels": 1, "max_pixels": 20000}, 14, (333, 11), (336, 28)),
    ({"resized_height": 280, "resized_width": 420}, 14, (560, 840), (280, 420)),
    ({"resized_height": 281, "resized_width": 433}, 16, (560, 840), (288, 448)),
    ({"resized_height": 9, "resized_width": 9}, 14, (560, 840), (56, 56)),
    ({"resized_height": 10000, "resized_width": 9000}, 14, (56, 84), (3752, 3388)),
]
TEN = [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
EIGHT = [0, 14, 28, 42, 57, 71, 85, 99]
SMALL, LARGE = (100, 10.0, 168, 224), (100, 10.0, 480, 640)
VIDEOS = [
    ({"fps": 1.0}, 14, SMALL, TEN, None, 1.0),
    ({"nframes": 4}, 14, SMALL, [0, 33, 66, 99], None, 0.4),
    ({"nframes": 5}, 16, SMALL, [0, 33, 66, 99], None, 0.4),
    ({"fps": 30}, 16, (12, 10.0, 168, 224), list(range(12)), None, 10.0),
    ({"video_start": 2.0, "video_end": 4.0}, 14, SMALL, [20, 27, 33, 40], None, 4 / 21 * 10),
    ({"video_start": 2.0, "video_end": 4.0}, 16, (100, 29.97, 168, 224), [60, 73, 86, 99], None, 2.997),
    ({"video_start": 7.35}, 14, SMALL, [74, 82, 91, 99], None, 4 / 26 * 10),
    ({"video_end": 99.0, "nframes": 6}, 14, (43, 10.0, 168, 224), [0, 8, 17, 25, 34, 42], None, 60 / 43),
    ({"min_frames": 7, "max_frames": 9}, 14, (100, 29.97, 480, 640), EIGHT, None, 2.3976),
    ({"fps": 4.0, "max_frames": 7}, 16, (300, 23.976, 48, 64), [0, 60, 120, 179, 239, 299], None, 0.47952),
    ({"fps": 0.1}, 14, SMALL, [0, 33, 66, 99], None, 0.4),
    ({"fps": 1.0, "max_pixels": 151200}, 14, LARGE, TEN, (336, 448), 1.0),
    ({"fps": 1.0, "min_pixels": 12544, "max_pixels": 12544}, 14, LARGE, TEN, (84, 112), 1.0),
    ({"nframes": 8, "total_pixels": 376320}, 14, LARGE, EIGHT, (280, 364), 0.8),
    ({"nframes": 8, "total_pixels": 1000}, 16, LARGE, EIGHT, (320, 416), 0.8),
    ({"nframes": 8, "resized_height": 200, "resized_width": 300}, 16, LARGE, EIGHT, (192, 288), 0.8),
    ({"nframes": 8, "min_pixels": 900000}, 14, LARGE, EIGHT, (840, 1120), 0.8),
    ({"nframes": 4, "max_pixels": 99999999}, 16, (100, 10.0, 1080, 1920), [0, 33, 66, 99], (640, 1152), 0.4),
]  # fmt: skip


def spec_of(patch_size=14, **changes):
    """A processor with the defaults of qwen-vl-utils; patches of 16: Qwen3-VL's videos."""
    side = 2 * patch_size
    is_third = patch_size == 16
    video = VideoSpec(
        min_pixels=128 * side**2,
        max_pixels=768 * side**2,
        budgets_clip=is_third,
        has_timestamps=is_third,
    )
    return VisionSpec(
        min_pixels=4 * side**2, max_pixels=16384 * side**2, patch_size=patch_size, video=video,
        **changes,
    )  # fmt: skip


@pytest.mark.parametrize(("options", "patch", "size", "resized"), IMAGES)
def test_an_image_has_the_size_of_qwen_vl_utils(options, patch, size, resized):
    grid = spec_of(patch).image_grid(*size, MediaOptions(**options))
    assert grid == (1, resized[0] // patch, resized[1] // patch)


@pytest.mark.parametrize(("options", "patch", "file", "index", "resized", "rate"), VIDEOS)
def test_a_video_has_the_frames_and_size_of_qwen_vl_utils(
    options, patch, file, index, resized, rate
):
    spec, options = spec_of(patch), MediaOptions(**options)
    num_frames, fps, *size = file
    frames = spec.frame_times(num_frames, fps, False, options)
    assert frames.index.tolist() == index
    assert len(index) / frames.num_frames * frames.fps == pytest.approx(rate, rel=1e-12)
    grid = spec.video_grid(len(index), *size, options)
    if resized is None:  # its own budget, as without options
        assert grid == spec.video_grid(len(index), *size)
    else:
        assert grid == (len(index) // 2, resized[0] // patch, resized[1] // patch)


def test_a_value_that_is_missing_is_the_processors():
    """A minimum above the row's maximum yields to that of qwen-vl-utils; a maximum does not move by itself."""
    spec = dataclasses.replace(spec_of(16), min_pixels=65536, max_pixels=80000)
    assert spec.image_grid(100, 100, MediaOptions(max_pixels=70000)) == (1, 16, 16)
    assert spec.image_grid(100, 100, MediaOptions(max_pixels=50176)) == (1, 6, 6)
    assert spec.image_grid(900, 900, MediaOptions(min_pixels=70000)) == (1, 16, 16)
    with pytest.raises(RowError, match="'min_pixels' 90,000 is more than 'max_pixels' 80,000"):
        spec.image_grid(900, 900, MediaOptions(min_pixels=90000))
    video = spec_of(14)
    with pytest.raises(RowError, match="'min_pixels' 100,352 is more than 'max_pixels' 12,544"):
        video.video_grid(4, 480, 640, MediaOptions(max_pixels=12544))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_pixels": "50176"}, "'max_pixels' must be a whole number from 1"),
        ({"max_pixels": 0}, "'max_pixels' must be a whole number from 1"),
        ({"min_pixels": True}, "'min_pixels' must be a whole number"),
        ({"resized_height": 28.5, "resized_width": 28}, "'resized_height' must be a whole number"),
        ({"resized_height": 280}, "'resized_height' and 'resized_width' need each other"),
        ({"resized_height": 28, "resized_width": 9000}, "differ by more than 200 times"),
        ({"resized_height": 28, "resized_width": 28, "max_pixels": 9999}, "'resized_height' and 'max_pixels' contra"),
        ({"min_pixels": 9, "max_pixels": 8}, "'min_pixels' 9 is more than 'max_pixels' 8"),
        ({"fps": 1, "nframes": 4}, "'nframes' and 'fps' contradict"),
        ({"nframes": 4, "max_frames": 8}, "'nframes' and 'max_frames' contradict"),
        ({"min_frames": 8, "max_frames": 4}, "'min_frames' 8 is more than 'max_frames' 4"),
        ({"fps": 0}, "'fps' must be a number from 0.001"),
        ({"fps": float("nan")}, "'fps' must be a number from 0.001"),
        ({"video_start": -1.0}, "'video_start' must be a number from 0"),
        ({"video_start": 4, "video_end": 4}, "'video_start' 4 is not before 'video_end' 4"),
    ],
)  # fmt: skip
def test_values_out_of_range_name_their_key(options, error):
    with pytest.raises(RowError, match=error):
        MediaOptions(**options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"nframes": 200}, "'nframes' samples 200 of 100 frames, 2 to 100 can be"),
        ({"nframes": 1}, "'nframes' samples 0 of 100 frames"),
        ({"max_frames": 1}, "'max_frames'"),
        ({"min_frames": 800}, "'min_frames' 800 is more than 'max_frames' 768"),
        ({"video_start": 20.0}, "'video_start' 20 and 'video_end' 10 leave fewer than two"),
        ({"video_start": 5.0, "video_end": 5.05}, "leave fewer than two of the video's 100 frames"),
    ],
)
def test_what_a_video_cannot_give_names_its_key(options, error):
    """qwen-vl-utils refuses them, too, except the fourth, which it clips."""
    video = VideoRef(
        "a.mp4", num_frames=100, fps=10.0, size=(48, 64), options=MediaOptions(**options)
    )
    with pytest.raises(RowError, match=f"video a.mp4: .*{error}"):
        videos.sampled(video, spec_of())
