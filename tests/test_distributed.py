"""Two processes, one with images and one with text alone: nobody waits, and the step is the same.

The processes are started once for all cases. A collective that one of them does not reach, or reaches
at another place, ends in an error after gloo's timeout.
"""

import contextlib
import datetime
import functools
import os
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from builders import (
    HYBRIDS,
    QUIET,
    SMALL_SPEC,
    collator,
    encoded,
    float64_loss,
    float64_stays,
    loss_and_grads,
    packed,
    small_config,
    small_spec,
    tiny_model,
    worst_difference,
)
from ranks import on_ranks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from mmpack.hf import PackCollator, patch_model

CONFIG = small_config()
SAMPLES = [
    [encoded(SMALL_SPEC, 1, 2, (2, 4), 3, 4), encoded(SMALL_SPEC, 8, (4, 6), (2, 2), 9)],
    [encoded(SMALL_SPEC, 5, 6, 7), encoded(SMALL_SPEC, 10, 11)],
]
PACKS = [packed(samples, seed=n) for n, samples in enumerate(SAMPLES)]
NUM_ITEMS = sum(sample.num_supervised for pack in PACKS for sample in pack)


def plain(model):
    """Nothing but the model."""


def freeze_tower(model):
    """LoRA's setting: a frozen tower whose hook makes its first output require gradients."""
    model.model.visual.requires_grad_(False)
    model.enable_input_require_grads()


def checkpoint(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})


def ddp(model):
    return DistributedDataParallel(patch_model(model))


def ddp_then_patch(model):
    return patch_model(DistributedDataParallel(model))


def fsdp(model, also=(), order="patch first"):
    if order == "patch first":
        patch_model(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    text, tower = model.model.language_model, model.model.visual
    for module in dict.fromkeys((*also, *tower.blocks, *text.layers, model)):
        fully_shard(module, mesh=mesh)
    return patch_model(model)


def fsdp_embedding_alone(model):
    return fsdp(model, also=[model.get_input_embeddings()])


def fsdp_tower_alone(model):
    """What comes out of the tower must be its own output, or nobody gathers its shards again."""
    return fsdp(model, also=[*model.model.visual.blocks, model.model.visual])


def fsdp_then_patch(model):
    return fsdp(model, order="patch last")


# name: (family, prepare, wrap, PackCollator's pixels)
CASES = {
    "ddp": ("qwen2_vl", plain, ddp, "float32"),
    "ddp, then patched": ("qwen2_vl", plain, ddp_then_patch, "float32"),
    "ddp, checkpointing": ("qwen2_vl", checkpoint, ddp, "uint8"),
    "fsdp2": ("qwen2_vl", plain, fsdp, "float32"),
    "fsdp2, then patched": ("qwen2_vl", plain, fsdp_then_patch, "float32"),
    "fsdp2, checkpointing": ("qwen2_vl", checkpoint, fsdp, "uint8"),
    "fsdp2, the embedding a group of its own": (
        "qwen2_vl", plain, fsdp_embedding_alone, "float32",
    ),
    "fsdp2, a frozen tower": ("qwen2_vl", freeze_tower, fsdp, "float32"),
    "ddp, Qwen2.5-VL": ("qwen2_5_vl", checkpoint, ddp, "float32"),
    "fsdp2, Qwen2.5-VL, the tower a group of its own": (
        "qwen2_5_vl", plain, fsdp_tower_alone, "uint8",
    ),
    "fsdp2, Qwen2.5-VL, then patched": ("qwen2_5_vl", plain, fsdp_then_patch, "float32"),
    "ddp, Qwen3-VL": ("qwen3_vl", plain, ddp, "uint8"),
    "fsdp2, Qwen3-VL, checkpointing": ("qwen3_vl", checkpoint, fsdp, "float32"),
    "fsdp2, Qwen3-VL, a frozen tower": ("qwen3_vl", freeze_tower, fsdp_tower_alone, "float32"),
    "ddp, Qwen3-VL-MoE": ("qwen3_vl_moe", plain, ddp, "float32"),
    "fsdp2, Qwen3-VL-MoE": ("qwen3_vl_moe", plain, fsdp, "uint8"),
    "ddp, Qwen3.5": ("qwen3_5", plain, ddp, "float32"),
    "fsdp2, Qwen3.5, checkpointing": ("qwen3_5", checkpoint, fsdp, "float32"),
    "fsdp2, Qwen3.5-MoE, then patched": ("qwen3_5_moe", plain, fsdp_then_patch, "float32"),
    "fsdp2, Qwen2.5-VL, videos beside text": ("qwen2_5_vl", plain, fsdp, "uint8"),
    "fsdp2, Qwen3-VL, videos beside images": ("qwen3_vl", plain, fsdp, "float32"),
}  # fmt: skip


def pack_of(case, rank):
    """One rank has images, or videos alone; the other none, or images alone."""
    family, samples = CASES[case][0], SAMPLES[rank]
    if "videos" in case:
        films = [encoded(small_spec(family), 1, (2, 2, 4), 3, 4)]
        samples = (films, SAMPLES[0 if "images" in case else 1])[rank]
    return packed(samples, family, seed=rank)


def model_of(family):
    """float64 for Qwen3.5, of which one process in float32 is 2e-4 from it."""
    if family not in HYBRIDS:
        return tiny_model(small_config(family))
    model = tiny_model(small_config(family), dtype=torch.float64)
    model.loss_function = float64_loss
    return model


def step(rank, case):
    """(this rank's share of the loss, every parameter's gradient) of a step over both packs."""
    family, prepare, wrap, pixels = CASES[case]
    model = model_of(family)
    prepare(model)
    wrapped = wrap(model)
    batch = PackCollator(model=wrapped, pixels=pixels)([pack_of(case, rank)])
    with float64_stays() if family in HYBRIDS else contextlib.nullcontext():
        loss = wrapped(**batch, num_items_in_batch=torch.tensor(NUM_ITEMS)).loss
        (loss * 2).backward()  # ranks' gradients are averaged
    return loss.item(), gradients(model)


def gradients(model):
    grads = {n: torch.zeros(p.shape) if p.grad is None else p.grad for n, p in unwrapped(model)}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in grads.items()}


