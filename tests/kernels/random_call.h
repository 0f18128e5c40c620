// Random calls of every form, and the memory they point to.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <iterator>
#include <utility>
#include <vector>

#include "fused_rope/kernels/cache.h"
#include "fused_rope/kernels/plan.h"
#include "fused_rope/kernels/weight_gradients.h"
#include "reference.h"

namespace fused_rope::kernels::testing {

constexpr int64_t kRows = 24;           // M
constexpr int64_t kMaxPackedHeads = 3;  // heads of k that follow q's in memory
constexpr int64_t kNoIndex = 1 << 30;   // between indices
constexpr int64_t kGuard = 16;          // elements around every tensor that must not change

// Random numbers in memory aligned to 64 bytes.
template <typename T>
class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t size) : lines_(size * sizeof(T) / 64 + 2) {}
  // `magnitude` may make them subnormal in T; one in 64 is a zero of either sign.
  Memory(int64_t size, Random& random, double magnitude = 1) : Memory(size) {
    for (int64_t i = 0; i < size; ++i) {
      const double factor = random.below(64) == 0 ? 0 : magnitude;
      data()[i] = narrow<T>(static_cast<Wide<T>>(random.normal() * factor));
    }
  }
  T* data() { return reinterpret_cast<T*>(lines_.data()); }
  bool operator==(const Memory& other) const {
    return std::memcmp(lines_.data(), other.lines_.data(), lines_.size() * 64) == 0;
  }

 private:
  struct alignas(64) Line {
    unsigned char bytes[64] = {};
  };
  std::vector<Line> lines_;
};

enum class CallKind { kRotation, kNorm, kNormBackward, kCache };

// What a call has written.
template <typename T>
struct Results {
  std::vector<Memory<T>> tensors;
  std::vector<Memory<float>> weight_gradients;  // of either dtype
  bool operator==(const Results&) const = default;
};

// A random call: every field of RotateParams, and the memory it points to.
template <typename T, typename Table, Precision kPrecision>
class Call {
 public:
  explicit Call(uint64_t seed, CallKind kind = CallKind::kRotation) : random_(seed), kind_(kind) {
    draw_shape();
    draw_tables();
    draw_rows();
    for (int i = 0; i < p_.count; ++i) draw_tensor(i);
    if (kind != CallKind::kRotation && (kind != CallKind::kCache || chance(2))) draw_norm();
    for (int i = 0; i < p_.count && p_.norm == nullptr && chance(4); ++i)
      draw_bits(in_[i], p_.tensors[i], p_.D, p_.pairing.offset, p_.pairing.end());
    if (kind == CallKind::kCache) draw_cache();
    p_.dtype = kDType<T>;
    p_.table_dtype = kDType<Table>;
    p_.precision = kPrecision;
    p_.inverse = chance(2);
  }

  // Calls `rotate` on a copy of the inputs and returns all memory after it.
  template <typename F>
  std::vector<Memory<T>> run(const F& rotate) {
    std::vector<Memory<T>> memory = memory_;
    RotateParams p = p_;
    for (int i = 0; i < p.count; ++i) {
      p.tensors[i].in = memory[in_[i].memory].data() + in_[i].first;
      p.tensors[i].out = memory[out_[i].memory].data() + out_[i].first;
    }
    CacheParams cache = cache_;
    if (kind_ == CallKind::kCache) {
      if (cache.k.data == nullptr) {
        p.tensors[1].out = nullptr;
        p.tensors[1].out_strides = {};
      }
      for (int i = 0; i < kMaxTensors; ++i)
        (i == 0 ? cache.k : cache.v).data = memory[caches_[i].memory].data() + caches_[i].first;
      if (has_values_) cache.values.in = memory[values_.memory].data() + values_.first;
      p.cache = &cache;
    }
    rotate(p);
    return memory;
  }

