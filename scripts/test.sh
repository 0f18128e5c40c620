#!/usr/bin/env bash
# Every test: C++ by ctest, Python by pytest, and those of transformers once more with its last release 4 and with the
# `kernels` package, which is no part of .venv: it changes what transformers' functions are.
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
  python -m pip list --format=freeze >.venv/constraints.txt  # what it needs too comes in the versions of .venv
  python -m pip install -q --target $folder --constraint .venv/constraints.txt $kernels && touch $folder/complete
}
PYTHONPATH=$PWD/$folder python -m pytest -q tests/python/test_use_kernels.py tests/python/test_transformers.py
