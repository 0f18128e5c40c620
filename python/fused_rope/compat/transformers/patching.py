"""`patch`, `unpatch` and `patched`: replace and restore the rotary functions of model families."""

from __future__ import annotations

import functools
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FunctionType, ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from ...diagnostics import has_kernels
from ...types import Compiled, Precision
from . import norms as rms_norms
from .adapters import Adapter, RealTableError
from .forms import TABLES, Form, find_form, signature, split
from .rewriting import Calls, Rewritten, norm_classes, rewrite
from .tables import Tables, is_recorded, rotary_modules

__all__ = [
    "Report",
    "attention_classes",
    "check_model",
    "find_norms",
    "is_patched",
    "modules_of",
    "patch",
    "patched",
    "rotary_functions",
    "unpatch",
]

_FUNCTION = re.compile(r"(vision_)?apply_\w*(rotary|rope)")
_METHOD = re.compile(r"_?apply_rotary")
# Packages that replace rotary functions too, and what to do where the operator shall run.
_REPLACERS = {"liger_kernel": "apply Liger with rope=False to use the operator"}
_MARK = "_fused_rope_replacement"  # the attribute of our functions that holds their _Replacement


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
        replacement = _replacement_of(self.value)
        return self.value if replacement is None else replacement.original

    @property
    def function(self) -> Any:
        """The function that a model calls there if it is not patched."""
        return _function_of(self.original)


def _replacement_of(value: Any) -> _Replacement | None:
    """The replacement to which a value belongs, or None."""
    function = _function_of(value)
    # A wrapper copies the attributes of what it wraps, so the mark alone is not enough.
    found = vars(function).get(_MARK) if isinstance(function, FunctionType) else None
    return found if found is not None and _function_of(found.ours) is function else None


def _function_of(value: Any) -> Any:
    """The function of a value, which may be a staticmethod."""
    return value.__func__ if isinstance(value, staticmethod) else value


def _replacer(value: Any) -> tuple[str, str]:
    """Who replaced a rotary function by this value, and the advice to append."""
    package = str(getattr(_function_of(value), "__module__", "")).partition(".")[0]
    advice = _REPLACERS.get(package)
    return (package, f": {advice}") if advice else ("somebody else", "")


@dataclass(frozen=True)
class Options:
    """The options of `patch`."""

    precision: str
    compiled: str
    rows: int | None
    table: str
    norms: str


class _Models:
    """How many calls of `patch` each model of a replacement has had; references are weak."""

    def __init__(self) -> None:
        self._counts: dict[int, tuple[Callable[[], torch.nn.Module | None], int]] = {}

    def __len__(self) -> int:
        self._drop_dead()
        return sum(count for _, count in self._counts.values())

    def add(self, model: torch.nn.Module | None) -> None:
        self._drop_dead()
        ref, count = self._counts.get(id(model), (None, 0))
        if ref is None:
            ref = (lambda: None) if model is None else weakref.ref(model)
        self._counts[id(model)] = ref, count + 1

    def take(self, model: torch.nn.Module | None) -> bool:
        """Undoes one `add` of the model, of one that contains it or that it contains, or of None.

        If the model is None it undoes any. Returns whether there was one.
        """
        self._drop_dead()
        for key in self._keys(model):
            ref, count = self._counts.pop(key)
            if count > 1:
                self._counts[key] = ref, count - 1
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
                del self._counts[key]


def _alive(ref: Callable[[], torch.nn.Module | None]) -> torch.nn.Module:
    model = ref()
    return torch.nn.Module() if model is None else model


class _Replacement:
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
        self.models = _Models()
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
        with _lock:
            was_installed, self.active, self.models = self.installed, False, _Models()
            if _replacements.get(self.site.key) is self:
                del _replacements[self.site.key]
            if was_installed:
                setattr(self.site.owner, self.site.name, self.original)
            others = [r for r in _retired.get(self.site.key, []) if r is not self]
            _retired[self.site.key] = [self, *others][: self.kept]
            return was_installed


