#include "ops/token_rows.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

namespace fused_rope {
namespace {

// Terms are clamped to [-kMaxTerm, kMaxTerm) so that a sum of two does not overflow into a row.
constexpr int64_t kMaxTerm = int64_t{1} << 62;

at::Tensor clamp_term(const at::Tensor& term) {
  return term.to(at::kLong).clamp(-kMaxTerm, kMaxTerm - 1);
}

}  // namespace

at::Tensor token_rows(const Arguments& a, const c10::SymInt& S, at::Device device) {
  at::Tensor rows = at::arange(c10::Scalar(S), at::TensorOptions(device).dtype(at::kLong));  // [S]
  at::Tensor skipped, offsets;
  if (a.offsets.has_value()) offsets = clamp_term(*a.offsets).unsqueeze(1);  // [B, 1]
  if (a.cu_seqlens.has_value()) {
    const at::Tensor starts = a.cu_seqlens->to(at::kLong);
    const c10::SymInt N = starts.sym_size(0) - 1;
    // Counting the ends at or before a token skips empty sequences; padding counts all N.
    const at::Tensor sequence =
        at::searchsorted(starts.slice(0, 1), rows, /*out_int32=*/false, /*right=*/true);
    skipped = sequence >= c10::Scalar(N);
    rows = rows - starts.index_select(0, sequence);
    if (offsets.defined()) {
      const at::Tensor of_padding = at::zeros({1}, rows.options());
      offsets = at::cat({offsets.squeeze(1), of_padding}).index_select(0, sequence);
    }
  }
  rows = rows.unsqueeze(0);
  if (a.positions.has_value()) {
    const at::Tensor& positions = *a.positions;
    const bool batched = positions.dim() == leading_dims(a) + 2;
    rows = clamp_term(batched ? positions : positions.unsqueeze(-2));
    const at::Tensor marked = rows == -1;
    skipped = skipped.defined() ? skipped.logical_or(marked) : marked;
  }
  rows = rows + std::clamp<c10::SymInt>(a.offset, -kMaxTerm, kMaxTerm - 1);
  if (offsets.defined()) rows = rows + offsets;
  rows = rows.masked_fill(rows == -1, -2);
  return skipped.defined() ? rows.masked_fill(skipped, -1) : rows;
}

at::Tensor token_rows_by_pair(const Arguments& a, const c10::SymInt& S, at::Device device) {
  const at::Tensor rows = token_rows(a, S, device);
  if (!a.axes.has_value()) return rows.unsqueeze(-1);
  if (a.axes->empty()) return rows.select(0, 0).unsqueeze(-1).slice(-1, 0, 0);
  // A stack of views instead of an index on the device, which would need a copy from the host.
  const std::vector<at::Tensor> by_axis = rows.unbind(0);
  std::vector<at::Tensor> by_pair;
  by_pair.reserve(a.axes->size());
  for (const int64_t axis : *a.axes) by_pair.push_back(by_axis[axis]);
  return at::stack(by_pair, -1);
}

}  // namespace fused_rope
