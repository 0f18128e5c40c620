// The kernel of a call with a cache whose heads are whole vectors: one launch rotates q and k, and
// stores k and v.
#pragma once

#include <cmath>

#include "fused_rope/kernels/cache.h"
#include "fused_rope/kernels/cuda/kernel.cuh"

namespace fused_rope::kernels {

struct NoNorm {
  explicit NoNorm(const RotateParams&) {}
};

// The slots of k or of v; strides in bytes. All that a thread reads is in two cache lines.
struct SlotArgs {
  const char* slots;
  LinearOffset slots_offset, head_offset, scale_offset;
  const char* scale;  // null unless values have 8 bits
  char* data;
  int64_t page, place;
  int64_t limit;  // slots
  int64_t page_size;
  FastDivmod per_page;  // where is_short
  Storage storage;
  bool is_int64;
  bool is_short;  // pages, slots and strides fit 32 bits

  SlotArgs() = default;
  SlotArgs(const RotateParams& p, const CacheTensorParams& cache, int64_t H,
           const ByteStrides& index_strides, const Tile& tile)
      : slots(tile_start(p.rows.out_rows.data, index_strides, tile)),
        slots_offset(index_strides, tile),
        head_offset(slot_strides(p, cache, H), tile),
        scale_offset(scale_strides(cache, H), tile),
        scale(reinterpret_cast<const char*>(cache.scale)),
        data(static_cast<char*>(cache.data)),
        page(cache.page * size_of(p.cache->storage, p.dtype)),
        place(cache.place * size_of(p.cache->storage, p.dtype)),
        limit(p.rows.out_rows_limit),
        page_size(p.cache->page_size),
        per_page(std::min<int64_t>(page_size, INT32_MAX)),
        storage(p.cache->storage),
        is_int64(p.rows.out_rows.is_int64),
        is_short(std::max({limit, page_size, std::abs(page), std::abs(place)}) <= INT32_MAX) {}

  // That of slot_offset, without h and in bytes.
  __device__ __forceinline__ int64_t offset_of(int64_t slot) const {
    if (is_short) {
      const uint32_t index = per_page.div(static_cast<uint32_t>(slot));
      const auto rest = static_cast<int32_t>(slot - index * static_cast<uint32_t>(page_size));
      return int64_t{static_cast<int32_t>(index)} * static_cast<int32_t>(page) +
             int64_t{rest} * static_cast<int32_t>(place);
    }
    const int64_t index = slot / page_size;
    return index * page + (slot - index * page_size) * place;
  }
};

enum { kKeySlots, kValueSlots };

// What a launch with a cache passes besides KernelParams, whose tiles are those of q and k.
template <typename Traits>
struct CacheArgs {
  using W = Wide<typename Traits::Element>;
  using Norm = std::conditional_t<Traits::kNorm, NormArgs<W>, NoNorm>;
  static constexpr bool kSharesWarps = true;

  SlotArgs slots[2] = {};
  TensorArgs value_tensor = {};
  FastDivmod per_value_head;
  uint32_t value_threads, value_elements;  // of a head of v
  bool has_key_out;
  Norm norm;

  CacheArgs(const RotateParams& p, Plan plan)
      : value_threads(static_cast<uint32_t>(
            ceil_divide(p.cache->values_D, int64_t{Traits::kVectors} * Traits::kVectorSize))),
        value_elements(static_cast<uint32_t>(p.cache->values_D)),
        has_key_out(p.tensors[1].out != nullptr),
        norm(p) {
    const RotateParams values = values_call(p);
    const TensorParams& v = values.tensors[0];
    if (v.in == nullptr || v.H == 0) return;
    const Tile tile = whole_tile(values, v);
    plan.head_threads = static_cast<int>(value_threads);
    const OperandStrides strides = operand_strides(values, v, false);
    value_tensor = TensorArgs(values, v, plan, strides, tile);
    slots[kValueSlots] = SlotArgs(values, p.cache->v, v.H, strides[kOutRows], tile);
    per_value_head = FastDivmod(value_threads);
  }
};

// The reciprocal of a normal number that is not too large, to one unit in the last place.
__device__ __forceinline__ float approximate_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
#else
  return 1.0f / x;
#endif
}

// x / scale, so that it rounds to the same 8 bits as a quotient of IEEE 754: by the reciprocal of
// the scale, and two corrections of the remainder (Markstein 2000). What the compiler's own
// division checks of each dividend is checked once here.
class DivisionByScale {
 public:
  __device__ __forceinline__ explicit DivisionByScale(float scale) {
    // Powers of two keep the scale away from subnormal reciprocals and remainders. Quotients that
    // overflow or underflow by them saturate, or are 0 in 8 bits.
    const float magnitude = scale < 0 ? -scale : scale;
    factor_ = magnitude < 0x1p-60f ? 0x1p96f : magnitude > 0x1p60f ? 0x1p-96f : 1.0f;
    divisor_ = scale * factor_;
    const float estimate = approximate_reciprocal(divisor_);
    const float corrected = add_product(estimate, add_product(1, -divisor_, estimate), estimate);
    const bool is_finite = estimate != 0 && estimate - estimate == 0;
    reciprocal_ = is_finite ? corrected : estimate;
  }

