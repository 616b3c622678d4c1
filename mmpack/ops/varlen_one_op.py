"""SDPA within segments as one op, for torch.compile on a CPU.

torch.compile unrolls a loop over segments, so every number of segments would be another graph. This op reads
`cu_seqlens` when it runs, which on a CPU waits for nothing. Its backward computes the scores of a segment again,
one key head at a time, in float32 or float64.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# T = tokens, H = query heads, Hk = key heads, K = head dim, t = tokens of a segment, g = H / Hk


def _segments(cu_seqlens):
    return pairwise(map(int, cu_seqlens.numpy()))


@torch.library.custom_op("mmpack::varlen_sdpa", mutates_args=())
def _varlen_sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float
) -> Tensor:
    out = q.new_empty(q.shape)
    for begin, end in _segments(cu_seqlens):
        q_s, k_s, v_s = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        out_s = F.scaled_dot_product_attention(
            q_s, k_s, v_s, is_causal=causal, scale=scale, enable_gqa=q_s.shape[1] != k_s.shape[1]
        )
        out[begin:end] = out_s[0].transpose(0, 1)
    return out


@_varlen_sdpa.register_fake
def _(q, *rest):
    return q.new_empty(q.shape)


@torch.library.custom_op("mmpack::varlen_sdpa_backward", mutates_args=())
def _varlen_sdpa_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    exact = torch.promote_types(q.dtype, torch.float32)
    heads = q.shape[1] // k.shape[1]
    for begin, end in _segments(cu_seqlens):
        for head in range(k.shape[1]):
            of_head = slice(head * heads, (head + 1) * heads)
            q_gtK, dout_gtK = (x[begin:end, of_head].transpose(0, 1).to(exact) for x in (q, dout))
            k_tK, v_tK = (x[begin:end, head].to(exact) for x in (k, v))
            scores = (q_gtK @ k_tK.T) * scale
            if causal:
                later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
                scores.masked_fill_(later, -torch.inf)
            p = scores.softmax(-1)
            dp = dout_gtK @ v_tK.T
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
            dq[begin:end, of_head] = (ds @ k_tK).transpose(0, 1).to(q.dtype)
            dk[begin:end, head] = (ds.mT @ q_gtK).sum(0).to(k.dtype)
            dv[begin:end, head] = (p.mT @ dout_gtK).sum(0).to(v.dtype)
    return dq, dk, dv


@_varlen_sdpa_backward.register_fake
def _(dout, q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save_for_backward(ctx, inputs, output):
    q, k, v, cu_seqlens, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens)


def _backward(ctx, dout):
    grads = _varlen_sdpa_backward(dout, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *grads, None, None, None


_varlen_sdpa.register_autograd(_backward, setup_context=_save_for_backward)


def varlen_sdpa(q_THK, k, v, cu_seqlens, causal, scale):
    """`varlen_libraries.sdpa` without a loop in the graph; tensors on the CPU."""
    return _varlen_sdpa(q_THK, k, v, cu_seqlens, causal, scale)
