"""Which table each call of a module takes.

Letters: M table rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functional import cos_sin_table
from .scaled_frequencies import ScaledFrequencies
from .table import Pair
from .tracing import in_dynamo, is_strictly_fake, is_traced

__all__ = ["TableCache"]


class Recent(NamedTuple):
    """The table that a call took, and the calls that it serves: rows above `low`, up to `high`."""

    device: torch.device | None
    low: float
    high: float
    pair: Pair | None


_NOTHING = Recent(None, math.inf, -math.inf, None)


class TableCache:
    """The tables of one module, which may be shared by threads and devices.

    A call takes one pair and keeps it until it ends. Which one depends on the call alone: its
    device, its frequencies, and the smallest of min_rows, 2 * min_rows, 4 * min_rows, ... rows that
    are enough. So recomputation in backward meets the same shapes. Code that is traced takes the
    longest pair so far, so that it need not be traced again for each length.

    Attributes:
        min_rows: the fewest rows of a pair.
        device: where the last call was.
    """

    def __init__(self, frequencies: ScaledFrequencies, min_rows: int) -> None:
        self.frequencies = frequencies
        self.min_rows = min_rows
        self.device = torch.device("cpu")
        self._forget()

    def pair(self, rows: int | None, q: Tensor) -> Pair | None:
        """The table for a call whose largest position is rows - 1, or not known on the host.

        Returns:
            None where no table has the frequencies of the call: it needs a row for each token.
        """
        if self.frequencies.depend_on_length and (rows is None or is_traced(q)):
            return None
        rows = self.min_rows if rows is None else rows
        if not in_dynamo():
            device, low, high, pair = self._recent
            if low < rows <= high and type(q) is Tensor and q.device == device:
                return pair
        return self._traced(rows, q) if is_traced(q) else self._take(rows, q.device)

    def longest(self) -> Pair:
        """The longest pair so far on `device`."""
        held = self._longest.get(self.device)
        if held is None:
            held = self._take(0, self.device)
            assert held is not None
        return held

    def reserve(self, rows: int) -> None:
        """Raises `min_rows`, and makes the pair of as many rows on `device`."""
        self.min_rows = max(self.min_rows, rows)
        self._take(rows, self.device)

    def move(self, device: torch.device | str) -> None:
        """Makes the shortest pair on `device`, so that a CUDA graph finds it."""
        self.device = torch.empty(0, device=device).device  # with its index
        if torch._guards.detect_fake_mode() is None:
            self._take(0, self.device)

    def _take(self, rows: int, device: torch.device) -> Pair | None:
        span = self.frequencies.span(rows)
        if span is None:
            return None
        M, low = max(self.min_rows, 1), -math.inf
        while rows > M:
            M, low = 2 * M, M
        pair = span.table.pair(M, device)
        if span.table.is_complete(M, device):
            self._recent = Recent(device, max(low, span.low), min(M, span.high), pair)
        held = self._longest.get(device)
        if held is None or held.cos.shape[0] < M:
            self._longest[device] = Pair(*map(_of_any_length, pair))
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
            real = type(q) is Tensor  # then the tracer takes the table for a constant
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
        self._longest[q.device] = grown  # Dynamo does this at run time, with real tensors
        return grown

    def _forget(self) -> None:
        self._recent = _NOTHING
        self._longest: dict[torch.device, Pair] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _TABLES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()


_TABLES = ("_recent", "_longest")


def _of_any_length(table: Tensor) -> Tensor:
    """`table`, marked so that compiled code serves tables of all lengths.

    These are the marks of torch._dynamo.maybe_mark_dynamic, whose import takes a second.
    """
    table._dynamo_weak_dynamic_indices = {0}  # type: ignore[attr-defined]
    table._has_dynamo_dim_marking = True  # type: ignore[attr-defined]
    return table
