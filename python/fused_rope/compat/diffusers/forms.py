"""The forms of diffusers' rotary functions."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import Any

from torch import Tensor

from .._patching import forms
from .._patching.forms import Form
from .._patching.reference_checks import Check
from .._patching.style import Adapter
from . import adapters
from . import reference_checks as check

__all__ = ["FORMS", "find_form"]


class TupleForm(Form):
    """A form whose cosines and sines are one argument: a tuple, or for each axis a tuple."""

    def tables(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        name = next(p.name for p in self.parameters[1:] if p.name != "xk")
        return _flat(arguments[name])


class SharedForm(TupleForm):
    """The form whose tables' width is an argument; complex tables are read whole."""

    def tables(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        return super().tables(arguments) if arguments.get("use_real", True) else []

    def width_of(self, arguments: Mapping[str, Any]) -> str:
        return "tiled" if arguments.get("use_real_unbind_dim", -1) == -2 else "repeated"


class MatrixForm(TupleForm):
    """A form whose table has rotation matrices: each number stands twice, once with its sign."""

    def halves(self, arguments: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        (m,) = self.tables(arguments)
        return [(m[..., 0, 0], m[..., 1, 1]), (m[..., 1, 0], -m[..., 0, 1])]


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in _flat(part)]


def _form(
    name: str,
    function: str,
    adapter: Adapter,
    *checks: Check,
    kind: type[Form] = Form,
    **options: Any,
) -> Form:
    """A form; its adapter refuses float64, which the originals compute in another precision."""
    return kind(name, (function,), adapters.narrow(adapter), checks, **options)


_ROTARY = "apply_rotary_emb"
_COMPLEX: dict[str, Any] = {"width": "half", "exact": False}

# Of several forms of one signature the most general comes first.
FORMS = (
    _form(
        "shared",
        _ROTARY,
        adapters.shared,
        *check.SHARED,
        kind=SharedForm,
        width="repeated",
        inexact=(check.complex_rows,),
    ),
    *(
        _form(
            "interleaved, half or complex, in float32",
            name,
            adapters.qwen,
            check.adjacent,
            check.halves,
            kind=SharedForm,
            width="repeated",
            inexact=(check.complex_shared,),
        )
        for name in ("apply_rotary_emb_qwen", "_apply_rotary_emb_nucleus")
    ),
    _form("complex", _ROTARY, adapters.complex_nested, check.complex_nested, **_COMPLEX),
    _form(
        "complex, in float64, heads first",
        _ROTARY,
        adapters.complex_heads_first,
        check.complex_heads_first,
        **_COMPLEX,
    ),
    _form(
        "complex, elements first",
        "_apply_rotary_emb",
        adapters.complex_elements_first,
        check.complex_elements_first,
        **_COMPLEX,
    ),
    _form(
        "interleaved, every second number of the tables",
        _ROTARY,
        adapters.strided_tables,
        check.strided_tables,
        check.strided_batched_tables,
        width="half",
    ),
    _form(
        "interleaved, every second number of a joint table",
        "apply_rotary_emb_transposed",
        adapters.joint_tables,
        check.joint_tables,
        width="half",
    ),
    _form(
        "interleaved, in float32, tables per head",
        _ROTARY,
        adapters.per_head,
        check.per_head,
        width="half",
    ),
    *(
        _form(
            "interleaved, in float32, all heads in one row",
            name,
            adapters.all_heads,
            check.all_heads,
            kind=TupleForm,
            width="repeated",
        )
        for name in (_ROTARY, "apply_interleaved_rotary_emb")
    ),
    _form(
        "half, in float32, tables per head",
        "apply_split_rotary_emb",
        adapters.split_heads,
        check.split_heads,
        check.split_heads_first,
        **_COMPLEX,
    ),
    _form(
        "rotation matrices, in float32",
        "apply_rotary",
        adapters.matrices,
        check.matrices,
        check.batched_matrices,
        check.packed_matrices,
        kind=MatrixForm,
        width="matrices",
    ),
    _form(
        "rotation matrices, to bfloat16",
        "apply_rotary",
        adapters.matrices_to_bfloat16,
        check.matrices,
        check.batched_matrices,
        check.packed_matrices,
        kind=MatrixForm,
        width="matrices",
    ),
    _form(
        "rotation matrices, in float32, heads first",
        "apply_rope",
        adapters.matrices_heads_first,
        check.matrices_heads_first,
        kind=MatrixForm,
        width="matrices",
    ),
    _form(
        "rotation matrices, in float32, q and k",
        "apply_rope",
        adapters.matrices_for_both,
        check.matrices_for_both,
        kind=MatrixForm,
        width="matrices",
    ),
    *(
        _form(
            "interleaved, in float32, q and k",
            name,
            adapters.joint_attention,
            first,
            kind=TupleForm,
            width="repeated",
        )
        for name, first in (
            ("_apply_rotary_emb", check.joint),
            ("_apply_rotary_emb_batched", check.joint_batched),
        )
    ),
    _form(
        "half, in float32",
        "_apply_rotary_emb",
        adapters.tiled,
        check.tiled,
        kind=TupleForm,
        width="tiled",
    ),
    _form("half, leading elements", "_apply_rotary_emb", adapters.leading, check.leading),
    _form(
        "half, leading elements",
        "_apply_partial_rotary_emb",
        adapters.leading_of_pair,
        check.leading_of_pair,
        kind=TupleForm,
    ),
    _form(
        "half, in float32, leading elements, by angles",
        "_apply_rotary_partial",
        adapters.leading_by_angles,
        check.angles,
        kind=TupleForm,
    ),
    _form(
        "half, one tensor",
        "_apply_rotary_pos_emb",
        adapters.unsqueezed,
        check.unsqueezed,
        check.unsqueezed_tokens_first,
    ),
    _form(
        "half, in float32, blocks, rows by positions",
        "apply_rotary_emb_allegro",
        adapters.axes,
        check.axes,
        kind=TupleForm,
    ),
)

# Functions without a form, by name and the end of their module's name, and the reason.
_REASONS = {
    ("apply_rotary_emb", "transformer_ernie_image"): (
        "no rotation: the two elements of a pair rotate by different angles"
    ),
    ("rope_apply", "transformer_wan_animate_2"): (
        "it builds a table for the grid of each sample, and returns float32"
    ),
    ("_rotate_half", ""): "the model writes the rotation as an expression around it",
}


def find_form(name: str, original: Any) -> tuple[Form, Adapter] | str:
    """The form of the function `name` and its adapter, or the reason for none."""
    module = original.__globals__["__name__"] if isinstance(original, FunctionType) else ""
    for (function, end), reason in _REASONS.items():
        if function == name and module.endswith(end):
            return reason
    return forms.find_form(name, original, FORMS)
