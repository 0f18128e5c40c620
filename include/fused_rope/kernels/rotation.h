// The formula: the only place of the library where a rotation is written, host and device, forward
// and backward.
#pragma once

#include "fused_rope/kernels/numeric.h"

namespace fused_rope {

// kFp32: rounded in Wide<T> after every product and sum, to T once at the end.
// kModel: the table, every product and the sum rounded to T, as eager PyTorch does in T.
enum class Precision { kFp32, kModel };

template <typename T>
struct Pair {
  Wide<T> a;
  Wide<T> b;
};

// value as the arithmetic of T sees it: a table entry or a product, rounded to T where the policy
// asks for it.
template <typename T, Precision kPrecision, typename V>
FUSED_ROPE_HOST_DEVICE Wide<T> rounded(V value) {
  if constexpr (kPrecision == Precision::kModel) {
    return widen(narrow<T>(value));
  } else {
    return static_cast<Wide<T>>(value);
  }
}

// Products and sums that no compiler may contract into an FMA. On the host, -ffp-contract=off sees
// to that.
template <typename V>
FUSED_ROPE_HOST_DEVICE V multiply(V x, V y) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<V, float>) {
    return __fmul_rn(x, y);
  } else {
    return __dmul_rn(x, y);
  }
#else
  return x * y;
#endif
}

template <typename V>
FUSED_ROPE_HOST_DEVICE V add(V x, V y) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<V, float>) {
    return __fadd_rn(x, y);
  } else {
    return __dadd_rn(x, y);
  }
#else
  return x + y;
#endif
}

// One member of a pair: own * c + partner * s. The first member of a pair takes -s, the second s.
template <typename T, Precision kPrecision>
FUSED_ROPE_HOST_DEVICE Wide<T> rotate_member(Wide<T> own, Wide<T> partner, Wide<T> c, Wide<T> s) {
  return add(rounded<T, kPrecision>(multiply(own, c)),
             rounded<T, kPrecision>(multiply(partner, s)));
}

// (a, b) -> (a*c - b*s, b*c + a*s). Inverse and backward are the same call with s negated.
template <typename T, Precision kPrecision>
FUSED_ROPE_HOST_DEVICE Pair<T> rotate_pair(Wide<T> a, Wide<T> b, Wide<T> c, Wide<T> s) {
  return {rotate_member<T, kPrecision>(a, b, c, -s), rotate_member<T, kPrecision>(b, a, c, s)};
}

}  // namespace fused_rope
