"""Units of samples that show the same images: planned as one, so that a pack encodes their images once.

A unit has the tokens of its samples, and each of its images once: that is what its pack spends on it, unless
another unit of the pack shows the same image. Planning by units changes no limit of a pack, but takes freedom from
the planner: with costs, units are at most a half, a third or a quarter of a pack.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmpack.packing.sample_images import SampleImages
from mmpack.types import Int64

UNLIMITED = 1 << 62
_TRIED = 16  # units with enough room that are tried for a sample; a limit for images in very many samples


@dataclass(frozen=True, slots=True, eq=False)
class UnitSizes:
    """Sizes of N samples, and the most that a unit of several may have.

    Attributes:
        num_tokens: (N,) tokens of each sample.
        most_tokens, most_patches, most_cost: limits of a unit.
        is_alone: (N,) samples that are not joined with others; None: none.
        cost: (N,) cost of each sample, an image that it shows twice counted once; None: without costs.
        image_cost: (I,) the part of it that is spent on each entry of `SampleImages`.
    """

    num_tokens: Int64
    most_tokens: int
    most_patches: int = UNLIMITED
    is_alone: NDArray[np.bool_] | None = None
    cost: Int64 | None = None
    image_cost: Int64 | None = None
    most_cost: int = UNLIMITED


def units_of(images: SampleImages, sizes: UnitSizes) -> Int64:
    """Join samples that show the same image into units within the limits.

    Images with the most patches come first, because sharing them saves most. The units that show an image are
    joined, the longest first, each with the fullest unit that has room for it. So most samples of an image are in
    as few units as the limits allow, also where samples show several images.

    Returns:
        (N,) int64: the unit of each sample, which is the number of its first sample.
    """
    num_samples = len(sizes.num_tokens)
    alone = np.arange(num_samples)
    tokens: list[int] = sizes.num_tokens.tolist()
    patches: list[int] = images.counted_once(images.num_patches, alone).tolist()
    cost = [0] * num_samples if sizes.cost is None else sizes.cost.tolist()
    first_of = list(range(num_samples))  # leads to the unit's first sample

    def unit_of(sample: int) -> int:
        while first_of[sample] != sample:
            first_of[sample] = sample = first_of[first_of[sample]]
        return sample

    for samples, image_patches, image_cost in _shared(images, sizes):
        units = sorted({unit_of(n) for n in samples}, key=lambda unit: (-tokens[unit], unit))
        rooms: list[tuple[int, int]] = []  # (tokens left, unit), ascending
        for unit in units:
            start = bisect_left(rooms, (tokens[unit], -1))
            for place in range(start, min(start + _TRIED, len(rooms))):
                other = rooms[place][1]
                both_patches = patches[unit] + patches[other] - image_patches
                both_cost = cost[unit] + cost[other] - image_cost
                if both_patches <= sizes.most_patches and both_cost <= sizes.most_cost:
                    break
            else:
                insort(rooms, (sizes.most_tokens - tokens[unit], unit))
                continue
            del rooms[place]
            first, second = min(unit, other), max(unit, other)
            first_of[second] = first
            tokens[first], patches[first] = tokens[unit] + tokens[other], both_patches
            cost[first] = both_cost
            insort(rooms, (sizes.most_tokens - tokens[first], first))
    return np.array([unit_of(n) for n in range(num_samples)], dtype=np.int64)


def _shared(images: SampleImages, sizes: UnitSizes) -> list[tuple[list[int], int, int]]:
    """(samples, patches, cost) of each image that several samples show, most patches first."""
    sample, image_cost = images.sample_of, sizes.image_cost
    image_cost = np.zeros_like(sample) if image_cost is None else image_cost
    joins = np.ones(len(sample), dtype=bool) if sizes.is_alone is None else ~sizes.is_alone[sample]
    columns = images.ids, sample, images.num_patches, image_cost
    ids, sample, patches, cost = (column[joins] for column in columns)
    order = np.lexsort((sample, ids))
    ids, sample = ids[order], sample[order]
    starts = np.flatnonzero(np.diff(ids, prepend=-1))
    ends = np.append(starts[1:], len(ids))
    is_shared = sample[starts] < sample[ends - 1] if len(ids) else np.zeros(0, dtype=bool)
    starts, ends = starts[is_shared], ends[is_shared]
    patches, cost = patches[order[starts]], cost[order[starts]]
    largest = np.argsort(-patches, kind="stable")
    places = zip(*(column[largest].tolist() for column in (starts, ends, patches, cost)))
    return [(sample[begin:end].tolist(), p, c) for begin, end, p, c in places]
