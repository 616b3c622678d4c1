"""What Qwen2.5-VL and Qwen3-VL add: windows, a table of positions, deepstack, experts (Qwen3.5's linear attention:
test_linear_attention.py)."""

import ast
import copy
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import (
    FAMILIES,
    HYBRIDS,
    SMALL_SPEC,
    collator,
    encoded,
    loss_and_grads,
    made_up_rows,
    packed,
    small_config,
    small_spec,
    tiny_model,
    worst_difference,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_window_index,
)

from mmpack import PackedDataset, VideoSpec, assemble, families, reference
from mmpack.hf import PackCollator, forward_kwargs, patch_model
from mmpack.hf.model_parts import TowerSpec
from mmpack.hf.self_test import _differ
from mmpack.hf.tower import run_tower
from mmpack.hf.training import train
from mmpack.hf.training_options import parse_training_arguments
from mmpack.packing.cost import sample_flops

pytestmark = pytest.mark.smoke
SAMPLES = [
    encoded(SMALL_SPEC, 1, 2, (4, 6), 3, (10, 2), 4),
    encoded(SMALL_SPEC, 5, 6, 7),
    encoded(SMALL_SPEC, 8, (6, 14), (2, 2), 9),
]
grids = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5
).map(lambda grids: [(t, 2 * h, 2 * w) for t, h, w in grids])


def assert_positions_are_transformers(grid_thw, side):
    ours = forward_kwargs._interpolated(
        torch.from_numpy(reference._patch_places(grid_thw, SMALL_SPEC)),
        torch.tensor(grid_thw),
        side,
    )
    index, weight = get_vision_interpolation_indices_and_weights(
        torch.tensor(grid_thw), side, align_corners=True, spatial_merge_size=2
    )
    assert torch.equal(ours["position_index"], index.int())
    assert torch.equal(ours["position_weight_bits"].view(torch.float32), weight)


@settings(max_examples=200, deadline=None)
@given(grid_thw=grids, side=st.sampled_from([1, 2, 5, 16, 48]))
def test_positions_made_on_the_device_are_transformers(grid_thw, side):
    """To the bit, in float32."""
    assert_positions_are_transformers(grid_thw, side)


def test_positions_far_from_the_origin_are_transformers_too():
    """A real budget: 4,096 patches in a row of a table of 48."""
    assert_positions_are_transformers([(1, 4096, 4), (1, 62, 90)], 48)


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_text_positions_are_the_models(family):
    """`get_rope_index` of each sample alone."""
    base = tiny_model(small_config(family)).model
    for sample in SAMPLES:
        batch = collator(family)([packed([sample], family)])
        ids = batch["input_ids"]
        theirs, _ = base.get_rope_index(
            ids, mm_token_type_ids=(ids == 90).int(), image_grid_thw=batch.get("image_grid_thw")
        )
        assert torch.equal(batch["position_ids"][1:], theirs)


