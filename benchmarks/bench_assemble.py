"""How long does it take to assemble a pack, excluding pixels, and how much of it can the device do?

The peer does the work of a collator without mmpack: `get_rope_index` on each sample with images, with placeholders
already expanded, then `torch.cat` of everything, and the segments' offsets. It does not make the other indices of
mmpack's pack. The ceiling is a copy of the finished pack's arrays. `test_batch`: host time and bytes of a batch
assembled by the C++ core and of a compact batch; on a GPU also the launches and time there. `test_veomni`: the
same against VeOmni, whose collator packs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.harness import CEILING, compare, kernel_launches, measure, time_ms
from benchmarks.peer_collators import veomni_pack
from benchmarks.peers import rope_index_model, rope_index_pack
from mmpack import VisionSpec, assemble
from mmpack.hf.forward_kwargs import assemble_on_device, batch_of, compact_batch_of
from mmpack.hf.model_parts import TowerSpec
from mmpack.ops import assemble_sequence
from mmpack.packing.compact import compact
from mmpack.types import IGNORE, EncodedSample, Pack

SPEC = VisionSpec(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
CASES = [  # capacity, segments, images
    (8192, 7, 28),
    (8192, 75, 0),
    (32768, 40, 100),
]


def made_up(capacity: int, segments: int, images: int) -> list[EncodedSample]:
    """Samples that fill a pack exactly: images of 16 x 16 to 40 x 40 patches, each after some text, and an answer
    that is a third of the text."""
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


def expand(pack: Pack, samples: list[EncodedSample]) -> list[tuple[torch.Tensor, ...]]:
    """(input_ids, labels, image_grid_thw) of each sample, with placeholders expanded: the peers' input."""
    return [
        (
            *(torch.from_numpy(x[begin:end]) for x in (pack.input_ids, pack.labels)),
            torch.from_numpy(sample.grid_thw).long(),
        )
        for begin, end, sample in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], samples)
    ]


@pytest.fixture(scope="module")
def model():
    return rope_index_model(SPEC)


@pytest.mark.cpu
@pytest.mark.parametrize(("capacity", "segments", "images"), CASES)
def test_assemble(capacity, segments, images, model, benchmark, recorder, quick):
    if quick and capacity != 8192:
        pytest.skip("not among the quick cases")
    samples = made_up(capacity, segments, images)
    pack = assemble(samples, pixels=False)
    assert len(pack.input_ids) == capacity
    expanded = expand(pack, samples)
    stock = rope_index_pack(model, expanded)
    assert np.array_equal(stock["position_ids"].numpy(), pack.position_ids)
    assert np.array_equal(stock["cu_seqlens"].numpy(), pack.cu_seqlens)

    arrays = [getattr(pack, field.name) for field in fields(pack)]
    arrays = [array for array in arrays if isinstance(array, np.ndarray)]
    candidates = {
        "mmpack": lambda: assemble(samples, pixels=False),
        "transformers": lambda: rope_index_pack(model, expanded),
        "reference": lambda: assemble(samples, pixels=False, impl="reference"),
        CEILING: lambda: [array.copy() for array in arrays],
    }
    config = f"segments={segments} images={images} tokens={capacity} patches={len(pack.vision_segment_ids)}"
    medians = measure(
        recorder, "assemble", "assemble", candidates, x=("tokens", capacity), config=config,
        rounds=5 if quick else 50, on_host=True,
    )  # fmt: skip
    compare(benchmark, medians, "mmpack", case=config)
    benchmark.pedantic(candidates["mmpack"], rounds=3, warmup_rounds=1)


def ours(samples: list[EncodedSample]) -> dict[str, Callable[[], dict[str, Any]]]:
    """From samples to a batch without pixels, assembled on the device or on the host."""
    has_images = any(len(sample.grid_thw) for sample in samples)
    values = {"pixel_values": torch.empty(0)} if has_images else {}  # grids are sent with pixels
    tower = TowerSpec()
    return {
        "device": lambda: compact_batch_of(compact(samples), values, tower),
        "native": lambda: batch_of(assemble(samples, pixels=False), values, tower),
    }


