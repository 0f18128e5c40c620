// Operations and their order match frequencies.py, so that results are bitwise identical.
#include "fused_rope/frequencies.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "modules/varying.h"

namespace fused_rope {
namespace {

using Series = std::vector<double>;

const char* name(RopeType kind) {
  constexpr const char* kNames[] = {"default", "linear",       "dynamic",        "yarn", "longrope",
                                    "llama3",  "proportional", "half_truncated", "axial"};
  return kNames[static_cast<size_t>(kind)];
}

template <typename T>
const T& need(const std::optional<T>& value, const RopeScaling& scaling, const char* key) {
  TORCH_CHECK_VALUE(value.has_value(), "frequencies: rope_type ", name(scaling.rope_type()),
                    " needs ", key, " in scaling");
  return *value;
}

double positive(double value, const char* key) {
  TORCH_CHECK_VALUE(value > 0 && std::isfinite(value), "frequencies: expected ", key,
                    " to be a number > 0, got ", value);
  return value;
}

double need_factor(const RopeScaling& scaling) {
  return positive(need(scaling.factor(), scaling, "factor"), "factor");
}

double need_trained(const RopeScaling& scaling) {
  constexpr const char* kKey = "original_max_position_embeddings";
  return positive(need(scaling.original_max_position_embeddings(), scaling, kKey), kKey);
}

// RoFormer (Su et al., 2021).
Series series(int64_t R, double base) {
  Series inv_freq;
  for (int64_t i = 0; i < R; i += 2) {
    inv_freq.push_back(1.0 / std::pow(base, static_cast<double>(i) / static_cast<double>(R)));
  }
  return inv_freq;
}

// Position interpolation (Chen et al., 2023).
Series linear(int64_t R, double base, const RopeScaling& scaling) {
  const double factor = need_factor(scaling);
  Series inv_freq = series(R, base);
  for (double& f : inv_freq) f /= factor;
  return inv_freq;
}

// NTK-aware scaling of the base, from the first row past the original length on.
Series dynamic(int64_t R, double base, const RopeScaling& scaling, int64_t rows) {
  const double factor = need_factor(scaling), trained = need_trained(scaling);
  const double stretch =
      factor * std::max(static_cast<double>(rows), trained) / trained - (factor - 1);
  const double power = static_cast<double>(R) / static_cast<double>(R - 2);
  return series(R, R > 2 ? base * std::pow(stretch, power) : base);
}

// YaRN (Peng et al., 2023): interpolates low frequencies, keeps high ones, and blends linearly
// between.
Series yarn(int64_t rotary_dim, double base, const RopeScaling& scaling) {
  const double factor = need_factor(scaling), trained = need_trained(scaling);
  TORCH_CHECK_VALUE(base != 1, "frequencies: expected another base than 1 with rope_type yarn");
  const auto R = static_cast<double>(rotary_dim);
  const auto pair_with_rotations = [&](double times) {
    return R * std::log(trained / (times * 2 * std::numbers::pi)) / (2 * std::log(base));
  };
  double low = pair_with_rotations(positive(scaling.beta_fast(), "beta_fast"));
  double high = pair_with_rotations(positive(scaling.beta_slow(), "beta_slow"));
  if (scaling.truncate()) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0);
  high = std::min(high, R - 1);
  constexpr double kMinWidth = 0.001;  // as in Transformers
  const double width = high == low ? kMinWidth : high - low;
  Series inv_freq = series(rotary_dim, base);
  for (size_t j = 0; j < inv_freq.size(); ++j) {
    const double interpolated = std::clamp((static_cast<double>(j) - low) / width, 0.0, 1.0);
    inv_freq[j] = inv_freq[j] / factor * interpolated + inv_freq[j] * (1 - interpolated);
  }
  return inv_freq;
}

double yarn_attention_factor(const RopeScaling& scaling) {
  const double factor = *scaling.factor();
  const auto mscale = [&](double weight) {
    constexpr double kSlope = 0.1;  // fitted in the YaRN paper
    return factor <= 1 ? 1.0 : kSlope * weight * std::log(factor) + 1.0;
  };
  const double numerator = scaling.mscale().value_or(0);
  const double denominator = scaling.mscale_all_dim().value_or(0);
  return numerator != 0 && denominator != 0 ? mscale(numerator) / mscale(denominator) : mscale(1);
}

// LongRoPE (Ding et al., 2024): one searched factor per pair, with a second set for long sequences.
Series longrope(int64_t R, double base, const RopeScaling& scaling, int64_t rows) {
  const auto list = [&](const std::optional<Series>& values, const char* key) {
    const Series& found = need(values, scaling, key);
    TORCH_CHECK_VALUE(static_cast<int64_t>(found.size()) == R / 2, "frequencies: expected ", R / 2,
                      " values in ", key, ", got ", found.size());
    for (const double value : found) positive(value, key);
    return found;
  };
  const bool is_long = static_cast<double>(rows) > need_trained(scaling);
  const Series short_factor = list(scaling.short_factor(), "short_factor");
  const Series long_factor = list(scaling.long_factor(), "long_factor");
  Series inv_freq = series(R, base);
  for (size_t j = 0; j < inv_freq.size(); ++j) {
    inv_freq[j] /= is_long ? long_factor[j] : short_factor[j];
  }
  return inv_freq;
}

double longrope_attention_factor(const RopeScaling& scaling) {
  const double factor = std::max(need_factor(scaling), 1.0), trained = need_trained(scaling);
  TORCH_CHECK_VALUE(trained > 1, "frequencies: expected original_max_position_embeddings > 1, got ",
                    trained);
  return std::sqrt(1 + std::log(factor) / std::log(trained));
}

// Llama 3.1: interpolates long wavelengths, keeps short ones, and blends between.
Series llama3(int64_t R, double base, const RopeScaling& scaling) {
  const double factor = need_factor(scaling), trained = need_trained(scaling);
  const double slow =
      positive(need(scaling.low_freq_factor(), scaling, "low_freq_factor"), "low_freq_factor");
  const double fast =
      positive(need(scaling.high_freq_factor(), scaling, "high_freq_factor"), "high_freq_factor");
  Series inv_freq = series(R, base);
  for (double& f : inv_freq) {
    const double rotations = trained * f / (2 * std::numbers::pi);
    const double kept = fast > slow ? std::clamp((rotations - slow) / (fast - slow), 0.0, 1.0)
                                    : static_cast<double>(rotations >= slow);
    f = (1 - kept) * f / factor + kept * f;
  }
  return inv_freq;
}

// p-RoPE (Gemma 4): rotates only the pairs of highest frequency, with the series of all R elements.
Series proportional(int64_t R, double base, const RopeScaling& scaling) {
  const double part = positive(scaling.partial_rotary_factor(), "partial_rotary_factor");
  TORCH_CHECK_VALUE(part <= 1, "frequencies: expected partial_rotary_factor <= 1, got ", part);
  const double factor = positive(scaling.factor().value_or(1), "factor");
  const auto rotated = static_cast<size_t>(std::floor(part * static_cast<double>(R) / 2));
  Series inv_freq = series(R, base);
  for (size_t j = 0; j < inv_freq.size(); ++j) {
    inv_freq[j] = j < rotated ? inv_freq[j] / factor : 0;
  }
  return inv_freq;
}

int64_t quarter(int64_t R, const RopeScaling& scaling) {
  TORCH_CHECK_VALUE(R % 4 == 0, "frequencies: rope_type ", name(scaling.rope_type()),
                    " needs a rotary_dim R that is a multiple of 4, got ", R);
  return R / 4;
}

// modded-nanogpt: R/4 frequencies whose last is 1/base, and R/4 pairs that are not rotated.
Series half_truncated(int64_t R, double base, const RopeScaling& scaling) {
  const int64_t rotated = quarter(R, scaling);
  const double step = 1 / static_cast<double>(std::max<int64_t>(rotated - 1, 1));
  Series inv_freq(static_cast<size_t>(2 * rotated));
  for (int64_t j = 0; j < rotated; ++j) {
    inv_freq[static_cast<size_t>(j)] = std::pow(1 / base, static_cast<double>(j) * step);
  }
  return inv_freq;
}

// 2-D vision: rows and columns, distinguished by `axes`, share the frequencies of R/2 elements.
Series axial(int64_t R, double base, const RopeScaling& scaling) {
  quarter(R, scaling);
  const Series once = series(R / 2, base);
  Series twice = once;
  twice.insert(twice.end(), once.begin(), once.end());
  return twice;
}

Series inverse_frequencies(int64_t R, double base, const RopeScaling& scaling, int64_t rows) {
  switch (scaling.rope_type()) {
    case RopeType::kDefault:
      break;
    case RopeType::kLinear:
      return linear(R, base, scaling);
    case RopeType::kDynamic:
      return dynamic(R, base, scaling, rows);
    case RopeType::kYarn:
      return yarn(R, base, scaling);
    case RopeType::kLongRope:
      return longrope(R, base, scaling, rows);
    case RopeType::kLlama3:
      return llama3(R, base, scaling);
    case RopeType::kProportional:
      return proportional(R, base, scaling);
    case RopeType::kHalfTruncated:
      return half_truncated(R, base, scaling);
    case RopeType::kAxial:
      return axial(R, base, scaling);
  }
  return series(R, base);
}

double attention_factor(const RopeScaling& scaling) {
  const RopeType kind = scaling.rope_type();
  if (kind != RopeType::kYarn && kind != RopeType::kLongRope) return 1;
  if (scaling.attention_factor().has_value()) {
    return positive(*scaling.attention_factor(), "attention_factor");
  }
  return kind == RopeType::kYarn ? yarn_attention_factor(scaling)
                                 : longrope_attention_factor(scaling);
}

}  // namespace

