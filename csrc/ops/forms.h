// The forms of the operators in terms of a few functions, for every layer of the dispatcher.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/params.h"

namespace fused_rope {

// A Layer has, where it registers them,
//   TensorPair rotate(const RawCall&)                     the second result undefined for one input
//   void rotate_(const RawCall&)                          in place
//   void rotate_out(const RawCall&, const Outputs&)
//   TensorQuad norm_backward(const RawCall&, const OptionalTensors&)
//   void rotate_and_cache(const RawCall&, const Outputs&) the second output null without k_out
// The first three serve the operators with a norm too.
template <typename Layer>
class Forms {
 public:
  static void register_all(torch::Library& m) {
    impl<&rotate<>>(m, "rotate");
    impl<&rotate_qk<>>(m, "rotate_qk");
    impl<&rotate<Weight>, Types<>, NormTypes>(m, "norm_rotate");
    impl<&rotate_qk<Weight, Weight>, Types<>, NormTypes>(m, "norm_rotate_qk");
    impl<&norm_rotate_qk_backward, Types<>, BackwardTypes>(m, "norm_rotate_qk_backward");
    register_mutating(m);
  }

  static void register_mutating(torch::Library& m) {
    impl<&rotate_<>>(m, "rotate_");
    impl<&rotate_qk_<>>(m, "rotate_qk_");
    impl<&rotate_out<>, OutRows>(m, "rotate_out");
    impl<&rotate_qk_out<>, OutRows>(m, "rotate_qk_out");
    impl<&rotate_<Weight>, Types<>, NormTypes>(m, "norm_rotate_");
    impl<&rotate_qk_<Weight, Weight>, Types<>, NormTypes>(m, "norm_rotate_qk_");
    impl<&rotate_out<Weight>, OutRows, NormTypes>(m, "norm_rotate_out");
    impl<&rotate_qk_out<Weight, Weight>, OutRows, NormTypes>(m, "norm_rotate_qk_out");
    if constexpr (requires { &Layer::rotate_and_cache; }) {
      impl<&rotate_and_cache, Types<>, OptionalNormTypes>(m, "rotate_and_cache");
    }
  }

 private:
  using Weight = const OptionalTensor&;
  using OutRows = Types<const OptionalTensor&>;

  template <auto kFunction, typename... Extra>
  static void impl(torch::Library& m, const char* name) {
    m.impl(name, TORCH_FN((Operator<decltype(kFunction), Extra...>::template kernel<kFunction>)));
  }

  // The functions below take as many weights as inputs, or none for the rotation alone.
  template <typename... W>
  static at::Tensor rotate(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                           const at::Tensor& sin, W... weight) {
    constexpr const char* kOp = sizeof...(W) == 0 ? "rotate" : "norm_rotate";
    return std::get<0>(Layer::rotate({kOp, {&x, nullptr}, cos, sin, a, {&weight...}}));
  }

  template <typename... W>
  static void rotate_(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                      const at::Tensor& sin, W... weight) {
    constexpr const char* kOp = sizeof...(W) == 0 ? "rotate_" : "norm_rotate_";
    Layer::rotate_({kOp, {&x, nullptr}, cos, sin, a, {&weight...}});
  }

  template <typename... W>
  static TensorPair rotate_qk(const Arguments& a, const at::Tensor& q, const at::Tensor& k,
                              const at::Tensor& cos, const at::Tensor& sin, W... weights) {
    constexpr const char* kOp = sizeof...(W) == 0 ? "rotate_qk" : "norm_rotate_qk";
    return Layer::rotate({kOp, {&q, &k}, cos, sin, a, {&weights...}});
  }

  template <typename... W>
  static void rotate_qk_(const Arguments& a, const at::Tensor& q, const at::Tensor& k,
                         const at::Tensor& cos, const at::Tensor& sin, W... weights) {
    constexpr const char* kOp = sizeof...(W) == 0 ? "rotate_qk_" : "norm_rotate_qk_";
    Layer::rotate_({kOp, {&q, &k}, cos, sin, a, {&weights...}});
  }

  template <typename... W>
  static void rotate_out(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                         const at::Tensor& sin, const at::Tensor& out, W... weight) {
    constexpr const char* kOp = sizeof...(W) == 0 ? "rotate_out" : "norm_rotate_out";
    Layer::rotate_out({kOp, {&x, nullptr}, cos, sin, a, {&weight...}}, {&out, nullptr});
  }

  template <typename... W>
  static void rotate_qk_out(const Arguments& a, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& q_out,
                            const at::Tensor& k_out, W... weights) {
    constexpr const char* kOp = sizeof...(W) == 0 ? "rotate_qk_out" : "norm_rotate_qk_out";
    Layer::rotate_out({kOp, {&q, &k}, cos, sin, a, {&weights...}}, {&q_out, &k_out});
  }

