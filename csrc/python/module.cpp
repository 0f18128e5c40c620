// fused_rope._C: the fast path from Python to the operators, and build information. The only file
// that includes pybind11. Arguments are parsed by hand: pybind11 takes as long for all of them as
// an operator does before its launch.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/macros/Macros.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fused_rope/version.h"
#include "ops/dispatch.h"

namespace fused_rope {
namespace {

namespace py = pybind11;

// Takes the arguments of one call in order. `name` is for messages: TypeError for a wrong type.
class Reader {
 public:
  Reader(const char* op, PyObject* const* arguments, Py_ssize_t count)
      : op_(op), next_(arguments), end_(arguments + count) {}

  // Borrowed: the caller holds the arguments.
  const at::Tensor& tensor(const char* name) {
    PyObject* object = next(name);
    if (!THPVariable_CheckExact(object)) {
      if (!THPVariable_Check(object)) refuse(name, "a Tensor", object);
      has_subclass_ = true;
    }
    return THPVariable_Unpack(object);
  }

  // Whether a tensor read so far is of a subclass, which may have a __torch_function__.
  bool has_subclass() const { return has_subclass_; }

  OptionalTensor optional_tensor(const char* name) {
    return skip_none(name) ? std::nullopt : OptionalTensor(tensor(name));
  }

  void read(const char* name, bool& option) {
    PyObject* object = next(name);
    option = object == Py_True || (object != Py_False && convert<bool>(name, "a bool", object));
  }

  template <typename Integer>
    requires(std::is_same_v<Integer, int64_t> || std::is_same_v<Integer, c10::SymInt>)
  void read(const char* name, Integer& option) {
    PyObject* object = next(name);
    if (!PyLong_CheckExact(object)) {
      option = convert<Integer>(name, "an int", object);
      return;
    }
    int overflow = 0;
    option = PyLong_AsLongLongAndOverflow(object, &overflow);
    TORCH_CHECK_VALUE(overflow == 0, op_, ": expected ", name, " of 64 bits, got ",
                      std::string(py::str(object)));
  }

  void read(const char* name, at::OptionalIntArrayRef& option) {
    if (skip_none(name)) return;
    integers_ = convert<std::vector<int64_t>>(name, "a sequence of ints", next(name));
    option = integers_;
  }

  void read(const char* name, std::string_view& option) {
    PyObject* object = next(name);
    if (!PyUnicode_Check(object)) refuse(name, "a str", object);
    Py_ssize_t length = 0;
    const char* text = PyUnicode_AsUTF8AndSize(object, &length);
    if (text == nullptr) throw python_error();
    option = {text, static_cast<size_t>(length)};
  }

  void read(const char* name, double& option) {
    PyObject* object = next(name);
    option = PyFloat_CheckExact(object) ? PyFloat_AS_DOUBLE(object)
                                        : convert<double>(name, "a float", object);
  }

  void read(const char* name, std::optional<double>& option) {
    if (!skip_none(name)) read(name, option.emplace());
  }

  [[noreturn]] void refuse_none(const char* name, const char* expected) const {
    refuse(name, expected, Py_None);
  }

  bool at_end() const { return next_ == end_; }

  Reader tuple(const char* name) {
    PyObject* object = next(name);
    if (!PyTuple_Check(object)) refuse(name, "a tuple", object);
    return {op_, PySequence_Fast_ITEMS(object), PyTuple_GET_SIZE(object)};
  }

  // Check for int first: a failing isinstance check is slow.
  bool is_at_tensor(const char* name) const {
    return !PyLong_CheckExact(peek(name)) && THPVariable_Check(peek(name));
  }

 private:
  PyObject* peek(const char* name) const {
    if (next_ == end_) [[unlikely]]
      refuse_missing(name);
    return *next_;
  }

  PyObject* next(const char* name) {
    PyObject* object = peek(name);
    ++next_;
    return object;
  }

  bool skip_none(const char* name) {
    const bool is_none = peek(name) == Py_None;
    next_ += is_none;
    return is_none;
  }

  template <typename T>
  T convert(const char* name, const char* expected, PyObject* object) const {
    py::detail::make_caster<T> caster;
    if (!caster.load(object, /*convert=*/true)) refuse(name, expected, object);
    return py::detail::cast_op<T>(std::move(caster));
  }

  // Out of line, so that reading is inlined.
  [[noreturn]] C10_NOINLINE void refuse_missing(const char* name) const {
    TORCH_CHECK_TYPE(false, op_, ": expected ", name, ", got no such argument");
  }

  [[noreturn]] C10_NOINLINE void refuse(const char* name, const char* expected,
                                        PyObject* object) const {
    TORCH_CHECK_TYPE(false, op_, ": expected ", name, " to be ", expected, ", got ",
                     Py_TYPE(object)->tp_name);
  }

