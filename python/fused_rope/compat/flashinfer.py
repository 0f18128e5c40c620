"""Drop-ins for FlashInfer's rotary functions (flashinfer/rope.py).

    from fused_rope.compat.flashinfer import apply_rope_pos_ids_inplace

The arguments are the same; results are rounded once, to the inputs' dtype. Differences: cosines
come from a table of `max_seq_len` rows (our argument), where the original computes them in the
kernel with approximate powers; it is made at the first call with the same frequencies and kept. Any
strides, rotary dimensions and dtypes work, tokens past indptr[-1] are copied, autograd records all
calls, and a position outside the table is an error.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..scaled_frequencies import ScaledFrequencies
from ..table_cache import TableCache
from ..tracing import in_dynamo
from ._tables import split_heads

__all__ = [
    "apply_llama31_rope",
    "apply_llama31_rope_inplace",
    "apply_llama31_rope_pos_ids",
    "apply_llama31_rope_pos_ids_inplace",
    "apply_rope",
    "apply_rope_inplace",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
]

# Llama 3.1's context. A table for D = 128 has 64 MiB.
_ROWS = 131072

_FACTORS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def apply_rope(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
    *,
    max_seq_len: int = _ROWS,
) -> tuple[Tensor, Tensor]:
    """Rotates the first R elements of the heads of packed sequences.

    Args:
        q, k: [T, Hq, D] and [T, Hk, D]; any float dtype.
        indptr: int32 or int64 [N + 1], the start of each sequence.
        offsets: int32 or int64 [N], the position of each sequence's first token.
        rotary_dim: R; None for D.
        interleave: pairs are adjacent elements instead of halves.
        rope_scale: positions are divided by it.
        rope_theta: base of the frequencies.
        max_seq_len: rows of the table, which positions must not exceed.

    Returns:
        q and k rotated, of their shapes and dtype.

    Raises:
        ValueError: shapes do not match.
        TypeError: an unsupported dtype.
        IndexError: a position is not in [0, max_seq_len) (on CUDA a device-side assertion).

    Example:
        >>> q, k = torch.randn(11, 8, 64), torch.randn(11, 2, 64)
        >>> indptr, offsets = torch.tensor([0, 4, 11]), torch.tensor([0, 25])
        >>> q_rotated, k_rotated = apply_rope(q, k, indptr, offsets)
    """
    cos, sin = _table(q, rotary_dim, rope_theta, max_seq_len, rope_scale)
    return functional.rotate_qk(q, k, cos, sin, **_sequences(indptr, offsets, interleave))


def apply_rope_inplace(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
    *,
    max_seq_len: int = _ROWS,
) -> None:
    """`apply_rope` in place.

    Raises:
        ValueError, TypeError, IndexError: as `apply_rope`.
        RuntimeError: q or k is a tensor that autograd forbids to write to.

    Example:
        >>> q, k = torch.randn(11, 8, 64), torch.randn(11, 2, 64)
        >>> apply_rope_inplace(q, k, torch.tensor([0, 4, 11]), torch.tensor([0, 25]))
    """
    cos, sin = _table(q, rotary_dim, rope_theta, max_seq_len, rope_scale)
    functional.rotate_qk_(q, k, cos, sin, **_sequences(indptr, offsets, interleave))


def apply_rope_pos_ids(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
    *,
    max_seq_len: int = _ROWS,
) -> tuple[Tensor, Tensor]:
    """Rotates the first R elements of the heads of tokens at any positions.

    Args:
        q, k, rotary_dim, interleave, rope_scale, rope_theta, max_seq_len: as in `apply_rope`.
        pos_ids: int32 or int64 [T]; -1 copies a token.

    Returns:
        q and k rotated, of their shapes and dtype.

    Raises:
        ValueError, TypeError, IndexError: as `apply_rope`.

    Example:
        >>> q, k = torch.randn(11, 8, 64), torch.randn(11, 2, 64)
        >>> q_rotated, k_rotated = apply_rope_pos_ids(q, k, torch.arange(11))
    """
    cos, sin = _table(q, rotary_dim, rope_theta, max_seq_len, rope_scale)
    return functional.rotate_qk(q, k, cos, sin, **_tokens(pos_ids, interleave))


def apply_rope_pos_ids_inplace(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
    *,
    max_seq_len: int = _ROWS,
) -> None:
    """`apply_rope_pos_ids` in place.

    Raises:
        ValueError, TypeError, IndexError: as `apply_rope`.
        RuntimeError: q or k is a tensor that autograd forbids to write to.

    Example:
        >>> q, k = torch.randn(11, 8, 64), torch.randn(11, 2, 64)
        >>> apply_rope_pos_ids_inplace(q, k, torch.arange(11))
    """
    cos, sin = _table(q, rotary_dim, rope_theta, max_seq_len, rope_scale)
    functional.rotate_qk_(q, k, cos, sin, **_tokens(pos_ids, interleave))


def apply_llama31_rope(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
    *,
    max_seq_len: int = _ROWS,
) -> tuple[Tensor, Tensor]:
    """`apply_rope` with the frequencies of Llama 3.1.

    Args:
        q, k, indptr, offsets, rotary_dim, interleave, rope_theta, max_seq_len: as in `apply_rope`.
        rope_scale: frequencies of long wavelengths are divided by it.
        low_freq_factor: wavelengths from old_context_len/low_freq_factor on are long.
        high_freq_factor: wavelengths up to old_context_len/high_freq_factor are unchanged.
        old_context_len: the context length of the training before.

    Returns:
        q and k rotated, of their shapes and dtype.

    Raises:
        ValueError, TypeError, IndexError: as `apply_rope`.

    Example:
        >>> q, k = torch.randn(11, 8, 64), torch.randn(11, 2, 64)
        >>> indptr, offsets = torch.tensor([0, 4, 11]), torch.tensor([0, 25])
        >>> q_rotated, k_rotated = apply_llama31_rope(q, k, indptr, offsets)
    """
    factors = rope_scale, low_freq_factor, high_freq_factor, old_context_len
    cos, sin = _table(q, rotary_dim, rope_theta, max_seq_len, *factors)
    return functional.rotate_qk(q, k, cos, sin, **_sequences(indptr, offsets, interleave))


def apply_llama31_rope_inplace(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
    *,
    max_seq_len: int = _ROWS,
) -> None:
    """`apply_llama31_rope` in place.

    Raises:
        ValueError, TypeError, IndexError: as `apply_rope`.
        RuntimeError: q or k is a tensor that autograd forbids to write to.

    Example:
        >>> q, k = torch.randn(11, 8, 64), torch.randn(11, 2, 64)
        >>> apply_llama31_rope_inplace(q, k, torch.tensor([0, 4, 11]), torch.tensor([0, 25]))
    """
    factors = rope_scale, low_freq_factor, high_freq_factor, old_context_len
    cos, sin = _table(q, rotary_dim, rope_theta, max_seq_len, *factors)
    functional.rotate_qk_(q, k, cos, sin, **_sequences(indptr, offsets, interleave))


def apply_llama31_rope_pos_ids(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
    *,
    max_seq_len: int = _ROWS,
) -> tuple[Tensor, Tensor]:
    """`apply_rope_pos_ids` with the frequencies of Llama 3.1; see `apply_llama31_rope`.

    Raises:
        ValueError, TypeError, IndexError: as `apply_rope`.

    Example:
        >>> q, k = torch.randn(11, 8, 64), torch.randn(11, 2, 64)
        >>> q_rotated, k_rotated = apply_llama31_rope_pos_ids(q, k, torch.arange(11))
    """
    factors = rope_scale, low_freq_factor, high_freq_factor, old_context_len
    cos, sin = _table(q, rotary_dim, rope_theta, max_seq_len, *factors)
    return functional.rotate_qk(q, k, cos, sin, **_tokens(pos_ids, interleave))


def apply_llama31_rope_pos_ids_inplace(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
    *,
    max_seq_len: int = _ROWS,
) -> None:
    """`apply_llama31_rope_pos_ids` in place.

    Raises:
        ValueError, TypeError, IndexError: as `apply_rope`.
        RuntimeError: q or k is a tensor that autograd forbids to write to.

    Example:
        >>> q, k = torch.randn(11, 8, 64), torch.randn(11, 2, 64)
        >>> apply_llama31_rope_pos_ids_inplace(q, k, torch.arange(11))
    """
    factors = rope_scale, low_freq_factor, high_freq_factor, old_context_len
    cos, sin = _table(q, rotary_dim, rope_theta, max_seq_len, *factors)
    functional.rotate_qk_(q, k, cos, sin, **_tokens(pos_ids, interleave))


def apply_rope_with_cos_sin_cache(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool = True,
) -> tuple[Tensor, Tensor]:
    """Rotates query and key by a table that the caller holds.

    Args:
        positions: int32 or int64 [T]; -1 copies a token.
        query, key: [T, Hq*D] and [T, Hk*D]; any float dtype.
        head_size: D.
        cos_sin_cache: [M, R], the cosines of R/2 pairs and then their sines, in any float dtype;
            the original requires float32.
        is_neox: pairs are elements j and j + R/2; adjacent elements if False.

    Returns:
        query and key rotated, of their shapes and dtype.

    Raises:
        ValueError: shapes do not match.
        TypeError: an unsupported dtype.
        IndexError: the table lacks the row of a position (on CUDA a device-side assertion).

    Example:
        >>> angle = torch.arange(40.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> cache = torch.cat([angle.cos(), angle.sin()], -1)
        >>> query, key = torch.randn(11, 8 * 64), torch.randn(11, 2 * 64)
        >>> query, key = apply_rope_with_cos_sin_cache(torch.arange(11), query, key, 64, cache)
    """
    operator = "apply_rope_with_cos_sin_cache"
    q, k = _heads(operator, positions, query, key, head_size)
    cos, sin = cos_sin_cache.chunk(2, -1)
    q, k = functional.rotate_qk(q, k, cos, sin, **_tokens(positions, not is_neox))
    return q.view(query.shape), k.view(key.shape)


def apply_rope_with_cos_sin_cache_inplace(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool = True,
) -> None:
    """`apply_rope_with_cos_sin_cache` in place.

    Raises:
        ValueError, TypeError, IndexError: as `apply_rope_with_cos_sin_cache`.
        RuntimeError: query or key is a tensor that autograd forbids to write to.

    Example:
        >>> angle = torch.arange(40.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> cache = torch.cat([angle.cos(), angle.sin()], -1)
        >>> query, key = torch.randn(11, 8 * 64), torch.randn(11, 2 * 64)
        >>> apply_rope_with_cos_sin_cache_inplace(torch.arange(11), query, key, 64, cache)
    """
    operator = "apply_rope_with_cos_sin_cache_inplace"
    q, k = _heads(operator, positions, query, key, head_size)
    cos, sin = cos_sin_cache.chunk(2, -1)
    functional.rotate_qk_(q, k, cos, sin, **_tokens(positions, not is_neox))


def _sequences(indptr: Tensor, offsets: Tensor, interleave: bool) -> dict[str, Any]:
    return {
        "layout": "thd",
        "cu_seqlens": indptr,
        "offset": offsets,
        "interleaved": interleave,
    }


def _tokens(positions: Tensor, interleave: bool) -> dict[str, Any]:
    return {"layout": "thd", "positions": positions, "interleaved": interleave}


def _heads(
    operator: str, positions: Tensor, query: Tensor, key: Tensor, head_size: int
) -> tuple[Tensor, Tensor]:
    tokens = positions.shape
    return (
        split_heads(operator, "query", query, tokens, head_size),
        split_heads(operator, "key", key, tokens, head_size),
    )


def _table(
    q: Tensor, rotary_dim: int | None, theta: float, rows: int, *factors: float
) -> tuple[Tensor, Tensor]:
    R = q.shape[-1] if rotary_dim is None else rotary_dim
    pair: tuple[Tensor, Tensor] | None
    if in_dynamo():
        pair = _constant(q.device, R, theta, rows, *factors)
    else:
        pair = _cache(R, theta, rows, *factors).pair(None, q)
    assert pair is not None
    return pair


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant(
    device: torch.device, R: int, theta: float, rows: int, *factors: float
) -> tuple[Tensor, Tensor] | None:
    """The table as a constant of the compiled graph: Dynamo cannot build it."""
    return _cache(R, theta, rows, *factors).pair(None, torch.empty(0, device=device))


@functools.lru_cache
def _cache(R: int, theta: float, rows: int, *factors: float) -> TableCache:
    """The table of linear scaling, which has one factor, or of Llama 3.1's, which has four."""
    scaling: dict[str, Any] = dict(zip(_FACTORS, factors, strict=False))
    scaling["rope_type"] = "linear" if len(factors) == 1 else "llama3"
    return TableCache(ScaledFrequencies(R, theta, scaling), rows)
