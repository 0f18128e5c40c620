// The schemas of all operators. The options of the rotating ones are listed in the order of
// FUSED_ROPE_OPTIONS.
#include <torch/library.h>

TORCH_LIBRARY(fused_rope, m) {
  constexpr const char* kSchemas[] = {
      "rotate(Tensor x, Tensor cos, Tensor sin, Tensor? positions=None, Tensor? offsets=None, "
      "Tensor? cu_seqlens=None, SymInt offset=0, str layout='bshd', int[]? axes=None, "
      "int rotary_offset=0, bool interleaved=False, int blocks=1, bool inverse=False, "
      "str precision='fp32', str table_layout='half') -> Tensor",

      "rotate_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? positions=None, "
      "Tensor? offsets=None, Tensor? cu_seqlens=None, SymInt offset=0, str layout='bshd', "
      "int[]? axes=None, int rotary_offset=0, bool interleaved=False, int blocks=1, "
      "bool inverse=False, str precision='fp32', str table_layout='half') -> ()",

      "rotate_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions=None, "
      "Tensor? offsets=None, Tensor? cu_seqlens=None, SymInt offset=0, str layout='bshd', "
      "int[]? axes=None, int rotary_offset=0, bool interleaved=False, int blocks=1, "
      "bool inverse=False, str precision='fp32', str table_layout='half') -> (Tensor, Tensor)",

      "rotate_qk_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor? positions=None, "
      "Tensor? offsets=None, Tensor? cu_seqlens=None, SymInt offset=0, str layout='bshd', "
      "int[]? axes=None, int rotary_offset=0, bool interleaved=False, int blocks=1, "
      "bool inverse=False, str precision='fp32', str table_layout='half') -> ()",

      "rotate_out(Tensor x, Tensor cos, Tensor sin, Tensor(a!) out, Tensor? positions=None, "
      "Tensor? offsets=None, Tensor? cu_seqlens=None, Tensor? out_rows=None, SymInt offset=0, "
      "str layout='bshd', int[]? axes=None, int rotary_offset=0, bool interleaved=False, "
      "int blocks=1, bool inverse=False, str precision='fp32', str table_layout='half') -> ()",

      "rotate_qk_out(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor(a!) q_out, "
      "Tensor(b!) k_out, Tensor? positions=None, Tensor? offsets=None, Tensor? cu_seqlens=None, "
      "Tensor? out_rows=None, SymInt offset=0, str layout='bshd', int[]? axes=None, "
      "int rotary_offset=0, bool interleaved=False, int blocks=1, bool inverse=False, "
      "str precision='fp32', str table_layout='half') -> ()",

      "cos_sin_table(Tensor inv_freq, SymInt rows, SymInt first=0, float scale=1.0, "
      "ScalarType dtype=float, Device? device=None) -> (Tensor, Tensor)",
  };
  for (const char* schema : kSchemas) {
    m.def(torch::schema(schema), {at::Tag::pt2_compliant_tag});
  }
}
