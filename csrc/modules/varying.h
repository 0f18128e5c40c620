// Frequencies of dynamic and longrope scaling: they depend on how many positions are in use.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "fused_rope/frequencies.h"

namespace fused_rope {

// Whether the frequencies of `scaling` depend on the number of rows.
bool varies(const RopeScaling& scaling);

// Two tensors, float64 [P] on the CPU: the frequencies up to the trained length, and the exponents
// of the stretch (dynamic) or the frequencies past the trained length (longrope).
std::tuple<at::Tensor, at::Tensor> varying_constants(int64_t rotary_dim, double base,
                                                     const RopeScaling& scaling);

// `frequencies` for `rows`, a scalar on the device of the constants, float64 [P] there. Does not
// synchronize and keeps no state.
at::Tensor varying_frequencies(const at::Tensor& rows, const at::Tensor& usual,
                               const at::Tensor& other, const RopeScaling& scaling);

}  // namespace fused_rope
