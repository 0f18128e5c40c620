// Rotary position embeddings on at::Tensor: differentiable, on CPU and CUDA.
//
// Letters: B batch, S sequence length, T tokens of a packed batch, N its sequences, H heads, D
// head_dim, R rotary_dim, P = R/2 pairs, M table rows. For pair j of a token that reads table row
// m, with lanes a and b = a + distance:
//
//   out[a] = x[a] * cos[m, j] - x[b] * sin[m, j]
//   out[b] = x[b] * cos[m, j] + x[a] * sin[m, j]
//
// Lanes outside [rotary_offset, rotary_offset + R) are copied bit for bit. Throws c10::ValueError
// for shapes and values, c10::TypeError for dtypes, c10::IndexError for rows read from a tensor,
// c10::Error for what autograd forbids.
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

// What all functions take beside tensors. RotateOptions().layout(Layout::kBHSD).interleaved(true)
struct RotateOptions {
  TORCH_ARG(Layout, layout) = Layout::kBSHD;
  // Table row of each token, int32 or int64 [S], [1, S] or [B, S], with a leading axis A beside
  // `axes`; -1: not rotated.
  TORCH_ARG(std::optional<at::Tensor>, positions);
  // Added to every position: one number, or an int32 or int64 tensor [B] or [N] ("offsets").
  TORCH_ARG(c10::SymInt, offset) = 0;
  TORCH_ARG(std::optional<at::Tensor>, offsets);
  // First token of each packed sequence and the end of the last, int32 or int64 [N + 1]; later
  // tokens are padding.
  TORCH_ARG(std::optional<at::Tensor>, cu_seqlens);
  // For the out functions: the row of the last output that each token is written to, or -1, [B, S]
  // or [T].
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

// x rotated by shared tables [M, P], per-token tables [B or 1, S, P] or per-head tables [B or 1, S,
// H, P]; 2P columns where table_layout says so.
FUSED_ROPE_API at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                                 const RotateOptions& options = {});

// x rotated in place.
FUSED_ROPE_API at::Tensor rotate_(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                                  const RotateOptions& options = {});

// q and k, of any two head counts, rotated in one launch.
FUSED_ROPE_API std::tuple<at::Tensor, at::Tensor> rotate_qk(const at::Tensor& q,
                                                            const at::Tensor& k,
                                                            const at::Tensor& cos,
                                                            const at::Tensor& sin,
                                                            const RotateOptions& options = {});

// q and k rotated in place.
FUSED_ROPE_API std::tuple<at::Tensor, at::Tensor> rotate_qk_(const at::Tensor& q,
                                                             const at::Tensor& k,
                                                             const at::Tensor& cos,
                                                             const at::Tensor& sin,
                                                             const RotateOptions& options = {});

// x rotated into `out`: x's shape and dtype, any strides; [rows, H, D] with out_rows. Takes no part
// in autograd.
FUSED_ROPE_API at::Tensor rotate_out(const at::Tensor& out, const at::Tensor& x,
                                     const at::Tensor& cos, const at::Tensor& sin,
                                     const RotateOptions& options = {});

// q and k rotated into `q_out` and `k_out`; out_rows concerns k_out.
FUSED_ROPE_API std::tuple<at::Tensor, at::Tensor> rotate_qk_out(
    const at::Tensor& q_out, const at::Tensor& k_out, const at::Tensor& q, const at::Tensor& k,
    const at::Tensor& cos, const at::Tensor& sin, const RotateOptions& options = {});

// cos and sin of row * inv_freq[j], times scale, for rows [first, first + rows): two tensors [rows,
// P] of `dtype`, right to 1 ulp of float32 for every row up to 2^31, on `device` (inv_freq's by
// default) without waiting for it.
FUSED_ROPE_API std::tuple<at::Tensor, at::Tensor> cos_sin_table(
    const at::Tensor& inv_freq, int64_t rows, int64_t first = 0, double scale = 1.0,
    at::ScalarType dtype = at::kFloat, std::optional<at::Device> device = std::nullopt);

}  // namespace fused_rope
