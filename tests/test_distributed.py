"""Two processes, one with images and one with text alone: nobody waits, and the step is the same.

The processes are started once for all cases. A collective that one of them does not reach, or reaches
at another place, ends in an error after gloo's timeout.
"""

import datetime
import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from builders import (
    QUIET,
    SMALL_SPEC,
    encoded,
    loss_and_grads,
    tiny_config,
    tiny_model,
    with_noise,
    worst_difference,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from mmpack import assemble
from mmpack.hf import PackCollator, patch_model

CONFIG = tiny_config(vocab_size=100, vision=SMALL_SPEC)
SAMPLES = [
    [encoded(SMALL_SPEC, 1, 2, (2, 4), 3, 4), encoded(SMALL_SPEC, 8, (4, 4), (2, 2), 9)],
    [encoded(SMALL_SPEC, 5, 6, 7), encoded(SMALL_SPEC, 10, 11)],
]
PACKS = [with_noise(assemble(samples, pixels=False), n) for n, samples in enumerate(SAMPLES)]
NUM_ITEMS = sum(len(pack.supervised_index) for pack in PACKS)


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
    for module in (*also, *tower.blocks, *text.layers, model):
        fully_shard(module, mesh=mesh)
    return patch_model(model)


def fsdp_embedding_alone(model):
    return fsdp(model, also=[model.get_input_embeddings()])


def fsdp_then_patch(model):
    return fsdp(model, order="patch last")


# name: (prepare, wrap, PackCollator's pixels)
CASES = {
    "ddp": (plain, ddp, "float32"),
    "ddp, then patched": (plain, ddp_then_patch, "float32"),
    "ddp, checkpointing": (checkpoint, ddp, "uint8"),
    "fsdp2": (plain, fsdp, "float32"),
    "fsdp2, then patched": (plain, fsdp_then_patch, "float32"),
    "fsdp2, checkpointing": (checkpoint, fsdp, "uint8"),
    "fsdp2, the embedding a group of its own": (plain, fsdp_embedding_alone, "float32"),
    "fsdp2, a frozen tower": (freeze_tower, fsdp, "float32"),
}


def step(rank, case):
    """(this rank's share of the loss, every parameter's gradient) of a step over both packs."""
    prepare, wrap, pixels = CASES[case]
    model = tiny_model(CONFIG)
    prepare(model)
    wrapped = wrap(model)
    batch = PackCollator(model=wrapped, pixels=pixels)([PACKS[rank]])
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


def work(rank, port, folder):
    """One of the two processes: every case, its result or its error in a file."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    for case in (*CASES, "trainer"):
        try:
            result = trainer_step(folder) if case == "trainer" else step(rank, case)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, folder / f"{case}.{rank}.pt")
        if isinstance(result, str):
            os._exit(1)  # the other one waits in a collective, until its timeout
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Case -> what each of the two ranks has to say."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = mp.spawn(work, (port, folder), nprocs=2, join=False).processes
    for process in processes:
        process.join(timeout=150)
        if process.is_alive():
            process.kill()
            process.join()

    def result_of(case):
        paths = [folder / f"{case}.{rank}.pt" for rank in range(2)]
        ranks = [torch.load(path) if path.is_file() else "did not get to it" for path in paths]
        errors = [result for result in ranks if isinstance(result, str)]
        assert not errors, "\n".join(errors)
        return ranks

    return result_of


@pytest.fixture(scope="module")
def expected():
    """Both packs in one process."""
    return loss_and_grads(
        patch_model(tiny_model(CONFIG)), [PackCollator()([p]) for p in PACKS], NUM_ITEMS
    )


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_step(case, results, expected):
    (loss, grads), (other_loss, other_grads) = results(case)
    assert loss + other_loss == pytest.approx(expected[0], rel=1e-5)
    assert grads.keys() == other_grads.keys() == expected[1].keys()
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
    exact = expected[1]
    if CASES[case][0] is freeze_tower:
        assert all((g == 0).all() for n, g in grads.items() if "visual" in n)
        exact = {n: torch.zeros_like(g) if "visual" in n else g for n, g in exact.items()}
    difference, name = worst_difference(grads, exact)
    assert difference <= 1e-5, name


def test_a_trainer_on_two_ranks(results, expected):
    """Two packs of 15 and 3 supervised tokens count by their tokens, as if one process had both."""
    (loss, grads), (_, other_grads) = results("trainer")
    assert loss == pytest.approx(expected[0], rel=1e-5)
    for ours in (grads, other_grads):
        difference, name = worst_difference(ours, expected[1])
        assert difference <= 1e-5, name
