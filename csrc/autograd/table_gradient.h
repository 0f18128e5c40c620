// Gradients and tangents with respect to the tables, composed from differentiable ATen operations.
#pragma once

#include "ops/dispatch.h"

namespace fused_rope {

// The rotated elements of x, a view [..., R].
at::Tensor rotated_elements(const Arguments& a, const at::Tensor& x, const at::Tensor& cos);

// Gradients of cos and sin, in their shape and dtype, from the rotated elements of x and the
// gradient of its output. Tokens that share a row are summed in a fixed order.
TensorPair table_gradient(const Arguments& a, const at::Tensor& elements, const at::Tensor& grad,
                          const at::Tensor& cos);

// rotate(x, cos_tangent, sin_tangent), but zero where an element is copied through.
at::Tensor table_tangent(const Arguments& a, const at::Tensor& x, const at::Tensor& cos_tangent,
                         const at::Tensor& sin_tangent);

}  // namespace fused_rope
