"""The stages of `benchmarks/gpu.sh` without a GPU: what fails, hangs or is cut off leaves a report."""

import ast
import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu_run
from benchmarks.gpu_run import STAGES, Stage
from benchmarks.outcomes import read_outcomes

ROOT = Path(__file__).resolve().parents[1]
STAGE_TESTS = {
    "passes": "def test_good(): pass",
    "fails": "def test_good(): pass\ndef test_bad(): assert 1 == 2, 'wrong by one'",
    "hangs": "import time\ndef test_hangs(): time.sleep(60)\n"
    + "\n".join(f"def test_{n}(): pass" for n in range(6)),
    "stuck": "import signal, time\ndef test_stuck():\n"
    "    signal.signal(signal.SIGINT, signal.SIG_IGN)\n    time.sleep(60)\ndef test_rest(): pass",
    "slow": "import time\ndef test_slow(): time.sleep(60)",
    "nothing": "def helper(): pass",
    "broken": "import no_such_module",
    "skipped": "import pytest\n@pytest.mark.skip(reason='no GPU')\ndef test_it(): pass",
    "sticky": "def test_it(): raise RuntimeError('CUDA error: an illegal memory access was seen')",
    "late": "def test_it(): pass",
}
# Plugins that take longer to import than these tests.
LIGHT = tuple(f"-p no:{name}" for name in ("cacheprovider", "hypothesispytest", "anyio"))


