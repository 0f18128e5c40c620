"""`patch`, `unpatch` and `patched`: replace and restore the rotary functions of model families."""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch

from ...frequencies import whole_number
from ...tracing import is_recorded
from ...types import Compiled, Precision
from .._patching import functions, replacements
from .._patching import norms as rms_norms
from .._patching.forms import Form, split
from .._patching.functions import Function, rotation_of, verified
from .._patching.replacements import MARK, Replacement, Report, Site, replacer
from .forms import find_form
from .rewriting import Calls, Rewritten, norm_classes, rewrite
from .tables import Tables, rotary_modules

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
_replacements = replacements.current  # tools that look at the state find it under this name


@dataclass(frozen=True)
class Options(replacements.Options):
    """The options of `patch`."""

    rows: int | None
    table: str


class _Forward(Replacement):
    """Replaces the forward of a rotary module. Compiled code depends on none of its options."""

    depends_on = ()
    options: Options

    def __init__(self, site: Site, options: Options) -> None:
        super().__init__(site, options)
        original = self.original
        self.tables: Tables | None = None
        self.functions: list[Function] = []  # those of the family
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

        setattr(forward, MARK, self)
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
            verified[width].add(pair, fresh=True)

    def _warn_if_replaced(self) -> None:
        """Warns if other code replaced a rotary function of the family after it was patched."""
        for function in self.functions:
            if function.active and not function.installed:
                self._warned = True
                who, advice = replacer(function.site.value)
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

    def report(self, report: Report) -> None:
        report.tables[self.site.owner_key] = "ours"

    def report_undone(self, report: Report) -> None:
        own = self.site.value is self.original
        maker = "ours" if self.installed else "its own" if own else "somebody else's"
        report.tables[self.site.owner_key] = maker


class _Attention(Replacement):
    """Replaces the forward of an attention class by one whose norms run with the rotation."""

    depends_on = ("precision", "compiled", "norms")
    kept = 4

    def __init__(self, site: Site, rewritten: Rewritten, how: str, options: Options) -> None:
        super().__init__(site, options)
        self.how = how
        self.ours = rewritten.make(
            Calls(self._defer, self._rotate, self._rotate_first, rms_norms.normalize)
        )
        setattr(self.ours, MARK, self)

    def report(self, report: Report) -> None:
        report.norms[self.site.key] = self.how

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
        rotation = rotation_of(function)
        if norm is None or rotation is None:
            return None
        return rotation.normalized(norm, args, kwargs)


def _width(pair: Any) -> str | None:
    """The width of these full-width tables; None if both fit, as at position 0, or neither does."""
    try:
        if is_recorded(pair[0].device):
            return None
        tiled, repeated = (
            functions.all_equal([split(t, w) for t in pair]) for w in ("tiled", "repeated")
        )
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
        TypeError: the model is a name, a config or a class, or rows is not an int.
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
    reason = None if fallback else replacements.lacks_kernels(model)
    if reason is not None:
        return Report(left_alone={site.key: reason for site in sites})
    with replacements.lock:
        for site in (*sites, *forwards, *attentions):
            replacements.check_options(site, options)
        # Everything that may fail precedes the first replacement.
        found = {site: replacements.find_replacement(site, options, _function) for site in sites}
        known = {site.module for site, entry in found.items() if isinstance(entry, Function)}
        for site in forwards:
            if site.module in known:
                found[site] = replacements.find_replacement(site, options, _Forward)
        forms = {site.key: e.form for site, e in found.items() if isinstance(e, Function)}
        for site in attentions:
            entry = _find_attention(site, forms, options)
            if entry is not None:
                found[site] = entry
        replacements.install(found, model)
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
    return replacements.undo(model, _belongs_to(model))


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
    belongs = _belongs_to(model)
    return replacements.any_installed(lambda entry: isinstance(entry, Function) and belongs(entry))


def _belongs_to(model: torch.nn.Module | None) -> Callable[[Replacement], bool]:
    """Whether a replacement is one of the model's family."""
    modules = {module.__name__ for module in modules_of(model)}
    return lambda entry: entry.site.module in modules


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


def _options(
    precision: str, compiled: str | None, rows: int | None, table: str, norms: str
) -> Options:
    compiled = replacements.check_choices(precision, compiled, norms)
    rows = None if rows is None else whole_number("patch", "rows", rows)
    if rows is not None and rows < 1:
        raise ValueError(f"patch: expected rows >= 1 or None, got {rows}")
    if table not in ("original", "float64"):
        raise ValueError(f"patch: expected table 'original' or 'float64', got {table!r}")
    if table == "float64" and rows is None:
        raise ValueError("patch: expected rows >= 1 with table 'float64', got None")
    return Options(precision, compiled, norms, rows, table)


def _report(found: dict[Site, Replacement | str], modules: list[ModuleType]) -> Report:
    rotary = {site.owner for site in _forwards(modules)}
    forwards = [site for site in found if site.name == "forward" and site.owner in rotary]
    others = {site: found[site] for site in forwards if not isinstance(found[site], Replacement)}
    report = replacements.describe({s: entry for s, entry in found.items() if s not in others})
    report.tables |= {site.owner_key: "somebody else's" for site in others}
    return report


def _link(found: Mapping[Site, Replacement | str]) -> None:
    """Tells the forwards of rotary modules which functions read their tables."""
    functions = [entry for entry in found.values() if isinstance(entry, Function)]
    for entry in found.values():
        if isinstance(entry, _Forward):
            entry.functions = [f for f in functions if f.site.module == entry.site.module]


def _function(site: Site, options: Options) -> Function | str:
    who, advice = replacer(site.original)
    if advice:
        return f"it was replaced by {who} first{advice}"
    found = find_form(site.name, site.function)
    return found if isinstance(found, str) else Function(site, *found, options)


def _find_attention(
    site: Site, forms: Mapping[str, Form], options: Options
) -> Replacement | str | None:
    """The replacement of an attention class's forward, or why none; None if it has no norms."""
    rewritten = find_norms(site, forms)
    if rewritten is None or isinstance(rewritten, str):  # also where it had another norm before
        return rewritten

    def make(site: Site, options: Options) -> Replacement | str:
        return _Attention(site, *rewritten, options)

    return replacements.find_replacement(site, options, make)


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
