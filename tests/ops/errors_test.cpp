// Mistakes in a call: the C++ types of the exceptions, numbers that would overflow, and mistakes
// that only C++ can make. tests/python/test_errors.py lists all mistakes.
#include <functional>
#include <typeinfo>

#include "testing.h"

namespace fused_rope {
namespace {

using testing::expect_identical;
using testing::OnDeviceFor;
using testing::Tensors;

// A valid call with B=2, S=5, Hq=3, Hk=2, D=16, P=8, M=32; each case changes a part of it.
struct Call : Tensors {
  explicit Call(const at::Device& device) : Tensors(device) {}

  at::Tensor q = randn({2, 5, 3, 16}), k = randn({2, 5, 2, 16});
  at::Tensor cos = randn({32, 8}), sin = randn({32, 8});
  at::Tensor q_out = at::zeros_like(q), k_out = at::zeros_like(k);
  RotateOptions options;
};

struct Form {
  const char* op;
  bool in_place, out;
  std::function<void(const Call&)> call;
};

const Form kForms[] = {
    {"rotate", false, false, [](const Call& c) { rotate(c.k, c.cos, c.sin, c.options); }},
    {"rotate_", true, false, [](const Call& c) { rotate_(c.k, c.cos, c.sin, c.options); }},
    {"rotate_qk", false, false,
     [](const Call& c) { rotate_qk(c.q, c.k, c.cos, c.sin, c.options); }},
    {"rotate_qk_", true, false,
     [](const Call& c) { rotate_qk_(c.q, c.k, c.cos, c.sin, c.options); }},
    {"rotate_out", false, true,
     [](const Call& c) { rotate_out(c.k_out, c.k, c.cos, c.sin, c.options); }},
    {"rotate_qk_out", false, true,
     [](const Call& c) { rotate_qk_out(c.q_out, c.k_out, c.q, c.k, c.cos, c.sin, c.options); }},
};

bool every_form(const Form&) { return true; }

struct ErrorCase {
  const char* name;
  const std::type_info& type;
  std::vector<std::string> words;  // that the message contains
  std::function<void(Call&)> change;
  std::function<bool(const Form&)> applies = every_form;
};

void PrintTo(const ErrorCase& c, std::ostream* out) { *out << c.name; }

class Errors : public OnDeviceFor<ErrorCase> {};

TEST_P(Errors, NameTheOperatorAndLeaveTensorsUnchanged) {
  if (device().is_cuda() && c().type == typeid(c10::IndexError)) {
    GTEST_SKIP() << "a device-side assertion there";
  }
  for (const Form& form : kForms) {
    if (!c().applies(form)) continue;
    SCOPED_TRACE(form.op);
    Call call(device());
    c().change(call);
    const std::vector<at::Tensor> tensors = {call.q, call.k, call.q_out, call.k_out};
    std::vector<at::Tensor> before;
    std::vector<int64_t> versions;
    for (const at::Tensor& t : tensors) {
      before.push_back(t.detach().clone());
      versions.push_back(t._version());
    }
    try {
      form.call(call);
      ADD_FAILURE() << "was accepted";
    } catch (const c10::Error& error) {
      const std::string message = error.what_without_backtrace();
      EXPECT_STREQ(typeid(error).name(), c().type.name()) << message;
      const std::string op = std::string(form.op) + ": ";
      EXPECT_TRUE(c().type == typeid(c10::Error) || message.rfind(op, 0) == 0) << message;
      for (const std::string& word : c().words) {
        EXPECT_NE(message.find(word), std::string::npos) << "no '" << word << "' in: " << message;
      }
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
      expect_identical(tensors[i], before[i]);
      EXPECT_EQ(tensors[i]._version(), versions[i]) << "version of tensor " << i;
    }
  }
}

const ErrorCase kErrors[] = {
    {"IntegerInput",
     typeid(c10::TypeError),
     {"dtype"},
     [](Call& c) {
       for (at::Tensor* t : {&c.q, &c.k, &c.q_out, &c.k_out}) *t = t->to(at::kInt);
     }},
    {"ShortTable",
     typeid(c10::ValueError),
     {"cos has 4 rows", "S = 5 are needed"},
     [](Call& c) { c.cos = c.cos.slice(0, 0, 4), c.sin = c.sin.slice(0, 0, 4); }},
    {"TwoOffsets",
     typeid(c10::ValueError),
     {"offset"},
     [](Call& c) { c.options.offsets(c.integers({0, 1})).offset(3); }},
    {"OutRowsWithoutOutput",
     typeid(c10::ValueError),
     {"out_rows"},
     [](Call& c) { c.options.out_rows(c.integers({0}).expand({2, 5})); },
     [](const Form& form) { return !form.out; }},
    {"HugeOffset",
     typeid(c10::ValueError),
     {"offset"},
     [](Call& c) { c.options.offset(INT64_MAX); }},
    {"HugeRotaryOffset",
     typeid(c10::ValueError),
     {"rotary_offset"},
     [](Call& c) { c.options.rotary_offset(INT64_MAX); }},
    {"HugeBlocks",
     typeid(c10::ValueError),
     {"blocks", "P=8"},
     [](Call& c) { c.options.blocks(INT64_MAX); }},
    {"PositionBeyondTheTable",
     typeid(c10::IndexError),
     {"positions", "M=32", "got 32"},
     [](Call& c) { c.options.positions(c.integers({0, 1, 31, 3, 32})); }},
    {"PositionBeyondInt32",
     typeid(c10::IndexError),
     {"positions", "4294967296"},
     [](Call& c) { c.options.positions(c.integers({0, 1, 2, 3, int64_t{1} << 32})); }},
    {"SumOfPositionAndOffsetBeyondInt64",
     typeid(c10::IndexError),
     {"positions", "M=32"},
     [](Call& c) { c.options.positions(c.integers({0, 1, 2, 3, INT64_MAX})).offset(INT64_MAX); }},
    {"OutRowBeyondTheOutput",
     typeid(c10::IndexError),
     {"out_rows", "10"},
     [](Call& c) {
       c.k_out = c.randn({10, 2, 16});
       c.options.out_rows(c.integers({0, 1, 2, 3, 4, 5, 6, 7, 8, 10}).view({2, 5}));
     },
     [](const Form& form) { return form.out; }},
    {"PositionsInTheMemoryOfTheOutput",
     typeid(c10::Error),
     {"positions", "share memory"},
     [](Call& c) { c.options.positions(c.k_out.flatten().slice(0, 0, 10).view(at::kLong)); },
     [](const Form& form) { return form.out; }},
    {"PositionsInTheMemoryOfTheInput",
     typeid(c10::Error),
     {"positions", "share memory"},
     [](Call& c) { c.options.positions(c.k.flatten().slice(0, 0, 10).view(at::kLong)); },
     [](const Form& form) { return form.in_place; }},
    {"OutRowsInTheMemoryOfTheOutput",
     typeid(c10::Error),
     {"out_rows", "share memory"},
     [](Call& c) {
       c.k_out = at::zeros_like(c.k).view({10, 2, 16});
       c.options.out_rows(c.k_out.flatten().slice(0, 0, 20).view(at::kLong).view({2, 5}));
     },
     [](const Form& form) { return form.out; }},
    {"LeafInPlace",
     typeid(c10::Error),
     {"leaf"},
     [](Call& c) { c.k.requires_grad_(); },
     [](const Form& form) { return form.in_place; }},
    {"OutputOfAnInputThatRequiresGrad",
     typeid(c10::Error),
     {"out", "grad"},
     [](Call& c) { c.k.requires_grad_(); },
     [](const Form& form) { return form.out; }},
};
FUSED_ROPE_ON_DEVICES_FOR(Errors, kErrors);

}  // namespace
}  // namespace fused_rope
