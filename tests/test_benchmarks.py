"""The benchmark suite and the compile report run, and the report can fail."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_run, report, tables
from benchmarks.harness import Recorder, read_rows
from benchmarks.outcomes import read_outcomes

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
MACHINE_OF_A_DRY_RUN = "dry run, no GPU"  # benchmarks.dry_run.MACHINE; to import that is to dry-run


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "target", "cases"),
    [(80, "sm_80", 36), (89, "sm_89", 36), (90, "sm_90a", 69), (100, "sm_100a", 69)],
)
def test_every_kernel_compiles_within_its_budget(arch, target, cases):
    done = python("-m", "benchmarks.compile_report", "--json", "--arch", arch)  # .ci/run: sm_90a
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["without_case"] == []
    assert len(report["kernels"]) >= cases
    for kernel in report["kernels"]:
        assert kernel["target"] == target and kernel["arch"] == arch
        assert kernel["problems"] == [] and kernel["registers"] > 0
        in_attention = "varlen_attention" in kernel["name"]
        assert kernel["programs"] >= 1 if in_attention else kernel["spill_bytes"] == 0
        exempt = "fp32" in kernel["name"] or "bwd_dkv bf16 K=256" in kernel["name"]
        assert kernel["spill_bytes"] <= 64 or exempt
        if arch == 90 and in_attention and not re.search("fp32|K=128|K=256", kernel["name"]):
            assert kernel["programs"] >= 2


@pytest.fixture(scope="module")
def compiled():
    """The lines of a process that asks `compile_report` what tests want to know."""
    names = ("embed_features_fwd bf16 D=3584", "varlen_attention_fwd bf16 K=128 causal G=7")
    code = f"""
import json
from dataclasses import asdict, replace
from benchmarks import compile_report as report
at_once = report.programs_at_once
for case in [(8, 128, 0), (8, 129, 0), (4, 255, 0), (4, 32, 0), (1, 16, 0), (8, 128, 113 * 1024),
             (8, 128, 114 * 1024), (4, 32, 227 * 1024), (4, 32, 0, 256)]:
    print(at_once(90, *case), end=" ")
print(at_once(89, 8, 32, 0), at_once(89, 8, 32, 98304), at_once(80, 8, 32, 98304))
assert not report.kernels_of_the_package() - {{case.kernel.__name__ for case in report.CASES}}
cases = {{case.name: case for case in report.CASES}}
print(json.dumps([asdict(report.compile_case(cases[name])) for name in {names}]))
case = cases["embed_features_fwd bf16 D=1536"]
narrow = {{**case.arguments, "weight_ptr": "*bf16", "features_ptr": "*bf16", "out_ptr": "*bf16"}}
print(report.compile_case(replace(case, programs={{90: 17}})).problems)
print(report.compile_case(replace(case, arguments=narrow)).problems)
print(report.compile_case(replace(case, needs=("HGMMA",))).problems)
report.CASES[:] = report.CASES[:1]
print(report.main(["--json"]))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_programs_per_multiprocessor(compiled):
    """Worked by hand: 2,048 threads, 64 warps and 65,536 registers in quarters, 228 KB of shared memory."""
    assert compiled[0].split() == "2 1 2 16 32 2 1 1 2 6 1 1".split()


def test_kernels_have_the_instructions_they_were_written_for(compiled):
    embed, attention = json.loads(compiled[1])
    for kernel in (embed, attention):
        assert kernel["target"] == "sm_90a" and kernel["problems"] == []
        assert kernel["spill_bytes"] == 0 and kernel["registers"] > 0
    # 3584 elements of 2 bytes over 128 threads of 16: four loads and four stores, and two ids.
    assert embed["instructions"]["LDG.128"] == embed["instructions"]["STG.128"] == 4
    assert embed["instructions"]["LDG"] == 6
    # A score is scaled and shifted by one FFMA: 128 x 128 scores over 256 threads.
    assert attention["instructions"]["FFMA"] >= 64


def test_the_report_finds_what_is_over_budget(compiled):
    lines = compiled[2:]
    assert "programs per multiprocessor, 17 needed" in lines[0]
    assert "no LDG.128" in lines[1]
    assert "no STG.128" in lines[1]
    assert lines[2] == "['no HGMMA']"
    assert lines[-1] == "1"
    assert any("_embed_features_bwd_kernel" in line for line in lines)  # a kernel without a case


