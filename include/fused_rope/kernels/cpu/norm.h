// The CPU kernel of a norm and the rotation, forward and backward, in buffers of the compute type.
#pragma once

#include <algorithm>
#include <vector>

#include "fused_rope/kernels/cpu/table_rows.h"
#include "fused_rope/kernels/normalization.h"
#include "fused_rope/kernels/weight_gradients.h"

namespace fused_rope::kernels {

// Vectors of the compiler, which every instruction set has or emulates.
using Eight [[gnu::vector_size(32)]] = float;

// Adds the neighbors in two vectors; the sums of x come in the lower half of each 16 bytes.
inline void add_neighbors(const Eight& x, const Eight& y, Eight& sums) {
#if defined(__clang__)
#define FUSED_ROPE_SHUFFLE(...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else  // GCC 11 has only its own
  using Indices [[gnu::vector_size(32)]] = int32_t;
#define FUSED_ROPE_SHUFFLE(...) __builtin_shuffle(x, y, Indices{__VA_ARGS__})
#endif
  sums = FUSED_ROPE_SHUFFLE(0, 2, 8, 10, 4, 6, 12, 14) +  // even ones
         FUSED_ROPE_SHUFFLE(1, 3, 9, 11, 5, 7, 13, 15);   // odd ones
#undef FUSED_ROPE_SHUFFLE
}

// Adds neighbors among n values, a power of two, until one is left.
template <typename W>
W sum_neighbors(W* values, int64_t n) {
  if constexpr (std::is_same_v<W, float>) {
    if (n >= 32) {
      for (int64_t i = 0; i < n / 32; ++i) {
        Eight v[4];
        std::memcpy(v, values + 32 * i, sizeof(v));
        add_neighbors(v[0], v[1], v[0]);
        add_neighbors(v[2], v[3], v[2]);
        add_neighbors(v[0], v[2], v[0]);
        float fours[8];  // 0, 1, 2, 3 and their neighbors
        std::memcpy(fours, &v[0], sizeof(fours));
        for (int j = 0; j < 4; ++j) fours[j] = add(fours[j], fours[j + 4]);
        values[i] = add(add(fours[0], fours[1]), add(fours[2], fours[3]));
      }
      n /= 32;
    }
  }
  for (n /= 2; n > 0; n /= 2) {
    FUSED_ROPE_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < n; ++i) values[i] = add(values[2 * i], values[2 * i + 1]);
  }
  return values[0];
}

// A head in memory.
template <typename T>
struct StridedHead {
  T* data;
  int64_t stride;
};

// Normalizes and rotates heads one by one.
template <typename T, Precision kPrecision>
class HeadNormalizer {
 public:
  using W = Wide<T>;
  using CallRows = TableRows<T, kPrecision>;

  explicit HeadNormalizer(const RotateParams& params)
      : p_(params),
        is_direct_(is_direct(params)),
        has_words_(has_words(params)),
        scalars_(params.D, params.norm->eps),
        x_(params.D),
        dy_(params.D),
        dn_(params.D),
        tree_(tree_leaves(params.D)),
        original_(params.axes == nullptr ? 0 : 2 * params.pairing.P) {
    for (int i = 0; i < params.count; ++i) {
      factors_[i] = factors(params.norm->weights[i]);
      for (int64_t d = 0; d < params.D; ++d)
        (d % 2 == 0 ? even_factors_ : odd_factors_)[i].push_back(factors_[i][d]);
    }
  }

  // Whether `forward` takes bfloat16 by words: contiguous heads, in which elements before, in and
  // after the pairs of a block are whole vectors of words.
  static bool has_words(const RotateParams& p) {
    const Pairing& pairing = p.pairing;
    const int64_t block = pairing.distance == 1 ? 2 * pairing.P : pairing.distance;
    return std::is_same_v<T, BFloat16> && is_direct(p) &&
           (p.D | pairing.offset | pairing.end() | block) % (2 * kWords) == 0;
  }

