// cos_sin_table: built on the host, so that tables are bitwise identical on every device, and
// copied without synchronizing.
#include "ops/table.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <cmath>

#include "fused_rope/ops.h"
#include "ops/checks.h"

namespace fused_rope {
namespace {

struct Angle {
  double cos, sin;
};

// cos and sin of m * f. The product's rounding error e, worth 200 float32 ulp at m = 2^31, is
// corrected to first order.
Angle angle_of(double m, double f) {
  const double p = m * f;
  const double e = std::fma(m, f, -p);
  const double c = std::cos(p);
  const double s = std::sin(p);
  return {c - e * s, s + e * c};
}

void check_table(const at::Tensor& inv_freq, int64_t rows, int64_t first, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(at::isFloatingType(inv_freq.scalar_type()),
                   "cos_sin_table: expected inv_freq of a floating dtype, got ",
                   dtype_name(inv_freq.scalar_type()));
  TORCH_CHECK_TYPE(is_supported(dtype), "cos_sin_table: expected dtype ", kFloatingDtypes, ", got ",
                   dtype_name(dtype));
  TORCH_CHECK_VALUE(inv_freq.dim() == 1, "cos_sin_table: expected inv_freq of shape [P], got ",
                    inv_freq.sym_sizes());
  TORCH_CHECK_VALUE(rows >= 0, "cos_sin_table: expected rows >= 0, got ", rows);
  TORCH_CHECK_VALUE(first >= 0 && first <= kMaxTableRows - rows,
                    "cos_sin_table: expected first >= 0 and first + rows <= ", kMaxTableRows,
                    ", got first=", first, ", rows=", rows);
}

TensorPair empty_tables(int64_t rows, int64_t P, const at::TensorOptions& options) {
  return {at::empty({rows, P}, options), at::empty({rows, P}, options)};
}

TensorPair build(const at::Tensor& inv_freq, c10::SymInt sym_rows, c10::SymInt sym_first,
                 double scale, at::ScalarType dtype, std::optional<at::Device> device) {
  const int64_t rows = sym_rows.guard_int(__FILE__, __LINE__);
  const int64_t first = sym_first.guard_int(__FILE__, __LINE__);
  check_table(inv_freq, rows, first, dtype);
  // Autograd cannot save inference tensors, so make normal ones in inference mode too.
  const c10::InferenceMode no_inference_tensors(false);
  const at::Tensor frequencies = inv_freq.detach().to(at::kCPU, at::kDouble).contiguous();
  const int64_t P = frequencies.size(0);
  const auto [cos, sin] = empty_tables(rows, P, at::TensorOptions(at::kCPU).dtype(at::kDouble));
  const double* f = frequencies.const_data_ptr<double>();
  double* c = cos.mutable_data_ptr<double>();
  double* s = sin.mutable_data_ptr<double>();
  constexpr int64_t kGrain = 1024;  // less work per thread does not pay
  at::parallel_for(0, rows * P, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Angle angle = angle_of(static_cast<double>(first + i / P), f[i % P]);
      c[i] = angle.cos * scale;
      s[i] = angle.sin * scale;
    }
  });
  const at::Device target = device.value_or(inv_freq.device());
  return {to_device(cos.to(dtype), target), to_device(sin.to(dtype), target)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_rope, CompositeExplicitAutograd, m) {
  m.impl("cos_sin_table", TORCH_FN(build));
}

at::Tensor to_device(const at::Tensor& host, at::Device device) {
  // From pageable memory even a non-blocking copy synchronizes with the stream.
  return (device.is_cuda() ? host.pin_memory() : host).to(device, /*non_blocking=*/true);
}

TensorPair cos_sin_table(const at::Tensor& inv_freq, int64_t rows, int64_t first, double scale,
                         at::ScalarType dtype, std::optional<at::Device> device) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("fused_rope::cos_sin_table", "")
                                 .typed<decltype(build)>();
  return handle.call(inv_freq, rows, first, scale, dtype, device);
}

}  // namespace fused_rope
