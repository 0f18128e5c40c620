#!/usr/bin/env bash
# Installs the package into .venv in editable mode and builds the C++ tests in build/; with --demo, only what the demo
# needs. Later runs build incrementally.
source "$(dirname "$0")/common.sh"
group=dev tests=ON
[ "${1:-}" != --demo ] || group=demo tests=OFF
scripts/bootstrap.sh $group
export PATH=$PWD/.venv/bin:$PATH

# with_tests ON|OFF: what is installed if the C++ tests are built, or not.
with_tests() { echo "$PWD -DFUSED_ROPE_TESTS=$1 -DFUSED_ROPE_WERROR=${CI:+ON} $(cat setup.py scripts/build_backend.py pyproject.toml | cksum)"; }
installed=.venv/installed
if [ -e build/CMakeCache.txt ] && { up_to_date $installed "$(with_tests ON)" || up_to_date $installed "$(with_tests $tests)"; }; then
  cmake --build build
else
  say "Building"
  CMAKE_ARGS="-DFUSED_ROPE_TESTS=$tests -DFUSED_ROPE_WERROR=${CI:+ON} ${CMAKE_ARGS:-}" \
    python -m pip install -v --no-deps --no-build-isolation -e .
  with_tests $tests >$installed
fi
