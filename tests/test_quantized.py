"""QLoRA: a patched model with bitsandbytes' 4-bit layers, as PEFT adapts it."""

import copy

import pytest
import torch
from builders import encoded, loss_and_grads, packed, small_config, small_spec, tiny_model

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from mmpack.hf import PackCollator, patch_model

SAMPLES = [encoded(small_spec(), 1, 2, (2, 4), 3, 4), encoded(small_spec(), 5, 6, 7, 8, 9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(small_config()).save_pretrained(folder)
    return folder


def quantized(folder):
    """In evaluation mode, as transformers loads it."""
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=options, dtype=torch.float32
    )


def adapted(model):
    torch.manual_seed(0)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=layers, init_lora_weights=False))
    return model.train()


@pytest.mark.parametrize("order", ["patched, then adapted", "adapted, then patched"])
def test_gradients_of_adapters_are_those_of_the_rows_alone(folder, order):
    """The self-test evaluates the model once. On a CPU with bf16 instructions, bitsandbytes' layers then change
    their weights' layout for good, and fail in training."""
    num_items = sum(sample.num_supervised for sample in SAMPLES)
    rows = [PackCollator()([packed([sample], seed=7)]) for sample in SAMPLES]
    for row in rows:
        del row["mmpack"]
    expected, exact = loss_and_grads(adapted(quantized(folder)), rows, num_items)
    model = quantized(folder)
    before = {name: copy.copy(p.data) for name, p in model.named_parameters()}
    if order == "patched, then adapted":
        patch_model(model)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert not any(module.training for module in model.modules())
        model = adapted(model)
    else:
        model = patch_model(adapted(model))
    loss, grads = loss_and_grads(model, [PackCollator()([packed(SAMPLES, seed=7)])], num_items)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) >= 8
    assert loss == pytest.approx(expected, rel=1e-5)
    for name in trained:
        worst = (grads[name] - exact[name]).abs().max()
        assert worst <= 1e-5 * exact[name].abs().max(), name
