#include "testing.h"

namespace fused_rope {
namespace {

using testing::devices;
using testing::expect_rotated;
using testing::expect_same_bits;
using testing::OnDevice;

// One call, described without tensors so that it can be made on any device and in any dtype.
struct Case {
  std::string name;
  Layout layout = Layout::kBSHD;
  int64_t B = 2, S = 5, Hq = 3, Hk = 2, D = 16, P = 8;
  std::vector<int64_t> table = {};  // the table's sizes before P; [M = 32] where empty
  std::vector<int64_t> positions = {}, positions_sizes = {};
  std::vector<int64_t> offsets = {}, cu_seqlens = {}, axes = {};
  RotateOptions options = {};

  std::vector<int64_t> sizes(int64_t H) const {
    switch (layout) {
      case Layout::kBHSD:
        return {B, H, S, D};
      case Layout::kSBHD:
        return {S, B, H, D};
      case Layout::kTHD:
        return {S, H, D};
      default:
        return {B, S, H, D};
    }
  }
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

class Values : public ::testing::TestWithParam<std::tuple<at::Device, Case>> {
 protected:
  Values() {
    at::manual_seed(testing::kSeed);
    RecordProperty("seed", std::to_string(testing::kSeed));
  }

  const Case& c() const { return std::get<1>(GetParam()); }
  at::Device device() const { return std::get<0>(GetParam()); }

  at::Tensor randn(at::IntArrayRef sizes, at::ScalarType dtype) const {
    return at::randn(sizes, at::kDouble).to(device(), dtype);
  }

  RotateOptions options(at::ScalarType index) const {
    RotateOptions o = c().options;
    const auto integers = [&](const std::vector<int64_t>& values) {
      return at::tensor(values, at::kLong).to(device(), index);
    };
    o.layout(c().layout);
    if (!c().positions.empty()) {
      o.positions(integers(c().positions).view(c().positions_sizes));
    }
    if (!c().offsets.empty()) o.offsets(integers(c().offsets));
    if (!c().cu_seqlens.empty()) o.cu_seqlens(integers(c().cu_seqlens));
    if (!c().axes.empty()) o.axes(c().axes);
    return o;
  }

