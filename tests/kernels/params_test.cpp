#include "fused_rope/kernels/params.h"

#include <gtest/gtest.h>

#include <string>

#include "calls.h"

namespace fused_rope::kernels {
namespace {

using testing::bhsd;
using testing::bshd;
using testing::call;
using testing::memory;
using testing::sbhd;

struct OrderCase {
  const char* name;
  int64_t B, S, H;
  Strides strides;
  std::array<Axis, 3> order;
};

void PrintTo(const OrderCase& c, std::ostream* out) { *out << c.name; }

class MemoryOrder : public ::testing::TestWithParam<OrderCase> {};

TEST_P(MemoryOrder, SortsAxesByStride) {
  const OrderCase& c = GetParam();
  RotateParams p = call(c.B, c.S, c.H, 64, 64);
  p.count = 2;
  p.tensors[1] = {memory, memory, c.strides, bshd(c.S, c.H, 64), c.H, false};
  EXPECT_EQ(memory_order(p, p.tensors[1]), c.order) << "of k, not of q";
}

const OrderCase kOrderCases[] = {
    {"BSHD", 2, 5, 3, bshd(5, 3, 64), {kHead, kSequence, kBatch}},
    {"BHSD", 2, 5, 3, bhsd(5, 3, 64), {kSequence, kHead, kBatch}},
    {"SBHD", 2, 5, 3, sbhd(2, 3, 64), {kHead, kBatch, kSequence}},
    {"OneHeadLast", 2, 5, 1, {320, 64, 1, 1}, {kSequence, kBatch, kHead}},
    {"OneTokenLast", 4, 1, 8, {512, 7, 64, 1}, {kHead, kBatch, kSequence}},
};

INSTANTIATE_TEST_SUITE_P(Layouts, MemoryOrder, ::testing::ValuesIn(kOrderCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(TotalHeads, CountsBothTensors) {
  RotateParams p = call(2, 3, 5, 64, 64);
  p.tensors[1] = p.tensors[0];
  p.tensors[1].H = 2;
  EXPECT_EQ(total_heads(p), 5);
  p.count = 2;
  EXPECT_EQ(total_heads(p), 7);
}

}  // namespace
}  // namespace fused_rope::kernels
