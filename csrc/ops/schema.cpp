// The schemas of all operators. The options of the rotating ones are listed in the order of
// FUSED_ROPE_OPTIONS and FUSED_ROPE_NORM_OPTIONS.
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

      "norm_rotate(Tensor x, Tensor cos, Tensor sin, Tensor? weight=None, Tensor? positions=None, "
      "Tensor? offsets=None, Tensor? cu_seqlens=None, SymInt offset=0, str layout='bshd', "
      "int[]? axes=None, int rotary_offset=0, bool interleaved=False, int blocks=1, "
      "bool inverse=False, str precision='fp32', str table_layout='half', *, float eps, "
      "bool zero_centered=False, str cast='never', bool after=False) -> Tensor",

      "norm_rotate_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? weight=None, "
      "Tensor? positions=None, Tensor? offsets=None, Tensor? cu_seqlens=None, SymInt offset=0, "
      "str layout='bshd', int[]? axes=None, int rotary_offset=0, bool interleaved=False, "
      "int blocks=1, bool inverse=False, str precision='fp32', str table_layout='half', *, "
      "float eps, bool zero_centered=False, str cast='never', bool after=False) -> ()",

      "norm_rotate_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight=None, "
      "Tensor? k_weight=None, Tensor? positions=None, Tensor? offsets=None, "
      "Tensor? cu_seqlens=None, SymInt offset=0, str layout='bshd', int[]? axes=None, "
      "int rotary_offset=0, bool interleaved=False, int blocks=1, bool inverse=False, "
      "str precision='fp32', str table_layout='half', *, float eps, bool zero_centered=False, "
      "str cast='never', bool after=False) -> (Tensor, Tensor)",

      "norm_rotate_qk_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor? q_weight=None, "
      "Tensor? k_weight=None, Tensor? positions=None, Tensor? offsets=None, "
      "Tensor? cu_seqlens=None, SymInt offset=0, str layout='bshd', int[]? axes=None, "
      "int rotary_offset=0, bool interleaved=False, int blocks=1, bool inverse=False, "
      "str precision='fp32', str table_layout='half', *, float eps, bool zero_centered=False, "
      "str cast='never', bool after=False) -> ()",

      "norm_rotate_out(Tensor x, Tensor cos, Tensor sin, Tensor(a!) out, Tensor? weight=None, "
      "Tensor? positions=None, Tensor? offsets=None, Tensor? cu_seqlens=None, "
      "Tensor? out_rows=None, SymInt offset=0, str layout='bshd', int[]? axes=None, "
      "int rotary_offset=0, bool interleaved=False, int blocks=1, bool inverse=False, "
      "str precision='fp32', str table_layout='half', *, float eps, bool zero_centered=False, "
      "str cast='never', bool after=False) -> ()",

      "norm_rotate_qk_out(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor(a!) q_out, "
      "Tensor(b!) k_out, Tensor? q_weight=None, Tensor? k_weight=None, Tensor? positions=None, "
      "Tensor? offsets=None, Tensor? cu_seqlens=None, Tensor? out_rows=None, SymInt offset=0, "
      "str layout='bshd', int[]? axes=None, int rotary_offset=0, bool interleaved=False, "
      "int blocks=1, bool inverse=False, str precision='fp32', str table_layout='half', *, "
      "float eps, bool zero_centered=False, str cast='never', bool after=False) -> ()",

      // Without v and v_cache, k alone is stored. Without k_out, the rotated k is in the cache
      // only.
      "rotate_and_cache(Tensor q, Tensor k, Tensor? v, Tensor cos, Tensor sin, "
      "Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor slots, Tensor(c!) q_out, "
      "Tensor(d!)? k_out=None, Tensor? k_scale=None, Tensor? v_scale=None, Tensor? q_weight=None, "
      "Tensor? k_weight=None, Tensor? positions=None, Tensor? offsets=None, "
      "Tensor? cu_seqlens=None, SymInt offset=0, str layout='bshd', int[]? axes=None, "
      "int rotary_offset=0, bool interleaved=False, int blocks=1, bool inverse=False, "
      "str precision='fp32', str table_layout='half', *, float? eps=None, "
      "bool zero_centered=False, str cast='never', bool after=False) -> ()",

      // The gradients of q, k, q_weight and k_weight that output_mask asks for; without k, those of
      // norm_rotate. An absent gradient of an output counts as zero.
      "norm_rotate_qk_backward(Tensor? q_grad, Tensor? k_grad, Tensor q, Tensor? k, Tensor cos, "
      "Tensor sin, Tensor? q_weight=None, Tensor? k_weight=None, Tensor? positions=None, "
      "Tensor? offsets=None, Tensor? cu_seqlens=None, SymInt offset=0, str layout='bshd', "
      "int[]? axes=None, int rotary_offset=0, bool interleaved=False, int blocks=1, "
      "bool inverse=False, str precision='fp32', str table_layout='half', *, float eps, "
      "bool zero_centered=False, str cast='never', bool after=False, bool[4] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor)",

      "cos_sin_table(Tensor inv_freq, SymInt rows, SymInt first=0, float scale=1.0, "
      "ScalarType dtype=float, Device? device=None) -> (Tensor, Tensor)",
  };
  for (const char* schema : kSchemas) {
    m.def(torch::schema(schema), {at::Tag::pt2_compliant_tag});
  }
}
