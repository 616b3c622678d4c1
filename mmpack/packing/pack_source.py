"""What `PackedDataset` and `PackStream` share: samples become packs in a DataLoader worker."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.utils.data import get_worker_info

from mmpack.data.media_paths import DATA_URIS, MediaFolders
from mmpack.errors import MAX_BAD, BadImageError, check_max_bad, count_reason, judge
from mmpack.packing import worker_buffers
from mmpack.packing.assemble import assemble
from mmpack.packing.compact import compact
from mmpack.types import EncodedSample

_COUNTERS = 257  # of segments: 256 workers, then the process itself
_log = logging.getLogger(__name__)


class PackSource:
    """A source of packs: how its samples are assembled, and what happens to images that no longer decode.

    Attributes:
        on_bad_image: "raise" or "drop".
        max_bad: the share of samples with images or videos that "drop" may leave out; from 1,000 samples on,
            more are an error.
        assemble: "host", or "device": packs are `CompactPack`s, for `PackCollator(assemble="device")`.
    """

    def __init__(self) -> None:
        self.on_bad_image: Literal["raise", "drop"] = "raise"
        self.max_bad = MAX_BAD
        self.assemble: Literal["host", "device"] = "host"
        self._media: MediaFolders | None = None
        # One column a worker: segments that came, of them with images or videos, dropped.
        self._counts = torch.zeros((3, _COUNTERS), dtype=torch.int64).share_memory_()
        self._reasons: Counter[str] = Counter()  # of this process
        self._example = ""

    @property
    def media_folders(self) -> list[str] | None:
        """Where files of images and videos must lie when a pack is made, links followed; None: anywhere. Set
        it before workers start."""
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
        return int(self._counts[2].sum())

    def _assemble(self, samples: list[EncodedSample]) -> Any:
        if self.on_bad_image not in ("raise", "drop"):
            raise ValueError(f"on_bad_image must be 'raise' or 'drop', got {self.on_bad_image!r}")
        if self.assemble not in ("host", "device"):
            raise ValueError(f"assemble must be 'host' or 'device', got {self.assemble!r}")
        make = compact if self.assemble == "device" else assemble
        vision = samples[0].vision
        if self.on_bad_image == "drop":
            self._count(len(samples), sum(bool(sample.media) for sample in samples), 0)
        while samples:
            try:
                return make(samples, empty=worker_buffers.empty, folders=self._media)
            except BadImageError as error:
                if self.on_bad_image == "raise":
                    raise
                _log.warning("dropped %s", error)
                count_reason(self._reasons, str(error).partition(": ")[2])
                self._example = self._example or str(error)
                self._count(0, 0, 1)
                del samples[error.segment]
        return make([EncodedSample.filler(1, vision)])  # none is left

    def _count(self, segments: int, with_media: int, dropped: int) -> None:
        """Count segments where every worker sees it.

        Raises:
            ValueError: too many were dropped.
        """
        worker = get_worker_info()
        column = -1 if worker is None else worker.id % (_COUNTERS - 1)
        self._counts[:, column] += torch.tensor([segments, with_media, dropped])
        if self._reasons:
            check_max_bad(self.max_bad)
            num_rows, num_media, num_bad = self._counts.sum(dim=1).tolist()
            judge(num_bad, num_rows, num_media, self.max_bad, self._reasons, self._example)
