"""The way through torch.func: functorch refuses C++ autograd Functions, so a Python one stands in
for them.

Its forward calls the same public function again, one level of the transformations down. What
concerns x stays with the operator; derivatives of the table, which transformations seldom ask for,
go through the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference

if TYPE_CHECKING:
    from .functional import Options

Call = Callable[..., Any]


def call(
    below: Call,
    name: str,
    tensors: tuple[Tensor, ...],
    rows: tuple[Any, ...],
    options: Options,
) -> Any:
    """`below(name, tensors, *rows, options)`; rows are positions, offset and cu_seqlens."""
    if name.endswith("_out"):
        raise RuntimeError(f"{name}: expected no out under torch.func transformations, got one")
    *xs, cos, sin = tensors
    in_place = name.endswith("_")
    # What backward may read must not be overwritten.
    kept = [x.clone() for x in xs] if in_place else xs
    out = _Rotate.apply(below, options, *rows, cos, sin, *kept)  # type: ignore[no-untyped-call]
    if in_place:
        for x, rotated in zip(xs, out, strict=True):
            x.copy_(rotated)
        return None
    return out if len(out) == 2 else out[0]


class _Rotate(torch.autograd.Function):
    """rotate or rotate_qk.

    Inputs are below, options, positions, offset, cu_seqlens, cos, sin, and x or q and k.
    """

    @staticmethod
    def forward(below: Call, options: Options, *inputs: Any) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = _rotate(below, options, *inputs)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.below, ctx.options, *rest = inputs
        ctx.others = [None if isinstance(t, Tensor) else t for t in rest]
        tensors = [t if isinstance(t, Tensor) else None for t in rest]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, (cos, sin), xs = _inputs(ctx)
        inverse = ctx.options._replace(inverse=not ctx.options.inverse)
        x_grads = [
            None if g is None else _rotate(ctx.below, inverse, *rows, cos, sin, g)[0] for g in grads
        ]
        table_grads: tuple[Tensor | None, ...] = (None, None)
        if ctx.needs_input_grad[5] or ctx.needs_input_grad[6]:
            pull: Any = torch.func.vjp(
                lambda c, s: _reference(ctx.options, *rows, c, s, *xs), cos, sin
            )[1]
            table_grads = pull(
                tuple(
                    torch.zeros_like(x) if g is None else g for x, g in zip(xs, grads, strict=True)
                )
            )
        return (None,) * 5 + (*table_grads, *x_grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        rows, (cos, sin), xs = _inputs(ctx)
        cos_tangent, sin_tangent = tangents[5:7]
        out = [
            torch.zeros_like(x)
            if t is None
            else _rotate(ctx.below, ctx.options, *rows, cos, sin, t)[0]
            for x, t in zip(xs, tangents[7:], strict=True)
        ]
        if cos_tangent is not None or sin_tangent is not None:
            table_tangents = tuple(
                torch.zeros_like(p) if t is None else t
                for p, t in ((cos, cos_tangent), (sin, sin_tangent))
            )
            by_table: Any = torch.func.jvp(
                lambda c, s: _reference(ctx.options, *rows, c, s, *xs), (cos, sin), table_tangents
            )[1]
            out = [x + t for x, t in zip(out, by_table, strict=True)]
        return tuple(out)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], below: Call, options: Options, *inputs: Any
    ) -> Any:
        dims = in_dims[2:]
        if any(d is not None for d in dims[:5]) or inputs[3].dim() == 4:
            return _one_by_one(info.batch_size, dims, below, options, inputs)
        heads = options.layout.index("h")
        folded, sizes = zip(
            *(
                _fold(x, d, heads, info.batch_size)
                for x, d in zip(inputs[5:], dims[5:], strict=True)
            ),
            strict=True,
        )
        out = _rotate(below, options, *inputs[:5], *folded)
        unfolded = tuple(y.unflatten(heads, s) for y, s in zip(out, sizes, strict=True))
        return unfolded, (heads,) * len(unfolded)


def _rotate(
    below: Call,
    options: Options,
    positions: Any,
    offset: Any,
    cu_seqlens: Any,
    *tensors: Tensor,
) -> Any:
    cos, sin, *xs = tensors
    out = below(
        "rotate" if len(xs) == 1 else "rotate_qk",
        (*xs, cos, sin),
        positions,
        offset,
        cu_seqlens,
        options,
    )
    return out if len(xs) == 2 else (out,)


def _reference(
    options: Options, positions: Any, offset: Any, cu_seqlens: Any, *tensors: Tensor
) -> Any:
    cos, sin, *xs = tensors
    rows = {"positions": positions, "offset": offset, "cu_seqlens": cu_seqlens}
    return tuple(reference.rotate(x, cos, sin, **rows, **options._asdict()) for x in xs)


def _inputs(ctx: Any) -> tuple[list[Any], list[Tensor], list[Tensor]]:
    """The saved inputs: positions, offset and cu_seqlens; cos and sin; x, or q and k."""
    inputs = [
        other if t is None else t for t, other in zip(ctx.saved_tensors, ctx.others, strict=True)
    ]
    return inputs[:3], inputs[3:5], inputs[5:]


def _fold(x: Tensor, dim: int | None, heads: int, size: int) -> tuple[Tensor, tuple[int, int]]:
    """x with the mapped axis folded into its heads, all treated alike, and how to unfold it."""
    moved = (
        x.unsqueeze(heads).expand(*x.shape[:heads], size, *x.shape[heads:])
        if dim is None
        else x.movedim(dim, heads)
    )
    return moved.flatten(heads, heads + 1), (size, moved.shape[heads + 1])


def _one_by_one(
    size: int,
    dims: tuple[int | None, ...],
    below: Call,
    options: Options,
    inputs: tuple[Any, ...],
) -> Any:
    """Tables or rows differ between samples: nothing to share, one call each."""
    outs = [
        _rotate(
            below,
            options,
            *(t if d is None else t.select(d, i) for t, d in zip(inputs, dims, strict=True)),
        )
        for i in range(size)
    ]
    stacked = tuple(torch.stack(sample) for sample in zip(*outs, strict=True))
    return stacked, (0,) * len(stacked)
