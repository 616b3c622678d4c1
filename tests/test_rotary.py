"""The rotary kernel inside a patched model: called, equal to stock, under autocast, checkpointing, LoRA."""

import pytest
import torch
from builders import (
    FAMILIES,
    SMALL_SPEC,
    collator,
    encoded,
    loss_and_grads,
    packed,
    small_config,
    tiny_model,
    worst_difference,
)

from mmpack.hf import patch_model
from mmpack.hf.model_patch import use_choice
from mmpack.hf.rotary import rotations

pytestmark = pytest.mark.usefixtures("wide_tiles")
CONFIG = small_config()
every_family = pytest.mark.parametrize("family", FAMILIES)
SAMPLES = [
    encoded(SMALL_SPEC, 1, 2, (2, 4), 3, 4),
    encoded(SMALL_SPEC, 5, 6, 7),
    encoded(SMALL_SPEC, 8, (4, 6), (2, 2), 9),
]


@pytest.fixture
def family():
    """What tests marked `every_family` run with in turn, and all others once."""
    return "qwen2_vl"


@pytest.fixture
def batch(family):
    return collator(family)([packed(SAMPLES, family)])


def with_kernel(model):
    """Patched, of all kernels with the rotary alone."""
    dtypes = dict.fromkeys((torch.float32, torch.float16), "triton")
    patch_model(model)
    use_choice(model, {"rotary": dtypes, "vision_rotary": dtypes}, torch.device("cpu"))
    return model


def patched(family="qwen2_vl", kernel=True):
    model = tiny_model(small_config(family))
    return with_kernel(model) if kernel else patch_model(model)


@pytest.fixture
def launches(monkeypatch):
    """(q's shape, number of position rows) of every call."""
    import mmpack.ops

    calls = []
    real = mmpack.ops.apply_mrope

    def count(q, k, position_ids, *args, **kwargs):
        calls.append((tuple(q.shape), len(position_ids)))
        return real(q, k, position_ids, *args, **kwargs)

    monkeypatch.setattr(mmpack.ops, "apply_mrope", count)
    return calls


@pytest.mark.smoke
@every_family
def test_every_attention_calls_it_once(batch, family, launches):
    tokens, patches = batch["input_ids"].shape[1], len(batch["pixel_values"])
    model = patched(family)
    model(**batch)
    launches.clear()  # the self-test's too
    model(**batch)
    num_layers = model.config.text_config.num_hidden_layers
    assert launches == [((patches, 2, 16), 2)] * 2 + [((tokens, 4, 8), 3)] * num_layers
    launches.clear()
    patched(family, kernel=False)(**batch)
    assert launches == []


@pytest.mark.smoke
@every_family
def test_each_bound_forward_equals_stock(batch, family):
    """Text and vision attention, output and gradients, in float32."""
    model = patched(family, kernel=False)
    base = model.model
    positions = batch["position_ids"][1:]
    plain = {**batch["mmpack"], "impl": "auto"}
    rotary, vision_rotary = rotations(base, plain, positions[:, 0])
    pack = {**plain, "rotary": rotary, "vision_rotary": vision_rotary}
    text = torch.randn(1, positions.shape[-1], 32)
    patches = torch.randn(len(batch["pixel_values"]), 32)
    where = pack["vision_position_ids"]
    cases = [
        (base.language_model.layers[0].self_attn, text, base.language_model.rotary_emb, positions),
        (base.visual.blocks[0].attn, patches, base.visual.rotary_pos_emb, where),
    ]
    for attention, hidden, rotary, place in cases:
        how = {"position_embeddings": rotary(hidden, place)}
        if hidden is patches:
            how["cu_seqlens"] = pack["vision_cu_seqlens"]
        results = []
        for mmpack in (plain, pack):
            x = hidden.clone().requires_grad_()
            out = attention(x, mmpack=mmpack, **how)
            out = out[0] if isinstance(out, tuple) else out
            out.square().sum().backward()
            results.append((out.detach(), x.grad))
        for stock, ours in zip(*results):
            assert torch.allclose(ours, stock, rtol=1e-5, atol=1e-5)


def test_autocast_is_no_further_from_float32_than_stock(batch):
    """In float16: the interpreter cannot round to bfloat16."""
    exact = loss_and_grads(patched(kernel=False), [batch], 5)
    with torch.autocast("cpu", torch.float16):
        stock, ours = (loss_and_grads(patched(kernel=one), [batch], 5) for one in (False, True))
    assert abs(ours[0] - exact[0]) <= 2 * abs(stock[0] - exact[0]) + 1e-3 * exact[0]
    for name, grad in exact[1].items():
        budget = 2 * (stock[1][name] - grad).abs().max() + 5e-3 * grad.abs().max()
        assert (ours[1][name] - grad).abs().max() <= budget, name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(batch, use_reentrant, launches):
    model = patched()
    expected = loss_and_grads(model, [batch], 5)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    launches.clear()
    loss, grads = loss_and_grads(model, [batch], 5)
    assert len(launches) == 2 * 4  # of every attention again in the backward
    assert loss == pytest.approx(expected[0], rel=1e-6)
    difference, name = worst_difference(grads, expected[1])
    assert difference <= 1e-5, name


def test_lora(batch, launches):
    """PEFT puts its layers in place of the projections; they are called as what they are."""
    peft = pytest.importorskip("peft")
    losses = {}
    for impl in ("auto", "triton"):
        torch.manual_seed(0)
        config = peft.LoraConfig(
            target_modules=["q_proj", "v_proj", "qkv"], init_lora_weights=False
        )
        model = peft.get_peft_model(tiny_model(CONFIG), config)
        model = with_kernel(model) if impl == "triton" else patch_model(model)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        losses[impl] = loss_and_grads(model, [batch], 5)
    assert launches
    assert losses["triton"][0] == pytest.approx(losses["auto"][0], rel=1e-6)
    difference, name = worst_difference(losses["triton"][1], losses["auto"][1])
    assert difference <= 1e-5, name


@pytest.mark.smoke
def test_without_a_pack_it_is_stock():
    model = tiny_model(CONFIG).eval()
    inputs = {
        "input_ids": torch.tensor([[0, 0, 1, 92, 90, 93, 2], [3, 4, 5, 92, 90, 93, 6]]),
        "pixel_values": torch.randn(8, 1176),
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]]),
    }
    inputs["attention_mask"] = (inputs["input_ids"] > 0).long()
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == 90).int()
    logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    patch_model(model, impl="triton")
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)
