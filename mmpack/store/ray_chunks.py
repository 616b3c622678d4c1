"""Chunks of rows as tasks of Ray, on this machine or a cluster: `mmpack pack --ray`.

Ray distributes the tasks, and repeats one whose worker or machine dies. What a task does is what a process of
`--jobs` does (`mmpack.store.build`), so samples, errors and their order are the same.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import mmpack
from mmpack.data.file_formats import Row

LOCAL = "local"  # instead of an address: a Ray of our own, on this machine
RETRIES = 3  # of a chunk whose worker died; Ray's default
_ANSWER_S = 60.0  # a cluster that does not answer; Ray itself waits for more than two minutes
_COUNTED_S = 10.0  # how often the cluster's cores are counted: clusters grow


def check_ray(address: str) -> None:
    """
    Raises:
        ValueError: the address has none of the forms, or ray is not installed.
    """
    if address.startswith("ray://"):
        raise ValueError(
            f"--ray {address} is an address of Ray's client; run mmpack pack on a machine of the cluster, with "
            "--ray auto or HOST:PORT"
        )
    if address not in (LOCAL, "auto") and not re.fullmatch(r"[\w.-]+:\d{1,5}|\[.+\]:\d+", address):
        raise ValueError(
            f"--ray takes HOST:PORT of a cluster, or auto, got {address}; for a Ray of its own, pass --ray as the "
            "last option, or --ray local"
        )
    if find_spec("ray") is None:
        raise ValueError("--ray needs ray, which is not installed; pip install 'mmpack[ray]'")


class RayTasks:
    """Does work on chunks in tasks of Ray; results are asked for in any order.

    Args:
        work: what is done to a chunk; sent once, and loaded once by each worker.
        address: of a cluster; `LOCAL` starts a Ray here, or uses the one of this process.
        cores: of this machine, for a Ray that is started here.

    Raises:
        ValueError: there is no Ray at the address, or it cannot be used.
    """

    def __init__(self, work: Callable[[Any], Any], address: str, cores: int) -> None:
        import ray

        self._ray = ray
        self._is_ours = _connect(ray, address, cores)
        self._rows: dict[Any, str] = {}  # task -> its rows; the tasks that are not finished
        self._most, self._counted = 0, -_COUNTED_S
        try:
            self._work = ray.put(pickle.dumps(work))
            self._task = ray.remote(max_retries=RETRIES)(_task(mmpack.__version__))
        except BaseException:
            self.close()
            raise

    def most(self) -> int:
        """Chunks to hand out at once: one per core of the cluster now, and as many that wait."""
        now = time.monotonic()
        if now >= self._counted + _COUNTED_S:
            cores = int(self._ray.cluster_resources().get("CPU", 0))
            self._most, self._counted = 2 * max(cores, 1), now
        return self._most

    def submit(self, chunk: tuple[int, list[Row]] | ValueError) -> Any:
        """Hand out a chunk; returns its task."""
        # In a list, the work stays a reference; as bytes, a chunk needs no mmpack to arrive.
        task = self._task.remote([self._work], pickle.dumps(chunk))
        self._rows[task] = "a file's end" if isinstance(chunk, ValueError) else _named(chunk[1])
        return task

    def result(self, task: Any) -> Any:
        """Wait for a task's result.

        Raises:
            ValueError: the work's own, or the task's workers died.
        """
        rows = self._rows[task]
        errors = self._ray.exceptions
        try:
            return self._ray.get(task)
        except errors.RayTaskError as error:
            raise error.cause from error
        except errors.RayError as error:
            first = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"Ray ended {rows} without a result, after {RETRIES} retries if a worker died ({first:.300}); "
                "memory ran out, or these rows end the process that reads them: --jobs 1 shows which"
            ) from None
        finally:
            del self._rows[task]

    def close(self) -> None:
        """Drop what is not finished, and shut Ray down if it was started or connected to here."""
        if self._is_ours:
            self._ray.shutdown()
        else:
            for task in self._rows:
                self._ray.cancel(task)
        self._rows.clear()


def _connect(ray: Any, address: str, cores: int) -> bool:
    """Start or connect to Ray; False: it was there, and stays."""
    if ray.is_initialized():
        if address != LOCAL:
            raise ValueError(f"this process already uses a Ray; leave out the address {address}")
        return False
    if address == LOCAL:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray has no argument for it
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        try:
            ray.init(LOCAL, num_cpus=cores, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"Ray did not start on this machine: {error!s:.400}; its logs say more, and --jobs works "
                "without it"
            ) from None
        return True
    _try(address)
    ray.init(address, logging_level="ERROR")
    return True


_TRIED = "import sys, ray; ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False)"


def _try(address: str) -> None:
    """Connect in a process of its own: here, Ray waits for minutes, deaf to Ctrl-C, and may end the process.

    Raises:
        ValueError: there is no Ray, or it is another version.
    """
    tried = [sys.executable, "-c", _TRIED, address]
    try:
        done = subprocess.run(tried, capture_output=True, text=True, timeout=_ANSWER_S)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"no Ray answers at {address} within {_ANSWER_S:.0f} s; check the address (ray status), or leave it "
            "out for a Ray on this machine"
        ) from None
    if done.returncode:
        causes = re.split(r"^(?=[\w.]+Error: (?!.*Traceback))", done.stderr, flags=re.M)
        why = " ".join(
            causes[min(1, len(causes) - 1)].partition("\n\n")[0].split()
        )  # the first one
        raise ValueError(
            f"cannot use the Ray at {address}: {why:.400}; check the address and its versions (ray status), or "
            "leave it out for a Ray on this machine"
        )


def _named(rows: list[Row]) -> str:
    return f"rows {rows[0].number} to {rows[-1].number} of {rows[0].source}"


def _task(version: str) -> Callable[[list[Any], bytes], Any]:
    """The function of a task. Inside of another function it is sent as code, so that it also runs, to say so,
    where mmpack is not installed."""

    def chunk_of_rows(work: list[Any], chunk: bytes) -> Any:
        import os

        host = os.uname().nodename
        try:
            import mmpack
            from mmpack.store.ray_chunks import _worked
        except ImportError as error:
            raise ValueError(
                f"{host} of the Ray cluster has no mmpack {version} ({error}); install it on every machine"
            ) from None
        if mmpack.__version__ != version:
            raise ValueError(
                f"{host} of the Ray cluster has mmpack {mmpack.__version__}, this machine {version}; install the "
                "same on all"
            )
        return _worked(work[0], chunk)

    return chunk_of_rows


_loaded: dict[str, Callable[[Any], Any]] = {}  # the work of this worker, by reference


def _worked(reference: Any, chunk: bytes) -> Any:
    import ray

    work = _loaded.get(reference.hex())
    if work is None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker per core already
        work = pickle.loads(ray.get(reference))  # from the process that hands out the chunks
        _loaded.clear()
        _loaded[reference.hex()] = work
    return work(pickle.loads(chunk))
