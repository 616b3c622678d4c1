#!/usr/bin/env bash
# Everything that needs a GPU, within nine minutes: build, the GPU tests, then the GPU benchmarks.
#   benchmarks/gpu.sh FOLDER     leaves FOLDER/tests.{txt,xml}, FOLDER/benchmarks.txt and FOLDER/latest.csv
# A step has a limit of its own and ends at the deadline at the latest; figures are on disk after every
# test, so what is cut off loses only what it had not measured. To publish: latest.csv as
# benchmarks/results/MACHINE/published.csv, tests.xml beside it, and `python -m benchmarks.report`.
# Needs torch, triton, transformers, numpy, pillow, pybind11, pytest, pytest-benchmark and hypothesis;
# installs nothing but mmpack itself.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?name a folder for the results}" && cd "$1" && pwd)
deadline=$((SECONDS + 525))
failed=0
rm -f "$out"/{tests.txt,tests.xml,benchmarks.txt,latest.csv}

step() { # step SECONDS LOG ARGUMENTS: pytest with these, at most so long
  local left=$((deadline - SECONDS)) limit=$1 log=$2
  shift 2
  if ((left < 15)); then
    echo "no time left for pytest $*" | tee -a "$out/$log"
    failed=1
    return
  fi
  timeout -k 5 $((limit < left ? limit : left)) python3 -m pytest "$@" 2>&1 | tee -a "$out/$log"
  local code=${PIPESTATUS[0]}
  if ((code)); then
    echo "exit code $code (124: out of time) of pytest $*" | tee -a "$out/$log"
    failed=1
  fi
}

bench() { # bench SECONDS FILES
  local limit=$1
  shift
  step "$limit" benchmarks.txt "${@/#/benchmarks/bench_}" -m gpu -s --csv "$out/latest.csv" \
    --benchmark-disable-gc
}

# FlashAttention-4 as a peer, where somebody has put it: carry/fa4.tar.xz.
if [ -f carry/fa4.tar.xz ]; then
  site=$(mktemp -d)
  python3 -c "import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])" carry/fa4.tar.xz "$site"
  export PYTHONPATH="$site:$site/nvidia_cutlass_dsl/dsl_packages${PYTHONPATH:+:$PYTHONPATH}"
fi

timeout 120 python3 -m pip install -q --no-build-isolation --no-deps -e . || exit 1
step 170 tests.txt -m gpu --junitxml "$out/tests.xml"
# The most wanted first: the last of them are what a slow machine loses.
bench 120 train.py embed_features.py
bench 150 varlen_attention.py
bench 70 assemble.py mrope.py patch_embed.py
bench 70 head.py tower.py
exit $failed
