#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "fused_rope/kernels/cpu/kernel.h"
#include "reference.h"

namespace fused_rope::kernels {
namespace {

using testing::kFormat;
using testing::Random;
using testing::to_double;
using testing::ulp;

constexpr uint64_t kSeed = 11;

// The memory format of a tensor.
enum class Memory { kBSHD, kBHSD, kSBHD, kGaps, kEverySecondElement, kElementsSlowest };

enum class Tables { kShared, kPerToken, kPerHead };

struct Case {
  std::string name;
  int64_t B = 2, S = 3;
  std::vector<int64_t> heads = {3};
  int64_t D = 8, R = 8, rotary_offset = 0;
  bool interleaved = false;
  int64_t blocks = 1;
  Memory in = Memory::kBSHD, out = Memory::kBSHD;
  bool in_place = false;
  Tables tables = Tables::kShared;
  bool strided_tables = false;
  std::vector<int64_t> positions = {};  // [A, B, S]
  std::vector<int64_t> axes = {};       // [P]
  std::vector<int64_t> offsets = {};    // [B] or [N]
  std::vector<int64_t> cu_seqlens = {};
  std::vector<int64_t> out_rows = {};  // [B, S]
  int64_t offset = 0;
  double table_scale = 1;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

constexpr int64_t kRows = 16;          // M
constexpr int64_t kScatteredRows = 9;  // of an output written through out_rows

// A tensor [B, S, H, D] with guard elements around it that must not change.
template <typename T>
class Tensor {
 public:
  Tensor(int64_t B, int64_t S, int64_t H, int64_t D, Memory memory, Random& random)
      : sizes_{B, S, H, D}, strides_(strides(memory)) {
    int64_t last = 2 * kMargin;
    for (const auto& [size, stride] :
         {std::pair{B, strides_.b}, {S, strides_.s}, {H, strides_.h}, {D, strides_.d}}) {
      last += std::max<int64_t>(size - 1, 0) * stride;
    }
    for (int64_t i = 0; i <= last; ++i) {
      values_.push_back(narrow<T>(static_cast<Wide<T>>(random.normal())));
    }
  }

  T* data() { return values_.data() + kMargin; }
  const Strides& strides() const { return strides_; }
  const std::vector<T>& values() const { return values_; }

  size_t index(int64_t b, int64_t s, int64_t h, int64_t d) const {
    return kMargin + b * strides_.b + s * strides_.s + h * strides_.h + d * strides_.d;
  }

 private:
  static constexpr int64_t kMargin = 5;

  Strides strides(Memory memory) const {
    const auto [B, S, H, D] = sizes_;
    switch (memory) {
      case Memory::kBHSD:
        return {H * S * D, D, S * D, 1};
      case Memory::kSBHD:
        return {H * D, B * H * D, D, 1};
      case Memory::kGaps:
        return {S * (H * (D + 3) + 7) + 1, H * (D + 3) + 7, D + 3, 1};
      case Memory::kEverySecondElement:
        return {2 * S * H * D, 2 * H * D, 2 * D, 2};
      case Memory::kElementsSlowest:
        return {S * H, H, 1, B * S * H};
      default:
        return {S * H * D, H * D, D, 1};
    }
  }

  std::array<int64_t, 4> sizes_;
  Strides strides_;
  std::vector<T> values_;
};

// One call: its tensors and the expected value of each output element.
template <typename T, typename Table>
class Rotation {
 public:
  Rotation(const Case& c, Precision precision, bool inverse, uint64_t seed)
      : c_(c),
        random_(seed),
        pairs_(testing::pair_elements(c.R, c.rotary_offset, c.interleaved, c.blocks)) {
    make_tables();
    p_.B = c.B;
    p_.S = c.S;
    p_.D = c.D;
    p_.count = static_cast<int>(c.heads.size());
    p_.pairing = {P(), c.rotary_offset, c.interleaved ? 1 : P() / c.blocks};
    p_.dtype = testing::kDType<T>;
    p_.table_dtype = testing::kDType<Table>;
    p_.precision = precision;
    p_.inverse = inverse;
    p_.in_place = c.in_place;
    p_.per_head = c.tables == Tables::kPerHead;
    p_.axes = c.axes.empty() ? nullptr : c.axes.data();
    make_rows();
    inputs_.reserve(kMaxTensors);
    outputs_.reserve(kMaxTensors);
    for (size_t i = 0; i < c.heads.size(); ++i) make_tensor(i);
  }

  const RotateParams& params() const { return p_; }

  void rotate(Isa isa) {
    const int64_t tokens = c_.B * c_.S;
    rotate_tokens(p_, 0, tokens / 2, isa);  // in ranges, as threads do
    rotate_tokens(p_, tokens / 2, tokens, isa);
  }

