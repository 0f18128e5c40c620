#include "fused_rope/kernels/cuda/launch.cuh"

namespace fused_rope::kernels {

template cudaError_t launch_elements<float>(const RotateParams&, const Plan&, cudaStream_t);

}  // namespace fused_rope::kernels
