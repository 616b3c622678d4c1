"""The chunked loss against torch's cross entropy in float64."""

import pytest
import torch
import torch.nn.functional as F

from mmpack.hf.loss import PackedLoss
from mmpack.ops import supervised_cross_entropy as door


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["mmpack.ops.supervised_cross_entropy"], "CHUNK", 400)


def run(loss_of, logits, weight, labels, num_items):
    """(loss, gradient of what made the logits): the head, whose output nobody else needs."""
    hidden = logits.detach().requires_grad_()
    loss = loss_of(hidden * weight, labels, num_items)
    (gradient,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), gradient


def in_torch(logits, labels, num_items):
    return F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels,
                           reduction="sum") / num_items  # fmt: skip


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(("L", "V"), [(1, 7), (13, 101), (9, 999), (400, 3)])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_loss_and_gradient(L, V, dtype, impl, device):
    if (impl, dtype, device.type) == ("triton", torch.bfloat16, "cpu"):
        pytest.skip("bf16 sums are wrong in the interpreter")
    L = min(L, 40) if impl == "triton" else L  # the interpreter takes 1 ms a row
    logits = 3 * torch.randn(L, V, dtype=torch.float64).to(device, dtype)
    labels = torch.randint(V, (L,), device=device)
    labels[L // 2] = -100 if L > 1 else labels[L // 2]
    loss, gradient = run(lambda *a: door(*a, impl=impl), logits, 1.0, labels, 17)
    exact, exact_gradient = run(in_torch, logits.double(), 1.0, labels, 17)
    plain, plain_gradient = run(in_torch, logits, 1.0, labels, 17)
    for ours, true, theirs in ((loss, exact, plain), (gradient, exact_gradient, plain_gradient)):
        budget = 2 * (theirs - true).abs().max() + 1e-5 * true.abs().max()
        if dtype == torch.float64:
            budget = 1e-14 * true.abs().max().clamp_min(1)
        assert (ours - true).abs().max() <= budget
    assert gradient.dtype == dtype
    assert loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert (gradient[labels == -100] == 0).all()


@pytest.mark.parametrize("num_items", [3, torch.tensor(3), torch.tensor(3.0)])
def test_num_items_may_be_a_number_or_a_tensor(num_items):
    logits, labels = torch.randn(5, 11), torch.randint(11, (5,))
    assert torch.allclose(door(logits, labels, num_items), in_torch(logits, labels, 3))


def test_the_mean_where_nobody_counts(device):
    logits = torch.randn(5, 11).to(device)
    labels = torch.tensor([1, -100, 3, -100, 0], device=device)
    assert torch.allclose(door(logits, labels), F.cross_entropy(logits, labels))


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0), 12])
@pytest.mark.parametrize("L", [0, 4])
def test_nothing_supervised_is_loss_zero(L, num_items, device):
    logits = torch.randn(L, 11, device=device, requires_grad=True)
    num_items = num_items.to(device) if isinstance(num_items, torch.Tensor) else num_items
    loss = door(logits * 1, torch.full((L,), -100, device=device), num_items)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_the_loss_may_be_scaled(device):
    """By gradient accumulation, by a scaler, across ranks."""
    logits, labels = (x.to(device) for x in (torch.randn(5, 11), torch.randint(11, (5,))))
    _, once = run(door, logits, 1.0, labels, 4)
    _, scaled = run(lambda *a: 1024 * door(*a), logits, 1.0, labels, 4)
    assert torch.equal(scaled, 1024 * once)


def test_float16_gradients_do_not_vanish_before_they_are_scaled(device):
    """1 / num_items is applied with the scaler's factor, not before."""
    logits, labels = torch.randn(5, 1000).half().to(device), torch.randint(1000, (5,)).to(device)
    _, gradient = run(lambda *a: 65536 * door(*a), logits, 1.0, labels, 100_000)
    exact = run(lambda *a: 65536 * in_torch(*a), logits.double(), 1.0, labels, 100_000)[1]
    assert (gradient - exact).abs().max() <= 2e-3 * exact.abs().max()
    assert (gradient != 0).all()


def test_the_backward_alone_overwrites_the_logits():
    logits, labels = torch.randn(5, 11, requires_grad=True), torch.randint(11, (5,))
    made = logits * 1
    loss = door(made, labels, 5)
    assert torch.equal(made, logits)
    loss.backward()
    assert torch.equal(made, logits.grad)


def test_a_second_backward_is_refused():
    logits, labels = torch.randn(5, 11, requires_grad=True), torch.randint(11, (5,))
    loss = door(logits * 1, labels, 5)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_who_needs_the_logits_after_all_is_told():
    """An operation that saved them finds them changed: torch says so, nothing is wrong silently."""
    hidden, labels = torch.randn(5, 11, requires_grad=True), torch.randint(11, (5,))
    logits = hidden.exp()  # exp's gradient is its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        door(logits, labels, 5).backward()


def test_no_data_is_asked_for():
    logits = torch.randn(1000, 50, device="meta", requires_grad=True)
    labels = torch.zeros(1000, dtype=torch.long, device="meta")
    door(logits * 1, labels, torch.zeros((), device="meta")).backward()
    assert logits.grad.shape == logits.shape


