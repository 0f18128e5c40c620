// The CPU backend: rows are checked before anything is written, tokens are spread over threads.
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include "fused_rope/kernels/cpu.h"
#include "ops/forms.h"

namespace fused_rope {
namespace {

void check_rows(const Call& call, const RotateParams& p, int64_t begin, int64_t end) {
  const std::optional<BadRow> bad = find_bad_row(p, begin, end);
  if (!bad.has_value()) return;
  TORCH_CHECK_INDEX(!bad->output, call.op, ": expected out_rows in [-1, ", p.rows.out_rows_limit,
                    "), got ", bad->index, " at b=", bad->b, ", s=", bad->s);
  TORCH_CHECK_INDEX(false, call.op, ": expected positions (offset included) in [0, M=", p.rows.M,
                    "), got ", bad->index, " at b=", bad->b, ", s=", bad->s);
}

// What PyTorch's own kernels take on this machine, so that ATEN_CPU_CAPABILITY holds for ours too.
Isa isa_of_torch() {
  const std::string capability = at::get_cpu_capability();
  const Isa isa = capability.starts_with("AVX512") ? Isa::kAvx512
                  : capability.starts_with("AVX2") ? Isa::kAvx2
                                                   : Isa::kBaseline;
  return has(isa) ? isa : Isa::kBaseline;
}

void launch_rotate(const Call& call, const RotateParams& p) {
  const int64_t tokens = p.B * p.S;
  const int64_t lanes = p.D * (p.tensors[0].H + (p.count > 1 ? p.tensors[1].H : 0));
  if (tokens == 0 || lanes == 0) return;
  constexpr int64_t kGrainLanes = 32768;
  const int64_t grain = std::max<int64_t>(1, kGrainLanes / lanes);
  const bool rows_in_memory = p.rows.positions.data != nullptr || p.rows.offsets.data != nullptr ||
                              p.rows.cu_seqlens.data != nullptr || p.rows.out_rows.data != nullptr;
  if (rows_in_memory) {
    at::parallel_for(0, tokens, kGrainLanes,
                     [&](int64_t begin, int64_t end) { check_rows(call, p, begin, end); });
  }
  static const Isa isa = isa_of_torch();
  at::parallel_for(0, tokens, grain,
                   [&](int64_t begin, int64_t end) { rotate_tokens(p, begin, end, isa); });
}

struct CpuBackend {
  using Guard = NoGuard;

  static at::Tensor empty(const at::Tensor& x) {
    return allocate_output(x, c10::DispatchKey::CPU, c10::GetAllocator(c10::kCPU));
  }

  static void launch(const Call& call, const RotateParams& params) { launch_rotate(call, params); }
};

}  // namespace

TORCH_LIBRARY_IMPL(fused_rope, CPU, m) { Forms<CpuBackend>::register_in(m); }

}  // namespace fused_rope
