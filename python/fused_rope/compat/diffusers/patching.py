"""`patch`, `unpatch`, `patched` and `is_patched` for models and pipelines of diffusers."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any, Literal, Protocol

import torch

from ...types import Compiled, Precision
from .._patching import norms as rms_norms
from .._patching import replacements
from .._patching.forms import Form
from .._patching.functions import Function
from .._patching.replacements import Options, Replacement, Report, Site
from .forms import find_form
from .processors import Processor, names_in, nested_functions
from .rewriting import rewrite

__all__ = ["Report", "is_patched", "patch", "patched", "report_of", "unpatch"]

_FUNCTION = re.compile(r"_?apply_\w*(rotary|rope)|(rope_apply|_rotate_half)$")
_NORM = re.compile("norm")
# Their models are not diffusers' own, and their functions do not rotate in its forms.
_OTHERS = re.compile(r"(builtins|torch|transformers|accelerate|peft)(\.|$)")


class Pipeline(Protocol):
    """A pipeline of diffusers."""

    @property
    def components(self) -> dict[str, Any]:
        """Its models, schedulers and tokenizers by name."""


def patch(
    model: torch.nn.Module | Pipeline | None = None,
    *,
    precision: Precision = "model",
    compiled: Compiled | None = None,
    norms: Literal["model", "fused"] = "model",
    fallback: bool = False,
) -> Report:
    """Makes models of diffusers rotate with the fused operator.

    It replaces the rotary functions that the model's layers and attention processors call: those of
    their Python modules, the shared one of `diffusers.models.embeddings`, and those that a
    processor defines inside of a method. A function is replaced for every model that calls it,
    until `unpatch` was called for all patched models or they are garbage. A call that the operator
    does not cover (unusual shapes or arguments, float64) runs the original.

    The operator reads one half of a full-width table. The halves of each new table are compared,
    once for all layers; if they differ, the original is restored, with a warning. On CUDA that
    synchronizes once per forward, and under inference mode, where writes to a table leave no trace,
    once per call. Tables of every second number and complex ones are not compared.

    Args:
        model: a model of diffusers, or a pipeline, whose models are patched; text encoders of
            transformers are not. None for every class that is imported.
        precision: "model" for results bitwise identical to the original's, or within one rounding
            where it multiplies complex numbers; "fp32" to compute in float32 and round once, which
            is what most of the originals do.
        compiled: what torch.compile gets. "original" is the model's own function, which the
            compiler fuses with the operators around it; "fused" is the operator. None is "original"
            with precision "model", else "fused".
        norms: "model": the model's own norms of q and k. "fused": processors that normalize q and k
            next to the rotation do both in one pass, forward and backward; without gradients a
            joint sequence of text and image is written in place of a concatenation. Fewer than 1e-4
            of bfloat16 elements differ from the model's, by one rounding. Norms with hooks,
            replaced forwards, wrappers or weights of another dtype, and all under autocast, run as
            modules.
        fallback: whether to patch models on devices without kernels, which run the reference.

    Returns:
        A Report of the functions that are replaced now, and of those that were left alone and why.

    Raises:
        TypeError: neither a model nor a pipeline.
        ValueError: an unknown option, or one that differs from that of a patched model with the
            same function. Nothing is replaced then.

    Example:
        >>> from diffusers import FluxTransformer2DModel
        >>> sizes = dict(num_layers=1, num_single_layers=1, num_attention_heads=2)
        >>> model = FluxTransformer2DModel(attention_head_dim=16, axes_dims_rope=(4, 4, 8), **sizes)
        >>> print(patch(model))
        patched diffusers.models.transformers.transformer_flux.apply_rotary_emb (shared)
        >>> print(unpatch(model))
        restored diffusers.models.transformers.transformer_flux.apply_rotary_emb
    """
    options = Options(precision, replacements.check_choices(precision, compiled, norms), norms)
    models, done = _models("patch", model), []
    report = Report()
    with replacements.lock:
        try:
            for part in models:
                sites = list(sites_of(_classes(part)))
                reason = None if fallback else replacements.lacks_kernels(part)
                if reason is not None:
                    report.left_alone |= {site.key: reason for site in sites}
                    continue
                found = _find(sites, options)
                replacements.install(found, part)
                done.append(part)
                _merge(report, _described(found, part))
        except BaseException:
            for part in done:
                replacements.undo(part, _belongs_to(part))
            raise
    return report


def unpatch(model: torch.nn.Module | Pipeline | None = None) -> Report:
    """Undoes one `patch` of a model or pipeline; the last one restores the original functions.

    Args:
        model: what was given to `patch`; None for everything that is imported.

    Returns:
        A Report of the functions that are the originals again, and of those that were left alone
        and why.

    Raises:
        TypeError: neither a model nor a pipeline.

    Example:
        >>> from diffusers import FluxTransformer2DModel
        >>> sizes = dict(num_layers=1, num_single_layers=1, num_attention_heads=2)
        >>> model = FluxTransformer2DModel(attention_head_dim=16, axes_dims_rope=(4, 4, 8), **sizes)
        >>> _ = patch(model)
        >>> unpatch(model).restored
        ['diffusers.models.transformers.transformer_flux.apply_rotary_emb']
    """
    report = Report()
    for part in _models("unpatch", model):
        _merge(report, replacements.undo(part, _belongs_to(part)))
    return report


@contextmanager
def patched(model: torch.nn.Module | Pipeline | None = None, **options: Any) -> Iterator[Report]:
    """Patches a model or pipeline inside a `with` statement.

    Args:
        model: as for `patch`.
        options: the keywords of `patch`.

    Yields:
        The Report of `patch`.

    Raises:
        TypeError, ValueError: as `patch`.

    Example:
        >>> from diffusers import FluxTransformer2DModel
        >>> sizes = dict(num_layers=1, num_single_layers=1, num_attention_heads=2)
        >>> model = FluxTransformer2DModel(attention_head_dim=16, axes_dims_rope=(4, 4, 8), **sizes)
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
        if report.patched or report.norms:
            unpatch(model)


