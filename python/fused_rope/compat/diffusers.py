"""Drop-in for diffusers' rotary function (diffusers/models/embeddings.py).

    from fused_rope.compat.diffusers import apply_rotary_emb

The arguments and numbers are the same. Differences: x may have any strides, tables are not
converted, and `out=` rotates the streams of a dual-stream block into one joint tensor.
"""

from __future__ import annotations

from torch import Tensor

from .. import functional
from ..types import Layout
from ._tables import for_all_tokens, real_and_imaginary

__all__ = ["apply_rotary_emb"]

_LAYOUTS: dict[int, Layout] = {1: "bshd", 2: "bhsd"}


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
    if not use_real:
        if not isinstance(freqs_cis, Tensor):
            raise TypeError("apply_rotary_emb: expected a complex tensor freqs_cis, got a tuple")
        cos, sin = real_and_imaginary("apply_rotary_emb", "freqs_cis", freqs_cis)
        cos, sin = _rows(cos, x, 1), _rows(sin, x, 1)
        return functional.rotate(x, cos, sin, interleaved=True, out=out)
    if use_real_unbind_dim not in (-1, -2) or sequence_dim not in _LAYOUTS:
        raise ValueError(
            "apply_rotary_emb: expected use_real_unbind_dim -1 or -2 and sequence_dim 1 or 2, got "
            f"{use_real_unbind_dim} and {sequence_dim}"
        )
    interleaved = use_real_unbind_dim == -1
    cos, sin = (_rows(table.to(x.device), x, sequence_dim) for table in freqs_cis)
    return functional.rotate(
        x,
        cos,
        sin,
        layout=_LAYOUTS[sequence_dim],
        table_layout="repeated" if interleaved else "tiled",
        interleaved=interleaved,
        out=out,
    )


def _rows(table: Tensor, x: Tensor, sequence_dim: int) -> Tensor:
    return for_all_tokens(table, x.shape[sequence_dim]) if x.dim() == 4 else table
