"""What `PackedDataset` and `PackStream` share: samples become packs in a DataLoader worker."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch.utils.data import get_worker_info

from mmpack.errors import BadImageError
from mmpack.packing import worker_buffers
from mmpack.packing.assemble import assemble
from mmpack.packing.compact import compact
from mmpack.types import EncodedSample

_COUNTERS = 257  # of segments dropped: 256 workers, then the process itself
_log = logging.getLogger(__name__)


class PackSource:
    """A source of packs: how its samples are assembled, and what happens to images that no longer decode.

    Attributes:
        on_bad_image: "raise" or "drop".
        assemble: "host", or "device": packs are `CompactPack`s, for `PackCollator(assemble="device")`.
    """

    def __init__(self) -> None:
        self.on_bad_image: Literal["raise", "drop"] = "raise"
        self.assemble: Literal["host", "device"] = "host"
        self._dropped = torch.zeros(_COUNTERS, dtype=torch.int64).share_memory_()  # one a worker

    @property
    def num_dropped_segments(self) -> int:
        """Segments left out of packs so far because of bad images, in this process and its workers."""
        return int(self._dropped.sum())

    def _assemble(self, samples: list[EncodedSample]) -> Any:
        if self.on_bad_image not in ("raise", "drop"):
            raise ValueError(f"on_bad_image must be 'raise' or 'drop', got {self.on_bad_image!r}")
        if self.assemble not in ("host", "device"):
            raise ValueError(f"assemble must be 'host' or 'device', got {self.assemble!r}")
        make = compact if self.assemble == "device" else assemble
        vision = samples[0].vision
        while samples:
            try:
                return make(samples, empty=worker_buffers.empty)
            except BadImageError as error:
                if self.on_bad_image == "raise":
                    raise
                _log.warning("dropped %s", error)
                worker = get_worker_info()
                self._dropped[-1 if worker is None else worker.id % (_COUNTERS - 1)] += 1
                del samples[error.segment]
        return make([EncodedSample.filler(1, vision)])  # none is left
