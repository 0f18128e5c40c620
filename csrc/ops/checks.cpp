#include "ops/checks.h"

#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/MemoryOverlap.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>

namespace fused_rope {
namespace {

void check_device(const Call& call, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.device() == call.inputs[0]->device(), call.op, ": expected ", name,
                    " on device ", call.inputs[0]->device(), " as ", call.name(0), " is, got ",
                    tensor.device());
}

void check_index(const Call& call, const char* name, const OptionalTensor& index) {
  if (!index.has_value()) return;
  check_index_dtype(call.op, name, index);
  check_device(call, name, *index);
}

// Calls f(name, tensor) for what selects rows.
template <typename F>
void for_each_index(const Call& call, const F& f) {
  const Arguments& a = call.arguments;
  f("positions", a.positions);
  f("offset", a.offsets);
  f("cu_seqlens", a.cu_seqlens);
  f("out_rows", a.out_rows);
}

// A tensor of tokens and heads.
void check_tensor(const Call& call, const char* name, const at::Tensor& tensor) {
  const at::Tensor& x = *call.inputs[0];
  const int64_t rank = call.layout == Layout::kTHD ? 3 : 4;
  TORCH_CHECK_TYPE(!tensor.is_nested(), call.op, ": expected ", name, " to be dense, ",
                   kNestedAdvice);
  TORCH_CHECK_TYPE(is_supported(tensor.scalar_type()), call.op, ": expected ", name, " of dtype ",
                   kFloatingDtypes, ", got ", dtype_name(tensor.scalar_type()));
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type(), call.op, ": expected ", name,
                   " of q's dtype ", dtype_name(x.scalar_type()), ", got ",
                   dtype_name(tensor.scalar_type()));
  check_device(call, name, tensor);
  TORCH_CHECK_VALUE(tensor.dim() == rank, call.op, ": expected ", name, " of ", rank,
                    " dimensions for layout ", call.arguments.layout, ", got ", tensor.sym_sizes());
}

void check_tables(const Call& call) {
  const at::Device device = call.inputs[0]->device();
  for (const auto& [name, table] : {std::pair{"cos", &call.cos}, std::pair{"sin", &call.sin}}) {
    TORCH_CHECK_TYPE(is_supported(table->scalar_type()), call.op, ": expected ", name, " of dtype ",
                     kFloatingDtypes, ", got ", dtype_name(table->scalar_type()));
    TORCH_CHECK_VALUE(table->device() == device, call.op, ": expected ", name, " on device ",
                      device, " as ", call.name(0), " is, got ", table->device());
  }
  TORCH_CHECK_TYPE(call.cos.scalar_type() == call.sin.scalar_type(), call.op,
                   ": expected sin of cos's dtype ", dtype_name(call.cos.scalar_type()), ", got ",
                   dtype_name(call.sin.scalar_type()));
  TORCH_CHECK_VALUE(call.cos.dim() >= 2 && call.cos.dim() <= 4, call.op,
                    ": expected cos of shape [M, P], [B or 1, S, P] or [B or 1, S, H, P], got ",
                    call.cos.sym_sizes());
  TORCH_CHECK_VALUE(call.sin.dim() == call.cos.dim(), call.op, ": expected sin of cos's shape ",
                    call.cos.sym_sizes(), ", got ", call.sin.sym_sizes());
}

void check_options(const Call& call) {
  const Arguments& a = call.arguments;
  TORCH_CHECK_VALUE(a.rotary_offset >= 0, call.op, ": expected rotary_offset >= 0, got ",
                    a.rotary_offset);
  TORCH_CHECK_VALUE(a.blocks >= 1, call.op, ": expected blocks >= 1, got ", a.blocks);
  TORCH_CHECK_VALUE(a.blocks == 1 || !a.interleaved, call.op,
                    ": expected blocks=1 with interleaved=True, got blocks=", a.blocks);
  TORCH_CHECK_VALUE(!a.cu_seqlens.has_value() || call.layout == Layout::kTHD, call.op,
                    ": expected cu_seqlens with layout thd only, got layout ", a.layout);
  TORCH_CHECK_VALUE(
      !a.cu_seqlens.has_value() || (a.cu_seqlens->dim() == 1 && a.cu_seqlens->sym_size(0) > 0),
      call.op, ": expected cu_seqlens of shape [N + 1], got ", a.cu_seqlens->sym_sizes());
  TORCH_CHECK_VALUE(!a.axes.has_value() || a.positions.has_value(), call.op,
                    ": expected positions with a leading axis A for axes, got none");
}

