#include "fused_rope/kernels/cpu/isa.h"

#include <gtest/gtest.h>

#include <cstring>
#include <optional>

#include "fused_rope/kernels/cpu/kernel.h"
#include "reference.h"

namespace fused_rope::kernels {
namespace {

using testing::Random;
using testing::vector_isas;

constexpr uint64_t kSeed = 4217;

TEST(InstructionSets, BestIsSupportedByThisMachine) {
  EXPECT_TRUE(has(Isa::kBaseline));
  EXPECT_TRUE(has(best_isa()));
  EXPECT_EQ(vector_isas().empty(), best_isa() == Isa::kBaseline);
}

TEST(InstructionSets, RunOnPassesTheSetItRunsOn) {
  for (const Isa isa : {Isa::kBaseline, best_isa()}) {
    std::optional<Isa> ran;
    run_on(isa, [&](auto constant) { ran = constant(); });
    EXPECT_EQ(ran, isa);
  }
}

// One scalar conversion, which cannot be vectorized.
template <typename T>
[[gnu::noinline]] uint32_t widened(uint16_t pattern) {
  return bits_of(widen(T{pattern}));
}

template <typename T>
[[gnu::noinline]] uint16_t narrowed(uint32_t pattern) {
  return narrow<T>(float_of(pattern)).bits;
}

template <typename T>
class Conversions : public ::testing::Test {};

using HalfTypes = ::testing::Types<Float16, BFloat16>;
TYPED_TEST_SUITE(Conversions, HalfTypes);

TYPED_TEST(Conversions, WidenIdenticallyWithEveryInstructionSet) {
  std::vector<TypeParam> values(1 << 16);
  for (uint32_t i = 0; i < values.size(); ++i) values[i].bits = static_cast<uint16_t>(i);
  for (const Isa isa : vector_isas()) {
    std::vector<uint32_t> got(values.size());
    run_on(isa, [from = values.data(), to = got.data(), n = values.size()](auto) {
      for (size_t i = 0; i < n; ++i) to[i] = bits_of(widen(from[i]));
    });
    for (uint32_t i = 0; i < got.size(); ++i) {
      ASSERT_EQ(got[i], widened<TypeParam>(values[i].bits)) << "of pattern " << i;
    }
  }
}

// Every upper half with the lower halves that decide its rounding, and random patterns.
std::vector<uint32_t> float_patterns() {
  std::vector<uint32_t> patterns;
  for (uint32_t high = 0; high < 1 << 16; ++high) {
    for (const uint32_t low : {0x0000u, 0x0001u, 0x0fffu, 0x1000u, 0x1001u, 0x1fffu, 0x2000u,
                               0x3000u, 0x7fffu, 0x8000u, 0x8001u, 0xf000u, 0xffffu}) {
      patterns.push_back(high << 16 | low);
    }
  }
  Random random(kSeed);
  for (int i = 0; i < 1 << 20; ++i) patterns.push_back(static_cast<uint32_t>(random.bits()));
  return patterns;
}

TYPED_TEST(Conversions, NarrowIdenticallyWithEveryInstructionSet) {
  SCOPED_TRACE(kSeed);
  const std::vector<uint32_t> patterns = float_patterns();
  for (const Isa isa : vector_isas()) {
    std::vector<TypeParam> got(patterns.size());
    run_on(isa, [from = patterns.data(), to = got.data(), n = patterns.size()](auto) {
      for (size_t i = 0; i < n; ++i) to[i] = narrow<TypeParam>(float_of(from[i]));
    });
    for (size_t i = 0; i < got.size(); ++i) {
      ASSERT_EQ(got[i].bits, narrowed<TypeParam>(patterns[i])) << "of pattern " << patterns[i];
    }
  }
}

// F16C's conversions against scalar ones.
TEST(F16cConversions, WidenAsScalarsButQuietNans) {
  if (!has(Isa::kAvx2)) GTEST_SKIP() << "needs F16C";
  std::vector<Float16> values(1 << 16);
  for (uint32_t i = 0; i < values.size(); ++i) values[i].bits = static_cast<uint16_t>(i);
  std::vector<float> got(values.size());
  widen_array(values.data(), got.data(), static_cast<int64_t>(got.size()));
  for (uint32_t i = 0; i < got.size(); ++i) {
    const uint32_t expected = widened<Float16>(values[i].bits);
    const uint32_t quiet = std::isnan(float_of(expected)) ? 0x00400000u : 0;
    ASSERT_EQ(bits_of(got[i]), expected | quiet) << "of pattern " << i;
  }
}

TEST(F16cConversions, NarrowAsScalars) {
  if (!has(Isa::kAvx2)) GTEST_SKIP() << "needs F16C";
  SCOPED_TRACE(kSeed);
  const std::vector<uint32_t> patterns = float_patterns();
  std::vector<float> values(patterns.size());
  std::memcpy(values.data(), patterns.data(), patterns.size() * sizeof(float));
  std::vector<Float16> got(patterns.size());
  narrow_array(values.data(), got.data(), static_cast<int64_t>(got.size()));
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(got[i].bits, narrowed<Float16>(patterns[i])) << "of pattern " << patterns[i];
  }
}

template <typename T>
class RandomBits : public ::testing::Test {
 protected:
  static constexpr int64_t H = 3, D = 2 * 67, P = 67;  // no multiple of a vector

