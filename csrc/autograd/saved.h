// Arguments kept from forward to backward.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

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
    const auto tensor = [](const OptionalTensor& t) { return t.value_or(at::Tensor()); };
    context->save_for_backward(
        {cos, sin, tensor(a.positions), tensor(a.offsets), tensor(a.cu_seqlens), x, k});
    context->saved_data["offset"] = a.offset;
    std::vector<int64_t> numbers = {static_cast<int64_t>(parse_layout("rotate", a.layout)),
                                    static_cast<int64_t>(parse_precision("rotate", a.precision)),
                                    a.rotary_offset,
                                    a.interleaved,
                                    a.blocks,
                                    a.inverse,
                                    a.axes.has_value()};
    if (a.axes.has_value()) numbers.insert(numbers.end(), a.axes->begin(), a.axes->end());
    context->saved_data["numbers"] = std::move(numbers);
  }

  explicit Saved(torch::autograd::AutogradContext* context)
      : tensors_(context->get_saved_variables()),
        offset_(context->saved_data["offset"].toSymInt()),
        numbers_(context->saved_data["numbers"].toIntVector()),
        positions_(optional(2)),
        offsets_(optional(3)),
        cu_seqlens_(optional(4)) {}

  const at::Tensor& cos() const { return tensors_[0]; }
  const at::Tensor& sin() const { return tensors_[1]; }
  const at::Tensor& x() const { return tensors_[5]; }
  const at::Tensor& k() const { return tensors_[6]; }

  // The arguments of forward, or of the opposite direction. They borrow from this object.
  Arguments arguments(bool flipped) const {
    at::OptionalIntArrayRef axes;
    if (numbers_[6]) axes = at::IntArrayRef(numbers_).slice(7);
    return {positions_,
            offsets_,
            cu_seqlens_,
            kNoTensor,
            offset_,
            name_of(static_cast<Layout>(numbers_[0])),
            axes,
            numbers_[2],
            numbers_[3] != 0,
            numbers_[4],
            (numbers_[5] != 0) != flipped,
            name_of(static_cast<Precision>(numbers_[1]))};
  }

 private:
  OptionalTensor optional(size_t i) const {
    return tensors_[i].defined() ? OptionalTensor(tensors_[i]) : std::nullopt;
  }

  torch::autograd::variable_list tensors_;
  c10::SymInt offset_;
  std::vector<int64_t> numbers_;  // layout, precision, rotary_offset, interleaved, blocks, inverse,
                                  // whether axes, axes
  OptionalTensor positions_, offsets_, cu_seqlens_;
};

}  // namespace fused_rope
