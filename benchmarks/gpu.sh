#!/usr/bin/env bash
# Everything that needs a GPU, within nine minutes: build, the GPU tests, then the GPU benchmarks.
#   benchmarks/gpu.sh [--dry-run] FOLDER [COMMIT]
# COMMIT is written beside the figures where there is no .git to ask. FOLDER/summary.txt says what ran, failed,
# hung and was left out; stages, limits and files are in benchmarks/gpu_run.py. --dry-run needs no GPU, selects
# all of it and runs none.
# Needs torch, triton, transformers, peft, numpy, pillow, pyarrow, platformdirs, pybind11, pytest, pytest-xdist,
# pytest-benchmark and hypothesis; installs nothing but mmpack itself. Pure wheels in carry/ are put on the path:
#   pip download --no-deps -d carry platformdirs
set -uo pipefail
folder=$(pwd)
cd "$(dirname "$0")/.."

# FlashAttention-4 as a peer, where somebody has put it: carry/fa4.tar.xz.
if [ -f carry/fa4.tar.xz ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  python3 -c "import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])" carry/fa4.tar.xz "$site"
  export PYTHONPATH="$site:$site/nvidia_cutlass_dsl/dsl_packages${PYTHONPATH:+:$PYTHONPATH}"
fi
for wheel in "$PWD"/carry/*-none-any.whl; do
  [ -f "$wheel" ] && export PYTHONPATH="$wheel${PYTHONPATH:+:$PYTHONPATH}"
done
python3 -m benchmarks.gpu_run --from "$folder" "$@"
