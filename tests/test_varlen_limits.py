"""Attention's kernels at their limits: numbers that are not finite, heads of other widths, other GPUs."""

from types import SimpleNamespace

import pytest
import torch
from test_varlen_attention import Case, assert_within_budget

from mmpack.ops import arguments, varlen_attention, varlen_libraries, varlen_triton
from mmpack.ops.varlen_attention import auto_impl, why_not

pytestmark = pytest.mark.usefixtures("poisoned_memory")
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("name", "value", "segment", "causal"),
    [
        ("v", INF, 1, True),  # in the tile of others
        ("v", INF, 3, False),  # behind it: in the same block of rows
        ("v", NAN, 4, False),  # behind the end of a long one
        ("k", INF, 1, False),
        ("k", NAN, 4, True),
        ("q", NAN, 3, True),
        ("dout", INF, 1, False),
        ("dout", NAN, 4, False),
    ],
)
def test_what_is_not_finite_stays_in_its_segment(name, value, segment, causal, device):
    """0 x inf is NaN: where p is 0, there must be no other segment's row. Three segments share a tile here."""
    case = Case([3, 6, 2, 129, 2], (1, 1), 16, causal, torch.float32, device)
    clean = case.run("triton")
    begin, end = case.offsets[segment : segment + 2]
    getattr(case, name)[begin + 1, 0, 3] = value  # one number
    others = torch.ones(len(case.q), dtype=torch.bool)
    others[begin:end] = False
    found = case.run("triton")
    for ours, expected in zip(found, clean):
        assert torch.allclose(ours[others], expected[others], rtol=1e-5, atol=1e-5)
    assert any(not x[begin:end].isfinite().all() for x in found)


def test_infinities_in_a_tile_are_as_in_torch(device):
    """Its rows are repeated one by one: what torch finds finite is the same, what it does not is not. A causal row
    of ours does not multiply the rows after it, torch's does."""
    case = Case([3, 5, 3], (2, 1), 24, True, torch.float32, device)
    before = case.run("triton")
    case.v[5] = INF  # of the second segment, rows 3 to 8
    found = case.run("triton")
    for ours, torchs in zip(found, case.plain_torch()):
        rest = torchs.isfinite()
        assert torch.allclose(ours[rest], torchs[rest], rtol=1e-4, atol=1e-5)
        assert rest[:3].all() and rest[8:].all()
    assert torch.allclose(found[0][:5], before[0][:5], rtol=1e-5, atol=1e-6)
    assert not found[0][5:8].isfinite().any() and not found[1][5:8].isfinite().any()


def test_heads_of_72_are_read_as_they_lie(device):
    """Qwen3-VL's tower: 72 = 64 + 16 - 8, and the 8 are the next head's, or the next projection's."""
    case = Case([20, 131], (2, 2), 72, False, torch.float16, device)
    fused = torch.stack([case.q, case.k, case.v, case.dout], dim=1)
    inputs = fused.unbind(1)
    for x in inputs:
        assert varlen_triton._readable(x, 80) is x
    fused.requires_grad_()
    expected, ours = case.run("triton"), case.run("triton", inputs=fused.unbind(1)[:3])
    for x, y in zip(expected, ours):
        assert torch.equal(x, y)
    assert_within_budget(case, ours)


def test_heads_of_odd_widths_are_padded(device):
    case = Case([5, 40], (2, 1), 20, True, torch.float16, device)  # 40 bytes, no multiple of 16
    assert varlen_triton._readable(case.q, 48).shape[2] == 48
    assert_within_budget(case, case.run("triton"))


@pytest.mark.parametrize(("K", "number"), [(64, 1), (128, 1), (256, 1), (80, 2), (72, 2)])
def test_one_descriptor_for_a_head_of_one_part(K, number):
    D0, D1 = varlen_triton.split_head_dim(K)
    descriptors = varlen_triton._descriptors(torch.empty(4, 2, K), 16, D0, D1)
    assert len(descriptors) == 2 and sum(d is not None for d in descriptors) == number


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float16], ids=str
)
def test_head_dim_256(dtype, device):
    """Qwen3.5's text."""
    case = Case([3, 129], (2, 1), 256, True, dtype, device)
    assert_within_budget(case, case.run("triton"))


def test_the_gradient_of_k_is_rounded_like_that_of_q(device):
    """ds = p (dp - delta) is rounded once, from a p in float32: dk was 1.2 times as far off as dq."""
    half = torch.float16 if device.type == "cpu" else torch.bfloat16
    case = Case([256], (2, 2), 64, False, half, device)
    _, dq, dk, _ = (
        (ours - exact).norm() / exact.norm()
        for ours, exact in zip(case.run("triton"), case.exact())
    )
    assert dk <= 1.1 * dq


def on_a_gpu(monkeypatch, capability, hip=None):
    """What would be said of a bf16 q on such a GPU, if every library were installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(varlen_libraries, "why_not", lambda impl: None)
    cuda = torch.device("cuda", 0)
    return SimpleNamespace(device=cuda, dtype=torch.bfloat16, shape=(1, 1, 64), requires_grad=True)


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((9, 0), None, None),
        ((10, 0), None, None),
        ((10, 3), None, None),
        ((8, 0), None, "needs TMA .* the GPU has 8.0"),
        ((8, 9), None, "needs TMA .* the GPU has 8.9"),
        ((12, 0), None, "227 KB of shared memory .* the GPU has 12.0"),
        ((9, 4), "6.4", "for NVIDIA GPUs"),
    ],
)
def test_gpus_that_run_the_kernels(monkeypatch, capability, hip, reason):
    found = why_not("triton", on_a_gpu(monkeypatch, capability, hip))
    assert (found is None) == (reason is None)
    if reason:
        with pytest.raises(ValueError, match=reason):
            raise ValueError(found)


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [((7, 5), None, "sdpa"), ((8, 0), None, "flash3"), ((9, 4), "6.4", "flash3")],
)
def test_auto_asks_for_a_gpu_that_flash_attention_supports(monkeypatch, capability, hip, expected):
    assert auto_impl(on_a_gpu(monkeypatch, capability, hip)) == expected


def test_other_kernels_run_from_sm_80_on(monkeypatch):
    cuda = on_a_gpu(monkeypatch, (8, 0)).device
    arguments.check_device(cuda)
    on_a_gpu(monkeypatch, (7, 5))
    with pytest.raises(ValueError, match="capability 8.0 or newer, cuda:0 has 7.5"):
        arguments.check_device(cuda)


def test_wider_heads_are_refused(device):
    case = Case([5], (1, 1), 264, True, torch.float32, device)
    with pytest.raises(ValueError, match="head dims up to 256, q has 264"):
        varlen_attention(
            case.q, case.k, case.v, case.cu_seqlens, 5, causal=True, scale=1.0, impl="triton"
        )
