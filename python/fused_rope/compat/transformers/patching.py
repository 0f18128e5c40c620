"""`patch` and `unpatch`: a family's rotary functions and tables become ours, and its own again."""

from __future__ import annotations

import functools
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from .forms import TABLES, Form, find_form, signature, split
from .shims import RealTableError, Shim
from .tables import Tables, is_recorded, rotary_modules

__all__ = ["Report", "modules_of", "patch", "rotary_functions", "unpatch"]

_FUNCTION = re.compile(r"(vision_)?apply_\w*(rotary|rope)")
_METHOD = re.compile(r"_?apply_rotary")
_MARK = "_fused_rope_replacement"  # of our functions: what they belong to


@dataclass
class Report:
    """What `patch` or `unpatch` did: by function, "module.function" or "module.class.method".

    Attributes:
        patched: functions that are ours now, and the form of each.
        tables: rotary modules, and who makes their cosines and sines now.
        restored: functions that are the models' own again.
        left_alone: functions that were not touched, and why.
    """

    patched: dict[str, str] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    restored: list[str] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"patched {name} ({form})" for name, form in self.patched.items()]
        lines += [f"restored {name}" for name in self.restored]
        lines += [f"tables of {name} ({maker})" for name, maker in self.tables.items()]
        lines += [f"left alone {name}: {reason}" for name, reason in self.left_alone.items()]
        return "\n".join(lines) or "found no rotary function"


@dataclass(frozen=True)
class Site:
    """Where a rotary function lives: in a module, or in a class as a method."""

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
        """The function, or the method, as it stands in its owner; None where it was deleted."""
        return vars(self.owner).get(self.name)

    @property
    def original(self) -> Any:
        """The value; where that is a replacement of another site's, imported while it stood
        there, the value that it replaces."""
        replacement = _replacement_of(self.value)
        return self.value if replacement is None else replacement.original

    @property
    def function(self) -> Any:
        """What is called there by a model that is not patched."""
        return _function_of(self.original)


def _replacement_of(value: Any) -> _Replacement | None:
    """The replacement that a value is, if it is one; wrappers copy a function's attributes."""
    function = _function_of(value)
    found = vars(function).get(_MARK) if isinstance(function, FunctionType) else None
    return found if found is not None and _function_of(found.ours) is function else None


def _function_of(value: Any) -> Any:
    """What is called at a site that has this value."""
    return value.__func__ if isinstance(value, staticmethod) else value


@dataclass(frozen=True)
class Options:
    """What a family is patched with, as `patch` takes it."""

    precision: str
    compiled: str
    rows: int | None
    table: str


class _Models:
    """The models that a replacement serves, counted; it keeps none of them alive."""

    def __init__(self) -> None:
        self._counts: dict[int, tuple[Callable[[], torch.nn.Module | None], int]] = {}

    def __len__(self) -> int:
        self._forget_the_dead()
        return sum(count for _, count in self._counts.values())

    def add(self, model: torch.nn.Module | None) -> None:
        self._forget_the_dead()
        ref, count = self._counts.get(id(model), (None, 0))
        if ref is None:
            ref = (lambda: None) if model is None else weakref.ref(model)
        self._counts[id(model)] = ref, count + 1

    def take(self, model: torch.nn.Module | None) -> bool:
        """Takes back one `add` of the model, of one that it wraps or that wraps it, or of None;
        of None, any."""
        self._forget_the_dead()
        for key in self._keys(model):
            ref, count = self._counts.pop(key)
            if count > 1:
                self._counts[key] = ref, count - 1
            return True
        return False

    def _keys(self, model: torch.nn.Module | None) -> list[int]:
        """The keys of `take`, the best first."""
        exact = [key for key in (id(model), id(None)) if key in self._counts]
        if exact or model is None:
            return exact or list(self._counts)
        parts = {id(part) for part in model.modules()}
        return [
            key
            for key, (ref, _) in self._counts.items()
            if key in parts or any(part is model for part in _alive(ref).modules())
        ]

    def _forget_the_dead(self) -> None:
        for key, (ref, _) in list(self._counts.items()):
            if key != id(None) and ref() is None:
                del self._counts[key]


