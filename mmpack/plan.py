"""Sizes -> PackPlan: which samples share a pack.

Best-fit-decreasing over tokens, or over tokens and vision patches at once, in C++
(`csrc/planner.cpp`). Sizes are all it needs, so a million samples are planned without opening one.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from mmpack.types import Int64, PackPlan

try:
    from mmpack import _native
except ImportError as error:
    raise ImportError(
        "mmpack's C++ core is not built; run: pip install --no-build-isolation --no-deps -e ."
    ) from error

OnOverflow = Literal["error", "drop", "truncate"]


def plan_packs(
    num_tokens: ArrayLike,
    capacity: int,
    *,
    num_patches: ArrayLike | None = None,
    patch_capacity: int | None = None,
    seed: int = 0,
    on_overflow: OnOverflow = "error",
) -> PackPlan:
    """Put N samples into packs that hold at most `capacity` tokens each.

    Args:
        num_tokens: (N,) tokens of each sample, placeholders included.
        capacity: tokens a pack may hold.
        num_patches: (N,) vision patches of each sample; needed with `patch_capacity`.
        patch_capacity: patches a pack may hold, which bounds the vision tower's memory.
        seed: decides the order of the packs and of samples of equal size. The same arguments give
            the same plan on every machine.
        on_overflow: what becomes of a sample that no pack can hold. "error" raises; "drop" leaves
            it out and lists it in `plan.dropped`; "truncate" plans it at the capacity and lists it
            in `plan.truncated`, for the caller to cut with `mmpack.truncate.truncate_sample`.

    Returns:
        The plan: every sample that is not dropped is in exactly one pack, no capacity is exceeded.

    Raises:
        ValueError: sizes or capacities make no sense, or a sample is too long and `on_overflow`
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

    too_long = tokens > capacity
    if patch_capacity is None:
        patches = None
    elif patches is not None:
        too_long |= patches > patch_capacity
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

    order, bin_offsets = _native.best_fit_decreasing(
        tokens[keep],
        capacity,
        None if patches is None else patches[keep],
        patch_capacity or 0,
        seed,
    )
    sample_index = keep[order]
    sums = np.concatenate([[0], tokens[sample_index].cumsum()])
    nothing = np.empty(0, dtype=np.int64)
    return PackPlan(
        sample_index=sample_index,
        bin_offsets=bin_offsets,
        pack_tokens=np.diff(sums[bin_offsets]),
        capacity=capacity,
        patch_capacity=patch_capacity,
        dropped=overflow if on_overflow == "drop" else nothing,
        truncated=overflow if on_overflow == "truncate" else nothing,
    )


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
