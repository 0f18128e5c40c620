"""One adapter for each signature with which diffusers' models call their rotary function.

An adapter takes views, selects rows and calls the operator; it computes nothing. An adapter with a
keyword `norm` takes x or a pair (q, k), which it rotates in one launch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .._patching.norms import Norm
from .._patching.style import Adapter, Pair, Style
from .._tables import for_all_tokens, real_and_imaginary

_LAYOUTS = {1: "bshd", 2: "bhsd"}
_REPEATED_FLOAT32 = Style("repeated", interleaved=True, float32=True)
_TILED_FLOAT32 = Style("tiled", float32=True)
_STYLES = {-1: _REPEATED_FLOAT32, -2: _TILED_FLOAT32}
_TILED = Style("tiled")
_HALF_FLOAT32 = Style("half", float32=True)
_INTERLEAVED = Style("half", interleaved=True)
_INTERLEAVED_FLOAT32 = Style("half", interleaved=True, float32=True)


def narrow(adapter: Adapter) -> Adapter:
    """The adapter; it raises ValueError for float64.

    The originals round float64 inputs to float32, and compute others in float64 with its tables.
    """

    @functools.wraps(adapter)
    def rotate(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            tensors = value if isinstance(value, tuple) else (value,)
            if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors):
                raise ValueError(
                    "apply_rotary_emb: expected float16, bfloat16 or float32, got torch.float64"
                )
        return adapter(*args, **kwargs)

    return rotate


def _expect(condition: bool, x: Tensor, table: Tensor) -> None:
    """Raises ValueError for shapes that the originals refuse, or that no model passes."""
    if not condition:
        raise ValueError(
            "apply_rotary_emb: expected a table with as many rows as x has tokens, got x "
            f"{list(x.shape)} and a table {list(table.shape)}"
        )


def _parts(freqs: Tensor, x: Tensor) -> Pair:
    return real_and_imaginary("apply_rotary_emb", "freqs_cis", freqs.to(x.device))


def _first(x: Any) -> Tensor:
    first: Tensor = x[0] if isinstance(x, tuple) else x
    return first


def _rotate(
    style: Style, x: Any, cos: Tensor, sin: Tensor, precision: str, layout: str, **options: Any
) -> Any:
    if isinstance(x, tuple):
        q, k = x
        return style.rotate_qk(q, k, cos, sin, precision, layout, **options)
    return style.rotate(x, cos, sin, precision, layout, **options)


def shared(
    x: Any,
    freqs_cis: Any,
    use_real: bool = True,
    use_real_unbind_dim: int = -1,
    sequence_dim: int = 2,
    *,
    precision: str = "model",
    norm: Norm | None = None,
    out: Any = None,
    span: tuple[int, int] | None = None,
) -> Any:
    """x or (q, k) [B, H, S, D], with sequence_dim 1 [B, S, H, D]; cos and sin [S, R], or complex.

    `span` says that x is a part of a joint sequence: the index of its first token, and the number
    of all tokens.
    """
    first = _first(x)
    if not use_real:
        _expect(span is None, first, first)
        return complex_rows(x, freqs_cis, precision=precision, norm=norm, out=out)
    style, layout = _STYLES.get(use_real_unbind_dim), _LAYOUTS.get(sequence_dim)
    if style is None or layout is None:
        raise ValueError(
            "apply_rotary_emb: expected use_real_unbind_dim -1 or -2 and sequence_dim 1 or 2, got "
            f"{use_real_unbind_dim} and {sequence_dim}"
        )
    cos, sin = freqs_cis
    _expect(first.dim() == 4 and cos.dim() == sin.dim() == 2, first, cos)
    start, S = span or (0, first.shape[sequence_dim])
    cos, sin = (for_all_tokens(table.to(first.device), S) for table in (cos, sin))
    _expect(cos.shape[0] == S, first, cos)
    return _rotate(style, x, cos, sin, precision, layout, norm=norm, out=out, offset=start)


def complex_rows(
    x: Any,
    freqs_cis: Tensor,
    *,
    precision: str = "model",
    norm: Norm | None = None,
    out: Any = None,
) -> Any:
    """x or (q, k) [B, S, H, D]; a complex table [B or 1, S, P], or [S, P]."""
    if not isinstance(freqs_cis, Tensor):
        raise TypeError("apply_rotary_emb: expected a complex tensor freqs_cis, got a tuple")
    first = _first(x)
    _expect(first.dim() == 4, first, freqs_cis)
    cos, sin = _parts(freqs_cis, first)
    cos, sin = (for_all_tokens(table, first.shape[1]) for table in (cos, sin))
    _expect(cos.shape[-2] == first.shape[1], first, freqs_cis)
    return _rotate(_INTERLEAVED_FLOAT32, x, cos, sin, precision, "bshd", norm=norm, out=out)


def complex_nested(
    x_in: Any, freqs_cis: Tensor, *, precision: str = "model", norm: Norm | None = None
) -> Any:
    """Z-Image: x or (q, k) [B, S, H, D]; a complex table [B or 1, S, P]."""
    _expect(freqs_cis.dim() == 3, _first(x_in), freqs_cis)
    return complex_rows(x_in, freqs_cis, precision=precision, norm=norm)


def qwen(
    x: Any,
    freqs_cis: Any,
    use_real: bool = True,
    use_real_unbind_dim: int = -1,
    *,
    precision: str = "model",
    norm: Norm | None = None,
) -> Any:
    """x or (q, k) [B, S, H, D] and a complex table [S, P]; x [B, H, S, D] and cos, sin [S, R]."""
    if use_real:
        return shared(x, freqs_cis, True, use_real_unbind_dim, 2, precision=precision, norm=norm)
    _expect(freqs_cis.dim() == 2, _first(x), freqs_cis)
    return complex_rows(x, freqs_cis, precision=precision, norm=norm)


def complex_heads_first(
    hidden_states: Tensor, freqs: Tensor, *, precision: str = "model"
) -> Tensor:
    """AnyFlow: x [B, H, S, D]; a complex table [..., S, P], the leading dimensions of size 1."""
    cos, sin = _rows_of_complex(hidden_states, freqs)
    return _INTERLEAVED_FLOAT32.rotate(hidden_states, cos, sin, precision, "bhsd")


def complex_elements_first(
    hidden_states: Tensor, freqs: Tensor, *, precision: str = "model"
) -> Tensor:
    """SANA's world model: x [B, H, D, S]; a complex table [..., S, P]."""
    x = hidden_states.transpose(-1, -2)
    cos, sin = _rows_of_complex(x, freqs)
    return _INTERLEAVED_FLOAT32.rotate(x, cos, sin, precision, "bhsd").transpose(-1, -2)