@pytest.mark.slow
def test_a_stranger_can_run_what_takes_real_rows(tmp_path):
    """Without the rows beside the checkout: others in their place, or skipped."""
    pytest.importorskip("pytest_benchmark")
    code = f"""
import sys
from pathlib import Path
import pytest
from benchmarks import harness
harness.SHARED = Path("nowhere")
files = [f"benchmarks/bench_{{name}}.py" for name in ("host", "index", "pixels", "plan", "store", "stream")]
sys.exit(pytest.main([*files, "--quick", "--csv", {str(tmp_path / "figures.csv")!r}]))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stdout
    with open(tmp_path / "figures.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["bench"] for row in rows} >= {"host", "pixels", "plan", "opening", "stream"}
    assert not [row["config"] for row in rows if "real" in row["config"]]
    (host,) = {row["config"] for row in rows if row["bench"] == "host"}
    assert not re.search(r"\b0 images", host)


@pytest.mark.slow  # .ci/run runs it, in a step of its own
def test_the_quick_benchmarks_leave_their_figures(tmp_path):
    pytest.importorskip("pytest_benchmark")
    done = python("-m", "pytest", "benchmarks", "--quick", "--csv", tmp_path / "figures.csv")
    assert done.returncode == 0, done.stdout
    if importlib.util.find_spec("binpacking") is None:
        assert "the peer is not installed: pip install --no-deps binpacking" in done.stdout
    with open(tmp_path / "figures.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    impls = {(row["bench"], row["impl"]) for row in rows}
    assert {bench for bench, _ in impls} <= set(report.TESTS)  # or it could not be published
    assert {("embed_features", "transformers"), ("embed_features", "index_copy")} <= impls
    assert {("patch_embed", name) for name in ("transformers", "linear", "mmpack")} <= impls
    assert ("mrope", "transformers") in impls
    sent = {r["impl"]: float(r["p50"]) for r in rows if r["metric"] == "to the device"}
    assert sent["transformers"] == pytest.approx(
        8 * sent["mmpack"], rel=1e-4
    )  # six digits are kept
    assert {("assemble", name) for name in ("transformers", "reference", "mmpack")} <= impls
    assert {("plan", "mmpack"), ("plan", "mmpack by cost")} <= impls
    assert {("pixels", name) for name in ("transformers", "mmpack", "Pillow", "torch")} <= impls
    assert {("opening", "mmpack"), ("opening", "ceiling")} <= impls
    assert {("host", name) for name in ("transformers", "mmpack", "mmpack uint8")} <= impls
    if (ROOT.parent / "shared" / "data").is_dir():  # the real rows
        assert {("index", "mmpack"), ("headers", "mmpack"), ("store", "mmpack")} <= impls
    assert {row["metric"] for row in rows} >= {"time", "bandwidth"}
    assert all(float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in rows)
    assert all(row["commit"] and row["date"] and row["machine"] and row["versions"] for row in rows)


def test_a_benchmark_must_say_where_it_runs():
    from benchmarks.conftest import pytest_collection_modifyitems

    unmarked = SimpleNamespace(nodeid="bench_x.py::test_x", get_closest_marker=lambda name: None)
    with pytest.raises(pytest.UsageError, match="::test_x must be marked cpu, gpu or both"):
        pytest_collection_modifyitems([unmarked])


def test_every_benchmark_says_what_it_asks():
    files = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    assert len(files) >= 14
    on_gpu = set()
    for path in files:
        text = path.read_text(encoding="utf-8")
        question, *rest = text.removeprefix('"""').partition('"""')[0].split("\n\n")
        assert question.endswith("?"), path.name
        assert re.search("[Pp]eer", rest[0]) and "ceiling" in "".join(rest), path.name
        if "@pytest.mark.gpu" in text:
            on_gpu.add(f"benchmarks/{path.name}")
    arguments = {argument for stage in gpu_run.STAGES for argument in stage.command}
    assert {a for a in arguments if a.startswith("benchmarks/bench_")} == on_gpu


def test_the_report_knows_its_benchmarks_and_tests():
    from benchmarks.plots import PLOTS

    assert {line.bench for line in tables.LINES} | {b for b, _ in PLOTS.values()} <= set(
        report.TESTS
    )
    for names in report.TESTS.values():
        for name in names:
            assert (ROOT / "tests" / f"{name}.py").is_file()


def test_the_tables_of_the_docs_say_what_the_published_results_say():
    assert report.main(["--check"]) == 0


@pytest.fixture
def results(tmp_path):
    """Figures of two benchmarks, in a folder of their own."""
    recorder = Recorder()

    def add(test, bench, impl, mode, metric, unit, value, config="", x=("T", 8192)):
        recorder.test = test
        recorder.add(
            bench, impl, mode, metric=metric, unit=unit, x=x, values=[value], config=config
        )

    for test, peer, ours in (("first", "transformers", 10.0), ("second", "LLaMA-Factory", 20.0)):
        add(test, "host", peer, "collate", "time", "ms", 40.0, "6 packs")
        add(test, "host", "mmpack uint8", "collate", "time", "ms", ours, "6 packs")
    for share in (0.15, 0.6):
        for impl, peak in (("transformers", 384.0), ("mmpack", 384 * share)):
            add(
                "head",
                "head",
                impl,
                "forward and backward",
                "peak",
                "MiB",
                peak,
                x=("share", share),
            )
    recorder.write(tmp_path / "figures.csv")
    return tmp_path / "figures.csv"


def outcomes(path, found):
    """A file of outcomes: of test files, or of single tests in them."""
    lines = ["stage,test,event,seconds,message"]
    for name, event in found.items():
        file, _, test = name.partition("::")
        lines.append(f'a stage,"tests/{file}.py::{test or "test_it"}",{event},0.10,')
    path.write_text("\n".join(lines) + "\n")
    return path


FUSED = {"test_supervised_linear_cross_entropy": "passed"}
GREEN = {
    **FUSED,
    **dict.fromkeys(("test_collator", "test_pixels", "test_supervised_cross_entropy"), "passed"),
}


def published(results, found, capsys):
    """(exit code, the table, pictures, what was said) of a report with these outcomes."""
    pytest.importorskip("matplotlib")
    folder = results.with_name("out")
    tests = outcomes(results.with_name("outcomes.csv"), found)
    code = report.main([str(results), "--out", str(folder), "--tests", str(tests)])
    pictures = {path.stem for path in folder.glob("*.png")}
    return code, (folder / "report.md").read_text(), pictures, capsys.readouterr().out


def test_the_report_makes_a_table_and_pictures(results, capsys):
    code, table, pictures, told = published(results, GREEN, capsys)
    assert code == 0 and pictures == {"memory"}
    assert "**57.6 MiB**: 6.7 x transformers" in table
    # Each peer against ours of its own test, where they took turns.
    assert "4.0 x transformers, 2.0 x LLaMA-Factory" in table
    assert table.count("not measured") >= 2 * (len(tables.LINES) - 8)
    assert "throughput.png is not drawn: no figures of train" in told


@pytest.mark.parametrize(
    "event", ["failed", "error", "crashed", "started", "selected", "dry", "skipped", None]
)
def test_the_report_withholds_what_no_green_test_stands_for(results, event, capsys):
    loss = ("test_supervised_cross_entropy", *FUSED)
    found = {**GREEN, **dict.fromkeys(loss, event)}
    found = {name: event for name, event in found.items() if event}
    code, table, pictures, told = published(results, found, capsys)
    assert code == 1 and not pictures
    assert "MiB" not in table
    assert f"withheld: {', '.join(f'`tests/{name}.py`' for name in loss)} not green" in table
    assert "4.0 x transformers" in table  # what its own tests stand for
    files = ", ".join(f"tests/{name}.py" for name in loss)
    assert f"withheld, as {files} is not green: head on cpu" in told


def test_a_file_that_is_skipped_beside_one_that_is_green_is_not_red(results, capsys):
    found = {**GREEN, "test_collator": "skipped"}  # it needs data that are not everywhere
    assert published(results, found, capsys)[0] == 0
    del found["test_collator"]
    assert published(results, found, capsys)[0] == 1  # it broke, or was not run


def on_a_gpu(results):
    """The same figures beside them, measured on a GPU."""
    path = results.with_name("gpu") / "figures.csv"
    path.parent.mkdir()
    path.write_text(re.sub(r"CPU, [^\"]*", "NVIDIA H200", results.read_text()))
    assert {row.machine for row in read_rows(path)} == {"NVIDIA H200"}
    return path


@pytest.mark.parametrize(
    "on_gpu",
    [
        {"test_supervised_cross_entropy": "failed", **FUSED},
        {
            "test_supervised_cross_entropy::a": "passed",
            "test_supervised_cross_entropy::b": "started",
            **FUSED,
        },
        {
            "test_supervised_cross_entropy::a": "passed",
            "test_supervised_cross_entropy::b": "selected",
            **FUSED,
        },
        {"test_varlen_attention": "passed"},  # its stage was left out
    ],
    ids=["failed", "hung", "cut off", "left out"],
)
def test_figures_of_a_gpu_need_its_own_tests_green(results, on_gpu, capsys):
    pytest.importorskip("matplotlib")
    path = on_a_gpu(results)
    tests = outcomes(results.with_name("outcomes.csv"), GREEN)
    arguments = [str(results), str(path), "--tests", str(tests), "--out", str(results.parent)]
    with pytest.raises(SystemExit):
        report.main(arguments)
    assert "no tests.csv of its tests beside it" in capsys.readouterr().err
    outcomes(path.with_name("tests.csv"), {"test_supervised_cross_entropy": "passed", **FUSED})
    assert report.main(arguments) == 0
    row = next(r for r in results.with_name("report.md").read_text().split("\n") if "logits" in r)
    assert row.count("**57.6 MiB**") == 2
    outcomes(path.with_name("tests.csv"), on_gpu)
    assert report.main(arguments) == 1
    row = next(r for r in results.with_name("report.md").read_text().split("\n") if "logits" in r)
    _, _, cpu, gpu, _ = row.split("|")
    assert "**57.6 MiB**" in cpu  # a GPU's tests are not the CPU's
    red = ["`tests/test_supervised_cross_entropy.py`"]
    red += ["`tests/test_supervised_linear_cross_entropy.py`"] * ("test_varlen_attention" in on_gpu)
    assert gpu.strip() == f"withheld: {', '.join(red)} not green"


def test_a_test_that_names_an_implementation_stands_for_that_one(tmp_path):
    recorder = Recorder()
    for impl, rate in (("triton", 400.0), ("flash2", 300.0), ("flash3", 500.0)):
        recorder.add(
            "varlen_attention", impl, "forward", metric="rate", unit="TFLOP/s", x=("T", 1),
            values=[rate], config="real rows, causal",
        )  # fmt: skip
    line = next(line for line in tables.LINES if line.title.endswith("real rows, forward"))
    impls = {row.impl for row in recorder.rows}

    def cell_with(test):
        name = "test_varlen_attention"
        found = read_outcomes(
            outcomes(tmp_path / "o.csv", {name: "passed", f"{name}::{test}": "failed"})
        )
        return tables.cell(line, recorder.rows, report.red_tests(found, [name], impls))

    theirs = cell_with("test_every_implementation[cuda-80-heads0-False-flash2]")
    assert "**400 TFLOP/s**" in theirs and "flash-attn 3" in theirs and "flash-attn 2" not in theirs
    for test in ("test_every_implementation[cuda-80-heads0-False-triton]", "test_any_lengths"):
        assert cell_with(test) == "withheld: `tests/test_varlen_attention.py` not green"


def test_figures_of_a_dry_run_are_refused(results, capsys):
    results.write_text(re.sub(r"CPU, [^\"]*", MACHINE_OF_A_DRY_RUN, results.read_text()))
    tests = outcomes(results.with_name("tests.csv"), GREEN)
    with pytest.raises(SystemExit):
        report.main([str(results), "--tests", str(tests)])
    assert "the figures are of a dry run" in capsys.readouterr().err


def test_a_run_again_takes_the_place_of_older_figures(results):
    before = read_rows(results)
    recorder = Recorder()
    recorder.add("head", "mmpack", "m", metric="time", unit="ms", x=("T", 1), values=[1, 2, 3])
    recorder.write(results)
    after = read_rows(results)
    assert [row for row in after if row.bench == "host"] == [r for r in before if r.bench == "host"]
    assert [(row.p50, row.x) for row in after if row.bench == "head"] == [(2.0, 1.0)]
