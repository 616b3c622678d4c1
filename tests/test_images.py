import dataclasses
import hashlib
import json

import numpy as np
import PIL
import pytest
import transformers
from PIL import Image

from mmpack import VisionSpec, images
from mmpack.types import ImageRef

SPEC = VisionSpec(min_pixels=56 * 56, max_pixels=28 * 28 * 64)


def pixel_values(path, spec):
    ref = ImageRef(str(path))
    grid = spec.image_grid(*images.image_size(ref))
    return images.normalize_patches(images.load_patches(ref, grid, spec), spec), grid


def stock_pixel_values(path, spec):
    processor = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels}
    )
    with Image.open(path) as image:
        out = processor(images=[image], return_tensors="np")
    return out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())


def test_golden_pixels(shared, vision):
    golden = json.loads((shared / "golden" / "pixels.json").read_text())
    rows = np.load(shared / "golden" / "pixels.npz")
    for number, entry in enumerate(golden["images"]):
        spec = dataclasses.replace(
            vision, min_pixels=golden["min_pixels"], max_pixels=entry["max_pixels"]
        )
        values, grid = pixel_values(shared / entry["file"], spec)
        assert list(grid) == entry["grid_thw"]
        assert values.shape == (np.prod(grid), 1176)
        assert np.array_equal(values[rows[f"rows_{number}"]], rows[f"values_{number}"])
        if PIL.__version__ == golden["pillow"]:  # another resampler may round otherwise
            assert hashlib.sha256(values.tobytes()).hexdigest() == entry["sha256_f32"]
    assert number == 53


@pytest.mark.parametrize(
    "mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "transparent P"]
)
def test_every_mode_equals_transformers_bit_for_bit(tmp_path, mode):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (90, 120, 4), dtype=np.uint8), "RGBA")
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    if mode == "transparent P":
        picture.convert("RGB").convert("P").save(path, transparency=3)
    elif mode == "I;16":
        Image.fromarray(rng.integers(0, 65536, (90, 120), dtype=np.uint16)).save(path)
    else:
        (picture.convert("RGB") if mode == "CMYK" else picture).convert(mode).save(path)
    values, grid = pixel_values(path, SPEC)
    expected, expected_grid = stock_pixel_values(path, SPEC)
    assert grid == expected_grid
    assert np.array_equal(values, expected)


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (700, 5), (333, 777)])
def test_odd_sizes_equal_transformers(tmp_path, size):
    path = tmp_path / "a.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    values, grid = pixel_values(path, SPEC)
    expected, expected_grid = stock_pixel_values(path, SPEC)
    assert grid == expected_grid
    assert np.array_equal(values, expected)


def test_sizes_are_read_from_headers(shared):
    for line in (shared / "realset" / "image_meta.jsonl").read_text().splitlines():
        meta = json.loads(line)
        size = images.image_size(ImageRef(str(shared / "realset" / meta["path"])))
        assert size == (meta["height"], meta["width"])


def test_patches_are_in_merge_order(tmp_path):
    # Each patch has its number in reading order as its grey value.
    grid_h, grid_w = 4, 6
    numbers = np.arange(grid_h * grid_w, dtype=np.uint8).reshape(grid_h, grid_w)
    Image.fromarray(numbers.repeat(14, axis=0).repeat(14, axis=1)).save(tmp_path / "a.png")
    patches = images.load_patches(ImageRef(str(tmp_path / "a.png")), (1, grid_h, grid_w), SPEC)
    assert (patches == patches[:, :1]).all()
    assert patches[:8, 0].tolist() == [0, 1, 6, 7, 2, 3, 8, 9]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), (b"<html>", "not an image Pillow can read")]
)
def test_a_file_that_is_no_image_is_named(tmp_path, content, message):
    path = tmp_path / "a.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.jpg .*{message}|a.jpg is {message}"):
        images.image_size(ImageRef(str(path)))


def test_a_cut_file_is_named(tmp_path):
    path = tmp_path / "a.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (100, 100, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    ref = ImageRef(str(path))
    assert images.image_size(ref) == (100, 100)
    with pytest.raises(ValueError, match="a.png cannot be decoded"):
        images.load_patches(ref, SPEC.image_grid(100, 100), SPEC)


def test_a_file_that_changed_size_is_refused(tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="now 100 x 100 pixels, it was planned as a grid of 4 x 6"):
        images.load_patches(ImageRef(str(tmp_path / "a.png")), (1, 4, 6), SPEC)
