#include "fused_rope/kernels/rotation.h"

#include <gtest/gtest.h>

#include "reference.h"

namespace fused_rope::kernels {
namespace {

using testing::kFormat;
using testing::Random;
using testing::round_to;
using testing::to_double;
using testing::ulp;

constexpr int kSamples = 20000;
constexpr uint64_t kSeed = 20240917;

// A random pair, cosine and sine, all representable in T.
template <typename T>
struct Sample {
  explicit Sample(Random& random) {
    const double scale = std::ldexp(1.0, static_cast<int>(random.below(13)) - 6);
    a = widen(narrow<T>(static_cast<Wide<T>>(random.normal() * scale)));
    b = widen(narrow<T>(static_cast<Wide<T>>(random.normal() * scale)));
    const double angle = random.normal() * 10;
    c = widen(narrow<T>(static_cast<Wide<T>>(std::cos(angle))));
    s = widen(narrow<T>(static_cast<Wide<T>>(std::sin(angle))));
  }

  std::complex<double> exact() const {
    return std::complex<double>(a, b) * std::complex<double>(c, s);
  }
  double norm() const { return std::abs(std::complex<double>(a, b)); }

  Wide<T> a, b, c, s;
};

template <typename T>
class Rotation : public ::testing::Test {};

using Types = ::testing::Types<Float16, BFloat16, float, double>;
TYPED_TEST_SUITE(Rotation, Types);

TYPED_TEST(Rotation, IsComplexMultiplication) {
  SCOPED_TRACE(kSeed);
  Random random(kSeed);
  for (int i = 0; i < kSamples; ++i) {
    const Sample<TypeParam> x(random);
    const auto got = rotate_pair<TypeParam, Precision::kFp32>(x.a, x.b, x.c, x.s);
    const double bound = 2 * ulp(kFormat<Wide<TypeParam>>, x.norm());
    ASSERT_NEAR(got.a, x.exact().real(), bound) << "sample " << i;
    ASSERT_NEAR(got.b, x.exact().imag(), bound) << "sample " << i;
  }
}

TYPED_TEST(Rotation, InverseRestoresThePair) {
  SCOPED_TRACE(kSeed);
  Random random(kSeed);
  for (int i = 0; i < kSamples; ++i) {
    const Sample<TypeParam> x(random);
    const auto rotated = rotate_pair<TypeParam, Precision::kFp32>(x.a, x.b, x.c, x.s);
    const auto back = rotate_pair<TypeParam, Precision::kFp32>(rotated.a, rotated.b, x.c, -x.s);
    const double length = std::norm(std::complex<double>(x.c, x.s));  // not 1: c and s are rounded
    const double bound = 5 * ulp(kFormat<Wide<TypeParam>>, x.norm());
    ASSERT_NEAR(back.a, x.a * length, bound) << "sample " << i;
    ASSERT_NEAR(back.b, x.b * length, bound) << "sample " << i;
  }
}

TYPED_TEST(Rotation, InverseIsTheTranspose) {
  SCOPED_TRACE(kSeed);
  Random random(kSeed);
  for (int i = 0; i < kSamples; ++i) {
    Sample<TypeParam> x(random);
    const Sample<TypeParam> y(random);
    x.c *= 3;  // also where the table is scaled
    const auto rx = rotate_pair<TypeParam, Precision::kFp32>(x.a, x.b, x.c, x.s);
    const auto ry = rotate_pair<TypeParam, Precision::kFp32>(y.a, y.b, x.c, -x.s);
    const double left = double{rx.a} * y.a + double{rx.b} * y.b;
    const double right = double{x.a} * ry.a + double{x.b} * ry.b;
    ASSERT_NEAR(left, right, 32 * ulp(kFormat<Wide<TypeParam>>, x.norm() * y.norm()));
  }
}

TYPED_TEST(Rotation, OfElementsIsThatOfThePair) {
  SCOPED_TRACE(kSeed);
  Random random(kSeed);
  for (int i = 0; i < kSamples; ++i) {
    const Sample<TypeParam> x(random);
    const auto pair = rotate_pair<TypeParam, Precision::kFp32>(x.a, x.b, x.c, x.s);
    ASSERT_EQ(pair.a, (rotate_element<TypeParam, Precision::kFp32>(x.a, x.b, x.c, -x.s)));
    ASSERT_EQ(pair.b, (rotate_element<TypeParam, Precision::kFp32>(x.b, x.a, x.c, x.s)));
  }
}

// An FMA would keep the rounding error of the product; two roundings leave nothing.
TYPED_TEST(Rotation, IsNeverContracted) {
  using W = Wide<TypeParam>;
  const W tiny = std::ldexp(W{1}, -(std::numeric_limits<W>::digits + 1) / 2);
  volatile W a = 1 + tiny, b = 1 + 2 * tiny, c = 1 + tiny, s = 1;
  const auto first = rotate_pair<TypeParam, Precision::kFp32>(a, b, c, s);
  EXPECT_EQ(first.a, W{0});
  const auto second = rotate_pair<TypeParam, Precision::kFp32>(b, a, c, -s);
  EXPECT_EQ(second.b, W{0});
}

template <typename T>
class ModelRotation : public ::testing::Test {};

using HalfTypes = ::testing::Types<Float16, BFloat16>;
TYPED_TEST_SUITE(ModelRotation, HalfTypes);

// Eager PyTorch: x * cos + rotate_half(x) * sin, with a rounding to T after each operation.
TYPED_TEST(ModelRotation, RoundsAsEagerPyTorch) {
  SCOPED_TRACE(kSeed);
  Random random(kSeed);
  const auto once = [](double value) { return round_to(kFormat<TypeParam>, value); };
  const auto sum = [&](double x, double y) { return once(round_to(kFormat<float>, x + y)); };
  for (int i = 0; i < kSamples; ++i) {
    const Sample<TypeParam> x(random);
    const auto got = rotate_pair<TypeParam, Precision::kModel>(x.a, x.b, x.c, x.s);
    const double a = sum(once(double{x.a} * x.c), once(-double{x.b} * x.s));
    const double b = sum(once(double{x.b} * x.c), once(double{x.a} * x.s));
    ASSERT_EQ(to_double(narrow<TypeParam>(got.a)), a) << "sample " << i;
    ASSERT_EQ(to_double(narrow<TypeParam>(got.b)), b) << "sample " << i;
  }
}

TYPED_TEST(ModelRotation, RoundsTheTable) {
  const float third = 1.0f / 3;
  const double expected = round_to(kFormat<TypeParam>, third);
  EXPECT_EQ((rounded<TypeParam, Precision::kModel>(third)), expected);
  EXPECT_EQ((rounded<TypeParam, Precision::kFp32>(third)), third);
  EXPECT_EQ((rounded<TypeParam, Precision::kFp32>(1.0 / 3)), third);  // float64 tables
}

}  // namespace
}  // namespace fused_rope::kernels