  void check() {
    const std::vector<Tensor<T>> before = outputs_;
    const std::vector<Tensor<T>> inputs = inputs_;
    rotate(Isa::kBaseline);
    for (size_t i = 0; i < outputs_.size(); ++i) {
      if (!c_.in_place) expect_identical(inputs_[i], inputs[i], "an input");
      check_tensor(i, inputs[i], before[i]);
    }
  }

  void expect_same_outputs(const Rotation& other) const {
    for (size_t i = 0; i < outputs_.size(); ++i) {
      expect_identical(outputs_[i], other.outputs_[i], "an output");
    }
  }

 private:
  int64_t P() const { return c_.R / 2; }

  void make_tables() {
    const int64_t step = c_.strided_tables ? 3 : 1;
    TableParams t = {nullptr, 0, 0, 0, 0, step};
    int64_t entries = 0;
    if (c_.tables == Tables::kShared) {
      t.m = (P() + (c_.strided_tables ? 2 : 0)) * step;
      entries = kRows * std::max<int64_t>(t.m, 1);
    } else {
      const int64_t H = c_.tables == Tables::kPerHead ? c_.heads[0] : 1;
      t.h = c_.tables == Tables::kPerHead ? P() * step : 0;
      t.s = H * P() * step;
      t.b = c_.strided_tables ? 0 : c_.S * t.s;  // [1, S, ...] for all batches
      entries = c_.B * c_.S * H * P() * step;
    }
    for (int64_t i = 0; i < entries; ++i) {
      const double angle = 3 * random_.normal();
      cos_.push_back(narrow<Table>(static_cast<Wide<Table>>(c_.table_scale * std::cos(angle))));
      sin_.push_back(narrow<Table>(static_cast<Wide<Table>>(c_.table_scale * std::sin(angle))));
    }
    p_.cos = p_.sin = t;
    p_.cos.data = cos_.data();
    p_.sin.data = sin_.data();
  }

  void make_rows() {
    RowParams& rows = p_.rows;
    const auto index = [](const std::vector<int64_t>& values) {
      return IndexParams{values.empty() ? nullptr : values.data(), true};
    };
    rows.positions = index(c_.positions);
    rows.positions_a = c_.B * c_.S;
    rows.positions_b = c_.S;
    rows.positions_s = 1;
    rows.offsets = index(c_.offsets);
    rows.offsets_stride = 1;
    rows.cu_seqlens = index(c_.cu_seqlens);
    rows.cu_seqlens_stride = 1;
    rows.N = static_cast<int64_t>(c_.cu_seqlens.size()) - 1;
    rows.offset = c_.offset;
    rows.M = kRows;
    rows.gathered = c_.tables != Tables::kShared;
    rows.out_rows = index(c_.out_rows);
    rows.out_rows_b = c_.S;
    rows.out_rows_s = 1;
    rows.out_rows_limit = kScatteredRows;
  }

  void make_tensor(size_t i) {
    const int64_t H = c_.heads[i];
    const bool scattered = !c_.out_rows.empty() && i + 1 == c_.heads.size();
    inputs_.emplace_back(c_.B, c_.S, H, c_.D, c_.in, random_);
    if (c_.in_place) {
      outputs_.push_back(inputs_.back());
    } else if (scattered) {
      outputs_.emplace_back(1, kScatteredRows, H, c_.D, c_.out, random_);
    } else {
      outputs_.emplace_back(c_.B, c_.S, H, c_.D, c_.out, random_);
    }
    p_.tensors[i] = {c_.in_place ? outputs_[i].data() : inputs_[i].data(),
                     outputs_[i].data(),
                     inputs_[i].strides(),
                     outputs_[i].strides(),
                     H,
                     scattered};
  }

  // The table row of a pair of a token, -1 where the pair is copied: the definition, token by
  // token.
  int64_t expected_row(int64_t b, int64_t s, int64_t j) const {
    int64_t sequence = b, start = 0;
    if (!c_.cu_seqlens.empty()) {
      if (s >= c_.cu_seqlens.back()) return -1;
      for (sequence = 0; s >= c_.cu_seqlens[sequence + 1];) ++sequence;
      start = c_.cu_seqlens[sequence];
    }
    int64_t position = s - start;
    if (!c_.positions.empty()) {
      const int64_t axis = c_.axes.empty() ? 0 : c_.axes[j];
      position = c_.positions[(axis * c_.B + b) * c_.S + s];
      if (position == -1) return -1;
    }
    return position + c_.offset + (c_.offsets.empty() ? 0 : c_.offsets[sequence]);
  }