  // Calls `backward` with gradients of the outputs, and returns all memory after it.
  template <typename F>
  Results<T> run_backward(const F& backward) {
    Results<T> results = {memory_, {}};
    NormBackwardParams p = {};
    p.call = p_;
    std::vector<std::vector<Wide<T>>> workspaces;
    for (int i = 0; i < p_.count; ++i) {
      TensorParams& t = p.call.tensors[i];
      const Wanted& wanted = wanted_[i];
      t.in = results.tensors[in_[i].memory].data() + in_[i].first;
      t.out = wanted.dx ? results.tensors[out_[i].memory].data() + out_[i].first : nullptr;
      const int64_t bytes = workspace_bytes(p_.B, p_.S, t.H, p_.D, p_.dtype);
      workspaces.emplace_back(bytes / sizeof(Wide<T>) + 1);
      results.weight_gradients.push_back(Memory<float>(2 * p_.D + kGuard));
      if (!wanted.gradient) continue;
      p.tensors[i] = {results.tensors[gradients_[i].memory].data() + gradients_[i].first,
                      gradient_strides_[i],
                      wanted.weight ? results.weight_gradients.back().data() : nullptr,
                      workspaces.back().data()};
    }
    backward(p);
    return results;
  }

  PlanOverrides overrides() {
    PlanOverrides o;
    if (chance(3)) o.vector = static_cast<int>(size_of(kDType<T>)) << random_.below(2);
    if (chance(4)) o.full = 0;
    if (chance(2)) o.threads = 32 << random_.below(4);
    if (chance(3)) o.work = static_cast<int>(random_.below(100));
    return o;
  }

  // Without multiprocessors every call is a large one.
  DeviceFacts facts() {
    return {chance(2) ? 0 : int64_t{1} << 40, random_.below(3) * 44,
            random_.below(2) * (228 << 10)};
  }

 private:
  struct Location {
    size_t memory;
    int64_t first;
  };

  bool chance(int64_t n) { return random_.below(n) == 0; }

  void draw_shape() {
    constexpr int64_t kVector = kVectorBytes / sizeof(T);
    p_.B = 1 + random_.below(3);
    p_.S = 1 + random_.below(6);
    if (chance(8)) {  // decode
      p_.B = 1 + random_.below(40);
      p_.S = 1;
    }
    p_.D = chance(4) ? 2 + random_.below(24) : kVector * (2 + random_.below(chance(8) ? 63 : 5));
    if (chance(40)) p_.D = 1024 - (chance(2) ? 0 : random_.below(100));
    p_.count = kind_ != CallKind::kCache && chance(3) ? 1 : 2;
    const int64_t widest = p_.D / 2;
    int64_t P = chance(3) ? random_.below(widest + 1) : chance(8) ? 1 : widest;
    if (chance(2)) P = std::max<int64_t>(P / kVector * kVector, std::min(kVector, widest));
    int64_t distance = P;
    const int64_t style = random_.below(4);
    if (style == 0 && P > 0) distance = 1;
    if (style == 1 && P % 2 == 0 && P > 0) distance = P / 2;
    int64_t offset = chance(2) ? 0 : random_.below(p_.D - 2 * P + 1);
    if (chance(2)) offset = offset / kVector * kVector;
    p_.pairing = {P, offset, distance};
    p_.in_place = kind_ != CallKind::kNormBackward && kind_ != CallKind::kCache && chance(3);
    simple_ = kind_ != CallKind::kRotation && !chance(3);
    if (simple_) {
      p_.D = 2 * kVector * (1 + random_.below(chance(4) ? 2 * kWarp : 8));
      p_.pairing = {p_.D / 2, 0, chance(2) ? 1 : p_.D / 2};
    }
  }

