"""What should attention's kernels reach on an H200? A prediction from their machine code, without a GPU.

    python -m benchmarks.attention_model [--json] [--results FOLDER]

Compiles the kernels for sm_90a and counts the instructions of their loops. With the tiles of the cases of
`bench_varlen_attention`, this gives the cycles of every program. Beside it stand measured figures of FOLDER
(benchmarks/results), of our kernels on an H200, where there are any.

The model: a multiprocessor computes 4,096 FLOPs (bf16) in its tensor cores, issues 4 instructions of a warp and
evaluates 16 exponentials per cycle (NVIDIA H100 architecture whitepaper). One step of a program waits for its
products, then for what follows on them, and for its barriers. Several programs on a multiprocessor overlap, until
one of the three rates is used up. Latencies are estimates, so are all results: expect errors of 25 %.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmpack import reference

RESULTS = Path(__file__).parent / "results"
MULTIPROCESSORS, HERTZ = 132, 1.7e9  # an H200's; its clock under such a load, at most 1.98 GHz
FLOPS_PER_CYCLE, EXPONENTIALS_PER_CYCLE, ISSUES_PER_CYCLE = 4096, 16, 4  # of a multiprocessor
# Estimates, in cycles: all warps of a program meet; wgmma's result is there; a program begins, waits for its tile,
# its rows and its first keys in turn, and stores its result.
BARRIER, PRODUCTS, PROGRAM = 100, 300, 4500
# Products of a step, and how often it waits for one before it goes on.
STEPS = {"fwd": (2, 2), "bwd_dq": (3, 2), "bwd_dkv": (4, 2)}
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"(@\S+\s+)?BRA\b.*`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Loop:
    """Instructions of a kernel's loop, per warp and step. `masked` are more, in steps whose scores are masked."""

    instructions: int
    masked: int
    exponentials: int
    barriers: int


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: its loop, blocks and warps, and how many programs a multiprocessor holds at once."""

    name: str
    loop: Loop
    BM: int
    BN: int
    num_warps: int
    programs: int


def loop_of(sass: str) -> Loop:
    """The loop with products of matrices: what lies between the target of a conditional branch back and the
    branch. A part without products that a branch leaves out is for masked steps."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.match(line):
            code.append(instruction[1])
    branches = []
    for place, text in enumerate(code):
        if found := _BRANCH.match(text):
            branches.append((place, labels[found[2]], bool(found[1])))
    loops = [
        (target, place)
        for place, target, is_conditional in branches
        if is_conditional and target <= place and "HGMMA" in "".join(code[target:place])
    ]
    if len(loops) != 1:
        raise ValueError(f"{len(loops)} loops with products in a kernel that has one")
    begin, end = loops[0]
    masked = 0
    for place, target, _ in branches:
        skipped = code[place + 1 : target]
        if begin <= place < target <= end and "HGMMA" not in "".join(skipped):
            masked += len(skipped)
    body = code[begin : end + 1]

    def count(name: str) -> int:
        return sum(name in text for text in body)

    return Loop(len(body) - masked, masked, count("MUFU.EX2"), count("BAR.SYNC"))


def compiled(K: int, G: int, causal: bool) -> dict[str, Kernel]:
    """The three kernels for a head dim, by name."""
    from benchmarks import compile_report as report

    kernels = {}
    for case in report.CASES:
        name = case.name.split()[0].removeprefix("varlen_attention_")
        if case.name.split()[1:] == ["bf16", f"K={K}", "causal" if causal else "full", f"G={G}"]:
            result, usage, sass = report.compile_and_disassemble(case)
            registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
            num_warps = case.options["num_warps"]
            programs = report.programs_at_once(90, num_warps, registers, result.metadata.shared)
            blocks = case.constants["BM"], case.constants["BN"]
            kernels[name] = Kernel(name, loop_of(sass), *blocks, num_warps, programs)
    return kernels


