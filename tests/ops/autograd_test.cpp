// Derivatives through libtorch, without Python: torch::autograd::grad, views, versions, forward
// mode. tests/python/test_autograd.py checks every option against finite differences.
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/forward_grad.h>

#include "testing.h"

namespace fused_rope {
namespace {

using testing::expect_identical;
using testing::leaf;
using testing::OnDevice;
using testing::rotation_formula;
using torch::autograd::grad;
using torch::autograd::variable_list;

const RotateOptions kInverse = RotateOptions().inverse(true);

class Autograd : public OnDevice {
 protected:
  static void expect_close(const at::Tensor& got, const at::Tensor& expected) {
    ASSERT_TRUE(got.defined());
    ASSERT_EQ(got.sizes(), expected.sizes());
    EXPECT_TRUE(at::allclose(got, expected, 1e-13, 1e-13));
  }
};
FUSED_ROPE_ON_DEVICES(Autograd);

TEST_P(Autograd, GradientsOfQAndKAreTheInverseRotation) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor q = leaf(randn({2, 5, 3, 16})), k = leaf(randn({2, 5, 2, 16}));
  const at::Tensor gq = randn(q.sizes()), gk = randn(k.sizes());
  const at::Tensor q_expected = rotate(gq, cos, sin, kInverse);
  const at::Tensor k_expected = rotate(gk, cos, sin, kInverse);
  expect_identical(grad({rotate(q, cos, sin)}, {q}, {gq})[0], q_expected);
  const auto [q_out, k_out] = rotate_qk(q, k, cos, sin);
  const variable_list both = grad({q_out, k_out}, {q, k}, {gq, gk}, /*retain_graph=*/true);
  expect_identical(both[0], q_expected);
  expect_identical(both[1], k_expected);
  // The gradient of an unused output is undefined.
  expect_identical(grad({q_out}, {q}, {gq}, true)[0], q_expected);
  expect_identical(grad({k_out}, {k}, {gk}, true)[0], k_expected);
  EXPECT_FALSE(grad({q_out}, {k}, {gq}, true, false, /*allow_unused=*/true)[0].defined());
}

TEST_P(Autograd, OnlyOutputsOfInputsThatRequireGradRequireIt) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor q = leaf(randn({2, 5, 3, 16})), k = randn({2, 5, 2, 16});
  const auto [q_out, k_out] = rotate_qk(q, k, cos, sin);
  EXPECT_TRUE(q_out.requires_grad());
  EXPECT_FALSE(k_out.requires_grad());
  const c10::AutoGradMode no_grad(false);
  EXPECT_FALSE(rotate(q, cos, sin).requires_grad());
}

TEST_P(Autograd, FirstAndSecondDerivativesAreThoseOfTheFormula) {
  const auto [c, s] = tables({5, 8}, at::kDouble);
  const at::Tensor x = randn({2, 5, 3, 16}, at::kDouble), g = randn(x.sizes(), at::kDouble);
  const variable_list v = {randn(x.sizes(), at::kDouble), randn(c.sizes(), at::kDouble),
                           randn(s.sizes(), at::kDouble)};
  const auto derivatives = [&](const auto& function) {
    variable_list in = {leaf(x), leaf(c), leaf(s)};
    const at::Tensor own_g = leaf(g);
    variable_list all = grad({function(in[0], in[1], in[2])}, in, {own_g},
                             /*retain_graph=*/true, /*create_graph=*/true);
    const variable_list first = all;
    in.push_back(own_g);
    for (const at::Tensor& second : grad(first, in, v)) all.push_back(second);
    return all;
  };
  const variable_list expected = derivatives(rotation_formula);
  const variable_list got = derivatives([](const auto&... in) { return rotate(in...); });
  const variable_list in_place =
      derivatives([](const auto& x, const auto&... in) { return rotate_(x * 1, in...); });
  for (size_t i = 0; i < expected.size(); ++i) {
    expect_close(got[i], expected[i]);
    expect_close(in_place[i], expected[i]);
  }
}

