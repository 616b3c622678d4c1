#!/usr/bin/env bash
# An environment with LLaMA-Factory and mmpack, with the versions that were run: llamafactory.sh FOLDER [PYTHON]
#
# LLaMA-Factory 0.9.5 requires transformers <= 5.6.0, mmpack >= 5.17. So LLaMA-Factory is installed without its
# requirements, those that training imports are named here, and it is run with DISABLE_VERSION_CHECK=1.
# (pip install llamafactory transformers==5.24.0 succeeds with LLaMA-Factory 0.8.3, which mmpack does not know.)
#
# torch, torchvision and torchaudio must be builds for the same CUDA, or all for CPUs: what is installed in FOLDER
# already, of these versions, is kept.
set -euo pipefail
folder=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
[ -d "$folder" ] || "${2:-python3}" -m venv "$folder"
pip() { "$folder/bin/python" -m pip install "$@"; }

pip torch==2.13.0 torchvision==0.28.0 torchaudio==2.11.1
pip transformers==5.24.0 accelerate==1.15.0 peft==0.20.0 datasets==4.0.0
pip --no-deps llamafactory==0.9.5 trl==0.24.0
pip omegaconf==2.3.1 einops==0.8.2 av==16.0.0 matplotlib==3.11.2 scipy sentencepiece tiktoken protobuf pydantic pandas fire
pip "$root[train]" pytest hypothesis pytest-benchmark
DISABLE_VERSION_CHECK=1 "$folder/bin/python" -c "import llamafactory.train.tuner, mmpack.integrations.llamafactory"
