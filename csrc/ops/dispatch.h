// The operators as typed functions: how the dispatcher calls ours, and how we call the dispatcher.
//
// FUSED_ROPE_OPTIONS, FUSED_ROPE_NORM_OPTIONS, the schemas (schema.cpp), RotateOptions and
// NormOptions (ops.h) are the only lists of the options. Everything else that passes, saves or
// reads options expands these macros.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymInt.h>

#include <array>
#include <optional>
#include <string_view>
#include <type_traits>

#include "fused_rope/kernels/params.h"
#include "fused_rope/ops.h"
#include "ops/enums.h"

namespace fused_rope {

// The options of the rotation, in the order of every schema: M(type in a kernel's signature, name).
#define FUSED_ROPE_OPTIONS(M)      \
  M(std::string_view, layout)      \
  M(at::OptionalIntArrayRef, axes) \
  M(int64_t, rotary_offset)        \
  M(bool, interleaved)             \
  M(int64_t, blocks)               \
  M(bool, inverse)                 \
  M(std::string_view, precision)   \
  M(std::string_view, table_layout)

// The options of the norm, keyword-only, after those of the rotation.
#define FUSED_ROPE_NORM_OPTIONS(M) \
  M(double, eps)                   \
  M(bool, zero_centered)           \
  M(std::string_view, cast)        \
  M(bool, after)

using OptionalTensor = std::optional<at::Tensor>;
using TensorPair = std::tuple<at::Tensor, at::Tensor>;
using TensorQuad = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline const OptionalTensor kNoTensor = std::nullopt;

inline const at::Tensor* pointer(const OptionalTensor& tensor) {
  return tensor.has_value() ? &*tensor : nullptr;
}

// The gradients that a backward call is asked for: of q, k and their weights.
using GradMask = std::array<bool, 2 * kernels::kMaxTensors>;

// The type in which a call keeps an option of the norm: eps is absent without a norm.
template <typename T>
using NormField = std::conditional_t<std::is_same_v<T, double>, std::optional<double>, T>;

// Empty for the rotation alone.
struct NormArguments {
#define FUSED_ROPE_FIELD(type, name) NormField<type> name = {};
  FUSED_ROPE_NORM_OPTIONS(FUSED_ROPE_FIELD)
#undef FUSED_ROPE_FIELD
  GradMask output_mask = {};  // of the backward operator

  auto tie() const {
#define FUSED_ROPE_NAME(type, name) name,
    return std::tie(FUSED_ROPE_NORM_OPTIONS(FUSED_ROPE_NAME) output_mask);
#undef FUSED_ROPE_NAME
  }
};

// All arguments after the tensors of a call, borrowed from the caller.
struct Arguments {
  const OptionalTensor& positions;
  const OptionalTensor& offsets;
  const OptionalTensor& cu_seqlens;
  const OptionalTensor& out_rows;
  c10::SymInt offset;
#define FUSED_ROPE_FIELD(type, name) type name;
  FUSED_ROPE_OPTIONS(FUSED_ROPE_FIELD)
#undef FUSED_ROPE_FIELD
  NormArguments norm = {};
};

// The type in a kernel's signature of each type in RotateOptions and NormOptions.
inline bool borrow(bool option) { return option; }
inline double borrow(double option) { return option; }
inline int64_t borrow(int64_t option) { return option; }
template <typename Enum>
  requires std::is_enum_v<Enum>
std::string_view borrow(Enum option) {
  return name_of(option);
}
inline at::OptionalIntArrayRef borrow(const std::optional<std::vector<int64_t>>& axes) {
  return axes.has_value() ? at::OptionalIntArrayRef(*axes) : std::nullopt;
}

// Borrowed from `o`.
inline Arguments arguments_of(const RotateOptions& o) {
#define FUSED_ROPE_BORROWED(type, name) , borrow(o.name())
  return {o.positions(), o.offsets(), o.cu_seqlens(), o.out_rows(),
          o.offset() FUSED_ROPE_OPTIONS(FUSED_ROPE_BORROWED)};
#undef FUSED_ROPE_BORROWED
}

inline void set_norm(Arguments& a, const NormOptions& norm) {
#define FUSED_ROPE_BORROWED(type, name) a.norm.name = borrow(norm.name());
  FUSED_ROPE_NORM_OPTIONS(FUSED_ROPE_BORROWED)
#undef FUSED_ROPE_BORROWED
}

inline Arguments arguments_of(const RotateOptions& o, const NormOptions& norm) {
  Arguments result = arguments_of(o);
  set_norm(result, norm);
  return result;
}

// Whether the host knows which row of a shared table each token reads.
inline bool are_rows_known(const Arguments& a) {
  return !a.positions.has_value() && !a.offsets.has_value() && !a.cu_seqlens.has_value();
}

// The dimensions of `positions` before [S] or [B, S]: one of A with axes.
inline int leading_dims(const Arguments& a) { return a.axes.has_value() ? 1 : 0; }

// The distance between the elements of a pair. Int is int64_t or SymInt.
template <typename Int>
Int pair_distance(const Arguments& a, const Int& P) {
  return a.interleaved ? Int(1) : P / a.blocks;
}

// As many tensors as a call has inputs; null for a second that there is not.
using Outputs = std::array<const at::Tensor*, kernels::kMaxTensors>;
using OptionalTensors = std::array<const OptionalTensor*, kernels::kMaxTensors>;

// What rotate_and_cache stores in the cache apart from k, and where. v and v_cache may be absent.
struct CacheArguments {
  const OptionalTensor& v;
  const at::Tensor& k_cache;
  const OptionalTensor& v_cache;
  const at::Tensor& slots;
  const OptionalTensor& k_scale;
  const OptionalTensor& v_scale;
};

// One call of an operator of the family, before any check.
struct RawCall {
  const char* op;
  std::array<const at::Tensor*, kernels::kMaxTensors> inputs;  // the second is null for one tensor
  const at::Tensor& cos;
  const at::Tensor& sin;
  const Arguments& arguments;
  OptionalTensors weights = {};  // null for the rotation alone
  const CacheArguments* cache = nullptr;