  // Whether quotients are those of `correct`, but for the sign of 0 and for what is not finite.
  __device__ __forceinline__ bool is_plain() const { return factor_ == 1; }

  __device__ __forceinline__ float estimate(float dividend) const { return dividend * reciprocal_; }

  __device__ __forceinline__ float correct(float quotient, float dividend) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float remainder = add_product(dividend, -quotient, divisor_);
      quotient = add_product(quotient, remainder, reciprocal_);
    }
    return quotient;
  }

  __device__ __forceinline__ float operator()(float x) const {
    const float dividend = x * factor_;
    const float quotient = estimate(dividend);
    const bool has_remainder = quotient != 0 && quotient - quotient == 0;
    return has_remainder ? correct(quotient, dividend) : quotient;
  }

 private:
  // sum + x * y, rounded once.
  __device__ __forceinline__ static float add_product(float sum, float x, float y) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(x, y, sum);
#else
    return std::fma(x, y, sum);
#endif
  }

  float factor_, divisor_, reciprocal_;
};

// Four numbers in 8 bits, the first of them in the lowest byte.
template <typename To>
__device__ __forceinline__ uint32_t narrow_four(const float (&x)[4]) {
  uint32_t word;
  To narrowed[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) narrowed[i] = narrow<To>(x[i]);
  std::memcpy(&word, narrowed, sizeof(word));
  return word;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
// NaNs lose their sign.
#define FUSED_ROPE_NARROW_FOUR(To, type)                                     \
  template <>                                                                \
  __device__ __forceinline__ uint32_t narrow_four<To>(const float (&x)[4]) { \
    uint32_t word;                                                           \
    asm("{\n"                                                                \
        ".reg .b16 low, high;\n"                                             \
        "cvt.rn.satfinite." type                                             \
        "x2.f32 low, %2, %1;\n"                                              \
        "cvt.rn.satfinite." type                                             \
        "x2.f32 high, %4, %3;\n"                                             \
        "mov.b32 %0, {low, high};\n"                                         \
        "}"                                                                  \
        : "=r"(word)                                                         \
        : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));                       \
    return word;                                                             \
  }
FUSED_ROPE_NARROW_FOUR(Float8E4M3, "e4m3")
FUSED_ROPE_NARROW_FOUR(Float8E5M2, "e5m2")
#undef FUSED_ROPE_NARROW_FOUR
#endif

// Divides by the scale of a head and rounds to 8 bits.
template <typename To>
class Quantizer {
 public:
  __device__ __forceinline__ explicit Quantizer(float scale) : divide_(scale) {}

  template <typename T, int kSize>
  __device__ __forceinline__ Vector<To, kSize> operator()(const Vector<T, kSize>& x) const {
    uint32_t words[kSize / 4];
    bool is_plain = kIsFloat && divide_.is_plain();
    if constexpr (kIsFloat) {
#pragma unroll
      for (int i = 0; i < kSize; i += 4) {
        float quotients[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) quotients[k] = divide_.estimate(widen_element(x, i + k));
        const uint32_t estimates = narrow_four<To>(quotients);
#pragma unroll
        for (int k = 0; k < 4; ++k)
          quotients[k] = divide_.correct(quotients[k], widen_element(x, i + k));
        // A NaN has seven ones: adding one sets the eighth bit of no other number.
        const uint32_t magnitudes = narrow_four<To>(quotients) & 0x7f7f7f7fu;
        is_plain = is_plain && ((magnitudes + 0x01010101u) & 0x80808080u) == 0;
        words[i / 4] = magnitudes | (estimates & 0x80808080u);
      }
    }
    if (!is_plain) {
      To others[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) others[i] = narrow<To>(divide_(widen_element(x, i)));
      std::memcpy(words, others, kSize);
    }
    Vector<To, kSize> result;
    std::memcpy(&result, words, kSize);
    return result;
  }

 private:
  static constexpr bool kIsFloat = !std::is_same_v<To, int8_t>;

  DivisionByScale divide_;
};

// A thread's part of a head that has a slot, and what it needs to find it: loads in flight.
template <typename Traits>
struct SlotPart {
  LinearCoordinates at;
  LoadedIndex slot;
  float scale;
  uint32_t start[Traits::kVectors];
  Vector<typename Traits::Element, Traits::kVectorSize> x[Traits::kVectors];

  __device__ __forceinline__ void load_slot(const SlotArgs& args, bool wanted) {
    slot = load_index_early(args.slots + args.slots_offset.at(at), args.is_int64, wanted);
    scale = load<1>(reinterpret_cast<const float*>(args.scale + args.scale_offset.at(at)),
                    kEvictLast, wanted && args.scale != nullptr)
                .element[0];
  }

