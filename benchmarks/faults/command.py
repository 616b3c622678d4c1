"""What faults are caused with: the command line, its errors, and the data set that breaks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def mmpack(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """A command line run to its end; `stdout` and `stderr` are text."""
    command = [sys.executable, "-m", "mmpack", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """The error a refused command ends with: one line, no traceback."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return lines[-1]


def make_data(folder: Path) -> None:
    """Leave in the folder what every fault gets: train.json, tokenizer, config.json and `packed`."""
    done = mmpack("demo", "--write", folder)
    assert done.returncode == 0, done.stderr
    pack(folder)


def pack(folder: Path) -> None:
    """Pack the folder's rows, anew if they are packed."""
    shutil.rmtree(folder / "packed", ignore_errors=True)
    options = ["--tokenizer", folder / "tokenizer", "--capacity", 2048, "--out", folder / "packed"]
    done = mmpack("pack", folder / "train.json", *options)
    assert done.returncode == 0, done.stderr
