// Who leaves the GPU's L2 cache when.
#pragma once

#include "fused_rope/kernels/numeric.h"

namespace fused_rope {

// What createpolicy makes of L2::evict_first, evict_normal, evict_last and evict_unchanged, the
// same on every architecture that has it (sm_80 and later).
constexpr uint64_t kFirstInL2 = uint64_t{0x12f00000} << 32;
constexpr uint64_t kNormalInL2 = uint64_t{0x16f00000} << 32;
constexpr uint64_t kLastInL2 = uint64_t{0x14f00000} << 32;
constexpr uint64_t kUnchangedInL2 = uint64_t{0x10f00000} << 32;

}  // namespace fused_rope
