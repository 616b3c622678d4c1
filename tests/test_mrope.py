"""The rotary kernel against the specification, and the specification against transformers."""

import pytest
import torch
from builders import assert_within_budget
from transformers import Qwen2VLConfig, Qwen3VLConfig
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl

from mmpack import reference
from mmpack.ops import apply_mrope

pytestmark = pytest.mark.usefixtures("poisoned_memory")
MAX_POSITION = 32_768


def make_case(T, H, HK, K, sections, dtype, device, num_freqs=None, position_dtype=torch.int64):
    """(q, k, position_ids, inv_freq): q and k views into one fused projection, as Linear leaves them."""
    num_freqs = num_freqs or sum(sections)
    fused = torch.randn(T, (H + 2 * HK) * K).to(device, dtype)
    q, k, _ = fused.view(T, H + 2 * HK, K).split([H, HK, HK], dim=1)
    position_ids = torch.randint(0, MAX_POSITION, (len(sections), T), dtype=position_dtype)
    inv_freq = 1 / 10_000 ** (torch.arange(num_freqs) / num_freqs)
    return q, k, position_ids.to(device), inv_freq.to(device)


def run(fn, q, k, dq, dk, *rest, **how):
    """Both outputs and both gradients."""
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = fn(q, k, *rest, **how)
    torch.autograd.backward(out, (dq, dk))
    return *(x.detach() for x in out), q.grad, k.grad


def assert_right(case, sections, dq=None, dk=None, **how):
    """Forward and gradients within the budget of the specification in the same dtype."""
    q, k, position_ids, inv_freq = case
    dq = torch.randn_like(q) if dq is None else dq
    dk = torch.randn_like(k) if dk is None else dk
    rest = (position_ids, inv_freq, sections)
    ours = run(apply_mrope, q, k, dq, dk, *rest, **how)
    torchs = run(reference.apply_mrope, q, k, dq, dk, *rest, **how)
    exact = run(reference.apply_mrope, *(x.double() for x in (q, k, dq, dk)), *rest, **how)
    assert all(x.is_contiguous() for x in ours[:2])
    for name, *values in zip(("q", "k", "dq", "dk"), ours, torchs, exact):
        assert values[0].shape == values[1].shape
        if values[0].numel():
            assert_within_budget(f"{name} {q.dtype}", *values)


TEXT = {"sections": (16, 24, 24)}
QWEN3 = {"sections": (24, 20, 20), "interleaved": True}
VISION = {"sections": (20, 20), "num_freqs": 20}
SHAPES = [  # T, H, Hk, K
    (1, 12, 2, 128, TEXT),
    (17, 28, 4, 128, TEXT),
    (9, 5, 1, 128, QWEN3),
    (19, 16, 16, 80, VISION),
    (3, 1, 1, 80, VISION),
    (8, 3, 2, 160, QWEN3),  # partial: 32 channels stay
    (11, 4, 2, 8, {"sections": (2, 1, 1)}),
    (11, 4, 2, 9, {"sections": (2, 1, 1)}),
    (13, 7, 3, 70, {"sections": (9, 5, 3)}),
    (13, 7, 3, 34, {"sections": (6, 6, 5), "interleaved": True}),
    (10, 2, 2, 6, {"sections": (3,)}),  # plain rope
    (0, 4, 2, 8, {"sections": (2, 1, 1)}),
]


@pytest.mark.smoke
@pytest.mark.parametrize(("T", "H", "HK", "K", "rope"), SHAPES)
def test_forward_and_gradients(T, H, HK, K, rope, device):
    dtypes = [torch.float32, torch.float16, torch.float64]
    for dtype in dtypes if device.type == "cpu" else [*dtypes, torch.bfloat16]:
        sections, num_freqs = rope["sections"], rope.get("num_freqs")
        case = make_case(T, H, HK, K, sections, dtype, device, num_freqs)
        interleaved = rope.get("interleaved", False)
        assert_right(case, sections, interleaved=interleaved, attention_scaling=1.25)


def test_strides_of_every_kind(device):
    sections, how = (2, 1, 1), {"interleaved": True}
    q, k, positions, inv_freq = make_case(21, 4, 2, 8, sections, torch.float32, device)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k)]
    channels_apart = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k)]
    for one, other in (heads_first, channels_apart):
        assert_right((one, other, positions, inv_freq), sections, **how)
    four = torch.randint(0, 99, (4, 1, 21), device=device)
    across = torch.randint(0, 99, (21, 3), device=device).T
    for rows in (four[1:, 0], across, positions.int()):
        assert_right((q, k, rows, inv_freq), sections, **how)
    ones = torch.ones(1, device=device)  # sum().backward() gives such gradients
    gradients = [x.expand(21, heads, 8) for x, heads in ((ones, 4), (ones, 2))]
    assert_right((q, k, positions, inv_freq), sections, *gradients, **how)


