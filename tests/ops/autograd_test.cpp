#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/forward_grad.h>

#include "testing.h"

namespace fused_rope {
namespace {

using testing::expect_rotated;
using testing::expect_same_bits;
using testing::OnDevice;
using testing::oracle;
using torch::autograd::grad;
using torch::autograd::variable_list;

class Autograd : public OnDevice {
 protected:
  static at::Tensor leaf(const at::Tensor& x) { return x.detach().clone().requires_grad_(); }

  static RotateOptions inverse(const RotateOptions& o) {
    return RotateOptions(o).inverse(!o.inverse());
  }

  static void expect_close(const at::Tensor& got, const at::Tensor& expected, double tolerance) {
    ASSERT_TRUE(got.defined());
    ASSERT_EQ(got.sizes(), expected.sizes());
    const at::Tensor error =
        (got.to(at::kCPU, at::kDouble) - expected.to(at::kCPU, at::kDouble)).abs();
    EXPECT_LE(error.numel() == 0 ? 0 : error.max().item<double>(), tolerance);
  }

  // Options that reach every branch of the table's gradients, with the table's sizes before P = 8.
  std::vector<std::tuple<std::string, std::vector<int64_t>, RotateOptions>> kinds() const {
    const auto positions = integers({3, -1, 9, 3, 3, 0, 1, -1, 9, 9});
    const auto axes = std::vector<int64_t>{0, 1, 1, 0, 1, 1, 0, 0};
    return {
        {"shared", {12}, RotateOptions()},
        {"offset", {12}, RotateOptions().offset(7)},
        {"interleaved", {12}, RotateOptions().interleaved(true)},
        {"blocks", {12}, RotateOptions().blocks(2).rotary_offset(3)},
        {"inverse", {12}, RotateOptions().inverse(true)},
        {"positions", {12}, RotateOptions().positions(positions.view({2, 5}))},
        {"positions of one row",
         {12},
         RotateOptions().positions(positions.slice(0, 0, 5)).offset(2)},
        {"offsets", {12}, RotateOptions().offsets(integers({7, 0}, at::kInt))},
        {"axes", {12}, RotateOptions().positions(positions.view({2, 5})).axes(axes)},
        {"axes of each batch",
         {12},
         RotateOptions()
             .positions(at::cat({positions, positions.flip(0)}).view({2, 2, 5}))
             .axes(axes)},
        {"axes interleaved",
         {12},
         RotateOptions().positions(positions.view({2, 5})).axes(axes).interleaved(true)},
        {"axes in blocks",
         {12},
         RotateOptions().positions(positions.view({2, 5})).axes(axes).blocks(2).rotary_offset(3)},
        {"per token", {2, 5}, RotateOptions()},
        {"per token of one batch", {1, 5}, RotateOptions().interleaved(true)},
        {"per head", {2, 5, 3}, RotateOptions()},
        {"per head of one batch", {1, 5, 3}, RotateOptions().blocks(2)},
    };
  }

  // The same for packed tokens, T = 10.
  std::vector<std::tuple<std::string, std::vector<int64_t>, RotateOptions>> packed_kinds() const {
    const auto o = RotateOptions().layout(Layout::kTHD);
    const auto starts = integers({0, 4, 4, 9}, at::kInt);
    const auto positions = integers({3, -1, 9, 3, 3, 0, 1, -1, 9, 99});
    return {
        {"one sequence", {12}, o},
        {"packed", {12}, RotateOptions(o).cu_seqlens(starts)},
        {"packed offsets", {12}, RotateOptions(o).cu_seqlens(starts).offsets(integers({2, 99, 7}))},
        {"packed positions", {12}, RotateOptions(o).cu_seqlens(starts).positions(positions)},
        {"packed tokens", {1, 10}, o},
        {"no sequence", {12}, RotateOptions(o).cu_seqlens(integers({0}))},
        {"no sequence after padding", {12}, RotateOptions(o).cu_seqlens(integers({3}))},
    };
  }

  template <typename F>
  void for_each_kind(F f) const {
    for (const auto& [name, sizes, options] : kinds()) {
      SCOPED_TRACE(name);
      f(std::vector<int64_t>{2, 5, 3, 20}, sizes, options);
    }
    for (const auto& [name, sizes, options] : packed_kinds()) {
      SCOPED_TRACE(name);
      f(std::vector<int64_t>{10, 3, 20}, sizes, options);
    }
  }

