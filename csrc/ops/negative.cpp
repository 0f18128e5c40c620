// In-place and out operators on tensors with the negative bit, such as the imaginary part of a
// conjugate. PyTorch's fallback looks for the written tensors among the results, and these
// operators return none.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <utility>
#include <vector>

namespace fused_rope {
namespace {

// Calls the operator with copies that have no negative bit, and writes back those that it changed.
void resolve_negative(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                      torch::jit::Stack* stack) {
  const at::AutoDispatchBelowADInplaceOrView below;  // the version is counted above
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  std::vector<std::pair<at::Tensor, at::Tensor>> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = (*stack)[first + i];
    if (!value.isTensor() || !value.toTensor().defined() || !value.toTensor().is_neg()) continue;
    const at::Tensor tensor = value.toTensor();
    const at::Tensor resolved = tensor.resolve_neg();
    if (arguments[i].alias_info() != nullptr) written.emplace_back(tensor, resolved);
    value = resolved;
  }
  constexpr auto kAfter = c10::DispatchKeySet::FULL_AFTER;
  op.redispatchBoxed(keys & c10::DispatchKeySet(kAfter, c10::DispatchKey::Negative), stack);
  for (const auto& [tensor, resolved] : written) tensor.copy_(resolved);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_rope, Negative, m) {
  for (const char* name :
       {"rotate_", "rotate_qk_", "rotate_out", "rotate_qk_out", "norm_rotate_", "norm_rotate_qk_",
        "norm_rotate_out", "norm_rotate_qk_out", "rotate_and_cache"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&resolve_negative>());
  }
}

}  // namespace fused_rope
