"""Rotary position embeddings for queries and keys as one fused, differentiable operator."""

from .compat.transformers import layers
from .embedding import RotaryEmbedding
from .frequencies import inv_freq, mrope_axes
from .functional import (
    cos_sin_table,
    norm_rotate,
    norm_rotate_,
    norm_rotate_qk,
    norm_rotate_qk_,
    rotate,
    rotate_,
    rotate_qk,
    rotate_qk_,
)
from .reference import register_fallback

register_fallback()

__all__ = [
    "RotaryEmbedding",
    "cos_sin_table",
    "inv_freq",
    "layers",
    "mrope_axes",
    "norm_rotate",
    "norm_rotate_",
    "norm_rotate_qk",
    "norm_rotate_qk_",
    "rotate",
    "rotate_",
    "rotate_qk",
    "rotate_qk_",
]
