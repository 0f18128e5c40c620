#include "fused_rope/kernels/cuda/cache_launch.cuh"

namespace fused_rope::kernels {

template cudaError_t launch_cache<Float16>(const RotateParams&, const std::optional<Plan>&,
                                           cudaStream_t);

}  // namespace fused_rope::kernels
