"""Attention within segments by libraries, all with one signature.

A library is imported only when it is requested. `offsets` is `cu_seqlens` on the host, as in
`mmpack.ops.varlen_attention`.
"""

import functools
import inspect
from importlib.util import find_spec
from itertools import pairwise

import torch
import torch.nn.functional as F

from mmpack.ops.block_mask import block_mask

# T = tokens, H = query heads, K = head dim


def reference(q_THK, k, v, cu_seqlens, max_seqlen, offsets, causal, scale):
    """The specification."""
    from mmpack import reference

    return reference.varlen_attention(q_THK, k, v, offsets, causal=causal, scale=scale)


def sdpa(q_THK, k, v, cu_seqlens, max_seqlen, offsets, causal, scale):
    """torch's scaled_dot_product_attention, one call per segment, without a T x T mask."""
    out = []
    for begin, end in pairwise(int(offset) for offset in offsets):
        q_s, k_s, v_s = (x[begin:end].transpose(0, 1)[None] for x in (q_THK, k, v))
        out_s = F.scaled_dot_product_attention(
            q_s, k_s, v_s, is_causal=causal, scale=scale, enable_gqa=q_s.shape[1] != k_s.shape[1]
        )
        out.append(out_s[0].transpose(0, 1))
    return torch.cat(out) if out else torch.empty_like(q_THK)


def torch_varlen(q_THK, k, v, cu_seqlens, max_seqlen, offsets, causal, scale):
    """torch.nn.attention.varlen, FlashAttention-2 in torch itself (2.10 and newer)."""
    from torch.nn.attention.varlen import varlen_attn

    options = {"scale": scale, "window_size": (-1, 0 if causal else -1)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = q_THK.shape[1] != k.shape[1]
    return varlen_attn(q_THK, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)


def flash2(q_THK, k, v, cu_seqlens, max_seqlen, offsets, causal, scale):
    """The flash-attn package, FlashAttention-2."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q_THK, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        softmax_scale=scale, causal=causal,
    )  # fmt: skip


def flash3(q_THK, k, v, cu_seqlens, max_seqlen, offsets, causal, scale):
    """FlashAttention-3, package `flash_attn_interface`."""
    from flash_attn_interface import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, q_THK, k, v, cu_seqlens, max_seqlen, causal, scale)


def flash4(q_THK, k, v, cu_seqlens, max_seqlen, offsets, causal, scale):
    """FlashAttention-4 in CuTe, package flash-attn-4."""
    from flash_attn.cute import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, q_THK, k, v, cu_seqlens, max_seqlen, causal, scale)


def _flash(function, q_THK, k, v, cu_seqlens, max_seqlen, causal, scale):
    out = function(
        q_THK, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen, softmax_scale=scale, causal=causal,
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out  # some versions also return the log-sum-exp


def flex(q_THK, k, v, cu_seqlens, max_seqlen, offsets, causal, scale):
    """torch's FlexAttention over a BlockMask made from `cu_seqlens`; compiled on a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = _compiled_flex() if q_THK.is_cuda else flex_attention
    out = attend(
        *(x.transpose(0, 1)[None] for x in (q_THK, k, v)),
        block_mask=block_mask(cu_seqlens, len(q_THK), causal=causal),
        scale=scale,
        enable_gqa=q_THK.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def why_not(impl):
    """Why an implementation is not installed; None if it is. Does not consider devices and dtypes."""
    if impl in ("reference", "sdpa"):
        return None
    if impl == "triton":
        return None if find_spec("triton") else "triton is not installed"
    module, name = {
        "torch_varlen": ("torch.nn.attention.varlen", "varlen_attn"),
        "flex": ("torch.nn.attention.flex_attention", "flex_attention"),
        "flash2": ("flash_attn", "flash_attn_varlen_func"),
        "flash3": ("flash_attn_interface", "flash_attn_varlen_func"),
        "flash4": ("flash_attn.cute", "flash_attn_varlen_func"),
    }[impl]
    try:
        found = __import__(module, fromlist=[name])
    except Exception as error:  # a package built for another torch can raise anything
        return f"{module} cannot be imported: {error}"
    return None if hasattr(found, name) else f"{module} has no {name}"
