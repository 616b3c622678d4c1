"""Samples -> PackPlan: `plan_packs` for samples, whose truncated lengths, costs and images are known exactly."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack.errors import counted, pack_limits
from mmpack.packing.cost import costs_of, image_flops, sizes_of
from mmpack.packing.image_units import UNLIMITED, UnitSizes, units_of
from mmpack.packing.overflow import (
    TOO_LONG_ADVICE,
    OnOverflow,
    fit_sample,
    is_too_long,
    tell_overflow,
)
from mmpack.packing.pack_stats import cost_floor, rank_imbalance
from mmpack.packing.plan import plan_sizes, quantised, room_of
from mmpack.packing.sample_images import SampleImages, images_of
from mmpack.types import EncodedSample, Int64, PackPlan

# With costs, units are at most this part of a pack: the first whose plan is balanced as well as a plan of samples
# must be (`test_balance`), else the one with the best balance. Measured in benchmarks/LOG.md.
_PARTS = (2, 3, 4)
_RANKS, _EXCESS = 8, 0.005


def plan_samples(
    samples: Sequence[EncodedSample],
    capacity: int,
    patch_capacity: int | None,
    on_overflow: OnOverflow,
    seed: int,
    cost: Any = None,
    *,
    frozen: Collection[str] = (),
    group_images: bool = False,
    side: NDArray[Any] | None = None,
) -> PackPlan:
    """Like `plan_packs`, for samples, so that truncated samples are planned with their exact length.

    Args:
        samples: a list or an `EncodedStore`.
        cost, group_images: as in `PackedDataset.from_samples`.
        frozen: parts of the model that are not trained, if `cost` is a config.
        side: (N,) integers, 0 for samples that are in no part of the plan (`part_of`), which may be of any length;
            units have samples of one number only, so that `part_of` a plan has whole units.
    """
    capacity, patch_capacity = pack_limits(capacity, patch_capacity)
    num_tokens, num_patches = sizes_of(samples)
    too_long = is_too_long(num_tokens, num_patches, capacity, patch_capacity)
    if side is not None:  # a sample that is not used takes no pack, so its length is of no interest
        unused = too_long & (side == 0)
        num_tokens[unused] = np.minimum(num_tokens[unused], capacity)
        if patch_capacity is not None:
            num_patches[unused] = np.minimum(num_patches[unused], patch_capacity)
        too_long &= ~unused
    overflow = np.flatnonzero(too_long).tolist()
    room = room_of(capacity, patch_capacity)
    num_used = len(samples) if side is None else int(np.count_nonzero(side))
    truncated: dict[int, EncodedSample] = {}
    if overflow and on_overflow == "error":
        longest = max(overflow, key=lambda n: (int(num_tokens[n]), int(num_patches[n])))
        sample = samples[longest]
        raise ValueError(
            f"too long for a pack of {room}: {len(overflow):,} of {counted(num_used, 'sample')}; the longest, "
            f"row {sample.row} of {sample.source}, has {num_tokens[longest]:,} tokens and "
            f"{num_patches[longest]:,} patches; {TOO_LONG_ADVICE}"
        )
    if on_overflow == "truncate":
        for number in overflow:
            # A sample that would lose its answer keeps its size and is dropped.
            for cut in fit_sample(samples[number], capacity, patch_capacity, "truncate"):
                num_tokens[number], num_patches[number] = cut.num_tokens, cut.num_patches
                truncated[number] = cut
    config = cost if isinstance(cost, Mapping) or hasattr(cost, "model_type") else None
    if config is not None:
        cost = costs_of(samples, config, frozen)
        if truncated:
            cost[list(truncated)] = costs_of(list(truncated.values()), config, frozen)
    how: OnOverflow = "drop" if on_overflow == "truncate" else on_overflow

    limits = capacity, patch_capacity
    if group_images:
        images = images_of(samples, truncated)
        if side is not None:  # an image of two sides is two
            ids = images.ids * (1 + int(side.max(initial=0))) + side[images.sample_of]
            images = replace(images, ids=ids)
        sizes = SampleSizes(num_tokens, num_patches, too_long, cost)
        if config is not None:
            sizes = replace(sizes, image_cost=image_flops(config, images.grid_thw, frozen))
        plan = plan_by_images(images, sizes, limits, seed, how)
    else:
        plan = plan_sizes(num_tokens, num_patches, cost, None, limits, seed, how)

    def name(number: int) -> str:
        return f"row {samples[number].row} of {samples[number].source}"

    for fate, numbers in (("left out", plan.dropped.tolist()), ("cut", list(truncated))):
        tell_overflow(fate, numbers, name, num_used, room)
    return replace(plan, truncated=np.array(list(truncated), dtype=np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class SampleSizes:
    """Sizes of N samples.

    Attributes:
        num_tokens, num_patches: (N,) as they are planned.
        is_alone: (N,) samples that are not planned together with others: those that are too long for a pack.
        cost: (N,) cost of each sample; None: without costs.
        image_cost: (I,) the part of it that is spent on each image; None: unknown, so an image counts in every
            sample.
    """

    num_tokens: Int64
    num_patches: Int64
    is_alone: NDArray[np.bool_]
    cost: Any = None
    image_cost: Int64 | None = None


def plan_by_images(
    images: SampleImages,
    sizes: SampleSizes,
    limits: tuple[int, int | None],
    seed: int,
    on_overflow: OnOverflow,
) -> PackPlan:
    """Plan N samples, those that show the same image together.

    Args:
        images: of these samples.
        sizes: of these samples.
        limits: capacity and patch capacity.
        seed, on_overflow: as in `plan_packs`.
    """
    capacity, patch_capacity = limits
    cost, image_cost = sizes.cost, sizes.image_cost
    if image_cost is None:
        image_cost = np.zeros_like(images.ids)
        cost = None if cost is None else quantised(cost, len(sizes.num_tokens))
    else:
        cost = np.asarray(cost)
    text = np.zeros_like(sizes.num_tokens) if cost is None else cost - images.sums(image_cost)

    def costs_by(unit: Int64) -> Int64:
        costs: Int64 = text + images.counted_once(image_cost, unit)
        return costs

    def planned(unit: Int64) -> PackPlan:
        once = images.counted_once(images.num_patches, unit)
        patches = np.where(sizes.is_alone, sizes.num_patches, once)
        costs = None if cost is None else costs_by(unit)
        return plan_sizes(sizes.num_tokens, patches, costs, unit, limits, seed, on_overflow)

    most_patches = UNLIMITED if patch_capacity is None else patch_capacity
    alone = costs_by(np.arange(len(sizes.num_tokens)))
    whole = UnitSizes(sizes.num_tokens, capacity, most_patches, sizes.is_alone, alone, image_cost)
    unit = units_of(images, whole)
    if cost is None or not alone.any():
        return planned(unit)
    fits = ~is_too_long(sizes.num_tokens, sizes.num_patches, capacity, patch_capacity)
    num_packs = max(1.0, sizes.num_tokens[fits].sum() / capacity)
    mean = costs_by(unit)[fits].astype(np.float64).sum() / num_packs
    plans = []
    for part in _PARTS:
        limited = replace(
            whole,
            most_tokens=capacity // part,
            most_patches=most_patches // part,
            most_cost=int(mean / part),
        )
        unit = units_of(images, limited)
        plan = planned(unit)
        packs = plan.totals(costs_by(unit).astype(np.float64))
        floor = cost_floor(plan, alone, packs)
        excess = rank_imbalance(packs, _RANKS) - rank_imbalance(floor, _RANKS)
        if excess <= _EXCESS:
            return plan
        plans.append((excess, part, plan))
        mean = packs.mean()
    return min(plans, key=lambda one: one[:2])[2]
