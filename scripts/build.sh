#!/usr/bin/env bash
# Installs the package into .venv in editable mode and builds the C++ tests in build/. Later runs build incrementally.
source "$(dirname "$0")/common.sh"
scripts/bootstrap.sh
export PATH=$PWD/.venv/bin:$PATH

options="-DFUSED_ROPE_TESTS=ON -DFUSED_ROPE_WERROR=${CI:+ON}"
installed=.venv/installed
wanted="$PWD $options $(cat setup.py pyproject.toml | cksum)"
if up_to_date $installed "$wanted" && [ -e build/CMakeCache.txt ]; then
  cmake --build build
else
  say "Building"
  CMAKE_ARGS=$options python -m pip install -v --no-deps --no-build-isolation -e .
  echo "$wanted" >$installed
fi
