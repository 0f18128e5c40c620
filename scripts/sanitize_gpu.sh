#!/usr/bin/env bash
# Runs every instance of the CUDA kernel under compute-sanitizer: scripts/sanitize_gpu.sh [TOOL...], by default all four
# tools. Prints one line per tool and plan. A fault, or a result that differs from the CPU's, prints the log and fails.
source "$(dirname "$0")/common.sh"
export PATH=$PWD/.venv/bin:$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD/python
export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # otherwise tensors share one block, which hides overruns
command -v compute-sanitizer >/dev/null || die "make sanitize-gpu needs compute-sanitizer: put it on PATH or set CUDA_HOME."

[ $# -gt 0 ] || set -- memcheck initcheck racecheck synccheck
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
for tool in "$@"; do
  options=()
  [ "$tool" != memcheck ] || options=(--padding 4096)  # so that an overrun does not land in the next tensor
  for plan in "" "vector=8 keep=0 threads=256 work=300" "vector=4"; do
    if FUSED_ROPE_PLAN=$plan compute-sanitizer --tool "$tool" "${options[@]}" --error-exitcode 1 \
        python3 tests/python/sanitize.py >"$log" 2>&1; then
      verdict=passed
    else
      verdict=FAILED
      status=1
      cat "$log"
    fi
    printf '%-10s %-6s plan "%s": %s; %s\n' "$tool" $verdict "$plan" \
      "$(grep ' calls, ' "$log" || echo 'calls were not finished')" \
      "$(grep 'SUMMARY' "$log" | sed 's/^=* *//' | paste -sd ' ' || true)"
  done
done
exit $status
