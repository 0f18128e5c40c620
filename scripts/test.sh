#!/usr/bin/env bash
# Runs all tests: C++ with ctest and Python with pytest. The transformers tests run again with the last 4.x release and
# with the `kernels` package, which is not in .venv because it replaces functions of transformers.
source "$(dirname "$0")/common.sh"
scripts/build.sh
export PATH=$PWD/.venv/bin:$PATH

say "C++ tests"
ctest --test-dir build --output-on-failure

say "Python tests"
python -m pytest -q

older=transformers==4.57.6
say "Python tests with $older"
folder=.venv/transformers-4
[ -e $folder/complete ] || { python -m pip install -q --target $folder $older && touch $folder/complete; }
PYTHONPATH=$PWD/$folder python -m pytest -q tests/python/test_transformers*.py

kernels=kernels==0.16.2
say "Python tests with $kernels"
folder=.venv/kernels
[ -e $folder/complete ] || {
  python -m pip list --format=freeze >.venv/constraints.txt  # dependencies come in the versions of .venv
  python -m pip install -q --target $folder --constraint .venv/constraints.txt $kernels && touch $folder/complete
}
PYTHONPATH=$PWD/$folder python -m pytest -q tests/python/test_use_kernels.py tests/python/test_transformers.py
