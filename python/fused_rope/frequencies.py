"""Inverse frequencies of every scaling, and the axes of M-RoPE.

Pair j of the token at position m rotates by `m * inv_freq[j]`. RoFormer (Su et al., 2021) has
`inv_freq[j] = base ** (-2j/R)`; the other kinds stretch these, so that a model reads longer texts
than it was trained on. All are computed in float64 on the host, so that default dtypes, default
devices and autocast have no effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["frequencies", "inv_freq", "mrope_axes"]

Scaling = Mapping[str, Any]
_Frequencies = tuple[list[float], float]


def inv_freq(head_dim: int, base: float = 10000.0) -> Tensor:
    """The inverse frequencies of RoFormer, for `fused_rope.cos_sin_table`.

    `frequencies` computes those of every scaling.

    Args:
        head_dim: the number of rotated elements, even: D, or rotary_dim if that is smaller.
        base: the base of the geometric series ("rope_theta").

    Returns:
        base ** (-2j / head_dim) for each pair j, float64 [head_dim / 2] on the CPU.

    Raises:
        ValueError: head_dim is odd or negative.

    Example:
        >>> cos, sin = fused_rope.cos_sin_table(fused_rope.inv_freq(64), 4096)
    """
    return frequencies(head_dim, base)[0]


def frequencies(
    rotary_dim: int,
    base: float = 10000.0,
    scaling: Scaling | None = None,
    *,
    rows: int | None = None,
) -> tuple[Tensor, float]:
    """The inverse frequencies of R elements, and the factor that scales cosine and sine.

    The keys are those of Hugging Face's `rope_scaling` and `rope_parameters`, and the values equal
    those of its `ROPE_INIT_FUNCTIONS` to float32 rounding.

    Args:
        rotary_dim: R, even.
        base: the base of the geometric series ("rope_theta").
        scaling: None, or a mapping with "rope_type" and the keys of that kind:

            ===============  =====================================================================
            default
            linear           factor
            dynamic          factor, original_max_position_embeddings
            yarn             factor, original_max_position_embeddings; optional beta_fast,
                             beta_slow, attention_factor, mscale, mscale_all_dim, truncate
            longrope         short_factor, long_factor, original_max_position_embeddings, and
                             factor or attention_factor
            llama3           factor, low_freq_factor, high_freq_factor,
                             original_max_position_embeddings
            proportional     optional partial_rotary_factor, factor
            half_truncated   (R/4 frequencies from 1 down to 1/base, then R/4 zeros)
            axial            (the frequencies of R/2 elements, once for each of two axes)
            ===============  =====================================================================

            All kinds except dynamic and longrope also take pair_order, P ints: pair j then has
            frequency pair_order[j].
        rows: the number of positions in use; only dynamic and longrope depend on it. None means at
            most original_max_position_embeddings.

    Returns:
        inv_freq, float64 [P] on the CPU, and the attention factor.

    Raises:
        ValueError: R is odd, rope_type is unknown, a key is missing or has the wrong length.

    Example:
        >>> inv_freq, factor = frequencies(128, 500000.0, {"rope_type": "linear", "factor": 4.0})
        >>> inv_freq.shape, factor
        (torch.Size([64]), 1.0)
    """
    if rotary_dim < 0 or rotary_dim % 2:
        raise ValueError(f"frequencies: expected an even rotary_dim R >= 0, got {rotary_dim}")
    scaling = {} if scaling is None else scaling
    kind = rope_type(scaling)
    inv_freq, factor = _KINDS[kind](rotary_dim, float(base), _Keys(kind, scaling), rows)
    if scaling.get("pair_order") is not None:
        inv_freq = _reordered(kind, inv_freq, scaling["pair_order"])
    with torch.inference_mode(False):
        return torch.tensor(inv_freq, dtype=torch.float64, device="cpu"), factor


def rope_type(scaling: Scaling) -> str:
    """The kind that `scaling` names, by the key "rope_type" or the older "type"."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kind = _ALIASES.get(kind, kind)
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise ValueError(f"frequencies: expected rope_type to be one of {known}, got {kind!r}")
    return str(kind)


