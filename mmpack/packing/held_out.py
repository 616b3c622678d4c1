"""Rows that are not trained on: those held out for evaluation, and those beyond the limits of an entry.

Held-out rows that share an image, or are one row, are on the same side.

The rows are chosen by a hash of their file and number, so the same rows are held out whatever the capacity and the
plan's seed are.
"""

from __future__ import annotations

import hashlib
import logging
import math
import zlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack.errors import counted
from mmpack.packing.plan import assigned
from mmpack.packing.sized_samples import are_sized
from mmpack.packing.split_documents import SplitSamples
from mmpack.packing.stream_select import hashed
from mmpack.store.row_checksum import files_of
from mmpack.types import EncodedSample, ImageRef, PackPlan

SPLITS = {"train": "plan", "val": "val"}  # the name of the plan in a store
_log = logging.getLogger(__name__)


def check_size(size: float) -> None:
    """
    Raises:
        ValueError: it is neither a share nor a number of rows.
    """
    if not (0 < size < 1 or (1 <= size < math.inf and size == int(size))):
        raise ValueError(
            f"--val-size (val_size) must be a number of rows, or a share above 0 and below 1, got {size:g}"
        )


def held_out(samples: Any, size: float, used: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """Choose the samples to hold out: as many as `size` says, or a few less if larger groups share images.

    Args:
        samples: a list, an `EncodedStore` or `SplitSamples`; all pieces of a document are on one side.
        size: a number of samples (of documents, if they are split), or a share of them below 1.
        used: (N,) the samples to choose from; None: all.

    Returns:
        (N,) whether each sample is held out.

    Raises:
        ValueError: the size is invalid, none can be held out, or none would be left.
    """
    check_size(size)
    if isinstance(samples, SplitSamples):
        whole = (
            None if used is None else np.isin(range(len(samples.samples)), samples.sample_of[used])
        )
        return held_out(samples.samples, size, whole)[samples.sample_of]
    group = _groups(samples)
    places = np.arange(len(group)) if used is None else np.flatnonzero(used)
    found = np.zeros(len(group), dtype=bool)
    group = group[places]
    wanted = int(size) if size >= 1 else max(1, round(size * len(group)))
    if wanted >= len(group):
        raise ValueError(
            f"--val-size (val_size) asks for {wanted:,} of {counted(len(group), 'row')}, and none would be left "
            "to train on; hold out fewer"
        )
    _, first, inverse, count = np.unique(
        group, return_index=True, return_inverse=True, return_counts=True
    )
    order = _by_hash(samples, places[first])
    chosen = np.zeros(len(count), dtype=bool)
    left = wanted
    for number in order:
        if count[number] <= left:
            chosen[number] = True
            left -= int(count[number])
    if left == wanted:
        raise ValueError(
            f"--val-size (val_size): none of {counted(len(group), 'row')} can be held out, because the smallest "
            f"group of rows that share images has {count.min():,}; hold out at least as many"
        )
    found[places] = chosen[inverse]
    return found


def _groups(samples: Sequence[EncodedSample]) -> NDArray[np.int64]:
    """(N,) a number per sample; samples that share an image, directly or through others, have the same: that of
    the first of them."""
    parent = list(range(len(samples)))  # none is larger than its sample

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    first: dict[Hashable, int] = {}
    for number, (is_again, keys) in enumerate(_shown(samples)):
        shared = [number - 1] if is_again else []
        shared += [other for key in keys if (other := first.setdefault(key, number)) != number]
        for other in shared:
            low, high = sorted((root(number), root(other)))
            parent[high] = low
    group = np.array(parent, dtype=np.int64)
    while (group[group] != group).any():
        group = group[group]
    return group


def _shown(samples: Any) -> Iterator[tuple[bool, Iterable[Hashable]]]:
    """For each sample: whether it is of the same row as the one before it (files in two folders may have one
    name), and what its images and videos are known by. Of a store they are read from its columns; one that was
    made of files has whole rows of one file in each batch, so a batch begins with another row."""
    if not hasattr(samples, "media_rows"):
        row = None
        for sample in samples:
            yield row == (row := (sample.source, sample.row)), map(_key, files_of(sample.media))
        return
    files, rows = samples.sources, samples.rows
    is_again = np.zeros(len(rows), dtype=bool)
    is_again[1:] = (files[1:] == files[:-1]) & (rows[1:] == rows[:-1])
    begin_of_batch = 0
    for batch in samples.media_rows():
        if samples.about.files:
            is_again[begin_of_batch] = False
        again = iter(is_again[begin_of_batch : begin_of_batch + len(batch.files) - 1].tolist())
        begin_of_batch += len(batch.files) - 1
        names = np.array([*batch.paths, None], dtype=object)[batch.path]
        inside = batch.offset >= 0
        names[inside] = batch.offset[inside]  # equal contents have one position
        for place in np.flatnonzero(batch.in_tar).tolist():
            names[place] = names[place], int(batch.in_tar[place])
        keys, ends = names.tolist(), batch.files.tolist()
        for begin, end in zip(ends, ends[1:]):
            yield next(again), keys[begin:end]


def _key(one: ImageRef) -> Hashable:
    """What an image, a video file or a frame is known by: its path, with its position in a tar file, or its
    content."""
    if one.data is None:
        return one.path if one.member is None else (one.path, one.member.offset)
    if isinstance(one.data, (bytes, bytearray, memoryview)):
        return hashlib.sha256(one.data).digest()
    return hashlib.sha256(one.data.tobytes()).digest()  # a PIL image


def within_limits(samples: Any, limits: Mapping[str, tuple[int, int]]) -> NDArray[np.bool_]:
    """Which samples the `num_samples` and `max_samples` of `dataset_info.json` entries leave, a bool each.

    `max_samples` leaves the first samples of an entry, `num_samples` chooses among them by the hash of their file
    and number. Documents count once, however many pieces they have.

    Args:
        limits: files of an entry, joined by "/" -> (num_samples, max_samples), 0: no limit.
    """
    used = np.ones(len(samples), dtype=bool)
    if not limits:
        return used
    if isinstance(samples, SplitSamples):
        return within_limits(samples.samples, limits)[samples.sample_of]
    files = samples.sources if are_sized(samples) else np.array([one.source for one in samples])
    for names, (num_samples, max_samples) in limits.items():
        own = np.flatnonzero(np.isin(files, names.split("/")))
        used[own] = False
        own = own[: max_samples or None]
        if num_samples > len(own):
            _log.warning(
                "num_samples of %s is %s, but %s are there; each is used once per epoch, and --mix repeats a "
                "source",
                names,
                f"{num_samples:,}",
                counted(len(own), "sample"),
            )
        used[own[_by_hash(samples, own)][: num_samples or None]] = True
    return used


def _by_hash(samples: Any, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order of samples by the hash of their file and number."""
    if hasattr(samples, "media_rows"):
        places = zip(samples.sources[numbers].tolist(), samples.rows[numbers].tolist())
        names = [f"{source}:{row}" for source, row in places]
    else:
        chosen = (samples[number] for number in numbers.tolist())
        names = [f"{one.source}:{one.row}" for one in chosen]
    return np.argsort(hashed([zlib.crc32(name.encode()) for name in names], 0), kind="stable")


def part_of(plan: PackPlan, own: NDArray[np.bool_]) -> PackPlan:
    """The plan of some of a plan's samples; the others are `unused`.

    Args:
        own: (N,) which samples; of each unit all or none, because its images are counted for its first sample.

    Raises:
        ValueError: none of them fits a pack.
    """
    if plan.unit is not None:
        _, first, unit = np.unique(plan.unit, return_index=True, return_inverse=True)
        assert (own[first][unit] == own).all()
    part = replace(
        plan,
        sample_index=np.sort(plan.sample_index[own[plan.sample_index]]),
        dropped=plan.dropped[own[plan.dropped]],
        truncated=plan.truncated[own[plan.truncated]],
        unused=np.flatnonzero(~own),
    )
    if not len(part.sample_index):
        raise ValueError(
            f"none of the {counted(int(own.sum()), 'row')} to train on, or held out (--val-size), fits a pack; "
            "choose more rows, or pack with a larger --capacity"
        )
    return assigned(part, plan.seed)
