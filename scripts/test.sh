#!/usr/bin/env bash
# Runs the tests that are not marked slow: C++ with ctest, Python with pytest. With --slow, runs the others: tests marked
# slow, and the transformers tests again with the last 4.x release and with the `kernels` package, which is not in .venv
# because it replaces functions of transformers.
source "$(dirname "$0")/common.sh"
scripts/build.sh
export PATH=$PWD/.venv/bin:$PATH

python_tests() { python -m pytest -q --durations=10 "${PYTEST_WORKERS[@]}" "$@"; }

if [ "${1:-}" != --slow ]; then
  say "C++ tests"
  ctest --test-dir build --output-on-failure --parallel "$(nproc)" -LE slow
  say "Python tests"
  python_tests -m "not slow"
  exit
fi

say "Slow C++ tests: projects that use the installed library"
ctest --test-dir build --output-on-failure -L slow
say "Slow Python tests"
python_tests -m slow

older=transformers==4.57.6
say "Python tests with $older"
folder=.venv/transformers-4
[ -e $folder/complete ] || { python -m pip install -q --target $folder $older && touch $folder/complete; }
PYTHONPATH=$PWD/$folder python_tests tests/python/test_transformers*.py

kernels=kernels==0.16.2
say "Python tests with $kernels"
folder=.venv/kernels
[ -e $folder/complete ] || {
  python -m pip list --format=freeze >.venv/constraints.txt  # dependencies come in the versions of .venv
  python -m pip install -q --target $folder --constraint .venv/constraints.txt $kernels && touch $folder/complete
}
PYTHONPATH=$PWD/$folder python_tests tests/python/test_use_kernels.py tests/python/test_transformers.py
