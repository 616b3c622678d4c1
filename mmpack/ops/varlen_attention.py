"""Attention within segments: argument checks, and the choice between our Triton kernels and libraries.

    out[t] = softmax over the t' that token t sees of (scale q[t] k[t']) times v[t']

A token sees its own segment, up to itself if causal. No T x T array is made, and nothing synchronizes with the
device: loops over segments use host integers that come with the batch. The arguments are those of flash-attn's
`flash_attn_varlen_func` (arXiv 2307.08691), with q, k and v of one packed row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpack.ops import varlen_libraries as libraries
from mmpack.ops.varlen_one_op import varlen_sdpa

# T = tokens, H = query heads, K = head dim, S = segments, n = tiles
IMPLEMENTATIONS = (
    "triton",
    "torch_varlen",
    "flash2",
    "flash3",
    "flash4",
    "flex",
    "sdpa",
    "reference",
)
# For "auto" with bf16 and fp16 on a GPU: the first that is available. Ours is not listed until its GPU tests pass
# and it is measured. On an H100, the forward of FlashAttention-3 is 1.3-1.9 times as fast as FlashAttention-2's
# (paper, arXiv 2407.08608, head dim 128); torch_varlen is FlashAttention-2. Not measured here.
AUTO = ("flash3", "flash2", "torch_varlen")
_FLASH = ("torch_varlen", "flash2", "flash3", "flash4")


def varlen_attention(
    q_THK: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    scale: float,
    tiles: tuple[Tensor, Tensor] | None = None,
    offsets: Sequence[int] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention within each segment; (T, H, K), differentiable in q, k and v.

    Args:
        q_THK: (T, H, K). k, v: (T, Hk, K), where Hk divides H (GQA). Views with any strides.
        cu_seqlens: (S + 1,) int32: segment s is rows `cu_seqlens[s]` to `cu_seqlens[s + 1]`; the last
            is T. Segments may be empty.
        max_seqlen: rows of the longest segment, or an upper bound.
        causal: a token sees its segment up to itself; else its whole segment.
        scale: factor of the scores, usually K ** -0.5.
        tiles: for "triton", (tiles (n, 4), segment_ids (T,)) int32, fields of `mmpack.Pack`; by default a longer
            list with unused entries is made on the device.
        offsets: `cu_seqlens` as integers on the host, for "sdpa" and "reference", which loop over segments. Needed
            if `cu_seqlens` is not on the CPU.
        impl: "auto" or one of IMPLEMENTATIONS, which is an error if it is unavailable. "auto" is the first
            available one of AUTO for bf16 and fp16 on a GPU, else "sdpa". "triton" takes float32, bf16 and fp16
            and K up to 256 (a K that is no multiple of 8 is padded, of 4 for float32), is deterministic, and needs
            compute capability 9.0 to 11.x (H100 to B300) or Triton's interpreter.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or `impl` is not available.
    """
    _check(q_THK, k, v, cu_seqlens, offsets)
    if impl == "auto":
        impl = auto_impl(q_THK)
    elif impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"impl must be 'auto' or one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}"
        )
    reason = None if torch.compiler.is_compiling() else why_not(impl, q_THK)
    if reason:
        raise ValueError(f"attention impl {impl!r} cannot be used: {reason}")
    if impl == "triton":
        from mmpack.ops.varlen_triton import varlen_attention_triton

        _check_tiles(tiles, q_THK)
        return varlen_attention_triton(q_THK, k, v, cu_seqlens, tiles, causal, scale)
    # torch.compile makes the number of offsets a constant of the graph as soon as `offsets` is looked at.
    if impl == "sdpa" and torch.compiler.is_compiling() and cu_seqlens.device.type == "cpu":
        return varlen_sdpa(q_THK, k, v, cu_seqlens, causal, scale)
    if impl in ("sdpa", "reference") and offsets is None:
        if cu_seqlens.device.type != "cpu":
            raise ValueError(
                f"attention impl {impl!r} loops over segments; pass offsets, which is cu_seqlens on the host"
            )
        offsets = cu_seqlens.numpy()  # type: ignore[assignment]  # numpy integers serve as ints
    run = getattr(libraries, impl)
    return run(q_THK, k, v, cu_seqlens, max_seqlen, offsets, causal, scale)


