// The backward of a norm and the rotation for heads that rotate as a whole, in whole vectors.
#pragma once

#include "fused_rope/kernels/cuda/kernel.cuh"
#include "fused_rope/kernels/weight_gradients.h"

namespace fused_rope::kernels {

// What the backward reads besides KernelParams. W is the compute type.
template <typename W>
struct BackwardArgs {
  static constexpr bool kSharesWarps = true;

  struct Tensor {
    const char* gradient;
    LinearOffset gradient_offset;
    W* sums;  // of leaves, [leaves, D], or null
    uint32_t leaves, leaf_heads, heads;
  };

  NormArgs<W> norm;
  Tensor tensors[kMaxTensors] = {};
  uint32_t D;
  uint32_t group_threads;  // of a head, those beyond it included
  uint32_t leaves_of_warp;
  uint32_t chains_of_group;  // one after another

  BackwardArgs(const RotateParams& p, const Plan& plan)
      : norm(p),
        D(static_cast<uint32_t>(p.D)),
        group_threads(std::bit_ceil(static_cast<unsigned>(plan.rotating_threads))) {
    const uint32_t groups = kWarp / group_threads;
    leaves_of_warp = std::max<uint32_t>(groups / kChains, 1);
    chains_of_group = std::max<uint32_t>(kChains / groups, 1);
  }
};

// The gradients that a thread sums for the weight, over a chain, and then over the chains of a
// leaf.
template <typename Traits>
class ThreadSums {
 public:
  using W = Wide<typename Traits::Element>;
  static constexpr int kElements = Traits::kVectors * Traits::kVectorSize;

  W values[Traits::kVectors][Traits::kVectorSize];

  __device__ __forceinline__ void clear() {
    for_each_element(values, [](W& value, int, int) { value = 0; });
  }

  // After each chain of a group: adds neighbors, then their sums. Earlier ones wait in shared
  // memory.
  __device__ __forceinline__ void add_chains(uint32_t chain, uint32_t chains) {
    if (chains == 1) return;
    if (chain % 2 == 0) return save(chain / 2);
    add_saved(chain / 2);
    if (chains == 2) return;
    chain == 1 ? save(0) : add_saved(0);
  }

  // Adds those of `groups` groups of lanes.
  __device__ __forceinline__ void add_groups(uint32_t groups, uint32_t group_threads) {
    for (uint32_t mask = group_threads; mask < groups * group_threads; mask *= 2)
      for_each_element(
          values, [&](W& value, int, int) { value = add(value, from_other_lane(value, mask)); });
  }

  __device__ __forceinline__ void store_to(W* sums, const uint32_t (&start)[Traits::kVectors]) {
    constexpr int kStore = kVectorBytes / sizeof(W);
#pragma unroll
    for (int v = 0; v < Traits::kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < Traits::kVectorSize; i += kStore) {
        Vector<W, kStore> vector;
#pragma unroll
        for (int k = 0; k < kStore; ++k) vector.element[k] = values[v][i + k];
        store(sums + start[v] + i, vector, kEvictNormal, true);
      }
    }
  }

  static constexpr size_t shared_bytes(uint32_t chains) {
    return chains == 1 ? 0 : 2 * kElements * kSmallBlockThreads * sizeof(W);
  }

 private:
  __device__ __forceinline__ static W& saved(uint32_t slot, int v, int i) {
    const uint32_t element = slot * kElements + v * Traits::kVectorSize + i;
    return static_cast<W*>(shared_memory())[element * kSmallBlockThreads + threadIdx.x];
  }
  __device__ __forceinline__ void save(uint32_t slot) {
    for_each_element(values, [&](W& value, int v, int i) { saved(slot, v, i) = value; });
  }
  __device__ __forceinline__ void add_saved(uint32_t slot) {
    for_each_element(values,
                     [&](W& value, int v, int i) { value = add(saved(slot, v, i), value); });
  }
};

// Of four warps, resident on a multiprocessor. More leave too few registers for a head in flight.
constexpr int kBackwardBlocks = 5;

