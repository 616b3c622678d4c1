"""The theorem over everything a run may switch on: family x implementation x mode, on made-up rows. Without any of
the modes: `test_equivalence.test_made_up_rows`.

Pairs of them in CI, one for each family on the oldest transformers too; all with `-m slow`.
"""

import functools
import itertools

import pytest
import torch
from builders import (
    FAMILIES,
    HYBRIDS,
    SMALL_SPEC,
    encoded,
    float64_loss,
    loss_and_grads,
    made_up_rows,
    small_config,
    tiny_model,
    to,
    with_noise,
    worst_difference,
)

from mmpack.hf import PackCollator, patch_model
from mmpack.types import IGNORE

IMPLS = {
    "reference float64": ("reference", torch.float64, 1e-10),
    "libraries float64": ("auto", torch.float64, 1e-10),
    "libraries float32": ("auto", torch.float32, 1e-5),
    "kernels float32": ("triton", torch.float32, 1e-5),
}
MODES = ["checkpointing", "reentrant", "LoRA", "LoRA checkpointing", "frozen tower"]
QUICK = [
    ("qwen2_vl", "reference float64", "LoRA checkpointing"),
    ("qwen2_vl", "libraries float64", "frozen tower"),
    ("qwen2_vl", "libraries float64", "reentrant"),
    ("qwen2_vl", "libraries float32", "checkpointing"),
    ("qwen2_vl", "kernels float32", "reentrant"),
    ("qwen2_5_vl", "reference float64", "LoRA"),
    ("qwen2_5_vl", "libraries float64", "checkpointing"),
    ("qwen2_5_vl", "libraries float32", "reentrant"),
    ("qwen2_5_vl", "libraries float32", "frozen tower"),
    ("qwen2_5_vl", "kernels float32", "LoRA checkpointing"),
    ("qwen3_vl", "reference float64", "reentrant"),
    ("qwen3_vl", "libraries float64", "LoRA checkpointing"),
    ("qwen3_vl", "libraries float32", "LoRA"),
    ("qwen3_vl", "libraries float32", "frozen tower"),
    ("qwen3_vl_moe", "libraries float64", "LoRA"),
    ("qwen3_vl_moe", "libraries float32", "reentrant"),
    ("qwen3_5", "reference float64", "checkpointing"),
    ("qwen3_5", "libraries float64", "LoRA checkpointing"),
    ("qwen3_5", "libraries float64", "frozen tower"),
    ("qwen3_5", "libraries float32", "LoRA"),
    ("qwen3_5", "kernels float32", "reentrant"),
    ("qwen3_5_moe", "reference float64", "LoRA"),
    ("qwen3_5_moe", "libraries float64", "reentrant"),
    ("qwen3_5_moe", "libraries float32", "checkpointing"),
]
# On the oldest transformers too: of each family what libraries compute, in one mode.
SMOKE = list({case[0]: case for case in QUICK if case[1] == "libraries float64"}.values())
CASES = [
    pytest.param(
        *case,
        marks=pytest.mark.smoke if case in SMOKE else () if case in QUICK else pytest.mark.slow,
    )
    for case in itertools.product([*FAMILIES, *HYBRIDS], IMPLS, MODES)
]


def model_of(dtype, mode, impl=None, family="qwen2_vl"):
    """A model in a mode, equal for equal arguments; patched if `impl` is given."""
    model = tiny_model(small_config(family), dtype=dtype)
    if dtype == torch.float64:
        model.loss_function = float64_loss
    if impl:
        patch_model(model, impl=impl)
    if "LoRA" in mode:
        peft = pytest.importorskip("peft")
        torch.manual_seed(1)
        names = ["q_proj", "v_proj", "down_proj", "qkv"]  # text and vision
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, and so would be the gradient of lora_A
                torch.nn.init.normal_(parameter)
    if mode == "frozen tower":
        model.model.visual.requires_grad_(False)
    if mode == "reentrant" or "checkpointing" in mode:
        model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
        if mode == "reentrant" or "LoRA" in mode:
            model.enable_input_require_grads()
    return model.train()


@pytest.mark.parametrize(("family", "impl", "mode"), CASES)
def test_the_theorem(family, impl, mode):
    """float64: to 1e-10. float32: of float64 on the rows alone to 1e-5, or, where stock float32 on the rows alone
    is further from it (an adapter's large random weights), no further than twice stock's distance."""
    name, dtype, tolerance = IMPLS[impl]
    batch, stock, num_items = made_up_rows(family)
    rows_alone = model_of(dtype, mode, family=family)
    expected_loss, expected = loss_and_grads(rows_alone, stock, num_items)
    loss, grads = loss_and_grads(model_of(dtype, mode, name, family), [batch], num_items)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    if dtype == torch.float32:
        single = expected
        exact = model_of(torch.float64, mode, family=family)
        exact.load_state_dict(model_of(dtype, mode, family=family).state_dict())
        _, expected = loss_and_grads(exact, stock, num_items)
        tolerance = max(tolerance, 2 * worst_difference(single, expected)[0])
    difference, parameter = worst_difference(grads, expected)
    assert difference <= tolerance, parameter
    assert any(gradient.abs().max() > 0 for gradient in grads.values())


@pytest.mark.parametrize(
    ("family", "impl"),
    [
        pytest.param("qwen2_vl", "auto", marks=pytest.mark.smoke),
        ("qwen2_vl", "triton"),
        ("qwen2_5_vl", "auto"),
        ("qwen3_vl", "auto"),
    ],
)
def test_autocast(family, impl):
    """No further from float32 than twice what stock autocast is, rows alone; float16, whose sums the
    interpreter gets right. (Not MoE: a rounding may send a token to another expert.)"""
    batch, stock, num_items = made_up_rows(family)
    model = functools.partial(model_of, torch.float32, "plain", family=family)
    _, exact = loss_and_grads(model(), stock, num_items)
    with torch.autocast("cpu", torch.float16):
        _, theirs = loss_and_grads(model(), stock, num_items)
        _, ours = loss_and_grads(model(impl=impl), [batch], num_items)
    for name, gradient in exact.items():
        budget = 2 * (theirs[name] - gradient).abs().max() + 5e-3 * gradient.abs().max()
        assert (ours[name] - gradient).abs().max() <= budget, name


