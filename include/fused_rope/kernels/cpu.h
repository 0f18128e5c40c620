// The CPU kernel: rotates a range of tokens. The caller spreads ranges over threads.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

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

// Rotates pairs [0, n) whose members start at a and b and follow each other at `step` lanes. Inputs
// and outputs are the same lanes or disjoint.
template <typename T, Precision kPrecision, typename Step>
void rotate_run(const T* a, const T* b, Step in_step, T* out_a, T* out_b, Step out_step,
                const Wide<T>* c, const Wide<T>* s, int64_t n) {
  FUSED_ROPE_INDEPENDENT_ITERATIONS
  for (int64_t j = 0; j < n; ++j) {
    const Pair<T> pair =
        rotate_pair<T, kPrecision>(widen(a[j * in_step]), widen(b[j * in_step]), c[j], s[j]);
    out_a[j * out_step] = narrow<T>(pair.a);
    out_b[j * out_step] = narrow<T>(pair.b);
  }
}

// The same for n pairs of neighbouring lanes. c and s hold one value a lane, signed as
// rotate_member takes it: all lanes do the same, and only the partner's takes a shuffle.
template <typename T, Precision kPrecision>
void rotate_neighbours(const T* in, T* out, const Wide<T>* c, const Wide<T>* s, int64_t n) {
  FUSED_ROPE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < 2 * n; i += 2) {
    const Wide<T> a = widen(in[i]);
    const Wide<T> b = widen(in[i + 1]);
    out[i] = narrow<T>(rotate_member<T, kPrecision>(a, b, c[i], s[i]));
    out[i + 1] = narrow<T>(rotate_member<T, kPrecision>(b, a, c[i + 1], s[i + 1]));
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
        isa_(kGainsFromWidth ? isa : Isa::kBaseline),
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
  // In float32, baseline code keeps up with memory, and wider vectors fell behind it
  // (benchmarks/NOTES.md).
  static constexpr bool kGainsFromWidth = !std::is_same_v<T, float>;

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
    constexpr int64_t kEntries = 8192;  // of cos and of sin: what stays in an L2 cache
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
      run_on(isa_, [this, rows](auto) {
        rows.for_each(
            [this](const T* in, T* out, int64_t slot) { rotate_row(in, out, One(), One(), slot); });
      });
    } else {
      rows.for_each(
          [&](const T* in, T* out, int64_t slot) { rotate_row(in, out, in_d, out_d, slot); });
    }
  }

  template <typename Step>
  void rotate_row(const T* in, T* out, Step in_d, Step out_d, int64_t slot) const {
    const auto copy = [=, this](int64_t begin, int64_t end) {
      if (begin != end && !p_.in_place) copy_lanes(in, out, in_d, out_d, begin, end);
    };
    copy(0, p_.lanes.offset);
    for (const Span& span : spans_) {
      if (!span.copied) {
        rotate_span(in + span.lane * in_d, out + span.lane * out_d, in_d, out_d, span, slot);
      } else if (neighbours()) {
        copy(span.lane, span.lane + 2 * span.size());
      } else {
        copy(span.lane, span.lane + span.size());
        copy(span.lane + p_.lanes.distance, span.lane + p_.lanes.distance + span.size());
      }
    }
    copy(p_.lanes.end(), p_.D);
  }

  template <typename Step>
  void rotate_span(const T* in, T* out, Step in_d, Step out_d, const Span& span,
                   int64_t slot) const {
    const int64_t first = slot * p_.lanes.P + span.begin;
    const Wide<T>* c = cos_.data() + first;
    const Wide<T>* s = sin_.data() + first;
    const int64_t b = p_.lanes.distance;
    if (!neighbours()) {
      rotate_run<T, kPrecision>(in, in + b * in_d, in_d, out, out + b * out_d, out_d, c, s,
                                span.size());
    } else if constexpr (std::is_same_v<Step, One>) {
      rotate_neighbours<T, kPrecision>(in, out, lane_cos_.data() + 2 * first,
                                       lane_sin_.data() + 2 * first, span.size());
    } else {
      rotate_run<T, kPrecision>(in, in + in_d, 2 * in_d, out, out + out_d, 2 * out_d, c, s,
                                span.size());
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
