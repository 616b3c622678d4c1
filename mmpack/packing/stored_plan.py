"""A store's folder -> its samples and their plan, checked against each other."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from mmpack.errors import counted
from mmpack.packing.held_out import SPLITS
from mmpack.packing.split_documents import SplitSamples
from mmpack.store.data_files import changed_files
from mmpack.store.encoded_store import EncodedStore, open_store
from mmpack.store.manifest import packed_split
from mmpack.store.plan_file import load_plan
from mmpack.types import PackPlan

_log = logging.getLogger("mmpack.packing.dataset")


def open_samples(
    folder: str | os.PathLike[str],
    on_changed_data: Literal["raise", "warn"],
    split: Literal["train", "val"] | None,
) -> tuple[EncodedStore | SplitSamples, PackPlan, Sequence[str] | None]:
    """The samples of a folder that `mmpack pack` wrote, the plan of a split, and their media folders, as
    `PackedDataset.from_store` takes them."""
    if on_changed_data not in ("raise", "warn"):
        raise ValueError(f"on_changed_data must be 'raise' or 'warn', got {on_changed_data!r}")
    given, (folder, named) = folder, packed_split(folder) or (folder, "train")
    if split is not None and named == "val" != split:
        raise ValueError(
            f"{given} are the rows held out of {folder}, but split is {split!r}; leave out one of :val and split"
        )
    split = split or named
    store = open_store(folder)
    if changed := changed_files(store):
        text = f"{' and '.join(changed[:4])} changed since {folder} was packed"
        if on_changed_data == "raise":
            raise ValueError(
                f"{text} ({len(changed)} of {counted(len(store.about.files), 'data file')}); pack again with "
                "--overwrite, or use the rows as packed with --on-changed-data warn "
                "(on_changed_data='warn')"
            )
        _log.warning("%s; using the rows as packed", text)
    samples: EncodedStore | SplitSamples = store
    if store.about.part is not None:
        raise ValueError(
            f"{folder} is part {store.about.part} of a store; join all parts with mmpack merge"
        )
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")
    if not (Path(folder) / f"{SPLITS[split]}.json").exists():
        if split == "val":
            raise ValueError(
                f"{folder} has no rows that are held out; pack again with --val-size and --overwrite"
            )
        raise ValueError(f"{folder} has no plan; pack again with --overwrite")
    if (Path(folder) / "pieces.json").exists():
        samples = SplitSamples.load(store, folder)
    plan = load_plan(folder, SPLITS[split])
    sizes = [(plan.num_tokens, samples.num_tokens)]
    if plan.num_patches is not None:
        sizes.append((plan.num_patches, samples.num_patches))
    for planned, known in sizes:
        is_same = planned.shape == known.shape
        if is_same:
            known = known.copy()
            for planned_otherwise in (plan.truncated, plan.unused):  # unused: perhaps cut, too
                known[planned_otherwise] = planned[planned_otherwise]
            if planned is plan.num_patches and plan.unit is not None:
                known = np.minimum(known, planned)  # an image counts once in its unit
        if not (is_same and np.array_equal(planned, known)):
            raise ValueError(f"{folder} has a plan for other samples; pack again with --overwrite")
    return samples, plan, store.about.media_folders
