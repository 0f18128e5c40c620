// Llama's attention in libtorch: grouped queries, RoPE with Llama 3.1's frequencies, a KV cache.
// Trains on a target, then decodes token by token.
//
//   llama_attention                   random weights and data
//   llama_attention GIVEN RESULT      reads weights, "x" and "target" from a dict of tensors that
//                                     torch.save wrote; writes the results to RESULT for torch.load

#include <fused_rope/fused_rope.h>
#include <torch/torch.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <tuple>
#include <vector>

namespace nn = torch::nn;
using fused_rope::Layout;
using fused_rope::RopeScaling;
using fused_rope::RopeType;
using fused_rope::RotaryEmbeddingOptions;
using torch::Tensor;
using Tensors = c10::Dict<std::string, Tensor>;

// Letters: B batch, S new tokens, L tokens so far, E hidden size, Hq and Hk heads, D head_dim.
constexpr int64_t B = 2, S = 24, E = 64, Hq = 8, Hk = 2, D = 16;
constexpr int64_t kSteps = 20;

// Keys and values of the tokens so far, with memory for `tokens` tokens.
struct Cache {
  explicit Cache(int64_t tokens)
      : k(torch::empty({B, Hk, tokens, D})), v(torch::empty({B, Hk, tokens, D})) {}

  // Appends S tokens and returns all L, [B, Hk, L, D].
  std::tuple<Tensor, Tensor> append(const Tensor& new_k, const Tensor& new_v) {
    const int64_t added = new_k.size(2);
    k.narrow(2, length, added).copy_(new_k);
    v.narrow(2, length, added).copy_(new_v);
    length += added;
    return {k.narrow(2, 0, length), v.narrow(2, 0, length)};
  }

  Tensor k, v;
  int64_t length = 0;
};

struct LlamaAttentionImpl : nn::Module {
  LlamaAttentionImpl() {
    const auto linear = [this](const char* name, int64_t in, int64_t out) {
      return register_module(name, nn::Linear(nn::LinearOptions(in, out).bias(false)));
    };
    q_proj = linear("q_proj", E, Hq * D);
    k_proj = linear("k_proj", E, Hk * D);
    v_proj = linear("v_proj", E, Hk * D);
    o_proj = linear("o_proj", Hq * D, E);
    const auto scaling = RopeScaling(RopeType::kLlama3)
                             .factor(8)
                             .low_freq_factor(1)
                             .high_freq_factor(4)
                             .original_max_position_embeddings(64);
    rope = fused_rope::RotaryEmbedding(
        RotaryEmbeddingOptions(D).layout(Layout::kBHSD).base(1e4).scaling(scaling));
    register_module("rope", rope);
  }

  // x [B, S, E]: the tokens that follow those in the cache.
  Tensor forward(const Tensor& x, Cache* cache = nullptr) {
    const auto heads = [&](nn::Linear& projection) {
      return projection(x).unflatten(-1, {-1, D}).transpose(1, 2);
    };
    auto [q, k] = rope(heads(q_proj), heads(k_proj), cache == nullptr ? 0 : cache->length);
    Tensor v = heads(v_proj);
    if (cache != nullptr) std::tie(k, v) = cache->append(k, v);

    const int64_t before = k.size(2) - q.size(2);
    const Tensor mask = torch::ones({q.size(2), k.size(2)}, torch::kBool).tril(before);
    const Tensor out = torch::scaled_dot_product_attention(q, k, v, mask, /*dropout_p=*/0.0,
                                                           /*is_causal=*/false, /*scale=*/{},
                                                           /*enable_gqa=*/true);
    return o_proj(out.transpose(1, 2).flatten(2));
  }

  nn::Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, o_proj{nullptr};
  fused_rope::RotaryEmbedding rope{nullptr};
};
TORCH_MODULE(LlamaAttention);

// Runs the prompt in one call, then one token per call.
Tensor decode(LlamaAttention& attention, const Tensor& x, int64_t prompt) {
  const torch::NoGradGuard no_grad;
  Cache cache(x.size(1));
  std::vector<Tensor> outs = {attention(x.narrow(1, 0, prompt), &cache)};
  for (int64_t i = prompt; i < x.size(1); ++i) {
    outs.push_back(attention(x.narrow(1, i, 1), &cache));
  }
  return torch::cat(outs, 1);
}

// Returns the losses of kSteps steps of gradient descent.
Tensor train(LlamaAttention& attention, const Tensor& x, const Tensor& target) {
  torch::optim::SGD optimizer(attention->parameters(), /*lr=*/0.5);
  std::vector<Tensor> losses;
  for (int64_t step = 0; step < kSteps; ++step) {
    optimizer.zero_grad();
    const Tensor loss = torch::mse_loss(attention(x), target);
    loss.backward();
    optimizer.step();
    losses.push_back(loss.detach());
  }
  return torch::stack(losses);
}

Tensors read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  Tensors tensors;
  for (const auto& entry : torch::pickle_load(bytes).toGenericDict()) {
    tensors.insert(entry.key().toStringRef(), entry.value().toTensor());
  }
  return tensors;
}

void write(const char* path, const Tensors& tensors) {
  const std::vector<char> bytes = torch::pickle_save(tensors);
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<int64_t>(bytes.size()));
}

int main(int argc, char** argv) {
  torch::manual_seed(0);
  LlamaAttention attention;
  Tensor x = torch::randn({B, S, E}), target = torch::randn({B, S, E}) / 4;
  if (argc == 3) {
    const torch::NoGradGuard no_grad;
    const Tensors given = read(argv[1]);
    for (auto& parameter : attention->named_parameters()) {
      parameter.value().copy_(given.at(parameter.key()));
    }
    x = given.at("x");
    target = given.at("target");
  }

  Tensors result;
  result.insert("out", attention(x).detach());
  const Tensor losses = train(attention, x, target);
  const Tensor trained = attention(x).detach(), decoded = decode(attention, x, /*prompt=*/S / 2);
  const double change = (decoded - trained).abs().max().item<double>();
  const double first = losses[0].item<double>(), last = losses[-1].item<double>();
  std::printf("loss %.4f, after %d steps %.4f; decoded with a cache: off by %.1e\n", first,
              static_cast<int>(kSteps), last, change);

  if (argc == 3) {
    result.insert("losses", losses);
    result.insert("trained", trained);
    result.insert("decoded", decoded);
    for (const auto& parameter : attention->named_parameters()) {
      result.insert(parameter.key(), parameter.value().detach());
    }
    write(argv[2], result);
  }
  return last < first && change < 1e-5 ? 0 : 1;
}
