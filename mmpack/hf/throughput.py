"""What `PackingCallback` logs: tokens, seconds, FLOPs, and the peak FLOP/s of devices."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from mmpack.hf.attention_share import AttentionShare
from mmpack.hf.compat import whole_numel
from mmpack.hf.gather import gathered
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.hf.model_parts import parts_of
from mmpack.hf.source_losses import SourceLosses, mean_losses
from mmpack.packing.cost import sample_flops
from mmpack.types import Int64

# Dense bf16 TFLOP/s with float32 accumulation, from NVIDIA's data sheets (which since Hopper print sparse figures,
# twice as high). The first entry whose words are all in the device's name applies.
PEAK_TFLOPS = {
    "H200 NVL": 835,
    "H200": 989,
    "GH200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "H800 PCIe": 756,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "B200": 2250,
}


@dataclass
class Seen:
    """One rank's counts since the last log."""

    num_batches: int = 0
    tokens: int = 0
    supervised: int = 0
    patches: int = 0
    useful_flops: int = 0
    left_out: dict[str, int] = field(default_factory=dict)  # since the run began
    flops: list[int] = field(default_factory=list)  # of each step, useful or not
    start: float = field(default_factory=lambda: time.perf_counter())
    paused: float = 0.0
    mark: float = field(default_factory=lambda: time.perf_counter())  # end of the last step


class TrainedCosts:
    """FLOPs of segments in a model, given which parameters are trained (`mmpack.packing.cost.sample_flops`).

    A part without trained parameters counts as frozen. For a language model trained through adapters (LoRA),
    gradients of weights do not count; a vision tower trained through adapters counts as fully trained.
    """

    def __init__(self, model: nn.Module, base: Any) -> None:
        self.config = base.config
        parts = parts_of(model, base)
        self.frozen = [
            name for name, part in parts.items() if not any(p.requires_grad for p in part)
        ]
        self.frozen_for_text = self.frozen
        language = parts["language"]
        trained = sum(whole_numel(p) for p in language if p.requires_grad)
        if 0 < trained < sum(map(whole_numel, language)) / 2:
            # Adapters: gradients of activations, but not of weights.
            self.frozen_for_text = ["vision", "language"]

    def of(
        self, num_tokens: Int64, num_supervised: Int64, grid_thw: Int64, image_offsets: Int64
    ) -> Int64:
        """(S,) operations, as in `sample_flops`."""
        none, nowhere = np.empty((0, 3), dtype=np.int64), np.zeros_like(image_offsets)
        zeros = np.zeros_like(num_tokens)
        text = (num_tokens, num_supervised, none, nowhere)
        images = (zeros, zeros, grid_thw, image_offsets)
        return sample_flops(self.config, *text, frozen=self.frozen_for_text) + sample_flops(
            self.config, *images, frozen=self.frozen
        )


def supervised_of(pack: MmpackDict) -> Sequence[int]:
    """S + 1 segment offsets in the supervised rows of a whole pack, also where this rank has a part of it."""
    context = pack.get("context")
    return pack["supervised_offsets"] if context is None else context["supervised_offsets"]


def useful_tokens(pack: MmpackDict) -> int:
    """Tokens of a batch's samples that have supervised tokens: not those of filler and empty packs."""
    is_useful = np.diff(pack["supervised_offsets"]) > 0
    return int(np.diff(pack["offsets"])[is_useful].sum())


