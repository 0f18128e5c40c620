// The kernel of a call with a cache whose heads are whole vectors: one launch rotates q and k, and
// stores k and v.
#pragma once

#include "fused_rope/kernels/cache.h"
#include "fused_rope/kernels/cuda/kernel.cuh"

namespace fused_rope::kernels {

struct NoNorm {
  explicit NoNorm(const RotateParams&) {}
};

// The cache of k or of v; strides in bytes.
struct SlotArgs {
  char* data;
  int64_t page, place;
  const char* scale;  // null unless values have 8 bits
  LinearOffset head_offset, scale_offset;

  SlotArgs() = default;
  SlotArgs(const RotateParams& p, const CacheTensorParams& cache, int64_t H, const Tile& tile)
      : data(static_cast<char*>(cache.data)),
        page(cache.page * size_of(p.cache->storage, p.dtype)),
        place(cache.place * size_of(p.cache->storage, p.dtype)),
        scale(reinterpret_cast<const char*>(cache.scale)),
        head_offset(slot_strides(p, cache, H), tile),
        scale_offset(scale_strides(cache, H), tile) {}
};

// What a launch with a cache passes besides KernelParams, whose tiles are those of q and k.
template <typename Traits>
struct CacheArgs {
  using W = Wide<typename Traits::Element>;
  using Norm = std::conditional_t<Traits::kNorm, NormArgs<W>, NoNorm>;
  static constexpr bool kSharesWarps = true;

  uint32_t first_value_block;              // blocks from this one on copy v
  uint32_t value_threads, value_elements;  // of a head of v
  FastDivmod per_value_head, per_page;
  bool has_key_out;
  bool has_short_slots;  // pages and slots fit per_page
  Storage storage;
  int64_t page_size;
  SlotArgs key, value;
  TensorArgs value_tensor;
  LookupArgs value_lookups;
  Norm norm;

  CacheArgs(const RotateParams& p, const Plan& plan)
      : first_value_block(0),
        value_threads(static_cast<uint32_t>(
            ceil_divide(p.cache->values_D, int64_t{2} * Traits::kVectorSize))),
        value_elements(static_cast<uint32_t>(p.cache->values_D)),
        per_value_head(std::max(value_threads, 1u)),
        per_page(p.cache->page_size),
        has_key_out(p.tensors[1].out != nullptr),
        has_short_slots(p.rows.out_rows_limit <= INT32_MAX && p.cache->page_size <= INT32_MAX),
        storage(p.cache->storage),
        page_size(p.cache->page_size),
        norm(p) {
    set_values(p, plan);
  }

 private:
  void set_values(const RotateParams& p, Plan plan) {
    const TensorParams& values = p.cache->values;
    value_tensor.threads = 0;
    if (values.in == nullptr || values.H == 0) return;
    plan.head_threads = static_cast<int>(value_threads);
    const RotateParams call = values_call(p);
    const Tile tile = whole_tile(call, values);
    const OperandStrides strides = operand_strides(call, call.tensors[0], false);
    value_tensor = TensorArgs(call, call.tensors[0], plan, strides, tile);
    value_lookups = LookupArgs(call, call.tensors[0], plan, strides, tile);
    value = SlotArgs(p, p.cache->v, values.H, tile);
  }
};

// Where a thread stores its part of a head. Its loads are in flight until `store`.
template <typename Traits>
struct Slot {
  using T = typename Traits::Element;
  static constexpr int kSize = Traits::kVectorSize;

  LoadedIndex index;
  float scale;

  __device__ __forceinline__ Slot(const KernelParams& params, const LookupArgs& lookups,
                                  const SlotArgs& to, const LinearCoordinates& at, bool wanted)
      : index(load_index_early(lookups.out_rows + lookups.out_rows_offset.at(at),
                               params.row_flags & kLongOutRows, wanted)),
        scale(load<1>(reinterpret_cast<const float*>(to.scale + to.scale_offset.at(at)), kEvictLast,
                      wanted && to.scale != nullptr)
                  .element[0]) {}

