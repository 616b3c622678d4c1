"""How many useful tokens per second does a whole training step process: forward, backward, optimizer?

The same rows in the same model. Peers: padded batches of eight, padded and grouped by length, transformers' own
packing (four rows of positions, sdpa with a mask). Ours: the same packs through a patched model, with library ops
and with our kernels. Useful tokens are the rows' tokens, without padding. The ceiling is a step whose FLOPs
(`mmpack.packing.cost`) all run at the rate of a large product. On a GPU the model is Qwen2-VL-2B with random
weights in bf16, elsewhere a tiny model in float32.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from benchmarks.harness import CEILING, device, host_syncs, kernel_launches, peak_mib, timer
from benchmarks.model_configs import QWEN2_VL_2B
from mmpack import VisionSpec, plan_packs
from mmpack.hf import PackCollator, patch_model, unpatch_model
from mmpack.ops.varlen_attention import AUTO, why_not
from mmpack.packing.assemble import assemble
from mmpack.packing.cost import sample_flops
from mmpack.types import EncodedSample, ImageRef

ON_GPU = torch.cuda.is_available()
# 96 rows drawn from 155,556 real ones: text tokens / answer tokens, then the images' grids.
ROWS = """
    59/33; 89/55; 45/16; 54/2; 52/20; 120/93; 76/46; 48/8; 133/99; 94/68; 66/34;
    153/105 124x40; 79/49; 57/11; 212/170; 248/218 46x22; 58/13; 50/18; 90/59; 199/148 36x36;
    102/70; 120/87; 54/27; 95/63; 35/3; 155/124; 70/31; 184/97; 162/91; 50/15; 45/4 40x58;
    42/10; 59/26; 41/7; 93/41; 36/3 42x60; 73/41; 88/59; 110/79; 83/50; 75/47; 92/55;
    34/6 38x58; 210/159 36x36; 43/7 40x58; 103/71; 72/23; 259/172; 44/2; 124/85; 252/85 30x22;
    109/62; 447/90 54x74; 935/121 54x74; 141/104; 54/9; 40/7; 70/40 14x20; 88/55; 71/11; 90/57;
    125/57; 47/7; 147/116; 83/24; 85/38; 79/18; 80/38; 86/52; 510/476 34x46; 139/110;
    408/61 54x74; 44/3; 86/55; 97/68; 126/48; 39/6; 70/42; 31/2 38x28; 128/47; 90/61; 131/101;
    672/63 54x74; 148/120; 118/83; 569/63; 136/59; 37/5; 40/12; 89/57; 72/39; 156/59; 135/71;
    61/36; 297/83 36x32; 87/56