class PackCounter:
    """Counts a rank's packs, and computes the log values over all ranks.

    Args:
        costs: FLOPs of segments; None: FLOPs are not counted.
        share: records attention to images; None: not recorded.
        context_size: ranks that share each pack (`ContextGroup`). Each of them counts the whole pack, and the log
            values are of each group's first.

    Attributes:
        losses: those of the data's sources.
    """

    def __init__(
        self,
        costs: TrainedCosts | None = None,
        share: AttentionShare | None = None,
        context_size: int = 1,
    ) -> None:
        self.costs = costs
        self.share = share
        self.context_size = context_size
        self.losses = SourceLosses()
        self._seen = Seen()

    @property
    def num_batches(self) -> int:
        """The number of batches since the last log."""
        return self._seen.num_batches

    def begin_step(self) -> None:
        """Start counting a step."""
        self._seen.flops.append(0)
        if self.share is not None:
            self.share.begin()

    def end_step(self) -> None:
        """Mark the end of a step."""
        self._seen.mark = time.perf_counter()

    def pause(self) -> None:
        """Exclude the time since the end of the step."""
        now = time.perf_counter()
        self._seen.paused += now - self._seen.mark
        self._seen.mark = now

    def count(self, packs: Sequence[MmpackDict]) -> None:
        """Count batches of a step by their `mmpack` dicts."""
        seen = self._seen
        for pack in packs:
            tokens, supervised = np.diff(pack["offsets"]), np.diff(supervised_of(pack))
            # An image or a video that several segments show counts for the first one.
            is_new = np.array(pack["grid_is_new"], dtype=bool)
            grids = np.array(pack["grid_thw"], dtype=np.int64).reshape(-1, 3)[is_new]
            images = np.concatenate([[0], is_new.cumsum()])[np.array(pack["grid_offsets"])]
            patches = np.diff(np.concatenate([[0], grids.prod(axis=1).cumsum()])[images])
            is_useful = supervised > 0
            seen.num_batches += 1
            seen.tokens += int(tokens[is_useful].sum())
            seen.supervised += int(supervised.sum())
            seen.patches += int(patches[is_useful].sum())
            if self.costs is not None:
                flops = self.costs.of(tokens, supervised, grids, images)
                seen.useful_flops += int(flops[is_useful].sum())
                seen.flops[-1] += int(flops.sum())
        self.losses.count(packs)
        if self.share is not None:
            self.share.begin()

    def pop(
        self, capacity: int, left_out: Mapping[str, int], device: torch.device
    ) -> dict[str, float]:
        """The log values over all ranks since the last call, then reset the counts. A collective.

        Args:
            capacity: maximum tokens per batch.
            left_out: what this rank left out so far, by name: segments dropped, rows skipped.
            device: its peak is used for `pack/mfu`.
        """
        seen, self._seen = self._seen, Seen()
        seconds = self._seen.start - seen.start - seen.paused
        seen.left_out = dict(left_out)
        mine: Any = (seen, self.share.pop() if self.share is not None else None, self.losses.pop())
        ranks = gathered(mine)
        every = [rank for rank, _, _ in ranks[:: self.context_size]]  # of groups
        room = capacity * sum(rank.num_batches for rank in every)
        values = {
            "utilization": sum(rank.tokens for rank in every) / room,
            "tokens_per_second": sum(rank.tokens for rank in every) / seconds,
            "supervised_tokens_per_second": sum(rank.supervised for rank in every) / seconds,
            "patches_per_second": sum(rank.patches for rank in every) / seconds,
        }
        if self.costs is not None:
            steps = np.array([rank.flops for rank in every])  # (groups, steps)
            values["flops_max_over_mean"] = steps.max(axis=0).sum() / steps.mean(axis=0).sum()
            tflops = sum(rank.useful_flops for rank in every) / seconds / len(ranks) / 1e12
            values["tflops"] = tflops
            peak = peak_tflops(device)
            if peak is not None:
                values["mfu"] = tflops / peak
        if self.share is not None:
            for layer, (mass, rows) in zip(self.share.layers, sum(share for _, share, _ in ranks)):
                if rows:
                    values[f"image_attention/layer_{layer}"] = mass / rows
        losses = mean_losses(found for *_, found in ranks)
        values |= {f"loss/{name}": loss for name, loss in losses.items()}
        for name in left_out:
            if number := sum(rank.left_out[name] for rank in every):
                values[name] = number
        return {f"pack/{name}": float(value) for name, value in values.items()}


def peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device in TFLOP/s; None if unknown, as for a CPU or a MIG slice."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    if "MIG" in words:
        return None
    known = (peak for name, peak in PEAK_TFLOPS.items() if set(name.split()) <= set(words))
    return next(known, None)
