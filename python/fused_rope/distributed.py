"""Sharding rules for torch.distributed.tensor, and the positions of context parallelism.

Importing this module teaches DTensor to rotate shards where they are, forward and backward:

* shards of the batch, of the heads (q's and k's apart) and partial sums, without communication;
* shards of the sequence, with positions, with tables per token, and with rows that are known on the
  host, without communication; otherwise (cu_seqlens, an offset that is a tensor) DTensor gathers
  the sequence first;
* shards of head_dim are gathered first, as pairs span them.

Tables and row tensors may be DTensors, replicated or sharded along the same dimension; plain ones
beside a DTensor count as replicated, and their gradients are not supported. In place, no placement
may have to change. `out=` is not supported.

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
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from . import functional

__all__ = ["contiguous_positions", "zigzag_positions"]

_Shardings = list[tuple[list[Placement], list[Placement]]]
_WHOLE = Replicate()


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


class _Call(NamedTuple):
    """An operator's arguments, as far as rules need them. Tensors come as DTensorSpec."""

    inputs: tuple[Any, ...]
    cos: Any
    sin: Any
    positions: Any = None
    offsets: Any = None
    cu_seqlens: Any = None
    offset: int = 0
    layout: str = "bshd"
    axes: Sequence[int] | None = None


class _Cut(NamedTuple):
    """How one mesh dimension cuts the tensors of a call so that each part can be rotated alone."""

    inputs: Sequence[Placement]
    table: Placement = _WHOLE
    positions: Placement = _WHOLE
    offsets: Placement = _WHOLE


def _by_heads(call: _Call) -> Iterator[_Cut]:
    """Heads know nothing of each other, and neither do q and k; a rotated sum is a sum."""
    heads = Shard(call.layout.index("h"))
    for inputs in itertools.product((_WHOLE, heads, Partial()), repeat=len(call.inputs)):
        if call.cos.ndim < 4 or heads not in inputs:
            yield _Cut(inputs)
        elif set(inputs) == {heads}:
            yield _Cut(inputs, table=Shard(2))


def _by_batch(call: _Call) -> Iterator[_Cut]:
    if call.layout == "thd":
        return
    inputs = [Shard(call.layout.index("b"))] * len(call.inputs)
    table = Shard(0) if call.cos.ndim > 2 and call.cos.shape[0] > 1 else _WHOLE
    dim = 0 if call.axes is None else 1
    shared = call.positions is None or call.positions.ndim < dim + 2
    positions = _WHOLE if shared or call.positions.shape[dim] == 1 else Shard(dim)
    yield _Cut(inputs, table, positions, offsets=Shard(0))


def _by_sequence(call: _Call) -> Iterator[_Cut]:
    dim = _sequence_dim(call.layout)
    inputs = [Shard(dim)] * len(call.inputs)
    one_row_each = call.offset == 0 and call.cos.shape[0] == call.inputs[0].shape[dim]
    if call.cos.ndim > 2:
        yield _Cut(inputs, table=Shard(1))
    elif call.cu_seqlens is not None:
        return
    elif call.positions is not None:
        yield _Cut(inputs, positions=Shard(call.positions.ndim - 1))
    elif call.offsets is None and one_row_each:
        yield _Cut(inputs, table=Shard(0))


def _shardings(call: _Call, in_place: bool) -> _Shardings:
    """All cuts, as placements of outputs and of tensors among the arguments."""
    if in_place and len({x.placements for x in call.inputs}) > 1:
        raise RuntimeError(
            "rotate_qk_: expected q and k with the same placements, as neither can be moved in "
            f"place, got {' and '.join(str(x.placements) for x in call.inputs)}"
        )
    shardings: _Shardings = []
    for cut in itertools.chain(_by_heads(call), _by_batch(call), _by_sequence(call)):
        if in_place and len(set(cut.inputs)) > 1:
            continue
        rows = (
            (call.positions, cut.positions),
            (call.offsets, cut.offsets),
            (call.cu_seqlens, _WHOLE),
        )
        given = [placement for tensor, placement in rows if tensor is not None]
        outputs = [] if in_place else list(cut.inputs)
        shardings.append((outputs, [*cut.inputs, cut.table, cut.table, *given]))
    return shardings


def _register(name: str) -> None:
    count = _inputs_of(name)

    def rule(*arguments: Any) -> _Shardings:
        known = len(_Call._fields) - 1 + count
        call = _Call(arguments[:count], *arguments[count:known])
        return _shardings(call, in_place=name.endswith("_"))

    register_sharding(getattr(torch.ops.fused_rope, name).default)(rule)


def _inputs_of(name: str) -> int:
    return 2 if name.startswith("rotate_qk") else 1


def _sequence_dim(layout: str) -> int:
    return layout.index("t" if layout == "thd" else "s")


def _suit_dtensors(
    name: str,
    tensors: tuple[Tensor, ...],
    positions: Tensor | None,
    offset: int | Tensor,
    cu_seqlens: Tensor | None,
    layout: str,
) -> tuple[tuple[Tensor, ...], Tensor | None, int | Tensor, Tensor | None]:
    """The arguments of operator `name`, with tables and row tensors that suit DTensors."""
    count, x = _inputs_of(name), tensors[0]
    if not isinstance(x, DTensor):
        return tensors, positions, offset, cu_seqlens
    cos, sin = tensors[count : count + 2]

    sequence_dim = _sequence_dim(layout)
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


for _name in ("rotate", "rotate_", "rotate_qk", "rotate_qk_"):
    _register(_name)
functional.suit_dtensors = _suit_dtensors
