// Instruction sets that the CPU kernel is compiled for. One is chosen at run time, so that one
// build of the library runs on every machine of its architecture.
#pragma once

#include <type_traits>

// Single functions are compiled for an instruction set and inline all that they call (flatten). If
// whole files were, the linker could merge an inline function that needs AVX-512 into baseline
// code.
#if defined(__x86_64__)
#define FUSED_ROPE_AVX2 gnu::target("avx2,f16c")
#define FUSED_ROPE_AVX512 gnu::target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

namespace fused_rope::kernels {

// kBaseline is what the compiler targets by default.
enum class Isa { kBaseline, kAvx2, kAvx512 };

// Whether this machine has an instruction set.
inline bool has(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return has(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
#endif
    default:
      return isa == Isa::kBaseline;
  }
}

inline Isa best_isa() {
  return has(Isa::kAvx512) ? Isa::kAvx512 : has(Isa::kAvx2) ? Isa::kAvx2 : Isa::kBaseline;
}

template <Isa kIsa>
using IsaConstant = std::integral_constant<Isa, kIsa>;

#if defined(__x86_64__)
template <typename F>
[[FUSED_ROPE_AVX2, gnu::flatten]] void run_avx2(const F& f) {
  f(IsaConstant<Isa::kAvx2>());
}

template <typename F>
[[FUSED_ROPE_AVX512, gnu::flatten]] void run_avx512(const F& f) {
  f(IsaConstant<Isa::kAvx512>());
}
#endif

// Calls f(IsaConstant<isa>()), compiled for `isa`, which this machine must have.
template <typename F>
void run_on(Isa isa, const F& f) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return run_avx2(f);
    case Isa::kAvx512:
      return run_avx512(f);
#endif
    default:
      return f(IsaConstant<Isa::kBaseline>());
  }
}

}  // namespace fused_rope::kernels
