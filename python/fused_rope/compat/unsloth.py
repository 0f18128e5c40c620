"""Drop-ins for Unsloth's rotary kernels (unsloth/kernels/rope_embedding.py).

    from fused_rope.compat.unsloth import fast_rope_embedding, inplace_rope_embedding

The arguments and results are the same. Differences: inputs are overwritten only with
`inplace=True`, nothing synchronizes, any head counts work, a row outside the table is an error,
torch.compile needs no graph break, and a result is rounded once, to the dtype of Q and K.
"""

from __future__ import annotations

from torch import Tensor

from .. import functional
from ..types import TableLayout

__all__ = [
    "Fast_RoPE_Embedding",
    "Fast_RoPE_Embedding_QK",
    "fast_rope_embedding",
    "inplace_rope_embedding",
]

# By table_layout.
_OPTIONS = {
    "half": functional.Options(layout="bhsd"),
    "tiled": functional.Options(layout="bhsd", table_layout="tiled"),
}


def fast_rope_embedding(
    Q: Tensor,
    K: Tensor,
    cos: Tensor,
    sin: Tensor,
    rope_embedding_indices: Tensor | None = None,
    *,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys, paired as halves.

    Args:
        Q, K: [B, Hq, S, D] and [B, Hk, S, D], any strides and float dtype.
        cos, sin: [M, D/2], or full width [M, D], of which the first half is read; after any number
            of dimensions of size 1.
        rope_embedding_indices: the row of each token, int32 or int64, [B, S] or flattened [B*S];
            None for rows 0 to S - 1.
        inplace: write the results to Q and K.

    Returns:
        Q and K rotated, of their shapes and dtype.

    Raises:
        ValueError: shapes do not match, or there are fewer than S rows without indices.
        TypeError: an unsupported dtype.
        IndexError: the table lacks the row of an index (on CUDA a device-side assertion).
        RuntimeError: inplace with tensors that autograd forbids.

    Example:
        >>> angle = torch.arange(9.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> Q, K = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64)
        >>> Q, K = fast_rope_embedding(Q, K, angle.cos(), angle.sin())
    """
    positions, shape, columns = rope_embedding_indices, Q.shape, cos.shape
    if positions is not None:
        B, S = shape[0], shape[-2]
        if positions.shape != (B, S) and positions.numel() == B * S:
            positions = positions.reshape(B, S)
    table_layout = "tiled"
    if len(columns) != 2 or columns[1] != shape[-1] or sin.dim() != 2:
        cos, sin, table_layout = _tables(cos, sin, shape[-1])
    name = "rotate_qk_" if inplace else "rotate_qk"
    options = _OPTIONS[table_layout]
    rotated = functional.call(name, (Q, K, cos, sin), positions, 0, None, options)
    return (Q, K) if inplace else rotated


def inplace_rope_embedding(
    Q: Tensor,
    K: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """`fast_rope_embedding` under its other name; it too is in place only with `inplace=True`.

    Args:
        position_ids: rope_embedding_indices of `fast_rope_embedding`, as are all other arguments.

    Returns:
        Q and K rotated.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as `fast_rope_embedding`.

    Example:
        >>> angle = torch.arange(9.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> Q, K = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64)
        >>> Q, K = inplace_rope_embedding(Q, K, angle.cos(), angle.sin(), inplace=True)
    """
    return fast_rope_embedding(Q, K, cos, sin, position_ids, inplace=inplace)


class Fast_RoPE_Embedding:
    """The original's autograd.Function for one tensor [B, S, H, D]."""

    @staticmethod
    def apply(Q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates Q [B, S, H, D] by rows 0 to S - 1; tables as in `fast_rope_embedding`."""
        cos, sin, table_layout = _tables(cos, sin, Q.shape[-1])
        return functional.rotate(Q, cos, sin, layout="bshd", table_layout=table_layout)


class Fast_RoPE_Embedding_QK:
    """The original's autograd.Function for queries and keys."""

    @staticmethod
    def apply(
        Q: Tensor, K: Tensor, cos: Tensor, sin: Tensor, rope_indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`fast_rope_embedding` with positional arguments."""
        return fast_rope_embedding(Q, K, cos, sin, rope_indices)


def _tables(cos: Tensor, sin: Tensor, D: int) -> tuple[Tensor, Tensor, TableLayout]:
    """Views [M, D/2] or [M, D] of the tables, and their table_layout."""
    cos, sin = _rows("cos", cos, D), _rows("sin", sin, D)
    return cos, sin, "tiled" if cos.shape[1] == D else "half"


def _rows(name: str, table: Tensor, D: int) -> Tensor:
    """A view of the table without its leading dimensions, which must be of size 1."""
    shape = table.shape
    if len(shape) < 2 or shape[-1] not in (D // 2, D) or any(n != 1 for n in shape[:-2]):
        raise ValueError(
            f"rotate_qk: expected {name} of [M, D/2] or [M, D] with D={D}, after any dimensions of "
            f"size 1, got {list(shape)}"
        )
    return table if len(shape) == 2 else table.view(shape[-2:])
