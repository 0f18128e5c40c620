// Autograd: backward calls the public operator with `inverse` flipped, so it is differentiable
// again. Calls without gradients construct no Function.
#include <ATen/FuncTorchTLS.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_make_dual.h>
#include <ATen/ops/_unpack_dual.h>
#include <ATen/ops/add.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <vector>

#include "autograd/saved.h"
#include "autograd/table_gradient.h"
#include "ops/checks.h"

namespace fused_rope::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename... Tensors>
bool needs_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (... || (tensors.defined() && tensors.requires_grad()));
}

template <typename... Tensors>
bool has_tangent(const Tensors&... tensors) {
  return (... || (tensors.defined() && tensors._fw_grad(0).defined()));
}

at::Tensor sum_or_either(const at::Tensor& x, const at::Tensor& y) {
  return !x.defined() ? y : !y.defined() ? x : at::add(x, y);
}

// What a Function takes besides the tensors that it differentiates.
struct Recorded {
  const Arguments& arguments;
  const at::Tensor& cos;
  const at::Tensor& sin;
};

// The tables that a Function differentiates: both where one requires grad, else none. Each tensor
// that Function::apply gets as an input costs a recorded call 70 ns.
variable_list trained_tables(const at::Tensor& cos, const at::Tensor& sin) {
  if (!needs_grad(cos, sin)) return {};
  return {cos, sin};
}

// The gradients of all that a Function takes. `elements` are the rotated elements of each input, or
// none where no table needs a gradient.
variable_list gradients(const AutogradContext& ctx, const Saved& saved,
                        const variable_list& elements, const variable_list& grads) {
  const size_t count = grads.size();
  variable_list result(count + 4);  // the last two belong to arguments without a gradient
  const Arguments forward = arguments_of(saved.options);
  Arguments inverse = forward;
  inverse.inverse = !forward.inverse;
  const auto is_needed = [&](size_t i) {
    return i < count && grads[i].defined() && ctx.needs_input_grad(i);
  };
  if (is_needed(0) && is_needed(1)) {
    std::tie(result[0], result[1]) =
        call_rotate_qk(inverse, grads[0], grads[1], saved.cos, saved.sin);
  } else {
    for (size_t i = 0; i < count; ++i) {
      if (is_needed(i)) result[i] = call_rotate(inverse, grads[i], saved.cos, saved.sin);
    }
  }
  if (elements.empty()) return result;
  if (!ctx.needs_input_grad(count) && !ctx.needs_input_grad(count + 1)) return result;
  for (size_t i = 0; i < count; ++i) {
    if (!grads[i].defined()) continue;
    const auto [cos_grad, sin_grad] = table_gradient(forward, elements[i], grads[i], saved.cos);
    result[count] = sum_or_either(result[count], cos_grad);
    result[count + 1] = sum_or_either(result[count + 1], sin_grad);
  }
  return result;
}

// rotate with one input, rotate_qk with two.
struct Rotate : public torch::autograd::Function<Rotate> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, at::TensorList trained,
                               const Recorded& recorded) {
    const auto& [a, cos, sin] = recorded;
    Saved::save(ctx, a, cos, sin, trained.empty() ? at::TensorList() : inputs);
    ctx->set_materialize_grads(false);
    const at::AutoDispatchBelowADInplaceOrView below;
    if (inputs.size() == 1) return {call_rotate(a, inputs[0], cos, sin)};
    auto [q_out, k_out] = call_rotate_qk(a, inputs[0], inputs[1], cos, sin);
    return {std::move(q_out), std::move(k_out)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    variable_list elements;
    for (const at::Tensor& x : saved.inputs) {
      elements.push_back(rotated_elements(arguments_of(saved.options), x, saved.cos));
    }
    return gradients(*ctx, saved, elements, grads);
  }
};

// Records the rotation of one tensor that has been rotated in place. A Function with two outputs
// refuses views, so q and k, often slices of one packed tensor, take one each after one launch.
struct RotateInPlace : public torch::autograd::Function<RotateInPlace> {
  static constexpr bool is_traceable = true;

  // `elements` are a copy of the rotated elements of x as they were before.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x,
                            [[maybe_unused]] at::TensorList trained, const variable_list& elements,
                            const Recorded& recorded) {
    const auto& [a, cos, sin] = recorded;
    Saved::save(ctx, a, cos, sin, elements);
    ctx->set_materialize_grads(false);
    ctx->mark_dirty({x});
    return x;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    return gradients(*ctx, saved, saved.inputs, grads);
  }
};

