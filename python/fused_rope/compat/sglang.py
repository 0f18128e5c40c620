"""Drop-ins for SGLang: its rotary functions, and that of its kernel library, sgl_kernel.

An environment variable switches SGLang, which loads this package by the entry point "fused_rope":

    SGLANG_PLUGINS=fused_rope python -m sglang.launch_server ...

`apply_rope_with_cos_sin_cache_inplace` has sgl_kernel's arguments. `apply_rope_inplace`,
`apply_rope_inplace_with_kvcache` and `rotary_embedding` are those of SGLang itself
(sglang/kernels/ops/attention/rope.py).

The arguments and numbers are the same. Differences: any head sizes, strides and dtypes of the table
work, and a position outside the table or a slot outside the cache is an error.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor

from .. import functional
from . import vllm
from ._tables import split_heads

__all__ = [
    "FusedSetKVBufferArg",
    "apply_rope_inplace",
    "apply_rope_inplace_with_kvcache",
    "apply_rope_with_cos_sin_cache_inplace",
    "plugin",
    "register",
    "rotary_embedding",
]


@dataclass
class FusedSetKVBufferArg:
    """What to write into the KV cache; sgl_kernel's and SGLang's own classes work, too.

    Args:
        value: [T, Hk*D] or [T, Hk, D].
        k_buffer, v_buffer: [rows, Hk*D] or [rows, Hk, D], of key's dtype.
        k_scale, v_scale: None, as in the original.
        cache_loc: int32 or int64 [T], the row of each token; -1 for none.
    """

    value: Tensor
    k_buffer: Tensor
    v_buffer: Tensor
    k_scale: float | None
    v_scale: float | None
    cache_loc: Tensor


def apply_rope_with_cos_sin_cache_inplace(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool = True,
    fused_set_kv_buffer_arg: FusedSetKVBufferArg | None = None,
    enable_pdl: bool | None = None,
) -> None:
    """Rotates query and key in place, and writes key and value into the KV cache if asked to.

    Args:
        positions: int32 or int64 [T]; -1 leaves a token as it is.
        query, key: [T, Hq*D] and [T, Hk*D], or [T, Hq, D] and [T, Hk, D]; any float dtype.
        head_size: D.
        cos_sin_cache: [M, R], the cosines of R/2 pairs and then their sines.
        is_neox: pairs are elements j and j + R/2; adjacent elements if False.
        fused_set_kv_buffer_arg: the values, the two caches and their rows.
        enable_pdl: no effect.

    Raises:
        ValueError: shapes do not match, or a scale is given.
        TypeError: an unsupported dtype.
        IndexError: a position or a row is out of range (on CUDA a device-side assertion).
        RuntimeError: query or key is a tensor that autograd forbids to write to.

    Example:
        >>> angle = torch.arange(40.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> table = torch.cat([angle.cos(), angle.sin()], -1)
        >>> query, key, value = (torch.randn(11, heads * 64) for heads in (8, 2, 2))
        >>> k_buffer, v_buffer = torch.zeros(2, 100, 2 * 64)
        >>> cache = FusedSetKVBufferArg(value, k_buffer, v_buffer, None, None, torch.arange(11))
        >>> apply_rope_with_cos_sin_cache_inplace(
        ...     torch.arange(11), query, key, 64, table, fused_set_kv_buffer_arg=cache
        ... )
    """
    operator = "apply_rope_with_cos_sin_cache_inplace"
    q = split_heads(operator, "query", query, positions.shape, head_size)
    k = split_heads(operator, "key", key, positions.shape, head_size)
    if fused_set_kv_buffer_arg is None:
        apply_rope_inplace(q, k, cos_sin_cache, positions, is_neox=is_neox)
        return
    cache = fused_set_kv_buffer_arg
    for name in ("k_scale", "v_scale"):
        scale = getattr(cache, name, None)  # SGLang's own class has none
        if scale is not None:
            raise ValueError(f"{operator}: expected {name}=None, got {scale}")
    apply_rope_inplace_with_kvcache(
        q,
        k,
        cache.value,
        cache.k_buffer,
        cache.v_buffer,
        cos_sin_cache,
        positions,
        cache.cache_loc,
        is_neox=is_neox,
    )


def apply_rope_inplace(
    q: Tensor,
    k: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    *,
    is_neox: bool,
    rope_dim: int = 0,
) -> None:
    """Rotates q and k in place.

    Args:
        q, k: [T, Hq, D] and [T, Hk, D]; any float dtype. Two dtypes take two launches.
        cos_sin_cache: [M, R], the cosines of R/2 pairs and then their sines.
        positions: int32 or int64 [T]; -1 leaves a token as it is.
        is_neox: pairs are elements j and j + R/2; adjacent elements if False.
        rope_dim: R, or 0.

    Raises:
        ValueError: shapes do not match.
        TypeError: an unsupported dtype.
        IndexError: the table lacks the row of a position (on CUDA a device-side assertion).
        RuntimeError: q or k is a tensor that autograd forbids to write to.

    Example:
        >>> angle = torch.arange(40.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> table = torch.cat([angle.cos(), angle.sin()], -1)
        >>> q, k = torch.randn(11, 8, 64), torch.randn(11, 2, 64)
        >>> apply_rope_inplace(q, k, table, torch.arange(11), is_neox=True)
    """
    R = cos_sin_cache.shape[-1]
    if rope_dim not in (0, R):
        raise ValueError(
            f"apply_rope_inplace: expected rope_dim of 0 or cos_sin_cache's width R={R}, "
            f"got {rope_dim}"
        )
    cos, sin = cos_sin_cache.chunk(2, -1)
    options: dict[str, Any] = {
        "layout": "thd",
        "positions": positions,
        "interleaved": not is_neox,
    }
    if q.dtype == k.dtype:
        functional.rotate_qk_(q, k, cos, sin, **options)
    else:
        functional.rotate_(q, cos, sin, **options)
        functional.rotate_(k, cos, sin, **options)


def apply_rope_inplace_with_kvcache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    out_loc: Tensor,
    *,
    is_neox: bool,
    rope_dim: int = 0,
) -> None:
    """Rotates q and k in place, and writes k and v into the rows `out_loc` of their caches.

    Args:
        q, k, cos_sin_cache, positions, is_neox, rope_dim: as in `apply_rope_inplace`.
        v: [T, Hk*D] or [T, Hk, D].
        k_cache, v_cache: [rows, Hk*D] or [rows, Hk, D], of k's dtype.
        out_loc: int32 or int64 [T]; a token at -1 is not stored.

    Raises:
        ValueError, TypeError, RuntimeError: as `apply_rope_inplace`.
        IndexError: a position or a row is out of range (on CUDA a device-side assertion).

    Example:
        >>> angle = torch.arange(40.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> table = torch.cat([angle.cos(), angle.sin()], -1)
        >>> q, k, v = (torch.randn(11, heads, 64) for heads in (8, 2, 2))
        >>> k_cache, v_cache = torch.zeros(2, 100, 2 * 64)
        >>> tokens = torch.arange(11)
        >>> apply_rope_inplace_with_kvcache(
        ...     q, k, v, k_cache, v_cache, table, tokens, tokens + 20, is_neox=True
        ... )
    """
    operator = "apply_rope_inplace_with_kvcache"
    tokens, D = k.shape[:1], k.shape[-1]
    v = split_heads(operator, "v", v, tokens, D)
    k_cache = split_heads(operator, "k_cache", k_cache, k_cache.shape[:1], D)
    v_cache = split_heads(operator, "v_cache", v_cache, v_cache.shape[:1], D)
    cos, sin = cos_sin_cache.chunk(2, -1)
    # The operator that stores does not work in place, and callers read k: a launch of its own.
    functional.rotate_and_cache(
        k[:, :0],  # no queries: they are rotated in place below
        k,
        v,
        cos,
        sin,
        k_cache,
        v_cache,
        out_loc,
        layout="thd",
        positions=positions,
        interleaved=not is_neox,
    )
    apply_rope_inplace(q, k, cos_sin_cache, positions, is_neox=is_neox, rope_dim=rope_dim)


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`vllm.rotary_embedding`, which returns query and key.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as `vllm.rotary_embedding`.

    Example:
        >>> angle = torch.arange(40.0)[:, None] / 10000 ** (torch.arange(0, 48, 2) / 48)
        >>> table = torch.cat([angle.cos(), angle.sin()], -1)
        >>> query, key = torch.randn(11, 8 * 48), torch.randn(11, 2 * 48)
        >>> query, key = rotary_embedding(torch.arange(11), query, key, 48, table)
    """
    vllm.rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox)
    return query, key


def register() -> list[str]:
    """Makes SGLang rotate with this package, by its registry of hooks.

    Call it in a plugin of SGLang, or before `HookRegistry.apply_hooks()`.

    Returns:
        The names of the replaced functions.

    Raises:
        ImportError: SGLang is not installed, or has no registry of hooks.
    """
    hooks = import_module("sglang.srt.plugins.hook_registry")
    for replacement in _REPLACEMENTS:
        target = f"sglang.kernels.ops.attention.rope.{replacement.__name__}"
        hooks.HookRegistry.register(target, replacement, hooks.HookType.REPLACE)
    return [replacement.__name__ for replacement in _REPLACEMENTS]


def plugin() -> None:
    """The entry point of SGLang: `register` if the variable SGLANG_PLUGINS names "fused_rope".

    If the variable is not set, SGLang loads every installed plugin, and this one does nothing. If
    it is set, SGLang loads only what it names.

    Raises:
        ImportError: as `register`.
    """
    names = os.environ.get("SGLANG_PLUGINS", "").split(",")
    if "fused_rope" in (name.strip() for name in names):
        register()


# SGLang's own `apply_rope_with_cos_sin_cache_inplace` calls the first two.
_REPLACEMENTS = (apply_rope_inplace, apply_rope_inplace_with_kvcache, rotary_embedding)
