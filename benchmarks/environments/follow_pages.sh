#!/usr/bin/env bash
# Follow docs/sft_trainer.md and docs/ms_swift.md as they are, each in a fresh environment: follow_pages.sh FOLDER [PYTHON]
#
# The tests run the pages' blocks, with a tiny model's folder in place of a published one. FOLDER/trl and FOLDER/swift
# are the environments; one that exists is used. (LLaMA-Factory: llamafactory.sh, then tests/test_llamafactory.py.)
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
python=${2:-python3}
cd "$root"

[ -d "$folder/trl" ] || "$python" -m venv "$folder/trl"
"$folder/trl/bin/python" -m pip install torch==2.13.0 transformers==5.24.0 datasets==5.2.0 "$root[train]" \
    trl==1.16.0 peft==0.21.2 pytest hypothesis
"$folder/trl/bin/pytest" -p no:cacheprovider tests/test_sft_rows.py tests/test_trl.py

benchmarks/environments/swift.sh "$folder/swift" "$python"
"$folder/swift/bin/pytest" -p no:cacheprovider tests/test_swift.py
