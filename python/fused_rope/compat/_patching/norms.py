"""The RMS norms of q and k: which arithmetic a norm module has, and norms that wait for a rotation.

A norm class is known if the operator's results equal those of the class on random inputs, with its
eps, weight and rounding. A `Deferred` stands in for one call of a norm. It normalizes at once
whenever the module is more than its class: hooks, a replaced forward, a parametrization, a wrapper,
a weight of another dtype or device.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules import module as _hooks
from torch.overrides import TorchFunctionMode

from ... import functional
from ...tracing import outside_modes

__all__ = [
    "Deferred",
    "Kind",
    "Norm",
    "defer",
    "joint",
    "joint_of_modules",
    "kind_of",
    "learn",
    "normalize",
]


class Norm(NamedTuple):
    """The norms of the tensors of one rotary call: arguments of `norm_rotate_qk`."""

    weights: tuple[Tensor | None, ...]
    eps: float
    zero_centered: bool
    cast: str
    after: bool

    @property
    def options(self) -> tuple[Any, ...]:
        """The values of `functional.NORM_OPTIONS`."""
        return self[1:]

    def only(self, index: int) -> Norm:
        """The norm of one of the tensors."""
        return self._replace(weights=self.weights[index : index + 1])


@dataclass(frozen=True)
class Kind:
    """The arithmetic of a norm class.

    Attributes:
        norm: the class, and its forward when it was checked.
        forward: as above.
        eps: the name of the attribute.
        weighted: whether it has a weight.
        zero_centered, cast: as in `norm_rotate`.
        mixed: whether the weight may be float32 if x is narrower.
        autocasts: whether autocast makes its results float32, as it may with F.rms_norm.
        attributes: other attributes of an instance, which must not differ.
    """

    norm: type
    forward: Any
    eps: str
    weighted: bool
    zero_centered: bool
    cast: str
    mixed: bool
    autocasts: bool
    attributes: dict[str, Any]

    def __str__(self) -> str:
        centered = ", zero-centered" if self.zero_centered else ""
        return f"rounded {self.cast} the weight{centered}" if self.weighted else "without weight"

    def fits(self, norm: torch.nn.Module, x: Any) -> bool:
        """Whether the operator returns what a call of this module with x returns."""
        if not (type(x) is Tensor and x.dtype in _DTYPES and x.dim() > 2 and _is_bare(norm)):
            return False
        if self.autocasts and torch.is_autocast_enabled(x.device.type):
            return False
        weight = norm._parameters.get("weight")
        if weight is None or not self.weighted:  # FSDP and others move parameters elsewhere
            return weight is None and not self.weighted
        dtypes = (x.dtype, torch.float32) if self.mixed else (x.dtype,)
        return (
            type(weight) in (Tensor, torch.nn.Parameter)
            and weight.dtype in dtypes
            and weight.device == x.device
            and weight.shape == x.shape[-1:]
        )


class _Instance(NamedTuple):
    """The kind of a module, while its class and its attributes are those of then."""

    kind: Kind | None
    norm: type
    forward: Any
    size: int
    values: tuple[tuple[str, Any], ...]

    def holds(self, norm: torch.nn.Module) -> bool:
        own = norm.__dict__
        return (
            self.norm is type(norm)
            and self.forward is type(norm).forward
            and self.size == len(own)
            and (not self.values or all(own.get(name) is value for name, value in self.values))
        )


# A float64 input is normalized in float32 by transformers, unlike by the operator.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CASTS = ("before", "after")
_EPS = ("variance_epsilon", "eps", "epsilon")
_WIDTH = 64

_kinds: dict[tuple[type, Any, bool], Kind | None] = {}
_instances: weakref.WeakKeyDictionary[torch.nn.Module, _Instance] = weakref.WeakKeyDictionary()


def _is_bare(norm: torch.nn.Module) -> bool:
    """Whether a call of the module is one of its class's forward and nothing else."""
    return not (
        "forward" in norm.__dict__
        or norm._forward_hooks
        or norm._forward_pre_hooks
        or norm._backward_hooks
        or norm._backward_pre_hooks
        or _hooks._global_forward_hooks
        or _hooks._global_forward_pre_hooks
        or _hooks._global_backward_hooks
        or _hooks._global_backward_pre_hooks
        or norm._compiled_call_impl is not None
    )


def kind_of(norm: Any) -> Kind | None:
    """The kind of a norm module, if its class is known (`learn`) and it has no other attributes."""
    if not isinstance(norm, torch.nn.Module):
        return None
    known = _instances.get(norm)
    if known is None or not known.holds(norm):
        known = _instances[norm] = _instance(norm)
    return known.kind


