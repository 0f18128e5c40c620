// From tensors to the plain data that kernels take: the only reader of strides and data pointers.
#pragma once

#include "ops/checks.h"

namespace fused_rope {

// Plain data, and what must live until it is used.
struct PreparedCall {
  RotateParams params;
  at::Tensor cos, sin;  // as the kernels read them
};

// Everything but the outputs. The call must have passed its checks.
PreparedCall prepare(const Call& call);

// Adds the outputs; in place they are the inputs.
void set_outputs(RotateParams& params, const Call& call, const Outputs& outputs);

// Memory for the result of rotating x: x's own strides where x is dense, row-major otherwise.
at::Tensor empty_output(const at::Tensor& x);

}  // namespace fused_rope