class _Forward(_Replacement):
    """Replaces the forward of a rotary module. Compiled code depends on none of its options."""

    depends_on = ()

    def __init__(self, site: Site, options: Options) -> None:
        super().__init__(site, options)
        original = self.original
        self.tables: Tables | None = None
        self.functions: list[_Function] = []  # those of the family
        self._warned = False

        @functools.wraps(original)
        def forward(
            self_: torch.nn.Module, x: Any, position_ids: Any = None, layer_type: str | None = None
        ) -> Any:
            arguments = () if layer_type is None else (layer_type,)
            tables = self.tables
            if torch.compiler.is_compiling() or tables is None or not self.active:
                return original(self_, x, position_ids, *arguments)
            if not self._warned:
                self._warn_if_replaced()
            made = tables(self_, x, position_ids, layer_type)
            if made is not None:
                self._mark_verified(made, layer_type)
                return made
            pair = original(self_, x, position_ids, *arguments)
            if self._from_library:
                self._mark_verified(pair, layer_type)
            return pair

        setattr(forward, _MARK, self)
        self.ours = forward
        self._from_library = _from_library(original)
        self._widths: dict[str | None, str] = {}

    def _mark_verified(self, pair: Any, layer_type: str | None) -> None:
        """Marks tables as verified, so that functions need not compare their halves.

        Our code and transformers' compute both halves from the same angles. One comparison per
        class finds the width, which synchronizes with the device; later tables have the same.
        """
        width = self._widths.get(layer_type) or _width(pair)
        if width is not None:
            self._widths[layer_type] = width
            _verified[width].add(pair, fresh=True)

    def _warn_if_replaced(self) -> None:
        """Warns if other code replaced a rotary function of the family after it was patched."""
        for function in self.functions:
            if function.active and not function.installed:
                self._warned = True
                who, advice = _replacer(function.site.value)
                warnings.warn(
                    f"fused_rope: {who} replaced {function.site.key} after it was patched{advice}",
                    stacklevel=3,
                )

    def install(self) -> None:
        self._warned = False
        self.tables = Tables(self.original, self.options.rows, self.options.table == "float64")
        super().install()

    def remove(self) -> bool:
        self.tables = None  # frees the rows; a forward that runs has a reference of its own
        return super().remove()


