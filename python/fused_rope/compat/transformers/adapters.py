"""One adapter for each signature with which models call their rotary function.

An adapter takes views, selects rows and calls the operator; it computes nothing. `Style` holds what
differs between functions of one signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import functional
from .._patching.norms import Norm
from .._patching.style import Adapter, Pair, Style, parts

HALF = Style()
HALF_FLOAT32 = Style(float32=True)
INTERLEAVED = Style("half", interleaved=True)
INTERLEAVED_FLOAT32 = Style("half", interleaved=True, float32=True)
REPEATED_FLOAT32 = Style("repeated", interleaved=True, float32=True)


# By the number of dimensions of x and of cos, and the dimension of the heads from the end.
_LAYOUTS = {
    (4, 2, -3): "bhsd",
    (4, 3, -3): "bhsd",
    (4, 2, -2): "bshd",
    (4, 3, -2): "bshd",
    (3, 2, -2): "thd",
}


def layout_of(x: Tensor, cos: Tensor, unsqueeze_dim: int) -> str:
    """The layout of x if cos broadcasts against it after `cos.unsqueeze(unsqueeze_dim)`."""
    dims = cos.dim()
    layout = None
    if isinstance(unsqueeze_dim, int):
        heads = unsqueeze_dim if unsqueeze_dim < 0 else unsqueeze_dim - dims - 1
        layout = _LAYOUTS.get((x.dim(), dims, heads))
    if layout is None:
        raise ValueError(
            "apply_rotary_pos_emb: expected unsqueeze_dim 1 or 2 and cos of [B or 1, S, R], got "
            f"unsqueeze_dim={unsqueeze_dim} and cos {list(cos.shape)} for q {list(x.shape)}"
        )
    return layout


def per_token(cos: Tensor, sin: Tensor, x: Tensor, layout: str) -> Pair:
    """The operator's tables for [B or 1, S, R] or [S, R].

    [S, R] is a shared table of the operator. Another number of rows becomes [1, M, R], so that the
    operator refuses it, as the models do, instead of reading the first S rows.
    """
    if cos.dim() == 2 and cos.shape[0] != x.shape[-2 if layout == "bhsd" else -3]:
        return cos[None], sin[None]
    return cos, sin


def pair(style: Style) -> Adapter:
    """q and k [B, H, S, D], or [B, S, H, D] with unsqueeze_dim 2; cos [B or 1, S, R].

    Also q and k [T, H, D] with cos [T, R] and unsqueeze_dim 1.
    """

    def rotate(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        unsqueeze_dim: int = 1,
        *,
        precision: str = "model",
        norm: Norm | None = None,
    ) -> Pair:
        layout = layout_of(q, cos, unsqueeze_dim)
        cos, sin = per_token(cos, sin, q, layout)
        return style.rotate_qk(q, k, cos, sin, precision, layout, norm=norm)

    return rotate


def single(style: Style) -> Adapter:
    """x [B, H, S, D], or [B, S, H, D] with unsqueeze_dim 2; cos [B or 1, S, R]."""

    def rotate(
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        unsqueeze_dim: int = 1,
        *,
        precision: str = "model",
        norm: Norm | None = None,
    ) -> Tensor:
        layout = layout_of(x, cos, unsqueeze_dim)
        cos, sin = per_token(cos, sin, x, layout)
        return style.rotate(x, cos, sin, precision, layout=layout, norm=norm)

    return rotate


def optional_key(style: Style) -> Adapter:
    """As `pair`; k may be None."""
    both, one = pair(style), single(style)

    def rotate(
        q: Tensor,
        k: Tensor | None = None,
        cos: Any = None,
        sin: Any = None,
        unsqueeze_dim: int = 1,
        *,
        precision: str = "model",
        norm: Norm | None = None,
    ) -> Any:
        if k is None:
            return one(q, cos, sin, unsqueeze_dim, precision=precision, norm=norm)
        return both(q, k, cos, sin, unsqueeze_dim, precision=precision, norm=norm)

    return rotate


def last_queries(style: Style) -> Adapter:
    """As `pair` with unsqueeze_dim 1; q has only the last of the tokens of k and the tables."""

    def rotate(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        unsqueeze_dim: int = 1,
        *,
        precision: str = "model",
        norm: Norm | None = None,
    ) -> Pair:
        layout = layout_of(q, cos, unsqueeze_dim)
        if layout != "bhsd":
            raise ValueError(f"apply_rotary_pos_emb: expected unsqueeze_dim 1, got {unsqueeze_dim}")
        cos, sin = per_token(cos, sin, k, layout)
        S = q.shape[-2]
        q_norm, k_norm = (None, None) if norm is None else (norm.only(0), norm.only(1))
        rows = cos[..., -S:, :], sin[..., -S:, :]
        q = style.rotate(q, *rows, precision, layout=layout, norm=q_norm)
        return q, style.rotate(k, cos, sin, precision, layout=layout, norm=k_norm)

    return rotate


def sections(style: Style) -> Adapter:
    """M-RoPE: cos [3, B, S, R]; consecutive sections of elements read consecutive axes."""

    def rotate(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        mrope_section: Sequence[int],
        unsqueeze_dim: int = 1,
        *,
        precision: str = "model",
    ) -> Pair:
        def select(table: Tensor) -> Tensor:
            parts = table[..., : table.shape[-1] // 2].split(list(mrope_section), dim=-1)
            return torch.cat([part[axis % 3] for axis, part in enumerate(parts)], dim=-1)

        layout = layout_of(q, cos[0], unsqueeze_dim)
        return style.rotate_qk(q, k, select(cos), select(sin), precision, layout=layout)

    return rotate


def token_major(style: Style) -> Adapter:
    """Vision towers: q and k [T, H, D] or [B, S, H, D]; cos [T, R] or [B, S, R]."""

    def rotate(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        precision: str = "model",
        norm: Norm | None = None,
    ) -> Pair:
        layout = "thd" if q.dim() == 3 else "bshd"
        cos, sin = per_token(cos, sin, q, layout)
        return style.rotate_qk(q, k, cos, sin, precision, layout=layout, norm=norm)

    return rotate


def head_major(style: Style) -> Adapter:
    """q and k [B, H, S, D]; cos [S, R], after any number of dimensions of size 1."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, precision: str = "model") -> Pair:
        cos, sin = per_token(rows(cos), rows(sin), q, "bhsd")
        return style.rotate_qk(q, k, cos, sin, precision, layout="bhsd")

    return rotate