def test_what_the_input_holds_stays(device):
    q, k, *rest = make_case(21, 4, 2, 8, (2, 1, 1), torch.float32, device)
    before = q.clone(), k.clone()
    apply_mrope(q, k, *rest, (2, 1, 1))
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


def test_the_rest_of_the_channels_is_copied(device):
    q, k, *rest = make_case(21, 4, 2, 30, (2, 1, 1), torch.float16, device)
    for out, x in zip(apply_mrope(q, k, *rest, (2, 1, 1)), (q, k)):
        assert torch.equal(out[..., 8:], x[..., 8:])
        assert not torch.equal(out[..., :8], x[..., :8])


def test_one_of_two_gradients(device):
    q, k, *rest = make_case(9, 4, 2, 8, (2, 1, 1), torch.float32, device)
    q = q.detach().requires_grad_()
    out = apply_mrope(q, k, *rest, (2, 1, 1))
    out[0].sum().backward()
    expected = run(
        reference.apply_mrope, q, k, torch.ones_like(q), torch.zeros_like(k), *rest, (2, 1, 1)
    )
    assert torch.allclose(q.grad, expected[2], atol=1e-5)


def test_angles_hold_to_the_last_position(device):
    """cos and sin are the float32 angle's own to 2e-7, far beyond any context."""
    T = 1024
    q = torch.zeros(T, 1, 2, device=device)
    q[..., 0] = 1.0  # turns into (cos, sin)
    position_ids = torch.randint(0, 1 << 20, (1, T), device=device)
    inv_freq = torch.tensor([0.7310586], device=device)
    out, _ = apply_mrope(q, q[:, :0], position_ids, inv_freq, (1,))
    angle = (position_ids[0].float() * inv_freq).double()
    assert (out[:, 0, 0].double() - angle.cos()).abs().max() <= 2e-7
    assert (out[:, 0, 1].double() - angle.sin()).abs().max() <= 2e-7


def text_case(module, config, dtype):
    """q, k, positions and the rotary module of a text model."""
    torch.manual_seed(0)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    q, k = torch.randn(33, heads, head_dim), torch.randn(33, kv_heads, head_dim)
    return q.to(dtype), k.to(dtype), torch.randint(0, 4000, (3, 33)), module(config)


FAMILIES = {
    "qwen2_vl": (
        qwen2_vl,
        lambda: qwen2_vl.Qwen2VLRotaryEmbedding,
        Qwen2VLConfig(
            text_config={
                "hidden_size": 512,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            }
        ),
        False,
    ),
    "qwen3_vl": (
        qwen3_vl,
        lambda: qwen3_vl.Qwen3VLTextRotaryEmbedding,
        Qwen3VLConfig(
            text_config={
                "hidden_size": 512,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 128,
                "rope_scaling": {
                    "rope_type": "default",
                    "mrope_interleaved": True,
                    "mrope_section": [24, 20, 20],
                },
            }
        ),
        True,
    ),
}


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_text_models_of_transformers(family, dtype, device):
    """The specification equals transformers' rope; the kernel too, or is nearer to float64."""
    code, module, config, interleaved = FAMILIES[family]
    q, k, positions, rotary = text_case(module(), config.text_config, dtype)
    cos, sin = rotary(q, positions[:, None])
    stock = code.apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
    rest = (positions, rotary.inv_freq, tuple(rotary.mrope_section), interleaved)
    spec = reference.apply_mrope(q, k, *rest)
    exact = reference.apply_mrope(q.double(), k.double(), *rest)
    q, k, positions, inv_freq = (x.to(device) for x in (q, k, positions, rotary.inv_freq))
    ours = apply_mrope(q, k, positions, inv_freq, rest[2], interleaved=interleaved)
    for name, one, kernel, theirs, truth in zip("qk", spec, ours, stock, exact):
        if dtype == torch.float16:  # transformers rounds more often
            assert_within_budget(name, one, theirs[0], truth)
        else:
            assert torch.allclose(
                one, theirs[0], rtol=0, atol=1e-12 if dtype.itemsize == 8 else 1e-6
            )
        assert_within_budget(name, kernel.cpu(), theirs[0], truth)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_vision_tower_of_transformers(dtype, device):
    config = Qwen2VLConfig(vision_config={"embed_dim": 320, "num_heads": 4}).vision_config
    rotary = qwen2_vl.Qwen2VLVisionRotaryEmbedding(config)
    q, k = torch.randn(45, 4, 80).to(dtype), torch.randn(45, 4, 80).to(dtype)
    positions = torch.randint(0, 60, (45, 2))
    stock = qwen2_vl.apply_rotary_pos_emb_vision(q, k, *rotary(q, positions))
    rest = (positions.T, rotary.inv_freq, (20, 20))
    spec = reference.apply_mrope(q, k, *rest)
    ours = apply_mrope(*(x.to(device) for x in (q, k, *rest[:2])), (20, 20))
    for one, kernel, theirs in zip(spec, ours, stock):
        assert torch.equal(one, theirs)
        tolerance = 1e-6 if dtype == torch.float32 else 4e-3  # a rounding to float16
        assert torch.allclose(kernel.cpu(), theirs, rtol=0, atol=tolerance)


def test_it_runs_on_the_meta_device():
    q, k, *rest = (x.to("meta") for x in make_case(9, 4, 2, 8, (2, 1, 1), torch.float32, "cpu"))
    ours = run(apply_mrope, q, k, torch.empty_like(q), torch.empty_like(k), *rest, (2, 1, 1))
    assert [x.shape for x in ours] == [(9, 4, 8), (9, 2, 8)] * 2


def test_the_operator_is_well_formed(device):
    """Schema, fake and autograd of the custom op, as torch checks them."""
    q, k, *rest = make_case(9, 4, 2, 8, (2, 1, 1), torch.float32, device)
    q, k = q.detach().clone().requires_grad_(), k.detach().clone().requires_grad_()
    arguments = (q, k, *rest, [2, 1, 1], False, 1.0, False)
    torch.library.opcheck(torch.ops.mmpack.apply_mrope.default, arguments)


def test_two_backwards(device):
    """The backward is the op itself, so it has a backward."""
    q, k, *rest = make_case(2, 1, 1, 2, (1,), torch.float64, device)
    q, k = q.detach().clone().requires_grad_(), k.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: apply_mrope(q, k, *rest, (1,)), (q, k))
    assert torch.autograd.gradgradcheck(lambda q, k: apply_mrope(q, k, *rest, (1,)), (q, k))


def test_what_does_not_fit_is_told(device):
    q, k, positions, inv_freq = make_case(9, 4, 2, 8, (2, 1, 1), torch.float32, device)
    call = {"q_THK": q, "k": k, "position_ids_3T": positions, "inv_freq": inv_freq}
    call |= {"sections": (2, 1, 1)}
    cases = [
        ({"k": k[:8]}, r"must be \(T, H, K\) and \(T, Hk, K\), got \(9, 4, 8\) and \(8, 2, 8\)"),
        ({"q_THK": q.flatten(1)}, r"got \(9, 32\) and"),
        ({"k": k.half()}, "one floating dtype, got torch.float32 and torch.float16"),
        ({"sections": (4, 1, 1)}, "rotate 12 channels, the heads have 8"),
        ({"sections": (1, 1, 1, 1)}, r"there must be 1 to 3 sections.* got \(1, 1, 1, 1\)"),
        ({"sections": (2, 2), "interleaved": True}, "there must be 1 to 3 sections"),
        ({"sections": (2, 2)}, r"position_ids must be \(2, 9\) integers, .* got \(3, 9\)"),
        ({"position_ids_3T": positions[:, :5]}, r"must be \(3, 9\) integers, .* got \(3, 5\)"),
        (
            {"position_ids_3T": positions.float()},
            "integers, one row per section, got .* torch.float32",
        ),
        ({"inv_freq": inv_freq[:3]}, r"inv_freq must have 4 frequencies for sections \(2, 1, 1\)"),
        ({"inv_freq": inv_freq.to("meta")}, "inv_freq is on meta, q is on"),
        ({"k": k.to("meta")}, "k is on meta"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            apply_mrope(**{**call, **change})


def test_without_a_gpu_it_says_so(monkeypatch):
    import triton

    case = make_case(3, 1, 1, 8, (2, 1, 1), torch.float32, "cpu")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="the kernel needs a CUDA device, the tensors are on cpu"):
        apply_mrope(*case, (2, 1, 1))
