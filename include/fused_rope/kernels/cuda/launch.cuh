// From a plan to the kernel's instance and its launches. The .cu files instantiate launch_elements.
#pragma once

#include "fused_rope/kernels/cuda/kernel.cuh"
#include "fused_rope/kernels/cuda/launch.h"
#include "fused_rope/kernels/cuda/staged_kernel.cuh"

namespace fused_rope::kernels {

// Threads move vectors of 16 bytes. The other variants are changes of this one.
template <typename T, Precision kPrecision>
constexpr Variant base_variant(Arrangement arrangement, RowLookup lookup) {
  return {.precision = kPrecision,
          .arrangement = arrangement,
          .vector = kVectorBytes / sizeof(T),
          .lookup = lookup};
}

constexpr Variant with_vector(Variant variant, int vector) {
  variant.vector = vector;
  return variant;
}

constexpr Variant with_full_heads(Variant variant, int vector) {
  variant.vector = vector;
  variant.full_head = true;
  return variant;
}

constexpr Variant staged(Variant variant, int vector) {
  variant.vector = vector;
  variant.staged = true;
  return variant;
}

// The instance of a plan for threads that move vectors themselves.
template <typename T, typename Table, Variant kBase>
auto choose_direct(const Plan& plan) {
  constexpr Arrangement kArrangement = kBase.arrangement;
  if constexpr (has_full_heads(kBase.lookup)) {
    if constexpr (kBase.lookup == RowLookup::kLinear && sizeof(T) == 2) {
      constexpr int kVectors = vectors_of_thread(kArrangement, kBase.lookup);
      constexpr int kShort = kShortChunkBytes / kVectors / int{sizeof(T)};
      if (plan.full_head && plan.vector == kShort)
        return rotate_kernel<KernelTraits<T, Table, with_full_heads(kBase, kShort)>>;
    }
    if (plan.full_head)
      return rotate_kernel<KernelTraits<T, Table, with_full_heads(kBase, kBase.vector)>>;
  }
  if constexpr (has_single_pairs(kBase.lookup) && kArrangement == Arrangement::kPair) {
    if (plan.vector == 1) return rotate_kernel<KernelTraits<T, Table, with_vector(kBase, 1)>>;
  }
  return rotate_kernel<KernelTraits<T, Table, kBase>>;
}

// The same for staged chunks: kStagedPairs or one pair.
template <typename T, typename Table, Variant kBase>
auto choose_staged(const Plan& plan) {
  constexpr int kPair = kBase.arrangement == Arrangement::kAdjacent ? 2 : 1;
  return plan.vector > kPair
             ? rotate_staged_kernel<KernelTraits<T, Table, staged(kBase, kPair * kStagedPairs)>>
             : rotate_staged_kernel<KernelTraits<T, Table, staged(kBase, kPair)>>;
}

// Calls f.operator()<kArrangement>() with an arrangement.
template <typename F>
auto visit(Arrangement arrangement, const F& f) {
  return arrangement == Arrangement::kAdjacent ? f.template operator()<Arrangement::kAdjacent>()
                                               : f.template operator()<Arrangement::kPair>();
}

template <typename T, typename Table, Precision kPrecision, RowLookup kLookup>
auto choose_kernel(const Plan& plan) {
  return visit(plan.arrangement, [&]<Arrangement kArrangement>() {
    constexpr Variant kBase = base_variant<T, kPrecision>(kArrangement, kLookup);
    if constexpr (is_staged(kLookup)) {
      if (plan.staged) return choose_staged<T, Table, kBase>(plan);
    }
    return choose_direct<T, Table, kBase>(plan);
  });
}

#if defined(__CUDACC__)  // the tests' emulation on the host has its own
template <typename... Args>
cudaError_t enqueue(void (*kernel)(Args...), unsigned blocks, int threads, size_t shared_bytes,
                    cudaStream_t stream, const Args&... args) {
  kernel<<<blocks, static_cast<unsigned>(threads), shared_bytes, stream>>>(args...);
  return cudaGetLastError();
}
#endif

// Launches once for q and k together, unless one of them is so large that it needs several tiles.
template <typename Extra>
cudaError_t launch_tiles(const RotateParams& p, const Plan& plan,
                         void (*kernel)(KernelParams, Extra), Extra extra, cudaStream_t stream) {
  KernelParams params(p, plan);
  int tiles = 0;
  unsigned blocks[kMaxTensors] = {};  // of each tile
  cudaError_t error = cudaSuccess;
  const auto flush = [&] {
    const size_t shared_bytes =
        plan.staged ? params.chunks.shared_bytes() : static_cast<size_t>(plan.idle_bytes);
    params.second_block = blocks[0];
    params.alternate = plan.lookup == RowLookup::kPerHead && blocks[0] == blocks[1] ? 1 : 0;
    if (tiles > 0 && error == cudaSuccess)
      error = enqueue(kernel, blocks[0] + blocks[1], plan.block_threads, shared_bytes, stream,
                      params, extra);
    tiles = 0;
    blocks[0] = blocks[1] = 0;
  };
  const int64_t max_heads = plan.launch_threads / plan.head_threads;
  for (int i = 0; i < p.count; ++i) {
    const TensorParams& t = p.tensors[i];
    if (t.H == 0) continue;
    const OperandStrides strides = operand_strides(p, t, is_linear(plan.lookup), plan.chunk_heads);
    for_each_tile(strides, whole_tile(p, t, plan.chunk_heads), max_heads, [&](const Tile& tile) {
      if (tiles == kMaxTensors) flush();
      params.set_tile(tiles, p, t, plan, strides, tile);
      if constexpr (requires { extra.weights; }) extra.set_tile(tiles, p, i);
      blocks[tiles] = static_cast<unsigned>(params.blocks(tiles, plan));
      ++tiles;
    });
  }
  flush();
  return error;
}

template <typename T, typename Table, Precision kPrecision, RowLookup kLookup>
cudaError_t launch_tiles(const RotateParams& p, const Plan& plan, cudaStream_t stream) {
  const auto kernel = choose_kernel<T, Table, kPrecision, kLookup>(plan);
  return launch_tiles(p, plan, kernel, AxesOf<kLookup>(p), stream);
}

template <typename T, typename Table, Precision kPrecision>
cudaError_t launch_lookup(const RotateParams& p, const Plan& plan, cudaStream_t stream) {
  switch (plan.lookup) {
    case RowLookup::kLinear:
      return launch_tiles<T, Table, kPrecision, RowLookup::kLinear>(p, plan, stream);
    case RowLookup::kPerHead:
      return launch_tiles<T, Table, kPrecision, RowLookup::kPerHead>(p, plan, stream);
    case RowLookup::kPositions:
      return launch_tiles<T, Table, kPrecision, RowLookup::kPositions>(p, plan, stream);
    case RowLookup::kIndexed:
      return launch_tiles<T, Table, kPrecision, RowLookup::kIndexed>(p, plan, stream);
    case RowLookup::kPacked:
      return launch_tiles<T, Table, kPrecision, RowLookup::kPacked>(p, plan, stream);
    case RowLookup::kSections:
      return launch_tiles<T, Table, kPrecision, RowLookup::kSections>(p, plan, stream);
    default:
      return launch_tiles<T, Table, kPrecision, RowLookup::kAxes>(p, plan, stream);
  }
}

// Calls f<Table, kPrecision>() with what a call reads and how it rounds. Tables have type T or the
// type that T is rotated in.
template <typename T, typename F>
cudaError_t visit_table(const RotateParams& p, const F& f) {
  return visit_precision<T>(p.precision, [&]<Precision kPrecision>() {
    return p.table_dtype == p.dtype ? f.template operator()<T, kPrecision>()
                                    : f.template operator()<Wide<T>, kPrecision>();
  });
}

// Launches for elements of type T.
template <typename T>
cudaError_t launch_elements(const RotateParams& p, const Plan& plan, cudaStream_t stream) {
  return visit_table<T>(p, [&]<typename Table, Precision kPrecision>() {
    return launch_lookup<T, Table, kPrecision>(p, plan, stream);
  });
}

}  // namespace fused_rope::kernels