def _alive(ref: Callable[[], torch.nn.Module | None]) -> torch.nn.Module:
    model = ref()
    return torch.nn.Module() if model is None else model


class _Replacement:
    """What stands at a site in place of the original value, for so many models.

    Whoever holds on to `ours` (a hook, a bound method, another module that imported it) reaches the
    original through it once it is removed.
    """

    # The options that `ours` depends on, and how many removed ones are kept, so that code that was
    # compiled with them is valid when they come back.
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
    def stands(self) -> bool:
        return self.active and self.site.value is self.ours

    def fits(self, site: Site, options: Options) -> bool:
        """Whether it can stand at the site again, with these options."""
        return (
            self.site == site
            and self.original is site.original
            and all(getattr(self.options, n) == getattr(options, n) for n in self.depends_on)
        )

    def install(self) -> None:
        setattr(self.site.owner, self.site.name, self.ours)
        self.active = True

    def remove(self) -> bool:
        """Restores the original value, unless somebody else has replaced ours since."""
        with _lock:
            stood, self.active, self.models = self.stands, False, _Models()
            if _replacements.get(self.site.key) is self:
                del _replacements[self.site.key]
            if stood:
                setattr(self.site.owner, self.site.name, self.original)
            others = [r for r in _retired.get(self.site.key, []) if r is not self]
            _retired[self.site.key] = [self, *others][: self.kept]
            return stood


class _Forward(_Replacement):
    """The forward of a rotary module. Compiled code depends on none of its options."""

    depends_on = ()

    def __init__(self, site: Site, options: Options) -> None:
        super().__init__(site, options)
        original = self.original
        self.tables: Tables | None = None

        @functools.wraps(original)
        def forward(
            self_: torch.nn.Module, x: Any, position_ids: Any = None, layer_type: str | None = None
        ) -> Any:
            arguments = () if layer_type is None else (layer_type,)
            tables = self.tables
            if torch.compiler.is_compiling() or tables is None or not self.active:
                return original(self_, x, position_ids, *arguments)
            made = tables(self_, x, position_ids, layer_type)
            if made is not None:
                self._vouch(made, layer_type)
                return made
            pair = original(self_, x, position_ids, *arguments)
            if self._from_library:
                self._vouch(pair, layer_type)
            return pair

        setattr(forward, _MARK, self)
        self.ours = forward
        self._from_library = _from_library(original)
        self._widths: dict[str | None, str] = {}

    def _vouch(self, pair: Any, layer_type: str | None) -> None:
        """Spares functions the look at tables whose two halves are one by the code that made them.

        That is so of our own code and of transformers', once tables were seen that no other width
        fits: the one look of a class that synchronizes with the device.
        """
        width = self._widths.get(layer_type) or _width(pair)
        if width is not None:
            self._widths[layer_type] = width
            _alike[width].add(pair, fresh=True)

    def install(self) -> None:
        self.tables = Tables(self.original, self.options.rows, self.options.table == "float64")
        super().install()

    def remove(self) -> bool:
        self.tables = None  # with the rows that it keeps; a forward that runs holds its own
        return super().remove()


