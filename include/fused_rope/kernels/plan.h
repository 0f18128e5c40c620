// The launch plan of a call on a GPU: instance, grid and cache policies, chosen from shapes,
// strides and device facts. Runs, and is tested, without a GPU.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <optional>

#include "fused_rope/kernels/rows.h"
#include "fused_rope/kernels/tiling.h"

namespace fused_rope::kernels {

// Where a thread finds the two elements of its pairs.
enum class Arrangement {
  kPair,      // in two vectors `distance` elements apart: first elements, and their partners
  kAdjacent,  // in vectors of whole pairs (interleaved)
};

// How a thread finds the table row of its token.
enum class RowLookup {
  kLinear,     // none: addresses are linear in batch, sequence and head, sin at a fixed distance
               // from cos
  kPerHead,    // the same for tables that differ between heads and are read in vectors; blocks of q
               // and k alternate, so that the second of them finds the rows in cache
  kPositions,  // a position for each token selects a row, and is loaded before x
  kIndexed,    // any indices in device memory select rows of the table or of the output
  kPacked,     // the same in a packed batch, whose sequences a warp searches together
  kSections,   // the same with several axes of positions, one of which serves all pairs of a thread
  kAxes,       // any of these, or any order of axes: the staged kernel looks up the rows of a block
};

// Whether the staged kernel has it.
constexpr bool is_staged(RowLookup lookup) {
  return lookup == RowLookup::kLinear || lookup == RowLookup::kAxes;
}
FUSED_ROPE_HOST_DEVICE constexpr bool is_linear(RowLookup lookup) {
  return lookup == RowLookup::kLinear || lookup == RowLookup::kPerHead;
}
// Whether elements without a stride of 1 have an instance: one pair per thread. The others are
// general, so that these need fewer instances.
constexpr bool has_single_pairs(RowLookup lookup) {
  return lookup == RowLookup::kLinear || lookup == RowLookup::kIndexed ||
         lookup == RowLookup::kSections;
}
// Whether full heads have instances of their own. They gain 7 % with kSections, 0.6 % with
// kPerHead.
constexpr bool has_full_heads(RowLookup lookup) { return lookup != RowLookup::kPerHead; }
constexpr bool has_axes(RowLookup lookup) {
  return lookup == RowLookup::kSections || lookup == RowLookup::kAxes;
}

// Vectors of each head that a thread moves. kPair needs two. With kAdjacent one vector spreads the
// bytes in flight more evenly; two share the cost of a look-up. Two vectors of kSections would
// rarely have one axis.
constexpr int vectors_of_thread(Arrangement arrangement, RowLookup lookup) {
  const bool shares_row = lookup == RowLookup::kPositions || lookup == RowLookup::kIndexed ||
                          lookup == RowLookup::kPacked;
  return arrangement == Arrangement::kPair || shares_row ? 2 : 1;
}

struct DeviceFacts {
  int64_t l2_bytes;
  int64_t multiprocessors;
  int64_t shared_bytes = 0;  // of a multiprocessor
};

// The L2 policy of vectors of x. kLast: until they are written.
enum class Eviction { kFirst, kNormal, kLast };

// Decisions that an experiment makes instead of the plan; -1 leaves them to the plan.
struct PlanOverrides {
  int vector = -1;  // bytes: at most as many
  int threads = -1;
  int keep = -1;
  int evict = -1;  // an Eviction
  int work = -1;
  int full = -1;  // 0: no instances of full heads
};

struct Plan {
  Arrangement arrangement;
  RowLookup lookup;
  bool staged = false;  // blocks stage x in shared memory
  bool keeps_tables;    // table vectors get the L2 policy evict_last
  Eviction eviction;
  int vector;            // elements that a rotating thread moves at once
  int rotating_threads;  // threads of one head that rotate; staged: threads of one chunk
  int head_threads;      // threads of one head: those that rotate, then those that copy; staged: 1
  int chunk_heads = 1;   // staged: heads of a chunk; with a norm: heads of a thread
  bool single_elements = false;  // staged: vectors in shared memory are not aligned
  int block_vectors = 0;         // staged: vectors of 16 bytes that a block touches, at most
  bool full_head = false;        // every thread rotates, one head, and pairs form a single block
  int block_threads;
  int block_units;     // what a block processes: as many threads' vectors, staged: as many chunks
  int launch_threads;  // at most
  int idle_bytes = 0;  // shared memory of a block that only keeps further blocks away
};

constexpr int kVectorBytes = 16;     // the widest access of a thread
constexpr int kCacheLine = 128;      // bytes
constexpr int kAtom = 64;            // bytes that device memory reads at once
constexpr int kSector = 32;          // bytes: the least that L2 reads
constexpr int kShortChunk = 64;      // bytes
constexpr int kShortChunkBytes = 8;  // of all vectors of a thread that moves short chunks
constexpr int kWarp = 32;
constexpr int kSmallBlockThreads = 128;     // of a block, unless all blocks are resident at once
constexpr int kNormBlockThreads = 64;       // of a block with a norm: 1 % faster than 128
constexpr int kMaxBlockThreads = 256;       // the kernel's launch bound
constexpr int kResidentThreads = 1536;      // of a multiprocessor: six blocks of kMaxBlockThreads
constexpr int kTurnsOfOneHead = 8;          // of threads with a norm: with more they take two
constexpr int kKeptShare = 4;               // tables of up to 1/4 of the L2 cache are kept in it
constexpr int kHeavyShare = 10;             // tables of more than 1/10 of a large x make x stream
constexpr int kMaxLaunchThreads = 1 << 30;  // FastDivmod needs thread indices below 2^31
constexpr int kStagedThreads = 128;
// Vectors in flight in a staged thread, without look-ups and, where more blocks follow, with them:
// they take longer. One less or more is slower.
constexpr int kStagedLoads = 2;
constexpr int kStagedCopies = 6;
constexpr int kMinStagedBlocks = 16;      // of a multiprocessor: 32 registers
constexpr int kStagedPairs = 2;           // of a head that a staged thread rotates, at most
constexpr int kMaxChunkHeads = 4;         // share the entries of a staged thread
constexpr int kSharedBytes = 48 * 1024;   // of a block, without an opt-in
constexpr int kSystemSharedBytes = 1024;  // of a block, besides its own
constexpr int kMinRunBytes = 1024;        // of a staged block, to occupy its threads
constexpr int kMaxChunks = 64;            // of a staged block, to limit its rows
constexpr int kRowBytes = 16;             // of pointers to rows of cos and sin

// The largest power of two that divides n, or 16 for 0.
constexpr int64_t alignment(int64_t n) { return n == 0 ? kVectorBytes : n & -n; }

// The most elements, up to 16 bytes of them, that a thread can move at once in every group of
// `heads` heads of every tensor, where vectors start at multiples of all `spans`.
inline int64_t common_vector(const RotateParams& p, std::initializer_list<int64_t> spans,
                             int64_t heads = 1) {
  const int size = size_of(p.dtype);
  int64_t bytes = kVectorBytes;
  const auto limit = [&](int64_t n) { bytes = std::min(bytes, alignment(n)); };
  const auto limit_all = [&](const void* data, const Strides& strides, int64_t S, int64_t H) {
    limit(static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)));
    if (p.B > 1) limit(strides.b * size);
    if (S > 1) limit(strides.s * size);
    if (H > heads) limit(strides.h * heads * size);
    if (strides.d != 1) bytes = size;
  };
  for (const int64_t span : spans) limit(span * size);
  for (int i = 0; i < p.count; ++i) {
    const TensorParams& t = p.tensors[i];
    if (t.H == 0) continue;
    limit_all(t.in, t.in_strides, p.S, t.H);
    // A scattered output may have several rows where S is 1. An output that nobody wants, which is
    // null, has no strides.
    if (t.out != nullptr) limit_all(t.out, t.out_strides, t.scattered ? 2 : p.S, t.H);
  }
  return std::max<int64_t>(bytes / size, 1);
}

