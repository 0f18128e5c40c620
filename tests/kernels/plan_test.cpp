#include "fused_rope/kernels/plan.h"

#include <gtest/gtest.h>

#include <limits>
#include <set>
#include <vector>

#include "reference.h"

namespace fused_rope {
namespace {

__extension__ using Exact = __int128;

// 16-byte aligned, never read.
alignas(16) std::byte memory[64];

constexpr DeviceFacts kSmallCache = {0, 132};              // everything is larger
constexpr DeviceFacts kLargeCache = {INT64_MAX / 2, 132};  // nothing is

Strides bshd(int64_t S, int64_t H, int64_t D) { return {S * H * D, H * D, D, 1}; }
Strides bhsd(int64_t S, int64_t H, int64_t D) { return {H * S * D, D, S * D, 1}; }
Strides sbhd(int64_t B, int64_t H, int64_t D) { return {H * D, B * H * D, D, 1}; }

// A call with one contiguous bshd tensor and a float32 table of S rows, everything aligned.
RotateParams call(int64_t B, int64_t S, int64_t H, int64_t D, int64_t R) {
  RotateParams p = {};
  p.B = B;
  p.S = S;
  p.D = D;
  p.count = 1;
  p.tensors[0] = {memory, memory, bshd(S, H, D), bshd(S, H, D), H, false};
  p.lanes = {R / 2, 0, R / 2};
  p.cos = p.sin = {memory, R / 2, 0, 0, 0, 1};
  p.rows.M = S;
  p.dtype = DType::kBFloat16;
  p.table_dtype = DType::kFloat32;
  return p;
}

// Gathered tables with these strides.
void gather(RotateParams& p, const Strides& cos, const Strides& sin) {
  p.rows.gathered = true;
  p.cos = {memory, 0, cos.b, cos.s, cos.h, 1};
  p.sin = {memory, 0, sin.b, sin.s, sin.h, 1};
}

TEST(Quotient, IsExactBelowTwoToThe31) {
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
    const Quotient quotient(divisor);
    std::vector<uint32_t> numbers = {0, 1, 2, divisor - 1, divisor, kEnd - 2, kEnd - 1};
    const uint32_t largest = (kEnd - 1) / divisor * divisor;
    numbers.insert(numbers.end(), {largest, largest - 1});
    for (int i = 0; i < 200; ++i) {
      const uint32_t n = static_cast<uint32_t>(random.below(kEnd));
      numbers.insert(numbers.end(), {n, n / divisor * divisor});
      if (n >= divisor) numbers.push_back(n / divisor * divisor - 1);
    }
    for (const uint32_t n : numbers)
      ASSERT_EQ(quotient.of(n), n / divisor) << n << " / " << divisor;
  }
}

TEST(Quotient, OfNothingIsByOne) { EXPECT_EQ(Quotient().of(12345), 12345u); }

struct VectorCase {
  const char* name;
  void (*change)(RotateParams&);
  int vector;  // of bfloat16
};

void PrintTo(const VectorCase& c, std::ostream* out) { *out << c.name; }

class VectorWidth : public ::testing::TestWithParam<VectorCase> {};

TEST_P(VectorWidth, FitsTheMemory) {
  RotateParams p = call(2, 3, 4, 64, 32);
  GetParam().change(p);
  EXPECT_EQ(make_plan(p, kLargeCache).vector, GetParam().vector);
}

const VectorCase kVectorCases[] = {
    {"Contiguous", [](RotateParams&) {}, 8},
    {"MisalignedInput", [](RotateParams& p) { p.tensors[0].in = memory + 2; }, 1},
    {"HalfAlignedInput", [](RotateParams& p) { p.tensors[0].in = memory + 8; }, 1},
    {"MisalignedOutput", [](RotateParams& p) { p.tensors[0].out = memory + 4; }, 1},
    {"OddInputRowStride", [](RotateParams& p) { p.tensors[0].in_strides.s += 1; }, 1},
    {"OddOutputHeadStride", [](RotateParams& p) { p.tensors[0].out_strides.h += 4; }, 1},
    {"WideInputRowStride", [](RotateParams& p) { p.tensors[0].in_strides.s += 8; }, 8},
    {"OddBatchStride", [](RotateParams& p) { p.tensors[0].in_strides.b += 1; }, 1},
    {"OddBatchStrideOfOneBatch",
     [](RotateParams& p) {
       p.B = 1;
       p.tensors[0].in_strides.b = p.tensors[0].out_strides.b = 13;
     },
     8},
    {"OddTokenStrideOfOneToken",
     [](RotateParams& p) {
       p.S = 1;
       p.tensors[0].in_strides.s = p.tensors[0].out_strides.s = 13;
     },
     8},
    {"OddHeadStrideOfOneHead",
     [](RotateParams& p) {
       p.tensors[0].H = 1;
       p.tensors[0].in_strides.h = p.tensors[0].out_strides.h = 13;
     },
     8},
    {"ExpandedInput", [](RotateParams& p) { p.tensors[0].in_strides.h = 0; }, 8},
    {"StridedLanes", [](RotateParams& p) { p.tensors[0].in_strides.d = 2; }, 1},
    {"StridedOutputLanes", [](RotateParams& p) { p.tensors[0].out_strides.d = 64; }, 1},
    {"OddOffset", [](RotateParams& p) { p.lanes.offset = 4; }, 1},
    {"AlignedOffset", [](RotateParams& p) { p.lanes.offset = 32; }, 8},
    {"ShortHalf", [](RotateParams& p) { p.lanes.P = p.lanes.distance = 12; }, 1},
    {"Blocks", [](RotateParams& p) { p.lanes.distance = 8; }, 8},
    {"ShortBlocks", [](RotateParams& p) { p.lanes.distance = 4; }, 1},
    {"Interleaved", [](RotateParams& p) { p.lanes.distance = 1; }, 8},
    {"InterleavedShort", [](RotateParams& p) { p.lanes = {12, 0, 1}; }, 8},
    {"InterleavedOddSpan", [](RotateParams& p) { p.lanes = {6, 0, 1}; }, 1},
    {"OddHead", [](RotateParams& p) { p.D = 60; }, 1},
    {"OddHeadInPlace",
     [](RotateParams& p) {
       p.D = 60;
       p.in_place = true;
     },
     8},
    {"ScatteredOutput",
     [](RotateParams& p) {
       p.tensors[0].scattered = true;
       p.tensors[0].out_strides = {0, 256, 64, 1};
     },
     8},
    {"ScatteredOutputOfOneTokenWithOddRows",
     [](RotateParams& p) {
       p.S = 1;
       p.tensors[0].scattered = true;
       p.tensors[0].out_strides = {0, 257, 64, 1};
     },
     1},
    {"MisalignedKey",
     [](RotateParams& p) {
       p.count = 2;
       p.tensors[1] = p.tensors[0];
       p.tensors[1].in = memory + 2;
     },
     1},
    {"MisalignedKeyWithoutHeads",
     [](RotateParams& p) {
       p.count = 2;
       p.tensors[1] = p.tensors[0];
       p.tensors[1].in = memory + 2;
       p.tensors[1].H = 0;
     },
     8},
};

INSTANTIATE_TEST_SUITE_P(Memory, VectorWidth, ::testing::ValuesIn(kVectorCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(VectorWidthOfType, IsSixteenBytes) {
  for (const auto& [dtype, lanes] : {std::pair{DType::kFloat16, 8},
                                     {DType::kBFloat16, 8},
                                     {DType::kFloat32, 4},
                                     {DType::kFloat64, 2}}) {
    RotateParams p = call(1, 2, 3, 64, 64);
    p.dtype = dtype;
    EXPECT_EQ(make_plan(p, kLargeCache).vector, lanes);
  }
}

TEST(VectorTables, FitTheirMemory) {
  const auto fits = [](auto change) {
    RotateParams p = call(2, 3, 4, 64, 32);
    change(p);
    return make_plan(p, kLargeCache).vector_tables;
  };
  EXPECT_TRUE(fits([](RotateParams&) {}));
  EXPECT_TRUE(fits([](RotateParams& p) { p.cos.m = 2 * p.cos.m; })) << "half of a joint table";
  EXPECT_TRUE(fits([](RotateParams& p) { p.cos = {memory, 0, 0, 16, 0, 1}; })) << "per token";
  EXPECT_FALSE(fits([](RotateParams& p) { p.cos.data = memory + 4; }));
  EXPECT_FALSE(fits([](RotateParams& p) { p.sin.data = memory + 8; }));
  EXPECT_FALSE(fits([](RotateParams& p) { p.sin.m += 1; }));
  EXPECT_FALSE(fits([](RotateParams& p) { p.sin.j = 2; })) << "of a complex table";
  EXPECT_FALSE(fits([](RotateParams& p) { p.cos = {memory, 0, 0, 16, 2, 1}; })) << "per head";
}

TEST(Arrangement, IsAdjacentForInterleavedVectors) {
  RotateParams p = call(1, 1, 2, 64, 64);
  EXPECT_EQ(make_plan(p, kLargeCache).arrangement, Arrangement::kPair);
  p.lanes.distance = 1;
  EXPECT_EQ(make_plan(p, kLargeCache).arrangement, Arrangement::kAdjacent);
  p.tensors[0].in = memory + 2;
  EXPECT_EQ(make_plan(p, kLargeCache).arrangement, Arrangement::kPair) << "of single lanes";
}

TEST(PlanOfRows, LooksUpOnlyWhatIsInMemory) {
  const auto rows = [](auto change) {
    RotateParams p = call(2, 3, 4, 64, 64);
    change(p);
    return make_plan(p, kLargeCache).rows;
  };
  const IndexParams numbers = {memory, true};
  EXPECT_EQ(rows([](RotateParams&) {}), Rows::kLinear);
  EXPECT_EQ(rows([](RotateParams& p) { p.rows.offset = 7; }), Rows::kLinear);
  EXPECT_EQ(rows([](RotateParams& p) { p.rows.gathered = true; }), Rows::kLinear);
  EXPECT_EQ(rows([](RotateParams& p) { p.sin.m += 8; }), Rows::kLookup) << "no step beside cos";
  EXPECT_EQ(rows([](RotateParams& p) { p.sin.b += 8; }), Rows::kLookup);
  EXPECT_EQ(rows([](RotateParams& p) { p.sin.s += 8; }), Rows::kLookup);
  EXPECT_EQ(rows([](RotateParams& p) { p.sin.h += 8; }), Rows::kLookup);
  EXPECT_EQ(rows([&](RotateParams& p) { p.rows.positions = numbers; }), Rows::kLookup);
  EXPECT_EQ(rows([&](RotateParams& p) { p.rows.offsets = numbers; }), Rows::kLookup);
  EXPECT_EQ(rows([&](RotateParams& p) { p.rows.cu_seqlens = numbers; }), Rows::kLookup);
  EXPECT_EQ(rows([&](RotateParams& p) { p.rows.out_rows = numbers; }), Rows::kLookup);
}

TEST(PlanOfRows, KnowsWhetherTheAxesOfAThreadDiffer) {
  const auto rows = [](int64_t distance, int64_t first_of_second_axis, int64_t offset = 0) {
    RotateParams p = call(2, 3, 4, 128, 64);
    int64_t axes[32];
    for (int64_t j = 0; j < 32; ++j) axes[j] = j >= first_of_second_axis;
    p.rows.positions = {memory, true};
    p.axes = axes;
    p.lanes.distance = distance;
    p.lanes.offset = offset;
    return make_plan(p, kLargeCache).rows;
  };
  EXPECT_EQ(rows(32, 8), Rows::kSections) << "eight pairs in each two vectors";
  EXPECT_EQ(rows(32, 12), Rows::kAxes);
  EXPECT_EQ(rows(32, 32), Rows::kSections) << "one axis";
  EXPECT_EQ(rows(1, 12), Rows::kSections) << "four whole pairs in a vector";
  EXPECT_EQ(rows(1, 10), Rows::kAxes);
  EXPECT_EQ(rows(32, 11, 1), Rows::kSections) << "single lanes hold a pair";
}

TEST(Plan, GivesAThreadOneVectorOfWholePairsUnlessARowIsSharedByTwo) {
  int64_t axes[32] = {};
  const auto units = [&](int64_t distance, bool positions, const int64_t* pair_axes = nullptr) {
    RotateParams p = call(2, 3, 4, 64, 64);
    p.lanes.distance = distance;
    if (positions) p.rows.positions = {memory, true};
    p.axes = pair_axes;
    return make_plan(p, kLargeCache).units;
  };
  EXPECT_EQ(units(32, false), 4) << "two vectors of eight lanes";
  EXPECT_EQ(units(32, true), 4);
  EXPECT_EQ(units(32, true, axes), 4);
  EXPECT_EQ(units(1, false), 8);
  EXPECT_EQ(units(1, true), 4);
  EXPECT_EQ(units(1, true, axes), 8) << "one axis";
  axes[1] = 1;
  EXPECT_EQ(units(1, true, axes), 4);
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

TEST_P(TableBytes, CountWhatIsReadOnce) {
  RotateParams p = params();
  EXPECT_EQ(table_bytes(p), GetParam().rows * 2 * 32 * 4);
  p.table_dtype = DType::kBFloat16;
  EXPECT_EQ(table_bytes(p), GetParam().rows * 2 * 32 * 2);
}

TEST_P(TableBytes, AreKeptUpToAShareOfTheCache) {
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

TEST(Plan, StreamsLanesBesideHeavyTables) {
  const auto streams = [](int64_t H, auto change) {
    RotateParams p = call(2, 100, H, 64, 64);  // 128 bytes of lanes, 256 of cos and sin in a row
    change(p);
    return make_plan(p, kSmallCache).streams;
  };
  const auto as_it_is = [](RotateParams&) {};
  EXPECT_FALSE(streams(10, as_it_is)) << "100 rows beside 2000 heads: a tenth";
  EXPECT_TRUE(streams(9, as_it_is));
  EXPECT_FALSE(streams(5, [](RotateParams& p) { p.dtype = DType::kFloat32; }));
  EXPECT_FALSE(streams(5, [](RotateParams& p) {
    p.count = 2;
    p.tensors[1] = p.tensors[0];
  })) << "as many heads of k";
}

TEST(Plan, KeepsLanesThatFitInTheCache) {
  const RotateParams p = call(2, 100, 5, 64, 64);
  constexpr int64_t kLaneBytes = 2 * 100 * 5 * 64 * 2;
  EXPECT_TRUE(make_plan(p, {kLaneBytes - 1, 132}).streams);
  EXPECT_FALSE(make_plan(p, {kLaneBytes, 132}).streams);
}

TEST(Plan, GivesBlocksWholeHeads) {
  const auto threads = [](int64_t S, int64_t D, int64_t distance = 0) {
    RotateParams p = call(1, S, 32, D, D);
    if (distance > 0) p.lanes.distance = distance;
    return make_plan(p, kLargeCache).threads;
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
  void (*change)(RotateParams&);  // of 32 heads of 128 lanes: one token more than run at once
  int bytes;
  int shortest;  // that an experiment may have
};

void PrintTo(const VectorBytesCase& c, std::ostream* out) { *out << c.name; }

class VectorBytes : public ::testing::TestWithParam<VectorBytesCase> {};

TEST_P(VectorBytes, FollowShapeAndStrides) {
  RotateParams p = call(1, 793, 32, 128, 128);
  p.rows.M = 4096;
  GetParam().change(p);
  for (const DeviceFacts& device : {kSmallCache, kLargeCache}) {
    const auto bytes = [&](int override) {
      return make_plan(p, device, {.vector = override}).vector * size_of(p.dtype);
    };
    EXPECT_EQ(bytes(-1), GetParam().bytes);
    for (const auto& [override, instance] :
         {std::pair{0, 4}, {3, 4}, {4, 4}, {7, 4}, {8, 8}, {12, 8}, {15, 8}, {16, 16}, {99, 16}})
      EXPECT_EQ(bytes(override), std::max(instance, GetParam().shortest)) << override;
  }
}

// 64 of every 256 bytes, of four times the tokens.
void in_pieces(RotateParams& p) {
  p.S *= 4;
  p.lanes.P = p.lanes.distance = 16;
  p.in_place = true;
}

void set_strides(TensorParams& t, const Strides& strides) {
  t.in_strides = t.out_strides = strides;
}

// Heads of 32 lanes, so that all of a head is a piece.
void in_short_heads(RotateParams& p, const Strides& strides) {
  in_pieces(p);
  p.D = 32;
  set_strides(p.tensors[0], strides);
}

// Two tensors, the heads of one of them, `dense`, as close as if they had no gaps.
void in_pieces_of_one(RotateParams& p, int dense) {
  in_pieces(p);
  p.count = 2;
  p.tensors[1] = p.tensors[0];
  set_strides(p.tensors[dense], bshd(p.S, 32, 32));
}

constexpr int64_t kPieces = 4 * 793;  // tokens

const VectorBytesCase kVectorBytesCases[] = {
    {"Large", [](RotateParams&) {}, 8, 4},
    {"AllAtOnce", [](RotateParams& p) { p.S = 792; }, 16, 4},
    {"Float16", [](RotateParams& p) { p.dtype = DType::kFloat16; }, 8, 4},
    {"Float32", [](RotateParams& p) { p.dtype = DType::kFloat32; }, 16, 16},
    {"Interleaved", [](RotateParams& p) { p.lanes.distance = 1; }, 16, 8},
    {"Blocks", [](RotateParams& p) { p.lanes.distance = 32; }, 16, 16},
    {"Copies", [](RotateParams& p) { p.lanes.P = p.lanes.distance = 32; }, 16, 16},
    {"LookUps", [](RotateParams& p) { p.rows.positions = {memory, true}; }, 16, 16},
    {"PerHead", [](RotateParams& p) { p.per_head = true; }, 16, 16},
    {"Float64Entries", [](RotateParams& p) { p.table_dtype = DType::kFloat64; }, 8, 4},
    {"ShortEntries", [](RotateParams& p) { p.table_dtype = DType::kBFloat16; }, 8, 4},
    {"Streams", [](RotateParams& p) { p.S = 1 << 16, p.tensors[0].H = 1; }, 8, 4},
    {"SingleEntries", [](RotateParams& p) { p.cos.j = p.sin.j = 2; }, 16, 16},
    {"Pieces", in_pieces, 4, 4},
    {"PiecesAtOnce", [](RotateParams& p) { in_pieces(p), p.S -= 4; }, 16, 4},
    {"PiecesAtTheEnd", [](RotateParams& p) { in_pieces(p), p.lanes.offset = 96; }, 4, 4},
    {"PiecesOfFloat32", [](RotateParams& p) { in_pieces(p), p.dtype = DType::kFloat32; }, 16, 16},
    {"LongPieces", [](RotateParams& p) { in_pieces(p), p.lanes.P = p.lanes.distance = 24; }, 8, 4},
    {"InterleavedPieces", [](RotateParams& p) { in_pieces(p), p.lanes.distance = 1; }, 8, 8},
    {"InterleavedPiecesAtOnce",
     [](RotateParams& p) { in_pieces(p), p.S -= 4, p.lanes.distance = 1; }, 16, 8},
    {"LongInterleavedPieces",
     [](RotateParams& p) { in_pieces(p), p.lanes.P = 20, p.lanes.distance = 1; }, 16, 8},
    {"PiecesOfHeadsApart",
     [](RotateParams& p) {
       in_pieces(p);
       set_strides(p.tensors[0], bhsd(p.S, 32, 128));
     },
     4, 4},
    {"PiecesOfTheSecondAlone", [](RotateParams& p) { in_pieces_of_one(p, 0), p.tensors[0].H = 0; },
     4, 4},
    {"PiecesOfTheFirst", [](RotateParams& p) { in_pieces_of_one(p, 1); }, 4, 4},
    {"HeadsApart", [](RotateParams& p) { in_short_heads(p, bshd(kPieces, 32, 64)); }, 4, 4},
    {"HeadsLessApart", [](RotateParams& p) { in_short_heads(p, bshd(kPieces, 32, 56)); }, 8, 4},
    {"HeadsSideBySide", [](RotateParams& p) { in_short_heads(p, bshd(kPieces, 32, 32)); }, 8, 4},
    {"TokensSideBySide", [](RotateParams& p) { in_short_heads(p, bhsd(kPieces, 32, 32)); }, 8, 4},
    {"HeadsApartOutOfPlace",
     [](RotateParams& p) {
       in_short_heads(p, bshd(kPieces, 32, 64));
       p.in_place = false;
     },
     8, 4},
};

INSTANTIATE_TEST_SUITE_P(Of, VectorBytes, ::testing::ValuesIn(kVectorBytesCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Plan, TakesSizesWhoseProductDoesNotFit) {
  constexpr int64_t kHuge = int64_t{1} << 40;
  RotateParams p = call(1, 1, 1, 64, 64);
  p.B = p.S = p.tensors[0].H = kHuge;
  const Plan plan = make_plan(p, kLargeCache);
  EXPECT_EQ(plan.threads, 128);
  EXPECT_FALSE(plan.streams);
}

TEST(Plan, KnowsHeadsWithTheirOwnRows) {
  RotateParams p = call(2, 3, 4, 64, 64);
  EXPECT_EQ(make_plan(p, kLargeCache).rows, Rows::kLinear);
  p.per_head = true;
  EXPECT_EQ(make_plan(p, kLargeCache).rows, Rows::kPerHead);
  p.cos.j = 2;
  EXPECT_EQ(make_plan(p, kLargeCache).rows, Rows::kLinear) << "one entry at a time";
  p.rows.out_rows = {memory, true};
  EXPECT_EQ(make_plan(p, kLargeCache).rows, Rows::kLookup);
}

TEST(Plan, IsPlainWhereAllLanesRotateInOneSpan) {
  const auto plain = [](int64_t R, int64_t distance, bool in_place) {
    RotateParams p = call(2, 3, 4, 64, R);
    p.lanes.distance = distance;
    p.in_place = in_place;
    return make_plan(p, kLargeCache).plain;
  };
  EXPECT_TRUE(plain(64, 32, false));
  EXPECT_TRUE(plain(64, 1, false));
  EXPECT_FALSE(plain(64, 16, false)) << "two blocks";
  EXPECT_FALSE(plain(32, 16, false)) << "threads that copy";
  EXPECT_TRUE(plain(32, 16, true));
  EXPECT_FALSE(plain(32, 8, true));
}

struct NeighbourCase {
  const char* name;
  void (*change)(RotateParams&);  // of 5 heads and 2 in a packed tensor [2, 3, 9, 64]
  bool joined;
};

void PrintTo(const NeighbourCase& c, std::ostream* out) { *out << c.name; }

class Neighbours : public ::testing::TestWithParam<NeighbourCase> {
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

TEST_P(Neighbours, AreOneTensor) {
  RotateParams p = packed();
  GetParam().change(p);
  EXPECT_EQ(are_neighbours(p), GetParam().joined);
  if (!GetParam().joined) return;
  const RotateParams one = joined(p);
  EXPECT_EQ(one.count, 1);
  EXPECT_EQ(one.tensors[0].H, p.tensors[0].H + p.tensors[1].H);
  EXPECT_EQ(one.tensors[0].in, p.tensors[0].in);
}

constexpr Strides kElsewhere = {3 * 7 * 64, 7 * 64, 64, 1};
const NeighbourCase kNeighbourCases[] = {
    {"Packed", [](RotateParams&) {}, true},
    {"OneToken",
     [](RotateParams& p) {
       p.B = p.S = 1;  // whose strides say nothing
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
    {"OtherLanes", [](RotateParams& p) { p.tensors[1].in_strides.d = 2; }, false},
    {"OtherOutputs", [](RotateParams& p) { p.tensors[1].out_strides = kElsewhere; }, false},
    {"Scattered", [](RotateParams& p) { p.tensors[1].scattered = true; }, false},
    {"RowsOfHeads", [](RotateParams& p) { p.per_head = true; }, false},
};

INSTANTIATE_TEST_SUITE_P(Are, Neighbours, ::testing::ValuesIn(kNeighbourCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Plan, FollowsOverridesWithinReason) {
  const RotateParams p = call(2, 3, 4, 64, 64);
  EXPECT_EQ(make_plan(p, kLargeCache, {.threads = 64}).threads, 64);
  EXPECT_EQ(make_plan(p, kLargeCache, {.threads = 0}).threads, kWarp);
  EXPECT_EQ(make_plan(p, kLargeCache, {.threads = 4096}).threads, kMaxThreads);
  EXPECT_TRUE(make_plan(p, kLargeCache).keeps_tables);
  EXPECT_FALSE(make_plan(p, kLargeCache, {.keep = 0}).keeps_tables);
  EXPECT_FALSE(make_plan(p, kSmallCache).keeps_tables);
  EXPECT_TRUE(make_plan(p, kSmallCache, {.keep = 1}).keeps_tables);
  EXPECT_TRUE(make_plan(p, kSmallCache).streams);
  EXPECT_FALSE(make_plan(p, kSmallCache, {.stream = 0}).streams);
  EXPECT_FALSE(make_plan(p, kLargeCache).streams);
  EXPECT_TRUE(make_plan(p, kLargeCache, {.stream = 1}).streams);
}

TEST(Plan, HasLargerBlocksWhereAllRunAtOnce) {
  const auto threads = [](int64_t S) {
    return make_plan(call(1, S, 8, 128, 128), kLargeCache).threads;  // 64 threads for a token
  };
  EXPECT_EQ(threads(1), 128) << "less than a block for each multiprocessor";
  EXPECT_EQ(threads(2 * 132), 128);
  EXPECT_EQ(threads(3 * 132), 256);
  EXPECT_EQ(threads(24 * 132), 256);
  EXPECT_EQ(threads(25 * 132), 128) << "more than fit";
}

struct OrderCase {
  const char* name;
  int64_t B, S, H;
  Strides strides;
  std::array<Axis, 3> order;
};

void PrintTo(const OrderCase& c, std::ostream* out) { *out << c.name; }

class Order : public ::testing::TestWithParam<OrderCase> {};

TEST_P(Order, FollowsTheTensorsMemory) {
  const OrderCase& c = GetParam();
  RotateParams p = call(c.B, c.S, c.H, 64, 64);
  p.count = 2;
  p.tensors[1] = {memory, memory, c.strides, bshd(c.S, c.H, 64), c.H, false};
  EXPECT_EQ(memory_order(p, p.tensors[1]), c.order) << "of k, whatever the memory of q";
}

const OrderCase kOrderCases[] = {
    {"BSHD", 2, 5, 3, bshd(5, 3, 64), {kHead, kSequence, kBatch}},
    {"BHSD", 2, 5, 3, bhsd(5, 3, 64), {kSequence, kHead, kBatch}},
    {"SBHD", 2, 5, 3, sbhd(2, 3, 64), {kHead, kBatch, kSequence}},
    {"OneHeadLast", 2, 5, 1, {320, 64, 1, 1}, {kSequence, kBatch, kHead}},
    {"OneTokenLast", 4, 1, 8, {512, 7, 64, 1}, {kHead, kBatch, kSequence}},
};

INSTANTIATE_TEST_SUITE_P(Layouts, Order, ::testing::ValuesIn(kOrderCases),
                         [](const auto& info) { return std::string(info.param.name); });

struct HeadCase {
  int64_t D, R, offset;
  bool interleaved;
  int64_t blocks;
  bool in_place;
};

void PrintTo(const HeadCase& c, std::ostream* out) {
  *out << "D=" << c.D << " R=" << c.R << " offset=" << c.offset << " interleaved=" << c.interleaved
       << " blocks=" << c.blocks << " in_place=" << c.in_place;
}

class HeadCoverage : public ::testing::TestWithParam<HeadCase> {
 protected:
  RotateParams params(DType dtype, bool aligned) const {
    const HeadCase& c = GetParam();
    RotateParams p = call(2, 3, 4, c.D, c.R);
    const int64_t row = ceil_divide(c.D, 8) * 8;  // what stops vectors is the head, not its strides
    p.tensors[0].in_strides = p.tensors[0].out_strides = {12 * row, 4 * row, row, 1};
    if (!aligned) p.tensors[0].in = memory + size_of(dtype);
    p.lanes = {c.R / 2, c.offset, c.interleaved ? 1 : c.R / 2 / c.blocks};
    p.dtype = dtype;
    p.in_place = c.in_place;
    return p;
  }

  // The lanes that the plan's units touch: each takes a vector of first members and its partners,
  // or vectors of the span as far apart as there are units; after them come as many as copy vectors
  // outside the span.
  static std::vector<int> touched(const RotateParams& p, const Plan& plan) {
    std::vector<int> count(p.D);
    const auto take = [&](int64_t lane) {
      for (int i = 0; i < plan.vector; ++i) ++count.at(lane + i);
    };
    for (int64_t unit = 0; unit < plan.rotating_units; ++unit) {
      if (plan.arrangement == Arrangement::kPair) {
        take(p.lanes.first(unit * plan.vector));
        take(p.lanes.first(unit * plan.vector) + p.lanes.distance);
      }
    }
    const int each = vectors_of_thread(plan.arrangement, plan.rows);
    const auto take_some = [&](int64_t units, const std::vector<int64_t>& vectors) {
      EXPECT_EQ(units, ceil_divide(static_cast<int64_t>(vectors.size()), each));
      for (int64_t unit = 0; unit < units; ++unit) {
        take(vectors[unit]);
        if (unit + units < static_cast<int64_t>(vectors.size())) take(vectors[unit + units]);
      }
    };
    std::vector<int64_t> inside, outside;
    for (int64_t lane = 0; lane < p.D; lane += plan.vector) {
      const bool rotated = lane >= p.lanes.offset && lane < p.lanes.end();
      if (rotated || !p.in_place) (rotated ? inside : outside).push_back(lane);
    }
    if (plan.arrangement == Arrangement::kAdjacent) take_some(plan.rotating_units, inside);
    take_some(plan.units - plan.rotating_units, outside);
    return count;
  }
};

TEST_P(HeadCoverage, TouchesEveryLaneOnce) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
    for (const auto& [aligned, positions] :
         {std::pair{true, false}, {true, true}, {false, false}}) {
      RotateParams p = params(dtype, aligned);
      if (positions) p.rows.positions = {memory, true};
      for (const int bytes : {4, 8, 16}) {
        const Plan plan = make_plan(p, kLargeCache, {.vector = bytes});
        SCOPED_TRACE(::testing::Message() << "size " << size_of(dtype) << " vector " << plan.vector
                                          << " positions " << positions);
        EXPECT_TRUE(aligned || plan.vector == 1);
        const std::vector<int> count = touched(p, plan);
        for (int64_t lane = 0; lane < p.D; ++lane) {
          const bool rotated = lane >= p.lanes.offset && lane < p.lanes.end();
          ASSERT_EQ(count[lane], rotated || !p.in_place) << "lane " << lane;
        }
      }
    }
  }
}

// The vectors of a thread hold whole pairs and lie in one span.
TEST_P(HeadCoverage, KeepsPairsTogether) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
    for (const int bytes : {4, 8, 16}) {
      const RotateParams p = params(dtype, true);
      const Plan plan = make_plan(p, kLargeCache, {.vector = bytes});
      EXPECT_EQ(plan.threads % kWarp, 0);
      EXPECT_LE(plan.threads, kMaxThreads);
      if (plan.vector == 1) continue;
      EXPECT_EQ(p.lanes.offset % plan.vector, 0);
      if (plan.arrangement == Arrangement::kAdjacent) {
        EXPECT_EQ(plan.vector % 2, 0);
        EXPECT_EQ(p.lanes.distance, 1);
      } else {
        EXPECT_EQ(p.lanes.distance % plan.vector, 0);
      }
    }
  }
}

std::vector<HeadCase> head_cases() {
  std::vector<HeadCase> all;
  for (const int64_t D : {2, 6, 8, 14, 64, 72, 80, 96, 128, 192, 256, 512}) {
    for (const int64_t R : {int64_t{0}, int64_t{2}, D / 4 / 2 * 2, D / 2 / 2 * 2, D - 2, D}) {
      for (const int64_t offset : {int64_t{0}, int64_t{1}, (D - R) / 2, D - R}) {
        if (R > D || offset + R > D) continue;
        for (const bool in_place : {false, true}) {
          all.push_back({D, R, offset, true, 1, in_place});
          for (const int64_t blocks : {1, 2, 3}) {
            if (R / 2 % blocks == 0) all.push_back({D, R, offset, false, blocks, in_place});
          }
        }
      }
    }
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Heads, HeadCoverage, ::testing::ValuesIn(head_cases()));

TEST(Plan, CountsTheHeadsOfBothTensors) {
  RotateParams p = call(2, 3, 5, 64, 64);
  p.tensors[1] = p.tensors[0];
  p.tensors[1].H = 2;
  EXPECT_EQ(total_heads(p), 5);
  p.count = 2;
  EXPECT_EQ(total_heads(p), 7);
}

constexpr Strides kShort = {64, 64, 64, 1};

std::vector<Runs> boxes_of(const RotateParams& p, const Box& whole, int units = 8,
                           int work = kMaxWork) {
  const TensorParams& t = p.tensors[0];
  Plan plan = make_plan(p, kLargeCache, {.work = work});
  plan.units = units;
  std::vector<Runs> boxes;
  for_each_box(walks_of(p, t, plan.rows), {memory_order(p, t), whole}, plan,
               [&](const Runs& runs) { boxes.push_back(runs); });
  return boxes;
}

// Of a contiguous tensor, whose table takes no steps.
std::vector<Runs> boxes_of(const std::array<int64_t, 3>& size, int units) {
  RotateParams p = call(size[kBatch], size[kSequence], size[kHead], 64, 64);
  p.cos.m = p.sin.m = 0;
  return boxes_of(p, {{0, 0, 0}, size}, units);
}

Exact volume(const Box& box) { return Exact{box.size[0]} * box.size[1] * box.size[2]; }

bool meet(const Box& x, const Box& y) {
  for (size_t i = 0; i < 3; ++i) {
    if (x.first[i] + x.size[i] <= y.first[i] || y.first[i] + y.size[i] <= x.first[i]) return false;
  }
  return true;
}

struct WorkCase {
  std::array<int64_t, 3> size;
  int units;
};

void PrintTo(const WorkCase& c, std::ostream* out) {
  *out << c.size[0] << " x " << c.size[1] << " x " << c.size[2] << " of " << c.units << " units";
}

class Boxes : public ::testing::TestWithParam<WorkCase> {};

// Boxes inside the whole that do not meet and are together as large as it hold every index once.
TEST_P(Boxes, HoldEveryIndexOnce) {
  const Box whole = {{0, 0, 0}, GetParam().size};
  const std::vector<Runs> boxes = boxes_of(GetParam().size, GetParam().units);
  ASSERT_LE(boxes.size(), 4096u);
  Exact total = 0;
  for (size_t i = 0; i < boxes.size(); ++i) {
    const Box& box = boxes[i].box;
    for (size_t axis = 0; axis < 3; ++axis) {
      EXPECT_GT(box.size[axis], 0);
      EXPECT_GE(box.first[axis], 0);
      EXPECT_LE(box.first[axis] + box.size[axis], whole.size[axis]);
    }
    EXPECT_LE(volume(box) * GetParam().units, Exact{kMaxWork});
    total += volume(box);
    for (size_t j = 0; j < i; ++j) ASSERT_FALSE(meet(box, boxes[j].box)) << i << " and " << j;
  }
  EXPECT_TRUE(total == volume(whole));
}

TEST_P(Boxes, AreFew) {
  const Box whole = {{0, 0, 0}, GetParam().size};
  const Exact least = (volume(whole) * GetParam().units + kMaxWork - 1) / kMaxWork;
  EXPECT_TRUE(Exact{boxes_of(GetParam().size, GetParam().units).size()} <= 4 * least);
}

constexpr int64_t kHuge = int64_t{1} << 33;
const WorkCase kWorkCases[] = {
    {{1, 1, 1}, 1},
    {{2, 3, 4}, 16},
    {{70001, 3, 1}, 8},
    {{1, 70001, 70001}, 1},
    {{70001, 1, 70001}, 16},
    {{70001, 70001, 8}, 16},
    {{kHuge, 1, 1}, 1},
    {{1, kHuge, 1}, 16},
    {{1, 1, kHuge + 1}, 3},
    {{3, kHuge / 3 + 1, 5}, 2},
    {{1 << 20, 1 << 20, 1}, 1},
    {{kMaxWork, 1, 1}, 1},
    {{kMaxWork + 1, 1, 1}, 1},
    {{1, 1, 1}, kMaxWork},
    {{5, 7, 3}, kMaxWork / 4},
    {{5, 7, 3}, kMaxWork},
};

INSTANTIATE_TEST_SUITE_P(Sizes, Boxes, ::testing::ValuesIn(kWorkCases));

struct StrideCase {
  const char* name;
  void (*change)(RotateParams&, const Strides&);
  int64_t size;  // bytes of what the strides count
};

void PrintTo(const StrideCase& c, std::ostream* out) { *out << c.name; }

class BoxesOfHugeStrides : public ::testing::TestWithParam<StrideCase> {};

// Along an axis whose steps do not fit in int32 a box has one coordinate; along others it is not
// cut.
TEST_P(BoxesOfHugeStrides, HoldOneCoordinate) {
  const int64_t large = (int64_t{1} << 32) / GetParam().size;
  const int64_t fits = INT32_MAX / 7 / GetParam().size;  // also for a run of all heads
  const Box whole = {{0, 0, 0}, {5, 6, 7}};
  for (const auto& [strides, count] : {std::pair{Strides{large, 64, 64, 1}, 5},
                                       {Strides{64, large, 64, 1}, 6},
                                       {Strides{64, 64, large, 1}, 7},
                                       {Strides{large, 64, large, 1}, 35},
                                       {Strides{fits, 64, 64, 1}, 1},
                                       {Strides{64, 64, 64, large}, 1}}) {
    RotateParams p = call(5, 6, 7, 64, 64);
    p.tensors[0].in_strides = p.tensors[0].out_strides = kShort;
    GetParam().change(p, strides);
    const std::vector<Runs> boxes = boxes_of(p, whole);
    EXPECT_EQ(static_cast<int>(boxes.size()), count);
    Exact total = 0;
    for (const auto& [order, box] : boxes) {
      total += volume(box);
      EXPECT_TRUE(box.size[0] == 1 || strides.b < large);
      EXPECT_TRUE(box.size[1] == 1 || strides.s < large);
      EXPECT_TRUE(box.size[2] == 1 || strides.h < large);
    }
    EXPECT_TRUE(total == volume(whole));
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

INSTANTIATE_TEST_SUITE_P(Of, BoxesOfHugeStrides, ::testing::ValuesIn(kStrideCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(StepsOfBoxes, FitInInt32ToTheByte) {
  const auto boxes = [](const Strides& in, const Strides& out) {
    RotateParams p = call(2, 2, 1, 64, 64);
    p.tensors[0].in_strides = in;
    p.tensors[0].out_strides = out;
    return boxes_of(p, {{0, 0, 0}, {2, 2, 1}}).size();
  };
  const Strides near = {64, 32, 0, 1};
  // The last multiple of 4 that fits, and the first that does not.
  for (const int64_t bytes : {int64_t{INT32_MAX} - 3, int64_t{INT32_MAX} + 1}) {
    const size_t count = bytes > INT32_MAX ? 2 : 1;
    EXPECT_EQ(boxes({bytes / 2, 0, 0, 1}, near), count) << bytes;
    for (const int sign : {1, -1})  // a run of two takes back twice its step
      EXPECT_EQ(boxes(near, {0, sign * bytes / 4, 0, 1}), count) << sign * bytes;
  }
  EXPECT_EQ(boxes({-(int64_t{1} << 33), 32, 0, 1}, near), 2u);
}

// Heads after heads, runs after runs: no step is longer than a head, however large the tensor, and
// halves of the slowest axis are as contiguous as the whole.
TEST(BoxesOfHugeTensors, AreFewWhereMemoryIsContiguous) {
  RotateParams p = call(8, 1 << 10, 32, 64, 64);
  const int64_t h = int64_t{1} << 28;
  p.tensors[0].in_strides = p.tensors[0].out_strides = {h << 15, h << 5, h, 1};
  const Box whole = {{0, 0, 0}, {8, 1 << 10, 32}};
  EXPECT_EQ(boxes_of(p, whole).size(), 1u);
  EXPECT_EQ(boxes_of(p, whole, 8, 1 << 19).size(), 4u);
}

// The output of the other memory order: a run of heads takes back more than 32 bits.
TEST(BoxesOfHugeTensors, AreCutAlongRunsThatAreTooLong) {
  RotateParams p = call(1, 6, 8, 64, 64);
  const int64_t h = int64_t{1} << 28;
  p.tensors[0].in_strides = {0, 8 * 64, 64, 1};
  p.tensors[0].out_strides = {0, 64, h, 1};
  const std::vector<Runs> boxes = boxes_of(p, {{0, 0, 0}, {1, 6, 8}});
  ASSERT_EQ(boxes.size(), 2u);
  for (const Runs& runs : boxes) EXPECT_EQ(runs.box.size[kHead], 4);
}

// Whatever the strides: what a place adds to an address is what its coordinates add.
TEST(Steps, LeadToEveryCoordinate) {
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
    const Box whole = {{0, 0, 0}, size};
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
    const Walks walks = walks_of(p, t, make_plan(p, kLargeCache).rows);
    Exact covered = 0;
    for (const Runs& runs : boxes_of(p, whole, 8, 8 + static_cast<int>(random.below(500)))) {
      covered += volume(runs.box);
      const auto fast = static_cast<uint32_t>(runs.size(0));
      const auto middle = static_cast<uint32_t>(runs.size(1));
      for (uint32_t head = 0; head < runs.heads(); ++head) {
        const Place place = {{head, head / fast, head / fast / middle}};
        const uint32_t at[] = {head % fast, head / fast % middle, head / fast / middle};
        for (const Walk& walk : walks) {
          int64_t expected = 0;
          for (size_t i = 0; i < 3; ++i) expected += at[i] * walk[runs.order[i]];
          ASSERT_EQ(Steps(walk, runs).to(place), expected) << "round " << round;
        }
      }
    }
    ASSERT_TRUE(covered == volume(whole)) << "round " << round;
  }
}

TEST(BoxesOfHugeRows, HoldOneTokenWhereNothingIsLookedUp) {
  RotateParams p = call(5, 6, 7, 64, 64);
  p.cos.m = p.sin.m = int64_t{1} << 30;
  EXPECT_EQ(boxes_of(p, {{0, 0, 0}, {5, 6, 7}}).size(), 6u);
  p.rows.positions = {memory, true};
  EXPECT_EQ(boxes_of(p, {{0, 0, 0}, {5, 6, 7}}).size(), 1u);
}

TEST(BoxesOfHugeWork, NeverOverflow) {
  // Sizes whose product exceeds 64 bits; only the first boxes are looked at.
  struct Enough {};
  int count = 0;
  RotateParams p = call(1, 1, 1, 64, 64);
  Plan plan = make_plan(p, kLargeCache);
  plan.units = 16;
  const Walks nowhere = {};
  const Runs whole = {memory_order(p, p.tensors[0]), {{0, 0, 0}, {kHuge, kHuge, kHuge}}};
  const auto look = [&](const Runs& runs) {
    EXPECT_LE(volume(runs.box) * 16, Exact{kMaxWork});
    if (++count == 1000) throw Enough();
  };
  EXPECT_THROW(for_each_box(nowhere, whole, plan, look), Enough);
}

}  // namespace
}  // namespace fused_rope
