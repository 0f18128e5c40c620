// Every operator of the library, and the typed calls to them.
#include <torch/library.h>

#include <string>

#include "ops/arguments.h"

namespace fused_rope {

TORCH_LIBRARY(fused_rope, m) {
  const std::string rows =
      "Tensor? positions=None, Tensor? offsets=None, Tensor? cu_seqlens=None, ";
  const std::string options =
      "SymInt offset=0, str layout=\"bshd\", int[]? axes=None, int rotary_offset=0, bool "
      "interleaved=False, "
      "int blocks=1, bool inverse=False, str precision=\"fp32\", str table_layout=\"half\")";
  const std::string out_rows = "Tensor? out_rows=None, ";
  const auto def = [&](const std::string& schema) {
    m.def(torch::schema(schema.c_str()), {at::Tag::pt2_compliant_tag});
  };

  def("rotate(Tensor x, Tensor cos, Tensor sin, " + rows + options + " -> Tensor");
  def("rotate_(Tensor(a!) x, Tensor cos, Tensor sin, " + rows + options + " -> ()");
  def("rotate_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, " + rows + options +
      " -> (Tensor, Tensor)");
  def("rotate_qk_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, " + rows + options +
      " -> ()");
  def("rotate_out(Tensor x, Tensor cos, Tensor sin, Tensor(a!) out, " + rows + out_rows + options +
      " -> ()");
  def("rotate_qk_out(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor(a!) q_out, Tensor(b!) "
      "k_out, " +
      rows + out_rows + options + " -> ()");
  def("cos_sin_table(Tensor inv_freq, SymInt rows, SymInt first=0, float scale=1.0, ScalarType "
      "dtype=float, "
      "Device? device=None) -> (Tensor, Tensor)");
}

at::Tensor call_rotate(const Arguments& arguments, const at::Tensor& x, const at::Tensor& cos,
                       const at::Tensor& sin) {
  return Flat<&call_rotate>::dispatch("fused_rope::rotate", arguments, x, cos, sin);
}

void call_rotate_(const Arguments& arguments, const at::Tensor& x, const at::Tensor& cos,
                  const at::Tensor& sin) {
  Flat<&call_rotate_>::dispatch("fused_rope::rotate_", arguments, x, cos, sin);
}

TensorPair call_rotate_qk(const Arguments& arguments, const at::Tensor& q, const at::Tensor& k,
                          const at::Tensor& cos, const at::Tensor& sin) {
  return Flat<&call_rotate_qk>::dispatch("fused_rope::rotate_qk", arguments, q, k, cos, sin);
}

void call_rotate_qk_(const Arguments& arguments, const at::Tensor& q, const at::Tensor& k,
                     const at::Tensor& cos, const at::Tensor& sin) {
  Flat<&call_rotate_qk_>::dispatch("fused_rope::rotate_qk_", arguments, q, k, cos, sin);
}

void call_rotate_out(const Arguments& arguments, const at::Tensor& x, const at::Tensor& cos,
                     const at::Tensor& sin, const at::Tensor& out) {
  FlatOut<&call_rotate_out>::dispatch("fused_rope::rotate_out", arguments, x, cos, sin, out);
}

void call_rotate_qk_out(const Arguments& arguments, const at::Tensor& q, const at::Tensor& k,
                        const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& q_out,
                        const at::Tensor& k_out) {
  FlatOut<&call_rotate_qk_out>::dispatch("fused_rope::rotate_qk_out", arguments, q, k, cos, sin,
                                         q_out, k_out);
}

}  // namespace fused_rope