def _rows_of_complex(x: Tensor, freqs: Tensor) -> Pair:
    """Cosine and sine [S, P] of a complex table [1, ..., 1, S, P] for x [B, H, S, D]."""
    S = x.shape[-2]
    _expect(
        x.dim() == 4 and freqs.numel() == S * freqs.shape[-1] == freqs.shape[-2:].numel(), x, freqs
    )
    cos, sin = _parts(freqs, x)
    return cos.view(S, -1), sin.view(S, -1)


def strided_tables(
    hidden_states: Any,
    freqs_cos: Tensor,
    freqs_sin: Tensor,
    *,
    precision: str = "model",
    norm: Norm | None = None,
) -> Any:
    """Wan: x or (q, k) [B, S, H, D]; [B or 1, S, 1, D], even cosines and odd sines are read."""
    first = _first(hidden_states)
    _expect(freqs_cos.dim() == 4 and freqs_cos.shape[2] == 1, first, freqs_cos)
    cos, sin = freqs_cos[:, :, 0, 0::2], freqs_sin[:, :, 0, 1::2]
    return _rotate(_INTERLEAVED, hidden_states, cos, sin, precision, "bshd", norm=norm)


def joint_tables(
    hidden_states: Any,
    freqs_cis: Tensor,
    *,
    precision: str = "model",
    norm: Norm | None = None,
) -> Any:
    """Helios: x or (q, k) [B, S, H, D]; cosines, then sines, [B or 1, S, 2 * D], read as by Wan."""
    cos, sin = freqs_cis.unsqueeze(-2).chunk(2, dim=-1)
    return strided_tables(hidden_states, cos, sin, precision=precision, norm=norm)


