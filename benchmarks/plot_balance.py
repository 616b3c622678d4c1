"""Draw what each rank has to do in each step, LLaMA-Factory's plan against ours.

    python -m benchmarks.plot_balance docs/balance.png

Rows and costs are those of `bench_plan`; LLaMA-Factory's planner is called as it calls it, on 1,000 rows
at a time.
"""

from __future__ import annotations

import sys

import numpy as np
from matplotlib.figure import Figure

from benchmarks.bench_plan import LENGTHS, as_plan, real_rows, synthetic_rows
from benchmarks.planners import planners
from mmpack import plan_packs
from mmpack.mixture import rank_imbalance

CAPACITY, RANKS, STEPS = 8192, 16, 40


def main(path: str) -> None:
    """Write the picture to `path`."""
    tokens, flops = real_rows() if LENGTHS.is_file() else synthetic_rows(150_000)
    keep = tokens <= CAPACITY
    tokens, flops = tokens[keep], flops[keep]
    name, plan = next(item for item in planners().items() if "knapsack by" in item[0])
    plans = {
        f"LLaMA-Factory {name.split()[1]}": as_plan(plan(tokens, CAPACITY), tokens, CAPACITY),
        "mmpack": plan_packs(tokens, CAPACITY, cost=flops),
    }
    # A white ground of its own is readable on light and dark pages.
    figure = Figure(figsize=(9, 3.4), layout="constrained", facecolor="white")
    axes = figure.subplots(1, 2, sharey=True)
    for place, (title, plan), color in zip(axes, plans.items(), ("#cc3311", "#0077bb")):
        packs = plan.totals(flops.astype(np.float64)) / flops.sum() * plan.num_packs
        dealt = np.random.default_rng(0).permutation(packs)[: RANKS * STEPS].reshape(STEPS, RANKS)
        steps = np.arange(STEPS)
        place.vlines(steps, dealt.min(axis=1), dealt.max(axis=1), color="#dddddd", linewidth=3)
        place.plot(steps, dealt, ".", color="#777777", markersize=3)
        place.plot(steps, dealt.max(axis=1), "_", color=color, markersize=8, markeredgewidth=2)
        waits = 1 - 1 / rank_imbalance(packs, RANKS)
        place.axhline(1, color="black", linewidth=0.8)
        place.set(
            title=f"{title}\npacks {plan.utilization:.1%} full, ranks wait {waits:.1%} of the time",
            xlabel="step",
            ylim=(0, 2.1),
        )
        place.title.set_fontsize(10)
        place.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"cost of each of {RANKS} ranks\n(1 = mean pack)")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
