"""What happens when something breaks: each fault is caused for real, what was observed is printed.

    python -m benchmarks.faults [NAME ...]

A fault is a function: its docstring says what breaks, its argument is the data (a demo data set,
packed) in a folder of its own, and it returns what was observed, in a few words. It asserts that this is a
clear error or an exact continuation, so a run that ends with exit code 0 means that all are.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


def mmpack(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """A command line run to its end; `stdout` and `stderr` are text."""
    command = [sys.executable, "-m", "mmpack.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """The error a refused command ends with: one line, no traceback."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return lines[-1]


TRAINING = []
PACKING = []


def make_data(folder: Path) -> None:
    """Leave in the folder what every fault gets: train.json, tokenizer, config.json and `packed`."""
    for arguments in (
        ["demo", "--write", folder],
        ["pack", folder / "train.json", "--tokenizer", folder / "tokenizer", "--capacity", 2048]
        + ["--out", folder / "packed"],
    ):
        done = mmpack(*arguments)
        assert done.returncode == 0, done.stderr


def main(names: Sequence[str]) -> int:
    """Cause the named faults, or all; print the table, then how many ended otherwise than they should."""
    faults = [fault for fault in [*PACKING, *TRAINING] if not names or fault.__name__ in names]
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "data"
        make_data(made)
        print("| fault | what was observed | s |\n| --- | --- | --- |")
        for fault in faults:
            data = Path(folder) / fault.__name__
            shutil.copytree(made, data)
            start = time.monotonic()
            try:
                observed = fault(data)
            except AssertionError as error:
                failures.append(fault.__name__)
                observed = f"**not as it should be**: {str(error)[-300:]!r}"
            seconds = time.monotonic() - start
            what = " ".join((fault.__doc__ or "").split())
            print(f"| {what} | {observed} | {seconds:.0f} |", flush=True)
            shutil.rmtree(data)
    print(f"{len(faults) - len(failures)} of {len(faults)} as they should be")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
