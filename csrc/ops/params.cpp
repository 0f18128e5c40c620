#include "ops/params.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include "fused_rope/kernels/weight_gradients.h"

namespace fused_rope {
namespace {

using kernels::DType;
using kernels::IndexParams;
using kernels::RowParams;
using kernels::TableParams;

DType dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kFloat:
      return DType::kFloat32;
    default:
      return DType::kFloat64;
  }
}

// The dtype in which the kernels read a table: x's own, or the one x is rotated in.
at::ScalarType kernel_table_type(at::ScalarType table, at::ScalarType x) {
  return table == x ? x : x == at::kDouble ? at::kDouble : at::kFloat;
}

kernels::Strides strides_of(const at::Tensor& x, Layout layout) {
  const LayoutDims dims = dims_of(layout);
  const at::IntArrayRef strides = x.strides();
  return {dims.batch == kNoBatch ? 0 : strides[dims.batch], strides[dims.sequence],
          strides[dims.head], strides.back()};
}

TableParams table_params(const at::Tensor& table, TableLayout layout) {
  const at::IntArrayRef sizes = table.sizes();
  const at::IntArrayRef strides = table.strides();
  const int64_t step = layout == TableLayout::kRepeated ? 2 : 1;
  TableParams params = {table.const_data_ptr(), 0, 0, 0, 0, step * strides.back()};
  if (sizes.size() == 2) {
    params.m = strides[0];
  } else {
    params.b = sizes[0] == 1 ? 0 : strides[0];
    params.s = strides[1];
    if (sizes.size() == 4) params.h = strides[2];
  }
  return params;
}

IndexParams index_params(const at::Tensor& index) {
  return {index.const_data_ptr(), index.scalar_type() == at::kLong};
}

IndexParams index_params(const OptionalTensor& index) {
  return index.has_value() ? index_params(*index) : IndexParams{nullptr, false};
}

// Strides of a [S], [1, S] or [B, S] index, after `leading` dimensions.
void set_token_strides(const at::Tensor& index, int64_t leading, int64_t& b, int64_t& s) {
  const bool batched = index.dim() == leading + 2 && index.size(leading) != 1;
  b = batched ? index.stride(leading) : 0;
  s = index.stride(-1);
}

RowParams row_params(const Call& call, int64_t M) {
  const Arguments& a = call.arguments;
  RowParams rows = {};
  // Without pairs no row is read, so none is looked up: its index may be any.
  rows.gathered = !is_shared(call.cos) || call.P() == 0;
  rows.M = M;
  rows.offset = a.offset.guard_int(__FILE__, __LINE__);
  rows.positions = index_params(a.positions);
  if (a.positions.has_value()) {
    const int64_t leading = leading_dims(a);
    rows.positions_a = leading ? a.positions->stride(0) : 0;
    set_token_strides(*a.positions, leading, rows.positions_b, rows.positions_s);
  }
  rows.offsets = index_params(a.offsets);
  if (a.offsets.has_value()) rows.offsets_stride = a.offsets->stride(0);
  rows.cu_seqlens = index_params(a.cu_seqlens);
  if (a.cu_seqlens.has_value()) {
    rows.cu_seqlens_stride = a.cu_seqlens->stride(0);
    rows.N = a.cu_seqlens->size(0) - 1;
  }
  rows.out_rows = index_params(a.out_rows);
  if (a.out_rows.has_value()) set_token_strides(*a.out_rows, 0, rows.out_rows_b, rows.out_rows_s);
  return rows;
}

kernels::Storage storage_of(const at::Tensor& cache) {
  switch (cache.scalar_type()) {
    case at::kFloat8_e4m3fn:
      return kernels::Storage::kE4M3;
    case at::kFloat8_e5m2:
      return kernels::Storage::kE5M2;
    case at::kChar:
      return kernels::Storage::kInt8;
    default:
      return kernels::Storage::kOwn;
  }
}

kernels::CacheTensorParams cache_params(const at::Tensor& cache, const OptionalTensor& scale) {
  const at::IntArrayRef strides = cache.strides();
  const bool paged = cache.dim() == 4;
  kernels::CacheTensorParams params = {cache.mutable_data_ptr(),
                                       paged ? strides[0] : 0,
                                       strides[strides.size() - 3],
                                       strides[strides.size() - 2],
                                       strides.back(),
                                       nullptr,
                                       0};
  if (scale.has_value()) {
    params.scale = scale->const_data_ptr<float>();
    params.scale_stride = scale->dim() == 0 ? 0 : scale->stride(0);
  }
  return params;
}

}  // namespace

PreparedCall::PreparedCall(const Call& call, const Outputs& outputs) {
  const Arguments& a = call.arguments;
  const at::Tensor& x = *call.inputs[0];
  const at::Tensor* cos = &call.cos;
  const at::Tensor* sin = &call.sin;
  const at::ScalarType type = kernel_table_type(cos->scalar_type(), x.scalar_type());
  if (type != cos->scalar_type()) {
    converted_ = {cos->to(type), sin->to(type)};
    cos = &converted_[0];
    sin = &converted_[1];
  }
  kernels::RotateParams& p = params;
  p.count = call.count();
  for (int i = 0; i < p.count; ++i) {
    const at::Tensor& input = *call.inputs[i];
    const Sizes<int64_t> sizes(input.sizes(), call.layout);
    p.B = sizes.B;
    p.S = sizes.S;
    p.D = sizes.D;
    p.tensors[i] = {
        input.const_data_ptr(), nullptr, strides_of(input, call.layout), {}, sizes.H, false};
  }
  const int64_t P = call.P();
  p.pairing = {P, a.rotary_offset, pair_distance(a, P)};
  p.cos = table_params(*cos, call.table_layout);
  p.sin = table_params(*sin, call.table_layout);
  p.rows = row_params(call, call.cos.size(0));
  p.axes = a.axes.has_value() ? a.axes->data() : nullptr;
  p.dtype = dtype_of(x);
  p.table_dtype = dtype_of(*cos);
  p.precision = call.precision;
  p.inverse = a.inverse;
  p.per_head = is_per_head(call.cos);
  if (call.has_norm()) set_norm(call);
  set_outputs(call, outputs);
  if (call.cache != nullptr) set_cache(call);
}

