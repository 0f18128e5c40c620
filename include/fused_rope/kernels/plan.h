// How a call is spread over a GPU: chosen from shapes, strides and device facts, testable without
// one.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

#include "fused_rope/kernels/params.h"

namespace fused_rope {

// Where a thread finds the two members of its pairs.
enum class Arrangement {
  kPair,      // a vector of first members and the vector of their partners, `distance` lanes apart
  kAdjacent,  // two vectors of whole pairs (interleaved)
};

// How a thread finds the table rows of its token.
enum class Rows {
  kLinear,  // addresses are linear in batch, sequence and head: nothing is looked up
  kLookup,  // numbers in device memory name rows of the table or of the output
  kAxes,    // the same, with a row of the table for each axis of positions
};

struct DeviceFacts {
  int64_t l2_bytes;
  int64_t multiprocessors;
};

// Division by a constant by multiplication (Granlund and Montgomery 1994); exact for n < 2^31, 1 <=
// divisor < 2^31.
struct Divider {
  uint32_t divisor = 1;
  uint32_t multiplier = 0;
  uint32_t shift = 0;

  Divider() = default;
  explicit Divider(int64_t by) : divisor(static_cast<uint32_t>(by)) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(
        ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

  // The quotient of n; n becomes the remainder.
  FUSED_ROPE_HOST_DEVICE uint32_t divide(uint32_t& n) const {
#if defined(__CUDA_ARCH__)
    const uint32_t quotient = (__umulhi(n, multiplier) + n) >> shift;
#else
    const uint32_t quotient =
        static_cast<uint32_t>((((uint64_t{n} * multiplier) >> 32) + n) >> shift);
#endif
    n -= quotient * divisor;
    return quotient;
  }
};

// Part of one tensor: first coordinates and sizes in batch, sequence, heads.
enum Axis { kBatch, kSequence, kHead };
struct Box {
  std::array<int64_t, 3> first;
  std::array<int64_t, 3> size;
};

// What an experiment may decide instead of the plan; -1 leaves it to the plan.
struct PlanOverrides {
  int heads = -1;
  int threads = -1;
};

struct Plan {
  Arrangement arrangement;
  Rows rows;
  int vector;            // lanes moved at once: 16 bytes of them, or 1
  int rotating_units;    // threads of one head that rotate
  int units;             // threads of one head: those that rotate, then those that copy
  int heads_per_thread;  // heads that share the table row a thread holds in registers
  int threads;           // of a block
  bool vector_tables;    // cos and sin can be read 16 bytes at a time
};

constexpr int kVectorBytes = 16;
constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;                // of a block
constexpr int kResidentThreads = 1536;          // of a multiprocessor
constexpr int kMaxHeads = 2;                    // of a thread
constexpr int64_t kMaxWork = int64_t{1} << 30;  // threads of one launch

constexpr bool is_power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

constexpr int64_t ceil_divide(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Whether every vector of `lanes` lanes of a tensor starts on a 16-byte boundary.
inline bool is_aligned(const void* data, const Strides& strides, const RotateParams& p, int64_t H,
                       int lanes) {
  const auto fits = [&](int64_t size, int64_t stride) { return size <= 1 || stride % lanes == 0; };
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && strides.d == 1 &&
         fits(p.B, strides.b) && fits(p.S, strides.s) && fits(H, strides.h);
}

// Whether all of a call's memory and spans can be moved in vectors of `lanes` lanes.
inline bool is_vectorizable(const RotateParams& p, int lanes) {
  const Lanes& l = p.lanes;
  const bool interleaved = l.distance == 1;
  if (l.offset % lanes != 0 || (interleaved ? 2 * l.P : l.distance) % lanes != 0) return false;
  if (!p.in_place && p.D % lanes != 0) return false;
  for (int i = 0; i < p.count; ++i) {
    const TensorParams& t = p.tensors[i];
    if (t.H == 0) continue;
    if (!is_aligned(t.in, t.in_strides, p, t.H, lanes)) return false;
    // A scattered output has rows of its own number, so its row stride must always fit.
    if (t.scattered && t.out_strides.s % lanes != 0) return false;
    if (!is_aligned(t.out, t.out_strides, p, t.H, lanes)) return false;
  }
  return true;
}

// Whether table rows start on 16-byte boundaries and their entries are neighbours.
inline bool is_vectorizable(const TableParams& table, DType dtype) {
  const int64_t entries = kVectorBytes / size_of(dtype);
  const auto fits = [&](int64_t stride) { return stride % entries == 0; };
  return reinterpret_cast<uintptr_t>(table.data) % kVectorBytes == 0 && table.j == 1 &&
         fits(table.m) && fits(table.b) && fits(table.s) && fits(table.h);
}

// The axes of a tensor from the smallest stride to the largest, so that neighbouring threads touch
// neighbouring memory.
inline std::array<Axis, 3> memory_order(const RotateParams& p, const TensorParams& t) {
  const std::array<int64_t, 3> sizes = {p.B, p.S, t.H};
  const std::array<int64_t, 3> strides = {t.in_strides.b, t.in_strides.s, t.in_strides.h};
  const auto stride = [&](Axis axis) { return sizes[axis] <= 1 ? INT64_MAX : strides[axis]; };
  std::array<Axis, 3> order = {kHead, kSequence, kBatch};
  std::stable_sort(order.begin(), order.end(),
                   [&](Axis x, Axis y) { return stride(x) < stride(y); });
  return order;
}

inline int64_t total_heads(const RotateParams& p) {
  return p.tensors[0].H + (p.count > 1 ? p.tensors[1].H : 0);
}

// Whether rows of the table or of the output are named by numbers in device memory.
inline bool has_lookups(const RowParams& rows) {
  return rows.positions.data != nullptr || rows.offsets.data != nullptr ||
         rows.cu_seqlens.data != nullptr || rows.out_rows.data != nullptr;
}

inline Plan make_plan(const RotateParams& p, const DeviceFacts& device,
                      const PlanOverrides& overrides = {}) {
  const auto choose = [](int override, int choice) { return override >= 0 ? override : choice; };
  Plan plan;
  const int lanes = kVectorBytes / size_of(p.dtype);
  plan.vector = is_vectorizable(p, lanes) ? lanes : 1;
  const bool adjacent = plan.vector > 1 && p.lanes.distance == 1;
  plan.arrangement = adjacent ? Arrangement::kAdjacent : Arrangement::kPair;
  plan.rows = p.axes != nullptr ? Rows::kAxes : has_lookups(p.rows) ? Rows::kLookup : Rows::kLinear;
  // Every thread moves two vectors of a head.
  const int64_t rotated = 2 * p.lanes.P;
  const int64_t copied = p.in_place ? 0 : p.D - rotated;
  plan.rotating_units = static_cast<int>(ceil_divide(rotated, 2 * plan.vector));
  plan.units = plan.rotating_units + static_cast<int>(ceil_divide(copied, 2 * plan.vector));

  // Rows of several axes are worth sharing by two heads, where that leaves threads enough: when
  // more is moved than the cache holds. One row is not, and with a table for each head none can be.
  const int64_t bytes = p.B * p.S * total_heads(p) * p.D * size_of(p.dtype);
  const bool shares = plan.rows == Rows::kAxes && bytes > device.l2_bytes;
  const int heads = std::clamp(choose(overrides.heads, shares ? 2 : 1), 1, kMaxHeads);
  plan.heads_per_thread = p.per_head || plan.vector == 1 ? 1 : heads;

  // Small blocks leave no gaps when one ends and the next begins. Where all are on the device at
  // once, fewer start sooner; where there is less than one for each multiprocessor, more run side
  // by side.
  const int64_t work = p.B * p.S * total_heads(p) * plan.units / plan.heads_per_thread;
  const int64_t each = work / std::max<int64_t>(device.multiprocessors, 1);
  const bool at_once = each > 128 && each <= kResidentThreads;
  const int threads = choose(overrides.threads, at_once ? 256 : 128);
  plan.threads = std::clamp(threads / kWarp * kWarp, kWarp, kMaxThreads);
  plan.vector_tables =
      is_vectorizable(p.cos, p.table_dtype) && is_vectorizable(p.sin, p.table_dtype);
  return plan;
}

// How a table's entries follow batch, sequence and head. Where no row is looked up, a shared table
// has its rows along the sequence.
inline Strides linear_strides(const TableParams& table, Rows rows) {
  return {table.b, table.s + (rows == Rows::kLinear ? table.m : 0), table.h, table.j};
}

inline int64_t stride_of(const Strides& strides, Axis axis) {
  return axis == kBatch ? strides.b : axis == kSequence ? strides.s : strides.h;
}

// The longest step of a launch along an axis, in bytes.
inline int64_t longest_stride(const RotateParams& p, const TensorParams& t, Rows rows, Axis axis) {
  const bool scattered = t.scattered && axis != kHead;
  const Strides positions = {p.rows.positions_b, p.rows.positions_s, 0, 0};
  return std::max({stride_of(t.in_strides, axis) * size_of(p.dtype),
                   scattered ? 0 : stride_of(t.out_strides, axis) * size_of(p.dtype),
                   stride_of(linear_strides(p.cos, rows), axis) * size_of(p.table_dtype),
                   stride_of(linear_strides(p.sin, rows), axis) * size_of(p.table_dtype),
                   stride_of(positions, axis) * size_of(p.rows.positions)});
}

// The axis along which a box must be halved before its threads and its strides fit in 32 bits, if
// any.
inline std::optional<Axis> axis_to_split(const RotateParams& p, const TensorParams& t,
                                         const Plan& plan, const Box& box) {
  for (const Axis axis : {kBatch, kSequence, kHead}) {
    if (box.size[axis] > 1 && longest_stride(p, t, plan.rows, axis) > UINT32_MAX) return axis;
  }
  // Divided one by one, because the product of the sizes may not fit in 64 bits.
  if (box.size[0] <= kMaxWork / plan.units / box.size[1] / box.size[2]) return std::nullopt;
  const auto longest = std::max_element(box.size.begin(), box.size.end());
  return *longest > 1 ? std::optional(static_cast<Axis>(longest - box.size.begin())) : std::nullopt;
}

// Calls f(box) for boxes that cover `whole`, none of which axis_to_split would split.
template <typename F>
void for_each_box(const RotateParams& p, const TensorParams& t, const Plan& plan, const Box& whole,
                  const F& f) {
  const std::optional<Axis> axis = axis_to_split(p, t, plan, whole);
  if (!axis.has_value()) return f(whole);
  Box low = whole;
  Box high = whole;
  low.size[*axis] = whole.size[*axis] / 2;
  high.first[*axis] += low.size[*axis];
  high.size[*axis] -= low.size[*axis];
  for_each_box(p, t, plan, low, f);
  for_each_box(p, t, plan, high, f);
}

}  // namespace fused_rope
