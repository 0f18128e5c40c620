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
};

inline const OptionalTensor kNoTensor = std::nullopt;

struct RotateOptions;

// Borrowed from `options`.
Arguments arguments_of(const RotateOptions& options);

// Flat<&f>::call is what the dispatcher calls for f(arguments, tensors...); FlatOut the same for
// schemas with out_rows.
template <auto kFunction>
struct Flat;

template <typename Result, typename... Tensors, Result (*kFunction)(const Arguments&, Tensors...)>
struct Flat<kFunction> {
  static Result call(Tensors... tensors, const OptionalTensor& positions,
                     const OptionalTensor& offsets, const OptionalTensor& cu_seqlens,
                     c10::SymInt offset, std::string_view layout, at::OptionalIntArrayRef axes,
                     int64_t rotary_offset, bool interleaved, int64_t blocks, bool inverse,
                     std::string_view precision) {
    return kFunction({positions, offsets, cu_seqlens, kNoTensor, std::move(offset), layout, axes,
                      rotary_offset, interleaved, blocks, inverse, precision},
                     tensors...);
  }
};

template <auto kFunction>
struct FlatOut;

template <typename Result, typename... Tensors, Result (*kFunction)(const Arguments&, Tensors...)>
struct FlatOut<kFunction> {
  static Result call(Tensors... tensors, const OptionalTensor& positions,
                     const OptionalTensor& offsets, const OptionalTensor& cu_seqlens,
                     const OptionalTensor& out_rows, c10::SymInt offset, std::string_view layout,
                     at::OptionalIntArrayRef axes, int64_t rotary_offset, bool interleaved,
                     int64_t blocks, bool inverse, std::string_view precision) {
    return kFunction({positions, offsets, cu_seqlens, out_rows, std::move(offset), layout, axes,
                      rotary_offset, interleaved, blocks, inverse, precision},
                     tensors...);
  }
};

// Calls the public operator `name` through the dispatcher; kFunction has its type, Arguments first.
template <auto kFunction, typename... Tensors>
auto call_operator(const char* name, const Arguments& a, const Tensors&... tensors) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow(name, "")
                                 .typed<decltype(Flat<kFunction>::call)>();
  return handle.call(tensors..., a.positions, a.offsets, a.cu_seqlens, a.offset, a.layout, a.axes,
                     a.rotary_offset, a.interleaved, a.blocks, a.inverse, a.precision);
}

template <auto kFunction, typename... Tensors>
auto call_out_operator(const char* name, const Arguments& a, const Tensors&... tensors) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow(name, "")
                                 .typed<decltype(FlatOut<kFunction>::call)>();
  return handle.call(tensors..., a.positions, a.offsets, a.cu_seqlens, a.out_rows, a.offset,
                     a.layout, a.axes, a.rotary_offset, a.interleaved, a.blocks, a.inverse,
                     a.precision);
}

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
