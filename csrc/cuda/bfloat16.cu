#include "fused_rope/kernels/cuda/launch.cuh"

namespace fused_rope::kernels {

template cudaError_t launch_elements<BFloat16>(const RotateParams&, const Plan&, cudaStream_t);

}  // namespace fused_rope::kernels
