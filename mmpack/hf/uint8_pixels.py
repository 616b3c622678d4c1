"""uint8 pixels into the vision tower: the forward bound on a model's patch embedding.

Bound there and not done in the hook, so that FSDP2 and ZeRO-3 gather the weight as for any forward:
FSDP2 has gathered the group the embedding is in, ZeRO-3 gathers what a forward reads. Floats take the
stock forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mmpack.hf.embedding import is_bare


def patch_embed_forward(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The forward to bind on a patch embedding whose class's own forward is `stock`."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != torch.uint8:
            return stock(self, hidden_states)
        mean, std = self.normalization  # the hook's, from the pack
        weight = self.proj.weight
        is_here = not isinstance(weight, DTensor) and weight.ndim == 5
        if is_here and is_bare(self.proj, nn.Conv3d):
            from mmpack.ops import patch_embed  # here: Triton is not everywhere

            stills, video = hidden_states, None
            still_values = math.prod(weight.shape[1:]) // weight.shape[2]
            if hidden_states.shape[1] > still_values:
                stills, video = hidden_states[:0, :still_values], hidden_states
            return patch_embed(stills, video, weight, self.proj.bias, mean, std)
        values = self.in_channels * self.temporal_patch_size * self.patch_size**2
        return stock(self, normalized(hidden_states, mean, std, values))

    return forward


def normalized(
    patches: torch.Tensor, mean: Sequence[float], std: Sequence[float], values: int
) -> torch.Tensor:
    """uint8 patches, of stills (P, C * p * p) or videos (P, C * t * p * p) -> `pixel_values` (P, values)
    float32, values = C * t * p * p, where they are: for a projection that is more than its weight (LoRA,
    hooks, a shard of its own)."""
    channels = patches.unflatten(1, (len(mean), -1)).float().unbind(1)
    scaled = [(x / 255 - m) / s for x, m, s in zip(channels, mean, std)]
    return in_every_frame(torch.stack(scaled, dim=1).flatten(1), len(mean), values)


def in_every_frame(patches: torch.Tensor, channels: int, values: int) -> torch.Tensor:
    """Patches (P, values), those of stills (P, C * p * p) repeated in every frame."""
    frames = values // patches.shape[1]
    by_channel: torch.Tensor = patches.unflatten(1, (channels, 1, -1))
    return by_channel.expand(-1, -1, frames, -1).flatten(1)
