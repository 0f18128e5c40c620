// Forward-mode AD: tensors with tangents. PyTorch has only one level of it.
#pragma once

#include <ATen/ops/_make_dual.h>
#include <ATen/ops/_unpack_dual.h>

namespace fused_rope {

// A tensor and its tangent, which is undefined if there is none.
struct Dual {
  explicit Dual(const at::Tensor& x) {
    std::tie(primal, tangent) = at::_unpack_dual(x, /*level=*/0);
  }
  at::Tensor primal, tangent;
};

inline bool has_tangent(const at::Tensor& x) { return x._fw_grad(/*level=*/0).defined(); }

inline at::Tensor join(const at::Tensor& primal, const at::Tensor& tangent) {
  return tangent.defined() ? at::_make_dual(primal, tangent, /*level=*/0) : primal;
}

}  // namespace fused_rope