// The widest vectors of rotated elements: each of whole pairs, or of elements of one block.
inline int rotated_vector(const RotateParams& p) {
  const bool interleaved = p.pairing.distance == 1;
  const int64_t span = interleaved ? 2 * p.pairing.P : p.pairing.distance;
  return static_cast<int>(common_vector(p, {p.pairing.offset, span, p.in_place ? 0 : p.D}));
}

// The most bytes of a table that can be read at once: 16, 8 or 4, or one entry.
inline int64_t table_vector(const TableParams& table, DType dtype) {
  const int size = size_of(dtype);
  if (table.j != 1) return size;
  const int64_t strides = table.m | table.b | table.s | table.h;
  const int64_t bytes = alignment(static_cast<int64_t>(reinterpret_cast<uintptr_t>(table.data)) |
                                  strides * size | kVectorBytes);
  return std::max<int64_t>(bytes, size);
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

// Threads per multiprocessor, if each moves `thread_elements`.
inline double threads_per_multiprocessor(const RotateParams& p, const DeviceFacts& device,
                                         int64_t thread_elements) {
  return moved_elements(p) / static_cast<double>(thread_elements * device.multiprocessors);
}

// How many times as many threads a call has as are resident at once, if each moves two vectors of
// 16 bytes.
inline double turns_of_threads(const RotateParams& p, const DeviceFacts& device) {
  const int64_t thread_elements = 2 * kVectorBytes / size_of(p.dtype);
  return threads_per_multiprocessor(p, device, thread_elements) / kResidentThreads;
}

// Whether all of them are resident at once.
inline bool are_resident(const RotateParams& p, const DeviceFacts& device) {
  return turns_of_threads(p, device) <= 1;
}

inline bool has_linear_rows(const RotateParams& p) {
  return !has_lookups(p.rows) && p.axes == nullptr && have_same_strides(p.cos, p.sin);
}

// Whether positions alone select rows, and rows and their stride fit 32 bits.
inline bool has_only_positions(const RotateParams& p) {
  return (row_flags(p.rows) & ~kLongPositions) == kHasPositions &&
         have_same_strides(p.cos, p.sin) && p.rows.M > 0 && p.rows.M <= INT32_MAX && p.cos.m >= 0 &&
         p.cos.m <= INT32_MAX / size_of(p.table_dtype);
}

// The heads of a chunk: several only where they follow one another in memory and share a row.
inline int64_t chunk_heads(const RotateParams& p) {
  int64_t heads = p.per_head ? 1 : kMaxChunkHeads;
  for (int i = 0; i < p.count; ++i) {
    const TensorParams& t = p.tensors[i];
    if (t.H == 0) continue;
    const bool contiguous = t.in_strides.h == p.D && t.out_strides.h == p.D;
    heads = contiguous ? std::gcd(heads, t.H) : 1;
  }
  return heads;
}

inline int64_t chunk_bytes(const RotateParams& p, int64_t heads) {
  return heads * p.D * size_of(p.dtype);
}

// Chunks of a tile that follow one another in the memory of input and output.
inline int64_t run_of(const OperandStrides& strides, const Tile& tile, int64_t chunk_bytes) {
  int64_t run = 1;
  for (int i = 0; i < 3; ++i) {
    const Axis axis = tile.order[i];
    const int64_t next = run * chunk_bytes;
    if (tile.size[axis] == 1) continue;
    if (strides[kIn][axis] != next || strides[kOut][axis] != next) break;
    run *= tile.size[axis];
  }
  return run;
}

// Whether heads are contiguous, enough of them follow one another, and a chunk fits in shared
// memory.
inline bool can_stage(const RotateParams& p) {
  // A warp finds the sequence of a packed token with 32 bits.
  if (moved_elements_of_head(p) != p.D || p.rows.N >= INT32_MAX) return false;
  const int64_t heads = chunk_heads(p);
  const int64_t bytes = chunk_bytes(p, heads);
  const int64_t rows = kMaxChunks * kMaxAxes * kRowBytes + kMaxAxisPairs;
  if (bytes + 2 * kVectorBytes + rows > kSharedBytes) return false;
  for (int i = 0; i < p.count; ++i) {
    const TensorParams& t = p.tensors[i];
    if (t.H == 0) continue;
    if (t.in_strides.d != 1 || t.out_strides.d != 1) return false;
    const Tile whole = whole_tile(p, t, heads);
    const int64_t run = run_of(operand_strides(p, t, false, heads), whole, bytes);
    if (run < whole.heads() && run * bytes < kMinRunBytes) return false;
  }
  return true;
}

// The lookup of threads that move vectors themselves; single: one pair each.
inline RowLookup choose_lookup(const RotateParams& p, const DeviceFacts& device, bool single) {
  if (p.axes != nullptr) return RowLookup::kSections;
  if (p.rows.cu_seqlens.data != nullptr && p.rows.N < INT32_MAX && !single)
    return RowLookup::kPacked;
  // An early position brings decode of 256 sequences from 1.16 to 1.10 times that without
  // positions; where later threads hide the look-up, x had better come first.
  if (has_only_positions(p) && are_resident(p, device) && !single) return RowLookup::kPositions;
  if (!has_linear_rows(p)) return RowLookup::kIndexed;
  return p.per_head && !single ? RowLookup::kPerHead : RowLookup::kLinear;
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

// The stride of the heads that are nearest to each other. Only looks at the first tensor that has
// heads.
inline int64_t least_stride(const RotateParams& p) {
  const TensorParams& t = p.tensors[0].H > 0 ? p.tensors[0] : p.tensors[1];
  return in_strides_of(t)[memory_order(p, t)[0]];
}

// Whether a call in place moves contiguous chunks of at most `bytes` whose stride is at least twice
// their size, more of them than are resident at once.
inline bool moves_chunks(const RotateParams& p, const DeviceFacts& device, int64_t bytes) {
  const int64_t chunk = 2 * p.pairing.P;
  return p.in_place && chunk * size_of(p.dtype) <= bytes && least_stride(p) >= 2 * chunk &&
         !are_resident(p, device);
}

// Whether chunks end within sectors, and atoms of memory start within heads.
inline bool splits_atoms(const RotateParams& p) {
  const int size = size_of(p.dtype);
  return 2 * p.pairing.P * size % kSector != 0 && least_stride(p) * size % kAtom != 0;
}

// Chunks stay in L2 until they are written, which gains 2 to 15 %.
inline Eviction choose_eviction(const RotateParams& p, const DeviceFacts& device) {
  if (moves_chunks(p, device, kCacheLine)) return Eviction::kLast;
  return should_stream(p, device) ? Eviction::kFirst : Eviction::kNormal;
}

// Shared memory that leaves kResidentThreads to a multiprocessor.
inline int choose_idle_bytes(const DeviceFacts& device, int block_threads) {
  const int64_t bytes =
      device.shared_bytes / (kResidentThreads / block_threads) - kSystemSharedBytes;
  return static_cast<int>(std::clamp<int64_t>(bytes / kCacheLine * kCacheLine, 0, kSharedBytes));
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

template <typename T>
T choose(int override, T choice) {
  return override >= 0 ? static_cast<T>(override) : choice;
}

// The plan of a call whose threads move vectors of `vector` elements themselves, or single pairs.
inline Plan plan_direct(const RotateParams& p, const DeviceFacts& device,
                        const PlanOverrides& overrides, int vector, RowLookup lookup) {
  const bool single = vector == 1;
  const bool adjacent = p.pairing.distance == 1 && !single;
  const Arrangement arrangement = adjacent ? Arrangement::kAdjacent : Arrangement::kPair;
  const int vectors = vectors_of_thread(arrangement, lookup);
  const int64_t thread_elements = int64_t{vectors} * vector;
  const auto rotating_threads = static_cast<int>(ceil_divide(2 * p.pairing.P, thread_elements));
  const auto copying_threads =
      static_cast<int>(ceil_divide(copied_elements_of_head(p), thread_elements));
  const int head_threads = rotating_threads + copying_threads;
  const int wanted =
      choose(overrides.threads, choose_block_threads(p, device, head_threads, thread_elements));
  const int block_threads = std::clamp(wanted / kWarp * kWarp, kWarp, kMaxBlockThreads);
  return {.arrangement = arrangement,
          .lookup = lookup,
          .keeps_tables = choose(overrides.keep, should_keep_tables(p, device)),
          .eviction = choose(overrides.evict, choose_eviction(p, device)),
          .vector = vector,
          .rotating_threads = rotating_threads,
          .head_threads = head_threads,
          .full_head =
              rotates_full_heads(p) && has_full_heads(lookup) && !single && overrides.full != 0,
          .block_threads = block_threads,
          .block_units = block_threads,
          .launch_threads = choose(overrides.work, kMaxLaunchThreads)};
}

// The plan of a call whose blocks stage x in shared memory. They copy it in vectors of 16 bytes,
// and rotate two pairs at a time if their number is even. moved: elements of a vector there, at
// most, as the place of x and of its pairs allows.
inline Plan plan_staged(const RotateParams& p, const DeviceFacts& device,
                        const PlanOverrides& overrides, int moved) {
  const bool adjacent = p.pairing.distance == 1;
  const bool even = (adjacent ? p.pairing.P : p.pairing.distance) % kStagedPairs == 0;
  const int pairs = even ? kStagedPairs : 1;
  const int vector = adjacent ? 2 * pairs : pairs;
  const int64_t heads = chunk_heads(p);
  const bool whole = common_vector(p, {heads * p.D}, heads) * size_of(p.dtype) == kVectorBytes;
  const bool linear = whole && has_linear_rows(p);
  const int64_t bytes = chunk_bytes(p, heads);
  const int64_t rotating_threads = p.pairing.P / pairs;
  const int wanted = choose(overrides.threads, kStagedThreads);
  const int threads = std::clamp(wanted / kWarp * kWarp, kWarp, kStagedThreads);
  const bool few = linear || are_resident(p, device);
  const int64_t loads = int64_t{few ? kStagedLoads : kStagedCopies} * threads;
  const int64_t chunks =
      std::min(loads * kVectorBytes / bytes, loads / std::max<int64_t>(rotating_threads, 1));
  const int64_t block_units = std::clamp<int64_t>(chunks, 1, kMaxChunks);
  return {.arrangement = adjacent ? Arrangement::kAdjacent : Arrangement::kPair,
          .lookup = linear ? RowLookup::kLinear : RowLookup::kAxes,
          .staged = true,
          .keeps_tables = choose(overrides.keep, should_keep_tables(p, device)),
          .eviction = choose(overrides.evict, choose_eviction(p, device)),
          .vector = vector,
          .rotating_threads = static_cast<int>(rotating_threads),
          .head_threads = 1,
          .chunk_heads = static_cast<int>(heads),
          .single_elements = moved < vector,
          .block_vectors = static_cast<int>(ceil_divide(block_units * bytes, kVectorBytes) + 2),
          .block_threads = threads,
          .block_units = static_cast<int>(block_units),
          .launch_threads = choose(overrides.work, kMaxLaunchThreads)};
}

// Whether vectors of `elements` are whole pairs, or parts of a block of pairs, whose table entries
// can be read in vectors and have one axis.
inline bool fits_vectors(const RotateParams& p, int elements) {
  const int pairs = p.pairing.distance == 1 ? elements / 2 : elements;
  const int64_t entries =
      std::min(table_vector(p.cos, p.table_dtype), table_vector(p.sin, p.table_dtype));
  return rotated_vector(p) >= elements &&
         entries >= std::min(pairs * size_of(p.table_dtype), kVectorBytes) &&
         (p.axes == nullptr || has_sections_of(p, pairs));
}

// Vectors of 16 bytes where x and its tables allow them; otherwise chunks, if elements are
// contiguous and fit in shared memory.
inline Plan make_plan(const RotateParams& p, const DeviceFacts& device,
                      const PlanOverrides& overrides = {}) {
  const int size = size_of(p.dtype);
  const int limit = choose(overrides.vector, kVectorBytes) / size;
  const int widest = kVectorBytes / size;
  const int shortest = kShortChunkBytes / size / (p.pairing.distance == 1 ? 1 : 2);
  const auto direct = [&](int vector) {
    return plan_direct(p, device, overrides, vector, choose_lookup(p, device, vector == 1));
  };
  const auto fits_shortest = [&] {
    return size == 2 && overrides.full != 0 && rotates_full_heads(p) && has_linear_rows(p) &&
           !p.per_head && fits_vectors(p, shortest);
  };
  // Short chunks are faster with fewer bytes in flight: 13 to 16 % with R = D/4. Those that split
  // atoms are faster with fewer still: 8 %.
  if (moves_chunks(p, device, kShortChunk) && fits_shortest()) {
    Plan plan = direct(shortest);
    if (splits_atoms(p)) plan.idle_bytes = choose_idle_bytes(device, plan.block_threads);
    return plan;
  }
  if (widest <= limit && fits_vectors(p, widest)) return direct(widest);
  if (can_stage(p)) {
    return plan_staged(p, device, overrides, std::min(rotated_vector(p), limit));
  }
  return direct(fits_shortest() ? shortest : 1);
}

// Whether a norm's weight can be read in vectors.
inline bool has_vectors(const WeightParams& weight) {
  return weight.data == nullptr ||
         (weight.stride == 1 && reinterpret_cast<uintptr_t>(weight.data) % kVectorBytes == 0);
}

// The plan of a call with a norm whose heads rotate as a whole, in whole vectors, each of a thread
// having its counterpart half a head away, where a thread has one head; null for all other calls,
// which a warp for each head serves.
inline std::optional<Plan> plan_norm(const RotateParams& p, const DeviceFacts& device,
                                     const PlanOverrides& overrides, int threads) {
  const int vector = kVectorBytes / size_of(p.dtype);
  const auto head_threads = static_cast<int>(p.D / (2 * vector));
  const bool whole = p.D == 2 * p.pairing.P && rotates_full_heads(p) && p.D % (2 * vector) == 0 &&
                     head_threads <= kWarp && fits_vectors(p, vector);
  const bool reads_vectors =
      has_vectors(p.norm->weights[0]) && (p.count == 1 || has_vectors(p.norm->weights[1]));
  if (!whole || !reads_vectors || p.axes != nullptr || p.dtype == DType::kFloat64 ||
      overrides.full == 0)
    return std::nullopt;
  const int wanted = choose(overrides.threads, threads);
  const int block_threads = std::clamp(wanted / kWarp * kWarp, kWarp, kSmallBlockThreads);
  return Plan{.arrangement = p.pairing.distance == 1 ? Arrangement::kAdjacent : Arrangement::kPair,
              .lookup = has_linear_rows(p) ? RowLookup::kLinear : RowLookup::kIndexed,
              .keeps_tables = choose(overrides.keep, should_keep_tables(p, device)),
              .eviction = choose(overrides.evict, choose_eviction(p, device)),
              .vector = vector,
              .rotating_threads = head_threads,
              .head_threads = static_cast<int>(std::bit_ceil(static_cast<unsigned>(head_threads))),
              .full_head = true,
              .block_threads = block_threads,
              .block_units = block_threads,
              .launch_threads = choose(overrides.work, kMaxLaunchThreads)};
}

// Whether a thread with a norm takes two heads of a token: they share a row, a weight and
// addresses, and twice the bytes are in flight. Of 40 heads of 128 elements this gains 2 % with
// 16384 tokens and 1 % with 8192; it loses 3 % with 2048 and 12 % with 768.
inline bool takes_two_heads(const RotateParams& p, const DeviceFacts& device) {
  const bool even = p.tensors[0].H % 2 == 0 && (p.count == 1 || p.tensors[1].H % 2 == 0);
  return even && size_of(p.dtype) == 2 && has_linear_rows(p) && !p.per_head &&
         turns_of_threads(p, device) > kTurnsOfOneHead;
}

// The same, with as many heads a thread as are faster.
inline std::optional<Plan> make_norm_plan(const RotateParams& p, const DeviceFacts& device,
                                          const PlanOverrides& overrides = {}) {
  std::optional<Plan> plan = plan_norm(p, device, overrides, kNormBlockThreads);
  if (plan.has_value() && takes_two_heads(p, device)) plan->chunk_heads = 2;
  return plan;
}

// The rotation of a call with a cache.
inline RotateParams without_slots(RotateParams p) {
  p.rows.out_rows = {};
  return p;
}

// The call that would copy v: its heads, which have a size of their own.
inline RotateParams values_call(const RotateParams& p) {
  RotateParams values = p;
  values.count = 1;
  values.D = p.cache->values_D;
  values.tensors[0] = p.cache->values;
  values.tensors[0].out = const_cast<void*>(values.tensors[0].in);
  values.tensors[0].out_strides = values.tensors[0].in_strides;
  return values;
}

// Offsets in the cache that depend on the head, of the cache itself and of its scales.
inline ByteStrides slot_strides(const RotateParams& p, const CacheTensorParams& t, int64_t H) {
  return {0, 0, H > 1 ? t.h * size_of(p.cache->storage, p.dtype) : 0};
}
inline ByteStrides scale_strides(const CacheTensorParams& t, int64_t H) {
  return {0, 0, H > 1 ? t.scale_stride * int64_t{sizeof(float)} : 0};
}

// Whether `elements` of a head are an aligned vector in the cache.
inline bool stores_vectors(const RotateParams& p, const CacheTensorParams& t, int64_t H,
                           int elements) {
  const int64_t size = size_of(p.cache->storage, p.dtype);
  const int64_t strides = t.page | t.place | (H > 1 ? t.h : 0);
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data));
  return t.d == 1 && (address | strides * size) % (elements * size) == 0;
}

// Whether one launch covers the heads of a tensor, and its offsets fit 32 bits.
inline bool fits_one_tile(const RotateParams& p, const TensorParams& t,
                          const CacheTensorParams* cache) {
  if (t.H == 0) return true;
  const int64_t head_threads = p.D * size_of(p.dtype) / kVectorBytes + 1;  // at most
  OperandStrides strides = operand_strides(p, t, false);
  const auto fits = [&] {
    return !axis_to_split(strides, whole_tile(p, t), kMaxLaunchThreads / head_threads).has_value();
  };
  if (!fits()) return false;
  if (cache == nullptr) return true;
  strides[kIn] = slot_strides(p, *cache, t.H);
  strides[kOut] = scale_strides(*cache, t.H);
  return fits();
}

// The plan of a call with a cache whose heads, and v's, are whole vectors in every memory; null for
// all other calls, which a warp for each head serves.
inline std::optional<Plan> make_cache_plan(const RotateParams& p, const DeviceFacts& device,
                                           const PlanOverrides& overrides = {}) {
  const CacheParams& cache = *p.cache;
  const int vector = kVectorBytes / size_of(p.dtype);
  const RotateParams values = values_call(p);
  const bool has_values = cache.values.in != nullptr && cache.values.H > 0;
  const bool fits = p.D > 0 && p.dtype != DType::kFloat64 && p.axes == nullptr &&
                    fits_vectors(p, vector) && stores_vectors(p, cache.k, p.tensors[1].H, vector) &&
                    fits_one_tile(p, p.tensors[0], nullptr) &&
                    fits_one_tile(p, p.tensors[1], &cache.k);
  const bool values_fit = !has_values || (common_vector(values, {values.D}) >= vector &&
                                          stores_vectors(p, cache.v, cache.values.H, vector) &&
                                          fits_one_tile(values, values.tensors[0], &cache.v));
  if (!fits || !values_fit || overrides.full == 0) return std::nullopt;
  const RotateParams rotation = without_slots(p);
  if (p.norm != nullptr) return plan_norm(rotation, device, overrides, kSmallBlockThreads);
  const RowLookup lookup = has_linear_rows(rotation) ? RowLookup::kLinear : RowLookup::kIndexed;
  return plan_direct(rotation, device, overrides, vector, lookup);
}

// All heads of a tensor in the order of weight_gradients.h.
inline Tile heads_in_order(const RotateParams& p, const TensorParams& t) {
  return {{kHead, kSequence, kBatch}, {0, 0, 0}, {p.B, p.S, t.H}};
}

inline ByteStrides gradient_strides(const RotateParams& p, const TensorParams& t,
                                    const GradientParams& gradient) {
  TensorParams of_gradient = t;
  of_gradient.in_strides = gradient.strides;
  return operand_strides(p, of_gradient, false)[kIn];
}

// The same for the backward, whose tiles are whole tensors.
inline std::optional<Plan> make_backward_plan(const NormBackwardParams& p,
                                              const DeviceFacts& device,
                                              const PlanOverrides& overrides = {}) {
  if (p.call.B * p.call.S == 0) return std::nullopt;
  std::optional<Plan> plan = plan_norm(p.call, device, overrides, kSmallBlockThreads);
  if (!plan.has_value()) return plan;
  RotateParams gradients = p.call;  // in the place of x
  for (int i = 0; i < p.call.count; ++i) {
    const TensorParams& t = p.call.tensors[i];
    const GradientParams& g = p.tensors[i];
    if (g.gradient == nullptr || t.H == 0) continue;
    OperandStrides strides = operand_strides(p.call, t, is_linear(plan->lookup));
    const Tile tile = heads_in_order(p.call, t);
    // FastDivmod needs indices below 2^31, also of heads that the last threads find missing.
    constexpr int64_t kMaxHeads = INT32_MAX / 2;
    const auto fits = [&] { return !axis_to_split(strides, tile, kMaxHeads).has_value(); };
    if (!fits()) return std::nullopt;
    strides[kIn] = gradient_strides(p.call, t, g);
    if (!fits()) return std::nullopt;
    gradients.tensors[i].in = g.gradient;
    gradients.tensors[i].in_strides = g.strides;
  }
  if (rotated_vector(gradients) < plan->vector) return std::nullopt;
  plan->head_threads = 1;  // params number heads, not threads
  return plan;
}

}  // namespace fused_rope::kernels
