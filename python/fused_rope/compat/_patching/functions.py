"""Replacements of rotary functions: they call an adapter, and the original where it may not."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ...tracing import is_recorded
from . import norms as rms_norms
from .forms import TABLES, Form, signature
from .replacements import MARK, Replacement, Report, Site
from .style import Adapter, RealTableError

__all__ = ["Function", "Rotation", "VerifiedTables", "all_equal", "rotation_of", "verified"]


_ROTATION = "_fused_rope_rotation"  # the attribute of our functions that holds their Rotation


class Rotation:
    """A function to call in the place of a rotary function; it has the original's signature.

    Attributes:
        ours: the function.
    """

    def __init__(
        self,
        owner: Replacement,
        key: str,
        function: Any,
        form: Form,
        adapter: Adapter,
    ) -> None:
        self.owner = owner
        self.form = form
        self.function = function
        self.names = list(signature(function).parameters)
        tables = [name in TABLES for name in self.names]
        self.first = tables.index(True) if True in tables else 0
        self.last = self.first + sum(tables)
        self.mismatch = f"{key}: the halves of its tables differ, unlike form {form.name!r}"
        self.warned = False
        # Dynamo cannot trace the first read of a cached property.
        self.normalizes, self.joins = form.normalizes, form.joins
        self._adapter = adapter
        self.ours = self._make(adapter)

    def _make(self, adapter: Adapter) -> Any:
        original, owner, precision = self.function, self.owner, self.owner.options.precision
        inlined = owner.options.compiled == "original" and self.form.inlines
        unread, known = self.form.unread, verified[self.form.width].contains
        first, last = self.first, self.last

        def ours(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                if inlined or not owner.active:
                    return original(*args, **kwargs)
                if unread:
                    self._assert_halves_equal(args, kwargs)
                return adapter(*args, precision=precision, **kwargs)
            if not owner.active:
                return original(*args, **kwargs)
            trusted = not unread or (first < last <= len(args) and known(args[first:last]))
            if not (trusted or self._verify(args, kwargs)):
                return self._fall_back(args, kwargs)
            try:
                return adapter(*args, precision=precision, **kwargs)
            except (TypeError, ValueError) as error:  # raised before any memory is touched
                if isinstance(error, RealTableError):
                    raise
            return self._fall_back(args, kwargs)

        if isinstance(original, torch.nn.Module):  # the `kernels` package wraps functions in layers
            ours.__signature__ = signature(original)  # type: ignore[attr-defined]
            ours.__name__ = owner.site.name
        else:
            functools.update_wrapper(ours, original)
        setattr(ours, _ROTATION, self)
        return ours

    def normalized(
        self,
        norm: rms_norms.Norm,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        **options: Any,
    ) -> Any | None:
        """The results of a call whose tensors are normalized too; None if it is not covered.

        `options` are further ones of the adapter.
        """
        if not (self.owner.active and self.normalizes) or (norm.after and self.form.order):
            return None
        if torch.compiler.is_compiling():
            if self.form.unread:
                self._assert_halves_equal(args, kwargs)
        elif not self._trusts(args, kwargs):
            return None
        try:
            precision = self.owner.options.precision
            return self._adapter(*args, precision=precision, norm=norm, **kwargs, **options)
        except (TypeError, ValueError):  # raised before any memory is touched
            return None

    def _trusts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the adapter reads all that a call's tables say."""
        if not self.form.unread:
            return True
        known = verified[self.form.width].contains
        first, last = self.first, self.last
        return (first < last <= len(args) and known(args[first:last])) or self._verify(args, kwargs)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The given arguments of a call by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def _assert_halves_equal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Adds the comparison to a graph, which cannot branch on it."""
        for read, unread in self.form.halves(self.arguments(args, kwargs)):
            torch._assert_async((read == unread).all(), self.mismatch)

    def _fall_back(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original's results in the adapter's order of elements."""
        result = self.function(*args, **kwargs)
        return result if self.form.order is None else tuple(map(self.form.order.ours, result))

    def _verify(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the two halves of each full-width table of a call are equal.

        The caller may pass any tables, and tables that agree now may differ at other positions. So
        each new table is compared, once for all layers that share it. On CUDA that is one
        synchronization per forward, and none if the rotary module marks its tables as verified.
        """
        try:
            arguments = self.arguments(args, kwargs)
            tables, known = self.form.tables(arguments), verified[self.form.width_of(arguments)]
            if known.contains(tables):
                return True
            if any(is_recorded(table.device) for table in tables):
                return False
            equal = all_equal(self.form.halves(arguments))
        except Exception:  # no such arguments, or no values: meta, fake and mapped tensors
            return False
        if equal:
            known.add(tables)
        else:
            self._give_up()
        return equal

    def _give_up(self) -> None:
        """Ends the patch of the family, unless caches may hold keys in the adapter's order."""
        if self.form.order is None:
            self.owner.remove()
        if not self.warned:
            self.warned = self.form.order is not None
            warnings.warn(
                f"fused_rope: the model uses its own rotary function again: {self.mismatch}",
                stacklevel=4,
            )


def rotation_of(function: Any) -> Rotation | None:
    """The Rotation whose function it is, or None."""
    found = vars(function).get(_ROTATION) if isinstance(function, FunctionType) else None
    # A wrapper copies the attributes of what it wraps, so the attribute alone is not enough.
    return found if found is not None and found.ours is function else None


class Function(Replacement):
    """Replaces a rotary function."""

    depends_on = ("precision", "compiled")
    kept = 4

    def __init__(self, site: Site, form: Form, adapter: Adapter, options: Any) -> None:
        super().__init__(site, options)
        self.form = form
        self.rotation = Rotation(self, site.key, site.function, form, adapter)
        ours = self.rotation.ours
        setattr(ours, MARK, self)
        self.ours = staticmethod(ours) if isinstance(self.original, staticmethod) else ours

    def report(self, report: Report) -> None:
        report.patched[self.site.key] = self.form.name


class VerifiedTables:
    """Full-width tables whose halves were found equal, while they live and do not change."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int | None]] = {}

    def contains(self, tables: Sequence[Tensor]) -> bool:
        """Whether it contains all of these."""
        for table in tables:
            known = self._known.get(id(table))
            if known is None or known[0]() is not table:
                return False
            if known[1] is not None and known[1] != table._version:
                return False
        return True

    def add(self, tables: Iterable[Tensor], fresh: bool = False) -> None:
        """Adds these.

        An inference tensor has no version counter, so that writes to it go unseen. It is added only
        if it is fresh, that is if no other code has a reference to it.
        """
        for table in tables:
            inference = table.is_inference()
            if fresh or not inference:
                key = id(table)
                forget = functools.partial(self._forget, key)
                version = None if inference else table._version
                self._known[key] = weakref.ref(table, forget), version

    def _forget(self, key: int, ref: weakref.ref[Tensor]) -> None:
        if self._known.get(key, (None,))[0] is ref:
            del self._known[key]


def all_equal(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether the tensors of each pair have equal values. Synchronizes once."""
    if any(a.shape != b.shape for a, b in pairs):
        return False
    if all(a.device.type == "cpu" for a, _ in pairs):
        return all(torch.equal(a, b) for a, b in pairs)
    return bool(torch.stack([(a == b).all() for a, b in pairs]).all())


# By the width of the tables.
verified: defaultdict[str, VerifiedTables] = defaultdict(VerifiedTables)
