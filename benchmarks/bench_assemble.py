"""How long does a pack take to assemble, pixels aside, against transformers' own pieces in torch?

The peer is what a collator without mmpack does: `get_rope_index` on each sample with images, whose
placeholders are expanded already, then everything joined with `torch.cat` and the segments' offsets; it
makes none of the indices that mmpack's pack holds besides. The ceiling is a copy of the finished pack's arrays.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from benchmarks.harness import time_ms
from benchmarks.peers import rope_index_model, rope_index_pack
from mmpack import VisionSpec, assemble
from mmpack.types import IGNORE, EncodedSample

SPEC = VisionSpec(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
CASES = [  # capacity, segments, images
    (8192, 7, 28),
    (8192, 75, 0),
    (32768, 40, 100),
]


def made_up(capacity: int, segments: int, images: int) -> list[EncodedSample]:
    """Samples that fill a pack to its last token: images of 16 x 16 to 40 x 40 patches, each after some
    text, and an answer of a third of the text."""
    rng = np.random.default_rng(0)
    grids = np.ones((images, 3), dtype=np.int32)
    grids[:, 1:] = 2 * rng.integers(8, 21, (images, 2))
    num_text = capacity - int(SPEC.num_features(grids).sum())
    share = np.diff(np.linspace(0, num_text, segments + 1).astype(int))
    samples = []
    for n, own in enumerate(np.array_split(grids, segments)):
        ids = rng.integers(0, 151_000, share[n] + len(own)).astype(np.int32)
        places = np.linspace(1, len(ids) // 2, len(own)).astype(int)
        ids[places] = SPEC.image_token_id
        labels = np.where(np.arange(len(ids)) >= len(ids) * 2 // 3, ids, IGNORE).astype(np.int32)
        samples.append(EncodedSample(ids, labels, own, (), SPEC, "made up", n))
    return samples


@pytest.fixture(scope="module")
def model():
    return rope_index_model(SPEC)


@pytest.mark.parametrize(("capacity", "segments", "images"), CASES)
def test_assemble(capacity, segments, images, model, benchmark, recorder, quick):
    if quick and capacity != 8192:
        pytest.skip("not among the quick cases")
    samples = made_up(capacity, segments, images)
    pack = assemble(samples, pixels=False)
    assert len(pack.input_ids) == capacity
    expanded = []
    for begin, end, sample in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], samples):
        ids, labels = (torch.from_numpy(x[begin:end]) for x in (pack.input_ids, pack.labels))
        expanded.append((ids, labels, torch.from_numpy(sample.grid_thw).long()))
    stock = rope_index_pack(model, expanded)
    assert np.array_equal(stock["position_ids"].numpy(), pack.position_ids)
    assert np.array_equal(stock["cu_seqlens"].numpy(), pack.cu_seqlens)

    arrays = [getattr(pack, field.name) for field in fields(pack)]
    arrays = [array for array in arrays if isinstance(array, np.ndarray)]
    candidates = {
        "mmpack": lambda: assemble(samples, pixels=False),
        "transformers": lambda: rope_index_pack(model, expanded),
        "reference": lambda: assemble(samples, pixels=False, impl="reference"),
        "copy": lambda: [array.copy() for array in arrays],
    }
    times = time_ms(candidates, rounds=5 if quick else 50)
    config = f"segments={segments} images={images} tokens={capacity} patches={len(pack.vision_segment_ids)}"
    medians = {name: float(np.median(values)) for name, values in times.items()}
    for name, values in times.items():
        recorder.add(
            "assemble",
            name,
            "assemble",
            metric="time",
            unit="ms",
            values=values,
            x=("tokens", capacity),
            config=config,
        )
    ratios = {f"{name} x": round(ms / medians["mmpack"], 2) for name, ms in medians.items()}
    benchmark.extra_info.update(ratios, case=config)
    benchmark.pedantic(candidates["mmpack"], rounds=3, warmup_rounds=1)
    print(f"\n{config}: " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in medians.items()))
