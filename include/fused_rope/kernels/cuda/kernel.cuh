// The CUDA kernel. Memory layout is a template parameter; everything else is a run-time argument.
#pragma once

#include "fused_rope/kernels/cuda/kernel_params.cuh"
#include "fused_rope/kernels/rotation.h"

// Fails as PyTorch's own indexing does: "device-side assert triggered", also with NDEBUG.
extern "C" __host__ __device__ void __assert_fail(const char* expression, const char* file,
                                                  unsigned line, const char* function) noexcept
    __attribute__((__noreturn__));

// __builtin_unreachable keeps ptxas from saving registers across the call.
#define FUSED_ROPE_DEVICE_CHECK(condition)                                                   \
  do {                                                                                       \
    if (!(condition)) {                                                                      \
      __assert_fail(#condition, __FILE__, __LINE__, static_cast<const char*>(__FUNCTION__)); \
      __builtin_unreachable();                                                               \
    }                                                                                        \
  } while (false)

namespace fused_rope::kernels {

// What an instance of the kernel fixes at compile time, besides the types of x and of the table.
struct Variant {
  Precision precision;
  Arrangement arrangement;
  int vector;  // elements
  RowLookup lookup;
  bool vector_tables;
  bool full_head;
};

template <typename T, typename TableT, Variant kVariant>
struct KernelTraits {
  using Element = T;
  using Table = TableT;
  static constexpr Precision kPrecision = kVariant.precision;
  static constexpr Arrangement kArrangement = kVariant.arrangement;
  static constexpr int kVectorSize = kVariant.vector;
  static constexpr RowLookup kLookup = kVariant.lookup;
  static constexpr bool kVectorTables = kVariant.vector_tables;
  static constexpr bool kFullHead = kVariant.full_head;

  static constexpr bool kAdjacent = kArrangement == Arrangement::kAdjacent;
  static constexpr int kVectors = vectors_of_thread(kArrangement, kLookup);
  static constexpr int kPairs = kVectorSize * kVectors / 2;
  // Groups of consecutive pairs: one for both vectors, or one in each.
  static constexpr int kGroups = kAdjacent ? kVectors : 1;
  static constexpr int kGroupPairs = kPairs / kGroups;
  // Blocks that must fit on a multiprocessor. This limits registers, so that enough loads of x are
  // in flight; with more, kAxes would spill.
  static constexpr int kMinBlocks = kLookup == RowLookup::kAxes ? 4 : 6;
};

// Loads kCount entries of a table row from `first` on, as the arithmetic of x sees them.
template <typename Traits, int kCount>
__device__ __forceinline__ void load_entries(const typename Traits::Table* row, uint32_t first,
                                             int64_t stride, uint64_t policy,
                                             Wide<typename Traits::Element>* to) {
  using T = typename Traits::Element;
  using Table = typename Traits::Table;
  if constexpr (Traits::kVectorTables) {
    constexpr int kLoad =
        kCount * sizeof(Table) > kVectorBytes ? kVectorBytes / sizeof(Table) : kCount;
#pragma unroll
    for (int i = 0; i < kCount; i += kLoad) {
      const auto loaded = load<kLoad>(row + first + i, policy, true);
#pragma unroll
      for (int j = 0; j < kLoad; ++j)
        to[i + j] = rounded<T, Traits::kPrecision>(widen(loaded.element[j]));
    }
  } else {
    const Table* entry = row + first * stride;
#pragma unroll
    for (int i = 0; i < kCount; ++i, entry += stride)
      to[i] = rounded<T, Traits::kPrecision>(widen(*entry));
  }
}

// Widens one element. The upper bfloat16 of a register needs only a mask.
template <typename T, int kSize>
__device__ __forceinline__ Wide<T> widen_element(const Vector<T, kSize>& x, int i) {
  if constexpr (std::is_same_v<T, BFloat16> && kSize > 1) {
    if (i % 2 == 1) {
      uint32_t both;
      std::memcpy(&both, &x.element[i - 1], sizeof(both));
      return float_of(both & 0xffff0000u);
    }
  }
  return widen(x.element[i]);
}

// Rounds two values to T, in one packed conversion where T has 16 bits.
template <typename T>
__device__ __forceinline__ void narrow_two(Wide<T> x, Wide<T> y, T& to_x, T& to_y) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    to_x.bits = __bfloat16_as_ushort(both.x);
    to_y.bits = __bfloat16_as_ushort(both.y);
  } else if constexpr (std::is_same_v<T, Float16>) {
    const __half2 both = __floats2half2_rn(x, y);
    to_x.bits = __half_as_ushort(both.x);
    to_y.bits = __half_as_ushort(both.y);
  } else {
    to_x = x;
    to_y = y;
  }
}

