"""`pack/loss/NAME`: the loss of each source of the data, summed on the device and read when Trainer logs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mmpack.hf.mmpack_dict import MmpackDict

_MOST = 24  # sources with a value of their own; others are one
_OTHERS = "other sources"


class SourceLosses:
    """Sums of weight * loss and of weights, by source, since the last log.

    Attributes:
        seen: the sources of all batches.
    """

    def __init__(self) -> None:
        self.seen = set[str]()
        self._rows: list[torch.Tensor] = []  # of each batch since `count`
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}
        self._weights = defaultdict[str, float](float)

    def take(self, losses_L: torch.Tensor) -> None:
        """Keep the losses of a batch's rows, which `PackedLoss` computes. torch.compile traces this."""
        self._rows.append(losses_L)

    def count(self, packs: Sequence[MmpackDict]) -> bool:
        """Add the batches whose losses were taken; `packs` are their `mmpack` dicts. False: they were not
        taken."""
        self.seen.update(name for pack in packs for name in pack["sources"])
        rows, self._rows = self._rows, []
        if len(rows) != len(packs):
            return False  # another loss than mmpack's, which tells no rows
        for pack, losses in zip(packs, rows):
            names = pack["sources"]
            if not names:
                continue
            if "loss_weight_bits" in pack:
                bits = pack["loss_weight_bits"].to(losses.device)
                losses = losses * bits.view(torch.float32)
            sums = losses.new_zeros(len(names), dtype=torch.float64)
            if "source_rows" in pack:
                sums.index_add_(0, pack["source_rows"].to(losses.device), losses.double())
            else:
                sums += losses.double().sum()
            self._sums[names] = sums + self._sums[names] if names in self._sums else sums
            for name, weight in zip(names, pack["source_sums"]):
                self._weights[name] += weight
        return True

    def pop(self) -> dict[str, tuple[float, float]]:
        """Source -> (sum of weight * loss, sum of weights) on this rank; then reset. Waits for the device."""
        totals = defaultdict[str, float](float)
        names = [name for group in self._sums for name in group]
        values: Any = torch.cat([*self._sums.values()]).cpu().numpy() if names else []
        for name, value in zip(names, values):
            totals[name] += float(value)
        found = {name: (totals[name], weight) for name, weight in self._weights.items()}
        self._sums.clear()
        self._weights.clear()
        return found


def mean_losses(ranks: Iterable[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """The loss of each source over all ranks, the largest 24 sources by name; {} for a single source."""
    sums: dict[str, list[float]] = {}
    for found in ranks:
        for name, values in found.items():
            sums[name] = [a + b for a, b in zip(sums.get(name, (0.0, 0.0)), values)]
    if len(sums) < 2:
        return {}
    by_weight = sorted(sums, key=lambda name: (-sums[name][1], name))
    for name in by_weight[_MOST:]:
        sums[_OTHERS] = [a + b for a, b in zip(sums.get(_OTHERS, (0.0, 0.0)), sums.pop(name))]
    return {name: loss / weight for name, (loss, weight) in sorted(sums.items()) if weight}