  std::pair<at::Tensor, at::Tensor> tables8(std::vector<int64_t> sizes,
                                            at::ScalarType dtype = at::kDouble) const {
    sizes.push_back(8);
    return tables(sizes, dtype);
  }
};
FUSED_ROPE_ON_DEVICES(Autograd);

TEST_P(Autograd, BackwardIsTheInverse) {
  for_each_kind([&](const auto& sizes, const auto& table, const RotateOptions& o) {
    for (const auto dtype : {at::kBFloat16, at::kFloat}) {
      const auto [cos, sin] = tables8(table, at::kFloat);
      const at::Tensor x = leaf(randn(sizes, dtype)), g = randn(sizes, dtype);
      const at::Tensor before = g.clone();
      const variable_list got = grad({rotate(x, cos, sin, o)}, {x}, {g});
      expect_same_bits(got[0], rotate(g, cos, sin, inverse(o)));
      expect_rotated(got[0], g, cos, sin, inverse(o));
      expect_same_bits(g, before);
    }
  });
}

TEST_P(Autograd, GradientsAreThoseOfTheOracle) {
  for_each_kind([&](const auto& sizes, const auto& table, const RotateOptions& o) {
    const auto [c, s] = tables8(table);
    const at::Tensor x = leaf(randn(sizes, at::kDouble)), cos = leaf(c), sin = leaf(s);
    const at::Tensor g = randn(sizes, at::kDouble);
    const variable_list got = grad({rotate(x, cos, sin, o)}, {x, cos, sin}, {g});
    const variable_list expected =
        grad({oracle(x, cos, sin, o).value}, {x, cos, sin}, {g.to(at::kCPU)});
    for (size_t i = 0; i < 3; ++i) expect_close(got[i], expected[i], 1e-13);
  });
}

TEST_P(Autograd, SecondDerivativesAreThoseOfTheOracle) {
  for_each_kind([&](const auto& sizes, const auto& table, const RotateOptions& o) {
    const auto [c, s] = tables8(table);
    const at::Tensor x = randn(sizes, at::kDouble), g = randn(sizes, at::kDouble);
    const std::vector<at::Tensor> v = {randn(sizes, at::kDouble), randn(c.sizes(), at::kDouble),
                                       randn(s.sizes(), at::kDouble)};
    const auto second = [&](bool ours) {
      const variable_list in = {leaf(x), leaf(c), leaf(s)};
      const at::Tensor own_g = leaf(g);
      const at::Tensor y = ours ? rotate(in[0], in[1], in[2], o)
                                : oracle(in[0], in[1], in[2], o).value.to(GetParam());
      const variable_list first =
          grad({y}, in, {own_g}, /*retain_graph=*/true, /*create_graph=*/true);
      variable_list all = in;
      all.push_back(own_g);
      return grad(first, all, {v[0], v[1], v[2]});
    };
    const variable_list got = second(true), expected = second(false);
    for (size_t i = 0; i < got.size(); ++i) expect_close(got[i], expected[i], 1e-12);
  });
}

TEST_P(Autograd, DoubleBackwardOfXIsTheForward) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor x = leaf(randn({2, 5, 3, 16})), g = leaf(randn({2, 5, 3, 16}));
  const variable_list first =
      grad({rotate(x, cos, sin)}, {x}, {g}, /*retain_graph=*/true, /*create_graph=*/true);
  ASSERT_TRUE(first[0].requires_grad());
  const at::Tensor v = randn({2, 5, 3, 16});
  expect_same_bits(grad({first[0]}, {g}, {v})[0], rotate(v, cos, sin));
}

TEST_P(Autograd, PairsHaveTheGradientsOfSingles) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor gq = randn({2, 5, 3, 16}), gk = randn({2, 5, 2, 16});
  const at::Tensor q_expected = rotate(gq, cos, sin, RotateOptions().inverse(true));
  const at::Tensor k_expected = rotate(gk, cos, sin, RotateOptions().inverse(true));
  const at::Tensor q = leaf(randn({2, 5, 3, 16})), k = leaf(randn({2, 5, 2, 16}));
  {
    const auto [q_out, k_out] = rotate_qk(q, k, cos, sin);
    const variable_list both = grad({q_out, k_out}, {q, k}, {gq, gk}, /*retain_graph=*/true);
    expect_same_bits(both[0], q_expected);
    expect_same_bits(both[1], k_expected);
    // An output that is not used has no gradient: the other's is not disturbed.
    expect_same_bits(grad({q_out}, {q}, {gq}, true)[0], q_expected);
    expect_same_bits(grad({k_out}, {k}, {gk}, true)[0], k_expected);
    EXPECT_FALSE(grad({q_out}, {k}, {gq}, true, false, /*allow_unused=*/true)[0].defined());
  }
  const auto [q_out, k_detached] = rotate_qk(q, k.detach(), cos, sin);
  EXPECT_TRUE(q_out.requires_grad());
  EXPECT_FALSE(k_detached.requires_grad());
  expect_same_bits(grad({q_out}, {q}, {gq})[0], q_expected);
  const auto [q_detached, k_out] = rotate_qk(q.detach(), k, cos, sin);
  EXPECT_FALSE(q_detached.requires_grad());
  expect_same_bits(grad({k_out}, {k}, {gk})[0], k_expected);
}

