// The CUDA kernel. Memory layout is a template parameter; everything else is a run-time argument.
#pragma once

#include "fused_rope/kernels/cuda/kernel_params.cuh"
#include "fused_rope/kernels/cuda/sequence_search.cuh"
#include "fused_rope/kernels/normalization.h"

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
  bool full_head = false;
  bool staged = false;
  bool norm = false;        // of full heads, whose threads are in one warp
  int heads = 1;            // of a token, that a thread with a norm takes one after another
  bool norm_first = false;  // the norm precedes the rotation, with `cast`; else the launch says
  Cast cast = Cast::kNever;
};

// The most blocks, up to `blocks`, that fit on a multiprocessor.
constexpr int fitting_blocks(int blocks, int threads) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
  constexpr int kThreads = 1024;
#elif defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870 || \
                                 __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1100)
  constexpr int kThreads = 1536;
#else
  constexpr int kThreads = 2048;
#endif
  return std::min(blocks, kThreads / threads);
}

template <typename T, typename TableT, Variant kVariant>
struct KernelTraits {
  using Element = T;
  using Table = TableT;
  static constexpr Precision kPrecision = kVariant.precision;
  static constexpr Arrangement kArrangement = kVariant.arrangement;
  static constexpr int kVectorSize = kVariant.vector;
  static constexpr RowLookup kLookup = kVariant.lookup;
  static constexpr bool kFullHead = kVariant.full_head;
  static constexpr bool kNorm = kVariant.norm;
  static constexpr int kHeads = kVariant.heads;
  static constexpr bool kNormFirst = kVariant.norm_first;
  static constexpr Cast kCast = kVariant.cast;
  // What a launch passes besides KernelParams.
  using Extra = std::conditional_t<kNorm, NormArgs<Wide<T>>, AxesOf<kLookup>>;

  static constexpr bool kOnlyRotates = kFullHead || kVariant.staged;
  static constexpr bool kAdjacent = kArrangement == Arrangement::kAdjacent;
  // Staged threads, and those of a norm's tree of sums, have one vector of each half of a head; the
  // former only one of whole pairs.
  static constexpr int kVectors = kNorm             ? 2
                                  : kVariant.staged ? (kArrangement == Arrangement::kPair ? 2 : 1)
                                                    : vectors_of_thread(kArrangement, kLookup);
  static constexpr int kPairs = kVectorSize * kVectors / 2;  // of each head
  // Groups of consecutive pairs: one for both vectors, or one in each.
  static constexpr int kGroups = kAdjacent ? kVectors : 1;
  static constexpr int kGroupPairs = kPairs / kGroups;
  // Blocks that must fit on a multiprocessor. This limits registers, so that enough loads of x are
  // in flight.
  static constexpr int kMaxThreads = kNorm ? kSmallBlockThreads : kMaxBlockThreads;
  static constexpr int kMinBlocks =
      fitting_blocks(!kNorm       ? kResidentThreads / kMaxBlockThreads
                     : kHeads > 1 ? 7  // with 8, registers are spilled
                                  : 8,
                     kMaxThreads);
};

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

// Pair 0 of the table rows of a token.
struct RowPointers {
  const char* cos;
  const char* sin;
};

