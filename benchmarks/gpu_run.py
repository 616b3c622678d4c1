"""The stages of `benchmarks/gpu.sh`: nine minutes of tests and benchmarks on a GPU, the most important first.

    python -m benchmarks.gpu_run [--dry-run] FOLDER [COMMIT]

Each stage is a separate process group with a time limit: SIGINT, then SIGKILL after GRACE seconds. So a sticky
CUDA error only affects its stage, and the summary reports it. Everything ends at DEADLINE. Files in FOLDER are
written line by line, so that a killed run only loses what it had not done:

    summary.txt      what ran, failed, hung or was left out; rewritten after every stage. Read it first
    tests.txt        pytest's output, with tracebacks as they happen
    tests.csv        every test: selected, started, outcome (`benchmarks.outcomes`)
    benchmarks.txt   output of the benchmarks
    latest.csv       their measurements
    tune.txt         what `mmpack tune` measured and chose
    environment.txt  build, `mmpack env`

To publish: copy latest.csv to benchmarks/results/MACHINE/published.csv and tests.csv beside it, then run `python
-m benchmarks.report`. A dry run (`benchmarks.dry_run`) selects everything, runs nothing and cannot be published.
Uses the standard library and pytest only, because mmpack is not built yet.
"""

from __future__ import annotations

