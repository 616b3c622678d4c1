"""uint8 patches into the tower against the specification and transformers' patch embedding."""

import pytest
import torch
import torch.nn.functional as F
from builders import assert_within_budget
from transformers import Qwen3VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchEmbed

from mmpack import VisionSpec, reference
from mmpack.data import images
from mmpack.ops import patch_embed

SPEC = VisionSpec(min_pixels=1, max_pixels=1)
NORMAL = (SPEC.image_mean, SPEC.image_std)


def make_case(P1, P2, p, E=24, C=3, t=2, bias=True, device="cpu"):
    """(stills, video, weight, bias, dout) in float64, pixels of every brightness."""
    stills = torch.randint(0, 256, (P1, C * p * p), dtype=torch.uint8)
    video = torch.randint(0, 256, (P2, C * t * p * p), dtype=torch.uint8) if P2 else None
    weight = torch.randn(E, C, t, p, p, dtype=torch.float64) * (C * t * p * p) ** -0.5
    b = torch.randn(E, dtype=torch.float64) if bias else None
    case = stills, video, weight, b, torch.randn(P1 + P2, E, dtype=torch.float64)
    return tuple(None if x is None else x.to(device) for x in case)


def run(fn, stills, video, weight, bias, dout, mean=SPEC.image_mean, std=SPEC.image_std):
    """Output and the gradients of weight and bias."""
    weight = weight.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    out = fn(stills, video, weight, bias, mean, std)
    out.backward(dout.to(out.dtype))
    return out.detach(), weight.grad, None if bias is None else bias.grad


def to(dtype, case):
    return [x.to(dtype) if x is not None and x.is_floating_point() else x for x in case]


SIZES = [(1, 0, 14), (5, 3, 14), (0, 7, 14), (0, 0, 14), (33, 0, 16), (3, 2, 1), (257, 0, 14)]


@pytest.mark.smoke
@pytest.mark.parametrize(("P1", "P2", "p"), SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients(P1, P2, p, bias, device):
    case = make_case(P1, P2, p, bias=bias, device=device)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rounded = to(dtype, case)
        exact = run(reference.patch_embed, *to(torch.float64, rounded))
        ours, torchs = run(patch_embed, *rounded), run(reference.patch_embed, *rounded)
        assert ours[0].shape == (P1 + P2, 24)
        for name, *values in zip(("out", "dweight", "dbias"), ours, torchs, exact):
            if values[0] is None or not values[0].numel():
                continue
            assert values[0].shape == values[1].shape
            assert values[0].dtype == dtype
            if dtype == torch.float64:
                assert torch.allclose(values[0], values[2], rtol=1e-10, atol=1e-10), name
            elif name == "out" or dtype == torch.float32 or not (P1 and P2):
                assert_within_budget(f"{name} {dtype}", *values)
            else:  # stills and video are two products: two bf16 sums, rounded, make a gradient
                error, size = (values[0].double() - values[2]).abs().max(), values[2].abs().max()
                assert error <= 2**-7 * size, name


def test_other_channels_and_frames(device):
    case = make_case(5, 2, 4, C=1, t=3, device=device)
    ours, spec = (run(fn, *case, (0.25,), (0.5,)) for fn in (patch_embed, reference.patch_embed))
    for one, other in zip(ours, spec):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


MODULES = {
    "qwen2_vl, 14 pixels": (
        lambda: PatchEmbed(patch_size=14, embed_dim=64),
        SPEC,
    ),
    "qwen3_vl, 16 pixels": (
        lambda: Qwen3VLVisionPatchEmbed(
            Qwen3VLConfig(vision_config={"hidden_size": 64}).vision_config
        ),
        VisionSpec(
            min_pixels=1, max_pixels=1, patch_size=16, image_mean=(0.5,) * 3, image_std=(0.5,) * 3
        ),
    ),
}


@pytest.mark.smoke
@pytest.mark.parametrize("family", MODULES)
def test_transformers_on_its_own_pixel_values(family):
    """Against the float32 pixel_values of transformers' image processor and its Conv3d: float32 to its
    rounding; bf16 no further from float64 than transformers is."""
    make, spec = MODULES[family]
    torch.manual_seed(0)
    module = make()
    module.proj.weight.data.normal_(std=0.03)
    stills = torch.randint(0, 256, (70, spec.patch_values), dtype=torch.uint8)
    pixel_values = torch.from_numpy(images.normalize_patches(stills.numpy(), spec))
    dout = torch.randn(70, 64)

    def gradients(module, out):
        module.zero_grad()
        out.backward(dout.to(out.dtype))
        return [out.detach(), *(p.grad for p in module.parameters())]

    def ours_of(module):
        how = (spec.image_mean, spec.image_std)
        return patch_embed(stills, None, module.proj.weight, module.proj.bias, *how)

    for dtype in (torch.float32, torch.bfloat16):
        module = module.to(dtype)
        stock, ours = gradients(module, module(pixel_values)), gradients(module, ours_of(module))
        module = module.double()
        exact = gradients(module, ours_of(module))
        for name, *values in zip(("out", "dweight", "dbias"), ours, stock, exact):
            assert_within_budget(f"{name} {dtype}", *values)
        assert len(exact) == 2 + (module.proj.bias is not None)


def test_the_shift_is_worth_its_place():
    """Bytes folded without taking 128 off first lose accuracy in bf16; with it they do not."""
    stills, _, weight, _, _ = make_case(512, 0, 14, E=256, bias=False)
    weight = weight.bfloat16().double()
    exact = reference.patch_embed(stills, None, weight, None, *NORMAL)
    low = weight.bfloat16()

    def error(out):
        return ((out.double() - exact).norm() / exact.norm()).item()

    pixel_values = torch.from_numpy(images.normalize_patches(stills.numpy(), SPEC))
    stock = F.linear(pixel_values.bfloat16(), low.flatten(1))
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None, None] for x in NORMAL)
    scaled, shift = weight / (255 * std), -(weight * mean / std).sum((1, 2, 3, 4))
    scaled = scaled.sum(2).flatten(1).bfloat16()
    unshifted = F.linear(stills.bfloat16(), scaled, shift.bfloat16())
    ours = error(patch_embed(stills, None, low, None, *NORMAL))
    assert ours <= 1.2 * error(stock)
    assert error(unshifted) >= 1.5 * ours