  // Calls f(q, k, cos, sin, options) for element types, table types, index types, directions and
  // precisions.
  template <typename F>
  void for_each_type(F f) const {
    std::vector<int64_t> table = c().table.empty() ? std::vector<int64_t>{32} : c().table;
    table.push_back(c().P);
    for (const auto dtype : {at::kHalf, at::kBFloat16, at::kFloat, at::kDouble}) {
      for (const auto table_dtype : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16}) {
        const bool inverse = table_dtype != at::kFloat;
        for (const Precision precision : {Precision::kFp32, Precision::kModel}) {
          SCOPED_TRACE(::testing::Message() << dtype << " with tables of " << table_dtype
                                            << ", precision " << static_cast<int>(precision));
          const at::Tensor angles = at::randn(table, at::kDouble);
          const auto index = precision == Precision::kFp32 ? at::kInt : at::kLong;
          f(randn(c().sizes(c().Hq), dtype), randn(c().sizes(c().Hk), dtype),
            angles.cos().to(device(), table_dtype), angles.sin().to(device(), table_dtype),
            options(index).precision(precision).inverse(inverse));
        }
      }
    }
  }
};

TEST_P(Values, Rotate) {
  for_each_type([](const at::Tensor& x, const at::Tensor&, const at::Tensor& cos,
                   const at::Tensor& sin, const RotateOptions& o) {
    const at::Tensor before = x.clone();
    expect_rotated(rotate(x, cos, sin, o), x, cos, sin, o);
    expect_same_bits(x, before);
  });
}

// All other forms give the bits of `rotate`.
TEST_P(Values, EveryFormAgrees) {
  for_each_type([](const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                   const at::Tensor& sin, const RotateOptions& o) {
    const bool per_head = cos.dim() == 4;
    const at::Tensor key = per_head ? q.flip(0) : k;  // such tables fit one number of heads
    const at::Tensor q_expected = rotate(q, cos, sin, o), k_expected = rotate(key, cos, sin, o);

    const auto [q_got, k_got] = rotate_qk(q, key, cos, sin, o);
    expect_same_bits(q_got, q_expected);
    expect_same_bits(k_got, k_expected);

    const at::Tensor x = q.clone();
    EXPECT_TRUE(rotate_(x, cos, sin, o).is_same(x));
    expect_same_bits(x, q_expected);

    const at::Tensor q_in_place = q.clone(), k_in_place = key.clone();
    const auto [q_same, k_same] = rotate_qk_(q_in_place, k_in_place, cos, sin, o);
    EXPECT_TRUE(q_same.is_same(q_in_place) && k_same.is_same(k_in_place));
    expect_same_bits(q_in_place, q_expected);
    expect_same_bits(k_in_place, k_expected);

    const at::Tensor q_out = at::full_like(q, NAN), k_out = at::full_like(key, NAN);
    EXPECT_TRUE(rotate_out(q_out, q, cos, sin, o).is_same(q_out));
    expect_same_bits(q_out, q_expected);
    q_out.fill_(NAN);
    rotate_qk_out(q_out, k_out, q, key, cos, sin, o);
    expect_same_bits(q_out, q_expected);
    expect_same_bits(k_out, k_expected);
  });
}

std::vector<Case> cases() {
  const std::vector<int64_t> ten = {3, -1, 31, 0, 7, 7, 12, -1, -1, 30};
  const std::vector<int64_t> two_axes = {3, -1, 31, 0, 7, -1, 12, 5, -1, 30};
  std::vector<Case> all;
  for (const auto& [name, layout] : {std::pair{"BSHD", Layout::kBSHD},
                                     {"BHSD", Layout::kBHSD},
                                     {"SBHD", Layout::kSBHD},
                                     {"THD", Layout::kTHD}}) {
    const Case c = {.name = name, .layout = layout, .B = layout == Layout::kTHD ? 1 : 2};
    const auto add = [&](const std::string& suffix, auto change) {
      all.push_back(c);
      all.back().name += suffix;
      change(all.back());
    };
    add("Half", [](Case&) {});
    add("Interleaved", [](Case& x) { x.options.interleaved(true); });
    add("Blocks", [](Case& x) { x.options.blocks(2); });
    add("Span", [](Case& x) { x.D = 22, x.P = 6, x.options.rotary_offset(5); });
    add("SpanInterleaved", [](Case& x) { x.D = 24, x.options.rotary_offset(8).interleaved(true); });
    add("Offset", [](Case& x) { x.options.offset(27); });
    add("Positions", [](Case& x) {
      x.positions = {3, -1, 31, 0, 7}, x.positions_sizes = {5}, x.options.offset(0);
    });
    add("PositionsOfOneRow", [](Case& x) {
      x.positions = {9, -1, 12, 30, 7}, x.positions_sizes = {1, 5}, x.options.offset(-7);
    });
    add("Axes", [&](Case& x) {
      x.positions = two_axes, x.positions_sizes = {2, 5}, x.axes = {0, 0, 1, 1, 0, 1, 0, 1};
    });
    add("AxesInterleaved", [&](Case& x) {
      x.positions = two_axes, x.positions_sizes = {2, 1, 5}, x.axes = {0, 0, 1, 1, 0, 1, 0, 1};
      x.options.interleaved(true);
    });
    add("PerToken", [](Case& x) { x.table = {x.B, 5}; });
    add("PerTokenOfOneBatch", [](Case& x) { x.table = {1, 5}; });
    add("PerHead", [](Case& x) { x.table = {x.B, 5, 3}; });
    add("OneHead", [](Case& x) { x.Hq = 1, x.Hk = 4; });
    add("NotEvenAVector", [](Case& x) { x.D = 14, x.P = 7, x.S = 3; });
    add("NoRotation", [](Case& x) { x.P = 0; });
    add("NoTokens", [](Case& x) { x.S = 0; });
    add("NoHeads", [](Case& x) { x.Hq = 0; });
    add("EmptyHead", [](Case& x) { x.D = 0, x.P = 0; });
    add("WholeTable", [](Case& x) { x.S = 32; });
    if (layout != Layout::kTHD) {
      add("NoBatch", [](Case& x) { x.B = 0; });
      add("PositionsOfEachBatch", [&](Case& x) { x.positions = ten, x.positions_sizes = {2, 5}; });
      add("Offsets", [](Case& x) { x.offsets = {27, 4}; });
      add("PositionsAndOffsets", [](Case& x) {
        x.positions = {0, -1, 2, -3, 1}, x.positions_sizes = {5}, x.offsets = {29, 4};
      });
      add("AxesOfEachBatch", [&](Case& x) {
        x.positions = ten, x.positions.insert(x.positions.end(), ten.rbegin(), ten.rend());
        x.positions_sizes = {2, 2, 5}, x.axes = {1, 0, 1, 1, 0, 0, 0, 1};
      });
      continue;
    }
    add("Packed", [](Case& x) { x.S = 12, x.cu_seqlens = {0, 4, 4, 9, 10, 10}; });
    add("PackedWithOffsets",
        [](Case& x) { x.S = 8, x.cu_seqlens = {0, 3, 3, 8}, x.offsets = {29, 99, 5}; });
    add("PackedWithPositions", [&](Case& x) {
      x.S = 10, x.cu_seqlens = {0, 3, 7}, x.positions = ten, x.positions_sizes = {10};
      x.positions[8] = x.positions[9] = 12345;  // padding reads nothing
    });
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(
    Cases, Values, ::testing::Combine(::testing::ValuesIn(devices()), ::testing::ValuesIn(cases())),
    [](const auto& info) {
      return testing::device_name(std::get<0>(info.param)) + std::get<1>(info.param).name;
    });

class Rotate : public OnDevice {};
FUSED_ROPE_ON_DEVICES(Rotate);

TEST_P(Rotate, GivesTheSameBitsForEveryMemory) {
  const at::Tensor x = randn({2, 6, 3, 32}, at::kBFloat16);
  const auto [cos, sin] = tables({6, 16});
  for (const bool interleaved : {false, true}) {
    const auto o = RotateOptions().interleaved(interleaved);
    const at::Tensor expected = rotate(x, cos, sin, o);
    const auto like = [&](const at::Tensor& memory) { return memory.copy_(x); };
    const auto empty = [&](at::IntArrayRef sizes) { return at::empty(sizes, x.options()); };
    const std::pair<const char*, at::Tensor> views[] = {
        {"heads before tokens", like(empty({2, 3, 6, 32}).transpose(1, 2))},
        {"tokens before batches", like(empty({6, 2, 3, 32}).transpose(0, 1))},
        {"lanes slowest", like(empty({32, 2, 6, 3}).permute({1, 2, 3, 0}))},
        {"packed qkv", like(empty({2, 6, 9, 32}).slice(2, 3, 6))},
        {"behind nope lanes", like(empty({2, 6, 3, 48}).slice(3, 16, 48))},
        {"misaligned", like(empty({2 * 6 * 3 * 32 + 1}).slice(0, 1).view({2, 6, 3, 32}))},
        {"odd rows", like(empty({2, 6, 3, 33}).slice(3, 0, 32))},
        {"every second lane", like(empty({2, 6, 3, 64}).slice(3, 0, 64, 2))},
    };
    for (const auto& [name, view] : views) {
      SCOPED_TRACE(name);
      ASSERT_TRUE(at::equal(view, x));
      const at::Tensor out = rotate(view, cos, sin, o);
      expect_same_bits(out, expected);
      const at::Tensor reference = at::empty_like(view);
      if (view.is_non_overlapping_and_dense()) {
        EXPECT_EQ(out.strides(), reference.strides());
      } else {
        EXPECT_TRUE(out.is_contiguous());
      }
      rotate_out(view, x, cos, sin, o);
      expect_same_bits(view, expected);
      view.copy_(x);
      rotate_(view, cos, sin, o);
      expect_same_bits(view, expected);
    }
    const at::Tensor expanded = x.slice(2, 0, 1).expand({2, 6, 5, 32});
    expect_same_bits(rotate(expanded, cos, sin, o), rotate(expanded.contiguous(), cos, sin, o));
  }
}

TEST_P(Rotate, LeavesTheMemoryAroundViewsAlone) {
  const at::Tensor packed = randn({2, 4, 7, 24});
  const at::Tensor before = packed.clone();
  const auto [cos, sin] = tables({4, 8});
  const at::Tensor q = packed.slice(2, 1, 4).slice(3, 4, 22),
                   k = packed.slice(2, 5, 7).slice(3, 4, 22);
  rotate_qk_(q, k, cos, sin, RotateOptions().rotary_offset(2));
  const at::Tensor changed = (packed != before).any(0).any(0).to(at::kCPU);
  for (int64_t h = 0; h < 7; ++h) {
    for (int64_t lane = 0; lane < 24; ++lane) {
      const bool rotated = h != 0 && h != 4 && lane >= 6 && lane < 22;
      EXPECT_EQ(changed[h][lane].item<bool>(), rotated) << "head " << h << " lane " << lane;
    }
  }
}

TEST_P(Rotate, ReadsTablesOfAnyStrides) {
  const at::Tensor x = randn({2, 6, 3, 16});
  const auto [cos, sin] = tables({6, 8});
  const at::Tensor expected = rotate(x, cos, sin);
  const at::Tensor joint = at::cat({cos, sin}, -1);
  expect_same_bits(rotate(x, joint.slice(1, 0, 8), joint.slice(1, 8, 16)), expected);
  const at::Tensor turns = at::view_as_real(at::complex(cos, sin));
  expect_same_bits(rotate(x, turns.select(-1, 0), turns.select(-1, 1)), expected);
  const at::Tensor columns = cos.t().contiguous().t();
  expect_same_bits(rotate(x, columns, sin), expected);
  const at::Tensor one_row = cos.slice(0, 2, 3);
  expect_same_bits(rotate(x, one_row.expand({6, 8}), one_row.expand({6, 8})),
                   rotate(x, one_row.expand({6, 8}).contiguous(), one_row.repeat({6, 1})));
}

TEST_P(Rotate, ReadsIndicesOfAnyStrides) {
  const at::Tensor x = randn({2, 3, 2, 8});
  const auto [cos, sin] = tables({16, 4});
  const at::Tensor positions = integers({5, 0, -1, 15, 2, 7}, at::kInt).view({2, 3});
  const at::Tensor expected = rotate(x, cos, sin, RotateOptions().positions(positions));
  const at::Tensor transposed = positions.t().contiguous().t();
  expect_same_bits(rotate(x, cos, sin, RotateOptions().positions(transposed)), expected);
  const at::Tensor spread =
      at::empty({2, 9}, positions.options()).slice(1, 1, 9, 3).copy_(positions);
  expect_same_bits(rotate(x, cos, sin, RotateOptions().positions(spread)), expected);
  const at::Tensor zero = integers({3}).expand({2});
  expect_same_bits(rotate(x, cos, sin, RotateOptions().offsets(zero)),
                   rotate(x, cos, sin, RotateOptions().offset(3)));
}

TEST_P(Rotate, CopiesBitsThatAreNoNumbers) {
  // Payloads of NaN survive where nothing is rotated: outside the span, at position -1, in padding.
  const at::Tensor bits = at::arange(0x7f80, 0x8000, at::kInt).to(at::kShort).view({1, 4, 1, 32});
  const at::Tensor x = bits.view(at::kBFloat16).to(GetParam());
  const auto [cos, sin] = tables({4, 4});
  const auto o = RotateOptions().rotary_offset(8);
  const at::Tensor out = rotate(x, cos, sin, o);
  expect_same_bits(out.slice(3, 0, 8), x.slice(3, 0, 8));
  expect_same_bits(out.slice(3, 16), x.slice(3, 16));
  const at::Tensor nowhere = at::full({4}, -1, at::kLong).to(GetParam());
  expect_same_bits(rotate(x, cos, sin, RotateOptions(o).positions(nowhere)), x);
  const at::Tensor packed = x.squeeze(0);
  const auto padded = RotateOptions(o).layout(Layout::kTHD).cu_seqlens(integers({0, 2}));
  expect_same_bits(rotate(packed, cos, sin, padded).slice(0, 2), packed.slice(0, 2));
}

TEST_P(Rotate, ModelPrecisionIsEagerPyTorch) {
  for (const auto dtype : {at::kHalf, at::kBFloat16}) {
    const at::Tensor x = randn({2, 9, 4, 64}, dtype);
    const auto [cos, sin] = tables({9, 32}, dtype);
    const auto o = RotateOptions().precision(Precision::kModel);
    const auto wide = [](const at::Tensor& t) { return at::cat({t, t}, -1).unsqueeze(1); };
    const at::Tensor turned = at::cat({-x.slice(3, 32), x.slice(3, 0, 32)}, -1);
    const at::Tensor half = x * wide(cos) + turned * wide(sin);
    expect_same_bits(rotate(x, cos, sin, o), half);
    expect_same_bits(rotate(x, cos.to(at::kFloat), sin.to(at::kFloat), o), half);

    const at::Tensor pairs = x.unflatten(-1, {32, 2});
    const at::Tensor swapped =
        at::stack({-pairs.select(-1, 1), pairs.select(-1, 0)}, -1).flatten(-2);
    const auto repeat = [](const at::Tensor& t) { return t.repeat_interleave(2, -1).unsqueeze(1); };
    expect_same_bits(rotate(x, cos, sin, RotateOptions(o).interleaved(true)),
                     x * repeat(cos) + swapped * repeat(sin));
  }
}

TEST_P(Rotate, FullWidthTablesRotateAsHalfWidthOnes) {
  const at::Tensor q = randn({2, 5, 3, 32}), k = randn({2, 5, 3, 32});
  const std::vector<std::vector<int64_t>> shapes = {{5, 8}, {1, 5, 8}, {2, 5, 3, 8}};
  for (const auto& sizes : shapes) {
    const auto [cos, sin] = tables(sizes);
    const auto o = RotateOptions().rotary_offset(4).interleaved(true);
    const auto expected = rotate_qk(q, k, cos, sin, o);
    const auto nan = [](const at::Tensor& t) { return at::full_like(t, NAN); };  // never read
    const auto tiled = [&](const at::Tensor& t) { return at::cat({t, nan(t)}, -1); };
    const auto repeated = [&](const at::Tensor& t) {
      return at::stack({t, nan(t)}, -1).flatten(-2);
    };
    const auto check = [&](const at::Tensor& c, const at::Tensor& s, TableLayout table_layout) {
      const auto full = RotateOptions(o).table_layout(table_layout);
      const auto [q_out, k_out] = rotate_qk(q, k, c, s, full);
      expect_same_bits(q_out, std::get<0>(expected));
      expect_same_bits(k_out, std::get<1>(expected));
      expect_same_bits(rotate_(q.clone(), c, s, full), q_out);
      expect_same_bits(rotate_out(at::empty_like(q), q, c, s, full), q_out);
    };
    check(tiled(cos), tiled(sin), TableLayout::kTiled);
    check(repeated(cos), repeated(sin), TableLayout::kRepeated);
  }
}

TEST_P(Rotate, InverseRestores) {
  const at::Tensor x = randn({2, 7, 3, 32}, at::kDouble);
  const auto [cos, sin] = tables({7, 16}, at::kDouble);
  const at::Tensor back = rotate(rotate(x, cos, sin), cos, sin, RotateOptions().inverse(true));
  EXPECT_TRUE(at::allclose(back, x, 1e-14, 1e-14));
}

TEST_P(Rotate, ScattersIntoPagedRows) {
  const at::Tensor q = randn({2, 3, 4, 16}), k = randn({2, 3, 2, 16});
  const auto [cos, sin] = tables({3, 8});
  const auto [q_expected, k_expected] = rotate_qk(q, k, cos, sin);
  for (const auto index : {at::kInt, at::kLong}) {
    const at::Tensor pages = randn({10, 2, 20}).slice(2, 0, 16);
    const at::Tensor expected = pages.clone();
    const at::Tensor q_out = at::empty_like(q);
    const auto rows = integers({9, -1, 0, 4, 5, -1}, index).view({2, 3});
    const at::Tensor tokens = k_expected.flatten(0, 1);
    for (const auto& [row, token] : {std::pair{9, 0}, {0, 2}, {4, 3}, {5, 4}}) {
      expected[row].copy_(tokens[token]);
    }
    rotate_qk_out(q_out, pages, q, k, cos, sin, RotateOptions().out_rows(rows));
    expect_same_bits(q_out, q_expected);
    expect_same_bits(pages, expected);
  }
  const at::Tensor packed = k.flatten(0, 1), pages = at::zeros({7, 2, 16}, k.options());
  const at::Tensor order = integers({6, 5, 4, 3, 2, 1});
  const auto o = RotateOptions().layout(Layout::kTHD).positions(integers({0, 1, 2, 0, 1, 2}));
  rotate_out(pages, packed, cos, sin, RotateOptions(o).out_rows(order));
  expect_same_bits(pages.slice(0, 1).flip(0), k_expected.flatten(0, 1));
  expect_same_bits(pages[0], at::zeros({2, 16}));
}

TEST_P(Rotate, WritesIntoASliceOfAJointTensor) {
  const at::Tensor x = randn({2, 4, 3, 16}), joint = randn({2, 9, 3, 24});
  const at::Tensor before = joint.clone();
  const auto [cos, sin] = tables({4, 8});
  rotate_out(joint.slice(1, 5).slice(3, 8), x, cos, sin);
  expect_same_bits(joint.slice(1, 5).slice(3, 8), rotate(x, cos, sin));
  expect_same_bits(joint.slice(1, 0, 5), before.slice(1, 0, 5));
  expect_same_bits(joint.slice(3, 0, 8), before.slice(3, 0, 8));
}

TEST_P(Rotate, CountsVersions) {
  const auto [cos, sin] = tables({4, 8});
  const at::Tensor q = randn({2, 4, 3, 16}), k = randn({2, 4, 3, 16});
  const at::Tensor q_out = at::empty_like(q), k_out = at::empty_like(k);
  const auto versions = [&] {
    return std::vector<int64_t>{q._version(),     k._version(),   q_out._version(),
                                k_out._version(), cos._version(), sin._version()};
  };
  const auto start = versions();
  const auto expect = [&](std::vector<int64_t> changed) {
    auto now = versions();
    for (size_t i = 0; i < now.size(); ++i) EXPECT_EQ(now[i] > start[i], changed[i] > 0) << i;
  };
  rotate_qk(q, k, cos, sin);
  expect({0, 0, 0, 0, 0, 0});
  rotate_out(q_out, q, cos, sin);
  expect({0, 0, 1, 0, 0, 0});
  rotate_qk_out(q_out, k_out, q, k, cos, sin);
  expect({0, 0, 1, 1, 0, 0});
  rotate_(q, cos, sin);
  expect({1, 0, 1, 1, 0, 0});
  rotate_qk_(q, k, cos, sin);
  expect({1, 1, 1, 1, 0, 0});
}

TEST_P(Rotate, WorksInInferenceMode) {
  const auto [cos, sin] = tables({4, 8});
  const at::Tensor x = randn({2, 4, 3, 16});
  const at::Tensor expected = rotate(x, cos, sin);
  const c10::InferenceMode inference;
  const at::Tensor made = rotate(x, cos, sin);
  EXPECT_TRUE(made.is_inference());
  expect_same_bits(made, expected);
  const at::Tensor own = x.clone(), other = x.clone();
  rotate_qk_(own, other, cos, sin);
  expect_same_bits(own, expected);
  rotate_qk_(x, made, cos, sin);  // one tensor of each kind
  expect_same_bits(x, expected);
}

TEST_P(Rotate, RunsWithoutGradientsOnLeaves) {
  const auto [cos, sin] = tables({4, 8});
  const at::Tensor x = randn({2, 4, 3, 16}).requires_grad_();
  const at::Tensor expected = rotate(x.detach(), cos, sin);
  const c10::AutoGradMode no_grad(false);
  EXPECT_FALSE(rotate(x, cos, sin).requires_grad());
  rotate_(x, cos, sin);
  expect_same_bits(x, expected);
}

class Meta : public ::testing::Test {
 protected:
  static at::Tensor meta(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) {
    return at::empty(sizes, at::TensorOptions(at::kMeta).dtype(dtype));
  }
};

TEST_F(Meta, HasShapesAndStridesWithoutMemory) {
  const at::Tensor q = meta({2, 4, 70000, 64}, at::kHalf).transpose(1, 2);
  const at::Tensor k = meta({2, 70000, 6, 64}, at::kHalf).slice(2, 0, 2);
  const at::Tensor cos = meta({70000, 32}), sin = meta({70000, 32});
  const auto [q_out, k_out] = rotate_qk(q, k, cos, sin);
  EXPECT_TRUE(q_out.is_meta());
  EXPECT_EQ(q_out.sizes(), q.sizes());
  EXPECT_EQ(q_out.strides(), q.strides());
  EXPECT_EQ(q_out.scalar_type(), at::kHalf);
  EXPECT_EQ(k_out.sizes(), k.sizes());
  EXPECT_TRUE(k_out.is_contiguous());
  EXPECT_EQ(rotate(q, cos, sin).strides(), q.strides());
  rotate_(q, cos, sin);
  rotate_qk_(q, k, cos, sin);
  rotate_out(q_out, q, cos, sin);
  rotate_qk_out(q_out, k_out, q, k, cos, sin);
}

TEST_F(Meta, ChecksWhatItKnows) {
  const at::Tensor x = meta({2, 5, 3, 16}), cos = meta({5, 8});
  EXPECT_THROW(rotate(x, cos, meta({5, 8}, at::kDouble)), c10::TypeError);
  EXPECT_THROW(rotate(x.squeeze(0)[0], cos, cos), c10::ValueError);
  EXPECT_THROW(rotate(x, cos, at::ones({5, 8})), c10::ValueError);
}

}  // namespace
}  // namespace fused_rope
