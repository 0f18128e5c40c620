// From a call with a cache to its kernel. The .cu files instantiate launch_cache.
#pragma once

#include "fused_rope/kernels/cuda/cache_heads.cuh"
#include "fused_rope/kernels/cuda/cache_kernel.cuh"
#include "fused_rope/kernels/cuda/norm_launch.cuh"

namespace fused_rope::kernels {

// One launch for q, k and v.
template <typename Traits>
cudaError_t launch_cache_kernel(const RotateParams& p, const Plan& plan, cudaStream_t stream) {
  const RotateParams rotation = without_slots(p);
  KernelParams params(rotation, plan);
  CacheArgs<Traits> cache(p, plan);
  unsigned blocks[kMaxTensors] = {};
  for (int i = 0; i < p.count; ++i) {
    const TensorParams& t = p.tensors[i];
    if (t.H == 0) continue;
    const Tile tile = whole_tile(p, t);
    const OperandStrides strides = operand_strides(p, t, is_linear(plan.lookup));
    params.set_tile(i, rotation, t, plan, strides, tile);
    if (i == 1) cache.slots[kKeySlots] = SlotArgs(p, p.cache->k, t.H, strides[kOutRows], tile);
    if constexpr (Traits::kNorm) cache.norm.set_tile(i, p, i);
    blocks[i] = static_cast<unsigned>(params.blocks(i, plan));
  }
  params.second_block = blocks[0];
  params.first_value_block = blocks[0] + blocks[1];
  const int64_t value_blocks = ceil_divide(cache.value_tensor.threads, plan.block_threads);
  return enqueue(cache_kernel<Traits>,
                 params.first_value_block + static_cast<unsigned>(value_blocks), plan.block_threads,
                 0, stream, params, cache);
}

// Calls f<Traits>() with the instance of a plan.
template <typename T, typename Table, Precision kPrecision, typename F>
cudaError_t visit_cache(const RotateParams& p, const Plan& plan, const F& f) {
  if (p.norm != nullptr) return visit_norm<T, Table, kPrecision>(plan, f);
  return visit(plan.arrangement, [&]<Arrangement kArrangement>() {
    constexpr Variant kLinear = base_variant<T, kPrecision>(kArrangement, RowLookup::kLinear);
    constexpr Variant kIndexed = base_variant<T, kPrecision>(kArrangement, RowLookup::kIndexed);
    return visit_lookup<T, Table, kLinear, kIndexed>(plan, f);
  });
}

// plan: null for a warp for each head.
template <typename T>
cudaError_t launch_cache(const RotateParams& p, const std::optional<Plan>& plan,
                         cudaStream_t stream) {
  return visit_table<T>(p, [&]<typename Table, Precision kPrecision>() {
    if constexpr (!std::is_same_v<T, double>) {
      if (plan.has_value()) {
        return visit_cache<T, Table, kPrecision>(p, *plan, [&]<typename Traits>() {
          return launch_cache_kernel<Traits>(p, *plan, stream);
        });
      }
    }
    const CacheHeadParams params(p);
    const WarpHeadParams& heads = params.heads;
    const int64_t units = std::max(heads.heads[0] + heads.heads[1], params.values[0]);
    return launch_warps<Wide<T>>(cache_heads_kernel<T, Table, kPrecision>, params, units, 1,
                                 stream);
  });
}

}  // namespace fused_rope::kernels
