// The formula of normalization.h by the CPU kernel, against independent ones: bit by bit with a
// recursive sum, and in float64 with derivatives from differences.
#include <gtest/gtest.h>

#include <complex>
#include <functional>
#include <string>
#include <vector>

#include "fused_rope/kernels/cpu/kernel.h"
#include "reference.h"

namespace fused_rope::kernels {
namespace {

using testing::kDType;
using testing::kFormat;
using testing::pair_elements;
using testing::Random;
using testing::to_double;
using testing::ulp;
using testing::vector_isas;

constexpr uint64_t kSeed = 20240917;

struct Options {
  int64_t D = 64, R = 64, offset = 0;
  bool interleaved = false;
  bool after = false, zero_centered = false, inverse = false;
  Cast cast = Cast::kNever;
  double eps = 1e-6;
};

// Heads [B, S, H, D] with a weight, and what the kernel makes of them.
template <typename T>
struct Heads {
  static constexpr int64_t B = 2, S = 21, H = 3;

  explicit Heads(const Options& o) : options(o), x(B * S * H * o.D), gradient(x.size()) {
    Random random(kSeed);
    const auto fill = [&](auto& values) {
      for (auto& value : values) value = narrow<T>(static_cast<Wide<T>>(random.normal()));
    };
    fill(x);
    fill(gradient);
    weight.resize(o.D);
    fill(weight);
    for (int64_t i = 0; i < S * o.R / 2; ++i) {
      const double angle = random.normal() * 10;
      cos.push_back(static_cast<Wide<T>>(std::cos(angle)));
      sin.push_back(static_cast<Wide<T>>(std::sin(angle)));
    }
    out = dx = x;
    weight_gradient = weight;
    const int64_t P = o.R / 2;
    norm.weights[0] = {weight.data(), 1, kDType<T>};
    norm.eps = o.eps;
    norm.zero_centered = o.zero_centered;
    norm.cast = o.cast;
    norm.after = o.after;
    params.B = B;
    params.S = S;
    params.D = o.D;
    params.count = 1;
    params.tensors[0] = {x.data(), out.data(), strides(), strides(), H, false};
    params.pairing = {P, o.offset, o.interleaved ? 1 : P};
    params.cos = {cos.data(), P, 0, 0, 0, 1};
    params.sin = {sin.data(), P, 0, 0, 0, 1};
    params.rows.M = S;
    params.dtype = kDType<T>;
    params.table_dtype = kDType<Wide<T>>;
    params.inverse = o.inverse;
    params.norm = &norm;
  }
  Heads(const Heads&) = delete;

  Strides strides() const { return {S * H * options.D, H * options.D, options.D, 1}; }

  void forward() { rotate_tokens(params, 0, B * S); }

  // In two steps of leaves, which must not matter.
  void backward(int64_t first_leaves = 0) {
    NormBackwardParams p = {};
    p.call = params;
    p.call.tensors[0].out = dx.data();
    std::vector<char> workspace(workspace_bytes(B, S, H, options.D, kDType<T>));
    p.tensors[0] = {gradient.data(), strides(), weight_gradient.data(), workspace.data()};
    norm_backward(p, 0, first_leaves);
    norm_backward(p, first_leaves, backward_leaves(p));
    sum_weight_gradients(p);
  }

