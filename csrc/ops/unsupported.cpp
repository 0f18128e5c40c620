// Errors for tensors that no kernel can read. Without these, the dispatcher would only list
// backends.
#include <torch/library.h>

#include <string>

#include "ops/checks.h"

namespace fused_rope {
namespace {

// "rotate" of "fused_rope::rotate".
std::string name_of(const c10::OperatorHandle& op) {
  const std::string& name = op.schema().name();
  return name.substr(name.rfind(':') + 1);
}

void refuse_nested(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_TYPE(false, name_of(op), ": expected dense tensors, ", kNestedAdvice);
}

void refuse_quantized(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_TYPE(false, name_of(op),
                   ": expected tensors of floating dtype, got a quantized one: dequantize() it");
}

template <void (*kRefuse)(const c10::OperatorHandle&, torch::jit::Stack*)>
void refuse_all(torch::Library& m) {
  for (const char* name :
       {"rotate", "rotate_", "rotate_qk", "rotate_qk_", "rotate_out", "rotate_qk_out",
        "norm_rotate", "norm_rotate_", "norm_rotate_qk", "norm_rotate_qk_", "norm_rotate_out",
        "norm_rotate_qk_out", "norm_rotate_qk_backward", "rotate_and_cache"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<kRefuse>());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_rope, AutogradNestedTensor, m) { refuse_all<&refuse_nested>(m); }
TORCH_LIBRARY_IMPL(fused_rope, NestedTensorCPU, m) { refuse_all<&refuse_nested>(m); }
TORCH_LIBRARY_IMPL(fused_rope, NestedTensorCUDA, m) { refuse_all<&refuse_nested>(m); }
TORCH_LIBRARY_IMPL(fused_rope, QuantizedCPU, m) { refuse_all<&refuse_quantized>(m); }
TORCH_LIBRARY_IMPL(fused_rope, QuantizedCUDA, m) { refuse_all<&refuse_quantized>(m); }

}  // namespace fused_rope
