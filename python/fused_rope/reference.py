"""The operators in pure PyTorch: read this first.

A rotary embedding rotates the pairs of elements of each token by angles from one row of a table. It
has four steps: `table_rows` (the row that a token reads, or that it is copied unchanged), `gather`
(cosines and sines of those rows), `split_pairs` (the two elements of each pair) and `rotate_heads`
(the formula). `rms_norm` is the norm that comes before or after it in `norm_rotate`.

The functions have the arguments of their namesakes in `fused_rope`, run on any device without
synchronizing, and are differentiable by PyTorch's own rules. On the CPU their results are bitwise
identical to the operators'. They are a baseline for benchmarks, and the fallback on devices without
a kernel (`register_fallback`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .types import Cast, Layout, Precision, TableLayout

__all__ = [
    "norm_rotate",
    "norm_rotate_",
    "norm_rotate_qk",
    "norm_rotate_qk_",
    "register_fallback",
    "rotate",
    "rotate_",
    "rotate_and_cache",
    "rotate_qk",
    "rotate_qk_",
]

_TRANSPOSED = {"bshd": (0, 0), "bhsd": (1, 2), "sbhd": (0, 1)}


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: Layout = "bshd",
    table_layout: TableLayout = "half",
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    axes: Sequence[int] | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    blocks: int = 1,
    inverse: bool = False,
    precision: Precision = "fp32",
    out: Tensor | None = None,
    out_rows: Tensor | None = None,
) -> Tensor:
    """`fused_rope.rotate` in PyTorch; that function documents every argument.

    Args:
        x: [B, S, H, D] in the order that `layout` names, or [T, H, D] for "thd"; any float dtype.
        cos, sin: [M, P] shared rows, [B or 1, S, P] per token, or [B or 1, S, H, P] per token and
            head; 2P columns if `table_layout` is "tiled" or "repeated".

    Returns:
        A tensor of x's shape and dtype, or `out`.

    Raises:
        ValueError: the shared table has too few rows for the tokens.
        IndexError, RuntimeError: the table lacks the row of a position (PyTorch's own error; on
            CUDA a device-side assertion).
        RuntimeError: `out` with inputs that require grad.

    Example:
        >>> angle = torch.arange(5.0)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
        >>> rotate(torch.randn(2, 5, 3, 8), angle.cos(), angle.sin()).shape
        torch.Size([2, 5, 3, 8])
    """
    if out is not None:
        _refuse_grad("rotate", "out=", x, cos, sin)
    (y,) = _rotated(
        (x,),
        cos,
        sin,
        layout=layout,
        table_layout=table_layout,
        positions=positions,
        offset=offset,
        cu_seqlens=cu_seqlens,
        axes=axes,
        rotary_offset=rotary_offset,
        interleaved=interleaved,
        blocks=blocks,
        inverse=inverse,
        precision=precision,
    )
    return y if out is None else _write(out, y, layout, out_rows)


def rotate_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: Layout = "bshd",
    out: tuple[Tensor, Tensor] | None = None,
    out_rows: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`fused_rope.rotate_qk` in PyTorch. See `rotate`.

    Example:
        >>> angle = torch.arange(5.0)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
        >>> q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8)
        >>> q, k = rotate_qk(q, k, angle.cos(), angle.sin())
    """
    if out is not None:
        _refuse_grad("rotate_qk", "out=", q, k, cos, sin)
    y, z = _rotated((q, k), cos, sin, layout=layout, **options)
    if out is None:
        return y, z
    return _write(out[0], y, layout), _write(out[1], z, layout, out_rows)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Tensor:
    """`fused_rope.rotate_` in PyTorch: rotates x in place and returns it. See `rotate`.

    Example:
        >>> angle = torch.arange(5.0)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
        >>> x = rotate_(torch.randn(2, 5, 3, 8), angle.cos(), angle.sin())
    """
    (y,) = _rotated((x,), cos, sin, **options)
    return _overwrite(x, y, cos, **options)


def rotate_qk_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """`fused_rope.rotate_qk_` in PyTorch: rotates q and k in place. See `rotate`.

    Example:
        >>> angle = torch.arange(5.0)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
        >>> q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8)
        >>> q, k = rotate_qk_(q, k, angle.cos(), angle.sin())
    """
    y, z = _rotated((q, k), cos, sin, **options)
    return _overwrite(q, y, cos, **options), _overwrite(k, z, cos, **options)


