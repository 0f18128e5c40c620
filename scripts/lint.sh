#!/usr/bin/env bash
# Checks the style of C++, CUDA and Python, the words of all files, the types of the package, and the workflows; --fix
# reformats.
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
python scripts/words.py
python -m mypy
scripts/workflows.sh
