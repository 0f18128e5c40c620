// How the KV cache stores a value, and where.
#pragma once

#include "fused_rope/kernels/fast_divmod.h"
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

// A value of x's dtype as the cache stores it. 8 bits hold its quotient by the scale, in float32.
template <typename To, typename T>
FUSED_ROPE_HOST_DEVICE To stored(T value, [[maybe_unused]] float scale) {
  if constexpr (std::is_same_v<To, T>) {
    return value;
  } else {
    return narrow<To>(static_cast<float>(widen(value)) / scale);
  }
}

// The scale of a head; 1 for a cache of x's dtype.
FUSED_ROPE_HOST_DEVICE float scale_of(const CacheTensorParams& cache, int64_t h) {
  return cache.scale == nullptr ? 1.0f : cache.scale[h * cache.scale_stride];
}

// Offset in elements of a head of the token in `slot`, a valid one.
FUSED_ROPE_HOST_DEVICE int64_t slot_offset(const CacheParams& p, const CacheTensorParams& cache,
                                           int64_t slot, int64_t h) {
  const int64_t page = divide(slot, p.page_size);
  return page * cache.page + (slot - page * p.page_size) * cache.place + h * cache.h;
}

}  // namespace fused_rope::kernels