  const char* op_;
  PyObject* const* next_;
  PyObject* const* end_;
  bool has_subclass_ = false;
  std::vector<int64_t> integers_;  // what an option that was read refers to
};

// Whether a TorchFunctionMode or a torch.func transform is active. The fast path bypasses both.
bool is_intercepted() {
  return at::impl::torch_function_mode_enabled() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// The arguments that select rows: positions, offset (an int or a tensor), cu_seqlens and out_rows.
struct RowArguments {
  explicit RowArguments(Reader& reader) : positions(reader.optional_tensor("positions")) {
    if (reader.is_at_tensor("offset")) {
      offsets = reader.tensor("offset");
    } else {
      reader.read("offset", offset);
    }
    cu_seqlens = reader.optional_tensor("cu_seqlens");
    out_rows = reader.optional_tensor("out_rows");
  }

  OptionalTensor positions, offsets, cu_seqlens, out_rows;
  c10::SymInt offset = 0;
};

// Whether an operator has a norm: kWithEps, if eps is not None.
enum class Norm { kNever, kAlways, kWithEps };

// Arguments with the options of a tuple, in the order of FUSED_ROPE_OPTIONS. Omitted last ones have
// their defaults, but where there can be a norm, all are there and FUSED_ROPE_NORM_OPTIONS follow.
template <Norm kNorm>
Arguments read_arguments(const RowArguments& rows, Reader& options) {
  static const RotateOptions kDefaults;
  static const Arguments defaults = arguments_of(kDefaults);
#define FUSED_ROPE_DEFAULT(type, name) , defaults.name
#define FUSED_ROPE_READ(type, name) \
  if (!options.at_end()) options.read(#name, result.name);
  Arguments result = {rows.positions, rows.offsets, rows.cu_seqlens, rows.out_rows,
                      rows.offset FUSED_ROPE_OPTIONS(FUSED_ROPE_DEFAULT)};
  FUSED_ROPE_OPTIONS(FUSED_ROPE_READ)
#undef FUSED_ROPE_READ
#define FUSED_ROPE_READ(type, name) options.read(#name, result.norm.name);
  if constexpr (kNorm != Norm::kNever) {
    FUSED_ROPE_NORM_OPTIONS(FUSED_ROPE_READ)
  }
  if (kNorm == Norm::kAlways && !result.norm.eps.has_value()) options.refuse_none("eps", "a float");
#undef FUSED_ROPE_DEFAULT
#undef FUSED_ROPE_READ
  return result;
}

PyObject* wrap(at::Tensor&& tensor) {
  PyObject* object = THPVariable_Wrap(std::move(tensor));
  if (object == nullptr) throw python_error();
  return object;
}

PyObject* wrap(TensorPair&& tensors) {
  THPObjectPtr pair(PyTuple_New(2));
  if (!pair) throw python_error();
  PyTuple_SET_ITEM(pair.get(), 0, wrap(std::move(std::get<0>(tensors))));
  PyTuple_SET_ITEM(pair.get(), 1, wrap(std::move(std::get<1>(tensors))));
  return pair.release();
}

enum class Form { kNew, kInPlace, kOut };

// What Python calls for one operator: with a tuple of x, or q and k, cos, sin, the outputs and the
// weights; then RowArguments and the tuple of options. Returns NotImplemented, and does nothing
// else, where torch.func, a TorchFunctionMode or a subclass of Tensor may intercept the call.
template <int kCount, Form kForm, bool kNorm>
struct Entry {
  inline static PyMethodDef method = {};

  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    if (is_intercepted()) Py_RETURN_NOTIMPLEMENTED;
    Reader reader(method.ml_name, arguments, count);
    Outputs inputs = {}, outputs = {};
    Reader tensors = reader.tuple("tensors");
    for (int i = 0; i < kCount; ++i) inputs[i] = &tensors.tensor(RawCall::input_name(kCount, i));
    const at::Tensor& cos = tensors.tensor("cos");
    const at::Tensor& sin = tensors.tensor("sin");
    for (int i = 0; kForm == Form::kOut && i < kCount; ++i) {
      outputs[i] = &tensors.tensor(RawCall::output_name(kCount, i));
    }
    std::array<OptionalTensor, kNorm ? kCount : 0> weights;
    OptionalTensors given = {};
    for (size_t i = 0; i < weights.size(); ++i) {
      weights[i] = tensors.optional_tensor(RawCall::weight_name(kCount, i));
      given[i] = &weights[i];
    }
    const RowArguments rows(reader);
    if (tensors.has_subclass() || reader.has_subclass()) Py_RETURN_NOTIMPLEMENTED;
    Reader options = reader.tuple("options");
    const Arguments a = read_arguments<kNorm ? Norm::kAlways : Norm::kNever>(rows, options);
    return run({method.ml_name, inputs, cos, sin, a, given}, outputs);
    END_HANDLE_TH_ERRORS
  }

 private:
  static bool is_recorded(const RawCall& c) {
    return at::GradMode::is_enabled() &&
           (c.inputs[0]->requires_grad() || (kCount == 2 && c.inputs[1]->requires_grad()) ||
            c.cos.requires_grad() || c.sin.requires_grad() || weights_require_grad(c));
  }

  static bool weights_require_grad([[maybe_unused]] const RawCall& c) {
    for (int i = 0; kNorm && i < kCount; ++i) {
      if (c.weight(i).has_value() && c.weight(i)->requires_grad()) return true;
    }
    return false;
  }

  static PyObject* run(const RawCall& call, [[maybe_unused]] const Outputs& outputs) {
    // Recording a call adds owners of the tensors. The first one next to Python takes the GIL.
    std::array<at::Tensor, 4> owners;
    if (is_recorded(call)) {
      owners = {*call.inputs[0], *call.inputs[kCount - 1], call.cos, call.sin};
    }
    if constexpr (kForm == Form::kNew) {
      TensorPair rotated;
      {
        const py::gil_scoped_release no_gil;
        rotated = call_rotate(call);
      }
      return kCount == 1 ? wrap(std::get<0>(std::move(rotated))) : wrap(std::move(rotated));
    }
    {
      const py::gil_scoped_release no_gil;
      kForm == Form::kInPlace ? call_rotate_(call) : call_rotate_out(call, outputs);
    }
    Py_RETURN_NONE;
  }
};

// The same for rotate_and_cache: its tuple has the tensors of the schema, up to k_weight. Returns
// q_out, new memory where that is None.
struct CacheEntry {
  inline static PyMethodDef method = {};

  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    if (is_intercepted()) Py_RETURN_NOTIMPLEMENTED;
    Reader reader(method.ml_name, arguments, count);
    Reader tensors = reader.tuple("tensors");
    const at::Tensor& q = tensors.tensor("q");
    const at::Tensor& k = tensors.tensor("k");
    const OptionalTensor v = tensors.optional_tensor("v");
    const at::Tensor& cos = tensors.tensor("cos");
    const at::Tensor& sin = tensors.tensor("sin");
    const at::Tensor& k_cache = tensors.tensor("k_cache");
    const OptionalTensor v_cache = tensors.optional_tensor("v_cache");
    const at::Tensor& slots = tensors.tensor("slots");
    const OptionalTensor q_out = tensors.optional_tensor("q_out");
    const OptionalTensor k_out = tensors.optional_tensor("k_out");
    const OptionalTensor k_scale = tensors.optional_tensor("k_scale");
    const OptionalTensor v_scale = tensors.optional_tensor("v_scale");
    const OptionalTensor q_weight = tensors.optional_tensor("q_weight");
    const OptionalTensor k_weight = tensors.optional_tensor("k_weight");
    const RowArguments rows(reader);
    if (tensors.has_subclass() || reader.has_subclass()) Py_RETURN_NOTIMPLEMENTED;
    Reader options = reader.tuple("options");
    const Arguments a = read_arguments<Norm::kWithEps>(rows, options);
    const CacheArguments cache = {v, k_cache, v_cache, slots, k_scale, v_scale};
    at::Tensor rotated;
    {
      const py::gil_scoped_release no_gil;
      rotated = call_rotate_and_cache(
          {method.ml_name, {&q, &k}, cos, sin, a, {&q_weight, &k_weight}, &cache},
          {pointer(q_out), pointer(k_out)});
    }
    return wrap(std::move(rotated));
    END_HANDLE_TH_ERRORS
  }
};

template <typename E>
void def_entry(py::module_& m, const char* name) {
  E::method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&E::call)),
               METH_FASTCALL, nullptr};
  PyObject* function = PyCFunction_New(&E::method, nullptr);
  if (function == nullptr) throw py::error_already_set();
  m.add_object(name, py::reinterpret_steal<py::object>(function));
}

