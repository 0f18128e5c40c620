"""The angles of TransformerEngine and Megatron-LM, and the rows that a context-parallel rank reads.

Both pass angles [M, 1, 1, R], each twice in its row, and split each sequence into 2*cp_size chunks,
of which rank cp_rank holds chunks cp_rank and 2*cp_size - 1 - cp_rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import nested_error

__all__ = ["look_up"]


def look_up(
    operator: str,
    t: Tensor,
    freqs: Tensor,
    layout: str,
    start_positions: Tensor | None,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> tuple[Tensor, dict[str, Any]]:
    """The angles [M, R] or [B, S, R] that `t` reads, and the keywords that choose their rows.

    Args:
        operator: the name in messages.
        t: [S, B, H, D], [B, S, H, D] or [T, H, D], as layout says.
        freqs: [M, 1, 1, R]; or [M, B, 1, R], without start_positions and not with "thd".

    Raises:
        ValueError: another shape of t or freqs, "thd" without cu_seqlens, a cp_rank that is not in
            [0, cp_size), or an odd S with cp_size > 1. TypeError: t is a nested tensor.
    """
    shared = freqs.dim() == 4 and freqs.shape[1] == 1
    own = not shared and layout != "thd" and start_positions is None
    if t.is_nested:
        raise nested_error(operator)
    if t.dim() != len(layout):
        raise ValueError(
            f"{operator}: expected a tensor of {len(layout)} dimensions for {layout!r}, got "
            f"{list(t.shape)}"
        )
    if freqs.dim() != 4 or freqs.shape[2] != 1 or not (shared or own):
        raise ValueError(
            f"{operator}: expected freqs of [M, 1, 1, R], or [M, B, 1, R] with neither "
            f"start_positions nor 'thd', got {list(freqs.shape)}"
        )
    if not 0 <= cp_rank < cp_size:
        raise ValueError(
            f"{operator}: expected cp_rank in [0, cp_size={cp_size}), got cp_rank={cp_rank}"
        )
    angle = freqs[:, :, 0]
    positions = None
    if layout == "thd":
        if cu_seqlens is None:
            raise ValueError(f"{operator}: expected cu_seqlens with 'thd', got None")
        if cp_size > 1:
            cu_seqlens = cu_seqlens // cp_size
            positions = _packed_positions(t.shape[0], cu_seqlens, cp_size, cp_rank)
    else:
        cu_seqlens = None
        S = t.shape[layout.index("s")]
        if cp_size > 1:
            positions = _positions(operator, S, angle, cp_size, cp_rank)
        if start_positions is None:  # cosine and sine only of the rows that are read
            angle, positions = angle[:S] if positions is None else angle[positions], None
    return angle[:, 0] if shared else angle.transpose(0, 1), dict(
        layout=layout,
        positions=positions,
        offset=0 if start_positions is None else start_positions,
        cu_seqlens=cu_seqlens,
    )


def _positions(operator: str, S: int, angle: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """The positions [S] of this rank's two chunks, one from the front and one from the back."""
    whole, chunk = cp_size * S, S // 2
    if S % 2 or whole > angle.shape[0]:
        raise ValueError(
            f"{operator}: expected an even S and at least cp_size*S={whole} rows of freqs, got "
            f"S={S} and {angle.shape[0]} rows"
        )
    front = torch.arange(cp_rank * chunk, (cp_rank + 1) * chunk, device=angle.device)
    back = torch.arange(whole - (cp_rank + 1) * chunk, whole - cp_rank * chunk, device=angle.device)
    return torch.cat([front, back])


def _packed_positions(T: int, starts: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """The positions [T] of this rank's two chunks of each packed sequence, which begin at `starts`.

    If the two chunks of a sequence cannot be equally long, which only the device knows, the
    positions are out of range, so that the operator raises.
    """
    token = torch.arange(T, device=starts.device, dtype=starts.dtype)
    sequence = torch.searchsorted(starts, token, right=True).sub(1).clamp(0, len(starts) - 2)
    index = token - starts[sequence]
    length = starts[sequence + 1] - starts[sequence]
    chunk = length // 2
    front = cp_rank * chunk + index
    back = cp_size * length - (cp_rank + 1) * chunk + index - chunk
    no_row = torch.iinfo(starts.dtype).min // 2
    return torch.where(index < chunk, front, back).masked_fill(length % 2 != 0, no_row)
