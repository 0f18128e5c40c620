// The part of CUDA that the kernel's headers need to compile for the host, where threads run one
// after another. So the addressing is tested without a GPU or nvcc.
#pragma once

#include <algorithm>

#include "fused_rope/kernels/numeric.h"

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
using cudaStream_t = void*;

struct Index {
  unsigned x;
};
inline Index blockIdx, blockDim, threadIdx;

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

namespace fused_rope::kernels {

// As much as a launch may ask for.
alignas(16) inline unsigned char block_memory[48 * 1024];
inline void* shared_memory() { return block_memory; }

// Orders the accesses of shared memory, whose types differ.
inline void wait_for_block() { asm volatile("" ::: "memory"); }
inline void copy_async(void* to, const void* from) { std::memcpy(to, from, 16); }
inline void wait_for_copies() {}
template <typename Int>
Int from_lane(Int value, uint32_t) {
  return value;
}
template <typename F>
void share_in_warps(uint32_t n, uint32_t lanes, const F& f) {
  for (uint32_t i = 0; i < n; ++i) {
    for (uint32_t lane = 0; lane < lanes; ++lane) f(i, lane);
  }
}

template <typename Params, typename Axes>
cudaError_t enqueue(void (*kernel)(Params, Axes), unsigned blocks, int threads, size_t shared_bytes,
                    cudaStream_t, const Params& params, const Axes& axes) {
  if (shared_bytes > sizeof(block_memory)) return cudaErrorInvalidValue;
  // One thread does the work of a block that shares memory.
  blockDim.x = shared_bytes > 0 ? 1 : static_cast<unsigned>(threads);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(params, axes);
  }
  return cudaSuccess;
}

}  // namespace fused_rope::kernels
