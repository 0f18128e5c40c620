"""Forms of rotary functions, and which form a given function has.

A function has a form if it has the form's name and signature and passes its reference checks: the
function and the form's adapter return bitwise identical results in float32, in bfloat16, and in
bfloat16 with float32 tables, with and without each optional argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference_checks as check
from .style import Adapter

__all__ = ["TABLES", "Form", "Order", "find_form", "signature", "split"]

_DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)

# The parameters that take full-width tables; the last one takes cosine and sine in one tensor.
TABLES = ("cos", "sin", "cos_k", "sin_k", "relative_position_embeddings")


class Order(NamedTuple):
    """The permutation between an adapter's results, in x's order, and a function's results."""

    theirs: Callable[[Tensor], Tensor]
    ours: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """One form of rotary function.

    Attributes:
        name: of the form, in reports.
        functions: the names of functions, or methods, that may have it.
        adapter: replaces them: it has their parameters, and a keyword-only `precision`. It raises
            ValueError for arguments that it does not cover.
        checks: make arguments for which the results of both must be bitwise identical. The function
            or the adapter may refuse all of them but the first.
        width: of the tables. "tiled", "repeated" and "blocks" are full-width tables of which the
            adapter reads one half and the model both; with "half" and "first" both read the same.
        exact: False if results may differ by a rounding: PyTorch may contract complex products.
        inexact: further checks, whose results may differ by a rounding.
        order: the permutation between both results, if they order elements differently.
        device: where it can be checked.
    """

    name: str
    functions: tuple[str, ...]
    adapter: Adapter
    checks: tuple[check.Check, ...]
    width: str = "tiled"
    exact: bool = True
    inexact: tuple[check.Check, ...] = ()
    order: Order | None = None
    device: str = "cpu"

    @property
    def inlines(self) -> bool:
        """Whether torch.compile may get the model's own function instead of the adapter.

        It may not if eager and compiled calls would order the keys of one cache differently, or if
        the function is a kernel already.
        """
        return self.order is None and self.device == "cpu"

    @property
    def unread(self) -> bool:
        """Whether the model reads a part of its full-width tables that the adapter does not."""
        return self.width not in ("half", "first")

    @cached_property
    def parameters(self) -> list[inspect.Parameter]:
        """The adapter's parameters without its options, which are keyword-only."""
        found = inspect.signature(self.adapter).parameters.values()
        return [p for p in found if p.kind is not inspect.Parameter.KEYWORD_ONLY]

    @cached_property
    def normalizes(self) -> bool:
        """Whether the adapter takes a norm."""
        return "norm" in inspect.signature(self.adapter).parameters

    @cached_property
    def joins(self) -> bool:
        """Whether the adapter takes a part of a joint sequence."""
        return "span" in inspect.signature(self.adapter).parameters

    def fit(self, original: Callable[..., Any]) -> Adapter | None:
        """The adapter that can replace `original`, or None."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return None
        theirs = list(signature(original).parameters.values())
        index = self._ignored(theirs)
        adapter = self.adapter if index is None else _without_position_ids(self.adapter, index)
        if not self._takes(theirs if index is None else _without(theirs, index)):
            return None
        if not all(self._agree(original, adapter, index, *dtypes) for dtypes in _DTYPES):
            return None
        return adapter

    def tables(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        """The tables of a call of which the adapter does not read a part that the model reads."""
        return [table for name, table in arguments.items() if name in TABLES]

    def width_of(self, arguments: Mapping[str, Any]) -> str:
        """The width of these tables."""
        return self.width

    def halves(self, arguments: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """For each of these tables, the part that the adapter reads and the other."""
        width = self.width_of(arguments)
        axes = arguments["position_ids"].shape[-1] if width == "blocks" else 1
        return [split(table, width, axes) for table in self.tables(arguments)]

    def _takes(self, theirs: list[inspect.Parameter]) -> bool:
        """Whether the adapter's parameters have these names, order and kinds."""
        ours = self.parameters
        return [p.name for p in theirs] == [p.name for p in ours] and all(
            a.kind in (b.kind, inspect.Parameter.POSITIONAL_ONLY)
            for a, b in zip(theirs, ours, strict=True)
        )

    def _ignored(self, theirs: list[inspect.Parameter]) -> int | None:
        """The index of position_ids if the function takes it and the adapter does not."""
        names = [parameter.name for parameter in theirs]
        if "position_ids" not in names or any(p.name == "position_ids" for p in self.parameters):
            return None
        return names.index("position_ids")

    def _agree(
        self,
        original: Callable[..., Any],
        adapter: Adapter,
        ignored: int | None,
        dtype: torch.dtype,
        table_dtype: torch.dtype,
    ) -> bool:
        for number, make in enumerate((*self.checks, *self.inexact)):
            exact = self.exact and number < len(self.checks)
            arguments = list(make(check.Draw(dtype, table_dtype, self.device)))
            if ignored is None:
                calls = [arguments]
            else:
                before, after = arguments[:ignored], arguments[ignored:]
                calls = [[*before, ids, *after] for ids in check.position_ids(self.device)]
            ours = _result(adapter, calls[0])
            theirs = _result(original, calls[0])
            if theirs is None or ours is None:
                if number == 0:
                    return False
                continue
            # A function that ignores its position_ids takes any; one that gathers fails for some.
            others = [_result(original, call) for call in calls[1:]]
            for found in (theirs, *others):
                if found is None or not self._same(found[0], ours[0], exact, dtype == table_dtype):
                    return False
                # A caller may use the arguments that a function writes to, and not its results.
                if not _all_equal(found[1], ours[1]):
                    return False
        return True

    def _same(
        self, theirs: tuple[Any, ...], ours: tuple[Any, ...], exact: bool, one_dtype: bool
    ) -> bool:
        """Whether results are equal, and of one dtype where all arguments have one."""
        if len(theirs) != len(ours) or not all(isinstance(t, Tensor) for t in theirs):
            return False
        if self.order is not None:
            ours = tuple(map(self.order.theirs, ours))
        pairs = list(zip(theirs, ours, strict=True))
        if one_dtype and any(a.dtype != b.dtype for a, b in pairs):
            return False
        return all(_equal(a.to(b.dtype), b, exact) for a, b in pairs)


