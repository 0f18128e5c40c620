// How a call is spread over a GPU: chosen from shapes, strides and device facts, testable without
// one.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <utility>

#include "fused_rope/kernels/params.h"

namespace fused_rope {

// Where a thread finds the two members of its pairs.
enum class Arrangement {
  kPair,      // a vector of first members and the vector of their partners, `distance` lanes apart
  kAdjacent,  // two vectors of whole pairs (interleaved)
};

// How a thread finds the table rows of its token.
enum class Rows {
  kLinear,    // addresses are linear in batch, sequence and head, sin's a step beside cos's
  kPerHead,   // the same, and heads have rows of their own, in vectors like the lanes: q's and k's
              // blocks take turns, so that the second finds its rows in cache
  kLookup,    // numbers in device memory name rows of the table or of the output
  kSections,  // the same, with several axes of positions, but one for all pairs of a thread
  kAxes,      // axes that differ within a thread
};

FUSED_ROPE_HOST_DEVICE constexpr bool is_linear(Rows rows) {
  return rows == Rows::kLinear || rows == Rows::kPerHead;
}
constexpr bool has_axes(Rows rows) { return rows == Rows::kSections || rows == Rows::kAxes; }

// Vectors that a thread moves: those of both members, or one or two of whole pairs. One keeps less
// in flight, more evenly; where every thread looks a row up, two share it. Two vectors of sections
// would seldom have one axis.
constexpr int vectors_of_thread(Arrangement arrangement, Rows rows) {
  const bool looks_up = rows == Rows::kLookup || rows == Rows::kAxes;
  return arrangement == Arrangement::kPair || looks_up ? 2 : 1;
}

struct DeviceFacts {
  int64_t l2_bytes;
  int64_t multiprocessors;
};

// floor(n / divisor) by multiplication (Granlund and Montgomery 1994); exact for n < 2^31, 1 <=
// divisor < 2^31.
struct Quotient {
  uint32_t multiplier = 0;
  uint32_t shift = 0;

  Quotient() = default;
  explicit Quotient(int64_t divisor) {
    const auto by = static_cast<uint32_t>(divisor);
    while ((uint64_t{1} << shift) < by) ++shift;
    multiplier =
        static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by)) / by + 1);
  }

  FUSED_ROPE_HOST_DEVICE uint32_t of(uint32_t n) const {
#if defined(__CUDA_ARCH__)
    return (__umulhi(n, multiplier) + n) >> shift;
#else
    return static_cast<uint32_t>((((uint64_t{n} * multiplier) >> 32) + n) >> shift);
#endif
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
  int vector = -1;  // bytes: 4, 8 or 16, as far as there are such instances
  int threads = -1;
  int keep = -1;
  int stream = -1;
  int work = -1;
};

struct Plan {
  Arrangement arrangement;
  Rows rows;
  bool vector_tables;  // cos and sin can be read 16 bytes at a time
  bool keeps_tables;   // their lines, where read in vectors, leave the L2 cache last
  bool streams;        // lines of lanes, where moved in vectors, leave it first
  int vector;          // lanes moved at once: 16, 8 or 4 bytes of them, or 1
  int rotating_units;  // threads of one head that rotate
  int units;           // threads of one head: those that rotate, then those that copy
  bool plain;          // every thread rotates, and pairs are not in several blocks
  int threads;         // of a block
  int work;            // threads of one launch, at most
};

constexpr int kVectorBytes = 16;
constexpr int kFewestBytes = 8;  // that a thread moves in vectors
constexpr int kShortPiece = 64;  // bytes
constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;        // of a block
constexpr int kResidentThreads = 1536;  // of a multiprocessor
constexpr int kKeptShare = 4;           // tables of up to a quarter of the L2 cache are kept in it
constexpr int kHeavyShare = 10;    // tables of more than a tenth of many lanes make them stream
constexpr int kMaxWork = 1 << 30;  // threads of one launch

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

// By Axis.
inline std::array<int64_t, 3> in_strides_of(const TensorParams& t) {
  return {t.in_strides.b, t.in_strides.s, t.in_strides.h};
}

// The axes of a tensor from the smallest stride to the largest, so that neighbouring threads touch
// neighbouring memory.
inline std::array<Axis, 3> memory_order(const RotateParams& p, const TensorParams& t) {
  const std::array<int64_t, 3> sizes = {p.B, p.S, t.H};
  const std::array<int64_t, 3> strides = in_strides_of(t);
  const auto stride = [&](Axis axis) { return sizes[axis] <= 1 ? INT64_MAX : strides[axis]; };
  std::array<Axis, 3> order = {kHead, kSequence, kBatch};
  for (const int i : {0, 1, 0}) {  // a stable sort of three
    if (stride(order[i + 1]) < stride(order[i])) std::swap(order[i], order[i + 1]);
  }
  return order;
}

