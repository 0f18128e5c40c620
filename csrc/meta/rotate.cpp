// Shapes and strides without data: what tracers, compilers and meta tensors see.
#include "ops/forms.h"

namespace fused_rope {

TORCH_LIBRARY_IMPL(fused_rope, Meta, m) { Forms<nullptr>::register_in(m); }

}  // namespace fused_rope
