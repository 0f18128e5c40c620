// The CUDA kernels of a norm, compiled for the host, against the CPU kernel, forward and backward.
#include <gtest/gtest.h>

#include <map>
#include <string>

#include "fused_rope/kernels/cpu/kernel.h"
#include "fused_rope/kernels/cuda/norm_launch.cuh"
#include "random_call.h"

namespace fused_rope::kernels {
namespace {

using testing::AllTypes;
using testing::Call;
using testing::CallKind;

std::string name_of(const std::optional<Plan>& plan, const NormParams& norm) {
  std::string name = norm.after ? "after" : "before";
  if (!plan.has_value()) return name + ", a warp each";
  name += plan->arrangement == Arrangement::kPair ? ", pair" : ", adjacent";
  name += plan->lookup == RowLookup::kLinear ? ", linear" : ", indexed";
  return plan->chunk_heads == 2 ? name + ", two heads" : name;
}

constexpr const char* kNames[] = {"after, a warp each",       "before, a warp each",
                                  "after, pair, linear",      "before, pair, linear",
                                  "after, pair, indexed",     "before, pair, indexed",
                                  "after, adjacent, linear",  "before, adjacent, linear",
                                  "after, adjacent, indexed", "before, adjacent, indexed"};
// Of the forward, with elements of 16 bits.
constexpr const char* kNamesOfTwoHeads[] = {
    "after, pair, linear, two heads", "before, pair, linear, two heads",
    "after, adjacent, linear, two heads", "before, adjacent, linear, two heads"};

template <typename T>
class CudaNorm : public ::testing::Test {};

TYPED_TEST_SUITE(CudaNorm, AllTypes);

constexpr uint64_t kForwardCalls = 2000;
constexpr uint64_t kBackwardCalls = 400;

// float64 has no instances but those of a warp each.
template <typename T>
void expect_all(const std::map<std::string, int>& seen) {
  for (const char* name : kNames) {
    const bool expected = !std::is_same_v<T, double> || std::string(name).ends_with("each");
    EXPECT_EQ(seen.contains(name), expected) << name;
  }
}

TYPED_TEST(CudaNorm, ForwardIsBitwiseIdenticalToTheCpuKernel) {
  using T = typename TypeParam::Element;
  std::map<std::string, int> seen;
  for (uint64_t seed = 0; seed < kForwardCalls; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    Call<T, typename TypeParam::Table, TypeParam::kPrecision> call(seed, CallKind::kNorm);
    const PlanOverrides overrides = call.overrides();
    const DeviceFacts facts = call.facts();
    const auto on_gpu = [&](const RotateParams& p) {
      if (total_heads(p) == 0) return;
      const std::optional<Plan> plan = make_norm_plan(p, facts, overrides);
      ++seen[name_of(plan, *p.norm)];
      EXPECT_EQ(launch_norm<T>(p, plan, nullptr), cudaSuccess);
    };
    const auto on_cpu = [](const RotateParams& p) { rotate_tokens(p, 0, p.B * p.S); };
    ASSERT_TRUE(call.run(on_gpu) == call.run(on_cpu));
  }
  expect_all<T>(seen);
  for (const char* name : kNamesOfTwoHeads) EXPECT_EQ(seen.contains(name), sizeof(T) == 2) << name;
}

TYPED_TEST(CudaNorm, BackwardIsBitwiseIdenticalToTheCpuKernel) {
  using T = typename TypeParam::Element;
  std::map<std::string, int> seen;
  for (uint64_t seed = 0; seed < kBackwardCalls; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    Call<T, typename TypeParam::Table, TypeParam::kPrecision> call(seed, CallKind::kNormBackward);
    const PlanOverrides overrides = call.overrides();
    const DeviceFacts facts = call.facts();
    const auto on_gpu = [&](const NormBackwardParams& p) {
      const std::optional<Plan> plan = make_backward_plan(p, facts, overrides);
      ++seen[name_of(plan, *p.call.norm)];
      EXPECT_EQ(launch_backward<T>(p, plan, nullptr), cudaSuccess);
    };
    const auto on_cpu = [](const NormBackwardParams& p) {
      norm_backward(p, 0, backward_leaves(p));
      sum_weight_gradients(p);
    };
    ASSERT_TRUE(call.run_backward(on_gpu) == call.run_backward(on_cpu));
  }
  expect_all<T>(seen);
}

// One head of D float32 elements, forward and backward.
struct OneHead {
  explicit OneHead(int64_t D) : x(D), gradient(D), out(D), dx(D), dw(D), table(D / 2) {
    testing::Random random(D);
    for (std::vector<float>* values : {&x, &gradient, &table}) {
      for (float& value : *values) value = static_cast<float>(random.normal());
    }
    norm.eps = 1e-6;
    RotateParams& p = backward.call;
    p.B = p.S = p.rows.M = 1;
    p.D = D;
    p.count = 1;
    p.tensors[0] = {x.data(), dx.data(), {D, D, D, 1}, {D, D, D, 1}, 1, false};
    p.pairing = {D / 2, 0, D / 2};
    p.cos = p.sin = {table.data(), D / 2, 0, 0, 0, 1};
    p.dtype = p.table_dtype = DType::kFloat32;
    p.norm = &norm;
    workspace.resize(workspace_bytes(1, 1, 1, D, p.dtype) / sizeof(float));
    backward.tensors[0] = {gradient.data(), {D, D, D, 1}, dw.data(), workspace.data()};
    forward = p;
    forward.tensors[0].out = out.data();
  }

