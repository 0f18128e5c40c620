"""The operators as typed functions, and the table that they read.

The docstrings, comments and messages of the package write shapes with these letters:

    B  batch                               D  head_dim
    S  sequence length                     R  rotary_dim, the rotated elements of a head
    T  tokens of a packed batch            P  pairs, R/2
    N  sequences in a packed batch         o  rotary_offset, the first rotated element
    H  heads; Hq of queries, Hk of keys    M  table rows
    A  position axes of M-RoPE

`fused_rope.reference` implements the same functions in pure PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import TransformType

from . import _C, _functorch
from .types import Cast, Layout, Precision, TableLayout

_ops = torch.ops.fused_rope
_entries = vars(_C)
_ROW_MAJOR = torch.contiguous_format
_in_dynamo = torch.compiler.is_dynamo_compiling
# fused_rope.distributed sets this: it adapts the other arguments of a call to DTensors.
adapt_to_dtensors: Callable[..., Any] | None = None


class Options(NamedTuple):
    """The options of an operator, in its schema's order. A call may omit the last ones."""

    layout: Layout = "bshd"
    axes: Sequence[int] | None = None
    rotary_offset: int = 0
    interleaved: bool = False
    blocks: int = 1
    inverse: bool = False
    precision: Precision = "fp32"
    table_layout: TableLayout = "half"


# Keyword-only in the operators' schemas; after the fields of Options in a call.
NORM_OPTIONS = ("eps", "zero_centered", "cast", "after")


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
    """Rotates the pairs of elements of each head by the angle of its token.

    This is the rotary position embedding of RoFormer (arXiv:2104.09864). For pair j of a token that
    reads table row m, with c = cos[m, j] and s = sin[m, j] (negated if `inverse`)::

        out[a] = x[a] * c - x[b] * s
        out[b] = x[b] * c + x[a] * s

    where b = a + P (the default, as in Llama), b = a + 1 (`interleaved`, as in GPT-J) or
    b = a + P / blocks. Elements outside [rotary_offset, rotary_offset + R) are copied bit for bit.
    With the default pairs, R = D and one table row per token, this is the fused form of::

        c, s = (torch.cat([t, t], -1)[None, :, None] for t in (cos, sin))
        x1, x2 = x.chunk(2, -1)
        out = x * c + torch.cat([-x2, x1], -1) * s

    Args:
        x: float16, bfloat16, float32 or float64, [B, S, H, D] in the order that `layout` names, or
            [T, H, D]. Any strides.
        cos, sin: tables of one floating dtype, any strides: shared [M, P], per token [B or 1, S, P]
            or per token and head [B or 1, S, H, P]; 2P columns if `table_layout` says so. R is 2P.
        layout: "bshd", "bhsd", "sbhd" (4-D) or "thd" (packed sequences, 3-D).
        table_layout: the columns of cos and sin. "half": P, one for each pair. "tiled": 2P, the
            second half a copy of the first (Hugging Face's cat(freqs, freqs)). "repeated": 2P,
            each number twice in succession (repeat_interleave, as in diffusers). The copies are
            not read: they have no effect, and their gradient is 0.
        positions: the row of a shared table that each token reads, int32 or int64, [S], [1, S] or
            [B, S] ([T] or [1, T] for "thd"), after a leading dimension A if `axes` is given. -1
            copies the token unchanged. None: token i reads row i.
        offset: added to every position: an int, or an int32 or int64 tensor [B] ([N] with
            `cu_seqlens`).
        cu_seqlens: int32 or int64 [N + 1], the start of each packed sequence; token indices count
            from there. Tokens past cu_seqlens[-1] are padding and copied unchanged.
        axes: P ints: pair j reads its row from positions[axes[j]] (M-RoPE; see `mrope_axes`).
        rotary_offset: the first rotated element.
        interleaved: the two elements of a pair are adjacent.
        blocks: pairs are halves of each of `blocks` equal spans of the rotated elements; divides P.
        inverse: apply the inverse rotation.
        precision: "fp32" computes in float32 (float64 for float64) and rounds once; "model" rounds
            the table, the products and the sum to x's dtype, as eager PyTorch does.
        out: memory for the result, of x's shape and dtype, any strides. Does not support autograd.
        out_rows: int32 or int64 [B, S] or [T]: `out` is [rows, H, D], and token i is written to row
            out_rows[i], or nowhere if that is -1.

    Returns:
        A tensor of x's shape and dtype, or `out`. Differentiable in x, cos and sin.

    Raises:
        ValueError: shapes, devices or values do not match, or the table lacks a row that the host
            knows to be needed.
        TypeError: an unsupported dtype, or not a tensor.
        IndexError: the table lacks a row that a tensor asks for (on CUDA a device-side assertion).
        RuntimeError: `out` with inputs that require grad, or memory that overlaps.

    Example::

        >>> x = torch.randn(2, 128, 32, 64)  # [B, S, H, D]
        >>> inv_freq = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
        >>> cos, sin = fused_rope.cos_sin_table(inv_freq, 128)
        >>> fused_rope.rotate(x, cos, sin).shape
        torch.Size([2, 128, 32, 64])
    """
    options = (
        layout,
        axes,
        rotary_offset,
        interleaved,
        blocks,
        inverse,
        precision,
        table_layout,
    )
    if out is not None:
        call("rotate_out", (x, cos, sin, out), positions, offset, cu_seqlens, options, out_rows)
        return out
    rotated: Tensor = call(
        "rotate", (x, cos, sin), positions, offset, cu_seqlens, options, out_rows
    )
    return rotated


