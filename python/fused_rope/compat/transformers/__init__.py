"""Hugging Face transformers: a drop-in for its rotary function, and `patch` for whole models.

    from fused_rope.compat.transformers import patch, unpatch

    print(patch(model))    # model runs on the fused operator; which functions were replaced
    unpatch(model)         # and now on its own again

A model calls the rotary function of the Python module that defines its attention, so that is what
`patch` replaces, for every instance of the family. What it puts there is never guessed: a row of
`FORMS` must have the function's signature and return its very numbers in reference checks.
Everything else is left alone and reported.

    shims.py          one shim for each signature
    forms.py          the table of forms
    tables.py         rotary modules' cosines and sines, the same bits in fewer kernels
    patching.py       patch and unpatch
    kernel_layers.py  the same for transformers' `use_kernels=True`
    coverage.py       which model classes are covered: python -m fused_rope.compat.transformers

Letters: B batch, S sequence length, Hq, Hk query and key heads, D head_dim, R rotary_dim.
"""

from __future__ import annotations

from torch import Tensor

from . import shims
from .forms import FORMS, Form
from .patching import Report, patch, unpatch

__all__ = ["FORMS", "Form", "Report", "apply_rotary_pos_emb", "patch", "unpatch"]

_half = shims.pair(shims.HALF)


def apply_rotary_pos_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
    *,
    precision: str = "model",
) -> tuple[Tensor, Tensor]:
    """Drop-in for the function of this name in Llama's module and its many copies.

    Args:
        q, k: [B, Hq, S, D] and [B, Hk, S, D]; with unsqueeze_dim=2 [B, S, Hq, D] and [B, S, Hk, D].
        cos, sin: [B or 1, S, R], full width, the second half a copy of the first (of which only the
            first is read); where R < D, the first R elements are rotated. [S, R] with unsqueeze_dim
            0 or 1, as vision towers have it.
        unsqueeze_dim: where tables get the dimension of the heads.
        precision: "model" for eager Hugging Face's own roundings, bit for bit; "fp32" for one.

    Returns:
        q and k rotated, in q's dtype. (Where the tables' dtype is wider, as under autocast, the
        original returns theirs; here they are rotated in it and then rounded to q's.)

    Raises:
        ValueError: shapes that do not fit each other, another unsqueeze_dim.

    Example:
        >>> q, k = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64)
        >>> angle = torch.arange(9.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> angle = torch.cat([angle, angle], -1).expand(2, 9, 64)
        >>> q, k = apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    """
    rotated: tuple[Tensor, Tensor] = _half(q, k, cos, sin, unsqueeze_dim, precision=precision)
    return rotated
