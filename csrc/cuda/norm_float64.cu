#include "fused_rope/kernels/cuda/norm_launch.cuh"

namespace fused_rope::kernels {

template cudaError_t launch_norm<double>(const RotateParams&, const std::optional<Plan>&,
                                         cudaStream_t);
template cudaError_t launch_backward<double>(const NormBackwardParams&, const std::optional<Plan>&,
                                             cudaStream_t);

}  // namespace fused_rope::kernels
