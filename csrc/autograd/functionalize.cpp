// Functionalization: torch.compile, torch.export and torch.func.functionalize see an operator in
// place as the same one out of place, then copy_. Without these kernels PyTorch rebuilds the views
// that an operator mutates by strides, which Inductor gets wrong where a stride is symbolic.
#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace fused_rope::functionalization {
namespace {

using at::functionalization::impl::isFunctionalTensor;

// Makes the checks of a device's kernel, which never runs. Sizes are checked by the operator out of
// place, in the compiled code.
void check(const Call& call) {
  check_metadata(call);
  check_in_place(call);
}

void rotate_(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
             const at::Tensor& sin) {
  const at::AutoDispatchBelowADInplaceOrView below;
  if (!isFunctionalTensor(x)) {
    const at::AutoDispatchSkipFunctionalize skip;
    return call_rotate_(a, x, cos, sin);
  }
  check({"rotate_", {&x, nullptr}, cos, sin, a});
  x.copy_(call_rotate(a, x, cos, sin));
}

void rotate_qk_(const Arguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                const at::Tensor& sin) {
  const at::AutoDispatchBelowADInplaceOrView below;
  if (!isFunctionalTensor(q) && !isFunctionalTensor(k)) {
    const at::AutoDispatchSkipFunctionalize skip;
    return call_rotate_qk_(a, q, k, cos, sin);
  }
  check({"rotate_qk_", {&q, &k}, cos, sin, a});
  const auto [q_rotated, k_rotated] = call_rotate_qk(a, q, k, cos, sin);
  q.copy_(q_rotated);
  k.copy_(k_rotated);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_rope, Functionalize, m) {
  m.impl("rotate_", TORCH_FN(Flat<&rotate_>::call));
  m.impl("rotate_qk_", TORCH_FN(Flat<&rotate_qk_>::call));
}

}  // namespace fused_rope::functionalization
