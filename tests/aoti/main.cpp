// Runs an AOTInductor package without Python: aoti PACKAGE EXAMPLES, where EXAMPLES is a list of
// [inputs, outputs] written by torch.save. Fails unless the package returns those very outputs.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

std::vector<at::Tensor> tensors(const c10::IValue& list) {
  std::vector<at::Tensor> result;
  for (const c10::IValue& item : list.toListRef()) result.push_back(item.toTensor());
  return result;
}

c10::IValue read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return torch::pickle_load({std::istreambuf_iterator<char>(file), {}});
}

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: aoti PACKAGE EXAMPLES\n"), 2;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const c10::IValue examples = read(argv[2]);
  int right = 0, total = 0;
  for (const c10::IValue& example : examples.toListRef()) {
    const std::vector<at::Tensor> expected = tensors(example.toListRef()[1]);
    const std::vector<at::Tensor> outputs = model.run(tensors(example.toListRef()[0]));
    total += static_cast<int>(expected.size());
    for (size_t i = 0; i < expected.size() && i < outputs.size(); ++i)
      right += outputs[i].equal(expected[i]);
  }
  std::printf("%d of %d outputs are right\n", right, total);
  return total > 0 && right == total ? 0 : 1;
}
