"""Which images samples show, and what a pack spends on those that several of its samples show.

A pack runs the vision tower once for each distinct image (`mmpack.packing.shared_images`), however many of its
segments show it. So its cost is that of its text plus one run of the tower per distinct image, which is not a sum
over samples: it depends on which of them share the pack. `pack_costs` counts it for packs that are planned;
`mmpack.packing.image_units` plans samples that show the same images as one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack.packing.cost import costs_of, image_flops
from mmpack.packing.shared_images import media_keys
from mmpack.packing.split_documents import SplitSamples
from mmpack.packing.truncate import truncate_sample
from mmpack.store.row_checksum import files_of
from mmpack.types import EncodedSample, Int32, Int64, PackPlan


@dataclass(frozen=True, slots=True, eq=False)
class SampleImages:
    """Which images and videos N samples show; an entry per grid, I in all.

    Attributes:
        ids: (I,) int64, equal for the same pixels: the same image and the same grid.
        grid_thw: (I, 3) int32 patches of each: frames, height, width.
        offsets: (N + 1,) int64; the entries of sample n are `offsets[n] : offsets[n + 1]`.
    """

    ids: Int64
    grid_thw: Int32
    offsets: Int64

    @property
    def num_patches(self) -> Int64:
        """(I,) patches that enter the vision tower."""
        patches: Int64 = self.grid_thw.astype(np.int64).prod(axis=1)
        return patches

    @property
    def sample_of(self) -> Int64:
        """(I,) the sample that shows each."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def kept(self, keeps: NDArray[np.bool_]) -> SampleImages:
        """The entries for which `keeps` (I,) is true, of the same samples."""
        sums = np.concatenate([[0], keeps.cumsum()])
        return SampleImages(self.ids[keeps], self.grid_thw[keeps], sums[self.offsets])

    def of_samples(self, keeps: NDArray[np.bool_]) -> SampleImages:
        """The images of the samples for which `keeps` (N,) is true."""
        counts = np.diff(self.offsets)
        entries = np.repeat(keeps, counts)
        offsets = np.concatenate([[0], counts[keeps].cumsum()])
        return SampleImages(self.ids[entries], self.grid_thw[entries], offsets)

    def sums(self, values: Int64) -> Int64:
        """(N,) sums of `values` (I,) over each sample's entries."""
        sums = np.concatenate([[0], values.cumsum(dtype=np.int64)])
        totals: Int64 = sums[self.offsets[1:]] - sums[self.offsets[:-1]]
        return totals

    def counted_once(self, values: Int64, group: Int64) -> Int64:
        """Like `sums`, but each image counts once in a group of samples: for the first of them that shows it.

        Args:
            values: (I,) of each entry, equal for equal images.
            group: (N,) such as the pack or unit of each sample.
        """
        groups = group[self.sample_of]
        order = np.lexsort(
            (self.ids, groups)
        )  # stable: of equal images, the first sample's comes first
        is_first = np.ones(len(order), dtype=bool)
        ids, groups = self.ids[order], groups[order]
        is_first[1:] = (ids[1:] != ids[:-1]) | (groups[1:] != groups[:-1])
        once = np.zeros(len(order), dtype=np.int64)
        once[order[is_first]] = values[order[is_first]]
        return self.sums(once)


class ImageNumbers:
    """Numbers images and videos, and the parts of a video with timestamps, in the order in which they appear.

    Args:
        of_bytes: as in `media_key`; by default bytes stay in memory as long as this object.
    """

    def __init__(self, of_bytes: Callable[[bytes], Hashable] = bytes) -> None:
        self._of_bytes = of_bytes
        self._numbers: dict[Hashable, int] = {}
        self._seen = 0

    def of(self, sample: EncodedSample) -> list[int]:
        """The number of each of a sample's grids. Without references to its images, they are like no others."""
        self._seen += 1
        keys = media_keys(sample, self._of_bytes)
        if keys is None:
            keys = [(self._seen, len(sample.grid_thw))]
        return [
            self._numbers.setdefault((key, part), len(self._numbers))
            for key, count in keys
            for part in range(count)
        ]


def images_of(
    samples: Sequence[EncodedSample], cut: Mapping[int, EncodedSample] | None = None
) -> SampleImages:
    """Which images N samples show; images are numbered in the order in which they appear.

    Args:
        samples: a list or an `EncodedStore`, of which only samples with videos or with options of images are read.
        cut: number of a sample -> its beginning, which is planned instead.
    """
    if isinstance(samples, SplitSamples):  # each image is in one piece, in order
        whole = images_of(samples.samples)
        return SampleImages(whole.ids, whole.grid_thw, samples.grids()[1])
    if hasattr(samples, "media_rows"):
        images = _of_store(samples)
    else:
        numbers = ImageNumbers()
        found = [numbers.of(sample) for sample in samples]
        grids = [np.empty((0, 3), dtype=np.int32), *(sample.grid_thw for sample in samples)]
        ids = np.array([one for of_sample in found for one in of_sample], dtype=np.int64)
        images = SampleImages(ids, np.concatenate(grids), np.cumsum([0, *map(len, found)]))
    if cut:
        keeps = np.ones(len(images.ids), dtype=bool)
        for number, sample in cut.items():
            begin, end = images.offsets[number : number + 2]
            keeps[begin + len(sample.grid_thw) : end] = False
        images = images.kept(keeps)
    return images