def num_bytes(batch: dict[str, Any]) -> int:
    """Bytes of a batch's tensors, sent from the worker to the device."""
    values = [*batch.values(), *batch["mmpack"].values()]
    values += batch["mmpack"].get("compact", {}).values()
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


@pytest.mark.cpu
@pytest.mark.gpu
@pytest.mark.parametrize(("capacity", "segments", "images"), CASES)
def test_batch(capacity, segments, images, model, benchmark, recorder, quick):
    if quick and capacity != 8192:
        pytest.skip("not among the quick cases")
    samples = made_up(capacity, segments, images)
    expanded = expand(assemble(samples, pixels=False), samples)
    candidates = ours(samples) | {"transformers": lambda: rope_index_pack(model, expanded)}
    batches = {name: candidates[name]() for name in ("device", "native")}
    x, config = ("tokens", capacity), f"segments={segments} images={images} tokens={capacity}"
    medians = measure(
        recorder, "batch", "host", candidates, x=x, config=config,
        rounds=5 if quick else 50, on_host=True,
    )  # fmt: skip
    sizes = {name: [num_bytes(batch)] for name, batch in batches.items()}
    figures = [("host", "bytes", "B", sizes)]
    if torch.cuda.is_available():
        figures += on_the_gpu(batches["device"], quick)
    for mode, metric, unit, found in figures:
        for name, of_name in found.items():
            recorder.add(
                "batch", name, mode, metric=metric, unit=unit, values=of_name, x=x, config=config
            )  # fmt: skip
            print(f"{mode} {config}: {metric} {name} {float(np.median(of_name)):.4g} {unit}")
    compare(benchmark, medians, "device", case=config)
    benchmark.pedantic(candidates["device"], rounds=3, warmup_rounds=1)


@pytest.mark.cpu
@pytest.mark.peer("--no-deps veomni", "veomni")
@pytest.mark.parametrize(("capacity", "segments", "images"), CASES)
def test_veomni(capacity, segments, images, model, benchmark, recorder, quick):
    if quick and capacity != 8192:
        pytest.skip("not among the quick cases")
    samples = made_up(capacity, segments, images)
    pack = assemble(samples, pixels=False)
    expanded, collate = expand(pack, samples), veomni_pack(model)
    stock = collate(expanded)
    assert np.array_equal(stock["position_ids"][0].numpy(), pack.position_ids[1:])
    assert np.array_equal(stock["cu_seq_lens_q"].numpy(), pack.cu_seqlens)

    candidates = ours(samples) | {"VeOmni": lambda: collate(expanded)}
    config = f"segments={segments} images={images} tokens={capacity}"
    medians = measure(
        recorder, "batch", "host, beside VeOmni", candidates, x=("tokens", capacity), config=config,
        rounds=5 if quick else 50, on_host=True,
    )  # fmt: skip
    compare(benchmark, medians, "device", case=config)
    benchmark.pedantic(candidates["device"], rounds=3, warmup_rounds=1)


def on_the_gpu(
    batch: dict[str, Any], quick: bool
) -> list[tuple[str, str, str, dict[str, list[float]]]]:
    """The device's work for a compact batch: all of it, and only the sequence."""
    batch = to_gpu(batch)
    pack = batch["mmpack"]
    tensors = (
        batch["input_ids"][0],
        *(pack["compact"][n] for n in ("offsets", "markers", "grid_thw")),
    )
    steps = pack["compact"]["temporal_step_bits"].view(torch.float32)
    known = {name: pack["compact"][name] for name in ("sizes", "video_id", "merge_size")}
    runs = {
        "all": lambda: assemble_on_device(batch, pack, None),
        "sequence": lambda: assemble_sequence(*tensors, steps, pack["compact"]["shown"], **known),
    }
    launches = {name: [kernel_launches(run)] for name, run in runs.items()}
    return [
        ("device", "time", "ms", time_ms(runs, rounds=5 if quick else 50)),
        ("device", "launches", "1", launches),
    ]


def to_gpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: to_gpu(item) for name, item in value.items()}
    return value.cuda() if isinstance(value, torch.Tensor) else value
