// From tensors to the plain data that kernels take: the only reader of strides and data pointers.
#pragma once

#include "ops/checks.h"

namespace fused_rope {

// Plain data, and what must live until it is used.
class PreparedCall {
 public:
  // The call must have passed its checks. In place the outputs are the inputs.
  PreparedCall(const Call& call, const Outputs& outputs);

  RotateParams params = {};

 private:
  void set_outputs(const Call& call, const Outputs& outputs);

  std::array<at::Tensor, 2>
      widened_;  // cos and sin, where the kernels cannot read them as they are
};

// Memory for the result of rotating x: x's own strides where x is dense, row-major otherwise.
at::Tensor empty_output(const at::Tensor& x);

// The same straight from the allocator of x's device, for a tensor with memory on the current one:
// the dispatcher's way there takes as long as all else that a small call does.
at::Tensor allocate_output(const at::Tensor& x, c10::DispatchKey key, c10::Allocator* allocator);

}  // namespace fused_rope