  // cos + i sin of a pair as the kernel uses it: in the compute type, or rounded to T.
  std::complex<double> angle(int64_t b, int64_t s, int64_t h, int64_t j) const {
    const int64_t m = p_.rows.gathered ? 0 : expected_row(b, s, j);
    const TableParams& t = p_.cos;
    const int64_t at = m * t.m + b * t.b + s * t.s + h * t.h + j * t.j;
    const auto read = [&](Table entry) {
      const auto wide = static_cast<Wide<T>>(to_double(entry));
      return p_.precision == Precision::kModel ? to_double(narrow<T>(wide)) : to_double(wide);
    };
    return {read(cos_[at]), p_.inverse ? -read(sin_[at]) : read(sin_[at])};
  }

  double bound(double exact, double norm) const {
    const double unit = ulp(kFormat<Wide<T>>, norm) * std::max(1.0, c_.table_scale);
    if (p_.precision == Precision::kModel && sizeof(T) == 2) {
      return 2 * ulp(kFormat<T>, norm * c_.table_scale);  // 3 roundings of half an ulp
    }
    return ulp(kFormat<T>, std::abs(exact) + 2 * unit) / 2 + 2 * unit;
  }

  void check_tensor(size_t i, const Tensor<T>& in, Tensor<T> expected) {
    const Tensor<T>& got = outputs_[i];
    const bool scattered = p_.tensors[i].scattered;
    for (int64_t b = 0; b < c_.B; ++b) {
      for (int64_t s = 0; s < c_.S; ++s) {
        const int64_t row = scattered ? c_.out_rows[b * c_.S + s] : s;
        if (row == -1) continue;
        for (int64_t h = 0; h < c_.heads[i]; ++h) {
          const auto where = [&](int64_t d) { return got.index(scattered ? 0 : b, row, h, d); };
          for (int64_t d = 0; d < c_.D; ++d) {
            set(expected, where(d), in.values()[in.index(b, s, h, d)]);
          }
          for (int64_t j = 0; j < P(); ++j) {
            if (!p_.rows.gathered && expected_row(b, s, j) == -1) continue;
            const auto [first, second] = pairs_[j];
            const std::complex<double> x(to_double(in.values()[in.index(b, s, h, first)]),
                                         to_double(in.values()[in.index(b, s, h, second)]));
            const std::complex<double> y = x * angle(b, s, h, j);
            const T got_a = got.values()[where(first)], got_b = got.values()[where(second)];
            ASSERT_NEAR(to_double(got_a), y.real(), bound(y.real(), std::abs(x)))
                << "tensor " << i << " b=" << b << " s=" << s << " h=" << h << " element " << first;
            ASSERT_NEAR(to_double(got_b), y.imag(), bound(y.imag(), std::abs(x)))
                << "tensor " << i << " b=" << b << " s=" << s << " h=" << h << " element "
                << second;
            set(expected, where(first), got_a);
            set(expected, where(second), got_b);
          }
        }
      }
    }
    // All other elements are copies of the input, or unchanged.
    expect_identical(got, expected, "an output");
  }

  static void set(Tensor<T>& tensor, size_t at, T value) {
    const_cast<std::vector<T>&>(tensor.values())[at] = value;
  }

  static void expect_identical(const Tensor<T>& got, const Tensor<T>& expected, const char* name) {
    ASSERT_EQ(got.values().size(), expected.values().size());
    EXPECT_EQ(
        std::memcmp(got.values().data(), expected.values().data(), got.values().size() * sizeof(T)),
        0)
        << name << " is not bitwise identical";
  }

