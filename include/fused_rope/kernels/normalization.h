// RMS norm, written once for host and device, forward and backward:
//   r = 1 / sqrt(mean(x^2) + eps),  n = x * r,  y = n * w
#pragma once

#include <cmath>

#include "fused_rope/kernels/params.h"
#include "fused_rope/kernels/rotation.h"

namespace fused_rope::kernels {

// The one tree in which D terms of a head are added. Its leaves are term(i) + term(i + half) for i
// in [0, half), with 0 for a term that does not exist. Neighboring leaves, then neighboring sums,
// are added until one is left; zeros pad the leaves to a power of two. A thread that holds a vector
// of each half adds most of it alone, whatever the width of its vectors.
FUSED_ROPE_HOST_DEVICE constexpr int64_t tree_half(int64_t D) { return (D + 1) / 2; }

// The leaves with their padding.
FUSED_ROPE_HOST_DEVICE constexpr int64_t tree_leaves(int64_t D) {
  int64_t leaves = 1;
  while (leaves < tree_half(D)) leaves *= 2;
  return leaves;
}

#if defined(__CUDA_ARCH__)
// Correctly rounded, for x >= 0. What __fsqrt_rn and __frcp_rn do for most arguments; their calls
// for the others cost registers.
__device__ __forceinline__ float square_root(float x) {
  const bool is_small = x < 0x1p-96f;  // so that no intermediate result is subnormal
  const float scaled = is_small ? __fmul_rn(x, 0x1p64f) : x;
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(scaled));
  const float estimate = __fmul_rn(scaled, inverse);
  const float error = __fmaf_rn(-estimate, estimate, scaled);
  const float root = __fmaf_rn(error, __fmul_rn(inverse, 0.5f), estimate);
  const float result = scaled == 0 || scaled == INFINITY ? scaled : root;
  return is_small ? __fmul_rn(result, 0x1p-32f) : result;
}

// Correctly rounded, for the square roots of float32 numbers.
__device__ __forceinline__ float reciprocal(float x) {
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(x));
  const float error = __fmaf_rn(x, estimate, -1.0f);
  const float result = __fmaf_rn(estimate, -error, estimate);
  return x == 0 || x == INFINITY ? estimate : result;
}

__device__ __forceinline__ double square_root(double x) { return __dsqrt_rn(x); }
__device__ __forceinline__ double reciprocal(double x) { return __drcp_rn(x); }
#else
template <typename V>
FUSED_ROPE_HOST_DEVICE V square_root(V x) {
  return std::sqrt(x);
}
template <typename V>
FUSED_ROPE_HOST_DEVICE V reciprocal(V x) {
  return 1 / x;
}
#endif

// What the norm needs to know of a call, in the compute type.
template <typename V>
struct NormScalars {
  V inverse_D;
  V eps;

  NormScalars() = default;
  NormScalars(int64_t D, double eps_of_call)
      : inverse_D(static_cast<V>(1.0 / static_cast<double>(D))), eps(static_cast<V>(eps_of_call)) {}

  template <typename Other>
  FUSED_ROPE_HOST_DEVICE explicit NormScalars(const NormScalars<Other>& other)
      : inverse_D(static_cast<V>(other.inverse_D)), eps(static_cast<V>(other.eps)) {}

  // r, from the sum of squares.
  FUSED_ROPE_HOST_DEVICE V inverse_rms(V sum) const {
    return reciprocal(square_root(add(multiply(sum, inverse_D), eps)));
  }

  // mean(dn * n), from r and the sum of dn * x.
  FUSED_ROPE_HOST_DEVICE V mean_product(V sum, V r) const {
    return multiply(multiply(sum, r), inverse_D);
  }
};

// A value that kCast rounds to T, or that it does not.
template <typename T, bool kRounds>
FUSED_ROPE_HOST_DEVICE Wide<T> rounded_if(Wide<T> value) {
  return rounded<T, kRounds ? Precision::kModel : Precision::kFp32>(value);
}

// Calls f<kCast>().
template <typename F>
FUSED_ROPE_HOST_DEVICE void visit(Cast cast, const F& f) {
  switch (cast) {
    case Cast::kNever:
      return f.template operator()<Cast::kNever>();
    case Cast::kBefore:
      return f.template operator()<Cast::kBefore>();
    default:
      return f.template operator()<Cast::kAfter>();
  }
}

// The tensor between norm and rotation, or its gradient.
template <typename T, Cast kCast>
FUSED_ROPE_HOST_DEVICE Wide<T> between(Wide<T> value) {
  return rounded_if<T, kCast != Cast::kNever>(value);
}

// The factor w of a weight.
template <typename V>
FUSED_ROPE_HOST_DEVICE V weight_factor(V weight, bool zero_centered) {
  return zero_centered ? add(V{1}, weight) : weight;
}

// y.
template <typename T, Cast kCast>
FUSED_ROPE_HOST_DEVICE Wide<T> normalize(Wide<T> x, Wide<T> r, Wide<T> w) {
  const Wide<T> n = rounded_if<T, kCast == Cast::kBefore>(multiply(x, r));
  return between<T, kCast>(multiply(n, w));
}

// dn = dy * w. With dy, a gradient that `between` rounded.
template <typename T, Cast kCast>
FUSED_ROPE_HOST_DEVICE Wide<T> weighted_gradient(Wide<T> dy, Wide<T> w) {
  return rounded_if<T, kCast == Cast::kBefore>(multiply(dy, w));
}

// The gradient of the weight from one head.
template <typename T, Cast kCast>
FUSED_ROPE_HOST_DEVICE Wide<T> weight_gradient(Wide<T> dy, Wide<T> x, Wide<T> r) {
  constexpr bool kRounds = kCast == Cast::kBefore;
  return rounded_if<T, kRounds>(multiply(dy, rounded_if<T, kRounds>(multiply(x, r))));
}

// dx = r * (dn - n * mean(dn * n)).
template <typename V>
FUSED_ROPE_HOST_DEVICE V input_gradient(V dn, V x, V r, V mean) {
  return multiply(r, add(dn, -multiply(multiply(x, r), mean)));
}

}  // namespace fused_rope::kernels
