# Sourced by the scripts beside it: strict mode, the project's root, and what two of them need.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s\n' "$*"; }
die() { printf '%s\n' "$*" >&2; exit 1; }

# make_venv FOLDER PYTHON: a virtual environment with a pip that knows dependency groups.
make_venv() {
  "$2" -m venv --clear "$1"
  "$1/bin/python" -m pip install -q --upgrade "pip>=25.1"
}

# The packages that an environment needs, as pyproject.toml lists them.
dependency_groups() { sed -n '/^\[dependency-groups\]/,/^\[tool/p' pyproject.toml; }

# up_to_date STAMP TEXT: whether the step that wrote STAMP last did so for the same TEXT.
up_to_date() { [ -e "$1" ] && [ "$(cat "$1")" = "$2" ]; }
