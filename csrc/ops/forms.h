// The six forms of the operator over one backend: what a device registers is Forms<its Backend>.
#pragma once

#include <torch/library.h>

#include "ops/params.h"

namespace fused_rope {

// A Backend has
//   Guard(device)          while it lives the device is the current one;
//   empty(x)               memory for x rotated, see params.h;
//   launch(call, params)   runs a prepared call; absent where tensors hold no data.
template <typename Backend>
class Forms {
 public:
  static void register_in(torch::Library& m) {
    m.impl("rotate", TORCH_FN(Flat<&rotate>::call));
    m.impl("rotate_", TORCH_FN(Flat<&rotate_>::call));
    m.impl("rotate_qk", TORCH_FN(Flat<&rotate_qk>::call));
    m.impl("rotate_qk_", TORCH_FN(Flat<&rotate_qk_>::call));
    m.impl("rotate_out", TORCH_FN(FlatOut<&rotate_out>::call));
    m.impl("rotate_qk_out", TORCH_FN(FlatOut<&rotate_qk_out>::call));
  }

 private:
  using Guard = typename Backend::Guard;

  static at::Tensor rotate(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                           const at::Tensor& sin) {
    const Call call = {"rotate", {&x, nullptr}, cos, sin, a};
    check(call);
    const Guard guard(x.device());
    at::Tensor out = Backend::empty(x);
    run(call, {&out, nullptr});
    return out;
  }

  static void rotate_(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                      const at::Tensor& sin) {
    const Call call = {"rotate_", {&x, nullptr}, cos, sin, a};
    check(call);
    if constexpr (kHasData) check_in_place(call);
    const Guard guard(x.device());
    run(call, call.inputs);
  }

  static TensorPair rotate_qk(const Arguments& a, const at::Tensor& q, const at::Tensor& k,
                              const at::Tensor& cos, const at::Tensor& sin) {
    const Call call = {"rotate_qk", {&q, &k}, cos, sin, a};
    check(call);
    const Guard guard(q.device());
    at::Tensor q_out = Backend::empty(q);
    at::Tensor k_out = Backend::empty(k);
    run(call, {&q_out, &k_out});
    return {std::move(q_out), std::move(k_out)};
  }

  static void rotate_qk_(const Arguments& a, const at::Tensor& q, const at::Tensor& k,
                         const at::Tensor& cos, const at::Tensor& sin) {
    const Call call = {"rotate_qk_", {&q, &k}, cos, sin, a};
    check(call);
    if constexpr (kHasData) check_in_place(call);
    const Guard guard(q.device());
    run(call, call.inputs);
  }

  static void rotate_out(const Arguments& a, const at::Tensor& x, const at::Tensor& cos,
                         const at::Tensor& sin, const at::Tensor& out) {
    const Call call = {"rotate_out", {&x, nullptr}, cos, sin, a};
    check(call);
    check_outputs(call, {&out, nullptr});
    const Guard guard(x.device());
    run(call, {&out, nullptr});
  }

  static void rotate_qk_out(const Arguments& a, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& q_out,
                            const at::Tensor& k_out) {
    const Call call = {"rotate_qk_out", {&q, &k}, cos, sin, a};
    check(call);
    check_outputs(call, {&q_out, &k_out});
    const Guard guard(q.device());
    run(call, {&q_out, &k_out});
  }

  static constexpr bool kHasData = requires { &Backend::launch; };

  static void check(const Call& call) {
    check_metadata(call);
    if constexpr (kHasData) check_sizes(call);
  }

  static void check_outputs(const Call& call, const Outputs& outputs) {
    kHasData ? check_out(call, outputs) : check_out_metadata(call, outputs);
  }

  static void run([[maybe_unused]] const Call& call, [[maybe_unused]] const Outputs& outputs) {
    if constexpr (kHasData) Backend::launch(call, PreparedCall(call, outputs).params);
  }
};

// For devices of which there is only one.
struct NoGuard {
  explicit NoGuard(at::Device) {}
};

}  // namespace fused_rope
