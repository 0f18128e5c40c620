// From a call with a norm to its kernels. The .cu files instantiate launch_norm and
// launch_backward.
#pragma once

#include "fused_rope/kernels/cuda/launch.cuh"
#include "fused_rope/kernels/cuda/norm_backward.cuh"
#include "fused_rope/kernels/cuda/norm_heads.cuh"

namespace fused_rope::kernels {

// Lets a kernel have `bytes` of shared memory: cudaErrorLaunchOutOfResources if a block of this
// device has less.
template <typename Kernel>
cudaError_t opt_in_to_shared_memory(Kernel kernel, size_t bytes) {
  if (bytes <= size_t{kSharedBytes}) return cudaSuccess;
  int device = 0, available = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  if (bytes > static_cast<size_t>(available)) return cudaErrorLaunchOutOfResources;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

// Launches a kernel of whole warps for `units` heads or leaves.
template <typename W, typename Params>
cudaError_t launch_warps(void (*kernel)(Params), const Params& params, int64_t units,
                         int64_t arrays, cudaStream_t stream) {
  if (units == 0) return cudaSuccess;
  const size_t warp_bytes = static_cast<size_t>(params.warp_entries(arrays)) * sizeof(W);
  const auto warps =
      std::clamp<size_t>(size_t{kSharedBytes} / warp_bytes, 1, kSmallBlockThreads / kWarp);
  const size_t shared_bytes = warps * warp_bytes;
  if (const cudaError_t error = opt_in_to_shared_memory(kernel, shared_bytes); error != cudaSuccess)
    return error;
  const int64_t blocks =
      std::min<int64_t>(ceil_divide(units, static_cast<int64_t>(warps)), INT32_MAX);
  return enqueue(kernel, static_cast<unsigned>(blocks), static_cast<int>(warps) * kWarp,
                 shared_bytes, stream, params);
}

template <typename T, Precision kPrecision>
constexpr Variant norm_variant(Arrangement arrangement, RowLookup lookup, int heads = 1) {
  Variant variant = base_variant<T, kPrecision>(arrangement, lookup);
  variant.full_head = variant.norm = true;
  variant.heads = heads;
  return variant;
}

constexpr Variant with_norm_first(Variant variant, Cast cast) {
  variant.norm_first = true;
  variant.cast = cast;
  return variant;
}

// Calls f<Traits>() with the instance for how a plan finds rows.
template <typename T, typename Table, Variant kLinear, Variant kIndexed, typename F>
cudaError_t visit_lookup(const Plan& plan, const F& f) {
  return plan.lookup == RowLookup::kLinear
             ? f.template operator()<KernelTraits<T, Table, kLinear>>()
             : f.template operator()<KernelTraits<T, Table, kIndexed>>();
}

// Calls f<Traits>() with the instance of a plan.
template <typename T, typename Table, Precision kPrecision, typename F>
cudaError_t visit_norm(const Plan& plan, const F& f) {
  return visit(plan.arrangement, [&]<Arrangement kArrangement>() {
    constexpr Variant kLinear = norm_variant<T, kPrecision>(kArrangement, RowLookup::kLinear);
    constexpr Variant kIndexed = norm_variant<T, kPrecision>(kArrangement, RowLookup::kIndexed);
    return visit_lookup<T, Table, kLinear, kIndexed>(plan, f);
  });
}

// The same for a forward in 16 bits. Large calls have two heads a thread; others, whose time is
// that of their instructions, know the cast of a norm before the rotation at compile time.
template <typename T, typename Table, Precision kPrecision, typename F>
cudaError_t visit_forward(const NormParams& norm, const Plan& plan, const F& f) {
  return visit(plan.arrangement, [&]<Arrangement kArrangement>() {
    constexpr Variant kLinear = norm_variant<T, kPrecision>(kArrangement, RowLookup::kLinear);
    constexpr Variant kIndexed = norm_variant<T, kPrecision>(kArrangement, RowLookup::kIndexed);
    if (plan.chunk_heads == 2) {
      constexpr Variant kTwo = norm_variant<T, kPrecision>(kArrangement, RowLookup::kLinear, 2);
      return f.template operator()<KernelTraits<T, Table, kTwo>>();
    }
    const auto with_cast = [&]<Cast kCast>() {
      return visit_lookup<T, Table, with_norm_first(kLinear, kCast),
                          with_norm_first(kIndexed, kCast)>(plan, f);
    };
    if (!norm.after) {
      if (norm.cast == Cast::kBefore) return with_cast.template operator()<Cast::kBefore>();
      if (norm.cast == Cast::kAfter) return with_cast.template operator()<Cast::kAfter>();
      // The operators refuse the other precision without a cast.
      if constexpr (kPrecision == Precision::kFp32)
        return with_cast.template operator()<Cast::kNever>();
    }
    return visit_lookup<T, Table, kLinear, kIndexed>(plan, f);
  });
}

// plan: null for a warp for each head.
template <typename T>
cudaError_t launch_norm(const RotateParams& p, const std::optional<Plan>& plan,
                        cudaStream_t stream) {
  return visit_table<T>(p, [&]<typename Table, Precision kPrecision>() {
    if constexpr (!std::is_same_v<T, double>) {
      if (plan.has_value()) {
        const auto launch = [&]<typename Traits>() {
          return launch_tiles(p, *plan, rotate_kernel<Traits>, NormArgs<Wide<T>>(p), stream);
        };
        if constexpr (sizeof(T) == 2) {
          return visit_forward<T, Table, kPrecision>(*p.norm, *plan, launch);
        } else {
          return visit_norm<T, Table, kPrecision>(*plan, launch);
        }
      }
    }
    const WarpHeadParams params(p);
    return launch_warps<Wide<T>>(norm_heads_kernel<T, Table, kPrecision>, params,
                                 params.heads[0] + params.heads[1], 1, stream);
  });
}

// One launch for q and k; each of their leaves is a warp's, or a part of one.
template <typename Traits, bool kAfter>
cudaError_t launch_backward_kernel(const NormBackwardParams& p, const Plan& plan,
                                   cudaStream_t stream) {
  using W = Wide<typename Traits::Element>;
  const RotateParams& call = p.call;
  KernelParams params(call, plan);
  BackwardArgs<W> args(call, plan);
  unsigned blocks[kMaxTensors] = {};
  int tiles = 0;
  for (int i = 0; i < call.count; ++i) {
    const TensorParams& t = call.tensors[i];
    const GradientParams& g = p.tensors[i];
    if (g.gradient == nullptr || t.H == 0) continue;
    const Tile tile = heads_in_order(call, t);
    params.set_tile(tiles, call, t, plan, operand_strides(call, t, is_linear(plan.lookup)), tile);
    args.norm.set_tile(tiles, call, i);
    const Leaves leaves = leaves_of(call, t);
    args.tensors[tiles] = {static_cast<const char*>(g.gradient),
                           LinearOffset(gradient_strides(call, t, g), tile),
                           g.weight_gradient == nullptr ? nullptr : static_cast<W*>(g.workspace),
                           static_cast<uint32_t>(leaves.count),
                           static_cast<uint32_t>(leaves.steps),
                           static_cast<uint32_t>(leaves.rows)};
    const int64_t block_leaves = kSmallBlockThreads / kWarp * args.leaves_of_warp;
    blocks[tiles++] = static_cast<unsigned>(ceil_divide(leaves.count, block_leaves));
  }
  if (tiles == 0) return cudaSuccess;
  params.second_block = blocks[0];
  return enqueue(norm_backward_kernel<Traits, kAfter>, blocks[0] + blocks[1], kSmallBlockThreads,
                 args.D * sizeof(W) + ThreadSums<Traits>::shared_bytes(args.chains_of_group) +
                     kHeadStages * sizeof(HeadStage),
                 stream, params, args);
}

// Adds the sums of all leaves, or of all branches.
template <typename T, bool kOfLeaves>
cudaError_t launch_sums(const NormBackwardParams& p, cudaStream_t stream) {
  LeafSumParams params = {};
  params.D = static_cast<uint32_t>(p.call.D);
  unsigned tensors = 0;
  for (int i = 0; i < p.call.count; ++i) {
    const GradientParams& g = p.tensors[i];
    if (g.gradient == nullptr || g.weight_gradient == nullptr) continue;
    const WeightParams& weight = p.call.norm->weights[i];
    const int64_t leaves = leaves_of(p.call, p.call.tensors[i]).count;
    params.count[tensors] =
        static_cast<uint32_t>(kOfLeaves ? leaves : ceil_divide(leaves, int64_t{kLeaves}));
    params.sums[tensors] = g.workspace;
    params.to[tensors] = g.weight_gradient;
    params.is_wide[tensors++] = weight.data != nullptr && weight.dtype != p.call.dtype;
  }
  if (tensors == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(ceil_divide(p.call.D, kSumElements));
  return enqueue(sum_leaves_kernel<T, kOfLeaves>, tensors * blocks, kSumThreads,
                 kSumThreads * sizeof(Wide<T>), stream, params);
}

// plan: of the rotation in its place, or null for a warp for each leaf.
template <typename T>
cudaError_t launch_backward(const NormBackwardParams& p, const std::optional<Plan>& plan,
                            cudaStream_t stream) {
  const cudaError_t error = visit_table<T>(p.call, [&]<typename Table, Precision kPrecision>() {
    if constexpr (!std::is_same_v<T, double>) {
      if (plan.has_value()) {
        NormBackwardParams rotation = p;
        // Rows before the norm are those of the rotation's inverse.
        if (!p.call.norm->after) rotation.call.inverse = !p.call.inverse;
        return visit_norm<T, Table, kPrecision>(*plan, [&]<typename Traits>() {
          return p.call.norm->after
                     ? launch_backward_kernel<Traits, true>(rotation, *plan, stream)
                     : launch_backward_kernel<Traits, false>(rotation, *plan, stream);
        });
      }
    }
    const WarpHeadParams params(p);
    return launch_warps<Wide<T>>(norm_leaves_kernel<T, Table, kPrecision>, params,
                                 params.leaves[0] + params.leaves[1], 2 + kChains, stream);
  });
  if (error != cudaSuccess) return error;
  if constexpr (!std::is_same_v<T, double>) {
    if (plan.has_value()) return launch_sums<T, false>(p, stream);
  }
  return launch_sums<T, true>(p, stream);
}

}  // namespace fused_rope::kernels
