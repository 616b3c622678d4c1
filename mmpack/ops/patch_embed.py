"""uint8 patches -> vision hidden states. Equal to transformers' `PatchEmbed` on normalized floats; normalization
and the repeated frame of stills are folded into the weight.

    out[p] = weight . ((x[p] / 255 - mean) / std) + bias  =  folded . (x[p] - 128) + folded bias

A convolution whose stride equals its kernel size is a matrix product. Its input here is bytes minus 128: integers
of magnitude at most 128, exact in bf16 and half, while the normalized floats that transformers uses are rounded.
Without the 128, products would not cancel and the sum would lose a bit. The fold is in float32 (float64 for
float64), cast once. A still repeats its pixels in all t frames, so the frames' weights are added: 588 inputs per
patch instead of 1,176 (14 pixels), 768 instead of 1,536 (16 pixels).

Autograd goes through the fold, so gradients are those of the original weight and bias. The product is `F.linear`,
not Conv3d, which is slow in bf16 in several versions of cuDNN.

With `impl="triton"`, `cast_patches` writes x - 128 in one launch, in rows of a multiple of 8 values (14 pixels:
592 for 588), because products on tensor cores read 16 bytes at a time; the folded weight gets as many columns of
zeros, which change neither results nor gradients.

Bytes per still patch of 14 pixels, E = 1280, bf16: 588 sent to the GPU (float32 pixel_values: 4,704). On the GPU,
by torch: 588 + 588 for x - 128, 588 + 1,176 for the cast, 1,176 + 2,560 for the product, 6,676; by `cast_patches`:
588 + 1,184 and 1,184 + 2,560, 5,516. Kept for the backward: 1,176 or 1,184 (transformers: 2,352). The fold moves
22 MB, equal to 3,400 patches. Not measured on a GPU yet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# P1 = still patches, P2 = video patches, E = hidden size, C = channels, t = frames, p = patch side
SHIFT = 128  # x - 128 as int8 is x with the top bit flipped


def _embed(patches, weight_ECn, bias, mean, std, dtype, impl):
    """(P, E) from uint8 patches (P, C * n). `mean` and `std` are Python floats, because a tensor would need a copy
    to the device."""
    folded, folded_bias = [], 0 if bias is None else bias.to(weight_ECn.dtype)
    for channel, (m, s) in enumerate(zip(mean, std)):
        weight_En = weight_ECn[:, channel]
        folded.append((weight_En * (1 / (255 * s))).to(dtype))
        folded_bias = folded_bias + weight_En.sum(1) * ((SHIFT / 255 - m) / s)
    if impl == "triton":
        from mmpack.ops.cast_patches import cast_patches  # late: Triton may be missing

        shifted = cast_patches(patches, dtype)
        zeros = shifted.shape[1] - patches.shape[1]
        folded += [weight_ECn.new_zeros(len(weight_ECn), zeros, dtype=dtype)] if zeros else []
    else:
        shifted = (patches ^ SHIFT).view(torch.int8).to(dtype)
    return F.linear(shifted, torch.cat(folded, dim=1), folded_bias.to(dtype))


def _check(stills, video, weight, bias, mean, std):
    if weight.ndim != 5 or not weight.is_floating_point():
        raise ValueError(
            f"weight must be a convolution's (E, C, t, p, p), got {tuple(weight.shape)} {weight.dtype}"
        )
    E, C, t, height, width = weight.shape
    for name, numbers in {"mean": mean, "std": std}.items():
        if len(numbers) != C:
            raise ValueError(f"{name} must have {C} numbers, one per channel, got {numbers}")
    if bias is not None and bias.shape != (E,):
        raise ValueError(f"bias must be {(E,)}, got {tuple(bias.shape)}")
    for name, patches, frames in (("stills", stills, 1), ("video", video, t)):
        if patches is None:
            continue
        values = C * frames * height * width
        if patches.dtype != torch.uint8 or patches.ndim != 2 or patches.shape[1] != values:
            raise ValueError(
                f"{name} must be uint8 patches of {values} values for patches of {height} pixels, "
                f"got {tuple(patches.shape)} {patches.dtype}"
            )
        if patches.device != weight.device:
            raise ValueError(f"{name} are on {patches.device}, the weight is on {weight.device}")


def patch_embed(
    stills: Tensor,
    video: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    impl: str = "torch",
) -> Tensor:
    """(P1 + P2, E) hidden states of a vision tower, stills first; differentiable in weight and bias.

    Equal to transformers' `patch_embed(pixel_values)` of the same pixels, normalized in float32 and with stills
    repeated. Computed in autocast's dtype, else in the weight's.

    Args:
        stills: (P1, C * p * p) uint8 patches of still images.
        video: (P2, C * t * p * p) uint8 patches of t frames each, or None.
        weight: (E, C, t, p, p), the weight of the `Conv3d`.
        bias: (E,), or None.
        mean, std: per channel, after division by 255, Python floats (`VisionSpec.image_mean`).
        impl: "torch", or "triton" to cast the patches with `mmpack.ops.cast_patches`.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the device cannot run the kernel.
    """
    _check(stills, video, weight, bias, mean, std)
    if impl not in ("torch", "triton"):
        raise ValueError(f"impl must be 'torch' or 'triton', got {impl!r}")
    dtype, device = weight.dtype, weight.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    exact = torch.promote_types(weight.dtype, torch.float32)
    parts = []
    if len(stills) or video is None:
        still_weight = weight.sum(2, dtype=exact).flatten(2)
        parts.append(_embed(stills, still_weight, bias, mean, std, dtype, impl))
    if video is not None:
        parts.append(_embed(video, weight.to(exact).flatten(2), bias, mean, std, dtype, impl))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
