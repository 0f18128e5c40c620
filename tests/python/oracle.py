"""What a rotation must return: float64 complex multiplication, and the exact result in x's dtype.

Letters: B batch, S sequence length (T packed tokens), H heads, D head_dim, P pairs, M table rows,
A position axes. This file does not import fused_rope. The keywords are those of
`fused_rope.rotate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("bshd", "bhsd", "sbhd", "thd")
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)

# Dimensions to swap, so that x comes to be ordered [B, S, H, D].
_SWAPPED = {"bshd": (0, 0), "bhsd": (1, 2), "sbhd": (0, 1)}


# --- layouts -----------------------------------------------------------------------------------


def as_bshd(x: Tensor, layout: str) -> Tensor:
    """A view of x ordered [B, S, H, D]; packed tokens are one batch."""
    return x.unsqueeze(0) if layout == "thd" else x.transpose(*_SWAPPED[layout])


def from_bshd(x: Tensor, layout: str) -> Tensor:
    """The inverse of `as_bshd`."""
    return x.squeeze(0) if layout == "thd" else x.transpose(*_SWAPPED[layout])


def shape(layout: str, B: int, S: int, H: int, D: int) -> tuple[int, ...]:
    """The sizes of a tensor in this layout; "thd" packs the batch, T = B*S."""
    if layout == "thd":
        return (B * S, H, D)
    return tuple({"b": B, "s": S, "h": H, "d": D}[letter] for letter in layout)


def tensor(
    layout: str, B: int, S: int, H: int, D: int, dtype: torch.dtype, device: str = "cpu"
) -> Tensor:
    """Normally distributed values, the same ones on every device."""
    return torch.randn(shape(layout, B, S, H, D), dtype=torch.float64).to(dtype).to(device)


def any_bits(sizes: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Uniformly distributed bits: NaNs with payloads, infinities and subnormals among them."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(integer)
    return torch.randint(info.min, info.max, sizes, dtype=integer).view(dtype).to(device)


def angles(
    rows: int, P: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin [rows, P] of random angles: no two rows or pairs are alike."""
    angle = torch.rand(rows, P, dtype=torch.float64) * 6.28
    return angle.cos().to(dtype).to(device), angle.sin().to(dtype).to(device)


# --- the rotation ------------------------------------------------------------------------------


