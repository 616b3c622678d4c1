"""The benchmark suite and the compile report run, and the report can fail."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


def python(*arguments):
    """A process without the interpreter, which replaces Triton's compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_every_kernel_compiles_for_sm_90a_within_its_budget():
    done = python("-m", "benchmarks.compile_report", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["without_case"] == []
    assert len(report["kernels"]) >= 47
    for kernel in report["kernels"]:
        assert kernel["target"] == "sm_90a"
        assert kernel["problems"] == []
        assert kernel["spill_bytes"] == 0 or "fp32 K=128" in kernel["name"]
        assert kernel["registers"] > 0
    forward = next(k for k in report["kernels"] if k["name"] == "embed_features_fwd bf16 D=3584")
    # 3584 elements of 2 bytes over 128 threads of 16: four loads and four stores, and two ids.
    assert forward["instructions"]["LDG.128"] == forward["instructions"]["STG.128"] == 4
    assert forward["instructions"]["LDG"] == 6


def test_the_report_finds_what_is_over_budget():
    code = """
from dataclasses import replace
from benchmarks import compile_report as report
case = next(case for case in report.CASES if case.name == "embed_features_fwd bf16 D=1536")
narrow = {**case.arguments, "weight_ptr": "*bf16", "features_ptr": "*bf16", "out_ptr": "*bf16"}
print(report.compile_case(replace(case, max_registers=1)).problems)
print(report.compile_case(replace(case, arguments=narrow)).problems)
print(report.compile_case(replace(case, needs=("HGMMA",))).problems)
report.CASES[:] = report.CASES[:1]
print(report.main(["--json"]))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "registers, 1 allowed" in lines[0]
    assert "no LDG.128" in lines[1]
    assert "no STG.128" in lines[1]
    assert lines[2] == "['no HGMMA']"
    assert lines[-1] == "1"
    assert "_embed_features_bwd_kernel" in done.stdout  # a kernel without a case


def test_the_quick_benchmarks_leave_their_figures(tmp_path):
    pytest.importorskip("pytest_benchmark")
    done = python("-m", "pytest", "benchmarks", "--quick", "--csv", tmp_path / "figures.csv")
    assert done.returncode == 0, done.stdout
    with open(tmp_path / "figures.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    impls = {(row["bench"], row["impl"]) for row in rows}
    assert {("embed_features", "transformers"), ("embed_features", "index_copy")} <= impls
    assert {("patch_embed", name) for name in ("transformers", "linear", "mmpack")} <= impls
    assert ("mrope", "transformers") in impls
    sent = {r["impl"]: float(r["p50"]) for r in rows if r["metric"] == "to the device"}
    assert sent["transformers"] == pytest.approx(
        8 * sent["mmpack"], rel=1e-4
    )  # six digits are kept
    assert {("assemble", name) for name in ("transformers", "reference", "mmpack")} <= impls
    assert {("plan", "mmpack"), ("plan", "mmpack by cost")} <= impls
    assert {("pixels", name) for name in ("transformers", "mmpack", "mmpack by torch")} <= impls
    assert {("opening", "mmpack"), ("opening", "bytes")} <= impls
    assert {("host", name) for name in ("transformers", "mmpack", "mmpack uint8")} <= impls
    if (ROOT.parent / "shared" / "data").is_dir():  # the real rows
        assert {("index", "mmpack"), ("headers", "mmpack"), ("store", "mmpack")} <= impls
    assert {row["metric"] for row in rows} >= {"time", "bandwidth"}
    assert all(float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in rows)
    assert all(row["commit"] and row["date"] and row["machine"] and row["versions"] for row in rows)