void check_norm(const Call& call) {
  const NormArguments& norm = call.arguments.norm;
  const at::Tensor& x = *call.inputs[0];
  TORCH_CHECK_VALUE(*norm.eps >= 0 && std::isfinite(*norm.eps), call.op,
                    ": expected a finite eps >= 0, got ", *norm.eps);
  TORCH_CHECK_VALUE(call.cast != Cast::kNever || call.precision == Precision::kFp32, call.op,
                    ": expected cast=\"before\" or \"after\" with precision=\"model\", which ",
                    "rounds the normalized values, got cast=\"never\"");
  const char* or_float32 = x.scalar_type() == at::kFloat ? "" : " or float32";
  for (int i = 0; i < call.count(); ++i) {
    const OptionalTensor& weight = call.weight(i);
    if (!weight.has_value()) continue;
    const char* name = call.weight_name(i);
    const at::ScalarType type = weight->scalar_type();
    TORCH_CHECK_TYPE(type == x.scalar_type() || type == at::kFloat, call.op, ": expected ", name,
                     " of ", call.name(i), "'s dtype ", dtype_name(x.scalar_type()), or_float32,
                     ", got ", dtype_name(type));
    TORCH_CHECK_TYPE(call.cast != Cast::kBefore || type == x.scalar_type(), call.op, ": expected ",
                     name, " of ", call.name(i), "'s dtype ", dtype_name(x.scalar_type()),
                     " with cast=\"before\", got ", dtype_name(type),
                     ": convert it, or pass cast=\"after\"");
    TORCH_CHECK_VALUE(weight->device() == x.device(), call.op, ": expected ", name, " on device ",
                      x.device(), " as ", call.name(i), " is, got ", weight->device());
    TORCH_CHECK_VALUE(weight->dim() == 1, call.op, ": expected ", name, " of shape [D], got ",
                      weight->sym_sizes());
  }
}

void check_weight_sizes(const Call& call, int64_t D) {
  for (int i = 0; i < call.count(); ++i) {
    const OptionalTensor& weight = call.weight(i);
    TORCH_CHECK_VALUE(!weight.has_value() || weight->size(0) == D, call.op, ": expected ",
                      call.weight_name(i), " of shape [D], D=", D, ", got ", weight->sizes());
  }
}

// Per-token and per-head tables have no rows to select.
void check_no_row_selection(const Call& call) {
  const Arguments& a = call.arguments;
  const char* extra = a.positions.has_value()    ? "positions"
                      : a.offsets.has_value()    ? "offset"
                      : a.cu_seqlens.has_value() ? "cu_seqlens"
                                                 : nullptr;
  TORCH_CHECK_VALUE(extra == nullptr, call.op, ": expected no ", extra,
                    " with per-token tables, got cos of shape ", call.cos.sym_sizes());
  if (const auto offset = a.offset.maybe_as_int()) {
    TORCH_CHECK_VALUE(*offset == 0, call.op,
                      ": expected no offset with per-token tables, got offset=", *offset,
                      " and cos of shape ", call.cos.sym_sizes());
  }
}

// What to do about a table with too many columns for head_dim.
std::string advice_for_wide_table(const Call& call, const Sizes<int64_t>& x) {
  const int64_t columns = call.cos.sizes().back();
  std::string advice;
  if (x.D % 2 == 1) {
    advice = c10::str("; D is odd, so at most P=", x.D / 2,
                      " pairs fit and one element of each head is copied");
  }
  if (call.table_layout == TableLayout::kHalf && columns % 2 == 0 && columns <= x.D) {
    advice += "; if every number is there twice (full width), pass table_layout=\"tiled\" or ";
    advice += "\"repeated\"";
  }
  return advice;
}

