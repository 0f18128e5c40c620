// Shared by the operator tests: devices, seeded tensors, bitwise comparison. tests/python compares
// the operators with a float64 oracle; these tests show what only C++ can.
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

// Seeded tensors on one device.
class Tensors {
 public:
  explicit Tensors(const at::Device& device) : device_(device) {
    at::manual_seed(kSeed);
    ::testing::Test::RecordProperty("seed", std::to_string(kSeed));
  }

  at::Tensor randn(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) const {
    return at::randn(sizes, at::kDouble).to(device_, dtype);
  }

  // cos and sin of random angles, [..., P].
  std::pair<at::Tensor, at::Tensor> tables(at::IntArrayRef sizes,
                                           at::ScalarType dtype = at::kFloat) const {
    const at::Tensor angles = at::randn(sizes, at::kDouble) * 3;
    return {angles.cos().to(device_, dtype), angles.sin().to(device_, dtype)};
  }

  at::Tensor integers(at::ArrayRef<int64_t> values, at::ScalarType dtype = at::kLong) const {
    return at::tensor(values, at::kLong).to(device_, dtype);
  }

  const at::Device& device() const { return device_; }

 private:
  at::Device device_;
};

inline at::Tensor leaf(const at::Tensor& x) { return x.detach().clone().requires_grad_(); }

// rotate for tables [S, P] and R = D in ATen operations, which PyTorch differentiates.
inline at::Tensor rotation_formula(const at::Tensor& x, const at::Tensor& cos,
                                   const at::Tensor& sin) {
  const std::vector<at::Tensor> halves = x.chunk(2, -1);
  const at::Tensor c = cos.unsqueeze(1), s = sin.unsqueeze(1);
  return at::cat({halves[0] * c - halves[1] * s, halves[1] * c + halves[0] * s}, -1);
}

// A test that runs on every device.
class OnDevice : public ::testing::TestWithParam<at::Device>, protected Tensors {
 protected:
  OnDevice() : Tensors(GetParam()) {}
};

// A test that runs on every device for each case of a table.
template <typename Case>
class OnDeviceFor : public ::testing::TestWithParam<std::tuple<at::Device, Case>>,
                    protected Tensors {
 protected:
  OnDeviceFor() : Tensors(std::get<0>(this->GetParam())) {}

  const Case& c() const { return std::get<1>(this->GetParam()); }
};

#define FUSED_ROPE_ON_DEVICES(Suite)                                         \
  INSTANTIATE_TEST_SUITE_P(                                                  \
      Devices, Suite, ::testing::ValuesIn(::fused_rope::testing::devices()), \
      [](const auto& info) { return ::fused_rope::testing::device_name(info.param); })

// `cases` is a range of structs with a `name`.
#define FUSED_ROPE_ON_DEVICES_FOR(Suite, cases)                                 \
  INSTANTIATE_TEST_SUITE_P(                                                     \
      Cases, Suite,                                                             \
      ::testing::Combine(::testing::ValuesIn(::fused_rope::testing::devices()), \
                         ::testing::ValuesIn(cases)),                           \
      [](const auto& info) {                                                    \
        return ::fused_rope::testing::device_name(std::get<0>(info.param)) +    \
               std::string(std::get<1>(info.param).name);                       \
      })

// Expects bitwise identical tensors, so that NaN equals itself and 0 is not -0.
inline void expect_identical(const at::Tensor& got, const at::Tensor& expected) {
  ASSERT_EQ(got.sizes(), expected.sizes());
  ASSERT_EQ(got.scalar_type(), expected.scalar_type());
  const auto bits = [](const at::Tensor& t) {
    return t.detach().to(at::kCPU).contiguous().view(at::kByte);
  };
  if (got.numel() == 0) return;
  EXPECT_TRUE(at::equal(bits(got), bits(expected)));
}

}  // namespace fused_rope::testing