TEST_P(Autograd, InPlaceOnViewsOfOnePackedTensorReachesItsGradient) {
  const auto [c, s] = tables({5, 8}, at::kDouble);
  const at::Tensor packed = leaf(randn({2, 5, 7, 16}, at::kDouble));
  const at::Tensor g = randn({2, 5, 7, 16}, at::kDouble), cos = leaf(c), sin = leaf(s);
  const at::Tensor own = packed * 2, whole = packed * 2;
  rotate_qk_(own.slice(2, 0, 3), own.slice(2, 3, 5), cos, sin);
  const at::Tensor expected =
      at::cat({rotation_formula(whole.slice(2, 0, 5), cos, sin), whole.slice(2, 5)}, 2);
  expect_close(own, expected);
  const variable_list got = grad({own}, {packed, cos, sin}, {g});
  const variable_list wanted = grad({expected}, {packed, cos, sin}, {g});
  for (size_t i = 0; i < wanted.size(); ++i) expect_close(got[i], wanted[i]);
}

TEST_P(Autograd, InPlaceBumpsVersionsOfSavedTensors) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor x = leaf(randn({2, 5, 3, 16}));
  const at::Tensor y = x * 1, squared = y * y;
  rotate_(y, cos, sin);
  EXPECT_THROW(grad({squared.sum()}, {x}), c10::Error);
  const at::Tensor z = x * 1, rotated = rotate(z, cos, sin);
  rotate_(z, cos, sin);
  EXPECT_NO_THROW(grad({rotated.sum()}, {x})) << "rotate saves the tables only";
}

TEST_P(Autograd, KeepsTheInputAliveOnlyForTrainedTables) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor x = leaf(randn({2, 5, 3, 16})) * 1;
  const auto before = x.storage().use_count();
  const at::Tensor out = rotate(x, cos, sin);
  EXPECT_EQ(x.storage().use_count(), before);
}

class ForwardMode : public Autograd {
 protected:
  ~ForwardMode() override { torch::autograd::ForwardADLevel::release_idx(level_); }

  at::Tensor dual(const at::Tensor& primal, const at::Tensor& tangent) const {
    return at::_make_dual(primal, tangent, static_cast<int64_t>(level_));
  }
  at::Tensor tangent(const at::Tensor& x) const { return x._fw_grad(level_); }

 private:
  const uint64_t level_ = torch::autograd::ForwardADLevel::get_next_idx();
};
FUSED_ROPE_ON_DEVICES(ForwardMode);

TEST_P(ForwardMode, TangentOfQIsRotatedAndKHasNone) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor q = randn({2, 5, 3, 16}), k = randn({2, 5, 2, 16}), t = randn({2, 5, 3, 16});
  const at::Tensor expected = rotate(t, cos, sin);
  const auto [q_out, k_out] = rotate_qk(dual(q, t), k, cos, sin);
  expect_identical(q_out._fw_primal(0), rotate(q, cos, sin));
  expect_identical(tangent(q_out), expected);
  EXPECT_FALSE(tangent(k_out).defined());
  const at::Tensor own = dual(q.clone(), t.clone());
  rotate_qk_(own, k, cos, sin);
  expect_identical(tangent(own), expected);
  EXPECT_FALSE(tangent(k).defined());
}

TEST_P(ForwardMode, TangentsOfInputAndTablesAddUp) {
  const auto [cos, sin] = tables({5, 8}, at::kDouble);
  const at::Tensor x = randn({2, 5, 3, 16}, at::kDouble), tx = randn(x.sizes(), at::kDouble);
  const at::Tensor tc = randn(cos.sizes(), at::kDouble), ts = randn(sin.sizes(), at::kDouble);
  const at::Tensor expected = rotation_formula(tx, cos, sin) + rotation_formula(x, tc, ts);
  expect_close(tangent(rotate(dual(x, tx), dual(cos, tc), dual(sin, ts))), expected);
  const at::Tensor own = dual(x.clone(), tx.clone());
  rotate_(own, dual(cos, tc), dual(sin, ts));
  expect_close(tangent(own), expected);
  const at::Tensor primal = x.clone();
  rotate_(primal, cos, dual(sin, ts));
  expect_close(tangent(primal), rotation_formula(x, at::zeros_like(cos), ts));
}

TEST_P(ForwardMode, OutputsRejectTangents) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor x = randn({2, 5, 3, 16}), out = at::zeros_like(x);
  EXPECT_THROW(rotate_out(out, dual(x, x.clone()), cos, sin), c10::Error);
  EXPECT_FALSE(out.any().item<bool>());
}

}  // namespace
}  // namespace fused_rope
