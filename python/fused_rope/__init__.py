"""Rotary position embeddings for queries and keys as one fused, differentiable operator."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from ._requirements import torch_problem as _torch_problem

if _problem := _torch_problem():
    raise ImportError(_problem)

from . import _C, compat
from .diagnostics import build_info, self_check
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
    rotate_and_cache,
    rotate_qk,
    rotate_qk_,
)
from .reference import register_fallback

if TYPE_CHECKING:
    from . import distributed as distributed

register_fallback()


def __getattr__(name: str) -> Any:
    if name == "distributed":  # imports torch.distributed
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__: str = _C.version
__all__ = [
    "RotaryEmbedding",
    "build_info",
    "compat",
    "cos_sin_table",
    "inv_freq",
    "mrope_axes",
    "norm_rotate",
    "norm_rotate_",
    "norm_rotate_qk",
    "norm_rotate_qk_",
    "rotate",
    "rotate_",
    "rotate_and_cache",
    "rotate_qk",
    "rotate_qk_",
    "self_check",
]
