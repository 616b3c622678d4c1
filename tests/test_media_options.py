"""Size and sampling given for one image or video, and the keys a picture can be named with.

The numbers in `IMAGES` and `VIDEOS` are what `fetch_image` and `fetch_video` of qwen-vl-utils 0.0.14 gave (its
wheel on PyPI, the file `vision_process.py`, executed once with frames of no content and the range and sampling of
its decord reader): (options, side of a patch, what is there, indices, (height, width), frames sampled per second).
"""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from test_assemble import same
from test_video_files import film

from mmpack import Encoder, Reader, RowError, VideoSpec, VisionSpec, assemble
from mmpack.cli.main import main
from mmpack.data import images, videos
from mmpack.media_options import MediaOptions
from mmpack.packing.prompt import render_prompt
from mmpack.store.encoded_store import write_store
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


# From rows to pixels


@pytest.fixture(scope="module")
def demo(small_set):
    """An encoder with the demo's tokenizer, a template that knows videos, and the spec of 14 pixels."""
    encoder = Encoder.from_folder(small_set / "tokenizer")
    ids = {name: id for name, id in vars(encoder.vision).items() if name.endswith("_token_id")}
    video = "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}"
    template = encoder.tokenizer.chat_template.replace("{% else %}{{ part", video + "{{ part")
    encoder.tokenizer.chat_template = template
    return dataclasses.replace(encoder, vision=spec_of(**ids))


def row_of(*parts, **fields):
    user = {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}
    return {"messages": [user, {"role": "assistant", "content": "This."}], **fields}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 10):
        picture = Image.fromarray(rng.integers(0, 256, (168, 224, 3), dtype=np.uint8))
        picture.save(tmp_path / f"{n}.png")
    film(tmp_path / "film.mp4", num_frames=20, rate=5, size=(224, 168))
    return tmp_path


