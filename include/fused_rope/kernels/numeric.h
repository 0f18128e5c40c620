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

// The type in which T is rotated: float64 for float64, float32 for everything else.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

FUSED_ROPE_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
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

// Rounds value to T, to nearest even.
template <typename T, typename V>
FUSED_ROPE_HOST_DEVICE T narrow(V value) {
  if constexpr (std::is_same_v<T, Float16>) {
    return to_float16(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bfloat16(static_cast<float>(value));
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

}  // namespace fused_rope::kernels
