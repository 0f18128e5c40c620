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
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional
from ..frequencies import whole_number
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
    "mla_rope_quantize_fp8",
    "rope_quantize_fp8",
    "rope_quantize_fp8_append_paged_kv_cache",
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


def rope_quantize_fp8(
    q_rope: Tensor,
    k_rope: Tensor,
    q_nope: Tensor | None,
    k_nope: Tensor | None,
    cos_sin_cache: Tensor,
    pos_ids: Tensor,
    is_neox: bool = True,
    quantize_dtype: torch.dtype | None = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    q_rope_out: Tensor | None = None,
    k_rope_out: Tensor | None = None,
    q_nope_out: Tensor | None = None,
    k_nope_out: Tensor | None = None,
    enable_pdl: bool = False,
    backend: str = "cuda",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotates parts of queries and keys and rounds all of them to 8 bits; two launches.

    The original multiplies float32 results by the scales. Here a result is rounded to the inputs'
    dtype and divided by 1/scale, as caches in 8 bits are written: some numbers differ by one step.

    Args:
        q_rope, k_rope: [T, Hq, R] and [T, Hk, R], or [T, R] for one shared key head (MLA).
        q_nope, k_nope: the same with other last dimensions, not rotated, or None.
        cos_sin_cache: [M, R], the cosines of R/2 pairs and then their sines.
        pos_ids: int32 or int64 [T]; -1 for no rotation.
        is_neox: pairs are elements j and j + R/2; adjacent elements if False.
        quantize_dtype: float8_e4m3fn, float8_e5m2 or int8; None for that of the outputs, or
            float8_e4m3fn without any.
        quant_scale_q, quant_scale_kv: factors of stored numbers.
        q_rope_out, k_rope_out, q_nope_out, k_nope_out: memory for the results.
        enable_pdl, backend: no effect.

    Returns:
        q_rope, k_rope, q_nope and k_nope in 8 bits; a part that was None has no elements.

    Raises:
        ValueError: shapes do not match.
        TypeError: an unsupported dtype.
        IndexError: the table lacks the row of a position (on CUDA a device-side assertion).
        RuntimeError: an input requires grad.

    Example:
        >>> angle = torch.arange(40.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> table = torch.cat([angle.cos(), angle.sin()], -1)
        >>> q_rope, q_nope = torch.randn(11, 8, 64), torch.randn(11, 8, 128)
        >>> k_rope, k_nope = torch.randn(11, 64), torch.randn(11, 128)
        >>> parts = rope_quantize_fp8(q_rope, k_rope, q_nope, k_nope, table, torch.arange(11))
        >>> parts[0].dtype
        torch.float8_e4m3fn
    """
    outputs = q_rope_out, k_rope_out, q_nope_out, k_nope_out
    dtype = _quantized_dtype(quantize_dtype, outputs)
    q_rope_out, k_rope_out, q_nope_out, k_nope_out = (
        torch.empty_like(_or_empty(x, rope), dtype=dtype) if out is None else out
        for x, rope, out in zip(
            (q_rope, k_rope, q_nope, k_nope), (q_rope, k_rope) * 2, outputs, strict=True
        )
    )
    tokens = torch.arange(q_rope.shape[0], device=q_rope.device)
    rotation = _Rotation(cos_sin_cache, pos_ids, is_neox)
    _quantize(q_rope, q_nope, q_rope_out, q_nope_out, tokens, quant_scale_q, rotation)
    if k_rope.dim() == 2:
        _quantize(
            k_rope[:, None],
            None if k_nope is None else k_nope[:, None],
            k_rope_out[:, None],
            k_nope_out[:, None],
            tokens,
            quant_scale_kv,
            rotation,
        )
    else:
        _quantize(k_rope, k_nope, k_rope_out, k_nope_out, tokens, quant_scale_kv, rotation)
    return q_rope_out, k_rope_out, q_nope_out, k_nope_out


def mla_rope_quantize_fp8(
    q_rope: Tensor,
    k_rope: Tensor,
    q_nope: Tensor | None,
    k_nope: Tensor | None,
    cos_sin_cache: Tensor,
    pos_ids: Tensor,
    is_neox: bool = True,
    quantize_dtype: torch.dtype | None = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    q_rope_out: Tensor | None = None,
    k_rope_out: Tensor | None = None,
    q_nope_out: Tensor | None = None,
    k_nope_out: Tensor | None = None,
    enable_pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same as `rope_quantize_fp8`, by its older name."""
    return rope_quantize_fp8(
        q_rope,
        k_rope,
        q_nope,
        k_nope,
        cos_sin_cache,
        pos_ids,
        is_neox,
        quantize_dtype,
        quant_scale_q,
        quant_scale_kv,
        q_rope_out,
        k_rope_out,
        q_nope_out,
        k_nope_out,
    )


def rope_quantize_fp8_append_paged_kv_cache(
    q_rope: Tensor,
    k_rope: Tensor,
    q_nope: Tensor | None,
    k_nope: Tensor | None,
    v: Tensor | None,
    cos_sin_cache: Tensor,
    pos_ids: Tensor,
    paged_kv_cache: tuple[Tensor, Tensor],
    kv_indices: Tensor,
    kv_indptr: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    is_neox: bool = True,
    quantize_dtype: torch.dtype | None = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    page_size: int = 16,
    kv_layout: str = "NHD",
    q_rope_out: Tensor | None = None,
    q_nope_out: Tensor | None = None,
    enable_pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """`rope_quantize_fp8` that writes keys and values into a paged cache.

    Slots are computed from the page table first. Then there is one launch for queries, one for keys
    and one for values, or for keys and values together if no part of a key stays unrotated.
    `fused_rope.rotate_and_cache` is one launch, for queries that keep their dtype.

    Args:
        q_rope, k_rope, q_nope, k_nope: as in `rope_quantize_fp8`, as all that it has, too.
        v: [T, Hk, Dv], or None for MLA.
        paged_kv_cache: key and value caches [pages, page_size, Hk, D], or for "HND"
            [pages, Hk, page_size, D], where D is that of both parts of a key; for MLA the caches of
            k_nope [pages, page_size, Dn] and of k_rope [pages, page_size, R], in this order.
        kv_indices: the pages of all sequences, one after the other.
        kv_indptr: [N + 1], where the pages of each sequence begin in kv_indices.
        batch_indices: [T], the sequence of each token; -1 for padding, which is not stored.
        positions: [T], the place of each token in its sequence.
        page_size: tokens on a page.
        kv_layout: "NHD" or "HND".
        enable_pdl: no effect.

    Returns:
        q_rope and q_nope in 8 bits.

    Raises:
        ValueError: shapes do not match, v with MLA or none without it, another kv_layout.
        TypeError, RuntimeError: as `rope_quantize_fp8`.
        IndexError: a position or a page is out of range (on CUDA a device-side assertion).

    Example:
        >>> angle = torch.arange(40.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> table = torch.cat([angle.cos(), angle.sin()], -1)
        >>> q, k, v = (torch.randn(3, heads, 64) for heads in (8, 2, 2))
        >>> caches = torch.zeros(2, 10, 16, 2, 64).to(torch.float8_e4m3fn).unbind()
        >>> pages, starts = torch.tensor([7, 3, 4]), torch.tensor([0, 2, 3])
        >>> tokens, sequences = torch.tensor([15, 16, 5]), torch.tensor([0, 0, 1])
        >>> q_rotated, _ = rope_quantize_fp8_append_paged_kv_cache(
        ...     q, k, None, None, v, table, tokens, caches, pages, starts, sequences, tokens
        ... )
    """
    operator = "rope_quantize_fp8_append_paged_kv_cache"
    mla = k_rope.dim() == 2
    if mla == (v is not None):
        expected = "None with k_rope of [T, R]" if mla else "a tensor with k_rope of [T, Hk, R]"
        raise ValueError(f"{operator}: expected v to be {expected}")
    if kv_layout not in ("NHD", "HND"):
        raise ValueError(f"{operator}: expected kv_layout 'NHD' or 'HND', got {kv_layout!r}")
    dtype = _quantized_dtype(quantize_dtype, (q_rope_out, q_nope_out))
    if q_rope_out is None:
        q_rope_out = torch.empty_like(q_rope, dtype=dtype)
    if q_nope_out is None:
        q_nope_out = torch.empty_like(_or_empty(q_nope, q_rope), dtype=dtype)
    page = kv_indptr[batch_indices.clamp(min=0)] + positions // page_size
    slots = kv_indices[page].long() * page_size + positions % page_size
    slots = slots.masked_fill(batch_indices < 0, -1)
    tokens = torch.arange(q_rope.shape[0], device=q_rope.device)
    rotation = _Rotation(cos_sin_cache, pos_ids, is_neox)
    _quantize(q_rope, q_nope, q_rope_out, q_nope_out, tokens, quant_scale_q, rotation)
    first, second = paged_kv_cache
    if mla:
        k_nope = None if k_nope is None else k_nope[:, None]
        parts = second.unsqueeze(2), first.unsqueeze(2)
        _quantize(k_rope[:, None], k_nope, *parts, slots, quant_scale_kv, rotation)
        return q_rope_out, q_nope_out
    assert v is not None
    if kv_layout == "HND":
        first, second = first.transpose(1, 2), second.transpose(1, 2)
    if k_nope is None:
        _quantize(k_rope, v, first, second, slots, quant_scale_kv, rotation)
    else:
        R = k_rope.shape[-1]
        parts = first[..., :R], first[..., R:]
        _quantize(k_rope, k_nope, *parts, slots, quant_scale_kv, rotation)
        nothing = rotation._replace(cos_sin_cache=cos_sin_cache[:, :0])
        _quantize(v, None, second, second, slots, quant_scale_kv, nothing)
    return q_rope_out, q_nope_out


class _Rotation(NamedTuple):
    cos_sin_cache: Tensor
    positions: Tensor
    is_neox: bool


def _quantize(
    rope: Tensor,
    nope: Tensor | None,
    rope_out: Tensor,
    nope_out: Tensor,
    slots: Tensor,
    factor: float,
    rotation: _Rotation,
) -> None:
    """Stores rope [T, H, R], rotated, and nope [T, H, Dn] as keys and values in 8 bits."""
    scale = torch.full((), 1 / factor, dtype=torch.float32, device=rope.device)
    cos, sin = rotation.cos_sin_cache.chunk(2, -1)
    functional.rotate_and_cache(
        rope[:, :0],  # no queries: they would keep their dtype
        rope,
        nope,
        cos,
        sin,
        rope_out,
        None if nope is None else nope_out,
        slots,
        k_scale=scale,
        v_scale=None if nope is None else scale,
        **_tokens(rotation.positions, not rotation.is_neox),
    )


def _quantized_dtype(given: torch.dtype | None, outputs: tuple[Tensor | None, ...]) -> torch.dtype:
    if given is not None:
        return given
    return next((out.dtype for out in outputs if out is not None), torch.float8_e4m3fn)


def _or_empty(x: Tensor | None, rope: Tensor) -> Tensor:
    return rope[..., :0] if x is None else x


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
        # Sizes and arguments that change from call to call are symbols, which are no constants.
        R, rows = operator.index(R), operator.index(rows)
        theta, *numbers = (float.fromhex(float(number).hex()) for number in (theta, *factors))
        pair = _constant(q.device, R, theta, rows, *numbers)
    else:
        pair = _cache(R, theta, rows, *factors).pair(None, q)
    assert pair is not None
    return pair


def _constant(
    device: torch.device, R: int, theta: float, rows: int, *factors: float
) -> tuple[Tensor, Tensor] | None:
    """The table as a constant of the compiled graph: Dynamo cannot build it."""
    return _cache(R, theta, rows, *factors).pair(None, torch.empty(0, device=device))


# This is torch.compiler.assume_constant_result without its import of Dynamo, which takes a second.
_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


# A table of the default length takes 64 MiB for R = 128, and callers with dynamic scaling pass
# another theta for each length.
@functools.lru_cache(maxsize=16)
def _cache(R: int, theta: float, rows: int, *factors: float) -> TableCache:
    """The table of linear scaling, which has one factor, or of Llama 3.1's, which has four."""
    if whole_number("apply_rope", "max_seq_len", rows) < 1:
        raise ValueError(f"apply_rope: expected max_seq_len >= 1, got {rows}")
    scaling: dict[str, Any] = dict(zip(_FACTORS, factors, strict=False))
    scaling["rope_type"] = "linear" if len(factors) == 1 else "llama3"
    return TableCache(ScaledFrequencies(R, theta, scaling), rows)
