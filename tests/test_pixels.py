"""uint8 pixels the whole way: collator, worker, device, tower."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from builders import (
    FAMILIES,
    SMALL_SPEC,
    encoded,
    float64_loss,
    loss_and_grads,
    small_spec,
    tiny_config,
    tiny_model,
    with_noise,
    worst_difference,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader

from mmpack import Encoder, assemble
from mmpack.hf import PackCollator, patch_model, unpatch_model

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("wide_tiles")]
SAMPLES = [
    encoded(SMALL_SPEC, 1, 2, (2, 4), 3, 4),
    encoded(SMALL_SPEC, 5, 6, 7),
    encoded(SMALL_SPEC, 8, (4, 6), (2, 2), 9),
]
PACKS = [with_noise([sample], n) for n, sample in enumerate(SAMPLES)]
NUM_ITEMS = 6


def model_of(dtype=torch.float32, spec=SMALL_SPEC, family="qwen2_vl"):
    model = tiny_model(tiny_config(vocab_size=100, vision=spec, family=family), dtype=dtype)
    if dtype == torch.float64:
        model.loss_function = float64_loss
    return model


def packs_of(spec):
    samples = [dataclasses.replace(sample, vision=spec) for sample in SAMPLES]
    return [with_noise([sample], n) for n, sample in enumerate(samples)]


def uint8_batch(model, packs=PACKS):
    return PackCollator(model=model, pixels="uint8")(packs)


@pytest.fixture
def calls(monkeypatch):
    """(pixels' dtype, weight's type and dtype) of every call of the op."""
    import mmpack.ops

    seen = []
    real = mmpack.ops.patch_embed

    def record(stills, video, weight, *rest, impl):
        seen.append((stills.dtype, type(weight), weight.dtype))
        return real(stills, video, weight, *rest, impl=impl)

    monkeypatch.setattr(mmpack.ops, "patch_embed", record)
    return seen


def test_the_batch_holds_the_packs_own_bytes():
    model = patch_model(model_of())
    batch, floats = uint8_batch(model), PackCollator()(PACKS)
    pixels, whole = batch["pixel_values"], assemble([s for pack in PACKS for s in pack])
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.from_numpy(whole.pixels))
    assert 8 * pixels.nbytes == floats["pixel_values"].nbytes
    assert batch["mmpack"].keys() - floats["mmpack"].keys() == {"normalization"}
    assert all(torch.equal(batch[k], floats[k]) for k in ("input_ids", "labels", "position_ids"))
    text = PackCollator(model=model, pixels="uint8")([PACKS[1]])
    assert "pixel_values" not in text
    assert model(**text).loss.isfinite()


def test_the_collator_keeps_the_flag_and_not_the_model():
    collate = PackCollator(model=patch_model(model_of()), pixels="uint8")
    assert not any(isinstance(value, nn.Module) for value in vars(collate).values())


def test_what_cannot_read_bytes_is_told():
    model = model_of()
    with pytest.raises(ValueError, match="needs a patched model, but no model was passed"):
        PackCollator(pixels="uint8")
    with pytest.raises(ValueError, match="Qwen2VLForConditionalGeneration is not patched"):
        PackCollator(model=model, pixels="uint8")
    with pytest.raises(ValueError, match="pixels must be 'float32' or 'uint8', got 'bf16'"):
        PackCollator(model=patch_model(model), pixels="bf16")
    collate = PackCollator(Encoder(None, SMALL_SPEC), model=model, pixels="uint8")
    ids = torch.tensor([1, 92, 90, 93])
    feature = {"input_ids": ids, "labels": ids, "pixel_values": torch.zeros(4, 1176)}
    with pytest.raises(ValueError, match="processor outputs have float pixel_values"):
        collate([{**feature, "image_grid_thw": torch.tensor([[1, 2, 2]])}])
    unpatch_model(model)
    with pytest.raises(ValueError, match="Qwen2VLForConditionalGeneration is not patched"):
        PackCollator(model=model, pixels="uint8")


def exact_rows(packs):
    """Each row alone as stock transformers takes it, pixels normalised in float64."""
    for pack in packs:
        alone = PackCollator()([pack])
        row = {name: alone[name] for name in ("input_ids", "labels")}
        row["mm_token_type_ids"] = (alone["input_ids"] == 90).int()
        if "pixel_values" in alone:
            vision = pack[0].vision
            mean, std = (
                torch.tensor(x, dtype=torch.float64)[:, None]
                for x in (vision.image_mean, vision.image_std)
            )
            pixels = torch.from_numpy(assemble(pack).pixels).unflatten(1, (3, -1)).double()
            still = ((pixels / 255 - mean) / std)[:, :, None]
            row["pixel_values"] = still.expand(-1, -1, vision.temporal_patch_size, -1).flatten(1)
            row["image_grid_thw"] = alone["image_grid_thw"]
        yield row


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("family", "patch_size"), [("qwen2_vl", 16), *((f, small_spec(f).patch_size) for f in FAMILIES)]
)
def test_the_theorem(dtype, family, patch_size):
    """Loss and gradients of a pack of bytes equal those of its rows in the stock model, to 1e-10 in
    float64, where the stock model's pixels are normalised in float64 too."""
    spec = dataclasses.replace(SMALL_SPEC, patch_size=patch_size)
    packs = packs_of(spec)
    rows = [
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in row.items()}
        for row in exact_rows(packs)
    ]
    expected = loss_and_grads(model_of(dtype, spec, family), rows, NUM_ITEMS)
    model = patch_model(model_of(dtype, spec, family))
    loss, grads = loss_and_grads(model, [uint8_batch(model, packs)], NUM_ITEMS)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert abs(loss - expected[0]) <= tolerance * expected[0]
    difference, name = worst_difference(grads, expected[1])
    assert difference <= tolerance, name