  // Normalizes `count` heads, whose rows are in `slot`, slot + slot_step, ... of the rows in the
  // order for words if the call has them. tensor: whose weight it is.
  template <Cast kCast>
  void forward(int tensor, StridedHead<const T> in, int64_t in_step, StridedHead<T> out,
               int64_t out_step, int64_t count, const CallRows& rows, int64_t slot,
               int64_t slot_step) {
    const auto for_each = [=](int64_t begin, int64_t end, const auto& f) {
      for (int64_t i = begin; i < end; ++i)
        f(i, in.data + i * in_step, out.data + i * out_step, slot + i * slot_step);
    };
    if (!has_words_ && !(is_direct_ && std::is_same_v<T, W>)) {
      return for_each(0, count, [&](int64_t, const T* from, T* to, int64_t row) {
        forward_in_buffer<kCast>(tensor, {from, in.stride}, {to, out.stride}, rows, row);
      });
    }
    // Several heads at a time, so that one does not wait for the sum of another.
    constexpr int64_t kHeads = 8;
    W r[kHeads];
    for (int64_t first = 0; first < count; first += kHeads) {
      const int64_t end = std::min(first + kHeads, count);
      for_each(first, end,
               [&](int64_t i, const T* from, T*, int64_t) { r[i - first] = inverse_rms(from); });
      for_each(first, end, [&](int64_t i, const T* from, T* to, int64_t row) {
        if constexpr (std::is_same_v<T, BFloat16>) {
          forward_words<kCast>(tensor, from, to, r[i - first], rows, row);
        } else if constexpr (std::is_same_v<T, W>) {
          forward_direct<kCast>(tensor, from, to, r[i - first], rows, row);
        }
      });
    }
  }

  // Writes the gradient of x and adds that of the weight to `sums`, each unless it is null.
  // transposed: the rows of the inverse rotation.
  template <Cast kCast>
  void backward(int tensor, StridedHead<const T> in, StridedHead<const T> gradient,
                StridedHead<T> dx, W* sums, const CallRows& rows, const CallRows& transposed,
                int64_t slot) {
    W* const x = x_.data();
    W* const dy = dy_.data();
    W* const dn = dn_.data();
    const W* const w = factors_[tensor].data();
    load(in, x);
    load(gradient, dy);
    if (p_.norm->after) {
      rotate(rows, slot, x);
      round_between<kCast>(x);
    } else {
      rotate(transposed, slot, dy);
      round_between<kCast>(dy);
    }
    for (int64_t d = 0; d < p_.D; ++d) dn[d] = weighted_gradient<T, kCast>(dy[d], w[d]);
    const W r = scalars_.inverse_rms(sum([x](int64_t d) { return multiply(x[d], x[d]); }));
    if (sums != nullptr) {
      FUSED_ROPE_INDEPENDENT_ITERATIONS
      for (int64_t d = 0; d < p_.D; ++d)
        sums[d] = add(sums[d], weight_gradient<T, kCast>(dy[d], x[d], r));
    }
    if (dx.data == nullptr) return;
    const W products = sum([=](int64_t d) { return multiply(dn[d], x[d]); });
    const W mean = scalars_.mean_product(products, r);
    for (int64_t d = 0; d < p_.D; ++d) dn[d] = input_gradient(dn[d], x[d], r, mean);
    if (p_.norm->after) {
      round_between<kCast>(dn);
      rotate(transposed, slot, dn);
    }
    store(dn, dx);
  }

 private:
  static constexpr int kWords = 8;  // of a vector

  template <Cast kCast>
  void forward_in_buffer(int tensor, StridedHead<const T> in, StridedHead<T> out,
                         const CallRows& rows, int64_t slot) {
    W* const x = x_.data();
    const W* const w = factors_[tensor].data();
    load(in, x);
    if (p_.norm->after) {
      rotate(rows, slot, x);
      round_between<kCast>(x);
    }
    const W r = scalars_.inverse_rms(sum([x](int64_t d) { return multiply(x[d], x[d]); }));
    for (int64_t d = 0; d < p_.D; ++d) x[d] = normalize<T, kCast>(x[d], r, w[d]);
    if (!p_.norm->after) rotate(rows, slot, x);
    store(x, out);
  }

