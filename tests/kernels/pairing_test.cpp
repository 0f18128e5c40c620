#include "fused_rope/kernels/pairing.h"

#include <gtest/gtest.h>

#include "reference.h"

namespace fused_rope::kernels {
namespace {

struct Span {
  int64_t P;
  int64_t offset;
  bool interleaved;
  int64_t blocks;
};

void PrintTo(const Span& span, std::ostream* out) {
  *out << "P=" << span.P << " offset=" << span.offset << " interleaved=" << span.interleaved
       << " blocks=" << span.blocks;
}

class PairingOf : public ::testing::TestWithParam<Span> {
 protected:
  Pairing pairing() const {
    const Span& span = GetParam();
    return {span.P, span.offset, span.interleaved ? 1 : span.P / span.blocks};
  }
};

TEST_P(PairingOf, FindsTheElementsOfEveryPair) {
  const Span& span = GetParam();
  const auto pairs = testing::pair_elements(2 * span.P, span.offset, span.interleaved, span.blocks);
  ASSERT_EQ(static_cast<int64_t>(pairs.size()), span.P);
  for (int64_t j = 0; j < span.P; ++j) {
    EXPECT_EQ(pairing().first(j), pairs[j].first) << "pair " << j;
    EXPECT_EQ(pairing().first(j) + pairing().distance, pairs[j].second) << "pair " << j;
  }
}

TEST_P(PairingOf, CoversEveryRotatedElementOnce) {
  const Span& span = GetParam();
  std::vector<int> seen(span.offset + 2 * span.P + 8);
  for (int64_t j = 0; j < span.P; ++j) {
    ++seen.at(pairing().first(j));
    ++seen.at(pairing().first(j) + pairing().distance);
  }
  for (int64_t d = 0; d < static_cast<int64_t>(seen.size()); ++d) {
    EXPECT_EQ(seen[d], d >= span.offset && d < pairing().end()) << "element " << d;
  }
}

std::vector<Span> spans() {
  std::vector<Span> all;
  for (const int64_t P : {0, 1, 2, 3, 4, 7, 8, 12, 20, 32, 40, 64, 128}) {
    for (const int64_t offset : {0, 1, 5, 64}) {
      all.push_back({P, offset, true, 1});
      for (const int64_t blocks : {1, 2, 3, 4, 20}) {
        if (P % blocks == 0) all.push_back({P, offset, false, blocks});
      }
    }
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Spans, PairingOf, ::testing::ValuesIn(spans()));

}  // namespace
}  // namespace fused_rope::kernels