class Wrapped(nn.Conv3d):
    """Stands for whatever is more than a convolution (LoRA's)."""


NOT_BARE = {
    "a subclass": lambda conv: setattr(conv, "__class__", Wrapped),
    "a hook": lambda conv: conv.register_forward_hook(lambda module, args, out: out),
    "a replaced forward": lambda conv: setattr(conv, "forward", conv.forward),
}


@pytest.mark.parametrize("kind", ["bare", *NOT_BARE])
def test_a_projection_that_is_more_is_called(kind, calls):
    models = [patch_model(model_of()), patch_model(model_of())]
    expected = loss_and_grads(models[0], [PackCollator()(PACKS)], NUM_ITEMS)
    assert calls == []
    if kind != "bare":
        NOT_BARE[kind](models[1].model.visual.patch_embed.proj)
    loss, grads = loss_and_grads(models[1], [uint8_batch(models[1])], NUM_ITEMS)
    assert bool(calls) == (kind == "bare")
    assert loss == pytest.approx(expected[0], rel=1e-6)
    difference, name = worst_difference(grads, expected[1])
    assert difference <= 2e-5, name


def test_autocast_is_no_further_from_float32_than_stock():
    model = patch_model(model_of())
    floats, pixels = PackCollator()(PACKS), uint8_batch(model)
    exact = loss_and_grads(model, [floats], NUM_ITEMS)
    with torch.autocast("cpu", torch.bfloat16):
        stock = loss_and_grads(model, [floats], NUM_ITEMS)
        ours = loss_and_grads(model, [pixels], NUM_ITEMS)
    assert abs(ours[0] - exact[0]) <= 2 * abs(stock[0] - exact[0]) + 2e-3 * exact[0]
    for name, grad in exact[1].items():
        budget = 2 * (stock[1][name] - grad).abs().max() + 2e-2 * grad.abs().max()
        assert (ours[1][name] - grad).abs().max() <= budget, name


