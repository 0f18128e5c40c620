#include "fused_rope/kernels/numeric.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "reference.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fused_rope::kernels {
namespace {

using testing::decode;
using testing::Format;
using testing::kFormat;
using testing::round_to;

// Flushes subnormal operands and results of float32 arithmetic to zero during its lifetime.
class FlushToZero {
 public:
#if defined(__SSE2__)
  static constexpr bool kAvailable = true;
  FlushToZero() { _mm_setcsr(saved_ | 0x8040); }
  ~FlushToZero() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_ = _mm_getcsr();
#else
  static constexpr bool kAvailable = false;
#endif
};

// A float32 and its expected conversion, as bits: flush-to-zero affects comparisons of subnormals.
struct Sample {
  uint32_t value;
  uint16_t expected;
  bool is_nan;
};

template <typename T>
class HalfPrecision : public ::testing::Test {
 protected:
  static constexpr Format kType = kFormat<T>;

  // Expects every sample to be converted correctly, and prints the first that is not.
  static void expect_narrowed(const std::vector<Sample>& samples) {
    size_t wrong = 0;
    Sample first{};
    uint16_t got = 0;
    for (const Sample& sample : samples) {
      const uint16_t bits = narrow<T>(float_of(sample.value)).bits;
      const bool right = sample.is_nan ? is_nan(bits) && bits >> 15 == sample.expected >> 15
                                       : bits == sample.expected;
      if (right) continue;
      if (wrong++ == 0) {
        first = sample;
        got = bits;
      }
    }
    EXPECT_EQ(wrong, 0u) << std::hex << "first: float32 bits 0x" << first.value << " became 0x"
                         << got << ", expected 0x" << first.expected;
  }

  static bool is_nan(uint16_t bits) { return std::isnan(decode(kType, bits)); }

  // The pattern of a value of this type, searched in the sorted list of all values.
  static uint16_t encode(double value) {
    static const std::vector<double> magnitudes = [] {
      std::vector<double> all;
      for (uint32_t bits = 0; !std::isnan(decode(kType, static_cast<uint16_t>(bits))); ++bits) {
        all.push_back(decode(kType, static_cast<uint16_t>(bits)));
      }
      return all;
    }();
    const auto found = std::lower_bound(magnitudes.begin(), magnitudes.end(), std::abs(value));
    EXPECT_EQ(*found, std::abs(value));
    const auto index = static_cast<uint16_t>(found - magnitudes.begin());
    return static_cast<uint16_t>(index | (std::signbit(value) ? 0x8000 : 0));
  }

  static Sample sample(float value) {
    if (std::isnan(value)) {
      return {bits_of(value), static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0), true};
    }
    return {bits_of(value), encode(round_to(kType, value)), false};
  }

  // Every value, every midpoint between consecutive values, and the float32 on each side of both.
  static std::vector<Sample> edges() {
    std::vector<Sample> samples;
    for (uint32_t bits = 0; std::isfinite(decode(kType, static_cast<uint16_t>(bits))); ++bits) {
      const double value = decode(kType, static_cast<uint16_t>(bits));
      const double middle = value + testing::ulp(kType, value) / 2;
      for (const double center : {value, middle}) {
        const auto x = static_cast<float>(center);
        for (const float near : {std::nextafter(x, -1.0f), x, std::nextafter(x, INFINITY)}) {
          samples.push_back(sample(near));
          samples.push_back(sample(-near));
        }
      }
    }
    return samples;
  }
};

using HalfTypes = ::testing::Types<Float16, BFloat16>;
TYPED_TEST_SUITE(HalfPrecision, HalfTypes);

