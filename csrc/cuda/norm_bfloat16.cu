#include "fused_rope/kernels/cuda/norm_launch.cuh"

namespace fused_rope::kernels {

template cudaError_t launch_norm<BFloat16>(const RotateParams&, const std::optional<Plan>&,
                                           cudaStream_t);
template cudaError_t launch_backward<BFloat16>(const NormBackwardParams&,
                                               const std::optional<Plan>&, cudaStream_t);

}  // namespace fused_rope::kernels
