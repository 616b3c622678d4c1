"""`pytest benchmarks [--quick] [--csv FILE]`: pytest-benchmark's table, and all measurements as CSV."""

import importlib.util
from pathlib import Path

import pytest
import torch

from benchmarks.harness import RESULTS, Recorder, copy_gb_per_s, gemm_tflops, kind_of, machine


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="small cases and few rounds")
    default = RESULTS / kind_of(machine()) / "latest.csv"
    parser.addoption(
        "--csv",
        metavar="FILE",
        default=default,
        help=f"where the figures go, instead of a benchmark's old ones ({default})",
    )
    parser.addoption("--commit", default="", help="what the figures say if there is no .git to ask")


def pytest_configure(config):
    """Make `pytest benchmarks` run all benchmarks: the -m in pyproject.toml is for tests."""
    here = Path(__file__).resolve().parent
    paths = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    if all(path.is_relative_to(here) for path in paths):
        if config.option.markexpr in config.getini("addopts"):
            config.option.markexpr = ""
        config.option.reportchars += "s"  # show the reasons of skipped benchmarks


def pytest_collection_modifyitems(items):
    """Check that each benchmark is marked with where it runs, and skip those that cannot run here."""
    for item in items:
        if not any(item.get_closest_marker(name) for name in ("cpu", "gpu")):
            raise pytest.UsageError(f"{item.nodeid} must be marked cpu, gpu or both")
        if not item.get_closest_marker("cpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        for peer in item.iter_markers("peer"):
            package, module = peer.args
            if not _is_there(module):
                reason = f"the peer is not installed: pip install {package}"
                item.add_marker(pytest.mark.skip(reason=reason))


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the package around it
        return False


@pytest.fixture(scope="session")
def quick(request):
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def session_recorder(request):
    recorder = Recorder(request.config.getoption("--commit"))
    print(f"\nfigures go to {request.config.getoption('--csv')}")
    return recorder


@pytest.fixture
def recorder(request, session_recorder):
    """Rows of the run, written to disk after every test, so that an interrupted run keeps them."""
    session_recorder.test = request.node.name
    yield session_recorder
    if session_recorder.rows:
        session_recorder.write(request.config.getoption("--csv"))


@pytest.fixture(scope="session")
def copy_ceiling():
    """GB/s of a large copy in this run."""
    return copy_gb_per_s()


@pytest.fixture(scope="session")
def gemm_ceiling():
    """TFLOP/s of a large product in this run."""
    return gemm_tflops()
