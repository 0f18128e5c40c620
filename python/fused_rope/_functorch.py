"""The operators under torch.func: a Python autograd.Function, since functorch refuses C++ ones.

Its forward calls the operator again, one level of the transformations down. The derivative of a
rotation by x is computed by the operator, that by the table and all those of a norm by the
reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference

Call = Callable[..., Any]
Options = dict[str, Any]  # in the order of functional.Options and NORM_OPTIONS


class Inputs(NamedTuple):
    """The other inputs of an operator, or one value for each: a gradient, a tangent, a vmap dim."""

    positions: Any
    offset: Any
    cu_seqlens: Any
    cos: Any
    sin: Any
    xs: tuple[Any, ...]  # x, or q and k
    weights: tuple[Any, ...] = ()  # as many with a norm

    @classmethod
    def of(cls, flat: Sequence[Any], options: Options) -> Inputs:
        """Collects the arguments that `_Rotate` takes after `below` and `options`."""
        count = (len(flat) - 5) // (2 if "eps" in options else 1)
        return cls._make((*flat[:5], tuple(flat[5 : 5 + count]), tuple(flat[5 + count :])))

    def flat(self) -> tuple[Any, ...]:
        return (*self[:5], *self.xs, *self.weights)


def call(
    below: Call,
    name: str,
    tensors: tuple[Tensor | None, ...],
    rows: tuple[Any, ...],
    options: Options,
) -> Any:
    """`below(name, tensors, *rows, options)`; rows are positions, offset and cu_seqlens."""
    if name == "rotate_and_cache":
        raise RuntimeError(f"{name}: expected no torch.func transform: it writes to a cache")
    if name.endswith("_out"):
        raise RuntimeError(f"{name}: expected out=None under torch.func, got out: use {name[:-4]}")
    count = 2 if "_qk" in name else 1
    xs: Any = tensors[:count]
    cos, sin, *weights = tensors[count:]
    in_place = name.endswith("_")
    # Backward reads the inputs, so they must not be overwritten.
    kept = [x.clone() for x in xs] if in_place else xs
    inputs = Inputs._make((*rows, cos, sin, tuple(kept), tuple(weights)))
    function = _NormRotate if weights else _Rotate
    out = function.apply(below, options, *inputs.flat())  # type: ignore[no-untyped-call]
    if in_place:
        for x, rotated in zip(xs, out, strict=True):
            x.copy_(rotated)
        return None
    return out if len(out) == 2 else out[0]


class _Rotate(torch.autograd.Function):
    """rotate or rotate_qk of `below`, `options` and the flat `Inputs`."""

    @staticmethod
    def forward(below: Call, options: Options, *flat: Any) -> tuple[Tensor, ...]:
        return _rotate(below, options, Inputs.of(flat, options))

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
        inverse = ctx.options | {"inverse": not ctx.options["inverse"]}
        x_grads = tuple(
            None if g is None else _rotate(ctx.below, inverse, saved._replace(xs=(g,)))[0]
            for g in grads
        )
        cos_grad, sin_grad = None, None
        needed = Inputs.of(ctx.needs_input_grad[2:], ctx.options)
        if needed.cos or needed.sin:
            pull: Any = torch.func.vjp(_of_table(ctx.options, saved), saved.cos, saved.sin)[1]
            cos_grad, sin_grad = pull(_filled(grads, saved.xs))
        return None, None, *Inputs(None, None, None, cos_grad, sin_grad, x_grads).flat()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        saved, tangent = _saved(ctx), Inputs.of(tangents[2:], ctx.options)
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
        inputs, dims = Inputs.of(flat, options), Inputs.of(in_dims[2:], options)
        if any(d is not None for d in (*dims[:5], *dims.weights)) or inputs.cos.dim() == 4:
            return _one_by_one(info.batch_size, dims, below, options, inputs)
        heads = options["layout"].index("h")
        folded, sizes = zip(
            *(_fold(x, d, heads, info.batch_size) for x, d in zip(inputs.xs, dims.xs, strict=True)),
            strict=True,
        )
        out = _rotate(below, options, inputs._replace(xs=folded))
        unfolded = tuple(y.unflatten(heads, s) for y, s in zip(out, sizes, strict=True))
        return unfolded, (heads,) * len(unfolded)


class _NormRotate(_Rotate):
    """norm_rotate or norm_rotate_qk."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = _saved(ctx)
        flat = saved.flat()
        needed = [i for i, is_needed in enumerate(ctx.needs_input_grad[2:]) if is_needed]
        function = _of_some(ctx.options, saved, needed)
        pull: Any = torch.func.vjp(function, *(flat[i] for i in needed))[1]
        results: list[Tensor | None] = [None] * len(flat)
        for i, grad in zip(needed, pull(_filled(grads, saved.xs)), strict=True):
            results[i] = grad
        return None, None, *results

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        saved = _saved(ctx)
        flat = saved.flat()
        given = [i for i, tangent in enumerate(tangents[2:]) if tangent is not None]
        function = _of_some(ctx.options, saved, given)
        primals, pushed = (tuple(values[i] for i in given) for values in (flat, tangents[2:]))
        out: tuple[Tensor, ...] = torch.func.jvp(function, primals, pushed)[1]
        return out


def _rotate(below: Call, options: Options, inputs: Inputs) -> tuple[Tensor, ...]:
    """The operator, one level down; a tuple for one tensor too."""
    name = "norm_" * bool(inputs.weights) + ("rotate" if len(inputs.xs) == 1 else "rotate_qk")
    tensors = (*inputs.xs, inputs.cos, inputs.sin, *inputs.weights)
    out = below(name, tensors, *inputs[:3], tuple(options.values()))
    return (out,) if isinstance(out, Tensor) else out


def _rows(inputs: Inputs) -> dict[str, Any]:
    return dict(zip(("positions", "offset", "cu_seqlens"), inputs, strict=False))


def _of_table(options: Options, inputs: Inputs) -> Callable[..., tuple[Tensor, ...]]:
    """The reference as a function of cos and sin alone."""
    rows = _rows(inputs)

    def rotate(cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(reference.rotate(x, cos, sin, **rows, **options) for x in inputs.xs)

    return rotate


def _of_some(
    options: Options, inputs: Inputs, varied: Sequence[int]
) -> Callable[..., tuple[Tensor, ...]]:
    """The reference with a norm as a function of the flat `inputs` of these numbers."""
    rows = _rows(inputs)

    def norm_rotate(*values: Tensor) -> tuple[Tensor, ...]:
        flat = list(inputs.flat())
        for i, value in zip(varied, values, strict=True):
            flat[i] = value
        _, _, _, cos, sin, xs, weights = Inputs.of(flat, options)
        return tuple(
            reference.norm_rotate(x, cos, sin, weight, **rows, **options)
            for x, weight in zip(xs, weights, strict=True)
        )

    return norm_rotate


def _saved(ctx: Any) -> Inputs:
    saved = zip(ctx.saved_tensors, ctx.others, strict=True)
    return Inputs.of([other if t is None else t for t, other in saved], ctx.options)


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
        return Inputs.of([t if d is None else t.select(d, i) for t, d in pairs], options)

    outs = [_rotate(below, options, sample(i)) for i in range(size)]
    stacked = tuple(torch.stack(samples) for samples in zip(*outs, strict=True))
    return stacked, (0,) * len(stacked)
