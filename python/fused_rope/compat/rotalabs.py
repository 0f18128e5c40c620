"""Drop-ins for rotalabs-accel's rotary embedding (rotalabs_accel/kernels/rope.py).

    from fused_rope.compat.rotalabs import RotaryEmbedding, apply_rope, build_rope_cache

The arguments and results are those of its PyTorch path. Differences: `seq_len=`, `offset=` and
grouped-query attention work as documented, gradients are computed on every device, position ids may
differ between sequences, and `interleaved=False` pairs halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import embedding, functional, reference
from ..frequencies import frequencies
from ._tables import for_all_tokens

__all__ = ["RotaryEmbedding", "apply_rope", "build_rope_cache", "rope_torch"]


def apply_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    use_triton: bool | None = None,
    *,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """Rotates pairs of adjacent elements of q and k.

    Args:
        q, k: [B, S, Hq, D] and [B, S, Hk, D]; any float dtype.
        cos, sin: [S or more, P] in the order of the tokens, or per sequence [B or 1, S, P] or
            [B or 1, S, 1, P]. A single row is that of all tokens.
        use_triton: False for the PyTorch reference; True or None for the fused operator.
        interleaved: False for pairs of elements j and j + P.

    Returns:
        q and k rotated, of their shapes and dtype.

    Raises:
        ValueError: shapes do not match, or there are fewer than S rows.
        TypeError: an unsupported dtype.

    Example:
        >>> q, k = torch.randn(2, 16, 4, 32), torch.randn(2, 16, 1, 32)
        >>> q, k = apply_rope(q, k, *build_rope_cache(16, 32))
    """
    rotate_qk = reference.rotate_qk if use_triton is False else functional.rotate_qk
    S = q.shape[1] if q.dim() == 4 else 1
    cos, sin = _table("cos", cos, S), _table("sin", sin, S)
    return rotate_qk(q, k, cos, sin, interleaved=interleaved)


def rope_torch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = True
) -> tuple[Tensor, Tensor]:
    """`apply_rope` with the PyTorch reference, which runs on any device.

    Args:
        q, k, cos, sin, interleaved: as in `apply_rope`.

    Returns:
        q and k rotated, of their shapes and dtype.

    Raises:
        ValueError: as `apply_rope`.

    Example:
        >>> q, k = torch.randn(2, 16, 4, 32), torch.randn(2, 16, 1, 32)
        >>> q, k = rope_torch(q, k, *build_rope_cache(16, 32))
    """
    return apply_rope(q, k, cos, sin, use_triton=False, interleaved=interleaved)


def build_rope_cache(
    seq_len: int,
    head_dim: int | None = None,
    base: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A table of cosines and sines, computed from float64 angles for every dtype.

    Args:
        seq_len: the number of rows.
        head_dim, dim: D, even; the original's README calls it dim. Pass one of them.
        base: base of the frequencies.
        device: of the table; None for the default device.
        dtype: of the table.

    Returns:
        cos and sin, [seq_len, head_dim/2].

    Raises:
        ValueError: head_dim is odd, or neither or both of head_dim and dim are given.

    Example:
        >>> cos, sin = build_rope_cache(2048, 128)
    """
    D = dim if head_dim is None else head_dim
    if D is None or (head_dim is not None and dim is not None):
        raise ValueError(
            f"build_rope_cache: expected head_dim or dim, got head_dim={head_dim} and dim={dim}"
        )
    inv_freq, _ = frequencies(D, base)
    where = torch.get_default_device() if device is None else device
    return functional.cos_sin_table(inv_freq, seq_len, dtype=dtype, device=where)


class RotaryEmbedding(torch.nn.Module):
    """A module that rotates q and k, with a table that grows if the host knows the rows.

    Args:
        dim: D.
        max_seq_len: the minimum number of rows.
        base: base of the frequencies.
        interleaved: False for pairs of elements j and j + P.

    Raises:
        ValueError: dim is odd.

    Example:
        >>> rope = RotaryEmbedding(dim=32, max_seq_len=128)
        >>> q, k = torch.randn(2, 16, 4, 32), torch.randn(2, 16, 1, 32)
        >>> q_rotated, k_rotated = rope(q, k)
        >>> q_next, k_next = rope(q[:, :1], k[:, :1], seq_len=1, offset=16)
    """

    def __init__(
        self,
        dim: int,
        max_seq_len: int = 2048,
        base: float = 10000.0,
        *,
        interleaved: bool = True,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.max_seq_len = max_seq_len
        self.base = base
        self.rope = embedding.RotaryEmbedding(
            dim, max_seq_len=max_seq_len, base=base, interleaved=interleaved
        )

    @property
    def cos_cache(self) -> Tensor:
        """float32 [M, P]."""
        return self.rope.cos

    @property
    def sin_cache(self) -> Tensor:
        """float32 [M, P]."""
        return self.rope.sin

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        position_ids: Tensor | None = None,
        *,
        seq_len: int | None = None,
        offset: int | Tensor = 0,
    ) -> tuple[Tensor, Tensor]:
        """Rotates q and k out of place.

        Args:
            q, k: [B, S, Hq, D] and [B, S, Hk, D]; any float dtype.
            position_ids: the row of each token, int32 or int64, [S] or [B, S]. The table does not
                grow for them: call `module.rope.reserve(rows)` first.
            seq_len: S; optional.
            offset: the number of tokens before these: an int, or an int32 or int64 tensor [B].

        Returns:
            q and k rotated.

        Raises:
            ValueError: shapes do not match, or seq_len is not S.
            TypeError: an unsupported dtype.
            IndexError: the table lacks the row of a position (on CUDA a device-side assertion).
        """
        if seq_len is not None and seq_len != q.shape[1]:
            raise ValueError(
                f"RotaryEmbedding: expected q with S=seq_len={seq_len}, got {list(q.shape)}"
            )
        rotated: tuple[Tensor, Tensor]
        rotated = self.rope(q, k, positions=position_ids, offset=offset)
        return rotated

    def extra_repr(self) -> str:
        return f"dim={self.dim}, max_seq_len={self.max_seq_len}, base={self.base}"


def _table(name: str, table: Tensor, S: int) -> Tensor:
    """The table with S rows and without the dimension of size 1 that broadcasts over heads."""
    if table.dim() == 4:
        if table.shape[2] != 1:
            raise ValueError(
                f"apply_rope: expected {name} of [S, P], [B or 1, S, P] or [B or 1, S, 1, P], got "
                f"{list(table.shape)}"
            )
        table = table.squeeze(2)
    return for_all_tokens(table, S)