  // r of a head in memory: bfloat16 by words, or of the compute type.
  W inverse_rms(const T* in) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      const int64_t D = p_.D;
      float* const tree = tree_.data();
      const auto square = [](float x) { return multiply(x, x); };
      FUSED_ROPE_INDEPENDENT_ITERATIONS
      for (int64_t i = 0; i < D / 4; ++i) {  // two leaves, which are neighbors
        const TwoElements x = load_word(in + 2 * i);
        const TwoElements y = load_word(in + D / 2 + 2 * i);
        tree[i] =
            add(add(square(x.first), square(y.first)), add(square(x.second), square(y.second)));
      }
      const auto sums = static_cast<int64_t>(tree_.size()) / 2;
      std::fill(tree + D / 4, tree + sums, 0.0f);
      return scalars_.inverse_rms(sum_neighbors(tree, sums));
    } else if constexpr (std::is_same_v<T, W>) {
      return scalars_.inverse_rms(sum([in](int64_t d) { return multiply(in[d], in[d]); }));
    } else {
      return 0;
    }
  }

  // Whether heads can be read and written without a buffer.
  static bool is_direct(const RotateParams& p) {
    bool contiguous = true;
    for (int i = 0; i < p.count; ++i)
      contiguous = contiguous && p.tensors[i].in_strides.d == 1 && p.tensors[i].out_strides.d == 1;
    return contiguous && !p.norm->after && p.axes == nullptr;
  }

  template <Cast kCast>
  void forward_words(int tensor, const BFloat16* in, BFloat16* out, float r, const CallRows& rows,
                     int64_t slot) {
    const int64_t D = p_.D;
    const float* const even = even_factors_[tensor].data();
    const float* const odd = odd_factors_[tensor].data();
    const auto normalized = [=](int64_t d) {
      return NormalizedWords<kCast>{in + d, even + d / 2, odd + d / 2, r};
    };
    const auto copy = [=](int64_t begin, int64_t end) {
      for (int64_t d = begin; d < end; d += 2 * kWords) copy_words(normalized(d), out + d);
    };
    if (rows.copied()[slot] == Copied::kAll) return copy(0, D);
    const Pairing& pairing = p_.pairing;
    const float* const cos = rows.cos() + slot * rows.size();
    const float* const sin = rows.sin() + slot * rows.size();
    copy(0, pairing.offset);
    copy(pairing.end(), D);
    const int64_t n = pairing.distance;
    if (n == 1) {
      for (int64_t j = 0; j < pairing.P; j += kWords) {
        const int64_t d = pairing.offset + 2 * j;
        rotate_words(normalized(d), out + d, cos + j, sin + j);
      }
      return;
    }
    for (int64_t first = 0; first < pairing.P; first += n) {
      for (int64_t i = 0; i < n / 2; i += kWords) {
        const int64_t a = pairing.offset + 2 * first + 2 * i;
        const int64_t b = a + n;
        const float* const c = cos + first + i;
        const float* const s = sin + first + i;
        rotate_words(normalized(a), normalized(b), out + a, out + b, c, s, c + n / 2, s + n / 2);
      }
    }
  }

  // kWords words of a head, normalized.
  template <Cast kCast>
  struct NormalizedWords {
    const BFloat16* from;
    const float* even;
    const float* odd;
    float r;

    TwoElements at(int i) const {
      const TwoElements x = load_word(from + 2 * i);
      return {normalize<BFloat16, kCast>(x.first, r, even[i]),
              normalize<BFloat16, kCast>(x.second, r, odd[i])};
    }
  };

  template <typename Words>
  static void copy_words(const Words& words, BFloat16* out) {
    FUSED_ROPE_ONE_VECTOR
    for (int i = 0; i < kWords; ++i) store_word(out + 2 * i, words.at(i));
  }

  template <typename Words>
  static void rotate_words(const Words& words, BFloat16* out, const float* c, const float* s) {
    FUSED_ROPE_ONE_VECTOR
    for (int i = 0; i < kWords; ++i) {
      const TwoElements x = words.at(i);
      const auto [a, b] = rotate_pair<BFloat16, kPrecision>(x.first, x.second, c[i], s[i]);
      store_word(out + 2 * i, {a, b});
    }
  }

  template <typename Words>
  static void rotate_words(const Words& first, const Words& second, BFloat16* out_a,
                           BFloat16* out_b, const float* c1, const float* s1, const float* c2,
                           const float* s2) {
    FUSED_ROPE_ONE_VECTOR
    for (int i = 0; i < kWords; ++i) {
      const TwoElements x = first.at(i);
      const TwoElements y = second.at(i);
      const auto one = rotate_pair<BFloat16, kPrecision>(x.first, y.first, c1[i], s1[i]);
      const auto two = rotate_pair<BFloat16, kPrecision>(x.second, y.second, c2[i], s2[i]);
      store_word(out_a + 2 * i, {one.a, two.a});
      store_word(out_b + 2 * i, {one.b, two.b});
    }
  }

  template <Cast kCast>
  void forward_direct(int tensor, const W* in, W* out, W r, const CallRows& rows, int64_t slot) {
    const W* const w = factors_[tensor].data();
    const auto normalized = [=](int64_t d) { return normalize<T, kCast>(in[d], r, w[d]); };
    const auto copy = [=](int64_t begin, int64_t end) {
      FUSED_ROPE_INDEPENDENT_ITERATIONS
      for (int64_t d = begin; d < end; ++d) out[d] = normalized(d);
    };
    if (rows.copied()[slot] == Copied::kAll) return copy(0, p_.D);
    const Pairing& pairing = p_.pairing;
    const W* const cos = rows.cos() + slot * rows.size();
    const W* const sin = rows.sin() + slot * rows.size();
    copy(0, pairing.offset);
    copy(pairing.end(), p_.D);
    if (pairing.distance == 1) {
      FUSED_ROPE_INDEPENDENT_ITERATIONS
      for (int64_t i = 0; i < 2 * pairing.P; i += 2) {
        const int64_t d = pairing.offset + i;
        const W a = normalized(d), b = normalized(d + 1);
        out[d] = rotate_element<T, kPrecision>(a, b, cos[i], sin[i]);
        out[d + 1] = rotate_element<T, kPrecision>(b, a, cos[i + 1], sin[i + 1]);
      }
      return;
    }
    const int64_t n = pairing.distance;
    for (int64_t first = 0; first < pairing.P; first += n) {
      const int64_t d = pairing.offset + 2 * first;
      FUSED_ROPE_INDEPENDENT_ITERATIONS
      for (int64_t j = 0; j < n; ++j) {
        const auto pair = rotate_pair<T, kPrecision>(normalized(d + j), normalized(d + n + j),
                                                     cos[first + j], sin[first + j]);
        out[d + j] = pair.a;
        out[d + n + j] = pair.b;
      }
    }
  }

  std::vector<W> factors(const WeightParams& weight) const {
    std::vector<W> result(p_.D, W{1});
    const auto read = [&]<typename Weight>() {
      const auto* data = static_cast<const Weight*>(weight.data);
      for (int64_t d = 0; d < p_.D; ++d) {
        W value = static_cast<W>(widen(data[d * weight.stride]));
        if (value != value) value = widen(narrow<T>(value));  // as store_word expects
        result[d] = weight_factor(value, p_.norm->zero_centered);
      }
    };
    if (weight.data == nullptr) return result;
    weight.dtype == p_.dtype ? read.template operator()<T>() : read.template operator()<float>();
    return result;
  }

  void load(StridedHead<const T> from, W* to) const {
    if (from.stride != 1) {
      for (int64_t d = 0; d < p_.D; ++d) to[d] = widen(from.data[d * from.stride]);
    } else if constexpr (std::is_same_v<T, Float16>) {
      widen_array(from.data, to, p_.D);
    } else {
      FUSED_ROPE_INDEPENDENT_ITERATIONS
      for (int64_t d = 0; d < p_.D; ++d) to[d] = widen(from.data[d]);
    }
  }

  void store(const W* from, StridedHead<T> to) const {
    if (to.stride != 1) {
      for (int64_t d = 0; d < p_.D; ++d) to.data[d * to.stride] = narrow<T>(from[d]);
    } else if constexpr (std::is_same_v<T, Float16>) {
      narrow_array(from, to.data, p_.D);
    } else {
      FUSED_ROPE_INDEPENDENT_ITERATIONS
      for (int64_t d = 0; d < p_.D; ++d) to.data[d] = narrow<T>(from[d]);
    }
  }

  template <Cast kCast>
  void round_between(W* head) const {
    if constexpr (kCast != Cast::kNever) {
      for (int64_t d = 0; d < p_.D; ++d) head[d] = between<T, kCast>(head[d]);
    }
  }

  // Rotates in place. Does not round the sums of kModel to T, which a norm or `store` does.
  void rotate(const CallRows& rows, int64_t slot, W* head) {
    const Copied copied = rows.copied()[slot];
    if (copied == Copied::kAll) return;
    W* const rotated = head + p_.pairing.offset;
    if (copied == Copied::kSome) std::copy_n(rotated, original_.size(), original_.data());
    const W* const cos = rows.cos() + slot * rows.size();
    const W* const sin = rows.sin() + slot * rows.size();
    const int64_t n = p_.pairing.distance;
    if (n == 1) {
      rotate_interleaved<T, kPrecision>(rotated, rotated, cos, sin, p_.pairing.P);
    } else {
      for (int64_t first = 0; first < p_.pairing.P; first += n) {
        W* const a = rotated + 2 * first;
        rotate_pairs<T, kPrecision>(a, a + n, a, a + n, cos + first, sin + first, n);
      }
    }
    if (copied == Copied::kSome) rows.restore_wide(original_.data(), rotated, slot);
  }

  // The sum of term(d) for d in [0, D) by the tree of normalization.h.
  template <typename F>
  W sum(const F& term) {
    W* const tree = tree_.data();
    const int64_t half = tree_half(p_.D);
    FUSED_ROPE_INDEPENDENT_ITERATIONS
    for (int64_t d = 0; d < p_.D - half; ++d) tree[d] = add(term(d), term(d + half));
    if (p_.D % 2 != 0) tree[half - 1] = add(term(half - 1), W{0});
    const auto leaves = static_cast<int64_t>(tree_.size());
    std::fill(tree + half, tree + leaves, W{0});
    return sum_neighbors(tree, leaves);
  }

  const RotateParams& p_;
  const bool is_direct_, has_words_;
  const NormScalars<W> scalars_;
  std::vector<W> factors_[kMaxTensors];
  std::vector<W> even_factors_[kMaxTensors], odd_factors_[kMaxTensors];  // of words
  std::vector<W> x_, dy_, dn_, tree_;
  std::vector<W> original_;  // rotated elements before the rotation
};

