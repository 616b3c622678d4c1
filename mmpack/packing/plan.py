"""Sizes -> PackPlan: which samples share a pack.

Best-fit-decreasing over tokens (for packing text: arXiv 2404.10830), or over tokens and vision patches at
once (`csrc/planner.cpp`); given costs too, packs that are as full and cost the same (`csrc/balance.cpp`).
Sizes are all it needs, so a million samples are planned without opening one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mmpack import _native
from mmpack.packing.cost import costs_of, sizes_of
from mmpack.packing.overflow import OnOverflow, fit_sample, is_too_long
from mmpack.types import EncodedSample, Int64, PackPlan


def plan_packs(
    num_tokens: ArrayLike,
    capacity: int,
    *,
    num_patches: ArrayLike | None = None,
    patch_capacity: int | None = None,
    cost: ArrayLike | None = None,
    seed: int = 0,
    on_overflow: OnOverflow = "error",
) -> PackPlan:
    """Put N samples into packs that hold at most `capacity` tokens each.

    Args:
        num_tokens: (N,) tokens of each sample, placeholders included.
        capacity: tokens a pack may hold.
        num_patches: (N,) vision patches of each sample; needed with `patch_capacity`.
        patch_capacity: patches a pack may hold, which bounds the vision tower's memory.
        cost: (N,) what each sample costs, in any unit (`mmpack.packing.cost.sample_flops`); not negative. Every
            pack then costs at most 1/400 more than the larger of the mean and its costliest sample, as
            far as a search of bounded length gets; capacities stay hard. The number of packs may be
            larger than without, while 99.5 % of their room is used, or 97 % where fewer packs
            cannot cost the same: `mmpack.packing.pack_stats.busiest` says how close they are.
        seed: decides the order of the packs and of samples of equal size. The same arguments give
            the same plan on every machine.
        on_overflow: what becomes of a sample that no pack can hold. "error" raises; "drop" leaves
            it out and lists it in `plan.dropped`; "truncate" plans it at the capacity and lists it
            in `plan.truncated`, for the caller to cut with `mmpack.packing.truncate.truncate_sample`.

    Returns:
        The plan: every sample that is not dropped is in exactly one pack, no capacity is exceeded.

    Raises:
        ValueError: sizes, costs or capacities make no sense, or a sample is too long and `on_overflow`
            is "error"; the message counts them and names the longest.
    """
    tokens = _sizes(num_tokens, "num_tokens")
    patches = None if num_patches is None else _sizes(num_patches, "num_patches")
    if capacity < 1 or (patch_capacity is not None and patch_capacity < 1):
        raise ValueError(f"capacities must be positive, got {capacity} and {patch_capacity}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if patch_capacity is not None and patches is None:
        raise ValueError("patch_capacity needs num_patches, the patches of every sample")
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

    return _plan(
        PackPlan(
            sample_index=keep,
            bin_offsets=np.empty(0, dtype=np.int64),
            pack_tokens=np.empty(0, dtype=np.int64),
            capacity=capacity,
            patch_capacity=patch_capacity,
            dropped=overflow if on_overflow == "drop" else overflow[:0],
            truncated=overflow if on_overflow == "truncate" else overflow[:0],
            num_tokens=tokens,
            num_patches=patches,
            cost=None if cost is None else _quantised(cost, len(tokens)),
            seed=seed,
        ),
        seed,
    )


def plan_samples(
    samples: Sequence[EncodedSample],
    capacity: int,
    patch_capacity: int | None,
    on_overflow: OnOverflow,
    seed: int,
    cost: Any = None,
) -> PackPlan:
    """`plan_packs` for samples at hand, so that truncation is planned at its exact length. `cost` is
    as in `PackedDataset.from_samples`."""
    num_tokens, num_patches = sizes_of(samples)
    too_long = is_too_long(num_tokens, num_patches, capacity, patch_capacity)
    overflow = np.flatnonzero(too_long).tolist()
    truncated = {}
    if overflow and on_overflow == "error":
        longest = max(overflow, key=lambda n: (int(num_tokens[n]), int(num_patches[n])))
        sample = samples[longest]
        room = f"{capacity:,} tokens"
        if patch_capacity is not None:
            room += f" and {patch_capacity:,} patches"
        raise ValueError(
            f"{len(overflow)} of {len(samples)} samples are too long for a pack of {room}; row "
            f"{sample.row} of {sample.source} has {num_tokens[longest]:,} tokens and "
            f"{num_patches[longest]:,} patches. Raise the capacity, or choose to drop or truncate"
        )
    if on_overflow == "truncate":
        for number in overflow:
            # One that loses its answer keeps its size and is dropped.
            for cut in fit_sample(samples[number], capacity, patch_capacity, "truncate"):
                num_tokens[number], num_patches[number] = cut.num_tokens, cut.num_patches
                truncated[number] = cut
    if isinstance(cost, Mapping) or hasattr(cost, "model_type"):
        config, cost = cost, costs_of(samples, cost)
        if truncated:
            cost[list(truncated)] = costs_of(list(truncated.values()), config)
    plan = plan_packs(
        num_tokens,
        capacity,
        num_patches=num_patches,
        patch_capacity=patch_capacity,
        cost=cost,
        seed=seed,
        on_overflow="drop" if on_overflow == "truncate" else on_overflow,
    )
    return replace(plan, truncated=np.array(list(truncated), dtype=np.int64))


def plan_epoch(plan: PackPlan, epoch: int) -> PackPlan:
    """The plan of another epoch: other packs of the same samples, as many of them.

    A pure function of the plan and the epoch, so that every worker of every rank finds the same one.
    The number of packs does not depend on the seed: best-fit-decreasing's bins have the same shapes
    for every order of equal samples, and `balance` derives its number from theirs and from totals.

    Args:
        plan: what `plan_packs` returned; it is the plan of epoch 0.
        epoch: from 0.

    Raises:
        ValueError: a negative epoch, or a plan that `plan_packs` has not made.
    """
    if epoch < 0:
        raise ValueError(f"epoch must not be negative, got {epoch}")
    if epoch == 0:
        return plan
    seed = np.random.SeedSequence([plan.seed, epoch]).generate_state(1, np.uint64)[0]
    other = _plan(replace(plan, sample_index=np.sort(plan.sample_index)), int(seed))
    if other.num_packs != plan.num_packs:  # no plan of ours: a file may say anything
        raise ValueError(
            f"the plan has {plan.num_packs:,} packs, its samples and capacity make "
            f"{other.num_packs:,} in epoch {epoch}; pack again with --overwrite"
        )
    return other


def _plan(plan: PackPlan, seed: int) -> PackPlan:
    """The plan with its `sample_index` put into packs."""
    keep = plan.sample_index
    cost = None if plan.cost is None else plan.cost[keep]
    order, bin_offsets = _native.plan(
        plan.num_tokens[keep],
        plan.capacity,
        None if plan.num_patches is None else plan.num_patches[keep],
        plan.patch_capacity or 0,
        cost if cost is not None and cost.any() else None,
        seed,
    )
    planned = replace(plan, sample_index=keep[order], bin_offsets=bin_offsets)
    return replace(planned, pack_tokens=planned.totals(plan.num_tokens))


def _quantised(cost: ArrayLike, num_samples: int) -> Int64:
    """Integers, for sums that do not depend on their order; together about 2^52."""
    costs = np.asarray(cost)
    if costs.shape != (num_samples,) or not np.issubdtype(costs.dtype, np.number):
        raise ValueError(
            f"cost must be a flat array of {num_samples} numbers, got {costs.dtype} {costs.shape}"
        )
    costs = costs.astype(np.float64)
    if not np.isfinite(costs).all() or (costs < 0).any():
        worst = int(np.flatnonzero(~(costs >= 0) | ~np.isfinite(costs))[0])
        raise ValueError(f"cost must be finite and not negative, sample {worst} has {costs[worst]}")
    total = math.fsum(costs)
    if total:
        costs = costs / total * 2.0**52  # two roundings, the same on every machine
    return np.rint(costs).astype(np.int64)


def padded_utilization(num_tokens: ArrayLike, batch_size: int = 8, seed: int = 0) -> float:
    """Share of data in the computed tokens when shuffled batches are padded to their longest:
    what a plan's `utilization` is to be compared with."""
    tokens = _sizes(num_tokens, "num_tokens")
    shuffled = np.random.default_rng(seed).permutation(tokens)
    batches = [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
    room = sum(len(batch) * int(batch.max()) for batch in batches)
    return float(tokens.sum()) / room if room else 1.0


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
        f"{len(overflow)} of {len(tokens)} samples are too long for a pack; sample {longest} needs "
        f"{has}, the capacity is {limit}. Raise the capacity, or pass on_overflow='drop' or "
        "'truncate'"
    )
