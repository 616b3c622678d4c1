"""`pytest benchmarks [--quick] [--csv FILE]`: pytest-benchmark's table, and every figure as CSV."""

import pytest

from benchmarks.harness import Recorder, copy_gb_per_s


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="small cases and few rounds")
    parser.addoption("--csv", metavar="FILE", help="append every figure to this CSV")


@pytest.fixture(scope="session")
def quick(request):
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def recorder(request):
    """Rows of the run; written at its end where --csv says."""
    recorder = Recorder()
    yield recorder
    path = request.config.getoption("--csv")
    if path and recorder.rows:
        recorder.write(path)


@pytest.fixture(scope="session")
def copy_ceiling(recorder):
    """GB/s of a large copy in this run."""
    values = copy_gb_per_s()
    recorder.add(
        "ceiling", "copy", "copy", metric="bandwidth", unit="GB/s", x=("", 0), values=values
    )
    return sorted(values)[len(values) // 2]
