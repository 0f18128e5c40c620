// The enums of types.h: their words in schemas, and the dimensions of layouts.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <string_view>

#include "fused_rope/types.h"

namespace fused_rope {

// The argument that takes an enum, and the words for its values.
template <typename Enum>
struct Words;

template <>
struct Words<Layout> {
  static constexpr char kArgument[] = "layout";
  static constexpr std::array<std::string_view, 4> kNames = {"bshd", "bhsd", "sbhd", "thd"};
};

template <>
struct Words<Precision> {
  static constexpr char kArgument[] = "precision";
  static constexpr std::array<std::string_view, 2> kNames = {"fp32", "model"};
};

template <>
struct Words<TableLayout> {
  static constexpr char kArgument[] = "table_layout";
  static constexpr std::array<std::string_view, 3> kNames = {"half", "tiled", "repeated"};
};

template <>
struct Words<Cast> {
  static constexpr char kArgument[] = "cast";
  static constexpr std::array<std::string_view, 3> kNames = {"never", "before", "after"};
};

template <typename Enum>
std::string_view name_of(Enum value) {
  return Words<Enum>::kNames[static_cast<size_t>(value)];
}

// Throws ValueError with the name of the operator `op` for an unknown word.
template <typename Enum>
Enum parse(const char* op, std::string_view word) {
  constexpr const auto& kNames = Words<Enum>::kNames;
  const auto found = std::find(kNames.begin(), kNames.end(), word);
  TORCH_CHECK_VALUE(found != kNames.end(), op, ": expected ", Words<Enum>::kArgument,
                    " to be one of ", at::ArrayRef(kNames), ", got '", word, "'");
  return static_cast<Enum>(found - kNames.begin());
}

// The dimensions of the inputs of each layout. Packed inputs have no batch dimension.
struct LayoutDims {
  int batch, sequence, head;
};

inline constexpr int kNoBatch = -1;

constexpr LayoutDims dims_of(Layout layout) {
  constexpr LayoutDims kDims[] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {kNoBatch, 0, 1}};
  return kDims[static_cast<size_t>(layout)];
}

// x as a view [B, S, H, D]; packed tokens are one batch.
inline at::Tensor as_bshd(const at::Tensor& x, Layout layout) {
  const LayoutDims dims = dims_of(layout);
  if (dims.batch == kNoBatch) return x.unsqueeze(0);
  return layout == Layout::kBSHD ? x : x.permute({dims.batch, dims.sequence, dims.head, 3});
}

// P of a table with this many columns. Int is int64_t or SymInt.
template <typename Int>
Int pairs_of(TableLayout table_layout, const Int& columns) {
  return table_layout == TableLayout::kHalf ? columns : columns / 2;
}

}  // namespace fused_rope
