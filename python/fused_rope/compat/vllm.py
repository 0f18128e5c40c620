"""Drop-ins for vLLM: its rotary embeddings, and its operator (vllm/_custom_ops.py).

An environment variable switches vLLM, which loads this package by the entry point "fused_rope":

    VLLM_PLUGINS=fused_rope vllm serve ...

The operator works in place:

    from fused_rope.compat.vllm import rotary_embedding

The arguments and numbers are the same. Differences: any strides, rotary dimensions and head counts
work, and so do int32 positions and more than 2^31 elements; a position outside the cache is an
error.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from torch import Tensor

from .. import functional
from ..types import Precision
from ._tables import split_heads

__all__ = ["plugin", "register", "rotary_embedding"]


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
    *,
    precision: Precision = "fp32",
) -> None:
    """Rotates query and key in place.

    Args:
        positions: int32 or int64, [T] or [B, S].
        query: [T, Hq*head_size] or [T, Hq, head_size]; with positions [B, S]
            [B, S, Hq*head_size] or [B, S, Hq, head_size]. Any float dtype.
        key: the same with Hk heads, or None.
        head_size: D.
        cos_sin_cache: [M, R], the cosines of R/2 pairs and then their sines, in any float dtype.
        is_neox: pairs are elements j and j + R/2; adjacent elements if False.
        rope_dim_offset: the first rotated element.
        inverse: apply the inverse rotation.
        precision: "fp32" rounds once, as vLLM's kernel does. "model" rounds the cache, each product
            and their sum to query's dtype: bitwise identical to vLLM's PyTorch path
            (`forward_native`), and to its older kernels, which computed in query's dtype.

    Raises:
        ValueError: shapes do not match, or another precision.
        TypeError: an unsupported dtype.
        IndexError: the cache lacks the row of a position (on CUDA a device-side assertion).
        RuntimeError: query or key is a tensor that autograd forbids to write to.

    Example:
        >>> angle = torch.arange(40.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> cache = torch.cat([angle.cos(), angle.sin()], -1)
        >>> query, key = torch.randn(11, 8 * 64), torch.randn(11, 2 * 64)
        >>> rotary_embedding(torch.arange(11), query, key, 64, cache, is_neox=True)
    """
    if positions.dim() not in (1, 2):
        raise ValueError(
            f"rotary_embedding: expected positions of [T] or [B, S], got {list(positions.shape)}"
        )
    cos, sin = cos_sin_cache.chunk(2, -1)
    options: dict[str, Any] = {
        "layout": "thd" if positions.dim() == 1 else "bshd",
        "positions": positions,
        "rotary_offset": rope_dim_offset,
        "interleaved": not is_neox,
        "inverse": inverse,
        "precision": precision,
    }
    q = split_heads("rotary_embedding", "query", query, positions.shape, head_size)
    if key is None:
        functional.rotate_(q, cos, sin, **options)
    else:
        k = split_heads("rotary_embedding", "key", key, positions.shape, head_size)
        functional.rotate_qk_(q, k, cos, sin, **options)


def register(precision: Precision = "fp32") -> list[str]:
    """Makes vLLM construct its rotary embeddings with this package's rotation.

    Call it before the engine is made. Classes of vLLM's CustomOp registry are replaced by
    subclasses: constructors, tables and `forward_native` stay vLLM's own, `forward_cuda` and
    `forward_cpu` are one launch. A second call only changes the precision.

    Args:
        precision: "fp32" rounds once, as vLLM's kernels do. "model" gives the bits of
            `forward_native`, which rounds each product.

    Returns:
        The names of the replaced classes: those in this list that the installed vLLM has. The
        classes of Fourier and dual-chunk embeddings keep vLLM's code, and so does that of longrope,
        which is not in the registry.

    Raises:
        ImportError: vLLM is not installed.
        AssertionError: by vLLM, if another plugin replaced one of the classes.
        ValueError: another precision.
    """
    from ._vllm_layers import LAYERS  # these classes call this module

    if precision not in ("fp32", "model"):
        raise ValueError(f"register: expected precision 'fp32' or 'model', got {precision!r}")
    package = "vllm.model_executor.layers.rotary_embedding"
    modules = [import_module(package + part) for part in ("", ".common", ".ernie45_vl_rope")]
    found = {
        name: getattr(module, name)
        for name in LAYERS
        for module in modules
        if hasattr(module, name)
    }
    for name, original in found.items():
        if original not in _replaced:
            key = original.name
            ours = type(name, (LAYERS[name], original), {"__doc__": original.__doc__})
            original.register_oot(ours)
            ours.name = key  # type: ignore[attr-defined]  # register_oot sets it to the class's name
            _replaced[original] = ours
        _replaced[original].precision = precision
    return list(found)


def plugin() -> None:
    """The entry points of vLLM: `register` if the variable VLLM_PLUGINS names one of them.

    "fused_rope" is `register()`, "fused_rope_model" is `register("model")`. If the variable is not
    set, vLLM loads every installed plugin, and this one does nothing. If it is set, vLLM loads only
    what it names.

    Raises:
        ValueError: VLLM_PLUGINS names both.
        ImportError, AssertionError: as `register`.
    """
    names = [name.strip() for name in os.environ.get("VLLM_PLUGINS", "").split(",")]
    chosen = [precision for name, precision in _PLUGINS.items() if name in names]
    if len(chosen) > 1:
        raise ValueError(f"VLLM_PLUGINS: expected one of {', '.join(_PLUGINS)}, got all of them")
    if chosen:
        register(chosen[0])


_PLUGINS: dict[str, Precision] = {"fused_rope": "fp32", "fused_rope_model": "model"}
_replaced: dict[type, Any] = {}
