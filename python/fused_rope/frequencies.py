"""Inverse frequencies of every scaling, and the axes of M-RoPE.

Pair j of the token at position m rotates by `m * inv_freq[j]`. RoFormer (Su et al., 2021) has
`inv_freq[j] = base ** (-2j/R)`; the other kinds stretch these, so that a model reads longer texts
than it was trained on. All are computed in float64 on the host, so that default dtypes, default
devices and autocast have no effect.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
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
        ValueError: head_dim is odd or negative, or base is not a finite number > 0.
        TypeError: head_dim is not an int, or base is not a number.

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
            frequency pair_order[j]. rope_theta must be equal to base. Keys that only attention or
            the choice of axes reads are allowed; others are errors, since they might change the
            numbers.
        rows: the number of positions in use; only dynamic and longrope depend on it. None means at
            most original_max_position_embeddings.

    Returns:
        inv_freq, float64 [P] on the CPU, and the attention factor.

    Raises:
        ValueError: R is odd, base is not a finite number > 0, or rope_type is unknown; a key of
            scaling is missing, unknown or has a wrong value or length.
        TypeError: rotary_dim is not an int, base is not a number, or scaling is not a mapping.

    Example:
        >>> inv_freq, factor = frequencies(128, 500000.0, {"rope_type": "linear", "factor": 4.0})
        >>> inv_freq.shape, factor
        (torch.Size([64]), 1.0)
    """
    rotary_dim, base = whole_number("frequencies", "rotary_dim", rotary_dim), _checked_base(base)
    if rotary_dim < 0 or rotary_dim % 2:
        raise ValueError(f"frequencies: expected an even rotary_dim R >= 0, got {rotary_dim}")
    scaling = {} if scaling is None else scaling
    kind = rope_type(scaling)
    _refuse_unknown_keys(kind, scaling, base)
    inv_freq, factor = _KINDS[kind](rotary_dim, base, _Keys(kind, scaling), rows)
    if not all(map(math.isfinite, inv_freq)):
        raise ValueError(
            f"frequencies: expected finite frequencies, but base={base:g} and scaling overflow"
        )
    if scaling.get("pair_order") is not None:
        inv_freq = _reordered(kind, inv_freq, scaling["pair_order"])
    with torch.inference_mode(False):
        return torch.tensor(inv_freq, dtype=torch.float64, device="cpu"), factor


def rope_type(scaling: Scaling) -> str:
    """The kind that `scaling` names, by the key "rope_type" or the older "type"."""
    if not isinstance(scaling, Mapping):
        raise TypeError(
            "frequencies: expected scaling to be None or a mapping with rope_type, got "
            f"{type(scaling).__name__}"
        )
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kind = _ALIASES.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise ValueError(f"frequencies: expected rope_type to be one of {known}, got {kind!r}")
    return kind


def whole_number(function: str, name: str, value: Any) -> int:
    """`value` as an int.

    Raises:
        TypeError: it is not an int.
    """
    try:
        return operator.index(value)
    except TypeError:
        got = type(value).__name__
        raise TypeError(f"{function}: expected {name} to be an int, got {got}") from None


def _checked_base(base: Any) -> float:
    if not isinstance(base, Real):
        got = type(base).__name__
        raise TypeError(f"frequencies: expected base to be a number, got {got}")
    number = float(base)
    if not 0 < number < math.inf:
        raise ValueError(f"frequencies: expected a finite base > 0, got {base}")
    return number


