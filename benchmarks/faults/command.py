"""Tools for faults: the command line, its errors, and the data set."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def mmpack(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end; `stdout` and `stderr` are text."""
    command = [sys.executable, "-m", "mmpack", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """The error line of a failed command, checked to have no traceback."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return lines[-1]


def make_data(folder: Path) -> None:
    """Write the input of each fault into the folder: train.json, tokenizer, config.json and `packed`."""
    done = mmpack("demo", "--write", folder)
    assert done.returncode == 0, done.stderr
    pack(folder)


def pack(folder: Path) -> None:
    """Pack the folder's rows, again if they are already packed."""
    shutil.rmtree(folder / "packed", ignore_errors=True)
    options = ["--tokenizer", folder / "tokenizer", "--capacity", 2048, "--out", folder / "packed"]
    done = mmpack("pack", folder / "train.json", *options)
    assert done.returncode == 0, done.stderr