def rows(table: Tensor) -> Tensor:
    """[1, ..., 1, M, R] as [M, R]."""
    return table.reshape(table.shape[-2:])


def after_prefix(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    precision: str = "model",
    norm: Norm | None = None,
    **kwargs: Any,
) -> Pair:
    """q and k [B, H, S, D]: the last M tokens are rotated, class and register tokens are not."""
    if kwargs:
        raise ValueError(f"apply_rotary_pos_emb: expected no keywords, got {sorted(kwargs)}")
    cos, sin = rows(cos), rows(sin)
    S = q.shape[-2]
    tokens = torch.arange(S, device=q.device) - (S - cos.shape[0])
    positions = tokens.clamp(min=-1)
    return HALF.rotate_qk(q, k, cos, sin, precision, layout="bhsd", positions=positions, norm=norm)


def memory_keys(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_k_exclude_rope: int = 0,
    repeat_freqs_k: bool = False,
    *,
    precision: str = "model",
) -> Pair:
    """q [B, H, M, D], k [B, H, S, D]: k repeats the M rows; its last tokens may be excluded."""
    cos, sin = rows(cos), rows(sin)
    tokens, rotated = torch.arange(k.shape[-2], device=k.device), k.shape[-2] - num_k_exclude_rope
    row = tokens % cos.shape[0] if repeat_freqs_k else tokens
    positions = torch.where(tokens < rotated, row, -1)
    q = REPEATED_FLOAT32.rotate(q, cos, sin, precision, layout="bhsd")
    return q, REPEATED_FLOAT32.rotate(k, cos, sin, precision, layout="bhsd", positions=positions)


