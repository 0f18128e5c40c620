// The arguments of a launch. Threads read them from the constant bank, where each launch finds cold
// cache lines: the fields that a call without look-ups needs come first, then those of a look-up.
#pragma once

#include <algorithm>

#include "fused_rope/kernels/cuda/memory.cuh"
#include "fused_rope/kernels/fast_divmod.h"
#include "fused_rope/kernels/normalization.h"
#include "fused_rope/kernels/plan.h"
#include "fused_rope/kernels/rows.h"
#include "fused_rope/kernels/tiling.h"

namespace fused_rope::kernels {

// The axis of each pair's position, passed by value so that a captured launch owns it.
struct PairAxes {
  uint32_t used;  // a bit of each axis that a pair has; positions of others are not read
  uint8_t axis[kMaxAxisPairs];

  explicit PairAxes(const RotateParams& p) : used(p.axes == nullptr ? 1 : 0), axis() {
    for (int64_t j = 0; p.axes != nullptr && j < p.pairing.P; ++j) {
      axis[j] = static_cast<uint8_t>(p.axes[j]);
      used |= 1u << p.axes[j];
    }
  }

  // i: below 32.
  __device__ __forceinline__ bool is_used(uint32_t i) const { return (used >> i & 1) != 0; }
};
struct NoAxes {
  explicit NoAxes(const RotateParams&) {}
};

// A warp searches for the sequence of its token.
struct NoAxesOfSequences : NoAxes {
  static constexpr bool kSharesWarps = true;
  using NoAxes::NoAxes;
};

template <RowLookup kLookup>
using AxesOf = std::conditional_t<
    has_axes(kLookup), PairAxes,
    std::conditional_t<kLookup == RowLookup::kPacked, NoAxesOfSequences, NoAxes>>;

// The address of a tile's first head.
inline const char* tile_start(const void* data, const ByteStrides& strides, const Tile& tile) {
  return static_cast<const char*>(data) + tile.first[kBatch] * strides[kBatch] +
         tile.first[kSequence] * strides[kSequence] + tile.first[kHead] * strides[kHead];
}

// Arguments of one tensor that every call needs.
struct TensorArgs {
  uint32_t threads;
  FastDivmod per_row, per_plane;  // threads along the fastest axis, along the two fastest
  LinearOffset in_offset;
  const char* in;
  const char* cos;        // the first token's row, or the start of a table whose rows are looked up
  int64_t sin_after_cos;  // bytes
  LinearOffset row_offset;  // of a row of cos, or of a position that selects one
  LinearOffset out_offset;
  char* out;  // when scattered, row 0
  const char* positions;

  TensorArgs() = default;

  TensorArgs(const RotateParams& p, const TensorParams& t, const Plan& plan,
             const OperandStrides& strides, const Tile& tile)
      : threads(static_cast<uint32_t>(tile.heads() * plan.head_threads)),
        per_row(tile.extent(0) * plan.head_threads),
        per_plane(tile.extent(0) * tile.extent(1) * plan.head_threads),
        in_offset(strides[kIn], tile),
        in(tile_start(t.in, strides[kIn], tile)),
        cos(table_start(p, p.cos, plan, strides[kCos], tile)),
        sin_after_cos(table_start(p, p.sin, plan, strides[kSin], tile) - cos),
        row_offset(strides[is_linear(plan.lookup) || p.rows.gathered ? kCos : kPositions], tile),
        out_offset(strides[kOut], tile),
        out(const_cast<char*>(tile_start(t.out, strides[kOut], tile))),
        positions(tile_start(p.rows.positions.data, strides[kPositions], tile)) {}

  // The head of thread `index`, which becomes the index of the thread in its head. The three
  // divisions are independent of each other.
  __device__ __forceinline__ LinearCoordinates locate(uint32_t head_threads,
                                                      const FastDivmod& per_head,
                                                      uint32_t& index) const {
    const LinearCoordinates at = {{per_head.div(index), per_row.div(index), per_plane.div(index)}};
    index -= at.index[0] * head_threads;
    return at;
  }

