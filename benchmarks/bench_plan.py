"""How long do ranks wait for each other, and how full are packs, compared with other planners?

Cost is the FLOPs of a training step on Qwen2-VL-2B (`mmpack.packing.cost`). Imbalance is the busiest rank's cost
divided by the mean rank's, averaged over steps, with packs dealt in random order. Its floor, which is the ceiling
of this benchmark, is the imbalance of the same plan if each pack cost the larger of the mean and its costliest
sample. Seconds are CPU time of one thread. Peers: the planners of TRL, LLaMA-Factory, axolotl and ms-swift
(binpacking). Rows are the real lengths in random order, if they are beside the checkout, and a synthetic million.
`test_ranks` records the cost of each rank in each step.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from benchmarks.harness import SHARED
from benchmarks.model_configs import QWEN2_VL_2B
from benchmarks.planners import WINDOW, planners_of
from mmpack import PackPlan, plan_packs
from mmpack.packing.cost import sample_flops
from mmpack.packing.pack_stats import cost_floor, rank_imbalance

CAPACITIES = (4096, 8192, 32768)
RANKS = (8, 64)
LENGTHS = SHARED / "lengths" / "sft_mix.npz"
STEPS, RANKS_SHOWN = 40, 16
PEERS = [  # their dependencies conflict with ours
    pytest.param(name, marks=pytest.mark.peer(f"--no-deps {name}", name))
    for name in ("trl", "llamafactory", "axolotl", "binpacking")
]

pytestmark = pytest.mark.cpu


def real_rows() -> tuple[np.ndarray, np.ndarray]:
    """(tokens, FLOPs) of the rows with their own images, without NLVR's many small ones."""
    data = np.load(LENGTHS)
    tokens = data["text_tokens"].astype(np.int64) + data["image_tokens"]
    grids = np.stack([np.ones_like(data["grid_h"]), data["grid_h"], data["grid_w"]], axis=1)
    flops = sample_flops(QWEN2_VL_2B, tokens, data["answer_tokens"], grids, data["image_offset"])
    keep = np.flatnonzero(~data["imputed"] & (data["sources"][data["source"]] != "nlvr"))
    keep = np.random.default_rng(0).permutation(keep)
    return tokens[keep], flops[keep]


def synthetic_rows(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, FLOPs): two thirds text only, the others with one to six images of 56 to 1008 pixels per side;
    log-normal text lengths, of which a third to all is supervised."""
    rng = np.random.default_rng(0)
    text = np.minimum(20 + rng.lognormal(4.6, 0.9, num_rows), 4000).astype(np.int64)
    supervised = (text * rng.uniform(1 / 3, 1, num_rows)).astype(np.int64)
    num_images = np.where(
        rng.random(num_rows) < 2 / 3, 0, np.minimum(rng.geometric(0.7, num_rows), 6)
    )
    offsets = np.concatenate([[0], num_images.cumsum()])
    grids = 2 * rng.integers(2, 37, (offsets[-1], 3))
    grids[:, 0] = 1
    features = np.concatenate([[0], (grids[:, 1] * grids[:, 2] // 4).cumsum()])
    tokens = text + features[offsets[1:]] - features[offsets[:-1]]
    return tokens, sample_flops(QWEN2_VL_2B, tokens, supervised, grids, offsets)


def as_plan(bins: list[list[int]], tokens: np.ndarray, capacity: int) -> PackPlan:
    """A peer's bins as a plan, checked to have each sample once and to exceed no capacity."""
    order = np.concatenate([np.array(bin, dtype=np.int64) for bin in bins])
    assert np.array_equal(np.sort(order), np.arange(len(tokens)))
    offsets = np.cumsum([0, *map(len, bins)])
    pack_tokens = np.add.reduceat(tokens[order], offsets[:-1])
    assert pack_tokens.max() <= capacity
    nothing = order[:0]
    limits = (capacity, None, nothing, nothing)
    return PackPlan(order, offsets, pack_tokens, *limits, tokens, None, None, 0)


def figures(plan: PackPlan, flops: np.ndarray) -> dict[str, tuple[str, float]]:
    """All metrics of a plan except its time: metric -> (unit, value)."""
    found = {"packs": ("1", float(plan.num_packs)), "utilization": ("1", plan.utilization)}
    packs, floor = plan.totals(flops.astype(np.float64)), cost_floor(plan, flops)
    for ranks in RANKS:
        found[f"imbalance {ranks}"] = ("1", rank_imbalance(packs, ranks, seed=1))
        found[f"floor {ranks}"] = ("1", rank_imbalance(floor, ranks, seed=1))
    return found