TYPED_TEST(HalfPrecision, WidensEveryPatternExactly) {
  std::vector<uint32_t> expected(1 << 16);
  for (uint32_t bits = 0; bits < expected.size(); ++bits) {
    const double value = decode(TestFixture::kType, static_cast<uint16_t>(bits));
    expected[bits] = bits_of(static_cast<float>(value));
  }
  const auto check = [&] {
    for (uint32_t bits = 0; bits < expected.size(); ++bits) {
      const uint32_t got = bits_of(widen(TypeParam{static_cast<uint16_t>(bits)}));
      if (TestFixture::is_nan(static_cast<uint16_t>(bits))) {
        ASSERT_GT(got & 0x7fffffffu, 0x7f800000u) << "of pattern " << bits;
      } else {
        ASSERT_EQ(got, expected[bits]) << "of pattern " << bits;
      }
    }
  };
  check();
  if (!FlushToZero::kAvailable) return;
  SCOPED_TRACE("flush to zero");
  [[maybe_unused]] const FlushToZero flush;
  check();
}

TYPED_TEST(HalfPrecision, NarrowInvertsWiden) {
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    const auto pattern = static_cast<uint16_t>(bits);
    const uint16_t back = narrow<TypeParam>(widen(TypeParam{pattern})).bits;
    if (TestFixture::is_nan(pattern)) {
      ASSERT_TRUE(TestFixture::is_nan(back)) << "of pattern " << bits;
      ASSERT_EQ(back >> 15, pattern >> 15) << "of pattern " << bits;
    } else {
      ASSERT_EQ(back, pattern);
    }
  }
}

TYPED_TEST(HalfPrecision, RoundsToNearestEven) {
  const std::vector<Sample> samples = this->edges();
  this->expect_narrowed(samples);
  if (!FlushToZero::kAvailable) return;
  SCOPED_TRACE("flush to zero");
  std::vector<Sample> normal;  // subnormals of float32 may be flushed, in bfloat16 too
  for (const Sample& s : samples) {
    if ((s.value & 0x7f800000u) != 0 || (s.value & 0x7fffffffu) == 0) normal.push_back(s);
  }
  [[maybe_unused]] const FlushToZero flush;
  this->expect_narrowed(normal);
}

TYPED_TEST(HalfPrecision, RoundsFloat32OfEveryExponent) {
  std::vector<Sample> samples;
  constexpr uint64_t kStep = 4099;  // a prime: all low bits and all exponents
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += kStep) {
    samples.push_back(this->sample(float_of(static_cast<uint32_t>(bits))));
  }
  this->expect_narrowed(samples);
}

TYPED_TEST(HalfPrecision, RoundsSpecialValues) {
  using Limits = std::numeric_limits<float>;
  std::vector<Sample> samples;
  for (const float value :
       {0.0f, Limits::denorm_min(), Limits::min(), Limits::max(), Limits::infinity(),
        Limits::quiet_NaN(), 65504.0f, 65519.0f, 65520.0f, 0x1p-24f, 0x1p-25f, 0x1.000002p-25f}) {
    samples.push_back(this->sample(value));
    samples.push_back(this->sample(-value));
  }
  // NaNs whose payload is only in dropped bits must not become infinities.
  for (const uint32_t nan : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu, 0x7fc00000u}) {
    samples.push_back({nan, static_cast<uint16_t>(nan >> 16 & 0x8000u), true});
  }
  this->expect_narrowed(samples);
}

// A format of 8 bits, and its finite magnitudes in ascending order: entry i has the bits i.
template <typename T>
struct EightBits;
template <>
struct EightBits<Float8E4M3> {
  static constexpr Format kType = {3, -6, 8};
  static constexpr int kFinite = 0x7f;
};
template <>
struct EightBits<Float8E5M2> {
  static constexpr Format kType = {2, -14, 15};
  static constexpr int kFinite = 0x7c;
};