void check_span(const Call& call, const Sizes<int64_t>& x) {
  const Arguments& a = call.arguments;
  const int64_t P = call.P();
  const bool half = call.table_layout == TableLayout::kHalf;
  TORCH_CHECK_VALUE(half || call.cos.sizes().back() % 2 == 0, call.op,
                    ": expected cos with an even number of columns (2P) for table_layout=\"",
                    a.table_layout, "\", got ", call.cos.sizes(),
                    "; an odd head_dim leaves one element of each head unrotated");
  TORCH_CHECK_VALUE(2 * P <= x.D, call.op, ": expected cos with ", half ? "P <= D/2" : "2P <= D",
                    " columns, D=", x.D, ", got ", call.cos.sizes(),
                    half ? "" : c10::str(" and table_layout=\"", a.table_layout, "\""),
                    advice_for_wide_table(call, x));
  TORCH_CHECK_VALUE(a.rotary_offset <= x.D - 2 * P, call.op,
                    ": expected rotary_offset + R <= D, R=", 2 * P, ", D=", x.D,
                    ", got rotary_offset=", a.rotary_offset);
  TORCH_CHECK_VALUE(P % a.blocks == 0, call.op, ": expected blocks that divide P=", P,
                    ", got blocks=", a.blocks);
  constexpr int64_t kMaxHeadDim = std::numeric_limits<int32_t>::max();  // kernels index D by int
  TORCH_CHECK_VALUE(x.D <= kMaxHeadDim, call.op, ": expected D < 2^31, got ", x.D);
}

// What to do about an input's sizes that do not fit: another layout in which they do, if any.
template <typename Fits>
std::string advice_for_layout(const Call& call, const Fits& fits) {
  if (call.layout == Layout::kTHD) return "";
  for (const Layout layout : {Layout::kBHSD, Layout::kBSHD, Layout::kSBHD}) {
    if (layout == call.layout || !fits(layout)) continue;
    return c10::str("; did you mean layout=\"", name_of(layout), "\"?");
  }
  return "";
}

void check_positions(const Call& call, const Sizes<int64_t>& x) {
  const Arguments& a = call.arguments;
  const int64_t P = call.P();
  const at::IntArrayRef sizes = a.positions->sizes();
  const size_t leading = leading_dims(a);
  const auto fits = [&](Layout layout) {
    const Sizes<int64_t> x(call.inputs[0]->sizes(), layout);
    return (sizes.size() == leading + 1 && sizes[leading] == x.S) ||
           (sizes.size() == leading + 2 && (sizes[leading] == x.B || sizes[leading] == 1) &&
            sizes[leading + 1] == x.S);
  };
  TORCH_CHECK_VALUE(fits(call.layout), call.op, ": expected positions of shape ",
                    leading ? "[A, S], [A, 1, S] or [A, B, S] with axes" : "[S], [1, S] or [B, S]",
                    " with B=", x.B, ", S=", x.S, ", got ", sizes, advice_for_layout(call, fits));
  if (!leading) return;
  TORCH_CHECK_VALUE(sizes[0] >= 1 && sizes[0] <= kernels::kMaxAxes, call.op,
                    ": expected positions with 1 <= A <= ", kernels::kMaxAxes, " axes, got ",
                    sizes);
  TORCH_CHECK_VALUE(P <= kernels::kMaxAxisPairs, call.op,
                    ": expected P <= ", kernels::kMaxAxisPairs, " pairs with axes, got ", P);
  TORCH_CHECK_VALUE(static_cast<int64_t>(a.axes->size()) == P, call.op, ": expected axes of P=", P,
                    " numbers, got ", a.axes->size());
  for (const int64_t axis : *a.axes) {
    TORCH_CHECK_VALUE(axis >= 0 && axis < sizes[0], call.op, ": expected axes in [0, A=", sizes[0],
                      "), got ", axis);
  }
}

void check_shared(const Call& call, const Sizes<int64_t>& x) {
  const Arguments& a = call.arguments;
  if (a.positions.has_value()) check_positions(call, x);
  if (a.offsets.has_value()) {
    const int64_t rows = a.cu_seqlens.has_value() ? a.cu_seqlens->size(0) - 1 : x.B;
    TORCH_CHECK_VALUE(a.offsets->dim() == 1 && a.offsets->size(0) == rows, call.op,
                      ": expected offset of shape [", a.cu_seqlens.has_value() ? "N" : "B", "=",
                      rows, "], got ", a.offsets->sizes());
    TORCH_CHECK_VALUE(a.offset == 0, call.op, ": expected one offset, got an int and a tensor");
  }
  if (!are_rows_known(a)) return;
  const int64_t offset = a.offset.guard_int(__FILE__, __LINE__);
  TORCH_CHECK_VALUE(offset >= 0, call.op, ": expected offset >= 0 without positions, got ", offset);
  const int64_t M = call.cos.size(0);
  const uint64_t needed = static_cast<uint64_t>(offset) + static_cast<uint64_t>(x.S);
  TORCH_CHECK_VALUE(offset <= M && x.S <= M - offset, call.op, ": cos has ", M, " rows, but ",
                    offset ? c10::str("offset (", offset, ") + S (", x.S, ") = ") : "S = ", needed,
                    " are needed");
}

