"""Drop-in for vLLM's rotary operator (vllm/_custom_ops.py), which works in place.

    from fused_rope.compat.vllm import rotary_embedding

The arguments and numbers are the same. Differences: any strides, rotary dimensions and head counts
work, and so do int32 positions and more than 2^31 elements; a position outside the cache is an
error.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import functional
from ..types import Precision
from ._tables import split_heads

__all__ = ["rotary_embedding"]


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
    *,
    precision: Precision = "fp32",
) -> None:
    """Rotates query and key in place.

    Args:
        positions: int32 or int64, [T] or [B, S].
        query: [T, Hq*head_size] or [T, Hq, head_size]; with positions [B, S]
            [B, S, Hq*head_size] or [B, S, Hq, head_size]. Any float dtype.
        key: the same with Hk heads, or None.
        head_size: D.
        cos_sin_cache: [M, R], the cosines of R/2 pairs and then their sines, in any float dtype.
        is_neox: pairs are elements j and j + R/2; adjacent elements if False.
        rope_dim_offset: the first rotated element.
        inverse: apply the inverse rotation.
        precision: "fp32" rounds once, as vLLM's kernel does. "model" rounds the cache, each product
            and their sum to query's dtype: bitwise identical to vLLM's PyTorch path
            (`forward_native`), and to its older kernels, which computed in query's dtype.

    Raises:
        ValueError: shapes do not match, or another precision.
        TypeError: an unsupported dtype.
        IndexError: the cache lacks the row of a position (on CUDA a device-side assertion).
        RuntimeError: query or key is a tensor that autograd forbids to write to.

    Example:
        >>> angle = torch.arange(40.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> cache = torch.cat([angle.cos(), angle.sin()], -1)
        >>> query, key = torch.randn(11, 8 * 64), torch.randn(11, 2 * 64)
        >>> rotary_embedding(torch.arange(11), query, key, 64, cache, is_neox=True)
    """
    if positions.dim() not in (1, 2):
        raise ValueError(
            f"rotary_embedding: expected positions of [T] or [B, S], got {list(positions.shape)}"
        )
    cos, sin = cos_sin_cache.chunk(2, -1)
    options: dict[str, Any] = {
        "layout": "thd" if positions.dim() == 1 else "bshd",
        "positions": positions,
        "rotary_offset": rope_dim_offset,
        "interleaved": not is_neox,
        "inverse": inverse,
        "precision": precision,
    }
    q = split_heads("rotary_embedding", "query", query, positions.shape, head_size)
    if key is None:
        functional.rotate_(q, cos, sin, **options)
    else:
        k = split_heads("rotary_embedding", "key", key, positions.shape, head_size)
        functional.rotate_qk_(q, k, cos, sin, **options)
