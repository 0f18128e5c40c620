"""Sharding rules for torch.distributed.tensor, and the positions of context parallelism.

Importing this module teaches DTensor to rotate shards where they are, forward and backward:

* shards of the batch, of the heads (q's and k's apart) and partial sums, without communication;
* shards of the sequence, with positions, with tables per token, and with rows that are known on the
  host, without communication; otherwise (cu_seqlens, an offset that is a tensor) DTensor gathers
  the sequence first;
* shards of head_dim are gathered first, as pairs span them.

Tables and row tensors may be DTensors, replicated or sharded along the same dimension; plain ones
beside a DTensor count as replicated. In place, no placement may have to change. `out=` is not
supported.

Letters: B batch, S sequence length, T packed tokens, H heads, P pairs, M table rows.

Example:
    >>> import fused_rope, fused_rope.distributed
    >>> rope = fused_rope.RotaryEmbedding(64)
    >>> q = distribute_tensor(q, mesh, [Shard(1)])  # [B, S, H, 64], shards of the sequence
    >>> rope(q).placements
    (Shard(dim=1),)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from . import functional

__all__ = ["contiguous_positions", "zigzag_positions"]

_Shardings = list[tuple[list[Placement], list[Placement]]]


def contiguous_positions(
    length: int, rank: int, size: int, *, device: torch.device | str | None = None
) -> Tensor:
    """The tokens of one rank when a sequence is cut into `size` equal spans.

    They are both the positions to rotate by and the index that takes the rank's shard out of the
    whole sequence.

    Args:
        length: S of the whole sequence.
        rank: of this process in the group that shares the sequence.
        size: of that group.
        device: of the result; None for the default device.

    Returns:
        int64 [S/size].

    Raises:
        ValueError: a rank that is not in the group, or a length that is not a multiple of its size.

    Example:
        >>> contiguous_positions(8, rank=1, size=2)
        tensor([4, 5, 6, 7])
    """
    span = _span("contiguous_positions", length, rank, size, size)
    return torch.arange(rank * span, (rank + 1) * span, device=device)


def zigzag_positions(
    length: int, rank: int, size: int, *, device: torch.device | str | None = None
) -> Tensor:
    """The tokens of one rank when each takes a span from the front and one from the back.

    Every rank then has as much causal attention to compute: of 2 * size equal spans, rank r holds
    number r and number 2 * size - 1 - r, as in zig-zag ring attention.

    Args:
        length: S of the whole sequence.
        rank: of this process in the group that shares the sequence.
        size: of that group.
        device: of the result; None for the default device.

    Returns:
        int64 [S/size].

    Raises:
        ValueError: a rank that is not in the group, or a length that is not a multiple of twice its
            size.

    Example:
        >>> zigzag_positions(8, rank=1, size=2)
        tensor([2, 3, 4, 5])
    """
    span = _span("zigzag_positions", length, rank, size, 2 * size)
    front, back = rank * span, (2 * size - 1 - rank) * span
    spans = [torch.arange(first, first + span, device=device) for first in (front, back)]
    return torch.cat(spans)


def _span(name: str, length: int, rank: int, size: int, spans: int) -> int:
    if not 0 <= rank < size:
        raise ValueError(f"{name}: expected 0 <= rank < size, got rank={rank}, size={size}")
    if length < 0 or length % spans:
        raise ValueError(f"{name}: expected a length that is a multiple of {spans}, got {length}")
    return length // spans


def _shardings(
    in_place: bool,
    inputs: Sequence[Any],
    cos: Any,
    positions: Any = None,
    offsets: Any = None,
    cu_seqlens: Any = None,
    offset: int = 0,
    layout: str = "bshd",
    axes: Sequence[int] | None = None,
    *_: Any,
) -> _Shardings:
    """How a mesh dimension may shard outputs and inputs: the operator is right on each shard alone.

    Tensors come as DTensorSpec.
    """
    whole = Replicate()
    shardings: _Shardings = []

    def add(
        placements: Sequence[Placement],
        table: Placement = whole,
        position: Placement = whole,
        sequence: Placement = whole,
    ) -> None:
        rows = ((positions, position), (offsets, sequence), (cu_seqlens, whole))
        given = [placement for tensor, placement in rows if tensor is not None]
        shardings.append(([] if in_place else [*placements], [*placements, table, table, *given]))

    # Heads know nothing of each other, and neither do q and k; a rotation of a sum is a sum.
    heads = Shard(layout.index("h"))
    for each in itertools.product((whole, heads, Partial()), repeat=len(inputs)):
        if in_place and len(set(each)) > 1:
            continue
        if cos.ndim < 4 or heads not in each:
            add(each)
        elif set(each) == {heads}:
            add(each, table=Shard(2))

    if layout != "thd":
        of_batch = [Shard(layout.index("b"))] * len(inputs)
        table = Shard(0) if cos.ndim > 2 and cos.shape[0] > 1 else whole
        position: Placement = whole
        if positions is not None:
            batch_dim = 0 if axes is None else 1
            if positions.ndim == batch_dim + 2 and positions.shape[batch_dim] > 1:
                position = Shard(batch_dim)
        add(of_batch, table, position, Shard(0))

    sequence_dim = layout.index("t" if layout == "thd" else "s")
    of_sequence = [Shard(sequence_dim)] * len(inputs)
    counted = positions is None and offsets is None and offset == 0 and cu_seqlens is None
    if cos.ndim > 2:
        add(of_sequence, table=Shard(1))
    elif positions is not None and cu_seqlens is None:
        add(of_sequence, position=Shard(positions.ndim - 1))
    elif counted and cos.shape[0] == inputs[0].shape[sequence_dim]:
        add(of_sequence, table=Shard(0))
    return shardings


def _rotate(x: Any, cos: Any, sin: Any, *options: Any) -> _Shardings:
    return _shardings(False, (x,), cos, *options)


def _rotate_in_place(x: Any, cos: Any, sin: Any, *options: Any) -> _Shardings:
    return _shardings(True, (x,), cos, *options)


def _rotate_qk(q: Any, k: Any, cos: Any, sin: Any, *options: Any) -> _Shardings:
    return _shardings(False, (q, k), cos, *options)


def _rotate_qk_in_place(q: Any, k: Any, cos: Any, sin: Any, *options: Any) -> _Shardings:
    if q.placements != k.placements:
        raise RuntimeError(
            "rotate_qk_: expected q and k with the same placements, as neither can be moved in "
            f"place, got {q.placements} and {k.placements}"
        )
    return _shardings(True, (q, k), cos, *options)


def _beside_dtensors(
    name: str,
    tensors: tuple[Tensor, ...],
    positions: Tensor | None,
    offset: int | Tensor,
    cu_seqlens: Tensor | None,
    layout: str,
) -> tuple[tuple[Tensor, ...], Tensor | None, int | Tensor, Tensor | None]:
    """The arguments of operator `name`, with tables and row tensors that suit DTensors."""
    count = 2 if name.startswith("rotate_qk") else 1
    x = tensors[0]
    if not isinstance(x, DTensor):
        return tensors, positions, offset, cu_seqlens
    cos, sin = tensors[count : count + 2]

    sequence_dim = layout.index("t" if layout == "thd" else "s")
    rows_known = positions is None and cu_seqlens is None and not isinstance(offset, Tensor)
    if rows_known and cos.dim() == 2 and Shard(sequence_dim) in x.placements:
        # One row for each token: then the table can be sharded as the sequence is.
        last = offset + x.shape[sequence_dim]
        if offset >= 0 and last <= cos.shape[0] and (offset, last) != (0, cos.shape[0]):
            cos, sin, offset = cos[offset:last], sin[offset:last], 0

    def replicated(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or isinstance(tensor, DTensor):
            return tensor
        return DTensor.from_local(tensor, x.device_mesh, run_check=False)

    tensors = (*tensors[:count], replicated(cos), replicated(sin), *tensors[count + 2 :])
    return tensors, replicated(positions), replicated(offset), replicated(cu_seqlens)


_RULES: dict[str, Callable[..., _Shardings]] = {
    "rotate": _rotate,
    "rotate_": _rotate_in_place,
    "rotate_qk": _rotate_qk,
    "rotate_qk_": _rotate_qk_in_place,
}
for _name, _rule in _RULES.items():
    register_sharding(getattr(torch.ops.fused_rope, _name).default)(_rule)
functional._beside_dtensors = _beside_dtensors