def test_features_are_named_in_the_order_of_the_windows():
    pack = packed(SAMPLES, "qwen2_5_vl")
    plain, batch = (
        collate([pack])["mmpack"] for collate in (PackCollator(), collator("qwen2_5_vl"))
    )
    grids = torch.from_numpy(assemble(pack).grid_thw)
    theirs, offsets = get_vision_window_index(grids, 2, 56, 14)
    assert batch["window_order"].tolist() == theirs.tolist()
    assert list(batch["window_offsets"]) == offsets.tolist()
    order = batch["window_order"].long()
    assert not torch.equal(order, order.sort().values)
    assert torch.equal(batch["feature_token"], plain["feature_token"][order])
    tokens, features = batch["feature_token"].long(), torch.arange(len(order), dtype=torch.int32)
    assert torch.equal(batch["feature_index"][tokens], features)
    assert ((batch["feature_index"] < 0) == (plain["feature_index"] < 0)).all()
    assert batch["window_max_seqlen"] == 16  # 2 x 2 features of 4 patches
    assert batch["window_offsets"][-1] == batch["num_patches"]


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_features_at_every_level_are_stocks(family):
    """The tower gives what stock's gives, in the order the batch names it, and without a permutation
    in the backward."""
    model = tiny_model(small_config(family), dtype=torch.float64)
    batch = collator(family)([packed(SAMPLES, family)])
    pixels, grid_thw = batch["pixel_values"].double(), batch["image_grid_thw"]
    with torch.no_grad():
        stock = model.model.visual(pixels, grid_thw=grid_thw)
    levels = [stock.pooler_output, *getattr(stock, "deepstack_features", [])]
    patch_model(model)
    pack = {**batch["mmpack"], "impl": "auto"}
    features = run_tower(model.model, pixels, grid_thw, pack)
    assert len(features) == (3 if families.FAMILIES[family].has_deepstack else 1)
    natural = pack["feature_index"][pack["feature_index"] >= 0].long()
    for ours, theirs in zip(features, levels, strict=True):
        torch.testing.assert_close(ours[natural], theirs, rtol=1e-12, atol=1e-12)
    assert not any("Index" in name for name in graph_of(features[0]))
    assert not getattr(model.model.visual.merger, "merged", None)  # kept for nobody


