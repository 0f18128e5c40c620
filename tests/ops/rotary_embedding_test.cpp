#include "fused_rope/rotary_embedding.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/serialize.h>

#include <cmath>
#include <limits>
#include <numbers>
#include <sstream>

#include "testing.h"

namespace fused_rope {
namespace {

using testing::expect_identical;
using testing::OnDevice;
using testing::OnDeviceFor;

using Options = RotaryEmbeddingOptions;
using Where = RotaryEmbeddingForwardOptions;

at::Tensor series(int64_t R, double base) {
  return at::pow(base, -at::arange(0, R, 2, at::kDouble) / static_cast<double>(R));
}

RopeScaling llama3() {
  return RopeScaling(RopeType::kLlama3)
      .factor(8)
      .low_freq_factor(1)
      .high_freq_factor(4)
      .original_max_position_embeddings(8192);
}

RopeScaling yarn() {
  return RopeScaling(RopeType::kYarn).factor(8).original_max_position_embeddings(4096);
}

RopeScaling dynamic() {
  return RopeScaling(RopeType::kDynamic).factor(2).original_max_position_embeddings(32);
}

RopeScaling longrope() {
  std::vector<double> short_factor, long_factor;
  for (int j = 0; j < 16; ++j) {
    short_factor.push_back(1 + 0.1 * j);
    long_factor.push_back(2 + 0.3 * j);
  }
  return RopeScaling(RopeType::kLongRope)
      .factor(4)
      .original_max_position_embeddings(32)
      .short_factor(short_factor)
      .long_factor(long_factor);
}

// ROPE_INIT_FUNCTIONS of transformers 5.17 for 32 elements, in float32.
struct Known {
  RopeScaling scaling;
  double base;
  std::vector<double> inv_freq;
  double attention_factor;
};

TEST(Frequencies, AreThoseOfTransformers) {
  const std::vector<Known> all = {
      {RopeScaling(RopeType::kLinear).factor(4),
       1e4,
       {0.25, 0.140585333, 0.079056941, 0.0444569848, 0.0250000004, 0.0140585322, 0.00790569466,
        0.00444569858, 0.00249999994, 0.00140585331, 0.000790569466, 0.000444569858, 0.000250000012,
        0.000140585325, 7.90569466e-05, 4.44569851e-05},
       1},
      {yarn(),
       1e4,
       {1.0, 0.562341332, 0.316227764, 0.177827939, 0.100000001, 0.0562341288, 0.0276699308,
        0.0133370962, 0.00624999963, 0.00281170662, 0.0011858542, 0.000444569858, 0.000125000006,
        7.02926627e-05, 3.95284733e-05, 2.22284925e-05},
       1.2079441541679836},
      {yarn().factor(40).mscale(1).mscale_all_dim(0.5).beta_fast(16).beta_slow(2).truncate(false),
       1e4,
       {1.0, 0.562341332, 0.316227764, 0.177827939, 0.100000001, 0.0562341288, 0.0316227786,
        0.0150961196, 0.00579010462, 0.00173821871, 0.000123952457, 4.44569851e-05, 2.49999994e-05,
        1.40585325e-05, 7.90569447e-06, 4.44569832e-06},
       1.1557219901962608},
      {llama3(),
       5e5,
       {1.0, 0.440366626, 0.193922758, 0.0853971019, 0.0376060307, 0.0165604409, 0.00729266508,
        0.00321144611, 0.000524846022, 7.78465546e-05, 3.42810235e-05, 1.50962178e-05,
        6.64786967e-06, 2.92749974e-06, 1.28917316e-06, 5.6770881e-07},
       1}};
  for (const Known& known : all) {
    const auto [inv_freq, attention_factor] = frequencies(32, known.base, known.scaling);
    EXPECT_TRUE(at::allclose(inv_freq, at::tensor(known.inv_freq, at::kDouble), 1e-6, 0))
        << inv_freq;
    EXPECT_DOUBLE_EQ(attention_factor, known.attention_factor);
  }
}

TEST(Frequencies, AreAGeometricSeriesWithoutScaling) {
  for (const int64_t R : {0, 2, 6, 128}) {
    const auto [inv_freq, attention_factor] = frequencies(R, 5e5);
    EXPECT_EQ(inv_freq.scalar_type(), at::kDouble);
    EXPECT_TRUE(at::allclose(inv_freq, series(R, 5e5), 1e-14, 0));
    EXPECT_EQ(attention_factor, 1);
  }
}

TEST(Frequencies, OfDynamicAndLongRopeDependOnTheLength) {
  const at::Tensor usual = series(32, 1e4);
  const auto at_rows = [](const RopeScaling& scaling, int64_t rows) {
    return std::get<0>(frequencies(32, 1e4, scaling, rows));
  };
  for (const int64_t rows : {0, 1, 32}) {
    EXPECT_TRUE(at::allclose(at_rows(dynamic(), rows), usual, 1e-14, 0));
    EXPECT_TRUE(at::allclose(at_rows(longrope(), rows),
                             usual / at::tensor(*longrope().short_factor(), at::kDouble), 1e-14,
                             0));
  }
  const double stretched = 1e4 * std::pow(2.0 * 96 / 32 - 1, 32.0 / 30);
  EXPECT_TRUE(at::allclose(at_rows(dynamic(), 96), series(32, stretched), 1e-14, 0));
  EXPECT_TRUE(at::allclose(at_rows(longrope(), 33),
                           usual / at::tensor(*longrope().long_factor(), at::kDouble), 1e-14, 0));
  EXPECT_EQ(std::get<1>(frequencies(32, 1e4, dynamic(), 96)), 1);
  EXPECT_DOUBLE_EQ(std::get<1>(frequencies(32, 1e4, longrope(), 1)),
                   std::sqrt(1 + std::log(4.0) / std::log(32.0)));
  EXPECT_EQ(std::get<1>(frequencies(32, 1e4, longrope().attention_factor(1.25))), 1.25);
}

TEST(Frequencies, OfSomeScalingsAreZeroOrRepeat) {
  const auto of = [](const RopeScaling& scaling) {
    return std::get<0>(frequencies(8, 81, scaling));
  };
  const auto is = [](const at::Tensor& got, const std::vector<double>& expected) {
    return at::allclose(got, at::tensor(expected, at::kDouble), 1e-14, 0);
  };
  EXPECT_TRUE(is(of(RopeScaling(RopeType::kProportional).partial_rotary_factor(0.5).factor(2)),
                 {0.5, 1.0 / 6, 0, 0}));
  EXPECT_TRUE(is(of(RopeType::kProportional), {1, 1.0 / 3, 1.0 / 9, 1.0 / 27}));
  EXPECT_TRUE(is(of(RopeType::kHalfTruncated), {1, 1.0 / 81, 0, 0}));
  EXPECT_TRUE(is(of(RopeType::kAxial), {1, 1.0 / 9, 1, 1.0 / 9}));
  for (const RopeType kind : {RopeType::kHalfTruncated, RopeType::kAxial}) {
    EXPECT_THROW(frequencies(6, 1e4, kind), c10::ValueError);
  }
}

// As transformers, except for a frequency exactly at both factors, where it divides 0 by 0.
TEST(Frequencies, OfLlama3StepWhereLowAndHighFactorsMeet) {
  const at::Tensor usual = series(32, 1e4);
  const at::Tensor rotations = 8192 * usual / (2 * std::numbers::pi);
  for (const double fast : {4.0, 2.0}) {
    const RopeScaling scaling = llama3().low_freq_factor(4).high_freq_factor(fast);
    EXPECT_TRUE(at::allclose(std::get<0>(frequencies(32, 1e4, scaling)),
                             at::where(rotations < 4, usual / 8, usual), 1e-14, 0));
  }
  const double once = 8192 / (2 * std::numbers::pi);
  const RopeScaling exact = llama3().low_freq_factor(once).high_freq_factor(once);
  EXPECT_EQ(std::get<0>(frequencies(2, 1e4, exact)).item<double>(), 1);
}

TEST(Frequencies, RefuseNumbersOutOfRange) {
  const auto linear = RopeScaling(RopeType::kLinear);
  const RopeScaling wrong[] = {
      RopeScaling(linear).factor(0),
      RopeScaling(linear).factor(-4),
      RopeScaling(linear).factor(std::numeric_limits<double>::infinity()),
      yarn().original_max_position_embeddings(0),
      yarn().beta_slow(-1),
      yarn().attention_factor(-1),
      longrope().original_max_position_embeddings(1),
      longrope().long_factor(std::vector<double>(16, 0)),
      RopeScaling(RopeType::kProportional).partial_rotary_factor(2),
  };
  for (const RopeScaling& scaling : wrong) {
    EXPECT_THROW(frequencies(32, 1e4, scaling), c10::ValueError);
  }
  for (const double base : {0.0, -1.0, std::nan("")}) {
    EXPECT_THROW(frequencies(32, base), c10::ValueError);
  }
  EXPECT_THROW(frequencies(32, 1, yarn()), c10::ValueError);
  for (const int64_t axis : {-1, 8}) {
    EXPECT_THROW(RotaryEmbedding(Options(16).axes(std::vector<int64_t>(8, axis))), c10::ValueError);
  }
}

TEST(Frequencies, NameTheMissingParameter) {
  EXPECT_THROW(frequencies(3), c10::ValueError);
  EXPECT_THROW(frequencies(-2), c10::ValueError);
  for (const RopeScaling& scaling :
       {RopeScaling(RopeType::kLinear), RopeScaling(RopeType::kYarn).factor(2),
        yarn().factor(std::nullopt), llama3().high_freq_factor(std::nullopt),
        RopeScaling(RopeType::kDynamic).factor(2), dynamic().factor(std::nullopt),
        longrope().factor(std::nullopt), longrope().long_factor(std::nullopt),
        longrope().short_factor(std::vector<double>{1, 2}),
        longrope().original_max_position_embeddings(std::nullopt)}) {
    EXPECT_THROW(frequencies(32, 1e4, scaling), c10::ValueError);
  }
  try {
    frequencies(32, 1e4, llama3().low_freq_factor(std::nullopt));
    FAIL();
  } catch (const c10::ValueError& error) {
    EXPECT_NE(std::string(error.what_without_backtrace()).find("llama3 needs low_freq_factor"),
              std::string::npos);
  }
}

template <typename Base>
class WithModules : public Base {
 protected:
  RotaryEmbedding make(const Options& options) const {
    RotaryEmbedding rope(options);
    rope->to(this->device());
    return rope;
  }
};

class Module : public WithModules<OnDevice> {};
FUSED_ROPE_ON_DEVICES(Module);

struct ScalingCase {
  const char* name;
  RopeScaling (*make)();
};

void PrintTo(const ScalingCase& c, std::ostream* out) { *out << c.name; }

const ScalingCase kScalings[] = {
    {"Default", [] { return RopeScaling(); }}, {"Dynamic", dynamic}, {"LongRope", longrope}};

const ScalingCase kLengthDependentScalings[] = {kScalings[1], kScalings[2]};

class EachScaling : public WithModules<OnDeviceFor<ScalingCase>> {
 protected:
  const RopeScaling scaling = c().make();
};
FUSED_ROPE_ON_DEVICES_FOR(EachScaling, kScalings);

TEST_P(Module, RotatesQAndKByItsTable) {
  const auto [cos, sin] = cos_sin_table(series(64, 1e4), 2048, 0, 1, at::kFloat, device());
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
    const at::Tensor q = randn({2, 8, 17, 64}, dtype), k = randn({2, 2, 17, 64}, dtype);
    RotaryEmbedding rope = make(Options(64).layout(Layout::kBHSD));
    EXPECT_TRUE(at::allclose(rope->cos(), cos, 0, 1e-7));
    for (const int64_t offset : {0, 100}) {
      const auto [q_rotated, k_rotated] = rope(q, k, offset);
      const auto o = RotateOptions().layout(Layout::kBHSD).offset(offset);
      expect_identical(q_rotated, fused_rope::rotate(q, rope->cos(), rope->sin(), o));
      expect_identical(k_rotated, fused_rope::rotate(k, rope->cos(), rope->sin(), o));
      expect_identical(rope->rotate(q, offset), q_rotated);
    }
  }
}

TEST_P(Module, AppliesEveryOption) {
  const at::Tensor q = randn({19, 3, 40});
  const at::Tensor positions = at::randint(0, 30, {2, 19}, at::kLong).to(device());
  const std::vector<int64_t> axes = {0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1};
  const auto options = Options(40)
                           .rotary_dim(24)
                           .rotary_offset(16)
                           .max_seq_len(30)
                           .base(100)
                           .layout(Layout::kTHD)
                           .blocks(2)
                           .axes(axes)
                           .precision(Precision::kModel);
  RotaryEmbedding rope = make(options);
  const at::Tensor twice = series(12, 100).repeat({2});
  const auto [cos, sin] = cos_sin_table(twice, 30, 0, 1, at::kFloat, device());
  EXPECT_TRUE(at::allclose(rope->cos(), cos, 0, 1e-7));
  const auto o = RotateOptions()
                     .layout(Layout::kTHD)
                     .positions(positions)
                     .axes(axes)
                     .rotary_offset(16)
                     .blocks(2)
                     .precision(Precision::kModel);
  expect_identical(rope->rotate(q, Where().positions(positions)),
                   fused_rope::rotate(q, rope->cos(), rope->sin(), o));

  RotaryEmbedding interleaved = make(Options(40).layout(Layout::kTHD).interleaved(true));
  const auto pairs = RotateOptions().layout(Layout::kTHD).interleaved(true);
  expect_identical(interleaved->rotate(q),
                   fused_rope::rotate(q, interleaved->cos(), interleaved->sin(), pairs));
}

TEST_P(Module, UsesOnePositionForAllAxes) {
  const at::Tensor q = randn({2, 5, 3, 8});
  const std::vector<int64_t> axes = {0, 1, 2, 0};
  RotaryEmbedding rope = make(Options(8).axes(axes));
  const at::Tensor positions = integers({4, 9, 2, 0, 7});
  const at::Tensor expected = rope->rotate(q, Where().positions(positions.expand({3, 1, 5})));
  expect_identical(rope->rotate(q, Where().positions(positions)), expected);
  expect_identical(rope->rotate(q, Where().positions(positions.expand({2, 5}))), expected);
  expect_identical(rope->rotate(q),
                   rope->rotate(q, Where().positions(at::arange(5, positions.options()))));
}

TEST_P(Module, AppliesCuSeqlensAndOffsets) {
  const at::Tensor q = randn({30, 2, 8}), starts = integers({0, 10, 30});
  RotaryEmbedding packed = make(Options(8).layout(Layout::kTHD));
  const auto o = RotateOptions().layout(Layout::kTHD).cu_seqlens(starts);
  expect_identical(packed->rotate(q, Where().cu_seqlens(starts)),
                   fused_rope::rotate(q, packed->cos(), packed->sin(), o));

  const at::Tensor step = randn({2, 1, 4, 8}), lengths = integers({17, 90}, at::kInt);
  RotaryEmbedding rope = make(Options(8));
  expect_identical(
      rope->rotate(step, Where().offsets(lengths)),
      fused_rope::rotate(step, rope->cos(), rope->sin(), RotateOptions().offsets(lengths)));
}

TEST_P(Module, ScalesItsTableByTheAttentionFactor) {
  RotaryEmbedding rope = make(Options(32).scaling(yarn()).max_seq_len(50));
  const auto [inv_freq, factor] = frequencies(32, 1e4, yarn());
  const auto [cos, sin] = cos_sin_table(inv_freq, 50, 0, factor, at::kFloat, device());
  expect_identical(rope->cos(), cos);
  expect_identical(rope->sin(), sin);
}

TEST_P(Module, GrowsWhenTheRowsAreKnownOnTheHost) {
  const at::Tensor q = randn({1, 7, 2, 8});
  RotaryEmbedding rope = make(Options(8).max_seq_len(4)), roomy = make(Options(8));
  expect_identical(rope->rotate(q), roomy->rotate(q));
  EXPECT_EQ(rope->cos().size(0), 8);
  expect_identical(rope->rotate(q, 94), roomy->rotate(q, 94));
  EXPECT_EQ(rope->cos().size(0), 101);
  rope->reserve(50);
  EXPECT_EQ(rope->cos().size(0), 101);
  rope->reserve(102);
  EXPECT_EQ(rope->cos().size(0), 202);
  const at::Tensor positions = integers({201, 0, 1, 2, 3, 4, -1});
  expect_identical(rope->rotate(q, Where().positions(positions)),
                   roomy->rotate(q, Where().positions(positions)));
}

// Scalings whose frequencies depend on the length of the call.
class LengthDependentScaling : public EachScaling {
 protected:
  // Expects x rotated by the table for sequences of `rows` tokens.
  void expect_rotated_for(int64_t rows, const at::Tensor& got, const at::Tensor& x,
                          const RotateOptions& where) {
    const auto [inv_freq, scale] = frequencies(32, 1e4, scaling, rows);
    const auto [cos, sin] = cos_sin_table(inv_freq, 200, 0, scale, at::kFloat, device());
    EXPECT_TRUE(at::allclose(got, fused_rope::rotate(x, cos, sin, where), 0, 2e-6));
  }
};
FUSED_ROPE_ON_DEVICES_FOR(LengthDependentScaling, kLengthDependentScalings);

TEST_P(LengthDependentScaling, DependsOnlyOnTheCurrentCall) {
  RotaryEmbedding rope = make(Options(32).scaling(scaling).max_seq_len(4));
  for (const int64_t longest : {9, 31, 32, 100, 9}) {
    const at::Tensor x = randn({2, 7, 3, 32});
    const int64_t offset = longest - 6;
    expect_rotated_for(longest + 1, rope->rotate(x, offset), x, RotateOptions().offset(offset));
    const at::Tensor positions = at::randint(-1, longest, {2, 7}, at::kLong).to(device());
    positions[1][3] = longest;
    const at::Tensor got = rope->rotate(x, Where().positions(positions));
    expect_rotated_for(longest + 1, got, x, RotateOptions().positions(positions));
    const at::Tensor shifted = at::where(positions < 0, positions, positions + 3);
    EXPECT_TRUE(at::allclose(rope->rotate(x, Where(-3).positions(shifted)), got, 0, 2e-6));
    const at::Tensor offsets = integers({3, offset}, at::kInt);
    expect_rotated_for(longest + 1, rope->rotate(x, Where().offsets(offsets)), x,
                       RotateOptions().offsets(offsets));
  }
  const at::Tensor long_text = randn({1, 150, 2, 32});
  expect_rotated_for(150, rope->rotate(long_text), long_text, RotateOptions());
}

TEST_P(LengthDependentScaling, UsesTheLongestPackedSequence) {
  const at::Tensor x = randn({13, 2, 32}), starts = integers({0, 5, 5, 11}, at::kInt);
  const at::Tensor offsets = integers({50, 3, 40});
  const auto where = RotateOptions().layout(Layout::kTHD).cu_seqlens(starts);
  RotaryEmbedding rope = make(Options(32).scaling(scaling).layout(Layout::kTHD));
  expect_rotated_for(6, rope->rotate(x, Where().cu_seqlens(starts)), x, where);
  const at::Tensor got = rope->rotate(x, Where().cu_seqlens(starts).offsets(offsets));
  expect_rotated_for(55, got, x, RotateOptions(where).offsets(offsets));
  expect_identical(got.slice(0, 11), x.slice(0, 11));
  RotaryEmbedding other = make(Options(32).scaling(scaling));
  EXPECT_THROW(other->rotate(randn({2, 5, 1, 32}), Where().cu_seqlens(starts)), c10::ValueError);
}

TEST_P(LengthDependentScaling, UsesTheLargestPositionOfAllAxes) {
  std::vector<int64_t> axes(16);
  for (size_t j = 0; j < axes.size(); ++j) axes[j] = static_cast<int64_t>(j % 3);
  const at::Tensor x = randn({2, 7, 3, 32});
  const at::Tensor positions = at::randint(-1, 99, {3, 2, 7}, at::kLong).to(device());
  positions[2][0][0] = 99;
  RotaryEmbedding rope = make(Options(32).scaling(scaling).axes(axes));
  expect_rotated_for(100, rope->rotate(x, Where().positions(positions)), x,
                     RotateOptions().positions(positions).axes(axes));
}

TEST_P(LengthDependentScaling, RejectsPositionsThatAreNoRow) {
  RotaryEmbedding rope = make(Options(32).scaling(scaling));
  const at::Tensor x = randn({2, 3, 1, 32});
  EXPECT_THROW(rope->rotate(x, Where().positions(at::ones({3}, x.options()))), c10::TypeError);
  EXPECT_THROW(rope->rotate(x, Where().offsets(at::ones({2}, x.options()))), c10::TypeError);
  if (device().is_cuda()) return;
  EXPECT_THROW(rope->rotate(x, Where().positions(integers({0, -3, 1}))), c10::IndexError);
  EXPECT_THROW(rope->rotate(x, Where(-2).positions(integers({0, 3, 1}))), c10::IndexError);
}

TEST_P(LengthDependentScaling, WorksAfterMovesAndClones) {
  const at::Tensor x = randn({1, 7, 2, 32}), positions = at::arange(90, 97).to(device());
  RotaryEmbedding rope(Options(32).scaling(scaling).device(at::kMeta));
  EXPECT_TRUE(rope->cos().is_meta());
  rope->rotate(x.to(at::kMeta), Where().positions(positions.to(at::kMeta)));
  const auto copy = std::dynamic_pointer_cast<RotaryEmbeddingImpl>(rope->clone());
  for (RotaryEmbeddingImpl* module : {rope.get(), copy.get()}) {
    expect_rotated_for(97, module->rotate(x, Where().positions(positions)), x,
                       RotateOptions().positions(positions));
  }
}

TEST(ModuleOnTheHost, RejectsRowsItDoesNotHave) {
  const at::Tensor q = at::randn({1, 1, 2, 8});
  RotaryEmbedding rope(Options(8).max_seq_len(4));
  EXPECT_THROW(rope->rotate(q, Where().positions(at::tensor({4}, at::kLong))), c10::IndexError);
  EXPECT_THROW(rope->rotate(q, -1), c10::ValueError);
  EXPECT_THROW(rope->rotate(at::randn({1, 1, 2, 6})), c10::ValueError);
}

TEST_P(Module, KeepsItsFloat32TableThroughCastsAndSaves) {
  RotaryEmbedding rope = make(Options(16));
  const at::Tensor cos = rope->cos();
  torch::nn::Sequential model(torch::nn::Linear(16, 16));
  model->register_module("rope", rope.ptr());
  model->to(at::kBFloat16);
  model->to(device(), at::kHalf);
  expect_identical(rope->cos(), cos);
  EXPECT_EQ(rope->cos().scalar_type(), at::kFloat);
  EXPECT_EQ(rope->cos().device(), device());
  EXPECT_TRUE(rope->parameters().empty());
  EXPECT_TRUE(rope->buffers().empty());
  std::stringstream stream;
  torch::save(rope, stream);
  RotaryEmbedding other = make(Options(16));
  torch::load(other, stream);
  expect_identical(other->cos(), cos);
}

TEST_P(Module, MovesItsTableToTheDeviceOfQ) {
  RotaryEmbedding rope(Options(16));
  const at::Tensor q = randn({1, 5, 2, 16}), here = rope->rotate(q);
  EXPECT_EQ(rope->cos().device(), device());
  const at::Tensor on_host = rope->rotate(q.cpu());
  EXPECT_TRUE(rope->cos().is_cpu());
  expect_identical(here, on_host);
  EXPECT_EQ(rope->rotate(q.to(at::kMeta)).sizes(), q.sizes());
  rope->to(device());
  expect_identical(rope->rotate(q), on_host);
}

TEST_P(Module, IsDifferentiable) {
  RotaryEmbedding rope = make(Options(16).layout(Layout::kBHSD));
  const at::Tensor q = randn({2, 4, 5, 16}).requires_grad_();
  const at::Tensor k = randn({2, 1, 5, 16}).requires_grad_();
  const auto [q_rotated, k_rotated] = rope(q, k, 3);
  const at::Tensor gradient = randn({2, 1, 5, 16});
  (q_rotated.sum() + (k_rotated * gradient).sum()).backward();
  const auto o = RotateOptions().layout(Layout::kBHSD).offset(3).inverse(true);
  expect_identical(q.grad(), fused_rope::rotate(at::ones_like(q), rope->cos(), rope->sin(), o));
  expect_identical(k.grad(), fused_rope::rotate(gradient, rope->cos(), rope->sin(), o));
}

// Checkpointing runs two forward calls of different lengths before one backward.
TEST_P(EachScaling, KeepsTheTableOfAnEarlierForwardForBackward) {
  RotaryEmbedding rope = make(Options(32).scaling(scaling).max_seq_len(4));
  const at::Tensor kept = rope->cos(), before = kept.clone();
  const at::Tensor q = randn({1, 3, 2, 32}).requires_grad_();
  const at::Tensor longer = randn({1, 90, 2, 32}).requires_grad_();
  const at::Tensor first = rope->rotate(q), second = rope->rotate(longer);
  rope->to(at::kMeta);
  rope->to(device());
  (first.sum() + second.sum()).backward();
  expect_identical(kept, before);
  RotaryEmbedding fresh = make(Options(32).scaling(scaling).max_seq_len(4));
  const at::Tensor again = q.detach().requires_grad_();
  fresh->rotate(again).sum().backward();
  expect_identical(q.grad(), again.grad());
}

TEST_P(Module, KeepsItsTablesWhenDevicesOrLengthsAlternate) {
  RotaryEmbedding rope(Options(32).scaling(longrope()).max_seq_len(40));
  const at::Tensor q = randn({1, 9, 2, 32}), elsewhere = q.to(at::kMeta);
  const auto address_after = [&](const at::Tensor& x, int64_t offset) {
    rope->rotate(x, offset);
    EXPECT_EQ(rope->cos().device(), x.device());
    return rope->cos().const_data_ptr();
  };
  const void* usual = address_after(q, 0);
  const void* longer = address_after(q, 31);
  EXPECT_NE(usual, longer);
  for (int i = 0; i < 2; ++i) {
    address_after(elsewhere, i);
    EXPECT_EQ(address_after(q, 31), longer);
    address_after(q.cpu(), 0);
    EXPECT_EQ(address_after(q, 0), usual);
  }
}

TEST_P(Module, SharesItsTableWithModulesOfTheSameFrequencies) {
  const Options options = Options(48).base(1234).max_seq_len(100);
  std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> memory;
  {
    std::vector<RotaryEmbedding> layers;
    for (int i = 0; i < 5; ++i) layers.push_back(make(options));
    layers.push_back(make(Options(options).max_seq_len(60)));
    layers.push_back(make(Options(64).rotary_dim(48).layout(Layout::kBHSD).base(1234)));
    const auto expect_shared = [&](size_t count) {
      for (size_t i = 0; i < count; ++i) {
        EXPECT_EQ(layers[i]->sin().const_data_ptr(), layers[0]->sin().const_data_ptr());
      }
    };
    expect_shared(6);
    EXPECT_EQ(layers[5]->cos().size(0), 60);
    EXPECT_EQ(layers[6]->cos().size(0), 2048);
    const at::Tensor q = randn({1, 70, 2, 48});
    for (RotaryEmbedding& layer : layers) layer->reserve(5000);
    expect_shared(7);
    if (device().is_cpu()) {
      RotaryEmbedding few = make(Options(options).max_seq_len(60));
      EXPECT_THROW(few->rotate(q, Where().positions(at::arange(70))), c10::IndexError);
    }
    for (const Options& other : {Options(options).base(1235), Options(options).rotary_dim(46),
                                 Options(options).blocks(2)}) {
      EXPECT_NE(make(other)->cos().storage().data(), layers[0]->cos().storage().data());
    }
    memory = layers[0]->cos().storage().getWeakStorageImpl();
    EXPECT_FALSE(memory->expired());
  }
  EXPECT_TRUE(memory->expired());
}

struct Attention : torch::nn::Cloneable<Attention> {
  explicit Attention(const Options& options) : options(options) { reset(); }
  void reset() override { rope = register_module("rope", RotaryEmbedding(options)); }
  Options options;
  RotaryEmbedding rope{nullptr};
};

TEST_P(EachScaling, CanBeClonedToAnotherDevice) {
  Attention model(Options(32).scaling(scaling).max_seq_len(40));
  RotaryEmbedding rope = model.rope;
  rope->reserve(50);
  for (const at::Device target : {device(), at::Device(at::kMeta)}) {
    const auto copy = model.clone(target);
    const auto own = std::dynamic_pointer_cast<RotaryEmbeddingImpl>(copy->named_children()["rope"]);
    ASSERT_NE(own, nullptr);
    EXPECT_EQ(own->cos().device(), target);
    EXPECT_TRUE(rope->cos().is_cpu());
    const at::Tensor q = randn({1, 9, 2, 32}), positions = at::arange(9).to(device()) + 30;
    expect_identical(own->rotate(q, Where().positions(positions)),
                     make(Options(32).scaling(scaling).max_seq_len(80))
                         ->rotate(q, Where().positions(positions)));
  }
}

TEST_P(Module, CopiesAreIndependent) {
  RotaryEmbedding rope = make(Options(16).max_seq_len(4));
  RotaryEmbeddingImpl copy(*rope), assigned(Options(8));
  assigned = *rope;
  for (RotaryEmbeddingImpl* other : {&copy, &assigned}) {
    expect_identical(other->cos(), rope->cos());
    other->reserve(100);
    other->to(at::kMeta);
    EXPECT_TRUE(other->cos().is_meta());
  }
  EXPECT_EQ(rope->cos().device(), device());
  EXPECT_EQ(rope->cos().size(0), 4);
}

TEST_P(EachScaling, IsUnchangedWhenGrowthThrows) {
  RotaryEmbedding rope = make(Options(32).scaling(scaling).max_seq_len(4));
  const at::Tensor q = randn({1, 3, 2, 32});
  EXPECT_THROW(rope->reserve(int64_t{1} << 40), c10::ValueError);
  if (scaling.rope_type() != RopeType::kDynamic) {  // whose long calls need no table
    EXPECT_THROW(rope->rotate(q, int64_t{1} << 40), c10::ValueError);
  }
  EXPECT_EQ(rope->cos().size(0), 4);
  rope->rotate(q, Where().positions(integers({0, 1, 3})));
  rope->rotate(q, 4);
  EXPECT_EQ(rope->cos().size(0), 8);
}

TEST_P(Module, IsUnchangedWhenResetThrows) {
  RotaryEmbedding rope = make(Options(16).max_seq_len(4));
  const at::Tensor cos = rope->cos();
  rope->options.scaling(RopeType::kLinear);
  EXPECT_THROW(rope->reset(), c10::ValueError);
  EXPECT_EQ(rope->cos().const_data_ptr(), cos.const_data_ptr());
}

TEST_P(Module, CanBeCloned) {
  RotaryEmbedding rope = make(Options(16).max_seq_len(4));
  rope->reserve(9);
  const auto copy = std::dynamic_pointer_cast<RotaryEmbeddingImpl>(rope->clone());
  ASSERT_NE(copy, nullptr);
  expect_identical(copy->cos(), rope->cos());
  copy->options.base(100);
  copy->reset();
  EXPECT_FALSE(at::equal(copy->cos(), rope->cos()));
}

// What a module keeps must not depend on the mode in which it was made.
class MadeUnderModes : public EachScaling {
 protected:
  // Makes and calls a module under a mode, then trains it outside.
  template <typename Call>
  void expect_trainable_after(const Call& under_mode) {
    static int tests = 0;  // no two tests have the same base, so none reuses another's table
    const Options options = Options(32).base(1e4 + ++tests).scaling(scaling).max_seq_len(4);
    const at::Tensor q = randn({1, 5, 2, 32}).requires_grad_();
    const at::Tensor positions = integers({3, 1, 0, 2, 2});
    RotaryEmbedding rope{nullptr};
    const at::Tensor x = q.detach();
    under_mode([&] {
      rope = make(options);
      rope->rotate(x);
      rope->rotate(x, 60);
      rope->rotate(x, Where().positions(positions));
    });
    EXPECT_FALSE(rope->cos().is_inference());
    RotaryEmbedding fresh = make(options);
    const at::Tensor again = q.detach().requires_grad_();
    for (const Where& where : {Where(), Where(60), Where().positions(positions)}) {
      expect_identical(rope->rotate(q, where), fresh->rotate(again, where));
      rope->rotate(q, where).sum().backward();
      fresh->rotate(again, where).sum().backward();
      expect_identical(q.grad(), again.grad());
    }
  }
};
FUSED_ROPE_ON_DEVICES_FOR(MadeUnderModes, kScalings);

TEST_P(MadeUnderModes, TrainsAfterInferenceMode) {
  expect_trainable_after([](const auto& calls) {
    const c10::InferenceMode inference;
    calls();
  });
}

using torch::jit::tracer::trace;

torch::jit::Stack as_stack(const at::Tensor& x) { return {c10::IValue(x)}; }

std::shared_ptr<torch::jit::tracer::TracingState> traced(const at::Tensor& example,
                                                         RotaryEmbedding& rope) {
  return trace(
             as_stack(example),
             [&](const torch::jit::Stack& inputs) {
               return torch::jit::Stack{c10::IValue(rope->rotate(inputs[0].toTensor()))};
             },
             [](const at::Tensor&) { return std::string(); })
      .first;
}

TEST_P(MadeUnderModes, TrainsAfterATrace) {
  expect_trainable_after([&](const auto& calls) {
    trace(
        as_stack(randn({1})),
        [&](const torch::jit::Stack& inputs) {
          calls();
          return inputs;
        },
        [](const at::Tensor&) { return std::string(); });
  });
}

// This mode has no kernels: an operation that reached it would throw.
TEST_P(EachScaling, MakesItsTablesOutsideTheCallersModes) {
  const Options options = Options(32).base(777).scaling(scaling).max_seq_len(4);
  RotaryEmbedding rope{nullptr};
  std::shared_ptr<torch::nn::Module> copy;
  {
    const c10::impl::IncludeDispatchKeyGuard mode(c10::DispatchKey::TESTING_ONLY_GenericMode);
    EXPECT_ANY_THROW(at::ones({1}));
    rope = make(options);
    rope->reserve(100);
    rope->to(at::kMeta);
    rope->to(device());
    copy = rope->clone();
  }
  const at::Tensor q = randn({1, 9, 2, 32});
  expect_identical(rope->rotate(q), make(options)->rotate(q));
  expect_identical(std::dynamic_pointer_cast<RotaryEmbeddingImpl>(copy)->rotate(q, 50),
                   make(options)->rotate(q, 50));
}

// The frequencies of the example's length must not become constants of the trace.
TEST_P(LengthDependentScaling, IsTracedWithoutTheFrequenciesOfTheExample) {
  RotaryEmbedding rope = make(Options(32).scaling(scaling).max_seq_len(128));
  const at::Tensor example = randn({1, 9, 2, 32}), longer = randn({1, 70, 2, 32});
  torch::jit::GraphExecutor traced_rotate(traced(example, rope)->graph, "rotate");
  torch::jit::Stack stack = as_stack(example);
  traced_rotate.run(stack);
  EXPECT_TRUE(at::allclose(stack[0].toTensor(), rope->rotate(example), 0, 2e-6));
  stack = as_stack(longer);
  EXPECT_ANY_THROW(traced_rotate.run(stack));
}

TEST(ModuleOptions, AreValidated) {
  for (const Options& options :
       {Options(16).rotary_dim(7), Options(16).rotary_dim(18), Options(16).rotary_offset(-2),
        Options(16).rotary_dim(12).rotary_offset(6), Options(15), Options(16).blocks(3),
        Options(16).blocks(0), Options(16).blocks(2).interleaved(true),
        Options(16).axes(std::vector<int64_t>{0, 1}), Options(16).max_seq_len(-1),
        Options(16).scaling(RopeType::kLinear)}) {
    EXPECT_THROW(RotaryEmbedding{options}, c10::ValueError);
  }
}

TEST(ModuleOptions, ArePrinted) {
  std::ostringstream stream;
  stream << *RotaryEmbedding(Options(16).rotary_dim(8).max_seq_len(32));
  EXPECT_EQ(stream.str(),
            "fused_rope::RotaryEmbedding(head_dim=16, rotary_dim=8, rows=32, base=10000)");
}

}  // namespace
}  // namespace fused_rope