def _equal(theirs: Tensor, ours: Tensor, exact: bool) -> bool:
    if exact:
        return torch.equal(theirs, ours)
    eps = 2 * torch.finfo(ours.dtype).eps
    return theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=eps, atol=eps)


def _without_position_ids(adapter: Adapter, index: int) -> Adapter:
    """The adapter with transformers 4's signature: argument `index`, position_ids, is unused."""

    def rotate(*args: Any, precision: str = "model", **kwargs: Any) -> Any:
        if kwargs:
            kwargs.pop("position_ids", None)
        if len(args) > index:
            args = args[:index] + args[index + 1 :]
        return adapter(*args, precision=precision, **kwargs)

    return rotate


def split(table: Tensor, width: str, axes: int = 1) -> tuple[Tensor, Tensor]:
    """Two views of a full-width table; they are equal if the table has this width."""
    if width == "repeated":
        return table[..., ::2], table[..., 1::2]
    if axes > 1:
        table = table.unflatten(-1, (axes, -1))
    half = table.shape[-1] // 2
    return table[..., :half], table[..., half:]


def signature(original: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function, or of the forward of a layer of the `kernels` package."""
    return inspect.signature(
        original.forward if isinstance(original, torch.nn.Module) else original
    )


def _without(values: list[Any], index: int) -> list[Any]:
    return [*values[:index], *values[index + 1 :]]


def _all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def _result(
    function: Callable[..., Any], arguments: list[Any]
) -> tuple[tuple[Any, ...], list[Tensor]] | None:
    """The results of the function for copies of the arguments, and those copies but the indices.

    None if it raises.
    """
    copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            result = function(*copies)
    except Exception:  # of any kind: the function does not take these arguments
        return None
    after = [
        c for c in copies if isinstance(c, Tensor) and (c.is_floating_point() or c.is_complex())
    ]
    return tuple(result) if isinstance(result, (tuple, list)) else (result,), after


def find_form(name: str, original: Any, known: Sequence[Form]) -> tuple[Form, Adapter] | str:
    """The form of the function or method `name` and its adapter, or the reason for none."""
    if not isinstance(original, (FunctionType, torch.nn.Module)):
        return f"it is not a Python function but {_kind(original)}"
    if hasattr(original, "_torchdynamo_orig_callable") and not hasattr(
        original, "_torchdynamo_disable"
    ):
        return "it is compiled by torch.compile"
    try:
        signature(original)
    except Exception:  # a custom __signature__ may raise anything
        return "its signature cannot be read"
    forms = [form for form in known if name in form.functions]
    for form in forms:
        adapter = form.fit(original)
        if adapter is not None:
            return form, adapter
    if any(form.device == "cuda" for form in forms) and not torch.cuda.is_available():
        return "its form can be checked on CUDA only"
    return "its form is unknown"


def _kind(value: Any) -> str:
    if value is None or isinstance(value, type):
        return "None" if value is None else "a class"
    return f"of type {type(value).__name__}"
