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

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
using cudaStream_t = void*;

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

struct Index {
  unsigned x;
};
inline Index blockIdx, blockDim, gridDim, threadIdx;

inline uint32_t min(uint32_t x, uint32_t y) { return std::min(x, y); }

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

namespace fused_rope::kernels {

// As much as a block of sm_90 can have.
alignas(16) inline unsigned char block_memory[227 * 1024];
inline void* shared_memory() { return block_memory; }

// Each thread does the work of all, since it runs alone.
template <typename F>
bool share_in_block(uint32_t n, const F& f) {
  bool any = false;
  for (uint32_t i = 0; i < n; ++i) any |= f(i);
  return any;
}
template <typename F>
void share_in_warps(uint32_t n, uint32_t lanes, const F& f) {
  for (uint32_t i = 0; i < n; ++i) {
    for (uint32_t lane = 0; lane < lanes; ++lane) f(i, lane);
  }
}

template <typename V>
V from_lane(V value, uint32_t lane) {
  return emulation::block.exchange(value, lane);
}
template <typename V>
V from_other_lane(V value, uint32_t mask) {
  return emulation::block.exchange(value, emulation::block.lane() ^ mask);
}
inline void sync_warp() { emulation::block.wait_for_warp(); }
inline void sync_block() { emulation::block.wait_for_block(); }

// Kernels whose threads exchange values have an argument that says so. The threads of others run
// one after another.
template <typename... Args>
cudaError_t enqueue(void (*kernel)(Args...), unsigned blocks, int threads, size_t shared_bytes,
                    cudaStream_t, const Args&... args) {
  if (shared_bytes > sizeof(block_memory)) return cudaErrorInvalidValue;
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = blocks;
  const auto enter = [](unsigned thread) { threadIdx.x = thread; };
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    if constexpr ((requires { Args::kSharesWarps; } || ...)) {
      emulation::block.run(blockDim.x, [&] { kernel(args...); }, enter);
    } else {
      for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(args...);
    }
  }
  return cudaSuccess;
}

}  // namespace fused_rope::kernels