inline int64_t total_heads(const RotateParams& p) {
  return p.tensors[0].H + (p.count > 1 ? p.tensors[1].H : 0);
}

inline bool have_same_strides(const TableParams& x, const TableParams& y) {
  return x.m == y.m && x.b == y.b && x.s == y.s && x.h == y.h;
}

// Whether rows of the table or of the output are named by numbers in device memory.
inline bool has_lookups(const RowParams& rows) {
  return rows.positions.data != nullptr || rows.offsets.data != nullptr ||
         rows.cu_seqlens.data != nullptr || rows.out_rows.data != nullptr;
}

// Whether one tensor's heads go on where the other's end, as slices of a packed QKV tensor do: then
// one walk over memory serves both.
inline bool are_neighbours(const RotateParams& p) {
  if (p.count < 2 || p.per_head) return false;
  const TensorParams& q = p.tensors[0];
  const TensorParams& k = p.tensors[1];
  const auto follows = [&](const void* first, const void* second, const Strides& s,
                           const Strides& other) {
    const auto same = [](int64_t size, int64_t x, int64_t y) { return size <= 1 || x == y; };
    return static_cast<const char*>(first) + q.H * s.h * size_of(p.dtype) == second &&
           s.h == other.h && s.d == other.d && same(p.B, s.b, other.b) && same(p.S, s.s, other.s);
  };
  return q.H > 0 && k.H > 0 && !q.scattered && !k.scattered &&
         follows(q.in, k.in, q.in_strides, k.in_strides) &&
         follows(q.out, k.out, q.out_strides, k.out_strides);
}

// The call with the heads of both tensors in the first.
inline RotateParams joined(RotateParams p) {
  p.tensors[0].H += p.tensors[1].H;
  p.count = 1;
  return p;
}

inline double tokens(const RotateParams& p) {
  return static_cast<double>(p.B) * static_cast<double>(p.S);
}

// Rows of the table that a call may read: what is expanded counts once.
inline double table_rows(const RotateParams& p) {
  const auto S = static_cast<double>(p.S);
  if (p.rows.gathered) {
    return S * (p.cos.b != 0 ? static_cast<double>(p.B) : 1) *
           (p.cos.h != 0 ? static_cast<double>(p.tensors[0].H) : 1);
  }
  if (!has_lookups(p.rows)) return S;
  return std::min(static_cast<double>(p.rows.M), tokens(p) * (p.axes != nullptr ? kMaxAxes : 1));
}

inline double table_bytes(const RotateParams& p) {
  return 2 * table_rows(p) * static_cast<double>(p.lanes.P) * size_of(p.table_dtype);
}

// Lanes that a call reads, and writes; in place only those that are rotated.
inline int64_t moved_lanes_of_head(const RotateParams& p) {
  return p.in_place ? 2 * p.lanes.P : p.D;
}
inline double moved_lanes(const RotateParams& p) {
  return tokens(p) * static_cast<double>(total_heads(p)) *
         static_cast<double>(moved_lanes_of_head(p));
}

// The calls for which there are instances with vectors of less than 16 bytes.
inline bool has_shorter_vectors(const RotateParams& p, const Plan& plan) {
  return plan.rows == Rows::kLinear && plan.plain && plan.vector > 1 && size_of(p.dtype) == 2 &&
         plan.vector_tables;
}

// Bytes of the shortest vectors of those instances.
constexpr int shortest_vector(Arrangement arrangement, Rows rows) {
  return kFewestBytes / vectors_of_thread(arrangement, rows);
}

// Whether a call moves short pieces of memory with gaps between them that are no shorter. The first
// tensor that has heads stands for both.
inline bool moves_short_pieces(const RotateParams& p) {
  const TensorParams& t = p.tensors[0].H > 0 ? p.tensors[0] : p.tensors[1];
  const int64_t piece = 2 * p.lanes.P;
  return p.in_place && piece * size_of(p.dtype) <= kShortPiece &&
         in_strides_of(t)[memory_order(p, t)[0]] >= 2 * piece;
}

// Threads for each multiprocessor, where each moves so many lanes.
inline double threads_each(const RotateParams& p, const DeviceFacts& device,
                           int64_t lanes_of_thread) {
  return moved_lanes(p) / static_cast<double>(lanes_of_thread * device.multiprocessors);
}

// Bytes of a vector. With short ones a warp's two requests, for first members and for partners, lie
// closer together in memory: worth more threads where memory is what they wait for. Short pieces
// are quicker still with fewer bytes under way.
inline int bytes_of_vector(const RotateParams& p, const Plan& plan, const DeviceFacts& device) {
  if (threads_each(p, device, 2 * plan.vector) <= kResidentThreads) return kVectorBytes;
  if (moves_short_pieces(p)) return shortest_vector(plan.arrangement, plan.rows);
  return kVectorBytes / vectors_of_thread(plan.arrangement, plan.rows);
}

