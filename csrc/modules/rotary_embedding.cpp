#include "fused_rope/rotary_embedding.h"

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <ostream>
#include <utility>

namespace fused_rope {
namespace {

double need(const std::optional<double>& value, const char* kind, const char* key) {
  TORCH_CHECK_VALUE(value.has_value(), "frequencies: rope_type ", kind, " needs ", key,
                    " in scaling");
  return *value;
}

// RoFormer (Su et al., 2021). The operations and their order are Python's, so that the bits are
// too.
std::vector<double> series(int64_t R, double base) {
  std::vector<double> inv_freq;
  for (int64_t lane = 0; lane < R; lane += 2) {
    inv_freq.push_back(1.0 / std::pow(base, static_cast<double>(lane) / static_cast<double>(R)));
  }
  return inv_freq;
}

// Position interpolation (Chen et al., 2023).
void stretch_linear(std::vector<double>& inv_freq, const RopeScaling& scaling) {
  const double factor = need(scaling.factor(), "linear", "factor");
  for (double& f : inv_freq) f /= factor;
}

// YaRN (Peng et al., 2023): slow pairs interpolate, fast ones do not, a ramp lies between.
void stretch_yarn(std::vector<double>& inv_freq, double base, const RopeScaling& scaling) {
  const double factor = need(scaling.factor(), "yarn", "factor");
  const double trained =
      need(scaling.original_max_position_embeddings(), "yarn", "original_max_position_embeddings");
  const auto R = static_cast<double>(2 * inv_freq.size());
  const auto pair_that_turns = [&](double times) {
    return R * std::log(trained / (times * 2 * std::numbers::pi)) / (2 * std::log(base));
  };
  double low = pair_that_turns(scaling.beta_fast());
  double high = pair_that_turns(scaling.beta_slow());
  if (scaling.truncate()) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0);
  high = std::min(high, R - 1);
  const double width = high == low ? 0.001 : high - low;
  for (size_t j = 0; j < inv_freq.size(); ++j) {
    const double interpolated = std::clamp((static_cast<double>(j) - low) / width, 0.0, 1.0);
    inv_freq[j] = inv_freq[j] / factor * interpolated + inv_freq[j] * (1 - interpolated);
  }
}

double yarn_attention_factor(const RopeScaling& scaling) {
  if (scaling.attention_factor().has_value()) return *scaling.attention_factor();
  const double factor = *scaling.factor();
  const auto mscale = [&](double weight) {
    return factor <= 1 ? 1.0 : 0.1 * weight * std::log(factor) + 1.0;
  };
  const double numerator = scaling.mscale().value_or(0);
  const double denominator = scaling.mscale_all_dim().value_or(0);
  return numerator != 0 && denominator != 0 ? mscale(numerator) / mscale(denominator) : mscale(1);
}

// Llama 3.1: long waves interpolate, short ones do not, a blend by wavelength lies between.
void stretch_llama3(std::vector<double>& inv_freq, const RopeScaling& scaling) {
  const double factor = need(scaling.factor(), "llama3", "factor");
  const double slow = need(scaling.low_freq_factor(), "llama3", "low_freq_factor");
  const double fast = need(scaling.high_freq_factor(), "llama3", "high_freq_factor");
  const double trained = need(scaling.original_max_position_embeddings(), "llama3",
                              "original_max_position_embeddings");
  for (double& f : inv_freq) {
    const double turns = trained * f / (2 * std::numbers::pi);
    const double kept = std::clamp((turns - slow) / (fast - slow), 0.0, 1.0);
    f = (1 - kept) * f / factor + kept * f;
  }
}

int64_t rotary_dim_of(const RotaryEmbeddingOptions& o) {
  return o.rotary_dim().value_or(o.head_dim() - o.rotary_offset());
}

void check(const RotaryEmbeddingOptions& o) {
  const int64_t R = rotary_dim_of(o);
  TORCH_CHECK_VALUE(
      R % 2 == 0 && R >= 0 && o.rotary_offset() >= 0 && o.rotary_offset() + R <= o.head_dim(),
      "RotaryEmbedding: expected an even rotary_dim R, rotary_offset o >= 0 and o + R <= head_dim, "
      "got R=",
      R, ", o=", o.rotary_offset(), ", head_dim=", o.head_dim());
  TORCH_CHECK_VALUE(
      o.blocks() >= 1 && R / 2 % o.blocks() == 0 && !(o.blocks() > 1 && o.interleaved()),
      "RotaryEmbedding: expected blocks that divide P=", R / 2,
      ", and only 1 with interleaved, got blocks=", o.blocks(), ", interleaved=", o.interleaved());
  if (o.axes().has_value()) {
    TORCH_CHECK_VALUE(static_cast<int64_t>(o.axes()->size()) == R / 2,
                      "RotaryEmbedding: expected axes of P=", R / 2, " ints, got ",
                      o.axes()->size());
  }
}

int64_t sequence_dim(Layout layout) {
  return layout == Layout::kBSHD ? 1 : layout == Layout::kBHSD ? 2 : 0;
}

}  // namespace