def rotate_(
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
) -> Tensor:
    """Rotates x in place and returns it.

    Elements outside the rotated span, padding and tokens at position -1 are not written. Autograd
    works, also on views such as slices of a packed QKV tensor.

    Args:
        x: as in `rotate`, and so are all other arguments.

    Returns:
        x.

    Raises:
        ValueError, TypeError, IndexError: as `rotate`.
        RuntimeError: x is a leaf that requires grad or a view of one, one of several views made by
            one call (split, unbind), or expanded. Raised before x is written.

    Example::

        >>> qkv = torch.randn(2, 128, 3, 8, 64)
        >>> inv_freq = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
        >>> cos, sin = fused_rope.cos_sin_table(inv_freq, 128)
        >>> q = fused_rope.rotate_(qkv[:, :, 0], cos, sin)
    """
    options = (
        layout,
        axes,
        rotary_offset,
        interleaved,
        blocks,
        inverse,
        precision,
        table_layout,
    )
    call("rotate_", (x, cos, sin), positions, offset, cu_seqlens, options)
    return x


def rotate_qk(
    q: Tensor,
    k: Tensor,
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
    out: tuple[Tensor, Tensor] | None = None,
    out_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotates q and k by one table in one launch.

    Args:
        q, k: [B, S, Hq, D] and [B, S, Hk, D] in the order that `layout` names, or [T, Hq, D] and
            [T, Hk, D]. One dtype and device; any head counts, any strides.
        out: memory for the two results. Does not support autograd.
        out_rows: as in `rotate`, for k: a decode step rotates q and writes k directly into its
            slots of a paged cache.
        cos, sin: as in `rotate`, and so are all other arguments.

    Returns:
        q and k rotated, of their shapes and dtype, or `out`.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as `rotate`.

    Example::

        >>> q, k = torch.randn(2, 32, 128, 64), torch.randn(2, 8, 128, 64)  # [B, H, S, D]
        >>> inv_freq = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
        >>> cos, sin = fused_rope.cos_sin_table(inv_freq, 4096)
        >>> q, k = fused_rope.rotate_qk(q, k, cos, sin, layout="bhsd", offset=17)
    """
    options = (
        layout,
        axes,
        rotary_offset,
        interleaved,
        blocks,
        inverse,
        precision,
        table_layout,
    )
    if out is not None:
        check_pair("rotate_qk", out)
        call(
            "rotate_qk_out",
            (q, k, cos, sin, *out),
            positions,
            offset,
            cu_seqlens,
            options,
            out_rows,
        )
        return out
    rotated: tuple[Tensor, Tensor] = call(
        "rotate_qk", (q, k, cos, sin), positions, offset, cu_seqlens, options, out_rows
    )
    return rotated


def rotate_qk_(
    q: Tensor,
    k: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """Rotates q and k in place, in one launch, and returns them.

    Args:
        q, k: as in `rotate_qk`, and so are all other arguments. They may be slices of one packed
            tensor, but must not overlap.

    Returns:
        q and k.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as `rotate_qk` and `rotate_`.

    Example::

        >>> qkv = torch.randn(2, 128, 12, 64)  # 8 heads of q, 2 of k, 2 of v
        >>> inv_freq = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
        >>> cos, sin = fused_rope.cos_sin_table(inv_freq, 128)
        >>> q, k = fused_rope.rotate_qk_(qkv[:, :, :8], qkv[:, :, 8:10], cos, sin)
    """
    options = (
        layout,
        axes,
        rotary_offset,
        interleaved,
        blocks,
        inverse,
        precision,
        table_layout,
    )
    call("rotate_qk_", (q, k, cos, sin), positions, offset, cu_seqlens, options)
    return q, k


def norm_rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    zero_centered: bool = False,
    cast: Cast = "never",
    after: bool = False,
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
    """Normalizes each head by its root mean square and rotates it, in one pass.

    The RMS norm (arXiv:1910.07467) is taken over all D elements of a head, also if fewer are
    rotated::

        y = x / sqrt(mean(x * x) + eps) * weight
        out = rotate(y, cos, sin)

    A token that is not rotated (position -1, padding) is normalized all the same. Results are
    bitwise identical on every device, and do not depend on the batch size, layout or strides. With
    the default options this is the fused form of::

        y = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
        out = fused_rope.rotate(y, cos, sin)

    except that the result is rounded to x's dtype once instead of twice (`cast`).

    Args:
        x: float16, bfloat16, float32 or float64, [B, S, H, D] in the order that `layout` names, or
            [T, H, D]. Any strides.
        cos, sin: as in `rotate`.
        weight: [D], of x's dtype or float32, any stride; None for 1.
        eps: added to the mean of the squares.
        zero_centered: the factors are 1 + weight (Gemma).
        cast: where the normalized value is rounded to x's dtype. "never": only the result is.
            "before": before the product with the weight and after it (Llama, Qwen3); the weight
            must have x's dtype. "after": after the product (Gemma, OLMo 2, torch.nn.RMSNorm).
        after: the rotation comes first, then the norm (HunYuan, Llama 4). Unless cast is "never",
            the rotated value is rounded to x's dtype.
        precision: of the rotation, as in `rotate`. "model" with cast="before" rounds as eager Qwen3
            does, with cast="after" as eager Gemma 3.
        layout: as in `rotate`, and all keywords that are not named here.

    Returns:
        A tensor of x's shape and dtype, or `out`. Differentiable in x, cos, sin and weight.

    Raises:
        ValueError: as `rotate`; a weight whose shape is not [D]; a negative or infinite eps;
            cast="never" with precision="model"; on CUDA a head that does not fit in shared memory
            (on an H200 D above 32768, for gradients above 8320).
        TypeError: as `rotate`; a weight of another dtype; no eps.
        IndexError: as `rotate`.
        RuntimeError: `out` with inputs that require grad, or memory that overlaps.

    Example::

        >>> x, weight = torch.randn(2, 128, 32, 64), torch.ones(64)  # [B, S, H, D]
        >>> inv_freq = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
        >>> cos, sin = fused_rope.cos_sin_table(inv_freq, 128)
        >>> fused_rope.norm_rotate(x, cos, sin, weight, eps=1e-6).shape
        torch.Size([2, 128, 32, 64])
    """
    options = (
        layout,
        axes,
        rotary_offset,
        interleaved,
        blocks,
        inverse,
        precision,
        table_layout,
        eps,
        zero_centered,
        cast,
        after,
    )
    if out is not None:
        call(
            "norm_rotate_out",
            (x, cos, sin, out, weight),
            positions,
            offset,
            cu_seqlens,
            options,
            out_rows,
        )
        return out
    rotated: Tensor = call(
        "norm_rotate", (x, cos, sin, weight), positions, offset, cu_seqlens, options, out_rows
    )
    return rotated


def norm_rotate_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    zero_centered: bool = False,
    cast: Cast = "never",
    after: bool = False,
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
) -> Tensor:
    """Normalizes and rotates x in place, and returns it.

    All elements are written. Autograd is not supported, since the backward pass needs x.

    Args:
        x: as in `norm_rotate`, and so are all other arguments.

    Returns:
        x.

    Raises:
        ValueError, TypeError, IndexError: as `norm_rotate`.
        RuntimeError: a tensor requires grad, or x is expanded. Raised before x is written.

    Example::

        >>> qkv, weight = torch.randn(2, 128, 3, 8, 64), torch.ones(64)
        >>> inv_freq = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
        >>> cos, sin = fused_rope.cos_sin_table(inv_freq, 128)
        >>> q = fused_rope.norm_rotate_(qkv[:, :, 0], cos, sin, weight, eps=1e-6)
    """
    options = (
        layout,
        axes,
        rotary_offset,
        interleaved,
        blocks,
        inverse,
        precision,
        table_layout,
        eps,
        zero_centered,
        cast,
        after,
    )
    call("norm_rotate_", (x, cos, sin, weight), positions, offset, cu_seqlens, options)
    return x


def norm_rotate_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    eps: float,
    zero_centered: bool = False,
    cast: Cast = "never",
    after: bool = False,
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
    out: tuple[Tensor, Tensor] | None = None,
    out_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalizes and rotates q and k in one launch.

    Args:
        q, k: [B, S, Hq, D] and [B, S, Hk, D] in the order that `layout` names, or [T, Hq, D] and
            [T, Hk, D]. One dtype and device; any head counts, any strides.
        q_weight, k_weight: as `weight` of `norm_rotate`; None for 1.
        out: memory for the two results. Does not support autograd.
        out_rows: as in `rotate_qk`, for k.
        cos, sin: as in `norm_rotate`, and all keywords that are not named here.

    Returns:
        q and k normalized and rotated, of their shapes and dtype, or `out`. Differentiable in q, k,
        cos, sin and the weights.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as `norm_rotate`.

    Example::

        >>> q, k = torch.randn(2, 32, 128, 64), torch.randn(2, 8, 128, 64)  # [B, H, S, D]
        >>> q_weight, k_weight = torch.ones(64), torch.ones(64)
        >>> inv_freq = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
        >>> cos, sin = fused_rope.cos_sin_table(inv_freq, 4096)
        >>> q, k = fused_rope.norm_rotate_qk(
        ...     q, k, cos, sin, q_weight, k_weight, eps=1e-6, layout="bhsd", offset=17
        ... )
    """
    options = (
        layout,
        axes,
        rotary_offset,
        interleaved,
        blocks,
        inverse,
        precision,
        table_layout,
        eps,
        zero_centered,
        cast,
        after,
    )
    if out is not None:
        check_pair("norm_rotate_qk", out)
        call(
            "norm_rotate_qk_out",
            (q, k, cos, sin, *out, q_weight, k_weight),
            positions,
            offset,
            cu_seqlens,
            options,
            out_rows,
        )
        return out
    rotated: tuple[Tensor, Tensor] = call(
        "norm_rotate_qk",
        (q, k, cos, sin, q_weight, k_weight),
        positions,
        offset,
        cu_seqlens,
        options,
        out_rows,
    )
    return rotated


def norm_rotate_qk_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    eps: float,
    zero_centered: bool = False,
    cast: Cast = "never",
    after: bool = False,
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
) -> tuple[Tensor, Tensor]:
    """Normalizes and rotates q and k in place, in one launch, and returns them.

    Args:
        q, k: as in `norm_rotate_qk`, and so are all other arguments. They may be slices of one
            packed tensor, but must not overlap.

    Returns:
        q and k.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as `norm_rotate_qk` and `norm_rotate_`.

    Example::

        >>> qkv, weight = torch.randn(2, 128, 12, 64), torch.ones(64)  # heads of q, k and v
        >>> inv_freq = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
        >>> cos, sin = fused_rope.cos_sin_table(inv_freq, 128)
        >>> q, k = qkv[:, :, :8], qkv[:, :, 8:10]
        >>> q, k = fused_rope.norm_rotate_qk_(q, k, cos, sin, weight, weight, eps=1e-6)
    """
    options = (
        layout,
        axes,
        rotary_offset,
        interleaved,
        blocks,
        inverse,
        precision,
        table_layout,
        eps,
        zero_centered,
        cast,
        after,
    )
    call(
        "norm_rotate_qk_",
        (q, k, cos, sin, q_weight, k_weight),
        positions,
        offset,
        cu_seqlens,
        options,
    )
    return q, k


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
) -> Tensor:
    """Rotates q, and stores k, rotated, and v in a KV cache, in one launch.

    This is what a layer does before attention in a prefill or decode step. With a cache of q's
    dtype it is the fused form of::

        q, k = fused_rope.rotate_qk(q, k, cos, sin)
        k_cache.view(-1, *k_cache.shape[-2:])[slots] = k
        v_cache.view(-1, *v_cache.shape[-2:])[slots] = v

    A cache of 8 bits holds numbers whose product with the scale is the value::

        stored = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)

    where x is the rotated k, or v, of q's dtype. Values outside the range of the cache's dtype
    become its largest or smallest number; a NaN stays one, or becomes 0 in int8.

    Args:
        q, k: [B, S, Hq, D] and [B, S, Hk, D] in the order that `layout` names, or [T, Hq, D] and
            [T, Hk, D]. One dtype and device; any head counts, any strides. k is not changed.
        v: [B, S, Hk, Dv], laid out as k; any Dv. None, with `v_cache` None: only k is stored.
        cos, sin: as in `rotate`.
        k_cache, v_cache: [rows, Hk, D] or [pages, page_size, Hk, D], and Dv for v; any strides, so
            that a [pages, Hk, page_size, D] cache is passed as its transpose(1, 2). Both of q's
            dtype, float8_e4m3fn, float8_e5m2 or int8.
        slots: int32 or int64 [B, S] ([T] for "thd"): the row of each token, which is
            page * page_size + place in a paged cache. A token with slot -1 is rotated but not
            stored. A slot that two tokens share holds either.
        k_scale, v_scale: for caches of 8 bits, float32 [] or [Hk] on q's device.
        q_out: memory for the result, of q's shape and dtype, any strides.
        k_out: memory for the rotated k, where it is wanted outside the cache too (attention over a
            prompt reads it instead of the cache).
        eps: normalizes q and k as `norm_rotate_qk` does. None: no norm.
        q_weight, k_weight, zero_centered, cast, after: of the norm, as in `norm_rotate_qk`.
        layout: as in `rotate`, and all keywords that are not named here.

    Returns:
        q rotated, of q's shape and dtype, or `q_out`.

    Raises:
        ValueError: as `rotate`; caches, scales or slots whose shapes do not match; scales for a
            cache of q's dtype, or none for one of 8 bits; options of a norm without eps.
        TypeError: as `rotate`; a cache, scale or slots of another dtype.
        IndexError: as `rotate`; a slot outside the cache (on CUDA a device-side assertion).
        RuntimeError: an input requires grad, or memory that overlaps.

    Example::

        >>> q, k, v = torch.randn(3, 32, 64), torch.randn(3, 8, 64), torch.randn(3, 8, 64)
        >>> cos, sin = fused_rope.cos_sin_table(fused_rope.inv_freq(64), 4096)
        >>> k_cache, v_cache = torch.zeros(2, 100, 16, 8, 64).unbind()  # 100 pages of 16 tokens
        >>> slots = torch.tensor([16 * 7 + 2, 16 * 9, 16 * 4 + 15])  # one token of three sequences
        >>> positions = torch.tensor([34, 160, 63])
        >>> q = fused_rope.rotate_and_cache(
        ...     q, k, v, cos, sin, k_cache, v_cache, slots, layout="thd", positions=positions
        ... )
    """
    options = (
        layout,
        axes,
        rotary_offset,
        interleaved,
        blocks,
        inverse,
        precision,
        table_layout,
        eps,
        zero_centered,
        cast,
        after,
    )
    inputs = (q, k, v, cos, sin, k_cache, v_cache, slots)
    others = (k_out, k_scale, v_scale, q_weight, k_weight)
    if not _in_dynamo():
        done: Tensor = _C.rotate_and_cache(
            (*inputs, q_out, *others), positions, offset, cu_seqlens, None, options
        )
        if done is not NotImplemented:
            return done
    rotated = _empty_output(q) if q_out is None else q_out
    tensors = (*inputs, rotated, *others)
    _dispatch("rotate_and_cache", tensors, positions, offset, cu_seqlens, options)
    return rotated


