"""How a rotary function pairs elements, reads its tables and rounds; the adapters' one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import functional
from .norms import Norm

__all__ = ["Adapter", "Pair", "RealTableError", "Style", "parts"]

Adapter = Callable[..., Any]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Style:
    """How a function pairs the elements of a head, reads its tables and rounds.

    Attributes:
        width: "half" for tables [..., P]; for [..., R], "tiled" (two equal halves), "repeated"
            (every number twice in succession) or "first" (the model reads only the first half).
        interleaved: the two elements of a pair are adjacent.
        inverse: the rotation is the inverse one.
        trailing: the last R elements are rotated, not the first.
        float32: the model computes in float32 and rounds once; otherwise it rounds each operation
            to its dtype.
    """

    width: str = "tiled"
    interleaved: bool = False
    inverse: bool = False
    trailing: bool = False
    float32: bool = False

    def rotate(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        precision: str,
        layout: str,
        positions: Tensor | None = None,
        blocks: int = 1,
        norm: Norm | None = None,
        offset: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        """`functional.rotate` in this style, or `norm_rotate`."""
        options = self._options(x, cos, precision, layout, blocks)
        outs = () if out is None else (out,)
        rotated: Tensor = _call("rotate", (x, cos, sin), positions, offset, options, norm, outs)
        return rotated if out is None else out

    def rotate_qk(
        self,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        precision: str,
        layout: str,
        positions: Tensor | None = None,
        norm: Norm | None = None,
        offset: int = 0,
        out: Pair | None = None,
    ) -> Pair:
        """`functional.rotate_qk` in this style, or `norm_rotate_qk`."""
        options = self._options(q, cos, precision, layout)
        tensors = (q, k, cos, sin)
        rotated: Pair = _call("rotate_qk", tensors, positions, offset, options, norm, out or ())
        return rotated if out is None else out

    @property
    def table_layout(self) -> str:
        """The operator's name for `width`."""
        return "tiled" if self.width == "first" else self.width

    def _options(
        self, x: Tensor, cos: Tensor, precision: str, layout: str, blocks: int = 1
    ) -> tuple[Any, ...]:
        """The options of `functional.call`."""
        # With a wider table the model computes in the table's dtype, as precision "fp32" does.
        x_dtype, dtype = x.dtype, cos.dtype
        if self.float32 or (dtype != x_dtype and torch.promote_types(x_dtype, dtype) != x_dtype):
            precision = "fp32"
        offset = 0
        if self.trailing:
            offset = x.shape[-1] - cos.shape[-1] * (2 if self.width == "half" else 1)
        return (
            layout,
            None,
            offset,
            self.interleaved,
            blocks,
            self.inverse,
            precision,
            self.table_layout,
        )


def _call(
    name: str,
    tensors: tuple[Tensor, ...],
    positions: Tensor | None,
    offset: int,
    options: tuple[Any, ...],
    norm: Norm | None,
    outs: tuple[Tensor, ...],
) -> Any:
    """The operator `name`, or the one that normalizes too, or writes to `outs`."""
    weights: tuple[Tensor | None, ...] = ()
    if norm is not None:
        name, weights, options = f"norm_{name}", norm.weights, (*options, *norm.options)
    if outs:
        name = f"{name}_out"
    return functional.call(name, (*tensors, *outs, *weights), positions, offset, None, options)


class RealTableError(TypeError):
    """A real table instead of a complex one."""


def parts(freqs: Tensor, device: torch.device) -> Pair:
    """Cosine and sine: the real and the imaginary part of a complex table."""
    if not freqs.is_complex():
        raise RealTableError(
            f"apply_rotary_emb: expected a complex table, got {freqs.dtype}: a cast such as "
            "model.to(dtype) dropped the imaginary part: build the table again after the cast"
        )
    freqs = freqs.to(device)
    return freqs.real, freqs.imag
