#include "ops/token_rows.h"

#include "testing.h"

namespace fused_rope {
namespace {

using testing::OnDevice;

constexpr int64_t kMin = std::numeric_limits<int64_t>::min();
constexpr int64_t kMax = std::numeric_limits<int64_t>::max();

class TokenRowsTest : public OnDevice {
 protected:
  void expect_rows(const RotateOptions& o, int64_t S, at::IntArrayRef sizes,
                   at::ArrayRef<int64_t> expected) const {
    expect_equal(token_rows(arguments_of(o), S, GetParam()), sizes, expected);
  }

  static void expect_equal(const at::Tensor& got, at::IntArrayRef sizes,
                           at::ArrayRef<int64_t> expected) {
    ASSERT_EQ(got.scalar_type(), at::kLong);
    EXPECT_EQ(got.sizes(), sizes);
    const at::Tensor flat = got.to(at::kCPU).contiguous();
    EXPECT_EQ(at::ArrayRef<int64_t>(flat.const_data_ptr<int64_t>(), flat.numel()), expected);
  }
};
FUSED_ROPE_ON_DEVICES(TokenRowsTest);

TEST_P(TokenRowsTest, CountsTokens) {
  expect_rows(RotateOptions(), 3, {1, 3}, {0, 1, 2});
  expect_rows(RotateOptions().offset(7), 3, {1, 3}, {7, 8, 9});
  expect_rows(RotateOptions(), 0, {1, 0}, {});
}

TEST_P(TokenRowsTest, AddsTheOffsetOfEachBatch) {
  expect_rows(RotateOptions().offsets(integers({7, 0}, at::kInt)), 3, {2, 3}, {7, 8, 9, 0, 1, 2});
}

TEST_P(TokenRowsTest, ReadsPositions) {
  const at::Tensor positions = integers({4, -1, 2, 0, 9, -1}, at::kInt);
  expect_rows(RotateOptions().positions(positions), 6, {1, 6}, {4, -1, 2, 0, 9, -1});
  expect_rows(RotateOptions().positions(positions.view({2, 3})).offset(3), 3, {2, 3},
              {7, -1, 5, 3, 12, -1});
  expect_rows(RotateOptions().positions(positions.slice(0, 0, 3)).offsets(integers({1, 5})), 3,
              {2, 3}, {5, -1, 3, 9, -1, 7});
}

TEST_P(TokenRowsTest, StartsAgainInEachSequence) {
  const at::Tensor starts = integers({0, 2, 2, 5}, at::kInt);
  expect_rows(RotateOptions().cu_seqlens(starts), 7, {1, 7}, {0, 1, 0, 1, 2, -1, -1});
  expect_rows(RotateOptions().offsets(integers({1, 50, 4})).cu_seqlens(starts), 7, {1, 7},
              {1, 2, 4, 5, 6, -1, -1});
  // Positions replace the count; cu_seqlens still selects the offset and marks padding.
  expect_rows(RotateOptions()
                  .positions(integers({3, -1, 0, 0, 3, 8, 8}))
                  .offsets(integers({1, 50, 4}))
                  .cu_seqlens(starts),
              7, {1, 7}, {4, -1, 4, 4, 7, -1, -1});
}

TEST_P(TokenRowsTest, AllTokensArePaddingWithoutSequences) {
  for (const int64_t start : {0, 2}) {
    expect_rows(RotateOptions().cu_seqlens(integers({start})), 3, {1, 3}, {-1, -1, -1});
    expect_rows(RotateOptions().offsets(integers({})).cu_seqlens(integers({start})), 3, {1, 3},
                {-1, -1, -1});
  }
}

TEST_P(TokenRowsTest, TokensBeforeTheFirstSequenceHaveNoRow) {
  expect_rows(RotateOptions().cu_seqlens(integers({1, 3})), 4, {1, 4}, {-2, 0, 1, -1});
}

TEST_P(TokenRowsTest, NegativeSumsAreNotMinusOne) {
  expect_rows(RotateOptions().positions(integers({-1, -2, 0, 1, 2})).offset(-2), 5, {1, 5},
              {-1, -4, -2, -2, 0});
  expect_rows(RotateOptions().positions(integers({-2, 3})).offsets(integers({1, -4})), 2, {2, 2},
              {-2, 4, -6, -2});
}

TEST_P(TokenRowsTest, SumsDoNotOverflow) {
  const at::Tensor extremes = integers({kMin, kMax});
  const auto is_row = [&](const RotateOptions& o) {
    const at::Tensor rows = token_rows(arguments_of(o), 2, GetParam());
    return (rows >= -1).logical_and(rows < int64_t{1} << 61).any().item<bool>();
  };
  for (const int64_t offset : {kMin, kMax}) {
    const at::Tensor positions = offset < 0 ? extremes.slice(0, 0, 1) : extremes.slice(0, 1, 2);
    EXPECT_FALSE(is_row(RotateOptions().positions(positions.expand({2})).offset(offset)));
    EXPECT_FALSE(
        is_row(RotateOptions().positions(positions.expand({2})).offsets(integers({offset}))));
  }
}

TEST_P(TokenRowsTest, EachAxisHasRows) {
  const auto o = RotateOptions()
                     .positions(integers({4, -1, 2, 0, 9, -1}).view({2, 3}))
                     .offsets(integers({1, 5}))
                     .axes(std::vector<int64_t>{1, 0, 1});
  const Arguments a = arguments_of(o);
  expect_equal(token_rows(a, 3, GetParam()), {2, 2, 3}, {5, -1, 3, 9, -1, 7, 1, 10, -1, 5, 14, -1});
  expect_equal(token_rows_by_pair(a, 3, GetParam()), {2, 3, 3},
               {1, 5, 1, 10, -1, 10, -1, 3, -1, 5, 9, 5, 14, -1, 14, -1, 7, -1});
}

TEST_P(TokenRowsTest, AxesOfNoPairs) {
  const auto o =
      RotateOptions().positions(integers({4, -1, 2, 0}).view({2, 2})).axes(std::vector<int64_t>());
  EXPECT_EQ(token_rows_by_pair(arguments_of(o), 2, GetParam()).sizes(), at::IntArrayRef({1, 2, 0}));
  const RotateOptions none;
  EXPECT_EQ(token_rows_by_pair(arguments_of(none), 2, GetParam()).sizes(),
            at::IntArrayRef({1, 2, 1}));
}

}  // namespace
}  // namespace fused_rope
