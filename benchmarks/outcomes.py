"""A pytest plugin that writes the outcome of every test to disk immediately, and a reader of its file.

    python -m pytest -p benchmarks.outcomes --outcomes FILE [--stage NAME] [--test-limit SECONDS] ...

A line of the CSV is an event: a test is selected, started, then passed, failed, error or skipped ("dry" if nothing
ran, see `benchmarks.dry_run`). So a killed run is still useful: a test that was only selected did not run, and a
test that started without an end hung or was cut off. A failure's traceback goes to stderr immediately. Under
xdist, the controller writes; `--test-limit` ends the worker of a test that takes longer, with its traceback, and
xdist continues with a new worker. Uses the standard library and pytest only.
"""

import csv
import faulthandler
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

FIELDS = ("stage", "test", "event", "seconds", "message")
ENDS = ("passed", "failed", "error", "skipped", "crashed", "dry")
_STDERR = os.dup(2)  # before pytest captures it


@dataclass(frozen=True)
class Outcome:
    """The last known event of a test: one of ENDS, "started" or "selected"."""

    stage: str
    test: str  # its node id
    event: str
    seconds: float
    message: str


def read_outcomes(path: str | Path) -> list[Outcome]:
    """The tests of a CSV in order of selection; incomplete lines are ignored."""
    last: dict[tuple[str, str], Outcome] = {}
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for line in csv.DictReader(file):
            with suppress(TypeError, ValueError):
                outcome = Outcome(**{**line, "seconds": float(line["seconds"])})  # type: ignore
                of = outcome.stage, outcome.test
                if outcome.event in (*ENDS, "started") or of not in last:
                    last[of] = outcome
    return list(last.values())


def pytest_addoption(parser):
    parser.addoption("--outcomes", metavar="FILE", help="where the outcome of every test goes")
    parser.addoption("--stage", default="", metavar="NAME", help="what the run is called there")
    parser.addoption(
        "--test-limit", type=float, metavar="SECONDS", help="ends the process of a slower test"
    )


def pytest_configure(config):
    if config.getoption("--outcomes") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(config), "outcomes writer")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item) -> Iterator[None]:
    limit = item.config.getoption("--test-limit")
    if limit:
        faulthandler.dump_traceback_later(limit, exit=True, file=_STDERR)
    try:
        return (yield)
    finally:
        if limit:
            faulthandler.cancel_dump_traceback_later()


class _Writer:
    """Appends events, writing each to disk immediately."""

    def __init__(self, config):
        self.stage = config.getoption("--stage")
        self.path = Path(config.getoption("--outcomes"))
        self.selected: set[str] = set()
        if not self.path.exists():
            self._append(FIELDS)

    def _append(self, values):
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(values)

    def _event(self, test, event, seconds=0.0, message=""):
        self._append((self.stage, test, event, f"{seconds:.2f}", " ".join(message.split())[:300]))

    def _select(self, tests):
        for test in tests:
            if test not in self.selected:
                self.selected.add(test)
                self._event(test, "selected")

    def pytest_collection_finish(self, session):
        self._select(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        self._select(ids)

    def pytest_collectreport(self, report):
        if report.failed:
            self._event(report.nodeid, "error", message=f"not collected: {_last(report)}")
            _show(f"{report.nodeid}, not collected", report)

    def pytest_runtest_logstart(self, nodeid, location):
        self._event(nodeid, "started")

    def pytest_runtest_logreport(self, report):
        event = report.outcome
        if report.failed and report.when in ("setup", "teardown"):
            event = "error"
        if report.failed and "crashed while running" in report.longreprtext:
            event = "crashed"
        if report.failed:
            _show(f"{report.nodeid}, {report.when}", report)
        if report.when == "call" or event != "passed":
            if ("dry", True) in report.user_properties and event == "passed":
                event = "dry"
            self._event(report.nodeid, event, report.duration, _last(report))


def _last(report):
    """A failure's or a skip's reason in one line."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash else (report.longreprtext.strip().splitlines() or [""])[-1]


def _show(title, report):
    text = f"\n--- {title}\n{report.longreprtext}\n"
    os.write(_STDERR, text.encode(errors="replace"))