// What one thread moves of a head, and how it rotates it.
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
  using WideVectors = Wide<T>[kVectors][kVectorSize];

  bool rotates;
  uint32_t start[kVectors];  // the first element of each vector
  uint32_t pair[Traits::kGroups];
  Wide<T> c[kPairs], s[kPairs];

  // thread: index in its head.
  __device__ __forceinline__ ThreadTile(const KernelParams& params, uint32_t thread)
      : rotates(Traits::kOnlyRotates || thread < params.rotating_threads) {
    if (!rotates) {
      thread -= params.rotating_threads;
      spread(thread, params.copying_threads, params.copied_elements);
#pragma unroll
      for (uint32_t& element : start)
        element += element < params.first_copied ? 0 : params.copied_gap;
    } else if constexpr (Traits::kAdjacent) {
      const bool all_rotate = Traits::kFullHead && !Traits::kNorm;
      spread(thread, all_rotate ? params.head_threads : params.rotating_threads,
             params.rotated_elements);
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

  __device__ __forceinline__ void load_elements(const KernelParams& params, const char* head,
                                                int64_t stride, bool wanted, Vectors& x) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      x[i] = load<kVectorSize>(reinterpret_cast<const T*>(head) + offset_of(start[i], stride),
                               params.load_policy, wanted);
    }
  }

  __device__ __forceinline__ void store_elements(const KernelParams& params, char* head,
                                                 int64_t stride, const Vectors& x) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      store(reinterpret_cast<T*>(head) + offset_of(start[i], stride), x[i], params.store_policy,
            true);
    }
  }

  // Loads the table entries of this thread's pairs.
  __device__ __forceinline__ void load_rows(const KernelParams& params, const RowPointers& rows,
                                            bool wanted = true) {
    constexpr int kWidest = kVectorBytes / sizeof(Table);
    constexpr int kLoad = kGroupPairs < kWidest ? kGroupPairs : kWidest;
    const auto load_row = [&](const char* row, int64_t stride, Wide<T>* entries) {
#pragma unroll
      for (int i = 0; i < kPairs; i += kLoad) {
        const uint32_t j = pair[i / kGroupPairs] + i % kGroupPairs;
        const Table* entry = reinterpret_cast<const Table*>(row) + (kLoad > 1 ? j : j * stride);
        const auto loaded = load<kLoad>(entry, params.table_policy, wanted);
#pragma unroll
        for (int k = 0; k < kLoad; ++k)
          entries[i + k] = rounded<T, Traits::kPrecision>(widen(loaded.element[k]));
      }
    };
    load_row(rows.cos, params.cos_j, c);
    load_row(rows.sin, params.sin_j, s);
    invert(params);
  }

  __device__ __forceinline__ static void widen_all(const Vectors& x, WideVectors& wide) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVectorSize; ++i) wide[v][i] = widen_element(x[v], i);
    }
  }

  __device__ __forceinline__ static void narrow_all(const WideVectors& wide, Vectors& x) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVectorSize; i += 2)
        narrow_two<T>(wide[v][i], wide[v][i + 1], x[v].element[i], x[v].element[i + 1]);
    }
  }

  // Rotates all pairs, without the last rounding. inverts: by the inverse rotation.
  template <bool kInverts = false>
  __device__ __forceinline__ void rotate_wide(WideVectors& wide) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      constexpr auto at = position_of;
      Wide<T>& a = wide[at(i, 0).vector][at(i, 0).element];
      Wide<T>& b = wide[at(i, 1).vector][at(i, 1).element];
      const auto pair = rotate_pair<T, Traits::kPrecision>(a, b, c[i], kInverts ? -s[i] : s[i]);
      a = pair.a;
      b = pair.b;
    }
  }

  // The same where each pair j has a row of its own, row_of(j), whose cos is null if the pair is
  // copied. Returns one bit for each pair that is not.
  template <typename RowOf>
  __device__ __forceinline__ uint32_t load_entries(const KernelParams& params, bool exists,
                                                   const RowOf& row_of) {
    uint32_t rotated = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t j = pair[i / kGroupPairs] + i % kGroupPairs;
      const RowPointers row = row_of(j);
      const bool wanted = exists && (is_linear(Traits::kLookup) || row.cos != nullptr);
      rotated |= static_cast<uint32_t>(wanted) << i;
      const auto entry = [&](const char* from, int64_t stride) {
        const Table* at = reinterpret_cast<const Table*>(from) + j * stride;
        return rounded<T, Traits::kPrecision>(
            widen(load<1>(at, params.table_policy, wanted).element[0]));
      };
      c[i] = entry(row.cos, params.cos_j);
      s[i] = entry(row.sin, params.sin_j);
    }
    invert(params);
    return rotated;
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
    // Neighboring elements are narrowed together where both are rotated.
    if constexpr (!kAll || kPairs == 1) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (kAll || ((pairs >> i) & 1))
          narrow_two<T>(rotated[i].a, rotated[i].b, element_of(x, i, 0), element_of(x, i, 1));
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
  __device__ __forceinline__ void spread(uint32_t thread, uint32_t threads, uint32_t elements) {
    start[0] = thread * kVectorSize;
    if constexpr (kVectors == 2) {
      const uint32_t other = (thread + threads) * kVectorSize;
      start[1] = other < elements ? other : start[0];
    }
  }

  // Vectors have a stride of 1.
  __device__ __forceinline__ static int64_t offset_of(uint32_t element, int64_t stride) {
    return kVectorSize == 1 ? element * stride : element;
  }

  // In kPair the elements were exchanged instead.
  __device__ __forceinline__ void invert(const KernelParams& params) {
    if constexpr (Traits::kAdjacent) {
      if (!params.inverse) return;
#pragma unroll
      for (Wide<T>& entry : s) entry = -entry;
    }
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

template <typename Token>
__device__ __forceinline__ Row find_row(const KernelParams& params, int flags, const Token& token) {
  const Row row = table_row(flags, params.table.offset, token);
  FUSED_ROPE_DEVICE_CHECK(row.copied || is_row(row.index, params.table.M));
  return row;
}

__device__ __forceinline__ RowPointers pointers_to(const KernelParams& params,
                                                   const TensorArgs& tensor, int64_t row) {
  return {tensor.cos + row * params.table.cos_row,
          tensor.cos + tensor.sin_after_cos + row * params.table.sin_row};
}

// The row of a token of a per-token or per-head table, or of any table without look-ups.
__device__ __forceinline__ RowPointers gathered_row(const TensorArgs& tensor,
                                                    const LookupArgs& lookups,
                                                    const LinearCoordinates& at, bool linear) {
  const char* cos = tensor.cos + tensor.row_offset.at(at);
  if (linear) return {cos, cos + tensor.sin_after_cos};
  return {cos, tensor.cos + tensor.sin_after_cos + lookups.sin_offset.at(at)};
}

// Moves `out` to the row that a token is written to, if there is one.
template <typename T>
__device__ __forceinline__ bool to_out_row(const KernelParams& params, const LookupArgs& lookups,
                                           const TileToken& token, char*& out) {
  const int64_t slot = token.out_row();
  FUSED_ROPE_DEVICE_CHECK(slot == -1 || is_row(slot, params.rows.out_rows_limit));
  if (!lookups.scattered) return true;
  out += slot * lookups.out_row * static_cast<int64_t>(sizeof(T));
  return slot >= 0;
}

// Finds the table rows of a token; false where the token is copied. For kLinear and kIndexed.
template <RowLookup kLookup, typename Token>
__device__ __forceinline__ bool find_rows(const KernelParams& params, const TensorArgs& tensor,
                                          const LookupArgs& lookups, const LinearCoordinates& at,
                                          const Token& token, RowPointers& rows) {
  if (is_linear(kLookup) || (params.row_flags & kGathered)) {
    rows = gathered_row(tensor, lookups, at, is_linear(kLookup));
    return true;
  }
  const Row row = find_row(params, params.row_flags, token);
  if (!row.copied) rows = pointers_to(params, tensor, row.index);
  return !row.copied;
}

// Calls f(x) for each element.
template <typename W, int kVectors, int kSize, typename F>
__device__ __forceinline__ void for_each_element(W (&x)[kVectors][kSize], const F& f) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) f(x[v][i], v, i);
  }
}

