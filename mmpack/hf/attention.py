"""Attention within segments: registered with transformers for text, bound on instances for vision.

Text layers call a registered function through transformers' AttentionInterface. The vision tower does not: without
flash attention, it calls the interface once per image in a Python loop, so its attention gets its own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from mmpack.hf.compat import AttentionMaskInterface, sdpa_attention_forward, sdpa_mask
from mmpack.hf.context_parallel import to_heads, to_tokens
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.hf.op_choice import compute_dtype, impl_for
from mmpack.hf.rotary import rotate_vision
from mmpack.ops.varlen_attention import varlen_attention

NAME = "mmpack"


def text_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    mmpack: MmpackDict | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment; query (1, H, T, K) -> (1, T, H, K).

    Without an `mmpack` dict (`generate`, padded evaluation), calls transformers' sdpa.

    Raises:
        ValueError: attention dropout or a sliding window is enabled, or attention is to be recorded under context
            parallelism.
    """
    if mmpack is None:
        attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return attended
    if kwargs.get("dropout"):
        raise ValueError(
            "packed attention does not support dropout; set attention_dropout to 0 in the config"
        )
    if kwargs.get("sliding_window") is not None:
        raise ValueError(
            "packed attention does not support a sliding window; set use_sliding_window to False in the config"
        )
    if "watch" in mmpack:
        mmpack["watch"](module.layer_idx, query[0], key[0], kwargs["scaling"], mmpack)
    dtype = compute_dtype(value)
    q_THK, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    over = mmpack.get("context")
    if over is not None:
        q_THK, k, v = to_heads((q_THK, k, v), over)
    out = varlen_attention(
        q_THK,
        k,
        v,
        mmpack["cu_seqlens"],
        mmpack["max_seqlen"],
        causal=True,
        scale=kwargs["scaling"],
        tiles=(mmpack["tiles"], mmpack["segment_ids"]),
        offsets=mmpack["offsets"],
        impl=impl_for(mmpack, "attention", dtype),
    )
    if over is not None:
        out = to_tokens(out, over)
    return out[None], None


def vision_forward(
    stock: Callable[..., torch.Tensor], segments: str = "vision"
) -> Callable[..., torch.Tensor]:
    """The forward to bind on a vision attention, given its class's forward `stock`. `segments` is "vision" for
    attention within whole images, "window" within windows."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        mmpack: Any = None,  # a MmpackDict; its keys are built from `segments`
        **kwargs: Any,
    ) -> torch.Tensor:
        if mmpack is None:
            return stock(
                self, hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs
            )
        num_patches = len(hidden_states)
        q, k, v = self.qkv(hidden_states).reshape(num_patches, 3, self.num_heads, -1).unbind(1)
        q, k = rotate_vision(q, k, position_embeddings, mmpack)  # type: ignore[arg-type]  # given
        q, k, v = (x.to(compute_dtype(v)) for x in (q, k, v))
        out = varlen_attention(
            q,
            k,
            v,
            mmpack[f"{segments}_cu_seqlens"],
            mmpack[f"{segments}_max_seqlen"],
            causal=False,
            scale=self.scaling,
            tiles=(mmpack[f"{segments}_tiles"], mmpack[f"{segments}_segment_ids"]),
            offsets=mmpack[f"{segments}_offsets"],
            impl=impl_for(mmpack, f"{segments}_attention", q.dtype),
        )
        projected: torch.Tensor = self.proj(out.reshape(num_patches, -1))
        return projected

    return forward


AttentionInterface.register(NAME, text_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
