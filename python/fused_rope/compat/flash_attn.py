"""Drop-ins for flash-attn's rotary functions and module (flash_attn/layers/rotary.py).

    from fused_rope.compat.flash_attn import RotaryEmbedding, apply_rotary_emb

`apply_rotary` is that of flash_attn/ops/triton/rotary.py.

The arguments and numbers are the same. Differences: autograd records in-place calls, incoming
gradients are not overwritten, a row outside the table is an error, tokens past cu_seqlens[-1] are
copied, and headdim may exceed 256. Autograd forbids to record a call in place on a leaf that
requires grad: the leaf is overwritten, as in the original, and a copy with the gradient returned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..scaled_frequencies import ScaledFrequencies
from ..table import DeviceCopies
from ..table_cache import TableCache
from ..tracing import fake_mode_of, is_traced, outside_modes
from ..types import Layout
from ._tables import for_all_tokens

__all__ = [
    "ApplyRotaryEmb",
    "ApplyRotaryEmbKV_",
    "ApplyRotaryEmbQKV_",
    "RotaryEmbedding",
    "apply_rotary",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotates the first R elements of each head of x; `apply_rotary_emb` calls this.

    The original launches a kernel outside of autograd. This function is differentiable, and in
    place it refuses what autograd forbids.

    Args:
        conjugate: apply the inverse rotation, as a backward pass does.
        x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace: as in
            `apply_rotary_emb`.

    Returns:
        A tensor of x's shape and dtype, or x.

    Raises:
        ValueError, IndexError, RuntimeError: as `apply_rotary_emb`.

    Example:
        >>> angle = torch.arange(20.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> x = torch.randn(2, 16, 4, 64)
        >>> y = apply_rotary(x, angle.cos(), angle.sin(), 3)
        >>> x_again = apply_rotary(y, angle.cos(), angle.sin(), 3, conjugate=True)
    """
    options: dict[str, Any] = {
        "layout": "bshd" if cu_seqlens is None else "thd",
        "offset": seqlen_offsets,
        "cu_seqlens": cu_seqlens,
        "interleaved": interleaved,
        "inverse": conjugate,
    }
    if not inplace:
        return functional.rotate(x, cos, sin, **options)
    return _in_place(x, lambda x: functional.rotate_(x, cos, sin, **options))


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotates the first R elements of each head of x.

    Args:
        x: [B, S, H, D], or [T, H, D] with cu_seqlens; any float dtype.
        cos, sin: [M, P].
        interleaved: pairs are adjacent elements instead of halves.
        inplace: write the result to x.
        seqlen_offsets: added to the positions of each sequence: an int, or int32 or int64 [B] ([N]
            with cu_seqlens).
        cu_seqlens: int32 or int64 [N + 1], the start of each packed sequence.
        max_seqlen: no effect.

    Returns:
        A tensor of x's shape and dtype, or x.

    Raises:
        ValueError: shapes do not match, or the table has too few rows.
        TypeError: an unsupported dtype.
        IndexError: the table lacks a row that an offset asks for (on CUDA a device-side assertion).
        RuntimeError: inplace with an x that autograd forbids, such as a view of a leaf.

    Example:
        >>> angle = torch.arange(20.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> x = apply_rotary_emb(torch.randn(2, 16, 4, 64), angle.cos(), angle.sin())
    """
    return apply_rotary(
        x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace=inplace
    )


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """Rotates the first R elements of each head of x, rounded as in the original PyTorch function.

    Args:
        x: [B, S, H, D] or [S, H, D]; any float dtype.
        cos, sin: [S, P] or [B or 1, S, P]; a single row is that of all tokens.
        interleaved: pairs are adjacent elements instead of halves.

    Returns:
        A tensor of x's shape. As in the original, its dtype is the promotion of x's and the
        tables': with float32 tables a bfloat16 x gives a float32 result.

    Raises:
        ValueError: shapes do not match.
        TypeError: an unsupported dtype.

    Example:
        >>> angle = torch.arange(16.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> y = apply_rotary_emb_torch(torch.randn(2, 16, 4, 64), angle.cos(), angle.sin())
    """
    x = x.to(torch.promote_types(x.dtype, cos.dtype))
    if x.dim() in (3, 4):
        cos, sin = (for_all_tokens(table, x.shape[-3]) for table in (cos, sin))
    layout: Layout = "thd" if x.dim() == 3 else "bshd"
    return functional.rotate(x, cos, sin, layout=layout, interleaved=interleaved, precision="model")


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """x [..., D] with (-b, a) for each pair (a, b): of halves, or adjacent if interleaved.

    Example:
        >>> rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([-3., -4.,  1.,  2.])
    """
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotates the queries and keys of a packed tensor in place.

    Args:
        qkv: [B, S, 3, H, D], or [B, S, Hq + 2*Hk, D] with num_heads_q.
        cos, sin: [M, P].
        cos_k, sin_k: [M, P], separate tables of the keys.
        interleaved, seqlen_offsets: as in `apply_rotary_emb`.
        num_heads_q: Hq.

    Returns:
        qkv.

    Raises:
        ValueError, IndexError, RuntimeError: as `apply_rotary_emb`.

    Example:
        >>> angle = torch.arange(20.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> qkv = torch.randn(2, 16, 4 + 2 * 2, 64)
        >>> qkv = apply_rotary_emb_qkv_(qkv, angle.cos(), angle.sin(), num_heads_q=4)
    """
    options: dict[str, Any] = {"offset": seqlen_offsets, "interleaved": interleaved}

    def rotate_(qkv: Tensor) -> None:
        q, k = _queries_and_keys(qkv, num_heads_q)
        if cos_k is None and sin_k is None:
            functional.rotate_qk_(q, k, cos, sin, **options)
        else:
            functional.rotate_(q, cos, sin, **options)
            k_tables = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
            functional.rotate_(k, *k_tables, **options)

    return _in_place(qkv, rotate_)


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotates the keys of a packed tensor in place.

    Args:
        kv: [B, S, 2, H, D].
        cos, sin: [M, P].
        interleaved, seqlen_offsets: as in `apply_rotary_emb`.

    Returns:
        kv.

    Raises:
        ValueError, IndexError, RuntimeError: as `apply_rotary_emb`.

    Example:
        >>> angle = torch.arange(20.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> kv = apply_rotary_emb_kv_(torch.randn(2, 16, 2, 4, 64), angle.cos(), angle.sin())
    """
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(
            f"apply_rotary_emb_kv_: expected kv of [B, S, 2, H, D], got {list(kv.shape)}"
        )
    options: dict[str, Any] = {"offset": seqlen_offsets, "interleaved": interleaved}
    return _in_place(kv, lambda kv: functional.rotate_(kv[:, :, 0], cos, sin, **options))


class ApplyRotaryEmb:
    """`apply_rotary_emb` under the name of the original's autograd.Function."""

    apply = staticmethod(apply_rotary_emb)


class ApplyRotaryEmbQKV_:
    """`apply_rotary_emb_qkv_` under the name of the original's autograd.Function."""

    apply = staticmethod(apply_rotary_emb_qkv_)


class ApplyRotaryEmbKV_:
    """`apply_rotary_emb_kv_` under the name of the original's autograd.Function."""

    apply = staticmethod(apply_rotary_emb_kv_)


class RotaryEmbedding(torch.nn.Module):
    """A module with tables in the inputs' dtype that rotates queries and keys in place.

    With scale_base it computes XPos (Sun et al., arXiv:2212.10554): the scale of the queries' table
    grows with the position, that of the keys' table shrinks. Both are 1 in the middle of the call's
    rows; in the original, in the middle of the longest sequence so far. Attention scores do not
    depend on this if one call, or calls with the same max_seqlen, rotate queries and keys.

    Args:
        dim: R.
        base: base of the frequencies.
        interleaved: pairs are adjacent elements instead of halves.
        scale_base: XPos multiplies its scale once per this many tokens, such as 512; None for no
            scale.
        device: no effect: the tables are on the inputs' device.

    Raises:
        ValueError: dim is odd.

    Example:
        >>> rotary = RotaryEmbedding(64)
        >>> qkv = rotary(torch.randn(2, 16, 3, 4, 64))
        >>> q, kv = rotary(torch.randn(2, 1, 4, 64), torch.randn(2, 1, 2, 4, 64), seqlen_offset=16)
    """

    __prepare_scriptable__ = functional.refuse_scripting

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self._caches = {
            dtype: TableCache(ScaledFrequencies(dim, base, dtype=dtype), min_rows=1)
            for dtype in _DTYPES
        }
        self.inv_freq = self._caches[torch.float64].frequencies.inv_freq
        self._numbers = self.inv_freq.tolist()
        # XPos: cos, sin, cos_k, sin_k by number of rows and dtype.
        self._xpos: dict[tuple[int, torch.dtype], DeviceCopies] = {}
        # Rows, dtype and device of the last call.
        self._last = (0, torch.float32, torch.device("cpu"))

    @property
    def _tables(self) -> tuple[Tensor, ...]:
        """cos, sin, cos_k, sin_k of the last call, [M, P] each; none before the first."""
        rows, dtype, device = self._last
        return self._tables_for(None, torch.empty(0, dtype=dtype, device=device)) if rows else ()

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates queries and keys in place.

        Args:
            qkv: [B, S, 3, H, D], or [B, S, Hq + 2*Hk, D] with num_heads_q; with kv the queries
                [B, S, H, D].
            kv: [B, S, 2, H, D].
            seqlen_offset: the number of tokens before these: an int, or int32 or int64 [B].
            max_seqlen: rows that the tables must have; required with a tensor seqlen_offset.
            num_heads_q: Hq.

        Returns:
            qkv, or qkv and kv.

        Raises:
            ValueError, IndexError, RuntimeError: as `apply_rotary_emb`.
        """
        if qkv.is_nested:
            raise functional.nested_error("RotaryEmbedding")
        if qkv.dim() not in (4, 5):
            raise ValueError(
                "RotaryEmbedding: expected qkv of [B, S, 3, H, D] or 4 dimensions, got "
                f"{list(qkv.shape)}"
            )
        rows = max_seqlen
        if rows is None and not isinstance(seqlen_offset, Tensor):
            rows = qkv.shape[1] + seqlen_offset
        cos, sin, cos_k, sin_k = self._tables_for(rows, qkv)
        options: dict[str, Any] = {
            "interleaved": self.interleaved,
            "seqlen_offsets": seqlen_offset,
        }
        if kv is not None:
            q = apply_rotary_emb(qkv, cos, sin, inplace=True, **options)
            return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, **options)
        if self.scale_base is not None:
            options.update(cos_k=cos_k, sin_k=sin_k)
        return apply_rotary_emb_qkv_(qkv, cos, sin, num_heads_q=num_heads_q, **options)

    @property
    def _cos_cached(self) -> Tensor | None:
        """The table of cosines [M, P]; None before the first call. Some callers read it."""
        return self._cached(0)

    @property
    def _sin_cached(self) -> Tensor | None:
        return self._cached(1)

    @property
    def _cos_k_cached(self) -> Tensor | None:
        """The table of the keys with XPos; None without, as in the original."""
        return None if self.scale_base is None else self._cached(2)

    @property
    def _sin_k_cached(self) -> Tensor | None:
        return None if self.scale_base is None else self._cached(3)

    @property
    def _seq_len_cached(self) -> int:
        return self._tables[0].shape[0] if self._tables else 0

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes tables of at least seqlen rows, for callers that then read `_cos_cached`."""
        self._tables_for(seqlen, torch.empty(0, device=device, dtype=dtype))

    def _cached(self, index: int) -> Tensor | None:
        return self._tables[index] if self._tables else None

    def _tables_for(self, rows: int | None, x: Tensor) -> tuple[Tensor, ...]:
        """Tables of x's dtype and device; for None, with as many rows as calls so far needed."""
        if rows is None:
            rows = self._last[0]
            if rows == 0:
                raise ValueError("RotaryEmbedding: expected max_seqlen with a tensor seqlen_offset")
        if not is_traced(x):
            self._last = (max(rows, self._last[0]), x.dtype, x.device)
        if self.scale_base is not None:
            return self._xpos_tables(rows, self.scale_base, x)
        # The operator refuses other dtypes.
        cache = self._caches.get(x.dtype, self._caches[torch.float32])
        pair = cache.pair(rows, x)
        assert pair is not None
        return (*pair, *pair)

    def _xpos_tables(self, rows: int, scale_base: float, x: Tensor) -> tuple[Tensor, ...]:
        """Each number of rows has its own tables, since the scale is 1 in the middle row."""
        if is_traced(x):
            with fake_mode_of(x):
                tables = self._xpos_rows(rows, scale_base, x.dtype)
                return tuple(table.to(x.device) for table in tables)
        copies = self._xpos.get((rows, x.dtype))
        if copies is None:
            with outside_modes():
                copies = DeviceCopies(*self._xpos_rows(rows, scale_base, x.dtype))
            if len(self._xpos) >= _XPOS_TABLES:
                self._xpos = {}
            self._xpos[rows, x.dtype] = copies
        return copies.on(x.device)

    def _xpos_rows(self, rows: int, scale_base: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
        inv_freq = torch.tensor(self._numbers, dtype=torch.float64, device="cpu")
        element = torch.arange(0, self.dim, 2, dtype=torch.float64, device="cpu")
        row = torch.arange(rows, dtype=torch.float64, device="cpu")
        angle = row[:, None] * inv_freq  # `cos_sin_table` would keep the rows of a trace
        cos, sin = angle.cos(), angle.sin()
        scale = (element + 0.4 * self.dim) / (1.4 * self.dim)
        scale = scale ** ((row - rows // 2) / scale_base)[:, None]
        tables = (cos * scale, sin * scale, cos / scale, sin / scale)
        return tuple(table.to(dtype) for table in tables)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_xpos": {}}


# Bounds the XPos tables that are kept: each step of a decode loop has another length.
_XPOS_TABLES = 8
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _in_place(x: Tensor, rotate_: Callable[[Tensor], object]) -> Tensor:
    """Calls rotate_ on x, or for a leaf that requires grad on a copy, and returns what it rotated.

    The leaf then gets the values of the copy.
    """
    if not (x.is_leaf and x.requires_grad and torch.is_grad_enabled()):
        rotate_(x)
        return x
    rotated = x.clone()
    rotate_(rotated)
    with torch.no_grad():
        x.copy_(rotated)
    return rotated


def _queries_and_keys(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor]:
    """The views [B, S, H, D] of queries and keys in a packed tensor."""
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        return qkv[:, :, 0], qkv[:, :, 1]
    if qkv.dim() == 4 and num_heads_q is not None:
        keys_and_values = qkv.shape[2] - num_heads_q
        if keys_and_values >= 0 and keys_and_values % 2 == 0:
            end = num_heads_q + keys_and_values // 2
            return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q:end]
    raise ValueError(
        "apply_rotary_emb_qkv_: expected qkv of [B, S, 3, H, D], or of [B, S, Hq + 2*Hk, D] with "
        f"num_heads_q=Hq, got {list(qkv.shape)} and num_heads_q={num_heads_q}"
    )
