// A program that knows fused-rope only as installed: a quarter turn takes (a, b) to (-b, a).

#include <fused_rope/fused_rope.h>
#include <torch/torch.h>

#include <cstdio>

int main() {
  const auto q = torch::tensor({1.0f, 2.0f}).view({1, 1, 1, 2});
  const auto k = torch::tensor({3.0f, 4.0f}).view({1, 1, 1, 2});
  const auto cos = torch::zeros({1, 1});
  const auto sin = torch::ones({1, 1});

  const auto [q_out, k_out] = fused_rope::rotate_qk(q, k, cos, sin);

  const bool right = q_out.flatten().equal(torch::tensor({-2.0f, 1.0f})) &&
                     k_out.flatten().equal(torch::tensor({-4.0f, 3.0f}));
  std::printf("fused_rope %s: %s\n", FUSED_ROPE_VERSION, right ? "right" : "WRONG");
  return right ? 0 : 1;
}
