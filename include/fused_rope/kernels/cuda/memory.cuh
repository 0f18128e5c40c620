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
#define FUSED_ROPE_STORE(type, registers)                             \
  asm volatile(                                                       \
      "{\n"                                                           \
      ".reg .pred wanted;\n"                                          \
      "setp.ne.u32 wanted, %6, 0;\n"                                  \
      "@wanted st.global.L2::cache_hint" type " [%4], " registers     \
      ", %5;\n"                                                       \
      "}" ::"r"(word[0]),                                             \
      "r"(word[1]), "r"(word[2]), "r"(word[3]), "l"(to), "l"(policy), \
      "r"(static_cast<uint32_t>(wanted))                              \
      : "memory")

  // Loads if `wanted`. The predicate costs no branch.
  __device__ __forceinline__ void load(const void* from, uint64_t policy, bool wanted) {
    FUSED_ROPE_WITH_REGISTERS(FUSED_ROPE_LOAD);
  }

  __device__ __forceinline__ void store(void* to, uint64_t policy, bool wanted) const {
    FUSED_ROPE_WITH_REGISTERS(FUSED_ROPE_STORE);
  }

#undef FUSED_ROPE_STORE
#undef FUSED_ROPE_LOAD
#undef FUSED_ROPE_WITH_REGISTERS
};

// The Words that a vector is moved as, or 0 where it cannot have a policy.
template <typename T, int kSize>
#if __CUDA_ARCH__ >= 800
constexpr int kWords = kSize * sizeof(T) / 4;
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

// Stores a vector if it is `wanted`.
template <typename T, int kSize>
__device__ __forceinline__ void store(T* to, const Vector<T, kSize>& value, uint64_t policy,
                                      bool wanted) {
  using V = Vector<T, kSize>;
  if constexpr (kWords<T, kSize> > 0) {
    Words<kWords<T, kSize>> words{};
    std::memcpy(words.word, &value, sizeof(value));
    words.store(to, policy, wanted);
  } else if (wanted) {
    *reinterpret_cast<V*>(to) = value;
  }
}

// Loads 16 bytes of shared memory, each time that it is called: no register holds them in between.
template <int kSize, typename T>
__device__ __forceinline__ Vector<T, kSize> load_shared(const T* from) {
  static_assert(kSize * sizeof(T) == 16);
  Vector<T, kSize> value;
#if defined(__CUDA_ARCH__)
  uint32_t word[4];
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from))));
  std::memcpy(&value, word, sizeof(value));
#else
  value = *reinterpret_cast<const Vector<T, kSize>*>(from);
#endif
  return value;
}

// Starts to copy 16 bytes to shared memory if they are `wanted`; otherwise they become zeros. This
// thread may read them after wait_for_copies.
template <typename To>
__device__ __forceinline__ void copy_async(To& to, const void* from, bool wanted) {
  static_assert(sizeof(To) == 16);
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(&to))),
               "l"(from), "r"(wanted ? 16 : 0)
               : "memory");
#else
  to = wanted ? *static_cast<const To*>(from) : To{};
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups but the last kLeft.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

#if defined(__CUDACC__)  // the tests' emulation on the host has its own
constexpr unsigned kAllLanes = 0xffffffffu;

// Whether the threads of a warp exchange values.
constexpr bool together = true;

template <typename Int>
__device__ __forceinline__ Int from_lane(Int value, uint32_t lane) {
  return __shfl_sync(kAllLanes, value, static_cast<int>(lane));
}

// The value of the lane whose index differs in the bits of `mask`. All lanes of the warp must call
// it.
template <typename V>
__device__ __forceinline__ V from_other_lane(V value, uint32_t mask) {
  return __shfl_xor_sync(kAllLanes, value, static_cast<int>(mask));
}

// One bit for each lane. All lanes of the warp must call it.
__device__ __forceinline__ uint32_t ballot(bool vote) { return __ballot_sync(kAllLanes, vote); }

__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ void sync_block() { __syncthreads(); }

extern __shared__ int4 shared_vectors[];

// The dynamic shared memory of a block.
__device__ __forceinline__ void* shared_memory() { return shared_vectors; }

// Calls f(i, lane) for i in [0, n), each in the lanes of one warp, `lanes` of them or more, and
// waits for all of them.
template <typename F>
__device__ __forceinline__ void share_in_warps(uint32_t n, uint32_t /*lanes*/, const F& f) {
  for (uint32_t i = threadIdx.x / 32; i < n; i += blockDim.x / 32) f(i, threadIdx.x % 32);
  __syncthreads();
}
#endif

// An int32 or int64 whose load is in flight: value() waits for it.
struct LoadedIndex {
  int32_t low = 0;
  int32_t high = 0;
  bool is_int64 = false;

  __device__ __forceinline__ int64_t value() const {
    const int32_t upper = is_int64 ? high : low >> 31;
    return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(upper)) << 32 |
                                static_cast<uint32_t>(low));
  }
};

// Loads an index if it is `wanted` and keeps its cache line in L2: every thread waits for it, and
// the next layer reads it again.
__device__ __forceinline__ LoadedIndex load_index_early(const void* from, bool is_int64,
                                                        bool wanted = true) {
  LoadedIndex index;
  index.is_int64 = is_int64;
#if __CUDA_ARCH__ >= 800
  // Two loads into two registers: the second of one register would wait for the first.
  asm volatile(
      "{\n"
      ".reg .pred wanted, both;\n"
      "setp.ne.u32 wanted, %5, 0;\n"
      "setp.ne.and.u32 both, %4, 0, wanted;\n"
      "@wanted ld.global.L2::cache_hint.u32 %0, [%2], %3;\n"
      "@both ld.global.L2::cache_hint.u32 %1, [%2+4], %3;\n"
      "}"
      : "+r"(index.low), "+r"(index.high)
      : "l"(from), "l"(kEvictLast), "r"(static_cast<uint32_t>(is_int64)),
        "r"(static_cast<uint32_t>(wanted)));
#else
  if (wanted) index.low = static_cast<const int32_t*>(from)[0];
  if (wanted && is_int64) index.high = static_cast<const int32_t*>(from)[1];
#endif
  return index;
}

}  // namespace fused_rope::kernels
