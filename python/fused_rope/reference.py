"""The operators in pure PyTorch: read this first.

A rotary embedding rotates the pairs of elements of each token by angles from one row of a table. It
has four steps: `table_rows` (the row that a token reads, or that it is copied unchanged), `gather`
(cosines and sines of those rows), `split_pairs` (the two elements of each pair) and `rotate_heads`
(the formula).

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

from .types import Layout, Precision, TableLayout

__all__ = ["register_fallback", "rotate", "rotate_", "rotate_qk", "rotate_qk_"]

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
        _refuse_grad("rotate", x, cos, sin)
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
        _refuse_grad("rotate_qk", q, k, cos, sin)
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
        starts = cu_seqlens.long()
        padding = token >= starts[-1]
        sequence = torch.searchsorted(starts[1:-1], token, right=True)
        token = token - starts[sequence]
    if isinstance(offset, Tensor):
        offset = offset.long()
        offset = offset.unsqueeze(-1) if cu_seqlens is None else offset[sequence]

    if positions is None:
        row = token.unsqueeze(0)
        skip = padding.unsqueeze(0)
    elif axes is None:
        row = torch.atleast_2d(positions.long())
        skip = padding | (row == -1)
    else:
        row = torch.stack([torch.atleast_2d(positions[axis].long()) for axis in axes], dim=-1)
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
                f"expected cos with at least offset + S = {offset} + {S} rows, got {M}"
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
    # A token without a row repeats the write of another: to drop it would synchronize.
    kept = rows != -1
    other, any_kept = kept.int().argmax(), kept.any()
    rows = torch.where(any_kept, torch.where(kept, rows, rows[other]), 0)
    values = torch.where(kept[:, None, None], tokens, tokens[other])
    return out.index_copy_(0, rows, torch.where(any_kept, values, out[0]))


def _refuse_grad(name: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(f"{name}: out= does not support autograd, but an input requires grad")


_library: torch.library.Library | None = None


def register_fallback() -> None:
    """Registers the reference for devices without a kernel: XPU, MPS, CUDA in a CPU-only build."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("fused_rope", "IMPL")
    for form in (rotate, rotate_, rotate_qk, rotate_qk_):
        _library.impl(form.__name__, _kernel(form), "CompositeExplicitAutograd")
    for form in (rotate, rotate_qk):
        _library.impl(f"{form.__name__}_out", _kernel(form, out=True), "CompositeExplicitAutograd")


def _kernel(form: Callable[..., Any], *, out: bool = False) -> Callable[..., Any]:
    """`form` with the positional arguments of its operator's schema."""
    n = 2 if form in (rotate_qk, rotate_qk_) else 1
    operator = getattr(torch.ops.fused_rope, form.__name__ + "_out" * out)
    tensors = 2 * n + 2 if out else n + 2
    names = [argument.name for argument in operator.default._schema.arguments[tensors:]]

    def kernel(*args: Any) -> Any:
        if any(isinstance(a, Tensor) and a.layout != torch.strided for a in args):
            name = form.__name__ + "_out" * out
            raise TypeError(f"{name}: expected strided tensors, got a sparse one")
        shapes = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
        inputs, outs = args[: n + 2], args[n + 2 : tensors]
        options = dict(zip(names, args[tensors:], strict=False))
        offsets = options.pop("offsets", None)
        if offsets is not None:
            options["offset"] = offsets
        if out:
            options["out"] = outs if n == 2 else outs[0]
        _warn_of_cuda(inputs[0].device.type)
        with torch.no_grad():
            operator(*shapes)  # the Meta kernel checks the arguments
            result = form(*inputs, **options)
        if out or form in (rotate_, rotate_qk_):
            return None
        if n == 2:
            return tuple(map(_with_strides_of, result, inputs))
        return _with_strides_of(result, inputs[0])

    return kernel


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
            stacklevel=3,
        )
