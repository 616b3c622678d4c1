"""Compile every kernel of mmpack for sm_90a (H100, H200), without a GPU, and hold it to a budget.

    python -m benchmarks.compile_report [--json] [--only NAME]

Triton's own ptxas does the work; nothing is loaded or run. Each kernel is compiled as a GPU run would
specialise it: pointers and strides divisible by 16, sizes as constants. Reported are registers,
spills, shared memory and the instructions that tell whether the loads are as wide as meant. The exit
code is 1 if a kernel spills, exceeds its registers or lacks an instruction it needs.
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

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: it replaces the compiler

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmpack.ops import embed_features as _  # noqa: F401  (the name is the op's, not the file's)
from mmpack.ops import mrope, varlen_triton  # noqa: F401

embed = sys.modules["mmpack.ops.embed_features"]
varlen = sys.modules["mmpack.ops.varlen_triton"]
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
    "HGMMA": r"\bHGMMA\b",
    "UTMALDG": r"\bUTMALDG\b",
    "ATOM": r"\b(?:ATOMG?|REDG?)\b",
}


@dataclass(frozen=True)
class Case:
    """A kernel as one GPU run would launch it, and what it may cost.

    `arguments` are Triton types, ":16" marking divisibility by 16; `needs` are instructions that must
    be there, `lacks` those that must not.
    """

    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    max_registers: int
    needs: tuple[str, ...] = ()
    max_spill_bytes: int = 0
    lacks: tuple[str, ...] = ("LDL", "STL", "ATOM")


@dataclass
class Result:
    """What the compiler made of a case."""

    name: str
    target: str
    triton: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int]
    problems: list[str] = field(default_factory=list)


def _embed_cases(dtype: str, D: int) -> list[Case]:
    wide = f"*{dtype}:16"
    copies = {"D": D, "COPY_D": embed.copy_width(D)}
    sums = {
        "D": D,
        "BLOCK_D": embed.BLOCK_D,
        "MAX_RUN": embed.MAX_RUN,
        "BLOCK_R": embed.BLOCK_R,
        "ACC": tl.float32,
    }
    options = {"num_warps": embed.NUM_WARPS}
    text = {
        "input_ids_ptr": "*i64:16",
        "text_order_ptr": "*i32:16",
        "text_id_offsets_ptr": "*i32:16",
    }
    cases = [
        Case(
            f"embed_features_fwd {dtype} D={D}",
            embed._embed_features_fwd_kernel,
            {
                "out_ptr": wide,
                "input_ids_ptr": "*i64:16",
                "feature_index_ptr": "*i32:16",
                "weight_ptr": wide,
                "features_ptr": wide,
                "weight_stride": "i32:16",
                "features_stride": "i32:16",
            },
            copies,
            options,
            max_registers=64,
            needs=("LDG.128", "STG.128"),
        )
    ]
    for accumulate in (False, True):
        name = "accumulate_embedding_grad" if accumulate else "embed_features_bwd"
        cases += [
            Case(
                f"{name} {dtype} D={D}",
                embed._embed_features_bwd_kernel,
                {
                    "dweight_ptr": "*fp32:16" if accumulate else wide,
                    "partial_ptr": "*fp32:16",
                    "dfeatures_ptr": wide,
                    "dout_ptr": wide,
                    **text,
                    "feature_token_ptr": "*i32:16",
                    "dout_stride": "i32:16",
                    "num_runs": "i32",
                    "padding_idx": "i32",
                },
                {**sums, **copies, "ACCUMULATE": accumulate},
                options,
                max_registers=96,
                needs=("LDG.128", "STG.128"),
            ),
            Case(
                f"{name} partials {dtype} D={D}",
                embed._embed_features_bwd_partials_kernel,
                {
                    "dweight_ptr": "*fp32:16" if accumulate else wide,
                    "partial_ptr": "*fp32:16",
                    **text,
                    "num_runs": "i32",
                    "padding_idx": "i32",
                },
                {**sums, "ACCUMULATE": accumulate},
                options,
                max_registers=96,
                needs=("LDG.128", "STG.128"),
            ),
        ]
    return cases


def _attention_cases(dtype: str, K: int, G: int, causal: bool) -> list[Case]:
    D0, D1 = varlen.split_head_dim(K)
    at_the_limit = K == 128 or dtype == "fp32"  # there dk and dv are held to spill nothing
    registers = {"fwd": 250, "bwd_dq": 220, "bwd_dkv": 255 if at_the_limit else 230}
    cases = []
    for name, kernel in (
        ("fwd", varlen.kernels._varlen_attention_fwd_kernel),
        ("bwd_dq", varlen.kernels._varlen_attention_bwd_dq_kernel),
        ("bwd_dkv", varlen.kernels._varlen_attention_bwd_dkv_kernel),
    ):
        options = varlen.launch_options(name, K, {"fp32": torch.float32}.get(dtype))
        num_warps = options.pop("num_warps")
        constants = {"H": G, "G": G, "K": K, "D0": D0, "D1": D1, "TILE": varlen.TILE}
        constants |= {"CAUSAL": causal, **options}
        arguments = {}
        for argument in kernel.arg_names:
            if argument.endswith("_desc"):  # q0_desc: queries, the first D0 columns
                rows = constants["BN" if argument[0] in "kv" else "BM"]
                columns = D1 if D1 and "1_" in argument else D0
                arguments[argument] = f"tensordesc<{dtype}[{rows}, {columns}]>"
            elif argument.endswith("_step"):
                arguments[argument] = "i32:16"
            elif argument not in constants:
                arguments[argument] = {
                    "lse_ptr": "*fp32:16",
                    "delta_ptr": "*fp32:16",
                    "tiles_ptr": "*i32:16",
                    "segment_ids_ptr": "*i32:16",
                    "T": "i32",
                    "scale": "fp32",
                    "scale_log2": "fp32",
                }.get(argument, f"*{dtype}:16")
        cases.append(
            Case(
                f"varlen_attention_{name} {dtype} K={K} {'causal' if causal else 'full'} G={G}",
                kernel,
                arguments,
                constants,
                {"num_warps": num_warps, "num_stages": options["STAGES"]},
                max_registers=registers[name],
                needs=("UTMALDG",) if dtype == "fp32" else ("HGMMA", "UTMALDG", "STG.128"),
                lacks=("ATOM",) if dtype == "fp32" else ("LDL", "STL", "ATOM"),
                # Exact float32 products use no tensor core; Triton 3.6 spills a little at K = 128.
                max_spill_bytes=512 if dtype == "fp32" else 0,
            )
        )
    return cases


_TEXT = {"sections": (16, 24, 24), "interleaved": False, "num_freqs": 64}
_QWEN3 = {"sections": (24, 20, 20), "interleaved": True, "num_freqs": 64}
_VISION = {"sections": (20, 20), "interleaved": False, "num_freqs": 20}
_PARTIAL = {"sections": (11, 11, 10), "interleaved": True, "num_freqs": 32}


def _mrope_case(name: str, dtype: str, H: int, HK: int, K: int, rope: dict[str, Any]) -> Case:
    """Of both directions the inverse, which negates more. Vision positions are a transposed view."""
    strides = ("q_stride_t", "q_stride_h", "k_stride_t", "k_stride_h", "position_stride")
    constants = mrope.mrope_constants(H, HK, K, **rope, inverse=True, dtype=None)
    arguments = {
        **dict.fromkeys(("q_out_ptr", "k_out_ptr", "q_ptr", "k_ptr"), f"*{dtype}:16"),
        "position_ids_ptr": "*i64:16",
        "inv_freq_ptr": "*fp32:16",
        **dict.fromkeys(strides, "i32:16"),
        "position_stride_t": "i32",
        "T": "i32",
        "scaling": "fp32",
    }
    return Case(
        f"apply_mrope {name} {dtype}",
        mrope._apply_mrope_kernel,
        arguments,
        constants,
        {"num_warps": mrope.NUM_WARPS},
        max_registers=128,
        needs=("LDG.128", "STG.128"),
    )


CASES = [
    case
    for dtype, D in (("bf16", 1536), ("bf16", 3584), ("bf16", 8192), ("fp32", 3584))
    for case in _embed_cases(dtype, D)
] + [
    _mrope_case("12 + 2 heads", "bf16", 12, 2, 128, _TEXT),
    _mrope_case("28 + 4 heads", "bf16", 28, 4, 128, _TEXT),
    _mrope_case("28 + 4 heads", "fp32", 28, 4, 128, _TEXT),
    _mrope_case("interleaved", "bf16", 32, 8, 128, _QWEN3),
    _mrope_case("vision", "bf16", 16, 16, 80, _VISION),
    _mrope_case("partial", "bf16", 16, 2, 256, _PARTIAL),
]
CASES += [
    case
    for dtype, K, G, causal in (
        ("bf16", 128, 6, True),  # Qwen2-VL-2B
        ("bf16", 128, 7, True),  # 7B
        ("fp16", 128, 7, True),
        ("bf16", 128, 1, False),
        ("bf16", 80, 1, False),  # the vision tower
        ("bf16", 96, 1, False),
        ("bf16", 64, 1, True),
        ("fp32", 128, 7, True),
        ("fp32", 80, 1, False),
    )
    for case in _attention_cases(dtype, K, G, causal)
]


def compile_case(case: Case) -> Result:
    """Compile, disassemble, judge."""
    signature, attributes, constants = {}, {}, {}
    for place, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            constants[(place,)] = case.constants[name]
        else:
            kind, _, divisible = case.arguments[name].partition(":")
            signature[name] = kind
            if divisible:
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
    """Bytes ptxas stores to and loads from spills. Newer Tritons assemble with a second ptxas."""
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
    """Names of every `_*_kernel` in mmpack.ops."""
    modules = [module for name, module in sys.modules.items() if name.startswith("mmpack.ops.")]
    return {
        name
        for module in modules
        for name, value in inspect.getmembers(module)
        if name.startswith("_") and name.endswith("_kernel") and hasattr(value, "arg_names")
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the report; 1 if a kernel is over budget or has no case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", help="cases whose name holds this")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if options.only is None or options.only in case.name]
    with multiprocessing.get_context("fork").Pool() as pool:  # kernels do not pickle, places do
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
