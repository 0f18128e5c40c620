// The entry to the CUDA kernels. Callers need the CUDA runtime's headers, not nvcc.
#pragma once

#include <cuda_runtime_api.h>

#include "fused_rope/kernels/params.h"

namespace fused_rope::kernels {

// Enqueues the rotation on `stream` of the current device. Does not synchronize; safe under stream
// capture.
cudaError_t launch_rotate(const RotateParams& params, cudaStream_t stream);

}  // namespace fused_rope::kernels
