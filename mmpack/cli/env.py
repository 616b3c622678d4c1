"""`mmpack env`: installed packages and available implementations, for bug reports.

Must never raise: reporting missing and broken packages is its purpose. Each package is imported by name under
`_reason`.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from mmpack.cli.tables import aligned
from mmpack.cli.tune import as_dict, tuned_table

# Package -> module to import; "": only its version is looked up, because mmpack does not import it.
PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "tokenizers": "tokenizers",
    "numpy": "numpy",
    "pillow": "PIL",
    "pyarrow": "pyarrow",
    "av": "av",
    "matplotlib": "matplotlib",
    "flash-attn": "flash_attn",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-4": "flash_attn.cute",
    "ray": "",
    "datasets": "",
    "trl": "",
    "peft": "",
    "deepspeed": "",
    "liger-kernel": "",
}
# Ops with kernels in `mmpack.ops`, and their fallback (None: there is none).
KERNELS = {
    "embed_features": "the embedding and an index",
    "accumulate_embedding_grad": None,
    "apply_mrope": "transformers",
    "cast_patches": "torch",
    "assemble_sequence": "the C++ core",
    "assemble_patches": "the C++ core",
    "attention_tiles": "the C++ core",
    "dense_mask": None,
}
PLAIN = (
    "block_mask",
    "patch_embed",
    "supervised_cross_entropy",
    "supervised_linear_cross_entropy",
)


def environment() -> dict[str, Any]:
    """The environment, for JSON. For each implementation: why it is not available; None if it is."""
    packages = {name: _package(name, module) for name, module in PACKAGES.items()}
    gpus: list[str] = []
    why_no_gpu = _reason(lambda: gpus.extend(_gpus()))
    ops: dict[str, dict[str, str | None]] = {}
    auto: list[str] = []
    broken = _reason(lambda: _look_at_ops(ops, auto, "cuda" if gpus else "cpu"))
    tuned: dict[str, Any] = {}
    why_not_tuned = _reason(lambda: tuned.update(_tuned()))
    return {
        "mmpack": sys.modules["mmpack"].__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": packages,
        "gpus": gpus,
        "why_no_gpu": why_no_gpu,
        "ops": ops,
        "auto": auto[0] if auto else None,
        "why_no_ops": broken,
        "tuned": tuned,
        "why_not_tuned": why_not_tuned,
    }


def env_table(found: dict[str, Any]) -> str:
    """The environment as text."""
    rows: list[tuple[str, ...]] = [
        (name, str(found[name])) for name in ("mmpack", "python", "platform", "cores")
    ]
    for name, package in found["packages"].items():
        state = package["version"] or "not installed"
        rows.append((name, f"{state}, BROKEN: {package['error']}" if package["error"] else state))
    gpus = found["gpus"] or [f"none: {found['why_no_gpu']}"]
    rows += [("GPU", gpu) for gpu in gpus]
    lines = [*aligned(rows, left=(0, 1)), ""]
    if found["why_no_ops"]:
        lines.append(f"mmpack.ops cannot be inspected: {found['why_no_ops']}")
    rows = [("op", "implementation", "")]
    for op, implementations in found["ops"].items():
        for name, reason in implementations.items():
            state = "available" if reason is None else f"no: {reason}"
            if op == "varlen_attention" and name == found["auto"]:
                state += "; impl='auto' without mmpack tune"
            rows.append((op, name, state))
    lines += [*aligned(rows, left=(0, 1, 2)), ""] if found["ops"] else []
    if found["tuned"]:
        lines += tuned_table(found["tuned"])
    else:
        lines.append(f"mmpack tune: {found['why_not_tuned'] or 'nothing was measured on this GPU'}")
    return "\n".join(line.rstrip() for line in lines)


def _reason(call: Callable[[], Any]) -> str | None:
    """Why a call fails, in one line; None if it succeeds."""
    try:
        call()
    except Exception as error:  # whatever a broken package raises
        words = " ".join(str(error).split())[:300]
        return words if type(error) is ValueError else f"{type(error).__name__}: {words}"
    return None


def _package(name: str, module: str) -> dict[str, str | None]:
    try:
        found: str | None = version(name)
    except PackageNotFoundError:
        found = None
    except Exception as error:  # unreadable metadata
        return {"version": None, "error": f"{type(error).__name__}: {error}"}
    broken = _reason(lambda: import_module(module)) if module and found else None
    return {"version": found, "error": broken}


def _gpus() -> list[str]:
    torch = import_module("torch")
    if not (torch.version.cuda or torch.version.hip):
        raise ValueError(f"torch {torch.__version__} is built for the CPU only")
    torch.cuda.init()  # raises with the reason if there is none
    gpus = []
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        toolkit = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        gpus.append(
            f"{about.name}, compute capability {about.major}.{about.minor}, "
            f"{about.total_memory / 2**30:.0f} GiB, {toolkit}"
        )
    if not gpus:
        raise RuntimeError("torch finds no GPU")
    return gpus


def _look_at_ops(ops: dict[str, dict[str, str | None]], auto: list[str], device: str) -> None:
    """Fill in every op's implementations and why each is not available, for training in bf16 on `device`."""
    torch = import_module("torch")
    door = import_module("mmpack.ops.varlen_attention")
    q_THK = torch.empty(1, 1, 64, device=device, dtype=torch.bfloat16, requires_grad=True)

    def attention(impl: str) -> str | None:
        reasons: list[str | None] = []
        failed = _reason(lambda: reasons.append(door.why_not(impl, q_THK)))
        return failed or reasons[0]

    ops["varlen_attention"] = {impl: attention(impl) for impl in door.IMPLEMENTATIONS}
    auto.append(door.auto_impl(q_THK))
    for op, other in KERNELS.items():
        ops[op] = {"triton": _why_no_kernel(op, device)} | ({other: None} if other else {})
    for op in PLAIN:

        def look(op: str = op) -> Any:
            return getattr(import_module("mmpack.ops"), op)

        ops[op] = {"torch": _reason(look)}


def _tuned() -> dict[str, Any]:
    """What `mmpack tune` measured on this GPU, by shape class."""
    tuning = import_module("mmpack.ops.tuning")
    table = tuning.read_table(tuning.machine())
    return {name: as_dict(measured) for name, measured in table.items()}


def _why_no_kernel(op: str, device: str) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"

    def look() -> None:
        getattr(import_module("mmpack.ops"), op)
        checks = import_module("mmpack.ops.arguments")
        checks.check_device(import_module("torch").device(device))

    return _reason(look)