def _instance(norm: torch.nn.Module) -> _Instance:
    forward = type(norm).forward
    kind = _kinds.get((type(norm), forward, norm._parameters.get("weight") is not None))
    if kind is not None and not _same_attributes(kind, norm):
        kind = None
    values = () if kind is None else tuple(_attributes(norm, kind.eps).items())
    return _Instance(kind, type(norm), forward, len(vars(norm)), values)


def _same_attributes(kind: Kind, norm: torch.nn.Module) -> bool:
    theirs, weight = _attributes(norm, kind.eps), norm._parameters.get("weight")
    if norm._buffers or norm._modules or len(norm._parameters) > 1:
        return False
    if not isinstance(vars(norm).get(kind.eps), float):  # torch.nn.RMSNorm: that of the dtype
        return False
    width = None if weight is None else weight.shape[-1]
    return theirs.keys() == kind.attributes.keys() and all(
        value == kind.attributes[name] or value in (width, (width,))
        for name, value in theirs.items()
    )


def _attributes(norm: torch.nn.Module, eps: str) -> dict[str, Any]:
    names = (name for name in vars(norm) if not name.startswith("_"))
    return {name: vars(norm)[name] for name in names if name not in ("training", eps)}


def learn(norm: Any) -> list[Kind] | str:
    """The kinds of a norm class, with and without weight, which `kind_of` knows from then on.

    Returns:
        The kinds, or the reason for none.
    """
    name = getattr(norm, "__name__", str(norm))
    if not (isinstance(norm, type) and issubclass(norm, torch.nn.Module)):
        return f"its norm {name} is no module"
    if not _is_own(norm):
        return f"the forward of {name} was replaced"
    found = []
    for with_scale in (True, False):
        made = _make(norm, with_scale)
        if made is None:
            continue
        key = (norm, norm.forward, made._parameters.get("weight") is not None)
        if key not in _kinds:
            with outside_modes(), torch.autocast("cpu", enabled=False):
                _kinds[key] = _check(made)
            if _kinds[key] is not None:
                for known in [n for n in _instances if type(n) is norm]:
                    del _instances[known]
        kind = _kinds[key]
        if kind is not None and kind not in found:
            found.append(kind)
    return found or f"{name} is not an RMS norm of each head that the operator knows"


def _is_own(norm: type) -> bool:
    """Whether forward is the function that the class's module defines."""
    owner = next(base for base in norm.__mro__ if "forward" in vars(base))
    forward, module = vars(owner)["forward"], inspect.getmodule(owner)
    return (
        isinstance(forward, FunctionType)
        and not hasattr(forward, "__wrapped__")
        and not forward.__code__.co_freevars
        and forward.__code__.co_filename == getattr(module, "__file__", None)
        and norm.__call__ is torch.nn.Module.__call__
    )


def _make(norm: type, with_scale: bool) -> torch.nn.Module | None:
    """An instance for _WIDTH elements on the CPU; None if its arguments are unknown."""
    try:
        names = inspect.signature(norm).parameters
        if not with_scale and "with_scale" not in names:
            return None
        scale = {"with_scale": with_scale} if "with_scale" in names else {}
        width = () if next(iter(names), None) in (None, "eps") else (_WIDTH,)
        eps = names["eps"].default if "eps" in names else 0.0
        given = {} if isinstance(eps, float) else {"eps": 1e-6}
        with outside_modes(), torch.device("cpu"):
            made: torch.nn.Module = norm(*width, **scale, **given)
            return made.float()
    except Exception:  # of any kind: another signature
        return None


def _check(norm: torch.nn.Module) -> Kind | None:
    """The kind whose results are those of the module."""
    eps = next((name for name in _EPS if isinstance(vars(norm).get(name), float)), None)
    if eps is None or norm._buffers or norm._modules or set(norm._parameters) - {"weight"}:
        return None
    weight = norm._parameters.get("weight")
    if weight is not None and weight.shape != (_WIDTH,):
        return None
    attributes = _attributes(norm, eps)
    forward = type(norm).forward
    weighted = weight is not None
    arithmetic = [(False, "after")]
    if weighted:
        arithmetic = [(centered, cast) for centered in (False, True) for cast in _CASTS]
    for zero_centered, cast in arithmetic:
        flags = zero_centered, cast, False, False
        kind = Kind(type(norm), forward, eps, weighted, *flags, attributes)
        with torch._C._EnableTorchFunction(), _Calls() as calls:
            agrees = _agrees(norm, kind, torch.float32) and _agrees(norm, kind, torch.bfloat16)
        if agrees:
            mixed = cast == "after" and _agrees(norm, kind, torch.bfloat16, torch.float32)
            return replace(kind, mixed=mixed, autocasts="rms_norm" in calls.names)
    return None


