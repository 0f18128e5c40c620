"""Selects the table of each call of a module."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functional import cos_sin_table
from .scaled_frequencies import ScaledFrequencies
from .table import MAX_ROWS, Pair
from .tracing import in_dynamo, is_strictly_fake, is_traced

__all__ = ["TableCache"]


class Recent(NamedTuple):
    """The table of the last call, and the calls that it serves: rows in (low, high]."""

    device: torch.device | None
    low: float
    high: float
    pair: Pair | None


_NO_CALL = Recent(None, math.inf, -math.inf, None)


class TableCache:
    """The tables of one module, which threads and devices may share.

    The pair of a call depends only on the call: its device, its frequencies, and the smallest of
    min_rows, 2 * min_rows, 4 * min_rows, ... that suffices. So recomputation in backward gets equal
    shapes. Traced code uses the longest pair so far, so that new lengths do not trace it again.

    Attributes:
        min_rows: the minimum number of rows of a pair.
        device: of the last call.
    """

    def __init__(self, frequencies: ScaledFrequencies, min_rows: int) -> None:
        self.frequencies = frequencies
        self.min_rows = min_rows
        self.device = torch.device("cpu")
        self._forget()

    def pair(self, rows: int | None, q: Tensor) -> Pair | None:
        """The table for a call whose largest position is rows - 1, or unknown on the host if None.

        Returns:
            None if no table has the frequencies of the call: it needs one row per token.
        """
        if self.frequencies.depend_on_length and (rows is None or is_traced(q)):
            return None
        rows = self.min_rows if rows is None else rows
        if not in_dynamo():
            device, low, high, pair = self._recent
            if low < rows <= high and type(q) is Tensor and q.device == device:
                return pair
        return self._traced(rows, q) if is_traced(q) else self._take(rows, q.device)

    def longest(self, device: torch.device) -> Pair:
        """The longest pair so far on `device`."""
        held = self._longest.get(device)
        if held is None:
            held = self._take(0, device)
            assert held is not None
        return held

    def reserve(self, rows: int) -> None:
        """Raises `min_rows` to at least `rows`, and makes that pair on `device`."""
        self.min_rows = max(self.min_rows, rows)
        self._take(rows, self.device)

    def move(self, device: torch.device | str) -> None:
        """Makes the shortest pair on `device`, since a captured CUDA graph cannot."""
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        if torch._guards.detect_fake_mode() is None:
            self._take(0, self.device)

    def _take(self, rows: int, device: torch.device) -> Pair | None:
        if rows > MAX_ROWS:
            raise ValueError(
                f"RotaryEmbedding: expected positions in [0, {MAX_ROWS}), got offset + S = {rows}"
            )
        span = self.frequencies.span(rows)
        if span is None:
            return None
        M, low = max(self.min_rows, 1), -math.inf
        while rows > M:
            M, low = min(2 * M, MAX_ROWS), M
        pair = span.table.pair(M, device)
        if span.table.is_complete(M, device):
            self._recent = Recent(device, max(low, span.low), min(M, span.high), pair)
        held = self._longest.get(device)
        if held is None or held.cos.shape[0] < M:
            self._longest[device] = Pair(*map(_mark_dynamic, pair))
        self.device = device
        return pair

    def _traced(self, rows: int, q: Tensor) -> Pair:
        held = self._longest.get(q.device)
        M = 0 if held is None else held.cos.shape[0]
        if held is not None and rows <= M and not is_strictly_fake(q):
            return held
        span = self.frequencies.span(0)
        assert span is not None
        M = max(rows, 2 * M, self.min_rows)
        if not in_dynamo():
            real = type(q) is Tensor  # the tracer records the table as a constant
            return span.table.pair(int(M), q.device) if real else span.table.transient(M, q)
        grown = Pair(
            *cos_sin_table(
                self.frequencies.inv_freq,
                M,
                scale=span.table.scale,
                dtype=span.table.dtype,
                device=q.device,
            )
        )
        self._longest[q.device] = grown  # Dynamo runs this at run time, with real tensors
        return grown

    def _forget(self) -> None:
        self._recent = _NO_CALL
        self._longest: dict[torch.device, Pair] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _TABLES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()


_TABLES = ("_recent", "_longest")


def _mark_dynamic(table: Tensor) -> Tensor:
    """`table`, marked so that compiled code accepts tables of all lengths.

    This is torch._dynamo.maybe_mark_dynamic(table, 0) without its import, which takes a second.
    """
    table._dynamo_weak_dynamic_indices = {0}  # type: ignore[attr-defined]
    table._has_dynamo_dim_marking = True  # type: ignore[attr-defined]
    return table
