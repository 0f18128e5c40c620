#!/usr/bin/env bash
# Creates .venv: installs a compiler from Debian if there is none, uses the torch of $PYTHON if it has one (its environment
# is not modified), else installs $TORCH, and installs a group of pyproject.toml: `dev`, which also needs GoogleTest, or
# `demo`.
source "$(dirname "$0")/common.sh"

python=$(command -v "${PYTHON:-python3}") || die "There is no ${PYTHON:-python3}: install Python 3.10 or later, or set PYTHON=."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$python is older than 3.10: set PYTHON= to another."
torch=${TORCH:-torch==2.13.0}
wanted="$python $torch $(dependency_groups)"
group=${1:-dev}
for complete in dev "$group"; do
  up_to_date .venv/bootstrapped-$complete "$wanted" && exit 0
done

missing=()
command -v c++ >/dev/null || missing+=(g++)
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
[ -e "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || missing+=(python3-dev)
[ "$group" = demo ] || [ -e /usr/include/gtest/gtest.h ] || missing+=(libgtest-dev)
if [ ${#missing[@]} -gt 0 ]; then
  say "Installing ${missing[*]}"
  [ "$(id -u)" = 0 ] && sudo= || sudo="sudo -n"
  export DEBIAN_FRONTEND=noninteractive
  { $sudo apt-get update -q && $sudo apt-get install -q -y --no-install-recommends "${missing[@]}"; } ||
    die "These Debian packages are missing and could not be installed; install them or their equivalents: ${missing[*]}"
fi

if ! up_to_date .venv/bootstrapped-demo "$wanted"; then
  say "Creating .venv for $python"
  make_venv .venv "$python"
  if "$python" -c 'import torch' 2>/dev/null; then
    site_packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' >"$site_packages/outer.pth"
  else
    .venv/bin/python -m pip install "$torch"
  fi
  .venv/bin/python -m pip install --ignore-installed --group tools
fi
.venv/bin/python -m pip install --group "$group"
.venv/bin/python -c 'import torch; print("torch", torch.__version__)'
echo "$wanted" | tee .venv/bootstrapped-demo >".venv/bootstrapped-$group"
