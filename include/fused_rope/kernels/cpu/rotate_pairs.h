// Loops over the pairs of a head that the compiler turns into vector instructions.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>

#include "fused_rope/kernels/cpu/f16c.h"
#include "fused_rope/kernels/cpu/isa.h"
#include "fused_rope/kernels/rotation.h"

// The iterations of the next loop share no memory, so it needs no check before it is vectorized.
#if defined(__clang__)
#define FUSED_ROPE_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define FUSED_ROPE_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif

// The same for a loop that is one vector long: GCC would unroll it before it is vectorized.
#if defined(__clang__)
#define FUSED_ROPE_ONE_VECTOR FUSED_ROPE_INDEPENDENT_ITERATIONS
#else
#define FUSED_ROPE_ONE_VECTOR FUSED_ROPE_INDEPENDENT_ITERATIONS _Pragma("GCC unroll 1")
#endif

namespace fused_rope::kernels {

// Rotates n pairs with the rounding of T: first elements from a on, second ones from b on. Inputs
// and outputs are the same elements or disjoint. Element is T or a buffer's float.
template <typename T, Precision kPrecision, typename Element>
void rotate_pairs(const Element* a, const Element* b, Element* out_a, Element* out_b,
                  const Wide<T>* c, const Wide<T>* s, int64_t n) {
  FUSED_ROPE_INDEPENDENT_ITERATIONS
  for (int64_t j = 0; j < n; ++j) {
    const Pair<T> pair = rotate_pair<T, kPrecision>(widen(a[j]), widen(b[j]), c[j], s[j]);
    out_a[j] = narrow<Element>(pair.a);
    out_b[j] = narrow<Element>(pair.b);
  }
}

// The same for n interleaved pairs. c and s hold one value per element, signed for rotate_element:
// all elements do the same, and only the partners need a shuffle.
template <typename T, Precision kPrecision, typename Element>
void rotate_interleaved(const Element* in, Element* out, const Wide<T>* c, const Wide<T>* s,
                        int64_t n) {
  FUSED_ROPE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < 2 * n; i += 2) {
    const Wide<T> a = widen(in[i]);
    const Wide<T> b = widen(in[i + 1]);
    out[i] = narrow<Element>(rotate_element<T, kPrecision>(a, b, c[i], s[i]));
    out[i + 1] = narrow<Element>(rotate_element<T, kPrecision>(b, a, c[i + 1], s[i + 1]));
  }
}

// Rotates n pairs of contiguous float16, interleaved or with elements n apart, converted by F16C in
// float32 buffers. c and s are those of rotate_interleaved or of rotate_pairs.
template <Precision kPrecision, bool kInterleaved>
void rotate_f16c(const Float16* in, Float16* out, const float* c, const float* s, int64_t n) {
  constexpr int64_t kPairs = 128;  // 1 KiB of buffers stays in L1
  float a[2 * kPairs];
  float* const b = a + kPairs;
  for (int64_t j = 0; j < n; j += kPairs) {
    const int64_t m = std::min(kPairs, n - j);
    if constexpr (kInterleaved) {
      widen_array(in + 2 * j, a, 2 * m);
      rotate_interleaved<Float16, kPrecision>(a, a, c + 2 * j, s + 2 * j, m);
      narrow_array(a, out + 2 * j, 2 * m);
    } else {
      widen_array(in + j, a, m);
      widen_array(in + n + j, b, m);
      rotate_pairs<Float16, kPrecision>(a, b, a, b, c + j, s + j, m);
      narrow_array(a, out + j, m);
      narrow_array(b, out + n + j, m);
    }
  }
}

// Two adjacent bfloat16 elements as one 32-bit word: vectors of words widen and narrow without
// shuffles.
struct TwoElements {
  float first, second;
};

inline constexpr bool kFirstIsLow = std::endian::native == std::endian::little;

inline TwoElements load_word(const BFloat16* from) {
  uint32_t word;
  std::memcpy(&word, from, sizeof(word));
  const float low = float_of(word << 16);
  const float high = float_of(word & 0xffff0000u);
  return kFirstIsLow ? TwoElements{low, high} : TwoElements{high, low};
}

// A NaN among x comes from bfloat16 elements or entries, or from an operation: it has no bits that
// rounding could carry.
inline void store_word(BFloat16* to, TwoElements x) {
  const uint32_t low = round_to_bfloat16(kFirstIsLow ? x.first : x.second);
  const uint32_t high = round_to_bfloat16(kFirstIsLow ? x.second : x.first);
  const uint32_t word = low >> 16 | (high & 0xffff0000u);
  std::memcpy(to, &word, sizeof(word));
}

// Rotates kWords words, each of which is a pair.
template <Precision kPrecision, int kWords>
void rotate_words(const BFloat16* in, BFloat16* out, const float* c, const float* s) {
  FUSED_ROPE_ONE_VECTOR
  for (int j = 0; j < kWords; ++j) {
    const TwoElements x = load_word(in + 2 * j);
    const auto [a, b] = rotate_pair<BFloat16, kPrecision>(x.first, x.second, c[j], s[j]);
    store_word(out + 2 * j, {a, b});
  }
}

