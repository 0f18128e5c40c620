// What a caller may pass, and what is said when it does not fit. Written once for all devices;
// nothing is touched before.
#pragma once

#include <array>

#include "fused_rope/kernels/params.h"
#include "fused_rope/ops.h"
#include "ops/arguments.h"

namespace fused_rope {

// ValueError naming `op` for a word that is none of the names.
Layout parse_layout(const char* op, std::string_view layout);
Precision parse_precision(const char* op, std::string_view precision);
TableLayout parse_table_layout(const char* op, std::string_view table_layout);

std::string_view name_of(Layout layout);
std::string_view name_of(Precision precision);
std::string_view name_of(TableLayout table_layout);

// P of a table with so many columns. Int is int64_t or SymInt.
template <typename Int>
Int pairs_of(TableLayout table_layout, const Int& columns) {
  return table_layout == TableLayout::kHalf ? columns : columns / 2;
}

// One call of an operator: x, or q and k, with what they are rotated by.
struct Call {
  const char* op;
  std::array<const at::Tensor*, kernels::kMaxTensors> inputs;  // the second is null for rotate
  const at::Tensor& cos;
  const at::Tensor& sin;
  const Arguments& arguments;
  Layout layout = parse_layout(op, arguments.layout);
  Precision precision = parse_precision(op, arguments.precision);
  TableLayout table_layout = parse_table_layout(op, arguments.table_layout);

  int64_t P() const { return pairs_of(table_layout, cos.sizes().back()); }
  int count() const { return inputs[1] == nullptr ? 1 : 2; }
  const char* name(int i) const { return count() == 1 ? "x" : i == 0 ? "q" : "k"; }
  const char* out_name(int i) const { return count() == 1 ? "out" : i == 0 ? "q_out" : "k_out"; }
};

// What to do with a nested tensor, for messages.
inline constexpr char kNestedAdvice[] =
    "got a nested tensor: pass the values() of a jagged one with layout=\"thd\" and its offsets() "
    "as "
    "cu_seqlens";

// As many tensors as a call has inputs.
using Outputs = std::array<const at::Tensor*, kernels::kMaxTensors>;

// Sizes and strides by letter; packed layouts have B = 1 and S = T.
struct Extents {
  int64_t B, S, H, D;
  kernels::Strides strides;
};

Extents extents(const at::Tensor& x, Layout layout);

// Dtypes, ranks, devices and options: all that is known of meta tensors.
void check_metadata(const Call& call);

// Sizes against each other, and rows that are known on the host. check_metadata must have passed.
void check_sizes(const Call& call);

// In place: tensors whose elements share memory, and inference tensors outside inference mode.
void check_in_place(const Call& call);

// The given outputs: dtypes, devices and ranks; then shapes, out_rows and provable overlap.
void check_out_metadata(const Call& call, const Outputs& outputs);
void check_out(const Call& call, const Outputs& outputs);

}  // namespace fused_rope
