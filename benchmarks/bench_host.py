"""What does a batch cost on the host, including image decoding: full packs compared with padded batches of eight?

All use the same rows, from a few packs of real rows if they are beside the checkout, else of the demo's. Peers:
transformers' processor with padding; LLaMA-Factory's collator, on rows tokenized by its preprocessing; VeOmni's
transform and collator, which pack, with our packs. Ours with float and with byte pixels. The ceiling is Pillow's
decoding and resizing of the same images, the minimum for anything that resizes with Pillow.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench_pixels import decode_and_resize
from benchmarks.harness import CEILING, SHARED, compare, measure
from benchmarks.peer_collators import (
    llamafactory_collator,
    processor_of,
    transformers_collator,
    veomni_collator,
)
from mmpack import Encoder, PackedDataset
from mmpack.data import images
from mmpack.hf import PackCollator, patch_model

CAPACITY, MAX_PIXELS = 8192, 28 * 28 * 1280
# Their dependencies conflict with ours, so they are put on the path without them.
FACTORY = pytest.mark.peer("--no-deps llamafactory", "llamafactory")
VEOMNI = pytest.mark.peer("--no-deps veomni", "veomni")
PEERS = [
    "transformers",
    pytest.param("LLaMA-Factory", marks=FACTORY),
    pytest.param("VeOmni", marks=VEOMNI),
]


def rows_and_encoder():
    """(samples, encoder, description of the rows)"""
    from mmpack.cli.demo import NUM_ROWS, write_data

    if SHARED.is_dir():
        rows, tokenizer = SHARED / "realset" / "realset_sft.json", SHARED / "tokenizer" / "qwen2_vl"
        which = "real rows"
    else:
        folder = Path(tempfile.mkdtemp())
        write_data(folder, NUM_ROWS)
        rows, tokenizer, which = folder / "train.json", folder / "tokenizer", "demo rows"
    encoder = Encoder.from_folder(tokenizer, max_pixels=MAX_PIXELS)
    return list(encoder.read(rows)), encoder, which


@pytest.mark.cpu
@pytest.mark.parametrize("peer", PEERS)
def test_collate(peer, benchmark, recorder, quick):
    samples, encoder, which = rows_and_encoder()
    samples = samples[: 200 if quick else None]
    encoded = list(encoder.encode(samples))
    dataset = PackedDataset.from_samples(encoded, CAPACITY)
    full = np.flatnonzero(
        dataset.plan.pack_tokens > CAPACITY / 2
    )  # the last one may be nearly empty
    packs = full[: 1 if quick else 6].tolist()
    numbers = [n for pack in packs for n in dataset.plan.samples_of(pack).tolist()]
    batches = [numbers[i : i + 8] for i in range(0, len(numbers), 8)]
    tokens = sum(encoded[n].num_tokens for n in numbers)
    pictures = [in_memory(image) for n in numbers for image in encoded[n].media]

    processor, model = processor_of(encoder.tokenizer, encoder.vision), tiny_model()
    if peer == "transformers":
        collate, rows = transformers_collator(processor), samples
    elif peer == "LLaMA-Factory":
        collate, rows = llamafactory_collator(processor, model), encoded
    else:
        collate, rows = veomni_collator(processor, model), samples
        batches = [dataset.plan.samples_of(pack).tolist() for pack in packs]
    floats, in_bytes = PackCollator(), PackCollator(model=patch_model(model), pixels="uint8")

    def packed(collate):
        return [collate([dataset[pack]]) for pack in packs]

    candidates = {
        peer: lambda: [collate([rows[n] for n in batch]) for batch in batches],
        "mmpack": partial(packed, floats),
        "mmpack uint8": partial(packed, in_bytes),
        CEILING: lambda: [decode_and_resize(picture, encoder.vision) for picture in pictures],
    }
    config = f"{which}: {len(numbers)} rows, {len(pictures)} images, {tokens} tokens"
    equal = share_of_equal_images(candidates[peer](), pictures, encoder.vision)
    recorder.add(
        "host", peer, "collate", metric="images with our pixels", unit="", values=[equal],
        x=("packs", len(packs)), config=config,
    )  # fmt: skip
    medians = measure(
        recorder, "host", "collate", candidates, x=("packs", len(packs)), config=config,
        rounds=1 if quick else 5, warmup=1, on_host=True,
    )  # fmt: skip
    compare(benchmark, medians, "mmpack", case=config)
    benchmark.pedantic(candidates["mmpack"], rounds=1)


def share_of_equal_images(batches, pictures, vision):
    """The share of images whose `pixel_values` in a peer's batches equal ours to the bit."""
    made = [np.asarray(batch["pixel_values"]) for batch in batches if "pixel_values" in batch]
    theirs = np.concatenate(made)
    equal = begin = 0
    for picture in pictures:
        grid = vision.image_grid(*images.probe(picture))
        patches = images.load_patches(picture, grid, vision)
        ours = images.normalize_patches(patches, vision)
        equal += np.array_equal(theirs[begin : begin + len(ours)], ours)
        begin += len(ours)
    assert begin == len(theirs)
    return equal / len(pictures)


def in_memory(image):
    """The image with its file's bytes in memory."""
    return image if image.data is not None else replace(image, data=Path(image.path).read_bytes())


def tiny_model():
    """A model for the collators: ours needs a patched model, LLaMA-Factory's and VeOmni's use its positions; none
    runs it."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 151_936}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