def mrope_axes(sections: Sequence[int], interleaved: bool = False) -> tuple[int, ...]:
    """The position axis of each pair, for the `axes` of `fused_rope.rotate` (M-RoPE).

    Args:
        sections: the number of pairs of each of the A axes, P in total.
        interleaved: False for Qwen2-VL's order (the first sections[0] pairs read axis 0, the next
            sections[1] axis 1, ...), True for Qwen3-VL's (pair j reads axis j mod A if
            j < A * sections[j mod A], else axis 0).

    Returns:
        P ints in [0, A).

    Raises:
        ValueError: sections is empty or has a negative number.

    Example:
        >>> mrope_axes([2, 1, 1])
        (0, 0, 1, 2)
        >>> mrope_axes([2, 1, 1], interleaved=True)
        (0, 1, 2, 0)
    """
    sections = tuple(sections)
    A = len(sections)
    if A == 0 or min(sections) < 0:
        raise ValueError(f"mrope_axes: expected sections of one or more ints >= 0, got {sections}")
    if not interleaved:
        return tuple(axis for axis, pairs in enumerate(sections) for _ in range(pairs))
    return tuple(j % A if j < A * sections[j % A] else 0 for j in range(sum(sections)))


def _reordered(kind: str, inv_freq: list[float], order: Sequence[int]) -> list[float]:
    P = len(inv_freq)
    if kind in ("dynamic", "longrope"):
        raise ValueError(f"frequencies: rope_type {kind!r} takes no pair_order")
    if len(order) != P or not all(0 <= number < P for number in order):
        raise ValueError(f"frequencies: expected pair_order of P={P} ints in [0, P), got {order}")
    return [inv_freq[number] for number in order]


class _Keys:
    """The entries of one scaling; the error for a missing one names it."""

    def __init__(self, kind: str, scaling: Scaling) -> None:
        self.kind = kind
        self._scaling = scaling

    def need(self, key: str) -> Any:
        value = self._scaling.get(key)
        if value is None:
            raise ValueError(f"frequencies: rope_type {self.kind!r} needs {key} in scaling")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        value = self._scaling.get(key)
        return default if value is None else value

    def need_list(self, key: str, length: int) -> list[float]:
        values = [float(value) for value in self.need(key)]
        if len(values) != length:
            raise ValueError(f"frequencies: expected {length} values in {key}, got {len(values)}")
        return values


def _series(R: int, base: float) -> list[float]:
    return [1.0 / base ** (element / R) for element in range(0, R, 2)]


def _default(R: int, base: float, keys: _Keys, rows: int | None) -> _Frequencies:
    return _series(R, base), 1.0


def _linear(R: int, base: float, keys: _Keys, rows: int | None) -> _Frequencies:
    """Position interpolation (Chen et al., 2023)."""
    factor = keys.need("factor")
    return [f / factor for f in _series(R, base)], 1.0


def _dynamic(R: int, base: float, keys: _Keys, rows: int | None) -> _Frequencies:
    """NTK-aware scaling of the base, for rows beyond the original length."""
    factor = keys.need("factor")
    trained = keys.need("original_max_position_embeddings")
    stretch = factor * max(rows or 0, trained) / trained - (factor - 1)
    return _series(R, base * stretch ** (R / (R - 2)) if R > 2 else base), 1.0


def _yarn(R: int, base: float, keys: _Keys, rows: int | None) -> _Frequencies:
    """YaRN (Peng et al., 2023): interpolates slow pairs, keeps fast ones, blends those between."""
    factor = keys.need("factor")
    trained = keys.need("original_max_position_embeddings")

    def pair_with(rotations: float) -> float:
        """The pair that rotates so often over the trained length, as a fraction."""
        return R * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = pair_with(keys.get("beta_fast") or 32)
    high = pair_with(keys.get("beta_slow") or 1)
    if keys.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    width = (high - low) or 0.001

    inv_freq = []
    for j, f in enumerate(_series(R, base)):
        interpolated = min(max((j - low) / width, 0.0), 1.0)
        inv_freq.append(f / factor * interpolated + f * (1 - interpolated))
    return inv_freq, _yarn_attention_factor(factor, keys)


