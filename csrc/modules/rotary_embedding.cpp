#include "fused_rope/rotary_embedding.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <ostream>
#include <utility>

#include "modules/varying.h"

namespace fused_rope {
namespace {

int64_t rotary_dim_of(const RotaryEmbeddingOptions& o) {
  return o.rotary_dim().value_or(o.head_dim() - o.rotary_offset());
}

void check(const RotaryEmbeddingOptions& o) {
  const int64_t R = rotary_dim_of(o);
  TORCH_CHECK_VALUE(
      R % 2 == 0 && R >= 0 && o.rotary_offset() >= 0 && o.rotary_offset() + R <= o.head_dim(),
      "RotaryEmbedding: expected an even rotary_dim R, rotary_offset o >= 0 and o + R <= head_dim, "
      "got R=",
      R, ", o=", o.rotary_offset(), ", head_dim=", o.head_dim());
  TORCH_CHECK_VALUE(
      o.blocks() >= 1 && R / 2 % o.blocks() == 0 && !(o.blocks() > 1 && o.interleaved()),
      "RotaryEmbedding: expected blocks that divide P=", R / 2,
      ", and only 1 with interleaved, got blocks=", o.blocks(), ", interleaved=", o.interleaved());
  if (o.axes().has_value()) {
    TORCH_CHECK_VALUE(static_cast<int64_t>(o.axes()->size()) == R / 2,
                      "RotaryEmbedding: expected axes of P=", R / 2, " ints, got ",
                      o.axes()->size());
  }
}

int64_t sequence_dim(Layout layout) {
  return layout == Layout::kBSHD ? 1 : layout == Layout::kBHSD ? 2 : 0;
}

void check_indices(const at::Tensor& indices, const char* name) {
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kInt || indices.scalar_type() == at::kLong,
                   "RotaryEmbedding: expected ", name, " of dtype int32 or int64, got ",
                   indices.scalar_type());
}

// The position of each of `tokens` as the operator finds it, offset added; -1 for no rotation.
at::Tensor positions_of(int64_t tokens, const RotaryEmbeddingForwardOptions& where,
                        at::Device device) {
  at::Tensor counted = at::arange(tokens, at::TensorOptions(device).dtype(at::kLong));
  at::Tensor skipped = at::zeros({}, counted.options().dtype(at::kBool));
  at::Tensor before = at::full({}, where.offset(), counted.options());
  if (where.offsets().has_value()) {
    check_indices(*where.offsets(), "offsets");
    before = where.offsets()->unsqueeze(1);
  }
  if (where.cu_seqlens().has_value()) {
    check_indices(*where.cu_seqlens(), "cu_seqlens");
    const at::Tensor starts = where.cu_seqlens()->to(at::kLong);
    const int64_t last = std::max<int64_t>(starts.size(0) - 2, 0);
    const at::Tensor sequence = at::searchsorted(starts, counted, /*out_int32=*/false,
                                                 /*right=*/true)
                                    .sub(1)
                                    .clamp(0, last);
    skipped = counted >= starts[-1];
    counted = counted - starts.index_select(0, sequence);
    if (where.offsets().has_value()) before = where.offsets()->index_select(0, sequence);
  }
  if (where.positions().has_value()) {
    check_indices(*where.positions(), "positions");
    counted = where.positions()->to(at::kLong);
    skipped = skipped | (counted == -1);
  }
  const at::Tensor found = counted + before;
  // A sum that is no row must not look like -1: the operator is to refuse it.
  return at::where(skipped, -1, at::where(found < 0, found.clamp_max(-2), found));
}

}  // namespace

RotaryEmbeddingImpl::RotaryEmbeddingImpl(RotaryEmbeddingOptions options)
    : options(std::move(options)) {
  reset();
}

std::tuple<at::Tensor, at::Tensor> RotaryEmbeddingImpl::forward(
    const at::Tensor& q, const at::Tensor& k, const RotaryEmbeddingForwardOptions& where) {
  const Rotation rotation = prepare(q, where);
  return rotate_qk(q, k, rotation.cos, rotation.sin, rotation.options);
}

at::Tensor RotaryEmbeddingImpl::rotate(const at::Tensor& q,
                                       const RotaryEmbeddingForwardOptions& where) {
  const Rotation rotation = prepare(q, where);
  return fused_rope::rotate(q, rotation.cos, rotation.sin, rotation.options);
}

void RotaryEmbeddingImpl::reserve(int64_t rows) {
  const bool stale = is_long(rows) != long_;
  if (stale) choose_frequencies(rows);
  const int64_t here = cos.size(0);
  if (rows > here || stale) build(rows > here ? std::max(rows, 2 * here) : here, cos.device());
}

// Also what clone() calls, on a copy that has a table already.
void RotaryEmbeddingImpl::reset() {
  check(options);
  choose_frequencies(0);
  varying_ = at::Tensor();
  if (cos.defined()) {
    build(std::max(options.max_seq_len(), cos.size(0)), cos.device());
  } else {
    build(options.max_seq_len(), options.device());
  }
}

void RotaryEmbeddingImpl::to(at::Device device, at::ScalarType, bool) { move(device); }

void RotaryEmbeddingImpl::to(at::ScalarType, bool) {}

void RotaryEmbeddingImpl::to(at::Device device, bool) { move(device); }