class _Function(_Replacement):
    """Replaces a rotary function; it has the original's signature."""

    depends_on = ("precision", "compiled")
    kept = 4

    def __init__(self, site: Site, form: Form, adapter: Adapter, options: Options) -> None:
        super().__init__(site, options)
        self.form = form
        self.function = site.function
        self.signature = signature(self.function)
        self.names = list(self.signature.parameters)
        tables = [name in TABLES for name in self.names]
        self.first = tables.index(True) if True in tables else 0
        self.last = self.first + sum(tables)
        self.mismatch = f"{site.key}: the halves of its tables differ, unlike form {form.name!r}"
        self.warned = False
        self._adapter = adapter
        self.ours = self._make(adapter)

    def _make(self, adapter: Adapter) -> Any:
        original, precision = self.function, self.options.precision
        inlined = self.options.compiled == "original" and self.form.inlines
        unread, known = self.form.unread, _verified[self.form.width].contains
        first, last = self.first, self.last

        def ours(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                if inlined or not self.active:
                    return original(*args, **kwargs)
                if unread:
                    self._assert_halves_equal(args, kwargs)
                return adapter(*args, precision=precision, **kwargs)
            if not self.active:
                return original(*args, **kwargs)
            verified = not unread or (len(args) >= last and known(args[first:last]))
            if not (verified or self._verify(args, kwargs)):
                return self._fall_back(args, kwargs)
            try:
                return adapter(*args, precision=precision, **kwargs)
            except (TypeError, ValueError) as error:  # raised before any memory is touched
                if isinstance(error, RealTableError):
                    raise
            return self._fall_back(args, kwargs)

        if isinstance(original, torch.nn.Module):  # the `kernels` package wraps functions in layers
            ours.__signature__ = self.signature  # type: ignore[attr-defined]
            ours.__name__ = self.site.name
        else:
            functools.update_wrapper(ours, original)
        setattr(ours, _MARK, self)
        return staticmethod(ours) if isinstance(self.original, staticmethod) else ours

    def normalized(
        self, norm: rms_norms.Norm, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any | None:
        """The results of a call whose tensors are normalized too; None if it is not covered."""
        if not (self.active and self.form.normalizes) or (norm.after and self.form.order):
            return None
        if torch.compiler.is_compiling():
            if self.form.unread:
                self._assert_halves_equal(args, kwargs)
        elif not self._trusts(args, kwargs):
            return None
        try:
            return self._adapter(*args, precision=self.options.precision, norm=norm, **kwargs)
        except (TypeError, ValueError):  # raised before any memory is touched
            return None

    def _trusts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the adapter reads all that a call's tables say."""
        known = _verified[self.form.width].contains
        verified = len(args) >= self.last and known(args[self.first : self.last])
        return not self.form.unread or verified or self._verify(args, kwargs)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def _assert_halves_equal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Adds the comparison to a graph, which cannot branch on it."""
        for read, unread in self.form.halves(self._arguments(args, kwargs)):
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
            arguments = self._arguments(args, kwargs)
            tables = [table for name, table in arguments.items() if name in TABLES]
            if _verified[self.form.width].contains(tables):
                return True
            if any(is_recorded(table.device) for table in tables):
                return False
            equal = _all_equal(self.form.halves(arguments))
        except Exception:  # no such arguments, or no values: meta, fake and mapped tensors
            return False
        if equal:
            _verified[self.form.width].add(tables)
        else:
            self._give_up()
        return equal

    def _give_up(self) -> None:
        """Ends the patch of the family, unless caches may hold keys in the adapter's order."""
        if self.form.order is None:
            self.remove()
        if not self.warned:
            self.warned = self.form.order is not None
            warnings.warn(
                f"fused_rope: the model uses its own rotary function again: {self.mismatch}",
                stacklevel=4,
            )


class _Attention(_Replacement):
    """Replaces the forward of an attention class by one whose norms run with the rotation."""

    depends_on = ("precision", "compiled", "norms")
    kept = 4

    def __init__(self, site: Site, rewritten: Rewritten, how: str, options: Options) -> None:
        super().__init__(site, options)
        self.how = how
        self.ours = rewritten.make(
            Calls(self._defer, self._rotate, self._rotate_first, rms_norms.normalize)
        )
        setattr(self.ours, _MARK, self)

    def _fuses(self) -> bool:
        compiled = self.options.compiled == "fused" or not torch.compiler.is_compiling()
        return self.active and compiled

    def _defer(self, norm: Any) -> Any:
        return rms_norms.defer(norm) if self._fuses() else norm

    def _rotate(self, function: Any, calls: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
        norm = rms_norms.joint(calls, self.options.precision, after=False)
        result = self._normalized(function, norm, args, kwargs)
        if result is not None:
            return result
        count = len(calls)
        xs = map(rms_norms.normalize, calls, args)
        return function(*xs, *args[count:], **kwargs)

    def _rotate_first(
        self, function: Any, modules: tuple[Any, ...], *args: Any, **kwargs: Any
    ) -> Any:
        if self._fuses():
            norm = rms_norms.joint_of_modules(modules, args, self.options.precision)
            result = self._normalized(function, norm, args, kwargs)
            if result is not None:
                return result
        rotated = function(*args, **kwargs)
        if len(modules) == 1:
            return modules[0](rotated)
        return tuple(norm(x) for norm, x in zip(modules, rotated, strict=True))

    def _normalized(
        self,
        function: Any,
        norm: rms_norms.Norm | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any | None:
        replacement = None if norm is None else _replacement_of(function)
        if norm is None or not isinstance(replacement, _Function):
            return None
        return replacement.normalized(norm, args, kwargs)


class _VerifiedTables:
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


def _all_equal(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether the tensors of each pair have equal values. Synchronizes once."""
    if any(a.shape != b.shape for a, b in pairs):
        return False
    if all(a.device.type == "cpu" for a, _ in pairs):
        return all(torch.equal(a, b) for a, b in pairs)
    return bool(torch.stack([(a == b).all() for a, b in pairs]).all())


def _width(pair: Any) -> str | None:
    """The width of these full-width tables; None if both fit, as at position 0, or neither does."""
    try:
        if is_recorded(pair[0].device):
            return None
        tiled, repeated = (_all_equal([split(t, w) for t in pair]) for w in ("tiled", "repeated"))
    except Exception:  # not a pair of tables, or tables without values
        return None
    return None if tiled == repeated else "tiled" if tiled else "repeated"


def _from_library(forward: Callable[..., Any]) -> bool:
    """Whether a function and all that it wraps are defined in transformers or PyTorch."""
    function: Any = forward
    while function is not None:
        package = getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0]
        if package not in ("transformers", "torch"):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


_lock = threading.RLock()
_replacements: dict[str, _Replacement] = {}
_retired: dict[str, list[_Replacement]] = {}
_verified = {w: _VerifiedTables() for w in ("tiled", "repeated", "blocks", "half", "first")}


def patch(
    model: torch.nn.Module | None = None,
    *,
    precision: Precision = "model",
    compiled: Compiled | None = None,
    rows: int | None = None,
    table: Literal["original", "float64"] = "original",
    norms: Literal["model", "fused"] = "model",
    fallback: bool = False,
) -> Report:
    """Makes Hugging Face models rotate with the fused operator.

    The function is replaced for every instance of the model's family, until `unpatch` was called
    for all patched models or they are garbage. References to the replacement call the original from
    then on. Gradients, torch.compile and generate() work as before. A call that the operator does
    not cover (unusual shapes, dtypes or arguments) runs the original.

    The operator reads one half of a full-width table. The halves of each new table are compared,
    once for all layers; if they differ, the family's own function is restored, with a warning. On
    CUDA that synchronizes once per rotary module of transformers, and once per forward for other
    tables. While a CUDA graph is captured or a call is traced, tables that were not compared before
    run the original; a graph of torch.compile with the operator asserts that the halves are equal.

    The family's rotary modules recompute cosines and sines at every forward. Those whose results
    are bitwise identical in a reference check do so in fewer kernels: see `rows`. Modules with
    dynamic or longrope scaling or M-RoPE, traced modules, and all modules while float32 matmuls may
    be rounded further, use their own forward.

    DeepSeek's interleaved form permutes the elements of q and k before it rotates them; the
    operator keeps their order. Attention scores are then equal up to the order of their sums, and
    only patched models can read the keys in a cache.

    Args:
        model: a model of transformers 4.57 or 5; None for every family that is imported.
        precision: "model" for results bitwise identical to eager Hugging Face; "fp32" to compute in
            float32 and round once.
        compiled: what torch.compile gets. "original" is the model's own function, which the
            compiler fuses with the operators around it; "fused" is the operator, which the compiler
            cannot fuse. None is "original" with precision "model", else "fused". DeepSeek's
            interleaved form, which orders cached keys differently, and functions written in Triton
            always use the operator.
        rows: an exclusive upper bound of all positions. The CPU then keeps the rows of the table
            across forwards, until the module's frequencies change or `unpatch` frees them; a
            position at or beyond the bound is an IndexError in the model's forward, and a negative
            one is computed as in the original. CUDA keeps nothing and accepts any position. None:
            any position; rows are recomputed.
        table: "original": bitwise identical to the model's own table, whose angles are float32.
            "float64": float64 angles of the config's frequencies (or of the module's, if they are
            not a rounding of those), times the module's attention_scaling, rounded once to the
            dtype that the module returns. Needs `rows`. It takes effect in the first forward that
            is not captured in a CUDA graph, which synchronizes. It does not apply to torch.compile,
            nor to modules that use their own forward.
        norms: "model": the model's own norms of q and k. "fused": attention classes that normalize
            q and k next to the rotation do both in one pass, forward and backward. With precision
            "model" every rounding is the model's; only the order of the sum of squares differs,
            which changes fewer than 1e-4 of bfloat16 elements. With "fp32" the result is rounded
            once. Norms with hooks, replaced forwards, wrappers or weights of another dtype run as
            modules, as all do under torch.compile with compiled="original".

    Returns:
        A Report of the functions that are replaced now, and of those that were left alone and why.
        Functions are left alone that cannot be read (scripted, builtin, compiled), whose form is
        unknown, that Liger replaced first, or that other code replaced since another model was
        patched; all functions, if the model's device has no kernel. The first forward after other
        code replaced ours warns.

    Raises:
        TypeError: the model is a name, a config or a class.
        ValueError: an unknown option, `table="float64"` without `rows`, or options that differ from
            those of a patched model of the family. Nothing is replaced then.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> print(patch(model))
        patched transformers.models.llama.modeling_llama.apply_rotary_pos_emb (half)
        tables of transformers.models.llama.modeling_llama.LlamaRotaryEmbedding (ours)
        >>> print(unpatch(model))
        restored transformers.models.llama.modeling_llama.apply_rotary_pos_emb
        tables of transformers.models.llama.modeling_llama.LlamaRotaryEmbedding (its own)
    """
    check_model("patch", model)
    options = _options(precision, compiled, rows, table, norms)
    modules = modules_of(model)
    sites, forwards = list(rotary_functions(modules)), _forwards(modules)
    attentions = list(attention_classes(modules)) if norms == "fused" else []
    reason = None if fallback else _lacks_kernels(model)
    if reason is not None:
        return Report(left_alone={site.key: reason for site in sites})
    with _lock:
        for site in (*sites, *forwards, *attentions):
            _check_options(site, options)
        # Everything that may fail precedes the first replacement.
        found = {site: _find_replacement(site, options, _function) for site in sites}
        known = {site.module for site, entry in found.items() if isinstance(entry, _Function)}
        for site in forwards:
            if site.module in known:
                found[site] = _find_replacement(site, options, _Forward)
        forms = {site.key: e.form for site, e in found.items() if isinstance(e, _Function)}
        for site in attentions:
            entry = _find_attention(site, forms, options)
            if entry is not None:
                found[site] = entry
        _install(found, model)
        _link(found)
        return _report(found, modules)


def unpatch(model: torch.nn.Module | None = None) -> Report:
    """Undoes one `patch` of the model's family; the last one restores the model's own function.

    Args:
        model: the model that was given to `patch`, wrapped or not; None for every family that is
            imported.

    Returns:
        A Report of the functions that are the model's own again, and of those that were left alone
        and why.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> sizes = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
        >>> model = LlamaModel(LlamaConfig(vocab_size=32, **sizes))
        >>> _ = patch(model)
        >>> unpatch(model).restored
        ['transformers.models.llama.modeling_llama.apply_rotary_pos_emb']
    """
    check_model("unpatch", model)
    report = Report()
    modules = {module.__name__ for module in modules_of(model)}
    with _lock:
        for entry in [e for e in _replacements.values() if e.site.module in modules]:
            entry.models.take(model)
            if not entry.models:
                entry.remove()
            if isinstance(entry, _Forward):
                report.tables[entry.site.owner_key] = _maker(entry)
            elif not entry.installed and entry.site.value is entry.original:
                report.restored.append(entry.site.key)
            else:
                report.left_alone[entry.site.key] = (
                    f"{len(entry.models)} more models are patched"
                    if entry.installed
                    else "it was replaced by {} since{}".format(*_replacer(entry.site.value))
                )
    return report


@contextmanager
def patched(model: torch.nn.Module | None = None, **options: Any) -> Iterator[Report]:
    """Patches a model inside a `with` statement.

    The function is replaced for the whole family, as by `patch`: other models of the family use
    the operator too meanwhile, unless they were patched before.

    Args:
        model: as for `patch`.
        options: the keywords of `patch`.

    Yields:
        The Report of `patch`.

    Raises:
        TypeError, ValueError: as `patch`.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> sizes = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
        >>> model = LlamaModel(LlamaConfig(vocab_size=32, **sizes))
        >>> with patched(model) as report:
        ...     is_patched(model)
        True
        >>> is_patched(model)
        False
    """
    report = patch(model, **options)
    try:
        yield report
    finally:
        if report.patched:
            unpatch(model)


def is_patched(model: torch.nn.Module | None = None) -> bool:
    """Whether a model rotates with the operator now.

    A model does if a model of its family is patched, itself or another one.

    Args:
        model: a model of transformers; None for any family that is imported.

    Raises:
        TypeError: the model is a name, a config or a class.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> sizes = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
        >>> is_patched(LlamaModel(LlamaConfig(vocab_size=32, **sizes)))
        False
    """
    check_model("is_patched", model)
    modules = {module.__name__ for module in modules_of(model)}
    with _lock:
        return any(
            isinstance(entry, _Function) and entry.installed and bool(entry.models)
            for entry in list(_replacements.values())
            if entry.site.module in modules
        )


def check_model(operator: str, model: Any) -> None:
    """Raises TypeError if `model` is neither a model nor None."""
    if model is None or isinstance(model, torch.nn.Module):
        return
    if isinstance(model, type):
        got, advice = f"the class {model.__name__}", "pass an instance of a model"
    elif isinstance(model, str):
        got, advice = f"the str {model!r}", "load it first, such as by AutoModel.from_pretrained"
    elif hasattr(model, "model_type"):
        got = f"the config {type(model).__name__}"
        advice = "make the model of that config first, such as by AutoModel.from_config"
    else:
        got, advice = f"an object of type {type(model).__name__}", "pass the torch.nn.Module"
    raise TypeError(f"{operator}: expected a model of transformers or None, got {got}: {advice}")


def _lacks_kernels(model: torch.nn.Module | None) -> str | None:
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


def _maker(entry: _Replacement) -> str:
    """What computes the tables of a rotary module now."""
    own = entry.site.value is entry.original
    return "ours" if entry.installed else "its own" if own else "somebody else's"


def _options(
    precision: str, compiled: str | None, rows: int | None, table: str, norms: str
) -> Options:
    if precision not in ("fp32", "model"):
        raise ValueError(f"patch: expected precision 'fp32' or 'model', got {precision!r}")
    if compiled not in (None, "original", "fused"):
        raise ValueError(f"patch: expected compiled 'original', 'fused' or None, got {compiled!r}")
    if rows is not None and rows < 1:
        raise ValueError(f"patch: expected rows >= 1 or None, got {rows}")
    if table not in ("original", "float64"):
        raise ValueError(f"patch: expected table 'original' or 'float64', got {table!r}")
    if norms not in ("model", "fused"):
        raise ValueError(f"patch: expected norms 'model' or 'fused', got {norms!r}")
    if table == "float64" and rows is None:
        raise ValueError("patch: expected rows >= 1 with table 'float64', got None")
    compiled = compiled or ("original" if precision == "model" else "fused")
    return Options(precision, compiled, rows, table, norms)


def _entry(site: Site) -> _Replacement | None:
    """The replacement of a site, if a patched model lives and the owner is the same object."""
    entry = _replacements.get(site.key)
    if entry is not None and (entry.site != site or not entry.models):
        entry.remove()
        return None
    return entry


def _check_options(site: Site, options: Options) -> None:
    """Raises if a family is already patched with other options."""
    entry = _entry(site)
    if entry is None:
        return
    for name, theirs in asdict(entry.options).items():
        ours = getattr(options, name)
        if ours != theirs:
            raise ValueError(
                f"patch: expected {name} {theirs!r}, as {site.key} is patched with it, got {ours!r}"
                ": unpatch it first"
            )


def _find_replacement(
    site: Site, options: Options, make: Callable[[Site, Options], _Replacement | str]
) -> _Replacement | str:
    """The replacement to install at the site, or the reason for none."""
    entry = _entry(site)
    if entry is not None:
        if entry.installed or site.original is entry.original:
            return entry
        who, advice = _replacer(site.value)
        return f"it was replaced by {who} since another model was patched{advice}"
    for entry in _retired.get(site.key, []):  # makes code that was compiled with it valid again
        if entry.fits(site, options):
            entry.options = options
            return entry
    return make(site, options)


def _install(found: dict[Site, _Replacement | str], model: torch.nn.Module | None) -> None:
    """Installs all of these or none; a site that cannot be assigned gets a reason instead."""
    before: list[tuple[_Replacement, Any, bool]] = []
    try:
        for site, entry in found.items():
            if isinstance(entry, str) or entry.installed:
                continue
            before.append((entry, site.value, entry.active))
            try:
                entry.install()
            except (AttributeError, TypeError) as error:
                before.pop()
                found[site] = f"it cannot be replaced: {error}"
    except BaseException:
        for entry, value, active in before:
            setattr(entry.site.owner, entry.site.name, value)
            entry.active = active
        raise
    for site, entry in found.items():
        if isinstance(entry, _Replacement):
            _replacements[site.key] = entry
            entry.models.add(model)


def _link(found: dict[Site, _Replacement | str]) -> None:
    """Tells the forwards of rotary modules which functions read their tables."""
    functions = [entry for entry in found.values() if isinstance(entry, _Function)]
    for entry in found.values():
        if isinstance(entry, _Forward):
            entry.functions = [f for f in functions if f.site.module == entry.site.module]


def _report(found: dict[Site, _Replacement | str], modules: list[ModuleType]) -> Report:
    report = Report()
    rotary = {site.owner for site in _forwards(modules)}
    for site, entry in found.items():
        if isinstance(entry, _Function):
            report.patched[site.key] = entry.form.name
        elif isinstance(entry, _Forward):
            report.tables[site.owner_key] = "ours"
        elif isinstance(entry, _Attention):
            report.norms[site.key] = entry.how
        elif site.name == "forward" and site.owner in rotary:
            report.tables[site.owner_key] = "somebody else's"
        else:
            report.left_alone[site.key] = str(entry)
    return report


def _function(site: Site, options: Options) -> _Function | str:
    who, advice = _replacer(site.original)
    if advice:
        return f"it was replaced by {who} first{advice}"
    found = find_form(site.name, site.function)
    return found if isinstance(found, str) else _Function(site, *found, options)


def _find_attention(
    site: Site, forms: Mapping[str, Form], options: Options
) -> _Replacement | str | None:
    """The replacement of an attention class's forward, or why none; None if it has no norms."""
    rewritten = find_norms(site, forms)
    if rewritten is None:
        return None

    def make(site: Site, options: Options) -> _Replacement | str:
        return rewritten if isinstance(rewritten, str) else _Attention(site, *rewritten, options)

    return _find_replacement(site, options, make)


def find_norms(site: Site, forms: Mapping[str, Form]) -> tuple[Rewritten, str] | str | None:
    """The rewritten forward of an attention class, and order and rounding of its norms.

    Args:
        site: the class and its forward.
        forms: of the rotary functions that are replaced, by key.

    Returns:
        These; the reason for none; or None if the class does not normalize and rotate.
    """
    assert isinstance(site.owner, type)
    rotary = {name for name in vars(sys.modules[site.module]) if _FUNCTION.match(name)}
    rewritten = rewrite(site.owner, site.original, rotary)
    if not isinstance(rewritten, Rewritten):
        return rewritten
    for name in rewritten.functions:
        form = forms.get(f"{site.module}.{name}")
        if form is None or not form.normalizes or (rewritten.after and form.order):
            return f"{name} does not rotate in a form that runs with norms"
    kinds: dict[str, None] = {}
    for name, classes in norm_classes(site.owner, rewritten.norms).items():
        learned = [rms_norms.learn(norm) for norm in classes]
        known = [str(found[0]) for found in learned if not isinstance(found, str)]
        if not known:
            reasons = [reason for reason in learned if isinstance(reason, str)]
            return reasons[0] if reasons else f"the class of {name} is not an RMS norm"
        kinds |= dict.fromkeys(known)
    order = "after" if rewritten.after else "before"
    return rewritten, f"norm {order} the rotation, {'; '.join(kinds)}"


def attention_classes(modules: Iterable[ModuleType]) -> Iterator[Site]:
    """The classes of modules that define a forward of their own."""
    for module in modules:
        for _, value in sorted(vars(module).items()):
            defined = isinstance(value, type) and value.__module__ == module.__name__
            if defined and issubclass(value, torch.nn.Module) and "forward" in vars(value):
                yield Site(value, "forward")


def _forwards(modules: Iterable[ModuleType]) -> list[Site]:
    return list(dict.fromkeys(Site(owner, "forward") for owner in rotary_modules(modules)))


def modules_of(model: torch.nn.Module | None) -> list[ModuleType]:
    """The Python modules that define the model's layers; for None, those of every family."""
    if model is None:
        names = {
            name for name in sys.modules if re.match(r"transformers\.models\..*modeling", name)
        }
    else:
        names = {base.__module__ for layer in model.modules() for base in type(layer).__mro__}
    found = [sys.modules.get(name) for name in sorted(names)]
    return [module for module in found if isinstance(module, ModuleType)]


def rotary_functions(modules: Iterable[ModuleType]) -> Iterator[Site]:
    """The rotary functions of modules, and the rotary methods of the classes that they define.

    They are found by name; `find_form` tells whether they are functions and what they compute.
    """
    sites: dict[Site, None] = {}
    for module in modules:
        for name, value in sorted(vars(module).items()):
            if _FUNCTION.match(name):
                sites[Site(module, name)] = None
            elif isinstance(value, type) and value.__module__ == module.__name__:
                methods = sorted(name for name in vars(value) if _METHOD.match(name))
                sites |= dict.fromkeys(Site(value, method) for method in methods)
    yield from sites
