// Where the two members of pair j live in a head: half, interleaved and blocks differ only in one
// distance.
#pragma once

#include "fused_rope/kernels/numeric.h"

namespace fused_rope {

struct Lanes {
  int64_t P;         // pairs, R/2
  int64_t offset;    // first rotated lane, rotary_offset
  int64_t distance;  // between the members of a pair: P (half), 1 (interleaved), P/blocks

  // The lane of pair j's first member; its second is `distance` further.
  FUSED_ROPE_HOST_DEVICE int64_t first(int64_t j) const {
    return offset + j / distance * 2 * distance + j % distance;
  }

  FUSED_ROPE_HOST_DEVICE int64_t end() const { return offset + 2 * P; }
};

}  // namespace fused_rope
