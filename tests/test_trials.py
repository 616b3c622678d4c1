"""Candidates that are wrong, crash or hang in a child process, and which one is chosen."""

import os
import subprocess
import time

import fake_trials
import pytest
from fake_trials import FakeTrial, make, steady

from mmpack.trials import ROUNDS, Outcome, fastest, run_trial, run_trials


def test_candidates_alternate_and_the_median_of_five_counts():
    noisy = [90.0, 1.0, 7.0, 1.2, 1.1, 0.2]
    trial = FakeTrial({"library": steady(2.0), "triton": noisy, "bad": "wrong", "old": steady(1)})
    begun = []
    outcome = run_trial(trial, {"old": "it crashed"}, begun.append)
    assert trial.runs == ["library", "triton"] * (ROUNDS + 1)
    assert outcome.seconds == {"library": 2.0, "triton": 1.1}
    assert outcome.refused == {"old": "it crashed", "bad": "out: error 0.5, at most 0.001"}
    assert begun == ["library", "triton", "bad", *trial.runs]


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"library": 1.0, "triton": 0.94}, "triton"),
        ({"library": 1.0, "triton": 0.96}, "library"),
        ({"library": 1.0, "triton": 2.0}, "library"),
        ({"triton": 3.0, "other": 2.0}, "other"),  # the library's result was wrong
        ({"library": 1.0, "other": 0.9, "triton": 0.8}, "triton"),
        ({}, "library"),
    ],
)
def test_five_percent_replace_the_default(seconds, chosen):
    assert fastest(seconds, "library") == chosen


def test_what_goes_wrong_ends_only_the_child():
    start = time.monotonic()
    found = dict(run_trials(make, ["good", "bad", "impossible", "stuck"], limit=3))
    assert time.monotonic() - start < 30
    assert found["good"] == Outcome("library", {"library": 2.0, "triton": 1.0})
    assert found["bad"].seconds == {"library": 2.0, "triton": 1.5}
    assert found["bad"].refused == {
        "wrong": "out: error 0.5, at most 0.001",
        "crashes": "its process ended with SIGSEGV: Fatal: out of order",
        "raises": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "exits": "its process ended with exit code 3",
        "late": "its process ended with SIGKILL",
    }
    assert found["impossible"] == Outcome(failed="MemoryError: no room for the inputs")
    assert found["stuck"].seconds == {"library": 2.0}
    assert found["stuck"].refused == {"triton": "it took longer than 3 s"}


def test_a_child_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(fake_trials.make, "__qualname__", "no_such_function")
    with pytest.raises(ValueError, match="for measuring cannot be used: .*no_such_function"):
        next(run_trials(make, ["good"]))


def test_who_stops_listening_leaves_no_child(monkeypatch):
    started = []
    real = subprocess.Popen

    def popen(*args, **kwargs):
        started.append(real(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    trials = run_trials(make, ["good", "stuck"])
    assert next(trials)[0] == "good"
    trials.close()
    (process,) = started
    assert process.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