void check_per_token(const Call& call, const at::Tensor& input) {
  const at::IntArrayRef sizes = call.cos.sizes();
  const bool per_head = is_per_head(call.cos);
  const auto fits = [&](Layout layout) {
    const Sizes<int64_t> x(input.sizes(), layout);
    return (sizes[0] == x.B || sizes[0] == 1) && sizes[1] == x.S && (!per_head || sizes[2] == x.H);
  };
  const Sizes<int64_t> x(input.sizes(), call.layout);
  TORCH_CHECK_VALUE(fits(call.layout), call.op, ": expected cos of shape ",
                    per_head ? "[B or 1, S, H, P]" : "[B or 1, S, P]", " with B=", x.B, ", S=", x.S,
                    per_head ? c10::str(", H=", x.H) : "", ", got ", sizes,
                    advice_for_layout(call, fits));
}

// Whether two tensors provably share memory. Functional tensors have no data: compare the ranges
// that they cover in one storage.
bool overlaps(const at::Tensor& x, const at::Tensor& y) {
  if (!at::functionalization::impl::isFunctionalTensor(x)) {
    const auto status = at::get_overlap_status(x, y);
    return status == at::MemOverlapStatus::Full || status == at::MemOverlapStatus::Partial;
  }
  const c10::TensorImpl *a = x.unsafeGetTensorImpl(), *b = y.unsafeGetTensorImpl();
  if (a == b) return true;
  if (!a->unsafe_storage().is_alias_of(b->unsafe_storage())) return false;
  if (!a->is_non_overlapping_and_dense_or_false()) return false;
  if (!b->is_non_overlapping_and_dense_or_false()) return false;
  const auto precedes = [](const c10::SymInt& from, const c10::SymInt& to) {
    return TORCH_GUARD_OR_FALSE(from.sym_lt(to));
  };
  const c10::SymInt &a_begin = a->sym_storage_offset(), &b_begin = b->sym_storage_offset();
  return precedes(0, a->sym_numel()) && precedes(0, b->sym_numel()) &&
         precedes(a_begin, b_begin + b->sym_numel()) && precedes(b_begin, a_begin + a->sym_numel());
}

// A written tensor needs its own memory for every element. An inference tensor written outside
// inference mode would change without a new version.
void check_writable(const Call& call, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(at::has_internal_overlap(tensor) != at::MemOverlap::Yes, call.op, ": expected ", name,
              " without elements that share memory, got strides ", tensor.sym_strides(),
              ": clone it first");
  TORCH_CHECK(!tensor.is_inference() || c10::InferenceMode::is_enabled(), call.op, ": expected ",
              name, " not to be an inference tensor, got one: clone it, or call this under ",
              "torch.inference_mode()");
}

void check_no_overlap(const Call& call, const char* name, const at::Tensor& tensor,
                      const char* other_name, const at::Tensor& other) {
  TORCH_CHECK(!overlaps(tensor, other), call.op, ": expected ", name, " and ", other_name,
              " not to share memory, got overlapping tensors");
}

// The tables, weights and indices, which a kernel reads while it writes `tensor`.
void check_no_overlap_with_constants(const Call& call, const char* name, const at::Tensor& tensor) {
  check_no_overlap(call, name, tensor, "cos", call.cos);
  check_no_overlap(call, name, tensor, "sin", call.sin);
  for (int i = 0; call.has_norm() && i < call.count(); ++i) {
    const OptionalTensor& weight = call.weight(i);
    if (weight.has_value()) check_no_overlap(call, name, tensor, call.weight_name(i), *weight);
  }
  for_each_index(call, [&](const char* index_name, const OptionalTensor& index) {
    if (index.has_value()) check_no_overlap(call, name, tensor, index_name, *index);
  });
}