std::tuple<at::Tensor, double> frequencies(int64_t rotary_dim, double base,
                                           const RopeScaling& scaling) {
  TORCH_CHECK_VALUE(rotary_dim >= 0 && rotary_dim % 2 == 0,
                    "frequencies: expected an even rotary_dim R >= 0, got ", rotary_dim);
  std::vector<double> inv_freq = series(rotary_dim, base);
  double attention_factor = 1.0;
  switch (scaling.rope_type()) {
    case RopeType::kDefault:
      break;
    case RopeType::kLinear:
      stretch_linear(inv_freq, scaling);
      break;
    case RopeType::kYarn:
      stretch_yarn(inv_freq, base, scaling);
      attention_factor = yarn_attention_factor(scaling);
      break;
    case RopeType::kLlama3:
      stretch_llama3(inv_freq, scaling);
      break;
  }
  const c10::InferenceMode no_inference_tensors(false);
  const auto P = static_cast<int64_t>(inv_freq.size());
  const at::Tensor result = at::empty({P}, at::TensorOptions(at::kCPU).dtype(at::kDouble));
  std::copy(inv_freq.begin(), inv_freq.end(), result.mutable_data_ptr<double>());
  return {result, attention_factor};
}

RotaryEmbeddingImpl::RotaryEmbeddingImpl(RotaryEmbeddingOptions options)
    : options(std::move(options)) {
  reset();
}

std::tuple<at::Tensor, at::Tensor> RotaryEmbeddingImpl::forward(
    const at::Tensor& q, const at::Tensor& k, const RotaryEmbeddingForwardOptions& where) {
  const RotateOptions rotation = prepare(q, where);
  return rotate_qk(q, k, cos, sin, rotation);
}

at::Tensor RotaryEmbeddingImpl::rotate(const at::Tensor& q,
                                       const RotaryEmbeddingForwardOptions& where) {
  const RotateOptions rotation = prepare(q, where);
  return fused_rope::rotate(q, cos, sin, rotation);
}

void RotaryEmbeddingImpl::reserve(int64_t rows) {
  if (rows > cos.size(0)) build(std::max(rows, 2 * cos.size(0)), cos.device());
}

// Also what clone() calls, on a copy that has a table already.
void RotaryEmbeddingImpl::reset() {
  check(options);
  at::Tensor inv_freq;
  std::tie(inv_freq, scale_) =
      frequencies(rotary_dim_of(options) / options.blocks(), options.base(), options.scaling());
  const c10::InferenceMode no_inference_tensors(false);
  inv_freq_ = inv_freq.repeat({options.blocks()});
  if (cos.defined()) {
    build(std::max(options.max_seq_len(), cos.size(0)), cos.device());
  } else {
    build(options.max_seq_len(), at::kCPU);
  }
}

void RotaryEmbeddingImpl::to(at::Device device, at::ScalarType, bool) { move(device); }

void RotaryEmbeddingImpl::to(at::ScalarType, bool) {}

void RotaryEmbeddingImpl::to(at::Device device, bool) { move(device); }

void RotaryEmbeddingImpl::pretty_print(std::ostream& stream) const {
  stream << "fused_rope::RotaryEmbedding(head_dim=" << options.head_dim()
         << ", rotary_dim=" << rotary_dim_of(options) << ", rows=" << cos.size(0)
         << ", base=" << options.base() << ")";
}

// Makes the table right for this call and says what the operator is to do.
RotateOptions RotaryEmbeddingImpl::prepare(const at::Tensor& q,
                                           const RotaryEmbeddingForwardOptions& where) {
  TORCH_CHECK_VALUE(q.dim() > 0 && q.size(-1) == options.head_dim(),
                    "RotaryEmbedding: expected q with D=", options.head_dim(), ", got ", q.sizes());
  const auto& positions = where.positions();
  const bool rows_known =
      !positions.has_value() && !where.cu_seqlens().has_value() && !where.offsets().has_value();
  move(q.device());
  if (rows_known) reserve(q.size(sequence_dim(options.layout())) + where.offset());

  auto rotation = RotateOptions()
                      .layout(options.layout())
                      .positions(positions)
                      .offset(where.offset())
                      .offsets(where.offsets())
                      .cu_seqlens(where.cu_seqlens())
                      .rotary_offset(options.rotary_offset())
                      .interleaved(options.interleaved())
                      .blocks(options.blocks())
                      .precision(options.precision());
  if (positions.has_value() && positions_have_axes(*positions, q)) rotation.axes(options.axes());
  return rotation;
}

bool RotaryEmbeddingImpl::positions_have_axes(const at::Tensor& positions,
                                              const at::Tensor& q) const {
  if (!options.axes().has_value() || positions.dim() < 2) return false;
  const Layout layout = options.layout();
  const int64_t B = layout == Layout::kTHD ? 1 : q.size(layout == Layout::kSBHD ? 1 : 0);
  const bool one_for_all =
      positions.dim() == 2 && (positions.size(0) == 1 || positions.size(0) == B);
  return !one_for_all;
}

void RotaryEmbeddingImpl::move(at::Device device) {
  if (device != cos.device()) build(cos.size(0), device);
}

void RotaryEmbeddingImpl::build(int64_t rows, at::Device device) {
  std::tie(cos, sin) = cos_sin_table(inv_freq_, rows, /*first=*/0, scale_, at::kFloat, device);
}

}  // namespace fused_rope
