"""`mmpack tune` for the model of the benchmarks, on a machine without its files.

    python -m benchmarks.tune_models [--dry-run]

The results go to stdout as JSON, and to the user's cache folder, where bench_train's "mmpack, tuned" finds them. A
dry run lists what would be measured, and needs no GPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.model_configs import QWEN2_VL_2B
from mmpack.cli.main import main as run_command
from mmpack.data.processor_folder import load_config
from mmpack.hf.op_choice import shape_classes


def main(words: Sequence[str]) -> int:
    """Returns the exit code of `mmpack tune`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(QWEN2_VL_2B), encoding="utf-8")
        if "--dry-run" in words:
            print("\n".join(map(str, shape_classes(load_config(path)))))
            return 0
        return run_command(["tune", str(path), "--json"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
