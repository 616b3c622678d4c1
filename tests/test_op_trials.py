"""`mmpack tune` accepts our kernels, and refuses an implementation with any of the faults that kernels have."""

import pytest
import torch

from mmpack.ops import op_trials, trial_cases
from mmpack.ops.op_trials import fresh_memory_is_nan, worst_row
from mmpack.ops.trial_cases import TRIALS, make_trial
from mmpack.ops.tuning import ShapeClass
from mmpack.trials import WrongResultError, run_trial, run_trials

ATTENTION = "varlen_attention {} H=2 Hk=1 K=16 causal={} window={}"
ROTARY = "apply_mrope {} H=2 Hk=1 K=20 S0=2 S1=3 S2=3 interleaved=1"
EMBEDDING = "embed_features {} V=100 D=40"
LOSS = "supervised_cross_entropy {} V=500"
HEAD = "supervised_linear_cross_entropy {} V=4000 D=16"
PATCHES = "patch_embed {} E=24 C=3 t=2 p=14"
CASES = [
    ATTENTION.format("{}", 1, 0), ATTENTION.format("{}", 0, 64), ROTARY, EMBEDDING,
    "apply_mrope {} H=2 Hk=2 K=16 S0=4 S1=4 S2=0 interleaved=0", PATCHES, LOSS, HEAD,
]  # fmt: skip


CPU = torch.device("cpu")


def trial(text, device=CPU, dtype="float32", tokens=64):
    shape = ShapeClass.parse(text.format(dtype))
    return TRIALS[shape.op](shape, tokens, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_all_implementations_pass_in_the_interpreter(case):
    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU here, not in the interpreter")
    found = run_trial(trial(case), {})
    assert found.refused == {} and "triton" in found.seconds and len(found.seconds) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_all_implementations_pass_on_a_gpu(case, dtype, device):
    one = trial(case, device, dtype)
    assert {"triton", one.default} <= set(one.candidates())
    for name in one.candidates():
        one.check(name)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_runs_are_timed_on_a_gpu(case):
    if not torch.cuda.is_available():
        pytest.skip("needs the clock of a CUDA device")
    found = run_trial(make_trial(f"1024 {case.format('bfloat16')}"), {})
    assert found.refused == {} and {"triton", found.default} <= found.seconds.keys()
    assert all(0 < seconds < 1 for seconds in found.seconds.values())


@pytest.mark.slow
def test_a_child_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    job = f"64 {EMBEDDING.format('float32')}"
    ((name, outcome),) = run_trials(make_trial, [job])
    assert name == job and "CUDA" in outcome.failed and not outcome.seconds


def attend(fault):
    """`varlen_attention`, whose "triton" is a library's with a fault in its output."""
    real = trial_cases.varlen_attention
    calls = []

    def run(q, k, v, cu_seqlens, max_seqlen, *, impl, **options):
        out = real(q, k, v, cu_seqlens, max_seqlen, impl="sdpa", **options)
        calls.append(impl)
        return fault(out, q, len(calls)) if impl == "triton" else out

    return run


def shifted_row(out, q, call):
    """One row of the smallest segment is off by three times the bound."""
    weight = torch.ones(len(out), 1, 1)
    weight[-1] += 4e-4
    return out * weight


def unwritten_row(out, q, call):
    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            written = x.new_empty(x.shape)
            written[:-1] = x[:-1]
            return written

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    return Kernel.apply(out)


FAULTS = {
    "wrong": (shifted_row, "out: error .*e-04, at most 1.0"),
    "a gradient": (lambda out, q, call: out + 1e-3 * (q - q.detach()), "dq: error"),
    "unwritten": (unwritten_row, "out: error inf, at most"),
    "not finite": (lambda out, q, call: out * float("inf"), "out: error inf"),
    "unstable": (lambda out, q, call: out * (1 + 2e-7 * call), "out: two runs differ"),
    "leaking": (
        lambda out, q, call: out * (1 + 1e-6 * q.detach()[130:200].abs().mean()),
        "out: a change in one segment changed another",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    acts, message = FAULTS[fault]
    monkeypatch.setattr(trial_cases, "varlen_attention", attend(acts))
    one = trial(CASES[0])
    one.check("sdpa")
    with pytest.raises(WrongResultError, match=message):
        one.check("triton")


def test_no_fault_is_seen_where_there_is_none(monkeypatch):
    monkeypatch.setattr(trial_cases, "varlen_attention", attend(lambda out, q, call: out))
    one = trial(CASES[1])
    one.check("triton")
    assert one.seconds("triton") > 0
    lengths = one.timed_lengths()
    assert sum(lengths) == 128 and set(lengths) == {64}


def share(rows):
    """Depends on a row of the segment that is changed."""
    return rows[150].norm() / rows[5].norm()


@pytest.mark.parametrize(
    ("case", "acts", "message"),
    [
        (ROTARY, lambda run: {**run, "k_out": run["k_out"] * (1 + 1e-4)}, "k_out: error"),
        (ROTARY, lambda run: {**run, "dq": -run["dq"]}, "dq: error"),
        (EMBEDDING, lambda run: {**run, "out": run["out"] + 1e-6}, "out: not copied bit by bit"),
        (EMBEDDING, lambda run: {**run, "dweight": run["dweight"].roll(1, 0)}, "dweight: error"),
        (
            EMBEDDING,
            lambda run: {**run, "dfeatures": run["dfeatures"].roll(1, 0)},
            "dfeatures: not copied bit by bit",
        ),
        (PATCHES, lambda run: {**run, "out": run["out"].roll(1, 0)}, "out: error"),
        (PATCHES, lambda run: {**run, "dweight": run["dweight"] * 1.001}, "dweight: error"),
        (LOSS, lambda run: {**run, "loss": run["loss"] * 1.001}, "loss: error"),
        (LOSS, lambda run: {**run, "dlogits": run["dlogits"] + 1e-4}, "dlogits: error"),
        (HEAD, lambda run: {**run, "dweight": run["dweight"] * 1.001}, "dweight: error"),
        (
            HEAD,
            lambda run: {**run, "dhidden": run["dhidden"] * (1 + 2e-6 * share(run["dhidden"]))},
            "dhidden: a change in one segment changed another",
        ),
    ],
)
def test_a_fault_of_the_other_ops_is_noticed(case, acts, message, monkeypatch):
    one = trial(case)
    real = one.run

    def run(name, given):
        return acts(real(one.plain, given)) if name == "triton" else real(name, given)

    monkeypatch.setattr(one, "run", run)
    one.check(one.plain)
    with pytest.raises(WrongResultError, match=message):
        one.check("triton")


def test_memory_is_nan_only_inside():
    with fresh_memory_is_nan():
        assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(2).isnan().all()
        assert torch.empty_like(torch.ones(2)).isnan().all()
        torch.empty(3, dtype=torch.int32)  # has none
    torch.empty(8).fill_(0)
    assert torch.empty.__module__ != op_trials.__name__


def test_one_bad_row_counts():
    exact = torch.ones(1000, 4, dtype=torch.float64)
    found = exact.clone()
    assert worst_row(found, exact) == 0
    found[7] *= 1.5
    assert worst_row(found, exact) == pytest.approx(0.5)
    found[7, 0] = float("nan")
    assert worst_row(found, exact) == float("inf")
