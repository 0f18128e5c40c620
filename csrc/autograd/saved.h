// Arguments kept from forward to backward.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <utility>
#include <vector>

#include "ops/checks.h"

namespace fused_rope {

// What a backward needs: the table, what picks its rows and, only where the table itself is
// trained, the inputs.
class Saved {
 public:
  // The arguments must have passed the operator's checks.
  static void save(torch::autograd::AutogradContext* context, const Arguments& a,
                   const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& x = {},
                   const at::Tensor& k = {}) {
    const at::Tensor none;
    const auto tensor = [&](const OptionalTensor& t) -> const at::Tensor& {
      return t.has_value() ? *t : none;
    };
    torch::autograd::variable_list saved;
    saved.reserve(kTensors);
    int64_t which = 0;
    for (const at::Tensor* t :
         {&cos, &sin, &tensor(a.positions), &tensor(a.offsets), &tensor(a.cu_seqlens), &x, &k}) {
      which = 2 * which + t->defined();
      if (t->defined()) saved.push_back(*t);
    }
    context->save_for_backward(std::move(saved));
    std::vector<int64_t> numbers = {which,
                                    static_cast<int64_t>(parse_layout("rotate", a.layout)),
                                    static_cast<int64_t>(parse_precision("rotate", a.precision)),
                                    a.rotary_offset,
                                    a.interleaved,
                                    a.blocks,
                                    a.inverse,
                                    a.axes.has_value()};
    if (a.axes.has_value()) numbers.insert(numbers.end(), a.axes->begin(), a.axes->end());
    context->saved_data.emplace("numbers", std::move(numbers));
    if (a.offset.maybe_as_int() != 0) context->saved_data.emplace("offset", a.offset);
  }

  explicit Saved(torch::autograd::AutogradContext* context)
      : numbers_(context->saved_data["numbers"].toIntVector()) {
    torch::autograd::variable_list saved = context->get_saved_variables();
    for (size_t i = kTensors, last = saved.size(); i-- > 0;) {
      if (numbers_[0] >> (kTensors - 1 - i) & 1) tensors_[i] = std::move(saved[--last]);
    }
    positions_ = optional(2);
    offsets_ = optional(3);
    cu_seqlens_ = optional(4);
    const auto offset = context->saved_data.find("offset");
    if (offset != context->saved_data.end()) offset_ = offset->second.toSymInt();
  }

  const at::Tensor& cos() const { return tensors_[0]; }
  const at::Tensor& sin() const { return tensors_[1]; }
  const at::Tensor& x() const { return tensors_[5]; }
  const at::Tensor& k() const { return tensors_[6]; }

  // The arguments of forward, or of the opposite direction. They borrow from this object.
  Arguments arguments(bool flipped) const {
    at::OptionalIntArrayRef axes;
    if (numbers_[7]) axes = at::IntArrayRef(numbers_).slice(8);
    return {positions_,
            offsets_,
            cu_seqlens_,
            kNoTensor,
            offset_,
            name_of(static_cast<Layout>(numbers_[1])),
            axes,
            numbers_[3],
            numbers_[4] != 0,
            numbers_[5],
            (numbers_[6] != 0) != flipped,
            name_of(static_cast<Precision>(numbers_[2]))};
  }

 private:
  static constexpr size_t kTensors = 7;

  OptionalTensor optional(size_t i) const {
    return tensors_[i].defined() ? OptionalTensor(tensors_[i]) : std::nullopt;
  }

  // A bit for each tensor that is there, the first the highest; layout, precision, rotary_offset,
  // interleaved, blocks, inverse, whether axes, axes.
  std::vector<int64_t> numbers_;
  std::array<at::Tensor, kTensors> tensors_;
  c10::SymInt offset_ = 0;
  OptionalTensor positions_, offsets_, cu_seqlens_;
};

}  // namespace fused_rope
