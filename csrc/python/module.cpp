// fused_rope._C: a short way from Python to the operators, and facts of the build. The only file
// that knows pybind11. Arguments are read by hand: pybind11's own reading of sixteen of them takes
// as long as all that an operator does before its launch.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/macros/Macros.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "fused_rope/version.h"
#include "ops/arguments.h"

namespace fused_rope {
namespace {

namespace py = pybind11;

// The arguments of one call, taken in order, each by its name. TypeError for one of another type.
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

  std::string_view text(const char* name) {
    PyObject* object = next(name);
    if (!PyUnicode_Check(object)) refuse(name, "a str", object);
    Py_ssize_t length = 0;
    const char* text = PyUnicode_AsUTF8AndSize(object, &length);
    if (text == nullptr) throw python_error();
    return {text, static_cast<size_t>(length)};
  }

  bool flag(const char* name) {
    PyObject* object = next(name);
    return object == Py_True || (object != Py_False && convert<bool>(name, "a bool", object));
  }

  template <typename Integer = int64_t>
  Integer integer(const char* name) {
    PyObject* object = next(name);
    if (!PyLong_CheckExact(object)) return convert<Integer>(name, "an int", object);
    int overflow = 0;
    const int64_t number = PyLong_AsLongLongAndOverflow(object, &overflow);
    TORCH_CHECK_VALUE(overflow == 0, op_, ": expected ", name, " of 64 bits, got ",
                      std::string(py::str(object)));
    return number;
  }

  std::optional<std::vector<int64_t>> optional_integers(const char* name) {
    if (skip_none(name)) return std::nullopt;
    return convert<std::vector<int64_t>>(name, "a sequence of ints", next(name));
  }

  Reader tuple(const char* name) {
    PyObject* object = next(name);
    if (!PyTuple_Check(object)) refuse(name, "a tuple", object);
    return {op_, PySequence_Fast_ITEMS(object), PyTuple_GET_SIZE(object)};
  }

  // Python's own numbers first: isinstance is slow to say no.
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
};

// Whether a TorchFunctionMode or a transformation of torch.func is active, neither of which the
// direct way to an operator would reach.
bool is_intercepted() {
  return at::impl::torch_function_mode_enabled() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Where tokens are: positions, offset (an int or a tensor), cu_seqlens, out_rows.
struct RowArguments {
  explicit RowArguments(Reader& reader)
      : positions(reader.optional_tensor("positions")),
        offsets(reader.is_at_tensor("offset") ? OptionalTensor(reader.tensor("offset"))
                                              : std::nullopt),
        offset(offsets.has_value() ? c10::SymInt(0) : reader.integer<c10::SymInt>("offset")),
        cu_seqlens(reader.optional_tensor("cu_seqlens")),
        out_rows(reader.optional_tensor("out_rows")) {}

  OptionalTensor positions, offsets;
  c10::SymInt offset;
  OptionalTensor cu_seqlens, out_rows;
};

// The tuple of layout, axes, rotary_offset, interleaved, blocks, inverse, precision,
// table_layout.
struct Options {
  explicit Options(Reader reader)
      : layout(reader.text("layout")),
        axes(reader.optional_integers("axes")),
        rotary_offset(reader.integer("rotary_offset")),
        interleaved(reader.flag("interleaved")),
        blocks(reader.integer("blocks")),
        inverse(reader.flag("inverse")),
        precision(reader.text("precision")),
        table_layout(reader.text("table_layout")) {}

  std::string_view layout;
  std::optional<std::vector<int64_t>> axes;
  int64_t rotary_offset;
  bool interleaved;
  int64_t blocks;
  bool inverse;
  std::string_view precision;
  std::string_view table_layout;
};

Arguments arguments_of(const RowArguments& rows, const Options& o) {
  at::OptionalIntArrayRef axes;
  if (o.axes.has_value()) axes = at::IntArrayRef(*o.axes);
  return {rows.positions, rows.offsets, rows.cu_seqlens, rows.out_rows, rows.offset,
          o.layout,       axes,         o.rotary_offset, o.interleaved, o.blocks,
          o.inverse,      o.precision,  o.table_layout};
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

// Entry<&f>::call is what Python calls for f(arguments, tensors...): with a tuple of the tensors,
// then what RowArguments and Options read. Where torch.func, a TorchFunctionMode or a subclass of
// Tensor may intercept the call, it does nothing and returns NotImplemented.
template <auto kFunction>
struct Entry;

template <typename Result, typename... Tensors, Result (*kFunction)(const Arguments&, Tensors...)>
struct Entry<kFunction> {
  using Names = std::array<const char*, sizeof...(Tensors)>;  // of the tensors

  inline static PyMethodDef method = {};
  inline static Names names = {};

  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    if (is_intercepted()) Py_RETURN_NOTIMPLEMENTED;
    Reader reader(method.ml_name, arguments, count);
    Reader inputs = reader.tuple("tensors");
    const char* const* name = names.data();
    const std::tuple<Tensors...> tensors{next<Tensors>(inputs, name)...};
    const RowArguments rows(reader);
    if (inputs.has_subclass() || reader.has_subclass()) Py_RETURN_NOTIMPLEMENTED;
    const Options options(reader.tuple("options"));
    // Recording a call adds owners of the tensors. The first one next to Python takes the GIL.
    std::optional<std::tuple<std::decay_t<Tensors>...>> owners;
    if (at::GradMode::is_enabled() && requires_grad(tensors)) owners = tensors;
    const auto run = [&] {
      const py::gil_scoped_release no_gil;
      return std::apply([&](Tensors... t) { return kFunction(arguments_of(rows, options), t...); },
                        tensors);
    };
    if constexpr (std::is_void_v<Result>) {
      run();
      Py_RETURN_NONE;
    } else {
      return wrap(run());
    }
    END_HANDLE_TH_ERRORS
  }

 private:
  template <typename Tensor>
  static Tensor next(Reader& inputs, const char* const*& name) {
    return inputs.tensor(*name++);
  }

  static bool requires_grad(const std::tuple<Tensors...>& tensors) {
    return std::apply([](Tensors... t) { return (... || t.requires_grad()); }, tensors);
  }
};

template <typename E>
void def(py::module_& m, const char* name, const typename E::Names& tensors) {
  E::names = tensors;
  E::method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&E::call)),
               METH_FASTCALL, nullptr};
  PyObject* function = PyCFunction_New(&E::method, nullptr);
  if (function == nullptr) throw py::error_already_set();
  m.add_object(name, py::reinterpret_steal<py::object>(function));
}

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Low-overhead entry to the operators of fused_rope; use the functions of the package "
      "instead.";
  m.attr("version") = FUSED_ROPE_VERSION;
#if defined(FUSED_ROPE_WITH_CUDA)
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
  def<Entry<&call_rotate>>(m, "rotate", {"x", "cos", "sin"});
  def<Entry<&call_rotate_>>(m, "rotate_", {"x", "cos", "sin"});
  def<Entry<&call_rotate_qk>>(m, "rotate_qk", {"q", "k", "cos", "sin"});
  def<Entry<&call_rotate_qk_>>(m, "rotate_qk_", {"q", "k", "cos", "sin"});
  def<Entry<&call_rotate_out>>(m, "rotate_out", {"x", "cos", "sin", "out"});
  def<Entry<&call_rotate_qk_out>>(m, "rotate_qk_out", {"q", "k", "cos", "sin", "q_out", "k_out"});
}

}  // namespace
}  // namespace fused_rope