// The weight of a thread's elements. One of x's dtype is loaded before the sum of squares is known;
// a wider one after it, which spares registers.
template <typename Traits>
struct ThreadWeight {
  using T = typename Traits::Element;
  using W = Wide<T>;
  using Tile = ThreadTile<Traits>;

  typename Tile::Vectors own;

  __device__ __forceinline__ ThreadWeight(const NormArgs<W>& norm, bool is_second, const Tile& tile,
                                          bool exists) {
    const T* const weight = reinterpret_cast<const T*>(norm.weights[is_second]);
    const bool wanted = exists && norm.is_own[is_second];
#pragma unroll
    for (int v = 0; v < Traits::kVectors; ++v)
      own[v] = load<Traits::kVectorSize>(weight + tile.start[v], kEvictLast, wanted);
  }

  // What n is multiplied by.
  __device__ __forceinline__ void get_factors(const NormArgs<W>& norm, bool is_second,
                                              const Tile& tile, bool exists,
                                              typename Tile::WideVectors& factors) const {
    if (norm.is_own[is_second]) {
      Tile::widen_all(own, factors);
    } else if (norm.weights[is_second] != nullptr) {
      load_wide(reinterpret_cast<const W*>(norm.weights[is_second]), tile, exists, factors);
    } else {
      for_each_element(factors, [](W& factor, int, int) { factor = 1; });
    }
    if (!norm.zero_centered[is_second]) return;
    for_each_element(factors, [](W& factor, int, int) { factor = weight_factor(factor, true); });
  }

 private:
  __device__ __forceinline__ static void load_wide(const W* weight, const Tile& tile, bool exists,
                                                   typename Tile::WideVectors& factors) {
    constexpr int kLoad = kVectorBytes / sizeof(W);
#pragma unroll
    for (int v = 0; v < Traits::kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < Traits::kVectorSize; i += kLoad) {
        const auto loaded = load<kLoad>(weight + tile.start[v] + i, kEvictLast, exists);
#pragma unroll
        for (int k = 0; k < kLoad; ++k) factors[v][i + k] = loaded.element[k];
      }
    }
  }
};

