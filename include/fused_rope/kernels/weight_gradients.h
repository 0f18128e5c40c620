// The order in which the gradient of a norm's weight is summed over tokens and heads. It follows
// from their number alone, so that it depends on no device, layout or thread count.
//
// Head h of token (b, s) is row (b * S + s) * H + h. Consecutive rows form leaves; row i of a leaf
// belongs to its chain i % kChains. A chain adds its rows in order, starting from 0. The sum of a
// leaf is (chain 0 + chain 1) + (chain 2 + chain 3). The sums of leaves k, k + kStrands, ... are
// added in order, starting from 0, to strand k; the two halves of the strands are added until one
// is left.
#pragma once

#include <algorithm>

#include "fused_rope/kernels/params.h"

namespace fused_rope::kernels {

constexpr int64_t kChains = 4;  // of a leaf: four heads of 128 bfloat16 elements fill a warp
// Below this, a leaf has little work, and the sums of leaves become a part of the traffic.
constexpr int64_t kMinChainRows = 8;
// Four blocks of 128 threads on each of 132 multiprocessors, which are resident at once.
constexpr int64_t kMaxLeaves = 2112;
constexpr int64_t kStrands = 128;

// The leaves of one tensor.
struct Leaves {
  int64_t rows;       // of the tensor
  int64_t leaf_rows;  // of a leaf; the last one may have fewer
  int64_t count;

  explicit Leaves(int64_t all_rows)
      : rows(all_rows),
        leaf_rows(kChains * std::max(kMinChainRows, ceil_divide(all_rows, kChains * kMaxLeaves))),
        count(ceil_divide(all_rows, leaf_rows)) {}

  int64_t first(int64_t leaf) const { return leaf * leaf_rows; }
  int64_t end(int64_t leaf) const { return std::min(first(leaf) + leaf_rows, rows); }
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
