// Conversions of float16 arrays by F16C instructions, bitwise identical to those of numeric.h.
// Compilers before GCC 14 do not vectorize scalar conversions to them.
#pragma once

#include "fused_rope/kernels/numeric.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define FUSED_ROPE_F16C gnu::target("avx2,f16c")
#else
#define FUSED_ROPE_F16C
#endif

namespace fused_rope::kernels {

// Quiets signaling NaNs, as the first product would.
[[FUSED_ROPE_F16C]] inline void widen_array(const Float16* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__x86_64__)
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
  }
#endif
  for (; i < n; ++i) to[i] = widen(from[i]);
}

[[FUSED_ROPE_F16C]] inline void narrow_array(const float* from, Float16* to, int64_t n) {
  int64_t i = 0;
#if defined(__x86_64__)
  // The instruction keeps a NaN's payload, numeric.h drops it. As integers, only NaNs are above
  // these two, one for each sign.
  const __m128i nan = _mm_set1_epi16(0x7e00);
  const __m128i negative_nan = _mm_set1_epi16(static_cast<int16_t>(0xfe00));
  for (; i + 8 <= n; i += 8) {
    __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    half = _mm_min_epu16(_mm_min_epi16(half, nan), negative_nan);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
#endif
  for (; i < n; ++i) to[i] = narrow<Float16>(from[i]);
}

}  // namespace fused_rope::kernels
