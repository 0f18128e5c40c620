// rotate_and_cache through libtorch: every option and what it refuses. tests/python compares the
// operator with an oracle.
#include "testing.h"

namespace fused_rope {
namespace {

using testing::expect_identical;
using testing::OnDevice;

class RotateAndCache : public OnDevice {
 protected:
  at::Tensor slots() const { return at::tensor({7, -1, 0, 11}, at::kLong).to(device()); }
  // The same, without the token that is not stored.
  at::Tensor kept() const { return at::tensor({7, 0, 11}, at::kLong).to(device()); }
  static at::Tensor kept_tokens(const at::Tensor& x) {
    return at::cat({x.narrow(0, 0, 1), x.narrow(0, 2, 2)});
  }
};
FUSED_ROPE_ON_DEVICES(RotateAndCache);

const RotateOptions kPacked = RotateOptions().layout(Layout::kTHD).offset(3);

TEST_P(RotateAndCache, StoresKAndV) {
  const auto [cos, sin] = tables({9, 8});
  const at::Tensor q = randn({4, 3, 16}), k = randn({4, 2, 16}), v = randn({4, 2, 12});
  const at::Tensor k_cache = randn({3, 5, 2, 16}), v_cache = randn({3, 5, 2, 12});
  const at::Tensor k_expected = k_cache.view({15, 2, 16}).clone();
  const at::Tensor v_expected = v_cache.view({15, 2, 12}).clone();
  const auto [q_rotated, k_rotated] = rotate_qk(q, k, cos, sin, kPacked);
  k_expected.index_put_({kept()}, kept_tokens(k_rotated));
  v_expected.index_put_({kept()}, kept_tokens(v));
  const auto version = k_cache._version();
  expect_identical(
      rotate_and_cache(q, k, v, cos, sin, k_cache, v_cache, slots(), CacheOptions(), kPacked),
      q_rotated);
  EXPECT_GT(k_cache._version(), version);
  expect_identical(k_cache.view({15, 2, 16}), k_expected);
  expect_identical(v_cache.view({15, 2, 12}), v_expected);
}

TEST_P(RotateAndCache, OptionsSelectOutputsAndNorm) {
  const auto [cos, sin] = tables({9, 8});
  const at::Tensor q = randn({4, 3, 16}), k = randn({4, 2, 16});
  const at::Tensor q_weight = randn({16}), k_weight = randn({16});
  const at::Tensor q_out = at::empty_like(q), k_out = at::empty_like(k);
  const at::Tensor cache = at::zeros({15, 2, 16}, q.options());
  const NormOptions norm = NormOptions(1e-6).zero_centered(true).after(true);
  const CacheOptions options =
      CacheOptions().q_out(q_out).k_out(k_out).norm(norm).q_weight(q_weight).k_weight(k_weight);
  const at::Tensor got = rotate_and_cache(q, k, std::nullopt, cos, sin, cache, std::nullopt,
                                          slots().to(at::kInt), options, kPacked);
  EXPECT_TRUE(got.is_same(q_out));
  const auto [q_expected, k_expected] =
      norm_rotate_qk(q, k, cos, sin, q_weight, k_weight, norm, kPacked);
  expect_identical(q_out, q_expected);
  expect_identical(k_out, k_expected);
  expect_identical(cache.index_select(0, kept()), kept_tokens(k_expected));
}

TEST_P(RotateAndCache, StoresEightBits) {
  const auto [cos, sin] = tables({9, 8});
  const at::Tensor q = randn({4, 3, 16}), k = randn({4, 2, 16}), v = randn({4, 2, 16});
  const at::Tensor scale = at::full({2}, 0.25f, q.options().dtype(at::kFloat));
  const at::Tensor k_rotated = rotate(k, cos, sin, kPacked);
  for (const at::ScalarType type : {at::kFloat8_e4m3fn, at::kFloat8_e5m2, at::kChar}) {
    const at::Tensor k_cache = at::zeros({15, 2, 16}, q.options().dtype(type));
    const at::Tensor v_cache = at::zeros({15, 2, 16}, q.options().dtype(type));
    const CacheOptions options = CacheOptions().k_scale(scale).v_scale(scale.select(0, 0));
    rotate_and_cache(q, k, v, cos, sin, k_cache, v_cache, slots(), options, kPacked);
    for (const auto& [cache, x] : {std::pair{k_cache, k_rotated}, std::pair{v_cache, v}}) {
      const at::Tensor quotient = x / 0.25;
      const at::Tensor stored = (type == at::kChar ? quotient.round() : quotient).to(type);
      expect_identical(cache.to(at::kFloat).index_select(0, kept()),
                       kept_tokens(stored.to(at::kFloat)));
    }
  }
}

TEST_P(RotateAndCache, RefusesMistakes) {
  const auto [cos, sin] = tables({9, 8});
  const at::Tensor q = randn({4, 3, 16}), k = randn({4, 2, 16}), cache = randn({15, 2, 16});
  const auto call = [&](const at::Tensor& to, const CacheOptions& options,
                        const RotateOptions& rotation) {
    rotate_and_cache(q, k, std::nullopt, cos, sin, to, std::nullopt, slots(), options, rotation);
  };
  const CacheOptions with_scale = CacheOptions().k_scale(at::ones({}, q.options()));
  EXPECT_THROW(call(cache, with_scale, kPacked), c10::ValueError);
  EXPECT_THROW(call(cache.to(at::kHalf), {}, kPacked), c10::TypeError);
  EXPECT_THROW(call(cache, CacheOptions().k_weight(randn({16})), kPacked), c10::ValueError);
  EXPECT_THROW(call(cache, {}, RotateOptions(kPacked).out_rows(slots())), c10::ValueError);
  EXPECT_THROW(call(cache.clone().requires_grad_(), {}, kPacked), c10::Error);
}

}  // namespace
}  // namespace fused_rope
