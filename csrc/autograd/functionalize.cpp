// Functionalization: torch.compile, torch.export and torch.func.functionalize see an operator in
// place or with outputs as the same one out of place, then copy_ (or index_put_ for out_rows).
// Without these kernels PyTorch rebuilds the views that an operator mutates by strides, which
// Inductor gets wrong where a stride is symbolic.
#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <limits>

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

// The rotated tokens [T, H, D] of any layout.
at::Tensor tokens_of(const at::Tensor& rotated, Layout layout) {
  switch (layout) {
    case Layout::kTHD:
      return rotated;
    case Layout::kBSHD:
      return rotated.flatten(0, 1);
    case Layout::kBHSD:
      return rotated.transpose(1, 2).flatten(0, 1);
    case Layout::kSBHD:
      return rotated.transpose(0, 1).flatten(0, 1);
  }
  TORCH_INTERNAL_ASSERT(false, "unknown layout");
}

// Row rows[i] of out becomes token i. A token of row -1 repeats the write of one that has a row,
// since to drop it would mean to ask the device how many are left.
void scatter(const at::Tensor& out, const at::Tensor& tokens, const at::Tensor& out_rows) {
  const at::Tensor given = out_rows.flatten().to(at::kLong);
  if (given.sym_numel() == 0) return;
  const at::Tensor kept = given.ne(-1);
  const at::Tensor any_kept = kept.any();
  const at::Tensor other = kept.to(at::kInt).argmax().view({1});
  const at::Tensor rows = at::where(kept, given, given.index_select(0, other)).mul(any_kept);
  const at::Tensor values = at::where(kept.view({-1, 1, 1}), tokens, tokens.index_select(0, other));
  // Negative rows would count from the end.
  out.index_put_({at::where(rows.lt(0), std::numeric_limits<int64_t>::max() / 2, rows)},
                 at::where(any_kept, values, out.narrow(0, 0, 1)));
}

// The last of a call's outputs.
void write(const Call& call, const at::Tensor& out, const at::Tensor& rotated) {
  if (call.arguments.out_rows.has_value()) {
    scatter(out, tokens_of(rotated, call.layout), *call.arguments.out_rows);
  } else {
    out.copy_(rotated);
  }
}

void rotate_out(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                const at::Tensor& sin, const at::Tensor& out) {
  const at::AutoDispatchBelowADInplaceOrView below;
  if (!isFunctionalTensor(out)) {
    const at::AutoDispatchSkipFunctionalize skip;
    return call_rotate_out(a, x, cos, sin, out);
  }
  const Call call = {"rotate_out", {&x, nullptr}, cos, sin, a};
  check_metadata(call);
  check_out(call, {&out, nullptr});
  write(call, out, call_rotate(a, x, cos, sin));
}

void rotate_qk_out(const Arguments& a, const at::Tensor& q, const at::Tensor& k,
                   const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& q_out,
                   const at::Tensor& k_out) {
  const at::AutoDispatchBelowADInplaceOrView below;
  if (!isFunctionalTensor(q_out) && !isFunctionalTensor(k_out)) {
    const at::AutoDispatchSkipFunctionalize skip;
    return call_rotate_qk_out(a, q, k, cos, sin, q_out, k_out);
  }
  const Call call = {"rotate_qk_out", {&q, &k}, cos, sin, a};
  check_metadata(call);
  check_out(call, {&q_out, &k_out});
  const auto [q_rotated, k_rotated] = call_rotate_qk(a, q, k, cos, sin);
  q_out.copy_(q_rotated);
  write(call, k_out, k_rotated);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_rope, Functionalize, m) {
  m.impl("rotate_", TORCH_FN(Flat<&rotate_>::call));
  m.impl("rotate_qk_", TORCH_FN(Flat<&rotate_qk_>::call));
  m.impl("rotate_out", TORCH_FN(FlatOut<&rotate_out>::call));
  m.impl("rotate_qk_out", TORCH_FN(FlatOut<&rotate_qk_out>::call));
}

}  // namespace fused_rope::functionalization
