"""Hugging Face transformers: a drop-in for its rotary function, and `patch` for whole models.

    from fused_rope.compat.transformers import patch, patched, unpatch

    print(patch(model))  # the model uses the operator; prints which functions were replaced
    print(unpatch(model))  # the model uses its own functions again

    with patched(model) as report:  # both
        model.generate(**inputs)

A model calls the rotary function of the Python module that defines its attention. `patch` replaces
that function, for every instance of the family. It needs an entry of `FORMS` with the function's
signature whose results are bitwise identical in reference checks; otherwise it leaves the function
alone and reports why. `patch(model, norms="fused")` also replaces the forward of attention classes
that normalize q and k next to the rotation, so that both run in one pass.

    adapters.py          one adapter for each signature
    forms.py             the table of forms
    reference_checks.py  calls that a function and its adapter must answer alike
    tables.py            cosines and sines of rotary modules in fewer kernels
    rewriting.py         forwards of attention classes whose norms wait
    patching.py          patch, unpatch, patched and is_patched
    layers.py            layers of the `kernels` package
    kernel_layers.py     the same for transformers' `use_kernels=True`
    coverage.py          which model classes are covered: python -m fused_rope.compat.transformers
    configs.py           which configs `RotaryEmbedding.from_config` reads
    ../_patching         what does not depend on the library
"""

from __future__ import annotations

from torch import Tensor

from ...types import Precision
from .._tables import for_all_tokens
from . import adapters
from .forms import FORMS, Form
from .patching import Report, is_patched, patch, patched, unpatch

__all__ = [
    "FORMS",
    "Form",
    "Report",
    "apply_rotary_pos_emb",
    "is_patched",
    "patch",
    "patched",
    "unpatch",
]

_half = adapters.pair(adapters.HALF)


def apply_rotary_pos_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
    *,
    precision: Precision = "model",
) -> tuple[Tensor, Tensor]:
    """Drop-in for the function of this name in Llama's module and its many copies.

    Args:
        q, k: [B, Hq, S, D] and [B, Hk, S, D]; with unsqueeze_dim=2 [B, S, Hq, D] and [B, S, Hk, D].
        cos, sin: [B or 1, S, R], full width: the second half is a copy of the first and not read.
            If R < D, the first R elements are rotated. [S, R] with unsqueeze_dim 0 or 1, as in
            vision towers. A single row is that of all tokens.
        unsqueeze_dim: the dimension at which tables are unsqueezed for the heads.
        precision: "model" for results bitwise identical to eager Hugging Face; "fp32" to compute in
            float32 and round once.

    Returns:
        q and k rotated, in q's dtype. If the tables' dtype is wider, as under autocast, the
        original returns that dtype; this function computes in it and rounds to q's dtype.

    Raises:
        ValueError: shapes do not match, or another unsqueeze_dim.
        TypeError: an unsupported dtype.

    Example:
        >>> q, k = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64)
        >>> angle = torch.arange(9.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> angle = torch.cat([angle, angle], -1).expand(2, 9, 64)
        >>> q, k = apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    """
    rotated: tuple[Tensor, Tensor]
    try:
        rotated = _half(q, k, cos, sin, unsqueeze_dim, precision=precision)
    except ValueError:  # no cost to the usual call
        S = q.shape[-2 if adapters.layout_of(q, cos, unsqueeze_dim) == "bhsd" else -3]
        if not cos.shape[-2] == sin.shape[-2] == 1 != S:
            raise
        cos, sin = for_all_tokens(cos, S), for_all_tokens(sin, S)
        rotated = _half(q, k, cos, sin, unsqueeze_dim, precision=precision)
    return rotated
