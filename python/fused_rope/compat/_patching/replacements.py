"""Replacements of functions in other libraries: what stands at a site, for which models.

A site is an attribute of a module or class. `install` puts replacements there for a model; `undo`
takes them back. All state is in `current` and `retired`, guarded by `lock`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import FunctionType, ModuleType
from typing import Any, TypeVar

import torch

from ...diagnostics import has_kernels

__all__ = [
    "MARK",
    "Options",
    "Replacement",
    "Report",
    "Site",
    "any_installed",
    "check_choices",
    "check_options",
    "current",
    "describe",
    "find_replacement",
    "install",
    "lacks_kernels",
    "lock",
    "replacement_of",
    "replacer",
    "retired",
    "undo",
]

# Packages that replace rotary functions too, and what to do where the operator shall run.
_REPLACERS = {"liger_kernel": "apply Liger with rope=False to use the operator"}
MARK = "_fused_rope_replacement"  # the attribute of our functions that holds their Replacement


@dataclass
class Report:
    """What `patch` or `unpatch` did, by function: "module.function" or "module.class.method".

    Attributes:
        patched: replaced functions, and the form of each.
        norms: forwards of attention classes whose norms run with the rotation, and the order and
            rounding.
        tables: rotary modules, and what computes their cosines and sines now: "ours", "its own" or
            "somebody else's".
        restored: functions that are the models' own again.
        left_alone: functions that were skipped, and the reason.
    """

    patched: dict[str, str] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    restored: list[str] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"patched {name} ({form})" for name, form in self.patched.items()]
        lines += [f"fused norms of {name} ({how})" for name, how in self.norms.items()]
        lines += [f"restored {name}" for name in self.restored]
        lines += [f"tables of {name} ({maker})" for name, maker in self.tables.items()]
        lines += [f"left alone {name}: {reason}" for name, reason in self.left_alone.items()]
        return "\n".join(lines) or "found no rotary function"


@dataclass(frozen=True)
class Site:
    """An attribute of a module or class that holds a rotary function."""

    owner: ModuleType | type
    name: str

    @property
    def module(self) -> str:
        return self.owner.__name__ if isinstance(self.owner, ModuleType) else self.owner.__module__

    @property
    def owner_key(self) -> str:
        if isinstance(self.owner, ModuleType):
            return self.module
        return f"{self.module}.{self.owner.__qualname__}"

    @property
    def key(self) -> str:
        return f"{self.owner_key}.{self.name}"

    @property
    def value(self) -> Any:
        """What the owner holds now; None if it was deleted."""
        return vars(self.owner).get(self.name)

    @property
    def original(self) -> Any:
        """The value, or what it replaces: a module may import another site's replacement."""
        replacement = replacement_of(self.value)
        return self.value if replacement is None else replacement.original

    @property
    def function(self) -> Any:
        """The function that a model calls there if it is not patched."""
        return _function_of(self.original)


def replacement_of(value: Any) -> Replacement | None:
    """The replacement to which a value belongs, or None."""
    function = _function_of(value)
    # A wrapper copies the attributes of what it wraps, so the mark alone is not enough.
    found = vars(function).get(MARK) if isinstance(function, FunctionType) else None
    return found if found is not None and _function_of(found.ours) is function else None


def _function_of(value: Any) -> Any:
    """The function of a value, which may be a staticmethod."""
    return value.__func__ if isinstance(value, staticmethod) else value


def replacer(value: Any) -> tuple[str, str]:
    """Who replaced a rotary function by this value, and the advice to append."""
    package = str(getattr(_function_of(value), "__module__", "")).partition(".")[0]
    advice = _REPLACERS.get(package)
    return (package, f": {advice}") if advice else ("somebody else", "")


