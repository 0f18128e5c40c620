"""`patch` and `unpatch`: a family's rotary functions become ours, and its own again."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from .forms import Form, find_form, signature
from .shims import Shim

__all__ = ["Report", "modules_of", "patch", "rotary_functions", "unpatch"]

_FUNCTION = re.compile(r"(vision_)?apply_\w*(rotary|rope)")
_METHOD = re.compile(r"_?apply_rotary")


@dataclass
class Report:
    """What `patch` or `unpatch` did: by function, "module.function" or "module.class.method".

    Attributes:
        patched: functions that are ours now, and the form of each.
        restored: functions that are the models' own again.
        left_alone: functions that were not touched, and why.
    """

    patched: dict[str, str] = field(default_factory=dict)
    restored: list[str] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"patched {name} ({form})" for name, form in self.patched.items()]
        lines += [f"restored {name}" for name in self.restored]
        lines += [f"left alone {name}: {reason}" for name, reason in self.left_alone.items()]
        return "\n".join(lines) or "found no rotary function"


@dataclass(frozen=True)
class Site:
    """Where a rotary function lives: in a module, or in a class as a method."""

    owner: ModuleType | type
    name: str

    @property
    def key(self) -> str:
        if isinstance(self.owner, ModuleType):
            return f"{self.owner.__name__}.{self.name}"
        return f"{self.owner.__module__}.{self.owner.__qualname__}.{self.name}"

    @property
    def value(self) -> Any:
        """The function, or the method, as it stands in its owner."""
        return vars(self.owner)[self.name]

    @property
    def function(self) -> Callable[..., Any]:
        """What is called there."""
        value = self.value
        return value.__func__ if isinstance(value, staticmethod) else value


@dataclass
class _Patch:
    site: Site
    stock: Any
    form: Form
    shim: Shim
    precision: str
    models: int = 0
    ours: Any = None
    signature: inspect.Signature = field(default_factory=inspect.Signature)
    seen: bool = False

    def install(self) -> None:
        """Puts a function of the stock one's own signature in its place."""
        stock, shim, precision = self.site.function, self.shim, self.precision

        def ours(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling() and not self.seen and self._refuses(args, kwargs):
                return stock(*args, **kwargs)
            return shim(*args, precision=precision, **kwargs)

        self.signature = signature(stock)
        if isinstance(stock, torch.nn.Module):  # a function as the `kernels` package wraps it
            ours.__signature__ = self.signature  # type: ignore[attr-defined]
            ours.__name__ = self.site.name
        else:
            functools.update_wrapper(ours, stock)
        self.seen = self.form.width in ("half", "first")
        self.ours = staticmethod(ours) if isinstance(self.stock, staticmethod) else ours
        setattr(self.site.owner, self.site.name, self.ours)

    def remove(self) -> bool:
        """Restores the stock function, unless somebody else has replaced ours since."""
        _patches.pop(self.site.key, None)
        if self.site.value is not self.ours:
            return False
        setattr(self.site.owner, self.site.name, self.stock)
        return True

    def _refuses(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Looks at the first real call's tables: we read half of them, so the rest must be alike.

        This waits for the device, once for a family. What cannot be looked at now is looked at in a
        later call.
        """
        if torch._C._functorch.peek_interpreter_stack() is not None or (
            torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
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


_patches: dict[str, _Patch] = {}


def patch(model: torch.nn.Module | None = None, *, precision: str = "model") -> Report:
    """Lets Hugging Face models rotate by the fused operator.

    The function is replaced for every instance of the model's family, and models are counted: the
    last `unpatch` restores it. Gradients, torch.compile and generate() work as before. At the first
    call the tables are looked at, once for a family (this waits for the device): where the half
    that the operator does not read differs from the one it reads, the model's own function takes
    its place again, with a warning. (Compiled and captured calls cannot look: call once before.)

    DeepSeek's interleaved form permutes the lanes of q and k before it rotates them; ours leaves
    them where they are, so attention scores are equal up to the order of their sums, and keys in a
    cache are to be read by patched models alone.

    Args:
        model: a model of transformers 4.57 or 5; None for every family that is imported.
        precision: "model" keeps eager Hugging Face's roundings, bit for bit; "fp32" rounds once.

    Returns:
        A Report: which functions were replaced, and which were left alone, and why.

    Raises:
        ValueError: an unknown precision, or another than the family was patched with before.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> print(patch(model))
        patched transformers.models.llama.modeling_llama.apply_rotary_pos_emb (half)
        >>> print(unpatch(model))
        restored transformers.models.llama.modeling_llama.apply_rotary_pos_emb
    """
    if precision not in ("fp32", "model"):
        raise ValueError(f"patch: expected precision 'fp32' or 'model', got {precision!r}")
    sites = list(rotary_functions(modules_of(model)))
    for site in sites:
        entry = _patches.get(site.key)
        if entry is not None and entry.precision != precision:
            raise ValueError(
                f"patch: expected precision {entry.precision!r}, which {site.key} is patched with, "
                f"got {precision!r}"
            )
    report = Report()
    for site in sites:
        entry = _patches.get(site.key)
        if entry is None:
            found = find_form(site.name, site.function)
            if isinstance(found, str):
                report.left_alone[site.key] = found
                continue
            entry = _patches[site.key] = _Patch(site, site.value, *found, precision)
            entry.install()
        entry.models += 1
        report.patched[site.key] = entry.form.name
    return report


def unpatch(model: torch.nn.Module | None = None) -> Report:
    """Takes back one `patch` of the model's family; the last one restores the model's own function.

    Args:
        model: as it was given to `patch`; None for every family that is imported.

    Returns:
        A Report: which functions were restored, and which were left alone, and why.
    """
    report = Report()
    for site in rotary_functions(modules_of(model)):
        entry = _patches.get(site.key)
        if entry is None:
            continue
        entry.models -= 1
        if entry.models > 0:
            report.left_alone[site.key] = f"{entry.models} more models are patched"
        elif entry.remove():
            report.restored.append(site.key)
        else:
            report.left_alone[site.key] = "it was replaced by somebody else since"
    return report


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
