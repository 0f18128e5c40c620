"""Every result is compared with the float64 oracle of the tests before it is timed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from inputs import InputSet
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "python"))

from oracle import oracle


class WrongResult(Exception):
    """A call that returned something else than a rotation, or touched what it should not."""


def expected(inputs: InputSet, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """float64 q and k of these inputs, in their own shape."""
    q, k = (
        oracle(x, inputs.cos, inputs.sin, inverse=inverse, **inputs.options)
        for x in (inputs.q, inputs.k)
    )
    return q, k


def tolerance(dtype: torch.dtype, exact: bool) -> tuple[float, float]:
    """Allowed error, relative to the result and to the largest input.

    `exact`: rounded once from float32. Otherwise tables, products and sums may be rounded to dtype,
    as eager Hugging Face does, and angles may be float32.
    """
    eps = torch.finfo(dtype).eps
    if exact:
        return eps / 2, 4 * torch.finfo(torch.float32).eps
    return eps / 2, 2 * eps + 5e-4


def check(what: str, got: Tensor, want: Tensor, exact: bool) -> None:
    """Raises WrongResult unless every element of `got` is within the tolerance of `want`."""
    if got.shape != want.shape:
        raise WrongResult(f"{what}: expected shape {list(want.shape)}, got {list(got.shape)}")
    relative, absolute = tolerance(got.dtype, exact)
    difference = got.double().sub_(want).abs_()
    bound = want.abs().mul_(relative * (1 + 1e-3)).add_(absolute * float(want.abs().max()))
    if not bool((difference <= bound).all()):  # a NaN compares false
        raise WrongResult(f"{what}: off by up to {float(difference.max()):.3g}")


def poison(*like: Tensor) -> None:
    """Leaves NaN in the memory that the next outputs of these sizes are likely to be given."""
    held = [torch.full_like(x, float("nan")) for x in like]
    del held


def unchanged(what: str, x: Tensor, before: Tensor) -> None:
    if not torch.equal(x, before):
        raise WrongResult(f"{what}: input was changed by an out-of-place call")


def same_memory(what: str, x: Tensor, of: Tensor) -> None:
    if x.data_ptr() != of.data_ptr():
        raise WrongResult(f"{what}: a call in place returned other memory")
