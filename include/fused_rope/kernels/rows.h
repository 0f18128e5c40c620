// Which table row a token reads, or none, and which output row it is written to.
#pragma once

#include "fused_rope/kernels/params.h"
#if defined(__CUDACC__)
#include "fused_rope/kernels/cuda/memory.cuh"
#endif

namespace fused_rope::kernels {

// The table row of a token; a `copied` token is not rotated. The index may be out of range:
// check it with is_row.
struct Row {
  int64_t index;
  bool copied;
};

FUSED_ROPE_HOST_DEVICE bool is_row(int64_t index, int64_t rows) {
  return index >= 0 && index < rows;
}

// On the device it stays in L2: every thread waits for it, and the next layer reads it again.
FUSED_ROPE_HOST_DEVICE int64_t load_index(const IndexParams& index, int64_t i) {
  const char* at = static_cast<const char*>(index.data) + i * size_of(index);
#if defined(__CUDA_ARCH__)
  return index.is_int64 ? load_kept<int64_t>(at) : load_kept<int32_t>(at);
#else
  return index.is_int64 ? *reinterpret_cast<const int64_t*>(at)
                        : *reinterpret_cast<const int32_t*>(at);
#endif
}

// A saturating sum: a position and an offset must not wrap around to a valid row.
FUSED_ROPE_HOST_DEVICE int64_t add_rows(int64_t x, int64_t y) {
  const auto sum = static_cast<int64_t>(static_cast<uint64_t>(x) + static_cast<uint64_t>(y));
  const bool overflowed = ((x ^ sum) & (y ^ sum)) < 0;
  return overflowed ? (x < 0 ? INT64_MIN : INT64_MAX) : sum;
}

FUSED_ROPE_HOST_DEVICE int64_t sequence_start(const RowParams& rows, int64_t n) {
  return load_index(rows.cu_seqlens, n * rows.cu_seqlens_stride);
}

// A sequence of a packed batch and the position of a token in it.
struct SequencePosition {
  int64_t sequence, position;
};

// Finds the last sequence that starts at or before token t, which is never an empty one.
FUSED_ROPE_HOST_DEVICE SequencePosition locate_token(const RowParams& rows, int64_t t) {
  SequencePosition found = {0, t - sequence_start(rows, 0)};
  int64_t end = rows.N;
  while (end - found.sequence > 1) {
    const int64_t middle = found.sequence + ((end - found.sequence) >> 1);
    const int64_t position = t - sequence_start(rows, middle);
    if (position >= 0) {
      found = {middle, position};
    } else {
      end = middle;
    }
  }
  return found;
}

// The row of a shared table that a token reads. A Token has b(), s() and position(), its entry of
// `positions`; each is called only where needed. Gathered tables have no row to look up.
// Consume each load in its own basic block; otherwise ptxas shares its scoreboard with the loads of
// x, and the row waits for them.
template <typename Token>
FUSED_ROPE_HOST_DEVICE Row table_row(const RowParams& rows, const Token& token) {
  if (rows.gathered) return {0, false};
  const bool packed = rows.cu_seqlens.data != nullptr;
  SequencePosition here = {0, 0};
  if (packed) {
    const int64_t s = token.s();
    if (rows.N == 0 || s >= sequence_start(rows, rows.N)) return {0, true};
    here = locate_token(rows, s);
  }
  if (rows.positions.data != nullptr) {
    here.position = token.position();
    if (here.position == -1) return {0, true};
  } else if (!packed) {
    here.position = token.s();
  }
  int64_t index = add_rows(here.position, rows.offset);
  if (rows.offsets.data != nullptr) {
    const int64_t sequence = packed ? here.sequence : token.b();
    index = add_rows(index, load_index(rows.offsets, sequence * rows.offsets_stride));
  }
  return {index, false};
}

// Token (b, s) and an axis of positions.
struct Token {
  const RowParams& rows;
  int64_t b_index, s_index, axis;

  FUSED_ROPE_HOST_DEVICE int64_t b() const { return b_index; }
  FUSED_ROPE_HOST_DEVICE int64_t s() const { return s_index; }
  FUSED_ROPE_HOST_DEVICE int64_t position() const {
    return load_index(rows.positions, axis * rows.positions_a + b_index * rows.positions_b +
                                          s_index * rows.positions_s);
  }
};

FUSED_ROPE_HOST_DEVICE Row table_row(const RowParams& rows, int64_t b, int64_t s,
                                     int64_t axis = 0) {
  return table_row(rows, Token{rows, b, s, axis});
}

// The row of a scattered output that token (b, s) is written to, or -1 for none.
FUSED_ROPE_HOST_DEVICE int64_t output_row(const RowParams& rows, int64_t b, int64_t s) {
  return load_index(rows.out_rows, b * rows.out_rows_b + s * rows.out_rows_s);
}

// Offset in entries of pair 0 in row m of the table of (b, s, h).
FUSED_ROPE_HOST_DEVICE int64_t table_offset(const TableParams& table, int64_t m, int64_t b,
                                            int64_t s, int64_t h) {
  return m * table.m + b * table.b + s * table.s + h * table.h;
}

}  // namespace fused_rope::kernels