// A group of lanes takes the heads of a chain one after another, the next one's x and gradient in
// flight. The rows in params are those of the rotation when it comes before the norm, else those of
// its inverse.
template <typename Traits>
__global__ void __launch_bounds__(kSmallBlockThreads, kBackwardBlocks) norm_backward_kernel(
    const __grid_constant__ KernelParams params,
    const __grid_constant__ BackwardArgs<Wide<typename Traits::Element>> args) {
  using T = typename Traits::Element;
  using W = Wide<T>;
  using Vectors = typename ThreadTile<Traits>::Vectors;
  using WideVectors = typename ThreadTile<Traits>::WideVectors;
  const bool is_second = blockIdx.x >= params.second_block;
  const uint32_t block = blockIdx.x - (is_second ? params.second_block : 0);
  const TensorArgs& tensor = params.tensors[is_second];
  const LookupArgs& lookups = params.lookups[is_second];
  const auto& of_tensor = args.tensors[is_second];

  const uint32_t warp = block * (kSmallBlockThreads / kWarp) + threadIdx.x / kWarp;
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t group = lane / args.group_threads;
  const uint32_t thread = lane % args.group_threads;
  const uint32_t groups = kChains / args.chains_of_group;  // of a leaf
  const uint32_t leaf = warp * args.leaves_of_warp + group / groups;
  const bool exists = thread < params.rotating_threads && leaf < of_tensor.leaves;
  ThreadTile<Traits> tile(params, thread);
  ThreadSums<Traits> sums;

  struct Head {
    Vectors x[1], gradient[1];
    LinearCoordinates at;
    bool exists;
  };
  const auto load_head = [&](uint32_t index) {
    Head head;
    head.exists = exists && index < of_tensor.heads;
    head.at = tensor.locate(1, params.per_head, index);
    const uint32_t heads = head.exists ? 1 : 0;
    tile.load_elements(params, tensor.in + tensor.in_offset.at(head.at), 0, heads, 1, head.x);
    tile.load_elements(params, of_tensor.gradient + of_tensor.gradient_offset.at(head.at), 0, heads,
                       1, head.gradient);
    return head;
  };

  for (uint32_t pass = 0; pass < args.chains_of_group; ++pass) {
    sums.clear();
    uint32_t index = leaf * of_tensor.leaf_heads + group % groups * args.chains_of_group + pass;
    Head head = load_head(index);
    for (uint32_t i = 0; i < of_tensor.leaf_heads; i += kChains) {
      RowPointers rows;
      bool rotates = false;
      if (head.exists) {
        rotates = find_rows<Traits::kLookup>(params, tensor, lookups, head.at, rows);
        if (rotates) tile.load_rows(params, rows);
      }
      WideVectors factors;
      load_factors<Traits>(args.norm, is_second, tile, head.exists, factors);
      index += kChains;
      const Head next = load_head(i + kChains < of_tensor.leaf_heads ? index : of_tensor.heads);

      WideVectors x, dy;
      tile.widen_all(head.x[0], x);
      tile.widen_all(head.gradient[0], dy);
      if (args.norm.after) {
        if (rotates) tile.rotate_wide(x);
        round_between<T>(args.norm.cast, x);
      } else {
        if (rotates) tile.rotate_wide(dy);
        round_between<T>(args.norm.cast, dy);
      }
      visit(args.norm.cast, [&]<Cast kCast>() {
        const auto dn = [&](int v, int e) {
          return weighted_gradient<T, kCast>(dy[v][e], factors[v][e]);
        };
        const W squares = sum_of_terms<Traits>(args.group_threads, head.exists, [&](int v, int e) {
          return multiply(x[v][e], x[v][e]);
        });
        const W products = sum_of_terms<Traits>(args.group_threads, head.exists, [&](int v, int e) {
          return multiply(dn(v, e), x[v][e]);
        });
        const W r = args.norm.scalars.inverse_rms(squares);
        const W mean = args.norm.scalars.mean_product(products, r);
        for_each_element(dy, [&](W& value, int v, int e) {
          if (head.exists) {
            sums.values[v][e] =
                add(sums.values[v][e], weight_gradient<T, kCast>(value, x[v][e], r));
          }
          value = input_gradient(dn(v, e), x[v][e], r, mean);
        });
      });
      if (args.norm.after) {
        round_between<T>(args.norm.cast, dy);
        if (rotates) {
          tile.load_rows(params, rows);  // once more, to spare registers
          tile.template rotate_wide<true>(dy);
        }
      }
      tile.narrow_all(dy, head.x[0]);
      tile.store_elements(params, tensor.out + tensor.out_offset.at(head.at), 0,
                          head.exists && tensor.out != nullptr ? 1 : 0, 1, head.x);
      head = next;
    }
    sums.add_chains(pass, args.chains_of_group);
  }
  sums.add_groups(groups, args.group_threads);
  if (exists && group % groups == 0 && of_tensor.sums != nullptr)
    sums.store_to(of_tensor.sums + size_t{leaf} * args.D, tile.start);
}

}  // namespace fused_rope::kernels
