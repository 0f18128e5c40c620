"""Drop-ins for Liger Kernel's rotary functions (liger_kernel/transformers, liger_kernel/ops).

    from fused_rope.compat.liger import (
        liger_llama4_text_rotary_pos_emb,
        liger_llama4_vision_rotary_pos_emb,
        liger_multimodal_rotary_pos_emb,
        liger_rotary_pos_emb,
        liger_rotary_pos_emb_vision,
    )

The arguments are the same; results are rounded once, to q's dtype. Differences: q, k and incoming
gradients are not overwritten, `unsqueeze_dim` has an effect, and R < D and a table per sequence
work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional
from ..frequencies import mrope_axes
from ..types import Layout, TableLayout
from ._tables import real_and_imaginary

__all__ = [
    "LigerLlama4RopeFunction",
    "LigerQwen2VLMRopeFunction",
    "LigerRopeFunction",
    "liger_llama4_text_rotary_pos_emb",
    "liger_llama4_vision_rotary_pos_emb",
    "liger_multimodal_rotary_pos_emb",
    "liger_qwen2vl_mrope",
    "liger_rope",
    "liger_rotary_pos_emb",
    "liger_rotary_pos_emb_vision",
    "rope_backward",
    "rope_forward",
]

_LAYOUTS: dict[int, Layout] = {1: "bhsd", -3: "bhsd", 2: "bshd", -2: "bshd"}


def liger_rotary_pos_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    unsqueeze_dim: int = 1,
    *,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotates q and k, paired as halves, by tables per token.

    Args:
        q, k: [B, Hq, S, D] and [B, Hk, S, D]; with unsqueeze_dim=2 [B, S, Hq, D] and [B, S, Hk, D].
            Any float dtype.
        cos, sin: [B or 1, S, R] or [S, R], the second half a copy of the first; if R < D, the first
            R elements are rotated. With rotary_dim=R also half of that width. For an odd D they
            have D + 1 columns, and the last element of each head is copied.
        position_ids: no effect, as in the original: the tables are already per token.
        unsqueeze_dim: the dimension of the heads, 1 or 2.
        rotary_dim: R. Required only for tables of D/2 columns, which may be full width for R = D/2
            or half width for R = D (gpt-oss).

    Returns:
        q and k rotated, of their shapes and dtype.

    Raises:
        ValueError: shapes do not match, another unsqueeze_dim, or tables of D/2 columns without
            rotary_dim.
        TypeError: an unsupported dtype.

    Example:
        >>> q, k = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64)
        >>> angle = torch.arange(9.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> angle = torch.cat([angle, angle], -1)[None]
        >>> q, k = liger_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    """
    layout = _layout("liger_rotary_pos_emb", unsqueeze_dim)
    cos, sin, table_layout = _tables(cos, sin, q.shape[-1], rotary_dim)
    return functional.rotate_qk(q, k, cos, sin, layout=layout, table_layout=table_layout)


