// A decode step: positions from a tensor, and keys and values written directly into a paged cache.

#include <fused_rope/fused_rope.h>
#include <torch/torch.h>

#include <cstdio>

using fused_rope::CacheOptions;
using fused_rope::Layout;
using fused_rope::RotaryEmbedding;
using fused_rope::RotaryEmbeddingForwardOptions;
using fused_rope::RotaryEmbeddingOptions;
using fused_rope::RotateOptions;
using torch::Tensor;

// q [B, Hq, 1, D], k [B, Hk, 1, D]; lengths [B] are the tokens that each sequence has already.
std::tuple<Tensor, Tensor> rotate_step(RotaryEmbedding& rope, const Tensor& q, const Tensor& k,
                                       const Tensor& lengths) {
  return rope(q, k, RotaryEmbeddingForwardOptions().offsets(lengths));
}

// k_cache [pages, page_size, Hk, D]; slots [B, 1]: page * page_size + place, -1 for none.
void rotate_into_cache(const RotaryEmbedding& rope, const Tensor& q, const Tensor& k,
                       const Tensor& lengths, const Tensor& q_out, const Tensor& k_cache,
                       const Tensor& slots) {
  const auto options = RotateOptions().layout(Layout::kBHSD).offsets(lengths).out_rows(slots);
  const auto [cos, sin] = rope->table();
  fused_rope::rotate_qk_out(q_out, k_cache.flatten(0, 1), q, k, cos, sin, options);
}

// One token of each sequence: q [B, Hq, D], k and v [B, Hk, D]; positions and slots [B].
Tensor decode_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                   const Tensor& sin, const Tensor& k_cache, const Tensor& v_cache,
                   const Tensor& positions, const Tensor& slots, const CacheOptions& options) {
  const auto rotation = RotateOptions().layout(Layout::kTHD).positions(positions);
  return fused_rope::rotate_and_cache(q, k, v, cos, sin, k_cache, v_cache, slots, options,
                                      rotation);
}

int main() {
  const int64_t B = 3, Hq = 8, Hk = 2, D = 64, pages = 4, page_size = 16;
  torch::manual_seed(0);
  RotaryEmbedding rope(RotaryEmbeddingOptions(D).layout(Layout::kBHSD).max_seq_len(256));
  rope->reserve(512);  // a tensor gives the positions, so the table cannot grow by itself

  const Tensor q = torch::randn({B, Hq, 1, D}), k = torch::randn({B, Hk, 1, D});
  const Tensor lengths = torch::tensor({17, 90, 300});
  const auto [q_rotated, k_rotated] = rotate_step(rope, q, k, lengths);

  const Tensor q_out = torch::empty_like(q);
  const Tensor k_cache = torch::zeros({pages, page_size, Hk, D});
  const Tensor slots = torch::tensor({33, -1, 5}).view({B, 1});
  rotate_into_cache(rope, q, k, lengths, q_out, k_cache, slots);

  const auto [cos, sin] = rope->table();
  const Tensor v = torch::randn({B, Hk, D});
  const Tensor keys = torch::zeros_like(k_cache), values = torch::zeros_like(k_cache);
  const Tensor q_same = decode_step(q.squeeze(2), k.squeeze(2), v, cos, sin, keys, values, lengths,
                                    slots.flatten(), CacheOptions());

  const bool stored = torch::equal(k_cache[2][1], k_rotated[0].squeeze(1)) &&
                      torch::equal(k_cache[0][5], k_rotated[2].squeeze(1)) &&
                      torch::equal(q_out, q_rotated) &&
                      torch::equal(q_same, q_rotated.squeeze(2)) && torch::equal(keys, k_cache) &&
                      torch::equal(values[2][1], v[0]) && torch::equal(values[0][5], v[2]);
  std::printf("keys and values are %sin their slots\n", stored ? "" : "not ");
  return stored ? 0 : 1;
}
