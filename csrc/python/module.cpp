// fused_rope._C: a short way from Python to the operators, and facts of the build. The only file
// that knows pybind11.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "fused_rope/version.h"
#include "ops/arguments.h"

namespace fused_rope {
namespace {

namespace py = pybind11;

using Axes = std::optional<std::vector<int64_t>>;

// Entry<&f>::call takes what the Python functions pass: the schema's flat list with containers that
// pybind11 can fill.
template <auto kFunction>
struct Entry;

template <typename Result, typename... Tensors, Result (*kFunction)(const Arguments&, Tensors...)>
struct Entry<kFunction> {
  static Result call(Tensors... tensors, const OptionalTensor& positions,
                     const OptionalTensor& offsets, const OptionalTensor& cu_seqlens,
                     const OptionalTensor& out_rows, c10::SymInt offset, std::string_view layout,
                     const Axes& axes, int64_t rotary_offset, bool interleaved, int64_t blocks,
                     bool inverse, std::string_view precision) {
    const py::gil_scoped_release no_gil;
    at::OptionalIntArrayRef axes_ref;
    if (axes.has_value()) axes_ref = at::IntArrayRef(*axes);
    return kFunction({positions, offsets, cu_seqlens, out_rows, std::move(offset), layout, axes_ref,
                      rotary_offset, interleaved, blocks, inverse, precision},
                     tensors...);
  }
};

template <auto kFunction>
void def(py::module_& m, const char* name) {
  m.def(name, torch::wrap_pybind_function(&Entry<kFunction>::call));
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
  def<&call_rotate>(m, "rotate");
  def<&call_rotate_>(m, "rotate_");
  def<&call_rotate_qk>(m, "rotate_qk");
  def<&call_rotate_qk_>(m, "rotate_qk_");
  def<&call_rotate_out>(m, "rotate_out");
  def<&call_rotate_qk_out>(m, "rotate_qk_out");
}

}  // namespace
}  // namespace fused_rope
