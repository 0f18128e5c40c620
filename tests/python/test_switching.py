"""Every drop-in has its section in docs/migration.md, and the original's signatures."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import fused_rope.compat
import pytest
import torch

# Names that the original libraries do not have.
OURS = ("Report", "is_patched", "patch", "patched", "unpatch", "plugin", "register")
OURS += ("rotary_embedding_and_cache",)
PAGE = Path(__file__).parents[2] / "docs" / "migration.md"


def test_every_drop_in_is_there():
    text = PAGE.read_text()
    for module in pkgutil.iter_modules(fused_rope.compat.__path__):
        if not module.name.startswith("_"):
            assert f"from fused_rope.compat.{module.name} import" in text
            for name in importlib.import_module(f"fused_rope.compat.{module.name}").__all__:
                assert name in text or name in OURS or module.name == "transformers"


# What the originals take. A class is its constructor; `.apply` is what its autograd.Function takes.
QK = "q, k, cos, sin"
FLASH = "interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None"
FLASH_QKV = "cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None"
MEGATRON = "rotary_interleaved=False, mla_rotary_interleaved=False, mscale=1.0, inverse=False, "
MEGATRON += "mla_output_remove_interleaving=False"
INFER = "rotary_dim=None, interleave=False"
INFER_ROPE = f"{INFER}, rope_scale=1, rope_theta=10000.0"
INFER_LLAMA = f"{INFER}, rope_scale=8, rope_theta=500000.0, low_freq_factor=1, "
INFER_LLAMA += "high_freq_factor=4, old_context_len=8192"
INFER_CACHE = "positions, query, key, head_size, cos_sin_cache, is_neox=True"
INFER_QUANTIZE = "q_rope, k_rope, q_nope, k_nope, cos_sin_cache, pos_ids, is_neox=True, "
INFER_QUANTIZE += "quantize_dtype=None, quant_scale_q=1.0, quant_scale_kv=1.0, q_rope_out=None, "
INFER_QUANTIZE += "k_rope_out=None, q_nope_out=None, k_nope_out=None, enable_pdl=False"
TUNE = "dim, max_seq_len=4096, base=10000"
SIGNATURES = {
    "diffusers.apply_rotary_emb": "x, freqs_cis, use_real=True, use_real_unbind_dim=-1, "
    "sequence_dim=2",
    "flash_attn.apply_rotary": "x, cos, sin, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None, "
    "interleaved=False, inplace=False, conjugate=False",
    "flash_attn.apply_rotary_emb": f"x, cos, sin, {FLASH}",
    "flash_attn.apply_rotary_emb_func": f"x, cos, sin, {FLASH}",
    "flash_attn.ApplyRotaryEmb.apply": f"x, cos, sin, {FLASH}",
    "flash_attn.apply_rotary_emb_qkv_": f"qkv, cos, sin, {FLASH_QKV}",
    "flash_attn.ApplyRotaryEmbQKV_.apply": f"qkv, cos, sin, {FLASH_QKV}",
    "flash_attn.apply_rotary_emb_kv_": "kv, cos, sin, interleaved=False, seqlen_offsets=0",
    "flash_attn.ApplyRotaryEmbKV_.apply": "kv, cos, sin, interleaved=False, seqlen_offsets=0",
    "flash_attn.apply_rotary_emb_torch": "x, cos, sin, interleaved=False",
    "flash_attn.rotate_half": "x, interleaved=False",
    "flash_attn.RotaryEmbedding": "dim, base=10000.0, interleaved=False, scale_base=None, "
    "device=None",
    "flash_attn.RotaryEmbedding.forward": "self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, "
    "num_heads_q=None",
    "flash_attn.RotaryEmbedding._update_cos_sin_cache": "self, seqlen, device=None, dtype=None",
    **{
        f"flashinfer.apply_{name}{rows}{form}": f"q, k, {tokens}, {options}"
        for name, options in (("rope", INFER_ROPE), ("llama31_rope", INFER_LLAMA))
        for rows, tokens in (("", "indptr, offsets"), ("_pos_ids", "pos_ids"))
        for form in ("", "_inplace")
    },
    "flashinfer.apply_rope_with_cos_sin_cache": INFER_CACHE,
    "flashinfer.apply_rope_with_cos_sin_cache_inplace": INFER_CACHE,
    "flashinfer.mla_rope_quantize_fp8": INFER_QUANTIZE,
    "flashinfer.rope_quantize_fp8": f"{INFER_QUANTIZE}, backend='cuda'",
    "flashinfer.rope_quantize_fp8_append_paged_kv_cache": "q_rope, k_rope, q_nope, k_nope, v, "
    "cos_sin_cache, pos_ids, paged_kv_cache, kv_indices, kv_indptr, batch_indices, positions, "
    "is_neox=True, quantize_dtype=None, quant_scale_q=1.0, quant_scale_kv=1.0, page_size=16, "
    "kv_layout='NHD', q_rope_out=None, q_nope_out=None, enable_pdl=False",
    "liger.liger_rotary_pos_emb": f"{QK}, position_ids=None, unsqueeze_dim=1",
    "liger.liger_rope": f"{QK}, position_ids=None, unsqueeze_dim=1",
    "liger.LigerRopeFunction.apply": f"{QK}, position_ids=None, unsqueeze_dim=1",
    "liger.rope_forward": QK,
    "liger.rope_backward": "dq, dk, cos, sin",
    "liger.liger_rotary_pos_emb_vision": QK,
    "liger.liger_multimodal_rotary_pos_emb": f"{QK}, mrope_section, unsqueeze_dim=1",
    "liger.liger_qwen2vl_mrope": f"{QK}, mrope_section, unsqueeze_dim=1",
    "liger.LigerQwen2VLMRopeFunction.apply": f"{QK}, mrope_section, unsqueeze_dim=1",
    "liger.liger_llama4_text_rotary_pos_emb": "xq, xk, freqs_cis",
    "liger.liger_llama4_vision_rotary_pos_emb": "query, key, freqs_ci",
    "liger.LigerLlama4RopeFunction.apply": "q, k, freqs_cis, BLOCK_SIZE=None",
    "llama.apply_rotary_emb": "xq, xk, freqs_cis",
    "megatron.fused_apply_rotary_pos_emb": "t, freqs, transpose_output_memory=False, "
    "interleaved=False",
    "megatron.fused_apply_rotary_pos_emb_thd": "t, cu_seqlens, freqs, cp_size=1, cp_rank=0, "
    "interleaved=False",
    "megatron.apply_rotary_pos_emb_bshd": f"t, freqs, {MEGATRON}, multi_latent_attention=None",
    "megatron.apply_rotary_pos_emb_thd": f"t, cu_seqlens, freqs, {MEGATRON}, cp_group=None, "
    "multi_latent_attention=None, max_seqlen=None",
    "megatron.patch": "",
    "megatron.unpatch": "",
    "rotalabs.apply_rope": f"{QK}, use_triton=None",
    "rotalabs.rope_torch": QK,
    "rotalabs.build_rope_cache": "seq_len, head_dim, base=10000.0, device=None, "
    "dtype=torch.float32",
    "rotalabs.RotaryEmbedding": "dim, max_seq_len=2048, base=10000.0",
    "rotalabs.RotaryEmbedding.forward": "self, q, k, position_ids=None",
    "rotary_embedding_torch.apply_rotary_emb": "freqs, t, start_index=0, scale=1.0, seq_dim=-2, "
    "freqs_seq_dim=None",
    "rotary_embedding_torch.apply_learned_rotations": "rotations, t, start_index=0, "
    "freq_ranges=None",
    "rotary_embedding_torch.broadcat": "tensors, dim=-1",
    "rotary_embedding_torch.rotate_half": "x",
    "rotary_embedding_torch.RotaryEmbedding": "dim, custom_freqs=None, freqs_for='lang', "
    "theta=10000, max_freq=10, num_freqs=1, learned_freq=False, use_xpos=False, "
    "xpos_scale_base=512, interpolate_factor=1.0, theta_rescale_factor=1.0, "
    "seq_before_head_dim=False, cache_if_possible=True, cache_max_seq_len=8192",
    "rotary_embedding_torch.RotaryEmbedding.forward": "self, t, seq_len=None, offset=0",
    "rotary_embedding_torch.RotaryEmbedding.get_seq_pos": "self, seq_len, device=None, dtype=None, "
    "offset=0",
    "rotary_embedding_torch.RotaryEmbedding.get_scale": "self, t, seq_len=None, offset=0",
    "rotary_embedding_torch.RotaryEmbedding.get_axial_freqs": "self, *dims, offsets=None",
    "rotary_embedding_torch.RotaryEmbedding.rotate_queries_or_keys": "self, t, seq_dim=None, "
    "offset=0, scale=None",
    "rotary_embedding_torch.RotaryEmbedding.rotate_queries_and_keys": "self, q, k, seq_dim=None",
    "rotary_embedding_torch.RotaryEmbedding.rotate_queries_with_cached_keys": "self, q, k, "
    "seq_dim=None, offset=0",
    "torchtitan.apply_rotary_emb": "query, key, rope_cache, positions=None",
    "torchtitan.override": "config",
    "torchtitan.patch": "",
    "torchtitan.unpatch": "",
    "torchtune.RotaryPositionalEmbeddings": TUNE,
    "torchtune.RotaryPositionalEmbeddings.forward": "self, x, *, input_pos=None",
    "torchtune.Llama3ScaledRoPE": f"{TUNE}, scale_factor=8, low_freq_factor=1, high_freq_factor=4, "
    "old_context_len=8192",
    "torchtune.Llama3ScaledRoPE.forward": "self, x, *, input_pos=None",
    "torchtune.Phi3RotaryPositionalEmbeddings": TUNE,
    "torchtune.Phi3RotaryPositionalEmbeddings.forward": "self, x, input_pos=None",
    "torchtune.Qwen2RotaryPositionalEmbeddings": "dim, max_seq_len=4096, base=1000000.0",
    "torchtune.Qwen2RotaryPositionalEmbeddings.forward": "self, x, input_pos=None",
    "torchtune.VisionRotaryPositionalEmbeddings": "patch_size, tile_size, dim, base=10000, "
    "append_cls_token=True",
    "torchtune.VisionRotaryPositionalEmbeddings.forward": "self, x, **kwargs",
    "transformer_engine.apply_rotary_pos_emb": "t, freqs, tensor_format='sbhd', "
    "start_positions=None, interleaved=False, fused=False, cu_seqlens=None, cp_size=1, cp_rank=0",
    "transformer_engine.apply_fused_qkv_rotary_pos_emb": "qkv, q_freqs, k_freqs, "
    "qkv_split_arg_list, tensor_format='sbhd', start_positions=None, interleaved=False, "
    "cu_seqlens=None, cp_size=1, cp_rank=0",
    "triton_rotary.TritonRotary": "dim, max_seq_len",
    "triton_rotary.TritonRotary.forward": "self, q, k",
    "sglang.FusedSetKVBufferArg": "value, k_buffer, v_buffer, k_scale, v_scale, cache_loc",
    "sglang.apply_rope_with_cos_sin_cache_inplace": f"{INFER_CACHE}, "
    "fused_set_kv_buffer_arg=None, enable_pdl=None",
    "sglang.apply_rope_inplace": "q, k, cos_sin_cache, positions, *, is_neox, rope_dim=0",
    "sglang.apply_rope_inplace_with_kvcache": "q, k, v, k_cache, v_cache, cos_sin_cache, "
    "positions, out_loc, *, is_neox, rope_dim=0",
    "sglang.rotary_embedding": INFER_CACHE,
    "unsloth.fast_qk_norm_rope": "q_norm, k_norm, Q, K, cos, sin, position_ids=None",
    "unsloth.fast_rope_embedding": "Q, K, cos, sin, rope_embedding_indices=None",
    "unsloth.inplace_rope_embedding": "Q, K, cos, sin, position_ids",
    "unsloth.Fast_RoPE_Embedding.apply": "Q, cos, sin",
    "unsloth.Fast_RoPE_Embedding_QK.apply": "Q, K, cos, sin, rope_indices",
    "vllm.rotary_embedding": "positions, query, key, head_size, cos_sin_cache, is_neox, "
    "rope_dim_offset=0, inverse=False",
}


def parameters(signature):
    """The signature's parameters; those that the caller must or may give by name come last."""
    return list(
        inspect.signature(eval(f"lambda {signature}: 0", {"torch": torch})).parameters.values()
    )


def drop_in(name):
    module, *attributes = name.split(".")
    found = importlib.import_module(f"fused_rope.compat.{module}")
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_original_s(name):
    """Names, order, kinds and defaults; what a drop-in adds is optional and given by name."""
    theirs = parameters(SIGNATURES[name])
    ours = list(inspect.signature(drop_in(name)).parameters.values())
    for here, there in zip(ours, theirs, strict=False):
        assert (here.name, here.kind) == (there.name, there.kind)
        assert there.default in (here.default, inspect.Parameter.empty)
    assert len(ours) >= len(theirs)
    for added in ours[len(theirs) :]:
        assert added.kind is inspect.Parameter.KEYWORD_ONLY
        assert added.default is not inspect.Parameter.empty


def test_every_public_name_has_its_signature():
    for module in pkgutil.iter_modules(fused_rope.compat.__path__):
        if module.name.startswith("_") or module.name == "transformers":
            continue
        for name in importlib.import_module(f"fused_rope.compat.{module.name}").__all__:
            known = {f"{module.name}.{name}", f"{module.name}.{name}.apply"}
            assert name in OURS or known & SIGNATURES.keys(), f"{module.name}.{name}"
