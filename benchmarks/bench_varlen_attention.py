"""How fast is attention within segments, against every library that can do it?

TFLOP/s are the FLOPs of the segments alone over the time taken, so what computes more (a dense mask)
shows less: 4 K H a score forward, 2.5 times that backward, n (n + 1) / 2 scores of a causal segment
of n rows, n^2 of a full one. On a machine without a GPU only what runs there is measured, on
small cases.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from benchmarks.harness import compare, device, measure
from benchmarks.peers import dense_mask_attention, per_image_attention
from mmpack import reference
from mmpack.ops import varlen_attention
from mmpack.ops.varlen_attention import IMPLEMENTATIONS, why_not

ON_GPU = torch.cuda.is_available()
# 32 quantiles of 155,556 real supervised rows in tokens, and of their 57,031 images in patches.
ROWS = [
    36,
    40,
    44,
    46,
    49,
    52,
    55,
    59,
    64,
    70,
    76,
    82,
    89,
    96,
    103,
    110,
    118,
    126,
    136,
    148,
    162,
    181,
]
ROWS += [208, 245, 268, 298, 333, 397, 513, 673, 1418, 1703]
IMAGES = [
    196,
    196,
    196,
    224,
    224,
    224,
    224,
    224,
    224,
    224,
    312,
    480,
    576,
    576,
    576,
    616,
    748,
    840,
    960,
]
IMAGES += [1064, 1064, 1296, 1296, 2320, 2520, 3996, 3996, 3996, 3996, 3996, 4675, 5000]
TEXT_2B, TEXT_7B, VISION = (12, 2, 128), (28, 4, 128), (16, 16, 80)  # heads, key heads, head dim


def real_mix(quantiles: list[int], total: int) -> list[int]:
    """Lengths drawn from the quantiles until they fill `total`; the last is cut."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(min(int(rng.choice(quantiles)), total - sum(lengths)))
    return lengths


@dataclass(frozen=True)
class Case:
    """Segments and heads of one case."""

    name: str
    lengths: tuple[int, ...]
    heads: tuple[int, int, int]
    causal: bool

    def flops(self, mode: str) -> float:
        H, _, K = self.heads
        n = np.array(self.lengths, dtype=float)
        scores = (n * (n + 1) / 2 if self.causal else n * n).sum()
        return 4 * K * H * scores * {"forward": 1.0, "backward": 2.5}[mode]


SEGMENTS = {
    "32 x 1k": [1024] * 32,
    "16 x 2k": [2048] * 16,
    "4 x 8k": [8192] * 4,
    "1 x 32k": [32768],
    "128 x 256": [256] * 128,
    "real rows, 32k": real_mix(ROWS, 32768),
    "real rows under 1k, 32k": real_mix([n for n in ROWS if n < 1024], 32768),
}
CASES = [
    *[
        Case(f"{name}, {heads[0]}/{heads[1]} heads", tuple(lengths), heads, True)
        for heads in (TEXT_2B, TEXT_7B)
        for name, lengths in SEGMENTS.items()
    ],
    Case("40 images of 1,024 patches", (1024,) * 40, VISION, False),
    Case("real images, 40k patches", tuple(real_mix(IMAGES, 40960)), VISION, False),
]
CPU_CASES = [
    Case("real rows, 2k, 12/2 heads", tuple(real_mix(ROWS, 2048)), TEXT_2B, True),
    Case("4 x 512, 12/2 heads", (512,) * 4, TEXT_2B, True),
    Case("8 images of 256 patches", (256,) * 8, VISION, False),
]
QUICK = ("16 x 2k, 12/2 heads", "40 images of 1,024 patches", CPU_CASES[0].name, CPU_CASES[2].name)


def candidates_of(case: Case, mode: str) -> dict:
    """name -> a call of one forward, or of one backward whose forward is done."""
    place, dtype = device(), torch.bfloat16 if ON_GPU else torch.float32
    H, Hk, K = case.heads
    offsets = np.cumsum([0, *case.lengths])
    T = int(offsets[-1])
    inputs = [
        torch.randn(T, heads, K, device=place, dtype=dtype, requires_grad=True)
        for heads in (H, Hk, Hk)
    ]
    dout = torch.randn(T, H, K, device=place, dtype=dtype)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=place)
    tiles = tuple(
        torch.from_numpy(array).to(place)
        for array in (
            reference.attention_tiles(offsets, causal=case.causal),
            reference.segment_ids(offsets),
        )
    )
    options = {"causal": case.causal, "scale": K**-0.5}
    forwards = {}
    for impl in IMPLEMENTATIONS:
        if impl == "reference" or (ON_GPU and impl == "sdpa" and case.causal):
            continue  # a loop over a thousand rows is nobody's choice on a GPU
        if why_not(impl, inputs[0]) is None:
            forwards[impl] = functools.partial(
                varlen_attention, *inputs, cu_seqlens, max(case.lengths), **options,
                tiles=tiles, offsets=offsets, impl=impl,
            )  # fmt: skip
    if case.causal and T <= 32768:
        segment = tiles[1]
        mask = segment[:, None] == segment[None, :]
        mask &= torch.ones(T, T, dtype=torch.bool, device=place).tril()
        forwards["dense mask"] = functools.partial(
            dense_mask_attention, *inputs, mask, scale=K**-0.5
        )
    if not case.causal:
        forwards["transformers, per image"] = functools.partial(
            per_image_attention, *inputs, cu_seqlens, scale=K**-0.5
        )
    if mode == "forward":
        return {name: _without_grad(run) for name, run in forwards.items()}
    backwards = {}
    for name, run in forwards.items():
        out = run()
        backwards[name] = functools.partial(
            torch.autograd.grad, out, inputs, dout, retain_graph=True
        )
    return backwards


def _without_grad(run):
    def call():
        with torch.no_grad():
            return run()

    return call


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES if ON_GPU else CPU_CASES, ids=lambda case: case.name)
def test_attention(case, mode, benchmark, recorder, quick):
    if quick and case.name not in QUICK:
        pytest.skip("not among the quick cases")
    candidates = candidates_of(case, mode)
    medians = measure(
        recorder,
        "varlen_attention",
        mode,
        candidates,
        x=("T", sum(case.lengths)),
        config=case.name,
        rate=("rate", "TFLOP/s", case.flops(mode)),
        rounds=5 if quick or not ON_GPU else 20,
    )
    ours = "triton" if "triton" in medians else "sdpa"
    compare(benchmark, medians, ours, case=case.name)
    benchmark.pedantic(candidates[ours], rounds=3, warmup_rounds=1)
