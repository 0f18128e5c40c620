// The entry to the CUDA kernels: queries the device, makes the plan, selects the element type.
#include <utility>

#include "fused_rope/kernels/cuda/cache_launch.cuh"

#if defined(FUSED_ROPE_PLAN_OVERRIDES)
#include <cstdlib>

#include "plan_overrides.h"
#endif

namespace fused_rope::kernels {

// Instantiated in one file per element type, so that they compile in parallel.
#define FUSED_ROPE_EXTERN(T)                                                                      \
  extern template cudaError_t launch_elements<T>(const RotateParams&, const Plan&, cudaStream_t); \
  extern template cudaError_t launch_norm<T>(const RotateParams&, const std::optional<Plan>&,     \
                                             cudaStream_t);                                       \
  extern template cudaError_t launch_cache<T>(const RotateParams&, const std::optional<Plan>&,    \
                                              cudaStream_t);                                      \
  extern template cudaError_t launch_backward<T>(const NormBackwardParams&,                       \
                                                 const std::optional<Plan>&, cudaStream_t)
FUSED_ROPE_EXTERN(Float16);
FUSED_ROPE_EXTERN(BFloat16);
FUSED_ROPE_EXTERN(float);
FUSED_ROPE_EXTERN(double);
#undef FUSED_ROPE_EXTERN

static cudaError_t read_facts(int device, DeviceFacts* facts) {
  const std::pair<cudaDeviceAttr, int64_t*> attributes[] = {
      {cudaDevAttrL2CacheSize, &facts->l2_bytes},
      {cudaDevAttrMultiProcessorCount, &facts->multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &facts->shared_bytes}};
  for (const auto& [attribute, fact] : attributes) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
    if (error != cudaSuccess) return error;
    *fact = value;
  }
  return cudaSuccess;
}

// Facts of the current device. Each thread caches those of one device.
static cudaError_t device_facts(DeviceFacts* facts) {
  thread_local int known_device = -1;
  thread_local DeviceFacts known;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (device != known_device) {
    if (const cudaError_t error = read_facts(device, &known); error != cudaSuccess) return error;
    known_device = device;
  }
  *facts = known;
  return cudaSuccess;
}

static PlanOverrides read_overrides() {
#if defined(FUSED_ROPE_PLAN_OVERRIDES)
  if (const char* text = std::getenv("FUSED_ROPE_PLAN")) return parse_overrides(text);
#endif
  return {};
}

static const PlanOverrides& plan_overrides() {
  static const PlanOverrides overrides = read_overrides();
  return overrides;
}

cudaError_t launch_rotate(const RotateParams& params, cudaStream_t stream) {
  const bool has_elements = params.D > 0 && total_heads(params) > 0;
  const bool has_values = params.cache != nullptr && params.cache->values.in != nullptr;
  if (params.B == 0 || params.S == 0 || !(has_elements || has_values)) return cudaSuccess;
  DeviceFacts facts;
  if (const cudaError_t error = device_facts(&facts); error != cudaSuccess) return error;
  const PlanOverrides& overrides = plan_overrides();
  if (params.cache != nullptr) {
    const std::optional<Plan> plan = make_cache_plan(params, facts, overrides);
    return visit(params.dtype, [&]<typename T>() { return launch_cache<T>(params, plan, stream); });
  }
  if (params.norm != nullptr) {
    const std::optional<Plan> plan = make_norm_plan(params, facts, overrides);
    return visit(params.dtype, [&]<typename T>() { return launch_norm<T>(params, plan, stream); });
  }
  const auto launch = [&](const RotateParams& p) {
    const Plan plan = make_plan(p, facts, overrides);
    if (plan.head_threads == 0) return cudaSuccess;
    return visit(p.dtype, [&]<typename T>() { return launch_elements<T>(p, plan, stream); });
  };
  return are_adjacent(params) ? launch(joined(params)) : launch(params);
}

cudaError_t launch_norm_backward(const NormBackwardParams& params, cudaStream_t stream) {
  if (params.call.D == 0) return cudaSuccess;
  DeviceFacts facts;
  if (const cudaError_t error = device_facts(&facts); error != cudaSuccess) return error;
  const std::optional<Plan> plan = make_backward_plan(params, facts, plan_overrides());
  return visit(params.call.dtype,
               [&]<typename T>() { return launch_backward<T>(params, plan, stream); });
}

}  // namespace fused_rope::kernels
