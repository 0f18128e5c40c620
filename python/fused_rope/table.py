"""Tables of cosines and sines that modules share.

Tables are immutable: autograd and recomputation may keep a pair (cos, sin). Growth makes another
pair.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functional import cos_sin_table
from .tracing import fake_mode_of, is_capturing, outside_modes

__all__ = ["MAX_ROWS", "DeviceCopies", "Pair", "Table", "shared_table"]

MAX_ROWS = 2**31 + 1  # of `cos_sin_table`, which is exact up to row 2^31
_CPU = torch.device("cpu")


class Pair(NamedTuple):
    """The two halves of one table, [M, P] each."""

    cos: Tensor
    sin: Tensor


class DeviceCopies:
    """Immutable host tensors and their copies on other devices. Thread-safe."""

    def __init__(self, *host: Tensor) -> None:
        self._lock = threading.Lock()
        self._copies = {_CPU: host}
        self._in_flight: dict[torch.device, torch.cuda.Event] = {}

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The tensors on `device`, ready for its current stream, without synchronizing.

        Raises:
            RuntimeError: there is no copy yet while a CUDA graph is being captured.
        """
        copies = self._copies.get(device)
        if copies is None:
            with self._lock, outside_modes():
                copies = self._copies.get(device) or self._copy(device)
        event = self._in_flight.get(device)
        if event is not None and not is_capturing(device):
            torch.cuda.current_stream(device).wait_event(event)  # another stream may have copied
        return copies

    def are_complete(self, device: torch.device) -> bool:
        """Whether the copies on `device` are complete, so that no stream needs to wait."""
        if device in self._in_flight and not is_capturing(device):
            with self._lock:
                event = self._in_flight.get(device)
                if event is not None and event.query():
                    del self._in_flight[device]
        return device in self._copies and device not in self._in_flight

    def peek(self, device: torch.device) -> tuple[Tensor, ...] | None:
        """The existing copies or None; traced code must not make new ones."""
        return self._copies.get(device)

    def replace_host(self, *host: Tensor) -> None:
        """Replaces the host tensors by equal ones."""
        self._copies[_CPU] = host

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceCopies:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return DeviceCopies, self._copies[_CPU]

    def _copy(self, device: torch.device) -> tuple[Tensor, ...]:
        if is_capturing(device):
            raise RuntimeError(
                "RotaryEmbedding: expected its table to be on the device before a CUDA graph is "
                "captured: call reserve(rows) or run the module once before"
            )
        host = self._copies[_CPU]
        if device.type == "cuda":  # a copy from pageable memory would synchronize
            host = tuple(tensor.pin_memory() for tensor in host)
        copies = tuple(tensor.to(device, non_blocking=True) for tensor in host)
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._in_flight[device] = event
        self._copies[device] = copies
        return copies


class Table:
    """The rows of one set of frequencies, on any device. Thread-safe. See `shared_table`.

    Args:
        frequencies: P frequencies, in radians per row.
        scale: the attention factor of cos and sin.
        dtype: of the table.
    """

    def __init__(self, frequencies: tuple[float, ...], scale: float, dtype: torch.dtype) -> None:
        self.frequencies = frequencies
        self.scale = scale
        self.dtype = dtype
        self._lock = threading.Lock()
        self._longest: Pair | None = None
        self._by_rows: dict[int, DeviceCopies] = {}

    def pair(self, rows: int, device: torch.device) -> Pair:
        """The first `rows` rows on `device`; see `DeviceCopies.on`."""
        return Pair(*self._first(rows).on(device))

    def is_complete(self, rows: int, device: torch.device) -> bool:
        """See `DeviceCopies.are_complete`; for a pair that exists."""
        return self._by_rows[rows].are_complete(device)

    def transient(self, rows: int, q: Tensor) -> Pair:
        """The first `rows` rows on q's device and in q's fake mode, for one call."""
        with fake_mode_of(q):
            return self._build(rows, q.device)

    def _build(self, rows: int, device: torch.device) -> Pair:
        inv_freq = torch.tensor(self.frequencies, dtype=torch.float64, device="cpu")
        return Pair(
            *cos_sin_table(inv_freq, rows, scale=self.scale, dtype=self.dtype, device=device)
        )

    def _first(self, rows: int) -> DeviceCopies:
        copies = self._by_rows.get(rows)
        if copies is None:
            with self._lock, outside_modes():
                copies = self._by_rows.get(rows) or self._add(rows)
        return copies

    def _add(self, rows: int) -> DeviceCopies:
        if self._longest is None or self._longest.cos.shape[0] < rows:
            self._longest = self._build(rows, _CPU)
            # Shorter tables become views of it, so that their memory is freed. Their copies on
            # other devices stay, since streams may still read them.
            for shorter, copies in self._by_rows.items():
                copies.replace_host(*(table[:shorter] for table in self._longest))
        copies = DeviceCopies(*(table[:rows] for table in self._longest))
        self._by_rows[rows] = copies
        return copies

    def __deepcopy__(self, memo: dict[int, Any]) -> Table:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return shared_table, (self.frequencies, self.scale, self.dtype)


_lock = threading.Lock()
_tables: weakref.WeakValueDictionary[tuple[Any, ...], Table] = weakref.WeakValueDictionary()


def shared_table(
    frequencies: tuple[float, ...], scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Table:
    """The process's only `Table` of these frequencies; references to it are weak."""
    key = frequencies, scale, dtype
    with _lock:
        table = _tables.get(key)
        if table is None:
            table = _tables[key] = Table(*key)
        return table
