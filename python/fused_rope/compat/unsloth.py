"""Drop-ins for Unsloth's rotary kernels (unsloth/kernels/rope_embedding.py).

    from fused_rope.compat.unsloth import fast_rope_embedding, inplace_rope_embedding

The arguments and results are the same; what differs: inputs stay as they were unless `inplace=True`
says otherwise, nothing synchronizes, any head counts work, a row outside the table is an
error, torch.compile needs no graph break, and a result is rounded once, to the dtype of Q and K.

Letters: B batch, S sequence length, Hq, Hk query and key heads, D head_dim, M table rows.
"""

from __future__ import annotations

from torch import Tensor

from .. import functional

__all__ = [
    "Fast_RoPE_Embedding",
    "Fast_RoPE_Embedding_QK",
    "fast_rope_embedding",
    "inplace_rope_embedding",
]


def fast_rope_embedding(
    Q: Tensor,
    K: Tensor,
    cos: Tensor,
    sin: Tensor,
    rope_embedding_indices: Tensor | None = None,
    *,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys, half layout.

    Args:
        Q, K: [B, Hq, S, D] and [B, Hk, S, D], any strides.
        cos, sin: [M, D/2], or full width [M, D] (of which the first half is read), with any number
            of leading dimensions of size 1.
        rope_embedding_indices: the row of each token, int32 or int64, [B, S] or flattened [B*S];
            None for rows 0 to S - 1.
        inplace: write the results into Q and K.

    Returns:
        Q and K rotated, of their shapes and dtypes.

    Raises:
        ValueError: shapes that do not fit; fewer than S rows without indices.
        IndexError: an index that is no row (on CUDA a device-side assertion).

    Example:
        >>> angle = torch.arange(9.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> Q, K = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64)
        >>> Q, K = fast_rope_embedding(Q, K, angle.cos(), angle.sin())
    """
    positions = rope_embedding_indices
    if positions is not None and positions.numel() == Q.shape[0] * Q.shape[-2]:
        positions = positions.reshape(Q.shape[0], Q.shape[-2])
    cos, sin, table_layout = _tables(cos, sin, Q.shape[-1])
    options = ("bhsd", None, 0, False, 1, False, "fp32", table_layout)
    name = "rotate_qk_" if inplace else "rotate_qk"
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
    """`fast_rope_embedding` by its other name: in place, too, only if `inplace=True` says so.

    Args, results and errors: see `fast_rope_embedding`; position_ids are its indices.
    """
    return fast_rope_embedding(Q, K, cos, sin, position_ids, inplace=inplace)


class Fast_RoPE_Embedding:
    """The class-level entry for one tensor, [B, S, H, D]; autograd is the operator's own."""

    @staticmethod
    def apply(Q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Q [B, S, H, D] rotated by rows 0 to S - 1; tables as in `fast_rope_embedding`."""
        cos, sin, table_layout = _tables(cos, sin, Q.shape[-1])
        return functional.rotate(Q, cos, sin, layout="bshd", table_layout=table_layout)


class Fast_RoPE_Embedding_QK:
    """The class-level entry for queries and keys; autograd is the operator's own."""

    @staticmethod
    def apply(
        Q: Tensor, K: Tensor, cos: Tensor, sin: Tensor, rope_indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `fast_rope_embedding`, all arguments positional."""
        return fast_rope_embedding(Q, K, cos, sin, rope_indices)


def _tables(cos: Tensor, sin: Tensor, D: int) -> tuple[Tensor, Tensor, str]:
    """Tables [M, D/2] or [M, D], without leading dimensions of size 1, and their table_layout."""
    shape = cos.shape
    if len(shape) == 2 and shape[1] == D and sin.dim() == 2:  # the common form, checked first
        return cos, sin, "tiled"
    cos, sin = _rows("cos", cos, D), _rows("sin", sin, D)
    return cos, sin, "tiled" if cos.shape[1] == D else "half"


def _rows(name: str, table: Tensor, D: int) -> Tensor:
    """The view of a table without its leading dimensions, which must be of size 1."""
    shape = table.shape
    if len(shape) < 2 or shape[-1] not in (D // 2, D) or any(n != 1 for n in shape[:-2]):
        raise ValueError(
            f"rotate_qk: expected {name} of [M, D/2] or [M, D] with D={D}, after any dimensions of "
            f"size 1, got {list(shape)}"
        )
    return table.view(shape[-2:])
