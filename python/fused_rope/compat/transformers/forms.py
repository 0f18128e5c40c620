"""The forms in which models rotate: a table of them, and how a model's function is told to be one.

Nothing is guessed. A function has a form if it has the form's name and signature and returns the
form's very numbers on probes, in float32, in bfloat16 and in bfloat16 with float32 tables.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import shims
from .shims import Shim, Style

__all__ = ["FORMS", "NOT_ROTATIONS", "Form", "find_form"]

_DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)

# What functions call their full-width tables; the last holds cosine and sine.
_TABLES = ("cos", "sin", "cos_k", "sin_k", "relative_position_embeddings")


class Draw:
    """Random arguments for a probe; the global random state is not touched."""

    def __init__(self, dtype: torch.dtype, table_dtype: torch.dtype, device: str) -> None:
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._dtypes = (dtype, table_dtype)
        self.device = device

    def x(self, *shape: int) -> Tensor:
        """Queries, keys or values."""
        return self._randn(shape).to(self.device, self._dtypes[0])

    def tables(self, width: str, *shape: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of this full width, unless it is "half"; no two forms read them alike."""
        cos, sin = (self._randn(shape).to(self.device, self._dtypes[1]) for _ in range(2))
        return _widen(cos, width), _widen(sin, width)

    def freqs(self, *shape: int) -> Tensor:
        """A complex table."""
        return torch.complex(self._randn(shape), self._randn(shape)).to(self.device)

    def _randn(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator, device="cpu", dtype=torch.float32)


def _widen(half: Tensor, width: str) -> Tensor:
    if width == "tiled":
        return torch.cat([half, half], dim=-1)
    if width == "first":
        return torch.cat([half, half.flip(-1)], dim=-1)
    return half.repeat_interleave(2, dim=-1) if width == "repeated" else half


Arguments = tuple[Any, ...]
Probe = Callable[[Draw], Arguments]


@dataclass(frozen=True)
class Form:
    """One way in which models rotate.

    Attributes:
        name: as reports say it.
        functions: the names of models' functions, or methods, that may have it.
        shim: what takes their place: the same parameters, and a keyword-only `precision`.
        probes: arguments on which both must agree to the bit; all but the first may be refused by
            the function.
        width: what full-width tables must look like, of which the shim reads a half: "tiled",
            "repeated" or "blocks"; or "half" or "first": the model too reads no more.
        exact: False where only nearly: PyTorch's complex product may be contracted.
        order: what brings the shim's lanes into the function's order, where they differ.
        device: where it can be probed.
    """

    name: str
    functions: tuple[str, ...]
    shim: Shim
    probes: tuple[Probe, ...]
    width: str = "tiled"
    exact: bool = True
    order: Callable[[Tensor], Tensor] | None = None
    device: str = "cpu"

    @property
    def inlines(self) -> bool:
        """Whether a compiler may be given the model's own function instead of the shim.

        Not where eager and compiled calls would share a cache whose keys' lanes lie differently,
        nor where the function is a kernel already.
        """
        return self.order is None and self.device == "cpu"

    @cached_property
    def parameters(self) -> list[str]:
        """The shim's parameters without its own."""
        return [name for name in inspect.signature(self.shim).parameters if name != "precision"]

    def fit(self, stock: Callable[..., Any]) -> Shim | None:
        """The shim that can take the place of `stock`, or None."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return None
        shim = self._adapt(parameters(stock))
        if shim is None or not all(self._agree(stock, shim, *dtypes) for dtypes in _DTYPES):
            return None
        return shim

    def halves(self, arguments: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """Of a call's full-width tables the part that the shim reads and the one it does not."""
        for name, table in arguments.items():
            if name not in _TABLES or self.width in ("half", "first"):
                continue
            if self.width == "repeated":
                yield table[..., ::2], table[..., 1::2]
            elif self.width == "tiled":
                yield table.chunk(2, dim=-1)
            else:
                axes = arguments["position_ids"].shape[-1]
                yield table.unflatten(-1, (axes, -1)).chunk(2, dim=-1)

    def _adapt(self, theirs: list[str]) -> Shim | None:
        if theirs == self.parameters:
            return self.shim
        place = self._ignored(theirs)
        if place is None or _without(theirs, place) != self.parameters:
            return None
        return shims.without_position_ids(self.shim, place)

    def _ignored(self, theirs: list[str]) -> int | None:
        """The place of a position_ids that the function takes and the shim does not."""
        if "position_ids" not in theirs or "position_ids" in self.parameters:
            return None
        return theirs.index("position_ids")

    def _agree(
        self, stock: Callable[..., Any], shim: Shim, dtype: torch.dtype, table_dtype: torch.dtype
    ) -> bool:
        place = self._ignored(parameters(stock))
        for number, probe in enumerate(self.probes):
            arguments = list(probe(Draw(dtype, table_dtype, self.device)))
            if place is not None:
                arguments.insert(place, None)
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                try:
                    theirs = stock(*(a.clone() if isinstance(a, Tensor) else a for a in arguments))
                except Exception:  # whatever it is, the function cannot take these arguments
                    if number == 0:
                        return False
                    continue
                ours = shim(*arguments)
            if not self._same(_as_tuple(theirs), _as_tuple(ours)):
                return False
        return True

    def _same(self, theirs: tuple[Any, ...], ours: tuple[Tensor, ...]) -> bool:
        if len(theirs) != len(ours) or not all(isinstance(t, Tensor) for t in theirs):
            return False
        if self.order is not None:
            ours = tuple(map(self.order, ours))
        return all(self._equal(a.to(b.dtype), b) for a, b in zip(theirs, ours, strict=True))

    def _equal(self, theirs: Tensor, ours: Tensor) -> bool:
        if self.exact:
            return torch.equal(theirs, ours)
        eps = 2 * torch.finfo(ours.dtype).eps
        return theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=eps, atol=eps)