  void draw_norm() {
    for (int i = 0; i < p_.count; ++i) {
      WeightParams& weight = norm_.weights[i];
      const bool is_wide = chance(3);
      weight.stride = !simple_ && chance(6) ? 2 * random_.below(2) : 1;
      const int64_t first = !simple_ && chance(6) ? 1 : 0;
      const int64_t size = 2 * p_.D + first;
      weights_[i] = Memory<T>(size, random_);
      wide_weights_[i] = Memory<float>(size, random_);
      weight.dtype = is_wide ? DType::kFloat32 : kDType<T>;
      if (chance(4)) continue;
      weight.data = is_wide ? static_cast<const void*>(wide_weights_[i].data() + first)
                            : static_cast<const void*>(weights_[i].data() + first);
    }
    norm_.eps = chance(2) ? 1e-6 : 0.25;
    norm_.zero_centered = chance(2);
    norm_.cast = static_cast<Cast>(random_.below(3));
    norm_.after = chance(2);
    if (kPrecision == Precision::kModel && norm_.cast == Cast::kNever) norm_.cast = Cast::kAfter;
    p_.norm = &norm_;
    if (kind_ != CallKind::kNormBackward) return;
    for (int i = 0; i < p_.count; ++i) {
      int64_t size = 0;
      const int64_t H = p_.tensors[i].H;
      gradient_strides_[i] = draw_strides(p_.B, p_.S, std::max<int64_t>(H, 1), &size);
      if (chance(5)) expand(gradient_strides_[i]);
      gradients_[i] = {add(size), kGuard + (chance(8) ? 1 : 0)};
      wanted_[i] = {!chance(8), !chance(4), !chance(4)};
    }
  }

  // A cache of a few pages, and v.
  void draw_cache() {
    cache_.storage = static_cast<Storage>(random_.below(4));
    cache_.page_size = 1 + random_.below(chance(2) ? 3 : 17);
    const int64_t tokens = p_.B * p_.S;
    const int64_t pages = ceil_divide(tokens, cache_.page_size) + random_.below(3);
    p_.rows.out_rows_limit = pages * cache_.page_size;
    std::vector<int64_t> slots(p_.rows.out_rows_limit);
    for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
    for (size_t i = slots.size() - 1; i > 0; --i) std::swap(slots[i], slots[random_.below(i + 1)]);
    slots.resize(tokens);
    for (int64_t& slot : slots) slot = chance(5) ? -1 : slot;
    set_out_rows(slots);
    const int64_t H = p_.tensors[1].H;
    const int64_t D = p_.D;
    draw_slots(cache_.k, 0, pages, H);
    if (!simple_ && chance(2)) p_.D = 1 + random_.below(40);
    if (simple_ && chance(2)) p_.D = kVectorBytes / int64_t{sizeof(T)} * (1 + random_.below(9));
    cache_.values_D = p_.D;
    draw_slots(cache_.v, 1, pages, H);
    int64_t size = 0;
    cache_.values.in_strides = draw_strides(p_.B, p_.S, std::max<int64_t>(H, 1), &size);
    cache_.values.H = H;
    values_ = {add(size), kGuard};
    if (chance(4)) draw_bits(values_, cache_.values, cache_.values_D, 0, 0);
    p_.D = D;
    has_values_ = !chance(5);
    if (!chance(3)) cache_.k.data = &cache_;  // k_out is wanted, too
  }

  // A cache [pages, page_size, H, D] of at least the bytes that its storage needs.
  void draw_slots(CacheTensorParams& t, int i, int64_t pages, int64_t H) {
    int64_t size = 0;
    const Strides strides = draw_strides(pages, cache_.page_size, std::max<int64_t>(H, 1), &size);
    t.page = strides.b;
    t.place = strides.s;
    t.h = strides.h;
    t.d = strides.d;
    caches_[i] = {add(size), kGuard};
    if (cache_.storage == Storage::kOwn) return;
    scales_[i].resize(2 * std::max<int64_t>(H, 1));
    constexpr float kScales[] = {0, -0.3f, 1, 0x1p-70f, 0x1p-149f, 0x1p90f, INFINITY};
    for (float& scale : scales_[i]) {
      scale = static_cast<float>(0.002 + random_.below(50) / 1000.0);
      if (chance(20)) scale = kScales[random_.below(std::size(kScales))];
    }
    t.scale = scales_[i].data();
    t.scale_stride = random_.below(3);
  }

