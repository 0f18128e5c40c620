// Division of indices.
#pragma once

#include "fused_rope/kernels/numeric.h"

namespace fused_rope::kernels {

// floor(n / divisor) by multiplication and shift (Granlund and Montgomery 1994), for a divisor that
// is known on the host before a launch. Exact for n < 2^31 and 1 <= divisor < 2^31. By default it
// divides by one.
struct FastDivmod {
  uint32_t multiplier = 0;
  uint32_t shift = 0;

  FastDivmod() = default;
  explicit FastDivmod(int64_t divisor) {
    const auto d = static_cast<uint32_t>(divisor);
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier =
        static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }

  FUSED_ROPE_HOST_DEVICE uint32_t div(uint32_t n) const {
#if defined(__CUDA_ARCH__)
    return (__umulhi(n, multiplier) + n) >> shift;
#else
    return static_cast<uint32_t>((((uint64_t{n} * multiplier) >> 32) + n) >> shift);
#endif
  }
};

// n / divisor for n >= 0 and divisor >= 1, in 32 bits where they are enough: GPUs divide 64 bits in
// many instructions.
FUSED_ROPE_HOST_DEVICE int64_t divide(int64_t n, int64_t divisor) {
  if (n <= INT32_MAX && divisor <= INT32_MAX)
    return static_cast<uint32_t>(n) / static_cast<uint32_t>(divisor);
  return n / divisor;
}

}  // namespace fused_rope::kernels
