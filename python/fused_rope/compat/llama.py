"""Drop-in for the rotary function of Meta's Llama code (llama3, llama-models) and its copies.

    from fused_rope.compat.llama import apply_rotary_emb

    models.llama3.model.apply_rotary_emb = apply_rotary_emb  # or bind it in their module

The arguments are the same; on a CPU results are bitwise identical to the original's. Differences:
inputs are not widened in memory, and a table may be longer than the sequence.
"""

from __future__ import annotations

from torch import Tensor

from .. import functional
from ._tables import real_and_imaginary

__all__ = ["apply_rotary_emb"]


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates pairs of adjacent elements of xq and xk by complex numbers.

    Args:
        xq, xk: [B, S, Hq, D] and [B, S, Hk, D]; any float dtype.
        freqs_cis: complex, [S or more, D/2], as `precompute_freqs_cis` returns it.

    Returns:
        xq and xk rotated, of their shapes and dtype; computed in float32 and rounded once.

    Raises:
        ValueError: shapes do not match, or freqs_cis has too few rows.
        TypeError: freqs_cis is not complex; an unsupported dtype.

    Example:
        >>> xq, xk = torch.randn(2, 9, 4, 64), torch.randn(2, 9, 2, 64)
        >>> angle = torch.arange(9.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> xq, xk = apply_rotary_emb(xq, xk, torch.polar(torch.ones_like(angle), angle))
    """
    cos, sin = real_and_imaginary("apply_rotary_emb", "freqs_cis", freqs_cis)
    return functional.rotate_qk(xq, xk, cos, sin, interleaved=True)
