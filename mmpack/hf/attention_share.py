"""How much supervised text looks at images: attention mass, from a sample of rows.

A model may learn to answer from the text alone, and a loss does not tell. What does is the attention
that supervised tokens put on image placeholders; a layer's is computed here from the very q and k the
layer attends with, for at most ROWS rows of a pack: ROWS x T scores a head, never T x T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.hf.model_patch import is_patched
from mmpack.types import Float64

ROWS = 64  # evenly spaced over a pack's supervised rows; scores of 8,192 tokens: 2 MiB a head


class AttentionShare:
    """Sums of attention mass on images, by text layer, left on the device until they are asked for.

    Args:
        layers: numbers of the text layers to watch.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(sorted(set(layers)))
        self._left: set[int] = set()
        self._sums: dict[int, list[torch.Tensor]] = {layer: [] for layer in self.layers}

    def begin(self) -> None:
        """A batch comes: each layer is to be taken once, though gradient checkpointing runs it twice."""
        self._left = set(self.layers)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def take(
        self, layer: int, q_HTK: torch.Tensor, k: torch.Tensor, scale: float, pack: MmpackDict
    ) -> None:
        """What text attention calls, as `mmpack["watch"]`."""
        if layer in self._left:
            self._left.remove(layer)
            self._sums[layer].append(image_share(q_HTK, k, scale, pack))

    def pop(self) -> Float64:
        """(layers, 2) mass and rows summed since the last call. Waits for the device."""
        rows = []
        for sums in self._sums.values():
            rows.append(torch.stack(sums).sum(0).cpu().numpy() if sums else np.zeros(2))
            sums.clear()
        return np.stack(rows).astype(np.float64)


@torch.no_grad()
def image_share(
    q_HTK: torch.Tensor, k: torch.Tensor, scale: float, pack: MmpackDict
) -> torch.Tensor:
    """Sum over sampled supervised rows of the mass on images, mean of the heads, and how many rows: (2,).

    A row is one whose prediction is supervised. One with no image before it in its segment cannot look
    at any, and is not counted. Softmax is in float32, or float64 if q is; no random number is drawn.

    Args:
        q_HTK, k: rotated queries (H, T, K) and keys, of as many heads or a divisor of H.
        scale: of the scores.
        pack: a batch's `mmpack` dict.
    """
    device, supervised = q_HTK.device, pack["supervised_index"]
    dtype = torch.promote_types(q_HTK.dtype, torch.float32)
    num_heads, num_tokens, _ = q_HTK.shape
    n = min(ROWS, len(supervised))
    if not n:
        return torch.zeros(2, dtype=dtype, device=device)
    evenly = (torch.arange(n, device=device) * len(supervised) + len(supervised) // 2) // n
    rows = supervised[evenly]
    begin = pack["cu_seqlens"][pack["segment_ids"][rows]]
    tokens = torch.arange(num_tokens, device=device)
    is_hidden = (tokens < begin[:, None]) | (tokens > rows[:, None])
    is_image = pack["feature_index"] >= 0
    sees_image = (is_image & ~is_hidden).any(1)
    mass = torch.zeros(n, dtype=dtype, device=device)
    for q, k_TK in zip(q_HTK.chunk(len(k)), k):  # heads that share keys
        # autocast, which would round products to bf16, is off where it can be on
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            scores = q[:, rows].to(dtype) @ k_TK.to(dtype).T * scale
        weights = scores.masked_fill_(is_hidden, -torch.inf).softmax(-1)
        mass += (weights * is_image).sum((0, 2)) / num_heads
    return torch.stack([(mass * sees_image).sum(), sees_image.sum().to(dtype)])


def chosen_layers(model: nn.Module, base: Any, layers: Sequence[int] | None) -> Sequence[int]:
    """The text layers to look at, those asked for or the middle and the last one.

    Raises:
        ValueError: the model is not patched, or has no such layers.
    """
    if not is_patched(model):
        raise ValueError(
            "attention_every needs a patched model, whose attention calls back; "
            "patch_model(model) before training"
        )
    num_layers = len(base.language_model.layers)
    if layers is None:
        return [num_layers // 2, num_layers - 1]
    wrong = [layer for layer in layers if not 0 <= layer < num_layers]
    if wrong or not layers:
        raise ValueError(f"attention_layers must be from 0 to {num_layers - 1}, got {list(layers)}")
    return layers
