"""The forms in which models rotate: a table of them, and how a model's function is told to be one.

Nothing is guessed. A function has a form if it has the form's name and signature and returns the
form's very numbers in reference checks, in float32, in bfloat16 and in bfloat16 with float32
tables, with each optional argument given and not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import shims
from .shims import Shim, Style

__all__ = ["FORMS", "NOT_ROTATIONS", "TABLES", "Form", "find_form", "signature", "split"]

_DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)

# What functions call their full-width tables; the last holds cosine and sine.
TABLES = ("cos", "sin", "cos_k", "sin_k", "relative_position_embeddings")


class Order(NamedTuple):
    """How a function orders the elements of its results where a shim keeps x's order."""

    theirs: Callable[[Tensor], Tensor]
    ours: Callable[[Tensor], Tensor]


class Draw:
    """Random arguments of a reference check; the global random state is not touched."""

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
Check = Callable[[Draw], Arguments]


@dataclass(frozen=True)
class Form:
    """One way in which models rotate.

    Attributes:
        name: as reports say it.
        functions: the names of models' functions, or methods, that may have it.
        shim: what takes their place: the same parameters, and a keyword-only `precision`. It raises
            ValueError for arguments that it does not cover.
        checks: arguments on which both must agree bit for bit, every optional argument given and
            not; all but the first may be refused by the function or by the shim.
        width: what full-width tables must look like, of which the shim reads a half: "tiled",
            "repeated" or "blocks"; or "half" or "first": the model too reads no more.
        exact: False where only nearly: PyTorch's complex product may be contracted.
        order: what brings the shim's elements into the function's order, where they differ.
        device: where it can be checked.
    """

    name: str
    functions: tuple[str, ...]
    shim: Shim
    checks: tuple[Check, ...]
    width: str = "tiled"
    exact: bool = True
    order: Order | None = None
    device: str = "cpu"

    @property
    def inlines(self) -> bool:
        """Whether a compiler may be given the model's own function instead of the shim.

        Not where eager and compiled calls would share a cache whose keys are ordered differently,
        nor where the function is a kernel already.
        """
        return self.order is None and self.device == "cpu"

    @property
    def unread(self) -> bool:
        """Whether full-width tables have a part that the shim does not read and the model does."""
        return self.width not in ("half", "first")

    @cached_property
    def parameters(self) -> list[inspect.Parameter]:
        """The shim's parameters without its own."""
        found = inspect.signature(self.shim).parameters.values()
        return [parameter for parameter in found if parameter.name != "precision"]

    def fit(self, original: Callable[..., Any]) -> Shim | None:
        """The shim that can take the place of `original`, or None."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return None
        theirs = list(signature(original).parameters.values())
        place = self._ignored(theirs)
        shim = self.shim if place is None else shims.without_position_ids(self.shim, place)
        if not self._takes(theirs if place is None else _without(theirs, place)):
            return None
        if not all(self._agree(original, shim, place, *dtypes) for dtypes in _DTYPES):
            return None
        return shim

    def halves(self, arguments: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Of a call's full-width tables the part that the shim reads and the one it does not."""
        axes = arguments["position_ids"].shape[-1] if self.width == "blocks" else 1
        tables = [table for name, table in arguments.items() if name in TABLES]
        return [split(table, self.width, axes) for table in tables]

    def _takes(self, theirs: list[inspect.Parameter]) -> bool:
        """Whether the shim's parameters are these, so that any call passes the same to both."""
        ours = self.parameters
        return [p.name for p in theirs] == [p.name for p in ours] and all(
            a.kind in (b.kind, inspect.Parameter.POSITIONAL_ONLY)
            for a, b in zip(theirs, ours, strict=True)
        )

    def _ignored(self, theirs: list[inspect.Parameter]) -> int | None:
        """The place of a position_ids that the function takes and the shim does not."""
        names = [parameter.name for parameter in theirs]
        if "position_ids" not in names or any(p.name == "position_ids" for p in self.parameters):
            return None
        return names.index("position_ids")

    def _agree(
        self,
        original: Callable[..., Any],
        shim: Shim,
        ignored: int | None,
        dtype: torch.dtype,
        table_dtype: torch.dtype,
    ) -> bool:
        for number, check in enumerate(self.checks):
            arguments = list(check(Draw(dtype, table_dtype, self.device)))
            if ignored is None:
                calls = [arguments]
            else:
                before, after = arguments[:ignored], arguments[ignored:]
                calls = [[*before, ids, *after] for ids in _position_ids(self.device)]
            ours = _result(shim, calls[0])
            theirs = _result(original, calls[0])
            if theirs is None or ours is None:
                if number == 0:
                    return False
                continue
            # A function that ignores its position_ids takes any; one that gathers refuses some.
            others = [_result(original, call) for call in calls[1:]]
            if not all(a is not None and self._same(a, ours) for a in (theirs, *others)):
                return False
        return True

    def _same(self, theirs: tuple[Any, ...], ours: tuple[Any, ...]) -> bool:
        if len(theirs) != len(ours) or not all(isinstance(t, Tensor) for t in theirs):
            return False
        if self.order is not None:
            ours = tuple(map(self.order.theirs, ours))
        return all(self._equal(a.to(b.dtype), b) for a, b in zip(theirs, ours, strict=True))

    def _equal(self, theirs: Tensor, ours: Tensor) -> bool:
        if self.exact:
            return torch.equal(theirs, ours)
        eps = 2 * torch.finfo(ours.dtype).eps
        return theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=eps, atol=eps)


