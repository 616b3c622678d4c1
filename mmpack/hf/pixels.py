"""uint8 pixels into the vision tower: the forward bound on a model's patch embedding.

Bound there and not done in the hook, so that FSDP2 and ZeRO-3 gather the weight as for any forward:
FSDP2 has gathered the group the embedding is in, ZeRO-3 gathers what a forward reads. Floats take the
stock forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mmpack.hf.embedding import is_bare


def patch_embed_forward(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The forward to bind on a patch embedding whose class's own forward is `stock`."""

    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != torch.uint8:
            return stock(self, hidden_states)
        mean, std = self.normalization  # the hook's, from the pack
        weight = self.proj.weight
        is_here = not isinstance(weight, DTensor) and weight.ndim == 5
        if is_here and is_bare(self.proj, nn.Conv3d):
            from mmpack.ops import patch_embed  # here: Triton is not everywhere

            return patch_embed(hidden_states, None, weight, self.proj.bias, mean, std)
        return stock(self, normalized(hidden_states, mean, std, self.temporal_patch_size))

    return forward


def normalized(
    stills: torch.Tensor, mean: Sequence[float], std: Sequence[float], frames: int
) -> torch.Tensor:
    """uint8 still patches (P, C * p * p) -> `pixel_values` (P, C * frames * p * p) float32, where they
    are: for a projection that is more than its weight (LoRA, hooks, a shard of its own)."""
    channels = stills.unflatten(1, (len(mean), -1)).float().unbind(1)
    scaled = [(x / 255 - m) / s for x, m, s in zip(channels, mean, std)]
    return torch.stack(scaled, dim=1)[:, :, None].expand(-1, -1, frames, -1).flatten(1)
