"""The composition of a plan's packs, and how long ranks wait for each other.

A pack should have the same mix as the data set. A plan that sorts by size can put all images into the same packs,
which is an unintended curriculum and makes steps in which one rank works while the others wait.
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
    """The busiest rank's cost divided by the mean rank's, averaged over steps.

    Packs are dealt to ranks in random order, one per rank and step, `rounds` times; an incomplete last step is
    ignored.

    Args:
        pack_cost: (num_packs,) cost of each pack.
        num_ranks: data-parallel ranks.
        rounds: number of random orders to average over.
        seed: seed of the orders.

    Returns:
        At least 1.0, which means that no rank waits; 1.0 also if there is no full step.

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


def cost_floor(
    plan: PackPlan, cost: NDArray[Any], pack_cost: NDArray[Any] | None = None
) -> Float64:
    """The lowest possible cost of each pack: the mean, or its costliest sample if that costs more.

    A sample of more than half a pack may cost so little that the room beside it, at the cost per token of the
    costliest sample that fits, does not bring its pack to the mean. The pack then has that cost, and the mean is
    of the other packs, which have what it lacks.

    Args:
        plan: a plan of N samples.
        cost: (N,) cost of each sample.
        pack_cost: (num_packs,) cost of each pack (`mmpack.packing.sample_images.pack_costs`); default: the sum of
            its samples', which counts an image again for each of them.

    Returns:
        (num_packs,) float64, in the unit of `cost`.

    Raises:
        ValueError: `cost` and the plan have different numbers of samples.
    """
    if len(cost) != len(plan.num_tokens):
        raise ValueError(f"{len(cost)} costs for a plan of {len(plan.num_tokens)} samples")
    if not plan.num_packs:
        return np.empty(0)
    costs = np.asarray(cost, dtype=np.float64)[plan.sample_index]
    costliest = np.maximum.reduceat(costs, plan.bin_offsets[:-1])
    most = _most_cost(plan, costs)
    total = costs.sum() if pack_cost is None else np.asarray(pack_cost, dtype=np.float64).sum()
    is_cheap, mean = np.zeros(plan.num_packs, dtype=bool), total / plan.num_packs
    while (cheaper := most < mean).sum() > is_cheap.sum() and not cheaper.all():
        is_cheap = cheaper
        mean = (total - most[is_cheap].sum()) / (~is_cheap).sum()
    floor: Float64 = np.minimum(most, np.maximum(costliest, mean))
    return floor


def _most_cost(plan: PackPlan, costs: Float64) -> Float64:
    """(num_packs,) what a pack with the longest sample of each pack can cost; infinite if that is at most half as
    long as a pack, because then another plan may put several of them together. `costs` are in the plan's order."""
    tokens, first = plan.num_tokens[plan.sample_index], plan.bin_offsets[:-1]
    longest = np.maximum.reduceat(tokens, first)
    is_longest = tokens == np.repeat(longest, np.diff(plan.bin_offsets))
    of_longest = np.maximum.reduceat(np.where(is_longest, costs, 0.0), first)
    order = np.argsort(tokens)
    highest = np.maximum.accumulate(
        costs[order] / tokens[order]
    )  # per token, of this and shorter ones
    room = plan.capacity - longest
    num_fit = np.searchsorted(tokens[order], room, side="right")
    beside = room * np.concatenate([[0.0], highest])[num_fit]
    most: Float64 = np.where(2 * longest > plan.capacity, of_longest + beside, np.inf)
    return most


