// The CUDA kernels of a call with a cache, compiled for the host, against the CPU kernel of the
// rotation and a plain loop over slots.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <string>

#include "fused_rope/kernels/cpu/kernel.h"
#include "fused_rope/kernels/cuda/cache_launch.cuh"
#include "random_call.h"

namespace fused_rope::kernels {
namespace {

using testing::AllTypes;
using testing::Call;
using testing::CallKind;

std::string name_of(const std::optional<Plan>& plan, bool has_norm) {
  if (!plan.has_value()) return has_norm ? "norm, a warp each" : "a warp each";
  const std::string name = has_norm ? "norm, " : "";
  return name + (plan->arrangement == Arrangement::kPair ? "pair" : "adjacent");
}

// Stores the heads of a tensor in the slots of their tokens.
template <typename T>
void store(const RotateParams& p, const CacheTensorParams& cache, const void* data,
           const Strides& strides, int64_t H, int64_t D) {
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t s = 0; s < p.S; ++s) {
      const int64_t slot = output_row(p.rows, b, s);
      for (int64_t h = 0; h < H && slot >= 0; ++h) {
        const int64_t page = slot / p.cache->page_size, place = slot % p.cache->page_size;
        const int64_t to = page * cache.page + place * cache.place + h * cache.h;
        const auto* from =
            static_cast<const T*>(data) + b * strides.b + s * strides.s + h * strides.h;
        const float scale = cache.scale == nullptr ? 1 : cache.scale[h * cache.scale_stride];
        visit_storage<T>(p.cache->storage, [&]<typename To>() {
          for (int64_t d = 0; d < D; ++d)
            static_cast<To*>(cache.data)[to + d * cache.d] = stored<To>(from[d * strides.d], scale);
        });
      }
    }
  }
}

template <typename T>
void rotate_and_store(const RotateParams& p) {
  std::vector<T> buffer(p.B * p.S * p.tensors[1].H * p.D + 1);
  RotateParams rotation = p;
  rotation.cache = nullptr;
  rotation.rows.out_rows = {};
  TensorParams& k = rotation.tensors[1];
  if (k.out == nullptr) {
    k.out = buffer.data();
    k.out_strides = {p.S * k.H * p.D, k.H * p.D, p.D, 1};
  }
  rotate_tokens(rotation, 0, p.B * p.S);
  store<T>(p, p.cache->k, k.out, k.out_strides, k.H, p.D);
  const TensorParams& v = p.cache->values;
  if (v.in != nullptr) store<T>(p, p.cache->v, v.in, v.in_strides, v.H, p.cache->values_D);
}

TEST(SlotArgs, FindsSlotsInPagesOfAnySize) {
  constexpr int64_t kFar = int64_t{1} << 32;
  for (const int64_t page_size :
       {int64_t{1}, int64_t{17}, int64_t{INT32_MAX}, kFar / 2, kFar, kFar + 5}) {
    SCOPED_TRACE(::testing::Message() << "page size " << page_size);
    CacheParams cache = {};
    cache.storage = Storage::kInt8;
    cache.page_size = page_size;
    cache.k = {nullptr, 1000, 8, 0, 1, nullptr, 0};
    RotateParams p = {};
    p.B = p.S = 1;
    p.cache = &cache;
    p.rows.out_rows_limit = 3 * page_size;
    p.tensors[1].H = 1;
    const SlotArgs args(p, cache.k, 1, ByteStrides{}, whole_tile(p, p.tensors[1]));
    for (const int64_t slot :
         {int64_t{0}, page_size / 2, page_size - 1, page_size, 3 * page_size - 1})
      EXPECT_EQ(args.offset_of(slot), slot / page_size * 1000 + slot % page_size * 8) << slot;
  }
}

// x / scale by reciprocals, against a division: all must round to the same 8 bits.
TEST(DivisionByScale, RoundsToTheSameEightBitsAsADivision) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  std::vector<float> scales = {0.0f,     -0.0f,          kInfinity, -kInfinity, 1.0f,
                               -1.0f,    0x1p-149f,      0x1p-126f, 0x1p127f,   0x1p60f,
                               0x1p-60f, 0x1.fffffep-1f, 0x1p100f,  0x1p-100f,  0x1.000002p0f};
  testing::Random random(7);
  for (int i = 0; i < 100; ++i)
    scales.push_back(
        std::ldexp(1 + random.below(1 << 23) * 0x1p-23f, static_cast<int>(random.below(24)) - 18));
  for (const float scale : scales) {
    SCOPED_TRACE(::testing::Message() << "scale " << scale);
    const DivisionByScale by_reciprocal(scale);
    int64_t wrong = 0;
    const auto compare = [&](float x) {
      const float quotient = x / scale, other = by_reciprocal(x);
      wrong += to_float8<Float8E4M3>(quotient).bits != to_float8<Float8E4M3>(other).bits ||
               to_float8<Float8E5M2>(quotient).bits != to_float8<Float8E5M2>(other).bits ||
               to_int8(quotient) != to_int8(other);
    };
    for (uint32_t bits = 0; bits < 1u << 16; ++bits) compare(float_of(bits << 16));
    for (int i = 0; i < 4096; ++i) compare(scale * (i - 2048) / 1024.0f);  // halfway numbers, too
    EXPECT_EQ(wrong, 0);
  }
}

template <typename T>
class CudaCache : public ::testing::Test {};

TYPED_TEST_SUITE(CudaCache, AllTypes);

TYPED_TEST(CudaCache, IsBitwiseIdenticalToARotationAndPlainStores) {
  using T = typename TypeParam::Element;
  constexpr uint64_t kCalls = 800;
  std::map<std::string, int> seen;
  for (uint64_t seed = 0; seed < kCalls; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    Call<T, typename TypeParam::Table, TypeParam::kPrecision> call(seed, CallKind::kCache);
    const PlanOverrides overrides = call.overrides();
    const DeviceFacts facts = call.facts();
    const auto on_gpu = [&](const RotateParams& p) {
      const std::optional<Plan> plan = make_cache_plan(p, facts, overrides);
      ++seen[name_of(plan, p.norm != nullptr)];
      EXPECT_EQ(launch_cache<T>(p, plan, nullptr), cudaSuccess);
    };
    ASSERT_TRUE(call.run(on_gpu) == call.run(rotate_and_store<T>));
  }
  for (const char* name :
       {"norm, a warp each", "a warp each", "norm, pair", "pair", "norm, adjacent", "adjacent"}) {
    const bool expected = !std::is_same_v<T, double> || std::string(name).ends_with("each");
    EXPECT_EQ(seen.contains(name), expected) << name;
  }
}

}  // namespace
}  // namespace fused_rope::kernels
