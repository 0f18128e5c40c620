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

import torch
from torch import Tensor

from .. import functional
from ..types import Precision
from ._tables import split_heads

__all__ = ["plugin", "register", "rotary_embedding", "rotary_embedding_and_cache"]


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


def rotary_embedding_and_cache(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    precision: Precision = "fp32",
) -> Tensor:
    """`rotary_embedding` and then vLLM's `reshape_and_cache_flash`, in one launch.

    Args:
        positions, head_size, cos_sin_cache, is_neox, precision: as in `rotary_embedding`, with
            positions [T].
        query, key, value: [T, H*D] or [T, H, D]; value's heads may have another size. None of them
            is changed: the rotated key is in the cache only.
        key_cache, value_cache: [pages, page_size, Hk, D], any strides, so that vLLM's HND layout
            works, too.
        slot_mapping: int32 or int64 [T] or shorter: page * page_size + place of each token, or -1.
            Tokens past its end are rotated and not stored.
        kv_cache_dtype: "auto", or "fp8", "fp8_e4m3" or "fp8_e5m2" for caches of those or of uint8.
        k_scale, v_scale: float32 [], [1] or [Hk] for caches of 8 bits; "auto" ignores them.

    Returns:
        query rotated, of its shape and dtype.

    Raises:
        ValueError: shapes do not match, or another kv_cache_dtype: 4-bit and block-scaled caches
            have no rotation that stores them.
        TypeError: an unsupported dtype.
        IndexError: a position or a slot is out of range (on CUDA a device-side assertion).
        RuntimeError: an input requires grad.

    Example:
        >>> angle = torch.arange(40.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> table = torch.cat([angle.cos(), angle.sin()], -1)
        >>> query, key, value = (torch.randn(11, heads * 64) for heads in (8, 2, 2))
        >>> key_cache, value_cache = torch.zeros(2, 10, 16, 2, 64)
        >>> tokens = torch.arange(11)
        >>> query = rotary_embedding_and_cache(
        ...     tokens, query, key, value, 64, table, True, key_cache, value_cache, tokens + 32
        ... )
    """
    operator = "rotary_embedding_and_cache"
    if kv_cache_dtype not in _CACHE_DTYPES:
        known = ", ".join(_CACHE_DTYPES)
        raise ValueError(
            f"{operator}: expected kv_cache_dtype to be one of {known}, got {kv_cache_dtype!r}"
        )
    dtype = _CACHE_DTYPES[kv_cache_dtype]
    if dtype is not None:
        key_cache, value_cache = (
            cache.view(dtype) if cache.dtype == torch.uint8 else cache
            for cache in (key_cache, value_cache)
        )
    tokens, stored = positions.shape, slot_mapping.shape[0]
    if stored < tokens[0]:  # the other tokens are padding of a CUDA graph
        slot_mapping = torch.nn.functional.pad(slot_mapping, (0, tokens[0] - stored), value=-1)
    cos, sin = cos_sin_cache.chunk(2, -1)
    rotated = functional.rotate_and_cache(
        split_heads(operator, "query", query, tokens, head_size),
        split_heads(operator, "key", key, tokens, head_size),
        split_heads(operator, "value", value, tokens, value_cache.shape[-1]),
        cos,
        sin,
        key_cache,
        value_cache,
        slot_mapping,
        k_scale=_scale(k_scale) if dtype is not None else None,
        v_scale=_scale(v_scale) if dtype is not None else None,
        layout="thd",
        positions=positions,
        interleaved=not is_neox,
        precision=precision,
    )
    return rotated.view(query.shape)


def register(precision: Precision = "fp32") -> list[str]:
    """Makes vLLM construct its rotary embeddings with this package's rotation.

    Call it before the engine is made. Classes of vLLM's CustomOp registry are replaced by
    subclasses: constructors, tables and `forward_native` stay vLLM's own, `forward_cuda` and
    `forward_cpu` are one launch. A second call only changes the precision.

    Args:
        precision: "fp32" rounds once, as vLLM's kernels do. "model" gives the bits of
            `forward_native`, which rounds each product. vLLM's tests compare the two in bfloat16
            more closely than either rounding allows (test_pos_encoding.py, test_mrope.py): they
            pass with "model" only.

    Returns:
        The names of the replaced classes, those in this list that the installed vLLM has. The
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
_CACHE_DTYPES = {
    "auto": None,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def _scale(scale: Tensor | None) -> Tensor | None:
    """One scale for all heads is [1] in vLLM and [] in the operator."""
    return scale.view(()) if scale is not None and scale.numel() == 1 else scale
