// Loads and stores with an L2 eviction policy.
#pragma once

#include <cuda_runtime_api.h>

#include "fused_rope/kernels/numeric.h"

namespace fused_rope::kernels {

// What createpolicy returns for L2::evict_first, evict_normal, evict_last and evict_unchanged. The
// encoding is the same on every architecture that has it (sm_80 and later).
constexpr uint64_t kEvictFirst = uint64_t{0x12f00000} << 32;
constexpr uint64_t kEvictNormal = uint64_t{0x16f00000} << 32;
constexpr uint64_t kEvictLast = uint64_t{0x14f00000} << 32;
constexpr uint64_t kEvictUnchanged = uint64_t{0x10f00000} << 32;

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  T element[kSize];
};

// 32-bit words of a vector that is moved with a policy: 1, 2 or 4; 0 where that cannot be.
template <typename T, int kSize>
#if __CUDA_ARCH__ >= 800
constexpr int kWords = kSize > 1 || sizeof(T) == 8 ? kSize * sizeof(T) / 4 : 0;
#else
constexpr int kWords = 0;
#endif

// Loads a vector if it is `wanted`. The predicate costs no branch.
template <int kSize, typename T>
__device__ __forceinline__ Vector<T, kSize> load(const T* from, uint64_t policy, bool wanted) {
  using V = Vector<T, kSize>;
  V value{};
  if constexpr (kWords<T, kSize> > 0) {
    const auto flag = static_cast<uint32_t>(wanted);
    uint32_t words[kWords<T, kSize>];
    if constexpr (kWords<T, kSize> == 4) {
      asm volatile(
          "{\n"
          ".reg .pred wanted;\n"
          "setp.ne.u32 wanted, %6, 0;\n"
          "@wanted ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;\n"
          "}"
          : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
          : "l"(from), "l"(policy), "r"(flag));
    } else if constexpr (kWords<T, kSize> == 2) {
      asm volatile(
          "{\n"
          ".reg .pred wanted;\n"
          "setp.ne.u32 wanted, %4, 0;\n"
          "@wanted ld.global.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;\n"
          "}"
          : "=r"(words[0]), "=r"(words[1])
          : "l"(from), "l"(policy), "r"(flag));
    } else {
      asm volatile(
          "{\n"
          ".reg .pred wanted;\n"
          "setp.ne.u32 wanted, %3, 0;\n"
          "@wanted ld.global.L2::cache_hint.u32 %0, [%1], %2;\n"
          "}"
          : "=r"(words[0])
          : "l"(from), "l"(policy), "r"(flag));
    }
    std::memcpy(&value, words, sizeof(value));
  } else if (wanted) {
    value = *reinterpret_cast<const V*>(from);
  }
  return value;
}

template <typename T, int kSize>
__device__ __forceinline__ void store(T* to, const Vector<T, kSize>& value, uint64_t policy) {
  using V = Vector<T, kSize>;
  if constexpr (kWords<T, kSize> > 0) {
    uint32_t words[kWords<T, kSize>];
    std::memcpy(words, &value, sizeof(value));
    if constexpr (kWords<T, kSize> == 4) {
      asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to),
                   "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "l"(policy)
                   : "memory");
    } else if constexpr (kWords<T, kSize> == 2) {
      asm volatile("st.global.L2::cache_hint.v2.u32 [%0], {%1, %2}, %3;" ::"l"(to), "r"(words[0]),
                   "r"(words[1]), "l"(policy)
                   : "memory");
    } else {
      asm volatile("st.global.L2::cache_hint.u32 [%0], %1, %2;" ::"l"(to), "r"(words[0]),
                   "l"(policy)
                   : "memory");
    }
  } else {
    *reinterpret_cast<V*>(to) = value;
  }
}

// Loads an integer and keeps its cache line in L2.
template <typename Int>
__device__ __forceinline__ Int load_kept(const void* from) {
#if __CUDA_ARCH__ >= 800
  Int value;
  if constexpr (sizeof(Int) == 8) {
    asm volatile("ld.global.L2::cache_hint.s64 %0, [%1], %2;"
                 : "=l"(value)
                 : "l"(from), "l"(kEvictLast));
  } else {
    asm volatile("ld.global.L2::cache_hint.s32 %0, [%1], %2;"
                 : "=r"(value)
                 : "l"(from), "l"(kEvictLast));
  }
  return value;
#else
  return *static_cast<const Int*>(from);
#endif
}

}  // namespace fused_rope::kernels
