"""Runs a function on every rank of a group, for tests of distributed training, or in a process that may be killed.

They are forked by a server process, which has imported torch and transformers once: importing them takes a process
longer than most of these tests. The server is started by the first call and ends with the process that called.
(multiprocessing's server is one for all: whoever starts it first says what it has imported.)
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

TESTS = Path(__file__).resolve().parent
IMPORTED = (
    "torch",
    "transformers",
    "transformers.trainer",
    "accelerate.data_loader",
    "mmpack.hf",
    "builders",
)


def on_ranks(function: Callable, *arguments: object, size: int = 2, timeout: float = 200) -> None:
    """Call a module's function with these arguments (numbers and texts; a path becomes a text) on `size` ranks, in
    processes with the environment that torchrun gives them. If one fails, the others are killed.

    Raises:
        AssertionError: a rank failed or took too long; it holds what the ranks wrote to stderr.
    """
    failed = _ask("_run", **_call(function, arguments), size=size, timeout=timeout)
    assert not failed, failed


class Forked:
    """A function with these arguments, as `on_ranks` takes them, in a process of its own and of no group."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self._pid = _ask("_start", **_call(function, arguments))

    def is_alive(self) -> bool:
        return _ask("_status", pid=self._pid, timeout=0) is None

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def join(self, timeout: float = 120) -> int | None:
        """Its exit code, -9 if it was killed; None if it runs on."""
        return _ask("_status", pid=self._pid, timeout=timeout)


def _call(function: Callable, arguments: tuple[object, ...]) -> dict[str, Any]:
    return {
        "module": function.__module__,
        "function": function.__name__,
        "arguments": [a if isinstance(a, int) else str(a) for a in arguments],
    }


def _ask(what: str, **job: Any) -> Any:
    """What the server's function of this name answers."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps([what, job]) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@functools.cache
def _server() -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, __file__], env=environment, **pipes)


def _serve() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # what they share: none of it is garbage
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what ranks print is no answer
    for line in sys.stdin:
        what, job = json.loads(line)
        if "module" in job:
            importlib.import_module(job["module"])
            gc.freeze()
        answers.write(json.dumps(globals()[what](**job)) + "\n")
        answers.flush()


def _start(**call: Any) -> int:
    """Begin a call; returns the id of its process."""
    if (child := os.fork()) == 0:
        _work(**call)
    return child


_ended: dict[int, int] = {}  # process -> exit code


def _status(pid: int, timeout: float) -> int | None:
    """The exit code of a process that `_start` began; None if it runs that many seconds later."""
    end = time.monotonic() + timeout
    while pid not in _ended:
        child, status = os.waitpid(pid, os.WNOHANG)
        if child:
            _ended[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() >= end:
            return None
        else:
            time.sleep(0.01)
    return _ended[pid]


def _run(size: int, timeout: float, **call: Any) -> str:
    """Run a call on ranks; returns what was written by ranks if one failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reads, running = [], {}
    for rank in range(size):
        read, write = os.memfd_create("stderr"), None
        reads.append(read)
        write = os.dup(read)
        if (child := os.fork()) == 0:
            os.dup2(write, 2)
            _rank(call, rank, size, port)
        os.close(write)
        running[child] = rank
    failed = _wait(running, timeout)
    said = []
    for rank, read in enumerate(reads):
        size = os.lseek(read, 0, os.SEEK_END)
        text = os.pread(read, 4000, max(0, size - 4000)).decode(errors="replace")
        said.append(f"rank {rank}: {failed.get(rank, 'ended')}\n{text}")
        os.close(read)
    return "\n".join(said) if failed else ""


def _wait(running: dict[int, int], timeout: float) -> dict[int, str]:
    """Wait for the ranks; returns why each one that failed did."""
    failed: dict[int, str] = {}
    end = time.monotonic() + timeout
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in running:
            rank = running.pop(child)
            if status:
                failed[rank] = f"status {status}"
        elif child:
            _ended[child] = os.waitstatus_to_exitcode(status)
        if running and (failed or time.monotonic() > end):
            for child, rank in running.items():
                failed.setdefault(rank, "killed")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            return failed
        time.sleep(0.01)
    return failed


def _rank(call: dict[str, Any], rank: int, size: int, port: int) -> NoReturn:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    names |= {"LOCAL_WORLD_SIZE": size, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in names.items()})
    _work(**call)


def _work(module: str, function: str, arguments: list[Any]) -> NoReturn:
    code = 1
    try:
        getattr(importlib.import_module(module), function)(*arguments)
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads sometimes keep a process that is through from ending


if __name__ == "__main__":
    sys.path[0] = str(TESTS)
    _serve()
