// Parameters of calls that are planned and never run.
#pragma once

#include <cstddef>

#include "fused_rope/kernels/params.h"

namespace fused_rope::kernels::testing {

// Memory for parameters to point to, 16-byte aligned. Never read.
alignas(16) inline std::byte memory[64];

inline Strides bshd(int64_t S, int64_t H, int64_t D) { return {S * H * D, H * D, D, 1}; }
inline Strides bhsd(int64_t S, int64_t H, int64_t D) { return {H * S * D, D, S * D, 1}; }
inline Strides sbhd(int64_t B, int64_t H, int64_t D) { return {H * D, B * H * D, D, 1}; }

// A call with one contiguous [B, S, H, D] tensor and a float32 table of S rows, all aligned.
inline RotateParams call(int64_t B, int64_t S, int64_t H, int64_t D, int64_t R) {
  RotateParams p = {};
  p.B = B;
  p.S = S;
  p.D = D;
  p.count = 1;
  p.tensors[0] = {memory, memory, bshd(S, H, D), bshd(S, H, D), H, false};
  p.pairing = {R / 2, 0, R / 2};
  p.cos = p.sin = {memory, R / 2, 0, 0, 0, 1};
  p.rows.M = S;
  p.dtype = DType::kBFloat16;
  p.table_dtype = DType::kFloat32;
  return p;
}

// Makes the tables per-token or per-head, with these strides.
inline void gather(RotateParams& p, const Strides& cos, const Strides& sin) {
  p.rows.gathered = true;
  p.cos = {memory, 0, cos.b, cos.s, cos.h, 1};
  p.sin = {memory, 0, sin.b, sin.s, sin.h, 1};
}

}  // namespace fused_rope::kernels::testing