def signature(stock: Callable[..., Any]) -> inspect.Signature:
    """Of a function; of a layer, as the `kernels` package makes of functions, its forward's."""
    return inspect.signature(stock.forward if isinstance(stock, torch.nn.Module) else stock)


def parameters(stock: Callable[..., Any]) -> list[str]:
    """The names of a function's parameters."""
    return list(signature(stock).parameters)


def _without(values: list[Any], place: int) -> list[Any]:
    return [*values[:place], *values[place + 1 :]]


def _as_tuple(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def find_form(name: str, stock: Callable[..., Any]) -> tuple[Form, Shim] | str:
    """The form of the function or method `name` and its shim, or why there is none."""
    if name in NOT_ROTATIONS:
        return NOT_ROTATIONS[name]
    forms = [form for form in FORMS if name in form.functions]
    for form in forms:
        shim = form.fit(stock)
        if shim is not None:
            return form, shim
    if any(form.device == "cuda" for form in forms) and not torch.cuda.is_available():
        return "its form can be told on CUDA only"
    return "its form is unknown"


# --- the table ----------------------------------------------------------------------------------


def _pairs(width: str, partial: bool = True) -> tuple[Probe, ...]:
    """q, k and tables of whole heads, of both layouts and, where it may be, of the first lanes."""

    def heads_first(draw: Draw) -> Arguments:
        return draw.x(2, 3, 5, 8), draw.x(2, 1, 5, 8), *draw.tables(width, 2, 5, 4)

    def tokens_first(draw: Draw) -> Arguments:
        return draw.x(2, 5, 3, 8), draw.x(2, 5, 1, 8), *draw.tables(width, 1, 5, 4), 2

    def first_lanes(draw: Draw) -> Arguments:
        return draw.x(2, 3, 5, 8), draw.x(2, 1, 5, 8), *draw.tables(width, 2, 5, 3)

    return (heads_first, tokens_first, *([first_lanes] if partial else []))


def _singles(width: str) -> tuple[Probe, ...]:
    def without_key(pairs: Probe) -> Probe:
        return lambda draw: tuple(_without(list(pairs(draw)), 1))

    return tuple(map(without_key, _pairs(width)))


def _no_key(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), None, *draw.tables("tiled", 2, 5, 4)


def _last_queries(draw: Draw) -> Arguments:
    return draw.x(2, 3, 2, 8), draw.x(2, 1, 5, 8), *draw.tables("tiled", 2, 5, 4)


def _sections(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), draw.x(2, 1, 5, 8), *draw.tables("tiled", 3, 2, 5, 4), [1, 2, 1]


def _partial_sections(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), draw.x(2, 1, 5, 8), *draw.tables("tiled", 3, 2, 5, 3), [1, 1, 1]


def _packed_tokens(draw: Draw) -> Arguments:
    return draw.x(5, 3, 8), draw.x(5, 3, 8), *draw.tables("tiled", 5, 4)


def _batched_tokens(draw: Draw) -> Arguments:
    return draw.x(2, 5, 3, 8), draw.x(2, 5, 3, 8), *draw.tables("tiled", 5, 3)


def _prefixed(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), draw.x(2, 3, 5, 8), *draw.tables("tiled", 3, 4)


def _plane(draw: Draw) -> Arguments:
    return draw.x(2, 3, 4, 8), draw.x(2, 3, 4, 8), *draw.tables("repeated", 4, 4)


def _memory(draw: Draw) -> Arguments:
    return draw.x(2, 3, 4, 8), draw.x(2, 3, 10, 8), *draw.tables("repeated", 4, 4), 2, True


def _grouped_memory(draw: Draw) -> Arguments:
    q, k = draw.x(2, 3, 4, 8), draw.x(2, 3, 12, 8)
    tables = (*draw.tables("repeated", 4, 4), *draw.tables("repeated", 3, 4))
    return q, k, *tables, 2, 2


def _blocks(draw: Draw) -> Arguments:
    first, second = draw.tables("tiled", 2, 5, 2), draw.tables("tiled", 2, 5, 2)
    tables = (torch.cat([a, b], dim=-1) for a, b in zip(first, second, strict=True))
    return draw.x(2, 5, 3, 8), *tables, torch.zeros(2, 5, 2, dtype=torch.int64, device=draw.device)


def _swapped(draw: Draw) -> Arguments:
    return draw.x(2, 5, 3, 8), *draw.tables("half", 2, 5, 4)


def _cached_rows(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), *draw.tables("tiled", 1, 1, 7, 4)


def _angles(draw: Draw) -> Arguments:
    return draw.x(1, 5, 3, 8), draw.tables("half", 5, 4)[0].float()


def _gathered(draw: Draw) -> Arguments:
    ids = torch.tensor([[3, 1, 4, 1, 5], [0, 1, 2, 6, 6]], device=draw.device)
    return draw.x(2, 3, 5, 8), draw.x(2, 3, 5, 8), *draw.tables("tiled", 7, 4), ids


def _gathered_qkv(draw: Draw) -> Arguments:
    q, k, *rest = _gathered(draw)
    return q, k, draw.x(2, 3, 5, 8), *rest


def _complex(*table: int, layout: str) -> Probe:
    shape = (2, 3, 5, 8) if layout == "bhsd" else (2, 5, 3, 8)
    return lambda draw: (draw.x(*shape), draw.x(*shape), draw.freqs(*table))


def _conformer(draw: Draw) -> Arguments:
    tables = torch.stack(draw.tables("tiled", 7, 1, 1, 4))
    return SimpleNamespace(num_heads=3, head_size=8), draw.x(2, 5, 24), tables


def _sinusoidal(draw: Draw) -> Arguments:
    sin_cos = torch.cat(draw.tables("half", 1, 1, 5, 4), dim=-1)
    return sin_cos, draw.x(2, 3, 5, 8), draw.x(2, 3, 5, 8)


def _sinusoidal_values(draw: Draw) -> Arguments:
    return *_sinusoidal(draw), draw.x(2, 3, 5, 8)


def _time(draw: Draw) -> Arguments:
    return draw.x(2, 5, 8), *draw.tables("repeated", 2, 5, 3)


def _packed_qkv(draw: Draw) -> Arguments:
    lengths = torch.tensor([0, 2, 6], dtype=torch.int32, device=draw.device)
    return draw.x(6, 3, 2, 16), *draw.tables("half", 4, 8), lengths, 4


def _evens_first(x: Tensor) -> Tensor:
    return torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)


