#include "fused_rope/kernels/plan.h"

#include <gtest/gtest.h>

#include <array>
#include <string>
#include <vector>

#include "calls.h"
#include "plan_overrides.h"
#include "reference.h"

namespace fused_rope::kernels {
namespace {

using testing::bhsd;
using testing::bshd;
using testing::call;
using testing::gather;
using testing::memory;

constexpr DeviceFacts kSmallCache = {0, 132};  // nothing fits in it
constexpr DeviceFacts kLargeCache = {INT64_MAX / 2, 132};

struct VectorCase {
  const char* name;
  void (*change)(RotateParams&);
  int vector;   // of bfloat16
  bool staged;  // in shared memory
};

void PrintTo(const VectorCase& c, std::ostream* out) { *out << c.name; }

class VectorWidth : public ::testing::TestWithParam<VectorCase> {};

TEST_P(VectorWidth, FollowsAlignmentAndStrides) {
  RotateParams p = call(2, 3, 4, 64, 32);
  GetParam().change(p);
  const Plan plan = make_plan(p, kLargeCache);
  EXPECT_EQ(plan.vector, GetParam().vector);
  EXPECT_EQ(plan.staged, GetParam().staged);
}

TEST(VectorWidth, IsLimitedByAnOverride) {
  const RotateParams p = call(2, 3, 4, 64, 32);
  for (const auto& [bytes, vector] : {std::pair{0, 2}, {8, 2}, {15, 2}, {16, 8}, {99, 8}})
    EXPECT_EQ(make_plan(p, kLargeCache, {.vector = bytes}).vector, vector) << bytes;
}

TEST(StagedPlan, LooksUpRowsWhereChunksDoNotStartOrEndAtVectors) {
  const auto lookup = [](int64_t H, int64_t D, auto change) {
    RotateParams p = call(2, 3, H, D, D);
    change(p);
    const Plan plan = make_plan(p, kLargeCache);
    EXPECT_TRUE(plan.staged);
    return plan.lookup;
  };
  const auto unchanged = [](RotateParams&) {};
  EXPECT_EQ(lookup(4, 72, unchanged), RowLookup::kLinear);
  EXPECT_EQ(lookup(4, 100, unchanged), RowLookup::kLinear) << "four heads are a chunk";
  EXPECT_EQ(lookup(3, 100, unchanged), RowLookup::kAxes);
  EXPECT_EQ(lookup(4, 72, [](RotateParams& p) { p.tensors[0].in = memory + 2; }), RowLookup::kAxes);
  EXPECT_EQ(lookup(4, 72, [](RotateParams& p) { p.rows.positions = {memory, true}; }),
            RowLookup::kAxes);
  EXPECT_EQ(lookup(4, 72, [](RotateParams& p) { p.sin.m += 4; }), RowLookup::kAxes);
}

TEST(StagedPlan, RotatesTwoPairsAtATimeAndSingleElementsWhereTheyAreNotAligned) {
  const auto plan = [](int64_t D, int64_t distance, const std::byte* in) {
    RotateParams p = call(2, 3, 4, D, D);
    p.pairing.distance = distance;
    p.tensors[0].in = in;
    return make_plan(p, kLargeCache);
  };
  EXPECT_EQ(plan(72, 36, memory).vector, 2);
  EXPECT_FALSE(plan(72, 36, memory).single_elements);
  EXPECT_TRUE(plan(72, 36, memory + 2).single_elements);
  EXPECT_FALSE(plan(72, 36, memory + 4).single_elements);
  EXPECT_EQ(plan(90, 45, memory).vector, 1) << "an odd number of pairs";
  EXPECT_FALSE(plan(90, 45, memory + 2).single_elements);
  EXPECT_EQ(plan(72, 1, memory + 8).vector, 4) << "two whole pairs";
  EXPECT_FALSE(plan(72, 1, memory + 8).single_elements);
  EXPECT_TRUE(plan(72, 1, memory + 4).single_elements);
  EXPECT_EQ(plan(90, 1, memory + 4).vector, 2);
}

TEST(StagedPlan, FillsBlocksWithChunksOfContiguousHeads) {
  const auto plan = [](int64_t S, int64_t H, int64_t D, auto change) {
    RotateParams p = call(2, S, H, D, D);
    change(p);
    return make_plan(p, kLargeCache);
  };
  const auto unchanged = [](RotateParams&) {};
  EXPECT_EQ(plan(3, 4, 72, unchanged).chunk_heads, 4);
  EXPECT_EQ(plan(3, 6, 72, unchanged).chunk_heads, 2);
  EXPECT_EQ(plan(3, 16, 72, unchanged).block_units, 7) << "of 576 bytes, in 256 vectors";
  EXPECT_EQ(plan(3, 16, 72, unchanged).block_vectors, 254);
  EXPECT_EQ(plan(3, 4, 4, unchanged).block_units, kMaxChunks);
  EXPECT_EQ(plan(3, 16, 900, unchanged).block_units, 1) << "more than 256 vectors";
  EXPECT_EQ(plan(3, 16, 72, [](RotateParams& p) { p.per_head = true; }).chunk_heads, 1);
  const auto positions = [](RotateParams& p) { p.rows.positions = {memory, true}; };
  EXPECT_EQ(plan(3, 16, 72, positions).block_units, 7);
  EXPECT_EQ(plan(1 << 20, 16, 72, positions).block_units, 21) << "more blocks follow";
}

TEST(StagedPlan, NeedsContiguousHeadsInRunsThatOccupyABlock) {
  const auto staged = [](int64_t H, int64_t D, auto change) {
    RotateParams p = call(2, 3, H, D, D);
    change(p);
    return make_plan(p, kLargeCache).staged;
  };
  const auto apart = [](RotateParams& p) {
    p.tensors[0].in_strides.s += 4;
    p.tensors[0].in_strides.b += 12;
  };
  EXPECT_TRUE(staged(8, 72, apart));
  EXPECT_FALSE(staged(4, 72, apart)) << "576 bytes";
  EXPECT_FALSE(staged(8, 72, [](RotateParams& p) { p.tensors[0].in_strides.d = 2; }));
  EXPECT_FALSE(staged(8, 72, [](RotateParams& p) {
    p.in_place = true;
    p.pairing.P = p.pairing.distance = 18;
  })) << "half of each head";
  EXPECT_TRUE(staged(1, 19000, [](RotateParams& p) { p.dtype = DType::kBFloat16; }));
  EXPECT_FALSE(staged(1, 20004, [](RotateParams& p) { p.dtype = DType::kBFloat16; }))
      << "more than shared memory";
  EXPECT_FALSE(staged(8, 72, [](RotateParams& p) {
    p.rows.cu_seqlens = {memory, true};
    p.rows.N = INT32_MAX;
  })) << "a warp searches with 32 bits";
}

const VectorCase kVectorCases[] = {
    {"Contiguous", [](RotateParams&) {}, 8, false},
    {"MisalignedInput", [](RotateParams& p) { p.tensors[0].in = memory + 2; }, 2, true},
    {"HalfAlignedInput", [](RotateParams& p) { p.tensors[0].in = memory + 8; }, 2, true},
    {"MisalignedOutput", [](RotateParams& p) { p.tensors[0].out = memory + 4; }, 2, true},
    {"OddInputRowStride", [](RotateParams& p) { p.tensors[0].in_strides.s += 1; }, 1, false},
    {"OddOutputHeadStride", [](RotateParams& p) { p.tensors[0].out_strides.h += 4; }, 1, false},
    {"WideInputRowStride", [](RotateParams& p) { p.tensors[0].in_strides.s += 8; }, 8, false},
    {"OddBatchStride", [](RotateParams& p) { p.tensors[0].in_strides.b += 1; }, 2, true},
    {"OddBatchStrideOfOneBatch",
     [](RotateParams& p) {
       p.B = 1;
       p.tensors[0].in_strides.b = p.tensors[0].out_strides.b = 13;
     },
     8, false},
    {"OddTokenStrideOfOneToken",
     [](RotateParams& p) {
       p.S = 1;
       p.tensors[0].in_strides.s = p.tensors[0].out_strides.s = 13;
     },
     8, false},
    {"OddHeadStrideOfOneHead",
     [](RotateParams& p) {
       p.tensors[0].H = 1;
       p.tensors[0].in_strides.h = p.tensors[0].out_strides.h = 13;
     },
     8, false},
    {"ExpandedInput", [](RotateParams& p) { p.tensors[0].in_strides.h = 0; }, 8, false},
    {"StridedElements", [](RotateParams& p) { p.tensors[0].in_strides.d = 2; }, 1, false},
    {"StridedOutputElements", [](RotateParams& p) { p.tensors[0].out_strides.d = 64; }, 1, false},
    {"OddOffset", [](RotateParams& p) { p.pairing.offset = 4; }, 2, true},
    {"AlignedOffset", [](RotateParams& p) { p.pairing.offset = 32; }, 8, false},
    {"ShortHalf", [](RotateParams& p) { p.pairing.P = p.pairing.distance = 12; }, 2, true},
    {"Blocks", [](RotateParams& p) { p.pairing.distance = 8; }, 8, false},
    {"ShortBlocks", [](RotateParams& p) { p.pairing.distance = 4; }, 2, true},
    {"Interleaved", [](RotateParams& p) { p.pairing.distance = 1; }, 8, false},
    {"InterleavedShort", [](RotateParams& p) { p.pairing = {12, 0, 1}; }, 8, false},
    {"InterleavedOddSpan", [](RotateParams& p) { p.pairing = {6, 0, 1}; }, 4, true},
    {"OddHead", [](RotateParams& p) { p.D = 60; }, 1, false},
    {"OddHeadInPlace",
     [](RotateParams& p) {
       p.D = 60;
       p.in_place = true;
     },
     8, false},
    {"ScatteredOutput",
     [](RotateParams& p) {
       p.tensors[0].scattered = true;
       p.tensors[0].out_strides = {0, 256, 64, 1};
     },
     8, false},
    {"ScatteredOutputOfOneTokenWithOddRows",
     [](RotateParams& p) {
       p.S = 1;
       p.tensors[0].scattered = true;
       p.tensors[0].out_strides = {0, 257, 64, 1};
     },
     1, false},
    {"MisalignedKey",
     [](RotateParams& p) {
       p.count = 2;
       p.tensors[1] = p.tensors[0];
       p.tensors[1].in = memory + 2;
     },
     2, true},
    {"MisalignedKeyWithoutHeads",
     [](RotateParams& p) {
       p.count = 2;
       p.tensors[1] = p.tensors[0];
       p.tensors[1].in = memory + 2;
       p.tensors[1].H = 0;
     },
     8, false},
};

INSTANTIATE_TEST_SUITE_P(Memory, VectorWidth, ::testing::ValuesIn(kVectorCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(VectorWidthOfType, IsSixteenBytes) {
  for (const auto& [dtype, elements] : {std::pair{DType::kFloat16, 8},
                                        {DType::kBFloat16, 8},
                                        {DType::kFloat32, 4},
                                        {DType::kFloat64, 2}}) {
    RotateParams p = call(1, 2, 3, 64, 64);
    p.dtype = dtype;
    EXPECT_EQ(make_plan(p, kLargeCache).vector, elements);
  }
}

TEST(TableVector, IsAsWideAsAlignmentAndStridesAllow) {
  const auto bytes = [](auto change) {
    RotateParams p = call(2, 3, 4, 64, 32);
    change(p);
    return std::min(table_vector(p.cos, p.table_dtype), table_vector(p.sin, p.table_dtype));
  };
  EXPECT_EQ(bytes([](RotateParams&) {}), 16);
  EXPECT_EQ(bytes([](RotateParams& p) { p.cos.m = 2 * p.cos.m; }), 16) << "half of a joint table";
  EXPECT_EQ(bytes([](RotateParams& p) { p.cos = {memory, 0, 0, 16, 0, 1}; }), 16) << "per token";
  EXPECT_EQ(bytes([](RotateParams& p) { p.cos.data = memory + 4; }), 4);
  EXPECT_EQ(bytes([](RotateParams& p) { p.sin.data = memory + 8; }), 8);
  EXPECT_EQ(bytes([](RotateParams& p) { p.sin.m += 1; }), 4);
  EXPECT_EQ(bytes([](RotateParams& p) { p.sin.j = 2; }), 4) << "of a complex table";
  EXPECT_EQ(bytes([](RotateParams& p) { p.cos = {memory, 0, 0, 16, 2, 1}; }), 8) << "per head";
  RotateParams p = call(2, 3, 4, 64, 32);
  p.sin.j = 2;
  EXPECT_TRUE(make_plan(p, kLargeCache).staged) << "vectors of 16 bytes need entries as wide";
}

TEST(Arrangement, IsAdjacentForInterleavedVectors) {
  RotateParams p = call(1, 1, 2, 64, 64);
  EXPECT_EQ(make_plan(p, kLargeCache).arrangement, Arrangement::kPair);
  p.pairing.distance = 1;
  EXPECT_EQ(make_plan(p, kLargeCache).arrangement, Arrangement::kAdjacent);
  p.tensors[0].in_strides.d = 2;
  EXPECT_EQ(make_plan(p, kLargeCache).arrangement, Arrangement::kPair) << "single pairs";
}

TEST(RowLookupOfPlan, IsIndexedWhenDeviceMemorySelectsRows) {
  const auto rows = [](auto change) {
    RotateParams p = call(2, 3, 4, 64, 64);
    change(p);
    return make_plan(p, kLargeCache).lookup;
  };
  const IndexParams numbers = {memory, true};
  EXPECT_EQ(rows([](RotateParams&) {}), RowLookup::kLinear);
  EXPECT_EQ(rows([](RotateParams& p) { p.rows.offset = 7; }), RowLookup::kLinear);
  EXPECT_EQ(rows([](RotateParams& p) { p.rows.gathered = true; }), RowLookup::kLinear);
  EXPECT_EQ(rows([](RotateParams& p) { p.sin.m += 8; }), RowLookup::kIndexed)
      << "no fixed distance from cos";
  EXPECT_EQ(rows([](RotateParams& p) { p.sin.b += 8; }), RowLookup::kIndexed);
  EXPECT_EQ(rows([](RotateParams& p) { p.sin.s += 8; }), RowLookup::kIndexed);
  EXPECT_EQ(rows([](RotateParams& p) { p.sin.h += 8; }), RowLookup::kIndexed);
  EXPECT_EQ(rows([&](RotateParams& p) { p.rows.positions = numbers; }), RowLookup::kPositions);
  EXPECT_EQ(rows([&](RotateParams& p) { p.rows.positions = numbers, p.S = 1 << 20; }),
            RowLookup::kIndexed)
      << "more threads than are resident";
  EXPECT_EQ(rows([&](RotateParams& p) { p.rows.positions = numbers, p.sin.m += 8; }),
            RowLookup::kIndexed);
  EXPECT_EQ(rows([&](RotateParams& p) { p.rows.positions = numbers, p.rows.M = 1L << 31; }),
            RowLookup::kIndexed)
      << "rows that need 64 bits";
  EXPECT_EQ(rows([&](RotateParams& p) { p.rows.positions = p.rows.offsets = numbers; }),
            RowLookup::kIndexed);
  EXPECT_EQ(
      rows([&](RotateParams& p) { p.rows.positions = numbers, p.tensors[0].in = memory + 2; }),
      RowLookup::kAxes)
      << "staged";
  EXPECT_EQ(rows([&](RotateParams& p) { p.rows.offsets = numbers; }), RowLookup::kIndexed);
  const auto packed = [&](int64_t N) {
    return rows([&](RotateParams& p) { p.rows.cu_seqlens = numbers, p.rows.N = N; });
  };
  EXPECT_EQ(packed(1), RowLookup::kPacked);
  EXPECT_EQ(packed(INT32_MAX), RowLookup::kIndexed) << "a warp searches with 32 bits";
  EXPECT_EQ(rows([&](RotateParams& p) { p.rows.positions = numbers, p.rows.M = 0; }),
            RowLookup::kIndexed)
      << "no row is the nearest one";
  EXPECT_EQ(rows([&](RotateParams& p) { p.rows.out_rows = numbers; }), RowLookup::kIndexed);
}

TEST(RowLookupOfPlan, TellsWhetherThePairsOfAThreadHaveOneAxis) {
  const auto rows = [](int64_t distance, int64_t first_of_second_axis, int64_t offset = 0) {
    RotateParams p = call(2, 3, 4, 128, 64);
    int64_t axes[32];
    for (int64_t j = 0; j < 32; ++j) axes[j] = j >= first_of_second_axis;
    p.rows.positions = {memory, true};
    p.axes = axes;
    p.pairing.distance = distance;
    p.pairing.offset = offset;
    return make_plan(p, kLargeCache).lookup;
  };
  EXPECT_EQ(rows(32, 8), RowLookup::kSections) << "eight pairs in each two vectors";
  EXPECT_EQ(rows(32, 12), RowLookup::kAxes);
  EXPECT_EQ(rows(32, 32), RowLookup::kSections) << "one axis";
  EXPECT_EQ(rows(1, 12), RowLookup::kSections) << "four whole pairs in a vector";
  EXPECT_EQ(rows(1, 10), RowLookup::kAxes);
  EXPECT_EQ(rows(32, 8, 1), RowLookup::kAxes) << "staged";
}

TEST(Plan, GivesAThreadTwoVectorsOfWholePairsOnlyToShareALookup) {
  int64_t axes[32] = {};
  const auto threads = [&](int64_t distance, bool positions, const int64_t* pair_axes = nullptr) {
    RotateParams p = call(2, 3, 4, 64, 64);
    p.pairing.distance = distance;
    if (positions) p.rows.positions = {memory, true};
    p.axes = pair_axes;
    return make_plan(p, kLargeCache).head_threads;
  };
  EXPECT_EQ(threads(32, false), 4) << "two vectors of eight elements";
  EXPECT_EQ(threads(32, true), 4);
  EXPECT_EQ(threads(32, true, axes), 4);
  EXPECT_EQ(threads(1, false), 8);
  EXPECT_EQ(threads(1, true), 4);
  EXPECT_EQ(threads(1, true, axes), 8) << "one axis";
}

struct TableCase {
  const char* name;
  void (*change)(RotateParams&);  // of 2 batches, 8 tokens, 3 heads of q and 2 of k
  double rows;                    // of 32 pairs
};

void PrintTo(const TableCase& c, std::ostream* out) { *out << c.name; }

class TableBytes : public ::testing::TestWithParam<TableCase> {
 protected:
  RotateParams params() const {
    RotateParams p = call(2, 8, 3, 64, 64);
    p.count = 2;
    p.tensors[1] = p.tensors[0];
    p.tensors[1].H = 2;
    GetParam().change(p);
    return p;
  }
};

TEST_P(TableBytes, CountEveryRowOnce) {
  RotateParams p = params();
  EXPECT_EQ(table_bytes(p), GetParam().rows * 2 * 32 * 4);
  p.table_dtype = DType::kBFloat16;
  EXPECT_EQ(table_bytes(p), GetParam().rows * 2 * 32 * 2);
}

TEST_P(TableBytes, AreKeptInAShareOfTheCache) {
  const RotateParams p = params();
  const auto l2_bytes = static_cast<int64_t>(kKeptShare * table_bytes(p));
  EXPECT_TRUE(make_plan(p, {l2_bytes, 132}).keeps_tables);
  EXPECT_FALSE(make_plan(p, {l2_bytes - 1, 132}).keeps_tables);
}

constexpr int64_t kOneAxis[32] = {};
const TableCase kTableCases[] = {
    {"AsManyRowsAsTokensOfASequence", [](RotateParams&) {}, 8},
    {"OfALongTable", [](RotateParams& p) { p.rows.M = int64_t{1} << 40; }, 8},
    {"LookedUpInALongTable",
     [](RotateParams& p) {
       p.rows.M = int64_t{1} << 40;
       p.rows.positions = {memory, true};
     },
     16},
    {"LookedUpInAShortTable",
     [](RotateParams& p) {
       p.rows.M = 5;
       p.rows.positions = {memory, true};
     },
     5},
    {"LookedUpForEachAxis",
     [](RotateParams& p) {
       p.rows.M = int64_t{1} << 40;
       p.rows.positions = {memory, true};
       p.axes = kOneAxis;
     },
     16 * kMaxAxes},
    {"OfEachToken", [](RotateParams& p) { gather(p, {256, 32, 0, 1}, {256, 32, 0, 1}); }, 16},
    {"OfEachTokenOfEveryBatch", [](RotateParams& p) { gather(p, {0, 32, 0, 1}, {0, 32, 0, 1}); },
     8},
    {"OfEachHead",
     [](RotateParams& p) {
       gather(p, {768, 96, 32, 1}, {768, 96, 32, 1});
       p.per_head = true;
     },
     48},
    {"OfEveryHead",
     [](RotateParams& p) {
       gather(p, {256, 32, 0, 1}, {256, 32, 0, 1});
       p.per_head = true;
     },
     16},
};

INSTANTIATE_TEST_SUITE_P(Rows, TableBytes, ::testing::ValuesIn(kTableCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Plan, StreamsXWithLargeTables) {
  const auto streams = [](int64_t H, auto change) {
    RotateParams p = call(2, 100, H, 64, 64);  // 128 bytes a head, 256 a row of cos and sin
    change(p);
    return make_plan(p, kSmallCache).eviction == Eviction::kFirst;
  };
  const auto unchanged = [](RotateParams&) {};
  EXPECT_FALSE(streams(10, unchanged)) << "100 rows, 2000 heads: a tenth";
  EXPECT_TRUE(streams(9, unchanged));
  EXPECT_FALSE(streams(5, [](RotateParams& p) { p.dtype = DType::kFloat32; }));
  EXPECT_FALSE(streams(5, [](RotateParams& p) {
    p.count = 2;
    p.tensors[1] = p.tensors[0];
  })) << "as many heads of k";
}

TEST(Plan, DoesNotStreamAnXThatFitsInTheCache) {
  const RotateParams p = call(2, 100, 5, 64, 64);
  constexpr int64_t kXBytes = 2 * 100 * 5 * 64 * 2;
  EXPECT_EQ(make_plan(p, {kXBytes - 1, 132}).eviction, Eviction::kFirst);
  EXPECT_EQ(make_plan(p, {kXBytes, 132}).eviction, Eviction::kNormal);
}

TEST(Plan, MakesBlocksOfWholeHeads) {
  const auto threads = [](int64_t S, int64_t D, int64_t distance = 0) {
    RotateParams p = call(1, S, 32, D, D);
    if (distance > 0) p.pairing.distance = distance;
    return make_plan(p, kLargeCache).block_threads;
  };
  constexpr int64_t kMany = 4096;
  EXPECT_EQ(threads(kMany, 64), 128);
  EXPECT_EQ(threads(kMany, 80), 160) << "five threads for a head";
  EXPECT_EQ(threads(kMany, 96), 96) << "six";
  EXPECT_EQ(threads(kMany, 112), 224) << "seven";
  EXPECT_EQ(threads(kMany, 144), 128) << "nine: no whole heads in a block";
  EXPECT_EQ(threads(100, 96), 192) << "all run at once";
  EXPECT_EQ(threads(100, 80), 160);
  EXPECT_EQ(threads(792, 128), 256) << "1536 threads for each multiprocessor";
  EXPECT_EQ(threads(793, 128), 128);
  EXPECT_EQ(threads(396, 128, 1), 256) << "twice as many of one vector each";
  EXPECT_EQ(threads(397, 128, 1), 128);
}

struct VectorBytesCase {
  const char* name;
  void (*change)(RotateParams&);  // of 32 heads, D = 128, one more token than are resident at once
  int bytes;
};

void PrintTo(const VectorBytesCase& c, std::ostream* out) { *out << c.name; }

class VectorBytes : public ::testing::TestWithParam<VectorBytesCase> {};

TEST_P(VectorBytes, AreFewInShortChunks) {
  RotateParams p = call(1, 793, 32, 128, 128);
  p.rows.M = 4096;
  GetParam().change(p);
  for (const DeviceFacts& device : {kSmallCache, kLargeCache}) {
    const Plan plan = make_plan(p, device);
    EXPECT_EQ(plan.vector * size_of(p.dtype), GetParam().bytes);
  }
}

// In place, 64 of every 256 bytes, with four times the tokens.
void in_chunks(RotateParams& p) {
  p.S *= 4;
  p.pairing.P = p.pairing.distance = 16;
  p.in_place = true;
}

void set_strides(TensorParams& t, const Strides& strides) {
  t.in_strides = t.out_strides = strides;
}

// Heads with D = 32, so that the whole head is a chunk.
void in_short_heads(RotateParams& p, const Strides& strides) {
  in_chunks(p);
  p.D = 32;
  set_strides(p.tensors[0], strides);
}

// Two tensors, one of them, `dense`, without gaps between chunks.
void in_chunks_of_one(RotateParams& p, int dense) {
  in_chunks(p);
  p.count = 2;
  p.tensors[1] = p.tensors[0];
  set_strides(p.tensors[dense], bshd(p.S, 32, 32));
}

constexpr int64_t kChunkTokens = 4 * 793;

const VectorBytesCase kVectorBytesCases[] = {
    {"Large", [](RotateParams&) {}, 16},
    {"AllAtOnce", [](RotateParams& p) { p.S = 792; }, 16},
    {"Float16", [](RotateParams& p) { p.dtype = DType::kFloat16; }, 16},
    {"Float32", [](RotateParams& p) { p.dtype = DType::kFloat32; }, 16},
    {"Interleaved", [](RotateParams& p) { p.pairing.distance = 1; }, 16},
    {"Blocks", [](RotateParams& p) { p.pairing.distance = 32; }, 16},
    {"Copies", [](RotateParams& p) { p.pairing.P = p.pairing.distance = 32; }, 16},
    {"LookUps", [](RotateParams& p) { p.rows.positions = {memory, true}; }, 16},
    {"PerHead", [](RotateParams& p) { p.per_head = true; }, 16},
    {"ShortEntries", [](RotateParams& p) { p.table_dtype = DType::kBFloat16; }, 16},
    {"Streams", [](RotateParams& p) { p.S = 1 << 16, p.tensors[0].H = 1; }, 16},
    {"SingleEntries", [](RotateParams& p) { p.cos.j = p.sin.j = 2; }, 4},
    {"Chunks", in_chunks, 4},
    {"ChunksAtOnce", [](RotateParams& p) { in_chunks(p), p.S -= 4; }, 16},
    {"ChunksAtTheEnd", [](RotateParams& p) { in_chunks(p), p.pairing.offset = 96; }, 4},
    {"ChunksOfFloat32", [](RotateParams& p) { in_chunks(p), p.dtype = DType::kFloat32; }, 16},
    {"LongChunks", [](RotateParams& p) { in_chunks(p), p.pairing.P = p.pairing.distance = 24; },
     16},
    {"InterleavedChunks", [](RotateParams& p) { in_chunks(p), p.pairing.distance = 1; }, 8},
    {"InterleavedChunksAtOnce",
     [](RotateParams& p) { in_chunks(p), p.S -= 4, p.pairing.distance = 1; }, 16},
    {"LongInterleavedChunks",
     [](RotateParams& p) { in_chunks(p), p.pairing.P = 20, p.pairing.distance = 1; }, 16},
    {"ChunksOfHeadsApart",
     [](RotateParams& p) {
       in_chunks(p);
       set_strides(p.tensors[0], bhsd(p.S, 32, 128));
     },
     4},
    {"ChunksOfTheSecondAlone", [](RotateParams& p) { in_chunks_of_one(p, 0), p.tensors[0].H = 0; },
     4},
    {"ChunksOfTheFirst", [](RotateParams& p) { in_chunks_of_one(p, 1); }, 4},
    {"HeadsApart", [](RotateParams& p) { in_short_heads(p, bshd(kChunkTokens, 32, 64)); }, 4},
    {"HeadsLessApart", [](RotateParams& p) { in_short_heads(p, bshd(kChunkTokens, 32, 56)); }, 16},
    {"ContiguousHeads", [](RotateParams& p) { in_short_heads(p, bshd(kChunkTokens, 32, 32)); }, 16},
    {"ContiguousTokens", [](RotateParams& p) { in_short_heads(p, bhsd(kChunkTokens, 32, 32)); },
     16},
    {"HeadsApartOutOfPlace",
     [](RotateParams& p) {
       in_short_heads(p, bshd(kChunkTokens, 32, 64));
       p.in_place = false;
     },
     16},
};

INSTANTIATE_TEST_SUITE_P(Of, VectorBytes, ::testing::ValuesIn(kVectorBytesCases),
                         [](const auto& info) { return std::string(info.param.name); });

struct ChunkCase {
  const char* name;
  int64_t R, D;
  Eviction eviction;
  int idle_bytes = 0;
  int64_t S = 1 << 14;
};

void PrintTo(const ChunkCase& c, std::ostream* out) { *out << c.name; }

class ChunksInPlace : public ::testing::TestWithParam<ChunkCase> {};

TEST_P(ChunksInPlace, StayInTheCacheAndLeaveRoomIfTheySplitAtoms) {
  constexpr DeviceFacts kDevice = {int64_t{50} << 20, 132, 228 << 10};
  const ChunkCase& c = GetParam();
  RotateParams p = call(1, c.S, 32, c.D, c.R);
  p.in_place = true;
  const Plan plan = make_plan(p, kDevice);
  EXPECT_EQ(plan.eviction, c.eviction);
  EXPECT_EQ(plan.idle_bytes, c.idle_bytes);
  p.in_place = false;
  const Plan out_of_place = make_plan(p, kDevice);
  EXPECT_EQ(out_of_place.eviction, Eviction::kNormal);
  EXPECT_EQ(out_of_place.idle_bytes, 0);
}

INSTANTIATE_TEST_SUITE_P(
    Of, ChunksInPlace,
    ::testing::Values(ChunkCase{"Pythia1B", 32, 128, Eviction::kLast},
                      ChunkCase{"Pythia3B", 20, 80, Eviction::kLast, 24832},
                      ChunkCase{"Pythia3BAtOnce", 20, 80, Eviction::kNormal, 0, 64},
                      ChunkCase{"NeoX20B", 24, 96, Eviction::kLast},
                      ChunkCase{"NeoX20BAtOnce", 24, 96, Eviction::kNormal, 0, 64},
                      ChunkCase{"Phi2", 32, 80, Eviction::kLast},
                      ChunkCase{"HalfHeads", 64, 128, Eviction::kLast},
                      ChunkCase{"LongerThanALine", 66, 144, Eviction::kNormal},
                      ChunkCase{"LessApart", 64, 120, Eviction::kNormal},
                      ChunkCase{"WholeHeads", 64, 64, Eviction::kNormal}),
    [](const auto& info) { return std::string(info.param.name); });

// evict_first would triple the time of parts of sectors.
TEST(Plan, NeverStreamsChunksInPlace) {
  for (const int64_t D : {80, 96}) {
    RotateParams p = call(1, 1 << 16, 4, D, D / 4);
    EXPECT_EQ(make_plan(p, kSmallCache).eviction, Eviction::kFirst);
    p.in_place = true;
    EXPECT_NE(make_plan(p, kSmallCache).eviction, Eviction::kFirst);
  }
}

TEST(Plan, TakesSizesWhoseProductExceeds64Bits) {
  constexpr int64_t kHuge = int64_t{1} << 40;
  RotateParams p = call(1, 1, 1, 64, 64);
  p.B = p.S = p.tensors[0].H = kHuge;
  const Plan plan = make_plan(p, kLargeCache);
  EXPECT_EQ(plan.block_threads, 128);
  EXPECT_EQ(plan.eviction, Eviction::kNormal);
}

TEST(RowLookupOfPlan, IsPerHeadForVectorsOfPerHeadTables) {
  RotateParams p = call(2, 3, 4, 64, 64);
  EXPECT_EQ(make_plan(p, kLargeCache).lookup, RowLookup::kLinear);
  p.per_head = true;
  EXPECT_EQ(make_plan(p, kLargeCache).lookup, RowLookup::kPerHead);
  p.cos.j = 2;
  EXPECT_EQ(make_plan(p, kLargeCache).lookup, RowLookup::kLinear) << "one entry at a time";
  p.rows.out_rows = {memory, true};
  EXPECT_EQ(make_plan(p, kLargeCache).lookup, RowLookup::kAxes);
}

TEST(Plan, HasFullHeadsWhenAllElementsRotateInOneBlock) {
  const auto full_head = [](int64_t R, int64_t distance, bool in_place) {
    RotateParams p = call(2, 3, 4, 64, R);
    p.pairing.distance = distance;
    p.in_place = in_place;
    return make_plan(p, kLargeCache).full_head;
  };
  EXPECT_TRUE(full_head(64, 32, false));
  EXPECT_TRUE(full_head(64, 1, false));
  EXPECT_FALSE(full_head(64, 16, false)) << "two blocks";
  EXPECT_FALSE(full_head(32, 16, false)) << "threads that copy";
  EXPECT_TRUE(full_head(32, 16, true));
  EXPECT_FALSE(full_head(32, 8, true));
}

struct AdjacentCase {
  const char* name;
  void (*change)(RotateParams&);  // of 5 heads and 2 in a packed tensor [2, 3, 9, 64]
  bool joined;
};

void PrintTo(const AdjacentCase& c, std::ostream* out) { *out << c.name; }

class AdjacentTensors : public ::testing::TestWithParam<AdjacentCase> {
 protected:
  static RotateParams packed() {
    RotateParams p = call(2, 3, 5, 64, 64);
    p.count = 2;
    p.in_place = true;
    TensorParams& q = p.tensors[0];
    q.in_strides = q.out_strides = {3 * 9 * 64, 9 * 64, 64, 1};
    q.in = q.out = memory;
    p.tensors[1] = q;
    p.tensors[1].H = 2;
    p.tensors[1].in = p.tensors[1].out = memory + 5 * 64 * 2;
    return p;
  }
};

TEST_P(AdjacentTensors, AreJoined) {
  RotateParams p = packed();
  GetParam().change(p);
  EXPECT_EQ(are_adjacent(p), GetParam().joined);
  if (!GetParam().joined) return;
  const RotateParams one = joined(p);
  EXPECT_EQ(one.count, 1);
  EXPECT_EQ(one.tensors[0].H, p.tensors[0].H + p.tensors[1].H);
  EXPECT_EQ(one.tensors[0].in, p.tensors[0].in);
}

constexpr Strides kElsewhere = {3 * 7 * 64, 7 * 64, 64, 1};
const AdjacentCase kAdjacentCases[] = {
    {"Packed", [](RotateParams&) {}, true},
    {"OneToken",
     [](RotateParams& p) {
       p.B = p.S = 1;  // so their strides do not matter
       p.tensors[1].in_strides.b = p.tensors[1].out_strides.s = 12345;
     },
     true},
    {"Alone", [](RotateParams& p) { p.count = 1; }, false},
    {"NoHeadsOfQ", [](RotateParams& p) { p.tensors[0].H = 0; }, false},
    {"NoHeadsOfK", [](RotateParams& p) { p.tensors[1].H = 0; }, false},
    {"WithHeadsBetween", [](RotateParams& p) { p.tensors[1].in = memory + 6 * 64 * 2; }, false},
    {"WithOutputsElsewhere", [](RotateParams& p) { p.tensors[1].out = memory; }, false},
    {"OtherBatches", [](RotateParams& p) { p.tensors[1].in_strides.b += 64; }, false},
    {"OtherTokens", [](RotateParams& p) { p.tensors[1].in_strides.s += 64; }, false},
    {"OtherHeads", [](RotateParams& p) { p.tensors[1].in_strides.h += 64; }, false},
    {"OtherElements", [](RotateParams& p) { p.tensors[1].in_strides.d = 2; }, false},
    {"OtherOutputs", [](RotateParams& p) { p.tensors[1].out_strides = kElsewhere; }, false},
    {"Scattered", [](RotateParams& p) { p.tensors[1].scattered = true; }, false},
    {"RowsOfHeads", [](RotateParams& p) { p.per_head = true; }, false},
};

INSTANTIATE_TEST_SUITE_P(Cases, AdjacentTensors, ::testing::ValuesIn(kAdjacentCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Plan, ClampsOverrides) {
  const RotateParams p = call(2, 3, 4, 64, 64);
  EXPECT_EQ(make_plan(p, kLargeCache, {.threads = 64}).block_threads, 64);
  EXPECT_EQ(make_plan(p, kLargeCache, {.threads = 0}).block_threads, kWarp);
  EXPECT_EQ(make_plan(p, kLargeCache, {.threads = 4096}).block_threads, kMaxBlockThreads);
  EXPECT_TRUE(make_plan(p, kLargeCache).keeps_tables);
  EXPECT_FALSE(make_plan(p, kLargeCache, {.keep = 0}).keeps_tables);
  EXPECT_FALSE(make_plan(p, kSmallCache).keeps_tables);
  EXPECT_TRUE(make_plan(p, kSmallCache, {.keep = 1}).keeps_tables);
  EXPECT_EQ(make_plan(p, kSmallCache).eviction, Eviction::kFirst);
  EXPECT_EQ(make_plan(p, kSmallCache, {.evict = 1}).eviction, Eviction::kNormal);
  EXPECT_EQ(make_plan(p, kLargeCache).eviction, Eviction::kNormal);
  EXPECT_EQ(make_plan(p, kLargeCache, {.evict = 0}).eviction, Eviction::kFirst);
  EXPECT_TRUE(make_plan(p, kLargeCache).full_head);
  EXPECT_FALSE(make_plan(p, kLargeCache, {.full = 0}).full_head);
}

TEST(ParseOverrides, ReadsEveryWord) {
  const PlanOverrides none = parse_overrides("");
  EXPECT_EQ(none.vector, -1);
  EXPECT_EQ(none.work, -1);
  const PlanOverrides o = parse_overrides(" vector=8 threads=64  keep=0 evict=2 work=96 full=0");
  EXPECT_EQ(o.vector, 8);
  EXPECT_EQ(o.threads, 64);
  EXPECT_EQ(o.keep, 0);
  EXPECT_EQ(o.evict, 2);
  EXPECT_EQ(o.work, 96);
  EXPECT_EQ(o.full, 0);
}

TEST(ParseOverrides, RejectsWhatItDoesNotKnow) {
  for (const char* text : {"vectors=8", "vector", "vector=", "vector=x", "vector=8x", "keep=-1",
                           "threads=64,keep=0", "=8", "threads=99999999999"}) {
    EXPECT_THROW(parse_overrides(text), std::invalid_argument) << text;
  }
}

TEST(Plan, MakesLargerBlocksWhenAllAreResidentAtOnce) {
  const auto threads = [](int64_t S) {
    return make_plan(call(1, S, 8, 128, 128), kLargeCache).block_threads;  // 64 threads for a token
  };
  EXPECT_EQ(threads(1), 128) << "less than a block for each multiprocessor";
  EXPECT_EQ(threads(2 * 132), 128);
  EXPECT_EQ(threads(3 * 132), 256);
  EXPECT_EQ(threads(24 * 132), 256);
  EXPECT_EQ(threads(25 * 132), 128) << "more than are resident";
}

struct NormCase {
  const char* name;
  void (*change)(RotateParams&, NormParams&);
  bool whole;  // heads in whole vectors
};

void PrintTo(const NormCase& c, std::ostream* out) { *out << c.name; }

class NormPlan : public ::testing::TestWithParam<NormCase> {};

TEST_P(NormPlan, HasWholeVectorsWhereMemoryAndPairsAllow) {
  NormParams norm = {};
  RotateParams p = call(2, 3, 4, 128, 128);
  p.norm = &norm;
  GetParam().change(p, norm);
  EXPECT_EQ(make_norm_plan(p, kLargeCache).has_value(), GetParam().whole);
}

void make_heads(RotateParams& p, int64_t D) {
  const NormParams* const norm = p.norm;
  p = call(2, 3, 4, D, D);
  p.norm = norm;
}

INSTANTIATE_TEST_SUITE_P(
    All, NormPlan,
    ::testing::Values(
        NormCase{"half", [](RotateParams&, NormParams&) {}, true},
        NormCase{"interleaved", [](RotateParams& p, NormParams&) { p.pairing.distance = 1; }, true},
        NormCase{"blocks", [](RotateParams& p, NormParams&) { p.pairing.distance = 32; }, false},
        NormCase{"partial", [](RotateParams& p, NormParams&) { p.pairing = {32, 0, 32}; }, false},
        NormCase{"partial_in_place",
                 [](RotateParams& p, NormParams&) {
                   p.pairing = {32, 0, 32};
                   p.in_place = true;
                 },
                 false},
        NormCase{"D80", [](RotateParams& p, NormParams&) { make_heads(p, 80); }, true},
        NormCase{"D72", [](RotateParams& p, NormParams&) { make_heads(p, 72); }, false},
        NormCase{"D512", [](RotateParams& p, NormParams&) { make_heads(p, 512); }, true},
        NormCase{"D528", [](RotateParams& p, NormParams&) { make_heads(p, 528); }, false},
        NormCase{"unaligned", [](RotateParams& p, NormParams&) { p.tensors[0].in_strides.h = 129; },
                 false},
        NormCase{"short_table", [](RotateParams& p, NormParams&) { p.cos.m = 65; }, false},
        NormCase{"strided_weight",
                 [](RotateParams&, NormParams& norm) {
                   norm.weights[0] = {memory, 2, DType::kBFloat16};
                 },
                 false},
        NormCase{
            "wide_weight",
            [](RotateParams&, NormParams& norm) { norm.weights[0] = {memory, 1, DType::kFloat32}; },
            true},
        NormCase{"float64",
                 [](RotateParams& p, NormParams&) { p.dtype = p.table_dtype = DType::kFloat64; },
                 false}),
    [](const auto& info) { return info.param.name; });

TEST(NormPlanOfHeads, KeepsTheThreadsOfAHeadInOneWarp) {
  for (const auto& [D, rotating, all] :
       {std::array{16, 1, 1}, {64, 4, 4}, {80, 5, 8}, {128, 8, 8}, {512, 32, 32}}) {
    NormParams norm = {};
    RotateParams p = call(2, 3, 4, D, D);
    p.norm = &norm;
    const Plan plan = make_norm_plan(p, kLargeCache).value();
    EXPECT_EQ(plan.rotating_threads, rotating) << D;
    EXPECT_EQ(plan.head_threads, all) << D;
  }
}

TEST(NormPlanOfHeads, TakesTwoHeadsOfLargeCallsWithEvenHeads) {
  NormParams norm = {};
  RotateParams p = call(4, 16384, 4, 128, 128);
  p.norm = &norm;
  const auto heads = [&] { return make_norm_plan(p, kLargeCache)->chunk_heads; };
  EXPECT_EQ(heads(), 2);
  NormBackwardParams backward = {};
  backward.call = p;
  EXPECT_EQ(make_backward_plan(backward, kLargeCache)->chunk_heads, 1);
  const RotateParams large = p;
  p.S = 4096;
  EXPECT_EQ(heads(), 1) << "resident threads have few turns";
  p.B = 1;
  p.S = 64;
  EXPECT_EQ(heads(), 1) << "all threads are resident";
  p = large;
  p.tensors[0].H = 3;
  EXPECT_EQ(heads(), 1) << "odd";
  p = large;
  p.rows.positions = {memory, true};
  EXPECT_EQ(heads(), 1) << "looks up rows";
  p = large;
  p.per_head = true;
  EXPECT_EQ(heads(), 1) << "rows differ between heads";
}

TEST(NormPlanOfHeads, LooksUpOnlyWhatItMust) {
  NormParams norm = {};
  RotateParams p = call(2, 3, 4, 128, 128);
  p.norm = &norm;
  EXPECT_EQ(make_norm_plan(p, kLargeCache)->lookup, RowLookup::kLinear);
  p.rows.positions = {memory, true};
  EXPECT_EQ(make_norm_plan(p, kLargeCache)->lookup, RowLookup::kIndexed);
}

// A call that stores k and v of two heads in pages of 16 tokens, without k_out.
struct CacheCall {
  CacheParams cache = {};
  RotateParams p = call(64, 1, 4, 128, 128);

  CacheCall() {
    p.count = 2;
    p.tensors[1] = {memory, nullptr, bshd(1, 2, 128), {}, 2, false};
    cache.k = {memory, 16 * 2 * 128, 2 * 128, 128, 1, nullptr, 0};
    cache.v = cache.k;
    cache.values = {memory, nullptr, bshd(1, 2, 128), {}, 2, false};
    cache.values_D = 128;
    cache.page_size = 16;
    p.rows.out_rows = {memory, false};
    p.rows.out_rows_limit = 1024;
    p.cache = &cache;
  }

  bool has_plan() const { return make_cache_plan(p, kLargeCache).has_value(); }
};

TEST(CachePlan, TakesWholeVectorsWithoutAnOutputOfK) {
  CacheCall call;
  ASSERT_TRUE(call.has_plan());
  EXPECT_EQ(make_cache_plan(call.p, kLargeCache)->lookup, RowLookup::kLinear);
  call.p.rows.positions = {memory, true};
  EXPECT_EQ(make_cache_plan(call.p, kLargeCache)->lookup, RowLookup::kIndexed);
  NormParams norm = {};
  call.p.norm = &norm;
  EXPECT_TRUE(call.has_plan());
  EXPECT_EQ(make_cache_plan(call.p, kLargeCache)->chunk_heads, 1);
}

TEST(CachePlan, LeavesOtherMemoryToAWarpForEachHead) {
  const int64_t axes[64] = {};
  using Change = void (*)(CacheCall&, const int64_t*);
  const std::pair<const char*, Change> changes[] = {
      {"a page of k", [](CacheCall& c, const int64_t*) { c.cache.k.page += 4; }},
      {"elements of v", [](CacheCall& c, const int64_t*) { c.cache.v.d = 2; }},
      {"v itself", [](CacheCall& c, const int64_t*) { c.cache.values.in_strides.b += 4; }},
      {"the width of v", [](CacheCall& c, const int64_t*) { c.cache.values_D = 100; }},
      {"q", [](CacheCall& c, const int64_t*) { c.p.tensors[0].in_strides.b += 4; }},
      {"axes", [](CacheCall& c, const int64_t* all) { c.p.axes = all; }},
      {"float64", [](CacheCall& c, const int64_t*) { c.p.dtype = DType::kFloat64; }},
      {"no elements", [](CacheCall& c, const int64_t*) { c.p.D = c.p.pairing.P = 0; }},
      {"long heads of v", [](CacheCall& c, const int64_t*) { c.cache.v.h = int64_t{1} << 32; }},
  };
  for (const auto& [name, change] : changes) {
    CacheCall call;
    change(call, axes);
    EXPECT_FALSE(call.has_plan()) << name;
  }
}

TEST(CachePlan, StoresEightBitsInVectorsOfEightBytes) {
  CacheCall call;
  call.cache.storage = Storage::kE4M3;
  EXPECT_TRUE(call.has_plan());
  call.cache.k.place += 8;
  EXPECT_TRUE(call.has_plan());
  call.cache.k.place += 4;
  EXPECT_FALSE(call.has_plan());
}

TEST(BackwardPlan, NeedsAlignedGradientsAndTilesOfWholeTensors) {
  NormParams norm = {};
  NormBackwardParams p = {};
  p.call = call(2, 3, 4, 128, 128);
  p.call.norm = &norm;
  p.tensors[0] = {memory, bshd(3, 4, 128), memory, memory};
  EXPECT_TRUE(make_backward_plan(p, kLargeCache).has_value());
  p.tensors[0].strides.h = 129;
  EXPECT_FALSE(make_backward_plan(p, kLargeCache).has_value());
  p.tensors[0].strides = {0, 0, 0, 1};
  EXPECT_TRUE(make_backward_plan(p, kLargeCache).has_value());
  p.tensors[0].strides.s = int64_t{1} << 32;
  EXPECT_FALSE(make_backward_plan(p, kLargeCache).has_value());
  p.tensors[0].strides.s = 0;
  p.call.S = 0;
  EXPECT_FALSE(make_backward_plan(p, kLargeCache).has_value()) << "no tokens";
}

}  // namespace
}  // namespace fused_rope::kernels