def graph_of(tensor):
    """Names of the autograd nodes behind a tensor."""
    seen, names, waiting = set(), [], [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(node.name())
            waiting += [before for before, _ in node.next_functions]
    return names


def test_no_float_that_a_wrapper_might_round():
    """FSDP2 and DeepSpeed cast floating inputs to bf16; indices and shares must not be."""
    for family in [*FAMILIES, *HYBRIDS]:
        tensors = collator(family)([packed(SAMPLES, family)])["mmpack"].values()
        assert not any(isinstance(t, torch.Tensor) and t.is_floating_point() for t in tensors)


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_a_collator_that_does_not_know_the_tower_is_told(family):
    model = patch_model(tiny_model(small_config(family)))
    batch = PackCollator()([packed(SAMPLES, family)])
    if family == "qwen2_vl":
        assert model(**batch).loss.isfinite()
        return
    with pytest.raises(
        ValueError, match=rf"vision tower of {family}; .* PackCollator\(model=model\)"
    ):
        model(**batch)
    assert model(**PackCollator()([packed(SAMPLES[1:2], family)])).loss.isfinite()  # no images


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unpatched_model_takes_the_batch(family):
    model = tiny_model(small_config(family))
    batch = collator(family)([packed(SAMPLES, family)])
    loss, grads = loss_and_grads(model, [batch], 10)
    expected = loss_and_grads(patch_model(model), [batch], 10)
    assert loss == pytest.approx(expected[0], rel=1e-6)
    assert worst_difference(grads, expected[1])[0] <= 1e-5


def test_what_the_collator_knows_of_a_tower():
    def tower(family, **vision):
        config = copy.deepcopy(small_config(family))
        for name, value in vision.items():
            setattr(config.vision_config, name, value)
        return PackCollator(model=tiny_model(config)).tower

    assert tower("qwen2_vl") == TowerSpec()
    assert tower("qwen2_5_vl", window_size=112) == TowerSpec(window_side=4)
    assert tower("qwen3_vl", num_position_embeddings=2304) == TowerSpec(table_side=48)


def test_the_routers_auxiliary_loss_stays_transformers():
    """It is no sum over samples, so the theorem holds with a coefficient of 0 alone; with another, what
    transformers makes of the whole pack is added."""
    batch, stock, num_items = made_up_rows("qwen3_vl_moe")
    config = copy.deepcopy(small_config("qwen3_vl_moe"))
    config.text_config.output_router_logits = True
    config.text_config.router_aux_loss_coef = 0.0
    expected = loss_and_grads(tiny_model(config), stock, num_items)
    model = patch_model(tiny_model(config))
    loss, grads = loss_and_grads(model, [batch], num_items)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert worst_difference(grads, expected[1])[0] <= 1e-5
    model.config.text_config.router_aux_loss_coef = 0.5
    batch["output_router_logits"] = True  # transformers 5.17 looks here, and not into the config
    out = model(**batch, num_items_in_batch=torch.tensor(num_items))
    assert out.aux_loss > 0
    assert out.loss.item() == pytest.approx(loss + 0.5 * out.aux_loss.item(), rel=1e-5)


def test_the_self_test_of_experts_looks_at_half_the_digits():
    states = torch.randn(8, 32)
    rounded = states * (1 + 1e-6)
    assert not _differ(states, states, False) and not _differ(states, states, True)
    assert _differ(states, rounded, False) and not _differ(states, rounded, True)
    assert _differ(states, states + 0.01, True)
    assert _differ(states.bfloat16(), (states + 0.2).bfloat16(), True)


def test_a_new_family_is_one_record(monkeypatch):
    """Its costs, its videos and what is hung on its model follow from the record."""
    row = ([100], [10], [(1, 8, 12)], [0, 1])
    third = families.FAMILIES["qwen3_vl"]
    video = replace(third.video, processor="NewVideoProcessor", max_frames=9)
    new = replace(third, processor="NewProcessor", video=video, mlp_products=3, has_deepstack=False)
    monkeypatch.setitem(families.FAMILIES, "new", new)
    config = copy.deepcopy(small_config("qwen3_vl"))
    cost = sample_flops(config, *row)[0]
    config.model_type = "new"
    # A gate more in each of 2 blocks, mergers of 2 levels less: 96 patches, 24 features.
    merger = (4 * 32) * (4 * 32 + config.text_config.hidden_size)
    assert sample_flops(config, *row)[0] == cost + 6 * (96 * 2 * 32 * 48 - 24 * 2 * merger)

    assert families.family_of_processor("NewProcessor") is new
    size = {"shortest_edge": 1, "longest_edge": 2}
    processor = SimpleNamespace(
        video_processor_type="NewVideoProcessor", size=size, min_frames=4, max_frames=9
    )
    assert VideoSpec.from_parts(processor).has_timestamps
    processor.video_processor_type = "OtherVideoProcessor"
    with pytest.raises(
        ValueError, match="is a OtherVideoProcessor; use one of Qwen2VLVideo.*, NewVideoProcessor "
    ):
        VideoSpec.from_parts(processor)

    model = tiny_model(small_config("qwen3_vl"))
    model.model.config.model_type = "new"
    text = patch_model(model).model.language_model
    assert PackCollator(model=model).tower == TowerSpec(table_side=6)
    assert "_deepstack_process" not in vars(text) and not text._forward_pre_hooks


def test_names_of_families_are_in_one_file():
    """And names of their processors; prose is free."""
    package = Path(families.__file__).parent
    name = re.compile(r"qwen\d_?\d*_vl|qwen3_5|Qwen[\d_]+VL\w*Processor\b")
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        found = [
            (n.lineno, n.value)
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in prose
            if name.search(n.value)
        ]
        assert bool(found) == (path.name == "families.py"), (path, found)


@pytest.mark.parametrize("family", [*FAMILIES[1:], *HYBRIDS])
def test_mmpack_train_takes_the_families(family, tmp_path):
    """`mmpack train`'s Trainer, with uneven packs and its callback's costs."""
    samples = [encoded(small_spec(family), n, 1 + n, 2 + n) for n in range(3, 30, 3)]
    dataset = PackedDataset.from_samples(samples, capacity=9, cost=small_config(family))
    model = tiny_model(small_config(family))
    options = [
        "--output_dir",
        str(tmp_path),
        "--max_steps",
        "2",
        "--use_cpu",
        "--save_strategy",
        "no",
    ]
    report = train(patch_model(model), dataset, parse_training_arguments(options))
    assert report["steps"] == 2
    assert 0 < report["last_loss"] < 20
