// From a plan to the kernel's instance and its launches. The .cu files instantiate launch_elements.
#pragma once

#include "fused_rope/kernels/cuda/kernel.cuh"
#include "fused_rope/kernels/cuda/launch.h"

namespace fused_rope::kernels {

constexpr Variant with_single_entries(Variant variant) {
  variant.vector_tables = false;
  return variant;
}

constexpr Variant with_full_heads(Variant variant, int vector) {
  variant.full_head = true;
  variant.vector = vector;
  return variant;
}

// The instance for vectors of x. kBase has vectors of 16 bytes, of tables too; full heads have
// instances of their own with such tables.
template <typename T, typename Table, Variant kBase>
auto choose_vectors(const Plan& plan) {
  constexpr RowLookup kLookup = kBase.lookup;
  constexpr int kWidest = kBase.vector;
  if constexpr (kLookup != RowLookup::kPerHead) {
    if (!plan.vector_tables)
      return rotate_kernel<KernelTraits<T, Table, with_single_entries(kBase)>>;
  }
  if constexpr (kLookup != RowLookup::kAxes) {
    if constexpr (kLookup == RowLookup::kLinear && sizeof(T) == 2) {
      constexpr int kShortest = shortest_vector(kBase.arrangement, kLookup) / sizeof(T);
      if (plan.vector == kShortest)
        return rotate_kernel<KernelTraits<T, Table, with_full_heads(kBase, kShortest)>>;
      if (kShortest < kWidest / 2 && plan.vector == kWidest / 2)
        return rotate_kernel<KernelTraits<T, Table, with_full_heads(kBase, kWidest / 2)>>;
    }
    if (plan.full_head)
      return rotate_kernel<KernelTraits<T, Table, with_full_heads(kBase, kWidest)>>;
  }
  return rotate_kernel<KernelTraits<T, Table, kBase>>;
}

template <typename T, typename Table, Precision kPrecision, RowLookup kLookup>
auto choose_kernel(const Plan& plan) {
  constexpr Variant kPair = {.precision = kPrecision,
                             .arrangement = Arrangement::kPair,
                             .vector = kVectorBytes / sizeof(T),
                             .lookup = kLookup,
                             .vector_tables = true,
                             .full_head = false};
  // A thread with single elements has one pair, and so one axis.
  if constexpr (kLookup != RowLookup::kAxes && kLookup != RowLookup::kPerHead) {
    constexpr Variant kSingle = {.precision = kPrecision,
                                 .arrangement = Arrangement::kPair,
                                 .vector = 1,
                                 .lookup = kLookup,
                                 .vector_tables = false,
                                 .full_head = false};
    if (plan.vector == 1) return rotate_kernel<KernelTraits<T, Table, kSingle>>;
  }
  // So has one with a whole pair of float64.
  if constexpr (kLookup != RowLookup::kAxes || sizeof(T) < sizeof(double)) {
    constexpr Variant kAdjacent = {.precision = kPrecision,
                                   .arrangement = Arrangement::kAdjacent,
                                   .vector = kVectorBytes / sizeof(T),
                                   .lookup = kLookup,
                                   .vector_tables = true,
                                   .full_head = false};
    if (plan.arrangement == Arrangement::kAdjacent)
      return choose_vectors<T, Table, kAdjacent>(plan);
  }
  return choose_vectors<T, Table, kPair>(plan);
}

#if defined(__CUDACC__)  // the tests' emulation on the host has its own
template <typename Axes>
cudaError_t enqueue(void (*kernel)(KernelParams, Axes), unsigned blocks, int threads,
                    cudaStream_t stream, const KernelParams& params, const Axes& axes) {
  kernel<<<blocks, static_cast<unsigned>(threads), 0, stream>>>(params, axes);
  return cudaGetLastError();
}
#endif

// Launches once for q and k together, unless one of them is so large that it needs several tiles.
template <typename T, typename Table, Precision kPrecision, RowLookup kLookup>
cudaError_t launch_tiles(const RotateParams& p, const Plan& plan, cudaStream_t stream) {
  const auto kernel = choose_kernel<T, Table, kPrecision, kLookup>(plan);
  AxesOf<kLookup> axes;
  if constexpr (has_axes(kLookup)) {
    for (int64_t j = 0; j < p.pairing.P; ++j) axes.axis[j] = static_cast<uint8_t>(p.axes[j]);
  }
  KernelParams params(p, plan);
  int tiles = 0;
  unsigned blocks[kMaxTensors] = {};  // of each tile
  cudaError_t error = cudaSuccess;
  const auto flush = [&] {
    params.second_block = blocks[0];
    params.alternate = plan.lookup == RowLookup::kPerHead && blocks[0] == blocks[1] ? 1 : 0;
    if (tiles > 0 && error == cudaSuccess)
      error = enqueue(kernel, blocks[0] + blocks[1], plan.block_threads, stream, params, axes);
    tiles = 0;
    blocks[0] = blocks[1] = 0;
  };
  const int64_t max_heads = plan.launch_threads / plan.head_threads;
  for (int i = 0; i < p.count; ++i) {
    const TensorParams& t = p.tensors[i];
    if (t.H == 0) continue;
    const OperandStrides strides = operand_strides(p, t, is_linear(plan.lookup));
    for_each_tile(strides, whole_tile(p, t), max_heads, [&](const Tile& tile) {
      if (tiles == kMaxTensors) flush();
      params.set_tile(tiles, p, t, plan, strides, tile);
      const int64_t threads = params.tensors[tiles].threads;
      blocks[tiles++] = static_cast<unsigned>(ceil_divide(threads, plan.block_threads));
    });
  }
  flush();
  return error;
}

template <typename T, typename Table, Precision kPrecision>
cudaError_t launch_lookup(const RotateParams& p, const Plan& plan, cudaStream_t stream) {
  switch (plan.lookup) {
    case RowLookup::kLinear:
      return launch_tiles<T, Table, kPrecision, RowLookup::kLinear>(p, plan, stream);
    case RowLookup::kPerHead:
      return launch_tiles<T, Table, kPrecision, RowLookup::kPerHead>(p, plan, stream);
    case RowLookup::kIndexed:
      return launch_tiles<T, Table, kPrecision, RowLookup::kIndexed>(p, plan, stream);
    case RowLookup::kSections:
      return launch_tiles<T, Table, kPrecision, RowLookup::kSections>(p, plan, stream);
    default:
      return launch_tiles<T, Table, kPrecision, RowLookup::kAxes>(p, plan, stream);
  }
}

template <typename T, typename Table>
cudaError_t launch_table(const RotateParams& p, const Plan& plan, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {  // in float32 and float64 the two precisions are equal
    if (p.precision == Precision::kModel)
      return launch_lookup<T, Table, Precision::kModel>(p, plan, stream);
  }
  return launch_lookup<T, Table, Precision::kFp32>(p, plan, stream);
}

// Launches for elements of type T. Tables have type T or the type that T is rotated in.
template <typename T>
cudaError_t launch_elements(const RotateParams& p, const Plan& plan, cudaStream_t stream) {
  return p.table_dtype == p.dtype ? launch_table<T, T>(p, plan, stream)
                                  : launch_table<T, Wide<T>>(p, plan, stream);
}

}  // namespace fused_rope::kernels
