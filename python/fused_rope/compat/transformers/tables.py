"""The cosines and sines that a model's rotary module recomputes at every forward, in fewer kernels.

The original recipe launches nine kernels, whose time is mostly the host's. This module has three
replacements:

* A recipe of three kernels: positions times frequencies, the cosine, the sine, each written in the
  model's dtype. Nothing is kept, and any position is valid.
* With a bound on the positions, the rows below it are kept on the CPU, and a forward gathers its
  rows. Every forward compares the module's frequencies bitwise with those of the rows. On CUDA that
  comparison would synchronize or launch as many kernels as the recipe, so nothing is kept there.
* Float64 angles of the config's frequencies, of which the module holds rounded ones. On the CPU
  they fill the kept rows; on CUDA each forward selects the frequencies on the device.

All need a reference check of the module instance that finds the results bitwise identical. Whatever
is kept here is immutable, so that threads may share it. A table has R columns, or P if its width is
"half".
"""

from __future__ import annotations

import copy
import inspect
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...frequencies import frequencies
from ...functional import cos_sin_table
from ...hf_config import config_arguments
from ...tracing import is_capturing, is_recording, outside_modes

__all__ = ["RECIPES", "Recipe", "Tables", "rotary_modules"]

Pair = tuple[Tensor, Tensor]
Key = tuple[Any, ...]

_NAME = re.compile(r"\w*Rotary\w*Embedding$")
_PARAMETERS = (["self", "x", "position_ids"], ["self", "x", "position_ids", "layer_type"])


def rotary_modules(modules: Iterable[ModuleType]) -> Iterator[type[torch.nn.Module]]:
    """The classes defined in `modules` whose forward takes hidden states and position_ids."""
    for module in modules:
        for name, value in sorted(vars(module).items()):
            if (
                _NAME.match(name)
                and isinstance(value, type)
                and value.__module__ == module.__name__
                and _parameters(vars(value).get("forward")) in _PARAMETERS
            ):
                yield value


def _parameters(forward: Any) -> list[str]:
    """The names of a function's parameters; empty if it has no readable signature."""
    try:
        return list(inspect.signature(forward).parameters) if inspect.isfunction(forward) else []
    except Exception:  # a custom __signature__ may raise anything
        return []


@dataclass(frozen=True)
class Recipe:
    """How a module computes cosines and sines from frequencies and positions.

    Attributes:
        width: of the tables: "tiled" (two equal halves), "repeated" (every value twice) or "half".
        float32: whether the tables are float32; otherwise they have the hidden states' dtype.
    """

    width: str
    float32: bool = False

    def make(self, frequencies: Tensor, scale: float, ids: Tensor, dtype: torch.dtype) -> Pair:
        """Cosine and sine [..., R] of positions [...]; angles have the frequencies' dtype."""
        angles = (ids[..., None, None] * self._columns(frequencies)).flatten(-2)
        dtype = torch.float32 if self.float32 else dtype
        return _scaled(torch.cos, angles, scale, dtype), _scaled(torch.sin, angles, scale, dtype)

    def make_rows(
        self, frequencies: Tensor, scale: float, bound: int, dtype: torch.dtype
    ) -> Tensor:
        """Rows [M, 2R] on the CPU, cosine then sine, of the positions below the bound."""
        if frequencies.dtype != torch.float64:
            return torch.cat(self.make(frequencies, scale, torch.arange(bound), dtype), dim=-1)
        dtype = torch.float32 if self.float32 else dtype
        pair = cos_sin_table(frequencies, bound, scale=scale, dtype=dtype)
        return torch.cat([self._columns(half).flatten(-2) for half in pair], dim=-1)

    def _columns(self, values: Tensor) -> Tensor:
        """A view of [..., P] whose last two dimensions, flattened, are the R columns."""
        if self.width == "repeated":
            return values[..., None].expand(*values.shape, 2)
        return values[..., None, :].expand(*values.shape[:-1], 1 + (self.width == "tiled"), -1)


