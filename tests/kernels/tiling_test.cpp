#include "fused_rope/kernels/tiling.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "calls.h"
#include "reference.h"

namespace fused_rope::kernels {
namespace {

using testing::call;
using testing::gather;
using testing::memory;

__extension__ using Exact = __int128;

constexpr int64_t kMaxHeads = 1 << 27;
constexpr int64_t kHuge = int64_t{1} << 33;
constexpr Strides kShort = {64, 64, 64, 1};

// The tiles of a call's first tensor, whose table rows are looked up where it has positions.
std::vector<Tile> tiles_of(const RotateParams& p, int64_t max_heads = kMaxHeads) {
  const TensorParams& t = p.tensors[0];
  std::vector<Tile> tiles;
  for_each_tile(operand_strides(p, t, !has_lookups(p.rows)), whole_tile(p, t), max_heads,
                [&](const Tile& tile) { tiles.push_back(tile); });
  return tiles;
}

// The tiles of a contiguous tensor with one table row.
std::vector<Tile> tiles_of(const std::array<int64_t, 3>& size, int64_t max_heads) {
  RotateParams p = call(size[kBatch], size[kSequence], size[kHead], 64, 64);
  p.cos.m = p.sin.m = 0;
  return tiles_of(p, max_heads);
}

Exact volume(const std::array<int64_t, 3>& size) { return Exact{size[0]} * size[1] * size[2]; }

bool overlap(const Tile& x, const Tile& y) {
  for (size_t i = 0; i < 3; ++i) {
    if (x.first[i] + x.size[i] <= y.first[i] || y.first[i] + y.size[i] <= x.first[i]) return false;
  }
  return true;
}

struct SizeCase {
  std::array<int64_t, 3> size;
  int64_t max_heads;
};

void PrintTo(const SizeCase& c, std::ostream* out) {
  *out << c.size[0] << " x " << c.size[1] << " x " << c.size[2] << " by " << c.max_heads;
}

class TilingOfSizes : public ::testing::TestWithParam<SizeCase> {};

// Disjoint tiles inside the whole, as large as it together, hold every head once.
TEST_P(TilingOfSizes, CoversEveryHeadOnce) {
  const auto& [size, max_heads] = GetParam();
  const std::vector<Tile> tiles = tiles_of(size, max_heads);
  ASSERT_LE(tiles.size(), 4096u);
  Exact total = 0;
  for (size_t i = 0; i < tiles.size(); ++i) {
    const Tile& tile = tiles[i];
    for (size_t axis = 0; axis < 3; ++axis) {
      EXPECT_GT(tile.size[axis], 0);
      EXPECT_GE(tile.first[axis], 0);
      EXPECT_LE(tile.first[axis] + tile.size[axis], size[axis]);
    }
    EXPECT_LE(volume(tile.size), Exact{max_heads});
    total += volume(tile.size);
    for (size_t j = 0; j < i; ++j) ASSERT_FALSE(overlap(tile, tiles[j])) << i << " and " << j;
  }
  EXPECT_TRUE(total == volume(size));
}

TEST_P(TilingOfSizes, MakesFewTiles) {
  const auto& [size, max_heads] = GetParam();
  const Exact least = (volume(size) + max_heads - 1) / max_heads;
  EXPECT_TRUE(Exact{tiles_of(size, max_heads).size()} <= 4 * least);
}

constexpr int64_t kMaxThreads = 1 << 30;
const SizeCase kSizeCases[] = {
    {{1, 1, 1}, kMaxThreads},
    {{2, 3, 4}, kMaxThreads / 16},
    {{70001, 3, 1}, kMaxThreads / 8},
    {{1, 70001, 70001}, kMaxThreads},
    {{70001, 1, 70001}, kMaxThreads / 16},
    {{70001, 70001, 8}, kMaxThreads / 16},
    {{kHuge, 1, 1}, kMaxThreads},
    {{1, kHuge, 1}, kMaxThreads / 16},
    {{1, 1, kHuge + 1}, kMaxThreads / 3},
    {{3, kHuge / 3 + 1, 5}, kMaxThreads / 2},
    {{1 << 20, 1 << 20, 1}, kMaxThreads},
    {{kMaxThreads, 1, 1}, kMaxThreads},
    {{kMaxThreads + 1, 1, 1}, kMaxThreads},
    {{1, 1, 1}, 1},
    {{5, 7, 3}, 4},
    {{5, 7, 3}, 1},
};

INSTANTIATE_TEST_SUITE_P(Sizes, TilingOfSizes, ::testing::ValuesIn(kSizeCases));

TEST(Tiling, SplitsAlongTheSlowestAxis) {
  RotateParams p = call(8, 4, 4, 64, 64);
  for (const Tile& tile : tiles_of(p, 32)) {
    EXPECT_EQ(tile.size, (std::array<int64_t, 3>{2, 4, 4}));
  }
  std::swap(p.tensors[0].in_strides.b, p.tensors[0].in_strides.h);
  for (const Tile& tile : tiles_of(p, 32)) {
    EXPECT_EQ(tile.size, (std::array<int64_t, 3>{8, 4, 1}));
  }
}

struct StrideCase {
  const char* name;
  void (*change)(RotateParams&, const Strides&);
  int64_t size;  // bytes of an element
};

void PrintTo(const StrideCase& c, std::ostream* out) { *out << c.name; }

class TilingOfStrides : public ::testing::TestWithParam<StrideCase> {};

TEST_P(TilingOfStrides, SplitsOnlyAxesWhoseCoefficientsExceed32Bits) {
  const int64_t large = (int64_t{1} << 32) / GetParam().size;
  const int64_t fits = INT32_MAX / 7 / GetParam().size;  // also times the extent of the heads
  for (const auto& [strides, count] : {std::pair{Strides{large, 64, 64, 1}, 5},
                                       {Strides{64, large, 64, 1}, 6},
                                       {Strides{64, 64, large, 1}, 7},
                                       {Strides{large, 64, large, 1}, 35},
                                       {Strides{fits, 64, 64, 1}, 1},
                                       {Strides{64, 64, 64, large}, 1}}) {
    RotateParams p = call(5, 6, 7, 64, 64);
    p.tensors[0].in_strides = p.tensors[0].out_strides = kShort;
    GetParam().change(p, strides);
    const std::vector<Tile> tiles = tiles_of(p);
    EXPECT_EQ(static_cast<int>(tiles.size()), count);
    Exact total = 0;
    for (const Tile& tile : tiles) {
      total += volume(tile.size);
      EXPECT_TRUE(tile.size[kBatch] == 1 || strides.b < large);
      EXPECT_TRUE(tile.size[kSequence] == 1 || strides.s < large);
      EXPECT_TRUE(tile.size[kHead] == 1 || strides.h < large);
    }
    EXPECT_TRUE(total == 5 * 6 * 7);
  }
}

const StrideCase kStrideCases[] = {
    {"Input", [](RotateParams& p, const Strides& s) { p.tensors[0].in_strides = s; }, 2},
    {"Output", [](RotateParams& p, const Strides& s) { p.tensors[0].out_strides = s; }, 2},
    {"GatheredCos", [](RotateParams& p, const Strides& s) { gather(p, s, kShort); }, 4},
    {"GatheredSin", [](RotateParams& p, const Strides& s) { gather(p, kShort, s); }, 4},
    {"Positions",
     [](RotateParams& p, const Strides& s) {
       p.rows.positions = {memory, true};
       p.rows.positions_b = s.b;
       p.rows.positions_s = s.s;
       p.tensors[0].in_strides.h = 4 * s.h;  // as many bytes; positions have no heads
     },
     8},
};

INSTANTIATE_TEST_SUITE_P(Of, TilingOfStrides, ::testing::ValuesIn(kStrideCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Tiling, SplitsAtTheFirstCoefficientBeyondInt32) {
  const auto count = [](const Strides& in, const Strides& out) {
    RotateParams p = call(2, 2, 1, 64, 64);
    p.tensors[0].in_strides = in;
    p.tensors[0].out_strides = out;
    return tiles_of(p).size();
  };
  const Strides near = {64, 32, 0, 1};
  // The last multiple of 4 that fits, and the first that does not.
  for (const int64_t bytes : {int64_t{INT32_MAX} - 3, int64_t{INT32_MAX} + 1}) {
    const size_t expected = bytes > INT32_MAX ? 2 : 1;
    EXPECT_EQ(count({bytes / 2, 0, 0, 1}, near), expected) << bytes;
    for (const int sign : {1, -1})  // the outer coefficient subtracts twice the inner stride
      EXPECT_EQ(count(near, {0, sign * bytes / 4, 0, 1}), expected) << sign * bytes;
  }
  EXPECT_EQ(count({-(int64_t{1} << 33), 32, 0, 1}, near), 2u);
}

// Each stride is one head further, so no coefficient exceeds a head, whatever the size.
TEST(Tiling, KeepsHugeContiguousTensorsWhole) {
  RotateParams p = call(8, 1 << 10, 32, 64, 64);
  const int64_t h = int64_t{1} << 28;
  p.tensors[0].in_strides = p.tensors[0].out_strides = {h << 15, h << 5, h, 1};
  EXPECT_EQ(tiles_of(p).size(), 1u);
  EXPECT_EQ(tiles_of(p, 1 << 16).size(), 4u) << "halves of the slowest axis are contiguous, too";
}

// With the output in another memory order, the inner extent of heads exceeds 32 bits.
TEST(Tiling, SplitsTheInnerAxisWhenItsExtentIsTooLong) {
  RotateParams p = call(1, 6, 8, 64, 64);
  const int64_t h = int64_t{1} << 28;
  p.tensors[0].in_strides = {0, 8 * 64, 64, 1};
  p.tensors[0].out_strides = {0, 64, h, 1};
  const std::vector<Tile> tiles = tiles_of(p);
  ASSERT_EQ(tiles.size(), 2u);
  for (const Tile& tile : tiles) EXPECT_EQ(tile.size[kHead], 4);
}

TEST(Tiling, SplitsTheSequenceOfHugeTableRowsUnlessTheyAreLookedUp) {
  RotateParams p = call(5, 6, 7, 64, 64);
  p.cos.m = p.sin.m = int64_t{1} << 30;
  EXPECT_EQ(tiles_of(p).size(), 6u);
  p.rows.positions = {memory, true};
  EXPECT_EQ(tiles_of(p).size(), 1u);
}

TEST(Tiling, TakesSizesWhoseProductExceeds64Bits) {
  struct Enough {};
  int count = 0;
  const OperandStrides nowhere = {};
  const Tile whole = {{kHead, kSequence, kBatch}, {0, 0, 0}, {kHuge, kHuge, kHuge}};
  const auto look = [&](const Tile& tile) {
    EXPECT_LE(volume(tile.size), Exact{kMaxHeads});
    if (++count == 1000) throw Enough();
  };
  EXPECT_THROW(for_each_tile(nowhere, whole, kMaxHeads, look), Enough);
}

TEST(LinearOffset, IsTheDotProductOfCoordinatesAndStrides) {
  constexpr uint64_t kSeed = 7;
  SCOPED_TRACE(kSeed);
  testing::Random random(kSeed);
  const auto chance = [&] { return random.below(4) == 0; };
  const auto stride = [&] {
    return chance() ? 0 : random.below(int64_t{1} << random.below(33)) + 1;
  };
  const auto strides = [&] { return Strides{stride(), stride(), stride(), 1}; };
  for (int round = 0; round < 2000; ++round) {
    const std::array<int64_t, 3> size = {1 + random.below(4), 1 + random.below(4),
                                         1 + random.below(4)};
    RotateParams p = call(size[kBatch], size[kSequence], size[kHead], 64, 64);
    TensorParams& t = p.tensors[0];
    t.in_strides = strides();
    t.out_strides = strides();
    t.scattered = chance();
    if (chance()) {
      p.rows.positions = {memory, true};
      p.rows.positions_b = stride();
      p.rows.positions_s = stride();
    } else {
      gather(p, strides(), strides());
    }
    const OperandStrides operands = operand_strides(p, t, !has_lookups(p.rows));
    Exact covered = 0;
    for (const Tile& tile : tiles_of(p, 1 + random.below(63))) {
      covered += volume(tile.size);
      const auto n0 = static_cast<uint32_t>(tile.extent(0));
      const auto n1 = static_cast<uint32_t>(tile.extent(1));
      for (uint32_t head = 0; head < tile.heads(); ++head) {
        const LinearCoordinates at = {{head, head / n0, head / n0 / n1}};
        const uint32_t coordinates[] = {head % n0, head / n0 % n1, head / n0 / n1};
        for (const ByteStrides& bytes : operands) {
          int64_t expected = 0;
          for (size_t i = 0; i < 3; ++i) expected += coordinates[i] * bytes[tile.order[i]];
          ASSERT_EQ(LinearOffset(bytes, tile).at(at), expected) << "round " << round;
        }
      }
    }
    ASSERT_TRUE(covered == volume(size)) << "round " << round;
  }
}

}  // namespace
}  // namespace fused_rope::kernels
