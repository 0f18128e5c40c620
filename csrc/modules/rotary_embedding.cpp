#include "fused_rope/rotary_embedding.h"

#include <ATen/TensorOperators.h>
#include <ATen/TracerMode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/where.h>

#include <ostream>
#include <utility>

#include "modules/tables.h"
#include "modules/varying.h"
#include "ops/checks.h"
#include "ops/token_rows.h"

namespace fused_rope {
namespace {

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
  TORCH_CHECK_VALUE(o.max_seq_len() >= 0, "RotaryEmbedding: expected max_seq_len >= 0, got ",
                    o.max_seq_len());
  if (o.axes().has_value()) {
    TORCH_CHECK_VALUE(static_cast<int64_t>(o.axes()->size()) == R / 2,
                      "RotaryEmbedding: expected axes of P=", R / 2, " ints, got ",
                      o.axes()->size());
    for (const int64_t axis : *o.axes()) {
      TORCH_CHECK_VALUE(axis >= 0 && axis < kernels::kMaxAxes,
                        "RotaryEmbedding: expected axes in [0, ", kernels::kMaxAxes, "), got ",
                        axis);
    }
  }
}

}  // namespace

RotaryEmbeddingImpl::RotaryEmbeddingImpl(RotaryEmbeddingOptions options)
    : options(std::move(options)) {
  reset();
}

RotaryEmbeddingImpl::RotaryEmbeddingImpl(const RotaryEmbeddingImpl& other)
    : Cloneable(other),
      options(other.options),
      tables_(std::make_shared<TableCache>(*other.tables_)) {}

RotaryEmbeddingImpl& RotaryEmbeddingImpl::operator=(const RotaryEmbeddingImpl& other) {
  auto tables = std::make_shared<TableCache>(*other.tables_);
  Cloneable::operator=(other);
  options = other.options;
  tables_ = std::move(tables);
  return *this;
}

std::tuple<at::Tensor, at::Tensor> RotaryEmbeddingImpl::forward(
    const at::Tensor& q, const at::Tensor& k, const RotaryEmbeddingForwardOptions& where) {
  const Rotation rotation = prepare(q, where);
  return rotate_qk(q, k, rotation.table->cos, rotation.table->sin, rotation.options);
}

at::Tensor RotaryEmbeddingImpl::rotate(const at::Tensor& q,
                                       const RotaryEmbeddingForwardOptions& where) {
  const Rotation rotation = prepare(q, where);
  return fused_rope::rotate(q, rotation.table->cos, rotation.table->sin, rotation.options);
}

at::Tensor RotaryEmbeddingImpl::cos() const { return tables_->current()->cos; }

at::Tensor RotaryEmbeddingImpl::sin() const { return tables_->current()->sin; }

std::tuple<at::Tensor, at::Tensor> RotaryEmbeddingImpl::table() const {
  const auto current = tables_->current();
  return {current->cos, current->sin};
}

void RotaryEmbeddingImpl::reserve(int64_t rows) { tables_->reserve(rows); }

// clone() also calls this, on a copy that already has tables.
void RotaryEmbeddingImpl::reset() {
  check(options);
  tables_ = tables_ == nullptr
                ? std::make_shared<TableCache>(options, options.device())
                : std::make_shared<TableCache>(options, cos().device(), tables_.get());
}

std::shared_ptr<torch::nn::Module> RotaryEmbeddingImpl::clone(
    const std::optional<at::Device>& device) const {
  auto copy = Cloneable::clone(device);
  if (device.has_value()) copy->to(*device);
  return copy;
}

void RotaryEmbeddingImpl::to(at::Device device, at::ScalarType, bool) { to(device); }

void RotaryEmbeddingImpl::to(at::ScalarType, bool) {}

void RotaryEmbeddingImpl::to(at::Device device, bool) { tables_->move(device); }

void RotaryEmbeddingImpl::pretty_print(std::ostream& stream) const {
  stream << "fused_rope::RotaryEmbedding(head_dim=" << options.head_dim()
         << ", rotary_dim=" << rotary_dim_of(options) << ", rows=" << cos().size(0)
         << ", base=" << options.base() << ")";
}

