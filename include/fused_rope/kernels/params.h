// RotateParams: one call as plain data, the interface between PyTorch and the kernels. Strides are
// in elements.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "fused_rope/kernels/pairing.h"
#include "fused_rope/types.h"

namespace fused_rope::kernels {

constexpr int kMaxTensors = 2;       // q and k
constexpr int kMaxAxes = 8;          // of M-RoPE positions
constexpr int kMaxAxisPairs = 1024;  // P, where each pair names an axis

constexpr int64_t ceil_divide(int64_t n, int64_t by) { return (n + by - 1) / by; }

struct Strides {
  int64_t b, s, h, d;
};

// One tensor to rotate, [B, S, H, D] in any memory order ("thd": B = 1, S = T).
struct TensorParams {
  const void* in;
  void* out;  // equal to `in` when in place
  Strides in_strides;
  Strides out_strides;  // when scattered, .s is the stride of a row of `out` [rows, H, D]
  int64_t H;
  bool scattered;  // token (b, s) is written to row out_rows[b, s]
};

// cos or sin: entry (m, b, s, h, j) of shared [M, P], per-token [B, S, P] or per-head [B, S, H, P]
// tables. The strides of absent dimensions are 0.
struct TableParams {
  const void* data;
  int64_t m, b, s, h, j;
};

// An int32 or int64 tensor; data is null when the argument is absent.
struct IndexParams {
  const void* data;
  bool is_int64;
};

FUSED_ROPE_HOST_DEVICE int size_of(const IndexParams& index) { return index.is_int64 ? 8 : 4; }

// Which row of a shared table a token reads, and which row of a scattered output it is written to.
struct RowParams {
  IndexParams positions;  // [A, B, S]; absent: the token's index in its sequence
  int64_t positions_a, positions_b, positions_s;
  IndexParams offsets;  // [B], or [N] with cu_seqlens
  int64_t offsets_stride;
  IndexParams cu_seqlens;  // [N + 1]
  int64_t cu_seqlens_stride;
  int64_t N;
  int64_t offset;
  int64_t M;             // rows of a shared table
  bool gathered;         // per-token and per-head tables: no row to look up
  IndexParams out_rows;  // [B, S]
  int64_t out_rows_b, out_rows_s;
  int64_t out_rows_limit;  // rows of the scattered output
};

// The weight of a norm, [D].
struct WeightParams {
  const void* data;  // null: without a weight
  int64_t stride;
  DType dtype;  // x's, or float32
};

// RMS norm over the D elements of each head, before the rotation or after it.
struct NormParams {
  WeightParams weights[kMaxTensors];
  double eps;
  bool zero_centered;  // multiplies by 1 + weight
  Cast cast;
  bool after;  // the rotation
};

struct RotateParams {
  int64_t B, S, D;
  int count;  // tensors: 1 for rotate, 2 for rotate_qk
  TensorParams tensors[kMaxTensors];
  Pairing pairing;
  TableParams cos, sin;
  RowParams rows;
  const int64_t* axes;  // [P] on the host, the axis of each pair's position; null without M-RoPE
  DType dtype, table_dtype;  // a table has x's dtype, or the one that x is rotated in
  Precision precision;
  bool inverse;
  bool in_place;
  bool per_head;           // the table differs between heads
  const NormParams* norm;  // null without a norm
};

inline int64_t total_heads(const RotateParams& p) {
  return p.tensors[0].H + (p.count > 1 ? p.tensors[1].H : 0);
}

// Whether device memory says which row of the table, or of the output, belongs to a token.
inline bool has_lookups(const RowParams& rows) {
  return rows.positions.data != nullptr || rows.offsets.data != nullptr ||
         rows.cu_seqlens.data != nullptr || rows.out_rows.data != nullptr;
}

// Axes of positions: 1 without M-RoPE.
inline uint32_t count_axes(const RotateParams& p) {
  int64_t last = 0;
  for (int64_t j = 0; p.axes != nullptr && j < p.pairing.P; ++j) last = std::max(last, p.axes[j]);
  return static_cast<uint32_t>(last) + 1;
}

// The dimensions that number the heads of a tensor.
enum Axis { kBatch, kSequence, kHead };

// Input strides, by Axis.
inline std::array<int64_t, 3> in_strides_of(const TensorParams& t) {
  return {t.in_strides.b, t.in_strides.s, t.in_strides.h};
}

// The axes of a tensor from the smallest stride to the largest: in this order neighboring threads
// access neighboring memory.
inline std::array<Axis, 3> memory_order(const RotateParams& p, const TensorParams& t) {
  const std::array<int64_t, 3> sizes = {p.B, p.S, t.H};
  const std::array<int64_t, 3> strides = in_strides_of(t);
  const auto stride = [&](Axis axis) { return sizes[axis] <= 1 ? INT64_MAX : strides[axis]; };
  std::array<Axis, 3> order = {kHead, kSequence, kBatch};
  for (const int i : {0, 1, 0}) {  // a stable sort of three
    if (stride(order[i + 1]) < stride(order[i])) std::swap(order[i], order[i + 1]);
  }
  return order;
}

// What the backward of one tensor reads and writes, apart from x.
struct GradientParams {
  const void* gradient;  // of the output, [B, S, H, D]; null: the tensor is skipped
  Strides strides;
  void* weight_gradient;  // [D] contiguous, of the weight's dtype (x's without a weight), or null
  void* workspace;        // workspace_bytes() of weight_gradients.h, aligned to 16 bytes, or null
};

// The backward of a call with a norm.
struct NormBackwardParams {
  // The forward call, out of place: tensors[i].in is x, and tensors[i].out receives its gradient,
  // or is null.
  RotateParams call;
  GradientParams tensors[kMaxTensors];
};

}  // namespace fused_rope::kernels
