"""Sharding rules for torch.distributed.tensor, and the positions of context parallelism.

Importing this module registers the rules. Forward and backward then behave as follows:

* Shards of the batch, of the heads (of q and k independently) and partial sums rotate without
  communication. A norm is not linear: before it, partial sums are added.
* Shards of the sequence rotate without communication if positions are given, if tables are per
  token, or if the host knows the rows. Otherwise (cu_seqlens, a tensor offset) DTensor gathers the
  sequence first.
* Shards of head_dim are gathered first, since pairs span them.

Tables, positions, offset and cu_seqlens may be DTensors, replicated or sharded along the same
dimension; the weights of a norm are replicated, and their gradients are partial sums. With a
DTensor x, plain tensors count as replicated, and gradients of plain tables are not supported.
In place, placements must not have to change. `out=` is not supported.

`rotate_and_cache` takes q, k, v and the caches sharded along their heads, or all replicated.

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

_Shardings = list[tuple[list[Placement | None], list[Placement]]]
_WHOLE = Replicate()


def contiguous_positions(
    length: int, rank: int, size: int, *, device: torch.device | str | None = None
) -> Tensor:
    """The tokens of one rank if a sequence is split into `size` equal spans.

    They are the positions to rotate by, and the index that selects the rank's shard of the whole
    sequence.

    Args:
        length: S of the whole sequence.
        rank: of this process in the group that shares the sequence.
        size: of that group.
        device: of the result; None for the default device.

    Returns:
        int64 [S/size].

    Raises:
        ValueError: rank is not in [0, size), or length is not a multiple of size.

    Example:
        >>> contiguous_positions(8, rank=1, size=2)
        tensor([4, 5, 6, 7])
    """
    span = _span("contiguous_positions", length, rank, size, size)
    return torch.arange(rank * span, (rank + 1) * span, device=device)


def zigzag_positions(
    length: int, rank: int, size: int, *, device: torch.device | str | None = None
) -> Tensor:
    """The tokens of one rank if each rank has one span from the front and one from the back.

    All ranks then compute equally much causal attention: of 2 * size equal spans, rank r holds
    span r and span 2 * size - 1 - r, as in zig-zag ring attention.

    Args:
        length: S of the whole sequence.
        rank: of this process in the group that shares the sequence.
        size: of that group.
        device: of the result; None for the default device.

    Returns:
        int64 [S/size].

    Raises:
        ValueError: rank is not in [0, size), or length is not a multiple of 2 * size.

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
    """The arguments of an operator that the rules read. Tensors are DTensorSpecs."""

    inputs: tuple[Any, ...]
    cos: Any
    sin: Any
    weights: tuple[Any, ...]  # of a norm; None where there is none
    grads: tuple[Any, ...]  # of the results, for a backward operator; None for no gradient
    positions: Any = None
    offsets: Any = None
    cu_seqlens: Any = None
    offset: int = 0
    layout: str = "bshd"
    axes: Sequence[int] | None = None


class _Placements(NamedTuple):
    """How one mesh dimension shards the tensors of a call without need for communication."""

    inputs: Sequence[Placement]
    table: Placement = _WHOLE
    positions: Placement = _WHOLE
    offsets: Placement = _WHOLE


def _by_heads(call: _Call) -> Iterator[_Placements]:
    """Heads are independent, and so are q and k; a rotation alone is linear in partial sums."""
    heads = Shard(call.layout.index("h"))
    choices = (_WHOLE, heads) if call.weights else (_WHOLE, heads, Partial())
    for inputs in itertools.product(choices, repeat=len(call.inputs)):
        if call.cos.ndim < 4 or heads not in inputs:
            yield _Placements(inputs)
        elif set(inputs) == {heads}:
            yield _Placements(inputs, table=Shard(2))


def _by_batch(call: _Call) -> Iterator[_Placements]:
    if call.layout == "thd":
        return
    inputs = [Shard(call.layout.index("b"))] * len(call.inputs)
    table = Shard(0) if call.cos.ndim > 2 and call.cos.shape[0] > 1 else _WHOLE
    dim = 0 if call.axes is None else 1
    shared = call.positions is None or call.positions.ndim < dim + 2
    positions = _WHOLE if shared or call.positions.shape[dim] == 1 else Shard(dim)
    yield _Placements(inputs, table, positions, offsets=Shard(0))


def _by_sequence(call: _Call) -> Iterator[_Placements]:
    dim = _sequence_dim(call.layout)
    inputs = [Shard(dim)] * len(call.inputs)
    one_row_each = call.offset == 0 and call.cos.shape[0] == call.inputs[0].shape[dim]
    if call.cos.ndim > 2:
        yield _Placements(inputs, table=Shard(1))
    elif call.cu_seqlens is not None:
        return
    elif call.positions is not None:
        yield _Placements(inputs, positions=Shard(call.positions.ndim - 1))
    elif call.offsets is None and one_row_each:
        yield _Placements(inputs, table=Shard(0))


def _shardings(name: str, call: _Call, output_mask: Sequence[bool]) -> _Shardings:
    """All shardings, as placements of the outputs and of the tensor arguments."""
    in_place = name.endswith("_")
    if in_place and len({x.placements for x in call.inputs}) > 1:
        raise RuntimeError(
            f"{name}: expected q and k with the same placements, since in place neither can be "
            f"redistributed, got {' and '.join(str(x.placements) for x in call.inputs)}"
        )
    shardings: _Shardings = []
    for placements in itertools.chain(_by_heads(call), _by_batch(call), _by_sequence(call)):
        if in_place and len(set(placements.inputs)) > 1:
            continue
        outputs = _outputs(call, placements, output_mask)
        arguments = (
            *zip(call.grads, placements.inputs, strict=False),
            *zip(call.inputs, placements.inputs, strict=True),
            (call.cos, placements.table),
            (call.sin, placements.table),
            *((weight, _WHOLE) for weight in call.weights),
            (call.positions, placements.positions),
            (call.offsets, placements.offsets),
            (call.cu_seqlens, _WHOLE),
        )
        given = [placement for tensor, placement in arguments if tensor is not None]
        shardings.append(([] if in_place else outputs, given))
    return shardings