def _refuse_unknown_keys(kind: str, scaling: Scaling, base: float) -> None:
    unknown = sorted(map(str, {*scaling} - {*KEYS[kind], *COMMON_KEYS, *_ORDER_KEYS}))
    if unknown:
        raise ValueError(
            f"frequencies: rope_type {kind!r} does not read {', '.join(unknown)} of scaling: pass "
            "the rope_type that does, or remove what changes no number"
        )
    theta = scaling.get("rope_theta")
    if theta is not None and theta != base:
        raise ValueError(
            f"frequencies: expected base to be the rope_theta of scaling, {theta!r}, got {base:g}: "
            f"pass base={theta!r}"
        )


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
        TypeError: sections is not a sequence of ints.

    Example:
        >>> mrope_axes([2, 1, 1])
        (0, 0, 1, 2)
        >>> mrope_axes([2, 1, 1], interleaved=True)
        (0, 1, 2, 0)
    """
    if isinstance(sections, (str, Mapping)) or not hasattr(sections, "__iter__"):
        got = type(sections).__name__
        raise TypeError(f"mrope_axes: expected sections to be a sequence of ints, got {got}")
    sections = tuple(whole_number("mrope_axes", "each section", n) for n in sections)
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
    listed = isinstance(order, Sequence) and all(type(number) is int for number in order)
    if not listed or len(order) != P or not all(0 <= number < P for number in order):
        raise ValueError(f"frequencies: expected pair_order of P={P} ints in [0, P), got {order}")
    return [inv_freq[number] for number in order]


class _Keys:
    """The entries of one scaling; errors name the entry that is missing or wrong."""

    def __init__(self, kind: str, scaling: Scaling) -> None:
        self.kind = kind
        self._scaling = scaling

    def need(self, key: str) -> float:
        """A finite number > 0."""
        return self._positive(key, self._given(key))

    def get(self, key: str) -> float | None:
        """A finite number > 0; None if it is absent."""
        value = self._scaling.get(key)
        return None if value is None else self._positive(key, value)

    def get_nonzero(self, key: str) -> float | None:
        """As `get`; 0 means absent, as in transformers."""
        value = self._scaling.get(key)
        return None if isinstance(value, Real) and value == 0 else self.get(key)

    def flag(self, key: str, default: bool) -> bool:
        value = self._scaling.get(key)
        if not isinstance(value, (bool, type(None))):
            raise ValueError(f"frequencies: expected {key} to be True or False, got {value!r}")
        return default if value is None else value

    def need_list(self, key: str, length: int) -> list[float]:
        """Finite numbers > 0."""
        values = self._given(key)
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ValueError(f"frequencies: expected {key} to be a list of numbers, got {values!r}")
        if len(values) != length:
            raise ValueError(f"frequencies: expected {length} values in {key}, got {len(values)}")
        return [self._positive(key, value) for value in values]

    def _given(self, key: str) -> Any:
        value = self._scaling.get(key)
        if value is None:
            raise ValueError(f"frequencies: rope_type {self.kind!r} needs {key} in scaling")
        return value

    def _positive(self, key: str, value: Any) -> float:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else 0.0
        if not 0 < number < math.inf:
            raise ValueError(f"frequencies: expected {key} to be a number > 0, got {value!r}")
        return number


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
    if base == 1:
        raise ValueError("frequencies: expected another base than 1 with rope_type 'yarn', got 1")

    def pair_with(rotations: float) -> float:
        """The pair that rotates so often over the trained length, as a fraction."""
        return R * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = pair_with(keys.get_nonzero("beta_fast") or 32)
    high = pair_with(keys.get_nonzero("beta_slow") or 1)
    if keys.flag("truncate", default=True):
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
        return given

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    numerator, denominator = (keys.get_nonzero(key) for key in ("mscale", "mscale_all_dim"))
    return mscale(numerator) / mscale(denominator) if numerator and denominator else mscale(1.0)


def _longrope(R: int, base: float, keys: _Keys, rows: int | None) -> _Frequencies:
    """LongRoPE (Ding et al., 2024): a searched factor for each pair, and others for long texts."""
    trained = keys.need("original_max_position_embeddings")
    lists = {key: keys.need_list(key, R // 2) for key in ("short_factor", "long_factor")}
    stretch = lists["long_factor" if (rows or 0) > trained else "short_factor"]
    inv_freq = [f / s for f, s in zip(_series(R, base), stretch, strict=True)]
    attention_factor = keys.get("attention_factor")
    if attention_factor is None:
        if trained <= 1:
            raise ValueError(
                f"frequencies: expected original_max_position_embeddings > 1, got {trained:g}"
            )
        factor = keys.need("factor")
        attention_factor = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(trained))
    return inv_freq, attention_factor


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
    part, factor = keys.get("partial_rotary_factor") or 1.0, keys.get("factor") or 1.0
    if part > 1:
        raise ValueError(f"frequencies: expected partial_rotary_factor <= 1, got {part}")
    rotating = int(part * R // 2)
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
# The keys that each kind reads besides COMMON_KEYS.
KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": ("factor",),
    "half_truncated": (),
    "axial": (),
}
# Read for every rope_type, or by attention and not by the rotation.
COMMON_KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "llama_4_scaling_beta",
)
# The order of frequencies, and keys from which callers choose axes.
_ORDER_KEYS = ("pair_order", "mrope_section", "mrope_interleaved")
# Older configs call M-RoPE a scaling ("mrope") and LongRoPE "su".
_ALIASES = {"mrope": "default", "su": "longrope"}