std::tuple<at::Tensor, double> frequencies(int64_t rotary_dim, double base,
                                           const RopeScaling& scaling, int64_t rows) {
  TORCH_CHECK_VALUE(rotary_dim >= 0 && rotary_dim % 2 == 0,
                    "frequencies: expected an even rotary_dim R >= 0, got ", rotary_dim);
  TORCH_CHECK_VALUE(base > 0 && std::isfinite(base),
                    "frequencies: expected a finite base > 0, got ", base);
  const Series inv_freq = inverse_frequencies(rotary_dim, base, scaling, rows);
  const c10::InferenceMode no_inference_tensors(false);
  const at::Tensor result = at::empty({static_cast<int64_t>(inv_freq.size())},
                                      at::TensorOptions(at::kCPU).dtype(at::kDouble));
  std::copy(inv_freq.begin(), inv_freq.end(), result.mutable_data_ptr<double>());
  return {result, attention_factor(scaling)};
}

bool varies(const RopeScaling& scaling) {
  return scaling.rope_type() == RopeType::kDynamic || scaling.rope_type() == RopeType::kLongRope;
}

std::tuple<at::Tensor, at::Tensor> varying_constants(int64_t rotary_dim, double base,
                                                     const RopeScaling& scaling) {
  const at::Tensor usual = std::get<0>(frequencies(rotary_dim, base, scaling));
  const c10::InferenceMode no_inference_tensors(false);
  if (scaling.rope_type() == RopeType::kLongRope) {
    const auto longer = static_cast<int64_t>(need_trained(scaling)) + 1;
    return {usual, std::get<0>(frequencies(rotary_dim, base, scaling, longer))};
  }
  const at::Tensor elements = at::arange(0, rotary_dim, 2, usual.options());
  return {usual, elements / -static_cast<double>(std::max<int64_t>(rotary_dim - 2, 1))};
}

at::Tensor varying_frequencies(const at::Tensor& rows, const at::Tensor& usual,
                               const at::Tensor& other, const RopeScaling& scaling) {
  const double trained = need_trained(scaling);
  if (scaling.rope_type() == RopeType::kLongRope) return at::where(rows > trained, other, usual);
  const double factor = need_factor(scaling);
  const at::Tensor stretch =
      factor * rows.to(at::kDouble).clamp_min(trained) / trained - (factor - 1);
  return usual * stretch.pow(other);
}

}  // namespace fused_rope
