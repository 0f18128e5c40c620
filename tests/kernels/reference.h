// What the kernel tests compare with: rounding in float64, and pairs listed one by one.
#pragma once

#include <cmath>
#include <complex>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "fused_rope/kernels/cpu/isa.h"
#include "fused_rope/kernels/numeric.h"

namespace fused_rope::kernels::testing {

// A binary floating-point format with an implicit bit.
struct Format {
  int fraction_bits;
  int min_exponent;  // of normal numbers
  int max_exponent;
};

template <typename T>
constexpr Format kFormat = {std::numeric_limits<T>::digits - 1,
                            std::numeric_limits<T>::min_exponent - 1,
                            std::numeric_limits<T>::max_exponent - 1};
template <>
inline constexpr Format kFormat<Float16> = {10, -14, 15};
template <>
inline constexpr Format kFormat<BFloat16> = {7, -126, 127};

template <typename T>
constexpr DType kDType = std::is_same_v<T, Float16>    ? DType::kFloat16
                         : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                         : std::is_same_v<T, float>    ? DType::kFloat32
                                                       : DType::kFloat64;

// The distance between consecutive values of a format at `value`.
inline double ulp(const Format& format, double value) {
  const int exponent = value == 0 ? format.min_exponent : std::ilogb(value);
  return std::ldexp(1.0, std::max(exponent, format.min_exponent) - format.fraction_bits);
}

// `value` rounded to a format narrower than float64, to nearest even.
inline double round_to(const Format& format, double value) {
  if (value == 0 || !std::isfinite(value)) return value;
  const double quantum = ulp(format, value);
  const double rounded = std::nearbyint(value / quantum) * quantum;
  const bool overflows = std::abs(rounded) >= std::ldexp(1.0, format.max_exponent + 1);
  return overflows ? std::copysign(std::numeric_limits<double>::infinity(), value) : rounded;
}

// The value of a 16-bit pattern.
inline double decode(const Format& format, uint16_t bits) {
  const double sign = bits >> 15 ? -1.0 : 1.0;
  const int exponent = (bits & 0x7fff) >> format.fraction_bits;
  const int fraction = bits & ((1 << format.fraction_bits) - 1);
  const int special = (1 << (15 - format.fraction_bits)) - 1;
  if (exponent == special) {
    return sign * (fraction == 0 ? std::numeric_limits<double>::infinity()
                                 : std::numeric_limits<double>::quiet_NaN());
  }
  const int implicit = exponent == 0 ? 0 : 1 << format.fraction_bits;
  const int scale = std::max(exponent, 1) - 1 + format.min_exponent - format.fraction_bits;
  return sign * std::ldexp(implicit + fraction, scale);
}

inline double to_double(double value) { return value; }
inline double to_double(float value) { return value; }
inline double to_double(Float16 value) { return decode(kFormat<Float16>, value.bits); }
inline double to_double(BFloat16 value) { return decode(kFormat<BFloat16>, value.bits); }

// The indices of every pair's two elements, in the order of the table's columns.
inline std::vector<std::pair<int64_t, int64_t>> pair_elements(int64_t R, int64_t offset,
                                                              bool interleaved, int64_t blocks) {
  std::vector<std::pair<int64_t, int64_t>> pairs;
  if (interleaved) {
    for (int64_t d = offset; d < offset + R; d += 2) pairs.emplace_back(d, d + 1);
    return pairs;
  }
  const int64_t half = R / blocks / 2;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t start = offset + block * 2 * half;
    for (int64_t i = 0; i < half; ++i) pairs.emplace_back(start + i, start + half + i);
  }
  return pairs;
}

// The instruction sets of this machine beyond the baseline.
inline std::vector<Isa> vector_isas() {
  std::vector<Isa> isas;
  for (const Isa isa : {Isa::kAvx2, Isa::kAvx512}) {
    if (has(isa)) isas.push_back(isa);
  }
  return isas;
}

// Reproducible random numbers; tests print the seed with SCOPED_TRACE.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  double normal() { return std::normal_distribution<double>()(engine_); }
  uint64_t bits() { return engine_(); }
  int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(engine_); }

 private:
  std::mt19937_64 engine_;
};

}  // namespace fused_rope::kernels::testing