@pytest.mark.parametrize(
    ("family", "impl", "assemble_on"),
    [
        pytest.param("qwen2_vl", "auto", "host", marks=pytest.mark.smoke),
        pytest.param("qwen2_vl", "triton", "host", marks=pytest.mark.slow),
        ("qwen2_vl", "triton", "device"),
        pytest.param("qwen2_5_vl", "auto", "host", marks=pytest.mark.slow),
        pytest.param("qwen3_vl", "auto", "host", marks=pytest.mark.slow),
        pytest.param("qwen3_vl", "auto", "device", marks=pytest.mark.slow),
        pytest.param("qwen3_vl_moe", "auto", "host", marks=pytest.mark.slow),
        pytest.param("qwen3_5", "auto", "host", marks=pytest.mark.slow),
        pytest.param("qwen3_5_moe", "auto", "device", marks=pytest.mark.slow),
    ],
)
def test_the_whole_step_compiles_into_one_graph(family, impl, assemble_on):
    """Forward and backward, no graph break, the same numbers."""
    batch, _, num_items = made_up_rows(family, assemble_on)
    model = model_of(torch.float32, "plain", impl, family)
    # An eager step, which asks what may be asked once.
    expected = loss_and_grads(model, [batch], num_items)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss, grads = loss_and_grads(compiled, [batch], num_items)
    assert loss == pytest.approx(expected[0], rel=1e-6)
    grads = {name.removeprefix("_orig_mod."): gradient for name, gradient in grads.items()}
    difference, parameter = worst_difference(grads, expected[1])
    assert difference <= 1e-5, parameter


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_no_data_is_asked_for_in_a_step(family, impl):
    """Train mode, forward and backward on the meta device, where a question to the data is an error;
    floats and text alone (uint8 pixels: test_pixels)."""
    batch, _, num_items = made_up_rows(family)
    model = model_of(torch.float32, "plain", impl, family)
    if impl == "auto":
        loss_and_grads(model, [batch], num_items)
    else:
        from mmpack.hf.model_parts import PATCH

        getattr(model.model, PATCH).is_isolated = True  # the self-test reads its own result
    if family.endswith("_moe"):
        model.to(torch.bfloat16)  # the one dtype of torch's grouped products on the meta device
    loss = model.to("meta")(**on_meta(batch), num_items_in_batch=torch.tensor(3)).loss
    loss.backward()
    assert loss.is_meta
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


def on_meta(batch):
    """Tensors on the meta device, host integers as they are."""
    return {
        name: on_meta(value)
        if isinstance(value, dict)
        else value.to("meta")
        if isinstance(value, torch.Tensor)
        else value
        for name, value in batch.items()
    }


def test_a_frozen_tower_saves_nothing():
    """Its outputs have no graph, and gradients reach the rest."""
    batch, _, num_items = made_up_rows()
    model = model_of(torch.float32, "frozen tower", "auto")
    outputs = []
    model.model.visual.register_forward_hook(lambda *args: outputs.append(args[2]))
    model(**batch).loss.backward()
    assert outputs and not outputs[0].pooler_output.requires_grad
    assert model.model.language_model.embed_tokens.weight.grad.abs().max() > 0


@pytest.mark.parametrize("pad_to", [64, 100, 1000])
def test_padding_to_a_shape_changes_nothing(pad_to):

    rows = [encoded(SMALL_SPEC, 1, 2, (2, 4), 3, 4), encoded(SMALL_SPEC, range(5, 60))]
    num_items = 58
    pack = with_noise(rows)
    plain, padded = PackCollator()([pack]), PackCollator(pad_to=pad_to)([pack])
    assert padded["input_ids"].shape[1] == -(-plain["input_ids"].shape[1] // pad_to) * pad_to
    assert (padded["labels"][0, plain["labels"].shape[1] :] == IGNORE).all()
    model = model_of(torch.float32, "plain", "auto")
    loss, grads = loss_and_grads(model, [plain], num_items)
    padded_loss, padded_grads = loss_and_grads(model, [padded], num_items)
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    assert worst_difference(padded_grads, grads)[0] <= 1e-5


def test_the_logits_of_every_token():
    """In the places of `labels`, and the same loss."""

    pack = with_noise([encoded(SMALL_SPEC, 1, (2, 4), 3, 4, 5)])
    model = model_of(torch.float32, "plain", "auto")
    rows, full = PackCollator()([pack]), PackCollator(full_logits=True)([pack])
    one, all_of_them = model(**rows), model(**full)
    assert all_of_them.logits.shape == (1, full["labels"].shape[1], 100)
    torch.testing.assert_close(all_of_them.logits[0, rows["logits_to_keep"]], one.logits[0])
    torch.testing.assert_close(one.loss, all_of_them.loss)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_on_the_gpu_waits_for_nothing(family, impl):
    """Forward, backward and optimizer with torch's alarm on: a host sync is an error."""
    batch, _, num_items = made_up_rows(family)
    config = small_config(family)
    model = patch_model(tiny_model(config).to("cuda", torch.bfloat16), impl=impl)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    batch = to(torch.device("cuda"), batch)
    num_items = torch.tensor(num_items, device="cuda")

    def step():
        model(**batch, num_items_in_batch=num_items).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # compiles, and runs the self-test
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
