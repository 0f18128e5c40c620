#include "fused_rope/kernels/rows.h"

#include <gtest/gtest.h>

#include <limits>
#include <optional>
#include <vector>

namespace fused_rope::kernels {
namespace {

constexpr int64_t kLeast = std::numeric_limits<int64_t>::min();
constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

constexpr std::nullopt_t kCopied = std::nullopt;

// The row that a token reads, or none.
std::optional<int64_t> read_row(const RowParams& rows, int64_t b, int64_t s, int64_t axis = 0) {
  const Row row = table_row(rows, b, s, axis);
  return row.copied ? std::nullopt : std::optional(row.index);
}

// Indices of both integer types.
template <typename Int>
class IndexTypes : public ::testing::Test {
 protected:
  static IndexParams index(const std::vector<Int>& values) {
    return {values.data(), sizeof(Int) == 8};
  }

  // A packed batch whose sequences start at `starts`.
  static RowParams packed(const std::vector<Int>& starts) {
    RowParams rows = {};
    rows.cu_seqlens = index(starts);
    rows.cu_seqlens_stride = 1;
    rows.N = static_cast<int64_t>(starts.size()) - 1;
    return rows;
  }
};

using Ints = ::testing::Types<int32_t, int64_t>;
TYPED_TEST_SUITE(IndexTypes, Ints);

TEST(TableRow, IsTheTokensIndexWithoutPositions) {
  RowParams rows = {};
  EXPECT_EQ(read_row(rows, 3, 7), 7);
  rows.offset = 100;
  EXPECT_EQ(read_row(rows, 3, 7), 107);
  rows.offset = -8;
  EXPECT_EQ(read_row(rows, 3, 7), -1) << "a sum of -1 is out of range, not a copy";
}

TEST(TableRow, NeedsNoLookupInGatheredTables) {
  RowParams rows = {};
  rows.gathered = true;
  EXPECT_EQ(read_row(rows, 3, 7), 0);
}

TEST(TableRow, IsValidWithinTheTable) {
  EXPECT_FALSE(is_row(-1, 4));
  EXPECT_TRUE(is_row(0, 4));
  EXPECT_TRUE(is_row(3, 4));
  EXPECT_FALSE(is_row(4, 4));
  EXPECT_FALSE(is_row(0, 0));
  EXPECT_FALSE(is_row(kLeast, kMost));
}

TYPED_TEST(IndexTypes, ReadsPositionsThroughTheirStrides) {
  const std::vector<TypeParam> values = {10, -9, 11, -9, 12, -9, 20, -9, 21, -9, -1, -9};
  RowParams rows = {};
  rows.positions = this->index(values);
  rows.positions_b = 6;
  rows.positions_s = 2;
  EXPECT_EQ(read_row(rows, 0, 0), 10);
  EXPECT_EQ(read_row(rows, 0, 2), 12);
  EXPECT_EQ(read_row(rows, 1, 1), 21);
  EXPECT_EQ(read_row(rows, 1, 2), kCopied);
  rows.positions_b = 0;  // [S] and [1, S]: one row of positions for all batches
  EXPECT_EQ(read_row(rows, 5, 1), 11);
}

TYPED_TEST(IndexTypes, AddsOffsetsToPositions) {
  const std::vector<TypeParam> positions = {3, -1, -2};
  const std::vector<TypeParam> offsets = {100, -77, 200};
  RowParams rows = {};
  rows.positions = this->index(positions);
  rows.positions_s = 1;
  rows.offset = 5;
  EXPECT_EQ(read_row(rows, 1, 0), 8);
  EXPECT_EQ(read_row(rows, 1, 1), kCopied) << "-1 copies whatever the offset";
  EXPECT_EQ(read_row(rows, 1, 2), 3) << "only the sum must be a row";
  rows.offset = 0;
  rows.offsets = this->index(offsets);
  rows.offsets_stride = 2;
  EXPECT_EQ(read_row(rows, 0, 0), 103);
  EXPECT_EQ(read_row(rows, 1, 0), 203);
  EXPECT_EQ(read_row(rows, 1, 1), kCopied);
}

TYPED_TEST(IndexTypes, AddsOffsetsToTokenIndices) {
  const std::vector<TypeParam> offsets = {100, 0, -3};
  RowParams rows = {};
  rows.offsets = this->index(offsets);
  rows.offsets_stride = 1;
  EXPECT_EQ(read_row(rows, 0, 4), 104);
  EXPECT_EQ(read_row(rows, 1, 4), 4);
  EXPECT_EQ(read_row(rows, 2, 4), 1);
  EXPECT_EQ(read_row(rows, 2, 0), -3);
}

TYPED_TEST(IndexTypes, CountsFromTheStartOfEachSequence) {
  const std::vector<TypeParam> starts = {0, 0, 0, 3, 3, 4, 9, 9, 9};  // empty ones at both ends
  const RowParams rows = this->packed(starts);
  for (int64_t t = 0; t < 3; ++t) EXPECT_EQ(read_row(rows, 0, t), t) << t;
  EXPECT_EQ(read_row(rows, 0, 3), 0);
  for (int64_t t = 4; t < 9; ++t) EXPECT_EQ(read_row(rows, 0, t), t - 4) << t;
  for (int64_t t = 9; t < 12; ++t) EXPECT_EQ(read_row(rows, 0, t), kCopied) << "padding " << t;
}

TYPED_TEST(IndexTypes, FindsTheSequenceOfEveryToken) {
  for (const std::vector<TypeParam>& starts : {std::vector<TypeParam>{0, 1},
                                               {0, 5},
                                               {0, 2, 5},
                                               {0, 0, 1, 1, 1, 2, 7},
                                               {0, 3, 3},
                                               {0, 1, 2, 3, 4, 5, 6, 7}}) {
    const RowParams rows = this->packed(starts);
    int64_t token = 0;
    for (int64_t n = 0; n < rows.N; ++n) {
      for (; token < starts[n + 1]; ++token) {
        const SequencePosition found = locate_token(rows, token);
        EXPECT_EQ(found.sequence, n) << "token " << token << " of N=" << rows.N;
        EXPECT_EQ(found.position, token - starts[n]) << "token " << token << " of N=" << rows.N;
      }
    }
  }
}

TYPED_TEST(IndexTypes, ReadsCuSeqlensThroughItsStride) {
  const std::vector<TypeParam> starts = {0, -9, 2, -9, 5, -9};
  RowParams rows = this->packed(starts);
  rows.cu_seqlens_stride = 2;
  rows.N = 2;
  EXPECT_EQ(read_row(rows, 0, 1), 1);
  EXPECT_EQ(read_row(rows, 0, 4), 2);
  EXPECT_EQ(read_row(rows, 0, 5), kCopied);
}

TYPED_TEST(IndexTypes, ReadsOneOffsetPerSequence) {
  const std::vector<TypeParam> starts = {0, 2, 2, 4};
  const std::vector<TypeParam> offsets = {10, 20, 30};
  RowParams rows = this->packed(starts);
  rows.offsets = this->index(offsets);
  rows.offsets_stride = 1;
  EXPECT_EQ(read_row(rows, 0, 0), 10);
  EXPECT_EQ(read_row(rows, 0, 1), 11);
  EXPECT_EQ(read_row(rows, 0, 2), 30);
  EXPECT_EQ(read_row(rows, 0, 3), 31);
  EXPECT_EQ(read_row(rows, 0, 4), kCopied);
}

TYPED_TEST(IndexTypes, WithPositionsSequencesOnlySelectOffsetsAndPadding) {
  const std::vector<TypeParam> starts = {0, 2, 3};
  const std::vector<TypeParam> offsets = {10, 20};
  const std::vector<TypeParam> positions = {5, -1, 7, 8};
  RowParams rows = this->packed(starts);
  rows.offsets = this->index(offsets);
  rows.offsets_stride = 1;
  rows.positions = this->index(positions);
  rows.positions_s = 1;
  EXPECT_EQ(read_row(rows, 0, 0), 15);
  EXPECT_EQ(read_row(rows, 0, 1), kCopied);
  EXPECT_EQ(read_row(rows, 0, 2), 27);
  EXPECT_EQ(read_row(rows, 0, 3), kCopied);
}

TYPED_TEST(IndexTypes, TreatsAllTokensAsPaddingWithoutSequences) {
  for (const std::vector<TypeParam>& starts : {std::vector<TypeParam>{0}, {0, 0, 0}}) {
    const RowParams rows = this->packed(starts);
    EXPECT_EQ(read_row(rows, 0, 0), kCopied) << "N=" << rows.N;
    EXPECT_EQ(read_row(rows, 0, 100), kCopied) << "N=" << rows.N;
  }
}

TYPED_TEST(IndexTypes, ReadsThePositionsOfEachAxis) {
  // [A=2, B=2, S=2]
  const std::vector<TypeParam> positions = {0, 1, 2, 3, 4, -1, 6, 7};
  RowParams rows = {};
  rows.positions = this->index(positions);
  rows.positions_a = 4;
  rows.positions_b = 2;
  rows.positions_s = 1;
  EXPECT_EQ(read_row(rows, 0, 1, 0), 1);
  EXPECT_EQ(read_row(rows, 0, 1, 1), kCopied);
  EXPECT_EQ(read_row(rows, 1, 0, 1), 6);
  EXPECT_EQ(read_row(rows, 1, 1, 1), 7);
}

TYPED_TEST(IndexTypes, ReadsOutputRowsThroughTheirStrides) {
  const std::vector<TypeParam> values = {5, 6, -1, 8};
  RowParams rows = {};
  rows.out_rows = this->index(values);
  rows.out_rows_b = 1;
  rows.out_rows_s = 2;
  EXPECT_EQ(output_row(rows, 0, 0), 5);
  EXPECT_EQ(output_row(rows, 1, 0), 6);
  EXPECT_EQ(output_row(rows, 0, 1), -1);
  EXPECT_EQ(output_row(rows, 1, 1), 8);
}

TEST(TableRow, DoesNotTruncateInt64) {
  const std::vector<int64_t> positions = {(int64_t{1} << 32) + 1, kMost, kLeast, 0x100000000};
  RowParams rows = {};
  rows.positions = {positions.data(), true};
  rows.positions_s = 1;
  for (size_t s = 0; s < positions.size(); ++s) {
    EXPECT_EQ(read_row(rows, 0, static_cast<int64_t>(s)), positions[s]);
  }
}

// A position and an offset whose exact sum is out of range must not wrap around to a row.
TEST(TableRow, StaysOutOfRangeWhenTheSumOverflows) {
  constexpr int64_t kRows = int64_t{1} << 31;
  std::vector<int64_t> absurd = {0, 5, -2, -5, kRows, -kRows};
  for (const int64_t near : {0, 1, 2, 1000}) {
    absurd.push_back(kMost - near);
    absurd.push_back(kLeast + near);
  }
  for (const int64_t position : absurd) {
    for (const int64_t offset : absurd) {
      __extension__ using Exact = __int128;
      const Exact sum = Exact{position} + offset;
      RowParams by_int = {}, by_tensor = {};
      by_int.positions = by_tensor.positions = {&position, true};
      by_int.offset = offset;
      by_tensor.offsets = {&offset, true};
      for (const RowParams& rows : {by_int, by_tensor}) {
        ASSERT_EQ(is_row(table_row(rows, 0, 0).index, kRows), sum >= 0 && sum < kRows)
            << "position " << position << ", offset " << offset;
      }
    }
  }
}

TEST(TableOffset, CountsEntriesBeyondInt32) {
  const TableParams shared = {nullptr, 64, 0, 0, 0, 1};
  EXPECT_EQ(table_offset(shared, int64_t{1} << 31, 7, 8, 9), int64_t{1} << 37);
  const TableParams per_head = {nullptr, 0, 1000, 100, 10, 1};
  EXPECT_EQ(table_offset(per_head, 0, 1, 2, 3), 1230);
}

}  // namespace
}  // namespace fused_rope::kernels
