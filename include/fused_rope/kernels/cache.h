// Who leaves the GPU's L2 cache when.
#pragma once

#include "fused_rope/kernels/numeric.h"

namespace fused_rope {

// The upper halves of what createpolicy makes of L2::evict_first, evict_normal, evict_last and
// evict_unchanged, the same on every architecture that has it (sm_80 and later); the lower are 0.
constexpr uint32_t kFirstInL2 = 0x12f00000;
constexpr uint32_t kNormalInL2 = 0x16f00000;
constexpr uint32_t kLastInL2 = 0x14f00000;
constexpr uint32_t kUnchangedInL2 = 0x10f00000;

FUSED_ROPE_HOST_DEVICE constexpr uint64_t policy_of(uint32_t upper) {
  return uint64_t{upper} << 32;
}

}  // namespace fused_rope
