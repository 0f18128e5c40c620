"""Random arguments for reference checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["Arguments", "Check", "Draw", "position_ids"]


class Draw:
    """Random arguments of a reference check, from a generator of its own."""

    def __init__(self, dtype: torch.dtype, table_dtype: torch.dtype, device: str) -> None:
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._dtypes = (dtype, table_dtype)
        self.device = device

    def x(self, *shape: int) -> Tensor:
        """Queries, keys or values."""
        return self._randn(shape).to(self.device, self._dtypes[0])

    def tables(self, width: str, *shape: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of this width; random, so that no two forms give equal results."""
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


def position_ids(device: str) -> Iterator[Any]:
    """Values for a position_ids without effect: None, valid rows, and an object of no use."""
    yield None
    yield torch.tensor([[4, 3, 2, 1, 0], [1, 0, 3, 2, 4]], device=device)
    yield torch.tensor([[4, 3, 2, 1, 0]], device=device)
    yield torch.tensor([4, 3, 2, 1, 0], device=device)
    yield object()
