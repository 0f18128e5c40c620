// The kernels of a norm for every layout. Heads that rotate as a whole in whole vectors have faster
// ones.
#pragma once

#include "fused_rope/kernels/cuda/warp_head.cuh"

namespace fused_rope::kernels {

template <typename T, typename Table, Precision kPrecision>
__global__ void __launch_bounds__(kSmallBlockThreads)
    norm_heads_kernel(const __grid_constant__ WarpHeadParams params) {
  using W = Wide<T>;
  W* const x = warp_memory<W>(params.warp_entries(1));
  for_each_of_warp(params.heads, [&](int i, int64_t index) {
    const TensorParams& t = params.call.tensors[i];
    const WarpHead<T, Table, kPrecision> head(params, i, index, x + params.call.D);
    const int64_t slot = params.row_flags & kHasOutRows ? head.place.out_row(params.call.rows) : 0;
    if (t.scattered && slot < 0) return;
    sync_warp();
    head.load_all(t.in, t.in_strides, x);
    head.normalize_and_rotate(x);
    head.store_all(
        x, t.out,
        t.scattered ? head.offset_in_row(t.out_strides, slot) : head.place.offset(t.out_strides),
        t.out_strides.d);
  });
}

// A warp for each leaf of weight_gradients.h.
template <typename T, typename Table, Precision kPrecision>
__global__ void __launch_bounds__(kSmallBlockThreads)
    norm_leaves_kernel(const __grid_constant__ WarpHeadParams params) {
  using W = Wide<T>;
  const int64_t D = params.call.D;
  W* const x = warp_memory<W>(params.warp_entries(2 + kChains));
  W* const dy = x + D;
  W* const chains = dy + D;
  const bool after = params.norm.after;
  const bool inverse = params.call.inverse;
  for_each_of_warp(params.leaves, [&](int i, int64_t leaf) {
    const TensorParams& t = params.call.tensors[i];
    const GradientParams& g = params.gradients[i];
    const NormScalars<W> scalars(params.scalars);
    const uint32_t lane = threadIdx.x % kWarp;
    for (int64_t d = lane; d < kChains * D; d += kWarp) chains[d] = 0;
    const int64_t step = kChains * (params.leaves[i] - 1) + 1;  // from a group to the next
    for (int64_t index = leaf * kChains; index < params.heads[i];
         index += index % kChains + 1 == kChains ? step : 1) {
      W* const chain = chains + index % kChains * D;
      const WarpHead<T, Table, kPrecision> head(params, i, index, chains + kChains * D);
      visit(params.norm.cast, [&]<Cast kCast>() {
        sync_warp();
        head.load_all(t.in, t.in_strides, x);
        head.load_all(g.gradient, g.strides, dy);
        head.rotate(after ? x : dy, after ? inverse : !inverse);
        head.template round_between<kCast>(after ? x : dy);
        const W squares = head.sum([&](uint32_t d) { return multiply(x[d], x[d]); });
        const W products = head.sum([&](uint32_t d) {
          return multiply(weighted_gradient<T, kCast>(dy[d], head.factor(d)), x[d]);
        });
        const W r = scalars.inverse_rms(squares);
        const W mean = scalars.mean_product(products, r);
        head.for_each_element([&](uint32_t d) {
          chain[d] = add(chain[d], weight_gradient<T, kCast>(dy[d], x[d], r));
          const W dn = weighted_gradient<T, kCast>(dy[d], head.factor(d));
          dy[d] = input_gradient(dn, x[d], r, mean);
        });
        sync_warp();
        if (t.out == nullptr) return;
        if (after) {
          head.template round_between<kCast>(dy);
          head.rotate(dy, !inverse);
        }
        head.store_all(dy, t.out, head.place.offset(t.out_strides), t.out_strides.d);
      });
    }
    if (g.weight_gradient == nullptr) return;
    W* const sums = static_cast<W*>(g.workspace) + leaf * D;
    for (int64_t d = lane; d < D; d += kWarp) {
      sums[d] = sum_of_four(chains[d], chains[D + d], chains[2 * D + d], chains[3 * D + d]);
    }
  });
}

// What is left of the backward: the sums of all leaves, or of branches where a block added theirs.
struct LeafSumParams {
  static constexpr bool kSharesWarps = true;

  uint32_t D;
  uint32_t count[kMaxTensors];    // of leaves or branches
  const void* sums[kMaxTensors];  // [count, D]
  void* to[kMaxTensors];          // [D]
  bool is_wide[kMaxTensors];      // of float32, not x's dtype
};

constexpr int kSumElements = 8;  // of a block: 32 bytes of float32
constexpr int kSumThreads = kSumElements * int{kStrands};

// Of a strand, at most.
constexpr uint32_t kStrandBranches =
    static_cast<uint32_t>(ceil_divide(kMaxLeaves, int64_t{kLeaves} * kStrands));

// Blocks [0, second) have the elements of the first tensor, the others those of the second.
template <typename T, bool kOfLeaves>
__global__ void __launch_bounds__(kSumThreads)
    sum_leaves_kernel(const __grid_constant__ LeafSumParams params) {
  using W = Wide<T>;
  const uint32_t blocks = (params.D + kSumElements - 1) / kSumElements;  // of a tensor
  const uint32_t tensor = blockIdx.x / blocks;
  const uint32_t first = blockIdx.x % blocks * kSumElements;
  const uint32_t d = first + threadIdx.x % kSumElements;
  const uint32_t strand = threadIdx.x / kSumElements;
  auto* const shared = static_cast<W*>(shared_memory());
  W sum = 0;
  if (d < params.D) {
    const W* const from = static_cast<const W*>(params.sums[tensor]) + d;
    const auto at = [&](uint32_t i) {
      return i < params.count[tensor] ? from[size_t{i} * params.D] : W{0};
    };
    // All loads in flight. The zeros of what does not exist change no sum.
    W branches[kStrandBranches];
#pragma unroll
    for (uint32_t i = 0; i < kStrandBranches; ++i) {
      const uint32_t branch = strand + i * kStrands;
      const uint32_t leaf = branch * kLeaves;
      branches[i] =
          kOfLeaves ? sum_of_four(at(leaf), at(leaf + 1), at(leaf + 2), at(leaf + 3)) : at(branch);
    }
#pragma unroll
    for (const W& branch : branches) sum = add(sum, branch);
  }
  shared[threadIdx.x] = sum;
  sync_block();
  // A warp for each element, a lane for each strand.
  static_assert(kStrands == kWarp);
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t element = threadIdx.x / kWarp;
  W total = shared[lane * kSumElements + element];
  for (uint32_t n = kWarp / 2; n > 0; n /= 2) total = add(total, from_other_lane(total, n));
  const uint32_t written = first + element;
  if (lane > 0 || written >= params.D) return;
  if (params.is_wide[tensor]) {
    static_cast<float*>(params.to[tensor])[written] = static_cast<float>(total);
  } else {
    static_cast<T*>(params.to[tensor])[written] = narrow<T>(total);
  }
}

}  // namespace fused_rope::kernels
