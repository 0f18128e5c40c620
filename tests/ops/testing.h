// What the operator tests share: devices, seeded tensors, and an oracle in float64 complex
// arithmetic.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include <string>
#include <tuple>
#include <vector>

#include "fused_rope/fused_rope.h"

namespace fused_rope::testing {

constexpr uint64_t kSeed = 2104;

inline std::vector<at::Device> devices() {
  std::vector<at::Device> all = {at::kCPU};
  if (at::globalContext().hasCUDA()) all.emplace_back(at::kCUDA, 0);
  return all;
}

inline std::string device_name(const at::Device& device) {
  return device.is_cuda() ? "CUDA" : "CPU";
}

// A test that runs on every device; its random tensors repeat from run to run.
class OnDevice : public ::testing::TestWithParam<at::Device> {
 protected:
  OnDevice() {
    at::manual_seed(kSeed);
    RecordProperty("seed", std::to_string(kSeed));
  }

  at::Tensor randn(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) const {
    return at::randn(sizes, at::kDouble).to(GetParam(), dtype);
  }

  // cos and sin of random angles, [..., P].
  std::pair<at::Tensor, at::Tensor> tables(at::IntArrayRef sizes,
                                           at::ScalarType dtype = at::kFloat) const {
    const at::Tensor angles = at::randn(sizes, at::kDouble) * 3;
    return {angles.cos().to(GetParam(), dtype), angles.sin().to(GetParam(), dtype)};
  }

  at::Tensor integers(at::ArrayRef<int64_t> values, at::ScalarType dtype = at::kLong) const {
    return at::tensor(values, at::kLong).to(GetParam(), dtype);
  }
};

#define FUSED_ROPE_ON_DEVICES(Suite)                                         \
  INSTANTIATE_TEST_SUITE_P(                                                  \
      Devices, Suite, ::testing::ValuesIn(::fused_rope::testing::devices()), \
      [](const auto& info) { return ::fused_rope::testing::device_name(info.param); })

// x as [B, S, H, D], a view; and a tensor of that shape as x's layout has it.
inline at::Tensor to_bshd(const at::Tensor& x, Layout layout) {
  switch (layout) {
    case Layout::kBHSD:
      return x.transpose(1, 2);
    case Layout::kSBHD:
      return x.transpose(0, 1);
    case Layout::kTHD:
      return x.unsqueeze(0);
    default:
      return x;
  }
}

inline at::Tensor from_bshd(const at::Tensor& x, Layout layout) {
  return layout == Layout::kTHD ? x.squeeze(0) : to_bshd(x, layout);
}

// The lanes of the first and second members of all pairs, in the order of the table's columns.
inline std::pair<at::Tensor, at::Tensor> member_lanes(int64_t P, const RotateOptions& o) {
  const at::Tensor lanes = at::arange(2 * P, at::kLong) + o.rotary_offset();
  const at::Tensor members = o.interleaved()
                                 ? lanes.view({P, 2}).t()
                                 : lanes.view({o.blocks(), 2, P / o.blocks()}).transpose(0, 1);
  return {members.select(0, 0).reshape(-1), members.select(0, 1).reshape(-1)};
}

// The row that each pair of each token reads from a shared table, [B, S, P]; -1 where it is copied
// through.
inline at::Tensor pair_rows(const RotateOptions& o, int64_t B, int64_t S, int64_t P) {
  const auto host = [](const std::optional<at::Tensor>& t) {
    return t.has_value() ? t->to(at::kCPU, at::kLong) : at::Tensor();
  };
  const at::Tensor positions = host(o.positions()), offsets = host(o.offsets());
  const at::Tensor starts = host(o.cu_seqlens());
  at::Tensor rows = at::empty({B, S, P}, at::kLong);
  auto row = rows.accessor<int64_t, 3>();
  const int64_t offset = o.offset().expect_int();
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t s = 0; s < S; ++s) {
      int64_t sequence = b, start = 0;
      bool padding = false;
      if (starts.defined()) {
        padding = starts.size(0) == 1 || s >= starts[-1].item<int64_t>();
        for (int64_t n = 0; n + 1 < starts.size(0); ++n) {
          const auto first = starts[n].item<int64_t>();
          if (first <= s && s < starts[n + 1].item<int64_t>()) sequence = n, start = first;
        }
      }
      for (int64_t j = 0; j < P; ++j) {
        int64_t position = s - start;
        if (positions.defined()) {
          at::Tensor own = o.axes().has_value() ? positions[o.axes()->at(j)] : positions;
          if (own.dim() == 2) own = own[own.size(0) == 1 ? 0 : b];
          position = own[s].item<int64_t>();
        }
        const bool copied = padding || (positions.defined() && position == -1);
        const int64_t added = offsets.defined() && !copied ? offsets[sequence].item<int64_t>() : 0;
        row[b][s][j] = copied ? -1 : position + offset + added;
      }
    }
  }
  return rows;
}