  __device__ __forceinline__ void store_elements(
      const KernelParams& params, const CacheArgs<Traits>& cache, const SlotArgs& to,
      const LinearCoordinates& at, const uint32_t (&start)[Traits::kVectors],
      const Vector<T, kSize> (&x)[Traits::kVectors]) const {
    const int64_t slot = index.value();
    FUSED_ROPE_DEVICE_CHECK(slot == -1 || is_row(slot, params.rows.out_rows_limit));
    if (slot < 0) return;
    const int64_t page = cache.has_short_slots ? cache.per_page.div(static_cast<uint32_t>(slot))
                                               : slot / cache.page_size;
    char* const head = to.data + page * to.page + (slot - page * cache.page_size) * to.place +
                       to.head_offset.at(at);
    const Divide divide(scale);
    visit_storage<T>(cache.storage, [&]<typename To>() {
#pragma unroll
      for (int v = 0; v < Traits::kVectors; ++v) {
        Vector<To, kSize> vector;
#pragma unroll
        for (int i = 0; i < kSize; ++i) vector.element[i] = stored<To>(x[v].element[i], divide);
        store(reinterpret_cast<To*>(head) + start[v], vector, kEvictNormal, true);
      }
    });
  }
};

// Copies v to its slots.
template <typename Traits>
__device__ __forceinline__ void store_values(const KernelParams& params,
                                             const CacheArgs<Traits>& cache, uint32_t block) {
  using T = typename Traits::Element;
  constexpr int kSize = Traits::kVectorSize;
  const TensorArgs& tensor = cache.value_tensor;
  uint32_t index = block * blockDim.x + threadIdx.x;
  if (index >= tensor.threads) return;
  const LinearCoordinates at = tensor.locate(cache.value_threads, cache.per_value_head, index);
  const Slot<Traits> slot(params, cache.value_lookups, cache.value, at, true);
  const uint32_t second = (index + cache.value_threads) * kSize;
  const uint32_t start[2] = {index * kSize, second < cache.value_elements ? second : index * kSize};
  const T* const head = reinterpret_cast<const T*>(tensor.in + tensor.in_offset.at(at));
  const Vector<T, kSize> x[2] = {load<kSize>(head + start[0], params.x_policy, true),
                                 load<kSize>(head + start[1], params.x_policy, true)};
  slot.store_elements(params, cache, cache.value, at, start, x);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, Traits::kNorm ? 7 : 5)
    cache_kernel(const __grid_constant__ KernelParams params,
                 const __grid_constant__ CacheArgs<Traits> cache) {
  constexpr RowLookup kLookup = Traits::kLookup;
  if (blockIdx.x >= cache.first_value_block)
    return store_values(params, cache, blockIdx.x - cache.first_value_block);
  const TileBlock assigned = assign_block<kLookup>(params, blockIdx.x);
  const bool is_key = assigned.is_second;
  const TensorArgs& tensor = params.tensors[is_key];
  const LookupArgs& lookups = params.lookups[is_key];
  uint32_t index = assigned.block * blockDim.x + threadIdx.x;
  bool in_tile = index < tensor.threads;
  const LinearCoordinates at = tensor.locate(params.head_threads, params.per_head, index);
  if constexpr (Traits::kNorm) in_tile = in_tile && index < params.rotating_threads;
  ThreadTile<Traits> tile(params, index);

  // Issue the loads of indices first, then those of x, before waiting for any.
  const TileToken token = {params, tensor, lookups, at, 0};
  const bool has_position = (params.row_flags & kHasPositions) != 0;
  const PositionedToken positioned = {token, token.load_position(in_tile && has_position)};
  const Slot<Traits> slot(params, lookups, cache.key, at, in_tile && is_key);
  typename ThreadTile<Traits>::Vectors x;
  tile.load_elements(params, tensor.in + tensor.in_offset.at(at), lookups.in_d, in_tile, x);
  if (!Traits::kNorm && !in_tile) return;

  const auto load_rows = [&] {
    RowPointers rows;
    const bool found = find_rows<kLookup>(params, tensor, lookups, at, positioned, rows);
    if (found) tile.load_rows(params, rows);
    return found;
  };
  if constexpr (Traits::kNorm) {
    const ThreadWeight<Traits> weight(cache.norm, is_key, tile, in_tile);
    const bool rotates = in_tile && load_rows();
    normalize_and_rotate(params, cache.norm, is_key, tile, weight, in_tile, rotates, x);
    if (!in_tile) return;
  } else if (tile.rotates && load_rows()) {
    tile.template rotate<true>(x, tile.kAllPairs);
  }
  if (!is_key || cache.has_key_out)
    tile.store_elements(params, tensor.out + tensor.out_offset.at(at), lookups.out_d, x);
  if (is_key) slot.store_elements(params, cache, cache.key, at, tile.start, x);
}

}  // namespace fused_rope::kernels
