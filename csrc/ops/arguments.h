// The arguments that follow the tensors in every schema. The dispatcher passes them as a flat list;
// everything here takes them as one struct, and the list is written down only in this file, in
// schema.cpp and in the Python binding.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string_view>

namespace fused_rope {

using OptionalTensor = std::optional<at::Tensor>;

// Borrowed from the caller for the duration of a call.
struct Arguments {
  const OptionalTensor& positions;
  const OptionalTensor& offsets;
  const OptionalTensor& cu_seqlens;
  const OptionalTensor& out_rows;
  c10::SymInt offset;
  std::string_view layout;
  at::OptionalIntArrayRef axes;
  int64_t rotary_offset;
  bool interleaved;
  int64_t blocks;
  bool inverse;
  std::string_view precision;
  std::string_view table_layout;
};

inline const OptionalTensor kNoTensor = std::nullopt;

struct RotateOptions;

// Borrowed from `options`.
Arguments arguments_of(const RotateOptions& options);

// Flat<&f>::call is what the dispatcher calls for f(arguments, tensors...), FlatOut<&f>::call the
// same for schemas with out_rows. Where f is the typed call of a public operator, `dispatch` calls
// that operator through the dispatcher.
template <auto kFunction, typename... OutRows>
struct Flat;

template <auto kFunction>
using FlatOut = Flat<kFunction, const OptionalTensor&>;

template <typename Result, typename... Tensors, Result (*kFunction)(const Arguments&, Tensors...),
          typename... OutRows>
struct Flat<kFunction, OutRows...> {
  static Result call(Tensors... tensors, const OptionalTensor& positions,
                     const OptionalTensor& offsets, const OptionalTensor& cu_seqlens,
                     OutRows... out_rows, c10::SymInt offset, std::string_view layout,
                     at::OptionalIntArrayRef axes, int64_t rotary_offset, bool interleaved,
                     int64_t blocks, bool inverse, std::string_view precision,
                     std::string_view table_layout) {
    return kFunction(
        {positions, offsets, cu_seqlens, or_none(out_rows...), std::move(offset), layout, axes,
         rotary_offset, interleaved, blocks, inverse, precision, table_layout},
        tensors...);
  }

  static Result dispatch(const char* name, const Arguments& a, Tensors... tensors) {
    static const auto handle =
        c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<decltype(call)>();
    return handle.call(tensors..., a.positions, a.offsets, a.cu_seqlens,
                       static_cast<OutRows>(a.out_rows)..., a.offset, a.layout, a.axes,
                       a.rotary_offset, a.interleaved, a.blocks, a.inverse, a.precision,
                       a.table_layout);
  }

 private:
  static const OptionalTensor& or_none() { return kNoTensor; }
  static const OptionalTensor& or_none(const OptionalTensor& out_rows) { return out_rows; }
};

using TensorPair = std::tuple<at::Tensor, at::Tensor>;

at::Tensor call_rotate(const Arguments& arguments, const at::Tensor& x, const at::Tensor& cos,
                       const at::Tensor& sin);
void call_rotate_(const Arguments& arguments, const at::Tensor& x, const at::Tensor& cos,
                  const at::Tensor& sin);
TensorPair call_rotate_qk(const Arguments& arguments, const at::Tensor& q, const at::Tensor& k,
                          const at::Tensor& cos, const at::Tensor& sin);
void call_rotate_qk_(const Arguments& arguments, const at::Tensor& q, const at::Tensor& k,
                     const at::Tensor& cos, const at::Tensor& sin);
void call_rotate_out(const Arguments& arguments, const at::Tensor& x, const at::Tensor& cos,
                     const at::Tensor& sin, const at::Tensor& out);
void call_rotate_qk_out(const Arguments& arguments, const at::Tensor& q, const at::Tensor& k,
                        const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& q_out,
                        const at::Tensor& k_out);

}  // namespace fused_rope
