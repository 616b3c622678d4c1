"""Compile all kernels of mmpack for sm_90a (H100, H200), without a GPU, and check their resource limits.

    python -m benchmarks.compile_report [--json] [--only NAME]

Uses Triton's ptxas; nothing is loaded or run. Each kernel is compiled with the specialization of a GPU run:
pointers and strides divisible by 16, a model's sizes as constants, a pack's sizes as arbitrary numbers. Reports
registers, spills, shared memory and instructions, which show the width of loads. The exit code is 1 if a kernel
spills, exceeds its registers or lacks a required instruction.
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

ARCH = 90
MAX_SHARED = 227 * 1024
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
    "UTMALDG": r"\bUTMALDG\b",
    "ATOM": r"\b(?:ATOMG?|REDG?)\b",
}


@dataclass
class Result:
    """The compiler's result for a case."""

    name: str
    target: str
    triton: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int]
    problems: list[str] = field(default_factory=list)


def compile_case(case: Case) -> Result:
    """Compile and disassemble a case, and check its limits."""
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
    compiled = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=case.options)
    with tempfile.TemporaryDirectory() as scratch:
        cubin, ptx = Path(scratch, "kernel.cubin"), Path(scratch, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = _run("cuobjdump", "--dump-resource-usage", cubin)
        sass = _run("nvdisasm", "-c", cubin)
        target = re.search(r"\.target\s+([\w]+)", compiled.asm["ptx"])[1]
        spills = _spills(ptx, target)
    result = Result(
        case.name,
        target,
        triton.__version__,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spill_bytes=spills,
        shared_bytes=compiled.metadata.shared,
        instructions={
            name: len(re.findall(pattern, sass)) for name, pattern in _INSTRUCTIONS.items()
        },
    )
    if result.registers > case.max_registers:
        result.problems.append(f"{result.registers} registers, {case.max_registers} allowed")
    if result.spill_bytes > case.max_spill_bytes:
        result.problems.append(f"{result.spill_bytes} bytes spilled")
    if result.shared_bytes > MAX_SHARED:
        result.problems.append(f"{result.shared_bytes} bytes of shared memory")
    result.problems += [f"no {name}" for name in case.needs if not result.instructions[name]]
    result.problems += [f"{name} found" for name in case.lacks if result.instructions[name]]
    return result


def _compile_numbered(number: int) -> Result:
    return compile_case(CASES[number])


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
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", help="cases whose name holds this")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if options.only is None or options.only in case.name]
    with multiprocessing.get_context(
        "fork"
    ).Pool() as pool:  # kernels cannot be pickled, indices can
        results = pool.map(_compile_numbered, map(CASES.index, cases), chunksize=1)
    missing = kernels_of_the_package() - {case.kernel.__name__ for case in CASES}
    if options.json:
        report = {
            "kernels": [asdict(result) for result in results],
            "without_case": sorted(missing),
        }
        print(json.dumps(report, indent=1))
    else:
        for result in results:
            wide = {name: count for name, count in result.instructions.items() if count}
            print(
                f"{result.name:44} {result.target}  {result.registers:3} registers  "
                f"{result.spill_bytes} spilled  {result.shared_bytes:5} B shared  {wide}  "
                f"{'; '.join(result.problems) or 'ok'}"
            )
        for name in sorted(missing):
            print(f"{name} has no case in benchmarks/compile_report.py")
    return 1 if missing or any(result.problems for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
