"""A pytest plugin: everything a GPU run would select is selected, and nothing of it is run.

    python -m pytest -p benchmarks.dry_run ...

Files are imported and tests are parametrised as on a machine with a GPU, with torch told that there is one.
Each test then ends at once, as "dry", which no report takes for green; one of a peer that is not installed is
skipped as it would be. Benchmarks leave a figure each of a machine that is called "dry run", which cannot be
published. So a dry run shows that files import, what is selected and in which order, that limits hold and
what is left on disk. It shows nothing about kernels: none is compiled or run.
"""

import time

import pytest
import torch
from _pytest.reports import TestReport

MACHINE = "dry run, no GPU"

torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda device=None: MACHINE


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    skipped = next(item.iter_markers("skip"), None)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for when in ("setup", "call", "teardown"):
        report = TestReport(
            item.nodeid,
            item.location,
            {},
            outcome="skipped" if skipped and when == "setup" else "passed",
            longrepr=("", 0, skipped.kwargs["reason"]) if skipped and when == "setup" else None,
            when=when,
            user_properties=[("dry", True)],
            start=time.time(),
            stop=time.time(),
        )
        if not (skipped and when == "call"):
            item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    if "benchmarks" in item.path.parts and not skipped:
        _leave_a_figure(item)
    return True


def _leave_a_figure(item):
    from benchmarks.harness import Recorder

    kept = item.session.__dict__.setdefault(
        "dry_recorder", Recorder(item.config.getoption("--commit"))
    )
    kept.test = item.name
    bench = item.path.stem.removeprefix("bench_")
    kept.add(bench, "dry run", "dry run", metric="tests", unit="1", x=("tests", 1), values=[1])
    kept.write(item.config.getoption("--csv"))
