// Rotary position embeddings on at::Tensor: differentiable, on CPU and CUDA.
//
// Letters: B batch, S sequence length, T tokens of a packed batch, N its sequences, H heads, D
// head_dim, R rotary_dim, P = R/2 pairs, M table rows. For pair j of a token that reads table row
// m, with elements a and b = a + distance:
//
//   out[a] = x[a] * cos[m, j] - x[b] * sin[m, j]
//   out[b] = x[b] * cos[m, j] + x[a] * sin[m, j]
//
// Elements outside [rotary_offset, rotary_offset + R) are copied bit for bit. Throws
// c10::ValueError for shapes and values, c10::TypeError for dtypes, c10::IndexError for rows read
// from a tensor, c10::Error for what autograd forbids.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <torch/arg.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "fused_rope/types.h"

#if defined(_WIN32)
#define FUSED_ROPE_API
#else
#define FUSED_ROPE_API __attribute__((visibility("default")))
#endif

namespace fused_rope {

// Options of all functions: RotateOptions().layout(Layout::kBHSD).interleaved(true)
struct RotateOptions {
  TORCH_ARG(Layout, layout) = Layout::kBSHD;
  // Table row of each token, int32 or int64 [S], [1, S] or [B, S], with a leading axis A if `axes`
  // is given; -1: not rotated.
  TORCH_ARG(std::optional<at::Tensor>, positions);
  // Added to every position: one number, or an int32 or int64 tensor [B] or [N] ("offsets").
  TORCH_ARG(c10::SymInt, offset) = 0;
  TORCH_ARG(std::optional<at::Tensor>, offsets);
  // First token of each packed sequence and the end of the last, int32 or int64 [N + 1]; later
  // tokens are padding.
  TORCH_ARG(std::optional<at::Tensor>, cu_seqlens);
  // For the out functions: the row of the last output that each token is written to, int32 or
  // int64 [B, S] or [T]; -1: not written.
  TORCH_ARG(std::optional<at::Tensor>, out_rows);
  // The axis of `positions` that each pair reads (M-RoPE), P numbers.
  TORCH_ARG(std::optional<std::vector<int64_t>>, axes);
  TORCH_ARG(int64_t, rotary_offset) = 0;
  TORCH_ARG(bool, interleaved) = false;
  TORCH_ARG(int64_t, blocks) = 1;
  TORCH_ARG(bool, inverse) = false;
  TORCH_ARG(Precision, precision) = Precision::kFp32;
  // The columns of cos and sin: P (kHalf), or 2P (kTiled, kRepeated).
  TORCH_ARG(TableLayout, table_layout) = TableLayout::kHalf;
};

// Options of the RMS norm of a head: NormOptions(1e-6).cast(Cast::kBefore)
struct NormOptions {
  explicit NormOptions(double eps) : eps_(eps) {}
  TORCH_ARG(double, eps);  // added to the mean of the squares
  // The factors are 1 + weight.
  TORCH_ARG(bool, zero_centered) = false;
  // Where a normalized value is rounded to x's dtype.
  TORCH_ARG(Cast, cast) = Cast::kNever;
  // The rotation comes first.
  TORCH_ARG(bool, after) = false;
};

// Returns x rotated by shared tables [M, P], per-token tables [B or 1, S, P] or per-head tables [B
// or 1, S, H, P]; 2P columns where table_layout says so.
FUSED_ROPE_API at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                                 const RotateOptions& options = {});

// Rotates x in place and returns it.
FUSED_ROPE_API at::Tensor rotate_(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                                  const RotateOptions& options = {});

// Returns q and k rotated, in one launch. They may have different head counts.
FUSED_ROPE_API std::tuple<at::Tensor, at::Tensor> rotate_qk(const at::Tensor& q,
                                                            const at::Tensor& k,
                                                            const at::Tensor& cos,
                                                            const at::Tensor& sin,
                                                            const RotateOptions& options = {});

// Rotates q and k in place, in one launch, and returns them.
FUSED_ROPE_API std::tuple<at::Tensor, at::Tensor> rotate_qk_(const at::Tensor& q,
                                                             const at::Tensor& k,
                                                             const at::Tensor& cos,
                                                             const at::Tensor& sin,
                                                             const RotateOptions& options = {});

// Writes x rotated to `out`, which has x's shape and dtype and any strides, or is [rows, H, D] with
// out_rows. Does not support autograd.
FUSED_ROPE_API at::Tensor rotate_out(const at::Tensor& out, const at::Tensor& x,
                                     const at::Tensor& cos, const at::Tensor& sin,
                                     const RotateOptions& options = {});