TEST_P(Autograd, PairsSumTheGradientsOfTheTable) {
  const auto [c, s] = tables({5, 8}, at::kDouble);
  const at::Tensor q = randn({2, 5, 3, 16}, at::kDouble), k = randn({2, 5, 2, 16}, at::kDouble);
  const at::Tensor cos = leaf(c), sin = leaf(s);
  const variable_list weights = {randn(q.sizes(), at::kDouble), randn(k.sizes(), at::kDouble)};
  const auto gradients = [&](bool use_q, bool use_k, auto rotated) {
    const auto [q_out, k_out] = rotated();
    variable_list out, g;
    if (use_q) out.push_back(q_out), g.push_back(weights[0].to(q_out.device()));
    if (use_k) out.push_back(k_out), g.push_back(weights[1].to(k_out.device()));
    return grad(out, {cos, sin}, g);
  };
  for (const auto& [use_q, use_k] : {std::pair{true, true}, {true, false}, {false, true}}) {
    const variable_list expected = gradients(use_q, use_k, [&] {
      return std::pair(oracle(q, cos, sin).value, oracle(k, cos, sin).value);
    });
    const variable_list outside =
        gradients(use_q, use_k, [&] { return rotate_qk(q, k, cos, sin); });
    const variable_list inside =
        gradients(use_q, use_k, [&] { return rotate_qk_(q.clone(), k.clone(), cos, sin); });
    for (size_t i = 0; i < 2; ++i) {
      expect_close(outside[i], expected[i], 1e-13);
      expect_close(inside[i], expected[i], 1e-13);
    }
  }
}

TEST_P(Autograd, TableGradientsAreTheSameOnEveryRun) {
  const auto [c, s] = tables({4, 32});
  const at::Tensor positions = at::randint(-1, 4, {512}, at::kLong).to(GetParam());
  const auto o = RotateOptions().positions(positions);
  const at::Tensor x = randn({4, 512, 4, 64}), g = randn({4, 512, 4, 64});
  const at::Tensor cos = leaf(c), sin = leaf(s);
  const auto run = [&] { return grad({rotate(x, cos, sin, o)}, {cos, sin}, {g}); };
  const variable_list first = run();
  for (int i = 0; i < 5; ++i) {
    const variable_list again = run();
    expect_same_bits(again[0], first[0]);
    expect_same_bits(again[1], first[1]);
  }
}

TEST_P(Autograd, ReadsGradientsOfAnyStrides) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor x = leaf(randn({2, 5, 3, 16}));
  const at::Tensor out = rotate(x, cos, sin);
  const auto o = RotateOptions().inverse(true);
  for (const at::Tensor& g :
       {randn({1}).expand({2, 5, 3, 16}), randn({2, 3, 5, 16}).transpose(1, 2),
        randn({16, 3, 5, 2}).permute({3, 2, 1, 0})}) {
    const at::Tensor before = g.clone();
    expect_same_bits(grad({out}, {x}, {g}, /*retain_graph=*/true)[0],
                     rotate(g.contiguous(), cos, sin, o));
    expect_same_bits(g, before);
  }
}