def split(table: Tensor, width: str, axes: int = 1) -> tuple[Tensor, Tensor]:
    """Two views of a full-width table that are equal if it has this width."""
    if width == "repeated":
        return table[..., ::2], table[..., 1::2]
    if axes > 1:
        table = table.unflatten(-1, (axes, -1))
    half = table.shape[-1] // 2
    return table[..., :half], table[..., half:]


def signature(original: Callable[..., Any]) -> inspect.Signature:
    """Of a function; of a layer, as the `kernels` package makes of functions, its forward's."""
    return inspect.signature(
        original.forward if isinstance(original, torch.nn.Module) else original
    )


def _without(values: list[Any], place: int) -> list[Any]:
    return [*values[:place], *values[place + 1 :]]


def _result(function: Callable[..., Any], arguments: list[Any]) -> tuple[Any, ...] | None:
    """What the function makes of copies of the arguments, or None where it refuses them."""
    copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            result = function(*copies)
    except Exception:  # whatever it is, the function cannot take these arguments
        return None
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _position_ids(device: str) -> Iterator[Any]:
    """Values of a position_ids that has no effect: None, rows to gather, what cannot be used."""
    yield None
    yield torch.tensor([[4, 3, 2, 1, 0], [1, 0, 3, 2, 4]], device=device)
    yield torch.tensor([[4, 3, 2, 1, 0]], device=device)
    yield torch.tensor([4, 3, 2, 1, 0], device=device)
    yield object()


def find_form(name: str, original: Any) -> tuple[Form, Shim] | str:
    """The form of the function or method `name` and its shim, or why there is none."""
    if name in NOT_ROTATIONS:
        return NOT_ROTATIONS[name]
    if not isinstance(original, (FunctionType, torch.nn.Module)):
        return f"it is no plain function but {_kind(original)}"
    if hasattr(original, "_torchdynamo_orig_callable") and not hasattr(
        original, "_torchdynamo_disable"
    ):
        return "it is compiled by torch.compile"
    try:
        signature(original)
    except Exception:  # whatever a signature of somebody's own making raises
        return "its signature cannot be read"
    forms = [form for form in FORMS if name in form.functions]
    for form in forms:
        shim = form.fit(original)
        if shim is not None:
            return form, shim
    if any(form.device == "cuda" for form in forms) and not torch.cuda.is_available():
        return "its form can be told on CUDA only"
    return "its form is unknown"


def _kind(value: Any) -> str:
    if value is None or isinstance(value, type):
        return "None" if value is None else "a class"
    return f"of type {type(value).__name__}"


# --- the table ----------------------------------------------------------------------------------


