// Frequencies of dynamic and longrope scaling: they follow from how many positions are in use.
#pragma once

#include <ATen/core/Tensor.h>

#include "fused_rope/frequencies.h"

namespace fused_rope {

// Whether the frequencies of `scaling` vary at all.
bool varies(const RopeScaling& scaling);

// Two rows, float64 [2, P] on the CPU: the frequencies up to the trained length, and for dynamic
// the exponents of its stretch, for longrope the frequencies of longer texts.
at::Tensor varying_constants(int64_t rotary_dim, double base, const RopeScaling& scaling);

// `frequencies` for `rows`, a scalar on the device of the constants, float64 [P] there. Nothing
// waits for the device, and nothing is remembered.
at::Tensor varying_frequencies(const at::Tensor& rows, const at::Tensor& constants,
                               const RopeScaling& scaling);

}  // namespace fused_rope
