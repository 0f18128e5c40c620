// Modules on several streams and in CUDA graphs; part of builds with CUDA kernels.
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <thread>

#include "testing.h"

namespace fused_rope {
namespace {

using testing::expect_identical;
using Options = RotaryEmbeddingOptions;
using Where = RotaryEmbeddingForwardOptions;

class Streams : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!at::globalContext().hasCUDA()) GTEST_SKIP() << "there is no GPU";
    at::manual_seed(testing::kSeed);
  }
};

RopeScaling longrope() {
  return RopeScaling(RopeType::kLongRope)
      .factor(4)
      .original_max_position_embeddings(32)
      .short_factor(std::vector<double>(64, 1.5))
      .long_factor(std::vector<double>(64, 2.5));
}

// Each thread's stream reads tables that other streams have copied, and drops them while others
// still read.
TEST_F(Streams, ReadTablesThatOtherStreamsMade) {
  const at::Device gpu(at::kCUDA, 0);
  const at::Tensor x = at::randn({1, 300, 4, 128}, at::TensorOptions(gpu));
  for (const RopeScaling& scaling : {RopeScaling(), longrope()}) {
    const Options options = Options(128).base(4321).scaling(scaling).max_seq_len(2);
    constexpr int kCalls = 12;
    std::vector<at::Tensor> expected;
    for (int i = 0; i < kCalls; ++i) {
      RotaryEmbedding alone(Options(options).max_seq_len(300 + 700 * i));
      expected.push_back(alone->rotate(x, 700 * i));
    }
    c10::cuda::device_synchronize();
    RotaryEmbedding rope(options);
    std::vector<std::vector<at::Tensor>> got(4);
    std::vector<std::thread> threads;
    for (auto& results : got) {
      threads.emplace_back([&] {
        const c10::cuda::CUDAStreamGuard on(c10::cuda::getStreamFromPool(false, 0));
        for (int i = 0; i < kCalls; ++i) results.push_back(rope->rotate(x, 700 * i));
      });
    }
    for (std::thread& thread : threads) thread.join();
    c10::cuda::device_synchronize();
    for (const auto& results : got) {
      for (size_t i = 0; i < results.size(); ++i) expect_identical(results[i], expected[i]);
    }
  }
}

TEST_F(Streams, KeepTheTableOfACapturedGraph) {
  const at::Device gpu(at::kCUDA, 0);
  const at::Tensor x = at::randn({1, 7, 4, 128}, at::TensorOptions(gpu));
  RotaryEmbedding rope(Options(128).base(4322).max_seq_len(16));
  const at::Tensor expected = rope->rotate(x, 3);
  const c10::cuda::CUDAStreamGuard on(c10::cuda::getStreamFromPool(false, 0));
  c10::cuda::device_synchronize();
  at::cuda::CUDAGraph graph;
  graph.capture_begin();
  const at::Tensor got = rope->rotate(x, 3);
  graph.capture_end();
  // The table of the graph is neither overwritten nor freed.
  rope->rotate(x, 5000);
  rope->to(at::kCPU);
  for (int i = 0; i < 8; ++i) at::full({16, 64}, 7.0, x.options());
  graph.replay();
  c10::cuda::device_synchronize();
  expect_identical(got, expected);
}

TEST_F(Streams, RejectGrowthDuringCapture) {
  const at::Device gpu(at::kCUDA, 0);
  const at::Tensor x = at::randn({1, 7, 4, 128}, at::TensorOptions(gpu));
  RotaryEmbedding rope(Options(128).base(4323).max_seq_len(16).device(gpu));
  const c10::cuda::CUDAStreamGuard on(c10::cuda::getStreamFromPool(false, 0));
  c10::cuda::device_synchronize();
  at::cuda::CUDAGraph graph;
  graph.capture_begin();
  try {
    rope->rotate(x, 100);
    ADD_FAILURE() << "a table was built in a capture";
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what_without_backtrace()).find("call reserve(107)"),
              std::string::npos)
        << error.what_without_backtrace();
  }
  const at::Tensor got = rope->rotate(x, 0);
  graph.capture_end();
  graph.replay();
  expect_identical(got, rope->rotate(x, 0));
  rope->reserve(107);
  expect_identical(rope->rotate(x, 100), RotaryEmbedding(Options(128).base(4323))->rotate(x, 100));
}

TEST_F(Streams, KeepTheTableForADeviceWithoutIndex) {
  RotaryEmbedding rope(Options(128).device(at::kCUDA));
  const void* address = rope->cos().const_data_ptr();
  rope->to(at::kCUDA);
  EXPECT_EQ(rope->cos().const_data_ptr(), address);
}

}  // namespace
}  // namespace fused_rope
