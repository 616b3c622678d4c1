"""Launches the kernels of `mmpack.ops.varlen_kernels`, and makes them differentiable."""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmpack.ops import varlen_kernels as kernels
from mmpack.ops.arguments import on_its_device
from mmpack.types import TILE

# T = tokens, H = query heads, G = query heads per key head, K = head dim, S = segments, n = tiles
LOG2_E = 1.4426950408889634


def split_head_dim(K):
    """(D0, D1): two powers of two that together cover K; D1 is 0 if D0 covers it."""
    D0 = max(16, 1 << (K.bit_length() - 1))
    return D0, max(16, triton.next_power_of_2(K - D0)) if K > D0 else 0


# (BM, BN, stages, warps) of the kernels for half precision, up to a head dim. With up to 96, two programs share a
# multiprocessor: one computes while the other waits. `benchmarks.compile_report` checks that they fit.
_BLOCKS = {
    "fwd": {96: (128, 64, 2, 8), 128: (128, 128, 3, 8), 256: (128, 64, 2, 8)},
    "bwd_dq": {96: (128, 64, 2, 8), 128: (128, 64, 3, 8), 256: (128, 32, 2, 8)},
    "bwd_dkv": {128: (64, 64, 2, 4), 256: (32, 64, 2, 8)},
}


def launch_options(kernel, K, dtype):
    """Blocks, stages, warps and registers of a kernel. Blocks are small for float32, whose exact sums use no
    tensor cores. Scores are scaled and shifted by one FFMA each; newer versions of Triton fuse only with this
    option."""
    largest = next(D for D in _BLOCKS[kernel] if K <= D)
    BM, BN, stages, num_warps = _BLOCKS[kernel][largest]
    options = {"enable_fp_fusion": True}
    if dtype == torch.float32 and not triton.knobs.runtime.interpret:
        BM, BN, stages, num_warps = 16, 16, 1, 8
    elif largest == 96:
        options["maxnreg"] = 128  # 65,536 registers over two programs of 256 threads
    return {**options, "BM": BM, "BN": BN, "STAGES": stages, "num_warps": num_warps}


def _descriptors(x_THK, rows, D0, D1):
    """Two TMA descriptors, of blocks (rows, D0) and (rows, D1) of x as (T, columns); the second is None if D1 is
    0. Reads after the last column give 0."""
    T, H, K = x_THK.shape
    shape, strides = [T, (H - 1) * x_THK.stride(1) + K], [x_THK.stride(0), 1]
    blocks = ([rows, D0], [rows, D1] if D1 else None)
    return [block and TensorDescriptor(x_THK, shape, strides, block) for block in blocks]


def _readable(x_THK, D):
    """x if TMA can read its heads as columns: base, row stride and head are multiples of 16 bytes, and heads lie
    within a row. Else a copy, padded to D columns if K is not such a multiple."""
    T, H, K = x_THK.shape
    size = x_THK.element_size()
    if K * size % 16:
        return torch.nn.functional.pad(x_THK, (0, D - K))
    aligned = x_THK.stride(0) * size % 16 == 0 and x_THK.storage_offset() * size % 16 == 0
    within = x_THK.stride(2) == 1 and (H - 1) * x_THK.stride(1) + K <= x_THK.stride(0)
    return x_THK if aligned and within else x_THK.clone(memory_format=torch.contiguous_format)


