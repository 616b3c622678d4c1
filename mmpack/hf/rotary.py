"""Rotary embedding by mmpack's kernel: the forward bound on text attention, and a function for vision attention.

transformers computes cos and sin once for all layers. The kernel computes angles from integer positions and the
rotary module's `inv_freq`, which is read at call time because dynamic ropes change it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mmpack.hf.compat import apply_rotary_pos_emb_vision, attention_of
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.hf.model_parts import family_of
from mmpack.hf.op_choice import compute_dtype, impl_for

Attended = tuple[torch.Tensor, torch.Tensor | None]  # hidden states; attention weights


def rotations(
    base: Any, pack: MmpackDict, position_ids: torch.Tensor
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """`rotary` and `vision_rotary` of the `mmpack` dict: a rotary module and its positions, (3, T) for the text
    and (2, P) for the tower; for the text also whether its sections are interleaved."""
    text = base.language_model.rotary_emb, position_ids, family_of(base).is_interleaved
    return text, (base.visual.rotary_pos_emb, pack["vision_position_ids"].T)


def rotate(
    q_THK: torch.Tensor,
    k: torch.Tensor,
    rotary: Any,
    position_ids: torch.Tensor,
    is_interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k rotated as by the module `rotary`: contiguous, in one launch."""
    from mmpack.ops import apply_mrope  # late: Triton may be missing

    one_each = [len(rotary.inv_freq)] * len(position_ids)  # a tower's sections share frequencies
    return apply_mrope(
        q_THK,
        k,
        position_ids,
        rotary.inv_freq,
        tuple(getattr(rotary, "mrope_section", one_each)),
        interleaved=is_interleaved,
        attention_scaling=rotary.attention_scaling,
    )


def rotate_vision(
    q: torch.Tensor, k: torch.Tensor, cos_sin: tuple[torch.Tensor, ...], pack: MmpackDict
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tower's q and k (P, H, K), rotated by the kernel if the pack has `vision_rotary`, else as in stock."""
    if "vision_rotary" in pack and impl_for(pack, "vision_rotary", q.dtype) == "triton":
        return rotate(q, k, *pack["vision_rotary"])
    rotated: tuple[torch.Tensor, torch.Tensor] = apply_rotary_pos_emb_vision(q, k, *cos_sin)
    return rotated


def text_forward(stock: Callable[..., Attended]) -> Callable[..., Attended]:
    """The forward to bind on a text attention, given its class's forward `stock`."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Attended:
        pack: MmpackDict | None = kwargs.get("mmpack")
        if (
            pack is None
            or "rotary" not in pack
            or impl_for(pack, "rotary", compute_dtype(hidden_states)) != "triton"
        ):
            return stock(self, hidden_states, attention_mask=attention_mask, **kwargs)
        rows = hidden_states[0]
        gate = None
        q, k, v = (x(rows) for x in (self.q_proj, self.k_proj, self.v_proj))
        if q.shape[1] == 2 * self.config.num_attention_heads * self.head_dim:  # Qwen3.5
            q, gate = q.unflatten(1, (-1, 2, self.head_dim)).unbind(2)
        q, k, v = (x.reshape(len(rows), -1, self.head_dim) for x in (q, k, v))
        if hasattr(self, "q_norm"):  # Qwen3-VL, Qwen3.5
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, k, *pack["rotary"])
        out, weights = attention_of(self.config)(
            self,
            *(x.transpose(0, 1)[None] for x in (q, k, v)),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=getattr(self, "sliding_window", None),
            mmpack=pack,
        )
        out = out.flatten(2)
        if gate is not None:
            out = out * gate.flatten(1).sigmoid()
        return self.o_proj(out), weights

    return forward
