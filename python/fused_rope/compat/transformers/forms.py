"""The forms of transformers' rotary functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._patching import forms
from .._patching.forms import Form, Order
from .._patching.style import Adapter, Style
from . import adapters
from . import reference_checks as check

__all__ = ["FORMS", "NOT_ROTATIONS", "Form", "find_form"]


def _evens_first(x: Tensor) -> Tensor:
    return torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)


def _interleave(x: Tensor) -> Tensor:
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


_EVENS_FIRST = Order(theirs=_evens_first, ours=_interleave)


def _pair_form(name: str, style: Style, function: str = "apply_rotary_pos_emb") -> Form:
    return Form(name, (function,), adapters.pair(style), check.pairs(style.width), style.width)


def _deinterleaving(name: str, style: Style) -> Form:
    return Form(
        name,
        ("apply_rotary_pos_emb_interleave",),
        adapters.pair(style),
        check.pairs(style.width, partial_heads=False),
        style.width,
        order=_EVENS_FIRST,
    )


_MULTIMODAL = ("apply_multimodal_rotary_pos_emb",)
_POS_EMB = ("apply_rotary_pos_emb",)
_VISION = ("apply_rotary_pos_emb_vision",)
_PLANE = ("apply_rotary_pos_emb_2d", "apply_rotary_pos_emb_2d_self_attn")

# Of several forms of one signature the most general comes first.
FORMS = (
    Form(
        "half, key optional",
        _POS_EMB,
        adapters.optional_key(Style()),
        (check.no_key, *check.pairs("tiled")),
    ),
    Form(
        "half, last queries",
        _POS_EMB,
        adapters.last_queries(Style()),
        (check.last_queries, check.last_queries_tokens_first),
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
    Form("half, rows by position_ids", _POS_EMB, adapters.gathered, check.GATHERED),
    Form(
        "half, values too",
        _POS_EMB,
        adapters.gathered_qkv,
        tuple(map(check.with_values, check.GATHERED)),
    ),
    Form("half, after a prefix", _POS_EMB, adapters.after_prefix, (check.prefixed,)),
    Form("half, one tensor", _POS_EMB, adapters.single(Style()), check.singles("tiled")),
    Form(
        "half, one tensor, cached rows",
        (*_POS_EMB, "apply_rotary_pos_emb_esm"),
        adapters.cached_rows,
        (check.cached_rows,),
    ),
    Form(
        "interleaved, one tensor, last elements, in float32",
        _POS_EMB,
        adapters.single(Style("half", interleaved=True, trailing=True, float32=True)),
        check.singles("half"),
        "half",
    ),
    Form("interleaved, sine first", _POS_EMB, adapters.swapped, (check.swapped,), "half"),
    Form(
        "interleaved, in float64",
        ("apply_rotary_time_emb",),
        adapters.float64_time,
        (check.time,),
        "repeated",
    ),
    Form(
        "half, blocks",
        ("apply_multidimensional_rope",),
        adapters.blocks,
        (check.blocks, check.blocks_heads_first),
        "blocks",
    ),
    Form(
        "half, sections of axes",
        _MULTIMODAL,
        adapters.sections(Style("half")),
        (check.sections, check.partial_sections, check.sections_tokens_first),
    ),
    Form(
        "interleaved, sections of axes",
        _MULTIMODAL,
        adapters.sections(Style("half", interleaved=True)),
        (check.sections, check.partial_sections, check.sections_tokens_first),
        "first",
    ),
    Form(
        "half, in float32, tokens first",
        _VISION,
        adapters.token_major(Style(float32=True)),
        (check.packed_tokens, check.batched_tokens),
    ),
    Form("half, tokens first", _VISION, adapters.token_major(Style()), (check.batched_tokens,)),
    Form("half, in float32, by angles", _VISION, adapters.angles, (check.angles,), "half"),
    Form(
        "interleaved, in float32, plane",
        _PLANE,
        adapters.head_major(adapters.REPEATED_FLOAT32),
        (check.plane,),
        "repeated",
    ),
    Form(
        "interleaved, in float32, plane, repeated for keys",
        _PLANE,
        adapters.memory_keys,
        (check.plane, check.memory, check.repeated_memory, check.excluded_memory),
        "repeated",
    ),
    Form(
        "interleaved, in float32, plane, keys' own",
        ("apply_rotary_pos_emb_2d_cross_attn",),
        adapters.grouped_memory_keys,
        (check.grouped_memory, check.separate_tables),
        "repeated",
    ),
    Form(
        "complex, tokens first",
        ("apply_rotary_emb",),
        adapters.complex_rows("bshd"),
        (check.complex_tables(2, 5, 4, layout="bshd"),),
        "half",
        exact=False,
    ),
    Form(
        "complex, heads first",
        ("apply_rotary_emb",),
        adapters.complex_rows("bhsd"),
        (check.complex_tables(2, 5, 4, layout="bhsd"),),
        "half",
        exact=False,
    ),
    Form(
        "complex, plane",
        ("vision_apply_rotary_emb",),
        adapters.complex_plane,
        (check.complex_tables(5, 1, 4, layout="bshd"),),
        "half",
        exact=False,
    ),
    Form(
        "half, before the projections",
        ("_apply_rotary_embedding",),
        adapters.before_projection,
        (check.conformer,),
    ),
    Form(
        "interleaved, values too",
        ("apply_rotary_position_embeddings",),
        adapters.sinusoidal,
        (check.sinusoidal, check.sinusoidal_values),
        "half",
    ),
    Form(
        "half, packed, in place",
        ("apply_rotary_unpadded",),
        adapters.packed_qkv,
        (check.packed_qkv,),
        "half",
        device="cuda",
    ),
)

# Functions without a form, and the reason.
NOT_ROTATIONS = {
    "apply_rotary_embeddings": "no rotation: the two elements of a pair rotate by different angles",
}


def find_form(name: str, original: Any) -> tuple[Form, Adapter] | str:
    """The form of the function or method `name` and its adapter, or the reason for none."""
    return NOT_ROTATIONS.get(name) or forms.find_form(name, original, FORMS)