// Rotates kWords words of first elements with as many of second ones. The two pairs of a word read
// c1 and s1, and c2 and s2.
template <Precision kPrecision, int kWords>
void rotate_words(const BFloat16* a, const BFloat16* b, BFloat16* out_a, BFloat16* out_b,
                  const float* c1, const float* s1, const float* c2, const float* s2) {
  FUSED_ROPE_ONE_VECTOR
  for (int i = 0; i < kWords; ++i) {
    const TwoElements x = load_word(a + 2 * i);
    const TwoElements y = load_word(b + 2 * i);
    const auto one = rotate_pair<BFloat16, kPrecision>(x.first, y.first, c1[i], s1[i]);
    const auto two = rotate_pair<BFloat16, kPrecision>(x.second, y.second, c2[i], s2[i]);
    store_word(out_a + 2 * i, {one.a, two.a});
    store_word(out_b + 2 * i, {one.b, two.b});
  }
}

// Rotates n pairs of contiguous bfloat16, interleaved or with elements n apart, by vectors of
// kWords words and a last one of kLast words (0: none). Without vectors (kWords = 0), one pair at a
// time. With elements n apart, c and s hold the entries of pairs 0, 2, 4, ... and after them those
// of pairs 1, 3, 5, ...
template <Precision kPrecision, bool kInterleaved, int kWords, int kLast>
class WordPairs {
 public:
  WordPairs(const BFloat16* in, BFloat16* out, const float* c, const float* s, int64_t n)
      : in_(in), out_(out), c_(c), s_(s), n_(n) {}

  void rotate() const {
    if constexpr (kWords == 0) {
      rotate_one_by_one();
    } else if constexpr (kLast == 0) {
      rotate_whole_vectors();
    } else {
      // The last vector overlaps the one before it. In place, it must read its elements first.
      BFloat16 a[2 * kLast], b[2 * kLast];
      const int64_t j = n_ - kLast * kPairsPerWord;
      rotate_vector<kLast>(j, a, b);
      rotate_whole_vectors();
      std::memcpy(out_ + first(j), a, sizeof(a));
      if (!kInterleaved) std::memcpy(out_ + second(j), b, sizeof(b));
    }
  }

 private:
  static constexpr int kPairsPerWord = kInterleaved ? 1 : 2;

  int64_t first(int64_t j) const { return kInterleaved ? 2 * j : j; }
  int64_t second(int64_t j) const { return kInterleaved ? 2 * j + 1 : n_ + j; }
  int64_t entry(int64_t j) const {
    return kInterleaved ? j : j / 2 + (j % 2 == 0 ? 0 : (n_ + 1) / 2);
  }

  // Rotates the pairs of kCount words from pair j on.
  template <int kCount>
  void rotate_vector(int64_t j, BFloat16* out_a, BFloat16* out_b) const {
    const float* const c = c_ + entry(j);
    const float* const s = s_ + entry(j);
    if constexpr (kInterleaved) {
      rotate_words<kPrecision, kCount>(in_ + first(j), out_a, c, s);
    } else {
      rotate_words<kPrecision, kCount>(in_ + first(j), in_ + second(j), out_a, out_b, c, s,
                                       c_ + entry(j + 1), s_ + entry(j + 1));
    }
  }

  void rotate_whole_vectors() const {
    constexpr int64_t kPairs = kWords * kPairsPerWord;
    for (int64_t j = 0; j + kPairs <= n_; j += kPairs) {
      rotate_vector<kWords>(j, out_ + first(j), out_ + second(j));
    }
  }

  void rotate_one_by_one() const {
    for (int64_t j = 0; j < n_; ++j) {
      rotate_pairs<BFloat16, kPrecision>(in_ + first(j), in_ + second(j), out_ + first(j),
                                         out_ + second(j), c_ + entry(j), s_ + entry(j), 1);
    }
  }

  const BFloat16* const in_;
  BFloat16* const out_;
  const float* const c_;
  const float* const s_;
  const int64_t n_;
};

// Calls f<kWords, kLast>() with the vectors of a WordPairs for n pairs. A call chooses once for all
// heads: with constant widths, a head of few elements has no branches.
template <int kPairsPerWord, typename F>
void choose_vectors(int64_t n, const F& f) {
  const auto choose_last = [&]<int kWords>() {
    const int64_t rest = n % (kWords * kPairsPerWord);
    if (rest == 0) return f.template operator()<kWords, 0>();
    if constexpr (kWords == 16) {
      if (rest <= 4 * kPairsPerWord) return f.template operator()<kWords, 4>();
    }
    if constexpr (kWords > 4) {
      if (rest <= kWords / 2 * kPairsPerWord) {
        return f.template operator()<kWords, kWords / 2>();
      }
    }
    f.template operator()<kWords, kWords>();
  };
  if (n >= 16 * kPairsPerWord) return choose_last.template operator()<16>();
  if (n >= 8 * kPairsPerWord) return choose_last.template operator()<8>();
  if (n >= 4 * kPairsPerWord) return choose_last.template operator()<4>();
  f.template operator()<0, 0>();
}

// Copies n bytes, 0 or at least 2, between disjoint arrays by moves of constant size, of which the
// last two may overlap.
inline void copy_bytes(const std::byte* from, std::byte* to, int64_t n) {
  const auto move = [=]<int kBytes>() {
    for (int64_t i = 0; i + kBytes <= n; i += kBytes) std::memcpy(to + i, from + i, kBytes);
    std::memcpy(to + n - kBytes, from + n - kBytes, kBytes);
  };
  if (n == 0) return;
  if (n >= 64) return move.template operator()<64>();
  if (n >= 32) return move.template operator()<32>();
  if (n >= 16) return move.template operator()<16>();
  if (n >= 8) return move.template operator()<8>();
  if (n >= 4) return move.template operator()<4>();
  move.template operator()<2>();
}

}  // namespace fused_rope::kernels