// Output rows or slots. Under a tracer, sizes are symbolic.
void check_row_of_each_token(const Call& call, const char* name, const at::Tensor& index) {
  const Sizes<c10::SymInt> x(call.inputs[0]->sym_sizes(), call.layout);
  const bool packed = call.layout == Layout::kTHD;
  const c10::SymIntArrayRef rows = index.sym_sizes();
  const bool fits = (rows.size() == 2 && rows[0] == x.B && rows[1] == x.S) ||
                    (packed && rows.size() == 1 && rows[0] == x.S);
  TORCH_CHECK_VALUE(fits, call.op, ": expected ", name, " of shape ", packed ? "[T]" : "[B, S]",
                    " with B=", x.B, ", S=", x.S, ", got ", rows);
}

// Output i, written by out_rows. Under a tracer, sizes are symbolic.
void check_scattered(const Call& call, int i, const at::Tensor& out) {
  const Sizes<c10::SymInt> x(call.inputs[i]->sym_sizes(), call.layout);
  TORCH_CHECK_VALUE(out.sym_size(1) == x.H && out.sym_size(2) == x.D, call.op, ": expected ",
                    call.out_name(i), " of shape [rows, H=", x.H, ", D=", x.D,
                    "] with out_rows, got ", out.sym_sizes());
  check_row_of_each_token(call, "out_rows", *call.arguments.out_rows);
}

// Where rotate_and_cache stores k or v.
struct CacheTensor {
  const char* name;
  const at::Tensor& x;
  const char* cache_name;
  const at::Tensor& cache;
  const char* scale_name;
  const OptionalTensor& scale;
};

// Calls f with the CacheTensor of k, and with that of v if there is one.
template <typename F>
void for_each_cache(const Call& call, const F& f) {
  const CacheArguments& a = *call.cache;
  f(CacheTensor{"k", *call.inputs[1], "k_cache", a.k_cache, "k_scale", a.k_scale});
  if (a.v.has_value()) f(CacheTensor{"v", *a.v, "v_cache", *a.v_cache, "v_scale", a.v_scale});
}

void check_cache_dtype(const Call& call, const CacheTensor& t) {
  const at::ScalarType own = t.x.scalar_type(), type = t.cache.scalar_type();
  const bool has_8_bits =
      type == at::kFloat8_e4m3fn || type == at::kFloat8_e5m2 || type == at::kChar;
  TORCH_CHECK_TYPE(type == own || has_8_bits, call.op, ": expected ", t.cache_name, " of ", t.name,
                   "'s dtype ", dtype_name(own), ", float8_e4m3fn, float8_e5m2 or int8, got ",
                   dtype_name(type));
  TORCH_CHECK_TYPE(type == call.cache->k_cache.scalar_type(), call.op, ": expected ", t.cache_name,
                   " of k_cache's dtype ", dtype_name(call.cache->k_cache.scalar_type()), ", got ",
                   dtype_name(type));
  TORCH_CHECK_VALUE(t.scale.has_value() || !has_8_bits, call.op, ": expected ", t.scale_name,
                    " with ", t.cache_name, " of dtype ", dtype_name(type),
                    ", got none: pass a float32 tensor [] or [Hk], the value of 1 in the cache");
  TORCH_CHECK_VALUE(!t.scale.has_value() || has_8_bits, call.op, ": expected no ", t.scale_name,
                    " with ", t.cache_name, " of ", t.name, "'s own dtype, got one");
}

void check_scale(const Call& call, const char* name, const at::Tensor& scale) {
  TORCH_CHECK_TYPE(scale.scalar_type() == at::kFloat, call.op, ": expected ", name,
                   " of dtype float32, got ", dtype_name(scale.scalar_type()));
  check_device(call, name, scale);
  TORCH_CHECK_VALUE(scale.dim() <= 1, call.op, ": expected ", name, " of shape [] or [Hk], got ",
                    scale.sym_sizes());
}

// Options of a norm without eps, which would have no effect.
void check_no_norm(const Call& call) {
  const NormArguments& norm = call.arguments.norm;
  const char* given = call.weight(0).has_value()                        ? "q_weight"
                      : call.weight(1).has_value()                      ? "k_weight"
                      : norm.zero_centered                              ? "zero_centered"
                      : norm.after                                      ? "after"
                      : parse<Cast>(call.op, norm.cast) != Cast::kNever ? "cast"
                                                                        : nullptr;
  TORCH_CHECK_VALUE(given == nullptr, call.op, ": expected eps with ", given,
                    ", got none: pass the eps of the norm");
}