def test_no_float32_copy_of_all_logits(monkeypatch):
    """The largest tensor made is one chunk."""
    made = []
    real = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *a, **k: made.append(self.numel()) or real(self, *a, **k)
    )
    logits = torch.randn(300, 40, requires_grad=True)
    door((logits * 1).bfloat16(), torch.zeros(300, dtype=torch.long)).backward()
    assert max(made) <= 400


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(L, V\) and labels \(L,\), got \(2, 3, 4\) and \(3,\)"):
        door(torch.randn(2, 3, 4), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64], ids=str)
def test_weights(dtype, weight_dtype, device):
    logits = torch.randn(30, 50, dtype=torch.float64).to(device, dtype)
    labels = torch.randint(50, (30,), device=device)
    labels[3] = -100
    weights = torch.rand(30, dtype=weight_dtype, device=device)

    def in_float64(logits, labels, num_items):
        losses = F.cross_entropy(logits, labels, reduction="none")
        return (losses * weights).sum() / num_items

    total = weights.double()[labels != -100].sum().item()
    exactly = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype]
    for num_items in (0.3, torch.tensor(0.3, dtype=torch.float64), None):
        loss, gradient = run(lambda *a: door(*a, weights_L=weights), logits, 1.0, labels, num_items)
        truth = run(in_float64, logits.double(), 1.0, labels, total if num_items is None else 0.3)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        assert (loss - truth[0]).abs() <= min(exactly, 2e-6) * truth[0]
        assert (gradient - truth[1]).abs().max() <= exactly * truth[1].abs().max()
        assert (gradient[3] == 0).all()


def compiled(logits, labels, num_items=None, **weights):
    torch._dynamo.reset()
    return torch.compile(door, backend="aot_eager", fullgraph=True)(
        logits, labels, num_items, **weights
    )


@pytest.mark.parametrize("loss_of", [door, compiled], ids=["eager", "compiled"])
def test_a_row_of_weight_zero_adds_nothing_whatever_its_logits(loss_of):
    logits, labels = torch.randn(6, 11), torch.randint(11, (6,))
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0, 1.0])
    without, without_gradient = run(
        lambda *a: door(*a, weights_L=weights[weights > 0]),
        logits[weights > 0], 1.0, labels[weights > 0], None,
    )  # fmt: skip
    logits[1], logits[3] = torch.inf, torch.nan
    loss, gradient = run(lambda *a: loss_of(*a, weights_L=weights), logits, 1.0, labels, None)
    assert torch.allclose(loss, without, rtol=1e-6)
    assert torch.allclose(gradient[weights > 0], without_gradient, rtol=1e-6, atol=1e-8)
    assert (gradient[weights == 0] == 0).all()


def test_weights_of_one_change_no_bit():
    logits, labels = torch.randn(6, 11), torch.randint(11, (6,))
    labels[2] = -100
    for num_items in (None, 7):
        plain = run(door, logits, 1.0, labels, num_items)
        ones = run(lambda *a: door(*a, weights_L=torch.ones(6)), logits, 1.0, labels, num_items)
        assert all(map(torch.equal, plain, ones))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_views(impl, device):
    """Rows of a wider tensor, columns of a transposed one, and every second label."""
    wide, labels = torch.randn(6, 40).to(device), torch.randint(11, (12,), device=device)[::2]
    weights = torch.rand(12, device=device)[::2]
    for view_of in (lambda x: x[:, 7:18], lambda x: x.reshape(40, 6)[:11].T):
        logits = view_of(wide).contiguous()
        exact = run(lambda *a: door(*a, weights_L=weights), logits, 1.0, labels.contiguous(), 3)
        base = wide.clone().requires_grad_()
        loss = door(view_of(base * 1), labels, 3, impl=impl, weights_L=weights)
        (gradient,) = torch.autograd.grad(loss, base)
        assert torch.allclose(loss, exact[0], rtol=1e-6)
        assert torch.allclose(view_of(gradient), exact[1], rtol=1e-5, atol=1e-7)


def test_weights_that_do_not_fit():
    logits, labels = torch.randn(2, 4), torch.zeros(2, dtype=torch.long)
    for weights in (torch.ones(3), torch.ones(2, dtype=torch.bfloat16), torch.ones(2, 1)):
        with pytest.raises(ValueError, match=r"weights must be \(2,\) float32 or float64, one per row, got"):  # fmt: skip
            door(logits, labels, weights_L=weights)


@pytest.mark.parametrize("full_logits", [False, True])
def test_a_packed_batch_is_weighted_by_its_dict(full_logits):
    """Float32 bits in an int32 tensor, which FSDP2 and DeepSpeed do not cast."""
    logits, rows = torch.randn(1, 9, 11), torch.tensor([1, 2, 6])
    labels = torch.randint(11, (1, 9))
    targets, weights = labels[0, rows + 1], torch.tensor([0.1, 0.0, 3.0])
    pack = {"loss_weight_bits": weights.view(torch.int32), "supervised_index": rows}
    pack["is_counted"] = True
    kwargs = {} if full_logits else {"shift_labels": targets[None]}
    loss = PackedLoss(None)(
        logits if full_logits else logits[:, rows], labels, 11, torch.tensor(7.0), mmpack=pack, **kwargs
    )  # fmt: skip
    losses = F.cross_entropy(logits[0, rows].double(), targets, reduction="none")
    assert loss.item() == pytest.approx((losses * weights).sum().item() / 7, rel=1e-6)
