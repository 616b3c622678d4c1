#!/usr/bin/env bash
# Builds the C++ core with the address and undefined behavior sanitizers in a temporary folder and
# runs the tests of all native entry points on it; the checkout's build is not changed.
#   csrc/sanitize.sh [--smoke | pytest's arguments]
# Needs GCC with libasan and libubsan, pybind11, and the tests' dependencies; fails if one is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "sanitize: $1" >&2
  exit 1
}

command -v g++ > /dev/null || fail "g++ is not installed"
preload=
for library in libasan.so libubsan.so libstdc++.so; do  # libstdc++ for exceptions
  path=$(g++ -print-file-name="$library")
  [ -e "$path" ] || fail "g++ has no $library; install GCC's sanitizer runtimes"
  preload+=$(readlink -f "$path"):
done
includes=$(python -m pybind11 --includes) || fail "pybind11 is not installed; pip install -e '.[test]'"

case "${1:-}" in
  "") tests=(tests/test_native.py tests/test_resize.py tests/test_plan.py tests/test_balance.py tests/test_assemble.py) ;;
  --smoke) tests=(tests/test_native.py -k "not real_pack") level=-O0 ;;  # compiled in two thirds of the time
  *) tests=("$@") ;;
esac

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cp -r mmpack "$build/mmpack"
rm -f "$build"/mmpack/*.so
core="$build/mmpack/_native$(python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')"
# halt_on_error instead of -fno-sanitize-recover, with which GCC 12 loses checks of 16-byte stores.
export flags="-std=c++20 ${level:--O1} -g1 -fPIC -fvisibility=hidden -ffp-contract=off -D_GLIBCXX_ASSERTIONS
  -fsanitize=address,undefined $includes"
# Bindings only check arguments, and optimizing pybind11's templates takes a minute.
# shellcheck disable=SC2016,SC2086
printf '%s\n' csrc/*.cpp | build="$build" xargs -P "$(nproc)" -I{} \
  sh -c 'case {} in *bindings.cpp) unoptimized=-O0 ;; esac; g++ $flags $unoptimized -c {} -o "$build/$(basename {}).o"'
# shellcheck disable=SC2086
g++ $flags -shared "$build"/*.o -o "$core"
grep -q __asan_report_store "$core" || fail "$core has no address checks"

# Leaks and mismatched frees in Python and other libraries do not concern this core.
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH="$build" PYTHONDONTWRITEBYTECODE=1
# --capture=sys, because sanitizers write to the process's stderr, not to Python's
LD_PRELOAD="$preload" pytest --capture=sys -p no:cacheprovider "${tests[@]}"
