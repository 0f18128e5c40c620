// The overhead of a call from C++: the four operators on tensors of two elements.
//
//     cmake -S . -B build -DFUSED_ROPE_BENCHMARKS=ON && cmake --build build
//     build/benchmarks/cpp/fused_rope_call_cost

#include <fused_rope/fused_rope.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

namespace {

constexpr int kCalls = 10'000;
constexpr int kRounds = 21;

// Prints the median over rounds of the mean time of a call.
template <typename Call>
void report(const char* name, Call call) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> rounds;
  for (int round = 0; round < kRounds; ++round) {
    const auto start = Clock::now();
    for (int i = 0; i < kCalls; ++i) call();
    const std::chrono::duration<double, std::micro> elapsed = Clock::now() - start;
    rounds.push_back(elapsed.count() / kCalls);
  }
  std::nth_element(rounds.begin(), rounds.begin() + kRounds / 2, rounds.end());
  std::printf("%-28s %6.2f us\n", name, rounds[kRounds / 2]);
}

}  // namespace

int main() {
  const auto q = torch::randn({1, 1, 1, 2});
  const auto k = torch::randn({1, 1, 1, 2});
  const auto [cos, sin] = fused_rope::cos_sin_table(torch::ones({1}, torch::kDouble), 1);
  {
    const torch::NoGradGuard no_grad;
    report("torch::neg", [&] { q.neg(); });
    report("rotate", [&] { fused_rope::rotate(q, cos, sin); });
    report("rotate_", [&] { fused_rope::rotate_(q, cos, sin); });
    report("rotate_qk", [&] { fused_rope::rotate_qk(q, k, cos, sin); });
    report("rotate_qk_", [&] { fused_rope::rotate_qk_(q, k, cos, sin); });
    fused_rope::RotaryEmbedding rope(2);
    report("RotaryEmbedding", [&] { rope(q, k); });
  }
  const auto leaf = torch::randn({1, 1, 1, 2}, torch::requires_grad());
  report("torch::neg, recorded", [&] { leaf.neg(); });
  report("rotate, recorded", [&] { fused_rope::rotate(leaf, cos, sin); });
  report("rotate_qk, recorded", [&] { fused_rope::rotate_qk(leaf, leaf, cos, sin); });
}
