"""What the packs of a plan are made of, and how long ranks wait for each other.

A pack should be a miniature of the data set: a plan that sorts by size can put all pictures into the
same packs, which is a curriculum nobody asked for, and steps in which one rank works and the others
wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack.types import Int64, PackPlan

Float64 = NDArray[np.float64]


def rank_imbalance(
    pack_cost: NDArray[Any], num_ranks: int, *, rounds: int = 10, seed: int = 0
) -> float:
    """How much longer a step takes than its work evenly spread: mean over steps of max / mean.

    Packs are dealt to the ranks in random order, one a step, `rounds` times over; a step that would
    not have a pack for every rank is left out.

    Args:
        pack_cost: (num_packs,) cost of each pack.
        num_ranks: data-parallel ranks.
        rounds: orders of the packs to average over.
        seed: decides the orders.

    Returns:
        At least 1.0, which means that no rank waits; 1.0 too where there is no full step.

    Raises:
        ValueError: `num_ranks` or `rounds` is not positive.
    """
    if num_ranks < 1 or rounds < 1:
        raise ValueError(f"num_ranks and rounds must be positive, got {num_ranks} and {rounds}")
    rng = np.random.default_rng(seed)
    full = len(pack_cost) // num_ranks * num_ranks
    steps = [rng.permutation(pack_cost)[:full].reshape(-1, num_ranks) for _ in range(rounds)]
    costs = np.concatenate(steps).astype(np.float64)
    costs = costs[costs.any(axis=1)]
    return float((costs.max(axis=1) / costs.mean(axis=1)).mean()) if len(costs) else 1.0


def cost_floor(plan: PackPlan, cost: NDArray[Any]) -> Float64:
    """The least each pack can cost: the mean, or its costliest sample where that is more.

    Args:
        plan: of N samples.
        cost: (N,) cost of every sample.

    Returns:
        (num_packs,) float64, in the unit of `cost`.

    Raises:
        ValueError: `cost` is not of as many samples as the plan.
    """
    if len(cost) != len(plan.num_tokens):
        raise ValueError(f"{len(cost)} costs for a plan of {len(plan.num_tokens)} samples")
    if not plan.num_packs:
        return np.empty(0)
    costs = np.asarray(cost, dtype=np.float64)[plan.sample_index]
    costliest = np.maximum.reduceat(costs, plan.bin_offsets[:-1])
    floor: Float64 = np.maximum(costliest, costs.sum() / plan.num_packs)
    return floor


def busiest(plan: PackPlan, cost: NDArray[Any]) -> tuple[float, float]:
    """The cost of the costliest pack, and its floor, both over the mean pack's.

    Args:
        plan: of N samples.
        cost: (N,) cost of every sample.

    Returns:
        (cost, floor): the floor is the larger of 1 and the costliest sample's cost. A plan stays further above
        it where a pack has few samples, each a large part of its cost.

    Raises:
        ValueError: `cost` is not of as many samples as the plan.
    """
    if len(cost) != len(plan.num_tokens):
        raise ValueError(f"{len(cost)} costs for a plan of {len(plan.num_tokens)} samples")
    costs = np.asarray(cost, dtype=np.float64)
    packs = plan.totals(costs)
    if not packs.any():
        return 1.0, 1.0
    floor = max(1.0, costs[plan.sample_index].max() / packs.mean())
    return float(packs.max() / packs.mean()), float(floor)


def token_shares(
    plan: PackPlan, group: Sequence[str] | NDArray[Any]
) -> dict[str, dict[str, float]]:
    """Which share of its tokens a pack has from each group of samples: in all, and its spread.

    Args:
        group: (N,) name of the group every sample is from, its file say.

    Returns:
        For each group, the largest first, `share` of all planned tokens, and `p10`, `p50`, `p90` over
        the packs of its share of a pack's tokens.
    """
    names, number = np.unique(np.asarray(group), return_inverse=True)
    shares = {
        str(name): share_spread(plan, np.where(number == n, plan.num_tokens, 0))
        for n, name in enumerate(names)
    }
    return dict(sorted(shares.items(), key=lambda item: -item[1]["share"]))


def image_shares(
    plan: PackPlan, group: Sequence[str] | NDArray[Any], image_tokens: Int64
) -> dict[str, float]:
    """Which share of the tokens of each group of samples is images.

    Args:
        group: (N,) name of the group every sample is from.
        image_tokens: (N,) tokens of its images.
    """
    kept = plan.sample_index
    names, number = np.unique(np.asarray(group)[kept], return_inverse=True)
    images = np.bincount(number, image_tokens[kept])
    whole = np.bincount(number, plan.num_tokens[kept])
    return {str(name): round(float(s), 4) for name, s in zip(names, images / whole)}


def share_spread(plan: PackPlan, tokens: Int64) -> dict[str, float]:
    """`share`, `p10`, `p50` and `p90` as in `token_shares`, of (N,) tokens of every sample."""
    part, whole = plan.totals(tokens), np.maximum(plan.pack_tokens, 1)
    quantiles = np.percentile(part / whole, [10, 50, 90]) if plan.num_packs else np.zeros(3)
    share = part.sum() / max(1, int(plan.pack_tokens.sum()))
    return {
        name: round(float(value), 4)
        for name, value in zip(("share", "p10", "p50", "p90"), [share, *quantiles])
    }
