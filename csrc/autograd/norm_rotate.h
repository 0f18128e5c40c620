// norm_rotate and norm_rotate_qk under autograd. First derivatives are an operator; what is rarely
// asked for is composed of differentiable ATen operations.
#pragma once

#include "ops/dispatch.h"

namespace fused_rope {

// Calls the operator below autograd and records it.
TensorPair record_norm_rotate(const RawCall& call);

// The results with their tangents, if any of the call's tensors has one.
TensorPair norm_rotate_duals(const RawCall& call, bool is_recorded);

// norm_rotate_qk_backward in differentiable operations.
TensorQuad compose_norm_backward(const RawCall& call, const OptionalTensors& grads);

}  // namespace fused_rope
