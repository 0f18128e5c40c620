// A warp for each head, whose elements are in shared memory: the norm, and the cache, of every
// layout. Heads of whole vectors have faster kernels.
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
  FastDivmod per_distance;
  uint32_t tree_leaves;
  uint32_t axes;  // of positions
  uint8_t row_flags;
  bool moves_vectors;  // of 16 bytes
  PairAxes pairs;

  explicit WarpHeadParams(const RotateParams& p)
      : call(p),
        norm(p.norm == nullptr ? NormParams() : *p.norm),
        scalars(p.D, norm.eps),
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

// Head `index` of a tensor with H of them, in the order of weight_gradients.h.
struct HeadPlace {
  int64_t b, s, h;

  __device__ __forceinline__ HeadPlace(int64_t index, int64_t H, int64_t S) {
    const int64_t token = divide(index, H);
    h = index - token * H;
    b = divide(token, S);
    s = token - b * S;
  }

  __device__ __forceinline__ int64_t offset(const Strides& strides) const {
    return b * strides.b + s * strides.s + h * strides.h;
  }

  // The row that out_rows gives its token, or -1.
  __device__ __forceinline__ int64_t out_row(const RowParams& rows) const {
    const int64_t row = output_row(rows, b, s);
    FUSED_ROPE_DEVICE_CHECK(row == -1 || is_row(row, rows.out_rows_limit));
    return row;
  }
};

// One head, for the 32 threads of a warp. Their loops are over lanes; all of them must call each
// function.
template <typename T, typename Table, Precision kPrecision>
class WarpHead {
 public:
  using W = Wide<T>;

  // Head `index` of tensor i.
  __device__ __forceinline__ WarpHead(const WarpHeadParams& params, int i, int64_t index, W* tree)
      : place(index, params.call.tensors[i].H, params.call.S),
        params_(params),
        tree_(tree),
        tensor_(i),
        lane_(threadIdx.x % kWarp) {
    const RowParams& rows = params.call.rows;
    const uint32_t axis = params.pairs.is_used(lane_) ? lane_ : params.pairs.axis[0];
    row_ = table_row(params.row_flags, rows.offset, Token{rows, place.b, place.s, axis});
    FUSED_ROPE_DEVICE_CHECK((params.row_flags & kGathered) || row_.copied ||
                            is_row(row_.index, rows.M));
  }

  const HeadPlace place;

  __device__ __forceinline__ int64_t offset_in_row(const Strides& strides, int64_t row) const {
    return row * strides.s + place.h * strides.h;
  }

  __device__ __forceinline__ void load_all(const void* data, const Strides& strides, W* to) const {
    const T* from = static_cast<const T*>(data) + place.offset(strides);
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

  // Normalizes in place and rotates, without the last rounding.
  __device__ __forceinline__ void normalize_and_rotate(W* head) const {
    const bool after = params_.norm.after;
    visit(params_.norm.cast, [&]<Cast kCast>() {
      if (after) {
        rotate(head, params_.call.inverse);
        round_between<kCast>(head);
      }
      const W squares = sum([&](uint32_t d) { return multiply(head[d], head[d]); });
      const W r = NormScalars<W>(params_.scalars).inverse_rms(squares);
      for_each_element([&](uint32_t d) { head[d] = normalize<T, kCast>(head[d], r, factor(d)); });
      sync_warp();
    });
    if (!after) rotate(head, params_.call.inverse);
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

  __device__ __forceinline__ W entry(const TableParams& table, int64_t row, uint32_t j) const {
    const auto* entries = static_cast<const Table*>(table.data);
    const int64_t at = table_offset(table, row, place.b, place.s, place.h) + j * table.j;
    return rounded<T, kPrecision>(widen(entries[at]));
  }

  const WarpHeadParams& params_;
  W* const tree_;
  const int tensor_;
  const uint32_t lane_;
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

}  // namespace fused_rope::kernels