PATHS = ["0.png", "1.png", "2.png", "10.png"]
ROWS = [
    # (row, (t, h, w) of its grids for patches of 14, sampled frames of its first video)
    (row_of({"type": "image", "image": "0.png", "max_pixels": 12544}), [(1, 6, 8)], None),
    (row_of({"type": "image", "path": "0.png", "resized_height": 280, "resized_width": 84}), [(1, 20, 6)], None),
    (row_of({"type": "image", "min_pixels": 60000.0}, images=["0.png"]), [(1, 16, 22)], None),
    (row_of({"type": "image"}, {"type": "image"}, images=["1.png", {"path": "0.png", "max_pixels": 12544}]),
     [(1, 12, 16), (1, 6, 8)], None),
    (row_of({"type": "image"}, image={"path": "0.png", "max_pixels": 12544, "min_pixels": None}), [(1, 6, 8)], None),
    (row_of({"type": "image", "image": {"path": "0.png", "max_pixels": 12544}}), [(1, 6, 8)], None),
    (row_of({"type": "image_url", "image_url": {"url": "0.png", "detail": "auto"}, "max_pixels": 12544}),
     [(1, 6, 8)], None),
    (row_of({"type": "video", "video": "film.mp4", "fps": 1.0}), [(2, 20, 28)], [0, 6, 13, 19]),
    (row_of({"type": "video", "path": "film.mp4", "nframes": 6}), [(3, 20, 28)], [0, 4, 8, 11, 15, 19]),
    (row_of({"type": "video", "url": "film.mp4", "video_start": 1.0, "video_end": 2.0, "nframes": 2}),
     [(1, 20, 28)], [5, 10]),
    (row_of({"type": "video", "video": "film.mp4", "nframes": 2, "max_pixels": 9999, "min_pixels": 1}),
     [(1, 6, 8)], [0, 19]),
    (row_of({"type": "video"}, videos=[{"path": "film.mp4", "nframes": 2, "resized_height": 56, "resized_width": 56}]),
     [(1, 4, 4)], [0, 19]),
    (row_of({"type": "video", "video": PATHS, "fps": 1, "resized_height": 84, "resized_width": 56}),
     [(2, 6, 4)], [0, 1, 2, 3]),
    (row_of({"type": "video"}, videos=[{"frames": PATHS, "fps": 1, "total_pixels": 1, "min_pixels": 9408}]),
     [(2, 6, 8)], [0, 1, 2, 3]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_pixels_follow_the_options_of_the_row(number, folder, demo):
    """The grid is that of the options, and so are the frames and pixels, also out of a store."""
    row, grids, index = ROWS[number]
    encoder = dataclasses.replace(demo, media_dir=folder)
    spec = encoder.vision
    (sample,) = encoder.encode(encoder.read([row]))
    assert sample.grid_thw.tolist() == [list(grid) for grid in grids]
    pack = assemble([sample])
    patches = sum(int(np.prod(grid)) for grid in grids)
    assert len(pack.pixels if index is None else pack.video_pixels) == patches
    assert same(pack, assemble([sample], impl="reference"))
    if index is not None:
        ref = sample.media[0]
        assert videos.sampled(ref, spec).index.tolist() == index
        frames = stock_frames(folder, ref, index, grids[0], spec)
        assert np.array_equal(pack.video_pixels, frames)
    store = write_store(folder / "store", [sample], spec)
    assert same(assemble([store[0]]), pack)


def stock_frames(folder, ref, index, grid, spec):
    """The patches of a film's frames, decoded and resized here, as `images` writes frames."""
    import av

    if ref.frames:
        pictures = [Image.open(folder / name) for name in PATHS]
    else:
        with av.open(str(folder / "film.mp4")) as container:
            pictures = [frame.to_image() for frame in container.decode(video=0)]
    t, h, w = grid
    out = np.zeros((t * h * w, 2 * spec.patch_values), dtype=np.uint8)
    for number, at in enumerate(index):
        patch, frame = divmod(number, 2)
        rows = out[patch * h * w : (patch + 1) * h * w]
        images.write_frame(pictures[at], (h, w), spec, rows, frame)
    return out


def test_qwen3_has_the_times_of_the_sampled_frames(folder):
    """`video_start` moves them; qwen-vl-utils hands the indices in the whole file to the processor."""
    spec = spec_of(16)
    ref = dataclasses.replace(
        videos.probe(VideoRef(str(folder / "film.mp4"))),
        options=MediaOptions(video_start=2.0, nframes=4),
    )
    frames = videos.sampled(ref, spec)
    assert frames.index.tolist() == [10, 13, 16, 19]
    times = spec.video_spec.timestamps(frames.index, frames.fps, 2)
    assert times == ["<2.3 seconds>", "<3.5 seconds>"]
    timed = dataclasses.replace(spec, video=dataclasses.replace(spec.video, tokens_per_second=2))
    assert timed.temporal_step(frames) == pytest.approx(2 * 2 / (4 / 10 * 5))


def test_a_prompt_has_the_options_of_its_parts(folder, demo):
    part = {"type": "image", "path": str(folder / "0.png"), "max_pixels": 12544}
    prompt = render_prompt([{"role": "user", "content": [part]}], demo)
    assert prompt.image_grid_thw.tolist() == [[1, 6, 8]]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (row_of({"type": "image", "path": "0.png", "url": "1.png"}), "part of turn 0 has 'path' and 'url'; keep one"),
        (row_of({"type": "image", "image": "0.png", "fps": 2}), "an image has 'fps', which only videos have"),
        (row_of({"type": "image", "image": "0.png", "total_pixels": 9}), "an image has 'total_pixels'"),
        (row_of({"type": "image", "image": "0.png", "max_pixels": -1}), "turn 0: 'max_pixels' must be"),
        (row_of({"type": "image_url", "image_url": {"url": "0.png", "detail": "low"}}), "'detail' 'low' of an image"),
        (row_of({"type": "image"}, images=[{"path": "0.png", "url": "0.png"}]), "an image has both 'path' and 'url'"),
        (row_of({"type": "image"}, images=[{"path": "0.png", "width": 3}]), "an image has the unknown key 'width'"),
        (row_of({"type": "image", "max_pixels": 9}, images=[{"path": "0.png", "min_pixels": 3}]), "in its part and in"),
        (row_of({"type": "image", "max_pixels": 9, "image": {"path": "0.png", "max_pixels": 3}}), "'max_pixels' twice"),
        (row_of({"type": "video", "video": PATHS, "nframes": 2}), "'nframes' is given for a list of frames"),
        (row_of({"type": "video", "video": PATHS, "video_start": 2}), "'video_start' is given for a list of frames"),
        (row_of({"type": "video", "video": PATHS, "fps": 2, "sample_fps": 1}), "'sample_fps' and 'fps' contradict"),
        (row_of({"type": "video", "video": PATHS, "sample_fps": 2, "raw_fps": 30}), "'raw_fps' of a list of frames"),
        (row_of({"type": "video", "video": "film.mp4", "sample_fps": 1}), "has a 'sample_fps', but is not a list"),
        (row_of({"type": "video", "video": [{"path": "0.png", "max_pixels": 9}]}), "a frame of a video has 'max_pixels'"),
        (row_of({"type": "video", "video": "film.mp4", "fps": 2, "nframes": 2}), "'nframes' and 'fps' contradict"),
    ],
)  # fmt: skip
def test_wrong_options_of_a_row_name_their_key(row, error, folder):
    with pytest.raises(ValueError, match=f"row 0 of .*{error}"):
        list(Reader(media_dir=folder).read([row]))


