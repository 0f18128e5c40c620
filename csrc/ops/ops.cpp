// The libtorch functions: each calls the operator of the same name.
#include "fused_rope/ops.h"

#include "ops/checks.h"

namespace fused_rope {
namespace {

// out_rows belongs to the out functions alone.
Arguments without_out_rows(const char* op, const RotateOptions& options) {
  TORCH_CHECK_VALUE(!options.out_rows().has_value(), op,
                    ": expected no out_rows without an output, got one");
  return arguments_of(options);
}

}  // namespace

Arguments arguments_of(const RotateOptions& o) {
  at::OptionalIntArrayRef axes;
  if (o.axes().has_value()) axes = at::IntArrayRef(*o.axes());
  return {o.positions(),
          o.offsets(),
          o.cu_seqlens(),
          o.out_rows(),
          o.offset(),
          name_of(o.layout()),
          axes,
          o.rotary_offset(),
          o.interleaved(),
          o.blocks(),
          o.inverse(),
          name_of(o.precision()),
          name_of(o.table_layout())};
}

at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                  const RotateOptions& options) {
  return call_rotate(without_out_rows("rotate", options), x, cos, sin);
}

at::Tensor rotate_(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                   const RotateOptions& options) {
  call_rotate_(without_out_rows("rotate_", options), x, cos, sin);
  return x;
}

TensorPair rotate_qk(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                     const at::Tensor& sin, const RotateOptions& options) {
  return call_rotate_qk(without_out_rows("rotate_qk", options), q, k, cos, sin);
}

TensorPair rotate_qk_(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                      const at::Tensor& sin, const RotateOptions& options) {
  call_rotate_qk_(without_out_rows("rotate_qk_", options), q, k, cos, sin);
  return {q, k};
}

at::Tensor rotate_out(const at::Tensor& out, const at::Tensor& x, const at::Tensor& cos,
                      const at::Tensor& sin, const RotateOptions& options) {
  call_rotate_out(arguments_of(options), x, cos, sin, out);
  return out;
}

TensorPair rotate_qk_out(const at::Tensor& q_out, const at::Tensor& k_out, const at::Tensor& q,
                         const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin,
                         const RotateOptions& options) {
  call_rotate_qk_out(arguments_of(options), q, k, cos, sin, q_out, k_out);
  return {q_out, k_out};
}

}  // namespace fused_rope