def norm_rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None = None,
    *,
    layout: Layout = "bshd",
    out: Tensor | None = None,
    out_rows: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`fused_rope.norm_rotate` in PyTorch; that function documents every argument. See `rotate`.

    Example:
        >>> angle = torch.arange(5.0)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
        >>> x, weight = torch.randn(2, 5, 3, 8), torch.ones(8)
        >>> norm_rotate(x, angle.cos(), angle.sin(), weight, eps=1e-6).shape
        torch.Size([2, 5, 3, 8])
    """
    if out is not None:
        _refuse_grad("norm_rotate", "out=", x, cos, sin, weight)
    (y,) = _norm_rotated((x,), cos, sin, (weight,), layout=layout, **options)
    return y if out is None else _write(out, y, layout, out_rows)


def norm_rotate_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    layout: Layout = "bshd",
    out: tuple[Tensor, Tensor] | None = None,
    out_rows: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`fused_rope.norm_rotate_qk` in PyTorch. See `norm_rotate`.

    Example:
        >>> angle = torch.arange(5.0)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
        >>> q, k, weight = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8), torch.ones(8)
        >>> q, k = norm_rotate_qk(q, k, angle.cos(), angle.sin(), weight, weight, eps=1e-6)
    """
    if out is not None:
        _refuse_grad("norm_rotate_qk", "out=", q, k, cos, sin, q_weight, k_weight)
    weights = (q_weight, k_weight)
    y, z = _norm_rotated((q, k), cos, sin, weights, layout=layout, **options)
    if out is None:
        return y, z
    return _write(out[0], y, layout), _write(out[1], z, layout, out_rows)


def norm_rotate_(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, **options: Any
) -> Tensor:
    """`fused_rope.norm_rotate_` in PyTorch: writes the result to x and returns it.

    Example:
        >>> angle = torch.arange(5.0)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
        >>> x = norm_rotate_(torch.randn(2, 5, 3, 8), angle.cos(), angle.sin(), eps=1e-6)
    """
    _refuse_grad("norm_rotate_", "in place", x, cos, sin, weight)
    (y,) = _norm_rotated((x,), cos, sin, (weight,), **options)
    return x.copy_(y)


def norm_rotate_qk_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`fused_rope.norm_rotate_qk_` in PyTorch: writes the results to q and k and returns them.

    Example:
        >>> angle = torch.arange(5.0)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
        >>> q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8)
        >>> q, k = norm_rotate_qk_(q, k, angle.cos(), angle.sin(), eps=1e-6)
    """
    _refuse_grad("norm_rotate_qk_", "in place", q, k, cos, sin, q_weight, k_weight)
    y, z = _norm_rotated((q, k), cos, sin, (q_weight, k_weight), **options)
    return q.copy_(y), k.copy_(z)


def rotate_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float | None = None,
    zero_centered: bool = False,
    cast: Cast = "never",
    after: bool = False,
    layout: Layout = "bshd",
    **options: Any,
) -> Tensor:
    """`fused_rope.rotate_and_cache` in PyTorch; that function documents every argument.

    Example:
        >>> angle = torch.arange(5.0)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
        >>> q, k, v = torch.randn(3, 2, 5, 1, 8).unbind()
        >>> k_cache, v_cache = torch.zeros(2, 3, 4, 1, 8).unbind()  # 3 pages of 4 tokens
        >>> slots = torch.randperm(12)[:10].view(2, 5)
        >>> q = rotate_and_cache(q, k, v, angle.cos(), angle.sin(), k_cache, v_cache, slots)
    """
    _refuse_grad("rotate_and_cache", "a cache", q, k, v, cos, sin, q_weight, k_weight)
    if eps is None:
        y, z = _rotated((q, k), cos, sin, layout=layout, **options)
    else:
        options |= {"eps": eps, "zero_centered": zero_centered, "cast": cast, "after": after}
        y, z = _norm_rotated((q, k), cos, sin, (q_weight, k_weight), layout=layout, **options)
    store(k_cache, z, slots, k_scale, layout)
    if v is not None and v_cache is not None:
        store(v_cache, v, slots, v_scale, layout)
    if k_out is not None:
        k_out.copy_(z)
    return y if q_out is None else q_out.copy_(y)


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., H, D] in 8 bits: x / scale, saturated and rounded to nearest even."""
    y = x.float() / (scale if scale.dim() == 0 else scale[:, None])
    if dtype == torch.int8:
        return y.nan_to_num(0.0).clamp(-128, 127).round().to(dtype)
    largest = torch.finfo(dtype).max
    return y.clamp(-largest, largest).to(dtype)


