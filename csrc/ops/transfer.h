// Copies from the host that do not synchronize with the device.
#pragma once

#include <ATen/core/Tensor.h>

namespace fused_rope {

// `host` on `device`, enqueued on the device's current stream.
at::Tensor to_device(const at::Tensor& host, at::Device device);

}  // namespace fused_rope