def _pair_form(name: str, style: Style, function: str = "apply_rotary_pos_emb") -> Form:
    return Form(name, (function,), shims.pair(style), _pairs(style.width), style.width)


def _deinterleaving(name: str, style: Style) -> Form:
    return Form(
        name,
        ("apply_rotary_pos_emb_interleave",),
        shims.pair(style),
        _pairs(style.width, partial=False),
        style.width,
        order=_evens_first,
    )


_MULTIMODAL = ("apply_multimodal_rotary_pos_emb",)
_POS_EMB = ("apply_rotary_pos_emb",)
_VISION = ("apply_rotary_pos_emb_vision",)
_PLANE = ("apply_rotary_pos_emb_2d", "apply_rotary_pos_emb_2d_self_attn")

# A form that does more than another of its signature comes first.
FORMS = (
    Form("half, key optional", _POS_EMB, shims.optional_key(Style()), (_no_key, *_pairs("tiled"))),
    Form("half, last queries", _POS_EMB, shims.last_queries(Style()), (_last_queries,)),
    _pair_form("half", Style()),
    _pair_form("half, in float32", Style(float32=True)),
    _pair_form("half, the other way", Style(inverse=True)),
    _pair_form("half, half-width tables", Style("half")),
    _pair_form("interleaved", Style("repeated", interleaved=True)),
    _pair_form("interleaved, in float32", Style("repeated", interleaved=True, float32=True)),
    _pair_form("interleaved, tiled tables", Style("first", interleaved=True)),
    _pair_form(
        "interleaved, tiled tables, in float32", Style("first", interleaved=True, float32=True)
    ),
    _pair_form("interleaved, half-width tables", Style("half", interleaved=True)),
    _deinterleaving("interleaved, turned in place", Style("first", interleaved=True)),
    _deinterleaving("interleaved, turned in place, whole tables", Style("tiled", interleaved=True)),
    Form("half, rows by position_ids", _POS_EMB, shims.gathered, (_gathered,)),
    Form("half, values too", _POS_EMB, shims.gathered_qkv, (_gathered_qkv,)),
    Form("half, after a prefix", _POS_EMB, shims.after_prefix, (_prefixed,)),
    Form("half, one tensor", _POS_EMB, shims.single(Style()), _singles("tiled")),
    Form(
        "half, one tensor, cached rows",
        (*_POS_EMB, "apply_rotary_pos_emb_esm"),
        shims.cached_rows,
        (_cached_rows,),
    ),
    Form(
        "interleaved, one tensor, last lanes, in float32",
        _POS_EMB,
        shims.single(Style("half", interleaved=True, trailing=True, float32=True)),
        _singles("half"),
        "half",
    ),
    Form("interleaved, sine first", _POS_EMB, shims.swapped, (_swapped,), "half"),
    Form(
        "interleaved, in float64",
        ("apply_rotary_time_emb",),
        shims.float64_time,
        (_time,),
        "repeated",
    ),
    Form("half, blocks", ("apply_multidimensional_rope",), shims.blocks, (_blocks,), "blocks"),
    Form(
        "half, sections of axes",
        _MULTIMODAL,
        shims.sections(Style("half")),
        (_sections, _partial_sections),
    ),
    Form(
        "interleaved, sections of axes",
        _MULTIMODAL,
        shims.sections(Style("half", interleaved=True)),
        (_sections, _partial_sections),
        "first",
    ),
    Form(
        "half, in float32, tokens first",
        _VISION,
        shims.token_major(Style(float32=True)),
        (_packed_tokens, _batched_tokens),
    ),
    Form("half, tokens first", _VISION, shims.token_major(Style()), (_batched_tokens,)),
    Form("half, in float32, by angles", _VISION, shims.angles, (_angles,), "half"),
    Form(
        "interleaved, in float32, plane",
        _PLANE,
        shims.head_major(shims.REPEATED_FLOAT32),
        (_plane,),
        "repeated",
    ),
    Form(
        "interleaved, in float32, plane, repeated for keys",
        _PLANE,
        shims.memory_keys,
        (_plane, _memory),
        "repeated",
    ),
    Form(
        "interleaved, in float32, plane, keys' own",
        ("apply_rotary_pos_emb_2d_cross_attn",),
        shims.grouped_memory_keys,
        (_grouped_memory,),
        "repeated",
    ),
    Form(
        "complex, tokens first",
        ("apply_rotary_emb",),
        shims.complex_rows("bshd"),
        (_complex(2, 5, 4, layout="bshd"),),
        "half",
        exact=False,
    ),
    Form(
        "complex, heads first",
        ("apply_rotary_emb",),
        shims.complex_rows("bhsd"),
        (_complex(2, 5, 4, layout="bhsd"),),
        "half",
        exact=False,
    ),
    Form(
        "complex, plane",
        ("vision_apply_rotary_emb",),
        shims.complex_plane,
        (_complex(5, 1, 4, layout="bshd"),),
        "half",
        exact=False,
    ),
    Form(
        "half, before the projections",
        ("_apply_rotary_embedding",),
        shims.before_projection,
        (_conformer,),
    ),
    Form(
        "interleaved, values too",
        ("apply_rotary_position_embeddings",),
        shims.sinusoidal,
        (_sinusoidal, _sinusoidal_values),
        "half",
    ),
    Form(
        "half, packed, in place",
        ("apply_rotary_unpadded",),
        shims.packed_qkv,
        (_packed_qkv,),
        "half",
        device="cuda",
    ),
)

# By the name of the function: why there is no form for it.
NOT_ROTATIONS = {
    "apply_rotary_embeddings": "no rotation: the two lanes of a pair turn by different angles",
}
