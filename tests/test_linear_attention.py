"""Qwen3.5's Gated DeltaNets: no segment sees another, and an unpatched model is never silently wrong."""

import copy
import inspect
from types import MethodType, SimpleNamespace

import pytest
import torch
from builders import (
    HYBRIDS,
    SMALL_SPEC,
    collator,
    encoded,
    float64_loss,
    loss_and_grads,
    made_up_rows,
    packed,
    small_config,
    tiny_model,
    worst_difference,
)
from transformers.integrations import hub_kernels

from mmpack.hf import PackCollator, linear_attention, model_patch, patch_model, unpatch_model
from mmpack.hf.attention_share import chosen_layers
from mmpack.hf.self_test import check_isolation
from mmpack.hf.trainer_checks import check_collator

# transformers 5.17 ignores what newer ones refuse.
STOCK_REFUSES = "can't keep packed sequences apart" in inspect.getsource(hub_kernels)
every_hybrid = pytest.mark.parametrize("family", HYBRIDS)


@pytest.mark.smoke
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_theorem_at_real_head_dims(impl):
    """256 for attention, of which a quarter rotates; 128 in the Gated DeltaNets."""
    config = small_config("qwen3_5").to_dict()
    config["text_config"] |= {
        "head_dim": 256,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    }
    config["text_config"]["rope_parameters"] |= {
        "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
    }  # fmt: skip
    config = type(small_config("qwen3_5"))(**config)
    batch, stock, num_items = made_up_rows("qwen3_5")
    results = []
    for batches in (stock, [batch]):
        model = tiny_model(config, dtype=torch.float64)
        model.loss_function = float64_loss
        if batches is not stock:
            patch_model(model, impl=impl)
        results.append(loss_and_grads(model, batches, num_items))
    assert len(model.model.language_model.rotary_emb.inv_freq) == 32
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-10)
    difference, name = worst_difference(results[1][1], results[0][1])
    assert difference <= 1e-10, name


@every_hybrid
def test_stock_mixes_segments(family):
    """By position ids alone, without an error: why these models must be patched."""
    batch, stock, num_items = made_up_rows(family)
    names = ("mmpack", "cu_seq_lens_q", "seq_idx")
    leaky = {name: value for name, value in batch.items() if name not in names}
    _, expected = loss_and_grads(tiny_model(small_config(family)), stock, num_items)
    _, grads = loss_and_grads(tiny_model(small_config(family)), [leaky], num_items)
    assert worst_difference(grads, expected)[0] > 0.1
    assert all(gradient.isfinite().all() for gradient in grads.values())


@pytest.mark.skipif(
    not STOCK_REFUSES, reason="this transformers ignores seq_idx without its kernels"
)
@every_hybrid
def test_an_unpatched_model_refuses_the_batch(family):
    batch = collator(family)(
        [packed([encoded(SMALL_SPEC, 1, (2, 4), 2), encoded(SMALL_SPEC, 3, 4)], family)]
    )
    assert batch["cu_seq_lens_q"].tolist() == list(batch["mmpack"]["offsets"])
    assert batch["seq_idx"].tolist() == [batch["mmpack"]["segment_ids"].tolist()]
    model = patch_model(tiny_model(small_config(family)))
    assert model(**batch).loss.isfinite()
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        unpatch_model(model)(**batch)


@pytest.mark.skipif(
    not STOCK_REFUSES, reason="this transformers ignores seq_idx without its kernels"
)
@every_hybrid
def test_a_collator_that_knows_no_model_leaks_nothing(family):
    samples = [packed([encoded(SMALL_SPEC, 1, (2, 4), 2), encoded(SMALL_SPEC, 3, 4)], family)]
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        tiny_model(small_config(family))(**PackCollator()(samples))


def test_a_collator_that_knows_no_model_is_right_for_a_qwen3_vl():
    texts = [packed([encoded(SMALL_SPEC, 1, 2), encoded(SMALL_SPEC, 3, 4)], "qwen3_vl")]
    batch = PackCollator()(texts)
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 4]
    model = tiny_model(small_config("qwen3_vl"))
    rows = collator("qwen3_vl")(texts)
    assert "cu_seq_lens_q" not in rows
    rows.pop("mmpack")
    expected = model(**rows).loss
    patched = patch_model(model)(**batch).loss.item()
    batch.pop("mmpack")
    assert unpatch_model(model)(**batch).loss == expected
    assert patched == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.smoke
