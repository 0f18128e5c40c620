"""Rotary position embeddings for queries and keys as one fused, differentiable operator."""

import torch as _torch

from . import _build

if _torch.__version__ != _build.TORCH_VERSION:
    raise ImportError(
        f"fused_rope was built against torch {_build.TORCH_VERSION} but torch "
        f"{_torch.__version__} is imported: "
        "rebuild it with `pip install --no-build-isolation --force-reinstall .`"
    )

from . import _C
from .embedding import RotaryEmbedding
from .frequencies import mrope_axes
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

__version__: str = _C.version
__all__ = [
    "RotaryEmbedding",
    "cos_sin_table",
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