def stage(folder, name, limit=20.0, *options):
    path = folder / f"test_{name}.py"
    path.write_text(STAGE_TESTS[name] + "\n")
    kept = (
        "--outcomes",
        "{folder}/tests.csv",
        "--stage",
        name,
        "--tb=no",
        *LIGHT,
    )
    command = ("-m", "pytest", "-p", "benchmarks.outcomes", str(path), *kept, *options)
    return Stage(name, limit, "tests.txt", command)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(how each stage ended by name, the events of its tests, the folder) of a run in which much is wrong."""
    folder, tests = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("tests")
    (folder / "latest.csv").write_text("of an older run")
    stages = [
        stage(tests, "passes"),
        stage(tests, "fails"),
        stage(tests, "hangs", 20, "-n", "2", "--dist", "load", "--test-limit", "2"),
        stage(tests, "stuck", 4),
        stage(tests, "slow", 4),
        *(stage(tests, name) for name in ("nothing", "broken", "skipped", "sticky")),
    ]
    start = time.monotonic()
    done = gpu_run.run(stages, folder, commit="abc123", deadline=120, grace=2, least=1)
    assert time.monotonic() - start < 120
    events = {}
    for outcome in read_outcomes(folder / "tests.csv"):
        events.setdefault(outcome.stage, {})[outcome.test.partition("::")[2]] = outcome
    return {one.stage.name: one for one in done}, events, folder


def test_a_stage_ends_as_its_tests_do(run):
    done, events, _ = run
    assert list(done) == [name for name in STAGE_TESTS if name != "late"]
    assert done["passes"].end == "ok" and events["passes"]["test_good"].event == "passed"
    assert done["fails"].end == "exit code 1"
    assert events["fails"]["test_bad"].event == "failed"
    assert "wrong by one" in events["fails"]["test_bad"].message
    assert events["fails"]["test_good"].event == "passed"
    assert done["skipped"].end == "all skipped" and done["sticky"].end == "exit code 1"


def test_a_test_that_hangs_is_named_and_the_others_run(run):
    done, events, folder = run
    assert events["hangs"].pop("test_hangs").event == "crashed"
    assert {outcome.event for outcome in events["hangs"].values()} == {"passed"}
    assert len(events["hangs"]) == 6 and done["hangs"].end == "exit code 1"
    assert "in test_hangs" in (folder / "tests.txt").read_text()  # its traceback


def test_a_stage_that_hangs_is_cut_off(run):
    done, events, _ = run
    assert done["slow"].end.startswith("cut off after 4 s")  # SIGINT is usually enough
    assert done["stuck"].end == "cut off after 4 s, killed" and done["stuck"].seconds < 20
    assert events["stuck"]["test_stuck"].event == "started"
    assert events["stuck"]["test_rest"].event == "selected"


def test_a_stage_without_tests_is_a_failure(run):
    done, events, _ = run
    assert done["nothing"].end == "no test selected (exit code 5)"
    (broken,) = events["broken"].values()
    assert broken.event == "error" and "no_such_module" in broken.message


def test_the_summary_says_all_of_it(run):
    _, _, folder = run
    assert {path.name for path in folder.iterdir()} <= set(gpu_run.FILES)
    assert len(gpu_run.FILES) <= 8 and not (folder / "latest.csv").exists()  # the older run's
    summary = (folder / "summary.txt").read_text()
    assert "commit abc123" in summary or (ROOT / ".git").exists()
    assert "stages: 9 of 9 over: 1 ok, 8 not ok" in summary
    for line in (
        "test_fails.py::test_bad: AssertionError: wrong by one",
        "test_hangs.py::test_hangs",
        "test_stuck.py::test_stuck",
        "'illegal memory access': failures after it in this stage are not meaningful",
        "  1 x no GPU",
        "  1 of stuck",
    ):
        assert line in summary, summary


def test_what_comes_after_the_deadline_is_left_out(tmp_path):
    stages = [stage(tmp_path, "slow", 30), stage(tmp_path, "late")]
    last = replace(stage(tmp_path, "passes"), kept=20)
    cut, left_out, passed = gpu_run.run(
        [*stages, last], tmp_path / "out", deadline=24, grace=2, least=1
    )
    assert passed.end == "ok"  # in the time that was kept for it
    assert cut.end.startswith("cut off after 4 s") and left_out.end == "left out: 0 s were left"
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "left out: 0 s were left" in summary and "test_slow.py::test_slow" in summary


def test_a_run_that_is_killed_leaves_what_it_knew(tmp_path):
    stages = [stage(tmp_path, name) for name in ("passes", "stuck")]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path, PosixPath\n"
    code += "from benchmarks.gpu_run import Stage, run\n"
    code += f"run({stages!r}, Path({str(tmp_path / 'out')!r}))"
    killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    path, end = tmp_path / "out" / "tests.csv", time.monotonic() + 30
    while not (path.exists() and "test_stuck,started" in path.read_text()):
        assert time.monotonic() < end and killed.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    killed.kill()
    killed.wait()
    for child in children:
        os.killpg(int(child), signal.SIGKILL)
    events = {o.test.partition("::")[2]: o.event for o in read_outcomes(path)}
    assert events == {"test_good": "passed", "test_stuck": "started", "test_rest": "selected"}
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "stages: 1 of 2 over: 1 ok" in summary and "stuck" + " " * 28 + "running" in summary


@pytest.mark.parametrize("name", ["attention", pytest.param("bench head", marks=pytest.mark.slow)])
def test_a_dry_run_selects_what_a_gpu_would_run(name, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    (stage,) = (s for s in STAGES if s.name == name)
    (done,) = gpu_run.run([stage], tmp_path, commit="abc", dry=True)
    assert done.end == "ok"
    outcomes = read_outcomes(tmp_path / "tests.csv")
    assert {outcome.stage for outcome in outcomes} == {name}
    if name == "attention":
        assert len(outcomes) >= 60
        assert {o.event for o in outcomes} == {"dry"}  # which is not "passed"
        assert all("[cuda" in o.test for o in outcomes if "implementation" in o.test)
    assert {o.event for o in outcomes} <= {"dry", "skipped"}
    assert "DRY RUN, nothing ran" in (tmp_path / "summary.txt").read_text()
    if name == "bench head":
        with open(tmp_path / "latest.csv", newline="") as file:
            assert {row["machine"] for row in csv.DictReader(file)} == {"dry run, no GPU"}


def test_the_stages_name_every_file_with_a_gpu_test():
    on_gpu = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        for test in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
                takes_device = any(argument.arg == "device" for argument in test.args.args)
                marks = " ".join(map(ast.unparse, test.decorator_list))
                if takes_device or "pytest.mark.gpu" in marks:
                    on_gpu.add(f"tests/{path.name}")
    named = [a for stage in STAGES for a in stage.command if a.startswith("tests/")]
    assert len(named) == len(set(named)) and set(named) == on_gpu


def test_tuning_comes_after_the_tests_of_ops_and_before_the_benchmarks():
    names = [stage.name for stage in STAGES]
    assert names.index("assembly") < names.index("tune") < names.index("bench varlen_attention")
    (tune,) = (stage for stage in STAGES if stage.name == "tune")
    assert tune.dry == ("--dry-run",)  # test_op_choice.py runs it


def test_a_dry_run_of_a_command_has_further_arguments(tmp_path):
    words = ("-c", "import sys; print(*sys.argv[1:])", "all")
    stages = [Stage("tune", 20, "tune.txt", words, selects=False, dry=("--dry-run",))]
    for dry, said in ((False, "all"), (True, "all --dry-run")):
        (done,) = gpu_run.run(stages, tmp_path, dry=dry, least=1)
        assert done.end == "ok"
        assert (tmp_path / "tune.txt").read_text().splitlines()[-1] == said


def test_the_limits_fit_into_the_deadline():
    assert gpu_run.DEADLINE + gpu_run.GRACE <= 9 * 60
    of_tests = sum(stage.limit for stage in STAGES if stage.log == "tests.txt")
    assert of_tests <= 0.6 * gpu_run.DEADLINE  # benchmarks get some of it, whatever hangs
    assert STAGES[-1].name == "bench train" and STAGES[-1].kept >= 60
