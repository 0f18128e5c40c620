// The CPU kernel: rotates a range of tokens. The caller spreads ranges over threads.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

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

// Rotates pairs [0, n) whose members start at a and b and follow each other at `step` lanes. Inputs
// and outputs are the same lanes or disjoint. Step is std::integral_constant where the compiler
// should vectorise, int64_t otherwise.
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

// Rotates whole tokens: holds the table rows of one token, widened, while its heads pass.
template <typename T, Precision kPrecision>
class TokenRotator {
 public:
  explicit TokenRotator(const RotateParams& params)
      : p_(params), cos_(params.lanes.P), sin_(params.lanes.P) {}

  void rotate(int64_t b, int64_t s) {
    if (!p_.per_head) load_rows(b, s, 0);
    for (int i = 0; i < p_.count; ++i) {
      const TensorParams& t = p_.tensors[i];
      const int64_t row = t.scattered ? output_row(p_.rows, b, s) : s;
      if (t.scattered && row == -1) continue;
      const T* in = static_cast<const T*>(t.in) + b * t.in_strides.b + s * t.in_strides.s;
      T* out =
          static_cast<T*>(t.out) + (t.scattered ? 0 : b * t.out_strides.b) + row * t.out_strides.s;
      for (int64_t h = 0; h < t.H; ++h) {
        if (p_.per_head) load_rows(b, s, h);
        rotate_head(in + h * t.in_strides.h, t.in_strides.d, out + h * t.out_strides.h,
                    t.out_strides.d);
      }
    }
  }

 private:
  // Neighbouring pairs in one span of `distance` pairs, all rotated or all copied through.
  struct Run {
    int64_t begin, end;
    bool copied;
  };

  void load_rows(int64_t b, int64_t s, int64_t h) {
    visit(p_.table_dtype, [&]<typename Table>() {
      const auto* cos = static_cast<const Table*>(p_.cos.data);
      const auto* sin = static_cast<const Table*>(p_.sin.data);
      const int64_t span = p_.lanes.distance == 1 ? p_.lanes.P : p_.lanes.distance;
      Row row = table_row(p_.rows, b, s);
      runs_.clear();
      for (int64_t j = 0; j < p_.lanes.P; ++j) {
        if (p_.axes != nullptr) row = table_row(p_.rows, b, s, p_.axes[j]);
        if (j % span == 0 || runs_.back().copied != row.copied) runs_.push_back({j, j, row.copied});
        runs_.back().end = j + 1;
        if (row.copied) continue;
        const Table c = cos[table_offset(p_.cos, row.index, b, s, h) + j * p_.cos.j];
        const Table d = sin[table_offset(p_.sin, row.index, b, s, h) + j * p_.sin.j];
        cos_[j] = rounded<T, kPrecision>(widen(c));
        sin_[j] = rounded<T, kPrecision>(p_.inverse ? -widen(d) : widen(d));
      }
    });
  }

  void rotate_head(const T* in, int64_t in_d, T* out, int64_t out_d) const {
    if (!p_.in_place) {
      copy_lanes(in, in_d, out, out_d, 0, p_.lanes.offset);
      copy_lanes(in, in_d, out, out_d, p_.lanes.end(), p_.D);
    }
    for (const Run& run : runs_) {
      if (!run.copied) {
        rotate_pairs(in, in_d, out, out_d, run);
      } else if (!p_.in_place) {
        for (int64_t j = run.begin; j < run.end; ++j) {
          const int64_t a = p_.lanes.first(j);
          const int64_t b = a + p_.lanes.distance;
          copy_lanes(in, in_d, out, out_d, a, a + 1);
          copy_lanes(in, in_d, out, out_d, b, b + 1);
        }
      }
    }
  }

  void rotate_pairs(const T* in, int64_t in_d, T* out, int64_t out_d, const Run& run) const {
    const int64_t a = p_.lanes.first(run.begin);
    const int64_t b = a + p_.lanes.distance;
    const auto rotate = [&](auto in_step, auto out_step) {
      rotate_run<T, kPrecision>(in + a * in_d, in + b * in_d, in_step, out + a * out_d,
                                out + b * out_d, out_step, cos_.data() + run.begin,
                                sin_.data() + run.begin, run.end - run.begin);
    };
    const int64_t step = p_.lanes.distance == 1 ? 2 : 1;
    if (in_d != 1 || out_d != 1) {
      rotate(step * in_d, step * out_d);
    } else if (step == 1) {
      rotate(std::integral_constant<int64_t, 1>{}, std::integral_constant<int64_t, 1>{});
    } else {
      rotate(std::integral_constant<int64_t, 2>{}, std::integral_constant<int64_t, 2>{});
    }
  }

  static void copy_lanes(const T* in, int64_t in_d, T* out, int64_t out_d, int64_t begin,
                         int64_t end) {
    if (in_d == 1 && out_d == 1) {
      std::memcpy(out + begin, in + begin, static_cast<size_t>(end - begin) * sizeof(T));
    } else {
      for (int64_t lane = begin; lane < end; ++lane) out[lane * out_d] = in[lane * in_d];
    }
  }

  const RotateParams& p_;
  std::vector<Wide<T>> cos_, sin_;  // [P], sin negated for the inverse
  std::vector<Run> runs_;           // of the token, or of the head
};

// Rotates tokens [begin, end) of the B*S tokens. Rows must have been found good.
inline void rotate_tokens(const RotateParams& p, int64_t begin, int64_t end) {
  visit(p.dtype, [&]<typename T>() {
    const auto run = [&]<Precision kPrecision>() {
      TokenRotator<T, kPrecision> rotator(p);
      for (int64_t token = begin; token < end; ++token) rotator.rotate(token / p.S, token % p.S);
    };
    if constexpr (sizeof(T) == 2) {  // in float32 and float64 the two precisions are one
      if (p.precision == Precision::kModel) return run.template operator()<Precision::kModel>();
    }
    run.template operator()<Precision::kFp32>();
  });
}

}  // namespace fused_rope
