"""Compile all kernels of mmpack without a GPU, and check that they fit: sm_90a (H100, H200) unless others are
named.

    python -m benchmarks.compile_report [--arch 80 89 90 100] [--only NAME] [--json | --table]

Uses Triton's ptxas; nothing is loaded or run. Each kernel is compiled with the specialization of a GPU run:
pointers and strides divisible by 16, a model's sizes as constants, a pack's sizes as arbitrary numbers. Reports
registers, spills, shared memory, how many programs of a kernel a multiprocessor holds at once (from registers,
shared memory, threads and, on sm_100, tensor memory), and instructions, which show the width of loads. The exit
code is 1 if a multiprocessor holds fewer than a kernel's budget, spills exceed it, or an instruction is missing.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop(
    "TRITON_INTERPRET", None
)  # before triton is imported, because it replaces the compiler

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.compile_cases import CASES, Case

REGISTERS, TENSOR_COLUMNS, KB = 65536, 512, 1024  # per multiprocessor


@dataclass(frozen=True)
class Arch:
    """A multiprocessor, from the CUDA programming guide's table of compute capabilities."""

    target: str
    shared: int  # bytes; a program can have 1 KB less, and each takes 1 KB more than it asks for
    threads: int
    programs: int


ARCHS = {
    80: Arch("sm_80", 164 * KB, 2048, 32),  # A100
    89: Arch("sm_89", 100 * KB, 1536, 24),  # L4, L40S, RTX 4090
    90: Arch("sm_90a", 228 * KB, 2048, 32),  # H100, H200
    100: Arch("sm_100a", 228 * KB, 2048, 32),  # B200
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTIONS = {
    "LDG": r"\bLDG\b",
    "LDG.128": r"\bLDG\.E(?:\.\w+)*\.128",
    "STG": r"\bSTG\b",
    "STG.128": r"\bSTG\.E(?:\.\w+)*\.128",
    "LDL": r"\bLDL\b",
    "STL": r"\bSTL\b",
    "FFMA": r"\bFFMA2?\b",
    "HGMMA": r"\bHGMMA\b",
    "UTCHMMA": r"\bUTCHMMA\b",
    "UTMALDG": r"\bUTMALDG\b",
    "ATOM": r"\b(?:ATOMG?|REDG?)\b",
}


@dataclass
class Result:
    """The compiler's result for a case."""

    name: str
    arch: int
    target: str
    triton: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    programs: int  # that a multiprocessor holds at once
    instructions: dict[str, int]
    problems: list[str] = field(default_factory=list)


def programs_at_once(
    arch: int, num_warps: int, registers: int, shared: int, tensor_columns: int = 0
) -> int:
    """How many programs of a kernel one multiprocessor holds. Its four quarters give registers to whole warps, 256
    at a time."""
    of, per_warp = ARCHS[arch], -(-registers * 32 // 256) * 256
    limits = [
        REGISTERS // 4 // per_warp * 4 // num_warps,
        of.shared // (shared + KB),
        of.threads // (32 * num_warps),
        of.programs,
    ]
    return min([*limits, TENSOR_COLUMNS // tensor_columns] if tensor_columns else limits)


def compile_and_disassemble(case: Case, arch: int = 90) -> tuple[Any, str, str]:
    """Triton's compiled kernel, its resource usage and its machine code, as NVIDIA's tools print them."""
    signature, attributes, constants = {}, {}, {}
    for place, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            constants[(place,)] = case.constants[name]
        else:
            kind, _, divisible = case.arguments[name].partition(":")
            signature[name] = kind
            if divisible:
                parameter = case.kernel.params[place]
                fixed = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
                assert not fixed, f"{case.name}: a launch does not know what divides {name}"
                attributes[(place,)] = [["tt.divisibility", int(divisible)]]
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.options)
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", cubin)
        # Without an analysis of jumps, which changes no instruction and takes a quarter of the time.
        return compiled, usage, _run("nvdisasm", "-c", "-ndf", cubin)


def compile_case(case: Case, arch: int = 90) -> Result:
    """Compile and disassemble a case, and check its limits."""
    compiled, usage, sass = compile_and_disassemble(case, arch)
    target = re.search(r"\.target\s+([\w]+)", compiled.asm["ptx"])[1]
    instructions = {name: len(re.findall(pattern, sass)) for name, pattern in _INSTRUCTIONS.items()}
    spills = 0
    if instructions["LDL"] or instructions["STL"]:  # otherwise nothing is spilled
        with tempfile.TemporaryDirectory() as scratch:
            ptx = Path(scratch, "kernel.ptx")
            ptx.write_text(compiled.asm["ptx"])
            spills = _spills(ptx, target)
    registers, shared = int(re.search(r"REG:(\d+)", usage)[1]), compiled.metadata.shared
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    result = Result(
        case.name,
        arch,
        target,
        triton.__version__,
        registers,
        spills,
        shared,
        programs_at_once(arch, case.options["num_warps"], registers, shared, columns),
        instructions=instructions,
    )
    if result.programs < case.programs[arch]:
        result.problems.append(
            f"{result.programs} programs per multiprocessor, {case.programs[arch]} needed: "
            f"{registers} registers, {shared} bytes of shared memory, {columns} tensor columns"
        )
    if spills > case.max_spill_bytes:
        result.problems.append(f"{spills} bytes spilled, {case.max_spill_bytes} allowed")
    needs = [("UTCHMMA" if name == "HGMMA" and arch == 100 else name) for name in case.needs]
    result.problems += [f"no {name}" for name in needs if not result.instructions[name]]
    result.problems += [f"{name} found" for name in case.lacks if result.instructions[name]]
    return result


def _compile_numbered(number: int, arch: int) -> Result:
    return compile_case(CASES[number], arch)


def _run(tool: str, *arguments: Any) -> str:
    command = [str(_TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _spills(ptx: Path, target: str) -> int:
    """Bytes that ptxas stores to and loads from spills. Newer versions of Triton have a second ptxas."""
    for tool in ("ptxas", "ptxas-blackwell"):
        command = [str(_TOOLS / tool), "-v", f"--gpu-name={target}", str(ptx), "-o", "/dev/null"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            continue
        found = re.search(
            r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr + done.stdout
        )
        if done.returncode == 0 and found:
            return int(found[1]) + int(found[2])
    raise RuntimeError("no ptxas of this Triton reports spills")


def kernels_of_the_package() -> set[str]:
    """Names of all `_*_kernel` functions in mmpack.ops."""
    modules = [module for name, module in sys.modules.items() if name.startswith("mmpack.ops.")]
    return {
        name
        for module in modules
        for name, value in inspect.getmembers(module)
        if name.startswith("_") and name.endswith("_kernel") and hasattr(value, "arg_names")
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the report; returns 1 if a kernel exceeds a limit or has no case."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=[90])
    parser.add_argument("--only", help="cases whose name holds this")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument(
        "--table", action="store_true", help="print docs/internals/kernels.md's table"
    )
    options = parser.parse_args(arguments)
    numbered = [
        (number, arch)
        for number, case in enumerate(CASES)
        for arch in options.arch
        if arch in case.programs and (options.only is None or options.only in case.name)
    ]
    # Kernels cannot be pickled, indices can.
    with multiprocessing.get_context("fork").Pool() as pool:
        results = pool.starmap(_compile_numbered, numbered, chunksize=1)
    missing = kernels_of_the_package() - {case.kernel.__name__ for case in CASES}
    if options.json:
        report = {
            "kernels": [asdict(result) for result in results],
            "without_case": sorted(missing),
        }
        print(json.dumps(report, indent=1))
    elif options.table:
        _print_table(results, options.arch)
    else:
        for result in results:
            wide = {name: count for name, count in result.instructions.items() if count}
            print(
                f"{result.name:44} {result.target:7}  {result.registers:3} registers  "
                f"{result.spill_bytes} spilled  {result.shared_bytes:5} B shared  {result.programs:2} at once  "
                f"{wide}  {'; '.join(result.problems) or 'ok'}"
            )
    for name in sorted(missing) if not options.json else ():
        print(f"{name} has no case in benchmarks/compile_cases.py")
    return 1 if missing or any(result.problems for result in results) else 0


def _print_table(results: list[Result], archs: list[int]) -> None:
    """A row per case: per architecture, registers / KB of shared memory / programs at once, and bytes spilled."""
    cells: dict[str, dict[int, str]] = {}
    for result in results:
        spilled = f", {result.spill_bytes} B" if result.spill_bytes else ""
        shared = -(-result.shared_bytes // KB)
        cell = f"{result.registers} / {shared} / {result.programs}{spilled}"
        cells.setdefault(result.name, {})[result.arch] = cell
    print("| kernel |", " | ".join(ARCHS[arch].target for arch in archs), "|")
    print("| --- |" + " --- |" * len(archs))
    for name, by_arch in cells.items():
        print(f"| `{name}` |", " | ".join(by_arch.get(arch, "") for arch in archs), "|")


if __name__ == "__main__":
    sys.exit(main())
