"""Drop-in for TritonRotary, the half-truncated rotary module of modded-nanogpt's Triton port.

    from fused_rope.compat.triton_rotary import TritonRotary

The numbers are the same: half of the pairs have frequencies from 1 down to 1/10000, the other half
do not rotate, and the rotation is the inverse one. Differences: q and k are not overwritten, may
have any strides and head counts and get gradients, and the table grows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import embedding, functional

__all__ = ["TritonRotary"]


class TritonRotary(torch.nn.Module):
    """Applies the inverse rotation with half-truncated frequencies to q and k [B, H, S, D].

    Args:
        dim: D, a multiple of 4.
        max_seq_len: the minimum number of rows of the table.

    Raises:
        ValueError: dim is not a multiple of 4.

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
        """Returns x1*c + x2*s and x2*c - x1*s for the halves x1, x2 of q and k.

        Args:
            q, k: [B, Hq, S, D] and [B, Hk, S, D]; any float dtype.

        Raises:
            ValueError: shapes do not match each other or dim.
            TypeError: an unsupported dtype.
        """
        if q.dim() != 4 or q.shape[-1] != self.dim:
            raise ValueError(
                f"TritonRotary: expected q of [B, Hq, S, D] with D={self.dim}, got {list(q.shape)}"
            )
        pair = self.rope._tables.pair(q.shape[2], q)
        assert pair is not None
        return functional.rotate_qk(q, k, *pair, layout="bhsd", inverse=True)
