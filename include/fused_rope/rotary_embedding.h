// A libtorch module that owns a table, selects its rows and calls the operators: the C++ version of
// Python's fused_rope.RotaryEmbedding, with the same results.
//
// Letters: B batch, S sequence length, T packed tokens, N packed sequences, H heads, D head_dim, R
// rotary_dim, P = R/2 pairs, M table rows, A position axes.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <iosfwd>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "fused_rope/frequencies.h"
#include "fused_rope/ops.h"

namespace fused_rope {

struct RotaryEmbeddingOptions {
  RotaryEmbeddingOptions(int64_t head_dim) : head_dim_(head_dim) {}  // NOLINT

  TORCH_ARG(int64_t, head_dim);
  // R, even; by default all elements from rotary_offset on.
  TORCH_ARG(std::optional<int64_t>, rotary_dim);
  TORCH_ARG(int64_t, rotary_offset) = 0;
  // The initial M.
  TORCH_ARG(int64_t, max_seq_len) = 2048;
  // Base of the frequencies ("rope_theta").
  TORCH_ARG(double, base) = 10000.0;
  TORCH_ARG(RopeScaling, scaling);
  TORCH_ARG(Layout, layout) = Layout::kBSHD;
  TORCH_ARG(bool, interleaved) = false;
  // Halves inside each of this many spans, each with the frequencies of R/blocks elements.
  TORCH_ARG(int64_t, blocks) = 1;
  // M-RoPE: the position axis that each of the P pairs follows.
  TORCH_ARG(std::optional<std::vector<int64_t>>, axes);
  TORCH_ARG(Precision, precision) = Precision::kFp32;
  // The table's initial device.
  TORCH_ARG(at::Device, device) = at::kCPU;
};

// The positions of one call's tokens: rope(q, k, 17), or
// rope(q, k, RotaryEmbeddingForwardOptions().positions(positions)).
struct RotaryEmbeddingForwardOptions {
  RotaryEmbeddingForwardOptions(int64_t offset = 0) : offset_(offset) {}  // NOLINT

  // The number of preceding tokens: one int, or an int32 or int64 tensor [B] or [N] ("offsets").
  TORCH_ARG(int64_t, offset);
  TORCH_ARG(std::optional<at::Tensor>, offsets);
  // int32 or int64 [S], [1, S], [B, S] or [T], [1, T]; -1: not rotated. With axes, a leading axis A
  // before these; without that axis, all axes share the positions. A shape that could be [A, S] or
  // [B, S] is read as [B, S].
  TORCH_ARG(std::optional<at::Tensor>, positions);
  // First token of each packed sequence and the end of the last, int32 or int64 [N + 1].
  TORCH_ARG(std::optional<at::Tensor>, cu_seqlens);
};

struct Table;
class TableCache;

// The table is computed in float64 and kept in float32. It is neither a parameter nor a buffer:
// to(dtype) does not change it, save and load skip it, to(device) moves it. A call with q on
// another device adds a copy there, and devices may alternate. If the rows are known on the host
// (no tensor gives positions), the table grows automatically; otherwise it has max_seq_len rows
// until reserve(rows).
//
// Tables are immutable. A call holds its table until it returns; growth creates a new table. So
// threads may share a module: forward, rotate, reserve, to, clone and the accessors may run
// concurrently; changes of `options`, reset() and assignment may not. Modules with the same
// frequencies share memory: one table on the host and one copy on each device, until the last such
// module is destroyed. A table used in a captured CUDA graph lives as long as the module.
//
// The frequencies of dynamic and longrope scaling depend only on the largest position of the
// current call. If only the device knows that position, or if every row changes the frequencies
// (dynamic, past the trained length), the call computes a row for each of its tokens on the device,
// in float64, without synchronizing. Then any position is valid and reserve() is not needed.
//
//   fused_rope::RotaryEmbedding rope(RotaryEmbeddingOptions(64).layout(Layout::kBHSD).base(5e5));
//   const auto [q_rotated, k_rotated] = rope(q, k);
class FUSED_ROPE_API RotaryEmbeddingImpl : public torch::nn::Cloneable<RotaryEmbeddingImpl> {
 public:
  // Throws c10::ValueError if sizes do not match or the scaling lacks a key.
  explicit RotaryEmbeddingImpl(RotaryEmbeddingOptions options);
  RotaryEmbeddingImpl(const RotaryEmbeddingImpl& other);
  RotaryEmbeddingImpl& operator=(const RotaryEmbeddingImpl& other);

  // Returns q and k rotated; the inputs are not modified. q is [B, S, H, D] in the order of the
  // layout, or [T, H, D]; k is the same with any number of heads. Throws like rotate_qk.
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k,
                                             const RotaryEmbeddingForwardOptions& where = {});

  // Returns q rotated, for query-only layers.
  at::Tensor rotate(const at::Tensor& q, const RotaryEmbeddingForwardOptions& where = {});

  // Ensures that the table has at least `rows` rows on each of its devices. Call it before tensors
  // give positions, and before capturing a CUDA graph, which cannot build a table.
  void reserve(int64_t rows);

  // float32 [M, P], read-only: other modules may share the memory. They are the table of the last
  // call, on the module's current device. table() returns a consistent pair even if another thread
  // grows the table.
  at::Tensor cos() const;
  at::Tensor sin() const;
  std::tuple<at::Tensor, at::Tensor> table() const;

  // Applies changed `options`.
  void reset() override;
  // The copy is on `device` if given, else on this module's device.
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<at::Device>& device = std::nullopt) const override;
  void to(at::Device device, at::ScalarType dtype, bool non_blocking = false) override;
  void to(at::ScalarType dtype, bool non_blocking = false) override;
  // Frees this module's tables on other devices.
  void to(at::Device device, bool non_blocking = false) override;
  void pretty_print(std::ostream& stream) const override;

  RotaryEmbeddingOptions options;

 private:
  // The arguments of the operator.
  struct Rotation {
    std::shared_ptr<const Table> table;
    RotateOptions options;
  };
  using Where = RotaryEmbeddingForwardOptions;

  Rotation prepare(const at::Tensor& q, const Where& where) const;
  bool needs_own_rows(const at::Tensor& q, std::optional<int64_t> rows,
                      const RotateOptions& rotation) const;
  Rotation with_own_rows(const at::Tensor& q, RotateOptions rotation) const;
  bool positions_have_axes(const std::optional<at::Tensor>& positions, const at::Tensor& q) const;

  std::shared_ptr<TableCache> tables_;
};

// A shared handle to RotaryEmbeddingImpl, like all libtorch modules.
TORCH_MODULE(RotaryEmbedding);

}  // namespace fused_rope