// Writes q and k rotated to `q_out` and `k_out`. out_rows applies to k_out.
FUSED_ROPE_API std::tuple<at::Tensor, at::Tensor> rotate_qk_out(
    const at::Tensor& q_out, const at::Tensor& k_out, const at::Tensor& q, const at::Tensor& k,
    const at::Tensor& cos, const at::Tensor& sin, const RotateOptions& options = {});

// norm_rotate: RMS norm over the D elements of each head, then the rotation, in one pass:
//
//   y = x / sqrt(mean(x * x) + eps) * weight,   out = rotation of y
//
// The weights are [D], of x's dtype or float32, or nullopt for 1. Differentiable in x, the tables
// and the weights; the in-place and out functions do not support autograd.
FUSED_ROPE_API at::Tensor norm_rotate(const at::Tensor& x, const at::Tensor& cos,
                                      const at::Tensor& sin,
                                      const std::optional<at::Tensor>& weight,
                                      const NormOptions& norm, const RotateOptions& options = {});

FUSED_ROPE_API at::Tensor norm_rotate_(const at::Tensor& x, const at::Tensor& cos,
                                       const at::Tensor& sin,
                                       const std::optional<at::Tensor>& weight,
                                       const NormOptions& norm, const RotateOptions& options = {});

FUSED_ROPE_API std::tuple<at::Tensor, at::Tensor> norm_rotate_qk(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin,
    const std::optional<at::Tensor>& q_weight, const std::optional<at::Tensor>& k_weight,
    const NormOptions& norm, const RotateOptions& options = {});

FUSED_ROPE_API std::tuple<at::Tensor, at::Tensor> norm_rotate_qk_(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin,
    const std::optional<at::Tensor>& q_weight, const std::optional<at::Tensor>& k_weight,
    const NormOptions& norm, const RotateOptions& options = {});

FUSED_ROPE_API at::Tensor norm_rotate_out(const at::Tensor& out, const at::Tensor& x,
                                          const at::Tensor& cos, const at::Tensor& sin,
                                          const std::optional<at::Tensor>& weight,
                                          const NormOptions& norm,
                                          const RotateOptions& options = {});

FUSED_ROPE_API std::tuple<at::Tensor, at::Tensor> norm_rotate_qk_out(
    const at::Tensor& q_out, const at::Tensor& k_out, const at::Tensor& q, const at::Tensor& k,
    const at::Tensor& cos, const at::Tensor& sin, const std::optional<at::Tensor>& q_weight,
    const std::optional<at::Tensor>& k_weight, const NormOptions& norm,
    const RotateOptions& options = {});

// Options of rotate_and_cache: CacheOptions().k_scale(k_scale).v_scale(v_scale)
struct CacheOptions {
  // For caches of 8 bits: the value of 1 in the cache, float32 [] or [Hk].
  TORCH_ARG(std::optional<at::Tensor>, k_scale);
  TORCH_ARG(std::optional<at::Tensor>, v_scale);
  // Memory for q rotated, and for k rotated where it is wanted outside the cache too.
  TORCH_ARG(std::optional<at::Tensor>, q_out);
  TORCH_ARG(std::optional<at::Tensor>, k_out);
  // The norm of q and k, as in norm_rotate_qk.
  TORCH_ARG(std::optional<NormOptions>, norm);
  TORCH_ARG(std::optional<at::Tensor>, q_weight);
  TORCH_ARG(std::optional<at::Tensor>, k_weight);
};

// Returns q rotated, and stores k, rotated, and v in their slots of a KV cache, in one launch.
//
// The caches are [rows, Hk, D] or [pages, page_size, Hk, D], any strides, of x's dtype or of
// float8_e4m3fn, float8_e5m2 or int8, which hold the value divided by the scale. slots is int32 or
// int64 [B, S] or [T], page * page_size + place; -1: not stored. v may be narrower or wider than k;
// v and v_cache may both be nullopt. Does not support autograd.
FUSED_ROPE_API at::Tensor rotate_and_cache(const at::Tensor& q, const at::Tensor& k,
                                           const std::optional<at::Tensor>& v,
                                           const at::Tensor& cos, const at::Tensor& sin,
                                           const at::Tensor& k_cache,
                                           const std::optional<at::Tensor>& v_cache,
                                           const at::Tensor& slots, const CacheOptions& cache = {},
                                           const RotateOptions& options = {});

// Returns cos and sin of row * inv_freq[j], times scale, for rows [first, first + rows): two
// tensors [rows, P] of `dtype` on `device` (default: inv_freq's), within 1 float32 ulp for every
// row up to 2^31. Does not synchronize.
FUSED_ROPE_API std::tuple<at::Tensor, at::Tensor> cos_sin_table(
    const at::Tensor& inv_freq, int64_t rows, int64_t first = 0, double scale = 1.0,
    at::ScalarType dtype = at::kFloat, std::optional<at::Device> device = std::nullopt);

}  // namespace fused_rope