  Options options;
  NormParams norm = {};
  RotateParams params = {};
  std::vector<T> x, gradient, weight, out, dx, weight_gradient;
  std::vector<Wide<T>> cos, sin;
};

// The formula in float64, for one head and its weight.
std::vector<double> exact(const Options& o, std::vector<double> x,
                          const std::vector<double>& weight, const double* cos, const double* sin) {
  const auto rotate = [&] {
    const auto pairs = pair_elements(o.R, o.offset, o.interleaved, 1);
    for (size_t j = 0; j < pairs.size(); ++j) {
      const auto [a, b] = pairs[j];
      const std::complex<double> rotated =
          std::complex(x[a], x[b]) * std::complex(cos[j], o.inverse ? -sin[j] : sin[j]);
      x[a] = rotated.real();
      x[b] = rotated.imag();
    }
  };
  if (o.after) rotate();
  double squares = 0;
  for (const double value : x) squares += value * value;
  const double r = 1 / std::sqrt(squares / static_cast<double>(x.size()) + o.eps);
  for (size_t d = 0; d < x.size(); ++d) x[d] *= r * (weight[d] + (o.zero_centered ? 1 : 0));
  if (!o.after) rotate();
  return x;
}

// The tree of normalization.h, by its definition.
template <typename W>
W tree_sum(const std::vector<W>& terms) {
  const auto D = static_cast<int64_t>(terms.size());
  const int64_t half = (D + 1) / 2;
  int64_t size = 1;
  while (size < half) size *= 2;
  const std::function<W(int64_t, int64_t)> sum = [&](int64_t first, int64_t count) -> W {
    if (count > 1) return sum(first, count / 2) + sum(first + count / 2, count / 2);
    if (first >= half) return 0;
    return terms[first] + (first + half < D ? terms[first + half] : W{0});
  };
  return sum(0, size);
}

template <typename T>
class Norm : public ::testing::Test {};

using Types = ::testing::Types<Float16, BFloat16, float, double>;
TYPED_TEST_SUITE(Norm, Types);

constexpr int64_t kWidths[] = {1, 2, 3, 6, 8, 12, 31, 64, 80, 96, 100, 128, 130, 256, 576, 1024};

TYPED_TEST(Norm, RoundsWhereItSaysAndSumsByOneTree) {
  using W = Wide<TypeParam>;
  const auto to_T = [](W value) { return widen(narrow<TypeParam>(value)); };
  for (const int64_t D : kWidths) {
    for (const Cast cast : {Cast::kNever, Cast::kBefore, Cast::kAfter}) {
      Heads<TypeParam> heads({.D = D, .R = 0, .cast = cast});
      heads.forward();
      for (size_t first = 0; first < heads.x.size(); first += D) {
        std::vector<W> squares(D);
        for (int64_t d = 0; d < D; ++d)
          squares[d] = widen(heads.x[first + d]) * widen(heads.x[first + d]);
        const W inverse_D = static_cast<W>(1.0 / static_cast<double>(D));
        const W mean = tree_sum(squares) * inverse_D;
        const W r = 1 / std::sqrt(mean + static_cast<W>(1e-6));
        for (int64_t d = 0; d < D; ++d) {
          W n = widen(heads.x[first + d]) * r;
          if (cast == Cast::kBefore) n = to_T(n);
          const W want = to_T(n * widen(heads.weight[d]));
          ASSERT_EQ(to_double(heads.out[first + d]), to_double(narrow<TypeParam>(want)))
              << "D " << D << ", cast " << static_cast<int>(cast) << ", element " << d;
        }
      }
    }
  }
}

// Every order of norm and rotation, with and without elements that do not rotate.
std::vector<Options> all_options() {
  std::vector<Options> all;
  for (int i = 0; i < 16; ++i) {
    Options o = {.interleaved = (i & 1) != 0,
                 .after = (i & 2) != 0,
                 .zero_centered = (i & 4) != 0,
                 .inverse = (i & 8) != 0,
                 .eps = 0.1};
    all.push_back(o);
    o.D = 26;
    o.R = 12;
    o.offset = 5;
    all.push_back(o);
  }
  return all;
}

TYPED_TEST(Norm, IsAsExactAsItPromises) {
  for (const Options& o : all_options()) {
    Heads<TypeParam> heads(o);
    heads.forward();
    std::vector<double> weight, cos(heads.cos.begin(), heads.cos.end()),
        sin(heads.sin.begin(), heads.sin.end());
    for (const TypeParam w : heads.weight) weight.push_back(to_double(w));
    for (size_t first = 0; first < heads.x.size(); first += o.D) {
      const size_t row = first / o.D / Heads<TypeParam>::H % Heads<TypeParam>::S * o.R / 2;
      std::vector<double> x;
      for (int64_t d = 0; d < o.D; ++d) x.push_back(to_double(heads.x[first + d]));
      const auto want = exact(o, x, weight, cos.data() + row, sin.data() + row);
      double largest = 0;  // no pair has a longer norm than sqrt(2) of it
      for (const double value : want) largest = std::max(largest, std::abs(value));
      const double steps = std::log2(static_cast<double>(o.D)) / 2 + 5;
      const double bound = steps * ulp(kFormat<Wide<TypeParam>>, std::sqrt(2.0) * largest);
      for (int64_t d = 0; d < o.D; ++d) {
        const double half = ulp(kFormat<TypeParam>, want[d]) / 2;
        const double rounding = std::is_same_v<TypeParam, double> ? 0 : half * 1.01;
        ASSERT_NEAR(to_double(heads.out[first + d]), want[d], rounding + bound) << "element " << d;
      }
    }
  }
}

// The gradients of sum(out * gradient) in float64, by central differences.
TEST(NormBackward, IsTheDerivative) {
  constexpr double kStep = 1e-5;
  for (const Options& o : all_options()) {
    Heads<double> heads(o);
    heads.backward();
    const auto loss = [&] {
      heads.forward();
      double sum = 0;
      for (size_t i = 0; i < heads.out.size(); ++i) sum += heads.out[i] * heads.gradient[i];
      return sum;
    };
    const auto expect_derivative = [&](std::vector<double>& at, const std::vector<double>& got,
                                       size_t step) {
      for (size_t i = 0; i < at.size(); i += step) {
        const double value = at[i];
        at[i] = value + kStep;
        const double above = loss();
        at[i] = value - kStep;
        const double below = loss();
        at[i] = value;
        ASSERT_NEAR(got[i], (above - below) / (2 * kStep), 2e-6) << "element " << i;
      }
    };
    expect_derivative(heads.x, heads.dx, 97);
    expect_derivative(heads.weight, heads.weight_gradient, 7);
  }
}

template <typename T>
class NarrowNorm : public ::testing::Test {};
using NarrowTypes = ::testing::Types<Float16, BFloat16, float>;
TYPED_TEST_SUITE(NarrowNorm, NarrowTypes);

// As the same call in float64, but for the rounding of the compute type and of the result.
TYPED_TEST(NarrowNorm, GradientsAreThoseOfFloat64) {
  for (const Options& o : all_options()) {
    Heads<TypeParam> heads(o);
    heads.backward();
    Heads<double> wide(o);
    const auto copy = [](const auto& from, std::vector<double>& to) {
      for (size_t i = 0; i < to.size(); ++i) to[i] = static_cast<double>(widen(from[i]));
    };
    copy(heads.x, wide.x);
    copy(heads.gradient, wide.gradient);
    copy(heads.weight, wide.weight);
    wide.cos.assign(heads.cos.begin(), heads.cos.end());
    wide.sin.assign(heads.sin.begin(), heads.sin.end());
    wide.backward();
    const auto expect_near = [](const std::vector<TypeParam>& got, const std::vector<double>& want,
                                double relative) {
      double largest = 0;
      for (const double value : want) largest = std::max(largest, std::abs(value));
      for (size_t i = 0; i < want.size(); ++i) {
        const double half = ulp(kFormat<TypeParam>, want[i]) / 2;
        ASSERT_NEAR(to_double(got[i]), want[i], half * 1.01 + relative * largest) << i;
      }
    };
    expect_near(heads.dx, wide.dx, 4e-6);
    expect_near(heads.weight_gradient, wide.weight_gradient, 2e-6);
  }
}

TYPED_TEST(Norm, DependsNeitherOnRangesNorOnInstructions) {
  for (const Options& o : {Options{.D = 128, .R = 128}, Options{.D = 50, .R = 20, .after = true}}) {
    Heads<TypeParam> heads(o);
    rotate_tokens(heads.params, 0, heads.B * heads.S, Isa::kBaseline);
    const auto out = heads.out;
    heads.backward();
    const auto first = heads.dx;
    const auto weight = heads.weight_gradient;
    const auto same = [](const std::vector<TypeParam>& x, const std::vector<TypeParam>& y) {
      return std::memcmp(x.data(), y.data(), x.size() * sizeof(TypeParam)) == 0;
    };
    heads.backward(1);
    EXPECT_TRUE(same(heads.dx, first) && same(heads.weight_gradient, weight));
    for (const Isa isa : vector_isas()) {
      NormBackwardParams p = {};
      p.call = heads.params;
      p.call.tensors[0].out = heads.dx.data();
      std::vector<char> workspace(
          workspace_bytes(heads.B, heads.S, heads.H, o.D, kDType<TypeParam>));
      p.tensors[0] = {heads.gradient.data(), heads.strides(), heads.weight_gradient.data(),
                      workspace.data()};
      norm_backward(p, 0, backward_leaves(p), isa);
      sum_weight_gradients(p);
      EXPECT_TRUE(same(heads.dx, first) && same(heads.weight_gradient, weight));
      rotate_tokens(heads.params, 0, heads.B * heads.S, isa);
      EXPECT_TRUE(same(heads.out, out));
    }
  }
}

TEST(Leaves, CoverAllRowsAndAreFew) {
  for (const int64_t rows : {0, 1, 31, 32, 33, 1000, 67584, 67585, 524288}) {
    const Leaves leaves(rows);
    EXPECT_LE(leaves.count, kMaxLeaves);
    std::vector<int> seen(rows);
    for (int64_t leaf = 0; leaf < leaves.count; ++leaf) {
      int64_t of_leaf = 0;
      leaves.for_each_row(leaf, [&](int64_t row, int64_t chain) {
        ++seen[row];
        ++of_leaf;
        ASSERT_EQ(chain, row % kChains);
      });
      ASSERT_GT(of_leaf, 0);
      ASSERT_LE(of_leaf, leaves.steps * kChains);
    }
    EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), rows);
  }
}

}  // namespace
}  // namespace fused_rope::kernels
