"""The tensors of a work: random q and k in the memory that it names, tables, positions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from cases import MROPE, Work
from torch import Tensor

OFFSET_STEP = 7
EPS = 1e-6  # of the norm
PAGE_SIZE = 16  # tokens
SCALE = 1 / 64  # of 8 bits: normally distributed values become at most a few hundred


@dataclass(frozen=True)
class Cache:
    """Where a call stores k and v; each set has caches of its own, as many pages as tokens need."""

    v: Tensor
    k_cache: Tensor  # [pages, PAGE_SIZE, Hk, D]
    v_cache: Tensor
    slots: Tensor  # [B, S] int64, in random order
    scale: Tensor | None  # [] float32, of k and v; None unless values have 8 bits


@dataclass(frozen=True)
class InputSet:
    """The inputs of one call. Shared tables and options are the same objects in every set."""

    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor
    angles: Tensor  # [M, P] float64, the angles of cos and sin
    options: dict[str, Any] = field(
        default_factory=dict
    )  # keywords of fused_rope and of the oracle
    out_rows: Tensor | None = None  # [B, S]
    weights: tuple[Tensor, ...] = ()  # [D] of the norm of q and of k
    cache: Cache | None = None


def make_sets(work: Work, count: int, device: torch.device) -> list[InputSet]:
    """`count` sets with the same normally distributed q and k, each in its own memory."""
    q, k = _heads(work, count, device)
    angles = _angles(work, device)
    options = _options(work, device)
    cos, sin = _tables(work, count, angles)
    rows = torch.randperm(work.tokens, device=device).view(work.case.B, work.case.S)
    out_rows = rows if work.has("out_rows") else None
    weights = _weights(work, device)
    caches = _caches(work, k, rows)
    return [
        InputSet(q[i], k[i], cos[i], sin[i], angles, options, out_rows, weights, caches[i])
        for i in range(count)
    ]


def _caches(work: Work, k: list[Tensor], slots: Tensor) -> list[Cache | None]:
    """v and the caches of every set."""
    dtype = work.cache_dtype
    if dtype is None:
        return [None] * len(k)
    pages = -(-work.tokens // PAGE_SIZE)
    sizes = (2, pages, PAGE_SIZE, work.heads[1], work.case.D)
    scale = None if dtype == work.dtype else torch.tensor(SCALE, device=slots.device)
    v = torch.randn_like(k[0])
    caches = (torch.zeros(sizes, device=slots.device).to(dtype).unbind() for _ in k)
    return [Cache(v.clone(), *both, slots, scale) for both in caches]


def _heads(work: Work, count: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """q and k of every set, views of one allocation each."""
    (B, S, D), (Hq, Hk) = (work.case.B, work.case.S, work.case.D), work.heads

    def draw(*shape: int) -> Tensor:
        offset, numbers = work.storage_offset, torch.randn(shape, dtype=work.dtype, device=device)
        memory = numbers.new_empty(offset + count * numbers.numel())
        return memory[offset:].view(count, *shape).copy_(numbers)

    if work.has("packed"):
        qkv = draw(B, S, Hq + 2 * Hk, D)
        return list(qkv[..., :Hq, :]), list(qkv[..., Hq : Hq + Hk, :])
    if work.has("bhsd_view"):
        return list(draw(B, S, Hq, D).transpose(2, 3)), list(draw(B, S, Hk, D).transpose(2, 3))
    sizes = {"b": B, "s": S, "d": D, "t": B * S}
    q, k = (draw(*({**sizes, "h": H}[letter] for letter in work.layout)) for H in (Hq, Hk))
    return list(q), list(k)


def _weights(work: Work, device: torch.device) -> tuple[Tensor, ...]:
    """The weights of the norms of q and k; none without a norm."""
    if not work.has("norm"):
        return ()
    numbers = 1 + torch.randn(2, work.case.D, device=device) / 4
    return tuple(numbers.to(work.dtype))


def longest(work: Work) -> int:
    """Length of the longest sequence."""
    if work.has("cu_seqlens"):
        return int(_cu_seqlens(work).diff().max())
    return work.tokens if work.has("thd") else work.case.S


def _cu_seqlens(work: Work) -> Tensor:
    """[N + 1]: the first sequence has half the mean length, the last one and a half times it."""
    T, N = work.tokens, work.sequences
    ends = [i * T // N - T // N // 2 for i in range(1, N)]
    return torch.tensor([0, *ends, T], dtype=torch.int32)


def _angles(work: Work, device: torch.device) -> Tensor:
    """[M, P] float64: angles[m, j] = m * 10000^(-2j/R)."""
    rows = longest(work) + (OFFSET_STEP * work.case.B if work.has("offsets") else 0)
    pairs = torch.arange(work.P, dtype=torch.float64, device=device)
    row = torch.arange(rows, dtype=torch.float64, device=device)
    return torch.outer(row, 10000.0 ** (-pairs / work.P))


def _tables(work: Work, count: int, angles: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """float32 cos and sin of every set: one shared pair, or gathered tables in each set."""
    if not work.has("per_token", "per_head"):
        return [angles.cos().float()] * count, [angles.sin().float()] * count
    if work.has("per_head"):  # each head has frequencies of its own
        speed = 1 + torch.arange(work.heads[0], device=angles.device) / work.heads[0]
        angles = angles[:, None, :] * speed[:, None]
    shape = (count, 1 if work.layout == "thd" else work.case.B, *angles.shape)
    cos, sin = (t.float().expand(shape).contiguous() for t in (angles.cos(), angles.sin()))
    return list(cos), list(sin)


def _options(work: Work, device: torch.device) -> dict[str, Any]:
    """The keywords that differ from the defaults."""
    B, S = work.case.B, work.case.S
    options: dict[str, Any] = {}
    if work.layout != "bshd":
        options["layout"] = work.layout
    if work.has("interleaved"):
        options["interleaved"] = True
    if work.rotary_offset:
        options["rotary_offset"] = work.rotary_offset
    if work.has("positions32", "positions64"):
        positions = _rolled(B, S, 1, device)
        options["positions"] = positions.int() if work.has("positions32") else positions
    if work.has(*MROPE):
        options["positions"] = torch.stack([_rolled(B, S, step, device) for step in (1, 3, 5)])
        options["axes"] = _axes(work)
    if work.has("offsets"):
        options["offset"] = OFFSET_STEP * torch.arange(B, device=device)
    if work.has("cu_seqlens"):
        options["cu_seqlens"] = _cu_seqlens(work).to(device)
    return options


def _axes(work: Work) -> tuple[int, ...]:
    """The position axis of each pair; the comments give the sections of P = 64."""
    P = work.P
    if work.has("mrope_mixed"):  # 24, 20, 20, interleaved (Qwen3-VL)
        return tuple(j % 3 if j < 3 * (P * 5 // 16) else 0 for j in range(P))
    if work.has("mrope_interleaved"):  # 22, 21, 21, interleaved
        return tuple(j % 3 for j in range(P))
    first, second = (
        (P * 3 // 16, P * 13 // 32) if work.has("mrope_uneven") else (P // 4, P * 3 // 8)
    )
    return (0,) * first + (1,) * second + (2,) * (P - first - second)  # 12, 26, 26; 16, 24, 24


def _rolled(B: int, S: int, step: int, device: torch.device) -> Tensor:
    """[B, S] int64: consecutive rows, with a different first row in each batch."""
    start = step * (torch.arange(B, device=device) + 1) * max(S // 16, 1)
    return (torch.arange(S, device=device) + start[:, None]) % S


def token_rows(work: Work, inputs: InputSet) -> Tensor:
    """[B or 1, S] int64: the table row of each token."""
    positions: Tensor | None = inputs.options.get("positions")
    if positions is not None:
        return positions.long()
    return torch.arange(work.case.S, device=inputs.angles.device)[None]


def relayout(x: Tensor, source: str, target: str) -> Tensor:
    """A view of x with its dimensions in the order of `target`; both are permuted letters."""
    if source == target:
        return x
    return x.permute([source.index(letter) for letter in target])
