#include "fused_rope/kernels/fast_divmod.h"

#include <gtest/gtest.h>

#include <vector>

#include "reference.h"

namespace fused_rope::kernels {
namespace {

TEST(FastDivmod, IsExactBelowTwoToThe31) {
  constexpr uint32_t kEnd = uint32_t{1} << 31;
  std::vector<uint32_t> divisors = {1, 2, 3, 5, 6, 7, 9, 10, 12, 16, 24, 32, 96, 127, 128, 641};
  for (int bit = 8; bit < 31; ++bit) {
    for (const int near : {-1, 0, 1}) divisors.push_back((uint32_t{1} << bit) + near);
  }
  divisors.insert(divisors.end(), {65537, 70001, 6700417, 1000000007, kEnd - 2, kEnd - 1});
  constexpr uint64_t kSeed = 7;
  SCOPED_TRACE(kSeed);
  testing::Random random(kSeed);
  for (int i = 0; i < 200; ++i) {
    divisors.push_back(1 + static_cast<uint32_t>(random.below(kEnd - 1) >> random.below(31)));
  }
  for (const uint32_t divisor : divisors) {
    const FastDivmod by(divisor);
    std::vector<uint32_t> numbers = {0, 1, 2, divisor - 1, divisor, kEnd - 2, kEnd - 1};
    const uint32_t largest = (kEnd - 1) / divisor * divisor;
    numbers.insert(numbers.end(), {largest, largest - 1});
    for (int i = 0; i < 200; ++i) {
      const uint32_t n = static_cast<uint32_t>(random.below(kEnd));
      numbers.insert(numbers.end(), {n, n / divisor * divisor});
      if (n >= divisor) numbers.push_back(n / divisor * divisor - 1);
    }
    for (const uint32_t n : numbers) ASSERT_EQ(by.div(n), n / divisor) << n << " / " << divisor;
  }
}

TEST(FastDivmod, DividesByOneByDefault) { EXPECT_EQ(FastDivmod().div(12345), 12345u); }

TEST(Divide, IsExactOnBothSidesOf32Bits) {
  constexpr int64_t kFar = int64_t{1} << 31;
  for (const int64_t divisor : {int64_t{1}, int64_t{7}, kFar - 1, kFar, 3 * kFar + 1}) {
    for (const int64_t n : {int64_t{0}, int64_t{6}, kFar - 1, kFar, 2 * kFar, 5 * kFar, INT64_MAX})
      EXPECT_EQ(divide(n, divisor), n / divisor) << n << " / " << divisor;
  }
}

}  // namespace
}  // namespace fused_rope::kernels
