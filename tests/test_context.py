"""Context parallelism: loss and gradients of ranks that share packs equal those of their rows alone in stock."""

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
    collator,
    encoded,
    float64_loss,
    loss_and_grads,
    small_config,
    small_spec,
    stock_of,
    tiny_model,
    with_noise,
    worst_difference,
)
from ranks import on_ranks

from mmpack import ContextGroup
from mmpack.hf import PackCollator, patch_model

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def rows_of(name, family):
    """The rows of a pack: lists of what `encoded` takes, those of one number with one image."""
    spec = small_spec(family)
    return {
        "mixed": [
            encoded(spec, 1, 2, (2, 4), 3, 4),
            encoded(spec, range(5, 40)),
            encoded(spec, 8, (4, 6), (6, 2), 9, 10),
            encoded(spec, 11, (2, 4, 4), 12, (2, 4), 13, (3, 4, 2), 14),
        ],
        "one long image": [encoded(spec, 1, (10, 12), 2, 3), encoded(spec, 4, 5)],
        "text": [encoded(spec, range(5, 20)), encoded(spec, range(30, 55))],
        "a video": [encoded(spec, 1, (3, 4, 4), 2, 3), encoded(spec, range(5, 20))],
        "images first": [encoded(spec, 1, (2, 4), (4, 4), 2), encoded(spec, range(5, 60))],
    }[name]


@functools.cache
def packs_of(name, family):
    """(an item per row, stock inputs of each row)"""
    packs = [with_noise([row], seed) for seed, row in enumerate(rows_of(name, family))]
    return packs, [stock_of(collator(family)([pack]), small_spec(family)) for pack in packs]


def model_of(family, dtype):
    model = tiny_model(small_config(family), dtype=dtype)
    if dtype == torch.float64:
        model.loss_function = float64_loss
    return model


CASES = {
    f"mixed, {family}, {dtype}": ("mixed", family, dtype)
    for family in ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", *HYBRIDS)
    for dtype in (torch.float64, torch.float32)
}
CASES |= {
    name: (name, "qwen2_vl", torch.float64)
    for name in ("mixed", "one long image", "text", "a video", "images first")
}
CASES["mixed, float32"] = ("mixed", "qwen2_vl", torch.float32)


def work(folder):
    """One of the ranks: every case, its loss and gradients in a file."""
    torch.set_num_threads(1)
    folder, rank = Path(folder), int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    for case, (name, family, dtype) in CASES.items():
        try:
            packs, stock = packs_of(name, family)
            model = patch_model(
                model_of(family, dtype),
                context=ContextGroup.of(rank, dist.get_world_size(), dist.get_world_size()),
            )
            batch = PackCollator(model=model)(packs)
            loss, grads = loss_and_grads(model, [batch], supervised(stock))
            total = torch.tensor(loss, dtype=torch.float64)
            for tensor in (total, *grads.values()):
                dist.all_reduce(tensor)
        except Exception:
            traceback.print_exc()
            os._exit(1)
        if rank == 0:
            torch.save((total.item(), grads), folder / f"{case}.pt")
    dist.destroy_process_group()


def supervised(stock):
    return sum(int((inputs["labels"][0, 1:] != -100).sum()) for inputs in stock)


@functools.cache
def expected(name, family, dtype):
    _, stock = packs_of(name, family)
    return loss_and_grads(model_of(family, dtype), stock, supervised(stock))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(work, folder)
    return lambda case: torch.load(folder / f"{case}.pt")


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_share_packs_are_rows_alone(case, results):
    loss, grads = results(case)
    name, family, dtype = CASES[case]
    exact, exact_grads = expected(name, family, dtype)
    bound = TOLERANCE[dtype]
    if dtype == torch.float32 and family in HYBRIDS:  # twice stock's own error
        bound = 2 * worst_difference(exact_grads, expected(name, family, torch.float64)[1])[0]
    assert loss == pytest.approx(exact, rel=TOLERANCE[dtype])
    difference, name = worst_difference(grads, exact_grads)
    assert difference <= bound, name
