"""Drop-ins for Unsloth's rotary kernels (rope_embedding.py and qk_norm_rope.py of its kernels).

    from fused_rope.compat.unsloth import fast_rope_embedding, inplace_rope_embedding
    from fused_rope.compat.unsloth import fast_qk_norm_rope

The arguments and results are the same. Differences: inputs are overwritten only with
`inplace=True`, nothing synchronizes, any head counts work, a row outside the table is an error,
torch.compile needs no graph break, and a result is rounded once, to the dtype of Q and K.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import functional
from ..types import TableLayout

__all__ = [
    "Fast_RoPE_Embedding",
    "Fast_RoPE_Embedding_QK",
    "fast_qk_norm_rope",
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
    shape, columns = Q.shape, cos.shape
    positions = _positions(rope_embedding_indices, shape[0], shape[-2])
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


def fast_qk_norm_rope(
    q_norm: Any,
    k_norm: Any,
    Q: Tensor,
    K: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalizes each head by its root mean square and rotates it, paired as halves.

    One launch, also on the CPU and with norm weights that require grad, which get gradients.
    Nothing is rounded between the norm and the rotation.

    Args:
        q_norm, k_norm: modules with `weight` [D], of Q's dtype or float32, and `variance_epsilon`
            or `eps`.
        Q, K: [B, S, Hq, D] and [B, S, Hk, D], any strides and float dtype.
        cos, sin: as in `fast_rope_embedding`.
        position_ids: the row of each token, int32 or int64, [B, S] or flattened [B*S], or [S] for
            all sequences; None for rows 0 to S - 1.

    Returns:
        Q and K normalized and rotated, [B, Hq, S, D] and [B, Hk, S, D].

    Raises:
        ValueError, TypeError, IndexError: as `fast_rope_embedding`; a weight of another shape or
            dtype.

    Example:
        >>> angle = torch.arange(9.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> Q, K = torch.randn(2, 9, 4, 64), torch.randn(2, 9, 2, 64)
        >>> norm = torch.nn.RMSNorm(64, eps=1e-6)
        >>> Q, K = fast_qk_norm_rope(norm, norm, Q, K, angle.cos(), angle.sin())
    """
    cos, sin, table_layout = _tables(cos, sin, Q.shape[-1])
    kw: dict[str, Any] = {"table_layout": table_layout}
    kw["positions"] = _positions(position_ids, Q.shape[0], Q.shape[1])
    q_eps, k_eps = _eps(q_norm), _eps(k_norm)
    if q_eps == k_eps:
        weights = q_norm.weight, k_norm.weight
        Q, K = functional.norm_rotate_qk(Q, K, cos, sin, *weights, eps=q_eps, **kw)
    else:
        Q = functional.norm_rotate(Q, cos, sin, q_norm.weight, eps=q_eps, **kw)
        K = functional.norm_rotate(K, cos, sin, k_norm.weight, eps=k_eps, **kw)
    return Q.transpose(1, 2), K.transpose(1, 2)


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


def _eps(norm: Any) -> float:
    eps: float = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return eps


def _positions(indices: Tensor | None, B: int, S: int) -> Tensor | None:
    """Flattened indices as [B, S]."""
    if indices is None or indices.shape == (B, S) or indices.numel() != B * S:
        return indices
    return indices.reshape(B, S)


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