void check_cache_sizes(const Call& call, const CacheTensor& t) {
  const Sizes<int64_t> k(call.inputs[1]->sizes(), call.layout), x(t.x.sizes(), call.layout);
  TORCH_CHECK_VALUE(x.B == k.B && x.S == k.S && x.H == k.H, call.op, ": expected ", t.name,
                    " with k's B=", k.B, ", S=", k.S, ", H=", k.H, ", got ", t.x.sizes());
  const at::IntArrayRef sizes = t.cache.sizes();
  const size_t rank = sizes.size();
  const bool is_transposed = rank == 4 && sizes[1] == x.H && sizes[3] == x.D;
  TORCH_CHECK_VALUE(sizes[rank - 2] == x.H && sizes[rank - 1] == x.D, call.op, ": expected ",
                    t.cache_name, " of shape [", rank == 4 ? "pages, page_size" : "rows",
                    ", Hk=", x.H, ", D=", x.D, "], got ", sizes,
                    is_transposed ? ": pass its transpose(1, 2)" : "");
  const at::IntArrayRef slots = call.cache->k_cache.sizes().slice(0, rank - 2);
  TORCH_CHECK_VALUE(sizes.slice(0, rank - 2) == slots, call.op, ": expected ", t.cache_name,
                    " with k_cache's ", rank == 4 ? "pages and page_size " : "rows ", slots,
                    ", got ", sizes);
  TORCH_CHECK_VALUE(!t.scale.has_value() || t.scale->dim() == 0 || t.scale->size(0) == x.H, call.op,
                    ": expected ", t.scale_name, " of shape [] or [Hk=", x.H, "], got ",
                    t.scale->sizes());
}

}  // namespace

bool is_supported(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16 || type == at::kFloat || type == at::kDouble;
}

std::string dtype_name(at::ScalarType type) { return std::string(c10::getDtypeNames(type).first); }

void check_index_dtype(const char* op, const char* name, const OptionalTensor& index) {
  if (!index.has_value()) return;
  const at::ScalarType type = index->scalar_type();
  TORCH_CHECK_TYPE(type == at::kInt || type == at::kLong, op, ": expected ", name,
                   " of dtype int32 or int64, got ", dtype_name(type));
}

void check_metadata(const Call& call) {
  for (int i = 0; i < call.count(); ++i) check_tensor(call, call.name(i), *call.inputs[i]);
  check_tables(call);
  for_each_index(
      call, [&](const char* name, const OptionalTensor& index) { check_index(call, name, index); });
  check_options(call);
  if (call.has_norm()) check_norm(call);
  if (!is_shared(call.cos)) check_no_row_selection(call);
}

bool has_symbols(const Call& call) {
  const Arguments& a = call.arguments;
  if (!a.offset.maybe_as_int().has_value()) return true;
  const auto is_symbolic = [](const at::Tensor* tensor) {
    return tensor != nullptr && tensor->unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  };
  const std::array<const at::Tensor*, 7> tensors = {
      call.inputs[0],     call.inputs[1],       &call.cos, &call.sin, pointer(a.positions),
      pointer(a.offsets), pointer(a.cu_seqlens)};
  const auto is_symbolic_weight = [&](const OptionalTensor* weight) {
    return weight != nullptr && is_symbolic(pointer(*weight));
  };
  return std::any_of(tensors.begin(), tensors.end(), is_symbolic) ||
         std::any_of(call.weights.begin(), call.weights.end(), is_symbolic_weight);
}

void check_sizes(const Call& call) {
  const Sizes<int64_t> x(call.inputs[0]->sizes(), call.layout);
  TORCH_CHECK_VALUE(call.sin.sizes() == call.cos.sizes(), call.op, ": expected sin of cos's shape ",
                    call.cos.sizes(), ", got ", call.sin.sizes());
  check_span(call, x);
  for (int i = 0; i < call.count(); ++i) {
    const at::Tensor& input = *call.inputs[i];
    const auto fits = [&](Layout layout) {
      const Sizes<int64_t> q(call.inputs[0]->sizes(), layout), other(input.sizes(), layout);
      return other.B == q.B && other.S == q.S && other.D == q.D;
    };
    TORCH_CHECK_VALUE(fits(call.layout), call.op, ": expected ", call.name(i), " with q's B=", x.B,
                      ", S=", x.S, ", D=", x.D, ", got ", input.sizes(),
                      advice_for_layout(call, fits));
    if (!is_shared(call.cos)) check_per_token(call, input);
  }
  if (is_shared(call.cos)) check_shared(call, x);
  if (call.has_norm()) check_weight_sizes(call, x.D);
}

