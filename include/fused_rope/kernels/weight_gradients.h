// The order in which the gradient of a norm's weight is summed over tokens and heads. It follows
// from their number alone, so that it depends on no device, layout or thread count.
//
// Head h of token (b, s) is row (b * S + s) * H + h. kChains consecutive rows form a group; leaf l
// has groups l, l + count, l + 2 * count and so on, so that leaves that run side by side read
// memory in order. Row i of each group of a leaf belongs to its chain i. A chain adds its rows in
// order, starting from 0. The sum of a leaf is (chain 0 + chain 1) + (chain 2 + chain 3), that of a
// branch of kLeaves consecutive leaves is (leaf 0 + leaf 1) + (leaf 2 + leaf 3), with 0 for a leaf
// that does not exist. The sums of branches k, k + kStrands, ... are added in order, starting from
// 0, to strand k; the two halves of the strands are added until one is left.
#pragma once

#include <algorithm>

#include "fused_rope/kernels/params.h"
#include "fused_rope/kernels/rotation.h"

namespace fused_rope::kernels {

constexpr uint32_t kChains = 4;  // of a leaf: four heads of 128 bfloat16 elements fill a warp
// Below this, a leaf has little work, and the sums of leaves become a part of the traffic.
constexpr int64_t kMinChainRows = 10;
// Four blocks of 128 threads on each of 132 multiprocessors, which are resident at once.
constexpr int64_t kMaxLeaves = 2112;
constexpr uint32_t kLeaves = 4;   // of a branch: the warps of a block
constexpr int64_t kStrands = 32;  // the lanes of a warp

// The sum of four chains or leaves.
template <typename W>
FUSED_ROPE_HOST_DEVICE W sum_of_four(W a, W b, W c, W d) {
  return add(add(a, b), add(c, d));
}

// The leaves of one tensor.
struct Leaves {
  int64_t rows;    // of the tensor
  int64_t groups;  // of rows; the last one may have fewer
  int64_t count;
  int64_t steps;  // groups of a leaf, at most

  explicit Leaves(int64_t all_rows)
      : rows(all_rows),
        groups(ceil_divide(rows, int64_t{kChains})),
        count(std::min(kMaxLeaves, ceil_divide(groups, kMinChainRows))),
        steps(count == 0 ? 0 : ceil_divide(groups, count)) {}

  // Calls f(row, chain) for the rows of a leaf.
  template <typename F>
  void for_each_row(int64_t leaf, const F& f) const {
    for (int64_t group = leaf; group < groups; group += count) {
      const int64_t first = group * kChains;
      for (int64_t row = first; row < std::min(first + kChains, rows); ++row) f(row, row - first);
    }
  }
};

inline Leaves leaves_of(const RotateParams& p, const TensorParams& t) {
  return Leaves(p.B * p.S * t.H);
}

// Bytes of the workspace of a tensor [B, S, H, D]: the sums of its leaves, [leaves, D] in the
// compute type.
inline int64_t workspace_bytes(int64_t B, int64_t S, int64_t H, int64_t D, DType dtype) {
  return Leaves(B * S * H).count * D * (dtype == DType::kFloat64 ? 8 : 4);
}

}  // namespace fused_rope::kernels
