#include "fused_rope/kernels/cuda/norm_launch.cuh"

namespace fused_rope::kernels {

template cudaError_t launch_norm<Float16>(const RotateParams&, const std::optional<Plan>&,
                                          cudaStream_t);
template cudaError_t launch_backward<Float16>(const NormBackwardParams&, const std::optional<Plan>&,
                                              cudaStream_t);

}  // namespace fused_rope::kernels
