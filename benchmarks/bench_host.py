"""What does a batch cost on the host, images decoded: whole packs against padded batches of eight?

The same rows: those of some packs of real rows where they lie beside the checkout, of the demo's else.
transformers' processor with padding, LLaMA-Factory's collator (where it is installed; its rows come
tokenised, as its preprocessing leaves them), ours with float and with byte pixels. CPU only.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from benchmarks.harness import compare, time_ms
from benchmarks.peer_collators import llamafactory_collator, processor_of, transformers_collator
from mmpack import PackedDataset, VisionSpec, read_samples
from mmpack.encode import encode_samples
from mmpack.hf import PackCollator, patch_model

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CAPACITY = 8192


def rows_and_tokenizer():
    """(samples, tokenizer, which)"""
    from transformers import AutoTokenizer

    from mmpack.demo import NUM_ROWS, write_data

    if DATA.is_dir():
        rows, tokenizer = DATA / "realset" / "realset_sft.json", DATA / "tokenizer" / "qwen2_vl"
        which = "real rows"
    else:
        folder = Path(tempfile.mkdtemp())
        write_data(folder, NUM_ROWS)
        rows, tokenizer, which = folder / "train.json", folder / "tokenizer", "demo rows"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    return list(read_samples(rows)), tokenizer, which


@pytest.mark.filterwarnings("ignore:Palette images")
def test_collate(benchmark, recorder, quick):
    samples, tokenizer, which = rows_and_tokenizer()
    spec = VisionSpec(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    encoded = list(encode_samples(samples, tokenizer, spec))
    dataset = PackedDataset.from_samples(encoded, CAPACITY)
    packs = list(range(1 if quick else 6))
    numbers = [n for pack in packs for n in dataset.plan.samples_of(pack).tolist()]
    eights = [numbers[i : i + 8] for i in range(0, len(numbers), 8)]
    tokens = sum(encoded[n].num_tokens for n in numbers)
    images = sum(len(encoded[n].images) for n in numbers)

    processor, model = processor_of(tokenizer, spec), tiny_model()
    stock, factory = transformers_collator(processor), llamafactory_collator(processor, model)
    floats, in_bytes = PackCollator(), PackCollator(model=patch_model(model), pixels="uint8")

    by_torch = PackedDataset([with_torch(sample) for sample in encoded], dataset.plan)

    def packed(collate, packs_of=dataset):
        return [collate([packs_of[pack]]) for pack in packs]

    candidates = {
        "transformers": lambda: [stock([samples[n] for n in eight]) for eight in eights],
        "LLaMA-Factory": lambda: [factory([encoded[n] for n in eight]) for eight in eights],
        "mmpack": partial(packed, floats),
        "mmpack uint8": partial(packed, in_bytes),
        "mmpack uint8 by torch": partial(packed, in_bytes, by_torch),
    }
    if factory is None:
        del candidates["LLaMA-Factory"]
    config = f"{which}: {len(numbers)} rows, {images} images, {tokens} tokens"
    medians = {}
    for name, values in time_ms(candidates, rounds=2 if quick else 5, warmup=1).items():
        medians[name] = sorted(values)[len(values) // 2]
        recorder.add(
            "host", name, "collate", metric="time", unit="ms", values=values,
            x=("packs", len(packs)), config=config,
        )  # fmt: skip
    compare(benchmark, medians, "mmpack", case=config)
    print(f"\n{config}: {medians}")
    benchmark.pedantic(candidates["mmpack"], rounds=1)


def with_torch(sample):
    """The sample, resized by torch."""
    return replace(sample, vision=replace(sample.vision, resizer="torch"))


def tiny_model():
    """A patched collator asks for a model, LLaMA-Factory's for its positions; neither runs it."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 151_936}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