def _pairs(width: str, partial_heads: bool = True) -> tuple[Check, ...]:
    """q, k and tables of whole heads, of each unsqueeze_dim and, where it may be, a partial R."""

    def heads_first(draw: Draw) -> Arguments:
        return draw.x(2, 3, 5, 8), draw.x(2, 1, 5, 8), *draw.tables(width, 2, 5, 4)

    def heads_first_from_the_end(draw: Draw) -> Arguments:
        return *heads_first(draw), -3

    def tokens_first(draw: Draw) -> Arguments:
        return draw.x(2, 5, 3, 8), draw.x(2, 5, 1, 8), *draw.tables(width, 1, 5, 4), 2

    def tokens_first_from_the_end(draw: Draw) -> Arguments:
        return draw.x(2, 5, 3, 8), draw.x(2, 5, 1, 8), *draw.tables(width, 2, 5, 4), -2

    def partial(draw: Draw) -> Arguments:
        return draw.x(2, 3, 5, 8), draw.x(2, 1, 5, 8), *draw.tables(width, 2, 5, 3)

    # As many heads as tokens: the wrong one of two layouts is no error but other numbers.
    def without_batch(draw: Draw) -> Arguments:
        return draw.x(2, 5, 5, 8), draw.x(2, 5, 5, 8), *draw.tables(width, 5, 4)

    def heads_first_without_batch(draw: Draw) -> Arguments:
        return *without_batch(draw), 0

    return (
        heads_first,
        heads_first_from_the_end,
        tokens_first,
        tokens_first_from_the_end,
        without_batch,
        heads_first_without_batch,
        *([partial] if partial_heads else []),
    )


def _singles(width: str) -> tuple[Check, ...]:
    def without_key(pairs: Check) -> Check:
        return lambda draw: tuple(_without(list(pairs(draw)), 1))

    return tuple(map(without_key, _pairs(width)))


def _no_key(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), None, *draw.tables("tiled", 2, 5, 4)


def _last_queries(draw: Draw) -> Arguments:
    return draw.x(2, 3, 2, 8), draw.x(2, 1, 5, 8), *draw.tables("tiled", 2, 5, 4)


def _last_queries_tokens_first(draw: Draw) -> Arguments:
    return draw.x(2, 5, 3, 8), draw.x(2, 5, 1, 8), *draw.tables("tiled", 2, 5, 4), 2


def _sections(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), draw.x(2, 1, 5, 8), *draw.tables("tiled", 3, 2, 5, 4), [1, 2, 1]


def _partial_sections(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), draw.x(2, 1, 5, 8), *draw.tables("tiled", 3, 2, 5, 3), [1, 1, 1]


def _sections_tokens_first(draw: Draw) -> Arguments:
    return draw.x(2, 5, 3, 8), draw.x(2, 5, 1, 8), *draw.tables("tiled", 3, 2, 5, 4), [1, 2, 1], 2


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


def _repeated_memory(draw: Draw) -> Arguments:
    return draw.x(2, 3, 4, 8), draw.x(2, 3, 8, 8), *draw.tables("repeated", 4, 4), 0, True


def _excluded_memory(draw: Draw) -> Arguments:
    return draw.x(2, 3, 4, 8), draw.x(2, 3, 6, 8), *draw.tables("repeated", 4, 4), 2


def _grouped_memory(draw: Draw) -> Arguments:
    q, k = draw.x(2, 3, 4, 8), draw.x(2, 3, 12, 8)
    tables = (*draw.tables("repeated", 4, 4), *draw.tables("repeated", 3, 4))
    return q, k, *tables, 2, 2


def _own_tables(draw: Draw) -> Arguments:
    tables = (*draw.tables("repeated", 4, 4), *draw.tables("repeated", 6, 4))
    return draw.x(2, 3, 4, 8), draw.x(2, 3, 6, 8), *tables


def _blocks_heads_first(draw: Draw) -> Arguments:
    x, *rest = _blocks(draw)
    return x.transpose(1, 2), *rest, 1


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
    ids = torch.tensor([[3, 1, 4, 1, 5], [0, -1, 2, 6, -7]], device=draw.device)
    return draw.x(2, 3, 5, 8), draw.x(2, 3, 5, 8), *draw.tables("tiled", 7, 4), ids


def _gathered_tokens_first(draw: Draw) -> Arguments:
    q, k, *rest = _gathered(draw)
    return q.transpose(1, 2), k.transpose(1, 2), *rest, 2


def _with_values(check: Check) -> Check:
    def with_values(draw: Draw) -> Arguments:
        q, k, *rest = check(draw)
        return q, k, draw.x(*q.shape), *rest

    return with_values