def store(cache: Tensor, x: Tensor, slots: Tensor, scale: Tensor | None, layout: str) -> None:
    """Writes each token of x to its slot of the cache, or nowhere if that is -1."""
    tokens = _as_bshd(x, layout).flatten(0, 1)
    rows = slots.flatten().long()
    if rows.numel() == 0 or cache.numel() == 0:
        return
    if scale is not None:
        # Indexing does not support all 8-bit floats.
        tokens = quantize(tokens, scale, cache.dtype).view(torch.uint8)
        cache = cache.view(torch.uint8)
    paged = cache.dim() == 4
    tokens, rows = _writes(tokens, rows, cache[0, 0] if paged else cache[0])
    rows = torch.where(rows < 0, torch.iinfo(torch.int64).max, rows)  # no index from the end
    page_size = cache.shape[1]
    cache.index_put_((rows // page_size, rows % page_size) if paged else (rows,), tokens)


def norm_rotate_qk_backward(
    grads: tuple[Tensor | None, ...],
    tensors: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    weights: tuple[Tensor | None, ...],
    **options: Any,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradients of q and k, and those of their weights, from the gradients of the results.

    One of each for `norm_rotate`. None where there is no gradient or no weight.
    """
    tensor_grads: list[Tensor | None] = []
    weight_grads: list[Tensor | None] = []
    for grad, x, weight in zip(grads, tensors, weights, strict=True):
        if grad is None:
            tensor_grads.append(None)
            weight_grads.append(None)
            continue
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, weight) if t is not None]
            y = norm_rotate(leaves[0], cos, sin, *leaves[1:], **options)
        found = torch.autograd.grad(y, leaves, grad)
        tensor_grads.append(found[0])
        weight_grads.append(found[1] if weight is not None else None)
    return tensor_grads, weight_grads


def table_rows(
    S: int,
    *,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    axes: Sequence[int] | None = None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The row that each token reads, int64, and whether it is copied unchanged instead, bool.

    Both are [B or 1, S]. With axes each pair has its own row: [B or 1, S, P].
    """
    token = torch.arange(S, device=device)
    padding = torch.zeros(S, dtype=torch.bool, device=device)
    if cu_seqlens is not None:
        starts = cu_seqlens.long().contiguous()
        # Without sequences every token is padding.
        padding = token >= (starts[-1] if starts.shape[0] > 1 else 0)
        sequence = torch.searchsorted(starts[1:-1], token, right=True)
        token = token - starts[sequence]
    if isinstance(offset, Tensor):
        offset = offset.long()
        if cu_seqlens is None:
            offset = offset.unsqueeze(-1)
        else:
            # One more for the padding of a batch without sequences.
            offset = torch.nn.functional.pad(offset, (0, 1))[sequence]

    if positions is None:
        row = token.unsqueeze(0)
        skip = padding.unsqueeze(0)
    elif axes is None:
        row = torch.atleast_2d(positions.long())
        skip = padding | (row == -1)
    else:
        by_pair = [torch.atleast_2d(positions[axis].long()) for axis in axes]
        none = torch.atleast_2d(positions[0].long()).unsqueeze(-1)[..., :0]
        row = torch.stack(by_pair, dim=-1) if by_pair else none
        skip = padding.unsqueeze(-1) | (row == -1)
        offset = offset.unsqueeze(-1) if isinstance(offset, Tensor) else offset
    return torch.where(skip, 0, row + offset), skip


def half_width(table: Tensor, table_layout: str) -> Tensor:
    """A view [..., P] of a table [..., P or 2P]: the columns that are read, one per pair."""
    if table_layout == "half":
        return table
    if table.shape[-1] % 2 or table_layout not in ("tiled", "repeated"):
        raise ValueError(
            "expected table_layout half, tiled or repeated, and an even number of columns for the "
            f"latter two, got {table_layout!r} and cos {list(table.shape)}"
        )
    return table[..., ::2] if table_layout == "repeated" else table.chunk(2, -1)[0]


def gather(cos: Tensor, sin: Tensor, S: int, **rows: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """cos and sin of S tokens, [B or 1, S, H or 1, P], and which tokens are copied unchanged.

    Consecutive rows are a slice, not a gather.
    """
    if cos.dim() == 4:
        return cos, sin, None
    if cos.dim() == 3:
        return cos.unsqueeze(2), sin.unsqueeze(2), None

    def read(table: Tensor) -> Tensor:
        # table[row] would count a negative row from the end; index_select and gather refuse it.
        if row.dim() == 3:
            return table.gather(0, row.flatten(0, 1)).view(row.shape).unsqueeze(2)
        return table.index_select(0, row.flatten()).view(*row.shape, 1, table.shape[1])

    offset = rows.get("offset", 0)
    consecutive = rows.get("positions") is None and rows.get("cu_seqlens") is None
    if consecutive and not isinstance(offset, Tensor):
        M = cos.shape[0]
        if not 0 <= offset <= M - S:
            raise ValueError(
                f"cos has {M} rows, but offset ({offset}) + S ({S}) = {offset + S} are needed"
            )
        here = slice(offset, offset + S)
        return cos[here].unsqueeze(1), sin[here].unsqueeze(1), None
    row, skip = table_rows(S, device=cos.device, **rows)
    return read(cos), read(sin), skip.unsqueeze(2) if skip.dim() == 3 else skip[..., None, None]


def split_pairs(x: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """The two elements of each pair of x [..., R], each [..., P/d, d]: pair j is [j // d, j % d].

    d is the distance between the two elements of a pair: P (half), 1 (interleaved) or P/blocks
    (halves of each block).
    """
    first, second = x.unflatten(-1, (x.shape[-1] // (2 * d), 2, d)).unbind(-2)
    return first, second


def rotate_heads(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    skip: Tensor | None,
    *,
    rotary_offset: int = 0,
    interleaved: bool = False,
    blocks: int = 1,
    inverse: bool = False,
    precision: Precision = "fp32",
) -> Tensor:
    """The formula, on x [B, S, H, D] with tables that broadcast to [B, S, H, P]."""
    P = cos.shape[-1]
    if P == 0:
        return x.clone()
    d = 1 if interleaved else P // blocks
    before, span, after = x.split((rotary_offset, 2 * P, x.shape[-1] - rotary_offset - 2 * P), -1)
    a, b = split_pairs(span, d)

    # "fp32" rounds once, at the end; "model" rounds the table, each product and their sum.
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype = x.dtype if precision == "model" else exact
    c, s = (t.to(dtype).unflatten(-1, (P // d, d)) for t in (cos, -sin if inverse else sin))
    wide_a, wide_b = a.to(dtype), b.to(dtype)
    first = (wide_a * c - wide_b * s).to(x.dtype)
    second = (wide_b * c + wide_a * s).to(x.dtype)

    if skip is not None:
        skip = skip.unflatten(-1, (P // d, d)) if skip.shape[-1] == P else skip.unsqueeze(-1)
        first, second = torch.where(skip, a, first), torch.where(skip, b, second)
    return torch.cat((before, torch.stack((first, second), -2).flatten(-3), after), -1)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    zero_centered: bool = False,
    cast: Cast = "never",
    dtype: torch.dtype,
) -> Tensor:
    """The norm of each head of x [..., D], of `dtype`, or wider if cast is "never"."""
    wide = x.double() if dtype == torch.float64 else x.float()
    mean = sum_heads(wide * wide) * (1 / max(x.shape[-1], 1))
    y = wide * (mean + eps).rsqrt()  # on the CPU, a correctly rounded root and reciprocal
    if cast == "before":
        y = y.to(dtype)
    if weight is not None:
        factor = weight.to(wide.dtype)
        y = y.to(wide.dtype) * (1 + factor if zero_centered else factor)
    return y if cast == "never" else y.to(dtype)


def sum_heads(terms: Tensor) -> Tensor:
    """The sum of the last dimension D, kept with size 1, by a tree that only D determines.

    Each term is added to the one half of D away; then neighbors are added until one sum is left.
    """
    D = terms.shape[-1]
    first, second = terms.split((D - D // 2, D // 2), -1)
    sums = first + torch.nn.functional.pad(second, (0, D % 2))
    leaves = 1 << max(sums.shape[-1] - 1, 0).bit_length()
    sums = torch.nn.functional.pad(sums, (0, leaves - sums.shape[-1]))
    while sums.shape[-1] > 1:
        sums = sums[..., ::2] + sums[..., 1::2]
    return sums


def _norm_rotated(
    tensors: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    weights: tuple[Tensor | None, ...],
    *,
    eps: float,
    zero_centered: bool = False,
    cast: Cast = "never",
    after: bool = False,
    **rotation: Any,
) -> tuple[Tensor, ...]:
    """The normalized and rotated `tensors`, which have the same tokens."""

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        return rms_norm(x, weight, eps=eps, zero_centered=zero_centered, cast=cast, dtype=dtype)

    dtype = tensors[0].dtype
    results = tensors
    if after:
        # Without a cast, nothing is rounded between the rotation and the norm.
        wide = dtype if cast != "never" or dtype == torch.float64 else torch.float32
        results = _rotated(tuple(x.to(wide) for x in tensors), cos, sin, **rotation)
    results = tuple(norm(x, weight) for x, weight in zip(results, weights, strict=True))
    if not after:
        results = _rotated(results, cos, sin, **rotation)
    return tuple(y.to(dtype) for y in results)


def _rotated(
    tensors: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    *,
    layout: Layout = "bshd",
    table_layout: TableLayout = "half",
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    axes: Sequence[int] | None = None,
    **pairing: Any,
) -> tuple[Tensor, ...]:
    """The rotated `tensors`, which have the same tokens."""
    views = [_as_bshd(x, layout) for x in tensors]
    tables = gather(
        half_width(cos, table_layout),
        half_width(sin, table_layout),
        views[0].shape[1],
        positions=positions,
        offset=offset,
        cu_seqlens=cu_seqlens,
        axes=axes,
    )
    return tuple(_from_bshd(rotate_heads(v, *tables, **pairing), layout) for v in views)


def _as_bshd(x: Tensor, layout: str) -> Tensor:
    """x as a view [B, S, H, D]; packed tokens become one sequence."""
    return x.unsqueeze(0) if layout == "thd" else x.transpose(*_TRANSPOSED[layout])


def _from_bshd(x: Tensor, layout: str) -> Tensor:
    return x.squeeze(0) if layout == "thd" else x.transpose(*_TRANSPOSED[layout])


def _overwrite(
    x: Tensor,
    y: Tensor,
    cos: Tensor,
    *,
    rotary_offset: int = 0,
    table_layout: TableLayout = "half",
    **_: Any,
) -> Tensor:
    """Copies the rotated elements of y to x."""
    R = 2 * half_width(cos, table_layout).shape[-1]
    x.narrow(-1, rotary_offset, R).copy_(y.narrow(-1, rotary_offset, R))
    return x


def _write(out: Tensor, y: Tensor, layout: str, out_rows: Tensor | None = None) -> Tensor:
    """out = y, or, token by token, out[out_rows[i]] = y[i] wherever out_rows[i] is not -1."""
    if out_rows is None:
        return out.copy_(y)
    tokens = _as_bshd(y, layout).flatten(0, 1)
    rows = out_rows.flatten().long()
    if rows.numel() == 0:
        return out
    values, rows = _writes(tokens, rows, out[0])
    return out.index_copy_(0, rows, values)


def _writes(tokens: Tensor, rows: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens to write and their rows, without a row -1; row 0 holds `first`.

    A token with row -1 repeats the write of another: to drop it would synchronize.
    """
    kept = rows != -1
    other, any_kept = kept.int().argmax(), kept.any()
    rows = torch.where(any_kept, torch.where(kept, rows, rows[other]), 0)
    values = torch.where(kept[:, None, None], tokens, tokens[other])
    return torch.where(any_kept, values, first), rows


def _refuse_grad(name: str, form: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{name}: {form} does not support autograd, but an input requires grad")


_library: torch.library.Library | None = None


def register_fallback() -> None:
    """Registers the reference for devices without a kernel: XPU, MPS, CUDA in a CPU-only build."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("fused_rope", "IMPL")
    for form in (rotate, rotate_qk, norm_rotate, norm_rotate_qk):
        name = form.__name__
        in_place = globals()[f"{name}_"]
        _library.impl(name, _kernel(form), "CompositeExplicitAutograd")
        _library.impl(f"{name}_", _kernel(in_place), "CompositeExplicitAutograd")
        _library.impl(f"{name}_out", _kernel(form, out=True), "CompositeExplicitAutograd")
    _library.impl("norm_rotate_qk_backward", _backward_kernel, "CompositeExplicitAutograd")
    _library.impl("rotate_and_cache", _cache_kernel, "CompositeExplicitAutograd")


def _kernel(form: Callable[..., Any], *, out: bool = False) -> Callable[..., Any]:
    """`form` with the arguments of its operator's schema."""
    n = 2 if "_qk" in form.__name__ else 1
    operator = getattr(torch.ops.fused_rope, form.__name__ + "_out" * out)
    tensors = 2 * n + 2 if out else n + 2
    names = [argument.name for argument in operator.default._schema.arguments[tensors:]]

    def kernel(*args: Any, **norm: Any) -> Any:
        inputs, outs = args[: n + 2], args[n + 2 : tensors]
        options = dict(zip(names, args[tensors:], strict=False))
        _check(operator, args, norm)
        if out:
            options["out"] = outs if n == 2 else outs[0]
        with torch.no_grad():
            result = form(*inputs, **_one_offset(options), **norm)
        if out or form.__name__.endswith("_"):
            return None
        if n == 2:
            return tuple(map(_with_strides_of, result, inputs))
        return _with_strides_of(result, inputs[0])

    return kernel


def _cache_kernel(*args: Any, **norm: Any) -> None:
    """`rotate_and_cache` with the arguments of its operator's schema."""
    operator = torch.ops.fused_rope.rotate_and_cache
    _check(operator, args, norm)
    names = [argument.name for argument in operator.default._schema.arguments]
    options = dict(zip(names, args, strict=False))
    with torch.no_grad():
        rotate_and_cache(**_one_offset(options), **norm)


def _backward_kernel(*args: Any, output_mask: Sequence[bool], **norm: Any) -> tuple[Any, ...]:
    """`norm_rotate_qk_backward` with the arguments of its operator's schema."""
    operator = torch.ops.fused_rope.norm_rotate_qk_backward
    _check(operator, args, norm | {"output_mask": output_mask})
    names = [argument.name for argument in operator.default._schema.arguments]
    options = dict(zip(names, args, strict=False))
    grads, tensors, weights = (
        (options.pop(first, None), options.pop(second, None))
        for first, second in (("q_grad", "k_grad"), ("q", "k"), ("q_weight", "k_weight"))
    )
    cos, sin = options.pop("cos"), options.pop("sin")
    count = 1 if tensors[1] is None else 2
    results: tuple[list[Tensor | None], ...] = norm_rotate_qk_backward(
        grads[:count], tensors[:count], cos, sin, weights[:count], **_one_offset(options), **norm
    )
    for found, like in zip(results, (tensors, weights), strict=True):
        pairs = zip(found, like[:count], strict=True)
        found[:] = [None if g is None else _with_strides_of(g, x) for g, x in pairs]
    flat = [g for found in results for g in (*found, None)[:2]]
    return tuple(g if asked else None for g, asked in zip(flat, output_mask, strict=True))


def _check(operator: Any, args: Sequence[Any], norm: dict[str, Any]) -> None:
    """Raises what the Meta kernel raises for these arguments, and warns of CUDA tensors."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if any(t.layout != torch.strided for t in tensors):
        name = operator.__name__
        raise TypeError(f"{name}: expected strided tensors, got a sparse one")
    _warn_of_cuda(tensors[0].device.type)
    with torch.no_grad():
        operator(*(a.to("meta") if isinstance(a, Tensor) else a for a in args), **norm)


def _one_offset(options: dict[str, Any]) -> dict[str, Any]:
    """The options with a tensor of offsets as offset."""
    offsets = options.pop("offsets", None)
    return options if offsets is None else options | {"offset": offsets}


def _with_strides_of(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory order that the operator promises: x's if x is dense, else row-major."""
    if not torch.ops.aten.is_non_overlapping_and_dense(x):
        return y.contiguous()
    like = torch.empty_like(x)
    return y if y.stride() == like.stride() else like.copy_(y)


@functools.cache
def _warn_of_cuda(device_type: str) -> None:
    if device_type == "cuda":
        warnings.warn(
            "fused_rope was built without CUDA kernels: CUDA tensors use the PyTorch reference",
            stacklevel=4,
        )