class _Function(_Replacement):
    """A rotary function; it has the original's signature."""

    depends_on = ("precision", "compiled")
    kept = 4

    def __init__(self, site: Site, form: Form, shim: Shim, options: Options) -> None:
        super().__init__(site, options)
        self.form = form
        self.function = site.function
        self.signature = signature(self.function)
        self.names = list(self.signature.parameters)
        tables = [name in TABLES for name in self.names]
        self.first = tables.index(True) if True in tables else 0
        self.last = self.first + sum(tables)
        self.differ = f"{site.key}: its tables are not those of the form {form.name!r}"
        self.warned = False
        self.ours = self._make(shim)

    def _make(self, shim: Shim) -> Any:
        original, precision = self.function, self.options.precision
        inlined = self.options.compiled == "stock" and self.form.inlines
        unread, known = self.form.unread, _alike[self.form.width].knows
        first, last = self.first, self.last

        def ours(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                if inlined or not self.active:
                    return original(*args, **kwargs)
                if unread:
                    self._assert_alike(args, kwargs)
                return shim(*args, precision=precision, **kwargs)
            if not self.active:
                return original(*args, **kwargs)
            looked = not unread or (len(args) >= last and known(args[first:last]))
            if not (looked or self._look(args, kwargs)):
                return self._fall_back(args, kwargs)
            try:
                return shim(*args, precision=precision, **kwargs)
            except (TypeError, ValueError) as error:  # raised before any memory is touched
                if isinstance(error, RealTableError):
                    raise
            return self._fall_back(args, kwargs)

        if isinstance(original, torch.nn.Module):  # a function as the `kernels` package wraps it
            ours.__signature__ = self.signature  # type: ignore[attr-defined]
            ours.__name__ = self.site.name
        else:
            functools.update_wrapper(ours, original)
        setattr(ours, _MARK, self)
        return staticmethod(ours) if isinstance(self.original, staticmethod) else ours

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def _assert_alike(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In a graph, which cannot look: the assertion is made where the graph runs."""
        for read, unread in self.form.halves(self._arguments(args, kwargs)):
            torch._assert_async((read == unread).all(), self.differ)

    def _fall_back(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original's results, their elements ordered as the shim's are."""
        result = self.function(*args, **kwargs)
        return result if self.form.order is None else tuple(map(self.form.order.ours, result))

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call's tables may be read by half: the other half is the same.

        Tables come from anywhere, and those that agree now may differ at other positions. So every
        new table is compared, once for all layers that share it. On CUDA that is one
        synchronization for a forward; none where the rotary module vouches for its tables.
        """
        try:
            arguments = self._arguments(args, kwargs)
            tables = [table for name, table in arguments.items() if name in TABLES]
            if _alike[self.form.width].knows(tables):
                return True
            if any(is_recorded(table.device) for table in tables):
                return False
            same = _same(self.form.halves(arguments))
        except Exception:  # no such arguments, or no values: meta, fake and mapped tensors
            return False
        if same:
            _alike[self.form.width].add(tables)
        else:
            self._give_up()
        return same

    def _give_up(self) -> None:
        """Ends the patch of the family, unless caches may hold keys in an order of our own."""
        if self.form.order is None:
            self.remove()
        if not self.warned:
            self.warned = self.form.order is not None
            warnings.warn(
                f"fused_rope: the model's own function rotates again: {self.differ}", stacklevel=4
            )


class _Alike:
    """Full-width tables that are known to have two equal halves, as long as they live unchanged."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int | None]] = {}

    def knows(self, tables: Sequence[Tensor]) -> bool:
        """Whether all of these are known."""
        for table in tables:
            known = self._known.get(id(table))
            if known is None or known[0]() is not table:
                return False
            if known[1] is not None and known[1] != table._version:
                return False
        return True

    def add(self, tables: Iterable[Tensor], fresh: bool = False) -> None:
        """Remembers these. An inference tensor has no version that tells that it was written to:
        only a fresh one, which nobody else holds, is remembered; another is compared each time."""
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


def _same(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether the tensors of each pair have equal values; with one synchronization."""
    if any(a.shape != b.shape for a, b in pairs):
        return False
    if all(a.device.type == "cpu" for a, _ in pairs):
        return all(torch.equal(a, b) for a, b in pairs)
    return bool(torch.stack([(a == b).all() for a, b in pairs]).all())


def _width(pair: Any) -> str | None:
    """Which width these full-width tables have; None where both fit, as at position 0, or none."""
    try:
        if is_recorded(pair[0].device):
            return None
        tiled, repeated = (_same([split(t, w) for t in pair]) for w in ("tiled", "repeated"))
    except Exception:  # no tables, or none with values
        return None
    return None if tiled == repeated else "tiled" if tiled else "repeated"


def _from_library(forward: Callable[..., Any]) -> bool:
    """Whether a function and all that it wraps are of transformers, or decorators of PyTorch."""
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
_alike = {width: _Alike() for width in ("tiled", "repeated", "blocks", "half", "first")}


def patch(
    model: torch.nn.Module | None = None,
    *,
    precision: str = "model",
    compiled: str | None = None,
    rows: int | None = None,
    table: str = "stock",
) -> Report:
    """Lets Hugging Face models rotate by the fused operator.

    The function is replaced for every instance of the model's family, and models are counted while
    they live: the last `unpatch` restores it, and copies of ours that were captured meanwhile call
    the original from then on. Gradients, torch.compile and generate() work as before. A call that
    the operator does not cover (unusual shapes, dtypes or arguments) runs the original.

    The operator reads one half of a full-width table. Each new table is compared with its other
    half, once for all layers; where they differ, the family's own function takes its place again,
    with a warning. On CUDA that synchronizes once for a rotary module of transformers, and once a
    forward for tables of other origin. While a CUDA graph is captured or a call is traced, tables
    that are not known run the original; a graph of torch.compile that was given the operator
    asserts that the halves agree.

    The family's rotary modules, which recompute cosines and sines at every forward, do so in fewer
    kernels where a reference check of each module finds the results bitwise identical: see `rows`.
    Dynamic and longrope scaling, M-RoPE, tracers and a matmul precision below float32 keep the
    module's own forward.

    DeepSeek's interleaved form permutes the elements of q and k before it rotates them; ours keeps
    their order, so attention scores are equal up to the order of their sums, and only patched
    models can read the keys in a cache.

    Args:
        model: a model of transformers 4.57 or 5; None for every family that is imported.
        precision: "model" keeps eager Hugging Face's roundings, bit for bit; "fp32" rounds once.
        compiled: what torch.compile is given. "stock" is the model's own function, which the
            compiler fuses with what stands around it; "fused" is the operator, which is opaque to
            it. None: "stock" where precision is "model". DeepSeek's interleaved form, whose keys
            lie otherwise in a cache, and functions written in Triton are the operator always.
        rows: all positions are below this. Then the CPU keeps the rows of the table across forwards
            until the module's frequencies change in any way or `unpatch` frees them; a position at
            or beyond the bound is an IndexError in the model's forward, a negative one means what
            it does in the original. CUDA keeps nothing and takes any position. None: any position,
            rows are recomputed.
        table: "stock": the model's own recipe, bit for bit, whose angles are float32. "float64":
            angles of the config's frequencies in float64, or of the module's own where these are
            others, times the module's attention_scaling, rounded once to the dtype that the module
            returns. It needs `rows`, takes effect in the first forward that is not captured in a
            CUDA graph (which synchronizes), and does not apply to torch.compile, nor wherever else
            the module keeps its own forward.

    Returns:
        A Report: which functions are replaced now, and which were left alone, and why. A function
        that cannot be read (scripted, builtin, compiled), whose form is unknown, or that somebody
        else replaced since another model was patched, is left alone.

    Raises:
        ValueError: an unknown option, `table="float64"` without `rows`, or another option than a
            live model of the family is patched with. Nothing is replaced then.

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
    options = _options(precision, compiled, rows, table)
    modules = modules_of(model)
    sites, forwards = list(rotary_functions(modules)), _forwards(modules)
    with _lock:
        for site in (*sites, *forwards):
            _agree(site, options)
        # All that may fail comes before anything is replaced.
        found = {site: _prepare(site, options, _function) for site in sites}
        known = {site.module for site, entry in found.items() if isinstance(entry, _Function)}
        for site in forwards:
            if site.module in known:
                found[site] = _prepare(site, options, _Forward)
        _install(found, model)
        return _report(found)


def unpatch(model: torch.nn.Module | None = None) -> Report:
    """Takes back one `patch` of the model's family; the last one restores the model's own function.

    Args:
        model: as it was given to `patch`, wrapped or not; None for every family that is imported.

    Returns:
        A Report: which functions are the model's own now, and which were left alone, and why.
    """
    report = Report()
    modules = {module.__name__ for module in modules_of(model)}
    with _lock:
        for entry in [e for e in _replacements.values() if e.site.module in modules]:
            entry.models.take(model)
            if not entry.models:
                entry.remove()
            if isinstance(entry, _Forward):
                report.tables[entry.site.owner_key] = _maker(entry)
            elif not entry.stands and entry.site.value is entry.original:
                report.restored.append(entry.site.key)
            else:
                report.left_alone[entry.site.key] = (
                    f"{len(entry.models)} more models are patched"
                    if entry.stands
                    else "it was replaced by somebody else since"
                )
    return report


def _maker(entry: _Replacement) -> str:
    """Who makes the tables of a rotary module now."""
    own = entry.site.value is entry.original
    return "ours" if entry.stands else "its own" if own else "somebody else's"


def _options(precision: str, compiled: str | None, rows: int | None, table: str) -> Options:
    if precision not in ("fp32", "model"):
        raise ValueError(f"patch: expected precision 'fp32' or 'model', got {precision!r}")
    if compiled not in (None, "stock", "fused"):
        raise ValueError(f"patch: expected compiled 'stock', 'fused' or None, got {compiled!r}")
    if rows is not None and rows < 1:
        raise ValueError(f"patch: expected rows >= 1 or None, got {rows}")
    if table not in ("stock", "float64"):
        raise ValueError(f"patch: expected table 'stock' or 'float64', got {table!r}")
    if table == "float64" and rows is None:
        raise ValueError("patch: expected rows >= 1 with table 'float64', got None")
    compiled = compiled or ("stock" if precision == "model" else "fused")
    return Options(precision, compiled, rows, table)


def _entry(site: Site) -> _Replacement | None:
    """The replacement of a site, for as long as a patched model lives and the owner is the same."""
    entry = _replacements.get(site.key)
    if entry is not None and (entry.site != site or not entry.models):
        entry.remove()
        return None
    return entry


def _agree(site: Site, options: Options) -> None:
    """Raises unless a family that is patched already was patched with these options."""
    entry = _entry(site)
    if entry is None:
        return
    for name, theirs in asdict(entry.options).items():
        ours = getattr(options, name)
        if ours != theirs:
            raise ValueError(
                f"patch: expected {name} {theirs!r}, which {site.key} is patched with, got {ours!r}"
            )


def _prepare(
    site: Site, options: Options, make: Callable[[Site, Options], _Replacement | str]
) -> _Replacement | str:
    """What is to stand at the site, or why nothing is."""
    entry = _entry(site)
    if entry is not None:
        if entry.stands or site.original is entry.original:
            return entry
        return "it was replaced by somebody else since another model was patched"
    for entry in _retired.get(site.key, []):  # compiled code that knows it is valid again
        if entry.fits(site, options):
            entry.options = options
            return entry
    return make(site, options)


def _install(found: dict[Site, _Replacement | str], model: torch.nn.Module | None) -> None:
    """Installs all that was found, or nothing; what cannot be replaced gets a reason."""
    before: list[tuple[_Replacement, Any, bool]] = []
    try:
        for site, entry in found.items():
            if isinstance(entry, str) or entry.stands:
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


def _report(found: dict[Site, _Replacement | str]) -> Report:
    report = Report()
    for site, entry in found.items():
        if isinstance(entry, _Function):
            report.patched[site.key] = entry.form.name
        elif isinstance(entry, _Forward):
            report.tables[site.owner_key] = "ours"
        elif site.name == "forward":
            report.tables[site.owner_key] = "somebody else's"
        else:
            report.left_alone[site.key] = str(entry)
    return report


def _function(site: Site, options: Options) -> _Function | str:
    found = find_form(site.name, site.function)
    return found if isinstance(found, str) else _Function(site, *found, options)


def _forwards(modules: Iterable[ModuleType]) -> list[Site]:
    return list(dict.fromkeys(Site(owner, "forward") for owner in rotary_modules(modules)))


def modules_of(model: torch.nn.Module | None) -> list[ModuleType]:
    """The Python modules that define the model's layers; of no model, those of every family."""
    if model is None:
        names = {
            name for name in sys.modules if re.match(r"transformers\.models\..*modeling", name)
        }
    else:
        names = {base.__module__ for layer in model.modules() for base in type(layer).__mro__}
    found = [sys.modules.get(name) for name in sorted(names)]
    return [module for module in found if isinstance(module, ModuleType)]


def rotary_functions(modules: Iterable[ModuleType]) -> Iterator[Site]:
    """The rotary functions of modules, and the rotary methods of the classes that these define.

    Whatever has such a name: whether it is a function at all, `find_form` says.
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
