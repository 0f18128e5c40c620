// The kernels of a norm for every layout: a warp for each head, whose elements are in shared
// memory. Heads that rotate as a whole in whole vectors have faster ones.
#pragma once

#include "fused_rope/kernels/cuda/kernel.cuh"
#include "fused_rope/kernels/weight_gradients.h"

namespace fused_rope::kernels {

// A call, passed by value.
struct WarpHeadParams {
  static constexpr bool kSharesWarps = true;

  RotateParams call;  // its pointers to host memory are not for the device
  NormParams norm;
  NormScalars<double> scalars;
  GradientParams gradients[kMaxTensors] = {};
  int64_t heads[kMaxTensors] = {};   // of each tensor
  int64_t leaves[kMaxTensors] = {};  // of each tensor, in the backward
  int64_t leaf_heads[kMaxTensors] = {};
  FastDivmod per_distance;
  uint32_t tree_leaves;
  uint32_t axes;  // of positions
  uint8_t row_flags;
  bool moves_vectors;  // of 16 bytes
  PairAxes pairs;

  explicit WarpHeadParams(const RotateParams& p)
      : call(p),
        norm(*p.norm),
        scalars(p.D, p.norm->eps),
        per_distance(std::max<int64_t>(p.pairing.distance, 1)),
        tree_leaves(static_cast<uint32_t>(kernels::tree_leaves(p.D))),
        axes(count_axes(p)),
        row_flags(kernels::row_flags(p.rows)),
        moves_vectors(common_vector(p, {p.D}) * size_of(p.dtype) == kVectorBytes),
        pairs(p) {
    for (int i = 0; i < p.count; ++i) heads[i] = p.B * p.S * p.tensors[i].H;
  }

  explicit WarpHeadParams(const NormBackwardParams& p) : WarpHeadParams(p.call) {
    const int64_t bytes = kVectorBytes;
    const int64_t size = size_of(p.call.dtype);
    for (int i = 0; i < p.call.count; ++i) {
      const GradientParams& tensor = gradients[i] = p.tensors[i];
      if (tensor.gradient == nullptr) continue;
      const Leaves of_tensor = leaves_of(p.call, p.call.tensors[i]);
      leaves[i] = of_tensor.count;
      leaf_heads[i] = of_tensor.leaf_rows;
      const Strides& strides = tensor.strides;
      moves_vectors = moves_vectors && strides.d == 1 &&
                      reinterpret_cast<uintptr_t>(tensor.gradient) % bytes == 0 &&
                      (strides.b | strides.s | strides.h) * size % bytes == 0;
    }
  }

  // Elements of shared memory of a warp: `arrays` of a head, and a tree.
  FUSED_ROPE_HOST_DEVICE int64_t warp_entries(int64_t arrays) const {
    return (arrays * call.D + tree_leaves + 3) / 4 * 4;
  }
};

// One head, for the 32 threads of a warp. Their loops are over lanes; all of them must call each
// function.
template <typename T, typename Table, Precision kPrecision>
class WarpHead {
 public:
  using W = Wide<T>;

  // Head `index` of tensor i, in the order of weight_gradients.h.
  __device__ __forceinline__ WarpHead(const WarpHeadParams& params, int i, int64_t index, W* tree)
      : params_(params), tree_(tree), tensor_(i), lane_(threadIdx.x % kWarp) {
    const RotateParams& call = params.call;
    const int64_t token = divide(index, call.tensors[i].H);
    h_ = index - token * call.tensors[i].H;
    b_ = divide(token, call.S);
    s_ = token - b_ * call.S;
    const uint32_t axis = lane_ < params.axes ? lane_ : 0;
    row_ = table_row(params.row_flags, call.rows.offset, Token{call.rows, b_, s_, axis});
    FUSED_ROPE_DEVICE_CHECK((params.row_flags & kGathered) || row_.copied ||
                            is_row(row_.index, call.rows.M));
  }

  __device__ __forceinline__ int64_t offset(const Strides& strides) const {
    return b_ * strides.b + s_ * strides.s + h_ * strides.h;
  }

  // The row of a scattered output, or -1.
  __device__ __forceinline__ int64_t out_row() const {
    const int64_t row = output_row(params_.call.rows, b_, s_);
    FUSED_ROPE_DEVICE_CHECK(row == -1 || is_row(row, params_.call.rows.out_rows_limit));
    return row;
  }
  __device__ __forceinline__ int64_t offset_in_row(const Strides& strides, int64_t row) const {
    return row * strides.s + h_ * strides.h;
  }

  __device__ __forceinline__ void load_all(const void* data, const Strides& strides, W* to) const {
    const T* from = static_cast<const T*>(data) + offset(strides);
    if (params_.moves_vectors) {
      constexpr int kSize = kVectorBytes / sizeof(T);
      for (uint32_t d = lane_ * kSize; d < D(); d += kWarp * kSize) {
        const auto vector = load<kSize>(from + d, kEvictNormal, true);
#pragma unroll
        for (int i = 0; i < kSize; ++i) to[d + i] = widen_element(vector, i);
      }
    } else {
      for_each_element([&](uint32_t d) { to[d] = widen(from[d * strides.d]); });
    }
    sync_warp();
  }

