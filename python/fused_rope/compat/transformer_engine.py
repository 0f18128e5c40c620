"""Drop-in for TransformerEngine's rotary function (transformer_engine/pytorch/attention/rope.py).

    from fused_rope.compat.transformer_engine import apply_rotary_pos_emb

The arguments are the same. With `fused=True` the numbers are those of its kernel, otherwise those
of its unfused path, bitwise identical for equal cosines and sines. Differences: both cases are one
launch, backward always applies start_positions, tokens past cu_seqlens[-1] are copied, int64
indices work, and a position without angles is an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ..types import Layout

__all__ = ["apply_rotary_pos_emb"]


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: Layout = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """Rotates the first R elements of t by the angles of its tokens.

    Args:
        t: [S, B, H, D], [B, S, H, D] or [T, H, D], as tensor_format says; any float dtype.
        freqs: angles [M, 1, 1, R], each twice: in both halves of the row, or in succession if
            interleaved. Also [M, B, 1, R], angles per sequence, without start_positions and not
            with "thd".
        tensor_format: "sbhd", "bshd" or "thd".
        start_positions: int32 or int64, [B] or [N]: added to the positions of each sequence.
        interleaved: pairs are adjacent elements instead of halves.
        fused: compute in float32 and round once; otherwise cosine, sine, products and sum are
            rounded to t's dtype, as in the original's unfused path.
        cu_seqlens: int32 or int64 [N + 1], "thd" only: the start of each packed sequence before its
            split among cp_size ranks.
        cp_size, cp_rank: this rank holds chunks cp_rank and 2*cp_size - 1 - cp_rank of the
            2*cp_size chunks of each sequence.

    Returns:
        A contiguous tensor of t's shape and dtype; differentiable in t.

    Raises:
        ValueError: shapes do not match, freqs has too few rows, "thd" without cu_seqlens, or an odd
            S with cp_size > 1.
        TypeError: an unsupported dtype, or indices that are not int32 or int64.
        IndexError: a position without angles, or a packed sequence with an odd number of tokens on
            this rank (on CUDA a device-side assertion).

    Example:
        >>> angle = torch.arange(40.0)[:, None] / 10000 ** (torch.arange(0, 32, 2) / 32)
        >>> freqs = torch.cat([angle, angle], -1)[:, None, None]
        >>> t = apply_rotary_pos_emb(torch.randn(9, 2, 4, 64), freqs)
    """
    if tensor_format not in ("sbhd", "bshd", "thd"):
        raise ValueError(
            f"apply_rotary_pos_emb: expected tensor_format sbhd, bshd or thd, got {tensor_format!r}"
        )
    shared = freqs.dim() == 4 and freqs.shape[1] == 1
    own = not shared and tensor_format != "thd" and start_positions is None
    if freqs.dim() != 4 or freqs.shape[2] != 1 or not (shared or own):
        raise ValueError(
            "apply_rotary_pos_emb: expected freqs of [M, 1, 1, R], or [M, B, 1, R] with neither "
            f"start_positions nor 'thd', got {list(freqs.shape)}"
        )
    angle = freqs[:, :, 0]
    positions = None
    if tensor_format == "thd":
        if cu_seqlens is None:
            raise ValueError("apply_rotary_pos_emb: expected cu_seqlens with tensor_format 'thd'")
        if cp_size > 1:
            cu_seqlens = cu_seqlens // cp_size
            positions = _packed_positions(t.shape[0], cu_seqlens, cp_size, cp_rank)
    else:
        cu_seqlens = None
        S = t.shape[tensor_format.index("s")]
        if cp_size > 1:
            positions = _positions(S, angle, cp_size, cp_rank)
        if start_positions is None:  # cosine and sine only of the rows that are read
            angle, positions = angle[:S] if positions is None else angle[positions], None
    angle = angle[:, 0] if shared else angle.transpose(0, 1)
    rotated = functional.rotate(
        t,
        angle.cos(),
        angle.sin(),
        layout=tensor_format,
        table_layout="repeated" if interleaved else "tiled",
        positions=positions,
        offset=0 if start_positions is None else start_positions,
        cu_seqlens=cu_seqlens,
        interleaved=interleaved,
        precision="fp32" if fused else "model",
    )
    return rotated.contiguous()


def _positions(S: int, angle: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """The positions [S] of this rank's two chunks, one from the front and one from the back."""
    whole, chunk = cp_size * S, S // 2
    if S % 2 or whole > angle.shape[0]:
        raise ValueError(
            f"apply_rotary_pos_emb: expected an even S and at least cp_size*S={whole} rows of "
            f"freqs, got S={S} and {angle.shape[0]} rows"
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