// Returns the table, which does not change until the call returns, and the operator's options.
RotaryEmbeddingImpl::Rotation RotaryEmbeddingImpl::prepare(const at::Tensor& q,
                                                           const Where& where) const {
  TORCH_CHECK_VALUE(q.dim() > 0 && q.size(-1) == options.head_dim(),
                    "RotaryEmbedding: expected q with D=", options.head_dim(), ", got ", q.sizes());
  auto rotation = RotateOptions()
                      .layout(options.layout())
                      .positions(where.positions())
                      .offset(where.offset())
                      .offsets(where.offsets())
                      .cu_seqlens(where.cu_seqlens())
                      .rotary_offset(options.rotary_offset())
                      .interleaved(options.interleaved())
                      .blocks(options.blocks())
                      .precision(options.precision());
  if (positions_have_axes(where.positions(), q)) rotation.axes(options.axes());
  std::optional<int64_t> rows;
  if (are_rows_known(arguments_of(rotation))) {
    rows = q.size(dims_of(options.layout()).sequence) + where.offset();
  }
  if (needs_own_rows(q, rows, rotation)) return with_own_rows(q, std::move(rotation));
  return {tables_->take(q.device(), rows), std::move(rotation)};
}

// Whether the call must compute its own rows because no table has its frequencies. `rows` is given
// if known on the host. Meta tensors need only shapes, and without Python they lack some of the
// functions that compute rows. A trace must not record the frequencies of its example inputs.
bool RotaryEmbeddingImpl::needs_own_rows(const at::Tensor& q, std::optional<int64_t> rows,
                                         const RotateOptions& rotation) const {
  const bool is_error = rotation.cu_seqlens().has_value() && options.layout() != Layout::kTHD;
  if (!varies(options.scaling()) || q.is_meta() || q.numel() == 0 || is_error) return false;
  if (!rows.has_value() || at::tracer::impl::is_dispatch_enabled()) return true;
  return options.scaling().rope_type() == RopeType::kDynamic &&
         static_cast<double>(*rows) > *options.scaling().original_max_position_embeddings();
}

// Computes a table with one row per token (and axis) on the device, and positions that index it.
RotaryEmbeddingImpl::Rotation RotaryEmbeddingImpl::with_own_rows(const at::Tensor& q,
                                                                 RotateOptions rotation) const {
  check_index_dtype("RotaryEmbedding", "positions", rotation.positions());
  check_index_dtype("RotaryEmbedding", "offsets", rotation.offsets());
  check_index_dtype("RotaryEmbedding", "cu_seqlens", rotation.cu_seqlens());
  const auto constants = tables_->constants(q.device());
  const at::Tensor positions =
      token_rows(arguments_of(rotation), q.size(dims_of(options.layout()).sequence), q.device());
  const at::Tensor inv_freq = varying_frequencies(positions.max() + 1, constants->first,
                                                  constants->second, options.scaling());
  const at::Tensor angle = positions.reshape({-1, 1}).to(at::kDouble) * inv_freq;
  const at::Tensor numbers =
      at::arange(positions.numel(), positions.options()).view(positions.sizes());
  rotation.positions(at::where(positions < 0, positions, numbers))
      .offset(0)
      .offsets(std::nullopt)
      .cu_seqlens(std::nullopt);
  const double scale = tables_->scale();
  return {std::make_shared<Table>((angle.cos() * scale).to(at::kFloat),
                                  (angle.sin() * scale).to(at::kFloat)),
          std::move(rotation)};
}

bool RotaryEmbeddingImpl::positions_have_axes(const std::optional<at::Tensor>& positions,
                                              const at::Tensor& q) const {
  if (!positions.has_value() || !options.axes().has_value() || positions->dim() < 2) return false;
  const int batch = dims_of(options.layout()).batch;
  const int64_t B = batch == kNoBatch ? 1 : q.size(batch);
  const bool one_for_all =
      positions->dim() == 2 && (positions->size(0) == 1 || positions->size(0) == B);
  return !one_for_all;
}

}  // namespace fused_rope
