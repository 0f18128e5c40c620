// rotate_qk beside tables as other libraries keep them: full width, where the operator reads one
// column for each pair.
#pragma once

#include <optional>

#include "ops/arguments.h"

namespace fused_rope {

// How the operator's tables lie in a caller's [..., width].
struct WideTables {
  // Of the operator's tables: dimensions of size 1 are put before a caller's, or taken from there.
  int64_t dims;
  // "half": the columns are the operator's. "tiled" and "first": the first half of them.
  // "repeated": every second. "either": the first D/2 of D/2 or D.
  std::string_view width;
  // The last R lanes are rotated, not the first.
  bool trailing;
};

// q and k rotated by those columns; where the tables' dtype is wider than q's, so are the products,
// and they are rounded once. Views of the tables are made without the dispatcher, at a tenth of its
// cost; nothing is done and nullopt returned where somebody would have to see them (autograd, a
// mode, a subclass) or where they do not fit.
std::optional<TensorPair> rotate_qk_wide(Arguments a, const WideTables& form, const at::Tensor& q,
                                         const at::Tensor& k, const at::Tensor& cos,
                                         const at::Tensor& sin);

}  // namespace fused_rope