// The backward of leaves of heads.
template <typename T, Precision kPrecision>
class NormBackward {
 public:
  using W = Wide<T>;

  NormBackward(const NormBackwardParams& params, Isa isa)
      : p_(params),
        transposed_call_(transposed(params.call)),
        isa_(isa),
        head_(params.call),
        rows_(params.call, 1, false),
        transposed_(transposed_call_, 1, false),
        chains_(kChains * params.call.D) {}

  // Leaf `leaf` of tensor i.
  void run(int i, const Leaves& leaves, int64_t leaf) {
    const RotateParams& call = p_.call;
    const bool sums = p_.tensors[i].weight_gradient != nullptr;
    const int64_t D = call.D;
    const int64_t H = call.tensors[i].H;
    std::fill(chains_.begin(), chains_.end(), W{0});
    leaves.for_each_row(leaf, [&](int64_t row, int64_t chain) {
      const int64_t token = row / H, h = row % H;
      const int64_t b = token / call.S, s = token % call.S;
      if (chain == 0 || h == 0 || call.per_head) load_rows(b, s, h);
      W* const chain_sums = sums ? chains_.data() + chain * D : nullptr;
      run_on(isa_, [=, this](auto) {
        visit(call.norm->cast,
              [=, this]<Cast kCast>() { this->template backward<kCast>(i, b, s, h, chain_sums); });
      });
    });
    if (!sums) return;
    W* const leaf_sums = static_cast<W*>(p_.tensors[i].workspace) + leaf * D;
    const W* const chain = chains_.data();
    for (int64_t d = 0; d < D; ++d) {
      leaf_sums[d] = sum_of_four(chain[d], chain[D + d], chain[2 * D + d], chain[3 * D + d]);
    }
  }