  // Tables whose rows are aligned to vectors, or slightly misaligned.
  void draw_tables() {
    const int64_t step = !simple_ && chance(5) ? 2 * random_.below(2) : 1;  // 0: expanded columns
    const int64_t P = p_.pairing.P;
    const int64_t row =
        simple_ || chance(2) ? (P + 15) / 16 * 16 * step : P * step + random_.below(3);
    TableParams t = {nullptr, 0, 0, 0, 0, step};
    const int64_t form = std::max<int64_t>(random_.below(5) - 2, 0);  // shared, per token, per head
    int64_t H = 1;
    if (form == 0) {
      t.m = chance(12) ? 0 : row;
    } else {
      p_.per_head = form == 2;
      heads_ = 1 + random_.below(5);
      H = p_.per_head ? heads_ : 1;
      t.h = p_.per_head ? row : 0;
      t.s = chance(12) ? 0 : H * row;
      t.b = chance(2) ? 0 : p_.S * H * row;
    }
    p_.rows.gathered = form != 0;
    const int64_t size = form == 0 ? kRows * row : p_.B * p_.S * H * row;
    cos_ = Memory<Table>(size + kGuard, random_);
    sin_ = Memory<Table>(3 * size + kGuard, random_);
    p_.cos = p_.sin = t;
    if (chance(4)) {  // sin has other strides
      p_.sin = {nullptr, 2 * t.m, 2 * t.b, 2 * t.s, 2 * t.h, t.j};
    }
    p_.cos.data = cos_.data() + (!simple_ && chance(4) ? 1 : 0);
    p_.sin.data = sin_.data();
    if (P == 0) p_.cos.data = p_.sin.data = nullptr;  // no entry may be read
  }

  void draw_rows() {
    RowParams& rows = p_.rows;
    rows.M = kRows;
    if (rows.gathered) return;
    rows.offset = random_.below(4);
    const bool only_positions = chance(4);
    const bool has_axes = !only_positions && chance(4) && p_.pairing.P > 0;
    const int64_t axes = has_axes ? 1 + random_.below(3) : 0;
    if (axes > 0) {
      const int64_t group = chance(2) ? 16 : 1 + random_.below(3);  // consecutive pairs of one axis
      for (int64_t j = 0; j < p_.pairing.P; ++j) axes_.push_back(j / group % axes);
      if (chance(3)) std::replace(axes_.begin(), axes_.end(), random_.below(axes), axes - 1);
      p_.axes = axes_.data();
    }
    if (axes > 0 || only_positions || chance(3)) {
      rows.positions = positions(std::max<int64_t>(axes, 1), rows);
    }
    if (only_positions) return;
    if (p_.B == 1 && !chance(3)) {
      rows.N = random_.below(chance(2) ? 5 : 91);
      std::vector<int64_t> starts(rows.N + 1);
      for (int64_t& start : starts) start = random_.below(p_.S + 1);
      std::sort(starts.begin(), starts.end());
      if (rows.N > 0) starts[0] = 0;
      rows.cu_seqlens_stride = chance(4) ? 3 : 1;
      rows.cu_seqlens = integers(starts, rows.cu_seqlens_stride);
    }
    if (chance(3)) {
      std::vector<int64_t> offsets(std::max<int64_t>(p_.B, rows.N));
      for (int64_t& offset : offsets) offset = random_.below(5);
      rows.offsets_stride = chance(4) ? 2 * random_.below(2) : 1;
      rows.offsets = integers(offsets, rows.offsets_stride);
    }
  }

  // [axes, B, S], in this order or the reverse. An axis that no pair has may be out of range. Far
  // positions come with an offset that brings them back.
  IndexParams positions(int64_t axes, RowParams& rows) {
    const int64_t far = chance(4) ? int64_t{1} << (24 + random_.below(39)) : 0;
    const int64_t shift = chance(2) ? far : -far;
    rows.offset -= shift;
    const bool reversed = chance(4);
    rows.positions_a = reversed ? 1 : p_.B * p_.S;
    rows.positions_b = reversed ? axes : p_.S;
    rows.positions_s = reversed ? axes * p_.B : 1;
    std::vector<int64_t> values(axes * p_.B * p_.S);
    for (size_t i = 0; i < values.size(); ++i) {
      const auto at = static_cast<int64_t>(i);
      const int64_t axis = reversed ? at % axes : at / (p_.B * p_.S);
      const bool unused = !axes_.empty() && std::count(axes_.begin(), axes_.end(), axis) == 0;
      const int64_t row = random_.below(13) - 1;
      values[i] = row == -1 ? -1 : shift + (unused ? 2 * kRows : row);
    }
    if (chance(4)) rows.positions_b = 0;
    if (chance(8)) rows.positions_s = 0;
    return integers(values, 1, far > INT32_MAX / 2);
  }

