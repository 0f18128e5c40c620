// Autograd: backward calls the public operator with `inverse` flipped, so it is itself
// differentiable. Calls without gradients construct no Function.
#include <ATen/FuncTorchTLS.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <vector>

#include "autograd/dual.h"
#include "autograd/norm_rotate.h"
#include "autograd/operations.h"
#include "autograd/saved.h"
#include "autograd/table_gradient.h"
#include "ops/checks.h"
#include "ops/forms.h"

namespace fused_rope {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether `predicate` holds for any of the inputs, tables and weights.
template <typename F>
bool any_of(const RawCall& c, F predicate) {
  const auto of_weight = [&](int i) {
    return c.weights[i] != nullptr && c.weight(i).has_value() && predicate(*c.weight(i));
  };
  return predicate(*c.inputs[0]) || (c.count() == 2 && predicate(*c.inputs[1])) ||
         predicate(c.cos) || predicate(c.sin) || of_weight(0) || of_weight(1);
}

bool any_of(const OptionalTensors& tensors, bool (*predicate)(const at::Tensor&)) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [&](const OptionalTensor* x) { return x->has_value() && predicate(**x); });
}

bool requires_grad(const at::Tensor& x) { return x.requires_grad(); }

bool needs_grad(const RawCall& c) { return at::GradMode::is_enabled() && any_of(c, requires_grad); }

bool tables_need_grad(const at::Tensor& cos, const at::Tensor& sin) {
  return at::GradMode::is_enabled() && (cos.requires_grad() || sin.requires_grad());
}

RawCall call_of(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                const at::Tensor& sin) {
  return {"rotate", {&x, nullptr}, cos, sin, a};
}

// What a Function takes besides the tensors that it differentiates.
struct Recorded {
  const Arguments& arguments;
  const at::Tensor& cos;
  const at::Tensor& sin;
};

// The tables that a Function differentiates: both if one requires grad, else none. Each tensor that
// Function::apply gets as an input costs a recorded call 70 ns.
variable_list trained_tables(const at::Tensor& cos, const at::Tensor& sin) {
  if (!tables_need_grad(cos, sin)) return {};
  return {cos, sin};
}