// Pair 0 of the table rows of a token that is not copied.
struct RowPointers {
  const char* cos;
  const char* sin;
  bool copied;
};

// The vectors of a head that one thread moves, and how it rotates them.
template <typename Traits>
struct ThreadTile {
  using T = typename Traits::Element;
  using Table = typename Traits::Table;
  static constexpr int kVectorSize = Traits::kVectorSize;
  static constexpr int kVectors = Traits::kVectors;
  static constexpr int kPairs = Traits::kPairs;
  static constexpr int kGroupPairs = Traits::kGroupPairs;
  static constexpr uint32_t kAllPairs = (1u << kPairs) - 1;
  using Vectors = Vector<T, kVectorSize>[kVectors];

  bool rotates;
  uint32_t start[kVectors];  // the first element of each vector
  uint32_t pair[Traits::kGroups];
  Wide<T> c[kPairs], s[kPairs];

  // thread: index in its head.
  __device__ __forceinline__ ThreadTile(const KernelParams& params, uint32_t thread)
      : rotates(Traits::kFullHead || thread < params.rotating_threads) {
    if (!rotates) {
      thread -= params.rotating_threads;
      spread(thread, params.copying_threads, params.copied_vectors);
      const auto offset = static_cast<uint32_t>(params.pairing.offset);
      const auto rotated = static_cast<uint32_t>(2 * params.pairing.P);
#pragma unroll
      for (uint32_t& element : start) element += element < offset ? 0 : rotated;
    } else if constexpr (Traits::kAdjacent) {
      spread(thread, Traits::kFullHead ? params.head_threads : params.rotating_threads,
             params.rotated_vectors);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        pair[i] = start[i] / 2;
        start[i] += params.first_element;
      }
    } else {
      pair[0] = thread * kVectorSize;
      start[0] = params.first_element + pair[0];
      if (!Traits::kFullHead) start[0] += params.per_distance.div(pair[0]) * params.distance;
      start[1] = start[0] + params.to_partner;
    }
  }

  __device__ __forceinline__ void load_elements(const char* head, int64_t stride, uint64_t policy,
                                                bool wanted, Vectors& x) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      x[i] = load<kVectorSize>(reinterpret_cast<const T*>(head) + offset_of(i, stride), policy,
                               wanted);
  }

  __device__ __forceinline__ void store_elements(char* head, int64_t stride, uint64_t policy,
                                                 const Vectors& x) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      store(reinterpret_cast<T*>(head) + offset_of(i, stride), x[i], policy);
  }

  // Loads the table entries of this thread's pairs.
  __device__ __forceinline__ void load_rows(const KernelParams& params, const RowPointers& rows) {
    const auto load_row = [&](const char* row, const TableParams& table, Wide<T>* entries) {
#pragma unroll
      for (int i = 0; i < Traits::kGroups; ++i) {
        load_entries<Traits, kGroupPairs>(reinterpret_cast<const Table*>(row), pair[i], table.j,
                                          params.table_policy, entries + i * kGroupPairs);
      }
    };
    load_row(rows.cos, params.cos, c);
    load_row(rows.sin, params.sin, s);
    if constexpr (Traits::kAdjacent) {
      if (!params.inverse) return;
#pragma unroll
      for (Wide<T>& entry : s) entry = -entry;
    }
  }

  // Calls f(axis, pairs) for each axis of this thread's pairs, with one bit for each pair that
  // reads it.
  template <typename F>
  __device__ __forceinline__ void for_each_axis(const PairAxes& axes, const F& f) const {
    uint64_t packed = 0;  // the axis of each pair, one per byte
#pragma unroll
    for (int i = 0; i < Traits::kGroups; ++i)
      packed |= axes.load<kGroupPairs>(pair[i]) << 8 * i * kGroupPairs;
    for (uint32_t left = kAllPairs; left != 0;) {
      const auto axis = static_cast<uint8_t>(packed >> 8 * (__ffs(left) - 1));
      uint32_t pairs = 0;
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        pairs |= static_cast<uint32_t>(static_cast<uint8_t>(packed >> 8 * i) == axis) << i;
      left &= ~pairs;
      f(axis, pairs);
    }
  }

  // Rotates the pairs whose bit is set; kAll: every pair.
  template <bool kAll>
  __device__ __forceinline__ void rotate(Vectors& x, uint32_t pairs) const {
    Pair<T> rotated[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      rotated[i] = rotate_pair<T, Traits::kPrecision>(widen_element_of(x, i, 0),
                                                      widen_element_of(x, i, 1), c[i], s[i]);
    }
    // Neighboring elements are narrowed in pairs where both are rotated.
    if constexpr (!kAll || kPairs == 1) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (!kAll && !((pairs >> i) & 1)) continue;
        element_of(x, i, 0) = narrow<T>(rotated[i].a);
        element_of(x, i, 1) = narrow<T>(rotated[i].b);
      }
    } else if constexpr (Traits::kAdjacent) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        narrow_two<T>(rotated[i].a, rotated[i].b, element_of(x, i, 0), element_of(x, i, 1));
    } else {
#pragma unroll
      for (int i = 0; i < kPairs; i += 2) {
        narrow_two<T>(rotated[i].a, rotated[i + 1].a, element_of(x, i, 0), element_of(x, i + 1, 0));
        narrow_two<T>(rotated[i].b, rotated[i + 1].b, element_of(x, i, 1), element_of(x, i + 1, 1));
      }
    }
  }

 private:
  // A thread's vectors are `threads` vectors apart, so that neighboring threads access neighboring
  // memory. If the second one does not exist, the first one is processed twice.
  __device__ __forceinline__ void spread(uint32_t thread, uint32_t threads, uint32_t vectors) {
    start[0] = thread * kVectorSize;
    if constexpr (kVectors == 2) {
      const uint32_t other = thread + threads;
      start[1] = (other < vectors ? other : thread) * kVectorSize;
    }
  }

  // Vectors have a stride of 1.
  __device__ __forceinline__ int64_t offset_of(int i, int64_t stride) const {
    return kVectorSize == 1 ? start[i] * stride : start[i];
  }

  // Where the first or second element of the i-th pair is.
  struct Position {
    int vector, element;
  };
  __device__ __forceinline__ static constexpr Position position_of(int i, int which) {
    return Traits::kAdjacent ? Position{i / kGroupPairs, 2 * (i % kGroupPairs) + which}
                             : Position{which, i};
  }
  __device__ __forceinline__ static T& element_of(Vectors& x, int i, int which) {
    return x[position_of(i, which).vector].element[position_of(i, which).element];
  }
  __device__ __forceinline__ static Wide<T> widen_element_of(const Vectors& x, int i, int which) {
    return widen_element(x[position_of(i, which).vector], position_of(i, which).element);
  }
};