def grouped_memory_keys(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor,
    sin_k: Tensor,
    num_k_exclude_rope: int = 0,
    repeat_freqs_k: int = 1,
    *,
    precision: str = "model",
) -> Pair:
    """As `memory_keys` with k's own tables: the last M tokens of each group are rotated."""
    cos_k, sin_k = rows(cos_k), rows(sin_k)
    tokens, rotated = torch.arange(k.shape[-2], device=k.device), k.shape[-2] - num_k_exclude_rope
    group = max(rotated // repeat_freqs_k, 1)
    row = (tokens % group - (group - cos_k.shape[0])).clamp(min=-1)
    positions = torch.where(tokens < rotated, row, -1)
    q = REPEATED_FLOAT32.rotate(q, rows(cos), rows(sin), precision, layout="bhsd")
    return q, REPEATED_FLOAT32.rotate(
        k, cos_k, sin_k, precision, layout="bhsd", positions=positions
    )


def blocks(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    unsqueeze_dim: int = 2,
    *,
    precision: str = "model",
    norm: Norm | None = None,
) -> Tensor:
    """x has one span of elements for each axis of position_ids [B, S, A]; cos is tiled in each."""
    A = position_ids.shape[-1]

    def halves(table: Tensor) -> Tensor:
        spans: Tensor = table.unflatten(-1, (A, -1))
        return spans[..., : spans.shape[-1] // 2].flatten(-2)

    layout = layout_of(x, cos, unsqueeze_dim)
    cos, sin = per_token(halves(cos), halves(sin), x, layout)
    return Style("half").rotate(x, cos, sin, precision, layout=layout, blocks=A, norm=norm)


def swapped(tensor: Tensor, sin: Tensor, cos: Tensor, *, precision: str = "model") -> Tensor:
    """GPT-J: the sine first; tensor [B, S, H, R], tables [B, S, P]."""
    return INTERLEAVED.rotate(tensor, cos, sin, precision, layout="bshd")


def cached_rows(x: Tensor, cos: Tensor, sin: Tensor, *, precision: str = "model") -> Tensor:
    """x [B, H, S, D] reads the first S rows of cos [1, 1, M, D]."""
    cos, sin = (table[0, :, : x.shape[-2]] for table in (cos, sin))
    return HALF.rotate(x, cos, sin, precision, layout="bhsd")


def angles(tensor: Tensor, freqs: Tensor, *, precision: str = "model") -> Tensor:
    """tensor [1, T, H, D]; the table is the cosine and sine of freqs [T, P]."""
    cos, sin = freqs.cos()[None], freqs.sin()[None]
    return Style("half", float32=True).rotate(tensor, cos, sin, precision, layout="bshd")


def gathered(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    unsqueeze_dim: int = 1,
    *,
    precision: str = "model",
) -> Pair:
    """q and k [B, H, S, D]; a token reads the row of cos [M, R] that position_ids [B, S] names."""
    return HALF.rotate_qk(q, k, cos, sin, precision, **_gather(cos, position_ids, unsqueeze_dim))


def gathered_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    unsqueeze_dim: int = 1,
    *,
    precision: str = "model",
) -> tuple[Tensor, Tensor, Tensor]:
    """As `gathered`; the values are rotated, too."""
    rows = _gather(cos, position_ids, unsqueeze_dim)
    q, k = HALF.rotate_qk(q, k, cos, sin, precision, **rows)
    return q, k, HALF.rotate(v, cos, sin, precision, **rows)


def _gather(table: Tensor, ids: Tensor | None, unsqueeze_dim: int) -> dict[str, Any]:
    """The operator's options for the rows table[ids].

    Negative ids count from the end, as in Python, while -1 is no rotation to the operator. An id
    below -M stays as it is, never -1, so that the operator refuses it.
    """
    layout = {1: "bhsd", 2: "bshd"}.get(unsqueeze_dim)
    if (
        layout is None
        or ids is None
        or ids.dtype not in (torch.int32, torch.int64)
        or ids.dim() != 2
        or table.dim() != 2
        or not len(table)
    ):
        raise ValueError(
            "apply_rotary_pos_emb: expected cos [M, R] with M > 0, integer position_ids [B, S] and "
            f"unsqueeze_dim 1 or 2, got unsqueeze_dim={unsqueeze_dim} and cos {list(table.shape)}"
        )
    M = len(table)
    positions = torch.where((ids < 0) & (ids >= -M), ids + M, ids)
    return {"layout": layout, "positions": positions}


def complex_rows(layout: str) -> Adapter:
    """q and k in this layout; complex tables [B or 1, S, P]."""

    def rotate(xq: Tensor, xk: Tensor, freqs_cis: Tensor, *, precision: str = "model") -> Pair:
        cos, sin = parts(freqs_cis, xq.device)
        return INTERLEAVED_FLOAT32.rotate_qk(xq, xk, cos, sin, precision, layout=layout)

    return rotate


def complex_plane(
    query: Tensor, key: Tensor, freqs_ci: Tensor, *, precision: str = "model"
) -> Pair:
    """query and key [B, S, H, D]; freqs_ci complex with S * P numbers, as [S, 1, P]."""
    freqs_ci = freqs_ci.reshape(1, query.shape[1], query.shape[-1] // 2)
    cos, sin = parts(freqs_ci, query.device)
    return INTERLEAVED_FLOAT32.rotate_qk(query, key, cos, sin, precision, layout="bshd")


def before_projection(
    self: Any,
    hidden_states: Tensor,
    relative_position_embeddings: Tensor,
    *,
    precision: str = "model",
) -> Tensor:
    """Conformers: hidden_states [B, S, H * D] before the projections; tables [2, M, 1, 1, D]."""
    heads = hidden_states.unflatten(-1, (self.num_heads, self.head_size))
    cos, sin = relative_position_embeddings[:, : hidden_states.shape[1], 0]
    cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)
    rotated: Tensor = HALF.rotate(heads, cos, sin, precision, layout="bshd")
    return rotated.flatten(-2)


def sinusoidal(
    sinusoidal_pos: Tensor,
    query_layer: Tensor,
    key_layer: Tensor,
    value_layer: Tensor | None = None,
    *,
    precision: str = "model",
) -> tuple[Tensor, ...]:
    """RoFormer: q, k and optionally v [B, H, S, D]; sine then cosine in one tensor [1, 1, S, D]."""
    sin, cos = sinusoidal_pos[:, 0].chunk(2, dim=-1)
    qk = INTERLEAVED.rotate_qk(query_layer, key_layer, cos, sin, precision, layout="bhsd")
    if value_layer is None:
        return qk
    return *qk, INTERLEAVED.rotate(value_layer, cos, sin, precision, layout="bhsd")


def float64_time(
    hidden_states: Tensor, cos: Tensor, sin: Tensor, *, precision: str = "model"
) -> Tensor:
    """Music Flamingo: hidden_states [B, S, D] in float64, rounded once; cos [B, S, R], repeated."""
    x = hidden_states.double().unsqueeze(2)
    rotated = REPEATED_FLOAT32.rotate(x, cos.double(), sin.double(), precision, layout="bshd")
    return rotated.squeeze(2).to(hidden_states.dtype)


def packed_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    precision: str = "model",
) -> Tensor:
    """ModernBERT without padding: rotates q and k of qkv [T, 3, H, D] in place; tables [M, P]."""
    functional.rotate_qk_(qkv[:, 0], qkv[:, 1], cos, sin, layout="thd", cu_seqlens=cu_seqlens)
    return qkv
