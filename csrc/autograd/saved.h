// What forward saves for backward.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <string>
#include <type_traits>

#include "ops/dispatch.h"
#include "ops/enums.h"

namespace fused_rope {

struct Saved {
  // Without a norm `inputs` is empty unless a table needs a gradient; in place, it has copies of
  // the rotated elements. With a norm, the weights follow the inputs.
  static void save(torch::autograd::AutogradContext* ctx, const Arguments& a, const at::Tensor& cos,
                   const at::Tensor& sin, at::TensorList inputs) {
    torch::autograd::variable_list tensors;
    tensors.reserve(5 + inputs.size());
    tensors.push_back(cos);
    tensors.push_back(sin);
    tensors.insert(tensors.end(), inputs.begin(), inputs.end());
    for (const OptionalTensor* t : {&a.positions, &a.offsets, &a.cu_seqlens}) {
      tensors.push_back(t->value_or(at::Tensor()));
    }
    while (!tensors.back().defined()) tensors.pop_back();  // each is a SavedVariable, even so
    ctx->save_for_backward(std::move(tensors));
    if (!inputs.empty()) ctx->saved_data["inputs"] = static_cast<int64_t>(inputs.size());
    if (a.offset.maybe_as_int() != 0) ctx->saved_data["offset"] = a.offset;
    static const RotateOptions kDefaults;
    static const Arguments defaults = arguments_of(kDefaults);
#define FUSED_ROPE_SAVE(type, name) save_option(ctx, #name, a.name, defaults.name);
    FUSED_ROPE_OPTIONS(FUSED_ROPE_SAVE)
#undef FUSED_ROPE_SAVE
  }

  static void save_norm(torch::autograd::AutogradContext* ctx, const NormArguments& a) {
    static const RotateOptions kRotation;
    static const NormOptions kNoEps(0);
    static const NormArguments defaults = arguments_of(kRotation, kNoEps).norm;
#define FUSED_ROPE_SAVE(type, name) save_option(ctx, #name, a.name, defaults.name);
    FUSED_ROPE_NORM_OPTIONS(FUSED_ROPE_SAVE)
#undef FUSED_ROPE_SAVE
  }

  static NormOptions load_norm(torch::autograd::AutogradContext* ctx) {
    NormOptions norm(0);
#define FUSED_ROPE_LOAD(type, name) load_option(ctx, #name, norm.name());
    FUSED_ROPE_NORM_OPTIONS(FUSED_ROPE_LOAD)
#undef FUSED_ROPE_LOAD
    return norm;
  }

  explicit Saved(torch::autograd::AutogradContext* ctx) {
    torch::autograd::variable_list tensors = ctx->get_saved_variables();
    int64_t count = 0;
    load_option(ctx, "inputs", count);
    tensors.resize(5 + count);
    const auto after_inputs = tensors.begin() + 2 + count;
    cos = tensors[0];
    sin = tensors[1];
    inputs.assign(tensors.begin() + 2, after_inputs);
    const auto optional = [&](size_t i) {
      return after_inputs[i].defined() ? OptionalTensor(after_inputs[i]) : std::nullopt;
    };
    options.positions(optional(0)).offsets(optional(1)).cu_seqlens(optional(2));
    load_option(ctx, "offset", options.offset());
#define FUSED_ROPE_LOAD(type, name) load_option(ctx, #name, options.name());
    FUSED_ROPE_OPTIONS(FUSED_ROPE_LOAD)
#undef FUSED_ROPE_LOAD
  }

  at::Tensor cos, sin;
  RotateOptions options;
  torch::autograd::variable_list inputs;

 private:
  // Saves only what differs from the default: each entry costs 60 ns.
  template <typename T>
  static void save_option(torch::autograd::AutogradContext* ctx, const char* name, const T& option,
                          const T& default_option) {
    if constexpr (std::is_same_v<T, at::OptionalIntArrayRef>) {
      if (option.has_value()) ctx->saved_data[name] = option->vec();
    } else {
      if (option != default_option) ctx->saved_data[name] = option;
    }
  }

  template <typename T>
  static void load_option(torch::autograd::AutogradContext* ctx, const char* name, T& option) {
    const auto found = ctx->saved_data.find(name);
    if (found == ctx->saved_data.end()) return;
    const at::IValue& value = found->second;
    if constexpr (std::is_enum_v<T>) {
      option = parse<T>("rotate", value.toStringView());
    } else if constexpr (std::is_same_v<T, std::optional<std::vector<int64_t>>>) {
      option = value.toIntVector();
    } else if constexpr (std::is_same_v<T, c10::SymInt>) {
      option = value.toSymInt();
    } else {
      option = value.to<T>();
    }
  }
};

}  // namespace fused_rope