def is_patched(model: torch.nn.Module | Pipeline | None = None) -> bool:
    """Whether a model, or one of a pipeline's, rotates with the operator now.

    Args:
        model: as for `patch`.

    Raises:
        TypeError: neither a model nor a pipeline.

    Example:
        >>> from diffusers import FluxTransformer2DModel
        >>> sizes = dict(num_layers=1, num_single_layers=1, num_attention_heads=2)
        >>> model = FluxTransformer2DModel(attention_head_dim=16, axes_dims_rope=(4, 4, 8), **sizes)
        >>> is_patched(model)
        False
    """
    tests = [_belongs_to(part) for part in _models("is_patched", model)]
    return replacements.any_installed(lambda entry: any(belongs(entry) for belongs in tests))


def _models(operator: str, model: Any) -> list[torch.nn.Module | None]:
    """The models of a model, pipeline or None."""
    if model is None or isinstance(model, torch.nn.Module):
        return [model]
    components = getattr(model, "components", None)
    if isinstance(components, dict) and not isinstance(model, type):
        modules = [part for part in components.values() if isinstance(part, torch.nn.Module)]
        return list(dict.fromkeys(modules))
    got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    raise TypeError(
        f"{operator}: expected a model or pipeline of diffusers or None, got {got}: pass an "
        "instance, such as that of from_pretrained"
    )


def _described(found: Mapping[Site, Replacement | str], model: torch.nn.Module | None) -> Report:
    """The report; norms of the model that the operator does not know are left alone in it."""
    report = replacements.describe(found)
    layers = [] if model is None else list(model.modules())
    for site, entry in found.items():
        if not (isinstance(entry, Processor) and site.key in report.norms and layers):
            continue
        owner = site.owner
        assert isinstance(owner, type)
        using = [layer for layer in layers if isinstance(vars(layer).get("processor"), owner)]
        norms = [getattr(layer, name, None) for layer in using for name in entry.norms]
        if using and not any(map(rms_norms.kind_of, norms)):
            names = sorted({type(norm).__name__ for norm in norms if norm is not None})
            del report.norms[site.key]
            report.left_alone[site.key] = f"its norms are not known: {', '.join(names) or 'none'}"
    return report


def _merge(report: Report, other: Report) -> None:
    report.patched |= other.patched
    report.norms |= other.norms
    report.restored += [key for key in other.restored if key not in report.restored]
    report.left_alone |= other.left_alone


def _belongs_to(model: torch.nn.Module | None) -> Callable[[Replacement], bool]:
    """Whether a replacement is at a site of the model, or was installed for it."""
    sites = set(sites_of(_classes(model)))
    return lambda entry: entry.site in sites or (model is not None and model in entry.models)


def report_of(classes: Iterable[type]) -> Report:
    """What `patch(norms="fused")` would report of models with layers and processors of classes."""
    options = Options("model", "original", "fused")
    with replacements.lock:
        return replacements.describe(_find(list(sites_of(classes)), options))


def _find(sites: list[Site], options: Options) -> dict[Site, Replacement | str]:
    """What to install at each site, or why nothing."""
    # A function does not depend on the norms, and may be shared with models that have others.
    common = replace(options, norms="model")
    found: dict[Site, Replacement | str] = {}
    for site in sites:
        replacements.check_options(site, common if isinstance(site.owner, ModuleType) else options)
    for site in sites:
        if isinstance(site.owner, ModuleType):
            found[site] = replacements.find_replacement(site, common, _function)
    forms = {s: entry.form for s, entry in found.items() if isinstance(entry, Function)}
    make = functools.partial(_processor, forms=forms)
    for site in sites:
        if isinstance(site.owner, type):
            entry = replacements.find_replacement(site, options, make)
            if entry:
                found[site] = entry
    return found