  // In memory `stride` apart, or all the first one for 0.
  IndexParams integers(const std::vector<int64_t>& values, int64_t stride = 1,
                       bool is_long = false) {
    const auto step = static_cast<size_t>(std::max<int64_t>(stride, 1));
    std::vector<int64_t> spread(values.size() * step, kNoIndex);
    for (size_t i = 0; i < values.size(); ++i) spread[i * step] = values[i];
    if (is_long || chance(2)) {
      longs_.push_back(std::move(spread));
      return {longs_.back().data(), true};
    }
    ints_.emplace_back(spread.begin(), spread.end());
    return {ints_.back().data(), false};
  }

  // Sets the output rows or slots [B, S].
  void set_out_rows(const std::vector<int64_t>& out_rows) {
    RowParams& rows = p_.rows;
    const int64_t stride = chance(4) ? 2 : 1;
    const bool transposed = chance(4);
    rows.out_rows_b = (transposed ? 1 : p_.S) * stride;
    rows.out_rows_s = (transposed ? p_.B : 1) * stride;
    rows.out_rows = integers(out_rows, stride);
  }

  // Strides of [B, S, H, D] in a random order of the first three, elements contiguous or strided.
  Strides draw_strides(int64_t B, int64_t S, int64_t H, int64_t* size) {
    constexpr int64_t kVector = kVectorBytes / sizeof(T);
    Strides strides = {};
    strides.d = chance(20) ? 2 : 1;
    int64_t next = p_.D * strides.d;
    if (chance(3)) next += chance(2) ? kVector : 1;
    std::array<std::pair<int64_t*, int64_t>, 3> axes = {
        {{&strides.b, B}, {&strides.s, S}, {&strides.h, H}}};
    if (chance(2)) std::swap(axes[1], axes[2]);
    if (chance(4)) std::swap(axes[0], axes[1]);
    for (int i = 2; i >= 0; --i) {
      *axes[i].first = next;
      next *= axes[i].second;
    }
    *size = next;
    return strides;
  }

  void expand(Strides& strides) {
    if (chance(2)) strides.b = 0;
    if (chance(2)) strides.s = 0;
    if (chance(2) && !packed_) strides.h = 0;
  }

  // Now and then with numbers that are subnormal in float16, in bfloat16 or in all types.
  size_t add(int64_t size) {
    constexpr double kTiny[] = {0x1p-22, 0x1p-132, 0x1p-148};
    const double magnitude = chance(10) ? kTiny[random_.below(3)] : 1;
    memory_.emplace_back(size + 2 * kGuard, random_, magnitude);
    return memory_.size() - 1;
  }

  // Gives the elements of each head that are not in [first, end) any bits, those of NaNs too.
  void draw_bits(const Location& at, const TensorParams& t, int64_t D, int64_t first, int64_t end) {
    const Strides& strides = t.in_strides;
    for (int64_t head = 0; head < p_.B * p_.S * t.H; ++head) {
      const int64_t h = head % t.H, s = head / t.H % p_.S, b = head / t.H / p_.S;
      T* const x =
          memory_[at.memory].data() + at.first + b * strides.b + s * strides.s + h * strides.h;
      for (int64_t d = 0; d < D; ++d) {
        const uint64_t bits = random_.bits();
        if (d < first || d >= end) std::memcpy(x + d * strides.d, &bits, sizeof(T));
      }
    }
  }

  // Heads that a tensor's memory holds: its own, and k's after q's in a packed tensor.
  int64_t held_heads(const TensorParams& t) const {
    return std::max<int64_t>(t.H + (packed_ ? std::max(kMaxPackedHeads, heads_) : 0), 1);
  }