  __device__ __forceinline__ LinearCoordinates locate(uint32_t index) const {
    return {{index, per_row.div(index), per_plane.div(index)}};
  }

 private:
  static const char* table_start(const RotateParams& p, const TableParams& table, const Plan& plan,
                                 const ByteStrides& strides, const Tile& tile) {
    const int64_t row = is_linear(plan.lookup) ? p.rows.offset * table.m : 0;
    return tile_start(table.data, strides, tile) + row * size_of(p.table_dtype);
  }
};

// Arguments of one tensor that few look-ups, strided elements and scattered outputs need.
struct LookupArgs {
  bool scattered;
  int64_t in_d, out_d, out_row;  // strides of elements and of scattered rows
  LinearOffset offsets_offset, out_rows_offset, sin_offset, token_offset;
  const char* offsets;
  const char* out_rows;
  int64_t first_token;
  uint32_t run_chunks,
      run_blocks;      // staged: chunks that follow one another in memory; their blocks
  FastDivmod per_run;  // blocks

  LookupArgs() = default;

  LookupArgs(const RotateParams& p, const TensorParams& t, const Plan& plan,
             const OperandStrides& strides, const Tile& tile)
      : scattered(t.scattered),
        in_d(t.in_strides.d),
        out_d(t.out_strides.d),
        out_row(t.out_strides.s),
        offsets_offset(strides[kOffsets], tile),
        out_rows_offset(strides[kOutRows], tile),
        sin_offset(strides[kSin], tile),
        token_offset(strides[kToken], tile),
        offsets(tile_start(p.rows.offsets.data, strides[kOffsets], tile)),
        out_rows(tile_start(p.rows.out_rows.data, strides[kOutRows], tile)),
        first_token(tile.first[kSequence]),
        run_chunks(plan.staged ? static_cast<uint32_t>(
                                     run_of(strides, tile, chunk_bytes(p, plan.chunk_heads)))
                               : 1),
        run_blocks((run_chunks - 1) / plan.block_units + 1),
        per_run(run_blocks) {}

  __device__ __forceinline__ int64_t token(const LinearCoordinates& at) const {
    return first_token + token_offset.at(at);
  }
};

// What every look-up of a shared table reads: one cache line.
struct SharedTableArgs {
  int64_t offset;  // of all rows
  int64_t M;
  int64_t cos_row, sin_row;   // bytes between rows
  int64_t positions_of_axis;  // bytes between the positions of two axes
};

// The chunks of staged blocks.
struct ChunkArgs {
  uint32_t count;           // of a block, at most
  uint32_t vectors;         // of 16 bytes that a block touches, at most
  uint32_t bytes;           // of a chunk
  uint32_t heads, D;        // heads of a chunk; elements between them
  uint32_t axes;            // of positions: 1 without M-RoPE
  uint32_t pairs;           // P
  bool single_elements;     // vectors are not aligned
  FastDivmod per_rotation;  // threads that rotate a chunk

  ChunkArgs() = default;

  ChunkArgs(const RotateParams& p, const Plan& plan)
      : count(static_cast<uint32_t>(plan.block_units)),
        vectors(static_cast<uint32_t>(plan.block_vectors)),
        bytes(static_cast<uint32_t>(chunk_bytes(p, plan.chunk_heads))),
        heads(static_cast<uint32_t>(plan.chunk_heads)),
        D(static_cast<uint32_t>(p.D)),
        axes(count_axes(p)),
        pairs(static_cast<uint32_t>(p.pairing.P)),
        single_elements(plan.single_elements),
        per_rotation(std::max(plan.rotating_threads, 1)) {}

