// The rotation of a pair, written once for host and device, forward and backward.
#pragma once

#include "fused_rope/kernels/numeric.h"
#include "fused_rope/types.h"

namespace fused_rope::kernels {

template <typename T>
struct Pair {
  Wide<T> a;
  Wide<T> b;
};

// A table entry or a product as the precision has it: rounded to T in kModel, unchanged in kFp32.
template <typename T, Precision kPrecision, typename V>
FUSED_ROPE_HOST_DEVICE Wide<T> rounded(V value) {
  if constexpr (kPrecision == Precision::kModel) {
    return widen(narrow<T>(value));
  } else {
    return static_cast<Wide<T>>(value);
  }
}

// Calls f<kPrecision>(). In float32 and float64 the two precisions are equal.
template <typename T, typename F>
decltype(auto) visit_precision(Precision precision, const F& f) {
  if constexpr (sizeof(T) == 2) {
    if (precision == Precision::kModel) return f.template operator()<Precision::kModel>();
  }
  return f.template operator()<Precision::kFp32>();
}

// Products and sums that the compiler must not contract into an FMA: CPU and CUDA results are
// bitwise identical. On the host, -ffp-contract=off prevents contraction.
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

// One element of a pair: own * c + partner * s, with -s for the first element and s for the second.
template <typename T, Precision kPrecision>
FUSED_ROPE_HOST_DEVICE Wide<T> rotate_element(Wide<T> own, Wide<T> partner, Wide<T> c, Wide<T> s) {
  return add(rounded<T, kPrecision>(multiply(own, c)),
             rounded<T, kPrecision>(multiply(partner, s)));
}

// (a, b) -> (a*c - b*s, b*c + a*s). The inverse, which is also the backward, negates s.
template <typename T, Precision kPrecision>
FUSED_ROPE_HOST_DEVICE Pair<T> rotate_pair(Wide<T> a, Wide<T> b, Wide<T> c, Wide<T> s) {
  return {rotate_element<T, kPrecision>(a, b, c, -s), rotate_element<T, kPrecision>(b, a, c, s)};
}

}  // namespace fused_rope::kernels
