// The CUDA backend: the tensors' device and the current stream around the torch-free launch.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "fused_rope/kernels/launch.h"
#include "ops/forms.h"

namespace fused_rope {
namespace {

void launch(const Call& call, const RotateParams& params) {
  const c10::cuda::CUDAGuard guard(call.inputs[0]->device());
  C10_CUDA_CHECK(launch_rotate(params, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_rope, CUDA, m) { Forms<&launch>::register_in(m); }

}  // namespace fused_rope
