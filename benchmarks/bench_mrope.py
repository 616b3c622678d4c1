"""How fast are q and k rotated, compared with transformers, Liger and a copy?

The cost of one layer: peers compute cos and sin before (once per step for all layers), mmpack's kernel computes
its angles every time. GB/s count the minimum bytes of the task, q and k read and written once; the ceiling is a
large copy. Without a GPU, the kernel is not measured.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import compare, device, measure
from benchmarks.peers import liger_mrope, transformers_rope, transformers_vision_rope
from mmpack import reference
from mmpack.ops import apply_mrope

ON_GPU = torch.cuda.is_available()
COMPILED = torch.compile(transformers_rope, dynamic=True)  # compiled on first call
TEXT, VISION = (16, 24, 24), (20, 20)
CASES = [  # tokens, heads, key-value heads, head dim, sections
    *[(T, H, HK, 128, TEXT) for H, HK in ((12, 2), (28, 4)) for T in (8192, 32768)],
    *[(P, 16, 16, 80, VISION) for P in (8192, 32768)],
]
CPU_CASES = [(2048, 12, 2, 128, TEXT), (2048, 16, 16, 80, VISION)]


class Case:
    """Inputs of one size, made before timing."""

    def __init__(self, T: int, H: int, HK: int, K: int, sections: tuple[int, ...]) -> None:
        place, dtype = device(), torch.bfloat16
        self.T, self.H, self.HK, self.K, self.sections = T, H, HK, K, sections
        num_freqs = 64 if sections == TEXT else 20
        self.position_ids = torch.randint(0, 4096, (len(sections), T), device=place)
        self.inv_freq = 1 / 10_000 ** (torch.arange(num_freqs, device=place) / num_freqs)
        self.q = torch.randn(T, H, K, device=place, dtype=dtype).requires_grad_()
        self.k = torch.randn(T, HK, K, device=place, dtype=dtype).requires_grad_()
        self.dq, self.dk = torch.randn_like(self.q), torch.randn_like(self.k)
        angles = self.position_ids[:, :, None].float() * self.inv_freq
        self.all_axes = [x.repeat(1, 1, 2)[:, None] for x in (angles.cos(), angles.sin())]
        rows = torch.tensor(reference.rotary_axes(sections, False), device=place)
        half = angles[rows, :, torch.arange(len(rows), device=place) % num_freqs].T.repeat(1, 2)
        self.cos, self.sin = half.cos(), half.sin()
        if sections == TEXT:  # text tables are cast, the tower's stay float32
            self.cos, self.sin = self.cos.to(dtype), self.sin.to(dtype)

    def forwards(self) -> dict:
        """The forward of each candidate."""
        stock = transformers_rope if self.sections == TEXT else transformers_vision_rope
        made = {"transformers": lambda: stock(self.q, self.k, self.cos, self.sin)}
        if ON_GPU:
            if self.sections == TEXT:
                made["compiled"] = lambda: COMPILED(self.q, self.k, self.cos, self.sin)
            made["mmpack"] = lambda: apply_mrope(
                self.q, self.k, self.position_ids, self.inv_freq, self.sections
            )
        return made

    def with_liger(self) -> dict:
        """The forward of Liger and of mmpack."""
        cos, sin = (x.to(self.q.dtype) for x in self.all_axes)
        made = {"liger": lambda: liger_mrope(self.q, self.k, cos, sin, list(TEXT))}
        return made | {"mmpack": self.forwards()["mmpack"]}

    def backwards(self, forwards: dict) -> dict:
        """The backward of each candidate, after its forward."""
        made = {}
        for name, forward in forwards.items():
            out = forward()

            def backward(out=out):
                gradients = (self.dq.view_as(out[0]), self.dk.view_as(out[1]))
                return torch.autograd.grad(out, (self.q, self.k), gradients, retain_graph=True)

            made[name] = backward
        return made

    def bytes(self) -> int:
        """The minimum bytes of the task, for two-byte elements; without positions, a thousandth of it."""
        return 2 * 2 * self.T * (self.H + self.HK) * self.K + self.position_ids.nbytes


@pytest.mark.cpu
@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize(("T", "H", "HK", "K", "sections"), CASES if ON_GPU else CPU_CASES)
def test_rope(mode, T, H, HK, K, sections, benchmark, recorder, copy_ceiling, quick):
    if quick and (T == 8192 or H == 28):
        pytest.skip("not among the quick cases")
    case = Case(T, H, HK, K, sections)
    run(case, case.forwards(), mode, benchmark, recorder, copy_ceiling, quick)


@pytest.mark.gpu
@pytest.mark.peer("liger-kernel", "liger_kernel")
@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize(("T", "H", "HK", "K", "sections"), [c for c in CASES if c[4] == TEXT])
def test_liger(mode, T, H, HK, K, sections, benchmark, recorder, copy_ceiling, quick):
    if quick and (T == 8192 or H == 28):
        pytest.skip("not among the quick cases")
    case = Case(T, H, HK, K, sections)
    run(case, case.with_liger(), mode, benchmark, recorder, copy_ceiling, quick)


def run(case, forwards, mode, benchmark, recorder, copy_ceiling, quick):
    """Time the candidates of a case."""
    candidates = forwards if mode == "forward" else case.backwards(forwards)
    config = f"T={case.T} H={case.H}+{case.HK} K={case.K} bf16"
    medians = measure(
        recorder,
        "mrope",
        mode,
        candidates,
        x=("T", case.T),
        config=config,
        rate=("bandwidth", "GB/s", case.bytes()),
        rounds=20 if ON_GPU and not quick else 5,
        ceiling=copy_ceiling,
    )
    ours = "mmpack" if "mmpack" in medians else "transformers"
    compare(benchmark, medians, ours, case=config)
    benchmark.pedantic(candidates[ours], rounds=3, warmup_rounds=1)
