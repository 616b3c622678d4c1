"""What patching touches, what it leaves alone, and how it is taken back."""

import copy

import pytest
import torch
from builders import (
    FAMILIES,
    SMALL_SPEC,
    collator,
    encoded,
    packed,
    small_config,
    small_spec,
    tiny_model,
)

from mmpack.hf import PackCollator, attention, patch_model, unpatch_model
from mmpack.hf.model_patch import use_choice
from mmpack.hf.self_test import check_isolation

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("wide_tiles")]
CONFIG = small_config()
every_family = pytest.mark.parametrize("family", FAMILIES)


def batch_of(*samples, family="qwen2_vl"):
    """A packed batch with seeded pixels."""
    return collator(family)([packed(samples, family)])


SAMPLES = [
    encoded(SMALL_SPEC, 1, 2, (2, 4), 3, 4),
    encoded(SMALL_SPEC, 5, 6, 7),
    encoded(SMALL_SPEC, 8, (4, 6), (2, 2), 9),
]
TEXT = [encoded(SMALL_SPEC, 1, 2, 3), encoded(SMALL_SPEC, 4, 5)]


@pytest.fixture
def family():
    """What tests marked `every_family` run with in turn, and all others once."""
    return "qwen2_vl"


@pytest.fixture
def batch(family):
    return batch_of(*SAMPLES, family=family)


@pytest.fixture
def model(family):
    return tiny_model(small_config(family))


def state_of(model):
    """Everything patching may touch: attributes and hooks of every module, and the implementations."""
    base = model.model
    hooks = [
        dict(table)
        for module in model.modules()
        for name, table in sorted(vars(module).items())
        if name.startswith(("_forward_hooks", "_forward_pre_hooks"))
    ]
    return (
        base.language_model.config._attn_implementation,
        base.visual.config._attn_implementation,
        hooks,
        [sorted(vars(module)) for module in model.modules()],
        [name for name, _ in model.state_dict().items()],
    )


@pytest.mark.parametrize(
    ("family", "attn"), [("qwen2_vl", "eager"), *((family, "sdpa") for family in FAMILIES)]
)
def test_unpatching_takes_everything_back(family, attn, batch):
    model = tiny_model(small_config(family), attn=attn).eval()
    assert model.loss_function  # transformers keeps it once asked
    before = state_of(model)
    loss = model(**batch).loss
    assert patch_model(model) is model
    assert patch_model(model) is model  # twice is once
    assert state_of(model) != before
    assert torch.allclose(model(**batch).loss, loss)
    assert unpatch_model(model) is model
    assert state_of(model) == before
    assert torch.equal(model(**batch).loss, loss)
    assert unpatch_model(model) is model


@every_family
def test_patching_leaves_mode_gradients_and_random_state(model):
    model.train()
    model.model.visual.eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    patch_model(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def padded_batch(family):
    input_ids = torch.tensor([[0, 0, 1, 92, 90, 93, 2], [3, 4, 5, 92, 90, 93, 6]])
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids > 0).long(),
        "mm_token_type_ids": (input_ids == 90).int(),
        "pixel_values": torch.randn(8, 2 * small_spec(family).patch_values),
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]]),
    }


@every_family
def test_left_padded_evaluation_and_generation_stay_stock(model, family):
    model.eval()
    inputs = padded_batch(family)
    logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    patch_model(model)
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)


@every_family
def test_a_packed_step_between_generations(model, batch, family):
    inputs = padded_batch(family)
    model.eval()
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    patch_model(model)
    model(**batch).loss.backward()
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)


@every_family
def test_a_saved_model_is_stock(model, batch, tmp_path):
    loss = patch_model(model)(**batch).loss
    model.save_pretrained(tmp_path)
    assert "mmpack" not in (tmp_path / "config.json").read_text()
    reloaded = type(model).from_pretrained(tmp_path)
    assert torch.allclose(reloaded(**batch).loss, loss)


@every_family
def test_a_deep_copy_is_patched_on_its_own(model, batch):
    patch_model(model)
    loss = model(**batch).loss.item()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert other(**batch).loss.item() == loss
    unpatch_model(model)
    assert other(**batch).loss.item() == loss


def test_the_inner_model_alone(model, batch):
    expected = patch_model(copy.deepcopy(model)).model(**inner(batch)).last_hidden_state
    base = patch_model(model.model)
    assert torch.equal(base(**inner(batch)).last_hidden_state, expected)


def inner(batch):
    return {k: v for k, v in batch.items() if k not in ("labels", "shift_labels", "logits_to_keep")}