"""
VOCAB = 151_936 if ON_GPU else 2_048  # the last ids are special
SPEC = VisionSpec(
    min_pixels=3136,
    max_pixels=1_003_520,
    image_token_id=VOCAB - 1,
    video_token_id=VOCAB - 2,
    vision_start_token_id=VOCAB - 3,
    vision_end_token_id=VOCAB - 4,
)
TEXT, VISION = QWEN2_VL_2B["text_config"], QWEN2_VL_2B["vision_config"]
TINY_VISION = {**VISION, "depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
TINY_TEXT = {
    **TEXT,
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
}


def samples_of(num_rows: int) -> list[EncodedSample]:
    """Rows of these lengths: images of noise first, then random text, an answer last."""
    rng, noise = (np.random.default_rng(seed) for seed in (0, 1))
    samples = []
    for row in ROWS.replace("\n", " ").split(";")[:num_rows]:
        text, answer, *sides = map(int, re.findall(r"\d+", row))
        grids = np.array(sides, dtype=np.int32).reshape(-1, 2)
        image = [SPEC.vision_start_token_id, SPEC.image_token_id, SPEC.vision_end_token_id]
        num_text = max(text - 2 * len(grids), answer + 1)
        words = rng.integers(0, VOCAB - 100, num_text)
        ids = np.concatenate([image * len(grids), words]).astype(np.int32)
        labels = np.where(np.arange(len(ids)) >= len(ids) - answer, ids, -100).astype(np.int32)
        grid_thw = np.insert(grids, 0, 1, axis=1).astype(np.int32)
        shapes = [(height, width, 3) for height, width in (grids * SPEC.patch_size).tolist()]
        pictures = [noise.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
        media = tuple(ImageRef("noise", Image.fromarray(picture)) for picture in pictures)
        samples.append(EncodedSample(ids, labels, grid_thw, media, SPEC))
    return samples


def pixel_values(num_patches: int) -> torch.Tensor | None:
    if not num_patches:
        return None
    return torch.randn(num_patches, SPEC.patch_values * SPEC.temporal_patch_size)


def padded_batches(samples: list[EncodedSample], order: np.ndarray) -> list[dict]:
    """Batches of eight rows, as made by a processor with `padding=True`."""
    batches = []
    for numbers in np.split(order, range(8, len(order), 8)):
        packs = [assemble([samples[n]], pixels=False) for n in numbers]
        length = max(len(pack.input_ids) for pack in packs)
        batch = {
            name: torch.full((len(packs), length), value, dtype=torch.long)
            for name, value in (("input_ids", 0), ("labels", -100), ("attention_mask", 0))
        }
        for row, pack in enumerate(packs):
            batch["input_ids"][row, : len(pack.input_ids)] = torch.from_numpy(pack.input_ids)
            batch["labels"][row, : len(pack.labels)] = torch.from_numpy(pack.labels)
            batch["attention_mask"][row, : len(pack.input_ids)] = 1
        batch["mm_token_type_ids"] = (batch["input_ids"] == SPEC.image_token_id).int()
        grids = np.concatenate([pack.grid_thw for pack in packs])
        if len(grids):
            batch["image_grid_thw"] = torch.from_numpy(grids)
            batch["pixel_values"] = pixel_values(int(grids.prod(axis=1).sum()))
        batch["use_cache"] = False
        batches.append(batch)
    return batches


def packed_batches(
    samples: list[EncodedSample], capacity: int, collator: PackCollator
) -> list[dict]:
    """A collator's batches for a plan."""
    plan = plan_packs([sample.num_tokens for sample in samples], capacity)
    packs = (plan.samples_of(pack) for pack in range(plan.num_packs))
    return [collator([samples[n] for n in numbers]) for numbers in packs]


def stock(batch: dict) -> dict:
    """The inputs of an unpatched model for a packed batch: transformers' own packing."""
    hidden = ("mmpack", "logits_to_keep", "shift_labels")
    return {name: value for name, value in batch.items() if name not in hidden}


