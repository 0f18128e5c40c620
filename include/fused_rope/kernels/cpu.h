// The CPU kernel: rotates a range of tokens. The caller spreads ranges over threads.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "fused_rope/kernels/f16c.h"
#include "fused_rope/kernels/isa.h"
#include "fused_rope/kernels/rows.h"

// The next loop's iterations touch no common memory: it may be vectorised without asking.
#if defined(__clang__)
#define FUSED_ROPE_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define FUSED_ROPE_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif

namespace fused_rope {

// A token whose table row or output row does not exist.
struct BadRow {
  int64_t b, s;
  int64_t index;
  bool output;  // of out_rows, otherwise of the table
};

// The first token in [begin, end) of the B*S tokens that has a row out of range, if any.
inline std::optional<BadRow> find_bad_row(const RotateParams& p, int64_t begin, int64_t end) {
  std::vector<int64_t> axes = {0};
  if (p.axes != nullptr) {
    bool used[kMaxAxes] = {};
    for (int64_t j = 0; j < p.lanes.P; ++j) used[p.axes[j]] = true;
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

// A stride of one that the compiler knows, which lets it vectorise; others are int64_t.
using One = std::integral_constant<int64_t, 1>;

// Rotates pairs [0, n) whose members start at a and b and follow each other at `step` lanes, as T
// does it. Inputs and outputs are the same lanes or disjoint.
template <typename T, Precision kPrecision, typename Lane, typename Step>
void rotate_run(const Lane* a, const Lane* b, Step in_step, Lane* out_a, Lane* out_b, Step out_step,
                const Wide<T>* c, const Wide<T>* s, int64_t n) {
  FUSED_ROPE_INDEPENDENT_ITERATIONS
  for (int64_t j = 0; j < n; ++j) {
    const Pair<T> pair =
        rotate_pair<T, kPrecision>(widen(a[j * in_step]), widen(b[j * in_step]), c[j], s[j]);
    out_a[j * out_step] = narrow<Lane>(pair.a);
    out_b[j * out_step] = narrow<Lane>(pair.b);
  }
}

// The same for n pairs of neighbouring lanes. c and s hold one value a lane, signed as
// rotate_member takes it: all lanes do the same, and only the partner's takes a shuffle.
template <typename T, Precision kPrecision, typename Lane>
void rotate_neighbours(const Lane* in, Lane* out, const Wide<T>* c, const Wide<T>* s, int64_t n) {
  FUSED_ROPE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < 2 * n; i += 2) {
    const Wide<T> a = widen(in[i]);
    const Wide<T> b = widen(in[i + 1]);
    out[i] = narrow<Lane>(rotate_member<T, kPrecision>(a, b, c[i], s[i]));
    out[i + 1] = narrow<Lane>(rotate_member<T, kPrecision>(b, a, c[i + 1], s[i + 1]));
  }
}

// Rotates n pairs of float16 whose members lie side by side, `distance` apart, in float32 buffers:
// for machines with F16C. c and s are those of rotate_run or, of neighbours, of rotate_neighbours.
template <Precision kPrecision>
void rotate_f16c(const Float16* in, Float16* out, int64_t distance, const float* c, const float* s,
                 int64_t n) {
  constexpr int64_t kPairs = 128;
  float a[2 * kPairs];
  float* const b = a + kPairs;
  for (int64_t j = 0; j < n; j += kPairs) {
    const int64_t m = std::min(kPairs, n - j);
    if (distance == 1) {
      widen_lanes(in + 2 * j, a, 2 * m);
      rotate_neighbours<Float16, kPrecision>(a, a, c + 2 * j, s + 2 * j, m);
      narrow_lanes(a, out + 2 * j, 2 * m);
    } else {
      widen_lanes(in + j, a, m);
      widen_lanes(in + distance + j, b, m);
      rotate_run<Float16, kPrecision>(a, b, One(), a, b, One(), c + j, s + j, m);
      narrow_lanes(a, out + j, m);
      narrow_lanes(b, out + distance + j, m);
    }
  }
}

// Rows of lanes that are rotated one after another: the heads of a token, which share a row of the
// table, or neighbouring tokens of a head, each with the next one.
template <typename T>
struct LaneRows {
  const T* in;
  T* out;
  int64_t in_step, out_step;
  int64_t count;
  int64_t slot, slot_step;  // of the table rows

  template <typename F>
  void for_each(const F& f) const {
    for (int64_t i = 0; i < count; ++i) {
      f(in + i * in_step, out + i * out_step, slot + i * slot_step);
    }
  }
};

// Rotates whole tokens: holds the table rows of some tokens, widened, while their heads pass.
template <typename T, Precision kPrecision>
class TokenRotator {
 public:
  TokenRotator(const RotateParams& params, Isa isa)
      : p_(params),
        isa_(widest(isa)),
        slots_(slots()),
        cos_(slots_ * params.lanes.P),
        sin_(cos_.size()),
        lane_cos_(neighbours() ? 2 * cos_.size() : 0),
        lane_sin_(lane_cos_.size()) {
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
  // What gains from `isa` at most. In float32, baseline code keeps up with memory, and wider
  // vectors fell behind it (benchmarks/NOTES.md); float16 is converted eight lanes at a time.
  static Isa widest(Isa isa) {
    if (std::is_same_v<T, float>) return Isa::kBaseline;
    const bool converts_only = std::is_same_v<T, Float16> && kPrecision == Precision::kFp32;
    return converts_only ? std::min(isa, Isa::kAvx2) : isa;
  }

  // Pairs [begin, end), whose members follow each other evenly and whose positions are of one axis.
  struct Span {
    int64_t begin, end;
    int64_t lane;  // of the first pair's first member
    int64_t axis;
    bool copied;  // not rotated, in the token at hand

    int64_t size() const { return end - begin; }
  };

  bool neighbours() const { return p_.lanes.distance == 1; }

  // Whether the tokens of a head lie closer together than the heads of a token.
  static bool by_head(const TensorParams& t) {
    return !t.scattered && t.in_strides.s < t.in_strides.h;
  }

  // How many tokens' table rows are held: several where the tokens of a head pass one by one.
  int64_t slots() const {
    constexpr int64_t kEntries = 16384;  // of cos and of sin: half of a small L2 cache
    const bool several = !p_.per_head && std::any_of(p_.tensors, p_.tensors + p_.count, by_head);
    if (!several) return 1;
    return std::clamp<int64_t>(kEntries / std::max<int64_t>(p_.lanes.P, 1), 1, p_.S);
  }

  void find_spans() {
    const int64_t length = neighbours() ? p_.lanes.P : p_.lanes.distance;
    for (int64_t j = 0; j < p_.lanes.P; ++j) {
      const int64_t axis = p_.axes == nullptr ? 0 : p_.axes[j];
      if (j % length == 0 || axis != spans_.back().axis) {
        spans_.push_back({j, j, p_.lanes.first(j), axis, false});
      }
      spans_.back().end = j + 1;
    }
  }

  // Tokens [s, s + n) of batch entry b: one by one where some of them are not rotated.
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
          rotate_rows(
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
    const auto rotate_heads = [&](int64_t h, int64_t count) {
      rotate_rows(t, {input(t, b, s, h), output(t, b, row, h), t.in_strides.h, t.out_strides.h,
                      count, slot, 0});
    };
    if (!p_.per_head) return rotate_heads(0, t.H);
    for (int64_t h = 0; h < t.H; ++h) {
      load_rows(b, s, h, slot);
      rotate_heads(h, 1);
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

  // Whether there are pairs that the token does not rotate.
  bool load_rows(int64_t b, int64_t s, int64_t h, int64_t slot) {
    bool copied = false;
    Wide<T>* const cos_row = cos_.data() + slot * p_.lanes.P;
    Wide<T>* const sin_row = sin_.data() + slot * p_.lanes.P;
    visit(p_.table_dtype, [&]<typename Table>() {
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
    });
    return copied;
  }

  template <typename Table>
  static void load_entries(const Table* row, int64_t stride, const Span& span, Wide<T>* to) {
    const auto load = [&](auto step) {
      for (int64_t j = span.begin; j < span.end; ++j) {
        to[j] = rounded<T, kPrecision>(widen(row[j * step]));
      }
    };
    stride == 1 ? load(One()) : load(stride);
  }

  // What follows from the entries: the inverse's sign, and what lanes of neighbouring pairs take.
  void finish_entries(const Span& span, int64_t slot) {
    const int64_t first = slot * p_.lanes.P;
    if (p_.inverse) {
      for (int64_t j = first + span.begin; j < first + span.end; ++j) sin_[j] = -sin_[j];
    }
    if (!neighbours()) return;
    for (int64_t j = first + span.begin; j < first + span.end; ++j) {
      lane_cos_[2 * j] = lane_cos_[2 * j + 1] = cos_[j];
      lane_sin_[2 * j] = -sin_[j];
      lane_sin_[2 * j + 1] = sin_[j];
    }
  }

  // Only rows whose lanes lie side by side are worth an instruction set of their own.
  void rotate_rows(const TensorParams& t, const LaneRows<T>& rows) const {
    const int64_t in_d = t.in_strides.d;
    const int64_t out_d = t.out_strides.d;
    if (in_d == 1 && out_d == 1) {
      run_on(isa_, [this, rows](auto isa) {
        rows.for_each([this, isa](const T* in, T* out, int64_t slot) {
          rotate_row(isa, in, out, One(), One(), slot);
        });
      });
    } else {
      rows.for_each([&](const T* in, T* out, int64_t slot) {
        rotate_row(IsaConstant<Isa::kBaseline>(), in, out, in_d, out_d, slot);
      });
    }
  }

  template <Isa kIsa, typename Step>
  void rotate_row(IsaConstant<kIsa> isa, const T* in, T* out, Step in_d, Step out_d,
                  int64_t slot) const {
    const auto copy = [=, this](int64_t begin, int64_t end) {
      if (begin != end && !p_.in_place) copy_lanes(in, out, in_d, out_d, begin, end);
    };
    copy(0, p_.lanes.offset);
    for (const Span& span : spans_) {
      if (!span.copied) {
        rotate_span(isa, in + span.lane * in_d, out + span.lane * out_d, in_d, out_d, span, slot);
      } else if (neighbours()) {
        copy(span.lane, span.lane + 2 * span.size());
      } else {
        copy(span.lane, span.lane + span.size());
        copy(span.lane + p_.lanes.distance, span.lane + p_.lanes.distance + span.size());
      }
    }
    copy(p_.lanes.end(), p_.D);
  }

  template <Isa kIsa, typename Step>
  void rotate_span(IsaConstant<kIsa>, const T* in, T* out, Step in_d, Step out_d, const Span& span,
                   int64_t slot) const {
    const int64_t distance = p_.lanes.distance;
    const int64_t first = slot * p_.lanes.P + span.begin;
    const Wide<T>* c = cos_.data() + first;
    const Wide<T>* s = sin_.data() + first;
    const int64_t n = span.size();
    if constexpr (std::is_same_v<Step, One>) {
      if (neighbours()) {
        c = lane_cos_.data() + 2 * first;
        s = lane_sin_.data() + 2 * first;
      }
      if constexpr (std::is_same_v<T, Float16> && kIsa != Isa::kBaseline) {
        return rotate_f16c<kPrecision>(in, out, distance, c, s, n);
      }
      if (neighbours()) return rotate_neighbours<T, kPrecision>(in, out, c, s, n);
      rotate_run<T, kPrecision>(in, in + distance, in_d, out, out + distance, out_d, c, s, n);
    } else {
      const int64_t step = neighbours() ? 2 : 1;
      rotate_run<T, kPrecision>(in, in + distance * in_d, step * in_d, out, out + distance * out_d,
                                step * out_d, c, s, n);
    }
  }

  template <typename Step>
  static void copy_lanes(const T* in, T* out, Step in_d, Step out_d, int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<Step, One>) {
      std::memcpy(out + begin, in + begin, static_cast<size_t>(end - begin) * sizeof(T));
    } else {
      for (int64_t lane = begin; lane < end; ++lane) out[lane * out_d] = in[lane * in_d];
    }
  }

  const RotateParams& p_;
  const Isa isa_;
  const int64_t slots_;
  std::vector<Wide<T>> cos_, sin_;            // [slots, P], sin negated for the inverse
  std::vector<Wide<T>> lane_cos_, lane_sin_;  // [slots, 2P], of neighbours
  std::vector<Span> spans_;
};

// Rotates tokens [begin, end) of the B*S tokens on a machine that has `isa`, which changes no bit.
// Rows must have been found good.
inline void rotate_tokens(const RotateParams& p, int64_t begin, int64_t end, Isa isa = best_isa()) {
  visit(p.dtype, [&]<typename T>() {
    const auto run = [&]<Precision kPrecision>() {
      TokenRotator<T, kPrecision>(p, isa).rotate(begin, end);
    };
    if constexpr (sizeof(T) == 2) {  // in float32 and float64 the two precisions are one
      if (p.precision == Precision::kModel) return run.template operator()<Precision::kModel>();
    }
    run.template operator()<Precision::kFp32>();
  });
}

}  // namespace fused_rope