@every_family
def test_segments_do_not_see_each_other(model, family):
    """Bitwise: another text and other pixels in segment 0 leave segments 1 and 2 as they are."""
    if family == "qwen3_vl_moe":
        model.set_experts_implementation("batched_mm")  # products that do not depend on the others
    patch_model(model).eval()
    one, other = (batch_of(*SAMPLES, family=family) for _ in range(2))
    end = int(one["mmpack"]["offsets"][1])
    other["input_ids"][0, 0] = 50
    other["pixel_values"][:8] = 1.0
    logits = [model(**{**b, "logits_to_keep": 0, "labels": None}).logits for b in (one, other)]
    assert torch.equal(logits[0][0, end:], logits[1][0, end:])
    assert not torch.equal(logits[0][0, :end], logits[1][0, :end])


@pytest.mark.parametrize(
    ("family", "training"), [("qwen2_vl", False), *((family, True) for family in FAMILIES)]
)
def test_a_pack_without_images_runs_the_tower(model, training):
    patch_model(model).train(training)
    calls = []
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    model(**batch_of(*TEXT)).loss.backward()
    assert len(calls) == 1
    assert all(p.grad is not None for p in model.parameters())
    assert all((p.grad == 0).all() for p in model.model.visual.parameters())


def test_a_frozen_tower_is_not_run_for_nothing(model):
    patch_model(model).model.visual.requires_grad_(False)
    calls = []
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    model(**batch_of(*TEXT))
    assert calls == []


@every_family
def test_the_vision_tower_attends_in_one_call(model, batch, monkeypatch):
    calls = []
    num_layers = model.config.text_config.num_hidden_layers
    real = attention.varlen_attention

    def count(q, *args, **kwargs):
        calls.append(q.shape[0])
        return real(q, *args, **kwargs)

    patch_model(model)
    monkeypatch.setattr(attention, "varlen_attention", count)
    model(**batch)
    tokens, patches = batch["input_ids"].shape[1], len(batch["pixel_values"])
    assert calls == [patches] * 2 + [tokens] * num_layers


@every_family
def test_the_self_test_finds_a_leak(model, monkeypatch):
    def leaky(q, k, v, cu_seqlens, max_seqlen, **options):
        options["offsets"] = (0, len(q))
        return real(q, k, v, cu_seqlens[[0, -1]], len(q), **options)

    real = attention.varlen_attention
    monkeypatch.setattr(attention, "varlen_attention", leaky)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="packed segments see each other"):
        patch_model(model)
    assert state_of(model) == before


@every_family
def test_the_self_test_finds_attention_switched_back(model):
    patch_model(model)
    check_isolation(model.model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="Was an attention implementation .* replaced"):
        check_isolation(model.model)


@every_family
def test_a_model_without_weights_is_tested_at_first_use(batch, family):
    like = tiny_model(small_config(family))
    with torch.device("meta"):
        model = type(like)(copy.deepcopy(like.config))
    patch_model(model)
    assert not model.model._mmpack_patch.is_isolated
    model.to_empty(device="cpu")
    model.load_state_dict(like.state_dict())
    for module in model.modules():  # buffers are not in the state dict
        if hasattr(module, "original_inv_freq"):
            fresh = type(module)(module.config)
            module.inv_freq, module.original_inv_freq = fresh.inv_freq, fresh.original_inv_freq
    expected = patch_model(like)(**batch).loss
    assert torch.allclose(model(**batch).loss, expected)
    assert model.model._mmpack_patch.is_isolated


def test_what_a_loader_does_to_a_batch_is_told(model, batch):
    patch_model(model)
    cases = [
        ({"pixel_values": batch["pixel_values"][:1]}, "'dispatch_batches': False"),
        ({"input_ids": batch["input_ids"][:, 1:]}, "do not slice or stack"),
        ({"attention_mask": torch.ones(1, 3)}, "remove attention_mask"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 1, 32)}, "with input_ids"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**{**batch, **change})