def test_the_collator_and_the_callback_refuse_an_unpatched_model():
    model = tiny_model(small_config("qwen3_5"))
    with pytest.raises(
        ValueError,
        match=r"not patched, and its Gated .* PackCollator\(model=patch_model\(model\)\)",
    ):
        PackCollator(model=model)
    with pytest.raises(
        ValueError, match="Trainer's model is not patched, and its Gated .* call patch_model"
    ):
        check_collator(PackCollator(), model)
    check_collator(PackCollator(), patch_model(model))


@pytest.mark.smoke
@every_hybrid
@pytest.mark.parametrize("path", ["convolution", "state"])
def test_the_self_test_sees_a_leak_of_a_gated_deltanet(family, path):
    """By each of the two ways from token to token, the other closed."""
    model = patch_model(tiny_model(small_config(family)))
    layer = model.model.language_model.layers[0].linear_attn
    with torch.no_grad():
        if path == "convolution":
            layer.A_log.fill_(10)  # a state that forgets everything at once
        else:
            layer.conv1d.weight[..., :-1] = 0
    check_isolation(model.model)

    def whole(self, hidden_states, mmpack=None, **kwargs):
        return type(self).forward(self, hidden_states)

    layer.forward = MethodType(whole, layer)
    with pytest.raises(RuntimeError, match="packed segments see each other"):
        check_isolation(model.model)


@pytest.mark.smoke
@every_hybrid
def test_without_a_pack_it_is_stock(family):
    """Generation with its cache, and padded rows."""
    model = tiny_model(small_config(family)).eval()
    inputs = {"input_ids": torch.tensor([[0, 0, 1, 7, 2], [3, 4, 5, 8, 6]])}
    inputs["attention_mask"] = (inputs["input_ids"] > 0).long()
    asked = {"max_new_tokens": 4, "do_sample": False}
    logits, tokens = model(**inputs).logits, model.generate(**inputs, **asked)
    patch_model(model)
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, **asked), tokens)
    unpatch_model(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.smoke
def test_kernels_on_a_gpu_get_the_bounds_of_segments(monkeypatch):
    """One call of stock, if both libraries are installed; the host's bounds as well. (Which of them keeps what
    apart: test_compat.py.)"""
    calls = []
    forward = linear_attention.linear_forward(lambda *args, **kwargs: calls.append((args, kwargs)))
    pack = {
        "offsets": (0, 2, 5),
        "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
        "segment_ids": torch.tensor([0, 0, 1, 1, 1], dtype=torch.int32),
        "impl": "auto",
    }
    monkeypatch.setattr(linear_attention, "has_linear_kernels", lambda: True)
    hidden = SimpleNamespace(is_cuda=True)
    forward("layer", hidden, mmpack=pack, cu_seq_lens_q="the batch's", use_cache=False)
    ((args, kwargs),) = calls
    assert args == ("layer", hidden)
    assert kwargs.keys() == {"cu_seq_lens_q", "seq_idx", "cu_seqlens_cpu"}
    assert kwargs["cu_seq_lens_q"] is pack["cu_seqlens"]
    assert kwargs["seq_idx"].tolist() == [[0, 0, 1, 1, 1]]
    assert kwargs["cu_seqlens_cpu"].tolist() == [0, 2, 5]


@pytest.mark.smoke
def test_the_self_test_waits_for_the_gpu_that_kernels_need(monkeypatch):
    monkeypatch.setattr(model_patch, "has_linear_kernels", lambda both: True)
    model = patch_model(tiny_model(small_config("qwen3_5")))
    assert not getattr(model.model, model_patch.PATCH).is_isolated
    others = patch_model(tiny_model(small_config("qwen3_vl")))
    assert getattr(others.model, model_patch.PATCH).is_isolated


@pytest.mark.smoke
def test_attention_is_recorded_where_there_is_some():
    config = copy.deepcopy(small_config("qwen3_5"))
    config.text_config.num_hidden_layers = 6
    config.text_config.layer_types = ["linear_attention", "full_attention", "linear_attention"] * 2
    model = patch_model(tiny_model(config))
    assert chosen_layers(model, model.model, None) == [4, 4]
    assert chosen_layers(model, model.model, [1]) == [1]
    with pytest.raises(ValueError, match=r"\[0, 2\] are Gated DeltaNets, .* choose from \[1, 4\]"):
        chosen_layers(model, model.model, [0, 1, 2])
