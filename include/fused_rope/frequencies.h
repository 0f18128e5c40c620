// Inverse frequencies of every scaling: the C++ form of Python's fused_rope.frequencies, with the
// same numbers.
//
// Letters: R rotary_dim, P = R/2 pairs.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "fused_rope/ops.h"

namespace fused_rope {

// How frequencies are scaled for sequences longer than the trained length.
enum class RopeType {
  kDefault,
  kLinear,
  kDynamic,
  kYarn,
  kLongRope,
  kLlama3,
  kProportional,
  kHalfTruncated,
  kAxial
};

// A scaling and its keys, named as in Hugging Face configs. Keys that a kind requires have no
// default:
//
//   kLinear         factor
//   kDynamic        factor, original_max_position_embeddings
//   kYarn           factor, original_max_position_embeddings; optional beta_fast, beta_slow,
//                   attention_factor, mscale, mscale_all_dim, truncate
//   kLongRope       short_factor, long_factor (P each), original_max_position_embeddings, and
//                   factor or attention_factor
//   kLlama3         factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
//   kProportional   optional partial_rotary_factor, factor
//   kHalfTruncated  (R/4 frequencies from 1 down to 1/base, then R/4 zeros)
//   kAxial          (the frequencies of R/2 elements, once for each of two axes)
//
//   RopeScaling(RopeType::kYarn).factor(8).original_max_position_embeddings(4096)
struct RopeScaling {
  RopeScaling(RopeType rope_type = RopeType::kDefault) : rope_type_(rope_type) {}  // NOLINT

  TORCH_ARG(RopeType, rope_type);
  TORCH_ARG(std::optional<double>, factor);
  TORCH_ARG(std::optional<double>, original_max_position_embeddings);
  TORCH_ARG(std::optional<double>, low_freq_factor);
  TORCH_ARG(std::optional<double>, high_freq_factor);
  TORCH_ARG(double, beta_fast) = 32;
  TORCH_ARG(double, beta_slow) = 1;
  TORCH_ARG(std::optional<double>, attention_factor);
  TORCH_ARG(std::optional<double>, mscale);
  TORCH_ARG(std::optional<double>, mscale_all_dim);
  TORCH_ARG(bool, truncate) = true;
  TORCH_ARG(std::optional<std::vector<double>>, short_factor);
  TORCH_ARG(std::optional<std::vector<double>>, long_factor);
  TORCH_ARG(double, partial_rotary_factor) = 1;
};

// Returns the inverse frequencies of R elements, float64 [P] on the CPU, and the factor that scales
// cosine and sine. `rows` is the number of positions in use; only kDynamic and kLongRope depend on
// it. Throws c10::ValueError for an odd R, an R that the kind does not support, a missing key, or a
// list whose length is not P.
FUSED_ROPE_API std::tuple<at::Tensor, double> frequencies(int64_t rotary_dim, double base = 10000.0,
                                                          const RopeScaling& scaling = {},
                                                          int64_t rows = 0);

}  // namespace fused_rope