def test_dropout_and_sliding_windows_are_refused(batch):
    config = copy.deepcopy(CONFIG)
    config.text_config.attention_dropout = 0.1
    model = patch_model(tiny_model(config)).train()
    with pytest.raises(ValueError, match="not support dropout"):
        model(**batch)
    model.eval()(**batch)

    config = small_config().to_dict()
    config["text_config"].update(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    config["text_config"].pop("layer_types")
    model = tiny_model(type(CONFIG)(**config))
    with pytest.raises(ValueError, match="not support a sliding window"):
        patch_model(model)


def test_other_models_are_refused(model):
    with pytest.raises(
        ValueError, match=r"cannot patch Linear .* supported: qwen2_vl, qwen2_5_vl, q"
    ):
        patch_model(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model_type None.*qwen3_5, qwen3_5_moe$"):
        PackCollator(model=torch.nn.Linear(2, 2))
    model.model.config.model_type = "glm4v"
    with pytest.raises(ValueError, match=r"cannot patch .* \(model_type 'glm4v'\); supported: "):
        patch_model(model)
    model.model.config.model_type = "qwen2_vl"
    model.model.visual.blocks[0].attn.forward = model.model.visual.blocks[0].attn.forward
    with pytest.raises(ValueError, match="already has a replaced forward"):
        patch_model(model)


class Subclass(torch.nn.Embedding):
    """Stands for whatever is more than an nn.Embedding (LoRA's, a quantised one)."""


def change_class(embedding):
    embedding.__class__ = Subclass


PLAIN = {
    "as it is": lambda embedding: None,
    "frozen": lambda embedding: embedding.requires_grad_(False),
    "a padding row": lambda embedding: setattr(embedding, "padding_idx", 5),
}
NOT_PLAIN = {
    "a subclass": change_class,
    "a forward hook": lambda e: e.register_forward_hook(lambda module, args, out: out),
    "a forward pre-hook": lambda e: e.register_forward_pre_hook(lambda module, args: args),
    "a backward hook": lambda e: e.register_full_backward_hook(lambda module, grads, out: None),
    "a backward pre-hook": lambda e: e.register_full_backward_pre_hook(lambda module, grads: None),
    "a replaced forward": lambda e: setattr(e, "forward", e.forward),
    "max_norm": lambda e: setattr(e, "max_norm", 100.0),
    "scale_grad_by_freq": lambda e: setattr(e, "scale_grad_by_freq", True),
    "sparse": lambda e: setattr(e, "sparse", False) or setattr(e, "sparse", True),
    "a ZeRO-3 shard": lambda e: setattr(e.weight, "ds_id", 7),
}


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("kind", [*PLAIN, *NOT_PLAIN])
def test_the_embedding_is_fused_only_where_it_is_a_lookup(kind, fused_calls):
    batch = batch_of(*(SAMPLES if kind == "as it is" else TEXT))
    models = [tiny_model(CONFIG), tiny_model(CONFIG)]
    for model in models:
        {**PLAIN, **NOT_PLAIN}[kind](model.get_input_embeddings())
    stock, model = (
        models[0],
        patch_model(models[1], impl="triton" if kind == "as it is" else "auto"),
    )
    if kind != "as it is":  # of the kernels the embedding's alone
        use_choice(model, {"embedding": {torch.float32: "triton"}}, torch.device("cpu"))
    loss, expected = model(**batch).loss, patch_model(stock)(**batch).loss
    assert bool(fused_calls) == (kind in PLAIN)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    for ours, theirs in zip(model.parameters(), stock.parameters()):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            ours_grad, theirs_grad = (g.to_dense() for g in (ours.grad, theirs.grad))
            assert torch.allclose(ours_grad, theirs_grad, rtol=1e-4, atol=1e-6)


def test_a_sharded_table_is_not_plain(model):
    from torch.distributed.tensor import DTensor

    from mmpack.hf.compat import is_sharded
    from mmpack.hf.embedding import is_plain

    embedding = model.get_input_embeddings()
    assert is_plain(embedding)
    sharded = torch.Tensor._make_subclass(DTensor, embedding.weight.detach())
    assert is_sharded(sharded)


def test_input_require_grads_needs_the_module(batch, fused_calls):
    """What PEFT does under checkpointing: a hook makes the frozen table's output a leaf."""
    model = patch_model(tiny_model(CONFIG), impl="triton").requires_grad_(False)
    model.enable_input_require_grads()
    model.model.visual.requires_grad_(True)
    model(**batch).loss.backward()
    assert fused_calls == []
    assert all(p.grad is not None for p in model.model.visual.parameters())


def test_an_unknown_implementation_is_refused(model):
    with pytest.raises(
        ValueError, match="impl must be 'auto', 'libraries' or one of triton, .* got 'fast'"
    ):
        patch_model(model, impl="fast")


def test_patching_again_changes_the_implementation(model, batch, fused_calls):
    patch_model(patch_model(model), impl="triton")
    model(**batch)
    assert fused_calls