def _scaled(
    function: Callable[..., Tensor], angles: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    if torch._C._len_torch_dispatch_stack():  # a mode may save results, which out= overwrites
        values = function(angles)
        return (values if scale == 1 else values * scale).to(dtype)
    out = torch.empty_like(angles, dtype=dtype)
    return function(angles, out=out) if scale == 1 else torch.mul(function(angles), scale, out=out)


RECIPES = tuple(
    Recipe(width, float32) for width in ("tiled", "repeated", "half") for float32 in (False, True)
)


@dataclass(frozen=True)
class _KeptRows:
    """Rows [M, 2R] on the CPU, cosine then sine, and all that they were computed from.

    Attributes:
        rows: of the positions 0 to M - 1.
        dtype: of the hidden states.
        inv_freq: [P], the module's frequencies, reinterpreted as integers.
        frequencies: [P], those of the angles: inv_freq in float32, or float64 ones.
    """

    rows: Tensor
    recipe: Recipe
    scale: float
    dtype: torch.dtype
    inv_freq_dtype: torch.dtype
    inv_freq: Tensor
    frequencies: Tensor

    def are_of(self, recipe: Recipe, inv_freq: Tensor, scale: float) -> bool:
        """Whether the module still has the rows' frequencies and scale.

        It compares values, since writes through NumPy views do not change a tensor's version.
        """
        if (
            self.scale != scale
            or self.recipe is not recipe
            or self.inv_freq_dtype != inv_freq.dtype
        ):
            return False
        if torch._C._len_torch_dispatch_stack() > 0:  # modes must see the same operators each time
            with outside_modes():
                return torch.equal(self.inv_freq, _bits(inv_freq))
        return torch.equal(self.inv_freq, _bits(inv_freq))

    def gather(self, ids: Tensor) -> Pair:
        """Cosine and sine [B, S, R] of positions below M; negative ones are computed."""
        try:
            found = torch.embedding(self.rows, ids)
        except IndexError:
            rows, highest = self.rows.shape[0], int(ids.max())
            if highest >= rows:
                raise IndexError(
                    f"patch(model, rows={rows}): position {highest} has no row; "
                    f"pass rows= at least {highest + 1}"
                ) from None
            made = torch.cat(self.recipe.make(self.frequencies, self.scale, ids, self.dtype), -1)
            found = torch.embedding(self.rows, ids.clamp(min=0))
            found = torch.where(ids[..., None] < 0, made, found)
        cos, sin = found.chunk(2, dim=-1)
        return cos, sin


@dataclass(frozen=True)
class _ConfigFrequencies:
    """The float64 frequencies of a module's config, and bounds on their roundings.

    Attributes:
        values, low, high: float64 [P].
    """

    values: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def read(
        cls, module: torch.nn.Module, inv_freq: Tensor, layer_type: str | None
    ) -> _ConfigFrequencies | None:
        """Those of a module, on the CPU; None if its config does not determine them."""
        try:
            arguments = config_arguments(module.config, layer_type, interleaved=False)
            values, _ = frequencies(
                arguments["rotary_dim"], arguments["base"], arguments["scaling"]
            )
        except Exception:  # of any kind: the module's own frequencies are used
            return None
        if values.shape != inv_freq.shape:
            return None
        # Computed in float32 they are off by a few ulp; in a narrower dtype by one of its ulp.
        margin = values.abs() * max(2e-6, torch.finfo(inv_freq.dtype).eps)
        return cls(values, values - margin, values + margin)

    def exact(self, inv_freq: Tensor) -> Tensor:
        """Float64 [P]: the config's frequency if the module's is a rounding of it, or the module's.

        With float32 frequencies, angles of far positions are as inexact as float32 angles.
        """
        held = inv_freq.double()
        return torch.where(held.clamp(self.low, self.high) == held, self.values, held)

    def to(self, device: torch.device) -> _ConfigFrequencies:
        return _ConfigFrequencies(*(t.to(device) for t in (self.values, self.low, self.high)))


@dataclass(frozen=True)
class _DeviceFrequencies:
    """A config's frequencies on a CUDA device, and what tells when to read the config again.

    The device compares them with the module's frequencies, so changes of those need no action here.
    """

    found: _ConfigFrequencies | None
    host: _ConfigFrequencies | None
    config: Any
    inv_freq: weakref.ref[Tensor]
    version: int | None

    def is_recent(self, module: torch.nn.Module, inv_freq: Tensor) -> bool:
        return (
            self.inv_freq() is inv_freq
            and self.version == _version(inv_freq)
            and self.config is getattr(module, "config", None)
        )


@dataclass
class _ModuleState:
    """What is known of one module. Entries are immutable and set in one assignment."""

    recipes: dict[Key, Recipe | None] = field(default_factory=dict)
    kept: dict[Key, _KeptRows] = field(default_factory=dict)
    on_device: dict[Key, _DeviceFrequencies] = field(default_factory=dict)


class Tables:
    """Computes the tables of the modules of one class while it is patched.

    Args:
        original: the forward of the class.
        rows: an exclusive upper bound of the positions; None for no bound.
        exact: whether angles are float64 rather than those of the original recipe.
    """

    def __init__(self, original: Callable[..., Any], rows: int | None, exact: bool = False) -> None:
        self._original = original
        self._rows = rows
        self._exact = exact
        self._found: weakref.WeakKeyDictionary[torch.nn.Module, _ModuleState]
        self._found = weakref.WeakKeyDictionary()
        self._shared: weakref.WeakValueDictionary[Key, _KeptRows] = weakref.WeakValueDictionary()

    @torch.no_grad()
    def __call__(
        self, module: torch.nn.Module, x: Tensor, ids: Any, layer_type: str | None
    ) -> Pair | None:
        """Cosine and sine as the module computes them; None if the module must compute them."""
        numbers = _frequencies(module, x, ids, layer_type)
        if numbers is None:
            return None
        inv_freq, scale = numbers
        found = self._found.get(module)
        if found is None:
            found = self._found.setdefault(module, _ModuleState())
        recipe = self._recipe(found.recipes, module, x, inv_freq, scale, layer_type)
        if recipe is None:
            return None
        if self._rows is not None and _compares_on_host(x.device):
            key = x.dtype, layer_type
            kept = found.kept.get(key)
            if kept is None or not kept.are_of(recipe, inv_freq, scale):
                kept = self._make_rows(module, recipe, inv_freq, scale, self._rows, *key)
                found.kept[key] = kept
            return kept.gather(ids)
        if self._exact:
            exact = _exact_on_device(found.on_device, module, inv_freq, layer_type)
            return None if exact is None else recipe.make(exact, scale, ids, x.dtype)
        return recipe.make(inv_freq.float(), scale, ids, x.dtype)

    def _recipe(
        self,
        recipes: dict[Key, Recipe | None],
        module: torch.nn.Module,
        x: Tensor,
        inv_freq: Tensor,
        scale: float,
        layer_type: str | None,
    ) -> Recipe | None:
        """The result of the reference check of this module with its present settings."""
        key = x.device, x.dtype, layer_type, _settings(module)
        try:
            return recipes[key]
        except KeyError:
            if is_capturing(x.device):
                return None
        with outside_modes():
            if inv_freq.numel() > 1 and bool((inv_freq == inv_freq[0]).all()):
                return None  # all recipes agree, as before weights are loaded: check again later
            recipe = self._find_recipe(module, x, inv_freq, scale, layer_type)
        if len(recipes) >= _SETTINGS_PER_MODULE:
            recipes.clear()
        recipes[key] = recipe
        return recipe

    def _find_recipe(
        self,
        module: torch.nn.Module,
        x: Tensor,
        inv_freq: Tensor,
        scale: float,
        layer_type: str | None,
    ) -> Recipe | None:
        """Reference check: the recipe with bitwise identical results, also at negative and far ids.

        Synchronizes with the device, once per module, settings, device, dtype and layer type.
        """
        steps = torch.arange(257, device=x.device)
        ids = torch.stack([steps - 16, steps**2 * 13 % 1_000_003])
        options = [] if layer_type is None else [layer_type]
        try:  # on a copy, since the forward of some modules changes their state
            copied = copy.copy(module)
            for name in _REGISTRIES:
                vars(copied)[name] = copy.copy(vars(module)[name])
            theirs = self._original(copied, x, ids, *options)
        except Exception:  # of any kind: the module does not accept such positions
            return None
        if not (isinstance(theirs, tuple) and len(theirs) == 2) or not _same_state(copied, module):
            return None
        for recipe in RECIPES:
            ours = recipe.make(inv_freq.float(), scale, ids, x.dtype)
            pairs = zip(ours, theirs, strict=True)
            if all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs):
                return recipe
        return None

    def _make_rows(
        self,
        module: torch.nn.Module,
        recipe: Recipe,
        inv_freq: Tensor,
        scale: float,
        bound: int,
        dtype: torch.dtype,
        layer_type: str | None,
    ) -> _KeptRows:
        """The rows below the bound; modules with equal frequencies and scale share them."""
        with outside_modes():
            held = inv_freq.clone()
            used = held.float()
            if self._exact:
                config = _ConfigFrequencies.read(module, held, layer_type)
                used = held.double() if config is None else config.exact(held)
            bits = _bits(held)
            numbers = *bits.tolist(), *_bits(used).tolist()
            key: Key = recipe, scale, dtype, held.dtype, numbers
            kept = self._shared.get(key)
            if kept is None:
                rows = recipe.make_rows(used, scale, bound, dtype)
                kept = _KeptRows(rows, recipe, scale, dtype, held.dtype, bits, used)
                self._shared[key] = kept
        return kept


