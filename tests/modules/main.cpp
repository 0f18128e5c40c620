// Rotates by every kind of RotaryEmbedding, for Python to compare with its own: modules GIVEN
// RESULT, where GIVEN holds "q" and "k" [B, S, H, D], "positions" [B, S], "axes" [3, B, S] and
// "lengths" [B], written by torch.save. RESULT holds name + ".table", ".rows", ".positions" and
// ".lengths".
#include <fused_rope/fused_rope.h>
#include <torch/torch.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

using fused_rope::RopeScaling;
using fused_rope::RopeType;
using fused_rope::RotaryEmbedding;
using Options = fused_rope::RotaryEmbeddingOptions;
using Where = fused_rope::RotaryEmbeddingForwardOptions;
using Tensors = c10::Dict<std::string, at::Tensor>;

RopeScaling yarn() {
  return RopeScaling(RopeType::kYarn).factor(8).original_max_position_embeddings(32);
}

RopeScaling llama3(double high_freq_factor) {
  return RopeScaling(RopeType::kLlama3)
      .factor(8)
      .low_freq_factor(1)
      .high_freq_factor(high_freq_factor)
      .original_max_position_embeddings(64);
}

RopeScaling longrope() {
  std::vector<double> short_factor, long_factor;
  for (int j = 0; j < 16; ++j) {
    short_factor.push_back(1 + j / 8.0);
    long_factor.push_back(2 + j / 4.0);
  }
  return RopeScaling(RopeType::kLongRope)
      .factor(4)
      .original_max_position_embeddings(32)
      .short_factor(short_factor)
      .long_factor(long_factor);
}

// The same names and options as in tests/python/test_cpp_module.py.
std::vector<std::pair<std::string, Options>> all() {
  const auto dynamic =
      RopeScaling(RopeType::kDynamic).factor(2).original_max_position_embeddings(32);
  const Options usual = Options(32).max_seq_len(128);
  const auto scaled = [&](const RopeScaling& scaling) { return Options(usual).scaling(scaling); };
  return {
      {"default", Options(usual).base(5e5)},
      {"linear", scaled(RopeScaling(RopeType::kLinear).factor(4))},
      {"dynamic", scaled(dynamic)},
      {"yarn", scaled(yarn())},
      {"yarn, every key",
       scaled(
           yarn().factor(40).beta_fast(16).beta_slow(2).mscale(0.707).mscale_all_dim(1.5).truncate(
               false))},
      {"yarn, attention factor", scaled(yarn().attention_factor(1.25))},
      {"longrope", scaled(longrope())},
      {"llama3", scaled(llama3(4))},
      {"llama3, no blend", scaled(llama3(1))},
      {"proportional",
       scaled(RopeScaling(RopeType::kProportional).partial_rotary_factor(0.25).factor(8))},
      {"half-truncated", scaled(RopeType::kHalfTruncated)},
      {"axial", scaled(RopeType::kAxial)},
      {"span", Options(usual).rotary_dim(16).rotary_offset(8).scaling(dynamic)},
      {"interleaved", Options(usual).interleaved(true).precision(fused_rope::Precision::kModel)},
      {"blocks", Options(usual).blocks(2).scaling(dynamic)},
      {"axes", Options(usual)
                   .axes(std::vector<int64_t>{0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0})
                   .scaling(dynamic)},
  };
}

Tensors rotate_all(const Tensors& given) {
  const at::Tensor q = given.at("q"), k = given.at("k");
  Tensors result;
  for (const auto& [name, options] : all()) {
    RotaryEmbedding rope(options);
    result.insert(name + ".table", torch::stack({rope->cos(), rope->sin()}));
    const auto add = [&, &name = name](const char* how, const Where& where) {
      const auto [q_rotated, k_rotated] = rope(q, k, where);
      result.insert(name + how, torch::cat({q_rotated, k_rotated}, /*dim=*/2));
    };
    add(".rows", 90);
    const bool axes = options.axes().has_value();
    add(".positions", Where().positions(given.at(axes ? "axes" : "positions")));
    add(".lengths", Where().offsets(given.at("lengths")));
  }
  return result;
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

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: modules GIVEN RESULT\n"), 2;
  const std::vector<char> bytes = torch::pickle_save(rotate_all(read(argv[1])));
  std::ofstream(argv[2], std::ios::binary).write(bytes.data(), static_cast<int64_t>(bytes.size()));
}