  static void rotate_and_cache(const Arguments& a, const at::Tensor& q, const at::Tensor& k,
                               const OptionalTensor& v, const at::Tensor& cos,
                               const at::Tensor& sin, const at::Tensor& k_cache,
                               const OptionalTensor& v_cache, const at::Tensor& slots,
                               const at::Tensor& q_out, const OptionalTensor& k_out,
                               const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                               const OptionalTensor& q_weight, const OptionalTensor& k_weight) {
    const CacheArguments cache = {v, k_cache, v_cache, slots, k_scale, v_scale};
    Layer::rotate_and_cache(
        {"rotate_and_cache", {&q, &k}, cos, sin, a, {&q_weight, &k_weight}, &cache},
        {&q_out, pointer(k_out)});
  }

  static TensorQuad norm_rotate_qk_backward(const Arguments& a, const OptionalTensor& q_grad,
                                            const OptionalTensor& k_grad, const at::Tensor& q,
                                            const OptionalTensor& k, const at::Tensor& cos,
                                            const at::Tensor& sin, const OptionalTensor& q_weight,
                                            const OptionalTensor& k_weight) {
    const at::Tensor* second = k.has_value() ? &*k : nullptr;
    return Layer::norm_backward(
        {"norm_rotate_qk_backward", {&q, second}, cos, sin, a, {&q_weight, &k_weight}},
        {&q_grad, &k_grad});
  }
};

// The layer of a device. A Backend has
//   Guard(device)                   makes the device the current one;
//   empty(x)                        memory for x rotated, see params.h;
//   launch(call, params)            runs a prepared call; absent where tensors hold no data;
//   launch_backward(call, params)   the same for a backward call.
template <typename Backend>
class DeviceLayer {
 public:
  static TensorPair rotate(const RawCall& raw) {
    const Call call(raw);
    check(call);
    const Guard guard(call.inputs[0]->device());
    at::Tensor first = Backend::empty(*call.inputs[0]);
    at::Tensor second = call.count() == 2 ? Backend::empty(*call.inputs[1]) : at::Tensor();
    run(call, {&first, &second});
    return {std::move(first), std::move(second)};
  }

  static void rotate_(const RawCall& raw) {
    const Call call(raw);
    check(call);
    if constexpr (kHasData) check_in_place(call);
    const Guard guard(call.inputs[0]->device());
    run(call, call.inputs);
  }

  static void rotate_out(const RawCall& raw, const Outputs& outputs) {
    const Call call(raw);
    check(call);
    kHasData ? check_out(call, outputs) : check_out_metadata(call, outputs);
    const Guard guard(call.inputs[0]->device());
    run(call, outputs);
  }

  static void rotate_and_cache(const RawCall& raw, const Outputs& outputs) {
    const Call call(raw);
    check(call);
    kHasData ? check_out(call, outputs) : check_out_metadata(call, outputs);
    if constexpr (kHasData) {
      check_cache(call, outputs);
    } else {
      check_cache_metadata(call);
      const CacheArguments& cache = *call.cache;
      for (const at::Tensor* written :
           {outputs[0], outputs[1], &cache.k_cache, pointer(cache.v_cache)}) {
        if (written != nullptr) specialize_offset(*written);
      }
    }
    const Guard guard(call.inputs[0]->device());
    run(call, outputs);
  }

  static TensorQuad norm_backward(const RawCall& raw, const OptionalTensors& grads) {
    const Call call(raw);
    check(call);
    kHasData ? check_grads(call, grads) : check_grads_metadata(call, grads);
    const Guard guard(call.inputs[0]->device());
    Gradients results = empty_gradients(call, grads);
    if constexpr (kHasData) {
      Backend::launch_backward(call, PreparedBackward(call, grads, results).params);
    }
    auto& [q, k, q_weight, k_weight] = results;
    return {std::move(q), std::move(k), std::move(q_weight), std::move(k_weight)};
  }

 private:
  using Guard = typename Backend::Guard;
  static constexpr bool kHasData = requires { &Backend::launch; };

  static void check(const Call& call) {
    check_metadata(call);
    if constexpr (kHasData) {
      check_sizes(call);
      check_cu_seqlens(call);
    }
  }

  static Gradients empty_gradients(const Call& call, const OptionalTensors& grads) {
    constexpr int kWeights = kernels::kMaxTensors;
    const GradMask& mask = call.arguments.norm.output_mask;
    Gradients results;
    for (int i = 0; i < call.count(); ++i) {
      if (!grads[i]->has_value()) continue;
      if (mask[i]) results[i] = Backend::empty(*call.inputs[i]);
      const OptionalTensor& weight = call.weight(i);
      if (mask[kWeights + i] && weight.has_value()) {
        results[kWeights + i] = at::empty_symint(weight->sym_sizes(), weight->options());
        // An empty gradient has no address, and the kernels skip a tensor without one.
        if (kHasData && call.inputs[i]->numel() == 0) results[kWeights + i].zero_();
      }
    }
    return results;
  }

  static void run([[maybe_unused]] const Call& call, [[maybe_unused]] const Outputs& outputs) {
    if constexpr (kHasData) Backend::launch(call, PreparedCall(call, outputs).params);
  }
};

// For backends with only one device.
struct NoGuard {
  explicit NoGuard(at::Device) {}
};

}  // namespace fused_rope
