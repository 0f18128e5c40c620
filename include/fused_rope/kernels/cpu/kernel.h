// The CPU kernel: rotates a range of tokens. The caller distributes ranges over threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <type_traits>
#include <vector>

#include "fused_rope/kernels/cpu/norm.h"
#include "fused_rope/kernels/cpu/rotate_pairs.h"
#include "fused_rope/kernels/cpu/store.h"
#include "fused_rope/kernels/cpu/table_rows.h"

namespace fused_rope::kernels {

// A token whose table row, or whose output row or slot, does not exist.
struct BadRow {
  int64_t b, s;
  int64_t index;
  bool output;  // an output row or a slot, not a row of the table
};

// The first token in [begin, end) of the B*S tokens that has a row out of range, if any.
inline std::optional<BadRow> find_bad_row(const RotateParams& p, int64_t begin, int64_t end) {
  const std::vector<int64_t> axes = used_axes(p);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / p.S;
    const int64_t s = token % p.S;
    for (const int64_t axis : axes) {
      const Row row = table_row(p.rows, b, s, axis);
      if (!p.rows.gathered && !row.copied && !is_row(row.index, p.rows.M))
        return BadRow{b, s, row.index, false};
    }
    if (p.rows.out_rows.data != nullptr) {
      const int64_t row = output_row(p.rows, b, s);
      if (row != -1 && !is_row(row, p.rows.out_rows_limit)) return BadRow{b, s, row, true};
    }
  }
  return std::nullopt;
}

// Heads to rotate one after another: all heads of a token, which share a table row, or consecutive
// tokens of one head, which read consecutive slots.
template <typename T>
struct HeadRange {
  const T* in;
  T* out;
  int64_t in_stride, out_stride;
  int64_t count;
  int64_t slot, slot_stride;
};

// Rotates whole tokens. Holds the table rows of some tokens while it rotates their heads.
template <typename T, Precision kPrecision>
class TokenRotator {
 public:
  TokenRotator(const RotateParams& params, Isa isa)
      : p_(params),
        isa_(params.norm == nullptr ? widest(isa) : isa),
        store_isa_(isa),
        slots_(slots()),
        table_(params, slots_,
               params.norm == nullptr || HeadNormalizer<T, kPrecision>::has_words(params)),
        head_(params.D),
        original_(params.axes == nullptr ? 0 : 2 * params.pairing.P) {
    if (params.norm != nullptr) normalizer_.emplace(params);
  }