  size_t shared_bytes() const {
    return vectors * kVectorBytes + count * axes * kRowBytes + (axes > 1 ? pairs : 0);
  }
};

inline uint64_t policy_of(Eviction eviction) {
  switch (eviction) {
    case Eviction::kFirst:
      return kEvictFirst;
    case Eviction::kNormal:
      return kEvictNormal;
    default:
      return kEvictLast;
  }
}

// What loads keep in L2 leaves it like all else once it is written: stores that keep it, too, leave
// less room for the next loads.
inline uint64_t policy_of_stores(Eviction eviction) {
  return policy_of(eviction == Eviction::kLast ? Eviction::kNormal : eviction);
}

// One launch: up to two tiles, one of q and one of k, or both of one tensor.
struct KernelParams {
  uint32_t second_block;            // the first block of the second tile
  uint32_t head_threads, distance;  // threads of a head; elements between those of a pair
  FastDivmod per_head, per_distance;
  uint32_t first_element, to_partner;  // of pair 0; kPair: from an element to its partner
  uint32_t rotating_threads;           // of a head
  uint64_t load_policy, store_policy;  // L2 eviction policies of x
  uint64_t table_policy;
  bool inverse;  // in kPair, first_element and to_partner invert
  bool in_place;
  uint8_t alternate;           // kPerHead, 1: odd blocks process the second tile
  uint8_t row_flags;           // RowFlags
  uint32_t first_value_block;  // with a cache: blocks from this one on copy v
  TensorArgs tensors[kMaxTensors];
  SharedTableArgs table;
  uint32_t copying_threads;           // of a head
  uint32_t rotated_elements;          // of a head: kPair: without partners
  uint32_t copied_elements;           // of a head
  uint32_t first_copied, copied_gap;  // copied elements from the first on come after a gap
  int64_t cos_j, sin_j;               // strides of entries
  RowParams rows;
  LookupArgs lookups[kMaxTensors];
  ChunkArgs chunks;

  KernelParams(const RotateParams& p, const Plan& plan)
      : second_block(0),
        head_threads(static_cast<uint32_t>(plan.head_threads)),
        distance(static_cast<uint32_t>(std::max<int64_t>(p.pairing.distance, 1))),
        per_head(head_threads),
        per_distance(distance),
        first_element(static_cast<uint32_t>(p.pairing.offset)),
        to_partner(static_cast<uint32_t>(p.pairing.distance)),
        rotating_threads(static_cast<uint32_t>(plan.rotating_threads)),
        load_policy(policy_of(plan.eviction)),
        store_policy(policy_of_stores(plan.eviction)),
        table_policy(plan.keeps_tables ? kEvictLast : kEvictUnchanged),
        inverse(p.inverse),
        in_place(p.in_place),
        alternate(0),
        row_flags(kernels::row_flags(p.rows)),
        first_value_block(0),
        table{p.rows.offset, p.rows.M, p.cos.m * size_of(p.table_dtype),
              p.sin.m * size_of(p.table_dtype), p.rows.positions_a * size_of(p.rows.positions)},
        copying_threads(static_cast<uint32_t>(plan.head_threads - plan.rotating_threads)),
        rotated_elements(static_cast<uint32_t>(
            (plan.arrangement == Arrangement::kAdjacent ? 2 : 1) * p.pairing.P)),
        copied_elements(static_cast<uint32_t>(p.D - 2 * p.pairing.P)),
        first_copied(static_cast<uint32_t>(p.pairing.offset)),
        copied_gap(static_cast<uint32_t>(2 * p.pairing.P)),
        cos_j(p.cos.j),
        sin_j(p.sin.j),
        rows(p.rows),
        chunks(plan.staged ? ChunkArgs(p, plan) : ChunkArgs()) {
    // The inverse rotation of (a, b) is the rotation of (b, a): in kPair a thread takes the second
    // elements as the first ones.
    if (p.inverse && plan.arrangement == Arrangement::kPair) {
      first_element += to_partner;
      to_partner = -to_partner;
      inverse = false;
    }
  }

  void set_tile(int i, const RotateParams& p, const TensorParams& t, const Plan& plan,
                const OperandStrides& strides, const Tile& tile) {
    tensors[i] = TensorArgs(p, t, plan, strides, tile);
    lookups[i] = LookupArgs(p, t, plan, strides, tile);
  }

