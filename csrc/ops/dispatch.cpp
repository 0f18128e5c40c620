// Calls of the operators, and the libtorch functions.
#include "ops/dispatch.h"

#include "ops/params.h"

namespace fused_rope {
namespace {

using In = const at::Tensor&;

using MaybeIn = const OptionalTensor&;

template <typename Result, typename... Tensors>
using Plain = Operator<Result (*)(const Arguments&, Tensors...)>;

template <typename... Tensors>
using Out = Operator<void (*)(const Arguments&, Tensors...), Types<MaybeIn>>;

template <typename Result, typename... Tensors>
using PlainNorm = Operator<Result (*)(const Arguments&, Tensors...), Types<>, NormTypes>;

template <typename... Tensors>
using OutNorm = Operator<void (*)(const Arguments&, Tensors...), Types<MaybeIn>, NormTypes>;

// Only the out functions have out_rows.
template <typename... Norm>
Arguments without_out_rows(const char* op, const RotateOptions& options, const Norm&... norm) {
  TORCH_CHECK_VALUE(!options.out_rows().has_value(), op,
                    ": expected no out_rows without an output, got one");
  return arguments_of(options, norm...);
}

// Out of line, so that a rotation alone does not pay for these.
C10_NOINLINE TensorPair call_norm_rotate(const RawCall& c) {
  static const PlainNorm<at::Tensor, In, In, In, MaybeIn> norm_rotate("fused_rope::norm_rotate");
  static const PlainNorm<TensorPair, In, In, In, In, MaybeIn, MaybeIn> norm_rotate_qk(
      "fused_rope::norm_rotate_qk");
  const auto& [x, k] = c.inputs;
  if (k == nullptr) return {norm_rotate(c.arguments, *x, c.cos, c.sin, c.weight(0)), at::Tensor()};
  return norm_rotate_qk(c.arguments, *x, *k, c.cos, c.sin, c.weight(0), c.weight(1));
}

C10_NOINLINE void call_norm_rotate_(const RawCall& c) {
  static const PlainNorm<void, In, In, In, MaybeIn> norm_rotate_("fused_rope::norm_rotate_");
  static const PlainNorm<void, In, In, In, In, MaybeIn, MaybeIn> norm_rotate_qk_(
      "fused_rope::norm_rotate_qk_");
  const auto& [x, k] = c.inputs;
  if (k == nullptr) return norm_rotate_(c.arguments, *x, c.cos, c.sin, c.weight(0));
  norm_rotate_qk_(c.arguments, *x, *k, c.cos, c.sin, c.weight(0), c.weight(1));
}

C10_NOINLINE void call_norm_rotate_out(const RawCall& c, const Outputs& outputs) {
  static const OutNorm<In, In, In, In, MaybeIn> norm_rotate_out("fused_rope::norm_rotate_out");
  static const OutNorm<In, In, In, In, In, In, MaybeIn, MaybeIn> norm_rotate_qk_out(
      "fused_rope::norm_rotate_qk_out");
  const auto& [x, k] = c.inputs;
  if (k == nullptr) {
    return norm_rotate_out(c.arguments, *x, c.cos, c.sin, *outputs[0], c.weight(0));
  }
  norm_rotate_qk_out(c.arguments, *x, *k, c.cos, c.sin, *outputs[0], *outputs[1], c.weight(0),
                     c.weight(1));
}

}  // namespace

TensorPair call_rotate(const RawCall& c) {
  if (c.has_norm()) return call_norm_rotate(c);
  static const Plain<at::Tensor, In, In, In> rotate("fused_rope::rotate");
  static const Plain<TensorPair, In, In, In, In> rotate_qk("fused_rope::rotate_qk");
  const auto& [x, k] = c.inputs;
  if (k == nullptr) return {rotate(c.arguments, *x, c.cos, c.sin), at::Tensor()};
  return rotate_qk(c.arguments, *x, *k, c.cos, c.sin);
}

void call_rotate_(const RawCall& c) {
  if (c.has_norm()) return call_norm_rotate_(c);
  static const Plain<void, In, In, In> rotate_("fused_rope::rotate_");
  static const Plain<void, In, In, In, In> rotate_qk_("fused_rope::rotate_qk_");
  const auto& [x, k] = c.inputs;
  if (k == nullptr) return rotate_(c.arguments, *x, c.cos, c.sin);
  rotate_qk_(c.arguments, *x, *k, c.cos, c.sin);
}

void call_rotate_out(const RawCall& c, const Outputs& outputs) {
  if (c.has_norm()) return call_norm_rotate_out(c, outputs);
  static const Out<In, In, In, In> rotate_out("fused_rope::rotate_out");
  static const Out<In, In, In, In, In, In> rotate_qk_out("fused_rope::rotate_qk_out");
  const auto& [x, k] = c.inputs;
  if (k == nullptr) return rotate_out(c.arguments, *x, c.cos, c.sin, *outputs[0]);
  rotate_qk_out(c.arguments, *x, *k, c.cos, c.sin, *outputs[0], *outputs[1]);
}

at::Tensor call_rotate_and_cache(const RawCall& c, const Outputs& outputs) {
  static const Operator<void (*)(const Arguments&, In, In, MaybeIn, In, In, In, MaybeIn, In, In,
                                 MaybeIn, MaybeIn, MaybeIn, MaybeIn, MaybeIn),
                        Types<>, OptionalNormTypes>
      rotate_and_cache("fused_rope::rotate_and_cache");
  const CacheArguments& cache = *c.cache;
  const auto& [q, k] = c.inputs;
  const at::Tensor* const k_out = outputs[1];
  // The operator refuses nested and quantized tensors.
  const bool is_refused = q->is_nested() || q->is_quantized();
  const at::Tensor q_out = outputs[0] != nullptr ? *outputs[0] : is_refused ? *q : empty_output(*q);
  rotate_and_cache(c.arguments, *q, *k, cache.v, c.cos, c.sin, cache.k_cache, cache.v_cache,
                   cache.slots, q_out, k_out == nullptr ? kNoTensor : OptionalTensor(*k_out),
                   cache.k_scale, cache.v_scale, c.weight(0), c.weight(1));
  return q_out;
}

TensorQuad call_norm_rotate_backward(const RawCall& c, const OptionalTensors& grads) {
  static const Operator<TensorQuad (*)(const Arguments&, MaybeIn, MaybeIn, In, MaybeIn, In, In,
                                       MaybeIn, MaybeIn),
                        Types<>, BackwardTypes>
      backward("fused_rope::norm_rotate_qk_backward");
  const bool two = c.count() == 2;
  return backward(c.arguments, *grads[0], two ? *grads[1] : kNoTensor, *c.inputs[0],
                  two ? OptionalTensor(*c.inputs[1]) : kNoTensor, c.cos, c.sin, c.weight(0),
                  two ? c.weight(1) : kNoTensor);
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

at::Tensor norm_rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                       const OptionalTensor& weight, const NormOptions& norm,
                       const RotateOptions& options) {
  const Arguments a = without_out_rows("norm_rotate", options, norm);
  return std::get<0>(call_rotate({"norm_rotate", {&x, nullptr}, cos, sin, a, {&weight}}));
}

at::Tensor norm_rotate_(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                        const OptionalTensor& weight, const NormOptions& norm,
                        const RotateOptions& options) {
  const Arguments a = without_out_rows("norm_rotate_", options, norm);
  call_rotate_({"norm_rotate_", {&x, nullptr}, cos, sin, a, {&weight}});
  return x;
}

TensorPair norm_rotate_qk(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                          const at::Tensor& sin, const OptionalTensor& q_weight,
                          const OptionalTensor& k_weight, const NormOptions& norm,
                          const RotateOptions& options) {
  const Arguments a = without_out_rows("norm_rotate_qk", options, norm);
  return call_rotate({"norm_rotate_qk", {&q, &k}, cos, sin, a, {&q_weight, &k_weight}});
}

TensorPair norm_rotate_qk_(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                           const at::Tensor& sin, const OptionalTensor& q_weight,
                           const OptionalTensor& k_weight, const NormOptions& norm,
                           const RotateOptions& options) {
  const Arguments a = without_out_rows("norm_rotate_qk_", options, norm);
  call_rotate_({"norm_rotate_qk_", {&q, &k}, cos, sin, a, {&q_weight, &k_weight}});
  return {q, k};
}

at::Tensor norm_rotate_out(const at::Tensor& out, const at::Tensor& x, const at::Tensor& cos,
                           const at::Tensor& sin, const OptionalTensor& weight,
                           const NormOptions& norm, const RotateOptions& options) {
  const Arguments a = arguments_of(options, norm);
  call_rotate_out({"norm_rotate_out", {&x, nullptr}, cos, sin, a, {&weight}}, {&out, nullptr});
  return out;
}

TensorPair norm_rotate_qk_out(const at::Tensor& q_out, const at::Tensor& k_out, const at::Tensor& q,
                              const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin,
                              const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                              const NormOptions& norm, const RotateOptions& options) {
  const Arguments a = arguments_of(options, norm);
  call_rotate_out({"norm_rotate_qk_out", {&q, &k}, cos, sin, a, {&q_weight, &k_weight}},
                  {&q_out, &k_out});
  return {q_out, k_out};
}

at::Tensor rotate_and_cache(const at::Tensor& q, const at::Tensor& k, const OptionalTensor& v,
                            const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& k_cache,
                            const OptionalTensor& v_cache, const at::Tensor& slots,
                            const CacheOptions& cache, const RotateOptions& options) {
  Arguments a = without_out_rows("rotate_and_cache", options);
  set_norm(a, cache.norm().value_or(NormOptions(0)));
  if (!cache.norm().has_value()) a.norm.eps.reset();
  const CacheArguments into = {v, k_cache, v_cache, slots, cache.k_scale(), cache.v_scale()};
  return call_rotate_and_cache(
      {"rotate_and_cache", {&q, &k}, cos, sin, a, {&cache.q_weight(), &cache.k_weight()}, &into},
      {pointer(cache.q_out()), pointer(cache.k_out())});
}

}  // namespace fused_rope