  const Case& c_;
  Random random_;
  std::vector<std::pair<int64_t, int64_t>> pairs_;
  std::vector<Table> cos_, sin_;
  std::vector<Tensor<T>> inputs_, outputs_;
  RotateParams p_ = {};
};

class RotateTokens : public ::testing::TestWithParam<Case> {
 protected:
  template <typename T, typename Table>
  void check() {
    for (const bool inverse : {false, true}) {
      for (const Precision precision : {Precision::kFp32, Precision::kModel}) {
        SCOPED_TRACE(::testing::Message()
                     << "seed " << kSeed << ", " << sizeof(T) << " byte elements, " << sizeof(Table)
                     << " byte tables, inverse " << inverse << ", precision "
                     << static_cast<int>(precision));
        Rotation<T, Table> rotation(GetParam(), precision, inverse, kSeed);
        ASSERT_FALSE(find_bad_row(rotation.params(), 0, GetParam().B * GetParam().S).has_value());
        rotation.check();
        for (const Isa isa : testing::vector_isas()) {
          SCOPED_TRACE(::testing::Message() << "instruction set " << static_cast<int>(isa));
          Rotation<T, Table> again(GetParam(), precision, inverse, kSeed);
          again.rotate(isa);
          again.expect_same_outputs(rotation);
        }
      }
    }
  }
};

TEST_P(RotateTokens, Float16) {
  check<Float16, float>();
  check<Float16, Float16>();
}

TEST_P(RotateTokens, BFloat16) {
  check<BFloat16, float>();
  check<BFloat16, BFloat16>();
}

TEST_P(RotateTokens, Float32) { check<float, float>(); }

TEST_P(RotateTokens, Float64) { check<double, double>(); }

std::vector<Case> span_cases() {
  std::vector<Case> cases;
  std::set<std::string> names;
  for (const int64_t D : {2, 6, 8, 14, 80, 96, 128}) {
    for (const int64_t R : {int64_t{0}, int64_t{2}, D / 4 * 2, D}) {
      for (const int64_t offset : {int64_t{0}, (D - R) / 2, D - R}) {
        for (const int64_t blocks : {0, 1, 2, 3}) {  // 0: interleaved
          if (blocks > 1 && (R == 0 || R / 2 % blocks != 0)) continue;
          const std::string name =
              (::testing::Message() << "D" << D << "R" << R << "o" << offset << "n" << blocks)
                  .GetString();
          if (!names.insert(name).second) continue;
          cases.push_back({.name = name,
                           .heads = {2, 1},
                           .D = D,
                           .R = R,
                           .rotary_offset = offset,
                           .interleaved = blocks == 0,
                           .blocks = std::max<int64_t>(blocks, 1)});
        }
      }
    }
  }
  return cases;
}

std::vector<Case> memory_cases() {
  const std::pair<const char*, Memory> kinds[] = {
      {"BSHD", Memory::kBSHD},
      {"BHSD", Memory::kBHSD},
      {"SBHD", Memory::kSBHD},
      {"Gaps", Memory::kGaps},
      {"EverySecondElement", Memory::kEverySecondElement},
      {"ElementsSlowest", Memory::kElementsSlowest}};
  std::vector<Case> cases;
  for (const bool interleaved : {false, true}) {
    const std::string suffix = interleaved ? "Interleaved" : "";
    for (const auto& [in_name, in] : kinds) {
      const Case base = {.name = {},
                         .heads = {3, 2},
                         .D = 22,
                         .R = 12,
                         .rotary_offset = 3,
                         .interleaved = interleaved,
                         .in = in};
      cases.push_back(base);
      cases.back().name = std::string(in_name) + "InPlace" + suffix;
      cases.back().out = in;
      cases.back().in_place = true;
      for (const auto& [out_name, out] : kinds) {
        cases.push_back(base);
        cases.back().name = std::string(in_name) + "To" + out_name + suffix;
        cases.back().out = out;
      }
    }
  }
  // Heads rotated token by token, with more tokens than table rows are held.
  const Case by_head = {
      .name = "NothingRotated", .R = 0, .in = Memory::kBHSD, .out = Memory::kBHSD};
  cases.push_back(by_head);
  cases.push_back(by_head);
  cases.back().name = "ManyTokens";
  cases.back().S = 300;  // rows of 256 are held
  cases.back().D = cases.back().R = 128;
  cases.back().tables = Tables::kPerToken;
  return cases;
}

std::vector<Case> row_cases() {
  const std::vector<int64_t> positions = {7, -1, 15, 0, 3, -1};
  const std::vector<int64_t> three_axes = {0, 1,  2, -1, 4, 5, 6,  7,  -1,
                                           9, 10, 0, 15, 3, 8, -1, -1, -1};
  std::vector<Case> cases = {
      {.name = "Offset", .offset = 13},
      {.name = "Offsets", .offsets = {4, 13}},
      {.name = "Positions", .positions = positions},
      {.name = "PositionsBHSD", .in = Memory::kBHSD, .positions = positions},
      {.name = "PositionsAndNegativeOffset", .positions = {7, -1, 15, 9, 3, -1}, .offset = -3},
      {.name = "PositionsAndOffsets", .positions = {-4, -1, 8, 0, 3, -1}, .offsets = {4, 12}},
      {.name = "Packed", .B = 1, .S = 12, .cu_seqlens = {0, 0, 4, 4, 5, 10, 10}},
      {.name = "PackedWithOffsets",
       .B = 1,
       .S = 8,
       .offsets = {9, 5, 12},
       .cu_seqlens = {0, 4, 4, 7}},
      {.name = "PackedWithPositions",
       .B = 1,
       .S = 6,
       .positions = {3, -1, 5, 2, 9, 99},
       .offsets = {2, 6},
       .cu_seqlens = {0, 2, 5}},
      {.name = "PaddingOnly", .B = 1, .S = 4, .cu_seqlens = {0, 0}},
      {.name = "NoSequences", .B = 1, .S = 4, .cu_seqlens = {0}},
      {.name = "ThreeAxes", .D = 14, .R = 12, .positions = three_axes, .axes = {0, 1, 2, 0, 0, 2}},
      {.name = "ThreeAxesBlocks",
       .D = 14,
       .R = 12,
       .rotary_offset = 1,
       .blocks = 2,
       .positions = three_axes,
       .axes = {2, 1, 0, 1, 1, 2}},
      {.name = "ThreeAxesInterleaved",
       .D = 14,
       .R = 12,
       .rotary_offset = 2,
       .interleaved = true,
       .positions = three_axes,
       .axes = {0, 0, 1, 1, 2, 2}},
      {.name = "PerToken", .tables = Tables::kPerToken},
      {.name = "PerTokenStrided", .tables = Tables::kPerToken, .strided_tables = true},
      {.name = "SharedStrided", .strided_tables = true},
      {.name = "PerHead", .heads = {3, 3}, .tables = Tables::kPerHead},
      {.name = "PerHeadStrided",
       .heads = {3, 3},
       .tables = Tables::kPerHead,
       .strided_tables = true},
      {.name = "ScaledTable", .table_scale = 1.75},
      {.name = "Scattered",
       .heads = {3, 2},
       .out = Memory::kGaps,
       .out_rows = {8, -1, 0, 3, 5, -1}},
      {.name = "ScatteredAlone", .positions = positions, .out_rows = {2, 1, 0, 8, 7, -1}},
      {.name = "NoTokens", .B = 0},
      {.name = "EmptySequence", .S = 0},
      {.name = "NoHeads", .heads = {0, 2}},
      {.name = "NoKeyHeads", .heads = {2, 0}},
      {.name = "MoreKeysThanQueries", .heads = {1, 5}},
  };
  // Each again in place, which must not touch copied elements.
  for (size_t i = 0, n = cases.size(); i < n; ++i) {
    if (!cases[i].out_rows.empty()) continue;
    cases.push_back(cases[i]);
    cases.back().name += "InPlace";
    cases.back().in_place = true;
  }
  return cases;
}

// Every number of pairs up to more than four vectors, between copied elements.
std::vector<Case> width_cases() {
  std::vector<Case> cases;
  for (int64_t P = 1; P <= 70; ++P) {
    for (const int64_t blocks : {0, 1, 2}) {  // 0: interleaved
      if (blocks == 2 && P % 2 != 0) continue;
      for (const bool in_place : {false, true}) {
        cases.push_back({.name = (::testing::Message()
                                  << "P" << P << "n" << blocks << (in_place ? "InPlace" : ""))
                                     .GetString(),
                         .B = 1,
                         .S = 2,
                         .heads = {2},
                         .D = 2 * P + P % 5,
                         .R = 2 * P,
                         .rotary_offset = P % 5 / 2,
                         .interleaved = blocks == 0,
                         .blocks = std::max<int64_t>(blocks, 1),
                         .in_place = in_place});
      }
    }
  }
  return cases;
}

// Heads of models whose widths are no multiples of a vector, and copied elements of every size.
std::vector<Case> model_cases() {
  struct Head {
    int64_t D, R;
  };
  std::vector<Case> cases;
  for (const auto [D, R] :
       {Head{36, 36}, Head{72, 72}, Head{88, 88}, Head{100, 100}, Head{80, 20}, Head{96, 24},
        Head{80, 40}, Head{128, 36}, Head{64, 20}, Head{192, 64}, Head{576, 64}}) {
    for (const int64_t offset : {int64_t{0}, int64_t{1}, (D - R) / 2, D - R}) {
      if (offset > D - R) continue;
      for (const bool interleaved : {false, true}) {
        const std::string name = (::testing::Message() << "D" << D << "R" << R << "o" << offset
                                                       << (interleaved ? "Interleaved" : ""))
                                     .GetString();
        const bool named =
            std::any_of(cases.begin(), cases.end(), [&](const Case& c) { return c.name == name; });
        if (named) continue;
        cases.push_back({.name = name,
                         .heads = {3, 1},
                         .D = D,
                         .R = R,
                         .rotary_offset = offset,
                         .interleaved = interleaved,
                         .in = Memory::kGaps});
      }
    }
  }
  return cases;
}

// Orders of three axes over P pairs.
std::vector<std::pair<const char*, std::vector<int64_t>>> axes_orders(int64_t P) {
  std::vector<int64_t> sections(P), alternate(P), descending(P), last(P);
  for (int64_t j = 0; j < P; ++j) {
    sections[j] = j < P / 4 ? 0 : j < P / 2 + 1 ? 1 : 2;
    alternate[j] = j < P - P / 6 ? j % 3 : 0;
    descending[j] = 2 - j * 3 / P;
    last[j] = j == P - 1 ? 1 : 2;
  }
  return {{"Sections", sections},
          {"Alternate", alternate},
          {"Descending", descending},
          {"LastPair", last}};
}

// Three axes of positions in every order, where none, one or all say that pairs are copied.
std::vector<Case> axes_cases() {
  const std::pair<const char*, std::vector<int64_t>> positions[] = {
      {"Rotated", {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1}},
      {"OneAxisCopied", {0, 1, 2, 3, 4, 5, -1, -1, -1, -1, -1, -1, 12, 13, 14, 15, 0, 1}},
      {"SomeTokensCopied", {-1, 1, -1, 3, -1, 5, -1, 7, 8, -1, 10, 11, -1, 13, -1, 15, -1, 1}},
      {"AllCopied", std::vector<int64_t>(18, -1)}};
  std::vector<Case> cases;
  for (const int64_t P : {12, 65}) {
    for (const auto& [order, axes] : axes_orders(P)) {
      for (const auto& [kind, values] : positions) {
        for (const int64_t blocks : {0, 1, 3}) {  // 0: interleaved
          if (blocks == 3 && P % 3 != 0) continue;
          for (const Memory memory : {Memory::kBSHD, Memory::kBHSD, Memory::kEverySecondElement}) {
            cases.push_back(
                {.name = (::testing::Message() << "P" << P << order << kind << "n" << blocks << "m"
                                               << static_cast<int>(memory))
                             .GetString(),
                 .heads = {2, 1},
                 .D = 2 * P + 3,
                 .R = 2 * P,
                 .rotary_offset = 1,
                 .interleaved = blocks == 0,
                 .blocks = std::max<int64_t>(blocks, 1),
                 .in = memory,
                 .positions = values,
                 .axes = axes});
            cases.push_back(cases.back());
            cases.back().name += "InPlace";
            cases.back().out = memory;
            cases.back().in_place = true;
          }
        }
      }
    }
  }
  for (const auto& [order, axes] : axes_orders(36)) {
    cases.push_back({.name = std::string("Padding") + order,
                     .B = 1,
                     .S = 6,
                     .D = 72,
                     .R = 72,
                     .positions = positions[2].second,
                     .axes = axes,
                     .cu_seqlens = {0, 2, 4}});
  }
  return cases;
}

const auto kName = [](const auto& info) { return info.param.name; };
INSTANTIATE_TEST_SUITE_P(Spans, RotateTokens, ::testing::ValuesIn(span_cases()), kName);
INSTANTIATE_TEST_SUITE_P(Memory, RotateTokens, ::testing::ValuesIn(memory_cases()), kName);
INSTANTIATE_TEST_SUITE_P(Rows, RotateTokens, ::testing::ValuesIn(row_cases()), kName);
INSTANTIATE_TEST_SUITE_P(Widths, RotateTokens, ::testing::ValuesIn(width_cases()), kName);
INSTANTIATE_TEST_SUITE_P(Models, RotateTokens, ::testing::ValuesIn(model_cases()), kName);
INSTANTIATE_TEST_SUITE_P(Axes, RotateTokens, ::testing::ValuesIn(axes_cases()), kName);

// Vectorized loops and strided ones agree.
TEST(RotateTokensResults, AreBitwiseIdenticalForAllStrides) {
  SCOPED_TRACE(kSeed);
  Random random(kSeed);
  constexpr int64_t D = 64;
  std::vector<float> cos(D / 2), sin(D / 2), dense(D), sparse(3 * D), dense_out(D),
      sparse_out(3 * D);
  for (int64_t j = 0; j < D / 2; ++j) {
    cos[j] = static_cast<float>(random.normal());
    sin[j] = static_cast<float>(random.normal());
  }
  for (int64_t d = 0; d < D; ++d) dense[d] = sparse[3 * d] = static_cast<float>(random.normal());
  for (const int64_t distance : {1, 8, 32}) {
    RotateParams p = {};
    p.B = p.S = p.count = 1;
    p.D = D;
    p.pairing = {D / 2, 0, distance};
    p.cos = {cos.data(), 0, 0, 0, 0, 1};
    p.sin = {sin.data(), 0, 0, 0, 0, 1};
    p.rows.M = 1;
    p.dtype = p.table_dtype = DType::kFloat32;
    p.tensors[0] = {dense.data(), dense_out.data(), {D, D, D, 1}, {D, D, D, 1}, 1, false};
    rotate_tokens(p, 0, 1);
    p.tensors[0] = {sparse.data(), sparse_out.data(), {D, D, D, 3}, {D, D, D, 3}, 1, false};
    rotate_tokens(p, 0, 1);
    for (int64_t d = 0; d < D; ++d) ASSERT_EQ(dense_out[d], sparse_out[3 * d]) << "element " << d;
  }
}

// NaNs of the table whose payloads have bits below bfloat16's, which rounding could carry.
TEST(RotateTokensResults, AreNanWhereTheTableIs) {
  constexpr int64_t P = 37, D = 2 * P;
  std::vector<float> table(P);
  for (int64_t j = 0; j < P; ++j) {
    constexpr uint32_t kNans[] = {0x7fffffffu, 0xffffffffu, 0x7f800001u, 0xff80ffffu, 0x7fc0ffffu};
    table[j] = float_of(kNans[j % 5]);
  }
  const std::vector<BFloat16> in(D, narrow<BFloat16>(1.5f));
  std::vector<Isa> isas = testing::vector_isas();
  isas.push_back(Isa::kBaseline);
  for (const int64_t distance : {int64_t{1}, P}) {
    for (const bool inverse : {false, true}) {
      for (const Isa isa : isas) {
        std::vector<BFloat16> out(D);
        RotateParams p = {};
        p.B = p.S = p.count = 1;
        p.D = D;
        p.pairing = {P, 0, distance};
        p.cos = p.sin = {table.data(), 0, 0, 0, 0, 1};
        p.rows.M = 1;
        p.dtype = DType::kBFloat16;
        p.table_dtype = DType::kFloat32;
        p.inverse = inverse;
        p.tensors[0] = {in.data(), out.data(), {D, D, D, 1}, {D, D, D, 1}, 1, false};
        rotate_tokens(p, 0, 1, isa);
        for (int64_t d = 0; d < D; ++d) {
          ASSERT_TRUE(std::isnan(to_double(out[d])))
              << "element " << d << ", distance " << distance << ", instruction set "
              << static_cast<int>(isa);
        }
      }
    }
  }
}

// Elements of random bits, among them NaNs with payloads and negative zeros.
template <typename T>
class CopiedElements : public ::testing::Test {
 protected:
  static constexpr int64_t H = 2, P = 37, D = 2 * P + 5, kOffset = 2;
  static constexpr int64_t kCopiedAxis = 1;

