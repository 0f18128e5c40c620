// Threads that share modules. A separate program, for ThreadSanitizer, that reads results only
// through the module's functions.
#include <atomic>
#include <exception>
#include <thread>

#include "testing.h"

namespace fused_rope {
namespace {

using testing::OnDevice;
using Options = RotaryEmbeddingOptions;
using Where = RotaryEmbeddingForwardOptions;

constexpr int kThreads = 4;
constexpr int kCalls = 40;
constexpr int64_t kTrained = 32;

RopeScaling dynamic() {
  return RopeScaling(RopeType::kDynamic).factor(2).original_max_position_embeddings(kTrained);
}

RopeScaling longrope() {
  return RopeScaling(RopeType::kLongRope)
      .factor(4)
      .original_max_position_embeddings(kTrained)
      .short_factor(std::vector<double>(8, 1.5))
      .long_factor(std::vector<double>(8, 2.5));
}

class Threads : public OnDevice {
 protected:
  Threads() { at::set_num_threads(1); }

  // Runs `call(thread, i)` kCalls times in each of several threads at once. Counts the calls that
  // return false, and those that throw.
  template <typename Call>
  void expect_all_right(const Call& call) {
    std::atomic<int> wrong = 0, raised = 0;
    const auto run = [&](int thread) {
      for (int i = 0; i < kCalls; ++i) {
        try {
          if (!call(thread, i)) ++wrong;
        } catch (const std::exception& error) {
          ++raised;
          ADD_FAILURE() << error.what();
        }
      }
    };
    std::vector<std::thread> threads;
    for (int thread = 0; thread < kThreads; ++thread) threads.emplace_back(run, thread);
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0);
    EXPECT_EQ(raised, 0);
  }
};
FUSED_ROPE_ON_DEVICES(Threads);

// One input, with the result of a module that no other thread uses.
struct Case {
  at::Tensor x, expected;
  Where where;
};

TEST_P(Threads, ShareAModuleThatGrowsAndChangesFrequencies) {
  for (const RopeScaling& scaling : {RopeScaling(), dynamic(), longrope()}) {
    const Options options = Options(16).scaling(scaling).max_seq_len(2);
    std::vector<Case> cases;
    for (const int64_t last : {3, 7, 31, 32, 33, 60, 200, 900}) {
      const at::Tensor x = randn({1, 3, 2, 16}), positions = integers({last, 0, 1});
      for (const Where& where : {Where(last - 2), Where().positions(positions)}) {
        RotaryEmbedding alone(options);
        alone->reserve(1000);
        cases.push_back({x, alone->rotate(x, where), where});
      }
    }
    RotaryEmbedding rope(options), other(options);
    other->reserve(1000);
    const bool varies = scaling.rope_type() != RopeType::kDefault;
    expect_all_right([&](int thread, int i) {
      const size_t n = static_cast<size_t>(7 * i + 3 * thread) % cases.size();
      const auto& [x, expected, where] = cases[n];
      // Positions do not grow the table: these rows must be reserved.
      RotaryEmbedding& module = varies || !where.positions().has_value() ? rope : other;
      const c10::InferenceMode inference(i % 3 == 0);
      return at::equal(module->rotate(x, where), expected);
    });
  }
}

TEST_P(Threads, DifferentiateThroughASharedModule) {
  const at::Tensor q = randn({1, 3, 2, 16});
  RotaryEmbedding rope(Options(16).max_seq_len(2)), alone(Options(16));
  const auto gradient = [&](RotaryEmbedding& module, int64_t offset) {
    const at::Tensor leaf = q.detach().requires_grad_();
    module->rotate(leaf, offset).sum().backward();
    return leaf.grad();
  };
  std::vector<at::Tensor> expected;
  for (int i = 0; i < kCalls; ++i) expected.push_back(gradient(alone, 5 * i));
  expect_all_right([&](int, int i) {
    return at::equal(gradient(rope, 5 * i), expected[static_cast<size_t>(i)]);
  });
}

TEST_P(Threads, MoveReserveCloneAndReadWhileOthersCall) {
  const Options options = Options(16).scaling(longrope()).max_seq_len(2);
  const at::Tensor x = randn({1, 3, 2, 16});
  RotaryEmbedding rope(options), alone(options);
  const at::Tensor expected = alone->rotate(x, 40);
  expect_all_right([&](int thread, int i) {
    if (thread == 0) {
      rope->to(i % 2 == 0 ? at::Device(at::kMeta) : device());
      rope->reserve(3 * i);
    } else if (thread == 1) {
      const auto copy = std::dynamic_pointer_cast<RotaryEmbeddingImpl>(rope->clone());
      const auto [cos, sin] = rope->table();
      return cos.sizes() == sin.sizes() && at::equal(copy->rotate(x, 40), expected);
    }
    return at::equal(rope->rotate(x, 40), expected);
  });
}

TEST_P(Threads, CreateAndDestroyModulesOfTheSameFrequencies) {
  const at::Tensor x = randn({1, 3, 2, 16});
  std::vector<at::Tensor> expected;
  for (int i = 0; i < kCalls; ++i) {
    expected.push_back(RotaryEmbedding(Options(16).base(100 + i % 3))->rotate(x, i));
  }
  expect_all_right([&](int, int i) {
    RotaryEmbedding rope(Options(16).base(100 + i % 3).max_seq_len(2 + i));
    return at::equal(rope->rotate(x, i), expected[static_cast<size_t>(i)]);
  });
}

}  // namespace
}  // namespace fused_rope