 private:
  static RotateParams transposed(RotateParams call) {
    call.inverse = !call.inverse;
    return call;
  }

  void load_rows(int64_t b, int64_t s, int64_t h) {
    if (p_.call.norm->after) rows_.load(b, s, h, 0, isa_);
    transposed_.load(b, s, h, 0, isa_);
  }

  template <Cast kCast>
  void backward(int i, int64_t b, int64_t s, int64_t h, W* sums) {
    const TensorParams& t = p_.call.tensors[i];
    const GradientParams& g = p_.tensors[i];
    const auto offset = [&](const Strides& strides) {
      return b * strides.b + s * strides.s + h * strides.h;
    };
    const StridedHead<const T> in = {static_cast<const T*>(t.in) + offset(t.in_strides),
                                     t.in_strides.d};
    const StridedHead<const T> gradient = {static_cast<const T*>(g.gradient) + offset(g.strides),
                                           g.strides.d};
    StridedHead<T> dx = {nullptr, 0};
    if (t.out != nullptr) dx = {static_cast<T*>(t.out) + offset(t.out_strides), t.out_strides.d};
    head_.template backward<kCast>(i, in, gradient, dx, sums, rows_, transposed_, 0);
  }

  const NormBackwardParams& p_;
  const RotateParams transposed_call_;
  const Isa isa_;
  HeadNormalizer<T, kPrecision> head_;
  TableRows<T, kPrecision> rows_, transposed_;
  std::vector<W> chains_;  // [kChains, D]
};