  static int64_t axis(int64_t j) { return j % 3; }

  static std::vector<T> random_bits() {
    Random random(kSeed);
    std::vector<T> values(H * D);
    for (T& value : values) {
      const uint64_t bits = random.bits();
      std::memcpy(&value, &bits, sizeof(T));
      if (random.below(8) == 0) value = narrow<T>(static_cast<Wide<T>>(-0.0));
      if (random.below(8) == 0) std::memset(&value, 0xff, sizeof(T));
    }
    return values;
  }

  // The elements that are copied where kCopiedAxis has position -1.
  static std::vector<int64_t> copied_elements(bool interleaved) {
    std::vector<int64_t> elements;
    for (int64_t d = 0; d < D; ++d) {
      if (d < kOffset || d >= kOffset + 2 * P) elements.push_back(d);
    }
    const auto pairs = testing::pair_elements(2 * P, kOffset, interleaved, 1);
    for (int64_t j = 0; j < P; ++j) {
      if (axis(j) != kCopiedAxis) continue;
      elements.push_back(pairs[j].first);
      elements.push_back(pairs[j].second);
    }
    return elements;
  }

  static std::vector<T> rotated(const std::vector<T>& in, bool interleaved, bool in_place,
                                Precision precision, Isa isa) {
    std::vector<T> out = in_place ? in : std::vector<T>(in.size());
    const std::vector<Wide<T>> table(P, Wide<T>{0.75});
    const std::vector<int64_t> positions = {0, -1, 0};
    std::vector<int64_t> axes(P);
    for (int64_t j = 0; j < P; ++j) axes[j] = axis(j);
    RotateParams p = {};
    p.B = p.S = p.count = 1;
    p.D = D;
    p.pairing = {P, kOffset, interleaved ? 1 : P};
    p.cos = p.sin = {table.data(), P, 0, 0, 0, 1};
    p.axes = axes.data();
    p.rows.M = 1;
    p.rows.positions = {positions.data(), true};
    p.rows.positions_a = 1;
    p.dtype = testing::kDType<T>;
    p.table_dtype = testing::kDType<Wide<T>>;
    p.precision = precision;
    p.in_place = in_place;
    const Strides strides = {H * D, H * D, D, 1};
    p.tensors[0] = {in_place ? out.data() : in.data(), out.data(), strides, strides, H, false};
    rotate_tokens(p, 0, 1, isa);
    return out;
  }
};

using AllTypes = ::testing::Types<Float16, BFloat16, float, double>;
TYPED_TEST_SUITE(CopiedElements, AllTypes);

TYPED_TEST(CopiedElements, KeepEveryBitWithEveryInstructionSet) {
  SCOPED_TRACE(kSeed);
  std::vector<Isa> isas = testing::vector_isas();
  isas.push_back(Isa::kBaseline);
  const std::vector<TypeParam> in = TestFixture::random_bits();
  for (const bool interleaved : {false, true}) {
    const std::vector<int64_t> copied = TestFixture::copied_elements(interleaved);
    for (const bool in_place : {false, true}) {
      for (const Precision precision : {Precision::kFp32, Precision::kModel}) {
        for (const Isa isa : isas) {
          const auto out = TestFixture::rotated(in, interleaved, in_place, precision, isa);
          for (int64_t h = 0; h < TestFixture::H; ++h) {
            for (const int64_t d : copied) {
              const int64_t i = h * TestFixture::D + d;
              ASSERT_EQ(std::memcmp(&out[i], &in[i], sizeof(TypeParam)), 0)
                  << "element " << d << ", interleaved " << interleaved << ", in place " << in_place
                  << ", instruction set " << static_cast<int>(isa);
            }
          }
        }
      }
    }
  }
}

class FindBadRow : public ::testing::Test {
 protected:
  static constexpr int64_t B = 2, S = 3;

