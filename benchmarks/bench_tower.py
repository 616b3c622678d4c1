"""What does a vision tower gain from indices made on the host: Qwen2.5-VL's windows, Qwen3-VL's positions?

Forward and backward of the tower on the same float pixels. The peer is transformers' forward, which makes its
indices on the device, permutes, and loops over images. Both use the library's attention, so most of the time is
products that both compute. There is no ceiling.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from benchmarks.harness import compare, device, measure
from mmpack import VisionSpec, assemble
from mmpack.hf import patch_model
from mmpack.hf.forward_kwargs import batch_of
from mmpack.hf.model_parts import tower_of
from mmpack.hf.tower import run_tower
from mmpack.types import EncodedSample

ON_GPU = torch.cuda.is_available()
SPEC = VisionSpec(min_pixels=1, max_pixels=1)
GRIDS = {  # images of a pack: many small ones, few large ones
    "small": [(1, 16, 16)] * (64 if ON_GPU else 4),
    "large": [(1, 62, 82)] * 6 if ON_GPU else [(1, 24, 32)],
}
# On a GPU: the published width, and a quarter of the depth.
WIDTH, DEPTH, HEADS, OUT = (1280, 8, 16, 2048) if ON_GPU else (64, 4, 4, 64)
TOWERS = {
    "qwen2_5_vl": {"fullatt_block_indexes": list(range(DEPTH // 4 - 1, DEPTH, DEPTH // 4))[-4:]},
    "qwen3_vl": {"num_position_embeddings": 2304, "deepstack_visual_indexes": [0]},
}


def model_of(family: str) -> torch.nn.Module:
    """A config with a real tower on a GPU, a narrow one on a CPU, and a tiny text model."""
    text = {
        "vocab_size": 151_680, "hidden_size": OUT, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": OUT // 2,
        "rope_scaling": {"rope_type": "default", "mrope_section": [OUT // 4 - 2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": DEPTH, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_heads": HEADS,
        "out_hidden_size": OUT, "patch_size": 14, **TOWERS[family],
    }  # fmt: skip
    config = CONFIG_MAPPING[family](text_config=text, vision_config=vision)
    torch.manual_seed(0)
    with torch.device(device()):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    return model.to(torch.bfloat16 if ON_GPU else torch.float32)


class Case:
    """A pack of images only, and the tower with and without the patch."""

    def __init__(self, family: str, grids: list[tuple[int, int, int]]) -> None:
        self.family, self.grid_thw = family, torch.tensor(grids)
        ids = np.full(len(grids), SPEC.image_token_id, dtype=np.int32)
        sample = EncodedSample(ids, ids, np.array(grids, dtype=np.int32), (), SPEC)
        self.pack = assemble([sample], pixels=False)
        self.P = len(self.pack.vision_position_ids)

    def steps(self) -> dict:
        """The forward and backward of each candidate."""
        stock = model_of(self.family)
        model = patch_model(copy.deepcopy(stock))
        values = torch.randn(self.P, 2 * SPEC.patch_values).to(device(), stock.dtype)
        batch = batch_of(self.pack, {"pixel_values": values}, tower_of(model.model))
        pack = {
            name: x.to(device()) if isinstance(x, torch.Tensor) else x
            for name, x in batch["mmpack"].items()
        }
        pack["impl"] = "auto"
        grid_thw = self.grid_thw.to(device())

        def transformers():
            out = stock.model.visual(values, grid_thw=grid_thw)
            levels = [out.pooler_output, *getattr(out, "deepstack_features", [])]
            sum(level.square().mean() for level in levels).backward()

        def mmpack():
            levels = run_tower(model.model, values, grid_thw, pack)
            sum(level.square().mean() for level in levels).backward()

        return {"transformers": transformers, "mmpack": mmpack}


@pytest.mark.cpu
@pytest.mark.gpu
@pytest.mark.parametrize("images", GRIDS)
@pytest.mark.parametrize("family", TOWERS)
def test_tower(family, images, benchmark, recorder, quick):
    if quick and images == "large":
        pytest.skip("not among the quick cases")
    case = Case(family, GRIDS[images])
    candidates = case.steps()
    config = f"{family} {images} P={case.P} width={WIDTH} depth={DEPTH}"
    medians = measure(
        recorder, "tower", "step", candidates, x=("P", case.P), config=config,
        rounds=3 if quick else 10, warmup=1,
    )  # fmt: skip
    compare(benchmark, medians, "mmpack", case=config)
    benchmark.pedantic(candidates["mmpack"], rounds=3, warmup_rounds=1)