def _function(site: Site, options: Options) -> Function | str:
    found = find_form(site.name, site.function)
    return found if isinstance(found, str) else Function(site, *found, options)


def _processor(site: Site, options: Options, forms: Mapping[Site, Form]) -> Processor | str:
    """The replacement of a method, or why none; "" if it defines no function and fuses no norm.

    `forms` are those of the replaced functions of Python modules.
    """
    assert isinstance(site.owner, type)
    functions, left_alone = {}, {}
    method = inspect.unwrap(site.original)
    known = {}
    for name in _called(method):
        called = _site_of(method, name)
        if called is not None and called in forms:
            known[name] = forms[called]
    for function in nested_functions(method):
        name = function.__name__
        if _FUNCTION.match(name):
            form = find_form(name, function)
            if isinstance(form, str):
                left_alone[f"{site.key}.{name}"] = form
            else:
                functions[name] = (function, *form)
                known[name] = form[0]
    fuse = options.norms == "fused" and _normalizes(site.original)
    if not functions and not fuse:
        return next(iter(left_alone.values()), "")
    if fuse:
        _learn_norms()
    normalizing = {name for name, form in known.items() if form.normalizes}
    rewritten = rewrite(site.owner, site.original, functions, normalizing, fuse)
    if isinstance(rewritten, str):
        return rewritten
    if fuse and not rewritten.norms:
        left_alone[site.key] = "no norm of q and k stands next to the rotation"
        if not functions:
            return next(iter(left_alone.values()))
    return Processor(site, functions, rewritten, options, left_alone)


def _normalizes(method: Any) -> bool:
    return any(map(_NORM.search, names_in(inspect.unwrap(method).__code__)))


@functools.cache
def _learn_norms() -> None:
    """Makes the norms of diffusers' attention classes known."""
    normalization = import_module("diffusers.models.normalization")
    for norm in (torch.nn.RMSNorm, normalization.RMSNorm, normalization.MochiRMSNorm):
        rms_norms.learn(norm)


def _classes(model: torch.nn.Module | None) -> Iterator[type]:
    """The classes of a model's layers and of their processors; for None, all of diffusers."""
    if model is None:
        for name, module in sorted(sys.modules.items()):
            if name.startswith("diffusers.") and isinstance(module, ModuleType):
                for value in list(vars(module).values()):
                    if isinstance(value, type) and value.__module__ == name:
                        yield value
        return
    layers = list(model.modules())
    processors = [vars(layer).get("processor") for layer in layers]
    kinds = dict.fromkeys(type(part) for part in (*layers, *processors))
    yield from dict.fromkeys(base for kind in kinds for base in kind.__mro__)


def sites_of(classes: Iterable[type]) -> Iterator[Site]:
    """The rotary functions that methods of these classes call or define.

    A function of a Python module is an attribute of the module; a method that defines one, or
    normalizes and rotates, is an attribute of its class.
    """
    sites: dict[Site, None] = {}
    for kind in classes:
        if _OTHERS.match(kind.__module__):
            continue
        for name, value in list(vars(kind).items()):
            method = inspect.unwrap(Site(kind, name).original) if callable(value) else None
            if not isinstance(method, FunctionType):
                continue
            owners = list(_called_sites(method))
            defined = [f for f in nested_functions(method) if _FUNCTION.match(f.__name__)]
            sites |= dict.fromkeys(owners)
            if defined or (owners and name == "__call__" and _normalizes(method)):
                sites[Site(kind, name)] = None
    yield from sites


def _called_sites(method: FunctionType) -> Iterator[Site]:
    """The sites that a method calls, also through other functions of its Python module."""
    functions = {method: None}
    rest = [method]
    while rest:
        function = rest.pop()
        for name in _called(function):
            site = _site_of(function, name)
            if site is not None:
                yield site
        for name in names_in(function.__code__):
            value = function.__globals__.get(name)
            other = None if _FUNCTION.match(name) or not callable(value) else inspect.unwrap(value)
            if isinstance(other, FunctionType) and other not in functions:
                functions[other] = None
                rest += [other] if other.__globals__ is method.__globals__ else []


def _called(method: FunctionType) -> list[str]:
    """The names of rotary functions that a method does not define."""
    return [name for name in dict.fromkeys(names_in(method.__code__)) if _FUNCTION.match(name)]


def _site_of(method: FunctionType, name: str) -> Site | None:
    """The module attribute that a method calls by this name, imported or not."""
    if name in method.__globals__:
        module = sys.modules.get(method.__globals__["__name__"])
        return Site(module, name) if isinstance(module, ModuleType) else None
    embeddings = sys.modules.get("diffusers.models.embeddings")
    known = isinstance(embeddings, ModuleType) and name in vars(embeddings)
    return Site(embeddings, name) if known and embeddings is not None else None