// A tensor and its tangent at the only level there is.
struct Dual {
  explicit Dual(const at::Tensor& x) {
    std::tie(primal, tangent) = at::_unpack_dual(x, /*level=*/0);
  }
  at::Tensor primal, tangent;
};

// The tangent of rotate: it is linear in x and in the table.
at::Tensor tangent_of(const Arguments& a, const Dual& x, const Dual& cos, const Dual& sin) {
  at::Tensor tangent;
  if (x.tangent.defined()) tangent = call_rotate(a, x.tangent, cos.primal, sin.primal);
  if (cos.tangent.defined() || sin.tangent.defined()) {
    const auto or_zeros = [](const Dual& table) {
      return table.tangent.defined() ? table.tangent : at::zeros_like(table.primal);
    };
    tangent = sum_or_either(tangent, table_tangent(a, x.primal, or_zeros(cos), or_zeros(sin)));
  }
  return tangent;
}

at::Tensor join(const at::Tensor& primal, const at::Tensor& tangent) {
  return tangent.defined() ? at::_make_dual(primal, tangent, /*level=*/0) : primal;
}

at::Tensor rotate(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                  const at::Tensor& sin) {
  if (has_tangent(x, cos, sin)) {
    const Dual dx(x), dcos(cos), dsin(sin);
    const at::Tensor tangent = tangent_of(a, dx, dcos, dsin);
    return join(call_rotate(a, dx.primal, dcos.primal, dsin.primal), tangent);
  }
  if (!needs_grad(x, cos, sin)) {
    const at::AutoDispatchBelowAutograd below;
    return call_rotate(a, x, cos, sin);
  }
  const variable_list trained = trained_tables(cos, sin);
  return Rotate::apply(at::TensorList(x), at::TensorList(trained), Recorded{a, cos, sin})[0];
}

TensorPair rotate_qk(const Arguments& a, const at::Tensor& q, const at::Tensor& k,
                     const at::Tensor& cos, const at::Tensor& sin) {
  if (has_tangent(q, k, cos, sin)) {
    const Dual dq(q), dk(k), dcos(cos), dsin(sin);
    const auto [q_out, k_out] = call_rotate_qk(a, dq.primal, dk.primal, dcos.primal, dsin.primal);
    return {join(q_out, tangent_of(a, dq, dcos, dsin)), join(k_out, tangent_of(a, dk, dcos, dsin))};
  }
  if (!needs_grad(q, k, cos, sin)) {
    const at::AutoDispatchBelowAutograd below;
    return call_rotate_qk(a, q, k, cos, sin);
  }
  const std::array<at::Tensor, 2> inputs = {q, k};
  const variable_list trained = trained_tables(cos, sin);
  variable_list out =
      Rotate::apply(at::TensorList(inputs), at::TensorList(trained), Recorded{a, cos, sin});
  // Compiled autograd does not support mark_non_differentiable.
  if (trained.empty()) {
    if (!q.requires_grad()) out[0].detach_();
    if (!k.requires_grad()) out[1].detach_();
  }
  return {std::move(out[0]), std::move(out[1])};
}

// In place with a tangent: the primal is a view of x, the tangent is replaced.
void rotate_dual_(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                  const at::Tensor& sin) {
  const Dual dx(x), dcos(cos), dsin(sin);
  const at::Tensor tangent = tangent_of(a, dx, dcos, dsin);
  call_rotate_(a, dx.primal, dcos.primal, dsin.primal);
  if (dx.tangent.defined()) {
    dx.tangent.copy_(tangent);
  } else {
    x._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/true);
  }
}

