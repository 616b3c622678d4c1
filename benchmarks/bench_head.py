"""What do logits and loss cost, by the share of supervised tokens?

From a pack's last hidden states to the loss, and back to their gradient and the head's. Peers: transformers, with
logits of all tokens in float32 and its `ForCausalLMLoss`; Liger's fused linear cross entropy on a GPU. Ours:
supervised rows
only, with the gradient written over their logits. Memory is the peak allocation of a call; on a CPU, torch's
allocations are summed. The memory's ceiling is one copy of the supervised rows' logits plus the head's gradient.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import CEILING, compare, device, measure, peak_tensor_mib
from mmpack.ops import supervised_cross_entropy

ON_GPU = torch.cuda.is_available()
T, D, V = (8192, 1536, 151_936) if ON_GPU else (512, 64, 32_768)
SHARES = (0.05, 0.15, 0.3, 0.6, 1.0)


class Case:
    """Inputs of one share, made before timing."""

    def __init__(self, share: float) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(T, D, device=device(), dtype=torch.bfloat16).requires_grad_()
        self.weight = (
            torch.randn(V, D, device=device(), dtype=torch.bfloat16) / D**0.5
        ).requires_grad_()
        self.rows = torch.randperm(T)[: round(T * share)].sort().values.to(device())
        labels = torch.full((T,), -100, device=device())
        self.labels = labels.index_fill(0, self.rows, V - 1)
        self.row_labels = self.labels[self.rows]

    def transformers(self) -> torch.Tensor:
        from transformers.loss.loss_utils import ForCausalLMLoss

        logits = F.linear(self.hidden, self.weight)[None]
        return ForCausalLMLoss(logits, None, V, shift_labels=self.labels[None])

    def mmpack(self) -> torch.Tensor:
        logits = F.linear(self.hidden.index_select(0, self.rows), self.weight)
        return supervised_cross_entropy(logits, self.row_labels, len(self.rows))

    def liger(self) -> torch.Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(self.weight, self.hidden, self.labels)

    def step(self, name: str) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(getattr(self, name)(), (self.hidden, self.weight))


@pytest.mark.cpu
@pytest.mark.gpu
@pytest.mark.parametrize("share", SHARES)
def test_head(share, benchmark, recorder, quick):
    run(share, ("transformers", "mmpack"), benchmark, recorder, quick)


@pytest.mark.gpu
@pytest.mark.peer("liger-kernel", "liger_kernel")
@pytest.mark.parametrize("share", SHARES)
def test_liger(share, benchmark, recorder, quick):
    run(share, ("liger", "mmpack"), benchmark, recorder, quick)


def run(share, names, benchmark, recorder, quick):
    """Time the candidates of a share and measure their allocations; checks that gradients agree."""
    if quick and share not in (0.15, 0.6):
        pytest.skip("not among the quick cases")
    case, config = Case(share), f"T={T} D={D} V={V} bf16"
    theirs, ours = (case.step(name) for name in names)
    for a, b in zip(theirs, ours):
        assert (a - b).norm() <= 0.02 * a.norm()
    del theirs, ours, a, b
    x = ("share", share)
    steps = {name: lambda name=name: case.step(name) for name in names}
    medians = measure(
        recorder, "head", "forward and backward", steps, x=x, config=config,
        rounds=2 if quick else 10, warmup=1,
    )  # fmt: skip
    size = case.weight.element_size()
    least = size * V * (len(case.rows) + D) / 2**20
    peaks = {name: peak_tensor_mib(step) for name, step in steps.items()} | {CEILING: least}
    for name, peak in peaks.items():
        recorder.add(
            "head", name, "forward and backward", metric="peak", unit="MiB", values=[peak],
            x=x, config=config,
        )  # fmt: skip
    print("peak, MiB: " + ", ".join(f"{name} {peak:.0f}" for name, peak in peaks.items()))
    compare(benchmark, medians, "mmpack", case=f"{config} share={share}")
    benchmark.pedantic(steps["mmpack"], rounds=1)
