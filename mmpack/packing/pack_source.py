"""The common base of `PackedDataset` and `PackStream`: media folders, and counts of dropped segments."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch.utils.data import get_worker_info

from mmpack.data.media_paths import DATA_URIS, MediaFolders
from mmpack.errors import MAX_BAD, BadImageError, check_max_bad, count_reason, judge
from mmpack.packing.loss_weights import check_source_weights, source_name, with_weight
from mmpack.packing.pack_samples import MediaPolicy, PackSamples
from mmpack.types import EncodedSample

_COUNTERS = 257  # columns: 256 workers, then the process itself


class DroppedSegments:
    """Counts, in shared memory, of segments dropped from packs because of bad images."""

    def __init__(self) -> None:
        # One column per worker: segments seen, those with images or videos, those dropped.
        self._counts = torch.zeros((3, _COUNTERS), dtype=torch.int64).share_memory_()
        self._reasons: Counter[str] = Counter()  # in this process
        self._example = ""

    @property
    def number(self) -> int:
        """Dropped segments, in this process and its workers."""
        return int(self._counts[2].sum())

    def restore(self, counts: Sequence[int]) -> None:
        """Continue from the counts of a run that is resumed: segments, those with images or videos, those
        dropped."""
        self._counts.zero_()
        self._counts[:, -1] = torch.tensor(counts)

    def saw(self, segments: int, with_media: int, max_bad: float) -> None:
        """Count segments, `with_media` of which have images or videos.

        Raises:
            ValueError: a share above `max_bad` of those with images or videos was dropped.
        """
        self._count([segments, with_media, 0], max_bad)

    def drop(self, error: BadImageError, max_bad: float) -> None:
        """Count a dropped segment.

        Raises:
            ValueError: as in `saw`.
        """
        count_reason(self._reasons, str(error).partition(": ")[2])
        self._example = self._example or str(error)
        self._count([0, 0, 1], max_bad)

    def _count(self, numbers: list[int], max_bad: float) -> None:
        worker = get_worker_info()
        column = -1 if worker is None else worker.id % (_COUNTERS - 1)
        self._counts[:, column] += torch.tensor(numbers)
        if self._reasons:
            check_max_bad(max_bad)
            num_rows, num_media, num_bad = self._counts.sum(dim=1).tolist()
            judge(num_bad, num_rows, num_media, max_bad, self._reasons, self._example)


class PackSource:
    """A source of packs, with media folders and a policy for images that no longer decode.

    Attributes:
        on_bad_image: "raise" or "drop".
        max_bad: the largest share of samples with images or videos that "drop" may leave out; from 1,000 samples
            on, a larger share is an error.
        source_weights: factors of the loss by source.
    """

    capacity: int

    def __init__(self) -> None:
        self.on_bad_image: Literal["raise", "drop"] = "raise"
        self.max_bad = MAX_BAD
        self._media: MediaFolders | None = None
        self._media_of: dict[str, MediaFolders | None] = {}  # by the name of a mixture's source
        self._dropped = DroppedSegments()
        self._source_weights: dict[str, float] = {}

    @property
    def source_weights(self) -> dict[str, float]:
        """Factors of the loss by source: the name of a data file, without the number of a shard
        (`train-00000-of-00010.parquet` is of the source `train.parquet`). Files of the same name in several
        folders are one source. Sources that are not named count once. Set it before workers start.

        Raises:
            ValueError: when set: a weight is not a number from 0.000001 to 1,000,000, or no sample of a
                `PackedDataset` is of the source.
        """
        return self._source_weights

    @source_weights.setter
    def source_weights(self, weights: Mapping[str, float]) -> None:
        check_source_weights(weights, self._sources() if weights else None)
        self._source_weights = {name: float(weight) for name, weight in weights.items()}

    def _sources(self) -> Iterable[str] | None:
        """The data files of all samples, if known."""
        return None

    @property
    def media_folders(self) -> list[str] | None:
        """Folders that must contain image and video files when a pack is assembled, links resolved; None: any
        folder. Of a mixture, those of all its sources, or None if one may open any: a row only opens files in the
        folders of its own source. Setting them sets those of every source. Set it before workers start."""
        found = list(self._media_of.values()) or [self._media]
        names = [name for one in found if one is not None for name in one.names]
        return None if None in found else [one for one in dict.fromkeys(names) if one != DATA_URIS]

    @media_folders.setter
    def media_folders(self, folders: Sequence[str | os.PathLike[str]] | None) -> None:
        if isinstance(folders, (str, os.PathLike)):
            folders = [folders]
        self._media = None if folders is None else MediaFolders(folders)
        self._media_of = {}

    @property
    def num_dropped_segments(self) -> int:
        """Segments left out of packs so far because of bad images, in this process and its workers."""
        return self._dropped.number

    def _item(
        self,
        samples: Sequence[EncodedSample],
        resume: bytes | None = None,
        passes: Sequence[int] = (),
    ) -> PackSamples:
        if self.on_bad_image not in ("raise", "drop"):
            raise ValueError(
                f"--on-bad-image (on_bad_image) must be 'raise' or 'drop', got {self.on_bad_image!r}"
            )
        if self.on_bad_image == "raise" and self.max_bad != MAX_BAD:
            raise ValueError(
                f"max_bad is {self.max_bad!r}, but the first bad image stops the run; set on_bad_image to 'drop', "
                "or leave max_bad out"
            )
        if self._source_weights:
            factors = [self._source_weights.get(source_name(one.source), 1.0) for one in samples]
            samples = [
                one if factor == 1 else with_weight(one, factor)
                for one, factor in zip(samples, factors)
            ]
        what = self.on_bad_image, self.max_bad, self._media, self._dropped
        policy = MediaPolicy(*what, self._media_of, passes)
        return PackSamples(samples, self.capacity, policy, resume)
