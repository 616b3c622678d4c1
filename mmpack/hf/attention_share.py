"""How much supervised text attends to images: attention mass, from a sample of rows.

A model may learn to answer from the text alone, which the loss does not show. The attention of supervised tokens
to image placeholders does. It is computed here from a layer's own q and k, for at most ROWS rows per pack: ROWS x
T scores per head, never T x T.
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

ROWS = 64  # evenly spaced supervised rows of a pack; with 8,192 tokens, 2 MiB of scores per head


class AttentionShare:
    """Sums of attention mass on images per text layer, kept on the device until `pop`.

    Args:
        layers: indices of the text layers to record.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(sorted(set(layers)))
        self._left: set[int] = set()
        self._sums: dict[int, list[torch.Tensor]] = {layer: [] for layer in self.layers}

    def begin(self) -> None:
        """Start a batch: record each layer once, even if gradient checkpointing runs it twice."""
        self._left = set(self.layers)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def take(
        self, layer: int, q_HTK: torch.Tensor, k: torch.Tensor, scale: float, pack: MmpackDict
    ) -> None:
        """Record a layer; text attention calls this as `mmpack["watch"]`."""
        if layer in self._left:
            self._left.remove(layer)
            self._sums[layer].append(image_share(q_HTK, k, scale, pack))

    def pop(self) -> Float64:
        """(layers, 2) float64 sums of mass and rows since the last call. Waits for the device."""
        rows = []
        for sums in self._sums.values():
            rows.append(torch.stack(sums).sum(0).cpu().numpy() if sums else np.zeros(2))
            sums.clear()
        return np.stack(rows).astype(np.float64)


@torch.no_grad()
def image_share(
    q_HTK: torch.Tensor, k: torch.Tensor, scale: float, pack: MmpackDict
) -> torch.Tensor:
    """(2,) sum of the mass on images over sampled supervised rows, averaged over heads, and the number of rows.

    A row is a token whose prediction is supervised. Rows without an image before them in their segment are not
    counted. Softmax is computed in float32, or in float64 if q is float64.

    Args:
        q_HTK, k: rotated queries (H, T, K) and keys, whose number of heads divides H.
        scale: factor of the scores.
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
    for q, k_TK in zip(q_HTK.chunk(len(k)), k):  # query heads that share one key head
        # autocast would round products to bf16
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            scores = q[:, rows].to(dtype) @ k_TK.to(dtype).T * scale
        weights = scores.masked_fill_(is_hidden, -torch.inf).softmax(-1)
        mass += (weights * is_image).sum((0, 2)) / num_heads
    return torch.stack([(mass * sees_image).sum(), sees_image.sum().to(dtype)])


def chosen_layers(model: nn.Module, base: Any, layers: Sequence[int] | None) -> Sequence[int]:
    """The text layers to record: `layers`, or by default the middle and the last one of those with attention.

    Raises:
        ValueError: the model is not patched, or lacks a layer, or it is a Gated DeltaNet (Qwen3.5).
    """
    if not is_patched(model):
        raise ValueError(
            "attention_every needs a patched model; call patch_model(model) before training"
        )
    text = base.language_model.layers
    with_attention = [n for n, layer in enumerate(text) if hasattr(layer, "self_attn")]
    if layers is None:
        return [with_attention[len(with_attention) // 2], with_attention[-1]]
    if not layers or any(not 0 <= layer < len(text) for layer in layers):
        raise ValueError(f"attention_layers must be from 0 to {len(text) - 1}, got {list(layers)}")
    linear = [layer for layer in layers if layer not in with_attention]
    if linear:
        raise ValueError(
            f"attention_layers {linear} are Gated DeltaNets, which have no attention to record; choose from "
            f"{with_attention}"
        )
    return layers
