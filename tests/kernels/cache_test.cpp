// The CPU kernel's stores to a cache, value by value and in memory that must not change.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "fused_rope/kernels/cpu/kernel.h"
#include "reference.h"

namespace fused_rope::kernels {
namespace {

using testing::Random;

struct Case {
  std::string name;
  int64_t page_size = 1;
  bool strided = false;           // elements, heads and places have gaps between them
  bool heads_first = false;       // of a page: [H, page_size, D]
  bool tokens_innermost = false;  // of k: heads are farther apart than tokens
  bool with_k_out = false;
  bool with_v = true;
  bool long_slots = true;
  int64_t scale_stride = 1;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

constexpr int64_t kB = 2, kS = 3, kHq = 3, kHk = 2, kD = 20, kDv = 12, kR = 16, kPages = 8;
constexpr int64_t kGuard = 16;
constexpr int64_t kSlots[] = {4, -1, 0, 7, 2, -1};

size_t bytes_of(Storage storage, DType dtype) {
  return storage == Storage::kOwn ? size_of(dtype) : 1;
}

// A cache of kPages pages for heads of D elements, with guard bytes around it.
struct Cache {
  Cache(const Case& c, int64_t D, size_t element) {
    const int64_t step = c.strided ? 2 : 1, gap = c.strided ? 3 : 0;
    const int64_t head = D * step + gap;
    params.d = step;
    params.h = c.heads_first ? c.page_size * head + gap : head;
    params.place = c.heads_first ? head : kHk * head + gap;
    params.page = c.heads_first ? kHk * params.h : c.page_size * params.place;
    bytes.assign((kPages * params.page + 2 * kGuard) * element, std::byte{0x5a});
  }

  CacheTensorParams params = {};
  std::vector<std::byte> bytes;
};

template <typename T>
class Call {
 public:
  Call(const Case& c, Storage storage)
      : c_(c),
        element_(bytes_of(storage, testing::kDType<T>)),
        k_cache_(c, kD, element_),
        v_cache_(c, kDv, element_) {
    Random random(5);
    const auto draw = [&](std::vector<T>& values, int64_t n) {
      for (int64_t i = 0; i < n; ++i)
        values.push_back(narrow<T>(static_cast<Wide<T>>(100 * random.normal())));
    };
    draw(q_, kB * kS * kHq * kD);
    draw(k_, kB * kS * kHk * kD);
    draw(v_, kB * kS * kHk * kDv);
    for (int64_t i = 0; i < kS * kR / 2; ++i) {
      const double angle = 3 * random.normal();
      cos_.push_back(static_cast<Wide<T>>(std::cos(angle)));
      sin_.push_back(static_cast<Wide<T>>(std::sin(angle)));
    }
    q_out_.resize(q_.size());
    k_out_.resize(k_.size());
    set_params(storage);
  }

  void run(Isa isa) {
    rotate_tokens(p_, 0, 2, isa);  // in ranges, as threads do
    rotate_tokens(p_, 2, kB * kS, isa);
  }

  // Compares the caches with the tokens that a call without a cache rotates.
  void check() {
    RotateParams rotation = p_;
    std::vector<T> q(q_.size()), k(k_.size());
    rotation.cache = nullptr;
    rotation.rows.out_rows = {};
    rotation.tensors[0].out = q.data();
    rotation.tensors[1].out = k.data();
    rotation.tensors[1].out_strides = p_.tensors[1].in_strides;
    rotate_tokens(rotation, 0, kB * kS, Isa::kBaseline);
    EXPECT_EQ(std::memcmp(q.data(), q_out_.data(), q.size() * sizeof(T)), 0) << "q_out";
    if (c_.with_k_out) {
      EXPECT_EQ(std::memcmp(k.data(), k_out_.data(), k.size() * sizeof(T)), 0) << "k_out";
    }
    visit_storage<T>(cache_.storage, [&]<typename To>() {
      expect_stored<To>(k_cache_, Cache(c_, kD, element_), k, kD, p_.tensors[1].in_strides, 0);
      const std::vector<T> nothing;
      expect_stored<To>(v_cache_, Cache(c_, kDv, element_), c_.with_v ? v_ : nothing, kDv,
                        cache_.values.in_strides, 1);
    });
  }

 private:
  void set_params(Storage storage) {
    const auto strides = [&](int64_t H, int64_t D) {
      return c_.tokens_innermost ? Strides{kS * H * D, D, kS * D, 1}
                                 : Strides{kS * H * D, H * D, D, 1};
    };
    p_.B = kB;
    p_.S = kS;
    p_.D = kD;
    p_.count = 2;
    p_.tensors[0] = {q_.data(), q_out_.data(), strides(kHq, kD), strides(kHq, kD), kHq, false};
    p_.tensors[1] = {k_.data(),
                     c_.with_k_out ? k_out_.data() : nullptr,
                     strides(kHk, kD),
                     c_.with_k_out ? strides(kHk, kD) : Strides{},
                     kHk,
                     false};
    p_.pairing = {kR / 2, 2, kR / 2};
    p_.cos = {cos_.data(), kR / 2, 0, 0, 0, 1};
    p_.sin = {sin_.data(), kR / 2, 0, 0, 0, 1};
    p_.dtype = testing::kDType<T>;
    p_.table_dtype = testing::kDType<Wide<T>>;
    p_.rows.M = kS;
    short_slots_.assign(std::begin(kSlots), std::end(kSlots));
    p_.rows.out_rows = {c_.long_slots ? static_cast<const void*>(kSlots) : short_slots_.data(),
                        c_.long_slots};
    p_.rows.out_rows_b = kS;
    p_.rows.out_rows_s = 1;
    p_.rows.out_rows_limit = kPages * c_.page_size;
    cache_.k = k_cache_.params;
    cache_.v = v_cache_.params;
    cache_.page_size = c_.page_size;
    cache_.storage = storage;
    for (auto [tensor, cache, scale] :
         {std::tuple{&cache_.k, &k_cache_, k_scale_}, std::tuple{&cache_.v, &v_cache_, v_scale_}}) {
      tensor->data = cache->bytes.data() + kGuard * element_;
      if (storage == Storage::kOwn) continue;
      tensor->scale = scale;
      tensor->scale_stride = c_.scale_stride;
    }
    if (c_.with_v) {
      cache_.values = {v_.data(), nullptr, strides(kHk, kDv), {}, kHk, false};
      cache_.values_D = kDv;
    }
    p_.cache = &cache_;
  }