template <int kCount, Form kForm, bool kNorm = false>
void def(py::module_& m, const char* name) {
  def_entry<Entry<kCount, kForm, kNorm>>(m, name);
}

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Low-overhead entry to the operators of fused_rope; call the functions of the package "
      "instead.";
  m.attr("version") = FUSED_ROPE_VERSION;
#if defined(FUSED_ROPE_WITH_CUDA)
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
  def<1, Form::kNew>(m, "rotate");
  def<2, Form::kNew>(m, "rotate_qk");
  def<1, Form::kInPlace>(m, "rotate_");
  def<2, Form::kInPlace>(m, "rotate_qk_");
  def<1, Form::kOut>(m, "rotate_out");
  def<2, Form::kOut>(m, "rotate_qk_out");
  def<1, Form::kNew, true>(m, "norm_rotate");
  def<2, Form::kNew, true>(m, "norm_rotate_qk");
  def<1, Form::kInPlace, true>(m, "norm_rotate_");
  def<2, Form::kInPlace, true>(m, "norm_rotate_qk_");
  def<1, Form::kOut, true>(m, "norm_rotate_out");
  def<2, Form::kOut, true>(m, "norm_rotate_qk_out");
  def_entry<CacheEntry>(m, "rotate_and_cache");
}

}  // namespace
}  // namespace fused_rope
