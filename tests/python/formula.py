"""The rotation written out in float64, for whatever broadcasts, and how to compare with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def rotate_reference(
    x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, start: int = 0
) -> Tensor:
    """x [..., D], elements from `start` on rotated by tables [..., P] that broadcast over it."""
    x, cos, sin = x.detach().double(), cos.detach().double(), sin.detach().double()
    R = 2 * cos.shape[-1]
    left, middle, right = x[..., :start], x[..., start : start + R], x[..., start + R :]
    if interleaved:
        a, b = middle[..., 0::2], middle[..., 1::2]
        middle = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = middle.chunk(2, -1)
        middle = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([left, middle, right], -1)


def series(R: int, base: float = 10000.0) -> Tensor:
    """The frequencies of R elements, float64 [R/2]."""
    return base ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)


def close(got: Tensor, want: Tensor, *, ulps: float = 4, dtype: torch.dtype | None = None) -> None:
    """Fails unless got is want [float64] to some ulps of got's dtype, or of `dtype`."""
    assert got.shape == want.shape
    allowed = ulps * torch.finfo(dtype or got.dtype).eps
    torch.testing.assert_close(got.detach().double(), want.double(), rtol=allowed, atol=allowed)


def gradients(function: Callable[..., Any], *xs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Random gradients of the function's results, and the gradients of xs that they lead to.

    Fails if it changed xs or the gradients that it was given.
    """
    leaves = [x.detach().clone().requires_grad_() for x in xs]
    results = function(*leaves)
    results = [results] if isinstance(results, Tensor) else list(results)
    given = [torch.randn_like(result) for result in results]
    kept = [g.clone() for g in given]
    got = torch.autograd.grad(results, leaves, given)
    for before, after in zip([*xs, *kept], [*leaves, *given], strict=True):
        assert torch.equal(before, after)
    return given, list(got)


def compiles(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Fails unless the function compiles without a graph break, to the same results."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, want = compiled(*arguments, **options), function(*arguments, **options)
    torch._dynamo.reset()
    for a, b in zip(_all(got), _all(want), strict=True):
        assert torch.equal(a, b)


def _all(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)
