"""What does an image cost from its file to the pack's buffer?

For real images if they are beside the checkout, else synthetic photographs: all of `images.load_patches`. The
ceiling is Pillow's decoding and resizing, the minimum for anything that resizes with Pillow. For images in memory:
the resize alone, and all from an image to `pixel_values`. Peers: Pillow's resize and torch's (antialiased bicubic
of bytes, as torchvision calls it; its pixels differ), and transformers' PIL image processor. Whole packs, decoded
and collated, are in `bench_host`, with LLaMA-Factory and VeOmni as peers too.
"""

from __future__ import annotations

import io
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.harness import CEILING, SHARED, compare, measure
from mmpack import VisionSpec
from mmpack.data import images
from mmpack.data.resize import write_resized
from mmpack.types import ImageRef
from mmpack.video_spec import BICUBIC

SPEC = VisionSpec(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
REALSET = SHARED / "realset"


def photograph(height: int, width: int) -> Image.Image:
    """Smooth colors with noise, which compress like a photograph."""
    rng = np.random.default_rng(height)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), resample=BICUBIC), dtype=np.int16)
    noisy = smooth + rng.integers(-8, 9, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded_images(number: int) -> list[ImageRef]:
    """The image's encoded bytes, so that the disk is not measured."""
    if REALSET.is_dir():
        lines = (REALSET / "image_meta.jsonl").read_text(encoding="utf-8").splitlines()
        paths = [REALSET / json.loads(line)["path"] for line in lines]
        return [ImageRef(p.name, p.read_bytes()) for p in random.Random(0).sample(paths, number)]
    refs = []
    for n in range(number):
        buffer = io.BytesIO()
        photograph(360 + 40 * (n % 12), 480 + 56 * (n % 9)).save(buffer, "JPEG" if n % 2 else "PNG")
        refs.append(ImageRef(f"photograph {n}", buffer.getvalue()))
    return refs


def decode_and_resize(image: ImageRef, spec: VisionSpec) -> Image.Image:
    """The minimum for a processor that uses Pillow: RGB of the planned size."""
    opened = Image.open(io.BytesIO(image.data))
    height, width = spec.smart_resize(opened.height, opened.width)
    return images._to_rgb(opened).resize((width, height), resample=BICUBIC)


@pytest.mark.cpu
def test_files(benchmark, recorder, quick):
    """Milliseconds per image, over all images."""
    refs = encoded_images(24 if quick else 400)
    grids = [SPEC.image_grid(*images.probe(ref)) for ref in refs]
    buffer = np.empty((max(h * w for _, h, w in grids), SPEC.patch_values), dtype=np.uint8)

    def load():
        for ref, grid in zip(refs, grids):
            images.load_patches(ref, grid, SPEC, out=buffer[: grid[1] * grid[2]])

    candidates = {
        CEILING: lambda: [decode_and_resize(ref, SPEC) for ref in refs],
        "mmpack": load,
    }
    medians = measure(
        recorder, "pixels", "a file", candidates, x=("images", len(refs)),
        config="real" if REALSET.is_dir() else "made up", per=("ms", len(refs)),
        rounds=3 if quick else 7, warmup=1, on_host=True,
    )  # fmt: skip
    compare(benchmark, medians, "mmpack")
    benchmark.pedantic(candidates["mmpack"], rounds=1)


@pytest.mark.cpu
@pytest.mark.parametrize(("height", "width"), [(768, 1024), (1080, 1920)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_resize(height, width, mode, benchmark, recorder, quick):
    """From a decoded image to a resized one: Pillow's, torch's of a tensor; ours writes it as patches."""
    picture = photograph(height, width).convert(mode)
    _, grid_h, grid_w = SPEC.image_grid(height, width)
    size = (grid_w * 14, grid_h * 14)
    patches = np.empty((grid_h * grid_w, SPEC.patch_values), dtype=np.uint8)
    planes = torch.from_numpy(np.array(picture)).reshape(height, width, -1).permute(2, 0, 1)[None]
    shrink = torch.nn.functional.interpolate
    candidates = {
        "Pillow": lambda: picture.resize(size, resample=BICUBIC),
        "torch": lambda: shrink(planes, size[::-1], mode="bicubic", antialias=True),
        "mmpack": lambda: write_resized(picture, (grid_h, grid_w), 14, 2, patches),
    }
    medians = measure(
        recorder, "pixels", "resize", candidates, x=("pixels", height * width),
        config=f"{width} x {height} {mode}", rounds=3 if quick else 30, warmup=2, on_host=True,
    )  # fmt: skip
    compare(benchmark, medians, "mmpack", case=f"{width} x {height} {mode}")
    benchmark.pedantic(candidates["mmpack"], rounds=3)


@pytest.mark.cpu
@pytest.mark.parametrize(("height", "width"), [(448, 448), (768, 1024), (1080, 1920)])
def test_a_picture(height, width, benchmark, recorder, quick):
    """From a decoded image to transformers' `pixel_values`, and to ours as bytes and as floats."""
    from transformers import Qwen2VLImageProcessorPil

    picture = photograph(height, width)
    ref = ImageRef("picture", picture)
    grid = SPEC.image_grid(height, width)
    stock = Qwen2VLImageProcessorPil(
        size={"shortest_edge": SPEC.min_pixels, "longest_edge": SPEC.max_pixels}
    )
    patches = np.empty((grid[1] * grid[2], SPEC.patch_values), dtype=np.uint8)

    def in_bytes():
        return images.load_patches(ref, grid, SPEC, out=patches)

    candidates = {
        "transformers": lambda: stock(images=[picture], return_tensors="np")["pixel_values"],
        "mmpack": in_bytes,
        "mmpack float32": lambda: images.normalize_patches(in_bytes(), SPEC),
    }
    floats, size = candidates["transformers"](), f"{width} x {height}"
    assert np.array_equal(floats, candidates["mmpack float32"]())
    x = ("pixels", height * width)
    medians = measure(
        recorder, "pixels", "a picture", candidates, x=x, config=size,
        rounds=3 if quick else 30, warmup=2, on_host=True,
    )  # fmt: skip
    for name in medians:
        made = {"transformers": floats, "mmpack float32": floats}.get(name, patches).nbytes
        recorder.add(
            "pixels", name, "a picture", metric="made", unit="B", values=[made], x=x, config=size
        )  # fmt: skip
    compare(benchmark, medians, "mmpack", case=size)
    benchmark.pedantic(candidates["mmpack"], rounds=3)
