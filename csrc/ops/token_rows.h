// Which row of a shared table each token reads, in ATen operations. The kernels follow the same
// rule in kernels/rows.h.
#pragma once

#include "ops/dispatch.h"

namespace fused_rope {

// The `positions` that select the same rows without offset, offsets and cu_seqlens: int64,
// [B or 1, S] or, with axes, [A, B or 1, S]. Positions of -1 and padding are -1. Any other sum that
// is not a row stays invalid: it is never -1, and it does not overflow. The arguments must have
// passed check_metadata.
at::Tensor token_rows(const Arguments& a, const c10::SymInt& S, at::Device device);

// The row that each pair of each token reads: [B or 1, S, P], the last dimension 1 without axes.
at::Tensor token_rows_by_pair(const Arguments& a, const c10::SymInt& S, at::Device device);

}  // namespace fused_rope
