"""Drop-ins for TransformerEngine's rotary functions (transformer_engine/pytorch/attention/rope.py).

    from fused_rope.compat.transformer_engine import (
        apply_fused_qkv_rotary_pos_emb,
        apply_rotary_pos_emb,
    )

The arguments are the same. With `fused=True` the numbers are those of its kernel, otherwise those
of its unfused path, bitwise identical for equal cosines and sines. Differences: both cases are one
launch, backward always applies start_positions, tokens past cu_seqlens[-1] are copied, int64
indices work, and a position without angles is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import functional
from ..tracing import is_traced
from ..types import Layout
from ._angles import look_up

__all__ = ["apply_fused_qkv_rotary_pos_emb", "apply_rotary_pos_emb"]


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: Layout = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """Rotates the first R elements of t by the angles of its tokens.

    Args:
        t: [S, B, H, D], [B, S, H, D] or [T, H, D], as tensor_format says; any float dtype.
        freqs: angles [M, 1, 1, R], each twice: in both halves of the row, or in succession if
            interleaved. Also [M, B, 1, R], angles per sequence, without start_positions and not
            with "thd".
        tensor_format: "sbhd", "bshd" or "thd".
        start_positions: int32 or int64, [B] or [N]: added to the positions of each sequence.
        interleaved: pairs are adjacent elements instead of halves.
        fused: compute in float32 and round once; otherwise cosine, sine, products and sum are
            rounded to t's dtype, as in the original's unfused path.
        cu_seqlens: int32 or int64 [N + 1], "thd" only: the start of each packed sequence before its
            split among cp_size ranks.
        cp_size, cp_rank: this rank holds chunks cp_rank and 2*cp_size - 1 - cp_rank of the
            2*cp_size chunks of each sequence.

    Returns:
        A contiguous tensor of t's shape and dtype; differentiable in t.

    Raises:
        ValueError: shapes do not match, freqs has too few rows, "thd" without cu_seqlens, or an odd
            S with cp_size > 1.
        TypeError: an unsupported dtype, or indices that are not int32 or int64.
        IndexError: a position without angles, or a packed sequence with an odd number of tokens on
            this rank (on CUDA a device-side assertion).

    Example:
        >>> angle = torch.arange(40.0)[:, None] / 10000 ** (torch.arange(0, 32, 2) / 32)
        >>> freqs = torch.cat([angle, angle], -1)[:, None, None]
        >>> t = apply_rotary_pos_emb(torch.randn(9, 2, 4, 64), freqs)
    """
    name = "apply_rotary_pos_emb"
    if tensor_format not in ("sbhd", "bshd", "thd"):
        raise ValueError(f"{name}: expected tensor_format sbhd, bshd or thd, got {tensor_format!r}")
    angle, rows = look_up(
        name, t, freqs, tensor_format, start_positions, cu_seqlens, cp_size, cp_rank
    )
    rotated = functional.rotate(
        t,
        angle.cos(),
        angle.sin(),
        table_layout="repeated" if interleaved else "tiled",
        interleaved=interleaved,
        precision="fp32" if fused else "model",
        **rows,
    )
    return rotated.contiguous()


def apply_fused_qkv_rotary_pos_emb(
    qkv: Tensor,
    q_freqs: Tensor,
    k_freqs: Tensor,
    qkv_split_arg_list: Sequence[int],
    tensor_format: Layout = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a packed qkv and rotates the first R elements of q and k; v is copied.

    Backward rotates the gradients of q and k into their places in the packed gradient.

    Args:
        qkv: [S, B, G, W] or [B, S, G, W], as tensor_format says; any float dtype and strides. Each
            of the G groups holds the elements of some query heads, of one key and of one value.
        q_freqs, k_freqs: angles [M, 1, 1, R], each twice, as in `apply_rotary_pos_emb`. Pass the
            same tensor twice to rotate q and k in one launch.
        qkv_split_arg_list: the elements of q, k and v in W; the first is a multiple of the second,
            which is D.
        tensor_format: "sbhd" or "bshd".
        start_positions: int32 or int64 [B]: added to the positions of each sequence.
        interleaved: pairs are adjacent elements instead of halves.
        cu_seqlens: no effect, as in the original.
        cp_size, cp_rank: as in `apply_rotary_pos_emb`; without start_positions.

    Returns:
        q [S, B, Hq, D], k [S, B, G, D] and v [S, B, G, Dv] in tensor_format's order and qkv's
        dtype, contiguous; computed in float32 and rounded once. Differentiable in qkv.

    Raises:
        ValueError: shapes do not match, "thd", start_positions with cp_size > 1, or freqs that
            require grad.
        TypeError: an unsupported dtype, or start_positions that are not int32 or int64.
        IndexError: a position without angles (on CUDA a device-side assertion).

    Example:
        >>> angle = torch.arange(40.0)[:, None] / 10000 ** (torch.arange(0, 32, 2) / 32)
        >>> freqs = torch.cat([angle, angle], -1)[:, None, None]
        >>> qkv = torch.randn(9, 2, 4, (6 + 1 + 1) * 32)
        >>> q, k, v = apply_fused_qkv_rotary_pos_emb(qkv, freqs, freqs, [6 * 32, 32, 32])
        >>> q.shape
        torch.Size([9, 2, 24, 32])
    """
    name = "apply_fused_qkv_rotary_pos_emb"
    if tensor_format not in ("sbhd", "bshd"):
        raise ValueError(f"{name}: expected tensor_format sbhd or bshd, got {tensor_format!r}")
    if start_positions is not None and cp_size > 1:
        raise ValueError(f"{name}: expected cp_size=1 with start_positions, got cp_size={cp_size}")
    if q_freqs.requires_grad or k_freqs.requires_grad:
        raise ValueError(
            f"{name}: expected freqs without gradients: call apply_rotary_pos_emb on slices"
        )
    widths = tuple(qkv_split_arg_list)
    if (
        qkv.dim() != 4
        or len(widths) != 3
        or sum(widths) != qkv.shape[-1]
        or widths[1] < 1
        or widths[0] % widths[1]
    ):
        raise ValueError(
            f"{name}: expected qkv of 4 dimensions whose last one is split into q, k and v, with q "
            f"a multiple of k, got {list(qkv.shape)} and {list(widths)}"
        )
    tables: list[Tensor] = []
    rows: dict[str, Any] = {}
    for freqs in (q_freqs,) if q_freqs is k_freqs else (q_freqs, k_freqs):
        if freqs.dim() != 4 or freqs.shape[1] != 1:
            raise ValueError(f"{name}: expected freqs of [M, 1, 1, R], got {list(freqs.shape)}")
        angle, rows = look_up(
            name, qkv, freqs, tensor_format, start_positions, None, cp_size, cp_rank
        )
        tables += [angle.cos(), angle.sin()]
    packing = _Packing(qkv, widths)
    options = packing.of_groups(rows, qkv.device)
    options |= dict(table_layout="repeated" if interleaved else "tiled", interleaved=interleaved)
    if _records_backward(qkv):
        split: tuple[Tensor, Tensor, Tensor] = _Split.apply(qkv, packing, options, *tables)  # type: ignore[no-untyped-call]
        return split
    return packing.split(qkv, options, tables)


