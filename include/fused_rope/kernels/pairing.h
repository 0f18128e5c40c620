// Pairing: where the two elements of pair j are within a head. The half, interleaved and blocked
// layouts differ only in the distance between them.
#pragma once

#include "fused_rope/kernels/numeric.h"

namespace fused_rope::kernels {

struct Pairing {
  int64_t P;         // pairs, R/2
  int64_t offset;    // rotary_offset, the first rotated element
  int64_t distance;  // between the elements of a pair: P (half), 1 (interleaved), P/blocks

  // Index in the head of pair j's first element; the second is `distance` further.
  FUSED_ROPE_HOST_DEVICE int64_t first(int64_t j) const {
    return offset + j / distance * 2 * distance + j % distance;
  }

  // One past the last rotated element.
  FUSED_ROPE_HOST_DEVICE int64_t end() const { return offset + 2 * P; }
};

}  // namespace fused_rope::kernels