def busiest(
    plan: PackPlan, cost: NDArray[Any], pack_cost: NDArray[Any] | None = None
) -> tuple[float, float]:
    """The cost of the costliest pack and its lower bound, both relative to the mean pack.

    Args:
        plan: a plan of N samples.
        cost: (N,) cost of each sample.
        pack_cost: as in `cost_floor`.

    Returns:
        (cost, floor): the floor is the larger of 1 and the costliest sample's cost. Plans are further above it if
        packs have few samples, each a large part of the pack's cost.

    Raises:
        ValueError: `cost` and the plan have different numbers of samples.
    """
    if len(cost) != len(plan.num_tokens):
        raise ValueError(f"{len(cost)} costs for a plan of {len(plan.num_tokens)} samples")
    costs = np.asarray(cost, dtype=np.float64)
    packs = plan.totals(costs) if pack_cost is None else np.asarray(pack_cost, dtype=np.float64)
    if not packs.any():
        return 1.0, 1.0
    floor = max(1.0, costs[plan.sample_index].max() / packs.mean())
    return float(packs.max() / packs.mean()), float(floor)


def token_shares(
    plan: PackPlan, group: Sequence[str] | NDArray[Any]
) -> dict[str, dict[str, float]]:
    """The share of tokens from each group of samples, overall and its spread over packs.

    Args:
        group: (N,) name of each sample's group, such as its file.

    Returns:
        For each group, largest first: its `share` of all planned tokens, and percentiles `p10`, `p50`, `p90` of
        its share of a pack's tokens.
    """
    names, number = np.unique(np.asarray(group), return_inverse=True)
    kept, num_packs = plan.sample_index, plan.num_packs
    packs = np.repeat(np.arange(num_packs), np.diff(plan.bin_offsets))
    # Only pairs of a group and a pack that occur: a thousand files times all packs would take minutes.
    pairs, place = np.unique(number[kept] * max(1, num_packs) + packs, return_inverse=True)
    group_of, pack_of = np.divmod(pairs, max(1, num_packs))
    tokens = np.bincount(place, plan.num_tokens[kept], len(pairs))
    parts = tokens / np.maximum(plan.pack_tokens, 1)[pack_of]
    sums = np.bincount(group_of, tokens, len(names)) / max(1, int(plan.pack_tokens.sum()))
    bounds = np.searchsorted(group_of, np.arange(len(names) + 1))
    shares = {
        str(name): _spread(sums[n], parts[bounds[n] : bounds[n + 1]], num_packs)
        for n, name in enumerate(names)
    }
    return dict(sorted(shares.items(), key=lambda item: -item[1]["share"]))


def image_shares(
    plan: PackPlan, group: Sequence[str] | NDArray[Any], image_tokens: Int64
) -> dict[str, float]:
    """The share of image tokens in each group of samples.

    Args:
        group: (N,) name of each sample's group.
        image_tokens: (N,) image tokens of each sample.
    """
    kept = plan.sample_index
    names, number = np.unique(np.asarray(group)[kept], return_inverse=True)
    images = np.bincount(number, image_tokens[kept])
    whole = np.bincount(number, plan.num_tokens[kept])
    return {str(name): round(float(s), 4) for name, s in zip(names, images / whole)}


def share_spread(plan: PackPlan, tokens: Int64) -> dict[str, float]:
    """`share`, `p10`, `p50` and `p90` as in `token_shares`, for (N,) tokens of each sample."""
    part, whole = plan.totals(tokens), np.maximum(plan.pack_tokens, 1)
    share = part.sum() / max(1, int(plan.pack_tokens.sum()))
    return _spread(share, part / whole, plan.num_packs)


def _spread(share: float, parts: Float64, num_packs: int) -> dict[str, float]:
    """`share`, and percentiles over `num_packs` packs of `parts`, to which zeros are added."""
    num_zeros, parts = num_packs - len(parts), np.sort(parts)
    values = [share]
    for quantile in (0.1, 0.5, 0.9):
        place = quantile * max(0, num_packs - 1)
        low = int(place)
        ends = [
            0.0 if n < num_zeros else parts[n - num_zeros] for n in (low, low + 1) if n < num_packs
        ]
        values.append(float(np.interp(place - low, [0, 1][: len(ends)], ends)) if ends else 0.0)
    return {
        name: round(float(value), 4) for name, value in zip(("share", "p10", "p50", "p90"), values)
    }
