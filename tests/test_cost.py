"""Costs against `torch.utils.flop_counter` on tiny models of transformers, a row at a time."""

from math import prod

import numpy as np
import pytest
import torch
from builders import small_config
from torch.utils.flop_counter import (
    FlopCounterMode,
    conv_backward_flop,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_vl import Qwen2VLConfig
from transformers.models.qwen3_vl import Qwen3VLConfig
from transformers.models.qwen3_vl_moe import Qwen3VLMoeConfig

from mmpack.packing.cost import sample_flops

TEXT = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]},
}
VISION = {"depth": 3, "num_heads": 2, "patch_size": 14}
IDS = {
    "image_token_id": 990,
    "video_token_id": 991,
    "vision_start_token_id": 992,
    "vision_end_token_id": 993,
}
CONFIGS = {
    "qwen2_vl": Qwen2VLConfig(
        text_config=TEXT,
        vision_config={**VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 3},
        **IDS,
    ),
    "qwen2_5_vl": Qwen2_5_VLConfig(
        text_config=TEXT,
        vision_config={
            **VISION, "hidden_size": 32, "intermediate_size": 80, "out_hidden_size": 64,
            "fullatt_block_indexes": [1], "window_size": 112,
        },
        **IDS,
    ),
    "qwen3_vl": Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 32, "rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4]}},
        vision_config={
            **VISION, "hidden_size": 32, "intermediate_size": 80, "out_hidden_size": 64,
            "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16,
        },
        **IDS,
    ),
    "qwen3_vl_moe": Qwen3VLMoeConfig(
        text_config={
            **TEXT, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 48, "mlp_only_layers": [1],
        },
        vision_config={
            **VISION, "hidden_size": 32, "intermediate_size": 80, "out_hidden_size": 64,
            "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
        },
        **IDS,
    ),
}  # fmt: skip
DELTAS = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"], "head_dim": 32,
    "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25},
    "linear_key_head_dim": 16, "linear_value_head_dim": 24,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 40,
}  # fmt: skip
for name, more in {"qwen3_5": {}, "qwen3_5_moe": EXPERTS}.items():
    vision = CONFIGS["qwen3_vl"].vision_config.to_dict() | {"model_type": f"{name}_vision"}
    CONFIGS[name] = CONFIG_MAPPING[name](
        text_config={**TEXT, **DELTAS, **more}, vision_config=vision, **IDS
    )
ROWS = {  # text tokens, supervised tokens, images
    "text": (70, 30, []),
    "one image": (20, 9, [(1, 10, 14)]),
    "images": (31, 12, [(1, 22, 18), (1, 4, 4), (1, 8, 40)]),
}
FROZEN = [(), ("vision",), ("vision", "merger"), ("merger",), ("language",), ("vision", "language")]


def causal(count):
    """Torch's own formula, over the causal triangle where a call is causal. On a CPU attention is an
    op torch has no formula for, and elsewhere its formula counts the square."""

    def formula(*shapes, out_shape=None, **kwargs):
        tensors = [shape for shape in shapes if isinstance(shape, torch.Size)]
        is_causal = any(value is True for value in shapes) or kwargs.get("is_causal", False)
        query = tensors[1] if count is sdpa_backward_flop_count else tensors[0]
        key = tensors[2] if count is sdpa_backward_flop_count else tensors[1]
        square = count(*tensors[: 4 if count is sdpa_backward_flop_count else 3])
        assert query[2] == key[2]
        return square * (query[2] + 1) // (2 * query[2]) if is_causal else square

    return formula


def depthwise(grad_out, x, w, *options, out_shape=None):
    """Torch's formula of a convolution's backward takes the channels of a depthwise one for one group's: it counts
    204 M for 3 M. The gradients of input and weight cost a forward each."""
    *_, groups, mask = options
    if groups == 1:
        return conv_backward_flop.__wrapped__(grad_out, x, w, *options, out_shape=out_shape)
    return sum(mask[:2]) * 2 * prod(grad_out) * prod(w[1:])