# Captured graphs read these, so they live as long as the module, as its buffers do.
_captured: weakref.WeakKeyDictionary[torch.nn.Module, dict[int, _ConfigFrequencies]]
_captured = weakref.WeakKeyDictionary()

_REGISTRIES = "_buffers", "_non_persistent_buffers_set", "_parameters", "_modules"

# Bounds the memory if a setting changes at every step.
_SETTINGS_PER_MODULE = 16
_SETTING_TYPES = frozenset((bool, int, float, str, type(None)))


def _settings(module: torch.nn.Module) -> Key:
    """Attributes that the module's forward may read; a check is valid only for these values."""
    return tuple([item for item in vars(module).copy().items() if type(item[1]) in _SETTING_TYPES])


def _same_state(copied: torch.nn.Module, module: torch.nn.Module) -> bool:
    """Whether the copy still has the module's settings and buffers after its forward."""
    ours, theirs = copied._buffers, module._buffers
    same = ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in theirs)
    return same and _settings(copied) == _settings(module)


def _exact_on_device(
    on_device: dict[Key, _DeviceFrequencies],
    module: torch.nn.Module,
    inv_freq: Tensor,
    layer_type: str | None,
) -> Tensor | None:
    """Float64 [P], selected on the device; None in a capture if the config was not read before."""
    key = inv_freq.device, inv_freq.dtype, layer_type
    last = on_device.get(key)
    if is_capturing(inv_freq.device):
        if last is None:
            return None
        if last.found is not None:
            _captured.setdefault(module, {})[id(last.found)] = last.found
    elif last is None or not last.is_recent(module, inv_freq):
        last = on_device[key] = _read_config(module, inv_freq, layer_type, last)
    return inv_freq.double() if last.found is None else last.found.exact(inv_freq)


