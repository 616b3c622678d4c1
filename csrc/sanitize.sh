#!/usr/bin/env bash
# Builds the C++ core with the address and undefined behaviour sanitizers into a temporary folder and
# runs the tests of every native entry point on it; the checkout's own build stays as it is.
#   csrc/sanitize.sh [--smoke | pytest's arguments]
# Needs GCC with libasan and libubsan, pybind11, and what the tests need; fails where one is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "sanitize: $1" >&2
  exit 1
}

command -v g++ > /dev/null || fail "there is no g++"
preload=
for library in libasan.so libubsan.so libstdc++.so; do  # the last one: exceptions pass through it
  path=$(g++ -print-file-name="$library")
  [ -e "$path" ] || fail "g++ has no $library; install GCC's sanitizer runtimes"
  preload+=$(readlink -f "$path"):
done
includes=$(python -m pybind11 --includes) || fail "there is no pybind11; pip install -e '.[test]'"

case "${1:-}" in
  "") tests=(tests/test_native.py tests/test_plan.py tests/test_balance.py tests/test_assemble.py) ;;
  --smoke) tests=(tests/test_native.py -k "not real_pack") ;;
  *) tests=("$@") ;;
esac

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cp -r mmpack "$build/mmpack"
rm -f "$build"/mmpack/*.so
core="$build/mmpack/_native$(python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')"
# Not -fno-sanitize-recover: with it GCC 12 loses checks of 16-byte stores; halt_on_error does the same.
export flags="-std=c++20 -O1 -g -fPIC -fvisibility=hidden -ffp-contract=off -D_GLIBCXX_ASSERTIONS
  -fsanitize=address,undefined $includes"
# shellcheck disable=SC2016,SC2086
printf '%s\n' csrc/*.cpp | build="$build" xargs -P "$(nproc)" -I{} \
  sh -c 'g++ $flags -c {} -o "$build/$(basename {}).o"'
# shellcheck disable=SC2086
g++ $flags -shared "$build"/*.o -o "$core"
grep -q __asan_report_store "$core" || fail "$core checks nothing"

# Python keeps much until its end, and others free with what they like: neither is about this core.
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH="$build" PYTHONDONTWRITEBYTECODE=1
# --capture=sys: a sanitizer writes to the process, not to Python
LD_PRELOAD="$preload" pytest --capture=sys -p no:cacheprovider "${tests[@]}"
