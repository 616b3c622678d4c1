"""What `PackingCallback` counts: tokens, seconds and FLOPs, and what a device could do."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from mmpack.hf.model_parts import parts_of
from mmpack.packing.cost import sample_flops
from mmpack.types import Int64

# Dense bf16 TFLOP/s with float32 sums, from NVIDIA's data sheets (which print sparse ones, twice as
# many, since Hopper). The first entry whose words are all in the device's name.
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
    """What one rank has seen since the last log."""

    num_batches: int = 0
    tokens: int = 0
    supervised: int = 0
    patches: int = 0
    useful_flops: int = 0
    dropped: int = 0  # since the data set was made
    flops: list[int] = field(default_factory=list)  # of each step, all it computes
    start: float = field(default_factory=lambda: time.perf_counter())
    paused: float = 0.0
    mark: float = field(default_factory=lambda: time.perf_counter())  # training's last sign of life

    def pause(self) -> None:
        """What has passed since the mark was no training."""
        now = time.perf_counter()
        self.paused += now - self.mark
        self.mark = now


class TrainedCosts:
    """FLOPs of segments in a model as it is being trained."""

    def __init__(self, model: nn.Module, base: Any) -> None:
        self.config = base.config
        parts = parts_of(model, base)
        self.frozen = [
            name for name, part in parts.items() if not any(p.requires_grad for p in part)
        ]
        self.frozen_for_text = self.frozen
        language = parts["language"]
        trained = sum(_numel(p) for p in language if p.requires_grad)
        if 0 < trained < sum(map(_numel, language)) / 2:
            # Adapters: gradients pass, as they would to a trained merger below.
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


def _numel(parameter: Any) -> int:
    numel: int = getattr(parameter, "ds_numel", None) or parameter.numel()  # ZeRO-3: an empty shell
    return numel


def peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 TFLOP/s of a device; None if it is not known, as of a CPU or a part of a GPU (MIG)."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    if "MIG" in words:
        return None
    known = (peak for name, peak in PEAK_TFLOPS.items() if set(name.split()) <= set(words))
    return next(known, None)
