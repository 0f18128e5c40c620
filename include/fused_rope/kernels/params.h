// RotateParams: one call as plain data. The border between PyTorch and the kernels; strides in
// elements.
#pragma once

#include "fused_rope/kernels/lanes.h"
#include "fused_rope/kernels/rotation.h"

namespace fused_rope {

constexpr int kMaxTensors = 2;       // q and k
constexpr int kMaxAxes = 8;          // of M-RoPE positions
constexpr int kMaxAxisPairs = 1024;  // P, where each pair names an axis

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
// tables; strides of absent dimensions are 0.
struct TableParams {
  const void* data;
  int64_t m, b, s, h, j;
};

// Integers in memory, int32 or int64; data is null when the argument is absent.
struct IndexParams {
  const void* data;
  bool is_int64;
};

FUSED_ROPE_HOST_DEVICE int size_of(const IndexParams& index) { return index.is_int64 ? 8 : 4; }

// Which row of a shared table a token reads, and which row of a scattered output it is written to.
struct RowParams {
  IndexParams positions;  // [A, B, S]; absent: the token's index in its sequence
  int64_t positions_a, positions_b, positions_s;
  IndexParams offsets;  // [B], or [N] beside cu_seqlens
  int64_t offsets_stride;
  IndexParams cu_seqlens;  // [N + 1]
  int64_t cu_seqlens_stride;
  int64_t N;
  int64_t offset;
  int64_t M;             // rows of a shared table
  bool gathered;         // per-token and per-head tables: nothing to look up
  IndexParams out_rows;  // [B, S]
  int64_t out_rows_b, out_rows_s;
  int64_t out_rows_limit;  // rows of the scattered output
};

struct RotateParams {
  int64_t B, S, D;
  int count;  // tensors: 1 for rotate, 2 for rotate_qk
  TensorParams tensors[kMaxTensors];
  Lanes lanes;
  TableParams cos, sin;
  RowParams rows;
  const int64_t* axes;  // [P] on the host, the axis of each pair's position; null without M-RoPE
  DType dtype, table_dtype;
  Precision precision;
  bool inverse;
  bool in_place;
  bool per_head;  // the table differs between heads
};

}  // namespace fused_rope