def unwrapped(model):
    return [(name.removeprefix("module."), p) for name, p in model.named_parameters()]


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads = gradients(model)


def trainer_step(folder):
    """(logged loss, gradients) of one step of Trainer: it shards the packs and averages over ranks."""
    keep = KeepGradients()
    args = TrainingArguments(
        **QUIET,
        output_dir=folder,
        max_steps=1,
        max_grad_norm=0.0,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
    )
    trainer = Trainer(
        model=patch_model(tiny_model(CONFIG)),
        args=args,
        train_dataset=PACKS,
        data_collator=PackCollator(),
        callbacks=[keep],
    )
    trainer.train()
    return float(trainer.state.log_history[0]["loss"]), keep.grads


def work(folder):
    """One of the two processes: every case, its result or its error in a file."""
    torch.set_num_threads(1)
    folder, rank = Path(folder), int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    for case in (*CASES, "trainer"):
        try:
            result = trainer_step(folder) if case == "trainer" else step(rank, case)
        except Exception:
            traceback.print_exc()
            os._exit(1)
        torch.save(result, folder / f"{case}.{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Case -> what each of the two ranks has to say."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(work, folder)

    def result_of(case):
        return [torch.load(folder / f"{case}.{rank}.pt") for rank in range(2)]

    return result_of


@pytest.fixture(scope="module")
def expected():
    """Both packs in one process, by family and, in cases with videos, by case."""

    @functools.cache
    def compute(family, case=None):
        packs = [
            packed(samples, family, n) if case is None else pack_of(case, n)
            for n, samples in enumerate(SAMPLES)
        ]
        batches = [collator(family)([pack]) for pack in packs]
        return loss_and_grads(patch_model(model_of(family)), batches, NUM_ITEMS)

    return compute


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_step(case, results, expected):
    (loss, grads), (other_loss, other_grads) = results(case)
    family, prepare, _, _ = CASES[case]
    expected_loss, exact = expected(family, case if "videos" in case else None)
    assert loss + other_loss == pytest.approx(expected_loss, rel=1e-5)
    assert grads.keys() == other_grads.keys() == exact.keys()
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
    if prepare is freeze_tower:
        assert all((g == 0).all() for n, g in grads.items() if "visual" in n)
        exact = {n: torch.zeros_like(g) if "visual" in n else g for n, g in exact.items()}
    difference, name = worst_difference(grads, exact)
    assert difference <= (1e-10 if family in HYBRIDS else 1e-5), name


def test_a_trainer_on_two_ranks(results, expected):
    """Two packs of 15 and 3 supervised tokens count by their tokens, as if one process had both."""
    (loss, grads), (_, other_grads) = results("trainer")
    expected_loss, exact = expected("qwen2_vl")
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for ours in (grads, other_grads):
        difference, name = worst_difference(ours, exact)
        assert difference <= 1e-5, name