def _outputs(
    call: _Call, placements: _Placements, output_mask: Sequence[bool]
) -> list[Placement | None]:
    """Where the results are; of a backward operator, those that `output_mask` asks for."""
    if not call.grads:
        return list(placements.inputs)
    outputs: list[Placement | None] = [None] * 4
    for i, placement in enumerate(placements.inputs):
        if call.grads[i] is None:
            continue
        if output_mask[i]:
            outputs[i] = placement
        if output_mask[2 + i] and call.weights[i] is not None:
            outputs[2 + i] = _WHOLE if placement == _WHOLE else Partial()
    return outputs


def _cache_shardings(*given: Any, **_: Any) -> _Shardings:
    """The shardings of rotate_and_cache: by heads, or none. What it writes cannot move."""
    schema = torch.ops.fused_rope.rotate_and_cache.default._schema
    named = {a.name: value for a, value in zip(schema.arguments, given, strict=False)}
    heads = Shard(named.get("layout", "bshd").index("h"))
    cached = Shard(named["k_cache"].ndim - 2)
    by_heads: dict[str, Placement] = dict.fromkeys(("q", "k", "v", "q_out", "k_out"), heads)
    by_heads |= {"k_cache": cached, "v_cache": cached}
    moved = {n: placement for n, placement in by_heads.items() if named.get(n) is not None}
    for i in range(len(named["q"].placements)):
        here = {n: named[n].placements[i] for n in moved}
        if here != moved and set(here.values()) != {_WHOLE}:
            raise RuntimeError(
                "rotate_and_cache: expected q, k, v and the caches all sharded along their heads, "
                f"or all replicated, got {', '.join(f'{n} {p}' for n, p in here.items())}"
            )
    if named["cos"].ndim == 4:
        by_heads |= {"cos": Shard(2), "sin": Shard(2)}
    scales = {n: named[n] for n in ("k_scale", "v_scale") if named.get(n) is not None}
    by_heads |= {n: Shard(0) for n, scale in scales.items() if scale.ndim == 1}
    tensors = [a.name for a in schema.arguments if "Tensor" in str(a.type)]
    tensors = [n for n in tensors if named.get(n) is not None]
    sharded = [by_heads.get(n, _WHOLE) for n in tensors]
    return [([], [_WHOLE] * len(tensors)), ([], sharded)]


def _register(name: str) -> None:
    count = _inputs_of(name)
    is_backward = name.endswith("_backward")

    def rule(*arguments: Any, output_mask: Sequence[bool] = (), **_: Any) -> _Shardings:
        grads, rest = (arguments[:2], arguments[2:]) if is_backward else ((), arguments)
        inputs, (cos, sin), rest = rest[:count], rest[count : count + 2], rest[count + 2 :]
        weights = ()
        if name.startswith("norm"):
            weights, rest = (*rest[:count], None, None)[:count], rest[count:]
        inputs = tuple(x for x in inputs if x is not None)
        call = _Call(inputs, cos, sin, weights, grads, *rest[: len(_Call._fields) - 5])
        return _shardings(name, call, output_mask)

    register_sharding(getattr(torch.ops.fused_rope, name).default)(rule)


def _inputs_of(name: str) -> int:
    return 2 if "_qk" in name else 1


def _sequence_dim(layout: str) -> int:
    return layout.index("t" if layout == "thd" else "s")


def _adapt_to_dtensors(
    name: str,
    tensors: tuple[Any, ...],
    positions: Tensor | None,
    offset: int | Tensor,
    cu_seqlens: Tensor | None,
    layout: str,
) -> tuple[tuple[Any, ...], Tensor | None, int | Tensor, Tensor | None]:
    """The arguments of operator `name`; if x is a DTensor, all tensors are DTensors of its mesh."""
    is_cached = name == "rotate_and_cache"
    count, x = 3 if is_cached else _inputs_of(name), tensors[0]
    if not isinstance(x, DTensor):
        return tensors, positions, offset, cu_seqlens
    cos, sin = tensors[count : count + 2]

    sequence_dim = _sequence_dim(layout)
    rows_known = positions is None and cu_seqlens is None and not isinstance(offset, Tensor)
    if rows_known and cos.dim() == 2 and Shard(sequence_dim) in x.placements:
        # A table with one row per token can be sharded as the sequence is.
        last = offset + x.shape[sequence_dim]
        if offset >= 0 and last <= cos.shape[0] and (offset, last) != (0, cos.shape[0]):
            cos, sin, offset = cos[offset:last], sin[offset:last], 0

    def replicated(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or isinstance(tensor, DTensor):
            return tensor
        return DTensor.from_local(tensor, x.device_mesh, run_check=False)

    others = tensors[count + 2 :]
    if is_cached:
        others = tuple(map(replicated, others))
    elif name.startswith("norm"):
        others = (*others[:-count], *map(replicated, others[-count:]))
    tensors = (*tensors[:count], replicated(cos), replicated(sin), *others)
    return tensors, replicated(positions), replicated(offset), replicated(cu_seqlens)


for _name in ("rotate", "rotate_", "rotate_qk", "rotate_qk_"):
    _register(_name)
    _register(f"norm_{_name}")
_register("norm_rotate_qk_backward")
register_sharding(torch.ops.fused_rope.rotate_and_cache.default)(_cache_shardings)
functional.adapt_to_dtensors = _adapt_to_dtensors
