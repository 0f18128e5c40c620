"""Comparison of results with the float64 oracle of the tests."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from inputs import EPS, InputSet
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "python"))

from oracle import norm_oracle, oracle


class WrongResult(Exception):
    """A call returned a wrong rotation, or changed memory that it must not change."""


def expected(inputs: InputSet) -> tuple[Tensor, ...]:
    """The rotated q and k of these inputs, normalized first if they have weights, in float64."""
    if inputs.cache is not None:
        return expected_in_cache(inputs)
    tables, options = (inputs.cos, inputs.sin), inputs.options
    if not inputs.weights:
        return tuple(oracle(x, *tables, **options) for x in (inputs.q, inputs.k))
    pairs = zip((inputs.q, inputs.k), inputs.weights, strict=True)
    return tuple(norm_oracle(x, *tables, weight, eps=EPS, **options) for x, weight in pairs)


def expected_in_cache(inputs: InputSet) -> tuple[Tensor, ...]:
    """q rotated, and what the cache holds of k, rotated, and of v, in float64."""
    q, k = expected(replace(inputs, cache=None))
    assert inputs.cache is not None
    scale = 1.0 if inputs.cache.scale is None else inputs.cache.scale.double()
    return q, k / scale, inputs.cache.v.double() / scale


def expected_gradients(inputs: InputSet, given: InputSet) -> tuple[Tensor, ...]:
    """The gradients of q, k and the weights in float64; `given` holds the results' gradients."""
    rotated_back = [
        oracle(g, inputs.cos, inputs.sin, inverse=True, **inputs.options)
        for g in (given.q, given.k)
    ]
    if not inputs.weights:
        return tuple(rotated_back)
    pairs = zip((inputs.q, inputs.k), inputs.weights, rotated_back, strict=True)
    of_inputs, of_weights = zip(*(_norm_gradients(*pair) for pair in pairs), strict=True)
    return (*of_inputs, *of_weights)


def _norm_gradients(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight [D], where `grad` is that of the normalized x."""
    v = x.detach().double()
    scale = 1 / (v.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    n = v * scale
    of_weight = (grad * n).flatten(0, -2).sum(0)
    weighted = grad * weight.detach().double()
    return scale * (weighted - n * (weighted * n).mean(-1, keepdim=True)), of_weight


def tolerance(dtype: torch.dtype, exact: bool) -> tuple[float, float]:
    """The allowed error: (relative to the result, relative to the largest result).

    With `exact`, float32 results are rounded once. Without it, tables, products and sums may be
    rounded to dtype, as in eager Hugging Face, and angles may be float32.
    """
    eps = torch.finfo(dtype).eps
    if dtype == torch.float8_e4m3fn:  # of a bfloat16 value; the spacing of subnormals is fixed
        return eps / 2 + 2**-8, 1e-5
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
    if not bool((difference <= bound).all()):  # false for NaN
        raise WrongResult(f"{what}: off by up to {float(difference.max()):.3g}")


def poison(*like: Tensor) -> None:
    """Fills memory with NaN that the allocator is likely to return for outputs of these sizes."""
    held = [torch.full_like(x, float("nan")) for x in like]
    del held


def unchanged(what: str, x: Tensor, before: Tensor) -> None:
    if not torch.equal(x, before):
        raise WrongResult(f"{what}: an out-of-place call changed its input")


def same_memory(what: str, x: Tensor, of: Tensor) -> None:
    if x.data_ptr() != of.data_ptr():
        raise WrongResult(f"{what}: an in-place call returned other memory")
