// How the KV cache stores a value, and where.
#pragma once

#include "fused_rope/kernels/params.h"

namespace fused_rope::kernels {

// Calls f.operator()<To>() with the type that a cache stores, T for values of x's own dtype.
template <typename T, typename F>
FUSED_ROPE_HOST_DEVICE void visit_storage(Storage storage, const F& f) {
  if (storage == Storage::kOwn)
    f.template operator()<T>();
  else if (storage == Storage::kE4M3)
    f.template operator()<Float8E4M3>();
  else if (storage == Storage::kE5M2)
    f.template operator()<Float8E5M2>();
  else
    f.template operator()<int8_t>();
}

// Divides by a scale, so that a quotient rounds to the same 8 bits as one of IEEE 754: by its
// reciprocal, and two corrections of the remainder (Markstein 2000). The compiler's own division
// checks each dividend for what is checked once here.
class QuotientByReciprocal {
 public:
  FUSED_ROPE_HOST_DEVICE explicit QuotientByReciprocal(float scale) {
    // Powers of two keep the scale away from subnormal reciprocals and remainders. Quotients that
    // overflow or underflow by them saturate, or are 0 in 8 bits.
    const float magnitude = scale < 0 ? -scale : scale;
    factor_ = magnitude < 0x1p-60f ? 0x1p96f : magnitude > 0x1p60f ? 0x1p-96f : 1.0f;
    divisor_ = scale * factor_;
#if defined(__CUDA_ARCH__)
    reciprocal_ = __frcp_rn(divisor_);
#else
    reciprocal_ = 1.0f / divisor_;
#endif
  }

  FUSED_ROPE_HOST_DEVICE float operator()(float x) const {
    const float dividend = x * factor_;
    const float estimate = dividend * reciprocal_;
    float quotient = estimate;
    for (int i = 0; i < 2; ++i)
      quotient = fma(fma(-quotient, divisor_, dividend), reciprocal_, quotient);
    const bool has_remainder = estimate != 0 && estimate - estimate == 0;
    return has_remainder ? quotient : estimate;  // which keeps the sign of 0
  }

 private:
  FUSED_ROPE_HOST_DEVICE static float fma(float x, float y, float z) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(x, y, z);
#else
    return __builtin_fmaf(x, y, z);
#endif
  }

  float factor_, divisor_, reciprocal_;
};

class Quotient {
 public:
  FUSED_ROPE_HOST_DEVICE explicit Quotient(float scale) : scale_(scale) {}
  FUSED_ROPE_HOST_DEVICE float operator()(float x) const { return x / scale_; }

 private:
  float scale_;
};

// How values are divided by the scale of a head: on a CPU a division is one instruction.
#if defined(__CUDA_ARCH__)
using Divide = QuotientByReciprocal;
#else
using Divide = Quotient;
#endif

// A value of x's dtype as the cache stores it. 8 bits hold its quotient by the scale, in float32.
template <typename To, typename T>
FUSED_ROPE_HOST_DEVICE To stored(T value, [[maybe_unused]] const Divide& divide) {
  if constexpr (std::is_same_v<To, T>) {
    return value;
  } else {
    return narrow<To>(divide(static_cast<float>(widen(value))));
  }
}

// The scale of a head; 1 for a cache of x's dtype.
FUSED_ROPE_HOST_DEVICE float scale_of(const CacheTensorParams& cache, int64_t h) {
  return cache.scale == nullptr ? 1.0f : cache.scale[h * cache.scale_stride];
}

// Offset in elements of a head of the token in `slot`, a valid one.
FUSED_ROPE_HOST_DEVICE int64_t slot_offset(const CacheParams& p, const CacheTensorParams& cache,
                                           int64_t slot, int64_t h) {
  const bool is_short = slot <= INT32_MAX && p.page_size <= INT32_MAX;
  const int64_t page = is_short ? static_cast<uint32_t>(slot) / static_cast<uint32_t>(p.page_size)
                                : slot / p.page_size;
  return page * cache.page + (slot - page * p.page_size) * cache.place + h * cache.h;
}

}  // namespace fused_rope::kernels