@pytest.fixture(scope="module", params=["real", "synthetic"])
def rows(request, quick):
    if request.param == "real":
        if not LENGTHS.is_file():
            pytest.skip("needs the real lengths, which are not here")
        return "real", *real_rows()
    return "synthetic", *synthetic_rows(20_000 if quick else 1_000_000)


def compare_plans(planners, capacity, rows, recorder, rounds):
    """Record time and metrics of plans for the rows that fit."""
    name, tokens, flops = rows
    keep = tokens <= capacity
    tokens, flops = tokens[keep], flops[keep]
    config = f"{name} rows={len(tokens)} left out={int((~keep).sum())}"
    common = {"x": ("capacity", capacity), "config": config}
    print()
    for impl, make in planners.items():
        seconds = []
        for _ in range(rounds):
            start = time.process_time()
            plan = make(tokens, flops)
            seconds.append(time.process_time() - start)
        found = figures(plan, flops)
        recorder.add("plan", impl, "plan", metric="time", unit="s", values=seconds, **common)
        for metric, (unit, value) in found.items():
            recorder.add("plan", impl, "plan", metric=metric, unit=unit, values=[value], **common)
        line = ", ".join(f"{metric} {value:.5g}" for metric, (_, value) in found.items())
        print(f"{name} {capacity} {impl}: {np.median(seconds):.2f} s, {line}")


def ours(capacity):
    return {
        "mmpack": lambda tokens, flops: plan_packs(tokens, capacity),
        "mmpack by cost": lambda tokens, flops: plan_packs(tokens, capacity, cost=flops),
    }


def theirs(peer, capacity):
    return {
        name: lambda tokens, flops, plan=plan: as_plan(plan(tokens, capacity), tokens, capacity)
        for name, plan in planners_of(peer).items()
    }


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_plan(capacity, rows, benchmark, recorder, quick):
    if quick and capacity != 8192:
        pytest.skip("not among the quick cases")
    compare_plans(ours(capacity), capacity, rows, recorder, 1 if quick else 3)
    _, tokens, flops = rows
    few = tokens <= capacity
    benchmark.pedantic(
        lambda: plan_packs(tokens[few], capacity, cost=flops[few]), rounds=1
    )  # fmt: skip


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("peer", PEERS)
def test_peer(peer, capacity, rows, recorder, quick):
    if quick and capacity != 8192:
        pytest.skip("not among the quick cases")
    compare_plans(theirs(peer, capacity), capacity, rows, recorder, 1)


def ranks(planners, recorder):
    """Record the cost of each rank in some steps, with packs dealt at random; 1 is the mean pack's cost."""
    capacity = 8192
    is_real = LENGTHS.is_file()
    tokens, flops = real_rows() if is_real else synthetic_rows(150_000)
    keep = tokens <= capacity
    tokens, flops = tokens[keep], flops[keep]
    for impl, make in planners.items():
        plan = make(tokens, flops)
        packs = plan.totals(flops.astype(np.float64)) / flops.sum() * plan.num_packs
        waits = 1 - 1 / rank_imbalance(packs, RANKS_SHOWN)
        dealt = np.random.default_rng(0).permutation(packs)[: RANKS_SHOWN * STEPS]
        common = {
            "unit": "1",
            "config": f"{'real' if is_real else 'synthetic'} rows, capacity={capacity} ranks={RANKS_SHOWN}",
        }
        for step, costs in enumerate(dealt.reshape(STEPS, RANKS_SHOWN)):
            for metric, values in (("cost", costs), ("busiest", [costs.max()])):
                recorder.add(
                    "ranks", impl, "step", metric=metric, values=values, x=("step", step), **common
                )  # fmt: skip
        for metric, value in (("waiting", waits), ("utilization", plan.utilization)):
            recorder.add(
                "ranks", impl, "epoch", metric=metric, values=[value], x=("", 0), **common
            )  # fmt: skip
        print(f"{impl}: packs {plan.utilization:.1%} full, ranks wait {waits:.1%} of the time")


def test_ranks(recorder):
    ranks(ours(8192), recorder)


@pytest.mark.peer("--no-deps llamafactory", "llamafactory")
def test_ranks_of_llamafactory(recorder):
    by_window = {n: p for n, p in theirs("llamafactory", 8192).items() if n.endswith(f" {WINDOW}")}
    ranks(by_window, recorder)
