#!/usr/bin/env bash
# An environment with ms-swift and mmpack, with the versions that were run: swift.sh FOLDER [PYTHON]
#
# ms-swift 4.6.0 requires transformers < 5.20, trl < 1.0, peft < 0.21 and datasets < 4.8.5. torch and torchvision must be
# builds for the same CUDA, or both for CPUs: what is installed in FOLDER already, of these versions, is kept.
set -euo pipefail
folder=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
[ -d "$folder" ] || "${2:-python3}" -m venv "$folder"
pip() { "$folder/bin/python" -m pip install "$@"; }

pip torch==2.13.0 torchvision==0.28.0
pip ms-swift==4.6.0 qwen_vl_utils==0.0.14 transformers==5.19.0 accelerate==1.15.0 peft==0.20.0 trl==0.29.1 datasets==4.8.4
pip "$root[train]" pytest hypothesis pytest-benchmark
"$folder/bin/python" -c "import mmpack.integrations.swift"
