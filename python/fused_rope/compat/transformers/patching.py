"""`patch` and `unpatch`: a family's rotary functions and tables become ours, and its own again."""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import torch

from .forms import Form, find_form, signature
from .shims import Shim
from .tables import Tables, rotary_modules

__all__ = ["Report", "modules_of", "patch", "rotary_functions", "unpatch"]

_FUNCTION = re.compile(r"(vision_)?apply_\w*(rotary|rope)")
_METHOD = re.compile(r"_?apply_rotary")


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
        """The function, or the method, as it stands in its owner."""
        return vars(self.owner)[self.name]

    @property
    def function(self) -> Callable[..., Any]:
        """What is called there."""
        value = self.value
        return value.__func__ if isinstance(value, staticmethod) else value


@dataclass(frozen=True)
class Options:
    """What a family is patched with, as `patch` takes it."""

    precision: str
    compiled: str
    rows: int | None
    table: str

    @property
    def compiled_code(self) -> tuple[str, str]:
        """What compiled code depends on; rows and table matter to eager calls alone."""
        return self.precision, self.compiled


@dataclass
class _Replacement:
    """What stands at a site in place of the stock value, for so many models."""

    site: Site
    stock: Any
    options: Options
    models: int = 0
    ours: Any = None

    def install(self) -> None:
        setattr(self.site.owner, self.site.name, self.ours)

    def remove(self) -> bool:
        """Restores the stock value, unless somebody else has replaced ours since."""
        self.models = 0
        if _replacements.get(self.site.key) is self:
            del _replacements[self.site.key]
        if self.site.value is not self.ours:
            return False
        setattr(self.site.owner, self.site.name, self.stock)
        _retired[self.site.key, self.options.compiled_code] = self
        return True


class _Forward(_Replacement):
    """The forward of a rotary module."""

    def __init__(self, site: Site, options: Options) -> None:
        super().__init__(site, site.value, options)
        self.tables: Tables | None = None
        stock, replacement = site.value, self

        @functools.wraps(stock)
        def forward(
            self: torch.nn.Module, x: Any, position_ids: Any = None, layer_type: str | None = None
        ) -> Any:
            made = None
            if not torch.compiler.is_compiling() and (tables := replacement.tables) is not None:
                made = tables(self, x, position_ids, layer_type)
            if made is not None:
                return made
            return stock(self, x, position_ids, *([] if layer_type is None else [layer_type]))

        self.ours = forward

    def install(self) -> None:
        self.tables = Tables(self.stock, self.options.rows, self.options.table == "float64")
        super().install()

    def remove(self) -> bool:
        self.tables = None  # with the rows that it keeps; a forward that runs holds its own
        return super().remove()


