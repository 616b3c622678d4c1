"""What do logits and loss cost, by the share of supervised tokens?

From a pack's last hidden states to the loss, and back to their gradient and the head's. Ours, as the patched model
does it: supervised rows only, their logits in chunks of the vocabulary, or kept where they take less than the
head's gradient. Beside it, the same rows' logits kept, with the gradient written over them. Peers: transformers,
with logits of all tokens in float32 and its `ForCausalLMLoss`; and, on the same rows as ours, torch's chunked
`linear_cross_entropy` and TRL's chunked loss; on a GPU also Liger and cut-cross-entropy, which do not run on a
CPU. Memory is the peak allocation of a call, with its two gradients; on a CPU, torch's allocations are summed. The
memory's ceiling is the gradients alone.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import CEILING, compare, device, measure, peak_tensor_mib
from mmpack.hf.head import pays
from mmpack.ops import supervised_cross_entropy, supervised_linear_cross_entropy

ON_GPU = torch.cuda.is_available()
SIZES = {"gpu": (8192, 3584, 151_936), "cpu": (2048, 256, 32_768), "quick": (512, 64, 32_768)}
SHARES = (0.05, 0.15, 0.3, 0.6, 1.0)


class Case:
    """Inputs of one share, made before timing."""

    def __init__(self, share: float, sizes: tuple[int, int, int]) -> None:
        torch.manual_seed(0)
        T, D, self.V = sizes
        self.hidden = torch.randn(T, D, device=device(), dtype=torch.bfloat16).requires_grad_()
        self.weight = (
            torch.randn(self.V, D, device=device(), dtype=torch.bfloat16) / D**0.5
        ).requires_grad_()
        self.index = torch.randperm(T)[: round(T * share)].sort().values.to(device())
        labels = torch.full((T,), -100, device=device())
        ids = torch.randint(self.V, self.index.shape, device=device())
        self.labels = labels.index_copy(0, self.index, ids)
        self.row_labels = self.labels[self.index]

    def rows(self) -> torch.Tensor:
        return self.hidden.index_select(0, self.index)

    def transformers(self) -> torch.Tensor:
        from transformers.loss.loss_utils import ForCausalLMLoss

        logits = F.linear(self.hidden, self.weight)[None]
        return ForCausalLMLoss(logits, None, self.V, shift_labels=self.labels[None])

    def kept(self, impl: str = "auto") -> torch.Tensor:
        logits = F.linear(self.rows(), self.weight)
        return supervised_cross_entropy(logits, self.row_labels, len(self.index), impl=impl)

    def chunked(self, impl: str = "auto") -> torch.Tensor:
        arguments = (self.rows(), self.weight, self.row_labels, len(self.index))
        return supervised_linear_cross_entropy(*arguments, impl=impl)

    def mmpack(self, impl: str = "auto") -> torch.Tensor:
        is_chunked = pays(len(self.index), *self.weight.shape, is_trained=True)
        return (self.chunked if is_chunked else self.kept)(impl)

    def triton(self) -> torch.Tensor:
        return self.mmpack("triton")

    def torch(self) -> torch.Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(
            self.rows(), self.weight, self.row_labels, options=options, reduction="mean"
        )

    def trl(self) -> torch.Tensor:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        # as `SFTTrainer` calls it: 32,768 columns at once, temperature 1, no cap, no scale
        arguments = (self.rows(), self.weight, None, self.row_labels, 1.0, 32_768, None, 1.0)
        return -ChunkedLogProbFunction.apply(*arguments, ("log_probs",))[0].mean()

    def liger(self) -> torch.Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(self.weight, self.hidden, self.labels)

    def cce(self) -> torch.Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(self.hidden, self.weight, self.labels)

    def step(self, name: str) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(getattr(self, name)(), (self.hidden, self.weight))


NAMES = {"mmpack": "mmpack", "kept": "mmpack, logits kept", "triton": "mmpack, triton"}


@pytest.mark.cpu
@pytest.mark.gpu
@pytest.mark.parametrize("share", SHARES)
def test_head(share, benchmark, recorder, quick):
    names = ("transformers", "kept", "mmpack") + (("triton",) if ON_GPU else ())
    run(share, names, benchmark, recorder, quick)


@pytest.mark.cpu
@pytest.mark.gpu
@pytest.mark.parametrize("share", (0.15, 1.0))
def test_torch(share, benchmark, recorder, quick):
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("torch.nn.functional.linear_cross_entropy needs torch 2.13")
    run(share, ("torch", "mmpack"), benchmark, recorder, quick)


@pytest.mark.cpu
@pytest.mark.gpu
@pytest.mark.peer("trl", "trl")
@pytest.mark.parametrize("share", (0.15, 1.0))
def test_trl(share, benchmark, recorder, quick):
    run(share, ("trl", "mmpack"), benchmark, recorder, quick)


@pytest.mark.gpu
@pytest.mark.peer("liger-kernel", "liger_kernel")
@pytest.mark.parametrize("share", SHARES)
def test_liger(share, benchmark, recorder, quick):
    run(share, ("liger", "mmpack"), benchmark, recorder, quick)


@pytest.mark.gpu
@pytest.mark.peer("cut-cross-entropy", "cut_cross_entropy")
@pytest.mark.parametrize("share", (0.15, 1.0))
def test_cut_cross_entropy(share, benchmark, recorder, quick):
    run(share, ("cce", "mmpack"), benchmark, recorder, quick)


def run(share, names, benchmark, recorder, quick):
    """Time the candidates of a share and measure their allocations; checks that gradients agree."""
    rounds = 10 if "kept" in names else 3
    if quick and share != 0.15 and ("kept" not in names or share != 1.0):
        pytest.skip("not among the quick cases")
    sizes = SIZES["quick" if quick else "gpu" if ON_GPU else "cpu"]
    case, config = Case(share, sizes), "T={} D={} V={} bf16".format(*sizes)
    ours = case.step("mmpack")
    for name in names:
        for a, b in zip(case.step(name), ours):
            assert (a - b).norm() <= 0.02 * b.norm(), name
    del ours, a, b
    x = ("share", share)
    steps = {NAMES.get(name, name): lambda name=name: case.step(name) for name in names}
    medians = measure(
        recorder, "head", "forward and backward", steps, x=x, config=config,
        rounds=2 if quick else rounds, warmup=1,
    )  # fmt: skip
    least = (case.hidden.nbytes + case.weight.nbytes) / 2**20
    peaks = {name: peak_tensor_mib(step) for name, step in steps.items()} | {CEILING: least}
    for name, peak in peaks.items():
        recorder.add(
            "head", name, "forward and backward", metric="peak", unit="MiB", values=[peak],
            x=x, config=config,
        )  # fmt: skip
    print("peak, MiB: " + ", ".join(f"{name} {peak:.0f}" for name, peak in peaks.items()))
    compare(benchmark, medians, "mmpack", case=f"{config} share={share}")
    benchmark.pedantic(steps["mmpack"], rounds=1)