@on_its_device
def varlen_attention_fwd(q_THK, k, v, tiles_n4, segment_ids_T, cu_seqlens, causal, scale):
    """(out (T, H, K), lse (H, T) float32 in base 2); arguments are not checked again."""
    T, H, K = q_THK.shape
    out_THK, lse_HT = q_THK.new_empty(T, H, K), q_THK.new_empty(H, T, dtype=torch.float32)
    D0, D1 = split_head_dim(K)
    inputs = [_readable(x, D0 + D1) for x in (q_THK, k, v)]
    options = launch_options("fwd", K, q_THK.dtype)
    num_blocks = len(tiles_n4) * (TILE // options["BM"])
    if num_blocks:
        kernels._varlen_attention_fwd_kernel[(num_blocks * H,)](
            out_THK,
            lse_HT,
            *inputs,
            *_descriptors(inputs[0], options["BM"], D0, D1),
            *_descriptors(inputs[1], options["BN"], D0, D1),
            *_descriptors(inputs[2], options["BN"], D0, D1),
            tiles_n4,
            segment_ids_T,
            cu_seqlens.contiguous(),
            T,
            *(x.stride(0) for x in inputs),
            *(x.stride(1) for x in inputs),
            scale * LOG2_E,
            H=H,
            G=H // k.shape[1],
            K=K,
            D0=D0,
            D1=D1,
            TILE=TILE,
            CAUSAL=causal,
            **options,
        )
    return out_THK, lse_HT


@on_its_device
def varlen_attention_bwd(
    dout_THK, q, k, v, out, lse_HT, tiles_n4, segment_ids_T, cu_seqlens, causal, scale
):
    """(dq, dk, dv), contiguous, in two launches; arguments are not checked again."""
    (T, H, K), G = q.shape, q.shape[1] // k.shape[1]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta_HT = lse_HT.new_empty(lse_HT.shape)
    if not len(tiles_n4):
        return dq, dk, dv
    D0, D1 = split_head_dim(K)
    q, k, v, dout_THK, out = (_readable(x, D0 + D1) for x in (q, k, v, dout_THK, out))
    inputs = (q, k, v, dout_THK)
    constants = {"H": H, "G": G, "K": K, "D0": D0, "D1": D1, "TILE": TILE, "CAUSAL": causal}
    of_pack = (tiles_n4, segment_ids_T, cu_seqlens.contiguous(), T)
    options = launch_options("bwd_dq", K, q.dtype)
    kernels._varlen_attention_bwd_dq_kernel[(len(tiles_n4) * (TILE // options["BM"]) * H,)](
        dq,
        delta_HT,
        lse_HT,
        *inputs,
        *_descriptors(q, options["BM"], D0, D1),
        *_descriptors(k, options["BN"], D0, D1),
        *_descriptors(v, options["BN"], D0, D1),
        *_descriptors(out, options["BM"], D0, D1),
        *_descriptors(dout_THK, options["BM"], D0, D1),
        *of_pack,
        *(x.stride(0) for x in inputs),
        *(x.stride(1) for x in (*inputs, out)),
        scale,
        scale * LOG2_E,
        **constants,
        **options,
    )
    options = launch_options("bwd_dkv", K, q.dtype)
    kernels._varlen_attention_bwd_dkv_kernel[(len(tiles_n4) * (TILE // options["BN"]) * H // G,)](
        dk,
        dv,
        lse_HT,
        delta_HT,
        *inputs,
        *_descriptors(q, options["BM"], D0, D1),
        *_descriptors(k, options["BN"], D0, D1),
        *_descriptors(v, options["BN"], D0, D1),
        *_descriptors(dout_THK, options["BM"], D0, D1),
        *of_pack,
        *(x.stride(0) for x in inputs),
        *(x.stride(1) for x in inputs),
        scale,
        scale * LOG2_E,
        **constants,
        **options,
    )
    return dq, dk, dv


@torch.library.custom_op("mmpack::varlen_attention", mutates_args=())
def _varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tensor,
    segment_ids: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return varlen_attention_fwd(q, k, v, tiles, segment_ids, cu_seqlens, causal, scale)


@_varlen_attention.register_fake
def _(q, *rest):
    T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(H, T, dtype=torch.float32)


@torch.library.custom_op("mmpack::varlen_attention_backward", mutates_args=())
def _varlen_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Tensor,
    segment_ids: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return varlen_attention_bwd(
        dout, q, k, v, out, lse, tiles, segment_ids, cu_seqlens, causal, scale
    )


@_varlen_attention_backward.register_fake
def _(dout, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output):
    q, k, v, *of_pack, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, *of_pack)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    if dout is None:
        return (None,) * 8
    gradients = _varlen_attention_backward(dout, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *gradients, None, None, None, None, None


_varlen_attention.register_autograd(_backward, setup_context=_save_for_backward)


def tiles_from_cu_seqlens(cu_seqlens, T):
    """(tiles (cdiv(T, TILE) + S, 4), segment_ids (T,)) int32, made on the device without synchronization: the list
    has the maximum length, and unused tiles are empty. The host's list (`mmpack.reference.attention_tiles`) is
    shorter, joins short segments and is sorted."""
    S = len(cu_seqlens) - 1
    tokens = torch.arange(T, dtype=torch.int32, device=cu_seqlens.device)
    segment_ids = torch.searchsorted(
        cu_seqlens[1:].contiguous(), tokens, right=True, out_int32=True
    )
    if not T:
        return cu_seqlens.new_empty(0, 4), segment_ids
    places = torch.arange(triton.cdiv(T, TILE) + S, dtype=torch.int32, device=cu_seqlens.device)
    num_tiles = (cu_seqlens.diff() + TILE - 1) // TILE
    ends = num_tiles.cumsum(0, dtype=torch.int32)
    segment = torch.searchsorted(ends, places, right=True).clamp_max(S - 1)
    segment_begin, segment_end = cu_seqlens[segment], cu_seqlens[segment + 1]
    begin = segment_begin + (places - ends[segment] + num_tiles[segment]) * TILE
    end = torch.minimum(begin + TILE, segment_end)
    tiles = torch.stack([begin, end, segment_begin, segment_end], dim=1)
    return torch.where((places < ends[-1])[:, None], tiles, 0), segment_ids


def varlen_attention_triton(q_THK, k, v, cu_seqlens, tiles, causal, scale):
    """`impl="triton"` of `mmpack.ops.varlen_attention`, which has checked the arguments."""
    if tiles is None:
        tiles = tiles_from_cu_seqlens(cu_seqlens, len(q_THK))
    if scale <= 0:  # maxima are taken before scaling, so the scale must be positive
        q_THK, scale = (-q_THK, -scale) if scale else (q_THK * 0, 1.0)
    return _varlen_attention(q_THK, k, v, *tiles, cu_seqlens, causal, scale)[0]