class _Calls(TorchFunctionMode):
    """Names the functions of PyTorch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.add(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


def _agrees(
    norm: torch.nn.Module, kind: Kind, dtype: torch.dtype, weight_dtype: torch.dtype | None = None
) -> bool:
    """Whether operator and module agree for x of this dtype, for a large and a small eps.

    Rounding to bfloat16 before the weight instead of after it changes a quarter of the results; the
    order of the sums changes a few in a million.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    draw = torch.randn(33, _WIDTH, generator=generator, device="cpu", dtype=torch.float32)
    original = getattr(norm, kind.eps)
    try:
        x, weight = draw[:-1].to(dtype).view(2, 8, 2, _WIDTH), draw[-1].to(weight_dtype or dtype)
        given = norm._parameters.get("weight") is not None
        if given:
            norm._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
        for eps in (original, 0.5):
            setattr(norm, kind.eps, eps)
            with warnings.catch_warnings():  # some modules say that a mixed call is slow
                warnings.simplefilter("ignore")
                theirs = kind.forward(norm, x)
            ours = _operator(x, weight if given else None, kind, eps)
            if theirs.dtype != dtype or theirs.shape != x.shape or not _close(theirs, ours):
                return False
    except Exception:  # of any kind: the module takes other arguments
        return False
    finally:
        setattr(norm, kind.eps, original)
    return True


def _operator(x: Tensor, weight: Tensor | None, kind: Kind, eps: float) -> Tensor:
    """The operator's norm without a rotation."""
    cos = torch.ones(x.shape[1], 1, dtype=torch.float32, device="cpu")
    norm = Norm((weight,), eps, kind.zero_centered, kind.cast, False)
    options = ("bshd", None, 0, False, 1, False, "model", "half", *norm.options)
    tensors = (x, cos, torch.zeros_like(cos), weight)
    normalized: Tensor = functional.call("norm_rotate", tensors, None, 0, None, options)
    return normalized


def _close(theirs: Tensor, ours: Tensor) -> bool:
    if ours.dtype == torch.float32:
        return torch.allclose(theirs, ours, rtol=1e-6, atol=0)
    return bool((theirs != ours).double().mean() < 5e-3)


class Deferred:
    """One call of a norm that waits for the rotation.

    Attributes:
        norm: the module.
        kind: its kind; None once the call was not deferred.
    """

    __slots__ = ("kind", "norm")

    def __init__(self, norm: torch.nn.Module, kind: Kind) -> None:
        self.norm = norm
        self.kind: Kind | None = kind

    def __call__(self, x: Any) -> Any:
        """x, or the normalized x if the operator cannot normalize it."""
        assert self.kind is not None
        if self.kind.fits(self.norm, x):
            return x
        self.kind = None
        return self.norm(x)


def defer(norm: Any) -> Callable[[Any], Any]:
    """What to call in the place of a norm: a Deferred, or the norm itself."""
    kind = kind_of(norm)
    return norm if kind is None else Deferred(norm, kind)


def normalize(deferred: Any, x: Any) -> Any:
    """x, normalized if its norm waits."""
    if isinstance(deferred, Deferred) and deferred.kind is not None:
        return deferred.norm(x)
    return x


def joint(calls: tuple[Any, ...], precision: str, after: bool = False) -> Norm | None:
    """The norm of one rotary call, if all of its tensors wait for norms of one kind and eps."""
    waiting = [call for call in calls if isinstance(call, Deferred) and call.kind is not None]
    if len(waiting) < len(calls):
        return None
    arithmetic = {
        (getattr(call.norm, call.kind.eps), call.kind.zero_centered, call.kind.cast)
        for call in waiting
        if call.kind is not None
    }
    if len(arithmetic) > 1:
        return None
    eps, zero_centered, cast = arithmetic.pop()
    if not isinstance(eps, float):
        return None
    weights = tuple(call.norm._parameters.get("weight") for call in waiting)
    return Norm(weights, eps, zero_centered, "never" if precision == "fp32" else cast, after)


def joint_of_modules(modules: tuple[Any, ...], xs: tuple[Any, ...], precision: str) -> Norm | None:
    """As `joint`, for norms that follow the rotation of xs."""
    calls = [defer(norm) for norm in modules]
    fit = all(
        isinstance(call, Deferred) and call.kind is not None and call.kind.fits(call.norm, x)
        for call, x in zip(calls, xs, strict=False)
    )
    return joint(tuple(calls), precision, after=True) if fit else None
