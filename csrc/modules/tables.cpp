#include "modules/tables.h"

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <string>

#if defined(FUSED_ROPE_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "modules/varying.h"
#include "ops/table.h"

namespace fused_rope {
namespace {

// Tensors that outlive a call must not depend on the caller's inference mode, tracer, transforms or
// modes.
class OutsideModes {
  c10::impl::ForceDispatchKeyGuard dispatch_{c10::default_included_set, c10::default_excluded_set};
  c10::InferenceMode normal_{false};
};

c10::Stream current_stream(at::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

bool is_captured([[maybe_unused]] at::Device device) {
#if defined(FUSED_ROPE_WITH_CUDA)
  if (!device.is_cuda()) return false;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(c10::cuda::getCurrentCUDAStream(device.index()), &status));
  return status != cudaStreamCaptureStatusNone;
#else
  return false;
#endif
}

// Resolves "cuda" to the current device.
at::Device with_index(at::Device device) {
  const OutsideModes outside;
  return at::empty({0}, at::TensorOptions(device)).device();
}

// A captured copy would read host memory whose contents may have changed before a replay.
void check_not_captured(at::Device device, const std::string& what, const std::string& advice) {
  TORCH_CHECK(!is_captured(device), "RotaryEmbedding: expected ", what, " on ", device,
              " before a CUDA graph is captured, got none; move the module there", advice,
              " before the capture");
}

// Doubles the length, so that a series of growths costs only as much as the last one.
int64_t grown_rows(int64_t needed, int64_t present) {
  return needed <= present ? present : std::max(needed, std::min(2 * present, kMaxTableRows));
}

int64_t rows_of(const std::shared_ptr<const DevicePair>& pair) {
  return pair == nullptr ? 0 : pair->first.size(0);
}

std::shared_ptr<const DevicePair> copy_to(at::Device device, const at::Tensor& first,
                                          const at::Tensor& second) {
  return std::make_shared<DevicePair>(to_device(first, device), to_device(second, device));
}

}  // namespace

DevicePair::DevicePair(at::Tensor first, at::Tensor second)
    : first(std::move(first)), second(std::move(second)) {
  if (!this->first.is_cuda()) return;
  const c10::Stream stream = current_stream(this->first.device());
  written_.emplace(c10::kCUDA);
  written_->record(stream);
  ordered_streams_.push_back(stream);
}

void DevicePair::use_on_current_stream() const {
  if (!written_.has_value()) return;
  const c10::Stream stream = current_stream(first.device());
  const std::lock_guard lock(mutex_);
  if (std::ranges::find(ordered_streams_, stream) != ordered_streams_.end()) return;
  const OutsideModes outside;
  written_->block(stream);
  first.record_stream(stream);
  second.record_stream(stream);
  ordered_streams_.push_back(stream);
}

Table::Table(std::shared_ptr<const DevicePair> pair, int64_t rows) : memory(std::move(pair)) {
  const OutsideModes outside;
  cos = memory->first.narrow(0, 0, rows);
  sin = memory->second.narrow(0, 0, rows);
}

std::shared_ptr<SharedRows> SharedRows::of(const at::Tensor& inv_freq, double scale) {
  struct Registry {
    std::mutex mutex;
    std::unordered_map<std::string, std::weak_ptr<SharedRows>> rows;
  };
  static Registry& registry = *new Registry;  // never destroyed: static modules may still use it
  std::string numbers(static_cast<const char*>(inv_freq.const_data_ptr()), inv_freq.nbytes());
  numbers.append(reinterpret_cast<const char*>(&scale), sizeof scale);
  const std::lock_guard lock(registry.mutex);
  if (const auto found = registry.rows.find(numbers); found != registry.rows.end()) {
    if (auto shared = found->second.lock()) return shared;
  }
  std::erase_if(registry.rows, [](const auto& entry) { return entry.second.expired(); });
  auto shared = std::make_shared<SharedRows>(inv_freq, scale);
  registry.rows.insert_or_assign(std::move(numbers), shared);
  return shared;
}

std::shared_ptr<const DevicePair> SharedRows::on(at::Device device, int64_t rows) {
  const OutsideModes outside;
  if (device.is_meta()) {
    const auto empty = [&] {
      return at::empty({rows, inv_freq_.size(0)}, at::TensorOptions(device).dtype(at::kFloat));
    };
    return std::make_shared<DevicePair>(empty(), empty());
  }
  const std::lock_guard lock(mutex_);
  auto present = device.is_cpu() ? host_ : copies_[device].lock();
  if (present != nullptr && rows_of(present) >= rows) return present;
  const std::string number = std::to_string(rows);
  check_not_captured(device, "a table of " + number + " rows", " and call reserve(" + number + ")");
  const int64_t wanted = grown_rows(rows, rows_of(present));
  if (host_ == nullptr || rows_of(host_) < wanted) {
    const auto [cos, sin] = cos_sin_table(inv_freq_, grown_rows(wanted, rows_of(host_)),
                                          /*first=*/0, scale_, at::kFloat, at::kCPU);
    host_ = std::make_shared<DevicePair>(cos, sin);
  }
  if (device.is_cpu()) return host_;
  present = copy_to(device, host_->first.narrow(0, 0, wanted), host_->second.narrow(0, 0, wanted));
  copies_[device] = present;
  return present;
}

TableCache::TableCache(const RotaryEmbeddingOptions& options, at::Device device,
                       const TableCache* former)
    : state_{.device = with_index(device)} {
  const RopeScaling& scaling = options.scaling();
  const int64_t R = rotary_dim_of(options);
  const int64_t blocks = options.blocks();
  const OutsideModes outside;
  at::Tensor inv_freq;
  std::tie(inv_freq, scale_) = frequencies(R / blocks, options.base(), scaling);
  shared_[kUsual] = SharedRows::of(inv_freq.repeat({blocks}), scale_);
  if (varies(scaling)) {
    const auto [usual, other] = varying_constants(R / blocks, options.base(), scaling);
    host_constants_ = std::make_shared<DevicePair>(usual.repeat({blocks}), other.repeat({blocks}));
    if (scaling.rope_type() == RopeType::kLongRope) {
      shared_[kLong] = SharedRows::of(host_constants_->second, scale_);
      trained_ = *scaling.original_max_position_embeddings();
    }
  }
  if (former != nullptr) {
    const std::lock_guard lock(former->mutex_);
    state_.rows = former->state_.rows;
    state_.captured = former->state_.captured;
  }
  state_.rows[kUsual] = std::max(state_.rows[kUsual], options.max_seq_len());
  if (shared_[kLong] == nullptr) state_.rows[kLong] = 0;
  Lock lock(mutex_);
  prepare(lock, state_.device, state_.rows);
}

TableCache::TableCache(const TableCache& other)
    : shared_(other.shared_),
      host_constants_(other.host_constants_),
      scale_(other.scale_),
      trained_(other.trained_),
      state_([&] {
        const Lock lock(other.mutex_);
        return other.state_;
      }()) {}

std::shared_ptr<const Table> TableCache::take(at::Device device, std::optional<int64_t> rows) {
  const Regime regime = regime_of(rows.value_or(0));
  Lock lock(mutex_);
  auto table = find_or_build(lock, device, regime, rows);
  state_.device = device;
  state_.regime = regime;
  use(table->memory);
  return table;
}

std::shared_ptr<const Table> TableCache::current() {
  Lock lock(mutex_);
  auto table = state_.find(state_.device)->tables[state_.regime];
  use(table->memory);
  return table;
}

std::shared_ptr<const DevicePair> TableCache::constants(at::Device device) {
  Lock lock(mutex_);
  auto pair = find_or_copy_constants(lock, device);
  use(pair);
  return pair;
}

void TableCache::reserve(int64_t rows) {
  Lock lock(mutex_);
  const Regime regime = regime_of(rows);
  std::array<int64_t, kRegimes> wanted = state_.rows;
  wanted[regime] = grown_rows(rows, wanted[regime]);
  // Calls up to the trained length use the usual regime.
  if (regime == kLong) wanted[kUsual] = std::max(wanted[kUsual], static_cast<int64_t>(trained_));
  std::vector<at::Device> devices;
  for (const OnDevice& present : state_.devices) devices.push_back(present.device);
  for (const at::Device device : devices) prepare(lock, device, wanted);
}

void TableCache::move(at::Device to) {
  const at::Device device = with_index(to);
  Lock lock(mutex_);
  prepare(lock, device, state_.rows);
  const Regime regime = state_.regime;
  find_or_build(lock, device, regime, std::nullopt);  // another thread may have removed it
  std::erase_if(state_.devices, [&](const OnDevice& on) { return on.device != device; });
  state_.device = device;
  state_.regime = regime;
}

TableCache::OnDevice* TableCache::State::find(at::Device device) {
  const auto found = std::ranges::find(devices, device, &OnDevice::device);
  return found == devices.end() ? nullptr : &*found;
}

TableCache::OnDevice& TableCache::State::find_or_add(at::Device device) {
  OnDevice* found = find(device);
  return found != nullptr ? *found : devices.emplace_back(OnDevice{.device = device});
}

TableCache::Regime TableCache::regime_of(int64_t rows) const {
  return static_cast<double>(rows) > trained_ ? kLong : kUsual;
}

std::shared_ptr<const Table> TableCache::find_or_build(Lock& lock, at::Device device, Regime regime,
                                                       std::optional<int64_t> rows) {
  const int64_t needed = rows.value_or(state_.rows[regime]);
  const OnDevice* present = state_.find(device);
  if (present != nullptr && present->tables[regime] != nullptr &&
      present->tables[regime]->rows() >= needed) {
    return present->tables[regime];
  }
  TORCH_CHECK_VALUE(needed <= kMaxTableRows, "RotaryEmbedding: expected at most ", kMaxTableRows,
                    " rows, got ", needed);
  const int64_t M = state_.rows[regime] > 0 ? state_.rows[regime] : state_.rows[kUsual];
  const int64_t wanted = grown_rows(needed, M);
  lock.unlock();
  auto table = std::make_shared<const Table>(shared_[regime]->on(device, wanted), wanted);
  lock.lock();
  state_.rows[regime] = std::max(state_.rows[regime], wanted);
  auto& published = state_.find_or_add(device).tables[regime];
  if (published == nullptr || published->rows() < wanted) published = std::move(table);
  return published;
}

std::shared_ptr<const DevicePair> TableCache::find_or_copy_constants(Lock& lock,
                                                                     at::Device device) {
  if (const OnDevice* present = state_.find(device); present && present->constants) {
    return present->constants;
  }
  lock.unlock();
  const OutsideModes outside;
  check_not_captured(device, "the frequencies", "");
  auto copy = copy_to(device, host_constants_->first, host_constants_->second);
  lock.lock();
  auto& published = state_.find_or_add(device).constants;
  if (published == nullptr) published = std::move(copy);
  return published;
}

void TableCache::prepare(Lock& lock, at::Device device, std::array<int64_t, kRegimes> rows) {
  if (rows[kLong] > 0) find_or_build(lock, device, kLong, rows[kLong]);
  find_or_build(lock, device, kUsual, rows[kUsual]);
  if (host_constants_ != nullptr) find_or_copy_constants(lock, device);
}

void TableCache::use(const std::shared_ptr<const DevicePair>& pair) {
  if (!is_captured(pair->first.device())) {
    pair->use_on_current_stream();
  } else if (std::ranges::find(state_.captured, pair) == state_.captured.end()) {
    state_.captured.push_back(pair);
  }
}

}  // namespace fused_rope
