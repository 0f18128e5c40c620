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
    W* sums;                        // of branches, [branches, D], or null
    uint32_t leaves, steps, heads;  // steps: heads of a chain, at most
  };

  NormArgs<W> norm;
  Tensor tensors[kMaxTensors] = {};
  uint32_t D;
  uint32_t group_threads;  // of a head, those beyond it included
  uint32_t group_bits;     // log2 of group_threads
  uint32_t leaf_bits;      // log2 of the groups of a leaf
  uint32_t leaves_of_warp;
  uint32_t chains_of_group;  // one after another

  BackwardArgs(const RotateParams& p, const Plan& plan)
      : norm(p),
        D(static_cast<uint32_t>(p.D)),
        group_threads(std::bit_ceil(static_cast<unsigned>(plan.rotating_threads))),
        group_bits(static_cast<uint32_t>(std::countr_zero(group_threads))) {
    const uint32_t groups = kWarp / group_threads;
    leaf_bits = static_cast<uint32_t>(std::countr_zero(std::min<uint32_t>(groups, kChains)));
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

  __device__ __forceinline__ void store_shared(W* to, const uint32_t (&start)[Traits::kVectors]) {
    for_each_element(values, [&](W& value, int v, int i) { to[start[v] + i] = value; });
  }

  // saved: shared memory for those that wait.
  __device__ __forceinline__ explicit ThreadSums(W* saved) : saved_(saved) {}

  // The end of what has to wait in shared memory.
  __device__ __forceinline__ W* end(uint32_t chains) const {
    return saved_ + shared_bytes(chains) / sizeof(W);
  }
  FUSED_ROPE_HOST_DEVICE static constexpr size_t shared_bytes(uint32_t chains) {
    return chains == 1 ? 0 : 2 * kElements * kSmallBlockThreads * sizeof(W);
  }

 private:
  __device__ __forceinline__ W& saved(uint32_t slot, int v, int i) const {
    const uint32_t element = slot * kElements + v * Traits::kVectorSize + i;
    return saved_[element * kSmallBlockThreads + threadIdx.x];
  }
  __device__ __forceinline__ void save(uint32_t slot) {
    for_each_element(values, [&](W& value, int v, int i) { saved(slot, v, i) = value; });
  }
  __device__ __forceinline__ void add_saved(uint32_t slot) {
    for_each_element(values,
                     [&](W& value, int v, int i) { value = add(saved(slot, v, i), value); });
  }

  W* const saved_;
};

// Writes the factors of a weight, [D], to shared memory.
template <typename T>
__device__ __forceinline__ void share_factors(const NormArgs<Wide<T>>& norm, bool is_second,
                                              uint32_t D, Wide<T>* factors) {
  using W = Wide<T>;
  const char* const weight = norm.weights[is_second];
  for (uint32_t d = threadIdx.x; d < D; d += blockDim.x) {
    W value = 1;
    if (weight != nullptr) {
      value = norm.is_own[is_second] ? widen(reinterpret_cast<const T*>(weight)[d])
                                     : reinterpret_cast<const W*>(weight)[d];
    }
    factors[d] = weight_factor(value, norm.zero_centered[is_second]);
  }
}

// Calls f(dn, v, e) for element e of each vector v of a thread, few of them at a time to spare
// registers.
template <typename Traits, Cast kCast, typename F>
__device__ __forceinline__ void for_each_weighted(
    const Wide<typename Traits::Element>* factors, const ThreadTile<Traits>& tile,
    const typename ThreadTile<Traits>::WideVectors& dy, const F& f) {
  using T = typename Traits::Element;
  constexpr int kLoad = kVectorBytes / sizeof(Wide<T>);
#pragma unroll
  for (int i = 0; i < Traits::kVectorSize; i += kLoad) {
#pragma unroll
    for (int v = 0; v < Traits::kVectors; ++v) {
      const auto loaded = load_shared<kLoad>(factors + tile.start[v] + i);
#pragma unroll
      for (int k = 0; k < kLoad; ++k)
        f(weighted_gradient<T, kCast>(dy[v][i + k], loaded.element[k]), v, i + k);
    }
  }
}

struct alignas(kVectorBytes) Bytes16 {
  unsigned char bytes[kVectorBytes];
};

