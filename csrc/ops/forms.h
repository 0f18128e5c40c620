// The six forms of the operator in terms of three functions, for every layer of the dispatcher.
#pragma once

#include <torch/library.h>

#include "ops/params.h"

namespace fused_rope {

// A Layer has, where it registers them,
//   TensorPair rotate(const RawCall&)                     the second result undefined for one input
//   void rotate_(const RawCall&)                          in place
//   void rotate_out(const RawCall&, const Outputs&)
template <typename Layer>
class Forms {
 public:
  static void register_all(torch::Library& m) {
    impl<&rotate>(m, "rotate");
    impl<&rotate_qk>(m, "rotate_qk");
    register_mutating(m);
  }

  static void register_mutating(torch::Library& m) {
    impl<&rotate_>(m, "rotate_");
    impl<&rotate_qk_>(m, "rotate_qk_");
    impl<&rotate_out, const OptionalTensor&>(m, "rotate_out");
    impl<&rotate_qk_out, const OptionalTensor&>(m, "rotate_qk_out");
  }

 private:
  template <auto kFunction, typename... OutRows>
  static void impl(torch::Library& m, const char* name) {
    m.impl(name, TORCH_FN((Operator<decltype(kFunction), OutRows...>::template kernel<kFunction>)));
  }

  static at::Tensor rotate(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                           const at::Tensor& sin) {
    return std::get<0>(Layer::rotate({"rotate", {&x, nullptr}, cos, sin, a}));
  }

  static void rotate_(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                      const at::Tensor& sin) {
    Layer::rotate_({"rotate_", {&x, nullptr}, cos, sin, a});
  }

  static TensorPair rotate_qk(const Arguments& a, const at::Tensor& q, const at::Tensor& k,
                              const at::Tensor& cos, const at::Tensor& sin) {
    return Layer::rotate({"rotate_qk", {&q, &k}, cos, sin, a});
  }

  static void rotate_qk_(const Arguments& a, const at::Tensor& q, const at::Tensor& k,
                         const at::Tensor& cos, const at::Tensor& sin) {
    Layer::rotate_({"rotate_qk_", {&q, &k}, cos, sin, a});
  }

  static void rotate_out(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                         const at::Tensor& sin, const at::Tensor& out) {
    Layer::rotate_out({"rotate_out", {&x, nullptr}, cos, sin, a}, {&out, nullptr});
  }

  static void rotate_qk_out(const Arguments& a, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& q_out,
                            const at::Tensor& k_out) {
    Layer::rotate_out({"rotate_qk_out", {&q, &k}, cos, sin, a}, {&q_out, &k_out});
  }
};

// The layer of a device. A Backend has
//   Guard(device)          makes the device the current one;
//   empty(x)               memory for x rotated, see params.h;
//   launch(call, params)   runs a prepared call; absent where tensors hold no data.
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

 private:
  using Guard = typename Backend::Guard;
  static constexpr bool kHasData = requires { &Backend::launch; };

  static void check(const Call& call) {
    check_metadata(call);
    if constexpr (kHasData) check_sizes(call);
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