  __device__ __forceinline__ void store_all(const W* from, void* data, int64_t offset,
                                            int64_t stride) const {
    T* to = static_cast<T*>(data) + offset;
    if (params_.moves_vectors) {
      constexpr int kSize = kVectorBytes / sizeof(T);
      for (uint32_t d = lane_ * kSize; d < D(); d += kWarp * kSize) {
        Vector<T, kSize> vector;
#pragma unroll
        for (int i = 0; i < kSize; ++i) vector.element[i] = narrow<T>(from[d + i]);
        store(to + d, vector, kEvictNormal, true);
      }
    } else {
      for_each_element([&](uint32_t d) { to[d * stride] = narrow<T>(from[d]); });
    }
  }

  // Rotates in place, without the last rounding, by the rotation or its inverse.
  __device__ __forceinline__ void rotate(W* head, bool inverse) const {
    const RotateParams& call = params_.call;
    const auto P = static_cast<uint32_t>(call.pairing.P);
    const auto distance = static_cast<uint32_t>(call.pairing.distance);
    for (uint32_t start = 0; start < P; start += kWarp) {
      const uint32_t j = start + lane_;
      const bool exists = j < P;
      Row row = row_;
      if (params_.axes > 1) {
        const uint32_t axis = exists ? params_.pairs.axis[j] : 0;
        row.index = from_lane(row_.index, axis);
        row.copied = from_lane(static_cast<int>(row_.copied), axis) != 0;
      }
      if (!exists || row.copied) continue;
      W* const a = head + call.pairing.offset + j + params_.per_distance.div(j) * distance;
      W* const b = a + distance;
      const W c = entry(call.cos, row.index, j);
      const W s = entry(call.sin, row.index, j);
      const auto pair = rotate_pair<T, kPrecision>(*a, *b, c, inverse ? -s : s);
      *a = pair.a;
      *b = pair.b;
    }
    sync_warp();
  }

  // The factor of the weight for element d.
  __device__ __forceinline__ W factor(uint32_t d) const {
    const WeightParams& weight = params_.norm.weights[tensor_];
    if (weight.data == nullptr) return 1;
    const int64_t at = d * weight.stride;
    const auto value = weight.dtype == params_.call.dtype
                           ? static_cast<W>(widen(static_cast<const T*>(weight.data)[at]))
                           : static_cast<W>(static_cast<const float*>(weight.data)[at]);
    return weight_factor(value, params_.norm.zero_centered);
  }

  // The sum of term(d) over all elements, by the tree of normalization.h.
  template <typename F>
  __device__ __forceinline__ W sum(const F& term) const {
    const auto half = static_cast<uint32_t>(tree_half(D()));
    sync_warp();
    for (uint32_t i = lane_; i < params_.tree_leaves; i += kWarp) {
      const W first = i < half ? term(i) : W{0};
      const W second = i + half < D() ? term(i + half) : W{0};
      tree_[i] = i < half ? add(first, second) : W{0};
    }
    sync_warp();
    uint32_t n = params_.tree_leaves;
    for (; n > kWarp; n /= 2) {
      for (uint32_t i = lane_; i < n / 2; i += kWarp) {
        const W neighbors = add(tree_[2 * i], tree_[2 * i + 1]);
        sync_warp();
        tree_[i] = neighbors;
      }
      sync_warp();
    }
    W value = lane_ < n ? tree_[lane_] : W{0};
    for (uint32_t mask = 1; mask < n; mask *= 2) value = add(value, from_other_lane(value, mask));
    return from_lane(value, 0);
  }

  // Calls f(d) for each element, in the lane that owns it.
  template <typename F>
  __device__ __forceinline__ void for_each_element(const F& f) const {
    for (uint32_t d = lane_; d < D(); d += kWarp) f(d);
  }

  // Rounds what is between norm and rotation.
  template <Cast kCast>
  __device__ __forceinline__ void round_between(W* head) const {
    if (kCast == Cast::kNever) return;
    for_each_element([&](uint32_t d) { head[d] = between<T, kCast>(head[d]); });
    sync_warp();
  }

 private:
  __device__ __forceinline__ uint32_t D() const { return static_cast<uint32_t>(params_.call.D); }

  // In 32 bits where they are enough.
  __device__ __forceinline__ static int64_t divide(int64_t n, int64_t by) {
    if (n <= INT32_MAX && by <= INT32_MAX)
      return static_cast<uint32_t>(n) / static_cast<uint32_t>(by);
    return n / by;
  }

  __device__ __forceinline__ W entry(const TableParams& table, int64_t row, uint32_t j) const {
    const auto* entries = static_cast<const Table*>(table.data);
    const int64_t at = table_offset(table, row, b_, s_, h_) + j * table.j;
    return rounded<T, kPrecision>(widen(entries[at]));
  }