def _read_config(
    module: torch.nn.Module,
    inv_freq: Tensor,
    layer_type: str | None,
    last: _DeviceFrequencies | None,
) -> _DeviceFrequencies:
    """The config's frequencies on inv_freq's device; those of `last` if they are equal."""
    with outside_modes():
        host = _ConfigFrequencies.read(module, inv_freq, layer_type)
        if host is None:
            found = None
        elif last is not None and last.host and torch.equal(last.host.values, host.values):
            found = last.found
        else:
            found = host.to(inv_freq.device)
            if inv_freq.is_cuda:  # other streams may read them next
                torch.cuda.current_stream(inv_freq.device).synchronize()
    config = getattr(module, "config", None)
    return _DeviceFrequencies(found, host, config, weakref.ref(inv_freq), _version(inv_freq))


def _frequencies(
    module: torch.nn.Module, x: Tensor, ids: Any, layer_type: str | None
) -> tuple[Tensor, float] | None:
    """Frequencies and scale, if the tables depend on them and positions alone; else None."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    inv_freq: Any = getattr(module, f"{prefix}inv_freq", None)
    scale: Any = getattr(module, f"{prefix}attention_scaling", None)
    rope_type = getattr(module, "rope_type", None)
    if isinstance(rope_type, dict):
        rope_type = rope_type.get(layer_type)
    usable = (
        type(ids) is Tensor
        and ids.dtype in (torch.int32, torch.int64)
        and ids.dim() == 2
        and type(inv_freq) is Tensor
        and inv_freq.dim() == 1
        and inv_freq.is_floating_point()
        and ids.device == x.device == inv_freq.device
        and isinstance(scale, (int, float))
        and isinstance(rope_type, str)
        and rope_type != "longrope"
        and "dynamic" not in rope_type
        and "_is_replica" not in vars(module)  # DataParallel's replicas live for one forward
        and _multiplies_exactly(x.device)
        and torch._C._functorch.peek_interpreter_stack() is None
        and not is_recording()
    )
    return (inv_freq, scale) if usable else None


def _multiplies_exactly(device: torch.device) -> bool:
    """Whether a float32 matmul, as in the original recipe, rounds only once per product."""
    backend = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device.type)
    return backend is not None and backend.matmul.fp32_precision not in ("tf32", "bf16")


def _compares_on_host(device: torch.device) -> bool:
    """Whether the host can read the module's frequencies without synchronizing."""
    return device.type == "cpu"


def _bits(values: Tensor) -> Tensor:
    """The values reinterpreted as integers: then NaN equals itself, and 0 differs from -0."""
    return values.detach().view(_INTEGERS[values.element_size()])


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
