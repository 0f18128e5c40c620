// Causal attention over rotated queries and keys, and its gradients: the C++ API on one screen.

#include <fused_rope/fused_rope.h>
#include <torch/torch.h>

#include <cstdio>

using fused_rope::Layout;
using fused_rope::RotateOptions;
using torch::Tensor;

// q [B, Hq, S, D], k and v [B, Hk, S, D], tables [M, D/2]; the first token is at row `offset`.
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
              const Tensor& sin, int64_t offset) {
  const auto options = RotateOptions().layout(Layout::kBHSD).offset(offset);
  const auto [q_rotated, k_rotated] = fused_rope::rotate_qk(q, k, cos, sin, options);
  return torch::scaled_dot_product_attention(q_rotated, k_rotated, v, /*attn_mask=*/{},
                                             /*dropout_p=*/0.0, /*is_causal=*/true,
                                             /*scale=*/{}, /*enable_gqa=*/true);
}

int main() {
  const int64_t B = 2, Hq = 8, Hk = 2, S = 128, D = 64, M = 4096;
  torch::manual_seed(0);
  const Tensor q = torch::randn({B, Hq, S, D}, torch::requires_grad());
  const Tensor k = torch::randn({B, Hk, S, D}, torch::requires_grad());
  const Tensor v = torch::randn({B, Hk, S, D});
  const Tensor inv_freq = torch::pow(10000.0, torch::arange(0, D, 2, torch::kDouble) / -D);
  const auto [cos, sin] = fused_rope::cos_sin_table(inv_freq, M);

  const Tensor out = attend(q, k, v, cos, sin, /*offset=*/0);
  out.sum().backward();

  // Attention depends only on relative positions: a common offset changes nothing but rounding.
  const Tensor moved = attend(q, k, v, cos, sin, /*offset=*/1000);
  const double change = (moved - out).abs().max().item<double>();
  std::printf("fused_rope %s: q.grad %.3g, k.grad %.3g, moved by 1000 tokens: %.1e\n",
              FUSED_ROPE_VERSION, q.grad().norm().item<double>(), k.grad().norm().item<double>(),
              change);
  return change < 1e-4 ? 0 : 1;
}