// The gradients of all that a Function takes. `elements` are the rotated elements of each input, or
// none if no table needs a gradient.
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
        call_rotate({"rotate_qk", {&grads[0], &grads[1]}, saved.cos, saved.sin, inverse});
  } else {
    for (size_t i = 0; i < count; ++i) {
      if (is_needed(i)) result[i] = rotate_one(inverse, grads[i], saved.cos, saved.sin);
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
    const bool one = inputs.size() == 1;
    auto [first, second] =
        call_rotate({"rotate", {&inputs[0], one ? nullptr : &inputs[1]}, cos, sin, a});
    if (one) return {std::move(first)};
    return {std::move(first), std::move(second)};
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
// refuses views, and q and k are often slices of one packed tensor. So one launch rotates both, and
// each is recorded by itself.
struct RotateInPlace : public torch::autograd::Function<RotateInPlace> {
  static constexpr bool is_traceable = true;

  // `elements` is a copy of the rotated elements of x from before the rotation.
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

// The tangent of rotate, which is linear in x and in the table.
at::Tensor tangent_of(const Arguments& a, const Dual& x, const Dual& cos, const Dual& sin) {
  at::Tensor tangent;
  if (x.tangent.defined()) tangent = rotate_one(a, x.tangent, cos.primal, sin.primal);
  if (cos.tangent.defined() || sin.tangent.defined()) {
    const auto or_zeros = [](const Dual& table) {
      return table.tangent.defined() ? table.tangent : at::zeros_like(table.primal);
    };
    tangent = sum_or_either(tangent, table_tangent(a, x.primal, or_zeros(cos), or_zeros(sin)));
  }
  return tangent;
}

TensorPair rotate_duals(const RawCall& c) {
  const bool two = c.count() == 2;
  const Dual x(*c.inputs[0]), k(two ? *c.inputs[1] : *c.inputs[0]), cos(c.cos), sin(c.sin);
  const auto [first, second] = call_rotate(
      {c.op, {&x.primal, two ? &k.primal : nullptr}, cos.primal, sin.primal, c.arguments});
  return {join(first, tangent_of(c.arguments, x, cos, sin)),
          two ? join(second, tangent_of(c.arguments, k, cos, sin)) : at::Tensor()};
}

// In place with a tangent: the primal is a view of x, the tangent is replaced.
void rotate_dual_(const Arguments& a, const at::Tensor& x, const Dual& cos, const Dual& sin) {
  const Dual dual(x);
  const at::Tensor tangent = tangent_of(a, dual, cos, sin);
  call_rotate_(call_of(a, dual.primal, cos.primal, sin.primal));
  if (!tangent.defined()) return;
  if (dual.tangent.defined()) {
    dual.tangent.copy_(tangent);
  } else {
    x._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/true);
  }
}

// Raises every error of an in-place call before memory is read or written, including those of
// RotateInPlace::apply.
void check_before_writing(const RawCall& raw) {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (functorch) functorch->checkSupportsCppAutogradFunction();
  const bool tables = tables_need_grad(raw.cos, raw.sin);
  for (int i = 0; i < raw.count(); ++i) {
    const at::Tensor& x = *raw.inputs[i];
    const bool recorded = tables || (at::GradMode::is_enabled() && x.requires_grad());
    torch::autograd::check_inplace(x, recorded);
  }
  const Call call(raw);
  check_metadata(call);
  if (has_symbols(call)) return;
  check_sizes(call);
  check_in_place(call);
}

// The errors of a call with a norm that is composed of ATen operations, which would broadcast.
void check_composed(const RawCall& raw, const OptionalTensors& grads = {&kNoTensor, &kNoTensor}) {
  const Call call(raw);
  check_metadata(call);
  check_grads(call, grads);
  if (!has_symbols(call)) check_sizes(call);
}

struct AutogradLayer {
  static TensorPair rotate(const RawCall& c) {
    if (any_of(c, has_tangent)) {
      if (!c.has_norm()) return rotate_duals(c);
      check_composed(c);
      return norm_rotate_duals(c, needs_grad(c));
    }
    if (!needs_grad(c)) {
      const at::AutoDispatchBelowAutograd below;
      return call_rotate(c);
    }
    if (c.has_norm()) return record_norm_rotate(c);
    const Recorded recorded = {c.arguments, c.cos, c.sin};
    const variable_list trained = trained_tables(c.cos, c.sin);
    if (c.count() == 1) {
      variable_list out =
          Rotate::apply(at::TensorList(*c.inputs[0]), at::TensorList(trained), recorded);
      return {std::move(out[0]), at::Tensor()};
    }
    const std::array<at::Tensor, 2> inputs = {*c.inputs[0], *c.inputs[1]};
    variable_list out = Rotate::apply(at::TensorList(inputs), at::TensorList(trained), recorded);
    // Compiled autograd does not support mark_non_differentiable.
    for (size_t i = 0; i < inputs.size() && trained.empty(); ++i) {
      if (!inputs[i].requires_grad()) out[i].detach_();
    }
    return {std::move(out[0]), std::move(out[1])};
  }

  static void rotate_(const RawCall& c) {
    if (c.has_norm()) refuse_grads(c, "in place");
    const bool dual = any_of(c, has_tangent);
    if (!dual && !needs_grad(c)) {
      const at::AutoDispatchBelowAutograd below;
      return call_rotate_(c);
    }
    check_before_writing(c);
    dual ? rotate_duals_(c) : record(c);
  }

  static void rotate_out(const RawCall& c, const Outputs& outputs) {
    refuse_grads(c, "out=");
    for (int i = 0; i < c.count(); ++i) {
      refuse_grad(c.op, "out=", c.out_name(i), *outputs[i]);
    }
    const at::AutoDispatchBelowAutograd below;
    call_rotate_out(c, outputs);
  }

  static void rotate_and_cache(const RawCall& c, const Outputs& outputs) {
    constexpr const char* kForm = "a cache";
    const CacheArguments& cache = *c.cache;
    refuse_grads(c, kForm);
    refuse_grad(c.op, kForm, "k_cache", cache.k_cache);
    for (const auto& [name, tensor] : {std::pair{"v", &cache.v},
                                       {"v_cache", &cache.v_cache},
                                       {"k_scale", &cache.k_scale},
                                       {"v_scale", &cache.v_scale}}) {
      if (tensor->has_value()) refuse_grad(c.op, kForm, name, **tensor);
    }
    for (int i = 0; i < c.count(); ++i) {
      if (outputs[i] != nullptr) refuse_grad(c.op, kForm, c.out_name(i), *outputs[i]);
    }
    const at::AutoDispatchBelowAutograd below;
    call_rotate_and_cache(c, outputs);
  }

  static TensorQuad norm_backward(const RawCall& c, const OptionalTensors& grads) {
    const bool is_recorded =
        at::GradMode::is_enabled() && (any_of(c, requires_grad) || any_of(grads, requires_grad));
    if (is_recorded || any_of(c, has_tangent) || any_of(grads, has_tangent)) {
      check_composed(c, grads);
      return compose_norm_backward(c, grads);
    }
    const at::AutoDispatchBelowAutograd below;
    return call_norm_rotate_backward(c, grads);
  }

 private:
  static void rotate_duals_(const RawCall& c) {
    const Dual cos(c.cos), sin(c.sin);
    for (int i = 0; i < c.count(); ++i) rotate_dual_(c.arguments, *c.inputs[i], cos, sin);
  }

  // Rotates in one launch and records each tensor by itself.
  static void record(const RawCall& c) {
    std::array<variable_list, kernels::kMaxTensors> elements;
    for (int i = 0; i < c.count() && tables_need_grad(c.cos, c.sin); ++i) {
      // Autograd records the copy, so that the gradients of the tables are differentiable.
      elements[i] = {rotated_elements(c.arguments, *c.inputs[i], c.cos).clone()};
    }
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      call_rotate_(c);
    }
    const Recorded recorded = {c.arguments, c.cos, c.sin};
    const variable_list trained = trained_tables(c.cos, c.sin);
    for (int i = 0; i < c.count(); ++i) {
      RotateInPlace::apply(*c.inputs[i], at::TensorList(trained), elements[i], recorded);
    }
  }

  // What is written over, or to memory of the caller, has no backward.
  static void refuse_grads(const RawCall& c, const char* form) {
    for (int i = 0; i < c.count(); ++i) {
      refuse_grad(c.op, form, c.name(i), *c.inputs[i]);
      if (!c.has_norm() || !c.weight(i).has_value()) continue;
      refuse_grad(c.op, form, c.weight_name(i), *c.weight(i));
    }
    refuse_grad(c.op, form, "cos", c.cos);
    refuse_grad(c.op, form, "sin", c.sin);
  }

  static void refuse_grad(const char* op, const char* form, const char* name, const at::Tensor& x) {
    TORCH_CHECK(!(at::GradMode::is_enabled() && x.requires_grad()) && !has_tangent(x), op, ": ",
                form, " does not support autograd, but ", name,
                " requires grad: use the operator that returns new tensors");
  }
};

// Gives every written tensor a new version, also without gradients and in inference mode.
struct VersionLayer {
  static void rotate_(const RawCall& c) {
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      call_rotate_(c);
    }
    increment_versions(c.inputs);
  }

  static void rotate_out(const RawCall& c, const Outputs& outputs) {
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      call_rotate_out(c, outputs);
    }
    increment_versions(outputs);
  }

  static void rotate_and_cache(const RawCall& c, const Outputs& outputs) {
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      call_rotate_and_cache(c, outputs);
    }
    increment_versions(outputs);
    increment_versions({&c.cache->k_cache, pointer(c.cache->v_cache)});
  }

 private:
  static void increment_versions(const Outputs& written) {
    for (const at::Tensor* tensor : written) {
      if (tensor != nullptr) torch::autograd::increment_version(*tensor);
    }
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fused_rope, Autograd, m) {
  Forms<AutogradLayer>::register_all(m);
  // Frequencies are not trained through a table.
  m.impl("cos_sin_table", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(fused_rope, ADInplaceOrView, m) { Forms<VersionLayer>::register_mutating(m); }

}  // namespace fused_rope