  // Rotates heads of random bits, which include NaN, infinities and subnormals, by a random table.
  static std::vector<T> rotated(bool interleaved, Precision precision, Isa isa) {
    Random random(kSeed);
    std::vector<T> in(H * D), out(H * D);
    for (T& value : in) {
      const uint64_t bits = random.bits();
      std::memcpy(&value, &bits, sizeof(T));
    }
    std::vector<Wide<T>> cos(P), sin(P);
    for (Wide<T>& c : cos) c = static_cast<Wide<T>>(random.normal());
    for (Wide<T>& s : sin) s = static_cast<Wide<T>>(random.normal());
    RotateParams p = {};
    p.B = p.S = p.count = 1;
    p.D = D;
    p.pairing = {P, 0, interleaved ? 1 : P};
    p.cos = {cos.data(), 0, 0, 0, 0, 1};
    p.sin = {sin.data(), 0, 0, 0, 0, 1};
    p.rows.M = 1;
    p.dtype = testing::kDType<T>;
    p.table_dtype = testing::kDType<Wide<T>>;
    p.precision = precision;
    p.tensors[0] = {in.data(), out.data(), {H * D, H * D, D, 1}, {H * D, H * D, D, 1}, H, false};
    rotate_tokens(p, 0, 1, isa);
    return out;
  }
};

using AllTypes = ::testing::Types<Float16, BFloat16, float, double>;
TYPED_TEST_SUITE(RandomBits, AllTypes);

// All but the payloads of NaNs, which are unspecified.
TYPED_TEST(RandomBits, RotateIdenticallyWithEveryInstructionSet) {
  SCOPED_TRACE(kSeed);
  for (const bool interleaved : {false, true}) {
    for (const Precision precision : {Precision::kFp32, Precision::kModel}) {
      const auto expected = TestFixture::rotated(interleaved, precision, Isa::kBaseline);
      for (const Isa isa : vector_isas()) {
        const auto got = TestFixture::rotated(interleaved, precision, isa);
        for (size_t i = 0; i < got.size(); ++i) {
          const bool nan = std::isnan(testing::to_double(expected[i]));
          if (nan && std::isnan(testing::to_double(got[i]))) continue;
          ASSERT_EQ(std::memcmp(&got[i], &expected[i], sizeof(TypeParam)), 0)
              << "element " << i << ", interleaved " << interleaved << ", instruction set "
              << static_cast<int>(isa);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fused_rope::kernels
