// Element types, the type each is computed in, and conversions between them. The host side needs
// no CUDA.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FUSED_ROPE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FUSED_ROPE_HOST_DEVICE inline
#endif

namespace fused_rope::kernels {

enum class DType { kFloat16, kBFloat16, kFloat32, kFloat64 };

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// How a cache stores values: in x's dtype, or in 8 bits.
enum class Storage { kOwn, kE4M3, kE5M2, kInt8 };

struct Float8E4M3 {
  uint8_t bits;
};

struct Float8E5M2 {
  uint8_t bits;
};

// The type in which T is rotated: float64 for float64, float32 for everything else.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

FUSED_ROPE_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

FUSED_ROPE_HOST_DEVICE uint64_t bits_of(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

FUSED_ROPE_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

FUSED_ROPE_HOST_DEVICE double widen(double value) { return value; }
FUSED_ROPE_HOST_DEVICE float widen(float value) { return value; }
FUSED_ROPE_HOST_DEVICE float widen(BFloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}

FUSED_ROPE_HOST_DEVICE float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  // Selects instead of branches, so that it vectorizes; no float32 subnormal in between, so that it
  // is right under flush-to-zero.
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t subnormal =
      bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t special = normal + (112u << 23);
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  return float_of(sign | (magnitude >= 0x7c00u ? special : finite));
#endif
}

// Bits whose upper half is `value` rounded to bfloat16. A NaN may have no bits below bfloat16's.
FUSED_ROPE_HOST_DEVICE uint32_t round_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

FUSED_ROPE_HOST_DEVICE BFloat16 to_bfloat16(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t nan = bits_of(value) | 0x00400000u;
  return {static_cast<uint16_t>((value != value ? nan : round_to_bfloat16(value)) >> 16)};
#endif
}

FUSED_ROPE_HOST_DEVICE Float16 to_float16(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // 0.5f has float16's subnormal spacing as its ulp, so this addition rounds to it.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  return {static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite))};
#endif
}

// A float of 8 bits: its mantissa bits, its exponent's bias and the bits of its largest number.
template <typename T>
struct Float8Format;
template <>
struct Float8Format<Float8E4M3> {
  static constexpr uint32_t kMantissa = 3, kBias = 7;
  static constexpr float kMax = 448;
};
template <>
struct Float8Format<Float8E5M2> {
  static constexpr uint32_t kMantissa = 2, kBias = 15;
  static constexpr float kMax = 57344;
};

// Rounds to nearest even, saturates to the largest finite number, and keeps a NaN's sign.
template <typename T>
FUSED_ROPE_HOST_DEVICE T to_float8(float value) {
  using Format = Float8Format<T>;
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  uint32_t rounded = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t both;  // the lower byte is that of the second operand
  if constexpr (std::is_same_v<T, Float8E4M3>) {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(0.0f), "f"(value));
  } else {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(both) : "f"(0.0f), "f"(value));
  }
  rounded = both;
#else
  constexpr uint32_t kDropped = 23 - Format::kMantissa;
  constexpr uint32_t kBiasDifference = (127 - Format::kBias) << 23;
  // A float whose ulp is the spacing of subnormals, so that adding it rounds to them.
  constexpr uint32_t kSubnormal = (127 + 24 - Format::kBias - Format::kMantissa) << 23;
  const float absolute = float_of(bits & 0x7fffffffu);
  const float limited = absolute > Format::kMax ? Format::kMax : absolute;
  const uint32_t magnitude = bits_of(limited);
  const uint32_t subnormal = bits_of(limited + float_of(kSubnormal)) - kSubnormal;
  const uint32_t halfway = (1u << (kDropped - 1)) - 1 + ((magnitude >> kDropped) & 1u);
  const uint32_t normal = (magnitude - kBiasDifference + halfway) >> kDropped;
  rounded = sign | (magnitude < kBiasDifference + (1u << 23) ? subnormal : normal);
#endif
  return {static_cast<uint8_t>(value != value ? sign | 0x7fu : rounded)};
}

// Rounds to nearest even and saturates; a NaN becomes 0.
FUSED_ROPE_HOST_DEVICE int8_t to_int8(float value) {
#if defined(__CUDA_ARCH__)
  return static_cast<int8_t>(max(-128, min(127, __float2int_rn(value))));
#else
  const float number = value != value ? 0.0f : value;
  const float limited = number < -128.0f ? -128.0f : number > 127.0f ? 127.0f : number;
  constexpr float kUlpOfOne = 0x1.8p23f;  // adding it rounds to an integer
  return static_cast<int8_t>(bits_of(limited + kUlpOfOne) - bits_of(kUlpOfOne));
#endif
}

// Rounds value to T, to nearest even.
template <typename T, typename V>
FUSED_ROPE_HOST_DEVICE T narrow(V value) {
  if constexpr (std::is_same_v<T, Float16>) {
    return to_float16(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bfloat16(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, Float8E4M3> || std::is_same_v<T, Float8E5M2>) {
    return to_float8<T>(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, int8_t>) {
    return to_int8(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

// Calls f.operator()<T>() with the element type of dtype.
template <typename F>
decltype(auto) visit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat16:
      return f.template operator()<Float16>();
    case DType::kBFloat16:
      return f.template operator()<BFloat16>();
    case DType::kFloat32:
      return f.template operator()<float>();
    default:
      return f.template operator()<double>();
  }
}

constexpr int size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The bytes of a value of x's dtype in a cache.
constexpr int size_of(Storage storage, DType dtype) {
  return storage == Storage::kOwn ? size_of(dtype) : 1;
}

}  // namespace fused_rope::kernels
