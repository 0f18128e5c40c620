// Which table row a token reads, if any, and which output row it is written to.
#pragma once

#include "fused_rope/kernels/params.h"

namespace fused_rope {

// What a token reads or writes: nothing is rotated where `copied`; `index` is not yet known to be
// in range.
struct Row {
  int64_t index;
  bool copied;
};

FUSED_ROPE_HOST_DEVICE bool is_row(int64_t index, int64_t rows) {
  return index >= 0 && index < rows;
}

FUSED_ROPE_HOST_DEVICE int64_t load_index(const IndexParams& index, int64_t i) {
  return index.is_int64 ? static_cast<const int64_t*>(index.data)[i]
                        : static_cast<const int32_t*>(index.data)[i];
}

// A sum that saturates: absurd terms must not wrap around to a row.
FUSED_ROPE_HOST_DEVICE int64_t add_rows(int64_t x, int64_t y) {
  const auto sum = static_cast<int64_t>(static_cast<uint64_t>(x) + static_cast<uint64_t>(y));
  const bool overflowed = ((x ^ sum) & (y ^ sum)) < 0;
  return overflowed ? (x < 0 ? INT64_MIN : INT64_MAX) : sum;
}

FUSED_ROPE_HOST_DEVICE int64_t sequence_start(const RowParams& rows, int64_t n) {
  return load_index(rows.cu_seqlens, n * rows.cu_seqlens_stride);
}

// The last sequence that starts at or before token t; empty ones before it are passed over.
FUSED_ROPE_HOST_DEVICE int64_t sequence_of(const RowParams& rows, int64_t t) {
  int64_t low = 0;
  int64_t high = rows.N;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (sequence_start(rows, middle) <= t ? low : high) = middle;
  }
  return low;
}

// The row of a shared table that token (b, s) reads for pairs of `axis`. Gathered tables have
// nothing to look up.
FUSED_ROPE_HOST_DEVICE Row table_row(const RowParams& rows, int64_t b, int64_t s,
                                     int64_t axis = 0) {
  if (rows.gathered) return {0, false};
  int64_t position = s;
  int64_t sequence = b;
  if (rows.cu_seqlens.data != nullptr) {
    if (rows.N == 0 || s >= sequence_start(rows, rows.N)) return {0, true};
    sequence = sequence_of(rows, s);
    position = s - sequence_start(rows, sequence);
  }
  if (rows.positions.data != nullptr) {
    position = load_index(rows.positions,
                          axis * rows.positions_a + b * rows.positions_b + s * rows.positions_s);
    if (position == -1) return {0, true};
  }
  int64_t index = add_rows(position, rows.offset);
  if (rows.offsets.data != nullptr) {
    index = add_rows(index, load_index(rows.offsets, sequence * rows.offsets_stride));
  }
  return {index, false};
}

// The row of a scattered output that token (b, s) is written to; -1 means nowhere.
FUSED_ROPE_HOST_DEVICE int64_t output_row(const RowParams& rows, int64_t b, int64_t s) {
  return load_index(rows.out_rows, b * rows.out_rows_b + s * rows.out_rows_s);
}

// Offset, in entries, of pair 0 of the table row that (m, b, s, h) selects.
FUSED_ROPE_HOST_DEVICE int64_t table_offset(const TableParams& table, int64_t m, int64_t b,
                                            int64_t s, int64_t h) {
  return m * table.m + b * table.b + s * table.s + h * table.h;
}

}  // namespace fused_rope