void RotaryEmbeddingImpl::pretty_print(std::ostream& stream) const {
  stream << "fused_rope::RotaryEmbedding(head_dim=" << options.head_dim()
         << ", rotary_dim=" << rotary_dim_of(options) << ", rows=" << cos.size(0)
         << ", base=" << options.base() << ")";
}

// Makes the table right for this call and says what the operator is to do.
RotaryEmbeddingImpl::Rotation RotaryEmbeddingImpl::prepare(const at::Tensor& q,
                                                           const Where& where) {
  TORCH_CHECK_VALUE(q.dim() > 0 && q.size(-1) == options.head_dim(),
                    "RotaryEmbedding: expected q with D=", options.head_dim(), ", got ", q.sizes());
  const auto& positions = where.positions();
  std::optional<int64_t> rows;
  if (!positions.has_value() && !where.cu_seqlens().has_value() && !where.offsets().has_value()) {
    rows = q.size(sequence_dim(options.layout())) + where.offset();
  }
  move(q.device());

  auto rotation = RotateOptions()
                      .layout(options.layout())
                      .rotary_offset(options.rotary_offset())
                      .interleaved(options.interleaved())
                      .blocks(options.blocks())
                      .precision(options.precision());
  if (positions.has_value() && positions_have_axes(*positions, q)) rotation.axes(options.axes());
  if (needs_rows_of_its_own(q, rows, where)) {
    return with_rows_of_its_own(q, where, std::move(rotation));
  }
  if (rows.has_value()) reserve(*rows);
  rotation.positions(positions)
      .offset(where.offset())
      .offsets(where.offsets())
      .cu_seqlens(where.cu_seqlens());
  return {cos, sin, std::move(rotation)};
}

// Whether the frequencies of a call for `rows`, where they are known, are no table's. Meta tensors
// ask for shapes, and without Python they lack some of the functions that would compute rows.
bool RotaryEmbeddingImpl::needs_rows_of_its_own(const at::Tensor& q, std::optional<int64_t> rows,
                                                const Where& where) const {
  const bool to_be_refused = where.cu_seqlens().has_value() && options.layout() != Layout::kTHD;
  if (!varying_.defined() || q.is_meta() || q.numel() == 0 || to_be_refused) return false;
  if (!rows.has_value()) return true;
  return options.scaling().rope_type() == RopeType::kDynamic && is_past_training(*rows);
}

// A table of a row for each token (and axis), computed on the device, and positions that name them.
RotaryEmbeddingImpl::Rotation RotaryEmbeddingImpl::with_rows_of_its_own(
    const at::Tensor& q, const Where& where, RotateOptions rotation) const {
  const at::Tensor positions =
      positions_of(q.size(sequence_dim(options.layout())), where, q.device());
  const at::Tensor inv_freq = varying_frequencies(positions.max() + 1, varying_, options.scaling());
  const at::Tensor angle = positions.reshape({-1, 1}).to(at::kDouble) * inv_freq;
  const at::Tensor numbers =
      at::arange(positions.numel(), positions.options()).view(positions.sizes());
  rotation.positions(at::where(positions < 0, positions, numbers));
  return {(angle.cos() * scale_).to(at::kFloat), (angle.sin() * scale_).to(at::kFloat),
          std::move(rotation)};
}

bool RotaryEmbeddingImpl::positions_have_axes(const at::Tensor& positions,
                                              const at::Tensor& q) const {
  if (!options.axes().has_value() || positions.dim() < 2) return false;
  const Layout layout = options.layout();
  const int64_t B = layout == Layout::kTHD ? 1 : q.size(layout == Layout::kSBHD ? 1 : 0);
  const bool one_for_all =
      positions.dim() == 2 && (positions.size(0) == 1 || positions.size(0) == B);
  return !one_for_all;
}

bool RotaryEmbeddingImpl::is_past_training(int64_t rows) const {
  return static_cast<double>(rows) >
         options.scaling().original_max_position_embeddings().value_or(HUGE_VAL);
}

// Whether the table for so many rows is longrope's other one.
bool RotaryEmbeddingImpl::is_long(int64_t rows) const {
  return options.scaling().rope_type() == RopeType::kLongRope && is_past_training(rows);
}

void RotaryEmbeddingImpl::choose_frequencies(int64_t rows) {
  at::Tensor inv_freq;
  std::tie(inv_freq, scale_) = frequencies(rotary_dim_of(options) / options.blocks(),
                                           options.base(), options.scaling(), rows);
  const c10::InferenceMode no_inference_tensors(false);
  inv_freq_ = inv_freq.repeat({options.blocks()});
  long_ = is_long(rows);
}

void RotaryEmbeddingImpl::move(at::Device device) {
  if (device != cos.device()) build(cos.size(0), device);
}

void RotaryEmbeddingImpl::build(int64_t rows, at::Device device) {
  std::tie(cos, sin) = cos_sin_table(inv_freq_, rows, /*first=*/0, scale_, at::kFloat, device);
  if (varies(options.scaling()) && (!varying_.defined() || varying_.device() != device)) {
    const at::Tensor constants = varying_constants(rotary_dim_of(options) / options.blocks(),
                                                   options.base(), options.scaling());
    const c10::InferenceMode no_inference_tensors(false);
    varying_ = constants.repeat({1, options.blocks()}).to(device, /*non_blocking=*/true);
  }
}

}  // namespace fused_rope
