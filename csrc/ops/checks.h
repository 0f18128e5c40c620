// Checks of what a caller passes, and their messages, once for all devices. They run before any
// memory is touched.
#pragma once

#include "ops/dispatch.h"
#include "ops/enums.h"

namespace fused_rope {

// Tables are shared [M, P], per token [B or 1, S, P], or per head [B or 1, S, H, P].
inline bool is_shared(const at::Tensor& table) { return table.dim() == 2; }
inline bool is_per_head(const at::Tensor& table) { return table.dim() == 4; }

// One call with its enums parsed.
struct Call : RawCall {
  explicit Call(const RawCall& raw)
      : RawCall(raw),
        layout(parse<Layout>(op, arguments.layout)),
        precision(parse<Precision>(op, arguments.precision)),
        table_layout(parse<TableLayout>(op, arguments.table_layout)),
        cast(has_norm() ? parse<Cast>(op, arguments.norm.cast) : Cast::kNever) {}

  int64_t P() const { return pairs_of(table_layout, cos.sizes().back()); }

  // Whether the tokens of output i are written to the rows that out_rows selects.
  bool is_scattered(int i) const { return i == count() - 1 && arguments.out_rows.has_value(); }

  Layout layout;
  Precision precision;
  TableLayout table_layout;
  Cast cast;
};

// Sizes by letter; packed layouts have B = 1 and S = T. Int is int64_t or SymInt.
template <typename Int>
struct Sizes {
  Sizes(at::ArrayRef<Int> sizes, Layout layout)
      : B(dims_of(layout).batch == kNoBatch ? Int(1) : sizes[dims_of(layout).batch]),
        S(sizes[dims_of(layout).sequence]),
        H(sizes[dims_of(layout).head]),
        D(sizes.back()) {}

  Int B, S, H, D;
};

// The dtypes of inputs and tables.
inline constexpr char kFloatingDtypes[] = "float16, bfloat16, float32 or float64";
bool is_supported(at::ScalarType type);

// "float32", as in Python. Torch's own names depend on its version.
std::string dtype_name(at::ScalarType type);

// TypeError if `index` has a dtype other than int32 and int64.
void check_index_dtype(const char* op, const char* name, const OptionalTensor& index);

// What to do with a nested tensor, for messages.
inline constexpr char kNestedAdvice[] =
    "got a nested tensor: pass the values() of a jagged one with layout=\"thd\" and its offsets() "
    "as cu_seqlens";

// Checks dtypes, ranks, devices and options: all that is known of meta tensors.
void check_metadata(const Call& call);

// Whether a size or the offset is a symbol of a tracer. Then the compiled code checks sizes.
bool has_symbols(const Call& call);

// Checks sizes, and rows that are known on the host. check_metadata must have passed.
void check_sizes(const Call& call);

// Checks the values of cu_seqlens on the host. Kernels check the rows that follow from others.
void check_cu_seqlens(const Call& call);

// In place: refuses tensors whose elements share memory, and inference tensors outside inference
// mode.
void check_in_place(const Call& call);

// Checks the dtypes, devices and ranks of given outputs; check_out also checks their shapes,
// out_rows and provable overlap.
void check_out_metadata(const Call& call, const Outputs& outputs);
void check_out(const Call& call, const Outputs& outputs);

// rotate_and_cache: checks the dtypes, devices and ranks of v, the caches, slots and scales;
// check_cache also checks their shapes and, with the given outputs, provable overlap.
void check_cache_metadata(const Call& call);
void check_cache(const Call& call, const Outputs& outputs);

// Checks the gradients of the outputs of a backward call. check_grads also checks their shapes.
void check_grads_metadata(const Call& call, const OptionalTensors& grads);
void check_grads(const Call& call, const OptionalTensors& grads);

}  // namespace fused_rope