  std::vector<float> x, gradient, out, dx, dw, table, workspace;
  NormParams norm = {};
  RotateParams forward;
  NormBackwardParams backward = {};
};

// The most elements of which an array and a tree, or six arrays and a tree, fit in shared memory.
constexpr int64_t kMaxForwardD = 32768;
constexpr int64_t kMaxBackwardD = 8320;

TEST(CudaNormOfLargeHeads, MatchesTheCpuKernelUpToTheSharedMemoryOfABlock) {
  OneHead gpu(kMaxBackwardD), cpu(kMaxBackwardD);
  EXPECT_EQ(launch_norm<float>(gpu.forward, std::nullopt, nullptr), cudaSuccess);
  EXPECT_EQ(launch_backward<float>(gpu.backward, std::nullopt, nullptr), cudaSuccess);
  rotate_tokens(cpu.forward, 0, 1);
  norm_backward(cpu.backward, 0, backward_leaves(cpu.backward));
  sum_weight_gradients(cpu.backward);
  EXPECT_EQ(gpu.out, cpu.out);
  EXPECT_EQ(gpu.dx, cpu.dx);
  EXPECT_EQ(gpu.dw, cpu.dw);
  OneHead largest(kMaxForwardD);
  EXPECT_EQ(launch_norm<float>(largest.forward, std::nullopt, nullptr), cudaSuccess);
}

TEST(CudaNormOfLargeHeads, AreRefusedBeyondItBeforeMemoryIsTouched) {
  for (const int64_t D : {kMaxForwardD + 2, int64_t{1} << 29}) {
    SCOPED_TRACE(::testing::Message() << "D " << D);
    OneHead head(kMaxForwardD + 2);
    head.forward.D = head.backward.call.D = D;
    const OneHead before = head;
    EXPECT_EQ(launch_norm<float>(head.forward, std::nullopt, nullptr),
              cudaErrorLaunchOutOfResources);
    EXPECT_EQ(launch_backward<float>(head.backward, std::nullopt, nullptr),
              cudaErrorLaunchOutOfResources);
    EXPECT_TRUE(head.out == before.out && head.dx == before.dx && head.dw == before.dw);
  }
  OneHead head(kMaxBackwardD + 2);
  EXPECT_EQ(launch_backward<float>(head.backward, std::nullopt, nullptr),
            cudaErrorLaunchOutOfResources);
}

}  // namespace
}  // namespace fused_rope::kernels