  RotateParams params() const {
    RotateParams p = {};
    p.B = B;
    p.S = S;
    p.pairing = {4, 0, 4};
    p.rows.M = 10;
    p.rows.positions_a = B * S;
    p.rows.positions_b = S;
    p.rows.positions_s = 1;
    p.rows.out_rows_b = S;
    p.rows.out_rows_s = 1;
    p.rows.out_rows_limit = 7;
    return p;
  }

  static void expect(const RotateParams& p, int64_t b, int64_t s, int64_t index, bool output) {
    const std::optional<BadRow> bad = find_bad_row(p, 0, B * S);
    ASSERT_TRUE(bad.has_value());
    EXPECT_EQ(bad->b, b);
    EXPECT_EQ(bad->s, s);
    EXPECT_EQ(bad->index, index);
    EXPECT_EQ(bad->output, output);
  }
};

TEST_F(FindBadRow, AcceptsEveryRowOfTheTable) {
  const std::vector<int64_t> positions = {0, 9, -1, 5, 9, 0};
  RotateParams p = params();
  EXPECT_FALSE(find_bad_row(p, 0, B * S).has_value());
  p.rows.positions = {positions.data(), true};
  EXPECT_FALSE(find_bad_row(p, 0, B * S).has_value());
  EXPECT_FALSE(find_bad_row(p, 0, 0).has_value());
}

TEST_F(FindBadRow, ReturnsTheFirstToken) {
  for (const int64_t bad : {int64_t{10}, int64_t{-2}, INT64_MAX, INT64_MIN, int64_t{1} << 32}) {
    const std::vector<int64_t> positions = {0, 9, -1, 5, bad, 11};
    RotateParams p = params();
    p.rows.positions = {positions.data(), true};
    expect(p, 1, 1, bad, false);
    EXPECT_FALSE(find_bad_row(p, 0, 4).has_value()) << "before it";
    EXPECT_EQ(find_bad_row(p, 5, 6)->index, 11) << "after it";
  }
}

TEST_F(FindBadRow, AddsOffsets) {
  const std::vector<int32_t> offsets = {7, 8};
  RotateParams p = params();
  p.rows.offsets = {offsets.data(), false};
  p.rows.offsets_stride = 1;
  expect(p, 1, 2, 10, false);
}

TEST_F(FindBadRow, ChecksOnlyTheAxesThatPairsUse) {
  const std::vector<int64_t> positions = {0, 0, 0, 0, 0, 0, 0, 77, 0, 0, 0, 0, 0, 0, 0, 0, 88, 0};
  const std::vector<int64_t> without_one = {0, 2, 2, 0}, all = {0, 0, 2, 1};
  RotateParams p = params();
  p.rows.positions = {positions.data(), true};
  p.axes = without_one.data();
  expect(p, 1, 1, 88, false);
  p.axes = all.data();
  expect(p, 0, 1, 77, false);
}

TEST_F(FindBadRow, ChecksOutputRows) {
  const std::vector<int64_t> rows = {0, 6, -1, 7, 3, 2}, negative = {0, 6, -2, 7, 3, 2};
  RotateParams p = params();
  p.rows.out_rows = {rows.data(), true};
  expect(p, 1, 0, 7, true);
  p.rows.out_rows = {negative.data(), true};
  expect(p, 0, 2, -2, true);
}

TEST_F(FindBadRow, IgnoresGatheredTables) {
  RotateParams p = params();
  p.rows.gathered = true;
  p.rows.M = 0;
  EXPECT_FALSE(find_bad_row(p, 0, B * S).has_value());
}

TEST_F(FindBadRow, IgnoresPadding) {
  const std::vector<int64_t> starts = {0, 1, 2};
  RotateParams p = params();
  p.B = 1;
  p.S = 6;
  p.rows.M = 1;
  p.rows.cu_seqlens = {starts.data(), true};
  p.rows.cu_seqlens_stride = 1;
  p.rows.N = 2;
  EXPECT_FALSE(find_bad_row(p, 0, 6).has_value());
}

}  // namespace
}  // namespace fused_rope::kernels