TEST_P(Autograd, InPlaceOnViewsOfOnePackedTensor) {
  const auto [c, s] = tables({5, 8}, at::kDouble);
  const at::Tensor packed = leaf(randn({2, 5, 7, 16}, at::kDouble));
  const at::Tensor g = randn({2, 5, 7, 16}, at::kDouble);
  const auto o = RotateOptions().interleaved(true);
  for (const bool trains_table : {false, true}) {
    const at::Tensor cos = trains_table ? leaf(c) : c, sin = trains_table ? leaf(s) : s;
    const at::Tensor own = packed * 2;
    rotate_qk_(own.slice(2, 0, 3), own.slice(2, 3, 5), cos, sin, o);
    const at::Tensor double_packed = packed * 2;
    const at::Tensor expected =
        at::cat({rotate(double_packed.slice(2, 0, 3), cos, sin, o),
                 rotate(double_packed.slice(2, 3, 5), cos, sin, o), double_packed.slice(2, 5)},
                2);
    expect_same_bits(own, expected);
    variable_list inputs = {packed};
    if (trains_table) inputs.insert(inputs.end(), {cos, sin});
    const variable_list got = grad({own}, inputs, {g}), wanted = grad({expected}, inputs, {g});
    for (size_t i = 0; i < inputs.size(); ++i) expect_close(got[i], wanted[i], 1e-13);
  }
}

TEST_P(Autograd, InPlaceTwiceIsTwoRotations) {
  const auto [cos, sin] = tables({5, 8}, at::kDouble);
  const at::Tensor x = leaf(randn({2, 5, 3, 16}, at::kDouble)),
                   g = randn({2, 5, 3, 16}, at::kDouble);
  const at::Tensor y = x.clone();
  rotate_(rotate_(y, cos, sin), cos, sin);
  const auto o = RotateOptions().inverse(true);
  expect_same_bits(grad({y}, {x}, {g})[0], rotate(rotate(g, cos, sin, o), cos, sin, o));
}

TEST_P(Autograd, InPlaceSpoilsWhatOthersSaved) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor x = leaf(randn({2, 5, 3, 16}));
  const at::Tensor y = x * 1, squared = y * y;
  rotate_(y, cos, sin);
  EXPECT_THROW(grad({squared.sum()}, {x}), c10::Error);
  const at::Tensor z = x * 1, rotated = rotate(z, cos, sin);
  rotate_(z, cos, sin);  // rotate saved the table only
  EXPECT_NO_THROW(grad({rotated.sum()}, {x}));
}

TEST_P(Autograd, InPlaceWhereOnlyOneNeedsAGradient) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor leaf_q = leaf(randn({2, 5, 3, 16})), k = randn({2, 5, 2, 16});
  const at::Tensor expected = rotate(k, cos, sin), g = randn({2, 5, 3, 16});
  const at::Tensor q = leaf_q * 1;
  rotate_qk_(q, k, cos, sin);
  EXPECT_FALSE(k.requires_grad());
  expect_same_bits(k, expected);
  expect_same_bits(grad({q}, {leaf_q}, {g})[0], rotate(g, cos, sin, RotateOptions().inverse(true)));
  const at::Tensor plain = randn({2, 5, 3, 16}), leaf_k = leaf(randn({2, 5, 2, 16}));
  const at::Tensor key = leaf_k * 1;
  rotate_qk_(plain, key, cos, sin);
  EXPECT_FALSE(plain.requires_grad());
  EXPECT_TRUE(key.requires_grad());
}

// What PyTorch's own in-place operators accept: a chunk that needs no gradient, beside a query that
// does.
TEST_P(Autograd, InPlaceOnAChunkWithoutGradient) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor q = leaf(randn({2, 5, 3, 16})) * 1;
  const at::Tensor k = randn({2, 5, 4, 16}).split(2, 2)[0];
  const at::Tensor expected = rotate(k, cos, sin);
  rotate_qk_(q, k, cos, sin);
  expect_same_bits(k, expected);
}

TEST_P(Autograd, CountsVersionsInPlace) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor q = leaf(randn({2, 5, 3, 16})) * 1, k = leaf(randn({2, 5, 2, 16})) * 1;
  const int64_t before_q = q._version(), before_k = k._version();
  rotate_qk_(q, k, cos, sin);
  EXPECT_GT(q._version(), before_q);
  EXPECT_GT(k._version(), before_k);
}

TEST_P(Autograd, SavesTheInputOnlyForTheTable) {
  const auto [c, s] = tables({5, 8});
  const at::Tensor x = leaf(randn({2, 5, 3, 16})) * 1;
  const auto uses = [&] { return x.storage().use_count(); };
  const auto before = uses();
  const at::Tensor out = rotate(x, c, s);
  EXPECT_EQ(uses(), before) << "x is not needed for backward";
}

