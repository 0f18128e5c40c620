// What forward keeps for backward.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <string>

#include "ops/checks.h"

namespace fused_rope {

struct Saved {
  // `inputs` is empty where no table needs a gradient; in place it is a copy of rotated elements.
  static void save(torch::autograd::AutogradContext* ctx, const Arguments& a, const at::Tensor& cos,
                   const at::Tensor& sin, at::TensorList inputs) {
    torch::autograd::variable_list tensors;
    tensors.reserve(5 + inputs.size());
    tensors.push_back(cos);
    tensors.push_back(sin);
    for (const OptionalTensor* t : {&a.positions, &a.offsets, &a.cu_seqlens}) {
      tensors.push_back(t->value_or(at::Tensor()));
    }
    tensors.insert(tensors.end(), inputs.begin(), inputs.end());
    while (!tensors.back().defined()) tensors.pop_back();  // each is a SavedVariable, even so
    ctx->save_for_backward(std::move(tensors));
    // Only options that differ from their defaults: each costs 60 ns.
    static const RotateOptions kDefaults;
    static const Arguments defaults = arguments_of(kDefaults);
    auto& data = ctx->saved_data;
    if (a.offset.maybe_as_int() != 0) data["offset"] = a.offset;
    if (a.layout != defaults.layout) data["layout"] = a.layout;
    if (a.axes.has_value()) data["axes"] = a.axes->vec();
    if (a.rotary_offset != defaults.rotary_offset) data["rotary_offset"] = a.rotary_offset;
    if (a.interleaved != defaults.interleaved) data["interleaved"] = a.interleaved;
    if (a.blocks != defaults.blocks) data["blocks"] = a.blocks;
    if (a.inverse != defaults.inverse) data["inverse"] = a.inverse;
    if (a.precision != defaults.precision) data["precision"] = a.precision;
    if (a.table_layout != defaults.table_layout) data["table_layout"] = a.table_layout;
  }

  explicit Saved(torch::autograd::AutogradContext* ctx) {
    torch::autograd::variable_list tensors = ctx->get_saved_variables();
    if (tensors.size() < 5) tensors.resize(5);
    const auto optional = [](const at::Tensor& tensor) {
      return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
    };
    cos = tensors[0];
    sin = tensors[1];
    options.positions(optional(tensors[2]))
        .offsets(optional(tensors[3]))
        .cu_seqlens(optional(tensors[4]));
    inputs.assign(tensors.begin() + 5, tensors.end());
    const auto& data = ctx->saved_data;
    const auto found = [&](const char* name) {
      const auto field = data.find(name);
      return field == data.end() ? nullptr : &field->second;
    };
    if (const auto* v = found("offset")) options.offset(v->toSymInt());
    if (const auto* v = found("layout")) options.layout(parse_layout("rotate", v->toStringView()));
    if (const auto* v = found("axes")) options.axes(v->toIntVector());
    if (const auto* v = found("rotary_offset")) options.rotary_offset(v->toInt());
    if (const auto* v = found("interleaved")) options.interleaved(v->toBool());
    if (const auto* v = found("blocks")) options.blocks(v->toInt());
    if (const auto* v = found("inverse")) options.inverse(v->toBool());
    if (const auto* v = found("precision"))
      options.precision(parse_precision("rotate", v->toStringView()));
    if (const auto* v = found("table_layout"))
      options.table_layout(parse_table_layout("rotate", v->toStringView()));
  }

  at::Tensor cos, sin;
  RotateOptions options;
  torch::autograd::variable_list inputs;
};

}  // namespace fused_rope