def _of_store(store: Any) -> SampleImages:
    """`images_of` an `EncodedStore`, whose equal bytes have one position in `media.bin`."""
    sources: dict[Hashable, int] = {}
    known: list[Int64] = []  # (source, part, or position in the source) of each grid
    grids: list[Int32] = []
    counts: list[Int64] = []
    first = 0
    for rows in store.media_rows():
        numbers = [sources.setdefault(path, len(sources)) for path in rows.paths]
        source = np.where(
            rows.offset < 0, np.array(numbers, dtype=np.int64)[rows.path], -1 - rows.offset
        )
        num_grids = np.diff(rows.grids)
        found = np.zeros((len(rows.grid_thw), 2), dtype=np.int64)
        plain = np.repeat(rows.is_plain, num_grids)
        plain_files = np.repeat(rows.is_plain, np.diff(rows.files))
        found[plain] = np.stack([source, rows.in_tar], axis=1)[plain_files]
        for row in np.flatnonzero(~rows.is_plain).tolist():
            places = rows.offset[rows.files[row] : rows.files[row + 1]].tolist()
            entries = _of_row(store[first + row], places, sources)
            found[rows.grids[row] : rows.grids[row + 1]] = np.array(entries).reshape(-1, 2)
        known.append(found)
        grids.append(rows.grid_thw)
        counts.append(num_grids)
        first += len(num_grids)
    offsets = np.cumsum([0, *(one for count in counts for one in count.tolist())])
    grid_thw = np.concatenate(grids)
    each = np.concatenate([np.concatenate(known), grid_thw], axis=1)
    _, appears, ids = np.unique(each, axis=0, return_index=True, return_inverse=True)
    order = np.empty_like(appears)
    order[np.argsort(appears)] = np.arange(len(appears))
    return SampleImages(order[ids.reshape(-1)], grid_thw, offsets)


def _of_row(
    sample: EncodedSample, places: Sequence[int], sources: dict[Hashable, int]
) -> list[tuple[int, int]]:
    """(source, part) of each grid of a stored sample, as `_of_store` numbers them; `places` are the positions of
    its files in `media.bin`."""
    place_of = {id(file.data): place for file, place in zip(files_of(sample.media), places)}
    keys = media_keys(sample, lambda data: place_of[id(data)])
    if keys is None:
        keys = [((sample.source, sample.row), len(sample.grid_thw))]
    entries = []
    for key, count in keys:
        first = 0
        match key:
            case ("image", ("member", str(path), int(first)), _, ()):
                number = sources.setdefault(path, len(sources))
            case ("image", str(path), _, ()):
                number = sources.setdefault(path, len(sources))
            case ("image", ("bytes", int(place)), _, ()):
                number = -1 - place
            case _:
                number = sources.setdefault(key, len(sources))
        entries += [(number, first + part) for part in range(count)]
    return entries


def images_in(plan: PackPlan, samples: Sequence[EncodedSample]) -> SampleImages:
    """`images_of` samples as a plan has them: of those that it truncates, what is left."""
    return images_of(samples, _cut(plan, samples))


def patches_in(plan: PackPlan, images: SampleImages) -> tuple[int, int]:
    """Patches of a plan's images: (counted in every sample that shows them, counted once in every pack).

    Args:
        plan: a plan of N samples.
        images: of these samples, from `images_in`.
    """
    each = images.num_patches
    once = images.counted_once(each, pack_of(plan))
    return int(plan.totals(images.sums(each)).sum()), int(plan.totals(once).sum())


def pack_costs(
    plan: PackPlan,
    samples: Sequence[EncodedSample],
    config: Any,
    *,
    frozen: Collection[str] = (),
    images: SampleImages | None = None,
) -> tuple[Int64, Int64]:
    """FLOPs of a training step on the packs of a plan, in which an image counts once in each pack that shows it.

    Args:
        plan: a plan of the N samples.
        samples: a list or an `EncodedStore`.
        config: the model's config, a transformers config or a mapping.
        frozen: parts that are not trained, as in `sample_flops`.
        images: `images_in(plan, samples)`, if it is known.

    Returns:
        ((N,) FLOPs of each sample alone, (num_packs,) FLOPs of each pack).

    Raises:
        ValueError: as in `sample_flops`.
    """
    cut = _cut(plan, samples)
    images = images_of(samples, cut) if images is None else images
    costs = costs_of(samples, config, frozen)
    if cut:
        costs[list(cut)] = costs_of(list(cut.values()), config, frozen)
    each = image_flops(config, images.grid_thw, frozen)
    alone = np.arange(len(costs))
    text = costs - images.sums(each)
    packs = plan.totals(text + images.counted_once(each, pack_of(plan)))
    return text + images.counted_once(each, alone), packs


def _cut(plan: PackPlan, samples: Sequence[EncodedSample]) -> dict[int, EncodedSample]:
    """What is left of the samples that a plan truncates, by number."""
    limits = plan.capacity, plan.patch_capacity
    return {n: truncate_sample(samples[n], *limits) for n in plan.truncated.tolist()}


def pack_of(plan: PackPlan) -> Int64:
    """(N,) the pack of each sample; -1: none."""
    packs = np.full(len(plan.num_tokens), -1, dtype=np.int64)
    packs[plan.sample_index] = np.repeat(np.arange(plan.num_packs), np.diff(plan.bin_offsets))
    return packs