// Which tile a block processes, and the block's index within it.
struct TileBlock {
  bool is_second;
  uint32_t block;
};

template <RowLookup kLookup>
__device__ __forceinline__ TileBlock assign_block(const KernelParams& params, uint32_t block) {
  if (kLookup == RowLookup::kPerHead && params.alternate) return {block % 2 != 0, block / 2};
  const bool is_second = block >= params.second_block;
  return {is_second, block - (is_second ? params.second_block : 0)};
}

template <typename Traits>
__global__ void __launch_bounds__(kMaxBlockThreads, Traits::kMinBlocks)
    rotate_kernel(const __grid_constant__ KernelParams params,
                  const __grid_constant__ AxesOf<Traits::kLookup> axes) {
  using Table = typename Traits::Table;
  constexpr RowLookup kLookup = Traits::kLookup;
  const TileBlock assigned = assign_block<kLookup>(params, blockIdx.x);
  const TensorArgs& tensor = params.tensors[assigned.is_second];
  const LookupArgs& lookups = params.lookups[assigned.is_second];
  uint32_t index = assigned.block * blockDim.x + threadIdx.x;
  const bool in_tile = index < tensor.threads;
  const LinearCoordinates at = tensor.locate(params.head_threads, params.per_head, index);
  ThreadTile<Traits> tile(params, index);

  // Issue the loads of x before waiting for positions or table rows, and before the branch of
  // threads beyond the last head.
  typename ThreadTile<Traits>::Vectors x;
  tile.load_elements(tensor.in + tensor.in_offset.at(at), lookups.in_d, params.x_policy, in_tile,
                     x);
  if (!in_tile) return;

  const TileToken token = {params, lookups, at};
  const auto find_rows = [&](uint32_t axis) {
    const Row row = table_row(params.rows, token.on(axis));
    FUSED_ROPE_DEVICE_CHECK(row.copied || is_row(row.index, params.rows.M));
    const auto bytes = row.index * static_cast<int64_t>(sizeof(Table));
    return RowPointers{static_cast<const char*>(params.cos.data) + bytes * params.cos.m,
                       static_cast<const char*>(params.sin.data) + bytes * params.sin.m,
                       row.copied};
  };
  const auto choose_rows = [&]() -> RowPointers {
    if constexpr (kLookup == RowLookup::kSections) {
      return find_rows(axes.axis[tile.pair[0]]);
    } else {
      if (!is_linear(kLookup) && !params.rows.gathered) return find_rows(0);
      const char* cos = tensor.cos + tensor.cos_offset.at(at);
      if (is_linear(kLookup)) return {cos, cos + tensor.sin_after_cos, false};
      const char* sin = tensor.cos + tensor.sin_after_cos + lookups.sin_offset.at(at);
      return {cos, sin, false};
    }
  };
  if (tile.rotates) {
    if constexpr (kLookup == RowLookup::kAxes) {
      tile.for_each_axis(axes, [&](uint32_t axis, uint32_t pairs) {
        const RowPointers rows = find_rows(axis);
        if (rows.copied) return;
        tile.load_rows(params, rows);
        tile.template rotate<false>(x, pairs);
      });
    } else {
      const RowPointers rows = choose_rows();
      tile.rotates = !rows.copied;
      if (tile.rotates) {
        tile.load_rows(params, rows);
        tile.template rotate<true>(x, tile.kAllPairs);
      }
    }
  }
  if (!tile.rotates && params.in_place) return;

  char* out = tensor.out + tensor.out_offset.at(at);
  if (!is_linear(kLookup) && params.rows.out_rows.data != nullptr) {
    const int64_t row = output_row(params.rows, token.b(), token.s());
    FUSED_ROPE_DEVICE_CHECK(row == -1 || is_row(row, params.rows.out_rows_limit));
    if (lookups.scattered) {
      if (row < 0) return;
      out += row * lookups.out_row * static_cast<int64_t>(sizeof(typename Traits::Element));
    }
  }
  tile.store_elements(out, lookups.out_d, params.x_policy, x);
}

}  // namespace fused_rope::kernels
