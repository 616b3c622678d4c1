"""The C++ resize: Pillow's pixels, bit for bit, on every instruction set of this machine."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image
from test_native import assert_guards_stand, guarded, patches_by_transposition

from mmpack import _native
from mmpack.data import resize

SIZES = [
    # height, width -> height, width
    (768, 1024, 756, 1008),  # a little smaller
    (1080, 1920, 728, 1316),  # smaller, 8 taps
    (1000, 300, 84, 28),  # much smaller, the vertical pass first
    (100, 80, 224, 168),  # larger
    (64, 64, 56, 1176),  # the vertical pass first, and larger
    (84, 84, 84, 84),  # nothing to do
    (84, 100, 84, 56),  # only across
    (100, 84, 56, 84),  # only down
    (1, 1, 28, 28),
    (1, 300, 28, 28),
    (300, 1, 28, 28),
    (2, 3, 28, 56),
    (5, 7, 2, 2),  # fewer bytes than a register, and pixels than taps
]


def picture_of(rng, height, width, mode, kind="noise"):
    shape = (height, width) if mode == "L" else (height, width, 3)
    values = rng.integers(0, 256, shape, dtype=np.uint8)
    if kind == "black and white":  # overshoots on both sides
        values = np.where(values < 128, 0, 255).astype(np.uint8)
    return Image.fromarray(values)


def channels_of(picture):
    pixels = np.asarray(picture)
    return np.broadcast_to(pixels.reshape(*pixels.shape[:2], -1), (*pixels.shape[:2], 3))


def assert_equals_pillow(picture, size, patch, merge, kernel, frames=1, frame=0):
    """`size` is (height, width)."""
    expected = picture.resize(size[::-1], resample=Image.Resampling.BICUBIC)
    expected = patches_by_transposition(channels_of(expected), patch, merge)
    grid_h, grid_w = size[0] // patch, size[1] // patch
    out = guarded((grid_h * grid_w, 3 * frames * patch * patch), np.uint8)
    before = out.copy()
    _native.resize(
        resize.pixels_of(picture), patch, merge, out.reshape(grid_h, grid_w, 3, -1), frame,
        resize.installed_order()((picture.height, picture.width), size), kernel,
    )  # fmt: skip
    by_frame = out.reshape(len(out), 3, frames, -1)
    assert np.array_equal(by_frame[:, :, frame], expected.reshape(len(out), 3, -1)), (
        picture.size, picture.mode, size, kernel,
    )  # fmt: skip
    others = np.arange(frames) != frame
    assert np.array_equal(by_frame[:, :, others], before.reshape(by_frame.shape)[:, :, others])
    assert_guards_stand({"patches": out})


def random_case(rng):
    patch, merge = int(rng.choice([14, 16, 3, 1])), int(rng.integers(1, 4))
    height, width = (int(side) for side in np.exp(rng.uniform(0, np.log(600), 2)))
    block = patch * merge
    size = [max(1, int(side / block)) * block for side in np.exp(rng.uniform(2, np.log(500), 2))]
    height, width = (
        size[0] if rng.random() < 0.1 else height,
        size[1] if rng.random() < 0.1 else width,
    )
    mode = "L" if rng.random() < 0.3 else "RGB"
    kind = "noise" if rng.random() < 0.7 else "black and white"
    return picture_of(rng, height, width, mode, kind), tuple(size), patch, merge


@pytest.mark.parametrize("kernel", _native.RESIZE_KERNELS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_sizes_equal_pillows(case, mode, kernel):
    picture = picture_of(np.random.default_rng(0), *case[:2], mode, "black and white")
    patch, merge = (1, 1) if case[2] < 28 else (14, 2)
    assert_equals_pillow(picture, case[2:], patch, merge, kernel)


def test_random_sizes_equal_pillows():
    rng = np.random.default_rng(1)
    for _ in range(300):
        case = random_case(rng)
        for kernel in _native.RESIZE_KERNELS:
            assert_equals_pillow(*case, kernel)


@pytest.mark.slow
def test_20_000_random_sizes_equal_pillows():
    rng = np.random.default_rng(2)
    for _ in range(20_000):
        case = random_case(rng)
        for kernel in _native.RESIZE_KERNELS:
            assert_equals_pillow(*case, kernel)


@pytest.mark.slow
def test_real_images_equal_pillows(shared):
    for line in (shared / "realset" / "image_meta.jsonl").read_text().splitlines():
        with Image.open(shared / "realset" / json.loads(line)["path"]) as image:
            picture = image if image.mode == "L" else image.convert("RGB")
            size = [max(28, side // 28 * 28) for side in (picture.height, picture.width)]
            while size[0] * size[1] > 28 * 28 * 1280:
                size = [max(28, side * 9 // 10 // 28 * 28) for side in size]
            for kernel in _native.RESIZE_KERNELS:
                assert_equals_pillow(picture, tuple(size), 14, 2, kernel)


def test_a_frame_of_a_patch_leaves_the_others_alone():
    rng = np.random.default_rng(0)
    for frame in (2, 0, 1):
        picture = picture_of(rng, 50, 90, "RGB")
        assert_equals_pillow(picture, (28, 56), 14, 2, "", frames=3, frame=frame)


def test_the_plain_version_is_always_there():
    assert _native.RESIZE_KERNELS[-1] == "plain"


def test_pillows_own_memory_is_read():
    picture = picture_of(np.random.default_rng(0), 30, 40, "RGB")
    if not resize.exports_memory():
        pytest.skip("this Pillow cannot export its memory")
    pixels = resize.pixels_of(picture)
    assert pixels.shape == (30, 40, 4)
    assert not pixels.flags.writeable
    picture.putpixel((7, 5), (1, 2, 3))
    assert pixels[5, 7, :3].tolist() == [1, 2, 3]
    expected = np.asarray(picture)
    del picture  # the pixels keep it
    assert np.array_equal(pixels[:, :, :3], expected)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_picture_in_several_blocks_of_memory_is_copied(mode):
    height, width = (2200, 2000) if mode == "RGB" else (4200, 4100)  # above 16 MiB
    picture = Image.new(mode, (width, height)).resize((width, height))
    picture.paste(picture_of(np.random.default_rng(0), 100, 100, mode), (width - 100, height - 100))
    assert_equals_pillow(picture, (112, 112), 14, 2, "")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_pillow_that_exports_nothing(mode, monkeypatch):
    monkeypatch.setattr(resize, "exports_memory", lambda: False)
    picture = picture_of(np.random.default_rng(0), 30, 40, mode)
    pixels = resize.pixels_of(picture)
    colors = pixels if mode == "L" else pixels[:, :, :3]
    assert np.array_equal(colors, np.asarray(picture))


@pytest.fixture
def _asked_again():
    resize.installed_order.cache_clear()
    yield
    resize.installed_order.cache_clear()


def patches_of(picture):
    out = np.empty((8, 588), dtype=np.uint8)
    resize.write_resized(picture, (2, 4), 14, 2, out)
    return out


@pytest.mark.usefixtures("_asked_again")
def test_the_installed_pillows_order_is_found():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resize.installed_order() in resize.ORDERS


@pytest.mark.usefixtures("_asked_again")
@pytest.mark.parametrize("order", resize.ORDERS)
def test_an_order_is_told_from_every_other_one(order, monkeypatch):
    """With a Pillow of that order, which the native resize plays."""

    def resized(picture, size, resample):
        assert resample == Image.Resampling.BICUBIC
        out = np.empty((1, 1, 3, size[0] * size[1]), dtype=np.uint8)
        vertical_first = order((picture.height, picture.width), size[::-1])
        _native.resize(resize.pixels_of(picture), size[0], 1, out, 0, vertical_first)
        return Image.fromarray(np.ascontiguousarray(out.reshape(3, *size).transpose(1, 2, 0)))

    monkeypatch.setattr(Image.Image, "resize", resized)
    assert resize.installed_order() is order


@pytest.mark.usefixtures("_asked_again")
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_another_filter_is_left_to_pillow_with_a_warning(monkeypatch, mode):
    picture = picture_of(np.random.default_rng(0), 50, 90, mode)
    original = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda picture, size, resample: original(picture, size, Image.Resampling.BILINEAR),
    )
    with pytest.warns(UserWarning, match="resize does not equal that of Pillow"):
        patches = patches_of(picture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once per process
        assert np.array_equal(patches_of(picture), patches)
    bilinear = original(picture, (56, 28), Image.Resampling.BILINEAR)
    assert np.array_equal(patches, patches_by_transposition(channels_of(bilinear), 14, 2))


RGBX = np.zeros((30, 60, 4), dtype=np.uint8)
GREY = np.zeros((30, 60), dtype=np.uint8)
PATCHES = np.zeros((2, 4, 3, 196), dtype=np.uint8)


def test_patches_that_are_not_contiguous_are_refused():
    picture = Image.new("RGB", (60, 30))
    with pytest.raises(ValueError, match="patches must be contiguous"):
        resize.write_resized(picture, (2, 4), 14, 2, np.zeros((8, 2 * 588), np.uint8)[:, ::2])


def nothing(*shape):
    """An array of that shape with few bytes of memory, if it has any."""
    return np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), shape, (0,) * len(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((RGBX.astype(float), 14, 2, PATCHES), "pixels must be uint8 of shape"),
        ((RGBX[:, :, :3].copy(), 14, 2, PATCHES), r"pixels must be uint8 of shape \(any, any, 4\)"),
        ((RGBX[0, 0], 14, 2, PATCHES), "pixels must be uint8 of shape"),
        ((RGBX[:, ::2], 14, 2, PATCHES), "pixels must be contiguous"),
        ((GREY[::-1], 14, 2, PATCHES), "pixels must be contiguous"),
        ((nothing(2**40, 2**20), 14, 2, PATCHES), "pixels must be contiguous"),
        ((RGBX[:0], 14, 2, PATCHES), "sides of 1 to 2.20, got 0 x 60"),
        ((GREY[:, :0], 14, 2, PATCHES), "sides of 1 to 2.20, got 30 x 0"),
        ((np.zeros((2**20 + 1, 1), np.uint8), 14, 2, PATCHES), "sides of 1 to 2.20, got 1048577"),
        ((RGBX, 0, 2, PATCHES), "must be positive"),
        ((RGBX, 14, -2, PATCHES), "must be positive"),
        ((RGBX, 2**62, 2, PATCHES), "must be positive"),
        ((RGBX, 14, 2**40, PATCHES), "must be positive"),
        ((RGBX, 14, 3, PATCHES), "a grid of multiples of 3, at most 2.20 pixels per side, got 2 x 4"),
        ((RGBX, 2**20, 2, PATCHES), "at most 2.20 pixels per side"),
        ((RGBX, 14, 2, PATCHES[:0]), "a grid of multiples of 2"),
        ((RGBX, 14, 2, PATCHES.reshape(8, 588)), "patches must be of shape"),
        ((RGBX, 14, 2, PATCHES[:, :, :2].copy()), "patches must be uint8 of shape"),
        ((RGBX, 14, 2, PATCHES[..., :195].copy()), "patches must be uint8 of shape"),
        ((RGBX, 14, 2, PATCHES.astype(np.int8)), "patches must be uint8 of shape"),
        ((RGBX, 14, 2, PATCHES[:, :, ::-1]), "patches must be contiguous"),
        ((RGBX, 14, 2, np.frombuffer(PATCHES.tobytes(), np.uint8).reshape(PATCHES.shape)), "writable"),
        ((RGBX, 14, 2, PATCHES, 1), "frame must be from 0 to 0"),
        ((RGBX, 14, 2, PATCHES, -1), "frame must be from 0 to 0"),
        ((RGBX, 14, 2, PATCHES, 0, False, "avx9"), "kernel must be one of RESIZE_KERNELS, got 'avx9'"),
        (
            (np.zeros((2**16, 1), np.uint8), 1, 1, np.zeros((1, 2**16, 3, 1), np.uint8)),
            "a resize may take 4 GiB",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        _native.resize(*arguments)


def test_patches_that_share_memory_with_the_pixels_are_refused():
    pixels = np.zeros((28, 21, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match="patches must not share memory"):
        _native.resize(pixels, 14, 2, pixels.reshape(2, 2, 3, 196), 0)


def capsules(mode="RGB"):
    return Image.new(mode, (60, 30)).__arrow_c_array__()


@pytest.mark.skipif(not resize.exports_memory(), reason="this Pillow cannot export its memory")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: (None, None, 30, 60), "schema must be an arrow_schema capsule"),
        (lambda: (*capsules()[::-1], 30, 60), "schema must be an arrow_schema capsule"),
        (lambda: (capsules()[0], 3, 30, 60), "array must be an arrow_array capsule"),
        (lambda: (*capsules(), 30, 61), "height times width pixels, got 1800"),
        (lambda: (*capsules("L"), 31, 60), "height times width pixels, got 1800"),
        (lambda: (*capsules(), 2**32, 2**32), "from 1 to 2.20"),
        (lambda: (*capsules(), -30, -60), "from 1 to 2.20"),
        (lambda: (*capsules("F"), 30, 60), "bytes or of four bytes, got f"),
        (lambda: (capsules("L")[0], capsules()[1], 30, 60), "array must have pixels"),
        (lambda: (capsules()[0], capsules("L")[1], 30, 60), "bytes or of four bytes"),
    ],
)
def test_wrong_capsules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        _native.arrow_pixels(*arguments())
