"""Trials with candidates that are right, wrong, crash or hang, for tests/test_trials.py. Imports no torch."""

import os
import signal
import sys
import time
from dataclasses import dataclass, field

from mmpack.trials import WrongResultError


@dataclass
class FakeTrial:
    """Candidates by name: the seconds of each of their runs, or what happens instead."""

    behavior: dict
    default: str = "library"
    runs: list = field(default_factory=list)  # in order

    def candidates(self):
        return list(self.behavior)

    def check(self, name):
        acts = self.behavior[name]
        if acts == "wrong":
            raise WrongResultError("out: error 0.5, at most 0.001")
        if acts == "raises":
            raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")
        if acts == "crashes":
            print("Fatal: out of order", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if acts == "exits":
            os._exit(3)
        if acts == "hangs":
            time.sleep(60)

    def seconds(self, name):
        self.runs.append(name)
        times = self.behavior[name]
        if times == "late":  # right, but crashes when it is timed
            os.kill(os.getpid(), signal.SIGKILL)
        return times[self.runs.count(name) - 1]


def steady(seconds):
    return [9.0, *[seconds] * 5]  # the first run compiles


JOBS = {
    "good": {"library": steady(2.0), "triton": steady(1.0)},
    "bad": {
        "library": steady(2.0), "wrong": "wrong", "crashes": "crashes", "raises": "raises",
        "exits": "exits", "late": "late", "triton": steady(1.5),
    },
    "stuck": {"triton": "hangs", "library": steady(2.0)},
}  # fmt: skip


def make(job):
    if job == "impossible":
        raise MemoryError("no room for the inputs")
    print("a library prints this")
    return FakeTrial(JOBS[job])
