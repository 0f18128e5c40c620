// norm_rotate through libtorch: every function and option, and derivatives. tests/python compares
// the operators with a float64 oracle.
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <typeinfo>

#include "testing.h"

namespace fused_rope {
namespace {

using testing::expect_identical;
using testing::leaf;
using testing::OnDevice;
using testing::rotation_formula;
using torch::autograd::grad;
using torch::autograd::variable_list;

const NormOptions kNorm(1e-6);

// norm_rotate in ATen operations, which PyTorch differentiates, for rotate's default options.
at::Tensor formula(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                   const at::Tensor& weight, const NormOptions& norm) {
  const auto normalized = [&](const at::Tensor& y) {
    const at::Tensor factor = norm.zero_centered() ? weight + 1 : weight;
    return y * (y.square().mean(-1, /*keepdim=*/true) + norm.eps()).rsqrt() * factor;
  };
  const auto rotated = [&](const at::Tensor& y) { return rotation_formula(y, cos, sin); };
  return norm.after() ? normalized(rotated(x)) : rotated(normalized(x));
}

class NormRotate : public OnDevice {
 protected:
  static void expect_close(const at::Tensor& got, const at::Tensor& expected) {
    ASSERT_TRUE(got.defined());
    ASSERT_EQ(got.sizes(), expected.sizes());
    EXPECT_TRUE(at::allclose(got, expected, 1e-12, 1e-12));
  }
};
FUSED_ROPE_ON_DEVICES(NormRotate);

TEST_P(NormRotate, OptionsSelectTheFormula) {
  const auto [cos, sin] = tables({5, 8}, at::kDouble);
  const at::Tensor x = randn({2, 5, 3, 16}, at::kDouble), weight = randn({16}, at::kDouble);
  for (const bool after : {false, true}) {
    for (const bool zero_centered : {false, true}) {
      const NormOptions norm = NormOptions(0.1).after(after).zero_centered(zero_centered);
      expect_close(norm_rotate(x, cos, sin, weight, norm), formula(x, cos, sin, weight, norm));
    }
  }
  const at::Tensor ones = at::ones_like(weight);
  expect_close(norm_rotate(x, cos, sin, std::nullopt, kNorm), formula(x, cos, sin, ones, kNorm));
}

TEST_P(NormRotate, CastRoundsTheNormalizedValue) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor x = randn({2, 5, 3, 16}, at::kBFloat16), weight = randn({16}, at::kBFloat16);
  const auto still = tables({5, 0});  // no pair is rotated
  const auto result = [&](Cast cast, const auto& table) {
    return norm_rotate(x, table.first, table.second, weight, NormOptions(1e-6).cast(cast));
  };
  const std::pair table = {cos, sin};
  const auto in_two_steps = [&](Cast cast) { return rotate(result(cast, still), cos, sin); };
  expect_identical(result(Cast::kBefore, table), in_two_steps(Cast::kBefore));
  expect_identical(result(Cast::kAfter, table), in_two_steps(Cast::kAfter));
  EXPECT_FALSE(at::equal(result(Cast::kNever, table), in_two_steps(Cast::kNever)));
  EXPECT_FALSE(at::equal(result(Cast::kBefore, still), result(Cast::kAfter, still)));
}

TEST_P(NormRotate, AllFormsAgree) {
  const auto [cos, sin] = tables({9, 8});
  const at::Tensor q = randn({2, 3, 5, 16}), k = randn({2, 2, 5, 16});
  const at::Tensor q_weight = randn({16}), k_weight = randn({16});
  const RotateOptions options = RotateOptions().layout(Layout::kBHSD).offset(4);
  const at::Tensor q_expected = norm_rotate(q, cos, sin, q_weight, kNorm, options);
  const at::Tensor k_expected = norm_rotate(k, cos, sin, k_weight, kNorm, options);
  const auto expect_pair = [&](const auto& pair) {
    expect_identical(std::get<0>(pair), q_expected);
    expect_identical(std::get<1>(pair), k_expected);
  };
  expect_pair(norm_rotate_qk(q, k, cos, sin, q_weight, k_weight, kNorm, options));
  const at::Tensor q_out = at::empty_like(q), k_out = at::empty_like(k);
  expect_pair(norm_rotate_qk_out(q_out, k_out, q, k, cos, sin, q_weight, k_weight, kNorm, options));
  expect_identical(norm_rotate_out(q_out.zero_(), q, cos, sin, q_weight, kNorm, options),
                   q_expected);
  const at::Tensor own = q.clone();
  expect_identical(norm_rotate_(own, cos, sin, q_weight, kNorm, options), q_expected);
  const auto version = q._version();
  expect_pair(norm_rotate_qk_(q, k, cos, sin, q_weight, k_weight, kNorm, options));
  EXPECT_GT(q._version(), version);
}

TEST_P(NormRotate, FirstAndSecondDerivativesAreThoseOfTheFormula) {
  const auto [c, s] = tables({5, 8}, at::kDouble);
  const at::Tensor x = randn({2, 5, 3, 16}, at::kDouble), w = randn({16}, at::kDouble);
  const at::Tensor g = randn(x.sizes(), at::kDouble);
  const variable_list v = {randn(x.sizes(), at::kDouble), randn(c.sizes(), at::kDouble),
                           randn(s.sizes(), at::kDouble), randn(w.sizes(), at::kDouble)};
  for (const bool after : {false, true}) {
    const NormOptions norm = NormOptions(0.1).after(after);
    const auto derivatives = [&](const auto& function) {
      variable_list in = {leaf(x), leaf(c), leaf(s), leaf(w)};
      const at::Tensor own_g = leaf(g);
      variable_list all = grad({function(in[0], in[1], in[2], in[3])}, in, {own_g},
                               /*retain_graph=*/true, /*create_graph=*/true);
      const variable_list first = all;
      in.push_back(own_g);
      for (const at::Tensor& second : grad(first, in, v)) all.push_back(second);
      return all;
    };
    const variable_list expected =
        derivatives([&](const auto&... in) { return formula(in..., norm); });
    const variable_list got =
        derivatives([&](const auto&... in) { return norm_rotate(in..., norm); });
    for (size_t i = 0; i < expected.size(); ++i) expect_close(got[i], expected[i]);
  }
}

TEST_P(NormRotate, GradientsOfOneTensorNeedNoOther) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor q = leaf(randn({2, 5, 3, 16})), k = randn({2, 5, 2, 16});
  const at::Tensor weight = leaf(randn({16}));
  const auto [q_out, k_out] = norm_rotate_qk(q, k, cos, sin, weight, weight, kNorm);
  EXPECT_TRUE(k_out.requires_grad());
  const at::Tensor g = randn(q.sizes());
  const variable_list got = grad({q_out}, {q, weight}, {g});
  const variable_list alone = grad({norm_rotate(q, cos, sin, weight, kNorm)}, {q, weight}, {g});
  for (size_t i = 0; i < got.size(); ++i) expect_identical(got[i], alone[i]);
  const auto [q_own, k_own] = norm_rotate_qk(q, k, cos, sin, weight, std::nullopt, kNorm);
  EXPECT_FALSE(k_own.requires_grad());
}