def _yarn_attention_factor(factor: float, keys: _Keys) -> float:
    given = keys.get("attention_factor")
    if given is not None:
        return float(given)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    numerator, denominator = keys.get("mscale"), keys.get("mscale_all_dim")
    return mscale(numerator) / mscale(denominator) if numerator and denominator else mscale(1.0)


def _longrope(R: int, base: float, keys: _Keys, rows: int | None) -> _Frequencies:
    """LongRoPE (Ding et al., 2024): a searched factor for each pair, and others for long texts."""
    trained = keys.need("original_max_position_embeddings")
    lists = {key: keys.need_list(key, R // 2) for key in ("short_factor", "long_factor")}
    stretch = lists["long_factor" if (rows or 0) > trained else "short_factor"]
    inv_freq = [f / s for f, s in zip(_series(R, base), stretch, strict=True)]
    attention_factor = keys.get("attention_factor")
    if attention_factor is None:
        factor = keys.need("factor")
        attention_factor = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(trained))
    return inv_freq, float(attention_factor)


def _llama3(R: int, base: float, keys: _Keys, rows: int | None) -> _Frequencies:
    """Llama 3.1: interpolates slow pairs, keeps fast ones, blends those between by wavelength."""
    factor = keys.need("factor")
    slow, fast = keys.need("low_freq_factor"), keys.need("high_freq_factor")
    trained = keys.need("original_max_position_embeddings")
    inv_freq = []
    for f in _series(R, base):
        rotations = trained * f / (2 * math.pi)
        if fast > slow:
            kept = min(max((rotations - slow) / (fast - slow), 0.0), 1.0)
        else:  # no blend, as in transformers
            kept = 1.0 if rotations >= slow else 0.0
        inv_freq.append((1 - kept) * f / factor + kept * f)
    return inv_freq, 1.0


def _proportional(R: int, base: float, keys: _Keys, rows: int | None) -> _Frequencies:
    """p-RoPE (Gemma 4): only the fastest pairs rotate, with the series of all R elements."""
    rotating = int(keys.get("partial_rotary_factor", 1.0) * R // 2)
    factor = keys.get("factor", 1.0)
    return [f / factor if j < rotating else 0.0 for j, f in enumerate(_series(R, base))], 1.0


def _half_truncated(R: int, base: float, keys: _Keys, rows: int | None) -> _Frequencies:
    """modded-nanogpt: R/4 frequencies whose last is 1/base, and R/4 pairs that do not rotate."""
    rotating = _quarter(R, keys)
    step = 1 / max(rotating - 1, 1)
    return [(1.0 / base) ** (j * step) for j in range(rotating)] + [0.0] * rotating, 1.0


def _axial(R: int, base: float, keys: _Keys, rows: int | None) -> _Frequencies:
    """2-D vision: rows and columns (`axes`) have the same frequencies, those of R/2 elements."""
    _quarter(R, keys)
    return _series(R // 2, base) * 2, 1.0


def _quarter(R: int, keys: _Keys) -> int:
    if R % 4:
        raise ValueError(
            f"frequencies: rope_type {keys.kind!r} needs a rotary_dim R that is a multiple of 4, "
            f"got {R}"
        )
    return R // 4


_KINDS: dict[str, Callable[[int, float, _Keys, int | None], _Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
    "half_truncated": _half_truncated,
    "axial": _axial,
}
# Older configs call M-RoPE a scaling ("mrope") and LongRoPE "su".
_ALIASES = {"mrope": "default", "su": "longrope"}