def steps_of(kernel: Kernel, tiles: np.ndarray, G: int, causal: bool) -> np.ndarray:
    """(programs of a head, 2): steps of each program's loop, and how many of them are masked. A program of dk and
    dv serves the G query heads of a key head."""
    out = []
    for tile in tiles.tolist():
        begin, end, segment_begin, segment_end = tile
        is_shared = (begin, end) == (segment_begin, segment_end)
        rows, step = (kernel.BN, kernel.BM) if kernel.name == "bwd_dkv" else (kernel.BM, kernel.BN)
        for first in range(begin, end, rows):
            last = min(first + rows, end)
            if kernel.name == "bwd_dkv":
                places = np.arange(first if causal else segment_begin, segment_end, step)
                masked = places < first + rows - 1 if causal else np.zeros(len(places), bool)
                times = G
            else:
                places = np.arange(segment_begin, last if causal else segment_end, step)
                masked = places + step > (first + 1 if causal else segment_end)
                times = 1
            out.append((times * len(places), times * (len(places) if is_shared else masked.sum())))
    return np.array(out)


def cycles_of(kernel: Kernel, K: int, steps: np.ndarray) -> np.ndarray:
    """(alone, busy) of each program, (2, n): its cycles if it has a multiprocessor to itself, and those in which
    the most used of the three units is busy."""
    products, waits = STEPS[kernel.name]
    warps, (count, masked) = kernel.num_warps, steps.T
    tensor = 2 * products * kernel.BM * kernel.BN * K / FLOPS_PER_CYCLE
    exponentials = kernel.loop.exponentials * warps * 32 / EXPONENTIALS_PER_CYCLE
    issued = count * kernel.loop.instructions * warps / ISSUES_PER_CYCLE
    issued = issued + masked * kernel.loop.masked * warps / ISSUES_PER_CYCLE
    after = np.maximum(issued, count * exponentials)
    waiting = count * (kernel.loop.barriers * BARRIER + waits * PRODUCTS)
    alone = PROGRAM + count * tensor + after + waiting
    return np.stack([alone, np.maximum(after, count * tensor)])


def seconds(kernel: Kernel, K: int, heads: int, steps: np.ndarray) -> float:
    """Time of a launch: programs spread evenly, but none is faster than alone."""
    alone, busy = cycles_of(kernel, K, steps)
    at_once = max(alone.sum() / kernel.programs, busy.sum()) * heads / MULTIPROCESSORS
    return float(max(at_once, alone.max())) / HERTZ


def predict(case: Any, mode: str, kernels: dict[str, Kernel]) -> float:
    """TFLOP/s of a case of bench_varlen_attention, "forward" or "backward"."""
    H, Hk, K = case.heads
    tiles = reference.attention_tiles(np.cumsum([0, *case.lengths]), causal=case.causal)
    time = 0.0
    for name in ("fwd",) if mode == "forward" else ("bwd_dq", "bwd_dkv"):
        steps = steps_of(kernels[name], tiles, H // Hk, case.causal)
        time += seconds(kernels[name], K, Hk if name == "bwd_dkv" else H, steps)
    return case.flops(mode) / time / 1e12


def measured(folder: Path) -> dict[tuple[str, str], float]:
    """(case, mode) -> TFLOP/s of our kernels on an H200 in published results."""
    found = {}
    for path in sorted(folder.glob("*/published.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                ours = (row["bench"], row["impl"], row["metric"]) == (
                    "varlen_attention",
                    "triton",
                    "rate",
                )
                if ours and "H200" in row["machine"]:
                    found[row["config"], row["mode"]] = float(row["p50"])
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print predictions and measurements of all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--results", type=Path, default=RESULTS, help="published results")
    options = parser.parse_args(arguments)
    import benchmarks.compile_report  # noqa: F401  (first: it has Triton compile, not interpret)
    from benchmarks.bench_varlen_attention import CASES

    shapes: dict[tuple[int, int, bool], dict[str, Kernel]] = {}
    rows, found = [], measured(options.results)
    for case in CASES:
        H, Hk, K = case.heads
        shape = (K, H // Hk, case.causal)
        if shape not in shapes:
            shapes[shape] = compiled(*shape)
        for mode in ("forward", "backward"):
            rate = round(predict(case, mode, shapes[shape]))
            rows.append(
                {
                    "case": case.name,
                    "mode": mode,
                    "predicted": rate,
                    "measured": found.get((case.name, mode)),
                }
            )
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(
        "TFLOP/s on an H200, bf16. PREDICTED from machine code, +-25 %; measured: published results."
    )
    for row in rows:
        told = "not measured" if row["measured"] is None else f"{row['measured']:.0f} measured"
        print(f"{row['case']:40} {row['mode']:9} {row['predicted']:4} predicted  {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
