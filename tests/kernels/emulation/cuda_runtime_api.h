// The part of CUDA that the kernels' headers need to compile for the host. So they are tested
// without a GPU or nvcc.
#pragma once

#include <algorithm>

#include "fibers.h"
#include "fused_rope/kernels/numeric.h"

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchOutOfResources };
using cudaStream_t = void*;

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

struct Index {
  unsigned x;
};
inline Index blockIdx, blockDim, gridDim, threadIdx;

using std::max;
using std::min;

struct __nv_bfloat162 {
  fused_rope::kernels::BFloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {fused_rope::kernels::to_bfloat16(x), fused_rope::kernels::to_bfloat16(y)};
}
inline uint16_t __bfloat16_as_ushort(fused_rope::kernels::BFloat16 x) { return x.bits; }

struct __half2 {
  fused_rope::kernels::Float16 x, y;
};
inline __half2 __floats2half2_rn(float x, float y) {
  return {fused_rope::kernels::to_float16(x), fused_rope::kernels::to_float16(y)};
}
inline uint16_t __half_as_ushort(fused_rope::kernels::Float16 x) { return x.bits; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }

namespace fused_rope::kernels {

// As much as a block of sm_90 can have.
alignas(16) inline unsigned char block_memory[227 * 1024];
inline void* shared_memory() { return block_memory; }

template <typename F>
void share_in_warps(uint32_t n, uint32_t lanes, const F& f) {
  for (uint32_t i = 0; i < n; ++i) {
    for (uint32_t lane = 0; lane < lanes; ++lane) f(i, lane);
  }
}

// Whether threads exchange values. Otherwise they run one after another, as if each were alone.
inline bool together = false;

template <typename V>
V from_lane(V value, uint32_t lane) {
  return together ? emulation::block.exchange(value, lane) : value;
}
template <typename V>
V from_other_lane(V value, uint32_t mask) {
  return emulation::block.exchange(value, emulation::block.lane() ^ mask);
}
inline uint32_t ballot(bool vote) { return emulation::block.ballot(vote); }
inline void sync_warp() { emulation::block.wait_for_warp(); }
inline void sync_block() {
  asm volatile("" ::: "memory");  // accesses of shared memory have different types
  if (together) emulation::block.wait_for_block();
}

// Kernels whose threads exchange values have an argument that says so. The threads of others run
// one after another.
template <typename... Args>
cudaError_t enqueue(void (*kernel)(Args...), unsigned blocks, int threads, size_t shared_bytes,
                    cudaStream_t, const Args&... args) {
  if (shared_bytes > sizeof(block_memory)) return cudaErrorInvalidValue;
  together = (requires { Args::kSharesWarps; } || ...);
  // One thread does the work of a staged block whose threads do not exchange values.
  const auto is_staged = [](const auto& arg) {
    if constexpr (requires { arg.chunks; }) return arg.chunks.count > 0;
    return false;
  };
  blockDim.x = (is_staged(args) || ...) && !together ? 1 : static_cast<unsigned>(threads);
  gridDim.x = blocks;
  const auto enter = [](unsigned thread) { threadIdx.x = thread; };
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    if (together) {
      emulation::block.run(blockDim.x, [&] { kernel(args...); }, enter);
    } else {
      for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(args...);
    }
  }
  return cudaSuccess;
}

}  // namespace fused_rope::kernels

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int /*device*/) {
  *value = sizeof(fused_rope::kernels::block_memory);
  return cudaSuccess;
}
