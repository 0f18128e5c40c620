# Sourced by the other scripts: sets strict mode, changes to the project's root, defines shared functions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s\n' "$*"; }
die() { printf '%s\n' "$*" >&2; exit 1; }

# A few processes share the Python tests: each takes up to 2 GB.
PYTEST_WORKERS=(-n auto --maxprocesses=4 --dist=worksteal)

# make_venv FOLDER PYTHON: creates a virtual environment whose pip supports dependency groups.
make_venv() {
  "$2" -m venv --clear "$1"
  "$1/bin/python" -m pip install -q --upgrade "pip>=25.1"
}

# Prints the packages that an environment needs, as pyproject.toml lists them.
dependency_groups() { sed -n '/^\[dependency-groups\]/,/^\[tool/p' pyproject.toml; }

# up_to_date STAMP TEXT: true if the step that wrote STAMP last ran with the same TEXT.
up_to_date() { [ -e "$1" ] && [ "$(cat "$1")" = "$2" ]; }