  template <typename To>
  void expect_stored(const Cache& got, Cache expected, const std::vector<T>& x, int64_t D,
                     const Strides& in, int tensor) const {
    To* const to = reinterpret_cast<To*>(expected.bytes.data()) + kGuard;
    const float* const scales = tensor == 0 ? k_scale_ : v_scale_;
    for (int64_t token = 0; token < kB * kS && !x.empty(); ++token) {
      if (kSlots[token] == -1) continue;
      const int64_t page = kSlots[token] / c_.page_size, place = kSlots[token] % c_.page_size;
      for (int64_t h = 0; h < kHk; ++h) {
        for (int64_t d = 0; d < D; ++d) {
          const T value = x[token / kS * in.b + token % kS * in.s + h * in.h + d];
          To& at = to[page * got.params.page + place * got.params.place + h * got.params.h +
                      d * got.params.d];
          if constexpr (std::is_same_v<To, T>) {
            at = value;
          } else {
            at = narrow<To>(static_cast<float>(testing::to_double(value)) /
                            scales[h * c_.scale_stride]);
          }
        }
      }
    }
    EXPECT_EQ(std::memcmp(got.bytes.data(), expected.bytes.data(), got.bytes.size()), 0)
        << (tensor == 0 ? "k_cache" : "v_cache");
  }

  const Case c_;
  const size_t element_;
  Cache k_cache_, v_cache_;
  std::vector<T> q_, k_, v_, q_out_, k_out_;
  std::vector<Wide<T>> cos_, sin_;
  std::vector<int32_t> short_slots_;
  const float k_scale_[2] = {0.7f, 3.0f}, v_scale_[2] = {0.01f, 1.0f};
  CacheParams cache_ = {};
  RotateParams p_ = {};
};

class CpuCache : public ::testing::TestWithParam<Case> {
 protected:
  template <typename T>
  static void check() {
    for (const Storage storage : {Storage::kOwn, Storage::kE4M3, Storage::kE5M2, Storage::kInt8}) {
      for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
        if (!has(isa)) continue;
        SCOPED_TRACE("storage " + std::to_string(static_cast<int>(storage)) + " isa " +
                     std::to_string(static_cast<int>(isa)));
        Call<T> call(GetParam(), storage);
        call.run(isa);
        call.check();
      }
    }
  }
};

TEST_P(CpuCache, Float16) { check<Float16>(); }
TEST_P(CpuCache, BFloat16) { check<BFloat16>(); }
TEST_P(CpuCache, Float32) { check<float>(); }
TEST_P(CpuCache, Float64) { check<double>(); }

INSTANTIATE_TEST_SUITE_P(
    Cases, CpuCache,
    ::testing::Values(
        Case{.name = "rows"}, Case{.name = "pages_of_3", .page_size = 3},
        Case{.name = "pages_of_4", .page_size = 4, .with_k_out = true},
        Case{.name = "gaps", .page_size = 3, .strided = true},
        Case{.name = "heads_first", .page_size = 4, .heads_first = true},
        Case{.name = "tokens_innermost", .tokens_innermost = true},
        Case{.name = "tokens_innermost_out", .tokens_innermost = true, .with_k_out = true},
        Case{.name = "k_alone", .with_v = false}, Case{.name = "short_slots", .long_slots = false},
        Case{.name = "one_scale", .scale_stride = 0}),
    [](const auto& info) { return info.param.name; });

TEST(CpuCache, FindsSlotsOutsideTheCache) {
  const int64_t slots[] = {4, -1, 5, -2};
  RotateParams p = {};
  p.B = 1;
  p.rows.gathered = true;
  p.rows.out_rows_s = 1;
  p.rows.out_rows_limit = 5;
  for (const auto& [first, index] : {std::pair{0, int64_t{5}}, std::pair{3, int64_t{-2}}}) {
    p.S = 4 - first;
    p.rows.out_rows = {slots + first, true};
    const auto bad = find_bad_row(p, 0, p.S);
    ASSERT_TRUE(bad.has_value());
    EXPECT_TRUE(bad->output);
    EXPECT_EQ(bad->index, index);
  }
}

TEST(SlotOffset, DividesBothWays) {
  CacheParams p = {};
  p.page_size = 17;
  const CacheTensorParams cache = {nullptr, 1000, 50, 10, 1, nullptr, 0};
  EXPECT_EQ(slot_offset(p, cache, 17 * 3 + 16, 2), 3 * 1000 + 16 * 50 + 20);
  const int64_t far = int64_t{1} << 40;
  EXPECT_EQ(slot_offset(p, cache, 17 * far + 1, 0), far * 1000 + 50);
}

}  // namespace
}  // namespace fused_rope::kernels
