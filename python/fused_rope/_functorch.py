"""The operators under torch.func: a Python autograd.Function, since functorch refuses C++ ones.

Its forward calls the operator again, one level of the transformations down. Derivatives of x are
computed by the operator; those of the table, which are rarely asked for, by the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference

Call = Callable[..., Any]


class Options(NamedTuple):
    """The options of an operator, in its schema's order."""

    layout: str
    axes: Sequence[int] | None
    rotary_offset: int
    interleaved: bool
    blocks: int
    inverse: bool
    precision: str
    table_layout: str


class Inputs(NamedTuple):
    """The other inputs of an operator, or one value for each: a gradient, a tangent, a vmap dim."""

    positions: Any
    offset: Any
    cu_seqlens: Any
    cos: Any
    sin: Any
    xs: tuple[Any, ...]  # x, or q and k

    @classmethod
    def of(cls, flat: Sequence[Any]) -> Inputs:
        """Collects the arguments that `_Rotate` takes after `below` and `options`."""
        return cls._make((*flat[:5], tuple(flat[5:])))

    def flat(self) -> tuple[Any, ...]:
        return (*self[:5], *self.xs)


def call(
    below: Call,
    name: str,
    tensors: tuple[Tensor, ...],
    rows: tuple[Any, ...],
    options: tuple[Any, ...],
) -> Any:
    """`below(name, tensors, *rows, options)`; rows are positions, offset and cu_seqlens."""
    if name.endswith("_out"):
        raise RuntimeError(f"{name}: expected out=None under torch.func, got out: use {name[:-4]}")
    *xs, cos, sin = tensors
    in_place = name.endswith("_")
    # Backward reads the inputs, so they must not be overwritten.
    kept = [x.clone() for x in xs] if in_place else xs
    inputs = Inputs.of((*rows, cos, sin, *kept))
    out = _Rotate.apply(below, Options(*options), *inputs.flat())  # type: ignore[no-untyped-call]
    if in_place:
        for x, rotated in zip(xs, out, strict=True):
            x.copy_(rotated)
        return None
    return out if len(out) == 2 else out[0]


class _Rotate(torch.autograd.Function):
    """rotate or rotate_qk of `below`, `options` and the flat `Inputs`."""

    @staticmethod
    def forward(below: Call, options: Options, *flat: Any) -> tuple[Tensor, ...]:
        return _rotate(below, options, Inputs.of(flat))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.below, ctx.options, *flat = inputs
        ctx.others = [None if isinstance(t, Tensor) else t for t in flat]
        tensors = [t if isinstance(t, Tensor) else None for t in flat]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = _saved(ctx)
        inverse = ctx.options._replace(inverse=not ctx.options.inverse)
        x_grads = tuple(
            None if g is None else _rotate(ctx.below, inverse, saved._replace(xs=(g,)))[0]
            for g in grads
        )
        cos_grad, sin_grad = None, None
        needed = Inputs.of(ctx.needs_input_grad[2:])
        if needed.cos or needed.sin:
            pull: Any = torch.func.vjp(_of_table(ctx.options, saved), saved.cos, saved.sin)[1]
            cos_grad, sin_grad = pull(_filled(grads, saved.xs))
        return None, None, *Inputs(None, None, None, cos_grad, sin_grad, x_grads).flat()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        saved, tangent = _saved(ctx), Inputs.of(tangents[2:])
        out = tuple(
            torch.zeros_like(x)
            if t is None
            else _rotate(ctx.below, ctx.options, saved._replace(xs=(t,)))[0]
            for x, t in zip(saved.xs, tangent.xs, strict=True)
        )
        if tangent.cos is None and tangent.sin is None:
            return out
        table = saved.cos, saved.sin
        by_table: Any = torch.func.jvp(
            _of_table(ctx.options, saved), table, _filled((tangent.cos, tangent.sin), table)
        )[1]
        return tuple(x + t for x, t in zip(out, by_table, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], below: Call, options: Options, *flat: Any) -> Any:
        inputs, dims = Inputs.of(flat), Inputs.of(in_dims[2:])
        if any(d is not None for d in dims[:5]) or inputs.cos.dim() == 4:
            return _one_by_one(info.batch_size, dims, below, options, inputs)
        heads = options.layout.index("h")
        folded, sizes = zip(
            *(_fold(x, d, heads, info.batch_size) for x, d in zip(inputs.xs, dims.xs, strict=True)),
            strict=True,
        )
        out = _rotate(below, options, inputs._replace(xs=folded))
        unfolded = tuple(y.unflatten(heads, s) for y, s in zip(out, sizes, strict=True))
        return unfolded, (heads,) * len(unfolded)


def _rotate(below: Call, options: Options, inputs: Inputs) -> tuple[Tensor, ...]:
    """The operator, one level down; a tuple for one tensor too."""
    name = "rotate" if len(inputs.xs) == 1 else "rotate_qk"
    out = below(name, (*inputs.xs, inputs.cos, inputs.sin), *inputs[:3], options)
    return (out,) if isinstance(out, Tensor) else out


def _of_table(options: Options, inputs: Inputs) -> Callable[..., tuple[Tensor, ...]]:
    """The reference as a function of cos and sin alone."""
    positions, offset, cu_seqlens, *_ = inputs
    rows = {"positions": positions, "offset": offset, "cu_seqlens": cu_seqlens}

    def rotate(cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(reference.rotate(x, cos, sin, **rows, **options._asdict()) for x in inputs.xs)

    return rotate


def _saved(ctx: Any) -> Inputs:
    return Inputs.of(
        [other if t is None else t for t, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
    )


def _filled(values: Sequence[Tensor | None], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The values, with zeros for None."""
    return tuple(torch.zeros_like(x) if v is None else v for x, v in zip(like, values, strict=True))


def _fold(x: Tensor, dim: int | None, heads: int, size: int) -> tuple[Tensor, tuple[int, int]]:
    """x with the mapped dimension folded into its heads, and the sizes to unfold it.

    Heads are rotated alike, so that one call serves all samples.
    """
    moved = (
        x.unsqueeze(heads).expand(*x.shape[:heads], size, *x.shape[heads:])
        if dim is None
        else x.movedim(dim, heads)
    )
    return moved.flatten(heads, heads + 1), (size, moved.shape[heads + 1])


def _one_by_one(size: int, dims: Inputs, below: Call, options: Options, inputs: Inputs) -> Any:
    """One call per sample, since tables or positions differ between them."""

    def sample(i: int) -> Inputs:
        pairs = zip(inputs.flat(), dims.flat(), strict=True)
        return Inputs.of([t if d is None else t.select(d, i) for t, d in pairs])

    outs = [_rotate(below, options, sample(i)) for i in range(size)]
    stacked = tuple(torch.stack(samples) for samples in zip(*outs, strict=True))
    return stacked, (0,) * len(stacked)
