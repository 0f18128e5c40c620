#include <cmath>
#include <limits>

#include "testing.h"

namespace fused_rope {
namespace {

using testing::expect_same_bits;
using testing::OnDevice;

// The true cosine and sine of row * frequency. The product of two float64 numbers is kept whole, as
// a high and a low part.
struct Angle {
  Angle(int64_t row, double frequency) {
    const auto high = static_cast<long double>(row) * frequency;
    const auto low =
        std::fma(static_cast<long double>(row), static_cast<long double>(frequency), -high);
    cos = std::cos(high) * std::cos(low) - std::sin(high) * std::sin(low);
    sin = std::sin(high) * std::cos(low) + std::cos(high) * std::sin(low);
  }
  long double cos, sin;
};

long double ulps(float got, long double exact) {
  const float near = std::abs(static_cast<float>(exact));
  const float unit = std::nextafter(near, std::numeric_limits<float>::infinity()) - near;
  return std::abs(got - exact) / unit;
}

class Table : public OnDevice {
 protected:
  at::Tensor frequencies(int64_t P, double base = 10000) const {
    const at::Tensor exponents = at::arange(P, at::kDouble) / static_cast<double>(P);
    return at::pow(base, -exponents).to(GetParam());
  }
};
FUSED_ROPE_ON_DEVICES(Table);

TEST_P(Table, IsRightToOneUlpAtEveryRow) {
  for (const double base : {1e4, 5e5, 1e7}) {
    // float32 frequencies are what models keep; float64 ones fill all bits of the product.
    for (const auto dtype : {at::kDouble, at::kFloat}) {
      const at::Tensor inv_freq = frequencies(64, base).to(dtype);
      const at::Tensor f = inv_freq.to(at::kCPU, at::kDouble);
      for (const int64_t first : {int64_t{0}, int64_t{1} << 11, int64_t{48040}, int64_t{1} << 20,
                                  (int64_t{1} << 24) - 1, (int64_t{1} << 31) - 2}) {
        const auto [cos, sin] = cos_sin_table(inv_freq, 3, first);
        ASSERT_EQ(cos.sizes(), at::IntArrayRef({3, 64}));
        const at::Tensor c = cos.to(at::kCPU), s = sin.to(at::kCPU);
        for (int64_t i = 0; i < 3; ++i) {
          for (int64_t j = 0; j < 64; ++j) {
            const Angle exact(first + i, f[j].item<double>());
            ASSERT_LE(ulps(c[i][j].item<float>(), exact.cos), 1)
                << "cos row " << first + i << " pair " << j;
            ASSERT_LE(ulps(s[i][j].item<float>(), exact.sin), 1)
                << "sin row " << first + i << " pair " << j;
          }
        }
      }
    }
  }
}

TEST_P(Table, RowsDoNotDependOnTheFirst) {
  const at::Tensor inv_freq = frequencies(20);
  const auto [cos, sin] = cos_sin_table(inv_freq, 5000);
  const auto [later_cos, later_sin] = cos_sin_table(inv_freq, 1000, 4000);
  expect_same_bits(later_cos, cos.slice(0, 4000));
  expect_same_bits(later_sin, sin.slice(0, 4000));
}

TEST_P(Table, StartsAtTheUnitTurn) {
  const auto [cos, sin] = cos_sin_table(frequencies(8), 1);
  EXPECT_TRUE(at::equal(cos, at::ones_like(cos)));
  EXPECT_TRUE(at::equal(sin, at::zeros_like(sin)));
}

TEST_P(Table, IsScaledBeforeItIsRounded) {
  const at::Tensor inv_freq = frequencies(16);
  const auto [cos, sin] = cos_sin_table(inv_freq, 50, 3, 1.25, at::kDouble);
  const auto [unit_cos, unit_sin] = cos_sin_table(inv_freq, 50, 3, 1.0, at::kDouble);
  expect_same_bits(cos, unit_cos * 1.25);
  expect_same_bits(sin, unit_sin * 1.25);
  for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
    const auto [narrow_cos, narrow_sin] = cos_sin_table(inv_freq, 50, 3, 1.25, dtype);
    expect_same_bits(narrow_cos, cos.to(dtype));
    expect_same_bits(narrow_sin, sin.to(dtype));
  }
}

TEST_P(Table, IsTheSameOnEveryDevice) {
  const at::Tensor inv_freq = frequencies(32);
  const auto [cos, sin] = cos_sin_table(inv_freq, 300);
  EXPECT_EQ(cos.device(), GetParam());
  const auto [host_cos, host_sin] =
      cos_sin_table(inv_freq, 300, 0, 1.0, at::kFloat, at::Device(at::kCPU));
  EXPECT_TRUE(host_cos.is_cpu());
  expect_same_bits(cos, host_cos);
  expect_same_bits(sin, host_sin);
}

TEST_P(Table, MayBeEmpty) {
  const auto [no_rows, no_rows_sin] = cos_sin_table(frequencies(8), 0, 7);
  EXPECT_EQ(no_rows.sizes(), at::IntArrayRef({0, 8}));
  const auto [no_pairs, no_pairs_sin] = cos_sin_table(frequencies(0), 7);
  EXPECT_EQ(no_pairs_sin.sizes(), at::IntArrayRef({7, 0}));
}

TEST_P(Table, ReadsFrequenciesOfAnyStride) {
  const at::Tensor inv_freq = frequencies(16);
  const at::Tensor spread = inv_freq.repeat_interleave(2).slice(0, 0, 32, 2);
  expect_same_bits(std::get<0>(cos_sin_table(spread, 9)), std::get<0>(cos_sin_table(inv_freq, 9)));
}

TEST_P(Table, IsNeverAnInferenceTensor) {
  const c10::InferenceMode inference;
  const at::Tensor inv_freq = frequencies(8);
  ASSERT_TRUE(inv_freq.is_inference());
  const auto [cos, sin] = cos_sin_table(inv_freq, 4);
  EXPECT_FALSE(cos.is_inference());
  EXPECT_FALSE(sin.is_inference());
}

TEST_P(Table, RefusesWhatIsNoTable) {
  const at::Tensor f = frequencies(8);
  EXPECT_THROW(cos_sin_table(f, -1), c10::ValueError);
  EXPECT_THROW(cos_sin_table(f, 1, -1), c10::ValueError);
  EXPECT_THROW(cos_sin_table(f, 2, int64_t{1} << 31), c10::ValueError);
  EXPECT_THROW(cos_sin_table(f, INT64_MAX), c10::ValueError);
  EXPECT_THROW(cos_sin_table(f, 1, INT64_MAX), c10::ValueError);
  EXPECT_THROW(cos_sin_table(f.view({2, 4}), 1), c10::ValueError);
  EXPECT_THROW(cos_sin_table(f.to(at::kLong), 1), c10::TypeError);
  EXPECT_THROW(cos_sin_table(f, 1, 0, 1.0, at::kInt), c10::TypeError);
  EXPECT_NO_THROW(cos_sin_table(f, 1, int64_t{1} << 31));
}

TEST(MetaTable, HasNoValuesOnTheHost) {
  const at::Tensor f = at::empty({8}, at::TensorOptions(at::kMeta).dtype(at::kFloat));
  const at::Device host = at::kCPU;
  EXPECT_THROW(cos_sin_table(f, 4, 0, 1.0, at::kFloat, host), c10::Error);
}

}  // namespace
}  // namespace fused_rope