  // The blocks of a tile.
  int64_t blocks(int i, const Plan& plan) const {
    if (!plan.staged) return ceil_divide(tensors[i].threads, plan.block_units);
    return tensors[i].threads / lookups[i].run_chunks * lookups[i].run_blocks;
  }
};

// The norm of a launch. W is the compute type.
template <typename W>
struct NormArgs {
  static constexpr bool kSharesWarps = true;

  NormScalars<W> scalars;
  const char* weights[kMaxTensors] = {};  // of each tile; null without one
  bool is_own[kMaxTensors] = {};          // of x's type, not W
  bool zero_centered[kMaxTensors] = {};
  bool after;
  Cast cast;
  int64_t next_in[kMaxTensors] = {}, next_out[kMaxTensors] = {};  // bytes to a thread's second head

  explicit NormArgs(const RotateParams& p)
      : scalars(p.D, p.norm->eps), after(p.norm->after), cast(p.norm->cast) {}

  // tensor: of the call.
  void set_tile(int i, const RotateParams& p, int tensor) {
    const TensorParams& t = p.tensors[tensor];
    const WeightParams& weight = p.norm->weights[tensor];
    next_in[i] = t.in_strides.h * size_of(p.dtype);
    next_out[i] = t.out_strides.h * size_of(p.dtype);
    weights[i] = static_cast<const char*>(weight.data);
    is_own[i] = weight.data != nullptr && weight.dtype == p.dtype;
    zero_centered[i] = weight.data != nullptr && p.norm->zero_centered;
  }
};

// The token of a head, as table_row asks for it, and an axis of its positions.
struct TileToken {
  const KernelParams& params;
  const TensorArgs& tensor;
  const LookupArgs& lookups;
  const LinearCoordinates& at;
  uint32_t axis;

  __device__ __forceinline__ int64_t s() const { return lookups.token(at); }
  __device__ __forceinline__ SequencePosition place() const {
    return find_sequence(params.rows, s());
  }
  __device__ __forceinline__ LoadedIndex load_position(bool wanted = true) const {
    return load_index_early(tensor.positions + tensor.row_offset.at(at) +
                                static_cast<int64_t>(axis) * params.table.positions_of_axis,
                            params.row_flags & kLongPositions, wanted);
  }
  __device__ __forceinline__ int64_t position() const { return load_position().value(); }
  __device__ __forceinline__ int64_t offset(int64_t sequence) const {
    if (params.row_flags & kHasSequences)
      return load_index(params.rows.offsets, sequence * params.rows.offsets_stride);
    return load_index(lookups.offsets + lookups.offsets_offset.at(at),
                      params.row_flags & kLongOffsets);
  }
  __device__ __forceinline__ int64_t out_row() const {
    return load_index(lookups.out_rows + lookups.out_rows_offset.at(at),
                      params.row_flags & kLongOutRows);
  }
};

// A token whose place in a packed batch is known.
struct PlacedToken {
  const TileToken& token;
  SequencePosition found;

  __device__ __forceinline__ int64_t s() const { return token.s(); }
  __device__ __forceinline__ SequencePosition place() const { return found; }
  __device__ __forceinline__ int64_t position() const { return token.position(); }
  __device__ __forceinline__ int64_t offset(int64_t sequence) const {
    return token.offset(sequence);
  }
};

// A token whose position, if it has one, was loaded.
struct PositionedToken {
  const TileToken& token;
  LoadedIndex index;

  __device__ __forceinline__ int64_t s() const { return token.s(); }
  __device__ __forceinline__ SequencePosition place() const { return token.place(); }
  __device__ __forceinline__ int64_t position() const { return index.value(); }
  __device__ __forceinline__ int64_t offset(int64_t sequence) const {
    return token.offset(sequence);
  }
};

// A token that only has a position, which was loaded.
struct LoadedToken {
  LoadedIndex index;

  __device__ __forceinline__ int64_t s() const { return 0; }
  __device__ __forceinline__ SequencePosition place() const { return {0, 0}; }
  __device__ __forceinline__ int64_t position() const { return index.value(); }
  __device__ __forceinline__ int64_t offset(int64_t) const { return 0; }
};

}  // namespace fused_rope::kernels
