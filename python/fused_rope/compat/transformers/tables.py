"""The tables that a model's rotary module makes anew at every forward: the same bits for less.

Which rows a forward needs only the device knows, so no table of rows can be kept unless the caller
names a bound; and the stock recipe is nine kernels, most of whose time is the host's. So here

* the recipe is three kernels: a position times the frequencies, the cosine, the sine, each written
  in the model's dtype. Nothing but the module's own buffers is kept, any position will do;
* with a bound, every row is made once, by that recipe or of float64 angles, and a forward gathers
  its own, in one kernel.

Both are taken only where the recipe gave the module's own bits on probes. Letters: B batch, S
sequence length, P pairs, R = 2P or P columns, M table rows.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...frequencies import frequencies
from ...functional import cos_sin_table
from ...hf_config import config_arguments

__all__ = ["RECIPES", "Recipe", "Tables", "rotary_modules"]

Pair = tuple[Tensor, Tensor]
Key = tuple[Any, ...]  # class, device, dtype, layer type

_NAME = re.compile(r"\w*Rotary\w*Embedding$")
_PARAMETERS = (["self", "x", "position_ids"], ["self", "x", "position_ids", "layer_type"])


def rotary_modules(modules: Iterable[ModuleType]) -> Iterator[type[torch.nn.Module]]:
    """The classes defined in `modules` that make tables of hidden states and position_ids."""
    for module in modules:
        for name, value in sorted(vars(module).items()):
            if (
                _NAME.match(name)
                and isinstance(value, type)
                and value.__module__ == module.__name__
            ):
                forward = vars(value).get("forward")
                if forward and list(inspect.signature(forward).parameters) in _PARAMETERS:
                    yield value


@dataclass(frozen=True)
class Recipe:
    """How cosines and sines follow from frequencies and positions.

    Attributes:
        width: of the tables: "tiled" (two equal halves), "repeated" (every value twice) or "half".
        float32: they stay so; else they are rounded to the dtype of the hidden states.
    """

    width: str
    float32: bool = False

    def make(self, inv_freq: Tensor, scale: float, ids: Tensor, dtype: torch.dtype) -> Pair:
        """Cosine and sine [..., R] of the integers `ids` [...]; one product, as in a matmul."""
        angles = (ids[..., None, None] * self._lanes(inv_freq.float())).flatten(-2)
        dtype = torch.float32 if self.float32 else dtype
        return _scaled(torch.cos, angles, scale, dtype), _scaled(torch.sin, angles, scale, dtype)

    def make_exact(
        self, inv_freq: Tensor, scale: float, bound: int, dtype: torch.dtype, device: torch.device
    ) -> Pair:
        """Cosine and sine [M, R] of the rows below the bound, from float64 angles."""
        dtype = torch.float32 if self.float32 else dtype
        cos, sin = cos_sin_table(inv_freq, bound, scale=scale, dtype=dtype, device=device)
        return self._lanes(cos).flatten(-2), self._lanes(sin).flatten(-2)

    def _lanes(self, values: Tensor) -> Tensor:
        """A view of [..., P] whose last two dimensions, flattened, are the R columns."""
        if self.width == "repeated":
            return values[..., None].expand(*values.shape, 2)
        return values[..., None, :].expand(*values.shape[:-1], 1 + (self.width == "tiled"), -1)


def _scaled(
    function: Callable[..., Tensor], angles: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    out = torch.empty_like(angles, dtype=dtype)
    return function(angles, out=out) if scale == 1 else torch.mul(function(angles), scale, out=out)


RECIPES = tuple(
    Recipe(width, float32) for width in ("tiled", "repeated", "half") for float32 in (False, True)
)


@dataclass(frozen=True)
class _Kept:
    """Rows [M, 2R], cosine beside sine, and the frequencies that they were made of."""

    rows: Tensor
    source: weakref.ref[Tensor]
    version: int
    scale: float

    def are_of(self, inv_freq: Tensor, scale: float) -> bool:
        same = self.source() is inv_freq and self.version == inv_freq._version
        return same and self.scale == scale


class Tables:
    """What makes the tables in place of one class's own forward.

    Args:
        stock: that forward.
        rows: a bound above every position; None where there is none.
        exact: whether rows that are kept are made of float64 angles, not by the stock recipe.
    """

    def __init__(self, stock: Callable[..., Any], rows: int | None, exact: bool = False) -> None:
        self._stock = stock
        self._rows = rows
        self._exact = exact
        self._recipes: dict[Key, Recipe | None] = {}
        self._kept: weakref.WeakKeyDictionary[torch.nn.Module, dict[Key, _Kept]]
        self._kept = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def __call__(
        self, module: torch.nn.Module, x: Tensor, ids: Any, layer_type: str | None
    ) -> Pair | None:
        """Cosine and sine as the module makes them, or None where it has to make them itself."""
        found = _frequencies(module, x, ids, layer_type)
        if found is None:
            return None
        inv_freq, scale = found
        key = type(module), x.device, x.dtype, layer_type
        if key not in self._recipes:
            if _recording(x.device):
                return None
            self._recipes[key] = self._probe(module, x, inv_freq, scale, layer_type)
        recipe = self._recipes[key]
        if recipe is None:
            return None
        if self._rows is not None and not inv_freq.is_inference():
            rows = self._keep(module, key, recipe, inv_freq, scale, self._rows)
            if rows is not None:
                cos, sin = torch.embedding(rows, ids).chunk(2, dim=-1)
                return cos, sin
        return recipe.make(inv_freq, scale, ids, x.dtype)

    def _probe(
        self,
        module: torch.nn.Module,
        x: Tensor,
        inv_freq: Tensor,
        scale: float,
        layer_type: str | None,
    ) -> Recipe | None:
        """The recipe that gives the module's own bits at near and far positions.

        This waits for the device, once for a class, device, dtype and layer type.
        """
        ids = torch.arange(2 * 257, device=x.device).view(2, 257)
        ids = torch.stack([ids[0], ids[1] ** 2 * 13 % 1_000_003])
        try:
            theirs = self._stock(module, x, ids, *([] if layer_type is None else [layer_type]))
        except Exception:  # whatever it is, the module takes other positions
            return None
        if not (isinstance(theirs, tuple) and len(theirs) == 2):
            return None
        for recipe in RECIPES:
            ours = recipe.make(inv_freq, scale, ids, x.dtype)
            pairs = zip(ours, theirs, strict=True)
            if all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs):
                return recipe
        return None

    def _keep(
        self,
        module: torch.nn.Module,
        key: Key,
        recipe: Recipe,
        inv_freq: Tensor,
        scale: float,
        bound: int,
    ) -> Tensor | None:
        """The rows below the bound, made anew only when the frequencies changed."""
        kept = self._kept.setdefault(module, {}).get(key)
        if kept is not None and kept.are_of(inv_freq, scale):
            return kept.rows
        if _recording(inv_freq.device):  # a graph's memory is not to be kept
            return None
        device, dtype, layer_type = key[1:]
        with torch.inference_mode(False), torch.no_grad():
            if self._exact:
                exact = _exact_frequencies(module, inv_freq, layer_type)
                pair = recipe.make_exact(exact, scale, bound, dtype, device)
            else:
                pair = recipe.make(inv_freq, scale, torch.arange(bound, device=device), dtype)
            rows = torch.cat(pair, dim=-1)
        if rows.is_cuda:  # other streams may read them from now on
            torch.cuda.current_stream(rows.device).synchronize()
        source = weakref.ref(inv_freq)
        self._kept[module][key] = _Kept(rows, source, inv_freq._version, scale)
        return rows


def _frequencies(
    module: torch.nn.Module, x: Tensor, ids: Any, layer_type: str | None
) -> tuple[Tensor, float] | None:
    """Frequencies and scale of tables that depend on them and on positions alone; else None."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    inv_freq: Any = getattr(module, f"{prefix}inv_freq", None)
    scale: Any = getattr(module, f"{prefix}attention_scaling", None)
    rope_type = getattr(module, "rope_type", None)
    if isinstance(rope_type, dict):
        rope_type = rope_type.get(layer_type)
    plain = (
        type(ids) is Tensor
        and ids.dtype in (torch.int32, torch.int64)
        and ids.dim() == 2
        and type(inv_freq) is Tensor
        and ids.device == x.device == inv_freq.device
        and isinstance(scale, (int, float))
        and isinstance(rope_type, str)
        and rope_type != "longrope"
        and "dynamic" not in rope_type
        and _multiplies_exactly(x.device)
        and torch._C._functorch.peek_interpreter_stack() is None
    )
    return (inv_freq, scale) if plain else None


