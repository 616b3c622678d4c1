"""Attention within segments against the specification in float64: every implementation, one test."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpack import reference
from mmpack.ops import varlen_attention
from mmpack.ops.varlen_attention import IMPLEMENTATIONS, why_not
from mmpack.ops.varlen_triton import LOG2_E, tiles_from_cu_seqlens, varlen_attention_fwd
from mmpack.types import TILE

pytestmark = pytest.mark.usefixtures("poisoned_memory")

RAGGED = [1, 1, 127, 0, 128, 129, 300]
SHORT = [1, 3, 2, 0, 5, 70, 60, 1, 130]


class Case:
    """q, k, v and the output's gradient of segments of some lengths."""

    def __init__(self, lengths, heads, K, causal, dtype, device):
        self.offsets = np.cumsum([0, *lengths])
        self.causal, self.scale, self.device = causal, K**-0.5, device
        T = int(self.offsets[-1])
        shapes = [(T, heads[0], K), (T, heads[1], K), (T, heads[1], K), (T, heads[0], K)]
        self.q, self.k, self.v, self.dout = (
            torch.randn(shape).to(dtype).to(device) for shape in shapes
        )
        tiles = reference.attention_tiles(self.offsets, causal=causal)
        segment_ids = reference.segment_ids(self.offsets)
        self.cu_seqlens = torch.tensor(self.offsets, dtype=torch.int32).to(device)
        self.tiles = tuple(torch.from_numpy(x).to(device) for x in (tiles, segment_ids))
        self.max_seqlen = max(lengths, default=0)

    def run(self, impl, tiles="host", inputs=None):
        """The output and dq, dk, dv."""
        inputs = [x.detach().requires_grad_() for x in (inputs or (self.q, self.k, self.v))]
        out = varlen_attention(
            *inputs,
            self.cu_seqlens,
            self.max_seqlen,
            causal=self.causal,
            scale=self.scale,
            tiles=self.tiles if tiles == "host" else None,
            offsets=self.offsets,
            impl=impl,
        )
        return [out.detach(), *torch.autograd.grad(out, inputs, self.dout.to(out.dtype))]

    def exact(self):
        """The specification in float64."""
        return self.run("reference", inputs=[x.double() for x in (self.q, self.k, self.v)])

    def plain_torch(self):
        """What a user would write, in the same dtype throughout."""
        inputs = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        parts = []
        for begin, end in zip(self.offsets[:-1], self.offsets[1:]):
            q, k, v = (x[begin:end].transpose(0, 1) for x in inputs)
            k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
            scores = q @ k.transpose(1, 2) * self.scale
            if self.causal:
                future = torch.ones(len(scores[0]), len(scores[0]), device=q.device).triu(1).bool()
                scores = scores.masked_fill(future, -torch.inf)
            parts.append((scores.softmax(-1) @ v).transpose(0, 1))
        out = torch.cat(parts)
        return [out.detach(), *torch.autograd.grad(out, inputs, self.dout)]


def of_roundings(case, number):
    """What roundings at the size of a row's log-sum-exp in base 2 can do to out, dq, dk and dv: each moves
    all the p of a row, as the backward makes them, by half a spacing of that float32 times ln 2. `out` is
    divided by the row's own sum, from which they cancel."""
    q, k, v, dout = (x.double() for x in (case.q, case.k, case.v, case.dout))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for begin, end in zip(case.offsets[:-1], case.offsets[1:]):
        rows = slice(begin, end)
        for head in range(q.shape[1] if begin < end else 0):
            of = rows, head // (q.shape[1] // k.shape[1])
            scores = q[rows, head] @ k[of].T * case.scale
            if case.causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            lse = (scores.logsumexp(1) / np.log(2)).abs().float().cpu().numpy()
            moved = torch.from_numpy(number * np.log(2) * np.spacing(lse).astype(float) / 2)
            p = scores.softmax(1)
            dp = dout[rows, head] @ v[of].T
            ds = p * (dp - (p * dp).sum(1, keepdim=True)).abs() * abs(case.scale)
            p, ds = (x * moved.to(x.device)[:, None] for x in (p, ds))
            dq[rows, head] = ds @ k[of].abs()
            dk[of] += ds.T @ q[rows, head].abs()
            dv[of] += p.T @ dout[rows, head].abs()
    return [0.0, *(x.max() for x in (dq, dk, dv))]


def assert_within_budget(case, ours, factor=2, roundings=0):
    names = ("out", "dq", "dk", "dv")
    found = zip(names, ours, case.exact(), case.plain_torch(), of_roundings(case, roundings))
    for name, value, exact, plain, more in found:
        assert value.shape == exact.shape and value.dtype == case.q.dtype
        assert not value.isnan().any(), name
        budget = factor * (plain - exact).abs().max() + 1e-5 * exact.abs().max() + more
        assert (value - exact).abs().max() <= budget, name


def skip_unless_there(impl, case):
    reason = why_not(impl, case.q.detach().requires_grad_())
    if reason:
        pytest.skip(f"{impl}: {reason}")


def dtypes_of(device):
    return [torch.float32, torch.float16 if device.type == "cpu" else torch.bfloat16]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("K", "heads", "causal"), [(80, (2, 2), False), (128, (3, 1), True), (64, (4, 2), True)]
)
def test_every_implementation(impl, K, heads, causal, device):
    for dtype in dtypes_of(device):
        case = Case(SHORT, heads, K, causal, dtype, device)
        if device.type == "cuda" and dtype == torch.float32 and why_not(impl, case.q):
            continue  # flash attention has no float32
        skip_unless_there(impl, case)
        # A library's own roundings are not ours to judge: on the CPU, SDPA adds heads in float16.
        assert_within_budget(case, case.run(impl), factor=2 if impl == "triton" else 4)


HALF = torch.float16


