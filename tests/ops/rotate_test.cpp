// The libtorch functions: each option reaches its argument of the operator, each form returns the
// tensors it writes.
#include <ATen/core/dispatch/Dispatcher.h>

#include <functional>
#include <map>

#include "testing.h"

namespace fused_rope {
namespace {

using testing::expect_identical;
using testing::OnDevice;
using testing::OnDeviceFor;
using testing::Tensors;

using Named = std::map<std::string, c10::IValue>;

// Calls fused_rope::rotate through the dispatcher; arguments that are not named have the schema's
// defaults.
at::Tensor rotate_by_schema(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                            Named named) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_rope::rotate", "");
  named.insert({{"x", x}, {"cos", cos}, {"sin", sin}});
  torch::jit::Stack stack;
  for (const c10::Argument& argument : op.schema().arguments()) {
    const auto found = named.find(argument.name());
    stack.push_back(found == named.end() ? *argument.default_value() : found->second);
  }
  op.callBoxed(stack);
  return stack.at(0).toTensor();
}

// Sets options, and the arguments that they should become.
struct OptionCase {
  const char* name;
  std::function<void(const Tensors&, RotateOptions&, Named&)> set;
  std::vector<int64_t> table = {32};  // its sizes before P
};

void PrintTo(const OptionCase& c, std::ostream* out) { *out << c.name; }

class EachOption : public OnDeviceFor<OptionCase> {
 protected:
  EachOption() {
    c().set(*this, options, named);
    if (options.layout() == Layout::kTHD) x = x.flatten(0, 1);
  }

  at::Tensor expected() const { return rotate_by_schema(x, cos, sin, named); }

  std::vector<int64_t> table_sizes() const {
    std::vector<int64_t> sizes = c().table;
    sizes.push_back(8);
    return sizes;
  }