class _Models:
    """How many calls of `patch` each model of a replacement has had; references are weak.

    A wrapper counts as the model in it, which may live longer.

    Args:
        when_empty: called when the last model that is left becomes garbage.
    """

    def __init__(self, when_empty: Callable[[], object]) -> None:
        self._when_empty = when_empty
        self._counts: dict[int, tuple[Callable[[], torch.nn.Module | None], int]] = {}

    def __contains__(self, model: torch.nn.Module) -> bool:
        inner = _unwrapped(model)
        return self._counts.get(id(inner), (lambda: None, 0))[0]() is inner

    def __len__(self) -> int:
        self._drop_dead()
        return sum(count for _, count in self._counts.values())

    def add(self, model: torch.nn.Module | None) -> None:
        self._drop_dead()
        model = _unwrapped(model)
        ref, count = self._counts.get(id(model), (None, 0))
        if ref is None:
            ref = (lambda: None) if model is None else weakref.ref(model, self._lose)
        self._counts[id(model)] = ref, count + 1

    def take(self, model: torch.nn.Module | None) -> bool:
        """Undoes one `add` of the model, of one that contains it or that it contains, or of None.

        If the model is None it undoes any. Returns whether there was one.
        """
        self._drop_dead()
        model = _unwrapped(model)
        for key in self._keys(model):
            counted = self._counts.get(key)
            if counted is None:  # its model became garbage meanwhile
                continue
            ref, count = counted
            if count > 1:
                self._counts[key] = ref, count - 1
            else:
                self._counts.pop(key, None)
            return True
        return False

    def _keys(self, model: torch.nn.Module | None) -> list[int]:
        """The keys that `take` may use, in order of preference."""
        exact = [key for key in (id(model), id(None)) if key in self._counts]
        if exact or model is None:
            return exact or list(self._counts)
        parts = {id(part) for part in model.modules()}
        return [
            key
            for key, (ref, _) in self._counts.items()
            if key in parts or any(part is model for part in _alive(ref).modules())
        ]

    def _drop_dead(self) -> None:
        for key, (ref, _) in list(self._counts.items()):
            if key != id(None) and ref() is None:
                self._counts.pop(key, None)

    def _lose(self, ref: object) -> None:
        """Called by the garbage collector, in any thread and in the middle of any statement.

        It must not wait for a thread that patches, which may wait for this one. The next call of
        `patch` or `unpatch` then removes the replacement.
        """
        if lock.acquire(blocking=False):
            try:
                if not self:
                    self._when_empty()
            finally:
                lock.release()


def _unwrapped(model: torch.nn.Module | None) -> torch.nn.Module | None:
    """The innermost module that is all of the model, if there is one."""
    if model is None:
        return None
    children = list(model.children())
    while len(children) == 1 and not any(True for _ in model.parameters(recurse=False)):
        model = children[0]
        children = list(model.children())
    return model


def _alive(ref: Callable[[], torch.nn.Module | None]) -> torch.nn.Module:
    model = ref()
    return torch.nn.Module() if model is None else model


@dataclass(frozen=True)
class Options:
    """The options of `patch` that all libraries have."""

    precision: str
    compiled: str
    norms: str


def check_choices(precision: str, compiled: str | None, norms: str) -> str:
    """Raises ValueError for an unknown option; returns `compiled`, or what None means."""
    if precision not in ("fp32", "model"):
        raise ValueError(f"patch: expected precision 'fp32' or 'model', got {precision!r}")
    if compiled not in (None, "original", "fused"):
        raise ValueError(f"patch: expected compiled 'original', 'fused' or None, got {compiled!r}")
    if norms not in ("model", "fused"):
        raise ValueError(f"patch: expected norms 'model' or 'fused', got {norms!r}")
    return compiled or ("original" if precision == "model" else "fused")


AnyOptions = TypeVar("AnyOptions", bound=Options)


class Replacement:
    """The value at a site while models are patched.

    References to `ours` (in a hook, a bound method, a module that imported it) may outlive the
    patch; once it is removed, `ours` calls the original.
    """

    # The options that `ours` depends on, and how many removed replacements are kept per site:
    # compiled code stays valid if the same function is installed again.
    depends_on: tuple[str, ...]
    kept = 1

    def __init__(self, site: Site, options: Options) -> None:
        self.site = site
        self.original = site.original
        self.options = options
        self.models = _Models(self.remove)
        self.active = False
        self.ours: Any = None

    @property
    def installed(self) -> bool:
        return self.active and self.site.value is self.ours

    def fits(self, site: Site, options: Options) -> bool:
        """Whether it can be installed at the site again, with these options."""
        return (
            self.site == site
            and self.original is site.original
            and all(getattr(self.options, n) == getattr(options, n) for n in self.depends_on)
        )

    def install(self) -> None:
        setattr(self.site.owner, self.site.name, self.ours)
        self.active = True

    def remove(self) -> bool:
        """Restores the original value, unless other code has replaced ours since."""
        with lock:
            was_installed, self.active = self.installed, False
            self.models = _Models(self.remove)
            if current.get(self.site.key) is self:
                del current[self.site.key]
            if was_installed:
                setattr(self.site.owner, self.site.name, self.original)
            others = [r for r in retired.get(self.site.key, []) if r is not self]
            retired[self.site.key] = [self, *others][: self.kept]
            return was_installed

    def report(self, report: Report) -> None:
        """Adds to a report that it is installed."""
        raise NotImplementedError

    def report_undone(self, report: Report) -> None:
        """Adds to a report whether it is still installed after `undo`."""
        if not self.installed and self.site.value is self.original:
            report.restored.append(self.site.key)
        else:
            report.left_alone[self.site.key] = (
                f"{len(self.models)} more models are patched"
                if self.installed
                else "it was replaced by {} since{}".format(*replacer(self.site.value))
            )