def per_head(
    x: Any,
    freqs_cos: Tensor,
    freqs_sin: Tensor,
    *,
    precision: str = "model",
    norm: Norm | None = None,
) -> Any:
    """Mochi: x or (q, k) [B, S, H, D]; [S, H, P]."""
    first = _first(x)
    _expect(first.dim() == 4 and freqs_cos.dim() == 3, first, freqs_cos)
    cos, sin = freqs_cos[None], freqs_sin[None]
    return _rotate(_INTERLEAVED_FLOAT32, x, cos, sin, precision, "bshd", norm=norm)


def all_heads(x: Tensor, freqs: Any, *, precision: str = "model") -> Tensor:
    """LTX: x [B, S, H * D]; cos and sin [B or 1, S, H * D]."""
    cos, sin = freqs
    _expect(x.dim() == cos.dim() == 3, x, cos)
    rotated = _REPEATED_FLOAT32.rotate(x.unsqueeze(2), cos, sin, precision, "bshd")
    return rotated.squeeze(2)


def split_heads(x: Tensor, freqs: Any, *, precision: str = "model") -> Tensor:
    """LTX-2: x [B, S, H * D] or [B, H, S, D]; cos and sin [B or 1, H, S, P]."""
    cos, sin = freqs
    _expect(cos.dim() == 4, x, cos)
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    if x.dim() == 4:
        return _HALF_FLOAT32.rotate(x, cos, sin, precision, "bhsd")
    heads = x.unflatten(-1, (cos.shape[2], -1))
    return _HALF_FLOAT32.rotate(heads, cos, sin, precision, "bshd").flatten(-2)


def _matrices(rope: Tensor, dim: int) -> Pair:
    """Cosine and sine [B or 1, S, P] of rotation matrices that have size 1 at the heads' `dim`."""
    _expect(rope.dim() > 4 and rope.shape[-2:] == (2, 2) and rope.shape[dim] == 1, rope, rope)
    columns = rope[..., 0].squeeze(dim % rope.dim())
    return columns[..., 0], columns[..., 1]


def matrices_to_bfloat16(x: Tensor, rope: Tensor, *, precision: str = "model") -> Tensor:
    """Kandinsky 5: as `matrices`, with a bfloat16 result."""
    return matrices(x, rope, precision=precision).to(torch.bfloat16)


def matrices(x: Tensor, rope: Tensor, *, precision: str = "model") -> Tensor:
    """Kandinsky: x [B, S, H, D] or [S, H, D]; rotation matrices [(B or 1,) S, 1, P, 2, 2]."""
    cos, sin = _matrices(rope, -4)
    layout = {4: "bshd", 3: "thd"}.get(x.dim(), "")
    _expect(bool(layout) and cos.shape[-2] == x.shape[-3], x, rope)
    return _INTERLEAVED_FLOAT32.rotate(x, cos, sin, precision, layout)


def matrices_heads_first(
    xq: Any, freqs_cis: Tensor, *, precision: str = "model", norm: Norm | None = None
) -> Any:
    """PRX: x or (q, k) [B, H, S, D]; rotation matrices [B or 1, 1, S, P, 2, 2]."""
    _expect(freqs_cis.dim() == 6, _first(xq), freqs_cis)
    cos, sin = _matrices(freqs_cis.to(_first(xq).device), 1)
    return _rotate(_INTERLEAVED_FLOAT32, xq, cos, sin, precision, "bhsd", norm=norm)


