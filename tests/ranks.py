"""Runs a function on every rank of a group, for tests of distributed training.

Ranks are forked by a server process, which has imported torch and transformers once: importing them takes a process
longer than most of these tests. The server is started by the first call and ends with the process that called.
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
    server = _server()
    job = {
        "module": function.__module__,
        "function": function.__name__,
        "arguments": [a if isinstance(a, int) else str(a) for a in arguments],
        "size": size,
        "timeout": timeout,
    }
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    failed = json.loads(server.stdout.readline())
    assert not failed, failed


@functools.cache
def _server() -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, __file__], env=environment, **pipes)


def _serve() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # what ranks share: none of it is garbage
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what ranks print is no answer
    for line in sys.stdin:
        answers.write(json.dumps(_run(json.loads(line))) + "\n")
        answers.flush()


def _run(job: dict) -> str:
    """Run a job; returns what was written by ranks if one failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reads, running = [], {}
    for rank in range(job["size"]):
        read, write = os.memfd_create("stderr"), None
        reads.append(read)
        write = os.dup(read)
        if (child := os.fork()) == 0:
            os.dup2(write, 2)
            _rank(job, rank, port)
        os.close(write)
        running[child] = rank
    failed = _wait(running, job["timeout"])
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
        if running and (failed or time.monotonic() > end):
            for child, rank in running.items():
                failed.setdefault(rank, "killed")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            return failed
        time.sleep(0.01)
    return failed


def _rank(job: dict, rank: int, port: int) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["size"]}
    names |= {"LOCAL_WORLD_SIZE": job["size"], "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in names.items()})
    code = 1
    try:
        function = getattr(importlib.import_module(job["module"]), job["function"])
        function(*job["arguments"])
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
