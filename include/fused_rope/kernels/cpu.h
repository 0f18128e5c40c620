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

// Neighbouring heads of one token, from a lane on.
template <typename T>
struct Heads {
  const T* in;
  T* out;
  int64_t in_h, out_h;  // strides
  int64_t count;

  template <typename F>
  void for_each(const F& f) const {
    for (int64_t h = 0; h < count; ++h) f(in + h * in_h, out + h * out_h);
  }
};

// Rotates whole tokens: holds the table rows of one token, widened, while its heads pass.
template <typename T, Precision kPrecision>
class TokenRotator {
 public:
  TokenRotator(const RotateParams& params, Isa isa)
      : p_(params),
        isa_(kGainsFromWidth ? isa : Isa::kBaseline),
        cos_(params.lanes.P),
        sin_(params.lanes.P),
        lane_cos_(neighbours() ? 2 * params.lanes.P : 0),
        lane_sin_(lane_cos_.size()) {
    find_spans();
  }

  void rotate(int64_t b, int64_t s) {
    if (!p_.per_head) load_rows(b, s, 0);
    for (int i = 0; i < p_.count; ++i) {
      const TensorParams& t = p_.tensors[i];
      const int64_t row = t.scattered ? output_row(p_.rows, b, s) : s;
      if (t.scattered && row == -1) continue;
      Heads<T> heads = {
          static_cast<const T*>(t.in) + b * t.in_strides.b + s * t.in_strides.s,
          static_cast<T*>(t.out) + (t.scattered ? 0 : b * t.out_strides.b) + row * t.out_strides.s,
          t.in_strides.h, t.out_strides.h, t.H};
      if (!p_.per_head) {
        rotate_heads(heads, t);
        continue;
      }
      heads.count = 1;
      for (int64_t h = 0; h < t.H; ++h, heads.in += heads.in_h, heads.out += heads.out_h) {
        load_rows(b, s, h);
        rotate_heads(heads, t);
      }
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

  void load_rows(int64_t b, int64_t s, int64_t h) {
    visit(p_.table_dtype, [&]<typename Table>() {
      const auto* cos = static_cast<const Table*>(p_.cos.data);
      const auto* sin = static_cast<const Table*>(p_.sin.data);
      for (Span& span : spans_) {
        const Row row = table_row(p_.rows, b, s, span.axis);
        span.copied = row.copied;
        if (row.copied) continue;
        load_entries(cos + table_offset(p_.cos, row.index, b, s, h), p_.cos.j, span, cos_.data());
        load_entries(sin + table_offset(p_.sin, row.index, b, s, h), p_.sin.j, span, sin_.data());
        finish_entries(span);
      }
    });
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
  void finish_entries(const Span& span) {
    if (p_.inverse) {
      for (int64_t j = span.begin; j < span.end; ++j) sin_[j] = -sin_[j];
    }
    if (!neighbours()) return;
    for (int64_t j = span.begin; j < span.end; ++j) {
      lane_cos_[2 * j] = lane_cos_[2 * j + 1] = cos_[j];
      lane_sin_[2 * j] = -sin_[j];
      lane_sin_[2 * j + 1] = sin_[j];
    }
  }

  void rotate_heads(const Heads<T>& heads, const TensorParams& t) const {
    const int64_t in_d = t.in_strides.d;
    const int64_t out_d = t.out_strides.d;
    if (in_d == 1 && out_d == 1) {
      rotate_spans(heads, One(), One());
    } else {
      rotate_spans(heads, in_d, out_d);
    }
  }

  template <typename Step>
  void rotate_spans(const Heads<T>& heads, Step in_d, Step out_d) const {
    const auto copy = [&](int64_t begin, int64_t end) {
      if (!p_.in_place) copy_lanes(heads, in_d, out_d, begin, end);
    };
    copy(0, p_.lanes.offset);
    copy(p_.lanes.end(), p_.D);
    for (const Span& span : spans_) {
      if (!span.copied) {
        rotate_span(heads, in_d, out_d, span);
      } else if (neighbours()) {
        copy(span.lane, span.lane + 2 * span.size());
      } else {
        copy(span.lane, span.lane + span.size());
        copy(span.lane + p_.lanes.distance, span.lane + p_.lanes.distance + span.size());
      }
    }
  }

  // Only this is worth an instruction set of its own, and only where lanes lie side by side. All is
  // captured by value: the loop over heads must not fetch it anew for each.
  void rotate_span(const Heads<T>& heads, One, One, const Span& span) const {
    const int64_t a = span.lane;
    const int64_t b = a + p_.lanes.distance;
    const int64_t n = span.size();
    if (neighbours()) {
      const Wide<T>* c = lane_cos_.data() + 2 * span.begin;
      const Wide<T>* s = lane_sin_.data() + 2 * span.begin;
      run_on(isa_, [=](auto) {
        heads.for_each([=](const T* in, T* out) {
          rotate_neighbours<T, kPrecision>(in + a, out + a, c, s, n);
        });
      });
    } else {
      const Wide<T>* c = cos_.data() + span.begin;
      const Wide<T>* s = sin_.data() + span.begin;
      run_on(isa_, [=](auto) {
        heads.for_each([=](const T* in, T* out) {
          rotate_run<T, kPrecision>(in + a, in + b, One(), out + a, out + b, One(), c, s, n);
        });
      });
    }
  }

  void rotate_span(const Heads<T>& heads, int64_t in_d, int64_t out_d, const Span& span) const {
    const int64_t a = span.lane;
    const int64_t b = a + p_.lanes.distance;
    const int64_t step = neighbours() ? 2 : 1;
    heads.for_each([&](const T* in, T* out) {
      rotate_run<T, kPrecision>(in + a * in_d, in + b * in_d, step * in_d, out + a * out_d,
                                out + b * out_d, step * out_d, cos_.data() + span.begin,
                                sin_.data() + span.begin, span.size());
    });
  }

  template <typename Step>
  static void copy_lanes(const Heads<T>& heads, Step in_d, Step out_d, int64_t begin, int64_t end) {
    if (begin == end) return;
    heads.for_each([&](const T* in, T* out) {
      if constexpr (std::is_same_v<Step, One>) {
        std::memcpy(out + begin, in + begin, static_cast<size_t>(end - begin) * sizeof(T));
      } else {
        for (int64_t lane = begin; lane < end; ++lane) out[lane * out_d] = in[lane * in_d];
      }
    });
  }

  const RotateParams& p_;
  const Isa isa_;
  std::vector<Wide<T>> cos_, sin_;            // [P], sin negated for the inverse
  std::vector<Wide<T>> lane_cos_, lane_sin_;  // [2P], of neighbours
  std::vector<Span> spans_;
};

// Rotates tokens [begin, end) of the B*S tokens on a machine that has `isa`, which changes no bit.
// Rows must have been found good.
inline void rotate_tokens(const RotateParams& p, int64_t begin, int64_t end, Isa isa = best_isa()) {
  visit(p.dtype, [&]<typename T>() {
    const auto run = [&]<Precision kPrecision>() {
      TokenRotator<T, kPrecision> rotator(p, isa);
      for (int64_t token = begin; token < end; ++token) rotator.rotate(token / p.S, token % p.S);
    };
    if constexpr (sizeof(T) == 2) {  // in float32 and float64 the two precisions are one
      if (p.precision == Precision::kModel) return run.template operator()<Precision::kModel>();
    }
    run.template operator()<Precision::kFp32>();
  });
}

}  // namespace fused_rope
