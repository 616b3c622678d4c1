"""A `PackPlan` in a file: `plan.npz` of a store."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from mmpack.errors import names
from mmpack.store.mapped_arrays import load_arrays, save_arrays
from mmpack.types import PackPlan

_OPTIONAL: dict[str, Any] = {"patch_capacity": None, "num_patches": None, "cost": None}


def save_plan(plan: PackPlan, path: str | os.PathLike[str]) -> None:
    """Write a plan as .npz."""
    values = {field.name: getattr(plan, field.name) for field in fields(plan)}
    save_arrays(path, {name: value for name, value in values.items() if value is not None})


def load_plan(path: str | os.PathLike[str]) -> PackPlan:
    """Read a plan that `save_plan` wrote; its arrays are views of the mapped file.

    Raises:
        ValueError: an earlier version of mmpack wrote it, or it is damaged.
    """
    saved: dict[str, Any] = load_arrays(path)
    if "num_tokens" not in saved:
        raise ValueError(f"{path} is a plan of an earlier version; pack again with --overwrite")
    for name in ("capacity", "patch_capacity", "seed"):
        if name in saved:
            saved[name] = int(saved[name])
    saved = {**_OPTIONAL, **saved}
    if set(saved) != {field.name for field in fields(PackPlan)}:
        raise ValueError(f"{path} is damaged: it holds {names(saved)}; pack again with --overwrite")
    return PackPlan(**saved)
