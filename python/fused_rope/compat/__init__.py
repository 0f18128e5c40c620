"""Drop-ins for the rotary functions of other libraries, one module for each library.

They have the originals' names, argument order and shapes. They compute nothing: they rename
arguments, reshape views and call `fused_rope`. A module is imported when it is first used:
`fused_rope.compat.transformers.patch(model)`.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (
        diffusers,
        flash_attn,
        flashinfer,
        liger,
        llama,
        megatron,
        rotalabs,
        rotary_embedding_torch,
        sglang,
        torchtitan,
        torchtune,
        transformer_engine,
        transformers,
        triton_rotary,
        unsloth,
        vllm,
    )

__all__ = [
    "diffusers",
    "flash_attn",
    "flashinfer",
    "liger",
    "llama",
    "megatron",
    "rotalabs",
    "rotary_embedding_torch",
    "sglang",
    "torchtitan",
    "torchtune",
    "transformer_engine",
    "transformers",
    "triton_rotary",
    "unsloth",
    "vllm",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