def matrices_for_both(
    xq: Tensor, xk: Tensor, freqs_cis: Tensor, *, precision: str = "model"
) -> Pair:
    """HiDream: q and k [B, S, H, D]; rotation matrices [B or 1, S, 1, P, 2, 2]."""
    _expect(freqs_cis.dim() == 6, xq, freqs_cis)
    cos, sin = _matrices(freqs_cis, 2)
    return _INTERLEAVED_FLOAT32.rotate_qk(xq, xk, cos, sin, precision, "bshd")


def joint_attention(xq: Tensor, xk: Tensor, freqs_cis: Any, *, precision: str = "model") -> Pair:
    """JoyImage: q and k [B, S, H, D]; cos and sin [S, D] or [B, S, D]."""
    cos, sin = (table.to(xq.device) for table in freqs_cis)
    _expect(xq.dim() == 4 and cos.shape[-2] == xq.shape[1] == xk.shape[1], xq, cos)
    return _REPEATED_FLOAT32.rotate_qk(xq, xk, cos, sin, precision, "bshd")


def tiled(
    hidden_states: Any, rope: Any, *, precision: str = "model", norm: Norm | None = None
) -> Any:
    """LongCat's audio model: x or (q, k) [B, S, H, D]; cos and sin [S, D]."""
    return shared(hidden_states, rope, True, -2, 1, precision=precision, norm=norm)


def leading(
    hidden_states: Any,
    cos: Tensor,
    sin: Tensor,
    *,
    precision: str = "model",
    norm: Norm | None = None,
) -> Any:
    """MiniMax: x or (q, k) [B, S, H, D]; cos and sin [S, R], rounded to x's dtype."""
    first = _first(hidden_states)
    _expect(first.dim() == 4 and cos.dim() == 2 and cos.shape[0] == first.shape[1], first, cos)
    cos, sin = cos.to(first.dtype), sin.to(first.dtype)
    return _rotate(_TILED, hidden_states, cos, sin, precision, "bshd", norm=norm)


def leading_of_pair(
    hidden_states: Any, rotary_emb: Any, *, precision: str = "model", norm: Norm | None = None
) -> Any:
    """As `leading`, with both tables in one argument."""
    return leading(hidden_states, *rotary_emb, precision=precision, norm=norm)


def leading_by_angles(t: Tensor, freqs: Tensor, *, precision: str = "model") -> Tensor:
    """Stable Audio 3: x [B, S, H, D]; the tables are those of the last S angles [M, R]."""
    _expect(t.dim() == 4 and freqs.dim() == 2 and len(freqs) >= t.shape[1], t, freqs)
    angles = freqs[-t.shape[1] :, : freqs.shape[-1] // 2].float()
    return _HALF_FLOAT32.rotate(t, angles.cos(), angles.sin(), precision, "bshd")


def unsqueezed(
    hidden_states: Tensor,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
    *,
    precision: str = "model",
) -> Tensor:
    """Anima: x [B, H, S, D], or [B, S, H, D] with unsqueeze_dim 2; cos and sin [B or 1, S, R]."""
    layout = {1: "bhsd", 2: "bshd"}.get(unsqueeze_dim, "")
    _expect(bool(layout) and hidden_states.dim() == 4 and cos.dim() == 3, hidden_states, cos)
    return _TILED.rotate(hidden_states, cos, sin, precision, layout)


def axes(x: Tensor, freqs_cis: Any, positions: Any, *, precision: str = "model") -> Tensor:
    """Allegro: x [B, H, S, D]; each of three axes has tables [M, D / 3] and positions [B, S]."""

    def rows(index: int) -> Tensor:
        halves = [
            tables[index][:, : tables[index].shape[-1] // 2][ids]
            for tables, ids in zip(freqs_cis, positions, strict=True)
        ]
        return torch.cat(halves, dim=-1)

    _expect(x.dim() == 4 and positions[0].dim() == 2, x, positions[0])
    return _HALF_FLOAT32.rotate(x, rows(0), rows(1), precision, "bhsd", blocks=len(positions))
