// The search of a warp for the sequence of a token.
#pragma once

#include "fused_rope/kernels/cuda/memory.cuh"
#include "fused_rope/kernels/rows.h"

namespace fused_rope::kernels {

// find_sequence by all threads of a warp, for one token among fewer than 2^31 sequences: they
// compare 32 starts at a time.
__device__ __forceinline__ SequencePosition find_sequence_in_warp(const RowParams& rows,
                                                                  int64_t t) {
  if (!together) return find_sequence(rows, t);
  const auto N = static_cast<int32_t>(rows.N);
  const auto lane = static_cast<int32_t>(threadIdx.x % 32);
  int32_t found = -1;      // the last start that is known to be at or before t
  uint32_t left = N + 1u;  // starts after it that may be, too
  int64_t start = 0;
  do {
    const uint32_t step = (left + 31) / 32;
    const uint32_t after = (lane + 1) * step;
    const bool exists = after <= static_cast<uint32_t>(N - found);
    const int64_t value = exists ? sequence_start(rows, found + static_cast<int64_t>(after)) : 0;
    const uint32_t before = __popc(ballot(exists && value <= t));
    if (before > 0) start = from_lane(value, before - 1);
    found += before * step;
    left = min(step - 1, left - before * step);
  } while (left > 0);
  if (found == N || N == 0) return kPadding;
  return found < 0 ? SequencePosition{0, t - sequence_start(rows, 0)}
                   : SequencePosition{found, t - start};
}

}  // namespace fused_rope::kernels