  const WarpHeadParams& params_;
  W* const tree_;
  const int tensor_;
  const uint32_t lane_;
  int64_t b_, s_, h_;
  Row row_;  // of the axis of this lane
};

// The shared memory of this thread's warp.
template <typename W>
__device__ __forceinline__ W* warp_memory(int64_t entries) {
  return static_cast<W*>(shared_memory()) + threadIdx.x / kWarp * entries;
}

// Calls f(i, index) for index in [0, counts[i]), each in one warp of the grid.
template <typename F>
__device__ __forceinline__ void for_each_of_warp(const int64_t (&counts)[kMaxTensors], const F& f) {
  const uint32_t warps = blockDim.x / kWarp;
  for (int64_t index = int64_t{blockIdx.x} * warps + threadIdx.x / kWarp;
       index < counts[0] + counts[1]; index += int64_t{gridDim.x} * warps) {
    const bool is_second = index >= counts[0];
    f(is_second ? 1 : 0, index - (is_second ? counts[0] : 0));
  }
}

template <typename T, typename Table, Precision kPrecision>
__global__ void __launch_bounds__(kSmallBlockThreads)
    norm_heads_kernel(const __grid_constant__ WarpHeadParams params) {
  using W = Wide<T>;
  W* const x = warp_memory<W>(params.warp_entries(1));
  for_each_of_warp(params.heads, [&](int i, int64_t index) {
    const TensorParams& t = params.call.tensors[i];
    const WarpHead<T, Table, kPrecision> head(params, i, index, x + params.call.D);
    const int64_t slot = params.row_flags & kHasOutRows ? head.out_row() : 0;
    if (t.scattered && slot < 0) return;
    const NormScalars<W> scalars(params.scalars);
    visit(params.norm.cast, [&]<Cast kCast>() {
      sync_warp();
      head.load_all(t.in, t.in_strides, x);
      if (params.norm.after) {
        head.rotate(x, params.call.inverse);
        head.template round_between<kCast>(x);
      }
      const W sum = head.sum([&](uint32_t d) { return multiply(x[d], x[d]); });
      const W r = scalars.inverse_rms(sum);
      head.for_each_element(
          [&](uint32_t d) { x[d] = normalize<T, kCast>(x[d], r, head.factor(d)); });
      sync_warp();
      if (!params.norm.after) head.rotate(x, params.call.inverse);
      head.store_all(
          x, t.out,
          t.scattered ? head.offset_in_row(t.out_strides, slot) : head.offset(t.out_strides),
          t.out_strides.d);
    });
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
    const int64_t first = leaf * params.leaf_heads[i];
    const int64_t whole = first + params.leaf_heads[i];
    const int64_t end = whole < params.heads[i] ? whole : params.heads[i];
    for (int64_t index = first; index < end; ++index) {
      W* const chain = chains + (index - first) % kChains * D;
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
        head.store_all(dy, t.out, head.offset(t.out_strides), t.out_strides.d);
      });
    }
    if (g.weight_gradient == nullptr) return;
    W* const sums = static_cast<W*>(g.workspace) + leaf * D;
    for (int64_t d = lane; d < D; d += kWarp) {
      sums[d] = add(add(chains[d], chains[D + d]), add(chains[2 * D + d], chains[3 * D + d]));
    }
  });
}

// What is left of the backward: the sums of all leaves.
struct LeafSumParams {
  static constexpr bool kSharesWarps = true;

  uint32_t D;
  uint32_t leaves[kMaxTensors];
  const void* sums[kMaxTensors];  // [leaves, D]
  void* to[kMaxTensors];          // [D]
  bool is_wide[kMaxTensors];      // of float32, not x's dtype
};

constexpr int kSumThreads = 1024;
constexpr int kSumElements = kSumThreads / kStrands;  // of a block: 32 bytes of float32

// Blocks [0, second) have the elements of the first tensor, the others those of the second.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    sum_leaves_kernel(const __grid_constant__ LeafSumParams params) {
  using W = Wide<T>;
  const uint32_t blocks = (params.D + kSumElements - 1) / kSumElements;  // of a tensor
  const uint32_t tensor = blockIdx.x / blocks;
  const uint32_t d = blockIdx.x % blocks * kSumElements + threadIdx.x % kSumElements;
  const uint32_t strand = threadIdx.x / kSumElements;
  auto* const shared = static_cast<W*>(shared_memory());
  W sum = 0;
  if (d < params.D) {
    const W* const from = static_cast<const W*>(params.sums[tensor]) + d;
#pragma unroll 4
    for (uint32_t leaf = strand; leaf < params.leaves[tensor]; leaf += kStrands)
      sum = add(sum, from[size_t{leaf} * params.D]);
  }
  shared[threadIdx.x] = sum;
  for (uint32_t n = kStrands / 2; n > 0; n /= 2) {
    sync_block();
    if (strand < n)
      shared[threadIdx.x] = add(shared[threadIdx.x], shared[threadIdx.x + n * kSumElements]);
  }
  if (strand > 0 || d >= params.D) return;
  const W total = shared[threadIdx.x];
  if (params.is_wide[tensor]) {
    static_cast<float*>(params.to[tensor])[d] = static_cast<float>(total);
  } else {
    static_cast<T*>(params.to[tensor])[d] = narrow<T>(total);
  }
}

}  // namespace fused_rope::kernels