def cos_sin_table(
    inv_freq: Tensor,
    rows: int,
    *,
    first: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of row * inv_freq[j], times scale, for `rows` consecutive rows.

    The table is computed on the host from float64 angles whose rounding error is compensated. It is
    within 1 float32 ulp of the true cosine and sine for every row up to 2^31 and bitwise identical
    on every device. The copy to a device is asynchronous. Autocast, default dtypes and inference
    mode have no effect.

    Args:
        inv_freq: [P], any floating dtype, in radians per row, such as `fused_rope.inv_freq(64)`;
            only float64 is exact enough for far rows. It gets no gradient: compute a table of
            learned frequencies with torch.cos and torch.sin.
        rows: the number of rows.
        first: the first row; first + rows is at most 2^31 + 1.
        scale: the attention factor of YaRN or longrope.
        dtype: float16, bfloat16, float32 or float64.
        device: of the result; None for inv_freq's.

    Returns:
        cos [rows, P] and sin [rows, P].

    Raises:
        ValueError: inv_freq is not 1-D, or first and rows are out of range.
        TypeError: inv_freq is not a floating tensor, or another dtype.

    Example::

        >>> cos, sin = fused_rope.cos_sin_table(fused_rope.inv_freq(64), 4096, device="cpu")
    """
    if not isinstance(inv_freq, Tensor):
        raise TypeError(
            f"cos_sin_table: expected inv_freq to be a tensor [P], got {inv_freq!r}: pass "
            "fused_rope.inv_freq(head_dim, base)"
        )
    for name, value, expected, fits in (
        ("rows", rows, "an int", isinstance(rows, int) or hasattr(rows, "__index__")),
        ("first", first, "an int", isinstance(first, int) or hasattr(first, "__index__")),
        ("scale", scale, "a number", not isinstance(scale, str) and hasattr(scale, "__float__")),
        ("dtype", dtype, "a torch.dtype", isinstance(dtype, torch.dtype)),
    ):
        if not fits:
            got = type(value).__name__
            raise TypeError(f"cos_sin_table: expected {name} to be {expected}, got {got}")
    target = None if device is None else torch.device(device)
    table: tuple[Tensor, Tensor] = _ops.cos_sin_table(inv_freq, rows, first, scale, dtype, target)
    return table


@torch.library.register_fake("fused_rope::cos_sin_table")  # type: ignore[untyped-decorator]
def _(
    inv_freq: Tensor,
    rows: int,
    first: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    where = inv_freq.device if device is None else device
    shape = (rows, inv_freq.shape[0])
    return inv_freq.new_empty(shape, dtype=dtype, device=where), inv_freq.new_empty(
        shape, dtype=dtype, device=where
    )


def check_pair(operator: str, out: tuple[Tensor, Tensor]) -> None:
    """Raises TypeError unless `out` is a pair."""
    listed = isinstance(out, Sequence) and not isinstance(out, str)
    if not listed or len(out) != 2:
        one = "one tensor" if isinstance(out, Tensor) else type(out).__name__
        got = f"{len(out)} tensors" if listed else one
        raise TypeError(f"{operator}: expected out to be a pair of tensors, got {got}")


def call(
    name: str,
    tensors: tuple[Tensor | None, ...],
    positions: Tensor | None,
    offset: int | Tensor,
    cu_seqlens: Tensor | None,
    options: tuple[Any, ...],
    out_rows: Tensor | None = None,
) -> Any:
    """Calls operator `name`: dispatches to the eager, compiled, DTensor or torch.func path.

    An eager call on plain tensors ends in the C++ entry, before any other path is considered.

    Args:
        tensors: x, or q and k; cos, sin; the outputs; with a norm, as many weights as inputs.
        options: the fields of Options; with a norm, the values of NORM_OPTIONS after all of them.
    """
    if out_rows is not None and not name.endswith("_out"):
        raise ValueError(f"{name}: expected out with out_rows, got out=None: pass both")
    if not _in_dynamo():
        done = _entries[name](tensors, positions, offset, cu_seqlens, out_rows, options)
        if done is not NotImplemented:
            return done
    return _dispatch(name, tensors, positions, offset, cu_seqlens, options, out_rows)


def _dispatch(
    name: str,
    tensors: tuple[Tensor | None, ...],
    positions: Tensor | None,
    offset: int | Tensor,
    cu_seqlens: Tensor | None,
    options: tuple[Any, ...],
    out_rows: Tensor | None = None,
) -> Any:
    """The call of an operator that the C++ entry does not serve."""
    if not _in_dynamo():
        transform = torch._C._functorch.peek_interpreter_stack()
        if transform is not None and (
            name == "rotate_and_cache" or transform.key() != TransformType.Functionalize
        ):
            rows = (positions, offset, cu_seqlens)
            names = (*Options._fields, *NORM_OPTIONS)
            filled = (*options, *Options()[len(options) :])
            keywords = dict(zip(names, filled, strict=False))
            return _functorch.call(call, name, tensors, rows, keywords)
        if adapt_to_dtensors is None:
            _register_dtensors(tensors)
    if adapt_to_dtensors is not None:
        tensors, positions, offset, cu_seqlens = adapt_to_dtensors(
            name, tensors, positions, offset, cu_seqlens, options[0]
        )
    number, offsets = (0, offset) if isinstance(offset, Tensor) else (offset, None)
    extra = (out_rows,) if name.endswith("_out") else ()
    rotation = len(Options._fields)
    arguments = (*tensors, positions, offsets, cu_seqlens, *extra, number, *options[:rotation])
    norm = dict(zip(NORM_OPTIONS, options[rotation:], strict=False))
    operator = getattr(_ops, name)
    if _in_dynamo():
        return operator(*arguments, **norm)
    try:
        return operator(*arguments, **norm)
    except NotImplementedError:
        if any(isinstance(a, Tensor) and a.is_nested for a in arguments):
            raise nested_error(name) from None
        raise


def _empty_output(q: Tensor) -> Tensor:
    """Memory for q rotated: of q's strides if q is dense, else row-major."""
    like = torch.empty_like(q)
    return like if like.stride() == q.stride() else torch.empty_like(like, memory_format=_ROW_MAJOR)


def _register_dtensors(tensors: tuple[Tensor | None, ...]) -> None:
    """Imports the sharding rules if a tensor is a DTensor."""
    if any(type(t).__module__.startswith("torch.distributed.tensor") for t in tensors):
        import_module(".distributed", __package__)


def nested_error(operator: str) -> TypeError:
    """The error that `operator` raises for a nested tensor."""
    return TypeError(
        f"{operator}: expected dense tensors, got a nested tensor: pass the values() of a jagged "
        'one with layout="thd" and its offsets() as cu_seqlens'
    )


def refuse_scripting(module: torch.nn.Module) -> NoReturn:
    """The `__prepare_scriptable__` of modules: torch.jit.script cannot compile them."""
    raise RuntimeError(
        f"{type(module).__name__}: torch.jit.script cannot compile this module: use torch.compile "
        "or torch.export, or call torch.ops.fused_rope with a table"
    )


class _Unscriptable:
    """An entry of TorchScript's table of builtins that raises when torch.jit.script reads it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __str__(self) -> str:
        raise RuntimeError(
            f"{self._name}: torch.jit.script cannot compile fused_rope.{self._name}: call "
            f"torch.ops.fused_rope.{self._name}, or use torch.compile or torch.export"
        )


for _function in (
    rotate,
    rotate_,
    rotate_qk,
    rotate_qk_,
    norm_rotate,
    norm_rotate_,
    norm_rotate_qk,
    norm_rotate_qk_,
    rotate_and_cache,
    cos_sin_table,
):
    torch.jit._builtins._register_builtin(_function, _Unscriptable(_function.__name__))