def to_device(value):
    if isinstance(value, dict):
        return {name: to_device(item) for name, item in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    moved = value.to(device())
    return moved.bfloat16() if ON_GPU and moved.is_floating_point() else moved


class Run:
    """One model and optimizer for all candidates; a candidate is a way to patch and a list of batches."""

    def __init__(self, num_rows: int, capacity: int) -> None:
        self.samples = samples_of(num_rows)
        self.num_tokens = sum(sample.num_tokens for sample in self.samples)
        text, vision = (TEXT, VISION) if ON_GPU else (TINY_TEXT, TINY_VISION)
        config = Qwen2VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=True,
            image_token_id=SPEC.image_token_id, video_token_id=SPEC.video_token_id,
            vision_start_token_id=SPEC.vision_start_token_id,
            vision_end_token_id=SPEC.vision_end_token_id,
        )  # fmt: skip
        dtype = torch.bfloat16 if ON_GPU else torch.float32
        with torch.device(device()):
            self.model = Qwen2VLForConditionalGeneration._from_config(
                config, attn_implementation="sdpa", dtype=dtype
            ).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        shuffled = np.random.default_rng(1).permutation(num_rows)
        by_length = np.argsort([sample.num_tokens for sample in self.samples])
        packs = [to_device(b) for b in packed_batches(self.samples, capacity, PackCollator())]
        as_bytes = PackCollator(model=patch_model(self.model), pixels="uint8")
        packs_of_bytes = [to_device(b) for b in packed_batches(self.samples, capacity, as_bytes)]
        unpatch_model(self.model)
        padded = [to_device(batch) for batch in padded_batches(self.samples, shuffled)]
        grouped = [to_device(batch) for batch in padded_batches(self.samples, by_length)]
        self.candidates = {
            "padded, 8 rows": (None, padded),
            "padded, 8 rows of like length": (None, grouped),
            "transformers packed": (None, [stock(batch) for batch in packs]),
            "mmpack": ("libraries", packs_of_bytes),
        }
        if ON_GPU:
            self.candidates["torch varlen"] = ("torch_varlen", packs)
            self.candidates["mmpack, triton"] = ("triton", packs_of_bytes)
            self.candidates["mmpack, tuned"] = (
                "auto",
                packs_of_bytes,
            )  # by an earlier `mmpack tune`
        self.batches = {name: len(batches) for name, (_, batches) in self.candidates.items()}

    def flops(self) -> int:
        """FLOPs of an epoch's steps."""
        grids = [sample.grid_thw for sample in self.samples]
        return sample_flops(
            self.model.config,
            np.array([sample.num_tokens for sample in self.samples]),
            np.array([int((sample.labels != -100).sum()) for sample in self.samples]),
            np.concatenate(grids),
            np.cumsum([0, *map(len, grids)]),
        ).sum()

    def prepare(self, name: str) -> None:
        unpatch_model(self.model)
        impl = self.candidates[name][0]
        if impl is not None:
            patch_model(self.model, impl=impl)
        self.model.train()

    def epoch(self, name: str, limit: int | None = None) -> None:
        for batch in self.candidates[name][1][:limit]:
            self.model(**batch).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.mark.cpu
@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [8192] if ON_GPU else [2048])
def test_step(capacity, benchmark, recorder, gemm_ceiling, quick):
    run = Run(num_rows=12 if quick and not ON_GPU else 96, capacity=capacity)
    names = list(run.candidates)
    for name in names:  # warm up
        run.prepare(name)
        run.epoch(name, limit=2)
    times: dict[str, list[float]] = {name: [] for name in names}
    clock = timer()
    for _ in range(1 if quick else 2 if ON_GPU else 3):
        for name in names:
            run.prepare(name)
            times[name].append(clock(lambda name=name: run.epoch(name)))
    config = f"{len(run.samples)} rows, capacity={capacity}"
    common = {"x": ("capacity", capacity), "config": config}
    at_most = [run.num_tokens * gemm_ceiling * 1e12 / run.flops()]
    recorder.add(
        "train", CEILING, "step", metric="useful tokens", unit="1/s", values=at_most, **common
    )  # fmt: skip
    medians = {}
    for name, values in times.items():
        rates = [1e3 * run.num_tokens / ms for ms in values]
        medians[name] = sorted(rates)[len(rates) // 2]
        recorder.add(
            "train", name, "step", metric="useful tokens", unit="1/s", values=rates, **common
        )
        run.prepare(name)
        for metric, unit, probe in (
            ("peak memory", "MiB", peak_mib),
            ("syncs per step", "1", host_syncs),
            ("launches per step", "1", kernel_launches),
        ):
            value = probe(lambda name=name: run.epoch(name, limit=1))
            if value is not None:
                recorder.add(
                    "train", name, "step", metric=metric, unit=unit, values=[value], **common
                )
    benchmark.extra_info.update(
        {name: round(rate) for name, rate in medians.items()},
        attention=next(
            (n for n in AUTO if not why_not(n, run.model.lm_head.weight[:1, None])), "sdpa"
        ),
    )
    run.prepare("mmpack")
    benchmark.pedantic(lambda: run.epoch("mmpack", limit=1), rounds=2)
    print(
        f"\n{len(run.samples)} rows, {run.num_tokens} tokens, capacity {capacity}: "
        + ", ".join(
            f"{name} {rate:,.0f} useful tokens/s in {run.batches[name]} steps"
            for name, rate in medians.items()
        )
    )
