"""`mmpack demo`: a complete run on this machine, without downloads.

Draws a small data set of bar charts with questions, trains a tokenizer with Qwen2-VL's special tokens on it, and
trains the same tiny Qwen2-VL twice on the same rows in a stock Hugging Face Trainer: on padded batches of 8 with
stock transformers, and on packs with mmpack. Then it compares loss and gradients of a pack with those of its rows
alone.
"""

from __future__ import annotations

import copy
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Trainer,
    TrainingArguments,
    logging,
)

from mmpack.cli.terminal import say
from mmpack.data import images
from mmpack.data.encoder import Encoder
from mmpack.data.progress import Progress, progress
from mmpack.hf.collator import PackCollator
from mmpack.hf.model_patch import patch_model
from mmpack.packing.assemble import assemble
from mmpack.packing.dataset import PackedDataset
from mmpack.packing.plan import padded_utilization
from mmpack.types import IGNORE, EncodedSample

NUM_ROWS = 240
CAPACITY = 2048
PADDED_BATCH = 8
MAX_PIXELS = 28 * 28 * 256

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# Qwen2-VL's chat format, without videos and image numbers.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINGS = ["apples", "books", "chairs", "drums", "eggs", "flags", "glasses", "hats", "inks", "jars"]
COLORS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377"]


def run_demo(folder: str | None = None) -> dict[str, float]:
    """Run the demo, print and return its figures; `folder` keeps the data set, tokenizer and config."""
    logging.set_verbosity_error()
    torch.set_num_threads(
        1
    )  # a tiny model's threads wait for each other, on a busy machine above all
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(folder or scratch)
        write_data(root, NUM_ROWS)
        encoder = Encoder.from_folder(root / "tokenizer")
        dataset = PackedDataset.from_files(root / "train.json", encoder, CAPACITY)
        config = Qwen2VLConfig.from_pretrained(root / "config.json")
        samples = dataset.samples
        lengths = np.array([sample.num_tokens for sample in samples])
        say(
            f"{len(samples)} rows with {sum(len(s.grid_thw) for s in samples)} charts, "
            f"{lengths.sum():,} tokens, from {lengths.min()} to {lengths.max()} a row"
        )
        say(
            f"padded batches of {PADDED_BATCH}: {-(-len(samples) // PADDED_BATCH)} steps, "
            f"{padded_utilization(lengths, PADDED_BATCH):.0%} of the computed tokens are data"
        )
        say(
            f"packs of {CAPACITY:,}: {len(dataset)} steps, "
            f"{dataset.plan.utilization:.0%} of each pack is data"
        )

        say("\ntraining one epoch of each in a Hugging Face Trainer, in CPU seconds of one core:")
        padded = _train("padded", tiny_model(config), samples, pad_samples, PADDED_BATCH, scratch)
        model = patch_model(tiny_model(config))
        packed = _train("packed", model, dataset, PackCollator(), 1, scratch)
        for name, seconds in {"padded": padded, "packed": packed}.items():
            say(f"  {name}  {lengths.sum() / seconds:8,.0f} useful tokens/s  {seconds:5.1f} s")
        say(f"  packed is {padded / packed:.1f} x as fast on the same rows")

        loss, gradient, num_rows = _compare(config, dataset)
        say(
            f"\none pack against its {num_rows} rows alone, in stock transformers, float32:\n"
            f"  token-weighted loss   relative difference {loss:.1e}\n"
            f"  gradients             largest relative difference of a parameter {gradient:.1e}"
        )
    total = time.perf_counter() - start
    say(f"\ndone in {total:.0f} s")
    if folder:
        print(  # not wrapped: commands are copied
            f"\nleft in {folder}; now try\n"
            f"  mmpack pack {folder}/train.json --tokenizer {folder}/tokenizer "
            f"--capacity {CAPACITY} --out {folder}/packed\n"
            f"  mmpack inspect {folder}/packed\n"
            f"  mmpack train --data {folder}/packed --config {folder}/config.json --steps 20 "
            f"--output_dir {folder}/run"
        )
    return {
        "rows": len(samples),
        "packs": len(dataset),
        "utilization": round(dataset.plan.utilization, 6),
        "padded_utilization": round(padded_utilization(lengths, PADDED_BATCH), 6),
        "padded_seconds": round(padded, 3),
        "packed_seconds": round(packed, 3),
        "loss_difference": float(loss),
        "gradient_difference": gradient,
        "seconds": round(total, 3),
    }