// Small blocks leave no gaps when one ends and the next begins. Where all are on the device at
// once, fewer start sooner; where there is less than one for each multiprocessor, more run side by
// side. Blocks of whole heads do not share lines with each other.
inline int threads_of_block(const RotateParams& p, const DeviceFacts& device, int units,
                            int64_t lanes_of_thread) {
  const double each = threads_each(p, device, lanes_of_thread);
  const int threads = each > 128 && each <= kResidentThreads ? 256 : 128;
  const int64_t whole = std::lcm<int64_t>(std::max(units, 1), kWarp);
  if (whole > kMaxThreads) return threads;
  return static_cast<int>(std::max(whole, threads / whole * whole));
}

// Whether each run of `pairs` pairs has one axis.
inline bool has_sections_of(const RotateParams& p, int64_t pairs) {
  for (int64_t j = 1; j < p.lanes.P; ++j) {
    if (p.axes[j] != p.axes[j - 1] && j % pairs != 0) return false;
  }
  return true;
}

inline Rows choose_rows(const RotateParams& p, const Plan& plan) {
  if (p.axes != nullptr) {
    const bool adjacent = plan.arrangement == Arrangement::kAdjacent;
    return has_sections_of(p, adjacent ? plan.vector / 2 : plan.vector) ? Rows::kSections
                                                                        : Rows::kAxes;
  }
  if (has_lookups(p.rows) || !have_same_strides(p.cos, p.sin)) return Rows::kLookup;
  return p.per_head && plan.vector > 1 && plan.vector_tables ? Rows::kPerHead : Rows::kLinear;
}

inline Plan make_plan(const RotateParams& p, const DeviceFacts& device,
                      const PlanOverrides& overrides = {}) {
  const auto choose = [](int override, int choice) { return override >= 0 ? override : choice; };
  Plan plan;
  const int lanes = kVectorBytes / size_of(p.dtype);
  plan.vector = is_vectorizable(p, lanes) ? lanes : 1;
  const bool adjacent = plan.vector > 1 && p.lanes.distance == 1;
  plan.arrangement = adjacent ? Arrangement::kAdjacent : Arrangement::kPair;
  plan.vector_tables =
      is_vectorizable(p.cos, p.table_dtype) && is_vectorizable(p.sin, p.table_dtype);
  plan.rows = choose_rows(p, plan);

  // What layer after layer reads again should outlive the lanes that pass by, unless it takes much
  // of the cache away from everyone else. Lanes make way where tables weigh much beside them; those
  // that fit in the cache stay for whoever reads them next.
  const double table = table_bytes(p);
  const double lanes_bytes = moved_lanes(p) * size_of(p.dtype);
  const auto l2_bytes = static_cast<double>(device.l2_bytes);
  plan.keeps_tables = choose(overrides.keep, table * kKeptShare <= l2_bytes) != 0;
  const bool heavy = table * kHeavyShare > lanes_bytes && lanes_bytes > l2_bytes;
  plan.streams = choose(overrides.stream, heavy) != 0;

  const int64_t rotated = 2 * p.lanes.P;
  const int64_t copied = moved_lanes_of_head(p) - rotated;
  const bool one_span = p.lanes.distance == 1 || p.lanes.distance == p.lanes.P;
  plan.plain = one_span && copied == 0;
  if (has_shorter_vectors(p, plan)) {
    const int shortest = shortest_vector(plan.arrangement, plan.rows);
    const int bytes = choose(overrides.vector, bytes_of_vector(p, plan, device));
    const auto instance = static_cast<uint32_t>(std::clamp(bytes, shortest, kVectorBytes));
    plan.vector = static_cast<int>(std::bit_floor(instance)) / size_of(p.dtype);
  }

  const int64_t lanes_of_thread = vectors_of_thread(plan.arrangement, plan.rows) * plan.vector;
  plan.rotating_units = static_cast<int>(ceil_divide(rotated, lanes_of_thread));
  plan.units = plan.rotating_units + static_cast<int>(ceil_divide(copied, lanes_of_thread));
  const int threads =
      choose(overrides.threads, threads_of_block(p, device, plan.units, lanes_of_thread));
  plan.threads = std::clamp(threads / kWarp * kWarp, kWarp, kMaxThreads);
  plan.work = choose(overrides.work, kMaxWork);
  return plan;
}

// What a launch walks through: bytes that it moves on along each axis; none along an axis of one
// coordinate, whatever its stride.
using Walk = std::array<int64_t, 3>;
enum WalkOf { kIn, kOut, kCos, kSin, kPositions };
using Walks = std::array<Walk, 5>;