lock = threading.RLock()
current: dict[str, Replacement] = {}
retired: dict[str, list[Replacement]] = {}


def entry_at(site: Site) -> Replacement | None:
    """The replacement of a site, if a patched model lives and the owner is the same object."""
    entry = current.get(site.key)
    if entry is not None and (entry.site != site or not entry.models):
        entry.remove()
        return None
    return entry


def check_options(site: Site, options: Options) -> None:
    """Raises if a family is already patched with other options."""
    entry = entry_at(site)
    if entry is None:
        return
    for name, theirs in asdict(entry.options).items():
        ours = getattr(options, name)
        if ours != theirs:
            raise ValueError(
                f"patch: expected {name} {theirs!r}, as {site.key} is patched with it, got {ours!r}"
                ": unpatch it first"
            )


def find_replacement(
    site: Site, options: AnyOptions, make: Callable[[Site, AnyOptions], Replacement | str]
) -> Replacement | str:
    """The replacement to install at the site, or the reason for none."""
    entry = entry_at(site)
    if entry is not None:
        if entry.installed or site.original is entry.original:
            return entry
        who, advice = replacer(site.value)
        return f"it was replaced by {who} since another model was patched{advice}"
    for entry in retired.get(site.key, []):  # makes code that was compiled with it valid again
        if entry.fits(site, options):
            entry.options = options
            return entry
    return make(site, options)


def install(found: dict[Site, Replacement | str], model: torch.nn.Module | None) -> None:
    """Installs all of these or none; a site that cannot be assigned gets a reason instead."""
    # Before anything is installed: a replacement whose last model becomes garbage is removed.
    for replacement in _replacements(found):
        replacement.models.add(model)
    before: list[tuple[Replacement, Any, bool]] = []
    try:
        for site, entry in found.items():
            if isinstance(entry, str) or entry.installed:
                continue
            before.append((entry, site.value, entry.active))
            try:
                entry.install()
            except (AttributeError, TypeError) as error:
                before.pop()
                entry.models.take(model)
                found[site] = f"it cannot be replaced: {error}"
    except BaseException:
        for entry, value, active in before:
            setattr(entry.site.owner, entry.site.name, value)
            entry.active = active
        for replacement in _replacements(found):
            replacement.models.take(model)
        raise
    for replacement in _replacements(found):
        current[replacement.site.key] = replacement


def _replacements(found: Mapping[Site, Replacement | str]) -> list[Replacement]:
    return [entry for entry in found.values() if isinstance(entry, Replacement)]


def describe(found: Mapping[Site, Replacement | str]) -> Report:
    """The report of what stands at these sites, or why nothing of ours."""
    report = Report()
    for site, entry in found.items():
        if isinstance(entry, Replacement):
            entry.report(report)
        else:
            report.left_alone[site.key] = entry
    return report


def undo(model: torch.nn.Module | None, belongs: Callable[[Replacement], bool]) -> Report:
    """Undoes one `install` for the model of the replacements that belong to it."""
    report = Report()
    with lock:
        for entry in [entry for entry in current.values() if belongs(entry)]:
            entry.models.take(model)
            if not entry.models:
                entry.remove()
            entry.report_undone(report)
    return report


def any_installed(belongs: Callable[[Replacement], bool]) -> bool:
    """Whether a replacement that belongs to it stands at its site for a patched model."""
    with lock:
        return any(
            belongs(entry) and entry.installed and bool(entry.models)
            for entry in list(current.values())
        )


def lacks_kernels(model: torch.nn.Module | None) -> str | None:
    """Why the operator would be slower than the original on the model's devices; None if not."""
    parameters = [] if model is None else model.parameters()
    devices = {parameter.device.type for parameter in parameters} - {"meta"}
    without = sorted(device for device in devices if not has_kernels(device.upper()))
    if not without:
        return None
    return (
        f"the library has no kernels for {', '.join(without)}, and the PyTorch reference is slower "
        "than the original (patch with fallback=True uses it)"
    )