// A head of each group of a block, in shared memory: each thread's vectors.
struct HeadStage {
  Bytes16 x[2][kSmallBlockThreads];
  Bytes16 gradient[2][kSmallBlockThreads];
};
constexpr uint32_t kHeadStages = 2;  // the head that is computed, and the next one

// Of four warps, resident on a multiprocessor. More leave too few registers for a head in flight.
constexpr int kBackwardBlocks = 4;

// What a block does with tensor kTensor, whose index is known at compile time: constants of the
// launch are then operands of the loop's instructions.
template <typename Traits, bool kAfter, int kTensor>
__device__ __forceinline__ void backward_of_block(
    const KernelParams& params, const BackwardArgs<Wide<typename Traits::Element>>& args,
    uint32_t block) {
  using T = typename Traits::Element;
  using W = Wide<T>;
  using Vectors = typename ThreadTile<Traits>::Vectors;
  using WideVectors = typename ThreadTile<Traits>::WideVectors;
  const TensorArgs& tensor = params.tensors[kTensor];
  const LookupArgs& lookups = params.lookups[kTensor];
  const auto& of_tensor = args.tensors[kTensor];

  const uint32_t warp = block * (kSmallBlockThreads / kWarp) + threadIdx.x / kWarp;
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t thread = lane & (args.group_threads - 1);
  const uint32_t groups = 1u << args.leaf_bits;  // of a leaf
  const uint32_t group = (lane >> args.group_bits) & (groups - 1);
  const uint32_t leaf = warp * args.leaves_of_warp + (lane >> args.group_bits >> args.leaf_bits);
  const bool exists = thread < params.rotating_threads && leaf < of_tensor.leaves;
  ThreadTile<Traits> tile(params, thread);
  W* const factors = static_cast<W*>(shared_memory());
  ThreadSums<Traits> sums(factors + args.D);

  // Heads in flight: they need no registers.
  auto* const stages = reinterpret_cast<HeadStage*>(sums.end(args.chains_of_group));
  const auto fetch_head = [&](uint32_t stage, const LinearCoordinates& at, bool wanted) {
    const T* const x = reinterpret_cast<const T*>(tensor.in + tensor.in_offset.at(at));
    const T* const gradient =
        reinterpret_cast<const T*>(of_tensor.gradient + of_tensor.gradient_offset.at(at));
#pragma unroll
    for (int v = 0; v < Traits::kVectors; ++v) {
      copy_async(stages[stage].x[v][threadIdx.x], x + tile.start[v], wanted);
      copy_async(stages[stage].gradient[v][threadIdx.x], gradient + tile.start[v], wanted);
    }
    commit_copies();
  };
  const auto read = [&](const Bytes16(&from)[Traits::kVectors][kSmallBlockThreads],
                        WideVectors& wide) {
    Vectors vectors;
#pragma unroll
    for (int v = 0; v < Traits::kVectors; ++v) {
      vectors[v] =
          load_shared<Traits::kVectorSize>(reinterpret_cast<const T*>(from[v][threadIdx.x].bytes));
    }
    tile.widen_all(vectors, wide);
  };

  const auto load_rows = [&](const LinearCoordinates& at, bool wanted) {
    RowPointers rows = {nullptr, nullptr};
    bool rotates = true;
    if (is_linear(Traits::kLookup) || wanted) {
      const TileToken token = {params, tensor, lookups, at, 0};
      rotates = find_rows<Traits::kLookup>(params, tensor, lookups, at, token, rows);
    }
    tile.load_rows(params, rows, wanted && rotates);
    return rotates;  // a head that does not exist, too
  };

  const uint32_t first = leaf * kChains + group * args.chains_of_group;
  const uint32_t end = exists ? of_tensor.heads : 0;
  uint32_t index = first;
  LinearCoordinates at = tensor.locate(index);
  fetch_head(0, at, index < end);
  bool rotates = load_rows(at, index < end);
  char* out = tensor.out + tensor.out_offset.at(at);
  share_factors<T>(args.norm, kTensor, args.D, factors);
  sync_block();
  uint32_t stage = 0;
  for (uint32_t pass = 0; pass < args.chains_of_group; ++pass) {
    sums.clear();
    for (uint32_t step = 1; step <= of_tensor.steps; ++step) {
      const bool is_head = index < end;
      const bool is_last = step == of_tensor.steps;  // of this chain
      index = is_last ? first + pass + 1 : index + of_tensor.leaves * kChains;
      const bool is_next_head = index < end && (!is_last || pass + 1 < args.chains_of_group);
      at = tensor.locate(index);
      fetch_head(1 - stage, at, is_next_head);

      wait_for_copies<1>();
      WideVectors x, dy;  // the one that is rotated first, to spare registers
      if (kAfter) {
        read(stages[stage].x, x);
        if (rotates) tile.rotate_wide(x);
        round_between<T>(args.norm.cast, x);
        read(stages[stage].gradient, dy);
      } else {
        read(stages[stage].gradient, dy);
        if (rotates) tile.rotate_wide(dy);
        rotates = load_rows(at, is_next_head);
        round_between<T>(args.norm.cast, dy);
        read(stages[stage].x, x);
      }
      visit(args.norm.cast, [&]<Cast kCast>() {
        W squares[Traits::kVectorSize] = {}, products[Traits::kVectorSize] = {};
        for_each_weighted<Traits, kCast>(factors, tile, dy, [&](W dn, int v, int e) {
          const W square = multiply(x[v][e], x[v][e]);
          const W product = multiply(dn, x[v][e]);
          squares[e] = v == 0 ? square : add(squares[e], square);
          products[e] = v == 0 ? product : add(products[e], product);
        });
        W of_head[] = {sum_of_thread(squares), sum_of_thread(products)};
        add_threads(of_head, args.group_threads, is_head);
        const W r = args.norm.scalars.inverse_rms(of_head[0]);
        const W mean = args.norm.scalars.mean_product(of_head[1], r);
        for_each_weighted<Traits, kCast>(factors, tile, dy, [&](W dn, int v, int e) {
          if (is_head) {
            sums.values[v][e] =
                add(sums.values[v][e], weight_gradient<T, kCast>(dy[v][e], x[v][e], r));
          }
          dy[v][e] = input_gradient(dn, x[v][e], r, mean);
        });
      });
      if (kAfter) {
        round_between<T>(args.norm.cast, dy);
        if (rotates) tile.template rotate_wide<true>(dy);
        rotates = load_rows(at, is_next_head);
      }
      Vectors vectors;
      tile.narrow_all(dy, vectors);
      if (is_head && tensor.out != nullptr) tile.store_elements(params, out, 1, vectors);
      out = tensor.out + tensor.out_offset.at(at);
      stage = 1 - stage;
    }
    sums.add_chains(pass, args.chains_of_group);
  }
  sums.add_groups(groups, args.group_threads);
  if (of_tensor.sums == nullptr) return;
  // The leaves of each branch are added in shared memory, where heads were.
  wait_for_copies<0>();
  sync_block();
  W* const leaves = reinterpret_cast<W*>(stages);
  const uint32_t block_leaf = leaf - block * args.leaves_of_warp * (kSmallBlockThreads / kWarp);
  if (thread < params.rotating_threads && group == 0)
    sums.store_shared(leaves + block_leaf * args.D, tile.start);
  sync_block();
  for (uint32_t i = 0; i < args.leaves_of_warp; ++i) {
    const uint32_t branch = block * args.leaves_of_warp + i;
    if (branch * kLeaves >= of_tensor.leaves) return;
    const W* const first = leaves + i * kLeaves * args.D;
    for (uint32_t d = threadIdx.x; d < args.D; d += blockDim.x) {
      const auto at = [&](uint32_t l) { return first[l * args.D + d]; };
      of_tensor.sums[size_t{branch} * args.D + d] = sum_of_four(at(0), at(1), at(2), at(3));
    }
  }
}

// A group of lanes takes the heads of a chain one after another, the next one's x, gradient and row
// in flight. The rows in params are those of the rotation when it comes before the norm, else those
// of its inverse. kAfter: the norm comes after the rotation; at run time that choice would cost
// registers.
template <typename Traits, bool kAfter>
__global__ void __launch_bounds__(kSmallBlockThreads, kBackwardBlocks) norm_backward_kernel(
    const __grid_constant__ KernelParams params,
    const __grid_constant__ BackwardArgs<Wide<typename Traits::Element>> args) {
  if (blockIdx.x < params.second_block) {
    backward_of_block<Traits, kAfter, 0>(params, args, blockIdx.x);
  } else {
    backward_of_block<Traits, kAfter, 1>(params, args, blockIdx.x - params.second_block);
  }
}

}  // namespace fused_rope::kernels
