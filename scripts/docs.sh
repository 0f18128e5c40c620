#!/usr/bin/env bash
# Builds the documentation site into build/docs. A warning is an error.
source "$(dirname "$0")/common.sh"
export PATH=$PWD/.venv/bin:$PATH

stamp=.venv/docs-installed
wanted=$(grep '^docs = ' pyproject.toml)
up_to_date $stamp "$wanted" || {
  python -m pip install -q --group docs
  echo "$wanted" >$stamp
}
sphinx-build --builder html --fail-on-warning --keep-going --jobs auto --doctree-dir build/doctrees docs build/docs
echo "Open build/docs/index.html"
