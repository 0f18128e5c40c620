// The CUDA backend: launches on the tensors' device and its current stream.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "fused_rope/kernels/cuda/launch.h"
#include "ops/forms.h"

namespace fused_rope {
namespace {

void check_launch(const Call& call, cudaError_t error) {
  TORCH_CHECK_VALUE(error != cudaErrorLaunchOutOfResources, call.op,
                    ": expected heads that fit in the shared memory of a block of this GPU, got D=",
                    call.inputs[0]->sizes().back(),
                    ": normalize, rotate and store in separate calls");
  C10_CUDA_CHECK(error);
}

struct CudaBackend {
  using Guard = c10::cuda::CUDAGuard;

  static at::Tensor empty(const at::Tensor& x) {
    return allocate_output(x, c10::DispatchKey::CUDA, c10::cuda::CUDACachingAllocator::get());
  }

  static void launch(const Call& call, const kernels::RotateParams& params) {
    const c10::DeviceIndex device = call.inputs[0]->device().index();
    check_launch(call, kernels::launch_rotate(params, c10::cuda::getCurrentCUDAStream(device)));
  }

  static void launch_backward(const Call& call, const kernels::NormBackwardParams& params) {
    const c10::DeviceIndex device = call.inputs[0]->device().index();
    check_launch(call,
                 kernels::launch_norm_backward(params, c10::cuda::getCurrentCUDAStream(device)));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fused_rope, CUDA, m) { Forms<DeviceLayer<CudaBackend>>::register_all(m); }

}  // namespace fused_rope
