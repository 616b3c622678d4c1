"""Sizes -> PackPlan: which samples share a pack.

Best-fit-decreasing over tokens (for text packing: arXiv 2404.10830), or over tokens and vision patches together
(`csrc/planner.cpp`); with costs, packs that are equally full and cost the same (`csrc/balance.cpp`). Planning
needs only sizes, so a million samples are planned without reading one.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from mmpack import _native
from mmpack.errors import counted, integer, pack_limits
from mmpack.packing.overflow import TOO_LONG_ADVICE, OnOverflow, is_too_long, tell_overflow
from mmpack.types import Int64, PackPlan


def plan_packs(
    num_tokens: ArrayLike,
    capacity: int,
    cost: ArrayLike | None = None,
    *,
    num_patches: ArrayLike | None = None,
    patch_capacity: int | None = None,
    unit: ArrayLike | None = None,
    seed: int = 0,
    on_overflow: OnOverflow = "error",
) -> PackPlan:
    """Plan N samples into packs of at most `capacity` tokens.

    Args:
        num_tokens: (N,) tokens of each sample, placeholders included.
        capacity: maximum tokens per pack.
        cost: (N,) cost of each sample, in any unit (`mmpack.packing.cost.sample_flops`), not negative. The planner
            then searches, for a bounded time, for packs that each cost at most 1/400 more than the larger of the
            mean and the pack's costliest sample. Capacities are never exceeded. There may be more packs than
            without costs, down to 99.5 % full, or 97 % if fewer packs cannot cost the same;
            `mmpack.packing.pack_stats.busiest` measures the result.
        num_patches: (N,) vision patches of each sample; needed with `patch_capacity`.
        patch_capacity: maximum patches per pack, which bounds the vision tower's memory.
        unit: (N,) integers; samples of equal number are planned as one, and share a pack in every epoch. Default:
            each sample is a unit. `PackedDataset.from_samples(group_images=True)` makes units of samples that show
            the same images.
        seed: decides the order of packs, and of samples of equal size. The same arguments give the same plan on
            every machine.
        on_overflow: what to do with a sample that exceeds a pack. "error" raises; "drop" leaves it out, lists
            it in `plan.dropped` and logs how many there are; "truncate" plans it at the capacity and lists it in
            `plan.truncated`; the caller must cut it with `mmpack.packing.truncate.truncate_sample`.

    Returns:
        The plan: every sample that is not dropped is in exactly one pack, and no capacity is exceeded.

    Raises:
        ValueError: sizes, costs or capacities are invalid, a unit does not fit a pack, or a sample is too long and
            `on_overflow` is "error"; the message counts the samples and names the longest.
    """
    limits = capacity, patch_capacity
    plan = plan_sizes(num_tokens, num_patches, cost, unit, limits, seed, on_overflow)
    for fate, numbers in (("left out", plan.dropped), ("planned at the capacity", plan.truncated)):
        room = room_of(capacity, patch_capacity)
        tell_overflow(fate, numbers.tolist(), "sample {}".format, len(plan.num_tokens), room)
    return plan


def plan_sizes(
    num_tokens: ArrayLike,
    num_patches: ArrayLike | None,
    cost: ArrayLike | None,
    unit: ArrayLike | None,
    limits: tuple[int, int | None],
    seed: int,
    on_overflow: OnOverflow,
) -> PackPlan:
    """`plan_packs`, which also tells what it left out. `limits`: capacity and patch capacity."""
    capacity, patch_capacity = pack_limits(*limits)
    seed = integer(seed, "seed")
    tokens = _sizes(num_tokens, "num_tokens")
    patches = None if num_patches is None else _sizes(num_patches, "num_patches")
    if capacity < 1 or (patch_capacity is not None and patch_capacity < 1):
        raise ValueError(
            f"capacity and patch_capacity must be positive, got {capacity} and {patch_capacity}"
        )
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if patch_capacity is not None and patches is None:
        raise ValueError("patch_capacity needs num_patches, the patches of each sample")
    if patches is not None and len(patches) != len(tokens):
        raise ValueError(f"{len(tokens)} num_tokens but {len(patches)} num_patches")

    if patch_capacity is None:
        patches = None
    too_long = is_too_long(tokens, patches, capacity, patch_capacity)
    overflow = np.flatnonzero(too_long)
    keep = np.arange(len(tokens))
    if on_overflow == "truncate":
        tokens = np.minimum(tokens, capacity)
        patches = None if patches is None else np.minimum(patches, patch_capacity or 0)
    elif on_overflow == "drop":
        keep = np.flatnonzero(~too_long)
    elif on_overflow != "error":
        raise ValueError(f"on_overflow must be 'error', 'drop' or 'truncate', got {on_overflow!r}")
    elif len(overflow):
        raise ValueError(_overflow_message(tokens, patches, overflow, capacity, patch_capacity))

    plan = PackPlan(
        sample_index=keep,
        bin_offsets=np.empty(0, dtype=np.int64),
        pack_tokens=np.empty(0, dtype=np.int64),
        capacity=capacity,
        patch_capacity=patch_capacity,
        dropped=overflow if on_overflow == "drop" else overflow[:0],
        truncated=overflow if on_overflow == "truncate" else overflow[:0],
        num_tokens=tokens,
        num_patches=patches,
        cost=None if cost is None else quantised(cost, len(tokens)),
        seed=seed,
        unit=None if unit is None else _checked_units(unit, len(tokens)),
    )
    return assigned(plan, seed)


def plan_epoch(plan: PackPlan, epoch: int) -> PackPlan:
    """The plan of another epoch: the same samples and number of packs, but other packs.

    Depends only on the plan and the epoch, so every worker of every rank computes the same plan. The number of
    packs does not depend on the seed: the bins of best-fit-decreasing have the same shapes for every order of
    equal samples, and `balance` derives its number from them and from totals.

    Args:
        plan: a plan from `plan_packs`, which is the plan of epoch 0.
        epoch: from 0.

    Raises:
        ValueError: the epoch is negative, or the plan was not made by `plan_packs`.
    """
    epoch = integer(epoch, "epoch")
    if epoch < 0:
        raise ValueError(f"epoch must not be negative, got {epoch}")
    if epoch == 0:
        return plan
    seed = np.random.SeedSequence([plan.seed, epoch]).generate_state(1, np.uint64)[0]
    other = assigned(replace(plan, sample_index=np.sort(plan.sample_index)), int(seed))
    if other.num_packs != plan.num_packs:  # not from `plan_packs`: plan files are not trusted
        raise ValueError(
            f"the plan has {plan.num_packs:,} packs, but its samples and capacity give "
            f"{other.num_packs:,} in epoch {epoch}; pack again with --overwrite"
        )
    return other


def assigned(plan: PackPlan, seed: int) -> PackPlan:
    """The plan with the samples in `sample_index` assigned to packs, by units if it has any; without units, a
    sample may occur several times."""
    members, starts = _by_unit(plan)

    def of_units(values: Int64) -> Int64:
        sums: Int64 = values[members]
        return sums if plan.unit is None or not len(starts) else np.add.reduceat(sums, starts)

    tokens = of_units(plan.num_tokens)
    patches = None if plan.num_patches is None else of_units(plan.num_patches)
    cost = None if plan.cost is None else of_units(plan.cost)
    for name, sizes, most in (
        ("tokens", tokens, plan.capacity),
        ("patches", patches, plan.patch_capacity),
    ):
        if plan.unit is not None and sizes is not None and len(sizes) and sizes.max() > most:
            largest = int(sizes.argmax())
            number = plan.unit[members[starts[largest]]]
            raise ValueError(
                f"unit {number} has {sizes[largest]:,} {name} in all its samples, but a pack holds {most:,}; only "
                "samples that fit a pack together can be a unit"
            )
    order, bin_offsets = _native.plan(
        tokens,
        plan.capacity,
        patches,
        plan.patch_capacity or 0,
        cost if cost is not None and cost.any() else None,
        seed,
    )
    if plan.unit is not None:
        lengths = np.diff(np.append(starts, len(members)))[order]
        ends = np.concatenate([[0], lengths.cumsum()])
        bin_offsets = ends[bin_offsets]
        order = np.repeat(starts[order] - ends[:-1], lengths) + np.arange(len(members))
    planned = replace(plan, sample_index=members[order], bin_offsets=bin_offsets)
    return replace(planned, pack_tokens=planned.totals(plan.num_tokens))


def _by_unit(plan: PackPlan) -> tuple[Int64, Int64]:
    """(planned samples, ordered by unit; where each unit begins among them)."""
    if plan.unit is None:
        return plan.sample_index, np.arange(len(plan.sample_index))
    units = plan.unit[plan.sample_index]
    order = np.argsort(units, kind="stable")
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = np.diff(units[order]) != 0
    return plan.sample_index[order], np.flatnonzero(is_first)


def _checked_units(unit: ArrayLike, num_samples: int) -> Int64:
    units = np.asarray(unit)
    if units.shape != (num_samples,) or not (
        units.size == 0 or np.issubdtype(units.dtype, np.integer)
    ):
        raise ValueError(
            f"unit must be a flat array of {num_samples} integers, got {units.dtype} {units.shape}"
        )
    return units.astype(np.int64)


def quantised(cost: ArrayLike, num_samples: int, total: float | None = None) -> Int64:
    """Costs as integers of which `total`, by default their sum, is about 2^52, so that sums do not depend on their
    order."""
    costs = np.asarray(cost)
    if costs.shape != (num_samples,) or not np.issubdtype(costs.dtype, np.number):
        got = f"got {costs.dtype} {costs.shape}"
        if not costs.shape:
            got = f"or for a data set the model's config, got a {type(cost).__name__}"
        raise ValueError(f"cost must be a flat array of {num_samples} numbers, {got}")
    costs = costs.astype(np.float64)
    if not np.isfinite(costs).all() or (costs < 0).any():
        worst = int(np.flatnonzero(~(costs >= 0) | ~np.isfinite(costs))[0])
        raise ValueError(f"cost must be finite and not negative, sample {worst} has {costs[worst]}")
    total = math.fsum(costs) if total is None else total
    if total:
        costs = costs / total * 2.0**52  # two roundings, the same on every machine
    return np.rint(costs).astype(np.int64)


def padded_utilization(num_tokens: ArrayLike, batch_size: int = 8, seed: int = 0) -> float:
    """The share of real tokens if shuffled batches are padded to their longest sample, for comparison with a
    plan's `utilization`."""
    tokens = _sizes(num_tokens, "num_tokens")
    shuffled = np.random.default_rng(seed).permutation(tokens)
    batches = [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
    room = sum(len(batch) * int(batch.max()) for batch in batches)
    return float(tokens.sum()) / room if room else 1.0


def room_of(capacity: int, patch_capacity: int | None) -> str:
    """A pack's limits in words."""
    patches = "" if patch_capacity is None else f" and {patch_capacity:,} patches"
    return f"{capacity:,} tokens{patches}"


def _sizes(values: ArrayLike, name: str) -> Int64:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(
            f"{name} must be a flat array of integers, got {array.dtype} {array.shape}"
        )
    if array.size and array.min() < 0:
        raise ValueError(f"{name} must not be negative, sample {int(array.argmin())} is")
    return array.astype(np.int64)


def _overflow_message(
    tokens: Int64,
    patches: Int64 | None,
    overflow: Int64,
    capacity: int,
    patch_capacity: int | None,
) -> str:
    longest = int(overflow[tokens[overflow].argmax()])
    has, limit = f"{tokens[longest]:,} tokens", f"{capacity:,}"
    if tokens[longest] <= capacity and patches is not None:
        longest = int(overflow[patches[overflow].argmax()])
        has, limit = f"{patches[longest]:,} patches", f"{patch_capacity:,}"
    return (
        f"too long for a pack: {len(overflow):,} of {counted(len(tokens), 'sample')}; sample {longest} needs "
        f"{has}, the capacity is {limit}; {TOO_LONG_ADVICE}"
    )
