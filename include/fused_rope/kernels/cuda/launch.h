// The entry to the CUDA kernels. Callers need the CUDA runtime's headers, not nvcc.
#pragma once

#include <cuda_runtime_api.h>

#include "fused_rope/kernels/params.h"

namespace fused_rope::kernels {

// Enqueues the call on `stream` of the current device. Does not synchronize; safe under stream
// capture. Returns cudaErrorLaunchOutOfResources, with nothing enqueued, if a head of a call with a
// norm or a cache does not fit in the shared memory of a block.
cudaError_t launch_rotate(const RotateParams& params, cudaStream_t stream);

// Enqueues the backward of a call with a norm in the same way.
cudaError_t launch_norm_backward(const NormBackwardParams& params, cudaStream_t stream);

}  // namespace fused_rope::kernels