@pytest.mark.parametrize(
    ("K", "heads", "causal", "dtype"),
    [
        (64, (1, 1), False, torch.float32),
        (80, (1, 1), False, HALF),
        (80, (2, 1), True, torch.float32),
        (96, (2, 1), True, HALF),
        pytest.param(128, (2, 1), True, torch.float32, marks=pytest.mark.slow),  # as above
        pytest.param(128, (6, 1), True, HALF, marks=pytest.mark.slow),
        (128, (1, 1), False, HALF),
        (72, (1, 1), False, torch.float32),
        (8, (2, 1), True, HALF),
        pytest.param(128, (7, 1), True, torch.float32, marks=pytest.mark.slow),
        pytest.param(128, (12, 2), True, torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param(128, (28, 4), True, torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param(80, (16, 16), False, torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_kernels_on_ragged_segments(K, heads, causal, dtype, device):
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("bf16 sums are wrong in the interpreter")
    case = Case(RAGGED, heads, K, causal, dtype, device)
    assert_within_budget(case, case.run("triton"))


@pytest.mark.parametrize(("scale", "roundings"), [(-0.3, 0), (0.0, 0), (20.0, 3)])
def test_scales_of_any_sign_and_size(scale, roundings, device):
    """At 20 scores reach 1,000 in base 2, of which a float32 is known to 3e-5. The log-sum-exp is rounded as
    the next test counts; torch's own softmax keeps its p, and has no such error."""
    case = Case(SHORT, (2, 1), 64, True, torch.float32, device)
    case.scale = scale
    assert_within_budget(case, case.run("triton"), roundings=roundings)


def test_the_log_sum_exp_is_rounded_three_times(device):
    """However many blocks of keys follow the one with the peak: the peak's product rounds where it is
    subtracted and, without an FFMA, once more in the end; so does the sum. Scores are exact here, sums of
    integers, and so is the factor, as the kernel gets it."""
    case = Case([500], (1, 1), 16, False, torch.float32, device)
    q, k = torch.randint(1, 5, (500, 1, 16)).float(), torch.randint(-3, 4, (500, 1, 16)).float()
    k[0] = 4
    scale = 3.1
    _, lse = varlen_attention_fwd(
        q.to(device), k.to(device), case.v, *case.tiles, case.cu_seqlens, False, scale
    )
    scores = q[:, 0].double() @ k[:, 0].double().T * float(np.float32(scale * LOG2_E))
    exact = (scores * np.log(2)).logsumexp(1).numpy() / np.log(2)
    assert exact.max() > 800
    budget = 3 * np.spacing(exact.astype(np.float32)) / 2
    assert (np.abs(lse[0].cpu().numpy() - exact) <= budget).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [[1500], [1] * 300 + [700, 129], [257] * 5])
@pytest.mark.parametrize(
    ("K", "heads", "causal"),
    [(128, (7, 1), True), (128, (6, 2), True), (80, (3, 3), False), (96, (2, 2), True)],
)
def test_kernels_on_longer_ones(K, heads, causal, lengths, dtype, device):
    case = Case(lengths, heads, K, causal, dtype, device)
    assert_within_budget(case, case.run("triton"))


@pytest.mark.parametrize("causal", [True, False])
def test_many_tiny_segments(causal, device):
    lengths = np.random.default_rng(0).integers(1, 6, 200).tolist()
    case = Case(lengths, (2, 1), 64, causal, torch.float32, device)
    assert_within_budget(case, case.run("triton"))


@pytest.mark.parametrize("causal", [True, False])
def test_tiles_made_on_the_device(causal, device):
    """Gaps, empty segments and all, the same results."""
    case = Case([2, 0, 130, 5, 0, 128], (2, 1), 64, causal, torch.float32, device)
    assert_within_budget(case, case.run("triton", tiles="device"))


@settings(max_examples=4, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=3),
    causal=st.booleans(),
    heads=st.sampled_from([(1, 1), (2, 1)]),
)
def test_any_lengths(lengths, causal, heads):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Case(lengths, heads, 16, causal, torch.float32, device)
    ours, by_device = case.run("triton"), case.run("triton", tiles="device")
    for value, other, exact in zip(ours, by_device, case.exact()):
        assert value.shape == exact.shape
        assert torch.allclose(value.double(), exact, rtol=0, atol=1e-5)
        assert torch.allclose(value, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
@pytest.mark.parametrize("causal", [True, False])
def test_segments_do_not_leak(causal, impl, device):
    """Other keys and values in one segment leave every other segment's results equal to the bit."""
    case = Case([40, 150, 30, 3], (2, 1), 64, causal, torch.float32, device)
    before = case.run(impl)
    for segment in (0, 1, 2):  # in a shared tile, alone, between
        begin, end = case.offsets[segment : segment + 2]
        rest = torch.ones(len(case.q), dtype=torch.bool)
        rest[begin:end] = False
        k, v = case.k.clone(), case.v.clone()
        k[begin:end] = 100 * torch.randn_like(k[begin:end])
        v[begin:end] = 100 * torch.randn_like(v[begin:end])
        after = case.run(impl, inputs=[case.q, k, v])
        for old, new in zip(before, after):
            assert torch.equal(old[rest], new[rest])
        assert not torch.equal(before[0][begin:end], after[0][begin:end])


def test_two_backward_passes_give_the_same_bits(device):
    case = Case(RAGGED, (2, 1), 64, True, torch.float16, device)
    for first, second in zip(case.run("triton"), case.run("triton")):
        assert torch.equal(first, second)


@pytest.mark.parametrize("view", ["fused qkv", "heads first", "odd offset", "padded rows"])
def test_views_are_read_as_they_lie(view, device):
    case = Case([70, 130, 5], (2, 2), 80, False, torch.float32, device)
    T, H, K = case.q.shape
    if view == "fused qkv":
        fused = torch.stack([case.q, case.k, case.v], dim=1)
        inputs = list(fused.unbind(1))
    elif view == "heads first":  # transformers' (1, H, T, K), which TMA cannot take as columns
        inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (case.q, case.k, case.v)]
    elif view == "odd offset":
        inputs = []
        for x in (case.q, case.k, case.v):
            room = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)
            inputs.append(room[1:].view(T, H, K).copy_(x))
    else:
        inputs = []
        for x in (case.q, case.k, case.v):
            room = torch.full((T, H + 1, K + 4), float("nan"), dtype=x.dtype, device=device)
            inputs.append(room[:, :H, :K].copy_(x))
    expected = case.run("triton")
    for ours, theirs in zip(case.run("triton", inputs=inputs), expected):
        assert torch.equal(ours, theirs)


def test_a_fused_projection_is_not_copied(device, monkeypatch):
    case = Case([70, 130, 5], (2, 2), 80, False, torch.float16, device)
    inputs = torch.stack([case.q, case.k, case.v], dim=1).unbind(1)
    monkeypatch.setattr(torch.Tensor, "clone", None)  # a copy would fail
    tiles, segment_ids = case.tiles
    out, _ = varlen_attention_fwd(*inputs, tiles, segment_ids, case.cu_seqlens, False, case.scale)
    assert out.isfinite().all()


def test_torch_checks_the_custom_ops(device):
    case = Case([5, 130], (2, 1), 16, True, torch.float32, device)
    inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    arguments = (*inputs, *case.tiles, case.cu_seqlens, True, case.scale)
    torch.library.opcheck(torch.ops.mmpack.varlen_attention.default, arguments)


@pytest.mark.parametrize("tiles", ["host", "device"])
@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_no_data_is_asked_for(impl, tiles):
    """On the meta device, where a question to the data is an error."""
    case = Case([5, 130], (2, 1), 64, True, torch.bfloat16, torch.device("cpu"))
    for name in ("q", "k", "v", "dout", "cu_seqlens"):
        setattr(case, name, getattr(case, name).to("meta"))
    case.tiles = tuple(x.to("meta") for x in case.tiles)
    out, dq, dk, dv = case.run(impl, tiles=tiles)
    assert out.is_meta and dq.shape == case.q.shape
    assert dk.shape == dv.shape == case.k.shape


@given(lengths=st.lists(st.integers(0, 400), max_size=12), causal=st.booleans())
def test_tiles_cover_every_row_once(lengths, causal):
    offsets = np.cumsum([0, *lengths])
    tiles = reference.attention_tiles(offsets, causal=causal)
    assert tiles.dtype == np.int32 and tiles.shape[1] == 4
    rows = [row for begin, end, _, _ in tiles for row in range(begin, end)]
    assert sorted(rows) == list(range(offsets[-1]))
    assert all(0 < end - begin <= TILE == reference.TILE for begin, end, _, _ in tiles)
    for begin, end, segment_begin, segment_end in tiles:
        if (begin, end) == (segment_begin, segment_end):  # whole segments
            assert begin in offsets and end in offsets
        else:  # a part of one, aligned to its beginning
            assert (begin - segment_begin) % TILE == 0
            segment = np.searchsorted(offsets, begin, side="right") - 1
            assert (segment_begin, segment_end) == tuple(offsets[segment : segment + 2])
    work = (tiles[:, 1] if causal else tiles[:, 3]) - tiles[:, 2]
    assert (np.diff(work) <= 0).all()


def test_short_segments_share_a_tile():
    tiles = reference.attention_tiles(np.cumsum([0, 100, 20, 8, 50, 300, 10]), causal=True)
    assert tiles.tolist() == [
        [434, 478, 178, 478],
        [306, 434, 178, 478],
        [0, 128, 0, 128],  # three of them
        [178, 306, 178, 478],
        [128, 178, 128, 178],
        [478, 488, 478, 488],
    ]


@pytest.mark.parametrize("impl", ["flex"])  # named: it stands for that library alone
def test_forward_without_a_backward(impl, device):
    case = Case([300, 1, 0, 90, 200], (2, 1), 64, True, torch.float32, device)
    with torch.no_grad():
        out = varlen_attention(
            case.q, case.k, case.v, case.cu_seqlens, 300, causal=True, scale=case.scale, impl=impl
        )
    assert torch.allclose(out.double(), case.exact()[0], rtol=0, atol=1e-5)


def test_tiles_made_on_the_device_are_right():
    cu_seqlens = torch.tensor([0, 5, 5, 300], dtype=torch.int32)
    tiles, segment_ids = tiles_from_cu_seqlens(cu_seqlens, 300)
    assert segment_ids.tolist() == [0] * 5 + [2] * 295
    filled = tiles[tiles[:, 0] < tiles[:, 1]].tolist()
    assert filled == [[0, 5, 0, 5], [5, 133, 5, 300], [133, 261, 5, 300], [261, 300, 5, 300]]


def test_what_does_not_fit_is_refused():
    case = Case([5, 7], (2, 1), 16, True, torch.float32, torch.device("cpu"))
    rest = {"causal": True, "scale": 1.0}

    def call(q=case.q, k=case.k, v=case.v, cu_seqlens=case.cu_seqlens, **options):
        return varlen_attention(q, k, v, cu_seqlens, 7, **rest, **options)

    with pytest.raises(ValueError, match=r"heads that divide q's, got q \(12, 2, 16\), k \(12, 3"):
        call(k=torch.randn(12, 3, 16), v=torch.randn(12, 3, 16))
    with pytest.raises(ValueError, match=r"k and v one \(T, Hk, K\)"):
        call(v=torch.randn(11, 1, 16))
    with pytest.raises(ValueError, match="one dtype"):
        call(q=case.q.half())
    with pytest.raises(ValueError, match="they must be on one device"):
        call(q=case.q.to("meta"))
    with pytest.raises(ValueError, match="flat int32, got torch.int64"):
        call(cu_seqlens=case.cu_seqlens.long())
    with pytest.raises(ValueError, match="3 offsets from 0 to 11 do not fit 12 tokens and 2 segm"):
        call(offsets=[0, 5, 11])
    with pytest.raises(ValueError, match="impl must be 'auto' or one of triton, .*, got 'fast'"):
        call(impl="fast")
    with pytest.raises(ValueError, match=r"tiles must be int32 \(2, 4\) on cpu"):
        call(impl="triton", tiles=(torch.zeros(2, 3, dtype=torch.int32), case.tiles[1]))


def test_an_implementation_asked_for_is_never_another():
    """What cannot run here says why; nothing else runs in its place."""
    case = Case([5, 7], (2, 1), 16, True, torch.float64, torch.device("cpu"))
    with pytest.raises(ValueError, match="'triton' cannot be used: .* q is torch.float64"):
        case.run("triton")
    for impl in ("torch_varlen", "flash2", "flash3", "flash4"):
        with pytest.raises(ValueError, match=f"'{impl}' cannot be used: "):
            case.run(impl)
    meta = [x.to("meta") for x in (case.q, case.k, case.v, case.cu_seqlens)]
    with pytest.raises(ValueError, match="pass offsets, which is cu_seqlens on the host"):
        varlen_attention(*meta, 7, causal=True, scale=1.0)


def test_bf16_is_refused_in_the_interpreter(device):
    case = Case([5, 7], (2, 1), 16, True, torch.bfloat16, device)
    if device.type == "cuda":
        assert_within_budget(case, case.run("triton"))
    else:
        with pytest.raises(ValueError, match="bfloat16 sums are wrong in Triton's interpreter"):
            case.run("triton")