  void draw_tensor(int i) {
    TensorParams& t = p_.tensors[i];
    t.H = p_.per_head ? heads_ : random_.below(chance(16) ? 40 : 5);
    const bool follows = i == 1 && p_.tensors[0].H > 0 && packed_;
    int64_t size = 0;
    if (follows) {  // k's heads follow q's
      t = p_.tensors[0];
      t.H = p_.per_head ? heads_ : 1 + random_.below(kMaxPackedHeads);
      in_[1] = {in_[0].memory, in_[0].first + p_.tensors[0].H * t.in_strides.h};
    } else {
      packed_ = i == 0 && chance(2);
      t.in_strides = draw_strides(p_.B, p_.S, held_heads(t), &size);
      if (!p_.in_place && chance(5)) expand(t.in_strides);
      in_[i] = {add(size), kGuard};
    }
    if (p_.in_place) {
      t.out_strides = t.in_strides;
      out_[i] = in_[i];
      return;
    }
    const bool can_scatter = kind_ == CallKind::kRotation || kind_ == CallKind::kNorm;
    t.scattered = can_scatter && i + 1 == p_.count && !p_.rows.gathered && chance(4);
    if (t.scattered) {
      std::vector<int64_t> slots(p_.B * p_.S);
      for (size_t j = 0; j < slots.size(); ++j)
        slots[j] = chance(4) ? -1 : static_cast<int64_t>(2 * j);
      set_out_rows(slots);
      p_.rows.out_rows_limit = 2 * p_.B * p_.S;
      t.out_strides = draw_strides(1, p_.rows.out_rows_limit, std::max<int64_t>(t.H, 1), &size);
    } else {
      if (follows && chance(2)) {  // k's output heads follow q's
        t.out_strides = p_.tensors[0].out_strides;
        out_[i] = {out_[0].memory, out_[0].first + p_.tensors[0].H * t.out_strides.h};
        return;
      }
      t.out_strides = draw_strides(p_.B, p_.S, held_heads(t), &size);
    }
    out_[i] = {add(size), kGuard};
  }

  struct Wanted {
    bool gradient, dx, weight;
  };

  Random random_;
  CallKind kind_;
  RotateParams p_ = {};
  NormParams norm_ = {};
  Memory<T> weights_[kMaxTensors];
  Memory<float> wide_weights_[kMaxTensors];
  Wanted wanted_[kMaxTensors] = {};
  Location gradients_[kMaxTensors] = {};
  Strides gradient_strides_[kMaxTensors] = {};
  int64_t heads_ = 0;
  bool packed_ = false;
  bool has_values_ = false;
  bool simple_ = false;  // whole heads in whole vectors, if the tensors' memory allows
  Memory<Table> cos_, sin_;
  std::vector<int64_t> axes_;
  std::vector<Memory<T>> memory_;
  std::vector<std::vector<int64_t>> longs_;
  std::vector<std::vector<int32_t>> ints_;
  Location in_[kMaxTensors] = {}, out_[kMaxTensors] = {}, caches_[kMaxTensors] = {}, values_ = {};
  CacheParams cache_ = {};  // k.data: whether k_out is wanted
  std::vector<float> scales_[kMaxTensors];
};

// The types of a call, of elements, of a table, and its precision.
template <typename ElementT, typename TableT, Precision kPrecisionOfCall>
struct Types {
  using Element = ElementT;
  using Table = TableT;
  static constexpr Precision kPrecision = kPrecisionOfCall;
};
#if defined(__SANITIZE_ADDRESS__)  // all types take minutes to compile
using AllTypes = ::testing::Types<Types<BFloat16, float, Precision::kFp32>,
                                  Types<double, double, Precision::kFp32>>;
#else
using AllTypes =
    ::testing::Types<Types<BFloat16, float, Precision::kFp32>,
                     Types<BFloat16, BFloat16, Precision::kModel>,
                     Types<Float16, float, Precision::kFp32>, Types<float, float, Precision::kFp32>,
                     Types<double, double, Precision::kFp32>>;
#endif

}  // namespace fused_rope::kernels::testing
