#!/usr/bin/env bash
# Checks the style of C++, CUDA and Python, and the types of the package; with --fix mends what can be mended.
source "$(dirname "$0")/common.sh"
export PATH=$PWD/.venv/bin:$PATH

mapfile -t sources < <(find include csrc tests examples benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
if [ "${1:-}" = --fix ]; then
  clang-format -i "${sources[@]}"
  ruff check --fix .
  ruff format .
else
  clang-format --dry-run --Werror "${sources[@]}"
  ruff check .
  ruff format --check .
fi
python -m mypy
