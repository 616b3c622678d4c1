"""Tries candidates for a job in child processes: which are right, and how long each takes.

A crash, a hang or an error that leaves a process unusable (a sticky CUDA error) ends only the child: the candidate
that was running is refused with the reason, and another child continues. A child runs one candidate at a time and
names it before it begins.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

LIMIT = 180.0  # seconds for one candidate's check, with all compilation, or for importing torch
ROUNDS = 5
MARGIN = 0.05  # a candidate replaces the default if it takes 5 % less time; less is within noise


class WrongResultError(Exception):
    """A candidate's result is wrong. Its process can continue; after any other exception, it ends."""


class Trial(Protocol):
    """The candidates for one job."""

    default: str  # what is chosen unless another candidate is faster by MARGIN

    def candidates(self) -> Sequence[str]:
        """Their names."""

    def check(self, name: str) -> None:
        """Raises: WrongResultError: says what is wrong."""

    def seconds(self, name: str) -> float:
        """How long one run takes."""


@dataclass(frozen=True)
class Outcome:
    """The result of a trial.

    Attributes:
        default: the trial's.
        seconds: the median of each candidate that is right.
        refused: why each other candidate is not.
        failed: why there are no results at all; empty if there are.
    """

    default: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    failed: str = ""


def fastest(seconds: Mapping[str, float], default: str) -> str:
    """The candidate to choose; the default if nothing was measured."""
    if not seconds:
        return default
    best = min(seconds, key=lambda name: (seconds[name], name))
    if default in seconds and seconds[best] > (1 - MARGIN) * seconds[default]:
        return default
    return best


def run_trial(
    trial: Trial, refused: Mapping[str, str], begin: Callable[[str], None] = lambda name: None
) -> Outcome:
    """Check every candidate, then time those that are right, alternating, ROUNDS times after a first run.

    Args:
        refused: candidates to leave out, and why.
        begin: called with a candidate's name before it runs.
    """
    refused = dict(refused)
    right: list[str] = []
    for name in trial.candidates():
        if name in refused:
            continue
        begin(name)
        try:
            trial.check(name)
            right.append(name)
        except WrongResultError as error:
            refused[name] = str(error)
    times: dict[str, list[float]] = {name: [] for name in right}
    for _ in range(ROUNDS + 1):
        for name in right:
            begin(name)
            times[name].append(trial.seconds(name))
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    return Outcome(trial.default, seconds, refused)


def run_trials(
    make: Callable[[str], Trial], jobs: Sequence[str], *, limit: float = LIMIT
) -> Iterator[tuple[str, Outcome]]:
    """Run a trial per job in child processes; yields (job, outcome) as each is done.

    Args:
        make: a module's function, which makes a job's trial in the child.
        jobs: each once.
        limit: seconds after which a child that says nothing is killed.

    Raises:
        ValueError: the child cannot import the function.
    """
    left, refused = list(jobs), {job: dict[str, str]() for job in jobs}
    while left:
        with tempfile.TemporaryFile() as errors:
            child = _Child(make, {job: refused[job] for job in left}, errors)
            last: dict[str, Any] = {}
            try:
                for last in child.messages(limit):
                    if "outcome" in last:
                        left.remove(last["job"])
                        yield last["job"], Outcome(**last["outcome"])
            finally:
                ended = child.end()
        if "outcome" in last:
            continue  # it has done its work, or it ended between two jobs
        if not last:
            raise ValueError(f"the process for measuring cannot be used: {ended}")
        job, candidate, reason = last["job"], last.get("candidate"), last.get("error", ended)
        if candidate is None:
            yield job, Outcome(failed=reason)
            left.remove(job)
        else:
            refused[job][candidate] = reason


class _Child:
    """A process that runs trials, and what it says: lines of JSON."""

    def __init__(self, make: Any, refused: Mapping[str, Mapping[str, str]], errors: Any) -> None:
        self._errors = errors
        self._end = ""
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from mmpack.trials import child; child()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # its compilers end with it
        )
        self._said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        assert self._process.stdin is not None
        work = {"module": make.__module__, "function": make.__qualname__, "refused": refused}
        with suppress(BrokenPipeError):  # it has ended; `end` says why
            self._process.stdin.write(json.dumps(work).encode() + b"\n")
            self._process.stdin.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self._said.put(json.loads(line))
            except ValueError:
                break  # torn: the process was killed
        self._said.put(None)

    def messages(self, limit: float) -> Iterator[dict[str, Any]]:
        """What it says until it ends, or says nothing for `limit` seconds."""
        while True:
            try:
                message = self._said.get(timeout=limit)
            except queue.Empty:
                self._end = f"it took longer than {limit:g} s"
                return
            if message is None:
                try:
                    code = self._process.wait(10)
                    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
                    self._end = f"its process ended with {how}"
                except subprocess.TimeoutExpired:
                    self._end = "its process did not end"
                return
            yield message

    def end(self) -> str:
        """Kill it if it still runs, and say how it ended."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a driver that hangs may keep it
            self._process.wait(10)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{self._end}{': ' if last else ''}{last[:200]}"


def child() -> None:
    """Run the trials described by a line of stdin, and print messages."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is not a message
    work = json.loads(sys.stdin.readline())
    make = getattr(importlib.import_module(work["module"]), work["function"])

    def say(**message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    for job, refused in work["refused"].items():
        now: dict[str, str] = {"job": job}

        def begin(name: str, now: dict[str, str] = now) -> None:
            now["candidate"] = name
            say(**now)

        say(**now)
        try:
            outcome = run_trial(make(job), refused, begin)
        except Exception as error:  # whatever a kernel, a compiler or a library raises
            words = " ".join(str(error).split())[:200]
            say(**now, error=f"{type(error).__name__}: {words}")
            sys.exit(1)
        say(job=job, outcome=asdict(outcome))
