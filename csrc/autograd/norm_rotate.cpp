#include "autograd/norm_rotate.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <numeric>
#include <vector>

#include "autograd/dual.h"
#include "autograd/operations.h"
#include "autograd/saved.h"
#include "autograd/table_gradient.h"

namespace fused_rope {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// In the dtype that a norm is computed in.
at::Tensor widened(const at::Tensor& x) {
  return x.to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

OptionalTensor optional(const at::Tensor& x) {
  return x.defined() ? OptionalTensor(x) : std::nullopt;
}

// The norm of x and its derivative, without the roundings that `cast` asks for.
class Norm {
 public:
  Norm(const NormArguments& a, const at::Tensor& x, const OptionalTensor& weight)
      : scale_((x.square().mean(-1, /*keepdim=*/true) + *a.eps).rsqrt()), normalized_(x * scale_) {
    if (!weight.has_value()) return;
    const at::Tensor wide = weight->to(x.scalar_type());
    factor_ = a.zero_centered ? wide + 1 : wide;
  }

  at::Tensor value() const { return times_factor(normalized_); }

  // The gradients of x and of the weight from that of the value.
  at::Tensor input_grad(const at::Tensor& grad) const {
    const at::Tensor g = times_factor(grad);
    return scale_ * (g - normalized_ * (g * normalized_).mean(-1, /*keepdim=*/true));
  }
  at::Tensor weight_grad(const at::Tensor& grad) const {
    std::vector<int64_t> tokens_and_heads(grad.dim() - 1);
    std::iota(tokens_and_heads.begin(), tokens_and_heads.end(), 0);
    return (grad * normalized_).sum(tokens_and_heads);
  }

 private:
  at::Tensor times_factor(const at::Tensor& x) const { return factor_.defined() ? x * factor_ : x; }

  at::Tensor scale_, normalized_, factor_;
};

// norm_rotate of tensor i.
at::Tensor compose(const RawCall& c, int i) {
  const Arguments& a = c.arguments;
  const at::Tensor& x = *c.inputs[i];
  const at::Tensor in = a.norm.after ? rotate_one(a, widened(x), c.cos, c.sin) : widened(x);
  const at::Tensor normalized = Norm(a.norm, in, c.weight(i)).value();
  const at::Tensor out = a.norm.after ? normalized : rotate_one(a, normalized, c.cos, c.sin);
  return out.to(x.scalar_type());
}

// The gradients of tensor i and its weight, and what the gradients of the tables are computed from.
struct Backward {
  Backward(const RawCall& c, int i, const at::Tensor& grad) {
    const Arguments& a = c.arguments;
    const at::Tensor x = widened(*c.inputs[i]), g = widened(grad);
    Arguments inverse = a;
    inverse.inverse = !a.inverse;
    const bool after = a.norm.after;
    const Norm norm(a.norm, after ? rotate_one(a, x, c.cos, c.sin) : x, c.weight(i));
    const at::Tensor norm_grad = after ? g : rotate_one(inverse, g, c.cos, c.sin);
    const at::Tensor in_grad = norm.input_grad(norm_grad);
    rotated = after ? x : norm.value();
    rotated_grad = after ? in_grad : g;
    input = (after ? rotate_one(inverse, in_grad, c.cos, c.sin) : in_grad)
                .to(c.inputs[i]->scalar_type());
    if (!c.weight(i).has_value()) return;
    weight = norm.weight_grad(norm_grad).to(c.weight(i)->scalar_type());
  }

  at::Tensor input, weight;
  at::Tensor rotated, rotated_grad;  // what the rotation reads, and the gradient of its result
};

struct NormRotate : public torch::autograd::Function<NormRotate> {
  static constexpr bool is_traceable = true;

  // `weights` are those that are there, `trained` both tables if one requires grad, else none.
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs,
                               [[maybe_unused]] at::TensorList weights, at::TensorList trained,
                               const RawCall& call) {
    c10::SmallVector<at::Tensor, 2 * kernels::kMaxTensors> saved(inputs.begin(), inputs.end());
    for (int i = 0; i < call.count(); ++i) saved.push_back(call.weight(i).value_or(at::Tensor()));
    Saved::save(ctx, call.arguments, call.cos, call.sin, saved);
    Saved::save_norm(ctx, call.arguments.norm);
    if (!trained.empty()) ctx->saved_data["trained"] = true;
    ctx->set_materialize_grads(false);
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [first, second] = call_rotate(call);
    if (call.count() == 1) return {std::move(first)};
    return {std::move(first), std::move(second)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    Saved saved(ctx);
    const NormOptions norm = Saved::load_norm(ctx);
    const size_t count = grads.size();
    Arguments a = arguments_of(saved.options, norm);
    GradMask& mask = a.norm.output_mask;
    std::array<OptionalTensor, kernels::kMaxTensors> weights, output_grads;
    size_t slots = count;
    for (size_t i = 0; i < count; ++i) {
      weights[i] = optional(saved.inputs[count + i]);
      output_grads[i] = optional(grads[i]);
      mask[i] = ctx->needs_input_grad(i);
      if (weights[i].has_value()) mask[kWeights + i] = ctx->needs_input_grad(slots++);
    }
    const RawCall call = {"norm_rotate_qk_backward",
                          {&saved.inputs[0], count == 2 ? &saved.inputs[1] : nullptr},
                          saved.cos,
                          saved.sin,
                          a,
                          {&weights[0], &weights[1]}};
    const OptionalTensors given = {&output_grads[0], &output_grads[1]};
    const auto [q, k, q_weight, k_weight] = call_norm_rotate_backward(call, given);
    variable_list result = {q};
    if (count == 2) result.push_back(k);
    if (weights[0].has_value()) result.push_back(q_weight);
    if (weights[1].has_value()) result.push_back(k_weight);
    if (ctx->saved_data.count("trained") != 0) {
      const auto [cos, sin] = table_grads(call, given);
      result.insert(result.end(), {cos, sin});
    }
    result.emplace_back();  // of the call
    return result;
  }

 private:
  static constexpr size_t kWeights = kernels::kMaxTensors;  // where their entries of a mask begin

  static TensorPair table_grads(const RawCall& c, const OptionalTensors& grads) {
    at::Tensor cos, sin;
    for (int i = 0; i < c.count(); ++i) {
      if (!grads[i]->has_value()) continue;
      const Backward tensor(c, i, **grads[i]);
      const auto [cos_grad, sin_grad] =
          table_gradient(c.arguments, rotated_elements(c.arguments, tensor.rotated, c.cos),
                         tensor.rotated_grad, c.cos);
      cos = sum_or_either(cos, cos_grad);
      sin = sum_or_either(sin, sin_grad);
    }
    return {cos, sin};
  }
};

}  // namespace

TensorPair record_norm_rotate(const RawCall& c) {
  c10::SmallVector<at::Tensor, kernels::kMaxTensors> inputs, weights, trained;
  for (int i = 0; i < c.count(); ++i) {
    inputs.push_back(*c.inputs[i]);
    if (c.weight(i).has_value()) weights.push_back(*c.weight(i));
  }
  if (c.cos.requires_grad() || c.sin.requires_grad()) trained.append({c.cos, c.sin});
  variable_list out = NormRotate::apply(at::TensorList(inputs), at::TensorList(weights),
                                        at::TensorList(trained), c);
  // Compiled autograd does not support mark_non_differentiable.
  for (int i = 0; i < c.count() && trained.empty(); ++i) {
    const OptionalTensor& weight = c.weight(i);
    const bool is_constant =
        !inputs[i].requires_grad() && !(weight.has_value() && weight->requires_grad());
    if (is_constant) out[i].detach_();
  }
  return {std::move(out[0]), c.count() == 2 ? std::move(out[1]) : at::Tensor()};
}

TensorPair norm_rotate_duals(const RawCall& c, bool is_recorded) {
  // A Function would save inputs without their tangents.
  if (is_recorded) return {compose(c, 0), c.count() == 2 ? compose(c, 1) : at::Tensor()};
  const Dual cos(c.cos), sin(c.sin);
  std::array<at::Tensor, kernels::kMaxTensors> primals, tangents;
  std::array<OptionalTensor, kernels::kMaxTensors> weights;
  for (int i = 0; i < c.count(); ++i) {
    primals[i] = Dual(*c.inputs[i]).primal;
    if (c.weight(i).has_value()) weights[i] = Dual(*c.weight(i)).primal;
    tangents[i] = Dual(compose(c, i)).tangent;
  }
  const auto [first, second] = call_rotate({c.op,
                                            {&primals[0], c.count() == 2 ? &primals[1] : nullptr},
                                            cos.primal,
                                            sin.primal,
                                            c.arguments,
                                            {&weights[0], &weights[1]}});
  return {join(first, tangents[0]), c.count() == 2 ? join(second, tangents[1]) : at::Tensor()};
}

TensorQuad compose_norm_backward(const RawCall& c, const OptionalTensors& grads) {
  constexpr int kWeights = kernels::kMaxTensors;
  const GradMask& mask = c.arguments.norm.output_mask;
  std::array<at::Tensor, 2 * kernels::kMaxTensors> results;
  for (int i = 0; i < c.count(); ++i) {
    if (!grads[i]->has_value()) continue;
    const Backward tensor(c, i, **grads[i]);
    if (mask[i]) results[i] = tensor.input;
    if (mask[kWeights + i]) results[kWeights + i] = tensor.weight;
  }
  auto& [q, k, q_weight, k_weight] = results;
  return {q, k, q_weight, k_weight};
}

}  // namespace fused_rope