def test_options_that_contradict_the_processor_name_row_and_picture(folder, demo):
    encoder = dataclasses.replace(demo, media_dir=folder)
    row = row_of({"type": "image", "path": "0.png", "min_pixels": 1 << 30})
    with pytest.raises(
        ValueError, match=r"row 0 of .*image .*0.png: 'min_pixels' 1,073,741,824 is more than"
    ):
        list(encoder.encode(encoder.read([row])))
    row = row_of({"type": "video", "path": "film.mp4", "nframes": 100})
    with pytest.raises(
        ValueError, match=r"row 0 of .*video .*film.mp4: 'nframes' samples 100 of 20"
    ):
        list(encoder.encode(encoder.read([row])))


def test_a_picture_that_changed_is_found_with_options_too(folder):
    spec, options = spec_of(), MediaOptions(max_pixels=12544)
    ref = ImageRef(str(folder / "0.png"), options=options)
    grid = spec.image_grid(168, 224, options)
    assert images.load_patches(ref, grid, spec).shape == (48, spec.patch_values)
    Image.new("RGB", (224, 90)).save(folder / "0.png")
    with pytest.raises(
        ValueError, match="is now 224 x 90 pixels, but was planned as a grid of 6 x 8"
    ):
        images.load_patches(ref, grid, spec)


def test_min_pixels_is_an_option(small_set, tmp_path, capsys):
    tokenizer = small_set / "tokenizer"
    low = Encoder.from_folder(tokenizer).vision
    vision = Encoder.from_folder(tokenizer, min_pixels=200_000, max_pixels=300_000).vision
    assert vision == dataclasses.replace(low, min_pixels=200_000, max_pixels=300_000)
    words = ["check", str(small_set / "train.json"), "--tokenizer", str(tokenizer)]
    counts = []
    for more in ([], ["--min-pixels", "150000"]):
        assert main([*words, *more, "--json"]) == 0
        counts.append(capsys.readouterr().out)
    assert counts[0] != counts[1]
    assert main([*words, "--min-pixels", "99999999999"]) == 1
    error = capsys.readouterr().err
    assert "change --min-pixels (min_pixels) or --max-pixels (max_pixels)" in error