def token_rows(
    B: int,
    S: int,
    P: int,
    *,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    axes: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The table row that each pair of each token reads, and whether the pair is copied instead.

    int64 and bool, both [B, S, P].
    """
    token = torch.arange(S, device=device)
    position = token.expand(1, B, S)
    copied = torch.zeros(1, 1, S, dtype=torch.bool, device=device)
    sequence = None
    if cu_seqlens is not None:
        cu = cu_seqlens.long()
        copied = (token >= cu[-1] if len(cu) > 1 else token >= 0).expand(1, 1, S)
        # The last sequence that starts at or before the token, so not an empty one.
        sequence = (cu[:-1, None] <= token).sum(0).sub(1).clamp(min=0)
        position = (token - cu[sequence]).expand(1, 1, S)
    if positions is not None:
        leading = positions.shape[0] if axes is not None else 1
        batch = positions.shape[-2] if positions.dim() == (2 if axes is None else 3) else 1
        position = positions.long().reshape(leading, batch, S)
        copied = copied | (position == -1)
    if isinstance(offset, Tensor):
        if sequence is None:
            position = position + offset.long()[:, None]
        elif offset.numel():
            position = position + offset.long()[sequence]
    else:
        position = position + offset
    axis = torch.tensor([0] * P if axes is None else list(axes), dtype=torch.long, device=device)
    row, copied = (t.expand(-1, B, S)[axis].permute(1, 2, 0) for t in _same_axes(position, copied))
    return row.masked_fill(copied, 0), copied


def _same_axes(position: Tensor, copied: Tensor) -> tuple[Tensor, Tensor]:
    leading = max(position.shape[0], copied.shape[0])
    return position.expand(leading, -1, -1), copied.expand(leading, -1, -1)


def pair_elements(
    P: int, *, rotary_offset: int = 0, interleaved: bool = False, blocks: int = 1
) -> tuple[Tensor, Tensor]:
    """The first and the second element of every pair, int64 [P] each."""
    element = torch.arange(2 * P)
    if interleaved:
        first, second = element.view(P, 2).unbind(1)
    else:
        first, second = element.view(blocks, 2, P // blocks).unbind(1)
    return first.flatten() + rotary_offset, second.flatten() + rotary_offset


Arithmetic = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _rotated(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    arithmetic: Arithmetic,
    dtype: torch.dtype,
    *,
    layout: str = "bshd",
    rotary_offset: int = 0,
    interleaved: bool = False,
    blocks: int = 1,
    inverse: bool = False,
    **rows: Any,
) -> Tensor:
    v, cos, sin = as_bshd(x.detach(), layout), cos.detach(), sin.detach()
    B, S = v.shape[:2]
    P = cos.shape[-1]
    copied = None
    if cos.dim() == 2:
        row, copied = token_rows(B, S, P, device=x.device, **rows)
        pair = torch.arange(P, device=x.device)
        cos, sin, copied = cos[row, pair], sin[row, pair], copied.unsqueeze(2)
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    a, b = (
        t.to(x.device)
        for t in pair_elements(
            P, rotary_offset=rotary_offset, interleaved=interleaved, blocks=blocks
        )
    )
    out = v.to(dtype, copy=True)
    results = arithmetic(v[..., a], v[..., b], cos, -sin if inverse else sin)
    for element, result in zip((a, b), results, strict=True):
        result = result.to(dtype)
        out[..., element] = (
            result if copied is None else torch.where(copied, out[..., element], result)
        )
    return from_bshd(out, layout)


def _complex(xa: Tensor, xb: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    product = torch.complex(xa.double(), xb.double()) * torch.complex(c.double(), s.double())
    return product.real, product.imag


def _fp32(xa: Tensor, xb: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if xa.dtype == torch.float64 else torch.float32
    xa, xb, c, s = (t.to(wide) for t in (xa, xb, c, s))
    return xa * c - xb * s, xb * c + xa * s


def _model(xa: Tensor, xb: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    c, s = c.to(xa.dtype), s.to(xa.dtype)
    return xa * c - xb * s, xb * c + xa * s


def oracle(x: Tensor, cos: Tensor, sin: Tensor, **kw: Any) -> Tensor:
    """The rotation in float64. With a narrower x, a float64 table is rounded to float32."""
    table = torch.float64 if x.dtype == torch.float64 else torch.float32
    return _rotated(x, cos.to(table), sin.to(table), _complex, torch.float64, **kw)


def bits(x: Tensor, cos: Tensor, sin: Tensor, precision: str = "fp32", **kw: Any) -> Tensor:
    """The exact result in x's dtype: every product and sum rounded as `precision` says."""
    return _rotated(x, cos, sin, _fp32 if precision == "fp32" else _model, x.dtype, **kw)


def error_over_bound(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, **kw: Any) -> float:
    """Largest error of `out` as a fraction of what is allowed.

    Allowed are half a unit in the last place of the output plus two float32 units of the pair's
    norm, times the table's largest magnitude where that exceeds 1. For float64, where the oracle
    rounds as much as the operator, four float64 units of the norm.
    """
    if out.numel() == 0:
        return 0.0
    want = oracle(x, cos, sin, **kw)
    double = x.dtype == torch.float64
    unit = 4 * torch.finfo(torch.float64).eps if double else 2 * torch.finfo(torch.float32).eps
    v = x.detach().double()
    first, second = _pairs(v, cos.shape[-1], **kw)
    norms = _in_pairs(torch.zeros_like(v), torch.hypot(first, second), **kw)
    return _over_bound(out, want, unit * _magnitude(cos, sin) * norms)


def _elements(P: int, device: torch.device, **kw: Any) -> tuple[Tensor, Tensor]:
    span = {n: kw[n] for n in ("rotary_offset", "interleaved", "blocks") if n in kw}
    first, second = pair_elements(P, **span)
    return first.to(device), second.to(device)


def _pairs(x: Tensor, P: int, **kw: Any) -> tuple[Tensor, Tensor]:
    """The first and the second elements of all pairs, [..., P] each."""
    first, second = _elements(P, x.device, **kw)
    return x[..., first], x[..., second]


def _in_pairs(x: Tensor, values: Tensor, **kw: Any) -> Tensor:
    """x with both elements of each pair replaced by the pair's value."""
    result = x.clone()
    for element in _elements(values.shape[-1], x.device, **kw):
        result[..., element] = values
    return result


def _magnitude(cos: Tensor, sin: Tensor) -> float:
    """The table's largest absolute value, or 1."""
    return max([1.0] + [float(t.abs().max()) for t in (cos, sin) if t.numel()])


def _over_bound(out: Tensor, want: Tensor, allowed: Tensor) -> float:
    """Largest error of `out` as a fraction of `allowed` and half a unit in the last place."""
    info = torch.finfo(out.dtype)
    magnitude = torch.maximum(out.double().abs(), want.abs()).clamp_min(info.tiny)
    half_ulp = torch.exp2(torch.floor(torch.log2(magnitude))) * (info.eps / 2)
    return float(((out.double() - want).abs() / (half_ulp + allowed)).max())


# --- the norm ----------------------------------------------------------------------------------


def _factor(weight: Tensor | None, zero_centered: bool) -> Tensor | float:
    if weight is None:
        return 1.0
    return weight.detach().double() + zero_centered


def norm_oracle(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    zero_centered: bool = False,
    after: bool = False,
    **kw: Any,
) -> Tensor:
    """RMS norm and rotation in float64; the keywords are those of `fused_rope.norm_rotate`."""
    table = torch.float64 if x.dtype == torch.float64 else torch.float32

    def norm(y: Tensor) -> Tensor:
        mean = y.pow(2).sum(-1, keepdim=True) / max(y.shape[-1], 1)
        return y / (mean + eps).sqrt() * _factor(weight, zero_centered)

    def rotate(y: Tensor) -> Tensor:
        return _rotated(y, cos.to(table), sin.to(table), _complex, torch.float64, **kw)

    v = x.detach().double()
    return norm(rotate(v)) if after else rotate(norm(v))


def norm_bits(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    zero_centered: bool = False,
    cast: str = "never",
    after: bool = False,
    precision: str = "fp32",
    **kw: Any,
) -> Tensor:
    """The exact result where D is a power of two and the sum of squares is exact in any order."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    def norm(y: Tensor) -> Tensor:
        y = y.to(wide)
        mean = y.pow(2).double().sum(-1, keepdim=True).to(wide) / y.shape[-1]
        n = y * (1 / (mean + eps).double().sqrt().to(wide))
        n = n.to(x.dtype).to(wide) if cast == "before" else n
        factor = torch.ones((), dtype=wide) if weight is None else weight.to(wide)
        n = n * (1 + factor if zero_centered and weight is not None else factor)
        return n if cast == "never" else n.to(x.dtype)

    def rotate(y: Tensor) -> Tensor:
        return bits(y, cos, sin, precision, **kw)

    v = x.to(wide) if after and cast == "never" else x
    return (norm(rotate(v)) if after else rotate(norm(v))).to(x.dtype)


def norm_error_over_bound(
    out: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    zero_centered: bool = False,
    after: bool = False,
    **kw: Any,
) -> float:
    """Largest error of `out`, computed with cast="never", as a fraction of what is allowed.

    Allowed are half a unit in the last place of the output plus log2(D)/2 + 5 float32 units
    (float64 ones for float64) of the norm of the normalized and weighted pair, times the table's
    largest magnitude where that exceeds 1.
    """
    if out.numel() == 0:
        return 0.0
    options = dict(eps=eps, zero_centered=zero_centered, after=after)
    want = norm_oracle(x, cos, sin, weight, **options, **kw)
    v = x.detach().double()
    normed = oracle(v, cos.double(), sin.double(), **kw) if after else v
    normalized = v / (normed.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    factor = torch.as_tensor(_factor(weight, zero_centered), dtype=torch.float64).abs()
    factors = factor.to(x.device).expand_as(normalized)
    first, second = _pairs(factors, cos.shape[-1], **kw)
    largest_factors = _in_pairs(factors, torch.maximum(first, second), **kw)
    first, second = _pairs(normalized, cos.shape[-1], **kw)
    norms = _in_pairs(normalized.abs(), torch.hypot(first, second), **kw)
    eps_of_sum = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    unit = (math.log2(x.shape[-1]) / 2 + 5) * eps_of_sum
    return _over_bound(out, want, unit * _magnitude(cos, sin) * norms * largest_factors)


# --- 8 bits ------------------------------------------------------------------------------------


def quantized(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., H, D] as a cache stores it: the nearest of all numbers of `dtype`, ties to even."""
    y = (x.to(torch.float32) / (scale if scale.dim() == 0 else scale[:, None])).double()
    if dtype == torch.int8:
        whole = y.nan_to_num(0.0).clamp(-128, 127).floor()
        above = y.nan_to_num(0.0).clamp(-128, 127) - whole
        up = (above > 0.5) | ((above == 0.5) & (whole % 2 == 1))
        return (whole + up).to(dtype)
    nan = 0x7F
    numbers = torch.arange(nan, dtype=torch.uint8).view(dtype).double()
    numbers = numbers[numbers.isfinite()].to(x.device)  # ascending: entry i has the bits i
    size = y.abs().clamp(max=numbers[-1])
    high = torch.searchsorted(numbers, size.nan_to_num(0.0).contiguous())
    low = (high - 1).clamp(min=0)
    below, above = size - numbers[low], numbers[high] - size
    code = torch.where((below < above) | ((below == above) & (low % 2 == 0)), low, high)
    code = torch.where(y.isnan(), nan, code) | torch.where(y.signbit(), 0x80, 0)
    return code.to(torch.uint8).view(dtype)


# --- memory ------------------------------------------------------------------------------------


def same(got: Tensor, want: Tensor) -> None:
    """Fails unless shape, dtype and values are equal (a NaN equals a NaN)."""
    assert got.shape == want.shape and got.dtype == want.dtype, (got.shape, want.shape, got.dtype)
    torch.testing.assert_close(got.detach(), want.detach(), rtol=0, atol=0, equal_nan=True)


def identical(got: Tensor, want: Tensor) -> None:
    """Fails unless both are bitwise identical, NaN payloads and signs of zeros included."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    same(got.detach().contiguous().view(integer), want.detach().contiguous().view(integer))


Draw = Callable[..., Tensor]

# Views of shape [2, 5, 4, 16], from a function that draws dense tensors.
VIEWS: dict[str, Callable[[Draw], Tensor]] = {
    "contiguous": lambda r: r(2, 5, 4, 16),
    "heads before tokens": lambda r: r(2, 4, 5, 16).transpose(1, 2),
    "tokens before batch": lambda r: r(5, 2, 4, 16).transpose(0, 1),
    "elements outermost": lambda r: r(16, 2, 5, 4).permute(1, 2, 3, 0),
    "elements before heads": lambda r: r(2, 5, 16, 4).transpose(2, 3),
    "slice of packed qkv": lambda r: r(2, 5, 3, 4, 16)[:, :, 1],
    "heads of a projection": lambda r: r(2, 5, 160)[..., 48:112].unflatten(-1, (4, 16)),
    "grouped qkv": lambda r: r(2, 5, 4, 3, 16)[..., 2, :],
    "end of each head": lambda r: r(2, 5, 4, 48)[..., 32:],
    "every third token": lambda r: r(2, 15, 4, 16)[:, ::3],
    "every second element": lambda r: r(2, 5, 4, 32)[..., ::2],
    "one element off": lambda r: r(641)[1:].view(2, 5, 4, 16),
    "seven elements off": lambda r: r(647)[7:].view(2, 5, 4, 16),
    "odd pitch of heads": lambda r: r(2, 5, 4, 17)[..., :16],
    "odd pitch of tokens": lambda r: r(2, 5, 65)[..., :64].unflatten(-1, (4, 16)),
    "real parts": lambda r: r(2, 5, 4, 16, 2)[..., 0],
    "expanded batch": lambda r: r(1, 5, 4, 16).expand(2, 5, 4, 16),
    "expanded tokens": lambda r: r(2, 1, 4, 16).expand(2, 5, 4, 16),
    "expanded heads": lambda r: r(2, 5, 1, 16).expand(2, 5, 4, 16),
    "expanded elements": lambda r: r(2, 5, 4, 1).expand(2, 5, 4, 16),
    "one value": lambda r: r(1).expand(2, 5, 4, 16),
    "sliding windows": lambda r: r(80).as_strided((2, 5, 4, 16), (16, 4, 8, 1)),
}
OVERLAPPING = (*(n for n in VIEWS if n.startswith("expanded")), "one value", "sliding windows")
DENSE = (*tuple(VIEWS)[:5], "one element off", "seven elements off")


def view(name: str, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Random values in a view of VIEWS."""
    return VIEWS[name](lambda *sizes: torch.randn(sizes, dtype=torch.float64).to(dtype).to(device))


def views(dtype: torch.dtype, device: str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Every name of VIEWS with its tensor of shape [2, 5, 4, 16]."""
    for name in VIEWS:
        yield name, view(name, dtype, device)
