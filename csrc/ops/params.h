// Converts tensors to the kernels' parameters. Nothing else reads strides and data pointers.
#pragma once

#include "ops/checks.h"

namespace fused_rope {

// The parameters of a call, and the tensors they point to that nothing else owns.
class PreparedCall {
 public:
  // The call must have passed its checks. In place the outputs are the inputs.
  PreparedCall(const Call& call, const Outputs& outputs);

  PreparedCall(const PreparedCall&) = delete;  // params point to members

  kernels::RotateParams params = {};

 private:
  void set_outputs(const Call& call, const Outputs& outputs);
  void set_norm(const Call& call);
  void set_cache(const Call& call);

  std::array<at::Tensor, 2>
      converted_;  // cos and sin in a dtype that the kernels read, or undefined
  kernels::NormParams norm_ = {};
  kernels::CacheParams cache_ = {};
};

// The gradients of q, k, q_weight and k_weight: undefined where not asked for.
using Gradients = std::array<at::Tensor, 2 * kernels::kMaxTensors>;

// The parameters of a backward call.
class PreparedBackward {
 public:
  PreparedBackward(const Call& call, const OptionalTensors& grads, const Gradients& results);

  kernels::NormBackwardParams params = {};

 private:
  PreparedCall forward_;
  std::array<at::Tensor, kernels::kMaxTensors> workspaces_;
};

// Memory for the result of rotating x: x's own strides where x is dense, row-major otherwise.
at::Tensor empty_output(const at::Tensor& x);

// The same from the allocator of x's device, which is the current one. Through the dispatcher an
// allocation takes as long as the rest of a small call.
at::Tensor allocate_output(const at::Tensor& x, c10::DispatchKey key, c10::Allocator* allocator);

// Makes the storage offset of a traced tensor a constant: PyTorch's functionalization takes a
// symbolic offset of a view that an operator mutates for 0.
void specialize_offset(const at::Tensor& written);

}  // namespace fused_rope