inline Walks walks_of(const RotateParams& p, const TensorParams& t, Rows rows) {
  const auto walk = [&](int size, int64_t b, int64_t s, int64_t h) {
    return Walk{p.B > 1 ? b * size : 0, p.S > 1 ? s * size : 0, t.H > 1 ? h * size : 0};
  };
  // Where no row is looked up, a shared table has its rows along the sequence.
  const auto entries = [&](const TableParams& table) {
    const int64_t s = table.s + (is_linear(rows) ? table.m : 0);
    return walk(size_of(p.table_dtype), table.b, s, table.h);
  };
  const Strides& in = t.in_strides;
  const Strides out = t.scattered ? Strides{0, 0, t.out_strides.h, 0} : t.out_strides;
  const RowParams& r = p.rows;
  const int size = size_of(p.dtype);
  return {walk(size, in.b, in.s, in.h), walk(size, out.b, out.s, out.h), entries(p.cos),
          entries(p.sin), walk(size_of(r.positions), r.positions_b, r.positions_s, 0)};
}

// A box and its axes in memory order. A run is all coordinates along one of them.
struct Runs {
  std::array<Axis, 3> order;
  Box box;

  int64_t size(int i) const { return box.size[order[i]]; }
  int64_t heads() const { return size(0) * size(1) * size(2); }
};

// Where a thread works: the heads of its box before its own, the whole runs of the fastest axis
// before it, those of the two fastest.
struct Place {
  uint32_t before[3];
};

// What each head, run and run of runs before a place adds to an address, in bytes. A run takes back
// what its heads have added, so that no coordinate is needed:
// heads * step + runs * (step of the next axis - heads of a run * step) + ...
struct Steps {
  int32_t bytes[3];

  Steps() = default;
  Steps(const Walk& walk, const Runs& runs) {
    for (int i = 0; i < 3; ++i) bytes[i] = static_cast<int32_t>(exact(walk, runs, i));
  }

  static int64_t exact(const Walk& walk, const Runs& runs, int i) {
    if (i == 0) return step(walk, runs, 0);
    // Where there is one such run, no place has it before it.
    if (runs.size(i) == 1 && (i == 2 || runs.size(2) == 1)) return 0;
    return step(walk, runs, i) - runs.size(i - 1) * step(walk, runs, i - 1);
  }

  static int64_t step(const Walk& walk, const Runs& runs, int i) {
    return runs.size(i) > 1 ? walk[runs.order[i]] : 0;
  }

  FUSED_ROPE_HOST_DEVICE int64_t to(const Place& place) const {
    return product(place.before[0], bytes[0]) + product(place.before[1], bytes[1]) +
           product(place.before[2], bytes[2]);
  }

 private:
  // One instruction, also where the compiler keeps a factor in 64 bits from another block.
  FUSED_ROPE_HOST_DEVICE static int64_t product(uint32_t count, int32_t step) {
#if defined(__CUDA_ARCH__)
    int64_t bytes;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(bytes) : "r"(count), "r"(step));
    return bytes;
#else
    return int64_t{count} * step;
#endif
  }
};

// The axis along which a box must be halved before its threads fit in one launch and its steps in
// 32 bits, if any.
inline std::optional<Axis> axis_to_split(const Walks& walks, const Runs& runs, const Plan& plan) {
  const auto fits = [](int64_t step) { return std::abs(step) <= INT32_MAX; };
  for (const Walk& walk : walks) {
    for (int i = 0; i < 3; ++i) {
      // Either the step itself is too long or the run that it takes back.
      if (!fits(Steps::exact(walk, runs, i)))
        return runs.order[fits(Steps::step(walk, runs, i)) ? i - 1 : i];
    }
  }
  // Divided one by one, because the product of the sizes may not fit in 64 bits. Half of the
  // slowest axis leaves every step as it is.
  if (runs.size(0) <= plan.work / plan.units / runs.size(1) / runs.size(2)) return std::nullopt;
  for (int i = 2; i >= 0; --i) {
    if (runs.size(i) > 1) return runs.order[i];
  }
  return std::nullopt;
}

// Calls f(runs) for boxes that cover `whole`, none of which axis_to_split would split.
template <typename F>
void for_each_box(const Walks& walks, const Runs& whole, const Plan& plan, const F& f) {
  const std::optional<Axis> axis = axis_to_split(walks, whole, plan);
  if (!axis.has_value()) return f(whole);
  Runs low = whole;
  Runs high = whole;
  low.box.size[*axis] = whole.box.size[*axis] / 2;
  high.box.first[*axis] += low.box.size[*axis];
  high.box.size[*axis] -= low.box.size[*axis];
  for_each_box(walks, low, plan, f);
  for_each_box(walks, high, plan, f);
}

}  // namespace fused_rope
