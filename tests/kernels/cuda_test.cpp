// The CUDA kernel, compiled for the host, against the CPU kernel: which elements, entries and rows
// its threads access. tests/python/test_cuda.py tests what needs a GPU.
#include <gtest/gtest.h>

#include <map>
#include <string>

#include "fused_rope/kernels/cpu/kernel.h"
#include "fused_rope/kernels/cuda/launch.cuh"
#include "random_call.h"

namespace fused_rope::kernels {
namespace {

using testing::Call;

// The instance of a plan; sizes in bytes of elements and entries.
std::string name_of(const Plan& plan, size_t element, size_t entry) {
  constexpr const char* kRowNames[] = {"linear", "per head", "positions", "indexed",
                                       "packed", "sections", "axes"};
  return std::string(plan.staged ? "staged " : "") + kRowNames[static_cast<int>(plan.lookup)] +
         (plan.arrangement == Arrangement::kPair ? " pair" : " adjacent") +
         (plan.full_head ? " full" : "") + " x" + std::to_string(plan.vector) + ", " +
         std::to_string(element) + "/" + std::to_string(entry);
}

// No more threads than vectors need. So if the results are right, no two threads access the same
// element.
void expect_fewest_threads(const RotateParams& p, const Plan& plan) {
  const int64_t rotated = 2 * p.pairing.P / plan.vector;  // vectors
  EXPECT_EQ(plan.block_threads % kWarp, 0);
  EXPECT_LE(plan.block_threads, kMaxBlockThreads);
  const int each = plan.staged ? 1 : vectors_of_thread(plan.arrangement, plan.lookup);
  EXPECT_EQ(plan.rotating_threads,
            plan.arrangement == Arrangement::kPair ? rotated / 2 : ceil_divide(rotated, each));
  if (plan.staged) return;
  const int64_t copied = p.in_place ? 0 : ceil_divide(p.D, plan.vector) - rotated;
  EXPECT_EQ(plan.head_threads - plan.rotating_threads, ceil_divide(copied, each));
}

template <typename T, typename Table, Precision kPrecision>
void check(std::map<std::string, int>& seen) {
  constexpr uint64_t kCalls = 12000;
  for (uint64_t seed = 0; seed < kCalls; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    Call<T, Table, kPrecision> call(seed);
    const PlanOverrides overrides = call.overrides();
    const DeviceFacts facts = call.facts();
    const auto on_gpu = [&](const RotateParams& given) {
      const RotateParams p = are_adjacent(given) ? joined(given) : given;
      if (total_heads(p) == 0) return;
      const Plan plan = make_plan(p, facts, overrides);
      const std::string name = name_of(plan, sizeof(T), sizeof(Table));
      SCOPED_TRACE(name);
      expect_fewest_threads(p, plan);
      if (plan.head_threads == 0) return;
      ++seen[name];
      if (p.B * p.S * total_heads(p) / plan.chunk_heads * plan.head_threads >
          int64_t{2} * plan.launch_threads)
        ++seen["in several launches"];
      if (p.count < given.count) ++seen[p.in_place ? "joined in place" : "joined"];
      EXPECT_EQ((launch_lookup<T, Table, kPrecision>(p, plan, nullptr)), cudaSuccess);
    };
    const auto on_cpu = [](const RotateParams& p) { rotate_tokens(p, 0, p.B * p.S); };
    ASSERT_TRUE(call.run(on_gpu) == call.run(on_cpu));
  }
}

TEST(CudaKernel, IsBitwiseIdenticalToTheCpuKernel) {
  std::map<std::string, int> seen;
  check<BFloat16, float, Precision::kFp32>(seen);
  check<BFloat16, BFloat16, Precision::kModel>(seen);
  check<Float16, float, Precision::kFp32>(seen);
  check<float, float, Precision::kFp32>(seen);
  check<double, double, Precision::kFp32>(seen);
  for (const auto& [name, count] : seen) RecordProperty(name, count);
  for (const char* name : {"linear pair full x8, 2/4",
                           "linear pair x8, 2/4",
                           "linear adjacent full x8, 2/4",
                           "linear adjacent x8, 2/4",
                           "linear pair x1, 2/4",
                           "per head pair x8, 2/4",
                           "per head adjacent x8, 2/4",
                           "positions pair full x8, 2/4",
                           "positions pair x8, 2/4",
                           "positions adjacent full x8, 2/4",
                           "positions adjacent x8, 2/4",
                           "indexed pair full x8, 2/4",
                           "indexed pair x8, 2/4",
                           "indexed adjacent full x8, 2/4",
                           "indexed adjacent x8, 2/4",
                           "indexed pair x1, 2/4",
                           "packed pair full x8, 2/4",
                           "packed pair x8, 2/4",
                           "packed adjacent full x8, 2/4",
                           "packed adjacent x8, 2/4",
                           "sections pair full x8, 2/4",
                           "sections pair x8, 2/4",
                           "sections adjacent full x8, 2/4",
                           "sections adjacent x8, 2/4",
                           "sections pair x1, 2/4",
                           "linear pair full x2, 2/4",
                           "linear adjacent full x4, 2/4",
                           "staged linear pair x1, 2/4",
                           "staged linear pair x2, 2/4",
                           "staged linear adjacent x2, 2/4",
                           "staged linear adjacent x4, 2/4",
                           "staged axes pair x1, 2/4",
                           "staged axes pair x2, 2/4",
                           "staged axes adjacent x2, 2/4",
                           "staged axes adjacent x4, 2/4",
                           "joined",
                           "joined in place",
                           "in several launches"}) {
    EXPECT_GT(seen[name], 0) << name;
  }
}

}  // namespace
}  // namespace fused_rope::kernels