// Adds a thread's leaves, as the tree of normalization.h has them.
template <typename W, int kLeaves>
__device__ __forceinline__ W sum_of_thread(W (&leaves)[kLeaves]) {
#pragma unroll
  for (int n = kLeaves / 2; n > 0; n /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) leaves[i] = add(leaves[2 * i], leaves[2 * i + 1]);
  }
  return leaves[0];
}

// Adds the sums of a head's threads, kSums of them side by side so that they overlap. `threads`, a
// power of two, includes those beyond the head, which add zeros. All lanes of the warp must call
// it. It may end after three rounds, as for 128 elements of 16 bits: a branch in each costs more.
template <int kSums, typename W>
__device__ __forceinline__ void add_threads(W (&sums)[kSums], uint32_t threads, bool exists) {
#pragma unroll
  for (W& sum : sums) sum = exists ? sum : W{0};
#pragma unroll
  for (uint32_t mask = 1; mask < kWarp; mask *= 2) {
    if (mask == 8 && threads <= 8) return;
#pragma unroll
    for (W& sum : sums) {
      const W both = add(sum, from_other_lane(sum, mask));
      sum = mask < threads ? both : sum;
    }
  }
}

// The sum of term(v, i) over the vectors v of a thread's head, and the elements i of each.
template <typename Traits, typename F>
__device__ __forceinline__ auto sum_of_terms(uint32_t threads, bool exists, const F& term) {
  Wide<typename Traits::Element> leaves[Traits::kVectorSize];
#pragma unroll
  for (int i = 0; i < Traits::kVectorSize; ++i) leaves[i] = add(term(0, i), term(1, i));
  Wide<typename Traits::Element> sums[] = {sum_of_thread(leaves)};
  add_threads(sums, threads, exists);
  return sums[0];
}

// Rounds what is between norm and rotation.
template <typename T, typename W, int kVectors, int kSize>
__device__ __forceinline__ void round_between(Cast cast, W (&x)[kVectors][kSize]) {
  if (cast == Cast::kNever) return;
  for_each_element(x, [](W& value, int, int) { value = between<T, Cast::kAfter>(value); });
}

