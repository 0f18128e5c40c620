// Calls of the operators, and the libtorch functions.
#include "ops/dispatch.h"

namespace fused_rope {
namespace {

using In = const at::Tensor&;

template <typename Result, typename... Tensors>
using Plain = Operator<Result (*)(const Arguments&, Tensors...)>;

template <typename... Tensors>
using Out = Operator<void (*)(const Arguments&, Tensors...), const OptionalTensor&>;

// Only the out functions have out_rows.
Arguments without_out_rows(const char* op, const RotateOptions& options) {
  TORCH_CHECK_VALUE(!options.out_rows().has_value(), op,
                    ": expected no out_rows without an output, got one");
  return arguments_of(options);
}

}  // namespace

TensorPair call_rotate(const RawCall& c) {
  static const Plain<at::Tensor, In, In, In> rotate("fused_rope::rotate");
  static const Plain<TensorPair, In, In, In, In> rotate_qk("fused_rope::rotate_qk");
  const auto& [x, k] = c.inputs;
  if (k == nullptr) return {rotate(c.arguments, *x, c.cos, c.sin), at::Tensor()};
  return rotate_qk(c.arguments, *x, *k, c.cos, c.sin);
}

void call_rotate_(const RawCall& c) {
  static const Plain<void, In, In, In> rotate_("fused_rope::rotate_");
  static const Plain<void, In, In, In, In> rotate_qk_("fused_rope::rotate_qk_");
  const auto& [x, k] = c.inputs;
  if (k == nullptr) return rotate_(c.arguments, *x, c.cos, c.sin);
  rotate_qk_(c.arguments, *x, *k, c.cos, c.sin);
}

void call_rotate_out(const RawCall& c, const Outputs& outputs) {
  static const Out<In, In, In, In> rotate_out("fused_rope::rotate_out");
  static const Out<In, In, In, In, In, In> rotate_qk_out("fused_rope::rotate_qk_out");
  const auto& [x, k] = c.inputs;
  if (k == nullptr) return rotate_out(c.arguments, *x, c.cos, c.sin, *outputs[0]);
  rotate_qk_out(c.arguments, *x, *k, c.cos, c.sin, *outputs[0], *outputs[1]);
}

at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                  const RotateOptions& options) {
  const Arguments a = without_out_rows("rotate", options);
  return std::get<0>(call_rotate({"rotate", {&x, nullptr}, cos, sin, a}));
}

at::Tensor rotate_(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                   const RotateOptions& options) {
  const Arguments a = without_out_rows("rotate_", options);
  call_rotate_({"rotate_", {&x, nullptr}, cos, sin, a});
  return x;
}

TensorPair rotate_qk(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                     const at::Tensor& sin, const RotateOptions& options) {
  const Arguments a = without_out_rows("rotate_qk", options);
  return call_rotate({"rotate_qk", {&q, &k}, cos, sin, a});
}

TensorPair rotate_qk_(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                      const at::Tensor& sin, const RotateOptions& options) {
  const Arguments a = without_out_rows("rotate_qk_", options);
  call_rotate_({"rotate_qk_", {&q, &k}, cos, sin, a});
  return {q, k};
}

at::Tensor rotate_out(const at::Tensor& out, const at::Tensor& x, const at::Tensor& cos,
                      const at::Tensor& sin, const RotateOptions& options) {
  call_rotate_out({"rotate_out", {&x, nullptr}, cos, sin, arguments_of(options)}, {&out, nullptr});
  return out;
}

TensorPair rotate_qk_out(const at::Tensor& q_out, const at::Tensor& k_out, const at::Tensor& q,
                         const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin,
                         const RotateOptions& options) {
  call_rotate_out({"rotate_qk_out", {&q, &k}, cos, sin, arguments_of(options)}, {&q_out, &k_out});
  return {q_out, k_out};
}

}  // namespace fused_rope
