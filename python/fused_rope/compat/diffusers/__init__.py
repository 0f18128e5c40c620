"""diffusers: a drop-in for its rotary function, and `patch` for whole models and pipelines.

    from fused_rope.compat.diffusers import patch, patched, unpatch

    print(patch(pipeline))  # its models use the operator; prints which functions were replaced
    print(unpatch(pipeline))  # they use their own functions again

    with patched(transformer) as report:  # both
        transformer(**inputs)

A function is replaced if an entry of the table of forms has its signature and its results in
reference checks; otherwise it is left alone, and the report says why.

    adapters.py          one adapter for each signature
    forms.py             the table of forms
    reference_checks.py  calls that a function and its adapter must answer alike
    rewriting.py         attention processors that define a rotary function, or normalize q and k
    processors.py        the replacements of these
    patching.py          patch, unpatch, patched and is_patched
    coverage.py          which models are covered: python -m fused_rope.compat.diffusers
"""

from __future__ import annotations

from torch import Tensor

from . import adapters
from .patching import Report, is_patched, patch, patched, unpatch

__all__ = ["Report", "apply_rotary_emb", "is_patched", "patch", "patched", "unpatch"]


def apply_rotary_emb(
    x: Tensor,
    freqs_cis: Tensor | tuple[Tensor, Tensor],
    use_real: bool = True,
    use_real_unbind_dim: int = -1,
    sequence_dim: int = 2,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Rotates x by cosines and sines, or by complex numbers.

    It has the arguments and numbers of `diffusers.models.embeddings.apply_rotary_emb`. Differences:
    x may have any strides, tables are not converted, and `out=` rotates the streams of a
    dual-stream block into one joint tensor.

    Args:
        x: [B, H, S, D]; [B, S, H, D] with sequence_dim=1 or complex freqs_cis. Any float dtype.
        freqs_cis: (cos, sin), each [S, D], with every number twice: in succession with
            use_real_unbind_dim=-1, else in each half of the row. With use_real=False complex
            [B or 1, S, P]. A single row ([1, D], [B or 1, 1, P]) is that of all tokens.
        use_real: whether freqs_cis is (cos, sin).
        use_real_unbind_dim: -1 for pairs of adjacent elements (Flux, CogVideoX, Hunyuan-DiT), -2
            for pairs of elements j and j + P (Stable Audio, OmniGen, CogView4, Cosmos).
        sequence_dim: the dimension S of x, 1 or 2; no effect with complex freqs_cis.
        out: memory for the result, of x's shape and dtype, such as one stream's part of a joint
            tensor. Does not support autograd.

    Returns:
        A tensor of x's shape and dtype, or `out`.

    Raises:
        ValueError: shapes do not match, or another use_real_unbind_dim or sequence_dim.
        TypeError: use_real=False, and freqs_cis is not complex; an unsupported dtype.
        RuntimeError: `out` with inputs that require grad.

    Example:
        >>> text, image = torch.randn(2, 4, 7, 64), torch.randn(2, 4, 9, 64)
        >>> angle = torch.rand(16, 32).repeat_interleave(2, -1)
        >>> cos, sin = angle.cos(), angle.sin()
        >>> joint = torch.empty(2, 4, 16, 64)
        >>> _ = apply_rotary_emb(text, (cos[:7], sin[:7]), out=joint[:, :, :7])
        >>> _ = apply_rotary_emb(image, (cos[7:], sin[7:]), out=joint[:, :, 7:])
    """
    span = None
    if use_real and x.dim() == 4 and sequence_dim in (1, 2):  # further rows are not read
        span = 0, max(x.shape[sequence_dim], *(len(table) for table in freqs_cis))
    arguments = (x, freqs_cis, use_real, use_real_unbind_dim, sequence_dim)
    rotated: Tensor = adapters.shared(*arguments, precision="fp32", out=out, span=span)
    return rotated