  int count() const { return inputs[1] == nullptr ? 1 : 2; }
  bool has_norm() const { return weights[0] != nullptr && arguments.norm.eps.has_value(); }
  const OptionalTensor& weight(int i) const { return *weights[i]; }
  const char* name(int i) const { return input_name(count(), i); }
  const char* weight_name(int i) const { return weight_name(count(), i); }
  const char* out_name(int i) const { return output_name(count(), i); }

  static const char* input_name(int count, int i) { return count == 1 ? "x" : i == 0 ? "q" : "k"; }
  static const char* weight_name(int count, int i) {
    return count == 1 ? "weight" : i == 0 ? "q_weight" : "k_weight";
  }
  static const char* output_name(int count, int i) {
    return count == 1 ? "out" : i == 0 ? "q_out" : "k_out";
  }
};

// Call rotate for one input and rotate_qk for two, or norm_rotate and norm_rotate_qk if the call
// has a norm, or their in-place or out forms, through the dispatcher. The second result is
// undefined for one input. Exported for the Python entry.
FUSED_ROPE_API TensorPair call_rotate(const RawCall& call);
FUSED_ROPE_API void call_rotate_(const RawCall& call);
FUSED_ROPE_API void call_rotate_out(const RawCall& call, const Outputs& outputs);

// Calls rotate_and_cache and returns its q_out: new memory where the first output is null. The
// second one is null without k_out.
FUSED_ROPE_API at::Tensor call_rotate_and_cache(const RawCall& call, const Outputs& outputs);

// Calls norm_rotate_qk_backward: the gradients that call.arguments.norm.output_mask asks for, of q,
// k, q_weight and k_weight, from the gradients of the outputs. The others are undefined, and so are
// those that follow from an undefined gradient.
TensorQuad call_norm_rotate_backward(const RawCall& call, const OptionalTensors& grads);

template <typename...>
struct Types {};
template <typename, typename... Rest>
using TypesAfter = Types<Rest...>;

// The types of the options of a norm in a kernel's signature.
#define FUSED_ROPE_TYPE(type, name) , type
using NormTypes = TypesAfter<void FUSED_ROPE_NORM_OPTIONS(FUSED_ROPE_TYPE)>;
using BackwardTypes = TypesAfter<void FUSED_ROPE_NORM_OPTIONS(FUSED_ROPE_TYPE), GradMask>;
#undef FUSED_ROPE_TYPE
#define FUSED_ROPE_TYPE(type, name) , NormField<type>
using OptionalNormTypes = TypesAfter<void FUSED_ROPE_NORM_OPTIONS(FUSED_ROPE_TYPE)>;
#undef FUSED_ROPE_TYPE

// An option of the norm in the type of a kernel's signature.
template <typename To, typename From>
const To& norm_option(const From& option) {
  if constexpr (std::is_same_v<To, From>) {
    return option;
  } else {
    return option.value();
  }
}

// An operator as a function f(arguments, tensors...): `kernel` is what the dispatcher calls for f,
// with the arguments one by one, and operator() calls the dispatcher. OutRows is
// const OptionalTensor& for schemas with out_rows; Norm has the types of the norm's options.
template <typename Function, typename OutRows = Types<>, typename Norm = Types<>>
class Operator;

template <typename Result, typename... Tensors, typename... OutRows, typename... Norm>
class Operator<Result (*)(const Arguments&, Tensors...), Types<OutRows...>, Types<Norm...>> {
 public:
#define FUSED_ROPE_PARAMETER(type, name) , type name
#define FUSED_ROPE_VALUE(type, name) , name
#define FUSED_ROPE_MEMBER(type, name) , a.name
  template <Result (*kFunction)(const Arguments&, Tensors...)>
  static Result kernel(Tensors... tensors, const OptionalTensor& positions,
                       const OptionalTensor& offsets, const OptionalTensor& cu_seqlens,
                       OutRows... out_rows,
                       c10::SymInt offset FUSED_ROPE_OPTIONS(FUSED_ROPE_PARAMETER), Norm... norm) {
    return kFunction(
        {positions, offsets, cu_seqlens, std::get<0>(std::tie(out_rows..., kNoTensor)),
         std::move(offset) FUSED_ROPE_OPTIONS(FUSED_ROPE_VALUE), NormArguments{norm...}},
        tensors...);
  }

  explicit Operator(const char* name)
      : handle_(c10::Dispatcher::singleton()
                    .findSchemaOrThrow(name, "")
                    .typed<decltype(kernel<nullptr>)>()) {}

  Result operator()(const Arguments& a, Tensors... tensors) const {
    return call(a, std::index_sequence_for<Norm...>(), tensors...);
  }

 private:
  template <size_t... kIndices>
  Result call(const Arguments& a, std::index_sequence<kIndices...>, Tensors... tensors) const {
    return handle_.call(tensors..., a.positions, a.offsets, a.cu_seqlens,
                        static_cast<OutRows>(a.out_rows)...,
                        a.offset FUSED_ROPE_OPTIONS(FUSED_ROPE_MEMBER),
                        norm_option<Norm>(std::get<kIndices>(a.norm.tie()))...);
  }
#undef FUSED_ROPE_PARAMETER
#undef FUSED_ROPE_VALUE
#undef FUSED_ROPE_MEMBER

  c10::TypedOperatorHandle<decltype(kernel<nullptr>)> handle_;
};

}  // namespace fused_rope