// Leaves of all tensors: what norm_backward divides its work into.
inline int64_t backward_leaves(const NormBackwardParams& p) {
  int64_t count = 0;
  for (int i = 0; i < p.call.count; ++i) {
    if (p.tensors[i].gradient != nullptr) count += leaves_of(p.call, p.call.tensors[i]).count;
  }
  return count;
}

// Calls f<T, kPrecision>() with the types of a call.
template <typename F>
void visit(const RotateParams& p, const F& f) {
  visit(p.dtype, [&]<typename T>() {
    visit_precision<T>(p.precision,
                       [&]<Precision kPrecision>() { f.template operator()<T, kPrecision>(); });
  });
}

// Leaves [begin, end) of the backward: writes the gradients of their x, and the sums of their
// weight gradients to the workspaces. CallRows must be in range: call find_bad_row first.
inline void norm_backward(const NormBackwardParams& p, int64_t begin, int64_t end,
                          Isa isa = best_isa()) {
  visit(p.call, [&]<typename T, Precision kPrecision>() {
    NormBackward<T, kPrecision> backward(p, isa);
    int64_t first = 0;
    for (int i = 0; i < p.call.count; ++i) {
      if (p.tensors[i].gradient == nullptr) continue;
      const Leaves leaves = leaves_of(p.call, p.call.tensors[i]);
      const int64_t to = std::min(end - first, leaves.count);
      for (int64_t leaf = std::max<int64_t>(begin - first, 0); leaf < to; ++leaf)
        backward.run(i, leaves, leaf);
      first += leaves.count;
    }
  });
}

// Adds the sums of all leaves, after norm_backward, and writes the gradients of the weights.
inline void sum_weight_gradients(const NormBackwardParams& p) {
  visit(p.call.dtype, [&]<typename T>() {
    using W = Wide<T>;
    const int64_t D = p.call.D;
    for (int i = 0; i < p.call.count; ++i) {
      const GradientParams& tensor = p.tensors[i];
      if (tensor.gradient == nullptr || tensor.weight_gradient == nullptr) continue;
      const int64_t count = leaves_of(p.call, p.call.tensors[i]).count;
      std::vector<W> strands(kStrands * D);
      const std::vector<W> zeros(D);
      for (int64_t first = 0; first < count; first += kLeaves) {
        const auto leaf = [&](int64_t l) {
          return first + l < count ? static_cast<const W*>(tensor.workspace) + (first + l) * D
                                   : zeros.data();
        };
        W* const strand = strands.data() + first / kLeaves % kStrands * D;
        for (int64_t d = 0; d < D; ++d) {
          const W sum = sum_of_four(leaf(0)[d], leaf(1)[d], leaf(2)[d], leaf(3)[d]);
          strand[d] = add(strand[d], sum);
        }
      }
      for (int64_t n = kStrands / 2; n > 0; n /= 2) {
        for (int64_t j = 0; j < n * D; ++j) strands[j] = add(strands[j], strands[n * D + j]);
      }
      const auto write = [&]<typename Weight>() {
        auto* const out = static_cast<Weight*>(tensor.weight_gradient);
        for (int64_t d = 0; d < D; ++d) out[d] = narrow<Weight>(strands[d]);
      };
      const WeightParams& weight = p.call.norm->weights[i];
      weight.data == nullptr || weight.dtype == p.call.dtype ? write.template operator()<T>()
                                                             : write.template operator()<float>();
    }
  });
}

}  // namespace fused_rope::kernels
