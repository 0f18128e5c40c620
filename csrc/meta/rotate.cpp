// The Meta backend: shapes and strides without data, for tracers, compilers and meta tensors.
#include "ops/forms.h"

namespace fused_rope {
namespace {

struct MetaBackend {
  using Guard = NoGuard;
  static at::Tensor empty(const at::Tensor& x) { return empty_output(x); }
};

}  // namespace

TORCH_LIBRARY_IMPL(fused_rope, Meta, m) { Forms<DeviceLayer<MetaBackend>>::register_all(m); }

}  // namespace fused_rope
