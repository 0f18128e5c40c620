// Functionalization: torch.compile, torch.export and torch.func.functionalize see an in-place or
// out operator as the functional one and a copy_ (or an index_put_ for out_rows). Without these
// kernels PyTorch rebuilds the views that an operator mutates from strides, and Inductor gets those
// wrong if a stride is symbolic.
#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <limits>

#include "ops/checks.h"
#include "ops/forms.h"

namespace fused_rope {
namespace {

bool is_functional(const Outputs& tensors) {
  using at::functionalization::impl::isFunctionalTensor;
  return isFunctionalTensor(*tensors[0]) ||
         (tensors[1] != nullptr && isFunctionalTensor(*tensors[1]));
}

// Writes token i to row rows[i] of out. Dropping the tokens with row -1 would need a
// synchronization to count the rest, so each of them repeats the write of a token that has a row.
void scatter(const at::Tensor& out, const at::Tensor& tokens, const at::Tensor& out_rows) {
  const at::Tensor given = out_rows.flatten().to(at::kLong);
  if (given.sym_numel() == 0) return;
  const at::Tensor kept = given.ne(-1);
  const at::Tensor any_kept = kept.any();
  const at::Tensor other = kept.to(at::kInt).argmax().view({1});
  const at::Tensor rows = at::where(kept, given, given.index_select(0, other)).mul(any_kept);
  const at::Tensor values = at::where(kept.view({-1, 1, 1}), tokens, tokens.index_select(0, other));
  // index_put_ would count negative rows from the end.
  constexpr int64_t kOutOfRange = std::numeric_limits<int64_t>::max() / 2;
  out.index_put_({at::where(rows.lt(0), kOutOfRange, rows)},
                 at::where(any_kept, values, out.narrow(0, 0, 1)));
}

// The device's kernel never runs, so its checks are made here. The functional operator checks sizes
// in the compiled code.
struct FunctionalizeLayer {
  static void rotate_(const RawCall& raw) {
    const at::AutoDispatchBelowADInplaceOrView below;
    if (!is_functional(raw.inputs)) {
      const at::AutoDispatchSkipFunctionalize skip;
      return call_rotate_(raw);
    }
    const Call call(raw);
    check_metadata(call);
    check_in_place(call);
    const auto [first, second] = call_rotate(call);
    call.inputs[0]->copy_(first);
    if (call.count() == 2) call.inputs[1]->copy_(second);
  }

  static void rotate_out(const RawCall& raw, const Outputs& outputs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    if (!is_functional(outputs)) {
      const at::AutoDispatchSkipFunctionalize skip;
      return call_rotate_out(raw, outputs);
    }
    const Call call(raw);
    check_metadata(call);
    check_out(call, outputs);
    const auto [first, second] = call_rotate(call);
    for (int i = 0; i < call.count(); ++i) {
      const at::Tensor& rotated = i == 0 ? first : second;
      if (call.is_scattered(i)) {
        const at::Tensor tokens = as_bshd(rotated, call.layout).flatten(0, 1);
        scatter(*outputs[i], tokens, *call.arguments.out_rows);
      } else {
        outputs[i]->copy_(rotated);
      }
    }
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fused_rope, Functionalize, m) {
  Forms<FunctionalizeLayer>::register_mutating(m);
}

}  // namespace fused_rope