  __device__ __forceinline__ void store_in(const SlotArgs& args) const {
    const int64_t index = slot.value();
    FUSED_ROPE_DEVICE_CHECK(index == -1 || is_row(index, args.limit));
    if (index < 0) return;
    char* const head = args.data + args.offset_of(index) + args.head_offset.at(at);
    visit_storage<typename Traits::Element>(args.storage, [&]<typename To>() {
      To* const to = reinterpret_cast<To*>(head);
      if constexpr (std::is_same_v<To, typename Traits::Element>) {
#pragma unroll
        for (int v = 0; v < Traits::kVectors; ++v) store(to + start[v], x[v], kEvictNormal, true);
      } else {
        const Quantizer<To> quantize(scale);
#pragma unroll
        for (int v = 0; v < Traits::kVectors; ++v)
          store(to + start[v], quantize(x[v]), kEvictNormal, true);
      }
    });
  }
};

// Loads a part of v; false beyond the last head.
template <typename Traits>
__device__ __forceinline__ bool load_value(const KernelParams& params,
                                           const CacheArgs<Traits>& cache, SlotPart<Traits>& part) {
  using T = typename Traits::Element;
  constexpr int kSize = Traits::kVectorSize;
  const TensorArgs& tensor = cache.value_tensor;
  uint32_t index = (blockIdx.x - params.first_value_block) * blockDim.x + threadIdx.x;
  if (index >= tensor.threads) return false;
  part.at = tensor.locate(cache.value_threads, cache.per_value_head, index);
  part.load_slot(cache.slots[kValueSlots], true);
  const T* const head = reinterpret_cast<const T*>(tensor.in + tensor.in_offset.at(part.at));
#pragma unroll
  for (int v = 0; v < Traits::kVectors; ++v) {
    const uint32_t start = (index + v * cache.value_threads) * kSize;
    part.start[v] = start < cache.value_elements ? start : index * kSize;
    part.x[v] = load<kSize>(head + part.start[v], params.load_policy, true);
  }
  return true;
}

// Rotates a part of q or k, and stores it if its output is wanted. Whether it has a slot.
template <typename Traits>
__device__ __forceinline__ bool rotate_part(const KernelParams& params,
                                            const CacheArgs<Traits>& cache,
                                            SlotPart<Traits>& part) {
  constexpr RowLookup kLookup = Traits::kLookup;
  const TileBlock assigned = assign_block<kLookup>(params, blockIdx.x);
  const bool is_key = assigned.is_second;
  const TensorArgs& tensor = params.tensors[is_key];
  const LookupArgs& lookups = params.lookups[is_key];
  uint32_t index = assigned.block * blockDim.x + threadIdx.x;
  bool in_tile = index < tensor.threads;
  const LinearCoordinates& at = part.at;
  part.at = tensor.locate(params.head_threads, params.per_head, index);
  if constexpr (Traits::kNorm) in_tile = in_tile && index < params.rotating_threads;
  ThreadTile<Traits> tile(params, index);

  // Issue the loads of indices first, then those of x, before waiting for any.
  const TileToken token = {params, tensor, lookups, at, 0};
  PositionedToken positioned = {token, {}};
  if constexpr (!is_linear(kLookup)) {
    const bool has_position = (params.row_flags & kHasPositions) != 0;
    positioned.index = token.load_position(in_tile && has_position);
  }
  part.load_slot(cache.slots[kKeySlots], in_tile && is_key);
  tile.load_elements(params, tensor.in + tensor.in_offset.at(at), lookups.in_d, in_tile, part.x);
  if (!Traits::kNorm && !in_tile) return false;

  // Without a branch: the compiler waits for x before one.
  RowPointers rows = {nullptr, nullptr};
  bool rotates = in_tile && tile.rotates;
  if (is_linear(kLookup) || rotates)
    rotates &= find_rows<kLookup>(params, tensor, lookups, at, positioned, rows);
  tile.load_rows(params, rows, rotates);
  if constexpr (Traits::kNorm) {
    const ThreadWeight<Traits> weight(cache.norm, is_key, tile, in_tile);
    const auto get_factors = [&](typename ThreadTile<Traits>::WideVectors& factors) {
      weight.get_factors(cache.norm, is_key, tile, in_tile, factors);
    };
    normalize_and_rotate(params, cache.norm, tile, in_tile, rotates, get_factors, part.x);
    if (!in_tile) return false;
  } else if (rotates) {
    tile.template rotate<true>(part.x, tile.kAllPairs);
  }
  if (!is_key || cache.has_key_out)
    tile.store_elements(params, tensor.out + tensor.out_offset.at(at), lookups.out_d, part.x);
#pragma unroll
  for (int v = 0; v < Traits::kVectors; ++v) part.start[v] = tile.start[v];
  return is_key;
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads,
                                  fitting_blocks(Traits::kNorm ? 7 : 5, Traits::kMaxThreads))
    cache_kernel(const __grid_constant__ KernelParams params,
                 const __grid_constant__ CacheArgs<Traits> cache) {
  SlotPart<Traits> part;
  const bool is_value = blockIdx.x >= params.first_value_block;
  const bool has_slot =
      is_value ? load_value(params, cache, part) : rotate_part(params, cache, part);
  if (has_slot) part.store_in(cache.slots[is_value ? kValueSlots : kKeySlots]);
}

}  // namespace fused_rope::kernels
