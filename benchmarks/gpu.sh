#!/usr/bin/env bash
# Everything that needs a GPU, within nine minutes: build, the GPU tests, then the GPU benchmarks.
#   benchmarks/gpu.sh FOLDER     leaves FOLDER/tests.txt, FOLDER/benchmarks.txt and FOLDER/gpu.csv
# Needs torch, triton, transformers, numpy, pillow, pybind11, pytest, pytest-benchmark and hypothesis;
# installs nothing but mmpack itself.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?name a folder for the results}" && cd "$1" && pwd)
failed=0

# FlashAttention-4 as a peer, where somebody has put it: carry/fa4.tar.xz.
if [ -f carry/fa4.tar.xz ]; then
  site=$(mktemp -d)
  python3 -c "import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])" carry/fa4.tar.xz "$site"
  export PYTHONPATH="$site:$site/nvidia_cutlass_dsl/dsl_packages${PYTHONPATH:+:$PYTHONPATH}"
fi

python3 -m pip install -q --no-build-isolation --no-deps -e . || exit 1
timeout 200 python3 -m pytest -m gpu 2>&1 | tee "$out/tests.txt" || failed=1
timeout 300 python3 -m pytest benchmarks -s --csv "$out/gpu.csv" --benchmark-disable-gc \
  2>&1 | tee "$out/benchmarks.txt" || failed=1
exit $failed
