"""Frequencies that may depend on the length of a call: its table, or one row per token."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .frequencies import frequencies, rope_type, whole_number
from .table import DeviceCopies, Pair, Table, shared_table
from .tracing import is_strictly_fake, is_traced, outside_modes

__all__ = ["ScaledFrequencies", "Span"]


class Span(NamedTuple):
    """A table, and the numbers of rows for which it is valid: (low, high]."""

    table: Table
    low: float
    high: float


class ScaledFrequencies:
    """The frequencies of one scaling for any number of positions in use.

    Most kinds have one table. Longrope has two, for texts up to the trained length and for longer
    ones. Dynamic has one up to the trained length; beyond it the frequencies change with each row.
    For those rows, and for both kinds if only the device knows the largest position,
    `per_token_table` computes one row per token on the device, without synchronizing.

    Args:
        rotary_dim: R.
        base: base of the frequencies.
        scaling: as in `frequencies`.
        blocks: how many times the frequencies of R / blocks elements are repeated.
        dtype: of the tables.

    Attributes:
        inv_freq: float64 [P] on the CPU, those up to the trained length.
        depend_on_length: whether the kind is dynamic or longrope.

    Raises:
        ValueError: as `frequencies`.
    """

    def __init__(
        self,
        rotary_dim: int,
        base: float,
        scaling: Mapping[str, Any] | None = None,
        blocks: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        rotary_dim = whole_number("frequencies", "rotary_dim", rotary_dim)
        # Copies and saves of a module compute the frequencies again.
        scaling = None if scaling is None else copy.deepcopy(dict(scaling))
        self._arguments = rotary_dim, base, scaling, blocks, dtype
        self._spans: tuple[Span, ...]
        kind = rope_type(scaling or {})
        self.depend_on_length = kind in ("dynamic", "longrope")
        with outside_modes():
            inv_freq, scale = self._frequencies()
            self.inv_freq = inv_freq.repeat(blocks)
            self._scales = scale, scale
            table = shared_table(tuple(self.inv_freq.tolist()), scale, dtype)
            if not self.depend_on_length:
                self._spans = (Span(table, -math.inf, math.inf),)
                return
            assert scaling is not None
            trained = scaling["original_max_position_embeddings"]
            self._spans = (Span(table, -math.inf, trained),)
            # Beyond the trained length longrope has other frequencies; dynamic multiplies them by
            # powers of a factor that grows with the rows.
            self._trained, self._factor = float(trained), 0.0
            if kind == "longrope":
                other, scale = self._frequencies(rows=trained + 1)
                other = other.repeat(blocks)
                self._scales = self._scales[0], scale
                long = shared_table(tuple(other.tolist()), scale, dtype)
                self._spans += (Span(long, trained, math.inf),)
            else:
                self._factor = float(scaling["factor"])
                R = rotary_dim // blocks
                exponents = torch.arange(0, R, 2, dtype=torch.float64, device="cpu")
                other = (-exponents / max(R - 2, 1)).repeat(blocks)
            constants = torch.stack([self.inv_freq, other])
            self._constants, self._constant_numbers = DeviceCopies(constants), constants.tolist()

    def span(self, rows: int) -> Span | None:
        """The table of a call with `rows` positions in use; None if it needs `per_token_table`."""
        for span in self._spans:
            if rows <= span.high:
                return span
        return None

    def per_token_table(self, positions: Tensor) -> tuple[Pair, Tensor]:
        """A table with one row for each of `positions`, and the indices of these rows.

        Args:
            positions: int64, any shape and device; -1 means no rotation.

        Returns:
            cos and sin, float32 [positions.numel(), P], and indices, int64 of positions' shape.
        """
        device = positions.device
        rows = positions.max() + 1
        short, other = self._constants_with(positions)
        scale: float | Tensor = self._scales[0]
        if self._factor:
            stretch = self._factor * rows.double().clamp(min=self._trained) / self._trained
            inv_freq = short * (stretch - (self._factor - 1)) ** other
        else:
            inv_freq = torch.where(rows > self._trained, other, short)
            if self._scales[0] != self._scales[1]:
                scale = torch.where(rows > self._trained, self._scales[1], self._scales[0]).double()
        angle = positions.reshape(-1, 1).double() * inv_freq
        cos, sin = ((t * scale).float() for t in (angle.cos(), angle.sin()))
        numbers = torch.arange(positions.numel(), device=device).view(positions.shape)
        return Pair(cos, sin), torch.where(positions < 0, positions, numbers)

    def _constants_with(self, positions: Tensor) -> Tensor:
        device, kept = positions.device, None
        if not is_traced(positions):
            kept = self._constants.on(device)
        elif not is_strictly_fake(positions):
            kept = self._constants.peek(device)
        if kept is not None:
            return kept[0]
        return torch.tensor(self._constant_numbers, dtype=torch.float64, device="cpu").to(device)

    def _frequencies(self, rows: int | None = None) -> tuple[Tensor, float]:
        rotary_dim, base, scaling, blocks, _ = self._arguments
        return frequencies(rotary_dim // blocks, base, scaling, rows=rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return ScaledFrequencies, self._arguments
