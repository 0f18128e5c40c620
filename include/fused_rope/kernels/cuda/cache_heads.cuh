// The kernel of a call with a cache for every layout: a warp for each head of q, k and v. Heads of
// whole vectors have a faster one.
#pragma once

#include "fused_rope/kernels/cache.h"
#include "fused_rope/kernels/cuda/warp_head.cuh"

namespace fused_rope::kernels {

// A call with a cache, passed by value.
struct CacheHeadParams {
  static constexpr bool kSharesWarps = true;

  WarpHeadParams heads;
  CacheParams cache;
  bool has_norm;
  int64_t values[kMaxTensors] = {};  // heads of v

  explicit CacheHeadParams(const RotateParams& p)
      : heads(p), cache(*p.cache), has_norm(p.norm != nullptr) {
    if (cache.values.in != nullptr) values[0] = p.B * p.S * cache.values.H;
  }

  FUSED_ROPE_HOST_DEVICE int64_t warp_entries(int64_t arrays) const {
    return heads.warp_entries(arrays);
  }
};

// Stores a head in a slot. value(d) is element d, of type T.
template <typename T, typename F>
__device__ __forceinline__ void store_in_slot(const CacheParams& cache,
                                              const CacheTensorParams& tensor, int64_t slot,
                                              int64_t h, int64_t D, const F& value) {
  const int64_t start = slot_offset(cache, tensor, slot, h);
  const float scale = scale_of(tensor, h);
  visit_storage<T>(cache.storage, [&]<typename To>() {
    To* const to = static_cast<To*>(tensor.data) + start;
    for (int64_t d = threadIdx.x % kWarp; d < D; d += kWarp)
      to[d * tensor.d] = stored<To>(value(d), scale);
  });
}

template <typename T, typename Table, Precision kPrecision>
__global__ void __launch_bounds__(kSmallBlockThreads)
    cache_heads_kernel(const __grid_constant__ CacheHeadParams params) {
  using W = Wide<T>;
  const RotateParams& call = params.heads.call;
  W* const x = warp_memory<W>(params.heads.warp_entries(1));
  for_each_of_warp(params.heads.heads, [&](int i, int64_t index) {
    const TensorParams& t = call.tensors[i];
    const WarpHead<T, Table, kPrecision> head(params.heads, i, index, x + call.D);
    const HeadPlace& place = head.place;
    const int64_t slot = place.out_row(call.rows);
    if (t.out == nullptr && slot < 0) return;
    sync_warp();
    head.load_all(t.in, t.in_strides, x);
    if (params.has_norm) {
      head.normalize_and_rotate(x);
    } else {
      head.rotate(x, call.inverse);
    }
    // What is not rotated keeps its bits, a NaN's too.
    const T* const in = static_cast<const T*>(t.in) + place.offset(t.in_strides);
    const auto value = [&](int64_t d) {
      const T original = in[d * t.in_strides.d];
      return bits_of(x[d]) == bits_of(widen(original)) ? original : narrow<T>(x[d]);
    };
    if (t.out != nullptr) {
      T* const out = static_cast<T*>(t.out) + place.offset(t.out_strides);
      head.for_each_element([&](uint32_t d) { out[d * t.out_strides.d] = value(d); });
    }
    if (i == 1 && slot >= 0)
      store_in_slot<T>(params.cache, params.cache.k, slot, place.h, call.D, value);
  });
  for_each_of_warp(params.values, [&](int, int64_t index) {
    const TensorParams& t = params.cache.values;
    const HeadPlace place(index, t.H, call.S);
    const int64_t slot = place.out_row(call.rows);
    if (slot < 0) return;
    const T* const in = static_cast<const T*>(t.in) + place.offset(t.in_strides);
    store_in_slot<T>(params.cache, params.cache.v, slot, place.h, params.cache.values_D,
                     [&](int64_t d) { return in[d * t.in_strides.d]; });
  });
}

}  // namespace fused_rope::kernels