class _Function(_Replacement):
    """A rotary function; it has the stock one's signature."""

    def __init__(self, site: Site, form: Form, shim: Shim, options: Options) -> None:
        super().__init__(site, site.value, options)
        self.form = form
        self.signature = signature(site.function)
        self.ours = self._make(site.function, shim)

    def install(self) -> None:
        self.seen = self.form.width in ("half", "first")
        super().install()

    def _make(self, stock: Callable[..., Any], shim: Shim) -> Any:
        precision = self.options.precision
        inlined = self.options.compiled == "stock" and self.form.inlines

        def ours(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                if inlined:
                    return stock(*args, **kwargs)
            elif not self.seen and self._refuses(args, kwargs):
                return stock(*args, **kwargs)
            return shim(*args, precision=precision, **kwargs)

        if isinstance(stock, torch.nn.Module):  # a function as the `kernels` package wraps it
            ours.__signature__ = self.signature  # type: ignore[attr-defined]
            ours.__name__ = self.site.name
        else:
            functools.update_wrapper(ours, stock)
        return staticmethod(ours) if isinstance(self.stock, staticmethod) else ours

    def _refuses(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Looks at the first real call's tables: we read half of them, so the rest must be alike.

        This waits for the device, once for a family. What cannot be looked at now is looked at in a
        later call.
        """
        if (
            torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._is_tracing()
            or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
        ):
            return False
        call = self.signature.bind(*args, **kwargs)
        try:
            alike = all(torch.equal(*pair) for pair in self.form.halves(call.arguments))
        except (NotImplementedError, RuntimeError):  # no values: meta and fake tensors
            return False
        self.seen = alike
        if not alike:
            self.remove()
            warnings.warn(
                f"fused_rope: {self.site.key} is the model's own again: its tables are not "
                f"those of the form {self.form.name!r}",
                stacklevel=3,
            )
        return not alike


_replacements: dict[str, _Replacement] = {}
_retired: dict[tuple[str, tuple[str, str]], _Replacement] = {}


def patch(
    model: torch.nn.Module | None = None,
    *,
    precision: str = "model",
    compiled: str | None = None,
    rows: int | None = None,
    table: str = "stock",
) -> Report:
    """Lets Hugging Face models rotate by the fused operator.

    The function is replaced for every instance of the model's family, and models are counted: the
    last `unpatch` restores it. Gradients, torch.compile and generate() work as before. At the first
    call the tables are looked at, once for a family (this waits for the device): where the half
    that the operator does not read differs from the one it reads, the model's own function takes
    its place again, with a warning. (Captured and traced calls cannot look: call once before.)

    The family's rotary modules, which recompute cosines and sines at every forward, do so in fewer
    kernels where a reference check of each module finds the results bitwise identical: see `rows`.
    Dynamic and longrope scaling, M-RoPE, tracers and a matmul precision below float32 keep the
    module's own forward.

    DeepSeek's interleaved form permutes the lanes of q and k before it rotates them; ours leaves
    them where they are, so attention scores are equal up to the order of their sums, and keys in a
    cache are to be read by patched models alone.

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
        A Report: which functions were replaced, and which were left alone, and why.

    Raises:
        ValueError: an unknown option, `table="float64"` without `rows`, or another option than the
            family was patched with before.

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
    sites = list(rotary_functions(modules))
    for site in (*sites, *_forwards(modules)):
        _agree(site, options)
    report = Report()
    for site in sites:
        entry = _take(site, options, _function)
        if isinstance(entry, _Function):
            report.patched[site.key] = entry.form.name
        else:
            report.left_alone[site.key] = str(entry)
    patched = {site.module for site in sites if site.key in report.patched}
    for site in _forwards(modules):
        if site.module in patched:
            _take(site, options, _Forward)
            report.tables[site.owner_key] = "ours"
    return report


def unpatch(model: torch.nn.Module | None = None) -> Report:
    """Takes back one `patch` of the model's family; the last one restores the model's own function.

    Args:
        model: as it was given to `patch`; None for every family that is imported.

    Returns:
        A Report: which functions were restored, and which were left alone, and why.
    """
    report = Report()
    modules = {module.__name__ for module in modules_of(model)}
    for entry in [e for e in _replacements.values() if e.site.module in modules]:
        entry.models -= 1
        restored = entry.models == 0 and entry.remove()
        if isinstance(entry, _Forward):
            report.tables[entry.site.owner_key] = (
                "its own" if restored else "ours" if entry.models else "somebody else's"
            )
        elif restored:
            report.restored.append(entry.site.key)
        elif entry.models:
            report.left_alone[entry.site.key] = f"{entry.models} more models are patched"
        else:
            report.left_alone[entry.site.key] = "it was replaced by somebody else since"
    return report


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


def _agree(site: Site, options: Options) -> None:
    """Raises unless a family that is patched already was patched with these options."""
    entry = _replacements.get(site.key)
    if entry is None:
        return
    for name, theirs in asdict(entry.options).items():
        ours = getattr(options, name)
        if ours != theirs:
            raise ValueError(
                f"patch: expected {name} {theirs!r}, which {site.key} is patched with, got {ours!r}"
            )


def _take(
    site: Site, options: Options, make: Callable[[Site, Options], _Replacement | str]
) -> _Replacement | str:
    """What is installed at the site, for one more model, or why nothing is."""
    entry = _replacements.get(site.key)
    if entry is None:
        entry = _retired.get(
            (site.key, options.compiled_code)
        )  # compiled code that knows it is valid again
        if entry is None or entry.stock is not site.value:
            made = make(site, options)
            if isinstance(made, str):
                return made
            entry = made
        entry.options = options
        _replacements[site.key] = entry
        entry.install()
    entry.models += 1
    return entry


def _function(site: Site, options: Options) -> _Function | str:
    found = find_form(site.name, site.function)
    return found if isinstance(found, str) else _Function(site, *found, options)


def _forwards(modules: Iterable[ModuleType]) -> list[Site]:
    return [Site(owner, "forward") for owner in rotary_modules(modules)]


def modules_of(model: torch.nn.Module | None) -> list[ModuleType]:
    """The Python modules that define the model's layers; of no model, those of every family."""
    if model is None:
        names = {
            name for name in sys.modules if re.match(r"transformers\.models\..*modeling", name)
        }
    else:
        names = {base.__module__ for layer in model.modules() for base in type(layer).__mro__}
    return [sys.modules[name] for name in sorted(names) if name in sys.modules]


def rotary_functions(modules: Iterable[ModuleType]) -> Iterator[Site]:
    """The rotary functions of modules, and the rotary methods of the classes that these define."""
    for module in modules:
        for name, value in sorted(vars(module).items()):
            if _FUNCTION.match(name) and callable(value):
                yield Site(module, name)
            elif isinstance(value, type) and value.__module__ == module.__name__:
                for method in sorted(vars(value)):
                    if _METHOD.match(method):
                        yield Site(value, method)