  // Tokens [begin, end) of the B*S tokens.
  void rotate(int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t s = begin % p_.S;
      const int64_t n = std::min({slots_, end - begin, p_.S - s});
      rotate_tokens(begin / p_.S, s, n);
      begin += n;
    }
  }

 private:
  // The best instruction set up to `isa` for this type. In float32, baseline code is memory-bound
  // and wider vectors were slower (benchmarks/NOTES.md); F16C converts eight elements at a time.
  static Isa widest(Isa isa) {
    if (std::is_same_v<T, float>) return Isa::kBaseline;
    const bool converts_only = std::is_same_v<T, Float16> && kPrecision == Precision::kFp32;
    return converts_only ? std::min(isa, Isa::kAvx2) : isa;
  }

  bool interleaved() const { return p_.pairing.distance == 1; }

  // Whether the tokens of a head are closer together in memory than the heads of a token.
  bool by_head(const TensorParams& t) const {
    return !t.scattered && !is_cached(t) && t.in_strides.s < t.in_strides.h;
  }

  // Whether a tensor, k, goes to the cache, token by token.
  bool is_cached(const TensorParams& t) const {
    return p_.cache != nullptr && &t == &p_.tensors[1];
  }

  // Tokens whose table rows are held: several where heads are rotated token by token.
  int64_t slots() const {
    constexpr int64_t kEntries =
        16384;  // of cos and of sin: 128 KiB of float32, half of a small L2
    const bool several =
        !p_.per_head && std::any_of(p_.tensors, p_.tensors + p_.count,
                                    [this](const TensorParams& t) { return by_head(t); });
    if (!several) return 1;
    return std::clamp<int64_t>(kEntries / std::max<int64_t>(p_.pairing.P, 1), 1, p_.S);
  }

  // Tokens [s, s + n) of batch entry b.
  void rotate_tokens(int64_t b, int64_t s, int64_t n) {
    for (int64_t i = 0; i < n && !p_.per_head; ++i) table_.load(b, s + i, 0, i, isa_);
    for (int i = 0; i < p_.count; ++i) {
      const TensorParams& t = p_.tensors[i];
      if (n > 1 && by_head(t)) {
        for (int64_t h = 0; h < t.H; ++h) {
          rotate_heads(
              t, {input(t, b, s, h), output(t, b, s, h), t.in_strides.s, t.out_strides.s, n, 0, 1});
        }
      } else {
        for (int64_t slot = 0; slot < n; ++slot) {
          rotate_token(t, b, s + slot, slot);
          if (is_cached(t)) store_token(b, s + slot);
        }
      }
    }
  }

  // Stores k, rotated, and v of token (b, s) in its slot of the cache, if it has one.
  void store_token(int64_t b, int64_t s) const {
    const int64_t slot = output_row(p_.rows, b, s);
    if (slot == -1) return;
    const CacheParams& cache = *p_.cache;
    const auto store = [&](const CacheTensorParams& to, const T* from, int64_t H, int64_t D,
                           const Strides& strides) {
      kernels::store_token<T>(cache, to, {from, H, D, strides.h, strides.d}, slot, store_isa_);
    };
    const TensorParams& k = p_.tensors[1];
    const TensorParams& v = cache.values;
    store(cache.k, output(k, b, s, 0), k.H, p_.D, k.out_strides);
    if (v.in != nullptr) store(cache.v, input(v, b, s, 0), v.H, cache.values_D, v.in_strides);
  }

  void rotate_token(const TensorParams& t, int64_t b, int64_t s, int64_t slot) {
    const int64_t row = t.scattered ? output_row(p_.rows, b, s) : s;
    if (t.scattered && row == -1) return;
    const auto rotate_range = [&](int64_t h, int64_t count) {
      rotate_heads(t, {input(t, b, s, h), output(t, b, row, h), t.in_strides.h, t.out_strides.h,
                       count, slot, 0});
    };
    if (!p_.per_head) return rotate_range(0, t.H);
    for (int64_t h = 0; h < t.H; ++h) {
      table_.load(b, s, h, slot, isa_);
      rotate_range(h, 1);
    }
  }

  static const T* input(const TensorParams& t, int64_t b, int64_t s, int64_t h) {
    const Strides& strides = t.in_strides;
    return static_cast<const T*>(t.in) + b * strides.b + s * strides.s + h * strides.h;
  }

  static T* output(const TensorParams& t, int64_t b, int64_t row, int64_t h) {
    const Strides& strides = t.out_strides;
    return static_cast<T*>(t.out) + (t.scattered ? 0 : b * strides.b) + row * strides.s +
           h * strides.h;
  }

  void rotate_heads(const TensorParams& t, const HeadRange<T>& heads) {
    if (normalizer_.has_value()) return normalize_heads(t, heads);
    run_on(isa_, [this, heads, in_d = t.in_strides.d, out_d = t.out_strides.d](auto isa) {
      choose_loop<isa()>(
          [=, this](const auto& rotate) { this->rotate_heads(heads, in_d, out_d, rotate); });
    });
  }

  void normalize_heads(const TensorParams& t, const HeadRange<T>& heads) {
    const auto tensor = static_cast<int>(&t - p_.tensors);
    visit(p_.norm->cast, [&, this]<Cast kCast>() {
      run_on(isa_, [&, this](auto) {
        normalizer_->template forward<kCast>(tensor, {heads.in, t.in_strides.d}, heads.in_stride,
                                             {heads.out, t.out_strides.d}, heads.out_stride,
                                             heads.count, table_, heads.slot, heads.slot_stride);
      });
    });
  }

  // Pairs whose first elements are contiguous, or all interleaved ones.
  int64_t block_size() const { return interleaved() ? p_.pairing.P : p_.pairing.distance; }

  // Calls f(rotate), where rotate(in, out, cos, sin) rotates a block of contiguous pairs.
  template <Isa kIsa, typename F>
  void choose_loop(const F& f) const {
    interleaved() ? choose_loop<kIsa, true>(f) : choose_loop<kIsa, false>(f);
  }

  template <Isa kIsa, bool kInterleaved, typename F>
  void choose_loop(const F& f) const {
    const int64_t n = block_size();
    if constexpr (std::is_same_v<T, BFloat16>) {
      choose_vectors<kInterleaved ? 1 : 2>(n, [&, n]<int kWords, int kLast>() {
        f([n](const T* in, T* out, const float* c, const float* s) {
          WordPairs<kPrecision, kInterleaved, kWords, kLast>(in, out, c, s, n).rotate();
        });
      });
    } else {
      f([n](const T* in, T* out, const Wide<T>* c, const Wide<T>* s) {
        if constexpr (std::is_same_v<T, Float16> && kIsa != Isa::kBaseline) {
          rotate_f16c<kPrecision, kInterleaved>(in, out, c, s, n);
        } else if constexpr (kInterleaved) {
          rotate_interleaved<T, kPrecision>(in, out, c, s, n);
        } else {
          rotate_pairs<T, kPrecision>(in, in + n, out, out + n, c, s, n);
        }
      });
    }
  }

  // Rotates heads by `rotate`; those that are not contiguous in a buffer. What the compiler thinks
  // a store could change is read before the loop.
  template <typename Rotate>
  void rotate_heads(const HeadRange<T> heads, int64_t in_d, int64_t out_d, const Rotate rotate) {
    const bool contiguous = in_d == 1 && out_d == 1;
    const int64_t D = p_.D, P = p_.pairing.P, offset = p_.pairing.offset;
    const int64_t block = block_size(), row_size = table_.size();
    const Wide<T>* const cos = table_.cos();
    const Wide<T>* const sin = table_.sin();
    const Copied* const copied = table_.copied();
    for (int64_t i = 0; i < heads.count; ++i) {
      const T* in = heads.in + i * heads.in_stride;
      T* out = heads.out + i * heads.out_stride;
      const int64_t slot = heads.slot + i * heads.slot_stride;
      const bool all = copied[slot] == Copied::kAll;
      if (!contiguous) in = out = gather(in, in_d);
      if (in != out) {
        copy_elements(in, out, 0, all ? D : offset);
        if (!all) copy_elements(in, out, offset + 2 * P, D);
      }
      if (!all) {
        const bool some = copied[slot] == Copied::kSome;
        const T* const original = some && in == out ? keep_original(in + offset) : in + offset;
        for (int64_t first = 0; first < P; first += block) {
          const int64_t entry = slot * row_size + first;
          rotate(in + offset + 2 * first, out + offset + 2 * first, cos + entry, sin + entry);
        }
        if (some) table_.restore(original, out + offset, slot);
      }
      if (!contiguous) scatter(heads.out + i * heads.out_stride, out_d);
    }
  }

  static void copy_elements(const T* in, T* out, int64_t begin, int64_t end) {
    copy_bytes(reinterpret_cast<const std::byte*>(in + begin),
               reinterpret_cast<std::byte*>(out + begin),
               (end - begin) * static_cast<int64_t>(sizeof(T)));
  }

  // The elements of a head to gather and scatter: in place, none but the rotated ones.
  int64_t first_moved() const { return p_.in_place ? p_.pairing.offset : 0; }
  int64_t end_moved() const { return p_.in_place ? p_.pairing.end() : p_.D; }

  [[gnu::noinline]] T* gather(const T* in, int64_t stride) {
    for (int64_t d = first_moved(); d < end_moved(); ++d) head_[d] = in[d * stride];
    return head_.data();
  }

  [[gnu::noinline]] void scatter(T* out, int64_t stride) const {
    for (int64_t d = first_moved(); d < end_moved(); ++d) out[d * stride] = head_[d];
  }

  [[gnu::noinline]] const T* keep_original(const T* in) {
    std::copy_n(in, original_.size(), original_.data());
    return original_.data();
  }

  const RotateParams& p_;
  const Isa isa_, store_isa_;
  const int64_t slots_;
  TableRows<T, kPrecision> table_;
  std::vector<T> head_;      // a head whose elements are not contiguous
  std::vector<T> original_;  // its R elements before the rotation
  std::optional<HeadNormalizer<T, kPrecision>> normalizer_;
};

// Rotates tokens [begin, end) of the B*S tokens with `isa`, which does not change results. Rows
// must be in range: call find_bad_row first.
inline void rotate_tokens(const RotateParams& p, int64_t begin, int64_t end, Isa isa = best_isa()) {
  visit(p, [&]<typename T, Precision kPrecision>() {
    if (p.cache == nullptr || p.tensors[1].out != nullptr) {
      return TokenRotator<T, kPrecision>(p, isa).rotate(begin, end);
    }
    // All tokens of k pass through one buffer.
    RotateParams buffered = p;
    TensorParams& k = buffered.tensors[1];
    std::vector<T> token(k.H * p.D);
    k.out = token.data();
    k.out_strides = {0, 0, p.D, 1};
    TokenRotator<T, kPrecision>(buffered, isa).rotate(begin, end);
  });
}

}  // namespace fused_rope::kernels
