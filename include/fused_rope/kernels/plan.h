// The launch plan of a call on a GPU: instance, grid and cache policies, chosen from shapes,
// strides and device facts. Runs, and is tested, without a GPU.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>

#include "fused_rope/kernels/params.h"

namespace fused_rope::kernels {

// Where a thread finds the two elements of its pairs.
enum class Arrangement {
  kPair,      // in two vectors `distance` elements apart: first elements, and their partners
  kAdjacent,  // in vectors of whole pairs (interleaved)
};

// How a thread finds the table row of its token.
enum class RowLookup {
  kLinear,    // none: addresses are linear in batch, sequence and head, sin at a fixed distance
              // from cos
  kPerHead,   // the same for tables that differ between heads and are read in vectors; blocks of q
              // and k alternate, so that the second of them finds the rows in cache
  kIndexed,   // indices in device memory select rows of the table or of the output
  kSections,  // the same with several axes of positions, one of which serves all pairs of a thread
  kAxes,      // the same where the pairs of a thread read different axes
};

FUSED_ROPE_HOST_DEVICE constexpr bool is_linear(RowLookup lookup) {
  return lookup == RowLookup::kLinear || lookup == RowLookup::kPerHead;
}
constexpr bool has_axes(RowLookup lookup) {
  return lookup == RowLookup::kSections || lookup == RowLookup::kAxes;
}

// Vectors that a thread moves. kPair needs two. With kAdjacent one vector spreads the bytes in
// flight more evenly; two share the cost of a look-up. Two vectors of kSections would rarely have
// one axis.
constexpr int vectors_of_thread(Arrangement arrangement, RowLookup lookup) {
  const bool shares_row = lookup == RowLookup::kIndexed || lookup == RowLookup::kAxes;
  return arrangement == Arrangement::kPair || shares_row ? 2 : 1;
}

struct DeviceFacts {
  int64_t l2_bytes;
  int64_t multiprocessors;
};

// Decisions that an experiment makes instead of the plan; -1 leaves them to the plan.
struct PlanOverrides {
  int vector = -1;  // bytes: 4, 8 or 16, as far as there are such instances
  int threads = -1;
  int keep = -1;
  int stream = -1;
  int work = -1;
};

struct Plan {
  Arrangement arrangement;
  RowLookup lookup;
  bool vector_tables;    // cos and sin are read 16 bytes at a time
  bool keeps_tables;     // table vectors get the L2 policy evict_last
  bool streams;          // vectors of x get the L2 policy evict_first
  int vector;            // elements of a vector: 16, 8 or 4 bytes of them, or 1
  int rotating_threads;  // threads of one head that rotate
  int head_threads;      // threads of one head: those that rotate, then those that copy
  bool full_head;        // every thread rotates, and pairs form a single block
  int block_threads;
  int launch_threads;  // at most
};

constexpr int kVectorBytes = 16;    // the widest access of a thread
constexpr int kMinThreadBytes = 8;  // of all vectors of a thread
constexpr int kShortChunk = 64;     // bytes: half a cache line
constexpr int kWarp = 32;
constexpr int kSmallBlockThreads = 128;     // of a block, unless all blocks are resident at once
constexpr int kMaxBlockThreads = 256;       // the kernel's launch bound
constexpr int kResidentThreads = 1536;      // of a multiprocessor: six blocks of kMaxBlockThreads
constexpr int kKeptShare = 4;               // tables of up to 1/4 of the L2 cache are kept in it
constexpr int kHeavyShare = 10;             // tables of more than 1/10 of a large x make x stream
constexpr int kMaxLaunchThreads = 1 << 30;  // FastDivmod needs thread indices below 2^31

constexpr int64_t ceil_divide(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Whether every vector of `vector` elements of a tensor starts on a 16-byte boundary.
inline bool is_aligned(const void* data, const Strides& strides, const RotateParams& p, int64_t H,
                       int vector) {
  const auto fits = [&](int64_t size, int64_t stride) { return size <= 1 || stride % vector == 0; };
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && strides.d == 1 &&
         fits(p.B, strides.b) && fits(p.S, strides.s) && fits(H, strides.h);
}

// Whether a call can move all of its memory in vectors of `vector` elements.
inline bool is_vectorizable(const RotateParams& p, int vector) {
  const int64_t rotated = p.pairing.distance == 1 ? 2 * p.pairing.P : p.pairing.distance;
  if (p.pairing.offset % vector != 0 || rotated % vector != 0) return false;
  if (!p.in_place && p.D % vector != 0) return false;
  for (int i = 0; i < p.count; ++i) {
    const TensorParams& t = p.tensors[i];
    if (t.H == 0) continue;
    if (!is_aligned(t.in, t.in_strides, p, t.H, vector)) return false;
    // A scattered output may have several rows where S is 1.
    if (t.scattered && t.out_strides.s % vector != 0) return false;
    if (!is_aligned(t.out, t.out_strides, p, t.H, vector)) return false;
  }
  return true;
}

// Whether table rows are contiguous and start on 16-byte boundaries.
inline bool is_vectorizable(const TableParams& table, DType dtype) {
  const int64_t entries = kVectorBytes / size_of(dtype);
  const auto fits = [&](int64_t stride) { return stride % entries == 0; };
  return reinterpret_cast<uintptr_t>(table.data) % kVectorBytes == 0 && table.j == 1 &&
         fits(table.m) && fits(table.b) && fits(table.s) && fits(table.h);
}

inline bool have_same_strides(const TableParams& x, const TableParams& y) {
  return x.m == y.m && x.b == y.b && x.s == y.s && x.h == y.h;
}

// Whether k's heads follow q's in memory, as in slices of a packed QKV tensor: then the call can
// treat them as one tensor.
inline bool are_adjacent(const RotateParams& p) {
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

// The call with the heads of both tensors as one.
inline RotateParams joined(RotateParams p) {
  p.tensors[0].H += p.tensors[1].H;
  p.count = 1;
  return p;
}

inline double tokens(const RotateParams& p) {
  return static_cast<double>(p.B) * static_cast<double>(p.S);
}

// Table rows that a call may read. Expanded rows count once.
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
  return 2 * table_rows(p) * static_cast<double>(p.pairing.P) * size_of(p.table_dtype);
}

// Elements of a head that a call reads and writes; in place only the rotated ones.
inline int64_t moved_elements_of_head(const RotateParams& p) {
  return p.in_place ? 2 * p.pairing.P : p.D;
}
inline double moved_elements(const RotateParams& p) {
  return tokens(p) * static_cast<double>(total_heads(p)) *
         static_cast<double>(moved_elements_of_head(p));
}

// Elements of a head that a call copies.
inline int64_t copied_elements_of_head(const RotateParams& p) {
  return moved_elements_of_head(p) - 2 * p.pairing.P;
}

// Whether all elements rotate and pairs form a single block.
inline bool rotates_full_heads(const RotateParams& p) {
  const bool one_block = p.pairing.distance == 1 || p.pairing.distance == p.pairing.P;
  return one_block && copied_elements_of_head(p) == 0;
}

// Whether every `pairs` consecutive pairs have one axis.
inline bool has_sections_of(const RotateParams& p, int64_t pairs) {
  for (int64_t j = 1; j < p.pairing.P; ++j) {
    if (p.axes[j] != p.axes[j - 1] && j % pairs != 0) return false;
  }
  return true;
}

// vector: elements of a vector of x. vector_tables: whether cos and sin are read in vectors, too.
inline RowLookup choose_lookup(const RotateParams& p, Arrangement arrangement, int vector,
                               bool vector_tables) {
  if (p.axes != nullptr) {
    const int pairs = arrangement == Arrangement::kAdjacent ? vector / 2 : vector;
    return has_sections_of(p, pairs) ? RowLookup::kSections : RowLookup::kAxes;
  }
  if (has_lookups(p.rows) || !have_same_strides(p.cos, p.sin)) return RowLookup::kIndexed;
  return p.per_head && vector > 1 && vector_tables ? RowLookup::kPerHead : RowLookup::kLinear;
}

// Every layer reads the tables again: keep them in L2 where they are a small part of it.
inline bool should_keep_tables(const RotateParams& p, const DeviceFacts& device) {
  return table_bytes(p) * kKeptShare <= static_cast<double>(device.l2_bytes);
}

// Stream x where the tables are a large part of the traffic, unless x fits in L2 for its next
// reader.
inline bool should_stream(const RotateParams& p, const DeviceFacts& device) {
  const double x_bytes = moved_elements(p) * size_of(p.dtype);
  return table_bytes(p) * kHeavyShare > x_bytes && x_bytes > static_cast<double>(device.l2_bytes);
}

// Whether a call moves short contiguous chunks whose stride is at least twice their size. Only
// looks at the first tensor that has heads.
inline bool moves_short_chunks(const RotateParams& p) {
  const TensorParams& t = p.tensors[0].H > 0 ? p.tensors[0] : p.tensors[1];
  const int64_t chunk = 2 * p.pairing.P;
  return p.in_place && chunk * size_of(p.dtype) <= kShortChunk &&
         in_strides_of(t)[memory_order(p, t)[0]] >= 2 * chunk;
}

// Threads per multiprocessor, if each moves `thread_elements`.
inline double threads_per_multiprocessor(const RotateParams& p, const DeviceFacts& device,
                                         int64_t thread_elements) {
  return moved_elements(p) / static_cast<double>(thread_elements * device.multiprocessors);
}

// Bytes of the shortest vectors for which there are instances.
constexpr int shortest_vector(Arrangement arrangement, RowLookup lookup) {
  return kMinThreadBytes / vectors_of_thread(arrangement, lookup);
}

// Bytes of a vector, where there are instances with shorter vectors than `widest` elements. Shorter
// vectors bring a warp's two requests, for first elements and for partners, closer together in
// memory; that pays for the additional threads once the device is full. Short chunks are faster
// still with fewer bytes in flight.
inline int choose_vector_bytes(const RotateParams& p, const DeviceFacts& device,
                               Arrangement arrangement, RowLookup lookup, int widest) {
  if (threads_per_multiprocessor(p, device, 2 * widest) <= kResidentThreads) return kVectorBytes;
  if (moves_short_chunks(p)) return shortest_vector(arrangement, lookup);
  return kVectorBytes / vectors_of_thread(arrangement, lookup);
}

// Small blocks keep a multiprocessor busy when one ends and the next begins. Where all blocks are
// resident at once, fewer and larger ones start sooner, unless some multiprocessors would get none.
// Blocks of whole heads share no cache lines.
inline int choose_block_threads(const RotateParams& p, const DeviceFacts& device, int head_threads,
                                int64_t thread_elements) {
  const double each = threads_per_multiprocessor(p, device, thread_elements);
  const bool large = each > kSmallBlockThreads && each <= kResidentThreads;
  const int threads = large ? kMaxBlockThreads : kSmallBlockThreads;
  const int64_t whole = std::lcm<int64_t>(std::max(head_threads, 1), kWarp);
  if (whole > kMaxBlockThreads) return threads;
  return static_cast<int>(std::max(whole, threads / whole * whole));
}

inline Plan make_plan(const RotateParams& p, const DeviceFacts& device,
                      const PlanOverrides& overrides = {}) {
  const auto choose = [](int override, auto choice) {
    return override >= 0 ? static_cast<decltype(choice)>(override) : choice;
  };
  const int widest = kVectorBytes / size_of(p.dtype);
  const bool vectors = is_vectorizable(p, widest);
  const bool vector_tables =
      is_vectorizable(p.cos, p.table_dtype) && is_vectorizable(p.sin, p.table_dtype);
  const bool adjacent = vectors && p.pairing.distance == 1;
  const Arrangement arrangement = adjacent ? Arrangement::kAdjacent : Arrangement::kPair;
  const RowLookup lookup = choose_lookup(p, arrangement, vectors ? widest : 1, vector_tables);
  const bool full_head = rotates_full_heads(p);

  const bool has_shorter_vectors = vectors && vector_tables && full_head &&
                                   lookup == RowLookup::kLinear && size_of(p.dtype) == 2;
  int vector = vectors ? widest : 1;
  if (has_shorter_vectors) {
    const int bytes =
        choose(overrides.vector, choose_vector_bytes(p, device, arrangement, lookup, widest));
    const int clamped = std::clamp(bytes, shortest_vector(arrangement, lookup), kVectorBytes);
    vector = static_cast<int>(std::bit_floor(static_cast<uint32_t>(clamped))) / size_of(p.dtype);
  }

  const int64_t thread_elements = vectors_of_thread(arrangement, lookup) * vector;
  const auto rotating_threads = static_cast<int>(ceil_divide(2 * p.pairing.P, thread_elements));
  const auto copying_threads =
      static_cast<int>(ceil_divide(copied_elements_of_head(p), thread_elements));
  const int head_threads = rotating_threads + copying_threads;
  const int block_threads =
      choose(overrides.threads, choose_block_threads(p, device, head_threads, thread_elements));
  return {.arrangement = arrangement,
          .lookup = lookup,
          .vector_tables = vector_tables,
          .keeps_tables = choose(overrides.keep, should_keep_tables(p, device)),
          .streams = choose(overrides.stream, should_stream(p, device)),
          .vector = vector,
          .rotating_threads = rotating_threads,
          .head_threads = head_threads,
          .full_head = full_head,
          .block_threads = std::clamp(block_threads / kWarp * kWarp, kWarp, kMaxBlockThreads),
          .launch_threads = choose(overrides.work, kMaxLaunchThreads)};
}

}  // namespace fused_rope::kernels
