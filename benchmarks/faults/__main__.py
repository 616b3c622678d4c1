"""Cause real faults and print what happens.

    python -m benchmarks.faults [NAME ...]

A fault is a function. Its docstring says what breaks, its argument is a folder with a packed demo data set, and it
returns a short description of the result. It asserts that the result is a clear error or an exact continuation, so
exit code 0 means that all are.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults.command import make_data
from benchmarks.faults.packing import PACKING
from benchmarks.faults.training import TRAINING


def main(names: Sequence[str]) -> int:
    """Cause the named faults, or all; print the table, then the number of faults with a wrong result."""
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