void check_cu_seqlens(const Call& call) {
  const OptionalTensor& cu_seqlens = call.arguments.cu_seqlens;
  if (!cu_seqlens.has_value() || !cu_seqlens->is_cpu()) return;
  const at::Tensor starts = cu_seqlens->to(at::kLong).contiguous();
  const int64_t* first = starts.const_data_ptr<int64_t>();
  const int64_t* last = first + starts.numel();
  if (last - first == 1) return;  // no sequence, all padding
  TORCH_CHECK_VALUE(*first == 0 && std::is_sorted(first, last), call.op,
                    ": expected cu_seqlens that start at 0 and do not descend, got ",
                    at::IntArrayRef(first, std::min<int64_t>(last - first, 8)),
                    last - first > 8 ? " and more" : "",
                    "; if these are the lengths of the sequences, pass their cumulative sums, "
                    "torch.nn.functional.pad(lengths.cumsum(0), (1, 0))");
}

void check_in_place(const Call& call) {
  for (int i = 0; i < call.count(); ++i) {
    check_writable(call, call.name(i), *call.inputs[i]);
    check_no_overlap_with_constants(call, call.name(i), *call.inputs[i]);
  }
  if (call.count() == 2) check_no_overlap(call, "k", *call.inputs[1], "q", *call.inputs[0]);
}

void check_out_metadata(const Call& call, const Outputs& outputs) {
  for (int i = 0; i < call.count() && outputs[i] != nullptr; ++i) {
    const at::Tensor& in = *call.inputs[i];
    const at::Tensor& out = *outputs[i];
    TORCH_CHECK_TYPE(out.scalar_type() == in.scalar_type(), call.op, ": expected ",
                     call.out_name(i), " of dtype ", dtype_name(in.scalar_type()), " as ",
                     call.name(i), " is, got ", dtype_name(out.scalar_type()));
    TORCH_CHECK_VALUE(out.device() == in.device(), call.op, ": expected ", call.out_name(i),
                      " on device ", in.device(), " as ", call.name(i), " is, got ", out.device());
    const bool scattered = call.is_scattered(i);
    TORCH_CHECK_VALUE(out.dim() == (scattered ? 3 : in.dim()), call.op, ": expected ",
                      call.out_name(i), " of shape ",
                      scattered ? "[rows, H, D] with out_rows" : c10::str(in.sym_sizes()), ", got ",
                      out.sym_sizes());
  }
}

void check_out(const Call& call, const Outputs& outputs) {
  check_out_metadata(call, outputs);
  for (int i = 0; i < call.count() && outputs[i] != nullptr; ++i) {
    if (call.is_scattered(i)) {
      check_scattered(call, i, *outputs[i]);
    } else {
      TORCH_CHECK_VALUE(outputs[i]->sym_sizes() == call.inputs[i]->sym_sizes(), call.op,
                        ": expected ", call.out_name(i), " of shape ", call.inputs[i]->sym_sizes(),
                        " as ", call.name(i), " is, got ", outputs[i]->sym_sizes());
    }
    check_writable(call, call.out_name(i), *outputs[i]);
    for (int j = 0; j < call.count(); ++j)
      check_no_overlap(call, call.out_name(i), *outputs[i], call.name(j), *call.inputs[j]);
    for (int j = 0; j < i; ++j)
      check_no_overlap(call, call.out_name(i), *outputs[i], call.out_name(j), *outputs[j]);
    check_no_overlap_with_constants(call, call.out_name(i), *outputs[i]);
  }
}