template <typename T>
class EightBitFloat : public ::testing::Test {
 protected:
  // The bits of the number that is nearest to `value`.
  static uint8_t nearest(float value) {
    static const std::vector<double> magnitudes = [] {
      std::vector<double> all;
      const Format& type = EightBits<T>::kType;
      for (int bits = 0; bits < EightBits<T>::kFinite; ++bits) {
        const int exponent = bits >> type.fraction_bits;
        const int fraction = bits & ((1 << type.fraction_bits) - 1);
        const int implicit = exponent == 0 ? 0 : 1 << type.fraction_bits;
        const int scale = std::max(exponent, 1) - 1 + type.min_exponent - type.fraction_bits;
        all.push_back(std::ldexp(implicit + fraction, scale));
      }
      return all;
    }();
    const uint8_t sign = std::signbit(value) ? 0x80 : 0;
    if (std::isnan(value)) return sign | 0x7f;
    const double size = std::min<double>(std::abs(value), magnitudes.back());
    const auto high = std::lower_bound(magnitudes.begin(), magnitudes.end(), size);
    auto bits = static_cast<uint8_t>(high - magnitudes.begin());
    if (*high == size) return sign | bits;
    const double below = size - *(high - 1), above = *high - size;
    if (below < above || (below == above && bits % 2 == 1)) --bits;
    return sign | bits;
  }
};

using EightBitTypes = ::testing::Types<Float8E4M3, Float8E5M2>;
TYPED_TEST_SUITE(EightBitFloat, EightBitTypes);

TYPED_TEST(EightBitFloat, RoundsFloat32OfEveryExponent) {
  constexpr uint64_t kStep = 4099;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += kStep) {
    const float value = float_of(static_cast<uint32_t>(bits));
    ASSERT_EQ(narrow<TypeParam>(value).bits, this->nearest(value)) << std::hex << bits;
  }
}

TYPED_TEST(EightBitFloat, RoundsMidpointsToEven) {
  // All values of 16 bits include all numbers of 8 bits, their midpoints and neighbors.
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    for (const float value : {widen(Float16{static_cast<uint16_t>(bits)}),
                              widen(BFloat16{static_cast<uint16_t>(bits)})}) {
      ASSERT_EQ(narrow<TypeParam>(value).bits, this->nearest(value)) << value;
    }
  }
}

TYPED_TEST(EightBitFloat, SaturatesAndKeepsNaN) {
  using Limits = std::numeric_limits<float>;
  for (const float value : {Limits::infinity(), Limits::max(), 57344.0f, 61440.0f, 448.0f, 464.0f,
                            480.0f, Limits::quiet_NaN(), Limits::denorm_min(), 0.0f}) {
    EXPECT_EQ(narrow<TypeParam>(value).bits, this->nearest(value)) << value;
    EXPECT_EQ(narrow<TypeParam>(-value).bits, this->nearest(-value)) << -value;
  }
}

TEST(Int8, RoundsToNearestEvenAndSaturates) {
  for (int i = -150; i <= 150; ++i) {
    for (const float fraction : {0.0f, 0.25f, 0.5f, 0.75f}) {
      const float value = static_cast<float>(i) + fraction;
      const float expected = std::clamp(std::nearbyint(value), -128.0f, 127.0f);
      EXPECT_EQ(narrow<int8_t>(value), static_cast<int8_t>(expected)) << value;
    }
  }
  using Limits = std::numeric_limits<float>;
  EXPECT_EQ(narrow<int8_t>(Limits::infinity()), 127);
  EXPECT_EQ(narrow<int8_t>(-Limits::max()), -128);
  EXPECT_EQ(narrow<int8_t>(Limits::quiet_NaN()), 0);
  EXPECT_EQ(narrow<int8_t>(Limits::denorm_min()), 0);
}

TEST(Numeric, VisitPassesTheTypeOfEveryDType) {
  const auto name = [](DType dtype) {
    return visit(dtype, []<typename T>() { return std::pair(sizeof(T), sizeof(Wide<T>)); });
  };
  EXPECT_EQ(name(DType::kFloat16), std::pair(sizeof(Float16), sizeof(float)));
  EXPECT_EQ(name(DType::kBFloat16), std::pair(sizeof(BFloat16), sizeof(float)));
  EXPECT_EQ(name(DType::kFloat32), std::pair(sizeof(float), sizeof(float)));
  EXPECT_EQ(name(DType::kFloat64), std::pair(sizeof(double), sizeof(double)));
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
    EXPECT_EQ(static_cast<size_t>(size_of(dtype)), name(dtype).first);
  }
}

}  // namespace
}  // namespace fused_rope::kernels
