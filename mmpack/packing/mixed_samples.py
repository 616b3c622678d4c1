"""The samples of several data sets, as one sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack.data.chunks import item_at
from mmpack.packing.loss_weights import MIX_MARK
from mmpack.packing.sized_samples import are_sized
from mmpack.packing.split_documents import SplitSamples
from mmpack.types import EncodedSample, Int32, Int64


class MixedSamples(Sequence[EncodedSample]):
    """The samples of several sources, one source after the other. A sample's `source` begins with the name in the
    mixture: `NAME::train.json`.

    Attributes:
        parts: name -> samples.
        offsets: (parts + 1,) the first sample of each part.
        num_tokens, num_patches, num_supervised: (N,) int64.
    """

    def __init__(self, parts: Mapping[str, Sequence[EncodedSample]]) -> None:
        self.parts = dict(parts)
        self.offsets = np.cumsum([0, *map(len, self.parts.values())])
        sizes = [_sizes_of(samples) for samples in self.parts.values()]
        self.num_tokens, self.num_patches, self.num_supervised = np.concatenate(sizes, axis=1)

    @property
    def sources(self) -> NDArray[Any]:
        """(N,) the part and data file of each sample."""
        found = []
        for name, samples in self.parts.items():
            files = samples.sources if are_sized(samples) else [one.source for one in samples]
            found += [f"{name}{MIX_MARK}{file}" for file in files]
        return np.array(found)

    @property
    def id_range(self) -> tuple[int, int] | None:
        """(smallest, largest) token id; None if it is not known of a part."""
        found = [_id_range(samples) for samples in self.parts.values()]
        known = [one for one in found if one is not None]
        if len(known) < len(found):
            return None
        return min(low for low, _ in known), max(high for _, high in known)

    def grids(self) -> tuple[Int32, Int64]:
        """(grid_thw of all markers (I, 3), offsets of the samples in it (N + 1,))."""
        grids, lengths = [np.empty((0, 3), dtype=np.int32)], []
        for samples in self.parts.values():
            if are_sized(samples):
                values, offsets = samples.grids()
                grids.append(values)
                lengths.append(np.diff(offsets))
            else:
                grids += [sample.grid_thw for sample in samples]
                lengths.append(np.array([len(sample.grid_thw) for sample in samples]))
        return np.concatenate(grids), np.cumsum([0, *np.concatenate(lengths)])

    def __repr__(self) -> str:
        return f"MixedSamples({len(self):,} samples of {', '.join(self.parts)})"

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, number: Any) -> Any:
        return item_at(number, len(self), self._sample, "sample")

    def _sample(self, number: int) -> EncodedSample:
        part = int(np.searchsorted(self.offsets, number, side="right")) - 1
        name, samples = list(self.parts.items())[part]
        sample = samples[number - int(self.offsets[part])]
        return replace(sample, source=f"{name}{MIX_MARK}{sample.source}")


def _id_range(samples: Any) -> tuple[int, int] | None:
    samples = samples.samples if isinstance(samples, SplitSamples) else samples
    if hasattr(samples, "id_range"):
        known: tuple[int, int] | None = samples.id_range
        return known
    ranges = [sample.id_range for sample in samples]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _sizes_of(samples: Sequence[EncodedSample]) -> Int64:
    """(3, N) tokens, patches, supervised tokens."""
    if are_sized(samples):
        return np.stack([samples.num_tokens, samples.num_patches, samples.num_supervised])
    sizes = [(one.num_tokens, one.num_patches, one.num_supervised) for one in samples]
    return np.ascontiguousarray(np.array(sizes, dtype=np.int64).reshape(-1, 3).T)