TEST_P(Autograd, EmptyTensorsHaveEmptyGradients) {
  const auto [cos, sin] = tables({5, 8});
  for (const std::vector<int64_t>& sizes :
       {std::vector<int64_t>{0, 5, 3, 16}, {2, 0, 3, 16}, {2, 5, 0, 16}}) {
    const at::Tensor x = leaf(randn(sizes)), own_cos = leaf(cos), own_sin = leaf(sin);
    const variable_list got =
        grad({rotate(x, own_cos, own_sin)}, {x, own_cos, own_sin}, {randn(sizes)});
    EXPECT_EQ(got[0].sizes(), x.sizes());
    expect_close(got[1], at::zeros({5, 8}), 0);
    expect_close(got[2], at::zeros({5, 8}), 0);
  }
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

TEST_P(ForwardMode, TangentOfXIsRotated) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor x = randn({2, 5, 3, 16}), t = randn({2, 5, 3, 16});
  const at::Tensor out = rotate(dual(x, t), cos, sin);
  expect_same_bits(out._fw_primal(0), rotate(x, cos, sin));
  expect_same_bits(tangent(out), rotate(t, cos, sin));
  const at::Tensor k = randn({2, 5, 2, 16});
  const auto [q_out, k_out] = rotate_qk(dual(x, t), k, cos, sin);
  expect_same_bits(tangent(q_out), rotate(t, cos, sin));
  EXPECT_FALSE(tangent(k_out).defined());
}

// rotate is linear in the table, apart from what is copied: the tangent is a difference of two
// oracles.
TEST_P(ForwardMode, TangentsOfAllAddUp) {
  for_each_kind([&](const auto& sizes, const auto& table, const RotateOptions& o) {
    const auto [cos, sin] = tables8(table);
    const at::Tensor x = randn(sizes, at::kDouble), tx = randn(sizes, at::kDouble);
    const at::Tensor tc = randn(cos.sizes(), at::kDouble), ts = randn(sin.sizes(), at::kDouble);
    const at::Tensor expected = oracle(tx, cos, sin, o).value +
                                oracle(x, cos + tc, sin + ts, o).value -
                                oracle(x, cos, sin, o).value;
    const at::Tensor out = rotate(dual(x, tx), dual(cos, tc), dual(sin, ts), o);
    expect_close(tangent(out), expected, 1e-13);
    const at::Tensor only_sin = rotate(x, cos, dual(sin, ts), o);
    expect_close(tangent(only_sin),
                 oracle(x, cos, sin + ts, o).value - oracle(x, cos, sin, o).value, 1e-13);
  });
}

TEST_P(ForwardMode, InPlaceTakesTheTangentAlong) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor q = randn({2, 5, 3, 16}), k = randn({2, 5, 2, 16}), t = randn({2, 5, 3, 16});
  const at::Tensor expected = rotate(q, cos, sin), k_expected = rotate(k, cos, sin);
  const at::Tensor x = dual(q.clone(), t.clone());
  rotate_(x, cos, sin);
  expect_same_bits(x._fw_primal(0), expected);
  expect_same_bits(tangent(x), rotate(t, cos, sin));
  const at::Tensor y = dual(q.clone(), t.clone());
  rotate_qk_(y, k, cos, sin);
  expect_same_bits(tangent(y), rotate(t, cos, sin));
  expect_same_bits(k, k_expected);
  EXPECT_FALSE(tangent(k).defined());
}

TEST_P(ForwardMode, InPlaceTakesTheTangentOfTheTable) {
  const auto [cos, sin] = tables({5, 8}, at::kDouble);
  const at::Tensor x = randn({2, 5, 3, 16}, at::kDouble), ts = randn({5, 8}, at::kDouble);
  const at::Tensor own = x.clone();
  rotate_(own, cos, dual(sin, ts));
  expect_close(tangent(own), oracle(x, cos, sin + ts).value - oracle(x, cos, sin).value, 1e-13);
}

TEST_P(ForwardMode, OutputsRefuseTangents) {
  const auto [cos, sin] = tables({5, 8});
  const at::Tensor x = randn({2, 5, 3, 16}), out = at::zeros_like(x);
  EXPECT_THROW(rotate_out(out, dual(x, x.clone()), cos, sin), c10::Error);
  EXPECT_EQ(out.count_nonzero().item<int64_t>(), 0);
}

}  // namespace
}  // namespace fused_rope
