"""Drop-in for TritonRotary, the half-truncated rotary module of modded-nanogpt's Triton port.

    from fused_rope.compat.triton_rotary import TritonRotary

The numbers are the same: half of the pairs have frequencies, from 1 down to 1/10000, the other
half have none, and the rotation is the inverse one. What differs: q and k stay as they were, have
any strides and any two head counts, gradients flow, and the table grows.

Letters: B batch, S sequence length, Hq, Hk query and key heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import embedding, functional

__all__ = ["TritonRotary"]


class TritonRotary(torch.nn.Module):
    """Rotates q and k [B, H, S, D] backward by half-truncated frequencies.

    Args:
        dim: D, a multiple of 4.
        max_seq_len: rows of the table to begin with.

    Raises:
        ValueError: a dim that is no multiple of 4.

    Example:
        >>> rope = TritonRotary(dim=64, max_seq_len=128)
        >>> q, k = rope(torch.randn(2, 4, 100, 64), torch.randn(2, 2, 100, 64))
    """

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.dim = dim
        self.rope = embedding.RotaryEmbedding(
            dim, max_seq_len=max_seq_len, scaling={"rope_type": "half_truncated"}, layout="bhsd"
        )

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, Hq, S, D] and k [B, Hk, S, D] rotated: x1*c + x2*s and x2*c - x1*s.

        Raises:
            ValueError: shapes that do not fit each other, or dim.
        """
        if q.dim() != 4 or q.shape[-1] != self.dim:
            raise ValueError(
                f"TritonRotary: expected q of [B, Hq, S, D] with D={self.dim}, got {list(q.shape)}"
            )
        pair = self.rope._tables.pair(q.shape[2], q)
        assert pair is not None
        return functional.rotate_qk(q, k, *pair, layout="bhsd", inverse=True)
