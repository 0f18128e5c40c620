"""Tensors that no drop-in rotates, and modules that TorchScript cannot compile: readable errors."""

import pytest
import torch
from fused_rope import cos_sin_table, inv_freq
from fused_rope.compat import (
    flash_attn,
    liger,
    llama,
    megatron,
    rotalabs,
    rotary_embedding_torch,
    torchtitan,
    torchtune,
    transformer_engine,
    transformers,
    triton_rotary,
)
from fused_rope.compat.diffusers import apply_rotary_emb

COS, SIN = cos_sin_table(inv_freq(16), 32)
WIDE = [torch.cat([t, t], -1) for t in (COS, SIN)]
ANGLES = torch.arange(32.0)[:, None] * inv_freq(16).float()
FREQS = torch.cat([ANGLES, ANGLES], -1)[:, None, None]
COMPLEX = torch.complex(COS, SIN)

MODULES = {
    "flash_attn": lambda: flash_attn.RotaryEmbedding(16),
    "flash_attn XPos": lambda: flash_attn.RotaryEmbedding(16, scale_base=512.0),
    "rotalabs": lambda: rotalabs.RotaryEmbedding(16),
    "rotary_embedding_torch": lambda: rotary_embedding_torch.RotaryEmbedding(16),
    "torchtune": lambda: torchtune.RotaryPositionalEmbeddings(16),
    "torchtune Llama 3": lambda: torchtune.Llama3ScaledRoPE(16),
    "torchtune vision": lambda: torchtune.VisionRotaryPositionalEmbeddings(10, 30, 16),
    "triton_rotary": lambda: triton_rotary.TritonRotary(16, 32),
}
# How each drop-in is called with one tensor.
CALLS = {
    "flash_attn": lambda x: flash_attn.apply_rotary_emb(x, COS, SIN),
    "flash_attn module": lambda x: MODULES["flash_attn"]()(x),
    "flash_attn XPos module": lambda x: MODULES["flash_attn XPos"]()(x),
    "liger": lambda x: liger.liger_rotary_pos_emb_vision(x, x, *WIDE),
    "llama": lambda x: llama.apply_rotary_emb(x, x, COMPLEX),
    "megatron": lambda x: megatron.apply_rotary_pos_emb_bshd(x, FREQS),
    "rotalabs": lambda x: rotalabs.apply_rope(x, x, COS, SIN),
    "rotalabs module": lambda x: MODULES["rotalabs"]()(x, x),
    "rotary_embedding_torch": lambda x: rotary_embedding_torch.apply_rotary_emb(ANGLES, x),
    "rotary_embedding_torch module": lambda x: MODULES[
        "rotary_embedding_torch"
    ]().rotate_queries_or_keys(x),
    "torchtitan": lambda x: torchtitan.apply_rotary_emb(x, x, COMPLEX),
    "torchtune": lambda x: MODULES["torchtune"]()(x),
    "torchtune vision": lambda x: MODULES["torchtune vision"]()(x),
    "transformer_engine": lambda x: transformer_engine.apply_rotary_pos_emb(x, FREQS, "bshd"),
    "triton_rotary": lambda x: MODULES["triton_rotary"]()(x, x),
}
# Diffusers' and transformers' functions unsqueeze tables by the number of their dimensions.
NESTED_CALLS = CALLS | {
    "diffusers": lambda x: apply_rotary_emb(x, WIDE),
    "transformers": lambda x: transformers.apply_rotary_pos_emb(x, x, *(t[None] for t in WIDE)),
}


@pytest.mark.parametrize("name", NESTED_CALLS)
def test_nested_tensors(name):
    parts = [torch.randn(n, 2, 16) for n in (3, 5)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    with pytest.raises((TypeError, ValueError), match="expected"):
        NESTED_CALLS[name](x)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", [(), (16,)], ids=str)
def test_tensors_of_too_few_dimensions(name, shape):
    with pytest.raises(ValueError, match=r"expected .*got"):
        CALLS[name](torch.randn(shape))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("name", MODULES)
def test_scripting(name):
    with pytest.raises(RuntimeError, match=r"^\w+: torch\.jit\.script cannot compile this module"):
        torch.jit.script(MODULES[name]())
