// The CPU backend: checks all rows before any write, then distributes tokens over threads.
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include "fused_rope/kernels/cpu/kernel.h"
#include "ops/forms.h"

namespace fused_rope {
namespace {

void check_rows(const Call& call, const kernels::RotateParams& p, int64_t begin, int64_t end) {
  const std::optional<kernels::BadRow> bad = kernels::find_bad_row(p, begin, end);
  if (!bad.has_value()) return;
  TORCH_CHECK_INDEX(!bad->output, call.op, ": expected ", call.cache ? "slots" : "out_rows",
                    " in [-1, ", p.rows.out_rows_limit, "), got ", bad->index, " at b=", bad->b,
                    ", s=", bad->s);
  TORCH_CHECK_INDEX(false, call.op, ": expected positions (offset included) in [0, M=", p.rows.M,
                    "), got ", bad->index, " at b=", bad->b, ", s=", bad->s);
}

// The instruction set of PyTorch's own kernels, so that ATEN_CPU_CAPABILITY applies here too.
kernels::Isa isa_of_torch() {
  using kernels::Isa;
  const std::string capability = at::get_cpu_capability();
  const Isa isa = capability.starts_with("AVX512") ? Isa::kAvx512
                  : capability.starts_with("AVX2") ? Isa::kAvx2
                                                   : Isa::kBaseline;
  return kernels::has(isa) ? isa : Isa::kBaseline;
}

// at::internal::GRAIN_SIZE: less work per thread does not pay.
constexpr int64_t kGrain = 32768;

void check_rows(const Call& call, const kernels::RotateParams& p) {
  if (!kernels::has_lookups(p.rows)) return;
  at::parallel_for(0, p.B * p.S, kGrain,
                   [&](int64_t begin, int64_t end) { check_rows(call, p, begin, end); });
}

void launch_rotate(const Call& call, const kernels::RotateParams& p) {
  const int64_t tokens = p.B * p.S;
  int64_t elements = p.D * kernels::total_heads(p);  // of a token
  if (p.cache != nullptr) elements += p.cache->values_D * p.cache->values.H;
  if (tokens == 0 || elements == 0) return;
  check_rows(call, p);
  const int64_t grain = std::max<int64_t>(1, kGrain / elements);
  static const kernels::Isa isa = isa_of_torch();
  at::parallel_for(0, tokens, grain,
                   [&](int64_t begin, int64_t end) { kernels::rotate_tokens(p, begin, end, isa); });
}

void launch_norm_backward(const Call& call, const kernels::NormBackwardParams& p) {
  check_rows(call, p.call);
  static const kernels::Isa isa = isa_of_torch();
  at::parallel_for(0, kernels::backward_leaves(p), 1,
                   [&](int64_t begin, int64_t end) { kernels::norm_backward(p, begin, end, isa); });
  kernels::sum_weight_gradients(p);
}

struct CpuBackend {
  using Guard = NoGuard;

  static at::Tensor empty(const at::Tensor& x) {
    return allocate_output(x, c10::DispatchKey::CPU, c10::GetAllocator(c10::kCPU));
  }

  static void launch(const Call& call, const kernels::RotateParams& params) {
    launch_rotate(call, params);
  }

  static void launch_backward(const Call& call, const kernels::NormBackwardParams& params) {
    launch_norm_backward(call, params);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fused_rope, CPU, m) { Forms<DeviceLayer<CpuBackend>>::register_all(m); }

}  // namespace fused_rope
