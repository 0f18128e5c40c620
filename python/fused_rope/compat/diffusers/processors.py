"""Replacements of attention processors that define their rotary function, or normalize q and k."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._patching import norms as rms_norms
from .._patching.forms import Form
from .._patching.functions import Rotation, rotation_of
from .._patching.replacements import MARK, Options, Replacement, Report, Site
from .._patching.style import Adapter
from .rewriting import Calls, Rewritten

__all__ = ["Processor", "names_in", "nested_functions"]


def nested_functions(function: FunctionType) -> Iterator[FunctionType]:
    """The functions that a function defines, if they need none of its variables."""
    for code in function.__code__.co_consts:
        if isinstance(code, CodeType) and not code.co_freevars:
            yield FunctionType(code, function.__globals__, code.co_name)


def names_in(code: CodeType) -> Iterator[str]:
    """The names of globals and attributes in a function's code, and in what it defines."""
    yield from code.co_names
    for nested in code.co_consts:
        if isinstance(nested, CodeType):
            yield from names_in(nested)


class Waiting(NamedTuple):
    """Parts of a tensor, each with its norm, concatenated along a dimension."""

    parts: tuple[tuple[Tensor, rms_norms.Deferred], ...]
    dim: int


class Processor(Replacement):
    """Replaces a method of a processor by one whose functions rotate with the operator."""

    depends_on = ("precision", "compiled", "norms")
    kept = 4

    def __init__(
        self,
        site: Site,
        functions: Mapping[str, tuple[FunctionType, Form, Adapter]],
        rewritten: Rewritten,
        options: Options,
        left_alone: Mapping[str, str],
    ) -> None:
        super().__init__(site, options)
        self.norms = rewritten.norms
        self.left_alone = left_alone
        self.rotations = {
            name: Rotation(self, f"{site.key}.{name}", function, form, adapter)
            for name, (function, form, adapter) in functions.items()
        }
        calls = Calls(self._defer, self._join, self._rotate, _normalize)
        given = {name: rotation.ours for name, rotation in self.rotations.items()}
        self.ours = rewritten.make(calls, given)
        setattr(self.ours, MARK, self)

    def report(self, report: Report) -> None:
        for name, rotation in self.rotations.items():
            report.patched[f"{self.site.key}.{name}"] = rotation.form.name
        if self.norms:
            report.norms[self.site.key] = ", ".join(self.norms)
        report.left_alone |= self.left_alone

    def _defer(self, norm: Any, x: Any) -> Any:
        fused = self.options.compiled == "fused" or not torch.compiler.is_compiling()
        # torch.nn.RMSNorm returns float32 under autocast.
        if not (self.active and fused) or torch.is_autocast_enabled(x.device.type):
            return norm(x)
        deferred = rms_norms.defer(norm)
        x = deferred(x)
        if not isinstance(deferred, rms_norms.Deferred) or deferred.kind is None:
            return x
        return Waiting(((x, deferred),), 0)

    def _join(self, xs: list[Any], dim: int) -> Any:
        parts: list[tuple[Tensor, rms_norms.Deferred]] = []
        for x in xs:
            if not (isinstance(x, Waiting) and len(x.parts) == 1):
                return torch.cat([_normalize(x) for x in xs], dim=dim)
            parts += x.parts
        return Waiting(tuple(parts), dim)

    def _rotate(self, function: Any, xs: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
        rotation = rotation_of(function)
        if rotation is not None and all(isinstance(x, Waiting) for x in xs):
            rotated = self._fused(rotation, xs, args, kwargs)
            if rotated is not None:
                return rotated
        return tuple(function(_normalize(x), *args, **kwargs) for x in xs)

    def _fused(
        self, rotation: Rotation, xs: tuple[Waiting, ...], args: Any, kwargs: Any
    ) -> tuple[Tensor, ...] | None:
        """The rotated xs, normalized in the same pass; None if the operator cannot."""
        if len({(len(x.parts), x.dim) for x in xs}) > 1:
            return None
        spans = _spans(rotation, xs, args, kwargs)
        joint = _joint_memory(xs) if spans is not None and len(spans) > 1 else None
        done: list[tuple[Tensor, ...]] = []
        for index, options in enumerate(spans or ()):
            parts = [x.parts[index] for x in xs]
            norm = rms_norms.joint(tuple(d for _, d in parts), self.options.precision)
            if norm is None:
                return None
            tensors = tuple(t for t, _ in parts)
            if joint is not None:
                start, dim = options["span"][0], xs[0].dim
                out = tuple(
                    o.narrow(dim, start, t.shape[dim]) for o, t in zip(joint, tensors, strict=True)
                )
                options = {**options, "out": out if len(out) > 1 else out[0]}
            x = tensors if len(tensors) > 1 else tensors[0]
            rotated = rotation.normalized(norm, (x, *args), kwargs, **options)
            if rotated is None:
                return None
            done.append(rotated if isinstance(rotated, tuple) else (rotated,))
        if joint is not None or not done:
            return joint
        if len(done) == 1:
            return done[0]
        return tuple(torch.cat(parts, dim=xs[0].dim) for parts in zip(*done, strict=True))


def _normalize(x: Any) -> Any:
    """x, normalized if it waits."""
    if not isinstance(x, Waiting):
        return x
    parts = [deferred.norm(part) for part, deferred in x.parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=x.dim)


def _spans(
    rotation: Rotation, xs: tuple[Waiting, ...], args: Any, kwargs: Any
) -> list[dict[str, Any]] | None:
    """For each part of xs, the adapter's option that says which tokens it has; None if none can."""
    if len(xs[0].parts) == 1:
        return [{}]
    arguments = rotation.arguments((xs, *args), kwargs)
    if not rotation.joins or arguments.get("sequence_dim", 2) != xs[0].dim:
        return None
    lengths = [[part.shape[x.dim] for part, _ in x.parts] for x in xs]
    shapes = [{part.shape[: x.dim] + part.shape[x.dim + 1 :] for part, _ in x.parts} for x in xs]
    dtypes = {part.dtype for x in xs for part, _ in x.parts}
    if lengths[0] != lengths[-1] or len(dtypes) > 1 or any(len(s) > 1 for s in shapes):
        return None
    S = sum(lengths[0])
    return [{"span": (sum(lengths[0][:index]), S)} for index in range(len(lengths[0]))]


def _joint_memory(xs: tuple[Waiting, ...]) -> tuple[Tensor, ...] | None:
    """Memory for all parts of each x; None where autograd or a tracer follows the tensors."""
    if (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        return None
    weights = (deferred.norm._parameters.get("weight") for x in xs for _, deferred in x.parts)
    tensors = [t for t in (*weights, *(t for x in xs for t, _ in x.parts)) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    joint = []
    for x in xs:
        first = x.parts[0][0]
        shape = list(first.shape)
        shape[x.dim] = sum(part.shape[x.dim] for part, _ in x.parts)
        joint.append(first.new_empty(shape))
    return tuple(joint)
