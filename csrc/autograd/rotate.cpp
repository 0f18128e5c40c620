// Autograd: backward is the operator itself with `inverse` flipped, called through the dispatcher,
// so that it can be differentiated again. Calls that need no gradient never meet a Function.
#include <ATen/FuncTorchTLS.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_make_dual.h>
#include <ATen/ops/_unpack_dual.h>
#include <ATen/ops/add.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <memory>
#include <type_traits>

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

// A node of the graph, held as the graph holds it: by a shared_ptr until torch 2.12.
template <typename Node>
auto make_node() {
  using Pointer = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<Node>(new Node(), [](Node* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Node>();
  }
}

// functorch cannot follow a node of C++ and would miss its gradients.
void refuse_functorch() {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (functorch) functorch->checkSupportsCppAutogradFunction();
}

at::Tensor sum_or_either(const at::Tensor& x, const at::Tensor& y) {
  return !x.defined() ? y : !y.defined() ? x : at::add(x, y);
}

// Gradients of cos and sin from every input whose output has one. `lanes` are the inputs' rotated
// lanes.
TensorPair table_gradients(const Arguments& forward, const variable_list& lanes,
                           const variable_list& grads, const at::Tensor& cos) {
  TensorPair total;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i].defined()) continue;
    const auto [cos_grad, sin_grad] = table_gradient(forward, lanes[i], grads[i], cos);
    total = {sum_or_either(std::get<0>(total), cos_grad),
             sum_or_either(std::get<1>(total), sin_grad)};
  }
  return total;
}

// x, or q and k: without k this is rotate, otherwise rotate_qk.
struct Rotate : public torch::autograd::Function<Rotate> {
  static constexpr bool is_traceable = true;

  // What Function::apply does after forward, less what no rotation needs: it describes all inputs
  // and outputs once more, to fill in gradients that ours leave undefined, and looks for views and
  // inputs among fresh outputs. That would cost more than the call.
  static void record(const Arguments& a, const at::Tensor& x, const at::Tensor* k,
                     const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& x_out,
                     const at::Tensor* k_out) {
    const bool trains_table = cos.requires_grad() || sin.requires_grad();
    auto node = make_node<torch::autograd::CppNode<Rotate>>();
    torch::autograd::edge_list edges;
    edges.reserve(4);
    edges.push_back(torch::autograd::impl::gradient_edge(x));
    if (k != nullptr) edges.push_back(torch::autograd::impl::gradient_edge(*k));
    if (trains_table) {
      edges.push_back(torch::autograd::impl::gradient_edge(cos));
      edges.push_back(torch::autograd::impl::gradient_edge(sin));
    }
    node->is_variable_input_.assign(edges.size(), true);
    node->set_next_edges(std::move(edges));
    node->set_ctx_grad_fn(node);
    node->ctx_.set_materialize_grads(false);
    Saved::save(&node->ctx_, a, cos, sin, trains_table ? x : at::Tensor(),
                trains_table && k != nullptr ? *k : at::Tensor());
    node->save_variables_to_ctx();
    const auto set_history = [&](const at::Tensor& in, const at::Tensor& out) {
      if (trains_table || in.requires_grad()) {
        torch::autograd::impl::set_gradient_edge(out, {node, node->add_input_metadata(out)});
      } else {
        node->add_input_metadata(torch::autograd::Node::undefined_input());
      }
    };
    set_history(x, x_out);
    if (k != nullptr) set_history(*k, *k_out);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const Saved saved(context);
    const Arguments inverse = saved.arguments(/*flipped=*/true);
    const at::Tensor none;
    const size_t inputs = grads.size();
    const at::Tensor& x_grad = context->needs_input_grad(0) ? grads[0] : none;
    const at::Tensor& k_grad = inputs > 1 && context->needs_input_grad(1) ? grads[1] : none;
    variable_list result(saved.x().defined() ? inputs + 2 : inputs);
    if (x_grad.defined() && k_grad.defined()) {
      std::tie(result[0], result[1]) =
          call_rotate_qk(inverse, x_grad, k_grad, saved.cos(), saved.sin());
    } else if (x_grad.defined()) {
      result[0] = call_rotate(inverse, x_grad, saved.cos(), saved.sin());
    } else if (k_grad.defined()) {
      result[1] = call_rotate(inverse, k_grad, saved.cos(), saved.sin());
    }
    if (saved.x().defined()) {
      const Arguments forward = saved.arguments(/*flipped=*/false);
      variable_list lanes = {rotated_lanes(forward, saved.x(), saved.cos())};
      if (saved.k().defined()) lanes.push_back(rotated_lanes(forward, saved.k(), saved.cos()));
      std::tie(result[inputs], result[inputs + 1]) =
          table_gradients(forward, lanes, grads, saved.cos());
    }
    return result;
  }
};

