"""uint8 pixels in the vision tower: the forward bound on a model's patch embedding.

It is a bound forward, not a hook, so that FSDP2 and ZeRO-3 gather the weight as for any forward. Floats take the
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
from mmpack.hf.op_choice import compute_dtype, impl_for


def patch_embed_forward(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The forward to bind on a patch embedding, given its class's forward `stock`."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != torch.uint8:
            return stock(self, hidden_states)
        mean, std = self.normalization  # set, like `choice`, by the hook from the pack
        weight = self.proj.weight
        is_here = not isinstance(weight, DTensor) and weight.ndim == 5
        if is_here and is_bare(self.proj, nn.Conv3d):
            from mmpack.ops import patch_embed  # late: Triton may be missing

            stills, video = hidden_states, None
            still_values = math.prod(weight.shape[1:]) // weight.shape[2]
            if hidden_states.shape[1] > still_values:
                stills, video = hidden_states[:0, :still_values], hidden_states
            chosen = impl_for(self.choice, "patches", compute_dtype(weight))
            impl = "triton" if chosen == "triton" else "torch"
            return patch_embed(stills, video, weight, self.proj.bias, mean, std, impl=impl)
        values = self.in_channels * self.temporal_patch_size * self.patch_size**2
        return stock(self, normalized(hidden_states, mean, std, values))

    return forward


def normalized(
    patches: torch.Tensor, mean: Sequence[float], std: Sequence[float], values: int
) -> torch.Tensor:
    """uint8 patches of images (P, C * p * p) or videos (P, C * t * p * p) -> `pixel_values` (P, values) float32 on
    the same device, values = C * t * p * p. For a projection that is not a plain module (LoRA, hooks, shards)."""
    channels = patches.unflatten(1, (len(mean), -1)).float().unbind(1)
    scaled = [(x / 255 - m) / s for x, m, s in zip(channels, mean, std)]
    return in_every_frame(torch.stack(scaled, dim=1).flatten(1), len(mean), values)


def in_every_frame(patches: torch.Tensor, channels: int, values: int) -> torch.Tensor:
    """Patches (P, values); those of images (P, C * p * p) are repeated in every frame."""
    frames = values // patches.shape[1]
    by_channel: torch.Tensor = patches.unflatten(1, (channels, 1, -1))
    return by_channel.expand(-1, -1, frames, -1).flatten(1)
