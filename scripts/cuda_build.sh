#!/usr/bin/env bash
# Builds the library with a CUDA torch in a separate environment, .venv-cuda, and tests what another build could break:
# that the CUDA kernels are registered, what the package exports, and its messages. Every file is compiled by itself here,
# so each must include what it uses.
source "$(dirname "$0")/common.sh"
command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] ||
  die "make cuda-build needs nvcc (CUDA 13): put it on PATH or set CUDA_HOME."

stamp=.venv-cuda/bootstrapped
wanted="${PYTHON:-python3} ${CUDA_TORCH:=torch==2.14.1} $(dependency_groups)"
if ! up_to_date $stamp "$wanted"; then
  say "Virtual environment .venv-cuda with $CUDA_TORCH"
  make_venv .venv-cuda "${PYTHON:-python3}"
  .venv-cuda/bin/python -m pip install -q "$CUDA_TORCH"
  .venv-cuda/bin/python -m pip install -q --group dev
  echo "$wanted" >$stamp
fi
export PATH=$PWD/.venv-cuda/bin:$PATH

say "Building for sm_90"
TORCH_CUDA_ARCH_LIST=9.0 FUSED_ROPE_BUILD_DIR=build-cuda \
  CMAKE_ARGS="-DFUSED_ROPE_CUDA=ON -DFUSED_ROPE_WERROR=${CI:+ON} -DFUSED_ROPE_UNITY=OFF" \
  python -m pip install -v --no-deps --no-build-isolation --force-reinstall .

say "Testing"
python - <<'PY'
import fused_rope, torch
for name in ("rotate", "rotate_", "rotate_qk", "rotate_qk_", "norm_rotate_qk", "norm_rotate_qk_backward", "rotate_and_cache"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_rope::{name}", "CUDA"), name
print("CUDA kernels are registered:", fused_rope.__file__, torch.__version__)
PY
python -m pytest -q -m "not slow" "${PYTEST_WORKERS[@]}" tests/python/test_{build,errors,registration}.py
