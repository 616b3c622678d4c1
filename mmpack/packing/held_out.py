"""Rows held out of training: rows that share an image, or are one row, are on the same side.

The rows are chosen by a hash of their file and number, so the same rows are held out whatever the capacity and the
plan's seed are.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack.errors import counted
from mmpack.packing.plan import assigned
from mmpack.packing.split_documents import SplitSamples
from mmpack.packing.stream_select import hashed
from mmpack.types import EncodedSample, ImageRef, Media, PackPlan

SPLITS = {"train": "plan", "val": "val"}  # the name of the plan in a store


def check_size(size: float) -> None:
    """
    Raises:
        ValueError: it is neither a share nor a number of rows.
    """
    if not (0 < size < 1 or (size >= 1 and size == int(size))):
        raise ValueError(
            f"--val-size (val_size) must be a number of rows, or a share above 0 and below 1, got {size:g}"
        )


def held_out(samples: Any, size: float) -> NDArray[np.bool_]:
    """Choose the samples to hold out: as many as `size` says, or a few less if larger groups share images.

    Args:
        samples: a list, an `EncodedStore` or `SplitSamples`; all pieces of a document are on one side.
        size: a number of samples (of documents, if they are split), or a share of them below 1.

    Returns:
        (N,) whether each sample is held out.

    Raises:
        ValueError: the size is invalid, none can be held out, or none would be left.
    """
    check_size(size)
    if isinstance(samples, SplitSamples):
        return held_out(samples.samples, size)[samples.sample_of]
    group = _groups(samples)
    wanted = int(size) if size >= 1 else max(1, round(size * len(group)))
    if wanted >= len(group):
        raise ValueError(
            f"--val-size (val_size) asks for {wanted:,} of {counted(len(group), 'row')}, and none would be left to "
            "train on; hold out fewer"
        )
    first, count = np.unique(group, return_counts=True)  # a group's number is its first sample's
    names = [f"{one.source}:{one.row}" for one in (samples[number] for number in first.tolist())]
    order = np.argsort(hashed([zlib.crc32(name.encode()) for name in names], 0), kind="stable")
    chosen = np.zeros(len(group), dtype=bool)
    left = wanted
    for number in order:
        if count[number] <= left:
            chosen[first[number]] = True
            left -= int(count[number])
    if left == wanted:
        raise ValueError(
            f"--val-size (val_size): none of {counted(len(group), 'row')} can be held out, because the smallest "
            f"group of rows that share images has {count.min():,}; hold out at least as many"
        )
    return chosen[group]


def _groups(samples: Sequence[EncodedSample]) -> NDArray[np.int64]:
    """(N,) a number per sample; samples that share an image, directly or through others, have the same."""
    parent = list(range(len(samples)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    first: dict[Hashable, int] = {}
    for number, sample in enumerate(samples):
        for key in ((sample.source, sample.row), *_keys(sample)):
            other = root(first.setdefault(key, number))
            parent[max(root(number), other)] = min(root(number), other)
    return np.array([root(number) for number in range(len(samples))], dtype=np.int64)


def _keys(sample: EncodedSample) -> Iterator[Hashable]:
    for one in sample.media:
        yield from _keys_of(one)


def _keys_of(one: Media) -> Iterator[Hashable]:
    """What an image or video is known by: its path, or its content."""
    if not isinstance(one, ImageRef) and one.frames:
        for frame in one.frames:
            yield from _keys_of(frame)
    elif one.data is None:
        yield one.path
    elif isinstance(one.data, (bytes, bytearray, memoryview)):
        yield hashlib.sha256(one.data).digest()
    else:  # a PIL image
        yield hashlib.sha256(one.data.tobytes()).digest()


def split_plan(plan: PackPlan, is_held_out: NDArray[np.bool_]) -> tuple[PackPlan, PackPlan]:
    """The plan without the samples that are held out, and the plan of those.

    Raises:
        ValueError: one of them has no sample that fits a pack.
    """
    plans = []
    for own in (~is_held_out, is_held_out):
        part = replace(
            plan,
            sample_index=np.sort(plan.sample_index[own[plan.sample_index]]),
            dropped=plan.dropped[own[plan.dropped]],
            truncated=plan.truncated[own[plan.truncated]],
            unused=np.flatnonzero(~own),
        )
        if not len(part.sample_index):
            raise ValueError(
                "--val-size (val_size): all rows of one side are dropped, because they are longer than a pack; hold "
                "out more rows, or pack with a larger --capacity"
            )
        plans.append(assigned(part, plan.seed))
    return plans[0], plans[1]
