// The tables of modules. A pair of tensors never changes once it exists: whoever took one, a call,
// autograd or a CUDA graph, keeps it however the module grows, moves or changes its regime.
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

// Two tensors on one device, readable from every stream.
class DevicePair {
 public:
  // The current stream of the tensors' device is the one that writes them.
  DevicePair(at::Tensor first, at::Tensor second);

  const at::Tensor first, second;

  // Orders the current stream after the write, and a reuse of the memory after that stream.
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

// The rows of one set of frequencies, for all modules of the process that use the same numbers:
// computed once, on the host, and copied once to each device. The host's rows live as long as any
// of the modules, a device's copy as long as any module that uses it there.
class SharedRows {
 public:
  SharedRows(const at::Tensor& inv_freq, double scale) : inv_freq_(inv_freq), scale_(scale) {}

  // The one of these numbers. inv_freq: float64 [P], contiguous, on the CPU.
  static std::shared_ptr<SharedRows> of(const at::Tensor& inv_freq, double scale);

  // At least `rows` rows on `device`. Does not synchronize. Throws while a CUDA graph is captured
  // on the device's current stream, if the rows are not there already.
  std::shared_ptr<const DevicePair> on(at::Device device, int64_t rows);

 private:
  std::mutex mutex_;
  const at::Tensor inv_freq_;
  const double scale_;
  std::shared_ptr<const DevicePair> host_;
  std::unordered_map<at::Device, std::weak_ptr<const DevicePair>> copies_;
};

// The tables of one module: on each device that it was called on, and for longrope one for each of
// its two regimes. Threads may call every function at once.
class TableCache {
 public:
  // Tables of max_seq_len rows; of as many as `former` has, where that is more.
  TableCache(const RotaryEmbeddingOptions& options, at::Device device,
             const TableCache* former = nullptr);
  TableCache(const TableCache& other);

  // The table on `device` for a call that needs `rows` rows, to which it grows; for one whose rows
  // only the device knows, as long as it is.
  std::shared_ptr<const Table> take(at::Device device, std::optional<int64_t> rows);

  // The table that was taken last, on the device that the module has been moved to since.
  std::shared_ptr<const Table> current();

  // The two tensors that varying_frequencies needs, on `device`.
  std::shared_ptr<const DevicePair> constants(at::Device device);

  // The factor of cosine and sine.
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

    // Of the last call, or what the module was moved to since.
    at::Device device;
    Regime regime = kUsual;
    // M of each regime, 0 before its first use.
    std::array<int64_t, kRegimes> rows = {};
    std::vector<OnDevice> devices = {};
    // A CUDA graph reads these by their addresses: they live as long as the module.
    std::vector<std::shared_ptr<const DevicePair>> captured = {};
  };
  using Lock = std::unique_lock<std::mutex>;

  Regime regime_of(int64_t rows) const;
  // These release the lock while they build.
  std::shared_ptr<const Table> find_or_build(Lock& lock, at::Device device, Regime regime,
                                             std::optional<int64_t> rows);
  std::shared_ptr<const DevicePair> find_or_copy_constants(Lock& lock, at::Device device);
  // All that calls on `device` may need, with so many rows of each regime.
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