def counted(model, row):
    """Operations of a forward and backward of stock transformers."""
    text, supervised, images = row
    features = [t * h * w // 4 for t, h, w in images]
    ids = [[992] + [990] * count + [993] for count in features]
    ids = torch.tensor([sum(ids, []) + [5] * (text - 2 * len(images))])
    patch = model.config.vision_config
    values = 3 * patch.temporal_patch_size * patch.patch_size**2
    kept = torch.arange(ids.shape[1] - 1 - supervised, ids.shape[1] - 1)
    inputs = {
        "position_ids": torch.arange(ids.shape[1]).expand(3, 1, -1),
        "logits_to_keep": kept,
        "shift_labels": ids[:, kept + 1],
        "labels": ids,
        "use_cache": False,
    }
    if images:
        inputs["pixel_values"] = torch.randn(sum(4 * count for count in features), values)
        inputs["image_grid_thw"] = torch.tensor(images)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping = {flash: causal(sdpa_flop_count), backward: causal(sdpa_backward_flop_count)}
    mapping[torch.ops.aten.convolution_backward] = depthwise
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        loss = model(input_ids=ids, **inputs).loss
        if loss.requires_grad:
            loss.backward()
    assert flash in counter.get_flop_counts()["Global"]
    return counter.get_total_flops(), ids.shape[1]


@pytest.mark.parametrize("frozen", FROZEN, ids=lambda frozen: "+".join(frozen) or "trained")
@pytest.mark.parametrize("family", CONFIGS)
def test_costs_are_what_torch_counts(family, frozen):
    config = CONFIGS[family]
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    if family.endswith("_moe"):
        model.set_experts_implementation("eager")  # torch counts no grouped products
    visual = model.model.visual
    mergers = [visual.merger, *getattr(visual, "deepstack_merger_list", [])]
    model.requires_grad_("language" not in frozen)
    visual.requires_grad_("vision" not in frozen)
    for merger in mergers:
        merger.requires_grad_("merger" not in frozen)
    for name, row in ROWS.items():
        if name == "text" and "language" in frozen:
            continue  # its backward exists for the images it shares a pack with
        expected, num_tokens = counted(model, row)
        ours = sample_flops(config, [num_tokens], [row[1]], row[2], [0, len(row[2])], frozen=frozen)
        assert ours[0] == pytest.approx(expected, rel=0.01), name


def test_a_saved_config_costs_the_same():
    rows = ([100, 50], [30, 10], [(1, 8, 12)], [0, 1, 1])
    for config in CONFIGS.values():
        assert (sample_flops(config.to_dict(), *rows) == sample_flops(config, *rows)).all()


def test_a_config_json_of_qwen2_vl_will_do(shared):
    import json

    config = json.loads((shared / "configs" / "qwen2_vl_2b.json").read_text())
    rows = ([8192, 100], [0, 10], [(1, 30, 40)], [0, 0, 1])
    assert (
        sample_flops(config, *rows).tolist()
        == sample_flops(Qwen2VLConfig(**config), *rows).tolist()
    )
    # 6 operations a parameter of the layers (1.310e9) a token, and 7 * 1536 n (n + 1) of attention.
    layers = 28 * (2 * 1536**2 + 2 * 1536 * 256 + 3 * 1536 * 8960)
    assert sample_flops(config, *rows)[0] == 6 * layers * 8192 + 28 * 7 * 1536 * 8192 * 8193


def test_samples_are_counted_one_by_one():
    grids = [(1, 4, 4), (2, 8, 6), (1, 10, 10)]
    tokens, supervised, offsets = [50, 7, 90], [3, 1, 40], [0, 1, 1, 3]
    for config in CONFIGS.values():
        together = sample_flops(config, tokens, supervised, grids, offsets)
        for n in range(3):
            images = grids[offsets[n] : offsets[n + 1]]
            alone = sample_flops(
                config, tokens[n : n + 1], supervised[n : n + 1], images, [0, len(images)]
            )
            assert alone[0] == together[n] > 0
        assert together.dtype == np.int64


def test_a_family_by_another_name_costs_the_same():
    row = ([100], [9], [(1, 8, 8)], [0, 1])
    costs = [sample_flops(small_config(name), *row) for name in ("qwen3_vl", "cosmos3_omni")]
    assert costs[0] == costs[1] > 0


def test_windows_cost_less_than_whole_images():
    config = CONFIGS["qwen2_5_vl"]
    whole = {
        **config.to_dict(),
        "vision_config": {**config.vision_config.to_dict(), "fullatt_block_indexes": [0, 1, 2]},
    }
    row = ([100], [1], [(1, 40, 40)], [0, 1])
    assert sample_flops(config, *row) < sample_flops(whole, *row)
    # An image of one window is whole either way.
    small = ([100], [1], [(1, 8, 8)], [0, 1])
    assert sample_flops(config, *small) == sample_flops(whole, *small)


@pytest.mark.parametrize(
    ("config", "rows", "options", "message"),
    [
        ({"model_type": "llama"}, ([1], [0], [], [0, 0]), {}, "no costs for model_type 'llama'"),
        ({}, ([1], [0], [], [0, 0]), {}, "the config has no model_type"),
        ({"model_type": "qwen2_vl"}, ([1], [0], [], [0, 0]), {}, "has no hidden_size; load it with tr"),
        (CONFIGS["qwen2_vl"], ([1], [0, 1], [], [0, 0]), {}, "got 2, 2 and 0 grids"),
        (CONFIGS["qwen2_vl"], ([1], [0], [(1, 2, 2)], [0, 0]), {}, "got 1, 2 and 1 grids"),
        (CONFIGS["qwen2_vl"], ([1], [0], [], [0, 0]), {"frozen": ["head"]}, r"--frozen \(frozen\) has \['head'\]"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense(config, rows, options, message):
    with pytest.raises(ValueError, match=message):
        sample_flops(config, *rows, **options)
