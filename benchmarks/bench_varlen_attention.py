"""How fast is attention within segments, compared with all libraries that support it?

TFLOP/s are the FLOPs within segments divided by the time, so a candidate that computes more (a dense mask) shows
less: 4 K H per score forward, 2.5 times that backward, n (n + 1) / 2 scores for a causal segment of n rows, n^2
    for a full one.
The ceiling is a large product. Peers: flash-attn 2, 3 and 4, torch's varlen and flex attention, transformers'
dense mask and loop over images. Without a GPU, only implementations that run on a CPU are measured, on small
cases.
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
    int(n)
    for n in """
    36 40 44 46 49 52 55 59 64 70 76 82 89 96 103 110 118 126 136 148 162 181 208 245 268 298
    333 397 513 673 1418 1703
""".split()
]
IMAGES = [
    int(n)
    for n in """
    196 196 196 224 224 224 224 224 224 224 312 480 576 576 576 616 748 840 960 1064 1064 1296
    1296 2320 2520 3996 3996 3996 3996 3996 4675 5000
""".split()
]
TEXT_2B, TEXT_7B, VISION = (12, 2, 128), (28, 4, 128), (16, 16, 80)  # heads, key heads, head dim


def real_mix(quantiles: list[int], total: int) -> list[int]:
    """Lengths drawn from the quantiles until they fill `total`; the last one is cut."""
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
LENGTHS = (64, 256, 1024)  # segments on a CPU
CASES = [
    *[
        Case(f"{name}, {heads[0]}/{heads[1]} heads", tuple(lengths), heads, True)
        for heads in (TEXT_2B, TEXT_7B)
        for name, lengths in SEGMENTS.items()
        if heads == TEXT_2B or name in ("32 x 1k", "4 x 8k", "real rows, 32k")
    ],
    Case("40 images of 1,024 patches", (1024,) * 40, VISION, False),
    Case("real images, 40k patches", tuple(real_mix(IMAGES, 40960)), VISION, False),
]
CPU_CASES = [
    Case("real rows, 1k, 12/2 heads", tuple(real_mix(ROWS, 1024)), TEXT_2B, True),
    *[Case(f"{1024 // n} x {n}, 12/2 heads", (n,) * (1024 // n), TEXT_2B, True) for n in LENGTHS],
    Case("4 images of 256 patches", (256,) * 4, VISION, False),
]
QUICK = {"16 x 2k, 12/2 heads", "40 images of 1,024 patches"}
QUICK |= {case.name for case in CPU_CASES if case.lengths[0] != 256 or not case.causal}
FLASH = {
    "flash2": ("flash-attn", "flash_attn"),
    "flash3": ("flash-attn-3", "flash_attn_interface"),
    "flash4": ("flash-attn-4 --pre", "flash_attn.cute"),
}


def candidates_of(case: Case, mode: str, impls: tuple[str, ...]) -> dict:
    """name -> a function that runs one forward, or one backward after its forward, if it can run here."""
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
        if impl in impls and why_not(impl, inputs[0]) is None:
            forwards[impl] = functools.partial(
                varlen_attention, *inputs, cu_seqlens, max(case.lengths), **options,
                tiles=tiles, offsets=offsets, impl=impl,
            )  # fmt: skip
    if "dense mask" in impls:
        segment = tiles[1]
        mask = segment[:, None] == segment[None, :]
        mask &= torch.ones(T, T, dtype=torch.bool, device=place).tril()
        forwards["dense mask"] = functools.partial(
            dense_mask_attention, *inputs, mask, scale=K**-0.5
        )
    if "transformers, per image" in impls:
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


def impls_of(case: Case) -> tuple[str, ...]:
    """The candidates besides flash-attn."""
    impls = ["triton", "torch_varlen", "flex"]
    if not (ON_GPU and case.causal):  # on a GPU, nobody would loop over a thousand rows
        impls.append("sdpa")
    if case.causal and case.heads == TEXT_2B:  # takes 50 ms on an H200, whatever the segments
        impls.append("dense mask")
    if not case.causal:
        impls.append("transformers, per image")
    return tuple(impls)


@pytest.mark.cpu
@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES if ON_GPU else CPU_CASES, ids=lambda case: case.name)
def test_attention(case, mode, benchmark, recorder, gemm_ceiling, quick):
    run(case, mode, impls_of(case), benchmark, recorder, gemm_ceiling, quick)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "impl", [pytest.param(impl, marks=pytest.mark.peer(*peer)) for impl, peer in FLASH.items()]
)
def test_flash(impl, case, mode, benchmark, recorder, gemm_ceiling, quick):
    run(case, mode, ("triton", impl), benchmark, recorder, gemm_ceiling, quick)


def run(case, mode, impls, benchmark, recorder, gemm_ceiling, quick):
    """Time the candidates of a case."""
    if quick and case.name not in QUICK:
        pytest.skip("not among the quick cases")
    candidates = candidates_of(case, mode, impls)
    medians = measure(
        recorder,
        "varlen_attention",
        mode,
        candidates,
        x=("rows per segment", sum(case.lengths) / len(case.lengths)),
        config=case.name,
        rate=("rate", "TFLOP/s", case.flops(mode)),
        rounds=2 if quick else 10 if ON_GPU else 3,
        ceiling=gemm_ceiling,
    )
    ours = "triton" if "triton" in medians else "sdpa"
    compare(benchmark, medians, ours, case=case.name)
    benchmark.pedantic(candidates[ours], rounds=1)