// Raises every error of an in-place call before memory is read or written, those of
// RotateInPlace::apply included.
void check_early(const Call& call) {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (functorch) functorch->checkSupportsCppAutogradFunction();
  for (int i = 0; i < call.count(); ++i) {
    torch::autograd::check_inplace(*call.inputs[i],
                                   needs_grad(*call.inputs[i], call.cos, call.sin));
  }
  check_metadata(call);
  if (call.inputs[0]->unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return;
  check_sizes(call);
  check_in_place(call);
}

// Rotates `inputs` in place by `call` and records each of them.
template <typename F>
void record_in_place(const Arguments& a, at::TensorList inputs, const at::Tensor& cos,
                     const at::Tensor& sin, F call) {
  std::vector<variable_list> elements(inputs.size());
  for (size_t i = 0; i < inputs.size() && needs_grad(cos, sin); ++i) {
    // Autograd records the copy, so that the gradients of the tables are differentiable.
    elements[i] = {rotated_elements(a, inputs[i], cos).clone()};
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    call();
  }
  const variable_list trained = trained_tables(cos, sin);
  for (size_t i = 0; i < inputs.size(); ++i) {
    RotateInPlace::apply(inputs[i], at::TensorList(trained), elements[i], Recorded{a, cos, sin});
  }
}

void rotate_(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
             const at::Tensor& sin) {
  const bool dual = has_tangent(x, cos, sin);
  if (!dual && !needs_grad(x, cos, sin)) {
    const at::AutoDispatchBelowAutograd below;
    return call_rotate_(a, x, cos, sin);
  }
  check_early({"rotate_", {&x, nullptr}, cos, sin, a});
  if (dual) return rotate_dual_(a, x, cos, sin);
  record_in_place(a, x, cos, sin, [&] { call_rotate_(a, x, cos, sin); });
}

void rotate_qk_(const Arguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                const at::Tensor& sin) {
  const bool dual = has_tangent(q, k, cos, sin);
  if (!dual && !needs_grad(q, k, cos, sin)) {
    const at::AutoDispatchBelowAutograd below;
    return call_rotate_qk_(a, q, k, cos, sin);
  }
  check_early({"rotate_qk_", {&q, &k}, cos, sin, a});
  if (dual) {
    rotate_(a, q, cos, sin);
    return rotate_(a, k, cos, sin);
  }
  const std::array<at::Tensor, 2> inputs = {q, k};
  record_in_place(a, inputs, cos, sin, [&] { call_rotate_qk_(a, q, k, cos, sin); });
}

template <typename... Tensors>
void refuse_grad(const char* op, const Tensors&... tensors) {
  TORCH_CHECK(!needs_grad(tensors...) && !has_tangent(tensors...), op,
              ": out= does not support autograd, but an input requires grad");
}

void rotate_out(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                const at::Tensor& sin, const at::Tensor& out) {
  refuse_grad("rotate_out", x, cos, sin, out);
  const at::AutoDispatchBelowAutograd below;
  call_rotate_out(a, x, cos, sin, out);
}

void rotate_qk_out(const Arguments& a, const at::Tensor& q, const at::Tensor& k,
                   const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& q_out,
                   const at::Tensor& k_out) {
  refuse_grad("rotate_qk_out", q, k, cos, sin, q_out, k_out);
  const at::AutoDispatchBelowAutograd below;
  call_rotate_qk_out(a, q, k, cos, sin, q_out, k_out);
}

// Below autograd, on the path of calls without gradients and in inference mode: every tensor that
// is written gets a new version.
namespace versioned {

template <typename F, typename... Tensors>
void write(F call, const Tensors&... written) {
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    call();
  }
  (torch::autograd::increment_version(written), ...);
}

void rotate_(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
             const at::Tensor& sin) {
  write([&] { call_rotate_(a, x, cos, sin); }, x);
}

void rotate_qk_(const Arguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                const at::Tensor& sin) {
  write([&] { call_rotate_qk_(a, q, k, cos, sin); }, q, k);
}

void rotate_out(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                const at::Tensor& sin, const at::Tensor& out) {
  write([&] { call_rotate_out(a, x, cos, sin, out); }, out);
}

void rotate_qk_out(const Arguments& a, const at::Tensor& q, const at::Tensor& k,
                   const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& q_out,
                   const at::Tensor& k_out) {
  write([&] { call_rotate_qk_out(a, q, k, cos, sin, q_out, k_out); }, q_out, k_out);
}

}  // namespace versioned
}  // namespace

TORCH_LIBRARY_IMPL(fused_rope, Autograd, m) {
  m.impl("rotate", TORCH_FN(Flat<&rotate>::call));
  m.impl("rotate_", TORCH_FN(Flat<&rotate_>::call));
  m.impl("rotate_qk", TORCH_FN(Flat<&rotate_qk>::call));
  m.impl("rotate_qk_", TORCH_FN(Flat<&rotate_qk_>::call));
  m.impl("rotate_out", TORCH_FN(FlatOut<&rotate_out>::call));
  m.impl("rotate_qk_out", TORCH_FN(FlatOut<&rotate_qk_out>::call));
  m.impl("cos_sin_table",
         torch::CppFunction::makeFallthrough());  // frequencies are not trained through a table
}

TORCH_LIBRARY_IMPL(fused_rope, ADInplaceOrView, m) {
  m.impl("rotate_", TORCH_FN(Flat<&versioned::rotate_>::call));
  m.impl("rotate_qk_", TORCH_FN(Flat<&versioned::rotate_qk_>::call));
  m.impl("rotate_out", TORCH_FN(FlatOut<&versioned::rotate_out>::call));
  m.impl("rotate_qk_out", TORCH_FN(FlatOut<&versioned::rotate_qk_out>::call));
}

}  // namespace fused_rope::autograd