// The true result in float64, and the length of the pair that each lane belongs to (0 where it is
// copied).
struct Expected {
  at::Tensor value, norm;
};

// Rotation as multiplication of complex numbers; differentiable.
inline Expected oracle(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                       const RotateOptions& o = {}) {
  const at::Tensor lanes = to_bshd(x.to(at::kCPU, at::kDouble), o.layout());
  const int64_t B = lanes.size(0), S = lanes.size(1), H = lanes.size(2), P = cos.size(-1);
  const at::Tensor rows = cos.dim() == 2 ? pair_rows(o, B, S, P) : at::zeros({B, S, P}, at::kLong);
  const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto gather = [&](const at::Tensor& table) {
    const auto type = o.precision() == Precision::kModel ? x.scalar_type() : wide;
    const at::Tensor exact = table.to(at::kCPU, type).to(at::kDouble);
    if (cos.dim() == 4) return exact.expand({B, S, H, P});
    if (cos.dim() == 3) return exact.unsqueeze(2).expand({B, S, H, P});
    const at::Tensor columns = at::arange(P, at::kLong);
    return exact.index({rows.clamp_min(0), columns}).unsqueeze(2).expand({B, S, H, P});
  };
  const at::Tensor c = gather(cos), s = gather(sin);
  const auto [first, second] = member_lanes(P, o);
  const at::Tensor pairs =
      at::complex(lanes.index_select(-1, first), lanes.index_select(-1, second));
  const at::Tensor copied = (rows == -1).unsqueeze(2);
  const at::Tensor turned = at::where(copied, pairs, pairs * at::complex(c, o.inverse() ? -s : s));
  const auto place = [&](const at::Tensor& into, const at::Tensor& a, const at::Tensor& b) {
    return from_bshd(into.index_copy(-1, first, a).index_copy(-1, second, b), o.layout());
  };
  const at::Tensor norm = pairs.detach().abs().masked_fill(copied, 0);
  return {place(lanes, at::real(turned), at::imag(turned)),
          place(at::zeros_like(lanes), norm, norm)};
}

// The distance between neighbours of each value in `dtype`.
inline at::Tensor ulp(const at::Tensor& value, at::ScalarType dtype) {
  const auto [fraction_bits, min_exponent] = dtype == at::kHalf       ? std::pair{10, -14}
                                             : dtype == at::kBFloat16 ? std::pair{7, -126}
                                             : dtype == at::kFloat    ? std::pair{23, -126}
                                                                      : std::pair{52, -1022};
  const at::Tensor exponent = std::get<1>(at::frexp(value.to(at::kDouble))) - 1;
  return at::exp2((exponent.clamp_min(min_exponent) - fraction_bits).to(at::kDouble));
}

// Expects every lane within the bound of op-spec.md: half an ulp of the output, two float32 ulp of
// the pair's length; copied lanes to be equal. In precision "model" each of three steps may be half
// an ulp of the model's dtype off.
inline void expect_rotated(const at::Tensor& got, const at::Tensor& x, const at::Tensor& cos,
                           const at::Tensor& sin, const RotateOptions& o = {}) {
  const c10::AutoGradMode no_grad(false);
  ASSERT_EQ(got.sizes(), x.sizes());
  ASSERT_EQ(got.scalar_type(), x.scalar_type());
  const Expected expected = oracle(x, cos, sin, o);
  const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const bool model =
      o.precision() == Precision::kModel && at::isReducedFloatingType(x.scalar_type());
  const at::Tensor unit = ulp(expected.norm, model ? x.scalar_type() : wide);
  const double scale =
      cos.numel() == 0 ? 1 : std::max(1.0, at::maximum(cos.abs(), sin.abs()).max().item<double>());
  const at::Tensor slack = 2 * scale * unit;
  const at::Tensor bound = ulp(expected.value.abs() + slack, x.scalar_type()) / 2 + slack;
  const at::Tensor error = (got.to(at::kCPU, at::kDouble) - expected.value).abs();
  const at::Tensor wrong =
      (error > at::where(expected.norm == 0, 0, bound)).logical_or(error.isnan());
  EXPECT_EQ(wrong.sum().item<int64_t>(), 0)
      << "of " << got.numel() << " lanes of " << got.sizes() << ", first at "
      << wrong.nonzero().slice(0, 0, 1) << "largest error " << error.max().item<double>();
}

// Expects equal bits, so that NaN equals itself and 0 is not -0.
inline void expect_same_bits(const at::Tensor& got, const at::Tensor& expected) {
  ASSERT_EQ(got.sizes(), expected.sizes());
  ASSERT_EQ(got.scalar_type(), expected.scalar_type());
  const auto bits = [](const at::Tensor& t) {
    return t.detach().to(at::kCPU).contiguous().view(at::kByte);
  };
  if (got.numel() == 0) return;
  EXPECT_TRUE(at::equal(bits(got), bits(expected)));
}

}  // namespace fused_rope::testing