template <typename Error, typename F>
void expect_error(const F& call, const std::string& word) {
  try {
    call();
    ADD_FAILURE() << "was accepted";
  } catch (const c10::Error& error) {
    EXPECT_STREQ(typeid(error).name(), typeid(Error).name());
    const std::string message = error.what_without_backtrace();
    EXPECT_NE(message.find(word), std::string::npos) << message;
  }
}

TEST_P(NormRotate, Errors) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor x = randn({2, 5, 3, 16}), weight = randn({16}), before = x.clone();
  const auto call = [&, &cos = cos, &sin = sin](const at::Tensor& w, const NormOptions& norm,
                                                const RotateOptions& options = {}) {
    return [=] { norm_rotate_(x, cos, sin, w, norm, options); };
  };
  expect_error<c10::ValueError>(call(weight.slice(0, 1), kNorm), "weight of shape [D], D=16");
  expect_error<c10::TypeError>(call(weight.to(at::kDouble), kNorm), "float64");
  expect_error<c10::ValueError>(call(weight, NormOptions(-1)), "eps");
  expect_error<c10::ValueError>(call(weight, kNorm, RotateOptions().precision(Precision::kModel)),
                                "cast");
  expect_error<c10::ValueError>(
      call(weight, kNorm, RotateOptions().out_rows(integers({0}).expand({2, 5}))), "out_rows");
  expect_error<c10::Error>(call(leaf(weight), kNorm), "weight requires grad");
  expect_identical(x, before);
}

// A tangent of an input that requires grad: the call is composed of ATen operations, which would
// broadcast.
TEST_P(NormRotate, ErrorsOfAComposedCall) {
  const auto [cos, sin] = tables({5, 8});
  const uint64_t level = torch::autograd::ForwardADLevel::get_next_idx();
  {
    const at::Tensor x = leaf(randn({2, 5, 3, 16})), weight = randn({16}), k = randn({1, 5, 3, 16});
    const at::Tensor dual = at::_make_dual(x, randn(x.sizes()), static_cast<int64_t>(level));
    const auto call = [&, &cos = cos, &sin = sin](const at::Tensor& w, const NormOptions& norm) {
      return [=] { norm_rotate(dual, cos, sin, w, norm); };
    };
    expect_error<c10::ValueError>(call(weight.slice(0, 0, 1), kNorm), "weight of shape [D], D=16");
    expect_error<c10::TypeError>(call(weight.to(at::kDouble), kNorm), "float64");
    expect_error<c10::ValueError>(call(weight, NormOptions(-1)), "eps");
    expect_error<c10::ValueError>(
        [&, &cos = cos, &sin = sin] {
          norm_rotate_qk(dual, k, cos, sin, std::nullopt, std::nullopt, kNorm);
        },
        "k with q's B=2");
  }
  torch::autograd::ForwardADLevel::release_idx(level);
}

}  // namespace
}  // namespace fused_rope
