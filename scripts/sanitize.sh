#!/usr/bin/env bash
# The CPU's C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer.
source "$(dirname "$0")/common.sh"
export PATH=$PWD/.venv/bin:$PATH

cmake -S . -B build-sanitize -G Ninja -DPython_EXECUTABLE="$PWD/.venv/bin/python" \
  -DFUSED_ROPE_SANITIZE=ON -DFUSED_ROPE_TESTS=ON -DFUSED_ROPE_CUDA=OFF
cmake --build build-sanitize
ctest --test-dir build-sanitize --output-on-failure