void check_cache_metadata(const Call& call) {
  const CacheArguments& a = *call.cache;
  TORCH_CHECK_VALUE(a.v.has_value() == a.v_cache.has_value(), call.op, ": expected ",
                    a.v.has_value() ? "v_cache with v" : "no v_cache without v", ", got ",
                    a.v.has_value() ? "none" : "one", ": pass both or neither");
  TORCH_CHECK_VALUE(a.v.has_value() || !a.v_scale.has_value(), call.op,
                    ": expected no v_scale without v, got one");
  if (a.v.has_value()) check_tensor(call, "v", *a.v);
  check_index(call, "slots", a.slots);
  for_each_cache(call, [&](const CacheTensor& t) {
    check_cache_dtype(call, t);
    check_device(call, t.cache_name, t.cache);
    const int64_t rank = a.k_cache.dim();
    TORCH_CHECK_VALUE(t.cache.dim() == rank && (rank == 3 || rank == 4), call.op, ": expected ",
                      t.cache_name, " of shape [rows, Hk, D] or [pages, page_size, Hk, D]",
                      &t.cache == &a.k_cache ? "" : " as k_cache is", ", got ",
                      t.cache.sym_sizes());
    if (t.scale.has_value()) check_scale(call, t.scale_name, *t.scale);
  });
  if (!call.has_norm()) check_no_norm(call);
}

void check_cache(const Call& call, const Outputs& outputs) {
  check_cache_metadata(call);
  check_row_of_each_token(call, "slots", call.cache->slots);
  for_each_cache(call, [&](const CacheTensor& t) { check_cache_sizes(call, t); });
  for_each_cache(call, [&](const CacheTensor& written) {
    const char* const name = written.cache_name;
    check_writable(call, name, written.cache);
    for (int i = 0; i < call.count(); ++i) {
      check_no_overlap(call, name, written.cache, call.name(i), *call.inputs[i]);
      if (outputs[i] == nullptr) continue;
      check_no_overlap(call, name, written.cache, call.out_name(i), *outputs[i]);
    }
    check_no_overlap_with_constants(call, name, written.cache);
    check_no_overlap(call, name, written.cache, "slots", call.cache->slots);
    for_each_cache(call, [&](const CacheTensor& t) {
      check_no_overlap(call, name, written.cache, t.name, t.x);
      if (&t.cache != &written.cache)
        check_no_overlap(call, name, written.cache, t.cache_name, t.cache);
      if (t.scale.has_value()) check_no_overlap(call, name, written.cache, t.scale_name, *t.scale);
    });
  });
  for (int i = 0; i < call.count() && outputs[i] != nullptr; ++i) {
    check_no_overlap(call, call.out_name(i), *outputs[i], "slots", call.cache->slots);
    for_each_cache(call, [&](const CacheTensor& t) {
      check_no_overlap(call, call.out_name(i), *outputs[i], t.name, t.x);
      if (t.scale.has_value())
        check_no_overlap(call, call.out_name(i), *outputs[i], t.scale_name, *t.scale);
    });
  }
}

void check_grads_metadata(const Call& call, const OptionalTensors& grads) {
  for (int i = 0; i < call.count(); ++i) {
    if (!grads[i]->has_value()) continue;
    const at::Tensor &grad = **grads[i], &x = *call.inputs[i];
    TORCH_CHECK_TYPE(grad.scalar_type() == x.scalar_type(), call.op, ": expected the gradient of ",
                     call.out_name(i), " of dtype ", dtype_name(x.scalar_type()), ", got ",
                     dtype_name(grad.scalar_type()));
    TORCH_CHECK_VALUE(grad.device() == x.device(), call.op, ": expected the gradient of ",
                      call.out_name(i), " on device ", x.device(), ", got ", grad.device());
    TORCH_CHECK_VALUE(grad.dim() == x.dim(), call.op, ": expected the gradient of ",
                      call.out_name(i), " of shape ", x.sym_sizes(), ", got ", grad.sym_sizes());
  }
}

void check_grads(const Call& call, const OptionalTensors& grads) {
  check_grads_metadata(call, grads);
  for (int i = 0; i < call.count(); ++i) {
    if (!grads[i]->has_value()) continue;
    const c10::SymIntArrayRef expected = call.inputs[i]->sym_sizes();
    const c10::SymIntArrayRef got = (*grads[i])->sym_sizes();
    TORCH_CHECK_VALUE(got == expected, call.op, ": expected the gradient of ", call.out_name(i),
                      " of shape ", expected, ", got ", got);
  }
}

}  // namespace fused_rope
