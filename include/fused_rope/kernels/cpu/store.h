// The CPU kernel's stores to a KV cache.
#pragma once

#include "fused_rope/kernels/cache.h"
#include "fused_rope/kernels/cpu/rotate_pairs.h"

namespace fused_rope::kernels {

// A token of k or v, [H, D].
template <typename T>
struct TokenHeads {
  const T* data;
  int64_t H, D;
  int64_t h, d;  // strides
};

// Stores a token in a slot of its cache, a valid one, with `isa`, which does not change results.
template <typename T>
void store_token(const CacheParams& p, const CacheTensorParams& cache, const TokenHeads<T>& token,
                 int64_t slot, Isa isa) {
  const auto store_heads = [&]<typename To>() {
    const int64_t D = token.D, in_d = token.d, out_d = cache.d;
    for (int64_t h = 0; h < token.H; ++h) {
      const float scale = scale_of(cache, h);
      const T* const in = token.data + h * token.h;
      To* const out = static_cast<To*>(cache.data) + slot_offset(p, cache, slot, h);
      if (in_d == 1 && out_d == 1) {
        FUSED_ROPE_INDEPENDENT_ITERATIONS
        for (int64_t d = 0; d < D; ++d) out[d] = stored<To>(in[d], scale);
      } else {
        for (int64_t d = 0; d < D; ++d) out[d * out_d] = stored<To>(in[d * in_d], scale);
      }
    }
  };
  run_on(isa, [&](auto) { visit_storage<T>(p.storage, store_heads); });
}

}  // namespace fused_rope::kernels
