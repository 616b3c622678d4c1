"""How does a pack's memory fall when ranks share it, and what do they exchange for that?

Forward and backward of one rank of a context group, on packs of rows with an image. The peer is the same pack on
one rank; the memory's ceiling is that divided by the ranks. A backend that sends nothing stands for the other
ranks: it allocates what they would send, so that one process shows a rank's memory, counted from torch's
allocations without the parameters' gradients. Rows that leave the rank are counted where all exchanges pass, and
must equal the formula. Times are those of a real network only, and not measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForImageTextToText, Qwen2VLConfig

from benchmarks.harness import CEILING, peak_tensor_mib
from mmpack import ContextGroup, EncodedSample, VisionSpec
from mmpack.hf import PackCollator, context_parallel, patch_model

SIZES, TOKENS = (1, 2, 4, 8), (4096, 8192, 16_384, 32_768)
SPEC = VisionSpec(
    min_pixels=1, max_pixels=1, image_token_id=990, video_token_id=991, vision_start_token_id=992,
    vision_end_token_id=993,
)  # fmt: skip
CONFIG = {
    "text_config": {
        "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 32_768,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]}, "pad_token_id": 0,
        "bos_token_id": 0, "eos_token_id": 0,
    },
    "vision_config": {"depth": 4, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2, "hidden_size": 256},
    "image_token_id": 990, "video_token_id": 991, "vision_start_token_id": 992,
    "vision_end_token_id": 993,
}  # fmt: skip


def exchanged_bytes(text: Any, tokens: Sequence[int], rank: int, width: int) -> int:
    """Bytes that leave a rank in one forward of the text model's layers, which is also what leaves it in the
    backward and, with gradient checkpointing, in the second forward.

    Per layer with attention, of the rank's n tokens to heads and of all others' tokens back, for H heads of K on S
    ranks: width * K * ((S - 1) / S * n * (H + 2 max(Hk, S)) + (T - n) * H / S); the same for Gated DeltaNets, of
    which v heads also have two gates.

    Args:
        text: the text model's config.
        tokens: of each rank.
        width: bytes of a number.
    """
    size, n = len(tokens), tokens[rank]
    others = sum(tokens) - n
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    to_heads = (heads + 2 * max(text.num_key_value_heads, size)) * head_dim // size
    attention = n * (size - 1) * to_heads + others * heads // size * head_dim
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    num_linear = kinds.count("linear_attention")
    total = (len(kinds) - num_linear) * attention
    if num_linear:
        values = text.linear_num_value_heads
        keys = max(text.linear_num_key_heads, size) * text.linear_key_head_dim
        to_heads = (2 * keys + values * (text.linear_value_head_dim + 2)) // size
        back = others * values // size * text.linear_value_head_dim
        total += num_linear * (n * (size - 1) * to_heads + back)
    return width * total


def features_bytes(sent: Sequence[int], rank: int, width: int, hidden: int, levels: int = 1) -> int:
    """Bytes of features that leave a rank in a forward: a feature of the tower, once to each other rank that shows
    it, per level (deepstack has several)."""
    return (sum(sent) - sent[rank]) * hidden * levels * width


def counted(exchange: Callable[..., torch.Tensor], found: dict[str, int]) -> Callable[..., Any]:
    """`context_parallel.exchange` that adds up the bytes that leave the rank in a forward."""

    def count(rows: Any, received: Any, sent: Any, over: Any) -> torch.Tensor:
        what = "features" if tuple(sent) == over.get("sent_sizes") else "layers"
        leaving = sum(sent) - sent[over["rank"]]
        found[what] = found.get(what, 0) + leaving * rows[0:1].numel() * rows.element_size()
        return exchange(rows, received, sent, over)

    return count


def rows_of(num_tokens: int) -> list[EncodedSample]:
    """Rows of 1,024 tokens, 64 of them an image's."""
    ids = np.r_[SPEC.vision_start_token_id, SPEC.image_token_id, SPEC.vision_end_token_id]
    rows = []
    for n in range(num_tokens // 1024):
        text = np.random.default_rng(n).integers(0, 900, 1024 - 64 - 2)
        row = np.concatenate([ids, text]).astype(np.int32)
        labels = np.where(row < 900, row, -100).astype(np.int32)
        grid = np.array([[1, 16, 16]], dtype=np.int32)
        rows.append(EncodedSample(row, labels, grid, (), SPEC))
    return rows


def batch_of(model: torch.nn.Module, num_tokens: int) -> dict[str, Any]:
    """A rank's batch, with random pixels."""
    from mmpack import assemble
    from mmpack.hf.forward_kwargs import batch_of
    from mmpack.hf.model_parts import tower_of
    from mmpack.hf.weight_count import weight_entries
    from mmpack.packing.context_part import part_of

    rows = rows_of(num_tokens)
    pack = assemble(rows, pixels=False)
    group = PackCollator(model=model).context
    part = None if group is None else part_of(pack, group)
    num_patches = len((part.pack if part else pack).vision_position_ids)
    values = {"pixel_values": torch.randn(num_patches, 2 * SPEC.patch_values)}
    batch = batch_of(pack, values, tower_of(model.model), part)
    entries = batch["mmpack"]
    entries |= weight_entries(rows, "token", entries["supervised_offsets"], entries.get("context"))
    return batch


@pytest.mark.cpu
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_context(num_tokens, benchmark, recorder, quick):
    if quick and num_tokens > TOKENS[0]:
        pytest.skip("not among the quick cases")
    config = f"Qwen2-VL, 4 layers of 256, tower 4 of 64, T={num_tokens} float32"
    whole = 0.0
    sizes = SIZES[:2] if quick else SIZES
    for size in sizes:
        found: dict[str, int] = {}
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(Qwen2VLConfig(**CONFIG)).train()
        model = patch_model(model, context=ContextGroup(0, size))
        batch = batch_of(model, num_tokens)
        batch["mmpack"].get("context", {})["is_compared"] = True  # there is nobody to compare with

        def step(model: Any = model, batch: Any = batch) -> None:
            model.zero_grad()
            model(**batch, num_items_in_batch=torch.tensor(num_tokens)).loss.backward()

        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
        try:
            with mock.patch.object(
                context_parallel, "exchange", counted(context_parallel.exchange, found)
            ):
                step()
            gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            activations = peak_tensor_mib(step) - gradients / 2**20
            if size == sizes[-1]:
                benchmark.pedantic(step, rounds=1)
        finally:
            dist.destroy_process_group()
        x = ("ranks", size)
        whole = whole or activations
        name = "mmpack" if size > 1 else "one rank"
        peaks = {name: activations, CEILING: whole / size}
        for impl, peak in peaks.items():
            recorder.add(
                "context", impl, "forward and backward", metric="peak", unit="MiB", values=[peak],
                x=x, config=config,
            )  # fmt: skip
        line = f"T={num_tokens} ranks={size}: peak {activations:.1f} MiB, {whole / activations:.2f} x less"
        if size > 1:
            over = batch["mmpack"]["context"]
            text = model.config.text_config
            assert found["layers"] == exchanged_bytes(text, over["tokens"], 0, 4)
            assert found["features"] == features_bytes(over["sent_sizes"], 0, 4, text.hidden_size)
            for what, sent in found.items():
                recorder.add(
                    "context", "mmpack", "forward", metric=f"{what} sent", unit="MiB",
                    values=[sent / 2**20], x=x, config=config,
                )  # fmt: skip
            layers, features = found["layers"] / 2**20, found["features"] / 2**20
            line += f", sent in a forward: layers {layers:.2f}, features {features:.2f} MiB"
        print(line)
