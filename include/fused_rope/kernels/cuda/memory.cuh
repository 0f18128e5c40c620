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

// 1, 2 or 4 registers that one instruction moves. Operands have the same numbers for all three: %0
// to %3 are registers, of which the instruction names the first kCount, %4 the address, %5 the
// policy.
template <int kCount>
struct Words {
  uint32_t word[4];

#define FUSED_ROPE_WITH_REGISTERS(instruction)  \
  if constexpr (kCount == 4)                    \
    instruction(".v4.u32", "{%0, %1, %2, %3}"); \
  else if constexpr (kCount == 2)               \
    instruction(".v2.u32", "{%0, %1}");         \
  else                                          \
    instruction(".u32", "%0")
#define FUSED_ROPE_LOAD(type, registers)                           \
  asm volatile(                                                    \
      "{\n"                                                        \
      ".reg .pred wanted;\n"                                       \
      "setp.ne.u32 wanted, %6, 0;\n"                               \
      "@wanted ld.global.L2::cache_hint" type " " registers        \
      ", [%4], %5;\n"                                              \
      "}"                                                          \
      : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) \
      : "l"(from), "l"(policy), "r"(static_cast<uint32_t>(wanted)))
#define FUSED_ROPE_STORE(type, registers)                                                  \
  asm volatile("st.global.L2::cache_hint" type " [%4], " registers ", %5;" ::"r"(word[0]), \
               "r"(word[1]), "r"(word[2]), "r"(word[3]), "l"(to), "l"(policy)              \
               : "memory")

  // Loads if `wanted`. The predicate costs no branch.
  __device__ __forceinline__ void load(const void* from, uint64_t policy, bool wanted) {
    FUSED_ROPE_WITH_REGISTERS(FUSED_ROPE_LOAD);
  }

  __device__ __forceinline__ void store(void* to, uint64_t policy) const {
    FUSED_ROPE_WITH_REGISTERS(FUSED_ROPE_STORE);
  }

#undef FUSED_ROPE_STORE
#undef FUSED_ROPE_LOAD
#undef FUSED_ROPE_WITH_REGISTERS
};

// The Words that a vector is moved as, or 0 where it cannot have a policy.
template <typename T, int kSize>
#if __CUDA_ARCH__ >= 800
constexpr int kWords = kSize > 1 || sizeof(T) == 8 ? kSize * sizeof(T) / 4 : 0;
#else
constexpr int kWords = 0;
#endif

// Loads a vector if it is `wanted`; otherwise its value is unspecified.
template <int kSize, typename T>
__device__ __forceinline__ Vector<T, kSize> load(const T* from, uint64_t policy, bool wanted) {
  using V = Vector<T, kSize>;
  V value{};
  if constexpr (kWords<T, kSize> > 0) {
    Words<kWords<T, kSize>> words;
    words.load(from, policy, wanted);
    std::memcpy(&value, words.word, sizeof(value));
  } else if (wanted) {
    value = *reinterpret_cast<const V*>(from);
  }
  return value;
}

template <typename T, int kSize>
__device__ __forceinline__ void store(T* to, const Vector<T, kSize>& value, uint64_t policy) {
  using V = Vector<T, kSize>;
  if constexpr (kWords<T, kSize> > 0) {
    Words<kWords<T, kSize>> words{};
    std::memcpy(words.word, &value, sizeof(value));
    words.store(to, policy);
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