def _without_ids(check: Check) -> Check:
    """As many rows as tokens, and None for position_ids."""

    def without_ids(draw: Draw) -> Arguments:
        *tensors, cos, sin, _ = check(draw)
        return *tensors, cos[:5], sin[:5], None

    return without_ids


def _complex(*table: int, layout: str) -> Check:
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


def _interleave(x: Tensor) -> Tensor:
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


_EVENS_FIRST = Order(theirs=_evens_first, ours=_interleave)


def _pair_form(name: str, style: Style, function: str = "apply_rotary_pos_emb") -> Form:
    return Form(name, (function,), shims.pair(style), _pairs(style.width), style.width)


def _deinterleaving(name: str, style: Style) -> Form:
    return Form(
        name,
        ("apply_rotary_pos_emb_interleave",),
        shims.pair(style),
        _pairs(style.width, partial_heads=False),
        style.width,
        order=_EVENS_FIRST,
    )


_GATHERED = (_gathered, _gathered_tokens_first, _without_ids(_gathered))
_MULTIMODAL = ("apply_multimodal_rotary_pos_emb",)
_POS_EMB = ("apply_rotary_pos_emb",)
_VISION = ("apply_rotary_pos_emb_vision",)
_PLANE = ("apply_rotary_pos_emb_2d", "apply_rotary_pos_emb_2d_self_attn")

# A form that does more than another of its signature comes first.
FORMS = (
    Form("half, key optional", _POS_EMB, shims.optional_key(Style()), (_no_key, *_pairs("tiled"))),
    Form(
        "half, last queries",
        _POS_EMB,
        shims.last_queries(Style()),
        (_last_queries, _last_queries_tokens_first),
    ),
    _pair_form("half", Style()),
    _pair_form("half, in float32", Style(float32=True)),
    _pair_form("half, inverse", Style(inverse=True)),
    _pair_form("half, half-width tables", Style("half")),
    _pair_form("interleaved", Style("repeated", interleaved=True)),
    _pair_form("interleaved, in float32", Style("repeated", interleaved=True, float32=True)),
    _pair_form("interleaved, tiled tables", Style("first", interleaved=True)),
    _pair_form(
        "interleaved, tiled tables, in float32", Style("first", interleaved=True, float32=True)
    ),
    _pair_form("interleaved, half-width tables", Style("half", interleaved=True)),
    _deinterleaving("interleaved, order preserved", Style("first", interleaved=True)),
    _deinterleaving("interleaved, order preserved, whole tables", Style("tiled", interleaved=True)),
    Form("half, rows by position_ids", _POS_EMB, shims.gathered, _GATHERED),
    Form("half, values too", _POS_EMB, shims.gathered_qkv, tuple(map(_with_values, _GATHERED))),
    Form("half, after a prefix", _POS_EMB, shims.after_prefix, (_prefixed,)),
    Form("half, one tensor", _POS_EMB, shims.single(Style()), _singles("tiled")),
    Form(
        "half, one tensor, cached rows",
        (*_POS_EMB, "apply_rotary_pos_emb_esm"),
        shims.cached_rows,
        (_cached_rows,),
    ),
    Form(
        "interleaved, one tensor, last elements, in float32",
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
    Form(
        "half, blocks",
        ("apply_multidimensional_rope",),
        shims.blocks,
        (_blocks, _blocks_heads_first),
        "blocks",
    ),
    Form(
        "half, sections of axes",
        _MULTIMODAL,
        shims.sections(Style("half")),
        (_sections, _partial_sections, _sections_tokens_first),
    ),
    Form(
        "interleaved, sections of axes",
        _MULTIMODAL,
        shims.sections(Style("half", interleaved=True)),
        (_sections, _partial_sections, _sections_tokens_first),
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
        (_plane, _memory, _repeated_memory, _excluded_memory),
        "repeated",
    ),
    Form(
        "interleaved, in float32, plane, keys' own",
        ("apply_rotary_pos_emb_2d_cross_attn",),
        shims.grouped_memory_keys,
        (_grouped_memory, _own_tables),
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
    "apply_rotary_embeddings": "no rotation: the two elements of a pair rotate by different angles",
}
