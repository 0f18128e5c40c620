// The arguments of a launch. Threads read them from the constant bank, so the fields that a call
// without look-ups needs come first, in few cache lines.
#pragma once

#include <algorithm>

#include "fused_rope/kernels/cuda/memory.cuh"
#include "fused_rope/kernels/fast_divmod.h"
#include "fused_rope/kernels/plan.h"
#include "fused_rope/kernels/rows.h"
#include "fused_rope/kernels/tiling.h"

namespace fused_rope::kernels {

// The axis of each pair's position, passed by value so that a captured launch owns it.
struct PairAxes {
  alignas(8) uint8_t axis[kMaxAxisPairs];

  // The axes of kPairs pairs, one per byte.
  template <int kPairs>
  __device__ __forceinline__ uint64_t load(uint32_t pair) const {
    if constexpr (kPairs == 8) return *reinterpret_cast<const uint64_t*>(axis + pair);
    if constexpr (kPairs == 4) return *reinterpret_cast<const uint32_t*>(axis + pair);
    if constexpr (kPairs == 2) return *reinterpret_cast<const uint16_t*>(axis + pair);
    return axis[pair];
  }
};
struct NoAxes {};

template <RowLookup kLookup>
using AxesOf = std::conditional_t<has_axes(kLookup), PairAxes, NoAxes>;

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
  LinearOffset cos_offset, out_offset;
  char* out;  // when scattered, row 0

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
        cos_offset(strides[kCos], tile),
        out_offset(strides[kOut], tile),
        out(const_cast<char*>(tile_start(t.out, strides[kOut], tile))) {}

  // The head of thread `index`, which becomes the index of the thread in its head. The three
  // divisions are independent of each other.
  __device__ __forceinline__ LinearCoordinates locate(uint32_t head_threads,
                                                      const FastDivmod& per_head,
                                                      uint32_t& index) const {
    const LinearCoordinates at = {{per_head.div(index), per_row.div(index), per_plane.div(index)}};
    index -= at.index[0] * head_threads;
    return at;
  }

 private:
  static const char* table_start(const RotateParams& p, const TableParams& table, const Plan& plan,
                                 const ByteStrides& strides, const Tile& tile) {
    const int64_t row = is_linear(plan.lookup) ? p.rows.offset * table.m : 0;
    return tile_start(table.data, strides, tile) + row * size_of(p.table_dtype);
  }
};

// Arguments of one tensor that only look-ups, strided elements and scattered outputs need.
struct LookupArgs {
  Axis order[2];
  uint32_t extents[2];  // along the two fastest axes
  bool scattered;
  int64_t in_d, out_d, out_row;  // strides of elements and of scattered rows
  int64_t first[3];              // by Axis
  LinearOffset sin_offset, positions_offset;
  const char* positions;

  LookupArgs() = default;

  LookupArgs(const RotateParams& p, const TensorParams& t, const OperandStrides& strides,
             const Tile& tile)
      : order{tile.order[0], tile.order[1]},
        extents{static_cast<uint32_t>(tile.extent(0)), static_cast<uint32_t>(tile.extent(1))},
        scattered(t.scattered),
        in_d(t.in_strides.d),
        out_d(t.out_strides.d),
        out_row(t.out_strides.s),
        first{tile.first[0], tile.first[1], tile.first[2]},
        sin_offset(strides[kSin], tile),
        positions_offset(strides[kPositions], tile),
        positions(tile_start(p.rows.positions.data, strides[kPositions], tile)) {}

  // The coordinate along an axis, within the tile.
  __device__ __forceinline__ uint32_t along(const LinearCoordinates& at, Axis axis) const {
    return order[0] == axis   ? at.index[0] - at.index[1] * extents[0]
           : order[1] == axis ? at.index[1] - at.index[2] * extents[1]
                              : at.index[2];
  }
};

// One launch: up to two tiles, one of q and one of k, or both of one tensor.
struct KernelParams {
  uint32_t second_block;            // the first block of the second tile
  uint32_t head_threads, distance;  // threads of a head; elements between those of a pair
  FastDivmod per_head, per_distance;
  uint32_t first_element, to_partner;  // of pair 0; kPair: from an element to its partner
  uint64_t x_policy, table_policy;     // L2 eviction policies
  bool inverse;                        // in kPair, first_element and to_partner invert
  bool in_place;
  uint8_t alternate;  // kPerHead, 1: odd blocks process the second tile
  TensorArgs tensors[kMaxTensors];
  uint32_t rotating_threads, copying_threads;  // of a head
  uint32_t rotated_vectors, copied_vectors;    // of a head; the rotated ones for kAdjacent
  Pairing pairing;
  TableParams cos, sin;
  RowParams rows;
  LookupArgs lookups[kMaxTensors];

  KernelParams(const RotateParams& p, const Plan& plan)
      : second_block(0),
        head_threads(static_cast<uint32_t>(plan.head_threads)),
        distance(static_cast<uint32_t>(std::max<int64_t>(p.pairing.distance, 1))),
        per_head(head_threads),
        per_distance(distance),
        first_element(static_cast<uint32_t>(p.pairing.offset)),
        to_partner(static_cast<uint32_t>(p.pairing.distance)),
        x_policy(plan.streams ? kEvictFirst : kEvictNormal),
        table_policy(plan.keeps_tables ? kEvictLast : kEvictUnchanged),
        inverse(p.inverse),
        in_place(p.in_place),
        alternate(0),
        rotating_threads(static_cast<uint32_t>(plan.rotating_threads)),
        copying_threads(static_cast<uint32_t>(plan.head_threads - plan.rotating_threads)),
        rotated_vectors(static_cast<uint32_t>(2 * p.pairing.P / plan.vector)),
        copied_vectors(static_cast<uint32_t>((p.D - 2 * p.pairing.P) / plan.vector)),
        pairing(p.pairing),
        cos(p.cos),
        sin(p.sin),
        rows(p.rows) {
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
    lookups[i] = LookupArgs(p, t, strides, tile);
  }
};

// The token of a head, as table_row asks for it: computes coordinates only when they are needed.
struct TileToken {
  const KernelParams& params;
  const LookupArgs& lookups;
  const LinearCoordinates& at;
  uint32_t axis = 0;

  __device__ __forceinline__ TileToken on(uint32_t other) const {
    return {params, lookups, at, other};
  }
  __device__ __forceinline__ int64_t b() const {
    return lookups.first[kBatch] + lookups.along(at, kBatch);
  }
  __device__ __forceinline__ int64_t s() const {
    return lookups.first[kSequence] + lookups.along(at, kSequence);
  }
  __device__ __forceinline__ int64_t position() const {
    const IndexParams here = {lookups.positions + lookups.positions_offset.at(at),
                              params.rows.positions.is_int64};
    return load_index(here, axis * params.rows.positions_a);
  }
};

}  // namespace fused_rope::kernels