// Normalizes a head and rotates it. All lanes of the warp must call it. get_factors: writes what n
// is multiplied by.
template <typename Traits, typename F>
__device__ __forceinline__ void normalize_and_rotate(
    const KernelParams& params, const NormArgs<Wide<typename Traits::Element>>& norm,
    const ThreadTile<Traits>& tile, bool exists, bool rotates, const F& get_factors,
    typename ThreadTile<Traits>::Vectors& x) {
  using T = typename Traits::Element;
  using W = Wide<T>;
  typename ThreadTile<Traits>::WideVectors wide;
  tile.widen_all(x, wide);
  const bool after = !Traits::kNormFirst && norm.after;
  if (after) {
    if (rotates) tile.rotate_wide(wide);
    round_between<T>(norm.cast, wide);
  }
  const W sum = sum_of_terms<Traits>(
      params.head_threads, exists, [&](int v, int i) { return multiply(wide[v][i], wide[v][i]); });
  const W r = norm.scalars.inverse_rms(sum);
  typename ThreadTile<Traits>::WideVectors factors;
  get_factors(factors);
  const auto normalize_all = [&]<Cast kCast>() {
    for_each_element(wide, [&](W& value, int v, int i) {
      value = normalize<T, kCast>(value, r, factors[v][i]);
    });
  };
  if constexpr (Traits::kNormFirst) {
    normalize_all.template operator()<Traits::kCast>();
  } else {
    visit(norm.cast, normalize_all);
  }
  if (!after && rotates) tile.rotate_wide(wide);
  tile.narrow_all(wide, x);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, Traits::kMinBlocks)
    rotate_kernel(const __grid_constant__ KernelParams params,
                  const __grid_constant__ typename Traits::Extra extra) {
  using T = typename Traits::Element;
  constexpr RowLookup kLookup = Traits::kLookup;
  const TileBlock assigned = assign_block<kLookup>(params, blockIdx.x);
  const TensorArgs& tensor = params.tensors[assigned.is_second];
  const LookupArgs& lookups = params.lookups[assigned.is_second];
  const int flags = is_linear(kLookup)                 ? 0
                    : kLookup == RowLookup::kPositions ? int{kHasPositions}
                                                       : params.row_flags;
  uint32_t index = assigned.block * blockDim.x + threadIdx.x;
  bool in_tile = index < tensor.threads;
  const LinearCoordinates at = tensor.locate(params.head_threads, params.per_head, index);
  if constexpr (Traits::kNorm) in_tile = in_tile && index < params.rotating_threads;
  ThreadTile<Traits> tile(params, index);

  // Issue the load of a position first, then those of x, before waiting for either and before the
  // branch of threads beyond the last head.
  TileToken token = {params, tensor, lookups, at, 0};
  [[maybe_unused]] LoadedToken loaded;
  if constexpr (kLookup == RowLookup::kPositions) loaded.index = token.load_position(in_tile);
  typename ThreadTile<Traits>::Vectors heads[Traits::kHeads];
  auto& x = heads[0];
  const char* const in = tensor.in + tensor.in_offset.at(at);
  tile.load_elements(params, in, lookups.in_d, in_tile, x);
  if constexpr (Traits::kHeads == 2) {
    tile.load_elements(params, in + extra.next_in[assigned.is_second], lookups.in_d, in_tile,
                       heads[1]);
  }
  [[maybe_unused]] SequencePosition place = {0, 0};
  if constexpr (kLookup == RowLookup::kPacked) {
    // Most warps have one token.
    const int64_t first = from_lane(token.s(), 0);
    place = find_sequence_in_warp(params.rows, first);
    if (token.s() != first) place = find_sequence(params.rows, token.s());
  }
  if (!Traits::kNorm && !in_tile) return;

  bool copies = !tile.rotates;
  if constexpr (Traits::kNorm) {
    const ThreadWeight<Traits> weight(extra, assigned.is_second, tile, in_tile);
    // Without a branch: the compiler waits for x before one.
    RowPointers rows = {nullptr, nullptr};
    copies = !(is_linear(kLookup) || in_tile) ||
             !find_rows<kLookup>(params, tensor, lookups, at, token, rows);
    tile.load_rows(params, rows, in_tile && !copies);
    char* out = tensor.out + tensor.out_offset.at(at);
    bool is_stored = in_tile;
    if (flags & kHasOutRows) is_stored = in_tile && to_out_row<T>(params, lookups, token, out);
    // Two heads share them.
    [[maybe_unused]] typename ThreadTile<Traits>::WideVectors factors;
    if constexpr (Traits::kHeads > 1)
      weight.get_factors(extra, assigned.is_second, tile, in_tile, factors);
    const auto get_factors = [&](typename ThreadTile<Traits>::WideVectors& to) {
      if constexpr (Traits::kHeads > 1) {
        std::memcpy(&to, &factors, sizeof(to));
      } else {
        weight.get_factors(extra, assigned.is_second, tile, in_tile, to);
      }
    };
#pragma unroll 1
    for (int i = 0;; ++i) {
      normalize_and_rotate(params, extra, tile, in_tile, in_tile && !copies, get_factors, x);
      if (is_stored) tile.store_elements(params, out, lookups.out_d, x);
      if (i + 1 == Traits::kHeads) return;
      std::memcpy(&x, &heads[Traits::kHeads - 1], sizeof(x));
      out += extra.next_out[assigned.is_second];
    }
  } else if (tile.rotates) {
    if (is_linear(kLookup) || (flags & kGathered)) {
      tile.load_rows(params, gathered_row(tensor, lookups, at, is_linear(kLookup)));
    } else if constexpr (kLookup == RowLookup::kPositions) {
      // Load the nearest row before the check, which would delay it.
      const uint32_t nearest = min(loaded.index.low + static_cast<uint32_t>(params.table.offset),
                                   static_cast<uint32_t>(params.table.M - 1));
      const char* cos =
          tensor.cos + uint64_t{nearest} * static_cast<uint32_t>(params.table.cos_row);
      tile.load_rows(params, {cos, cos + tensor.sin_after_cos});
      copies = find_row(params, flags, loaded).copied;
    } else {
      if constexpr (kLookup == RowLookup::kSections) token.axis = extra.axis[tile.pair[0]];
      const Row row = kLookup == RowLookup::kPacked
                          ? find_row(params, flags, PlacedToken{token, place})
                          : find_row(params, flags, token);
      copies = row.copied;
      if (!copies) tile.load_rows(params, pointers_to(params, tensor, row.index));
    }
    if (!copies) tile.template rotate<true>(x, tile.kAllPairs);
  }
  if (copies && params.in_place && !Traits::kNorm) return;

  char* out = tensor.out + tensor.out_offset.at(at);
  if (flags & kHasOutRows) {
    if (!to_out_row<T>(params, lookups, token, out)) return;
  }
  tile.store_elements(params, out, lookups.out_d, x);
}

}  // namespace fused_rope::kernels