// One tensor that was rotated in place. Two outputs of one Function could not be views of one
// packed tensor, so q and k take one each, after the launch that rotated both.
struct RotateInPlace : public torch::autograd::Function<RotateInPlace> {
  static constexpr bool is_traceable = true;

  // `lanes` are the rotated lanes of x as they were before, where the table is trained.
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& cos,
                            const at::Tensor& sin, const OptionalTensor& lanes,
                            const Arguments& a) {
    Saved::save(context, a, cos, sin, lanes.has_value() ? *lanes : at::Tensor());
    context->set_materialize_grads(false);
    context->mark_dirty({x});
    return x;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list result(5);
    if (!grads[0].defined()) return result;
    const Saved saved(context);
    if (context->needs_input_grad(0)) {
      result[0] =
          call_rotate(saved.arguments(/*flipped=*/true), grads[0], saved.cos(), saved.sin());
    }
    if (saved.x().defined()) {
      std::tie(result[1], result[2]) =
          table_gradients(saved.arguments(/*flipped=*/false), {saved.x()}, grads, saved.cos());
    }
    return result;
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
  refuse_functorch();
  at::Tensor out = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_rotate(a, x, cos, sin);
  }();
  Rotate::record(a, x, nullptr, cos, sin, out, nullptr);
  return out;
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
  refuse_functorch();
  TensorPair out = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_rotate_qk(a, q, k, cos, sin);
  }();
  Rotate::record(a, q, &k, cos, sin, std::get<0>(out), &std::get<1>(out));
  return out;
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

// All that can be refused in place before anything is read or written.
void check_early(const Call& call) {
  for (int i = 0; i < call.count(); ++i) {
    torch::autograd::check_inplace(*call.inputs[i],
                                   needs_grad(*call.inputs[i], call.cos, call.sin));
  }
  check_metadata(call);
  if (call.inputs[0]->unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return;
  check_sizes(call);
  check_in_place(call);
}

// What a trained table's gradient needs of x before it is overwritten. Cloned where autograd can
// see it, so that this gradient can be differentiated by x.
OptionalTensor lanes_before(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                            const at::Tensor& sin) {
  if (!needs_grad(cos, sin)) return std::nullopt;
  return rotated_lanes(a, x, cos).clone();
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
  const OptionalTensor lanes = lanes_before(a, x, cos, sin);
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    call_rotate_(a, x, cos, sin);
  }
  RotateInPlace::apply(x, cos, sin, lanes, a);
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
  const OptionalTensor q_lanes = lanes_before(a, q, cos, sin);
  const OptionalTensor k_lanes = lanes_before(a, k, cos, sin);
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    call_rotate_qk_(a, q, k, cos, sin);
  }
  RotateInPlace::apply(q, cos, sin, q_lanes, a);
  RotateInPlace::apply(k, cos, sin, k_lanes, a);
}

template <typename... Tensors>
void refuse_grad(const char* op, const Tensors&... tensors) {
  TORCH_CHECK(!needs_grad(tensors...) && !has_tangent(tensors...), op,
              ": expected no tensor that requires grad beside out, which takes no part in "
              "autograd; got one");
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

// Below autograd, where calls without gradients and calls in inference mode meet: what is written
// gets a new version.
namespace versioned {

void rotate_(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
             const at::Tensor& sin) {
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    call_rotate_(a, x, cos, sin);
  }
  torch::autograd::increment_version(x);
}

void rotate_qk_(const Arguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                const at::Tensor& sin) {
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    call_rotate_qk_(a, q, k, cos, sin);
  }
  torch::autograd::increment_version(q);
  torch::autograd::increment_version(k);
}

void rotate_out(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                const at::Tensor& sin, const at::Tensor& out) {
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    call_rotate_out(a, x, cos, sin, out);
  }
  torch::autograd::increment_version(out);
}

void rotate_qk_out(const Arguments& a, const at::Tensor& q, const at::Tensor& k,
                   const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& q_out,
                   const at::Tensor& k_out) {
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    call_rotate_qk_out(a, q, k, cos, sin, q_out, k_out);
  }
  torch::autograd::increment_version(q_out);
  torch::autograd::increment_version(k_out);
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
