#include <functional>
#include <typeinfo>

#include "testing.h"

namespace fused_rope {
namespace {

using testing::devices;
using testing::expect_same_bits;

// A sound call of B=2, S=5, Hq=3, Hk=2, D=16, P=8, M=32, whose parts the cases below spoil.
struct Call {
  explicit Call(const at::Device& device) : on(device) {
    at::manual_seed(testing::kSeed);
    q = randn({2, 5, 3, 16});
    k = randn({2, 5, 2, 16});
    cos = randn({32, 8});
    sin = randn({32, 8});
    q_out = at::zeros_like(q);
    k_out = at::zeros_like(k);
  }

  at::Tensor randn(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) const {
    return at::randn(sizes, at::kDouble).to(on, dtype);
  }
  at::Tensor integers(at::ArrayRef<int64_t> values, at::ScalarType dtype = at::kLong) const {
    return at::tensor(values, at::kLong).to(on, dtype);
  }

  // Makes the call of a packed batch of T=10.
  void pack() {
    q = q.flatten(0, 1);
    k = k.flatten(0, 1);
    q_out = q_out.flatten(0, 1);
    k_out = k_out.flatten(0, 1);
    options.layout(Layout::kTHD);
  }

  at::Device on;
  at::Tensor q, k, cos, sin, q_out, k_out;
  RotateOptions options;
};

enum class Kind { kValue, kType, kIndex, kRuntime };

// Which forms a mistake can be made in.
enum class Forms { kAll, kPair, kInPlace, kInPlacePair, kOut };

struct Case {
  std::string name;
  Kind kind;
  std::vector<std::string> words;  // that the message must hold
  std::function<void(Call&)> spoil;
  Forms forms = Forms::kAll;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

struct Form {
  const char* op;
  bool pair, in_place, out;
  void (*call)(const Call&);
};

const Form kForms[] = {
    {"rotate", false, false, false, [](const Call& c) { rotate(c.k, c.cos, c.sin, c.options); }},
    {"rotate_", false, true, false, [](const Call& c) { rotate_(c.k, c.cos, c.sin, c.options); }},
    {"rotate_qk", true, false, false,
     [](const Call& c) { rotate_qk(c.q, c.k, c.cos, c.sin, c.options); }},
    {"rotate_qk_", true, true, false,
     [](const Call& c) { rotate_qk_(c.q, c.k, c.cos, c.sin, c.options); }},
    {"rotate_out", false, false, true,
     [](const Call& c) { rotate_out(c.k_out, c.k, c.cos, c.sin, c.options); }},
    {"rotate_qk_out", true, false, true,
     [](const Call& c) { rotate_qk_out(c.q_out, c.k_out, c.q, c.k, c.cos, c.sin, c.options); }},
};

bool applies(const Form& form, Forms forms) {
  switch (forms) {
    case Forms::kPair:
      return form.pair;
    case Forms::kInPlace:
      return form.in_place;
    case Forms::kInPlacePair:
      return form.in_place && form.pair;
    case Forms::kOut:
      return form.out;
    default:
      return true;
  }
}

const std::type_info& type_of(Kind kind) {
  switch (kind) {
    case Kind::kValue:
      return typeid(c10::ValueError);
    case Kind::kType:
      return typeid(c10::TypeError);
    case Kind::kIndex:
      return typeid(c10::IndexError);
    default:
      return typeid(c10::Error);
  }
}

class Errors : public ::testing::TestWithParam<std::tuple<at::Device, Case>> {};

TEST_P(Errors, NameTheOperatorAndLeaveTensorsAlone) {
  const auto& [device, c] = GetParam();
  if (device.is_cuda() && c.kind == Kind::kIndex) GTEST_SKIP() << "a device-side assertion there";
  for (const Form& form : kForms) {
    if (!applies(form, c.forms)) continue;
    SCOPED_TRACE(form.op);
    Call call(device);
    c.spoil(call);
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
      EXPECT_EQ(typeid(error).name(), type_of(c.kind).name()) << message;
      const std::string op = std::string(form.op) + ": expected ";
      EXPECT_TRUE(c.kind == Kind::kRuntime || message.rfind(op, 0) == 0) << message;
      for (const std::string& word : c.words) {
        EXPECT_NE(message.find(word), std::string::npos) << "no '" << word << "' in: " << message;
      }
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
      expect_same_bits(tensors[i], before[i]);
      EXPECT_EQ(tensors[i]._version(), versions[i]) << "version of tensor " << i;
    }
  }
}

std::vector<Case> cases() {
  using C = Call&;
  const auto value = Kind::kValue;
  const auto type = Kind::kType;
  const auto index = Kind::kIndex;
  const auto runtime = Kind::kRuntime;
  return {
      {"IntegerInput",
       type,
       {"dtype"},
       [](C c) {
         c.q = c.q.to(at::kInt), c.k = c.k.to(at::kInt);
         c.q_out = c.q_out.to(at::kInt), c.k_out = c.k_out.to(at::kInt);
       }},
      {"InputsOfTwoDtypes", type, {"k", "got"}, [](C c) { c.k = c.k.to(at::kHalf); }, Forms::kPair},
      {"InputRank", value, {"4 dim", "bshd", "got"}, [](C c) { c.q = c.q[0], c.k = c.k[0]; }},
      {"PackedInputRank", value, {"3 dim", "thd"}, [](C c) { c.options.layout(Layout::kTHD); }},
      {"KeyWithOtherTokens",
       value,
       {"k", "S=5"},
       [](C c) { c.k = c.k.slice(1, 0, 4), c.k_out = c.k_out.slice(1, 0, 4); },
       Forms::kPair},
      {"KeyWithOtherBatch",
       value,
       {"k", "B=2"},
       [](C c) { c.k = c.k.slice(0, 0, 1), c.k_out = c.k_out.slice(0, 0, 1); },
       Forms::kPair},
      {"KeyWithOtherHead",
       value,
       {"k", "D=16"},
       [](C c) { c.k = c.k.slice(3, 0, 8), c.k_out = c.k_out.slice(3, 0, 8); },
       Forms::kPair},
      {"IntegerTable", type, {"cos", "dtype"}, [](C c) { c.cos = c.cos.to(at::kInt); }},
      {"TablesOfTwoDtypes", type, {"sin", "cos"}, [](C c) { c.sin = c.sin.to(at::kDouble); }},
      {"TablesOfTwoShapes",
       value,
       {"sin", "cos", "[31, 8]"},
       [](C c) { c.sin = c.sin.slice(0, 0, 31); }},
      {"TablesOfTwoRanks", value, {"sin", "cos"}, [](C c) { c.sin = c.sin.unsqueeze(0); }},
      {"TableRank",
       value,
       {"cos", "[M, P]", "[8]"},
       [](C c) { c.cos = c.cos[0], c.sin = c.sin[0]; }},
      {"ShortTable",
       value,
       {"cos", "S=5", "[4, 8]"},
       [](C c) { c.cos = c.cos.slice(0, 0, 4), c.sin = c.sin.slice(0, 0, 4); }},
      {"ShortTableBehindAnOffset",
       value,
       {"cos", "offset", "28"},
       [](C c) { c.options.offset(28); }},
      {"HugeOffset", value, {"offset"}, [](C c) { c.options.offset(INT64_MAX); }},
      {"NegativeOffset", value, {"offset", "-1"}, [](C c) { c.options.offset(-1); }},
      {"WideTable", value, {"cos", "D=16"}, [](C c) { c.cos = c.sin = c.randn({32, 9}); }},
      {"SpanBeyondHead", value, {"rotary_offset", "D=16"}, [](C c) { c.options.rotary_offset(1); }},
      {"HugeRotaryOffset",
       value,
       {"rotary_offset"},
       [](C c) { c.options.rotary_offset(INT64_MAX); }},
      {"NegativeRotaryOffset",
       value,
       {"rotary_offset", "-2"},
       [](C c) { c.options.rotary_offset(-2); }},
      {"NoBlocks", value, {"blocks", "0"}, [](C c) { c.options.blocks(0); }},
      {"BlocksThatDoNotDivide", value, {"blocks", "P=8", "3"}, [](C c) { c.options.blocks(3); }},
      {"InterleavedBlocks",
       value,
       {"blocks", "interleaved"},
       [](C c) { c.options.blocks(2).interleaved(true); }},
      {"FloatPositions",
       type,
       {"positions", "int64"},
       [](C c) { c.options.positions(c.randn({5})); }},
      {"Int16Positions",
       type,
       {"positions", "int64"},
       [](C c) { c.options.positions(c.integers({0, 1, 2, 3, 4}, at::kShort)); }},
      {"PositionsOfAnotherLength",
       value,
       {"positions", "S=5", "[4]"},
       [](C c) { c.options.positions(c.integers({0, 1, 2, 3})); }},
      {"PositionsOfAnotherBatch",
       value,
       {"positions", "B=2", "[3, 5]"},
       [](C c) { c.options.positions(c.integers({0}).expand({3, 5})); }},
      {"PositionsWithAxesButNone",
       value,
       {"positions"},
       [](C c) { c.options.positions(c.integers({0}).expand({3, 2, 5})); }},
      {"FloatOffsets", type, {"offset"}, [](C c) { c.options.offsets(c.randn({2})); }},
      {"OffsetsOfAnotherBatch",
       value,
       {"offset", "B=2", "[3]"},
       [](C c) { c.options.offsets(c.integers({0, 1, 2})); }},
      {"TwoOffsets",
       value,
       {"offset"},
       [](C c) { c.options.offsets(c.integers({0, 1})).offset(3); }},
      {"CuSeqlensOfDenseBatch",
       value,
       {"cu_seqlens", "thd"},
       [](C c) { c.options.cu_seqlens(c.integers({0, 5})); }},
      {"FloatCuSeqlens",
       type,
       {"cu_seqlens"},
       [](C c) { c.pack(), c.options.cu_seqlens(c.randn({3})); }},
      {"EmptyCuSeqlens",
       value,
       {"cu_seqlens", "[N + 1]"},
       [](C c) { c.pack(), c.options.cu_seqlens(c.integers({})); }},
      {"CuSeqlensOfTwoDimensions",
       value,
       {"cu_seqlens", "[N + 1]"},
       [](C c) { c.pack(), c.options.cu_seqlens(c.integers({0, 10}).unsqueeze(0)); }},
      {"OffsetsOfOtherSequences",
       value,
       {"offset", "N=1", "[2]"},
       [](C c) {
         c.pack(), c.options.cu_seqlens(c.integers({0, 10})).offsets(c.integers({0, 0}));
       }},
      {"AxesWithoutPositions",
       value,
       {"axes", "positions"},
       [](C c) { c.options.axes(std::vector<int64_t>(8)); }},
      {"AxesOfAnotherLength",
       value,
       {"axes", "P=8", "7"},
       [](C c) {
         c.options.axes(std::vector<int64_t>(7)).positions(c.integers({0}).expand({3, 5}));
       }},
      {"AxisOutOfRange",
       value,
       {"axes", "A=3", "3"},
       [](C c) {
         c.options.axes(std::vector<int64_t>(8, 3)).positions(c.integers({0}).expand({3, 5}));
       }},
      {"NegativeAxis",
       value,
       {"axes", "-1"},
       [](C c) {
         c.options.axes(std::vector<int64_t>(8, -1)).positions(c.integers({0}).expand({3, 5}));
       }},
      {"NineAxes",
       value,
       {"positions", "8"},
       [](C c) {
         c.options.axes(std::vector<int64_t>(8)).positions(c.integers({0}).expand({9, 5}));
       }},
      {"PerTokenTableOfOtherTokens",
       value,
       {"cos", "S=5", "[2, 4, 8]"},
       [](C c) { c.cos = c.sin = c.randn({2, 4, 8}); }},
      {"PerTokenTableOfOtherBatch",
       value,
       {"cos", "B=2", "[3, 5, 8]"},
       [](C c) { c.cos = c.sin = c.randn({3, 5, 8}); }},
      {"PerTokenTableWithPositions",
       value,
       {"positions"},
       [](C c) {
         c.cos = c.sin = c.randn({2, 5, 8}), c.options.positions(c.integers({0, 1, 2, 3, 4}));
       }},
      {"PerTokenTableWithOffset",
       value,
       {"offset"},
       [](C c) { c.cos = c.sin = c.randn({2, 5, 8}), c.options.offset(1); }},
      {"PerTokenTableWithOffsets",
       value,
       {"offset"},
       [](C c) { c.cos = c.sin = c.randn({2, 5, 8}), c.options.offsets(c.integers({0, 0})); }},
      {"PerHeadTableOfOtherHeads",
       value,
       {"cos", "H="},
       [](C c) { c.cos = c.sin = c.randn({2, 5, 4, 8}); }},
      {"PerHeadTableOfDifferentHeads",
       value,
       {"cos", "H="},
       [](C c) { c.cos = c.sin = c.randn({2, 5, 2, 8}); },
       Forms::kPair},
      {"PositionBelowMinusOne",
       index,
       {"positions", "M=32", "-2"},
       [](C c) { c.options.positions(c.integers({0, 1, -2, 3, 4})); }},
      {"PositionBeyondTable",
       index,
       {"positions", "M=32", "32"},
       [](C c) { c.options.positions(c.integers({0, 1, 31, 3, 32})); }},
      {"PositionBeyondInt32",
       index,
       {"positions", "4294967296"},
       [](C c) { c.options.positions(c.integers({0, 1, 2, 3, int64_t{1} << 32})); }},
      {"PositionAndOffsetBeyondTable",
       index,
       {"32"},
       [](C c) { c.options.positions(c.integers({0, 1, 31, -1, 4})).offset(1); }},
      {"OffsetsBeyondTable", index, {"32"}, [](C c) { c.options.offsets(c.integers({0, 28})); }},
      {"SequenceBeyondTable",
       index,
       {"M=9"},
       [](C c) {
         c.pack(), c.options.cu_seqlens(c.integers({0, 10}));
         c.cos = c.cos.slice(0, 0, 9), c.sin = c.sin.slice(0, 0, 9);
       }},
      {"AxisPositionBeyondTable",
       index,
       {"M=32", "40"},
       [](C c) {
         c.options.axes(std::vector<int64_t>{0, 0, 1, 1, 1, 1, 1, 0});
         c.options.positions(c.integers({0, 0, 0, 0, 0, 1, 2, 3, 40, 4}).view({2, 5}));
       }},
      {"OverlappingInPlace",
       runtime,
       {"expected", "strides"},
       [](C c) { c.q = c.q.slice(2, 0, 1).expand({2, 5, 3, 16}), c.k = c.q; },
       Forms::kInPlace},
      {"SameTensorTwiceInPlace",
       runtime,
       {"k and q not to share memory"},
       [](C c) { c.k = c.q; },
       Forms::kInPlacePair},
      {"OverlappingPairInPlace",
       runtime,
       {"k and q not to share memory"},
       [](C c) {
         const at::Tensor joint = c.randn({3, 5, 3, 16});
         c.q = joint.slice(0, 0, 2), c.k = joint.slice(0, 1, 3);
       },
       Forms::kInPlacePair},
      {"OutputOfAnotherShape",
       value,
       {"out", "[2, 5, 2, 16]"},
       [](C c) { c.k_out = c.k_out.slice(1, 0, 4); },
       Forms::kOut},
      {"OutputOfAnotherDtype",
       type,
       {"out", "dtype"},
       [](C c) { c.k_out = c.k_out.to(at::kHalf); },
       Forms::kOut},
      {"OutputIsTheInput", runtime, {"out"}, [](C c) { c.k_out = c.k; }, Forms::kOut},
      {"OutputOverlapsItself",
       runtime,
       {"out", "strides"},
       [](C c) { c.k_out = c.k_out.slice(2, 0, 1).expand_as(c.k_out); },
       Forms::kOut},
      {"OutputRowsOfAnotherShape",
       value,
       {"out_rows", "S=5", "[5]"},
       [](C c) { c.k_out = c.randn({10, 2, 16}), c.options.out_rows(c.integers({0, 1, 2, 3, 4})); },
       Forms::kOut},
      {"FloatOutputRows",
       type,
       {"out_rows"},
       [](C c) { c.k_out = c.randn({10, 2, 16}), c.options.out_rows(c.randn({2, 5})); },
       Forms::kOut},
      {"ScatteredOutputOfOtherHeads",
       value,
       {"out", "H=2", "D=16"},
       [](C c) {
         c.k_out = c.randn({10, 3, 16}), c.options.out_rows(c.integers({0}).expand({2, 5}));
       },
       Forms::kOut},
      {"OutputRowBeyondOutput",
       index,
       {"out_rows", "10"},
       [](C c) {
         c.k_out = c.randn({10, 2, 16});
         c.options.out_rows(c.integers({0, 1, 2, 3, 4, 5, 6, 7, 8, 10}).view({2, 5}));
       },
       Forms::kOut},
      {"OutputRowBelowMinusOne",
       index,
       {"out_rows", "-2"},
       [](C c) {
         c.k_out = c.randn({10, 2, 16});
         c.options.out_rows(c.integers({0, 1, 2, 3, 4, 5, 6, 7, 8, -2}).view({2, 5}));
       },
       Forms::kOut},
      {"GradientBesideOutput",
       runtime,
       {"out", "grad"},
       [](C c) { c.k.requires_grad_(); },
       Forms::kOut},
      {"LeafInPlace", runtime, {"leaf"}, [](C c) { c.k.requires_grad_(); }, Forms::kInPlace},
      {"ViewOfALeafInPlace",
       runtime,
       {"leaf"},
       [](C c) { c.k = c.k.requires_grad_().slice(1, 0, 5); },
       Forms::kInPlace},
      {"OneOfSeveralViewsInPlace",
       runtime,
       {"view"},
       [](C c) {
         const at::Tensor base = c.randn({2, 5, 4, 16}).requires_grad_() * 2;
         c.k = base.split(2, 2)[0];
       },
       Forms::kInPlace},
  };
}

INSTANTIATE_TEST_SUITE_P(
    Cases, Errors, ::testing::Combine(::testing::ValuesIn(devices()), ::testing::ValuesIn(cases())),
    [](const auto& info) {
      return testing::device_name(std::get<0>(info.param)) + std::get<1>(info.param).name;
    });

// The key's mistakes come last: the query must not have been touched by then.
TEST(InPlacePair, RefusesTheKeyBeforeTheQueryIsTouched) {
  Call call(at::kCPU);
  const at::Tensor leaf = call.q;
  call.q = leaf.requires_grad_() * 1;
  const at::Tensor before = call.q.detach().clone();
  const at::Tensor key = call.k;
  const std::pair<const char*, at::Tensor> keys[] = {
      {"leaf", key.clone().requires_grad_()},
      {"expanded", key.slice(2, 0, 1).expand({2, 5, 2, 16})},
      {"dtype", key.to(at::kHalf)},
      {"shape", key.slice(1, 0, 4)},
      {"the query", call.q},
      {"inference", [&] {
         const c10::InferenceMode inference;
         return key.clone();
       }()}};
  for (const auto& [name, k] : keys) {
    SCOPED_TRACE(name);
    EXPECT_THROW(rotate_qk_(call.q, k, call.cos, call.sin), c10::Error);
    expect_same_bits(call.q, before);
  }
  const at::Tensor plain = before.clone();
  EXPECT_THROW(rotate_qk_(plain, keys[5].second, call.cos, call.sin), c10::Error);
  expect_same_bits(plain, before);
  const auto far = RotateOptions().positions(call.integers({0, 1, 2, 3, 99}));
  EXPECT_THROW(rotate_qk_(call.q, key.clone(), call.cos, call.sin, far), c10::IndexError);
  expect_same_bits(call.q, before);
}

TEST(OutputRows, BelongToOutputs) {
  Call call(at::kCPU);
  call.options.out_rows(call.integers({0}).expand({2, 5}));
  EXPECT_THROW(rotate(call.q, call.cos, call.sin, call.options), c10::ValueError);
  EXPECT_THROW(rotate_(call.q, call.cos, call.sin, call.options), c10::ValueError);
  EXPECT_THROW(rotate_qk(call.q, call.k, call.cos, call.sin, call.options), c10::ValueError);
  EXPECT_THROW(rotate_qk_(call.q, call.k, call.cos, call.sin, call.options), c10::ValueError);
}

}  // namespace
}  // namespace fused_rope
