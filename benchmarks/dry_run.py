"""A pytest plugin that selects everything a GPU run would select, but runs none of it.

    python -m pytest -p benchmarks.dry_run ...

Files are imported and tests parametrized as on a machine with a GPU; torch reports one. Each test then ends
immediately with the outcome "dry", which no report counts as passed; tests with a peer that is not installed are
skipped as usual. Each benchmark records one measurement on a machine called "dry run", which cannot be published.
So a dry run shows that files can be imported, what is selected and in which order, that time limits work, and what
is written to disk. It shows nothing about kernels: none is compiled or run.
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
