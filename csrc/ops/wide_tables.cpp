#include "ops/wide_tables.h"

#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <array>

#include "ops/checks.h"

namespace fused_rope {
namespace {

constexpr int64_t kMaxDims = 4;

// Whether a call with these tensors concerns autograd and our kernels alone: nobody traces, maps or
// replaces it.
template <typename... Tensors>
bool are_plain(const Tensors&... tensors) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet plain =
      c10::DispatchKeySet({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU,
                           DispatchKey::AutogradCUDA}) |
      c10::default_included_set | c10::autocast_dispatch_keyset;
  const c10::DispatchKeySet keys =
      (c10::impl::tls_local_dispatch_key_set().included_ | ... | tensors.key_set());
  return (keys.raw_repr() & ~plain.raw_repr()) == 0;
}

bool is_differentiated(const at::Tensor& table) {
  return table.requires_grad() || table._fw_grad(/*level=*/0).defined();
}

// A view of other sizes and strides, the base's version counter its own.
at::Tensor view_of(const at::Tensor& base, at::IntArrayRef sizes, at::IntArrayRef strides) {
  const c10::TensorImpl* impl = base.unsafeGetTensorImpl();
  auto view = impl->shallow_copy_and_detach(impl->version_counter(),
                                            /*allow_tensor_metadata_change=*/true);
  view->set_sizes_and_strides(sizes, strides);
  return at::Tensor(std::move(view));
}

// The operator's table in a caller's, beside heads of D lanes.
std::optional<at::Tensor> narrow(const at::Tensor& table, const WideTables& form, int64_t D) {
  const int64_t extra = table.dim() - form.dims;
  const at::IntArrayRef from = table.sizes();
  if (table.dim() < 2 || form.dims > kMaxDims ||
      !std::all_of(from.begin(), from.begin() + std::max<int64_t>(extra, 0),
                   [](int64_t size) { return size == 1; })) {
    return std::nullopt;
  }
  std::array<int64_t, kMaxDims> sizes, strides;
  for (int64_t i = 0; i < form.dims; ++i) {
    const bool added = i + extra < 0;
    sizes[i] = added ? 1 : from[i + extra];
    strides[i] = added ? 0 : table.strides()[i + extra];
  }
  int64_t& columns = sizes[form.dims - 1];
  if (form.width == "repeated") {
    columns = (columns + 1) / 2;
    strides[form.dims - 1] *= 2;
  } else if (form.width == "either") {
    if (columns != D / 2 && (columns != D || D % 2 != 0)) return std::nullopt;
    columns = D / 2;
  } else if (form.width != "half") {
    columns /= 2;
  }
  const auto dims = static_cast<size_t>(form.dims);
  return view_of(table, {sizes.data(), dims}, {strides.data(), dims});
}

}  // namespace

std::optional<TensorPair> rotate_qk_wide(Arguments a, const WideTables& form, const at::Tensor& q,
                                         const at::Tensor& k, const at::Tensor& cos,
                                         const at::Tensor& sin) {
  if (!are_plain(q, k, cos, sin) || is_differentiated(cos) || is_differentiated(sin) ||
      q.dim() == 0) {
    return std::nullopt;
  }
  const int64_t D = q.sizes().back();
  const std::optional<at::Tensor> half_cos = narrow(cos, form, D);
  const std::optional<at::Tensor> half_sin = narrow(sin, form, D);
  if (!half_cos.has_value() || !half_sin.has_value()) return std::nullopt;
  if (form.trailing) a.rotary_offset = D - 2 * half_cos->sizes().back();
  if (c10::promoteTypes(q.scalar_type(), cos.scalar_type()) != q.scalar_type()) {
    a.precision = name_of(Precision::kFp32);
  }
  return call_rotate_qk(a, q, k, *half_cos, *half_sin);
}

}  // namespace fused_rope