def test_workers_and_accelerate_leave_the_bytes_alone():
    """A DataLoader's worker process, then what Trainer moves batches with."""
    model = patch_model(model_of())
    collate = PackCollator(model=model, pixels="uint8")
    expected = collate([PACKS[0]])
    loader = DataLoader(PACKS, collate_fn=collate, num_workers=1)
    batch = send_to_device(next(iter(loader)), torch.device("cpu"))
    assert batch["pixel_values"].dtype == torch.uint8
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert batch["mmpack"]["normalization"] == expected["mmpack"]["normalization"]
    meta = send_to_device(expected, torch.device("meta"))
    assert (meta["pixel_values"].device.type, meta["pixel_values"].dtype) == ("meta", torch.uint8)
    assert meta["mmpack"]["normalization"] == expected["mmpack"]["normalization"]


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("alone", [None, "patch_embed", "proj"])
def test_fsdp2_casts_floats_and_leaves_bytes(alone, mesh, calls):
    """Under its mixed precision bytes and the two normalisation rows reach the tower as they are, and
    the weight comes gathered and cast; a projection sharded by itself is called as a module."""
    how = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    expected = loss_and_grads(
        patch_model(model_of()), [uint8_batch(patch_model(model_of()))], NUM_ITEMS
    )
    calls.clear()
    model = patch_model(model_of())
    tower = model.model.visual
    if alone:
        fully_shard(tower.patch_embed if alone == "patch_embed" else tower.patch_embed.proj, **how)
    for block in (*tower.blocks, *model.model.language_model.layers):
        fully_shard(block, **how)
    fully_shard(model, **how)
    seen = []
    tower.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    loss = model(**uint8_batch(model), num_items_in_batch=torch.tensor(NUM_ITEMS)).loss
    loss.backward()
    assert seen == [torch.uint8]
    assert calls == ([] if alone == "proj" else [(torch.uint8, nn.Parameter, torch.bfloat16)])
    assert loss.item() == pytest.approx(expected[0], rel=2e-3)
    exact = expected[1]["model.visual.patch_embed.proj.weight"]
    grad = tower.patch_embed.proj.weight.grad.full_tensor()
    assert (grad - exact).abs().max() <= 0.05 * exact.abs().max()


def test_zero_3_gathers_the_weight(monkeypatch, calls):
    """DeepSpeed's own partitioning, in one process on the CPU: bytes pass, the weight is gathered where
    it is read, its gradient is partitioned again."""
    deepspeed = pytest.importorskip("deepspeed")
    from deepspeed.utils import safe_get_full_grad

    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", 29511)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    model = patch_model(model_of())
    batch = uint8_batch(model)
    loss, grads = loss_and_grads(model, [batch], NUM_ITEMS)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    calls.clear()
    sharded = engine(**batch, num_items_in_batch=torch.tensor(NUM_ITEMS)).loss
    engine.backward(sharded)
    weight = model.model.visual.patch_embed.proj.weight
    exact = grads["model.visual.patch_embed.proj.weight"]
    assert weight.numel() == 0
    assert [(dtype, kind) for dtype, _, kind in calls] == [(torch.uint8, torch.bfloat16)]
    assert sharded.item() == pytest.approx(loss, rel=2e-3)
    assert (safe_get_full_grad(weight) - exact).abs().max() <= 0.05 * exact.abs().max()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("family", "impl"), [("qwen2_vl", "triton"), *((family, "auto") for family in FAMILIES)]
)
def test_a_step_asks_the_device_nothing(family, impl):
    """Forward and backward on the meta device, which raises where data are read."""
    spec = small_spec(family)
    model = patch_model(model_of(spec=spec, family=family), impl=impl)
    batch = uint8_batch(model, packs_of(spec))
    model(**batch)  # the self-test of isolation, which does ask
    if family == "qwen3_vl_moe":
        model.to(torch.bfloat16)  # the one dtype of torch's grouped products on the meta device
    loss = model.to("meta")(**send_to_device(batch, torch.device("meta"))).loss
    loss.backward()
    assert (loss.device.type, loss.shape) == ("meta", ())
    assert all(p.grad.shape == p.shape for p in model.parameters())
