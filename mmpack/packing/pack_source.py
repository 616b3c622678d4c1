"""What `PackedDataset` and `PackStream` share: where the images of their packs may lie, and how many were dropped."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from torch.utils.data import get_worker_info

from mmpack.data.media_paths import DATA_URIS, MediaFolders
from mmpack.errors import MAX_BAD, BadImageError, check_max_bad, count_reason, judge
from mmpack.packing.pack_samples import MediaPolicy, PackSamples
from mmpack.types import EncodedSample

_COUNTERS = 257  # of segments: 256 workers, then the process itself


class DroppedSegments:
    """Segments that left their packs because of bad images, counted where every worker sees them."""

    def __init__(self) -> None:
        # One column a worker: segments that came, of them with images or videos, dropped.
        self._counts = torch.zeros((3, _COUNTERS), dtype=torch.int64).share_memory_()
        self._reasons: Counter[str] = Counter()  # of this process
        self._example = ""

    @property
    def number(self) -> int:
        """How many, in this process and its workers."""
        return int(self._counts[2].sum())

    def came(self, segments: int, with_media: int, max_bad: float) -> None:
        """Count segments that came, so many of them with images or videos.

        Raises:
            ValueError: of those with images or videos more than the share `max_bad` were dropped.
        """
        self._count([segments, with_media, 0], max_bad)

    def left(self, error: BadImageError, max_bad: float) -> None:
        """Count a segment that was dropped.

        Raises:
            ValueError: as `came`.
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
    """A source of packs: where their images may lie, and what happens to those that no longer decode.

    Attributes:
        on_bad_image: "raise" or "drop".
        max_bad: the share of samples with images or videos that "drop" may leave out; from 1,000 samples on,
            more are an error.
    """

    capacity: int

    def __init__(self) -> None:
        self.on_bad_image: Literal["raise", "drop"] = "raise"
        self.max_bad = MAX_BAD
        self._media: MediaFolders | None = None
        self._dropped = DroppedSegments()

    @property
    def media_folders(self) -> list[str] | None:
        """Where files of images and videos must lie when a pack is assembled, links followed; None: anywhere.
        Set it before workers start."""
        if self._media is None:
            return None
        return [name for name in self._media.names if name != DATA_URIS]

    @media_folders.setter
    def media_folders(self, folders: Sequence[str | os.PathLike[str]] | None) -> None:
        if isinstance(folders, (str, os.PathLike)):
            folders = [folders]
        self._media = None if folders is None else MediaFolders(folders)

    @property
    def num_dropped_segments(self) -> int:
        """Segments left out of packs so far because of bad images, in this process and its workers."""
        return self._dropped.number

    def _item(self, samples: Sequence[EncodedSample], resume: bytes | None = None) -> PackSamples:
        if self.on_bad_image not in ("raise", "drop"):
            raise ValueError(f"on_bad_image must be 'raise' or 'drop', got {self.on_bad_image!r}")
        policy = MediaPolicy(self.on_bad_image, self.max_bad, self._media, self._dropped)
        return PackSamples(samples, self.capacity, policy, resume)
