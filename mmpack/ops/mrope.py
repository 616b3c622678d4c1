"""Multimodal rotary embedding (Qwen2-VL, arXiv 2409.12191) of q and k in one launch, with angles computed in the
kernel.

    out[t, h, i]     = q[t, h, i] cos(a) - q[t, h, i + R/2] sin(a)      a = position[axis(i), t]
    out[t, h, i+R/2] = q[t, h, i + R/2] cos(a) + q[t, h, i] sin(a)          * inv_freq[i]

transformers computes cos and sin for three axes, selects, doubles and casts them, and reads them in every layer: q
and k take ten elementwise kernels and come out transposed. Here positions are integers, and each token computes
its angles once for all heads of a tile. The outputs are new contiguous (T, H, K) buffers, as attention needs them;
inputs may be views into one fused projection.

The backward is the same kernel with negated angles: a rotation's transpose is its inverse.

The vision tower's two-dimensional rope is the same op with two rows of positions, whose sections share their
frequencies.

Precision: angles are the same float32 product as in transformers; cos and sin are accurate to 2^-23; the rotation
is in float32 (float64 for float64) and rounded once, while transformers' text model rounds cos, sin, both products
and the sum. `tl.cos` is not used, because its branch for huge arguments uses local memory.

Bytes in bf16, forward or backward, one launch: 4 T (H + Hk) K + 24 T. Not measured on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmpack.ops.arguments import check_device, on_its_device

# T = tokens (or patches), H = heads of q, Hk = heads of k, K = head dim, R = rotary channels of K
TILE = 2048  # pairs of elements: 256 threads x 8 pairs, 16 bytes of bf16 each
BLOCK_T = 8  # tokens per tile, one per warp, whose 32 threads compute the angles of one token
# x cos - y sin is one product and one FFMA; newer versions of Triton fuse only with this option.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def _cos_sin(angle):
    """(cos, sin) of a float32 angle: the remainder modulo pi/2 in float64, then Cephes' polynomials."""
    turns = tl.floor(angle.to(tl.float64) * 0.6366197723675814 + 0.5)
    x = (angle.to(tl.float64) - turns * 1.5707963267948966).to(tl.float32)
    z = x * x
    sin = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    cos = (2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2
    cos = cos * z * z - 0.5 * z + 1.0
    quadrant = turns.to(tl.int32) & 3
    is_odd = (quadrant & 1) == 1
    cos, sin = tl.where(is_odd, sin, cos), tl.where(is_odd, cos, sin)
    cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    return cos, tl.where(quadrant >= 2, -sin, sin)


@triton.jit
def _rotate_heads(
    out_ptr,
    x_ptr,
    stride_t,
    stride_h,
    offs_t,
    T,
    cos,
    sin,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    for first in tl.static_range(0, H, BLOCK_H):
        t = offs_t[:, None, None].to(tl.int64)
        h = first + tl.arange(0, BLOCK_H)[None, :, None]
        offs_f = tl.arange(0, BLOCK_F)[None, None, :]
        row = x_ptr + t * stride_t + h * stride_h
        out_row = out_ptr + (t * H + h) * K
        mask = (t < T) & (h < H) & (offs_f < HALF)
        a = tl.load(row + offs_f, mask=mask, other=0.0).to(COMPUTE)
        b = tl.load(row + HALF + offs_f, mask=mask, other=0.0).to(COMPUTE)
        tl.store(out_row + offs_f, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(
            out_row + HALF + offs_f, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=mask
        )
        if K > 2 * HALF:  # partial rotary: copy the rest
            offs_r = 2 * HALF + tl.arange(0, BLOCK_REST)[None, None, :]
            mask_r = (t < T) & (h < H) & (offs_r < K)
            tl.store(out_row + offs_r, tl.load(row + offs_r, mask=mask_r), mask=mask_r)


@triton.jit(
    do_not_specialize=["position_stride", "T"], do_not_specialize_on_alignment=["position_ids_ptr"]
)
def _apply_mrope_kernel(
    q_out_ptr,
    k_out_ptr,
    q_ptr,
    k_ptr,
    position_ids_ptr,
    inv_freq_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    position_stride,
    position_stride_t,
    T,
    scaling,
    H: tl.constexpr,
    HK: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    NUM_FREQS: tl.constexpr,
    NUM_AXES: tl.constexpr,
    SECTION_0: tl.constexpr,
    SECTION_1: tl.constexpr,
    SECTION_2: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    f = tl.arange(0, BLOCK_F)[None, None, :]
    if INTERLEAVED:
        is_1 = (f % 3 == 1) & (f < 3 * SECTION_1)
        is_2 = (f % 3 == 2) & (f < 3 * SECTION_2)
    else:
        is_1 = (f >= SECTION_0) & (f < SECTION_0 + SECTION_1)
        is_2 = f >= SECTION_0 + SECTION_1
    # (tokens, 1, frequencies), shared by the heads of a tile
    place = position_ids_ptr + offs_t[:, None, None].to(tl.int64) * position_stride_t
    mask_place = mask_t[:, None, None]
    position = tl.load(place, mask=mask_place, other=0).to(tl.float32)
    if NUM_AXES > 1:
        second = tl.load(place + position_stride, mask=mask_place, other=0).to(tl.float32)
        position = tl.where(is_1, second, position)
    if NUM_AXES > 2:
        third = tl.load(place + 2 * position_stride, mask=mask_place, other=0).to(tl.float32)
        position = tl.where(is_2, third, position)
    inv_freq = tl.load(inv_freq_ptr + f % NUM_FREQS, mask=f < HALF, other=0.0)
    cos, sin = _cos_sin(position * inv_freq)
    cos = (cos * scaling).to(COMPUTE)
    sin = (sin * scaling).to(COMPUTE)
    if INVERSE:
        sin = -sin
    _rotate_heads(
        q_out_ptr, q_ptr, q_stride_t, q_stride_h, offs_t, T, cos, sin,
        H, K, HALF, BLOCK_T, BLOCK_H, BLOCK_F, BLOCK_REST, COMPUTE,
    )  # fmt: skip
    _rotate_heads(
        k_out_ptr, k_ptr, k_stride_t, k_stride_h, offs_t, T, cos, sin,
        HK, K, HALF, BLOCK_T, BLOCK_H, BLOCK_F, BLOCK_REST, COMPUTE,
    )  # fmt: skip


def mrope_constants(H, HK, K, sections, interleaved, num_freqs, inverse, dtype):
    """The kernel's constants, for launches and the compile report."""
    half = sum(sections)
    block_f = triton.next_power_of_2(half)
    return {
        "H": H,
        "HK": HK,
        "K": K,
        "HALF": half,
        "NUM_FREQS": num_freqs,
        "NUM_AXES": len(sections),
        **{f"SECTION_{n}": (*sections, 0, 0)[n] for n in range(3)},
        "INTERLEAVED": interleaved,
        "INVERSE": inverse,
        "BLOCK_T": BLOCK_T,
        "BLOCK_H": min(triton.next_power_of_2(max(H, HK)), max(1, TILE // BLOCK_T // block_f)),
        "BLOCK_F": block_f,
        "BLOCK_REST": triton.next_power_of_2(max(1, K - 2 * half)),
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
    }


@on_its_device
def apply_mrope_fwd(
    q_THK, k, position_ids, inv_freq, sections, interleaved, attention_scaling, inverse=False
):
    """Rotated q and k, contiguous, in one launch; arguments are not checked again. `inverse` rotates back, for the
    gradient."""
    (T, H, K), HK = q_THK.shape, k.shape[1]
    q_out, k_out = q_THK.new_empty(T, H, K), k.new_empty(T, HK, K)
    if T and (H or HK) and K:
        q_THK, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_THK, k))
        constants = mrope_constants(
            H, HK, K, sections, interleaved, len(inv_freq), inverse, q_THK.dtype
        )
        _apply_mrope_kernel[(triton.cdiv(T, BLOCK_T),)](
            q_out,
            k_out,
            q_THK,
            k,
            position_ids,
            inv_freq,
            *q_THK.stride()[:2],
            *k.stride()[:2],
            *position_ids.stride(),
            T,
            attention_scaling,
            **constants,
            **OPTIONS,
        )
    return q_out, k_out


@torch.library.custom_op("mmpack::apply_mrope", mutates_args=())
def _apply_mrope(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    sections: list[int],
    interleaved: bool,
    attention_scaling: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    return apply_mrope_fwd(
        q, k, position_ids, inv_freq, sections, interleaved, attention_scaling, inverse
    )


@_apply_mrope.register_fake
def _(q, k, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save_for_backward(ctx, inputs, output):
    _, _, position_ids, inv_freq, *ctx.how, ctx.inverse = inputs
    ctx.save_for_backward(position_ids, inv_freq)


def _backward(ctx, dq, dk):
    dq, dk = _apply_mrope(dq, dk, *ctx.saved_tensors, *ctx.how, not ctx.inverse)
    return dq, dk, None, None, None, None, None, None


_apply_mrope.register_autograd(_backward, setup_context=_save_for_backward)


def _check(q_THK, k, position_ids, inv_freq, sections, interleaved):
    T, half = len(q_THK), sum(sections)
    if q_THK.ndim != 3 or k.ndim != 3 or len(k) != T or k.shape[2] != q_THK.shape[2]:
        raise ValueError(
            "q and k must be (T, H, K) and (T, Hk, K), got "
            f"{tuple(q_THK.shape)} and {tuple(k.shape)}"
        )
    if q_THK.dtype != k.dtype or not q_THK.is_floating_point():
        raise ValueError(f"q and k must have one floating dtype, got {q_THK.dtype} and {k.dtype}")
    if not 1 <= len(sections) <= 3 or (interleaved and len(sections) != 3):
        raise ValueError(
            f"there must be 1 to 3 sections, and 3 if interleaved, got {tuple(sections)}"
        )
    if 2 * half > q_THK.shape[2]:
        raise ValueError(
            f"sections {tuple(sections)} rotate {2 * half} channels, the heads have {q_THK.shape[2]}"
        )
    if position_ids.shape != (len(sections), T) or position_ids.is_floating_point():
        raise ValueError(
            f"position_ids must be {(len(sections), T)} integers, one row per section, got "
            f"{tuple(position_ids.shape)} {position_ids.dtype}"
        )
    shared = all(section == len(inv_freq) for section in sections)
    if inv_freq.ndim != 1 or not (len(inv_freq) == half or shared):
        raise ValueError(
            f"inv_freq must have {half} frequencies for sections {tuple(sections)}, or the length of "
            f"each section if all are equal, got {tuple(inv_freq.shape)}"
        )
    for name, tensor in {"k": k, "position_ids": position_ids, "inv_freq": inv_freq}.items():
        if tensor.device != q_THK.device:
            raise ValueError(f"{name} is on {tensor.device}, q is on {q_THK.device}")
    check_device(q_THK.device)


def apply_mrope(
    q_THK: Tensor,
    k: Tensor,
    position_ids_3T: Tensor,
    inv_freq: Tensor,
    sections: tuple[int, ...],
    *,
    interleaved: bool = False,
    attention_scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their multimodal positions: contiguous (T, H, K) and (T, Hk, K), out of place.

    Equal to transformers' `apply_rotary_pos_emb(q, k, *rotary_emb(x, position_ids))`, or in a vision tower to
    `apply_rotary_pos_emb_vision`. Differentiable in q and k.

    Args:
        q_THK, k: (T, H, K) and (T, Hk, K), any strides.
        position_ids_3T: (3, T) integers: t, h, w; in a tower (2, T): row, column. Any strides.
        inv_freq: the model's frequencies, one per channel pair; or one list for all sections if they have equal
            lengths (as in a vision tower).
        sections: number of frequencies for each row of positions; 2 * sum(sections) channels are rotary, the rest
            are copied.
        interleaved: rows of positions alternate (Qwen3-VL) instead of following each other (Qwen2-VL).
        attention_scaling: factor on cos and sin, from the rotary module.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the device cannot run the kernel.
    """
    _check(q_THK, k, position_ids_3T, inv_freq, sections, interleaved)
    return _apply_mrope(
        q_THK,
        k,
        position_ids_3T,
        inv_freq.float(),
        list(sections),
        interleaved,
        float(attention_scaling),
        False,
    )