  // Sizes that fit every layout of four dimensions, columns that fit every table layout.
  at::Tensor x = randn({4, 4, 4, 24}, at::kBFloat16);
  const std::pair<at::Tensor, at::Tensor> table = tables(table_sizes());
  const at::Tensor cos = table.first, sin = table.second;
  RotateOptions options;
  Named named;
};

TEST_P(EachOption, ReachesTheArgumentOfTheOperator) {
  const at::Tensor before = x.clone();
  expect_identical(rotate(x, cos, sin, options), expected());
  expect_identical(x, before);
  if (named.empty() || options.layout() == Layout::kTHD) return;
  EXPECT_FALSE(at::equal(expected(), rotate(x, cos, sin))) << "the option has no effect";
}

TEST_P(EachOption, IsTheSameForQAndK) {
  const at::Tensor k = x.flip(-1);
  const auto [q_out, k_out] = rotate_qk(x, k, cos, sin, options);
  expect_identical(q_out, expected());
  expect_identical(k_out, rotate(k, cos, sin, options));
}

TEST_P(EachOption, IsTheSameInPlace) {
  const at::Tensor want = expected();
  const at::Tensor q = x.clone(), k = x.clone();
  EXPECT_TRUE(rotate_(q, cos, sin, options).is_same(q));
  expect_identical(q, want);
  q.copy_(x);
  const auto [q_out, k_out] = rotate_qk_(q, k, cos, sin, options);
  EXPECT_TRUE(q_out.is_same(q) && k_out.is_same(k));
  expect_identical(q, want);
  expect_identical(k, want);
}

TEST_P(EachOption, IsTheSameIntoOutputs) {
  const at::Tensor want = expected();
  const at::Tensor q_out = at::full_like(x, NAN), k_out = at::full_like(x, NAN);
  EXPECT_TRUE(rotate_out(q_out, x, cos, sin, options).is_same(q_out));
  expect_identical(q_out, want);
  q_out.fill_(NAN);
  const auto [q, k] = rotate_qk_out(q_out, k_out, x, x, cos, sin, options);
  EXPECT_TRUE(q.is_same(q_out) && k.is_same(k_out));
  expect_identical(q, want);
  expect_identical(k, want);
}

const OptionCase kOptions[] = {
    {"Defaults", [](const Tensors&, RotateOptions&, Named&) {}},
    {"PerTokenTables", [](const Tensors&, RotateOptions&, Named&) {}, {4, 4}},
    {"PerHeadTables", [](const Tensors&, RotateOptions&, Named&) {}, {1, 4, 4}},
    {"LayoutBHSD",
     [](const Tensors&, RotateOptions& o, Named& named) {
       o.layout(Layout::kBHSD);
       named = {{"layout", "bhsd"}};
     }},
    {"LayoutSBHD",
     [](const Tensors&, RotateOptions& o, Named& named) {
       o.layout(Layout::kSBHD);
       named = {{"layout", "sbhd"}};
     }},
    {"LayoutTHD",
     [](const Tensors&, RotateOptions& o, Named& named) {
       o.layout(Layout::kTHD);
       named = {{"layout", "thd"}};
     }},
    {"CuSeqlens",
     [](const Tensors& t, RotateOptions& o, Named& named) {
       const at::Tensor starts = t.integers({0, 3, 3, 14}, at::kInt);
       o.layout(Layout::kTHD).cu_seqlens(starts);
       named = {{"layout", "thd"}, {"cu_seqlens", starts}};
     }},
    {"Positions",
     [](const Tensors& t, RotateOptions& o, Named& named) {
       const at::Tensor positions = t.integers({9, -1, 31, 0});
       o.positions(positions);
       named = {{"positions", positions}};
     }},
    {"Axes",
     [](const Tensors& t, RotateOptions& o, Named& named) {
       const at::Tensor positions = t.integers({9, -1, 31, 0, 1, 2, -1, 30}).view({2, 4});
       const std::vector<int64_t> axes = {0, 0, 1, 1, 0, 1, 0, 1};
       o.positions(positions).axes(axes);
       named = {{"positions", positions}, {"axes", axes}};
     }},
    {"Offset",
     [](const Tensors&, RotateOptions& o, Named& named) {
       o.offset(28);
       named = {{"offset", 28}};
     }},
    {"Offsets",
     [](const Tensors& t, RotateOptions& o, Named& named) {
       const at::Tensor offsets = t.integers({7, 0, 28, 3}, at::kInt);
       o.offsets(offsets);
       named = {{"offsets", offsets}};
     }},
    {"RotaryOffset",
     [](const Tensors&, RotateOptions& o, Named& named) {
       o.rotary_offset(3);
       named = {{"rotary_offset", 3}};
     }},
    {"Interleaved",
     [](const Tensors&, RotateOptions& o, Named& named) {
       o.interleaved(true);
       named = {{"interleaved", true}};
     }},
    {"Blocks",
     [](const Tensors&, RotateOptions& o, Named& named) {
       o.blocks(2);
       named = {{"blocks", 2}};
     }},
    {"Inverse",
     [](const Tensors&, RotateOptions& o, Named& named) {
       o.inverse(true);
       named = {{"inverse", true}};
     }},
    {"ModelPrecision",
     [](const Tensors&, RotateOptions& o, Named& named) {
       o.precision(Precision::kModel);
       named = {{"precision", "model"}};
     }},
    {"TiledTables",
     [](const Tensors&, RotateOptions& o, Named& named) {
       o.table_layout(TableLayout::kTiled);
       named = {{"table_layout", "tiled"}};
     }},
    {"RepeatedTables",
     [](const Tensors&, RotateOptions& o, Named& named) {
       o.table_layout(TableLayout::kRepeated);
       named = {{"table_layout", "repeated"}};
     }},
};
FUSED_ROPE_ON_DEVICES_FOR(EachOption, kOptions);

class Rotate : public OnDevice {};
FUSED_ROPE_ON_DEVICES(Rotate);

TEST_P(Rotate, WritesKToTheRowsOfOutRows) {
  const at::Tensor q = randn({2, 3, 4, 16}), k = randn({2, 3, 2, 16});
  const auto [cos, sin] = tables({3, 8});
  const at::Tensor pages = randn({10, 2, 16}), expected = pages.clone();
  const at::Tensor tokens = rotate(k, cos, sin).flatten(0, 1);
  for (const auto& [row, token] : {std::pair{9, 0}, {0, 2}, {4, 3}, {5, 4}}) {
    expected[row].copy_(tokens[token]);
  }
  const at::Tensor q_out = at::empty_like(q);
  const auto rows = integers({9, -1, 0, 4, 5, -1}).view({2, 3});
  rotate_qk_out(q_out, pages, q, k, cos, sin, RotateOptions().out_rows(rows));
  expect_identical(q_out, rotate(q, cos, sin));
  expect_identical(pages, expected);
}

TEST_P(Rotate, ReadsStridedViewsWithoutACopy) {
  const at::Tensor packed = randn({2, 4, 7, 24}), before = packed.clone();
  const auto [cos, sin] = tables({4, 8});
  const at::Tensor q = packed.slice(2, 1, 4).slice(3, 4, 22),
                   k = packed.slice(2, 5, 7).slice(3, 4, 22);
  const auto o = RotateOptions().rotary_offset(2);
  const auto [q_out, k_out] = rotate_qk(q, k, cos, sin, o);
  expect_identical(q_out, rotate(q.contiguous(), cos, sin, o));
  expect_identical(k_out, rotate(k.contiguous(), cos, sin, o));
  rotate_qk_(q, k, cos, sin, o);
  expect_identical(q, q_out);
  expect_identical(k, k_out);
  const at::Tensor changed = (packed != before).any(0).any(0).to(at::kCPU);
  EXPECT_EQ(changed.sum().item<int64_t>(), 5 * 16) << "rotated elements of q and k";
}

TEST_P(Rotate, LooksUpNoRowOfATableWithoutColumns) {
  const at::Tensor x = randn({2, 5, 3, 16}), none = randn({3, 0});
  const at::Tensor beyond = integers({0, 1, 2, 3, 99}), axes_beyond = beyond.expand({2, 5});
  const NormOptions norm(1e-6);
  const RotateOptions options[] = {
      RotateOptions().positions(beyond), RotateOptions().offsets(integers({0, 99})),
      RotateOptions().positions(axes_beyond).axes(std::vector<int64_t>())};
  const at::Tensor normalized =
      norm_rotate(x, none.new_empty({5, 0}), none.new_empty({5, 0}), std::nullopt, norm);
  for (const RotateOptions& o : options) {
    expect_identical(rotate(x, none, none, o), x);
    expect_identical(rotate_(x.clone(), none, none, o), x);
    expect_identical(norm_rotate(x, none, none, std::nullopt, norm, o), normalized);
  }
}

class CosSinTable : public OnDevice {
 protected:
  const at::Tensor inv_freq = at::pow(1e4, -at::arange(8, at::kDouble) / 8).to(device());
};
FUSED_ROPE_ON_DEVICES(CosSinTable);

TEST_P(CosSinTable, IsFloat32OnTheDeviceOfTheFrequencies) {
  const auto [cos, sin] = cos_sin_table(inv_freq, 5);
  EXPECT_EQ(cos.device(), device());
  EXPECT_EQ(cos.scalar_type(), at::kFloat);
  EXPECT_EQ(sin.sizes(), at::IntArrayRef({5, 8}));
  EXPECT_TRUE(at::equal(cos[0], at::ones_like(cos[0])) && !sin[0].any().item<bool>());
}

TEST_P(CosSinTable, TakesEveryArgument) {
  const auto [cos, sin] = cos_sin_table(inv_freq, 50, 3, 1.25, at::kDouble, at::Device(at::kCPU));
  EXPECT_TRUE(cos.is_cpu());
  const at::Tensor rows = at::arange(3, 53, at::kDouble).unsqueeze(1);
  const at::Tensor angles = rows * inv_freq.to(at::kCPU);
  EXPECT_TRUE(at::allclose(cos, 1.25 * angles.cos(), 0, 1e-13));
  EXPECT_TRUE(at::allclose(sin, 1.25 * angles.sin(), 0, 1e-13));
}

TEST_P(CosSinTable, RejectsSizesAndDtypesThatAreNoTable) {
  EXPECT_THROW(cos_sin_table(inv_freq, -1), c10::ValueError);
  EXPECT_THROW(cos_sin_table(inv_freq, 1, -1), c10::ValueError);
  EXPECT_THROW(cos_sin_table(inv_freq, 2, int64_t{1} << 31), c10::ValueError);
  EXPECT_THROW(cos_sin_table(inv_freq, INT64_MAX), c10::ValueError);
  EXPECT_THROW(cos_sin_table(inv_freq, 1, INT64_MAX), c10::ValueError);
  EXPECT_THROW(cos_sin_table(inv_freq.view({2, 4}), 1), c10::ValueError);
  EXPECT_THROW(cos_sin_table(inv_freq.to(at::kLong), 1), c10::TypeError);
  EXPECT_THROW(cos_sin_table(inv_freq, 1, 0, 1.0, at::kInt), c10::TypeError);
  EXPECT_NO_THROW(cos_sin_table(inv_freq, 1, int64_t{1} << 31));
}

TEST(CosSinTableOnMeta, HasNoValuesForTheHost) {
  const at::Tensor f = at::empty({8}, at::TensorOptions(at::kMeta).dtype(at::kFloat));
  const at::Device host = at::kCPU;
  EXPECT_THROW(cos_sin_table(f, 4, 0, 1.0, at::kFloat, host), c10::Error);
}

}  // namespace
}  // namespace fused_rope