def why_not(impl: str, q_THK: Tensor) -> str | None:
    """Why an implementation does not support this q; None if it does."""
    reason = libraries.why_not(impl)
    if reason:
        return reason
    device, dtype = q_THK.device.type, q_THK.dtype
    if impl in _FLASH:
        if device != "cuda":
            return f"it needs a CUDA device, q is on {device}"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"it takes bfloat16 and float16, q is {dtype}"
        if not torch.version.hip and _capability(q_THK) < (8, 0):
            return f"it needs compute capability 8.0, the GPU has {_version(q_THK)}"
    if impl == "flex" and device == "cpu" and q_THK.requires_grad and torch.is_grad_enabled():
        return "FlexAttention has no backward on the CPU"
    if impl == "triton":
        import triton

        from mmpack.ops import arguments

        if not arguments.runs_kernels(device):
            return f"the kernel needs a CUDA device, q is on {device}"
        if device == "cuda" and torch.version.hip:
            return "the kernel is for NVIDIA GPUs, whose loads it uses (TMA)"
        if device == "cuda" and not (9, 0) <= _capability(q_THK) < (12, 0):
            return (
                "the kernel needs TMA and 227 KB of shared memory (compute capability 9.0 to 11.x), the GPU has "
                f"{_version(q_THK)}"
            )
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"it takes bfloat16, float16 and float32, q is {dtype}"
        if device == "cpu" and dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
            return "bfloat16 sums are wrong in Triton's interpreter"
        if q_THK.shape[2] > 256:
            return f"it takes head dims up to 256, q has {q_THK.shape[2]}"
    return None


def _capability(q_THK: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(q_THK.device)


def _version(q_THK: Tensor) -> str:
    return "{}.{}".format(*_capability(q_THK))


def auto_impl(q_THK: Tensor) -> str:
    """The implementation that "auto" selects for this q."""
    if q_THK.device.type == "cuda" and q_THK.dtype in (torch.bfloat16, torch.float16):
        for impl in AUTO:
            if not why_not(impl, q_THK):
                return impl
    return "sdpa"


def _check(q_THK, k, v, cu_seqlens, offsets):
    shapes = f"q {tuple(q_THK.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q_THK.ndim != 3 or k.shape != v.shape or k.ndim != 3:
        raise ValueError(f"q must be (T, H, K) and k and v one (T, Hk, K), got {shapes}")
    T, H, K = q_THK.shape
    if k.shape[0] != T or k.shape[2] != K or not k.shape[1] or H % k.shape[1]:
        raise ValueError(f"k and v must have q's T and K, and heads that divide q's, got {shapes}")
    if not q_THK.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q_THK.dtype}, {k.dtype}, {v.dtype}")
    if not q_THK.device == k.device == v.device == cu_seqlens.device:
        raise ValueError(
            f"q is on {q_THK.device}, k on {k.device}, v on {v.device}, cu_seqlens on "
            f"{cu_seqlens.device}; they must be on one device"
        )
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or not len(cu_seqlens):
        raise ValueError(
            f"cu_seqlens must be flat int32, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if torch.compiler.is_compiling():
        return  # the checks below read data
    if offsets is None and cu_seqlens.device.type == "cpu":
        offsets = cu_seqlens.numpy()
    if offsets is not None and (len(offsets) != len(cu_seqlens) or offsets[-1] != T or offsets[0]):
        raise ValueError(
            f"{len(offsets)} offsets from {offsets[0]} to {offsets[-1]} do not fit {T} tokens and "
            f"{len(cu_seqlens) - 1} segments"
        )


def _check_tiles(tiles, q_THK):
    if tiles is None:
        return
    tiles_n4, segment_ids_T = tiles
    for name, tensor, shape in (
        ("tiles", tiles_n4, (len(tiles_n4), 4)),
        ("segment_ids", segment_ids_T, (len(q_THK),)),
    ):
        if tensor.dtype != torch.int32 or tensor.shape != shape or tensor.device != q_THK.device:
            raise ValueError(
                f"{name} must be int32 {shape} on {q_THK.device}, got {tensor.dtype} "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )


def candidates(q_THK: Tensor) -> list[str]:
    """The implementations that `mmpack tune` measures for this q: all but FlexAttention, which torch compiles
    again for other shapes, and the reference."""
    names = dict.fromkeys(("triton", *AUTO, "flash4", "sdpa"))
    return [impl for impl in names if not why_not(impl, q_THK)]


def why_not_installed(impl: str) -> str | None:
    """Why an implementation cannot be imported; None if it can. Does not consider devices and dtypes."""
    reason: str | None = libraries.why_not(impl)
    return reason
