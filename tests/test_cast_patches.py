"""uint8 patches cast for a product on tensor cores: equal to torch, in rows of 16 bytes."""

import sys

import pytest
import torch
from test_patch_embed import NORMAL, make_case, run
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed

from mmpack.hf.uint8_pixels import patch_embed_forward
from mmpack.ops import cast_patches, patch_embed

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(
    ("P", "N", "W"),
    [(1, 588, 592), (8, 588, 592), (21, 588, 592), (5, 768, 768), (3, 1176, 1176), (9, 3, 8), (0, 588, 592)],
)  # fmt: skip
def test_the_cast_is_exact(P, N, W, device):
    patches = torch.randint(0, 256, (P, N), dtype=torch.uint8).to(device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        out = cast_patches(patches, dtype)
        assert out.shape == (P, W) and out.dtype == dtype
        assert torch.equal(out[:, :N].double(), patches.double() - 128)
        assert not out[:, N:].any()


def test_views_are_read(device):
    patches = torch.randint(0, 256, (40, 588), dtype=torch.uint8).to(device)
    assert torch.equal(cast_patches(patches[3:31:2], torch.float32)[:, :588] + 128, patches[3:31:2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("P1", "P2", "p"), [(5, 3, 14), (9, 0, 14), (0, 4, 14), (7, 0, 16)])
def test_columns_of_zeros_change_nothing(P1, P2, p, dtype, device):
    case = [
        x.to(dtype) if x is not None and x.is_floating_point() else x
        for x in make_case(P1, P2, p, device=device)
    ]

    def by_kernel(*arguments):
        return patch_embed(*arguments, impl="triton")

    for ours, torchs in zip(run(by_kernel, *case), run(patch_embed, *case)):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert torch.allclose(ours, torchs, rtol=tolerance, atol=tolerance)


def test_torch_checks_the_op(device):
    patches = torch.randint(0, 256, (3, 588), dtype=torch.uint8).to(device)
    torch.library.opcheck(torch.ops.mmpack.cast_patches.default, (patches, torch.bfloat16))


def test_what_does_not_fit_is_refused(device):
    patches = torch.zeros(3, 588, dtype=torch.uint8).to(device)
    with pytest.raises(
        ValueError, match=r"uint8 \(P, N\) and the dtype floating, got torch.float32"
    ):
        cast_patches(patches.float(), torch.bfloat16)
    with pytest.raises(ValueError, match=r"\(3, 588\) and torch.int8"):
        cast_patches(patches, torch.int8)
    case = make_case(2, 0, 14, device=device)[:4]
    with pytest.raises(ValueError, match="impl must be 'torch' or 'triton', got 'fast'"):
        patch_embed(*case, *NORMAL, impl="fast")


FOUND = {"patches": {torch.float32: "triton"}}  # by `mmpack tune`


@pytest.mark.parametrize(
    ("impl", "tuned", "casts"),
    [("triton", {}, 1), ("auto", {}, 0), ("auto", FOUND, 1), ("sdpa", {}, 0)],
)
def test_a_patched_model_casts_in_the_kernel_if_chosen(impl, tuned, casts, monkeypatch, device):
    module = PatchEmbed(patch_size=14, embed_dim=8).to(device)
    module.normalization, module.choice = NORMAL, {"impl": impl, "tuned": tuned}  # by the tower
    calls, file = [], sys.modules["mmpack.ops.cast_patches"]
    real = file.cast_patches
    monkeypatch.setattr(file, "cast_patches", lambda *a: calls.append(a) or real(*a))
    patches = torch.randint(0, 256, (5, 588), dtype=torch.uint8).to(device)
    out = patch_embed_forward(PatchEmbed.forward)(module, patches)
    weight, bias = module.proj.weight, module.proj.bias
    assert torch.allclose(out, patch_embed(patches, None, weight, bias, *NORMAL), atol=1e-5)
    assert len(calls) == casts
