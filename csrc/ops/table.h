// What the modules share with cos_sin_table.
#pragma once

#include <ATen/core/Tensor.h>

namespace fused_rope {

// One more than the last row that is within 1 float32 ulp.
inline constexpr int64_t kMaxTableRows = (int64_t{1} << 31) + 1;

// Copies `host` to `device` on the device's current stream, without synchronizing.
at::Tensor to_device(const at::Tensor& host, at::Device device);

}  // namespace fused_rope
