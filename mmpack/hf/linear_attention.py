"""Linear attention within segments: the forward bound on Gated DeltaNets (Qwen3.5).

A Gated DeltaNet sees earlier tokens through a causal convolution and through a state that every token updates. It
knows no positions, so only the calls themselves can keep segments apart.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch

from mmpack.hf.compat import has_linear_kernels, linear_keywords
from mmpack.hf.context_parallel import of_rank, to_heads, to_tokens
from mmpack.hf.mmpack_dict import ContextDict, MmpackDict


def linear_forward(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The forward to bind on a Gated DeltaNet, given its class's forward `stock`.

    With a pack, stock is called once per segment, which is exact on every device. On CUDA with
    flash-linear-attention and causal-conv1d installed, it is called once, with the keywords by which their kernels
    begin each segment anew (not measured).
    """

    def forward(
        self: Any, hidden_states: torch.Tensor, mmpack: MmpackDict | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if mmpack is None:
            return stock(self, hidden_states, **kwargs)
        over = mmpack.get("context")
        if over is not None:
            return _over_ranks(stock, self, hidden_states, mmpack, over)
        return _by_segment(stock, self, hidden_states, mmpack)

    return forward


def _by_segment(
    stock: Callable[..., torch.Tensor], layer: Any, hidden_1TD: torch.Tensor, pack: MmpackDict
) -> torch.Tensor:
    offsets = pack["offsets"]
    if pack["impl"] != "reference" and hidden_1TD.is_cuda and has_linear_kernels():
        on_host = torch.tensor(offsets, dtype=torch.int32)  # or the device would be asked
        return stock(layer, hidden_1TD, **linear_keywords(pack), cu_seqlens_cpu=on_host)
    lengths = [end - start for start, end in zip(offsets, offsets[1:])]
    return torch.cat([stock(layer, part) for part in hidden_1TD.split(lengths, dim=1)], dim=1)


class _HeadsOfRank:
    """What stock's forward reads of a Gated DeltaNet, for some of its heads: the layer's attributes, except those
    that are given."""

    def __init__(self, layer: Any, **given: Any) -> None:
        self._layer = layer
        vars(self).update(given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _over_ranks(
    stock: Callable[..., torch.Tensor],
    layer: Any,
    hidden_1nD: torch.Tensor,
    pack: MmpackDict,
    over: ContextDict,
) -> torch.Tensor:
    """Under context parallelism. Convolution, state and gates are a head's own, so that what the layer projects of
    own tokens is exchanged for some heads of all tokens, on which stock's forward runs: its projections are then
    columns of its input, and its norm and output are left for the own tokens."""
    n = hidden_1nD.shape[1]
    K, Kv = layer.head_k_dim, layer.head_v_dim
    channels = [layer.key_dim, layer.key_dim, layer.value_dim]
    projected = [
        x.unflatten(1, (-1, w))
        for x, w in zip(layer.in_proj_qkv(hidden_1nD)[0].split(channels, dim=1), (K, K, Kv))
    ]
    gates = [proj(hidden_1nD)[0][:, :, None] for proj in (layer.in_proj_b, layer.in_proj_a)]
    parts = [x.flatten(1) for x in to_heads([*projected, *gates], over)]
    q, k, v, b, a = accumulate(x.shape[1] for x in parts)
    # causal-conv1d takes columns of a row only if the row's width is a multiple of 8, as stock's is
    parts.append(parts[0].new_zeros(len(parts[0]), -a % 8))
    weights = [
        of_rank(w.unflatten(0, (-1, one)), over).flatten(0, 1)
        for w, one in zip(layer.conv1d.weight.split(channels), (K, K, Kv))
    ]
    heads = _HeadsOfRank(
        layer,
        key_dim=q,
        value_dim=v - k,
        conv_dim=v,
        num_k_heads=q // K,
        num_v_heads=(v - k) // Kv,
        conv1d=SimpleNamespace(weight=torch.cat(weights), bias=None),
        A_log=of_rank(layer.A_log, over),
        dt_bias=of_rank(layer.dt_bias, over),
        in_proj_qkv=lambda x: x[..., :v],
        in_proj_b=lambda x: x[..., v:b],
        in_proj_a=lambda x: x[..., b:a],
        in_proj_z=lambda x: x[..., k:v],  # of the right shape; the norm does not look
        norm=lambda out, z: out,
        out_proj=lambda x: x,
    )
    out_1TC = _by_segment(stock, heads, torch.cat(parts, dim=1)[None], pack)
    out_nHK = to_tokens(out_1TC[0].unflatten(1, (-1, Kv)), over)
    z_nHK = layer.in_proj_z(hidden_1nD)[0].view_as(out_nHK)
    normed = layer.norm(out_nHK.flatten(0, 1), z_nHK.flatten(0, 1))
    projected_out: torch.Tensor = layer.out_proj(normed.view(1, n, -1))
    return projected_out
