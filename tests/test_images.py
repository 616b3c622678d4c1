import dataclasses
import hashlib
import json

import numpy as np
import PIL
import pytest
import transformers
from PIL import Image

from mmpack import VisionSpec
from mmpack.data import images
from mmpack.types import ImageRef

SPEC = VisionSpec(min_pixels=56 * 56, max_pixels=28 * 28 * 64)


def pixel_values(path, spec):
    ref = ImageRef(str(path))
    grid = spec.image_grid(*images.probe(ref))
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
        size = images.probe(ImageRef(str(shared / "realset" / meta["path"])))
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
    ("content", "message"),
    [(None, "does not exist"), (b"<html>", "in none of the formats JPEG, PNG")],
)
def test_a_file_that_is_no_image_is_named(tmp_path, content, message):
    path = tmp_path / "a.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.jpg (is )?{message}"):
        images.probe(ImageRef(str(path)))


def noise(path, size=(100, 100)):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return ImageRef(str(path))


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_cut_file_is_found_by_its_end(tmp_path, name):
    image = noise(tmp_path / name)
    assert images.probe(image) == (100, 100)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"{name} cannot be decoded"):
        images.probe(image)
    with pytest.raises(ValueError, match=f"{name} cannot be decoded"):
        images.load_patches(image, SPEC.image_grid(100, 100), SPEC)


def test_damage_in_the_middle_is_found_by_decoding(tmp_path):
    image = noise(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    (tmp_path / "a.png").write_bytes(data)
    assert images.probe(image) == (100, 100)
    with pytest.raises(ValueError, match="a.png cannot be decoded"):
        images.probe(image, decode=True)


def test_a_jpeg_with_something_behind_its_end_is_whole(tmp_path):
    image = noise(tmp_path / "a.jpg")
    with open(tmp_path / "a.jpg", "ab") as file:
        file.write(bytes(10_000))  # further than the end is looked for: then decoding decides
    assert images.probe(image) == (100, 100)


def test_bombs_are_refused_by_their_header(shared, tmp_path):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("bomb_30000x30000.png", "header_lies_65000x65000.png"):
        with pytest.raises(ValueError, match="is too large"):
            images.probe(ImageRef(str(shared / "malformed" / "images" / name)), decode=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 20_000  # KiB


def test_pictures_in_memory(tmp_path):
    image = noise(tmp_path / "a.png", (60, 80))
    grid = SPEC.image_grid(60, 80)
    expected = images.load_patches(image, grid, SPEC)
    data = ImageRef("bytes", (tmp_path / "a.png").read_bytes())
    for picture in (data, ImageRef("picture", Image.open(tmp_path / "a.png"))):
        assert images.probe(picture, decode=True) == (60, 80)
        assert np.array_equal(images.load_patches(picture, grid, SPEC), expected)
        stored = ImageRef("stored", images.encoded_bytes(picture))
        assert np.array_equal(images.load_patches(stored, grid, SPEC), expected)


def test_a_file_that_changed_size_is_refused(tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    with pytest.raises(
        ValueError, match="now 100 x 100 pixels, but was planned as a grid of 4 x 6"
    ):
        images.load_patches(ImageRef(str(tmp_path / "a.png")), (1, 4, 6), SPEC)


def test_patches_go_where_they_are_to_go(tmp_path):
    image, grid = noise(tmp_path / "a.png"), SPEC.image_grid(100, 100)
    buffer = np.zeros((grid[1] * grid[2] + 2, SPEC.patch_values), dtype=np.uint8)
    returned = images.load_patches(image, grid, SPEC, out=buffer[1:-1])
    assert np.shares_memory(returned, buffer)
    assert np.array_equal(buffer[1:-1], images.load_patches(image, grid, SPEC))
    assert not buffer[[0, -1]].any()
