// Differentiable operations that several derivatives share.
#pragma once

#include <ATen/ops/add.h>

#include "ops/dispatch.h"

namespace fused_rope {

inline at::Tensor rotate_one(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                             const at::Tensor& sin) {
  return std::get<0>(call_rotate({"rotate", {&x, nullptr}, cos, sin, a}));
}

// The sum of two gradients, either of which may be undefined.
inline at::Tensor sum_or_either(const at::Tensor& x, const at::Tensor& y) {
  return !x.defined() ? y : !y.defined() ? x : at::add(x, y);
}

}  // namespace fused_rope
