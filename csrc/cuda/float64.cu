#include "fused_rope/kernels/cuda.cuh"

namespace fused_rope {

template cudaError_t launch_elements<double>(const RotateParams&, const Plan&, cudaStream_t);

}  // namespace fused_rope
