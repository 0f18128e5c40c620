// The tables of modules. A pair of tensors is immutable: a call, autograd or a CUDA graph that
// holds one is not affected if the module grows, moves or changes its regime.
//
// Letters: P pairs, M table rows.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <array>
#include <cmath>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fused_rope/rotary_embedding.h"

namespace fused_rope {

// R of a module.
inline int64_t rotary_dim_of(const RotaryEmbeddingOptions& o) {
  return o.rotary_dim().value_or(o.head_dim() - o.rotary_offset());
}

// Two tensors on one device, readable from every stream.
class DevicePair {
 public:
  // The tensors must be written on their device's current stream.
  DevicePair(at::Tensor first, at::Tensor second);

  const at::Tensor first, second;

  // Orders the current stream after the write, and any reuse of the memory after the stream.
  void use_on_current_stream() const;

 private:
  mutable std::mutex mutex_;
  std::optional<c10::Event> written_;  // CUDA only
  mutable std::vector<c10::Stream> ordered_streams_;
};

// cos and sin, float32 [M, P], of one set of frequencies on one device.
struct Table {
  Table(at::Tensor cos, at::Tensor sin) : cos(std::move(cos)), sin(std::move(sin)) {}
  // The first `rows` rows of `pair`.
  Table(std::shared_ptr<const DevicePair> pair, int64_t rows);

  int64_t rows() const { return cos.size(0); }

  at::Tensor cos, sin;
  std::shared_ptr<const DevicePair> memory;
};

// The rows of one set of frequencies, shared by all modules of the process that use it: computed
// once on the host and copied once to each device. The host rows live as long as any of the
// modules, a device's copy as long as any module that uses it there.
class SharedRows {
 public:
  SharedRows(const at::Tensor& inv_freq, double scale) : inv_freq_(inv_freq), scale_(scale) {}

  // The shared instance for these values. inv_freq: float64 [P], contiguous, on the CPU.
  static std::shared_ptr<SharedRows> of(const at::Tensor& inv_freq, double scale);

  // At least `rows` rows on `device`. Does not synchronize. Throws if the rows are not there yet
  // and a CUDA graph is captured on the device's current stream.
  std::shared_ptr<const DevicePair> on(at::Device device, int64_t rows);

 private:
  std::mutex mutex_;
  const at::Tensor inv_freq_;
  const double scale_;
  std::shared_ptr<const DevicePair> host_;
  std::unordered_map<at::Device, std::weak_ptr<const DevicePair>> copies_;
};

// The tables of one module: one on each device that it was called on, and two with longrope, one
// per regime. Every function is thread-safe.
class TableCache {
 public:
  // Makes tables of max_seq_len rows, or of as many as `former` has, whichever is more.
  TableCache(const RotaryEmbeddingOptions& options, at::Device device,
             const TableCache* former = nullptr);
  TableCache(const TableCache& other);

  // The table on `device`, grown to at least `rows` rows. Without `rows`, which only the device
  // then knows, the table keeps its length.
  std::shared_ptr<const Table> take(at::Device device, std::optional<int64_t> rows);

  // The table of the last take(), on the module's current device.
  std::shared_ptr<const Table> current();

  // The two tensors that varying_frequencies needs, on `device`.
  std::shared_ptr<const DevicePair> constants(at::Device device);

  // The factor that scales cosine and sine.
  double scale() const { return scale_; }

  // Grows the tables on all devices to `rows` rows.
  void reserve(int64_t rows);

  // Makes `device` the only one with tables of this module.
  void move(at::Device device);

 private:
  enum Regime : size_t { kUsual, kLong, kRegimes };

  struct OnDevice {
    at::Device device;
    std::array<std::shared_ptr<const Table>, kRegimes> tables = {};
    std::shared_ptr<const DevicePair> constants = nullptr;
  };

  struct State {
    OnDevice* find(at::Device device);
    OnDevice& find_or_add(at::Device device);

    // The device of the last call or of the last move since.
    at::Device device;
    Regime regime = kUsual;
    // M of each regime, 0 before its first use.
    std::array<int64_t, kRegimes> rows = {};
    std::vector<OnDevice> devices = {};
    // CUDA graphs read these by address, so they live as long as the module.
    std::vector<std::shared_ptr<const DevicePair>> captured = {};
  };
  using Lock = std::unique_lock<std::mutex>;

  Regime regime_of(int64_t rows) const;
  // These release the lock while they build.
  std::shared_ptr<const Table> find_or_build(Lock& lock, at::Device device, Regime regime,
                                             std::optional<int64_t> rows);
  std::shared_ptr<const DevicePair> find_or_copy_constants(Lock& lock, at::Device device);
  // Builds everything that calls on `device` may need, with `rows` rows of each regime.
  void prepare(Lock& lock, at::Device device, std::array<int64_t, kRegimes> rows);
  void use(const std::shared_ptr<const DevicePair>& pair);

  std::array<std::shared_ptr<SharedRows>, kRegimes> shared_;
  std::shared_ptr<const DevicePair> host_constants_;  // null where frequencies do not vary
  double scale_;
  double trained_ = HUGE_VAL;  // where the regime kLong begins

  mutable std::mutex mutex_;
  State state_;
};

}  // namespace fused_rope