def test_under_autocast_it_computes_in_its_dtype():
    stills, _, weight, bias, dout = to(torch.float32, make_case(40, 0, 14))
    with torch.autocast("cpu", torch.bfloat16):
        out, dweight, dbias = run(patch_embed, stills, None, weight, bias, dout)
        pixel_values = torch.from_numpy(images.normalize_patches(stills.numpy(), SPEC))
        stock = F.linear(pixel_values, weight.flatten(1), bias)
    assert out.dtype == stock.dtype == torch.bfloat16
    assert dweight.dtype == dbias.dtype == torch.float32
    exact = run(reference.patch_embed, *to(torch.float64, (stills, None, weight, bias, dout)))
    assert_within_budget("out", out, stock, exact[0])
    assert (dweight - exact[1]).abs().max() <= 0.02 * exact[1].abs().max()


def test_pixels_and_what_is_frozen_get_no_gradient():
    stills, _, weight, bias, dout = make_case(4, 0, 14)
    bias.requires_grad_()
    out = patch_embed(stills, None, weight, bias, *NORMAL)
    out.backward(dout)
    assert torch.allclose(bias.grad, dout.sum(0))
    assert weight.grad is None


def test_it_runs_on_the_meta_device():
    case = [x.to("meta") for x in make_case(5, 3, 14)]
    assert [x.shape for x in run(patch_embed, *case)] == [(8, 24), (24, 3, 2, 14, 14), (24,)]


def test_what_does_not_fit_is_told():
    stills, video, weight, bias, _ = make_case(5, 3, 14)
    call = {"stills": stills, "video": video, "weight": weight, "bias": bias}
    call |= {"mean": SPEC.image_mean, "std": SPEC.image_std}
    cases = [
        ({"stills": video}, r"stills must be uint8 patches of 588 values .* got \(3, 1176\)"),
        (
            {"video": stills},
            r"video must be uint8 patches of 1176 values .* 14 pixels, got \(5, 588\)",
        ),
        ({"stills": stills.float()}, r"got \(5, 588\) torch.float32"),
        ({"weight": weight.flatten(1)}, r"weight must be a convolution's .* got \(24, 1176\)"),
        ({"mean": (0.5,)}, r"mean must have 3 numbers, one per channel, got \(0.5,\)"),
        ({"std": (0.5,) * 4}, "std must have 3 numbers, one per channel"),
        ({"bias": bias[:5]}, r"bias must be \(24,\), got \(5,\)"),
        ({"stills": stills.to("meta")}, "stills are on meta, the weight is on cpu"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            patch_embed(**{**call, **change})
