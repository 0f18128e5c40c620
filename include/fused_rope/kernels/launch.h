// The CUDA entry: plain data in, a status out. Callers need the CUDA runtime's headers, not nvcc.
#pragma once

#include <cuda_runtime_api.h>

#include "fused_rope/kernels/plan.h"

namespace fused_rope {

// Enqueues the rotation on `stream` of the current device. Never waits for the device; safe under
// stream capture.
cudaError_t launch_rotate(const RotateParams& params, cudaStream_t stream);

}  // namespace fused_rope