class _Packing:
    """Where q, k and v are in qkv, [S, B, G, W] or [B, S, G, W].

    The operator sees the query heads of one group as heads, and the groups as part of the dimension
    before them: [S, B*G, J, D], or [B, S*G, J, D].
    """

    def __init__(self, qkv: Tensor, widths: tuple[int, ...]) -> None:
        first, second, G, _ = qkv.shape
        self.widths = widths
        heads, D = widths[0] // widths[1], widths[1]
        self.shape = qkv.shape
        self.shapes = [(first, second, G * n, D) for n in (heads, 1)]  # of q and k
        self.grouped = [(first, second * G, n, D) for n in (heads, 1)]

    def of_groups(self, rows: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """The keywords that choose rows, for groups as part of B or S."""
        _, S, G, _ = self.shape
        if rows["layout"] == "bshd":
            return rows | {"positions": torch.arange(S * G, device=device) // G}
        if isinstance(rows["offset"], Tensor):
            return rows | {"offset": rows["offset"].repeat_interleave(G)}
        return rows

    def split(
        self, qkv: Tensor, options: dict[str, Any], tables: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, by differentiable operators."""
        *qk, v = qkv.split(self.widths, -1)
        q, k = _rotate(self._views(qk), tables, **options)
        contiguous = v.clone(memory_format=torch.contiguous_format)
        return q.reshape(self.shapes[0]), k.reshape(self.shapes[1]), contiguous

    def split_into_new(
        self, qkv: Tensor, options: dict[str, Any], tables: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`split` whose results are no views: those of an autograd.Function must not be."""
        *qk, v = qkv.split(self.widths, -1)
        q, k = (qkv.new_empty(shape) for shape in self.shapes)
        _rotate(self._views(qk), tables, self._views((q, k)), **options)
        return q, k, v.clone(memory_format=torch.contiguous_format)

    def pack(
        self, grads: Sequence[Tensor], options: dict[str, Any], tables: Sequence[Tensor]
    ) -> Tensor:
        """The gradient of qkv, from those of q, k and v."""
        packed = grads[0].new_empty(self.shape)
        *qk, v = packed.split(self.widths, -1)
        _rotate(self._views(grads[:2]), tables, self._views(qk), inverse=True, **options)
        v.copy_(grads[2])
        return packed

    def _views(self, qk: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """q and k as the operator sees them: views if they are in contiguous memory."""
        q, k = (x.reshape(shape) for x, shape in zip(qk, self.grouped, strict=True))
        return q, k


def _rotate(
    qk: tuple[Tensor, Tensor],
    tables: Sequence[Tensor],
    out: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    if len(tables) == 2:
        return functional.rotate_qk(*qk, *tables, out=out, **options)
    q_out, k_out = (None, None) if out is None else out
    return (
        functional.rotate(qk[0], *tables[:2], out=q_out, **options),
        functional.rotate(qk[1], *tables[2:], out=k_out, **options),
    )


def _records_backward(qkv: Tensor) -> bool:
    """Whether a call is an eager one that records a backward; others compose differentiable ones.

    torch.compile, torch.func and forward AD derive their own derivatives.
    """
    return (
        qkv.requires_grad
        and torch.is_grad_enabled()
        and type(qkv) is Tensor
        and not is_traced(qkv)
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


class _Split(torch.autograd.Function):
    """`_Packing.split_into_new`."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, packing: _Packing, options: dict[str, Any], *tables: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.packing, ctx.options = packing, options
        ctx.save_for_backward(*tables)
        return packing.split_into_new(qkv, options, tables)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        packed = _Pack.apply(*grads, ctx.packing, ctx.options, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return (packed, None, None, *[None] * len(ctx.saved_tensors))


class _Pack(torch.autograd.Function):
    """`_Packing.pack`, the transpose of `_Split`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packing: _Packing,
        options: dict[str, Any],
        *tables: Tensor,
    ) -> Tensor:
        ctx.packing, ctx.options = packing, options
        ctx.save_for_backward(*tables)
        return packing.pack((q, k, v), options, tables)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        split = _Split.apply(grad, ctx.packing, ctx.options, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return (*split, None, None, *[None] * len(ctx.saved_tensors))