def liger_rotary_pos_emb_vision(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotates q and k of a vision tower, paired as halves.

    Args:
        q, k: [S, Hq, D] and [S, Hk, D]; any float dtype.
        cos, sin: [S, D], the second half a copy of the first.

    Returns:
        q and k rotated, of their shapes and dtype.

    Raises:
        ValueError: shapes do not match.
        TypeError: an unsupported dtype.

    Example:
        >>> q, k, angle = torch.randn(9, 4, 64), torch.randn(9, 4, 64), torch.rand(9, 32)
        >>> angle = torch.cat([angle, angle], -1)
        >>> q, k = liger_rotary_pos_emb_vision(q, k, angle.cos(), angle.sin())
    """
    return functional.rotate_qk(q, k, cos, sin, layout="thd", table_layout="tiled")


def liger_multimodal_rotary_pos_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    mrope_section: Sequence[int],
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """Rotates q and k by M-RoPE in Qwen2-VL's order: each pair reads the table of its axis.

    Args:
        q, k: [B, Hq, S, D] and [B, Hk, S, D]; with unsqueeze_dim=2 [B, S, Hq, D] and [B, S, Hk, D].
        cos, sin: [A, B, S, D], a full-width table for each axis (time, height, width).
        mrope_section: the number of pairs of each axis, D/2 in total.
        unsqueeze_dim: the dimension of the heads, 1 or 2.

    Returns:
        q and k rotated, of their shapes and dtype.

    Raises:
        ValueError: shapes or sections do not match, or another unsqueeze_dim.
        TypeError: an unsupported dtype.

    Example:
        >>> q, k = torch.randn(2, 4, 9, 32), torch.randn(2, 2, 9, 32)
        >>> angle = torch.rand(3, 2, 9, 16).repeat(1, 1, 1, 2)
        >>> q, k = liger_multimodal_rotary_pos_emb(q, k, angle.cos(), angle.sin(), [8, 4, 4])
    """
    name = "liger_multimodal_rotary_pos_emb"
    layout = _layout(name, unsqueeze_dim)
    if cos.dim() != 4 or cos.shape[0] != len(mrope_section):
        raise ValueError(
            f"{name}: expected cos of [A, B, S, D] with a table for each of the "
            f"A={len(mrope_section)} sections, got {list(cos.shape)}"
        )
    # One shared table has the rows of all axes, sequences and tokens.
    rows = cos.shape[:-1]
    positions = torch.arange(rows.numel(), device=cos.device).view(rows)
    return functional.rotate_qk(
        q,
        k,
        cos.flatten(0, 2),
        sin.flatten(0, 2),
        layout=layout,
        table_layout="tiled",
        positions=positions,
        axes=mrope_axes(mrope_section),
    )


def liger_llama4_text_rotary_pos_emb(
    xq: Tensor, xk: Tensor, freqs_cis: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotates pairs of adjacent elements of xq and xk by complex numbers.

    Args:
        xq, xk: [B, S, Hq, D] and [B, S, Hk, D].
        freqs_cis: complex, [B or 1, S, D/2] or [S or more, D/2].

    Returns:
        xq and xk rotated, of their shapes and dtype.

    Raises:
        ValueError: shapes do not match.
        TypeError: freqs_cis is not complex; an unsupported dtype.

    Example:
        >>> xq, xk = torch.randn(2, 9, 4, 64), torch.randn(2, 9, 2, 64)
        >>> freqs_cis = torch.polar(torch.ones(2, 9, 32), torch.rand(2, 9, 32))
        >>> xq, xk = liger_llama4_text_rotary_pos_emb(xq, xk, freqs_cis)
    """
    cos, sin = real_and_imaginary("liger_llama4_text_rotary_pos_emb", "freqs_cis", freqs_cis)
    return functional.rotate_qk(xq, xk, cos, sin, interleaved=True)


def liger_llama4_vision_rotary_pos_emb(
    query: Tensor, key: Tensor, freqs_ci: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotates pairs of adjacent elements of query and key by complex numbers.

    Args:
        query, key: [B, S, H, D].
        freqs_ci: complex, [S, D/2], [S, 1, D/2] or [1, S, 1, D/2], shared by the batch.

    Returns:
        query and key rotated, of their shapes and dtype.

    Raises:
        ValueError: shapes do not match.
        TypeError: freqs_ci is real, as after a cast of its module (the original multiplies by it);
            an unsupported dtype.

    Example:
        >>> query, key = torch.randn(2, 9, 4, 64), torch.randn(2, 9, 4, 64)
        >>> freqs_ci = torch.polar(torch.ones(9, 1, 32), torch.rand(9, 1, 32))
        >>> query, key = liger_llama4_vision_rotary_pos_emb(query, key, freqs_ci)
    """
    name = "liger_llama4_vision_rotary_pos_emb"
    S, P = query.shape[1], query.shape[-1] // 2
    if freqs_ci.numel() != S * P or freqs_ci.shape[-1] != P:
        raise ValueError(
            f"{name}: expected freqs_ci of [S, D/2], [S, 1, D/2] or [1, S, 1, D/2] with S={S} and "
            f"D/2={P}, got {list(freqs_ci.shape)}"
        )
    cos, sin = real_and_imaginary(name, "freqs_ci", freqs_ci.reshape(S, P))
    return functional.rotate_qk(query, key, cos, sin, interleaved=True)


liger_rope = liger_rotary_pos_emb
liger_qwen2vl_mrope = liger_multimodal_rotary_pos_emb


class LigerRopeFunction:
    """`liger_rotary_pos_emb` under the name of the original's autograd.Function.

    Results have the memory order of q and k; the original's are views of [B, S, H, D] tensors.
    """

    apply = staticmethod(liger_rotary_pos_emb)


class LigerQwen2VLMRopeFunction:
    """`liger_multimodal_rotary_pos_emb` under the name of the original's autograd.Function."""

    apply = staticmethod(liger_multimodal_rotary_pos_emb)


class LigerLlama4RopeFunction:
    """`liger_llama4_text_rotary_pos_emb` under the name of the original's autograd.Function."""

    @staticmethod
    def apply(
        q: Tensor, k: Tensor, freqs_cis: Tensor, BLOCK_SIZE: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotates q [B, S, Hq, D] and k [B, S, Hk, D].

        Args:
            freqs_cis: as in `liger_llama4_text_rotary_pos_emb`, or its real and imaginary parts
                [S or more, D/2, 2].
            BLOCK_SIZE: no effect; it tunes the original's kernel.
        """
        if freqs_cis.is_floating_point() and freqs_cis.shape[-2:] == (q.shape[-1] // 2, 2):
            cos, sin = freqs_cis.unbind(-1)
            return functional.rotate_qk(q, k, cos, sin, interleaved=True)
        return liger_llama4_text_rotary_pos_emb(q, k, freqs_cis)


def rope_forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward of the original's autograd.Function.

    Args:
        q, k: [B, Hq, S, D] and [B, Hk, S, D].
        cos, sin: as in `liger_rotary_pos_emb`.

    Returns:
        q and k rotated, cos, sin.

    Raises:
        ValueError, TypeError: as `liger_rotary_pos_emb`.

    Example:
        >>> q, k, angle = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64), torch.rand(1, 9, 32)
        >>> cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
        >>> q, k, cos, sin = rope_forward(q, k, cos, sin)
    """
    return (*liger_rotary_pos_emb(q, k, cos, sin), cos, sin)


def rope_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The backward of the original's autograd.Function: the inverse rotation.

    Args:
        dq, dk: [B, Hq, S, D] and [B, Hk, S, D], gradients of `rope_forward`'s q and k.
        cos, sin: those of `rope_forward`.

    Returns:
        The gradients of q and k.

    Raises:
        ValueError, TypeError: as `liger_rotary_pos_emb`.

    Example:
        >>> dq, dk, angle = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64), torch.rand(1, 9, 32)
        >>> cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
        >>> dq, dk = rope_backward(dq, dk, cos, sin)
    """
    cos, sin, table_layout = _tables(cos, sin, dq.shape[-1], None)
    return functional.rotate_qk(
        dq, dk, cos, sin, layout="bhsd", table_layout=table_layout, inverse=True
    )


def _layout(operator: str, unsqueeze_dim: int) -> Layout:
    if unsqueeze_dim not in _LAYOUTS:
        raise ValueError(f"{operator}: expected unsqueeze_dim 1 or 2, got {unsqueeze_dim}")
    return _LAYOUTS[unsqueeze_dim]


def _tables(
    cos: Tensor, sin: Tensor, D: int, rotary_dim: int | None
) -> tuple[Tensor, Tensor, TableLayout]:
    """Tables have full width, or half of it if rotary_dim says so."""
    width = cos.shape[-1]
    if rotary_dim is None and D % 2 and width == D + 1:
        P = D // 2
        return cos[..., :P], sin[..., :P], "half"
    if rotary_dim is None and 2 * width == D:
        raise ValueError(
            f"liger_rotary_pos_emb: expected rotary_dim, as cos {list(cos.shape)} has D/2={width} "
            f"columns, got None: pass rotary_dim={width} for full width or {D} for half width"
        )
    if rotary_dim is not None and width not in (rotary_dim, rotary_dim // 2):
        raise ValueError(
            f"liger_rotary_pos_emb: expected cos of R={rotary_dim} or R/2 columns, got "
            f"{list(cos.shape)}"
        )
    return cos, sin, "half" if rotary_dim is not None and 2 * width == rotary_dim else "tiled"
