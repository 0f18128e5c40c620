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

FUSED_ROPE_HOST_DEVICE int64_t load_index(const void* at, bool is_int64) {
#if defined(__CUDA_ARCH__)
  return load_index_early(at, is_int64).value();
#else
  return is_int64 ? *static_cast<const int64_t*>(at) : *static_cast<const int32_t*>(at);
#endif
}

FUSED_ROPE_HOST_DEVICE int64_t load_index(const IndexParams& index, int64_t i) {
  return load_index(static_cast<const char*>(index.data) + i * size_of(index), index.is_int64);
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

// A sequence of a packed batch and the position of a token in it; padding is in sequence -1.
struct SequencePosition {
  int64_t sequence, position;
};
constexpr SequencePosition kPadding = {-1, 0};

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

// The same for any token, padding too. Without sequences all tokens are padding, wherever the first
// one would start.
FUSED_ROPE_HOST_DEVICE SequencePosition find_sequence(const RowParams& rows, int64_t t) {
  const bool padding = rows.N == 0 || t >= sequence_start(rows, rows.N);
  return padding ? kPadding : locate_token(rows, t);
}

// What a call looks up, as bits of one byte.
enum RowFlags : uint8_t {
  kHasPositions = 1,
  kLongPositions = 2,  // int64
  kHasOffsets = 4,
  kLongOffsets = 8,
  kHasOutRows = 16,
  kLongOutRows = 32,
  kHasSequences = 64,
  kGathered = 128,
};

inline uint8_t row_flags(const RowParams& rows) {
  const auto flags = [](const IndexParams& index, int present, int is_long) {
    return index.data == nullptr ? 0 : present | (index.is_int64 ? is_long : 0);
  };
  return static_cast<uint8_t>(flags(rows.positions, kHasPositions, kLongPositions) |
                              flags(rows.offsets, kHasOffsets, kLongOffsets) |
                              flags(rows.out_rows, kHasOutRows, kLongOutRows) |
                              flags(rows.cu_seqlens, kHasSequences, 0) |
                              (rows.gathered ? kGathered : 0));
}

// The row of a shared table that a token reads, with RowFlags and an offset for all tokens. A Token
// has s(), its index; place(), its sequence and its index there; position(), its entry of
// `positions`; and offset(sequence), that of `offsets`. Each is called only where needed. Gathered
// tables have no row to look up.
template <typename Token>
FUSED_ROPE_HOST_DEVICE Row table_row(int flags, int64_t offset, const Token& token) {
  if (flags & kGathered) return {0, false};
  SequencePosition here = {0, 0};
  if (flags & kHasSequences) {
    here = token.place();
    if (here.sequence < 0) return {0, true};
  }
  if (flags & kHasPositions) {
    here.position = token.position();
    if (here.position == -1) return {0, true};
  } else if (!(flags & kHasSequences)) {
    here.position = token.s();
  }
  int64_t index = add_rows(here.position, offset);
  if (flags & kHasOffsets) index = add_rows(index, token.offset(here.sequence));
  return {index, false};
}

// Token (b, s) and an axis of positions.
struct Token {
  const RowParams& rows;
  int64_t b_index, s_index, axis;

  FUSED_ROPE_HOST_DEVICE int64_t s() const { return s_index; }
  FUSED_ROPE_HOST_DEVICE SequencePosition place() const { return find_sequence(rows, s_index); }
  FUSED_ROPE_HOST_DEVICE int64_t position() const {
    return load_index(rows.positions, axis * rows.positions_a + b_index * rows.positions_b +
                                          s_index * rows.positions_s);
  }
  FUSED_ROPE_HOST_DEVICE int64_t offset(int64_t sequence) const {
    const int64_t i = rows.cu_seqlens.data != nullptr ? sequence : b_index;
    return load_index(rows.offsets, i * rows.offsets_stride);
  }
};

inline Row table_row(const RowParams& rows, int64_t b, int64_t s, int64_t axis = 0) {
  return table_row(row_flags(rows), rows.offset, Token{rows, b, s, axis});
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
