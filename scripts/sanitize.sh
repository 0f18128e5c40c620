#!/usr/bin/env bash
# Runs the C++ tests on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer, and the tests that share modules
# between threads under ThreadSanitizer.
source "$(dirname "$0")/common.sh"
export PATH=$PWD/.venv/bin:$PATH

# build FOLDER SANITIZE TARGET
build() {
  cmake -S . -B "$1" -G Ninja -DPython_EXECUTABLE="$PWD/.venv/bin/python" \
    -DFUSED_ROPE_SANITIZE="$2" -DFUSED_ROPE_TESTS=ON -DFUSED_ROPE_CUDA=OFF
  cmake --build "$1" --target "$3"
}
build build-sanitize ON all
ctest --test-dir build-sanitize --output-on-failure --parallel "$(nproc)"
build build-sanitize-thread thread fused_rope_thread_tests
ctest --test-dir build-sanitize-thread --output-on-failure -R '^threads$'
