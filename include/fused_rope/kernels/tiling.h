// Tiles of a tensor, small enough for 32-bit offsets and for one launch.
#pragma once

#include <array>
#include <cstdlib>
#include <optional>

#include "fused_rope/kernels/params.h"

namespace fused_rope::kernels {

// A box of the heads of one tensor.
struct Tile {
  std::array<Axis, 3> order;     // from the fastest axis to the slowest
  std::array<int64_t, 3> first;  // coordinates of the first head, by Axis
  std::array<int64_t, 3> size;   // by Axis

  int64_t extent(int i) const { return size[order[i]]; }
  int64_t heads() const { return extent(0) * extent(1) * extent(2); }
};

// All heads of a tensor, in chunks of `heads` where it is staged; a tile counts chunks.
inline Tile whole_tile(const RotateParams& p, const TensorParams& t, int64_t heads = 1) {
  return {memory_order(p, t), {0, 0, 0}, {p.B, p.S, t.H / heads}};
}

// Strides in bytes, by Axis; 0 along an axis of size 1, whose stride means nothing.
using ByteStrides = std::array<int64_t, 3>;

// What a thread addresses through the coordinates of its head. The last one is not memory, but the
// index of the token in its sequence.
enum Operand { kIn, kOut, kCos, kSin, kPositions, kOffsets, kOutRows, kToken };
using OperandStrides = std::array<ByteStrides, 8>;

// linear_rows: no table row is looked up, so a shared table has its rows along the sequence. heads:
// of a chunk.
inline OperandStrides operand_strides(const RotateParams& p, const TensorParams& t,
                                      bool linear_rows, int64_t heads = 1) {
  const auto bytes = [&](int size, int64_t b, int64_t s, int64_t h) {
    return ByteStrides{p.B > 1 ? b * size : 0, p.S > 1 ? s * size : 0,
                       t.H > heads ? h * size * heads : 0};
  };
  const auto table_bytes = [&](const TableParams& table) {
    const int64_t s = table.s + (linear_rows ? table.m : 0);
    return bytes(size_of(p.table_dtype), table.b, s, table.h);
  };
  const Strides& in = t.in_strides;
  const Strides out = t.scattered ? Strides{0, 0, t.out_strides.h, 0} : t.out_strides;
  const RowParams& r = p.rows;
  const int size = size_of(p.dtype);
  const bool packed = r.cu_seqlens.data != nullptr;  // then offsets belong to sequences
  return {bytes(size, in.b, in.s, in.h),
          bytes(size, out.b, out.s, out.h),
          table_bytes(p.cos),
          table_bytes(p.sin),
          bytes(size_of(r.positions), r.positions_b, r.positions_s, 0),
          bytes(size_of(r.offsets), packed ? 0 : r.offsets_stride, 0, 0),
          bytes(size_of(r.out_rows), r.out_rows_b, r.out_rows_s, 0),
          bytes(1, 0, 1, 0)};
}

// Head i of a tile with extents n0, n1, n2: i, i / n0 and i / (n0 * n1).
struct LinearCoordinates {
  uint32_t index[3];
};

// The offset in bytes of a head from the first head of its tile. It is linear in (i, i / n0,
// i / (n0 * n1)): each outer coefficient subtracts the inner extent, so no remainder is needed.
//   i * stride0 + i / n0 * (stride1 - n0 * stride0) + i / (n0 * n1) * (stride2 - n1 * stride1)
struct LinearOffset {
  int32_t coefficients[3];

  LinearOffset() = default;
  LinearOffset(const ByteStrides& strides, const Tile& tile) {
    for (int i = 0; i < 3; ++i)
      coefficients[i] = static_cast<int32_t>(coefficient(strides, tile, i));
  }

  static int64_t coefficient(const ByteStrides& strides, const Tile& tile, int i) {
    if (i == 0) return stride(strides, tile, 0);
    // No head has a nonzero coordinate here.
    if (tile.extent(i) == 1 && (i == 2 || tile.extent(2) == 1)) return 0;
    return stride(strides, tile, i) - tile.extent(i - 1) * stride(strides, tile, i - 1);
  }

  static int64_t stride(const ByteStrides& strides, const Tile& tile, int i) {
    return tile.extent(i) > 1 ? strides[tile.order[i]] : 0;
  }

  FUSED_ROPE_HOST_DEVICE int64_t at(const LinearCoordinates& coordinates) const {
    return product(coordinates.index[0], coefficients[0]) +
           product(coordinates.index[1], coefficients[1]) +
           product(coordinates.index[2], coefficients[2]);
  }

 private:
  // In PTX, so that it stays one instruction when the compiler holds a factor in 64 bits.
  FUSED_ROPE_HOST_DEVICE static int64_t product(uint32_t index, int32_t coefficient) {
#if defined(__CUDA_ARCH__)
    int64_t bytes;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(bytes) : "r"(index), "r"(coefficient));
    return bytes;
#else
    return int64_t{index} * coefficient;
#endif
  }
};

// The axis along which to halve a tile until its coefficients fit in 32 bits and it has at most
// max_heads heads, if any.
inline std::optional<Axis> axis_to_split(const OperandStrides& operands, const Tile& tile,
                                         int64_t max_heads) {
  const auto fits = [](int64_t coefficient) { return std::abs(coefficient) <= INT32_MAX; };
  for (const ByteStrides& strides : operands) {
    for (int i = 0; i < 3; ++i) {
      // Either the stride itself is too long, or the inner extent that is subtracted.
      if (!fits(LinearOffset::coefficient(strides, tile, i)))
        return tile.order[fits(LinearOffset::stride(strides, tile, i)) ? i - 1 : i];
    }
  }
  // Divides one by one, because the product of the extents may overflow. Halving the slowest axis
  // leaves all coefficients unchanged.
  if (tile.extent(0) <= max_heads / tile.extent(1) / tile.extent(2)) return std::nullopt;
  for (int i = 2; i >= 0; --i) {
    if (tile.extent(i) > 1) return tile.order[i];
  }
  return std::nullopt;
}

// Calls f(tile) for tiles that cover `whole` and that axis_to_split leaves alone.
template <typename F>
void for_each_tile(const OperandStrides& operands, const Tile& whole, int64_t max_heads,
                   const F& f) {
  const std::optional<Axis> axis = axis_to_split(operands, whole, max_heads);
  if (!axis.has_value()) return f(whole);
  Tile low = whole;
  Tile high = whole;
  low.size[*axis] = whole.size[*axis] / 2;
  high.first[*axis] += low.size[*axis];
  high.size[*axis] -= low.size[*axis];
  for_each_tile(operands, low, max_heads, f);
  for_each_tile(operands, high, max_heads, f);
}

}  // namespace fused_rope::kernels