import argparse
import collections
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from benchmarks.outcomes import Outcome, read_outcomes

ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 525  # seconds for everything
LEAST = 15  # with less time left a stage is not started
GRACE = 15  # from SIGINT to SIGKILL
TEST_LIMIT = 60  # seconds per test, including the compilation of its kernels
FILES = (
    "summary.txt", "tests.txt", "tests.csv", "tune.txt", "benchmarks.txt", "latest.csv", "environment.txt",
)  # fmt: skip
# After one of these errors, nothing works in the process.
STICKY = (
    "illegal memory access", "unspecified launch failure", "device-side assert", "misaligned address",
    "illegal instruction", "uncorrectable ECC", "invalid device context", "launch timed out",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A command with a limit."""

    name: str
    limit: float  # seconds
    log: str  # its output, in FOLDER
    command: tuple[str, ...]  # of python; {folder}, {commit} and {workers} are filled in
    selects: bool = True  # runs pytest with benchmarks.outcomes; selecting no test is a failure
    kept: float = 0  # seconds reserved for it by the stages before
    dry: tuple[str, ...] = ()  # further arguments in a dry run


@dataclass(frozen=True)
class Done:
    """The result of a stage: "ok", or what went wrong."""

    stage: Stage
    seconds: float
    end: str
    sticky: str = ""  # the sticky error, if one occurred


def _tests(name: str, limit: float, *files: str) -> Stage:
    chosen = ("-m", "gpu and not slow", "-n", "{workers}", "--dist", "load", "--tb=no", "-ra")
    events = ("--outcomes", "{folder}/tests.csv", "--stage", name, "--test-limit", str(TEST_LIMIT))
    paths = (f"tests/test_{file}.py" for file in files)
    return Stage(name, limit, "tests.txt", (*_PYTEST, *paths, *chosen, *events))


def _bench(name: str, limit: float, kept: float = 0) -> Stage:
    chosen = ("-m", "gpu", "-s", "--tb=no", "-ra", "--benchmark-disable-gc")
    events = ("--outcomes", "{folder}/tests.csv", "--stage", f"bench {name}")
    figures = ("--csv", "{folder}/latest.csv", "--commit", "{commit}")
    hang = ("-o", "faulthandler_timeout=40")  # print a traceback after 40 s
    path = f"benchmarks/bench_{name}.py"
    arguments = (*_PYTEST, path, *chosen, *events, *figures, *hang)
    return Stage(f"bench {name}", limit, "benchmarks.txt", arguments, kept=kept)


_PYTEST = ("-m", "pytest", "-p", "benchmarks.outcomes")
_PIP = ("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", ".")
_ENV = "from mmpack.cli.main import main; main(['env'])"
BUILD = Stage("build", 120, "environment.txt", _PIP, selects=False)
# Limits are for stages that hang; their sum exceeds the deadline. A slow machine skips the last stages, but not
# the training step.
STAGES = (
    Stage("environment", 30, "environment.txt", ("-c", _ENV), selects=False),
    _tests("attention", 90, "varlen_attention", "varlen_limits"),
    _tests("embedding, rope, patches, loss", 60, "embed_features", "mrope", "patch_embed",
           "cast_patches", "supervised_cross_entropy", "supervised_linear_cross_entropy"),
    _tests("assembly", 50, "assemble_sequence", "device_batches", "attention_masks"),
    _tests("trials", 40, "op_trials"),
    Stage("tune", 75, "tune.txt", ("-m", "benchmarks.tune_models"), selects=False, dry=("--dry-run",)),
    _tests("models", 75, "equivalence", "matrix"),
    _bench("varlen_attention", 100),
    _bench("embed_features", 45),
    _bench("mrope", 45),
    _bench("patch_embed", 30),
    _bench("head", 40),
    _bench("assemble", 30),
    _bench("tower", 40),
    _bench("train", 90, kept=60),
)  # fmt: skip


def run(
    stages: Sequence[Stage],
    folder: Path,
    *,
    commit: str = "",
    deadline: float = DEADLINE,
    grace: float = GRACE,
    least: float = LEAST,
    dry: bool = False,
) -> list[Done]:
    """Run the stages in order; `deadline`, `grace` and `least` are in seconds."""
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    title = f"{'DRY RUN, nothing ran. ' if dry else ''}{_commit(commit)}, {datetime.now():%Y-%m-%d %H:%M}"
    done: list[Done] = []
    _write_summary(folder, title, stages, done, "")
    for stage in stages:
        kept = sum(later.kept for later in stages[len(done) + 1 :])
        left = deadline - kept - (time.monotonic() - start)
        if left < least:
            done.append(Done(stage, 0, f"left out: {max(0, left):.0f} s were left"))
        else:
            _write_summary(folder, title, stages, done, stage.name)
            fill = {
                "folder": str(folder),
                "commit": commit,
                "workers": str(min(8, os.cpu_count() or 1)),
            }
            command = [sys.executable, *(argument.format(**fill) for argument in stage.command)]
            if dry and stage.selects:
                command += ["-p", "benchmarks.dry_run"]
            elif dry:
                command += stage.dry
            begun = time.monotonic()
            try:
                done.append(_run_stage(stage, command, folder, min(stage.limit, left), grace))
            except KeyboardInterrupt:
                done.append(Done(stage, time.monotonic() - begun, "ended from outside"))
                _write_summary(folder, title, stages, done, "")
                raise
        _write_summary(folder, title, stages, done, "")
        print(_line(done[-1], _outcomes(folder)), flush=True)
    return done


def _commit(given: str) -> str:
    """The commit for the measurements: from git if there is a .git, else from the caller."""
    if (ROOT / ".git").exists():
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        given = found or given
    return f"commit {given or 'unknown'}"


def _run_stage(stage: Stage, command: list[str], folder: Path, limit: float, grace: float) -> Done:
    begin = time.monotonic()
    path = folder / stage.log
    with path.open("ab") as log:
        log.write(f"\n== {stage.name}: {' '.join(command)}\n".encode())
        log.flush()
        at = log.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            end = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            end = f"cut off after {limit:.0f} s"
            _signal(process, signal.SIGINT)
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                end += ", killed"
        finally:
            _signal(process, signal.SIGKILL)  # also its workers
            process.wait()
    with path.open("rb") as log:
        log.seek(at)
        said = log.read().decode(errors="replace")
    sticky = next((error for error in STICKY if error in said), "")
    selected = [outcome for outcome in _outcomes(folder) if outcome.stage == stage.name]
    if stage.selects and not selected:
        end = f"no test selected ({end})"
    elif stage.selects and end == "ok" and all(o.event == "skipped" for o in selected):
        end = "all skipped"  # for example if torch finds no GPU
    return Done(stage, time.monotonic() - begin, end, sticky)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def _outcomes(folder: Path) -> list[Outcome]:
    path = folder / "tests.csv"
    return read_outcomes(path) if path.exists() else []


def _counts(outcomes: Sequence[Outcome]) -> str:
    """4 selected: 2 passed, 1 failed, 1 not run"""
    shown = {"started": "hung or cut off", "selected": "not run", "dry": "not run (dry)"}
    counts = collections.Counter(shown.get(o.event, o.event) for o in outcomes)
    return f"{len(outcomes)} selected: " + ", ".join(f"{n} {event}" for event, n in counts.items())


def _line(done: Done, outcomes: Sequence[Outcome]) -> str:
    of = [outcome for outcome in outcomes if outcome.stage == done.stage.name]
    took = f"{done.seconds:4.0f} of {done.stage.limit:3.0f} s"
    told = [done.end, *([_counts(of)] if of else [])]
    if done.sticky:
        told.append(f"'{done.sticky}': failures after it in this stage are not meaningful")
    return f"{done.stage.name:32} {took}  {'; '.join(told)}"


def _write_summary(
    folder: Path, title: str, stages: Sequence[Stage], done: Sequence[Done], running: str
) -> None:
    outcomes = _outcomes(folder)
    bad = {
        "failed": ("failed", "error"),
        "crashed, or over the limit of a test": ("crashed",),
        "hung or cut off: started, never ended": ("started",),
    }
    lines = [f"mmpack on a GPU. {title}", ""]
    of_ends = collections.Counter("ok" if stage.end == "ok" else "not ok" for stage in done)
    told = [f"{count} {end}" for end, count in sorted(of_ends.items(), reverse=True)]
    lines.append(f"stages: {len(done)} of {len(stages)} over: {', '.join(told) or 'none yet'}")
    lines += [f"tests and benchmarks: {_counts(outcomes)}", ""] if outcomes else [""]
    lines += [_line(stage, outcomes) for stage in done]
    for stage in stages[len(done) :]:
        lines.append(f"{stage.name:32} {'running' if stage.name == running else 'not yet'}")
    for name, events in bad.items():
        found = [o for o in outcomes if o.event in events and not (running and o.stage == running)]
        if found:
            lines += ["", f"{name}:"]
            lines += [f"  {o.test}{': ' if o.message else ''}{o.message[:160]}" for o in found]
    reasons = collections.Counter(o.message for o in outcomes if o.event == "skipped")
    if reasons:
        lines += ["", "skipped:", *(f"  {count} x {reason}" for reason, count in reasons.items())]
    left = collections.Counter(
        o.stage for o in outcomes if o.event == "selected" and o.stage != running
    )
    if left:
        lines += ["", "selected, not run:", *(f"  {n} of {stage}" for stage, n in left.items())]
    new = folder / "summary.txt.new"
    new.write_text("\n".join(lines) + "\n", encoding="utf-8")
    new.replace(folder / "summary.txt")


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 if every stage is ok, else 1; 130 if the run was interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the results go")
    parser.add_argument(
        "commit", nargs="?", default="", metavar="COMMIT", help="if there is no .git"
    )
    parser.add_argument("--dry-run", action="store_true", help="select everything, run nothing")
    parser.add_argument("--from", dest="start", type=Path, default=Path(), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    stages = STAGES if options.dry_run else (BUILD, *STAGES)  # a dry run builds nothing
    folder = (options.start / options.folder).resolve()
    try:
        done = run(stages, folder, commit=options.commit, dry=options.dry_run)
    except KeyboardInterrupt:
        return 130
    print(f"{folder / 'summary.txt'} says more")
    return 0 if all(stage.end == "ok" for stage in done) else 1


if __name__ == "__main__":
    sys.exit(main())
