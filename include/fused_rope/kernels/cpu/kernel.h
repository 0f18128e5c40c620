// The CPU kernel: rotates a range of tokens. The caller distributes ranges over threads.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "fused_rope/kernels/cpu/f16c.h"
#include "fused_rope/kernels/cpu/isa.h"
#include "fused_rope/kernels/rotation.h"
#include "fused_rope/kernels/rows.h"

// The iterations of the next loop share no memory, so it needs no check before it is vectorized.
#if defined(__clang__)
#define FUSED_ROPE_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define FUSED_ROPE_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif

namespace fused_rope::kernels {

// A token whose table row or output row does not exist.
struct BadRow {
  int64_t b, s;
  int64_t index;
  bool output;  // a row of out_rows, not of the table
};

// The first token in [begin, end) of the B*S tokens that has a row out of range, if any.
inline std::optional<BadRow> find_bad_row(const RotateParams& p, int64_t begin, int64_t end) {
  std::vector<int64_t> axes = {0};
  if (p.axes != nullptr) {
    bool used[kMaxAxes] = {};
    for (int64_t j = 0; j < p.pairing.P; ++j) used[p.axes[j]] = true;
    axes.clear();
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      if (used[axis]) axes.push_back(axis);
    }
  }
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

// A stride of 1 at compile time, so that loops vectorize; other strides are int64_t.
using One = std::integral_constant<int64_t, 1>;

// Rotates n pairs with the rounding of T: first elements from a on, second ones from b on. Inputs
// and outputs are the same elements or disjoint. Element is T or a buffer's float.
template <typename T, Precision kPrecision, typename Element, typename Stride>
void rotate_pairs(const Element* a, const Element* b, Stride in_stride, Element* out_a,
                  Element* out_b, Stride out_stride, const Wide<T>* c, const Wide<T>* s,
                  int64_t n) {
  FUSED_ROPE_INDEPENDENT_ITERATIONS
  for (int64_t j = 0; j < n; ++j) {
    const Pair<T> pair =
        rotate_pair<T, kPrecision>(widen(a[j * in_stride]), widen(b[j * in_stride]), c[j], s[j]);
    out_a[j * out_stride] = narrow<Element>(pair.a);
    out_b[j * out_stride] = narrow<Element>(pair.b);
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

// Rotates n pairs of contiguous float16, converted by F16C in float32 buffers. c and s are those of
// rotate_interleaved where distance is 1, else of rotate_pairs.
template <Precision kPrecision>
void rotate_f16c(const Float16* in, Float16* out, int64_t distance, const float* c, const float* s,
                 int64_t n) {
  constexpr int64_t kPairs = 128;  // 1 KiB of buffers stays in L1
  float a[2 * kPairs];
  float* const b = a + kPairs;
  for (int64_t j = 0; j < n; j += kPairs) {
    const int64_t m = std::min(kPairs, n - j);
    if (distance == 1) {
      widen_array(in + 2 * j, a, 2 * m);
      rotate_interleaved<Float16, kPrecision>(a, a, c + 2 * j, s + 2 * j, m);
      narrow_array(a, out + 2 * j, 2 * m);
    } else {
      widen_array(in + j, a, m);
      widen_array(in + distance + j, b, m);
      rotate_pairs<Float16, kPrecision>(a, b, One(), a, b, One(), c + j, s + j, m);
      narrow_array(a, out + j, m);
      narrow_array(b, out + distance + j, m);
    }
  }
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

  template <typename F>
  void for_each(const F& f) const {
    for (int64_t i = 0; i < count; ++i) {
      f(in + i * in_stride, out + i * out_stride, slot + i * slot_stride);
    }
  }
};

// Rotates whole tokens. Holds the widened table rows of some tokens, one per slot, while it rotates
// their heads.
template <typename T, Precision kPrecision>
class TokenRotator {
 public:
  TokenRotator(const RotateParams& params, Isa isa)
      : p_(params),
        isa_(widest(isa)),
        slots_(slots()),
        cos_(slots_ * params.pairing.P),
        sin_(cos_.size()),
        element_cos_(interleaved() ? 2 * cos_.size() : 0),
        element_sin_(element_cos_.size()) {
    find_spans();
  }

  // Tokens [begin, end) of the B*S tokens.
  void rotate(int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t s = begin % p_.S;
      const int64_t n = std::min({slots_, end - begin, p_.S - s});
      rotate_block(begin / p_.S, s, n);
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

  // Pairs [begin, end) with evenly spaced elements and one axis of positions.
  struct Span {
    int64_t begin, end;
    int64_t element;  // the first of the first pair
    int64_t axis;
    bool copied;  // in the current token

    int64_t size() const { return end - begin; }
  };

  bool interleaved() const { return p_.pairing.distance == 1; }

  // Whether the tokens of a head are closer together in memory than the heads of a token.
  static bool by_head(const TensorParams& t) {
    return !t.scattered && t.in_strides.s < t.in_strides.h;
  }

  // Tokens whose table rows are held: several where heads are rotated token by token.
  int64_t slots() const {
    constexpr int64_t kEntries =
        16384;  // of cos and of sin: 128 KiB of float32, half of a small L2
    const bool several = !p_.per_head && std::any_of(p_.tensors, p_.tensors + p_.count, by_head);
    if (!several) return 1;
    return std::clamp<int64_t>(kEntries / std::max<int64_t>(p_.pairing.P, 1), 1, p_.S);
  }

  void find_spans() {
    const int64_t length = interleaved() ? p_.pairing.P : p_.pairing.distance;
    for (int64_t j = 0; j < p_.pairing.P; ++j) {
      const int64_t axis = p_.axes == nullptr ? 0 : p_.axes[j];
      if (j % length == 0 || axis != spans_.back().axis) {
        spans_.push_back({j, j, p_.pairing.first(j), axis, false});
      }
      spans_.back().end = j + 1;
    }
  }

  // Tokens [s, s + n) of batch entry b, one by one if some of them are copied.
  void rotate_block(int64_t b, int64_t s, int64_t n) {
    bool copied = false;
    for (int64_t i = 0; i < n && !p_.per_head; ++i) copied |= load_rows(b, s + i, 0, i);
    if (copied && n > 1) {
      for (int64_t i = 0; i < n; ++i) rotate_block(b, s + i, 1);
      return;
    }
    for (int i = 0; i < p_.count; ++i) {
      const TensorParams& t = p_.tensors[i];
      if (n > 1 && by_head(t)) {
        for (int64_t h = 0; h < t.H; ++h) {
          rotate_heads(
              t, {input(t, b, s, h), output(t, b, s, h), t.in_strides.s, t.out_strides.s, n, 0, 1});
        }
      } else {
        for (int64_t slot = 0; slot < n; ++slot) rotate_token(t, b, s + slot, slot);
      }
    }
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
      load_rows(b, s, h, slot);
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

  // Returns whether the token has pairs that are copied. The tables have the type of x or its
  // compute type.
  bool load_rows(int64_t b, int64_t s, int64_t h, int64_t slot) {
    bool copied = false;
    Wide<T>* const cos_row = cos_.data() + slot * p_.pairing.P;
    Wide<T>* const sin_row = sin_.data() + slot * p_.pairing.P;
    const auto load = [&]<typename Table>() {
      const auto* cos = static_cast<const Table*>(p_.cos.data);
      const auto* sin = static_cast<const Table*>(p_.sin.data);
      for (Span& span : spans_) {
        const Row row = table_row(p_.rows, b, s, span.axis);
        span.copied = row.copied;
        copied |= row.copied;
        if (row.copied) continue;
        load_entries(cos + table_offset(p_.cos, row.index, b, s, h), p_.cos.j, span, cos_row);
        load_entries(sin + table_offset(p_.sin, row.index, b, s, h), p_.sin.j, span, sin_row);
        finish_entries(span, slot);
      }
    };
    p_.table_dtype == p_.dtype ? load.template operator()<T>()
                               : load.template operator()<Wide<T>>();
    return copied;
  }

  template <typename Table>
  static void load_entries(const Table* row, int64_t stride, const Span& span, Wide<T>* to) {
    const auto load = [&](auto known_stride) {
      for (int64_t j = span.begin; j < span.end; ++j) {
        to[j] = rounded<T, kPrecision>(widen(row[j * known_stride]));
      }
    };
    stride == 1 ? load(One()) : load(stride);
  }

  // Negates sin for the inverse and expands rows for rotate_interleaved.
  void finish_entries(const Span& span, int64_t slot) {
    const int64_t first = slot * p_.pairing.P;
    if (p_.inverse) {
      for (int64_t j = first + span.begin; j < first + span.end; ++j) sin_[j] = -sin_[j];
    }
    if (!interleaved()) return;
    for (int64_t j = first + span.begin; j < first + span.end; ++j) {
      element_cos_[2 * j] = element_cos_[2 * j + 1] = cos_[j];
      element_sin_[2 * j] = -sin_[j];
      element_sin_[2 * j + 1] = sin_[j];
    }
  }

  // Only contiguous heads gain from vector instructions.
  void rotate_heads(const TensorParams& t, const HeadRange<T>& heads) const {
    const int64_t in_d = t.in_strides.d;
    const int64_t out_d = t.out_strides.d;
    if (in_d == 1 && out_d == 1) {
      run_on(isa_, [this, heads](auto isa) {
        heads.for_each([this, isa](const T* in, T* out, int64_t slot) {
          rotate_head(isa, in, out, One(), One(), slot);
        });
      });
    } else {
      heads.for_each([&](const T* in, T* out, int64_t slot) {
        rotate_head(IsaConstant<Isa::kBaseline>(), in, out, in_d, out_d, slot);
      });
    }
  }

  template <Isa kIsa, typename Stride>
  void rotate_head(IsaConstant<kIsa> isa, const T* in, T* out, Stride in_d, Stride out_d,
                   int64_t slot) const {
    const auto copy = [=, this](int64_t begin, int64_t end) {
      if (begin != end && !p_.in_place) copy_elements(in, out, in_d, out_d, begin, end);
    };
    copy(0, p_.pairing.offset);
    for (const Span& span : spans_) {
      if (!span.copied) {
        rotate_span(isa, in + span.element * in_d, out + span.element * out_d, in_d, out_d, span,
                    slot);
      } else if (interleaved()) {
        copy(span.element, span.element + 2 * span.size());
      } else {
        copy(span.element, span.element + span.size());
        copy(span.element + p_.pairing.distance, span.element + p_.pairing.distance + span.size());
      }
    }
    copy(p_.pairing.end(), p_.D);
  }

  template <Isa kIsa, typename Stride>
  void rotate_span(IsaConstant<kIsa>, const T* in, T* out, Stride in_d, Stride out_d,
                   const Span& span, int64_t slot) const {
    const int64_t distance = p_.pairing.distance;
    const int64_t first = slot * p_.pairing.P + span.begin;
    const Wide<T>* c = cos_.data() + first;
    const Wide<T>* s = sin_.data() + first;
    const int64_t n = span.size();
    if constexpr (std::is_same_v<Stride, One>) {
      if (interleaved()) {
        c = element_cos_.data() + 2 * first;
        s = element_sin_.data() + 2 * first;
      }
      if constexpr (std::is_same_v<T, Float16> && kIsa != Isa::kBaseline) {
        return rotate_f16c<kPrecision>(in, out, distance, c, s, n);
      }
      if (interleaved()) return rotate_interleaved<T, kPrecision>(in, out, c, s, n);
      rotate_pairs<T, kPrecision>(in, in + distance, in_d, out, out + distance, out_d, c, s, n);
    } else {
      const int64_t step = interleaved() ? 2 : 1;
      rotate_pairs<T, kPrecision>(in, in + distance * in_d, step * in_d, out,
                                  out + distance * out_d, step * out_d, c, s, n);
    }
  }

  template <typename Stride>
  static void copy_elements(const T* in, T* out, Stride in_d, Stride out_d, int64_t begin,
                            int64_t end) {
    if constexpr (std::is_same_v<Stride, One>) {
      std::memcpy(out + begin, in + begin, static_cast<size_t>(end - begin) * sizeof(T));
    } else {
      for (int64_t d = begin; d < end; ++d) out[d * out_d] = in[d * in_d];
    }
  }

  const RotateParams& p_;
  const Isa isa_;
  const int64_t slots_;
  std::vector<Wide<T>> cos_, sin_;                  // [slots, P], sin negated for the inverse
  std::vector<Wide<T>> element_cos_, element_sin_;  // [slots, 2P], for rotate_interleaved
  std::vector<Span> spans_;
};

// Rotates tokens [begin, end) of the B*S tokens with `isa`, which does not change results. Rows
// must be in range: call find_bad_row first.
inline void rotate_tokens(const RotateParams& p, int64_t begin, int64_t end, Isa isa = best_isa()) {
  visit(p.dtype, [&]<typename T>() {
    const auto run = [&]<Precision kPrecision>() {
      TokenRotator<T, kPrecision>(p, isa).rotate(begin, end);
    };
    if constexpr (sizeof(T) == 2) {  // in float32 and float64 the two precisions are equal
      if (p.precision == Precision::kModel) return run.template operator()<Precision::kModel>();
    }
    run.template operator()<Precision::kFp32>();
  });
}

}  // namespace fused_rope::kernels