def write_data(root: Path, num_rows: int) -> None:
    """Charts, ShareGPT rows, tokenizer, image processor and model config, all seeded."""
    rng = random.Random(0)
    (root / "charts").mkdir(parents=True, exist_ok=True)
    rows = [_row(rng, root, number) for number in range(num_rows)]
    (root / "train.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    tokenizer = _tokenizer([turn["value"] for row in rows for turn in row["conversations"]])
    tokenizer.save_pretrained(root / "tokenizer")
    size = {"shortest_edge": 56 * 56, "longest_edge": MAX_PIXELS}
    Qwen2VLImageProcessorPil(size=size).save_pretrained(root / "tokenizer")
    _config(tokenizer).to_json_file(root / "config.json")


def _row(rng: random.Random, root: Path, number: int) -> dict[str, Any]:
    """A row with up to six charts and one to three questions: like real data, many short rows and a few long
    ones."""
    paths, charts = [], []
    for chart in range(rng.choice([0, 0, 1, 1, 1, 1, 1, 2, 2, 6])):
        values = {thing: rng.randint(1, 60) for thing in rng.sample(THINGS, rng.randint(3, 6))}
        paths.append(f"charts/{number:03d}_{chart}.png")
        charts.append(values)
        _draw(
            values, rng.choice([(140, 112), (140, 112), (224, 168), (448, 280)]), root / paths[-1]
        )
    markers = "".join(f"Chart {n + 1}: <image>\n" for n in range(len(charts)))
    turns = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        if charts:
            values = rng.choice(charts)
            question, answer = _about_chart(rng, values, charts.index(values) + 1)
        else:
            first, second = rng.randint(1, 99), rng.randint(1, 99)
            question, answer = (
                f"What is {first} + {second}?",
                f"{first} + {second} = {first + second}.",
            )
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = markers + turns[0]["value"]
    return {"conversations": turns, "images": paths}


def _about_chart(rng: random.Random, values: dict[str, int], number: int) -> tuple[str, str]:
    thing = rng.choice(list(values))
    kind = rng.random()
    if kind < 0.5:
        return (
            f"How many {thing} are in chart {number}?",
            f"Chart {number} shows {values[thing]} {thing}.",
        )
    if kind < 0.8:
        most = max(values, key=values.__getitem__)
        return f"What is there most of in chart {number}?", f"{most}, with {values[most]}."
    lines = [
        f"{name}: {value}, {'more' if value > 30 else 'less'} than thirty"
        for name, value in values.items()
    ]
    told = f"Chart {number} has {len(values)} bars.\n" + "\n".join(lines)
    return f"Describe chart {number}.", told + f"\nAll together that makes {sum(values.values())}."


def _draw(values: dict[str, int], size: tuple[int, int], path: Path) -> None:
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    width, height = size
    step = width / len(values)
    for n, (name, value) in enumerate(values.items()):
        left, top = n * step + 0.15 * step, (height - 14) * (1 - value / 66)
        draw.rectangle([left, top, left + 0.7 * step, height - 14], fill=COLORS[n % len(COLORS)])
        draw.text((left, top - 11), str(value), fill="black")
        draw.text((left, height - 12), name[:4], fill="black")
    picture.save(path)


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        [*texts, "system\nuser\nassistant\nYou are a helpful assistant."], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in {
            "image_token_id": "image_pad",
            "video_token_id": "video_pad",
            "vision_start_token_id": "vision_start",
            "vision_end_token_id": "vision_end",
        }.items()
    }
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": 128,
            "num_heads": 4,
            "mlp_ratio": 2,
        },
        tie_word_embeddings=True,
        architectures=["Qwen2VLForConditionalGeneration"],
        **ids,
    )


def tiny_model(config: Qwen2VLConfig) -> Qwen2VLForConditionalGeneration:
    """The demo's model with seeded random weights."""
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(copy.deepcopy(config))


def pad_samples(samples: Sequence[EncodedSample]) -> dict[str, torch.Tensor]:
    """A batch without packing: samples padded to the longest."""
    packs = [assemble([sample], share_images=False) for sample in samples]
    width = max(len(pack.input_ids) for pack in packs)
    batch = {
        "input_ids": torch.zeros(len(packs), width, dtype=torch.long),
        "labels": torch.full((len(packs), width), IGNORE),
        "attention_mask": torch.zeros(len(packs), width, dtype=torch.long),
        "mm_token_type_ids": torch.zeros(len(packs), width, dtype=torch.long),
    }
    for row, pack in enumerate(packs):
        length = len(pack.input_ids)
        batch["input_ids"][row, :length] = torch.from_numpy(pack.input_ids)
        batch["labels"][row, :length] = torch.from_numpy(pack.labels)
        batch["attention_mask"][row, :length] = 1
        batch["mm_token_type_ids"][row, :length] = torch.from_numpy(pack.feature_index >= 0).long()
    pixels = np.concatenate([pack.pixels for pack in packs])
    if len(pixels):
        batch["pixel_values"] = torch.from_numpy(images.normalize_patches(pixels, packs[0].vision))
        batch["image_grid_thw"] = torch.from_numpy(
            np.concatenate([pack.grid_thw for pack in packs])
        )
    return batch


def _train(name: str, model: Any, data: Any, collator: Any, batch_size: int, scratch: str) -> float:
    """CPU seconds of one epoch, including loading and decoding, excluding other programs on the machine."""
    args = TrainingArguments(
        output_dir=scratch,
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    steps = -(-len(data) // batch_size)
    with progress(name, steps, "steps") as bar:
        trainer = _BarTrainer(model=model, args=args, train_dataset=data, data_collator=collator)
        trainer.bar = bar
        start = time.process_time()
        trainer.train()
        return time.process_time() - start


class _BarTrainer(Trainer):
    """Prints no log, but moves a bar."""

    bar: Progress

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self.bar.update()


def _compare(config: Qwen2VLConfig, dataset: PackedDataset) -> tuple[float, float, int]:
    """Relative difference of the loss and of the worst parameter's gradient, and the number of rows in the
    pack."""
    samples = [dataset.samples[n] for n in dataset.plan.samples_of(0)]
    batch = PackCollator()([dataset[0]])
    num_items = batch["shift_labels"].numel()
    packed, alone = patch_model(tiny_model(config)), tiny_model(config)
    packed_loss = packed(**batch, num_items_in_batch=num_items).loss
    packed_loss.backward()
    alone_loss = 0.0
    for sample in samples:
        loss = alone(**pad_samples([sample]), num_items_in_batch=num_items).loss
        loss.backward()
        alone_loss += loss.item()
    differences = []
    for ours, theirs in zip(packed.parameters(), alone.parameters()):
        if theirs.grad is not None and theirs.grad.abs().max() > 0:
            differences.append((ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max())
    return abs(packed_loss.item() - alone_loss) / alone_loss, float(max(differences)), len(samples)