def _exact_frequencies(module: torch.nn.Module, inv_freq: Tensor, layer_type: str | None) -> Tensor:
    """Float64 [P] on the host: the config's where the module holds these rounded, else its own.

    The module's float32 frequencies alone would turn far positions as wrongly as float32 angles do.
    """
    held = inv_freq.double().cpu()
    try:
        said = config_arguments(module.config, layer_type, interleaved=False)
        exact, _ = frequencies(said["rotary_dim"], said["base"], said["scaling"])
    except Exception:  # whatever it is, the module's are right
        return held
    # Made in float32 they are off by some ulps; in a module cast to less, by one of its dtype's.
    rtol = max(2e-6, torch.finfo(inv_freq.dtype).eps)
    same = exact.shape == held.shape and torch.allclose(held, exact, rtol=rtol, atol=0)
    return exact if same else held


def _multiplies_exactly(device: torch.device) -> bool:
    """Whether a float32 matmul, which the stock recipe contains, rounds as a product does."""
    backend = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device.type)
    return backend is not None and backend.matmul.fp32_precision not in ("tf32", "bf16")


def _recording(device: torch.device) -> bool:
    """Whether what runs is recorded (a CUDA graph, a tracer) or fake: nothing may be read or kept.

    Modes that only watch, such as counters of operators, do not matter.
    """
    keys = torch._C._TorchDispatchModeKey
    return (
        torch._C._is_tracing()
        or any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY))
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )
