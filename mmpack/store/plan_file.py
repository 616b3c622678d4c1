"""A `PackPlan` in files: `plan.json` and `plan.*.npy` of a store."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from mmpack.store.mapped_arrays import ArrayType, load_arrays, save_arrays
from mmpack.store.records import damaged
from mmpack.types import Int64, PackPlan

_ARRAYS: dict[str, ArrayType] = {
    "sample_index": ("int64", ("planned",)),
    "bin_offsets": ("int64", ("packs + 1",)),
    "pack_tokens": ("int64", ("packs",)),
    "dropped": ("int64", ("dropped",)),
    "truncated": ("int64", ("truncated",)),
    "unused?": ("int64", ("unused",)),
    "num_tokens": ("int64", ("N",)),
    "num_patches?": ("int64", ("N",)),
    "cost?": ("int64", ("N",)),
    "unit?": ("int64", ("N",)),
}
_VALUES = {
    "capacity": range(1, 1 << 63),
    "patch_capacity": (None, range(1, 1 << 63)),
    "seed": range(1 << 64),
}


def save_plan(plan: PackPlan, folder: str | os.PathLike[str], name: str = "plan") -> None:
    """Write a plan into a store's folder, as `NAME.json` and `NAME.*.npy`."""
    values = {
        name: None if getattr(plan, name) is None else int(getattr(plan, name)) for name in _VALUES
    }
    others = {f.name: getattr(plan, f.name) for f in fields(plan) if f.name not in _VALUES}
    if not len(plan.unused):
        del others["unused"]
    arrays = {name: array for name, array in others.items() if array is not None}
    save_arrays(folder, name, _ARRAYS, arrays, values)


def load_plan(folder: str | os.PathLike[str], name: str = "plan") -> PackPlan:
    """Read a plan that `save_plan` wrote; its arrays are views of mapped files.

    Raises:
        ValueError: it is damaged or not a valid plan: a sample is missing or in two packs, or a pack is too full.
    """
    arrays, values = load_arrays(folder, name, _ARRAYS, _VALUES)
    plan = PackPlan(**{"num_patches": None, "cost": None, "unit": None, **arrays, **values})
    if flaw := _flaw(plan):
        raise damaged(Path(folder) / f"{name}.json", flaw)
    return plan


def _flaw(plan: PackPlan) -> str:
    """Why a plan is not valid; empty if it is. Values are used as indices only after their range is checked."""
    num_samples, order, offsets = len(plan.num_tokens), plan.sample_index, plan.bin_offsets
    for name in ("num_tokens", "num_patches", "cost"):
        values = getattr(plan, name)
        if values is not None and len(values) and values.min() < 0:
            return f"{name} of sample {int(values.argmin())} is negative"
    for name in ("sample_index", "dropped", "truncated", "unused"):
        numbers: Int64 = getattr(plan, name)
        if len(numbers) and not (0 <= numbers.min() and numbers.max() < num_samples):
            return f"{name} names samples that are not among the {num_samples:,}"
    others = (plan.dropped, plan.truncated, plan.unused)
    if any((np.diff(numbers) < 1).any() for numbers in others):
        return "the samples it drops, cuts or does not use are not in ascending order"
    is_placed = np.zeros(num_samples, dtype=bool)
    is_placed[order] = is_placed[plan.dropped] = is_placed[plan.unused] = True
    if len(order) + len(plan.dropped) + len(plan.unused) != num_samples or not is_placed.all():
        return "a sample is neither in exactly one pack nor dropped"
    if not len(offsets) or (offsets[0], offsets[-1]) != (0, len(order)):
        return f"bin_offsets do not go from 0 to {len(order):,}"
    if (offsets[1:] <= offsets[:-1]).any():  # a difference might overflow int64
        return "bin_offsets do not increase"
    limits: list[tuple[str, Any, Any]] = [("tokens", plan.num_tokens, plan.capacity)]
    if (plan.num_patches is None) != (plan.patch_capacity is None):
        return "only one of num_patches and patch_capacity is given"
    if plan.num_patches is not None:
        limits.append(("patches", plan.num_patches, plan.patch_capacity))
    for name, sizes, capacity in limits:
        planned = sizes[order]
        totals = np.add.reduceat(planned, offsets[:-1]) if len(order) else planned
        if len(order) and (planned.max() > capacity or totals.max() > capacity):
            return f"a pack has more {name} than its capacity of {capacity:,}"
        if name == "tokens" and not np.array_equal(plan.pack_tokens, totals):
            return "pack_tokens are not the sums of the packs' num_tokens"
    if plan.unit is not None:
        packs = np.repeat(np.arange(plan.num_packs), np.diff(offsets))
        units = plan.unit[order]
        by_unit = np.argsort(units, kind="stable")
        is_split = (np.diff(units[by_unit]) == 0) & (np.diff(packs[by_unit]) != 0)
        if is_split.any():
            return f"unit {units[by_unit][:-1][is_split][0]} is in several packs"
    return ""