void PreparedCall::set_outputs(const Call& call, const Outputs& outputs) {
  kernels::RotateParams& p = params;
  p.in_place = outputs[0] == call.inputs[0];
  for (int i = 0; i < p.count; ++i) {
    kernels::TensorParams& t = p.tensors[i];
    t.scattered = call.is_scattered(i);
    // No k_out, or a gradient that nobody asks for.
    if (outputs[i] == nullptr || !outputs[i]->defined()) continue;
    t.out = outputs[i]->mutable_data_ptr();
    t.out_strides = strides_of(*outputs[i], t.scattered ? Layout::kTHD : call.layout);
    if (t.scattered) p.rows.out_rows_limit = outputs[i]->size(0);
  }
}

C10_NOINLINE void PreparedCall::set_norm(const Call& call) {
  const NormArguments& a = call.arguments.norm;
  norm_.eps = *a.eps;
  norm_.zero_centered = a.zero_centered;
  norm_.cast = call.cast;
  norm_.after = a.after;
  for (int i = 0; i < call.count(); ++i) {
    const OptionalTensor& weight = call.weight(i);
    if (!weight.has_value()) continue;
    norm_.weights[i] = {weight->const_data_ptr(), weight->stride(0), dtype_of(*weight)};
  }
  params.norm = &norm_;
}

C10_NOINLINE void PreparedCall::set_cache(const Call& call) {
  const CacheArguments& a = *call.cache;
  const int64_t rank = a.k_cache.dim();
  kernels::RotateParams& p = params;
  cache_.storage = storage_of(a.k_cache);
  const int64_t page_size = a.k_cache.size(rank - 3);  // a cache of rows is one page
  cache_.page_size = std::max<int64_t>(page_size, 1);  // the kernels divide by it
  cache_.k = cache_params(a.k_cache, a.k_scale);
  if (a.v.has_value()) {
    const Sizes<int64_t> sizes(a.v->sizes(), call.layout);
    cache_.v = cache_params(*a.v_cache, a.v_scale);
    cache_.values = {
        a.v->const_data_ptr(), nullptr, strides_of(*a.v, call.layout), {}, sizes.H, false};
    cache_.values_D = sizes.D;
  }
  p.cache = &cache_;
  p.rows.out_rows = index_params(a.slots);
  set_token_strides(a.slots, 0, p.rows.out_rows_b, p.rows.out_rows_s);
  p.rows.out_rows_limit = rank == 3 ? page_size : a.k_cache.size(0) * page_size;
}

PreparedBackward::PreparedBackward(const Call& call, const OptionalTensors& grads,
                                   const Gradients& results)
    : forward_(call, {&results[0], &results[1]}) {
  params.call = forward_.params;
  for (int i = 0; i < call.count(); ++i) {
    if (!grads[i]->has_value()) continue;
    const at::Tensor& weight_grad = results[kernels::kMaxTensors + i];
    kernels::GradientParams& t = params.tensors[i];
    t.gradient = (*grads[i])->const_data_ptr();
    t.strides = strides_of(**grads[i], call.layout);
    if (!weight_grad.defined()) continue;
    t.weight_gradient = weight_grad.mutable_data_ptr();
    const kernels::RotateParams& p = params.call;
    const int64_t bytes = kernels::workspace_bytes(p.B, p.S, p.tensors[i].H, p.D, p.dtype);
    workspaces_[i] = at::empty({bytes}, weight_grad.options().dtype(at::kByte));
    t.workspace = workspaces_[i].mutable_data_ptr();
  }
}

void specialize_offset(const at::Tensor& written) {
  const c10::SymInt offset = written.sym_storage_offset();
  if (offset.maybe_as_int().has_value()) return;
  // One symbol at a time, since only an equation of one symbol makes it a constant.
  for (int64_t i = written.dim() - 1; i >= 0; --i) {
    written.sym_stride(i).guard_int(__FILE__, __LINE__);
    written.sym_size(i).guard_int(__FILE__, __LINE__);
  }
  offset.guard_int(__FILE__, __LINE__);
}

at::Tensor empty_output(const at::Tensor& x) {
  return x.is_non_overlapping_and_dense()
             ? at::empty_strided_symint(x.sym_sizes(), x.sym_strides(), x.options())
             : at::empty_symint(x.sym_sizes(), x.options());
}

at::Tensor allocate_output(const at::Tensor& x, c10::DispatchKey key, c10::Allocator* allocator) {
  const c10::DispatchKeySet keys(key);
  const at::ScalarType type = x.scalar_type();
  return at::Tensor(
      x.is_non_overlapping_and_dense()
          ? at::detail::empty_strided_generic(x.sizes(), x.strides(), allocator, keys, type)
          : at::detail::empty_generic(x.sizes(), allocator, keys, type, std::nullopt));
}

}  // namespace fused_rope
