"""Drop-ins for Megatron-LM's rotary functions (megatron/core/models/common/embeddings).

    import fused_rope.compat.megatron

    fused_rope.compat.megatron.patch()  # before the model's config is made

`patch` binds these functions in `rope_utils`, so that every rotation of a model is one launch:

    fused_apply_rotary_pos_emb       apply_rope_fusion, [S, B, H, D]; TransformerEngine's numbers
    fused_apply_rotary_pos_emb_thd   apply_rope_fusion, packed sequences
    apply_rotary_pos_emb_bshd        the unfused path: M-RoPE batches, mscale, inverse, MLA
    apply_rotary_pos_emb_thd         the unfused path of packed sequences

The first two compute in float32 and round once. The others round as the originals do, bitwise
identical for equal cosines and sines. Differences: tokens past cu_seqlens[-1] are copied, a
position without angles is an error, nothing synchronizes, and of angles only one of the two copies
in a row is read.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import functional
from . import transformer_engine
from ._angles import look_up
from ._bindings import Bindings
from ._tables import for_all_tokens

__all__ = [
    "apply_rotary_pos_emb_bshd",
    "apply_rotary_pos_emb_thd",
    "fused_apply_rotary_pos_emb",
    "fused_apply_rotary_pos_emb_thd",
    "patch",
    "unpatch",
]


def fused_apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, transpose_output_memory: bool = False, interleaved: bool = False
) -> Tensor:
    """Rotates the first R elements of t, computed in float32 and rounded once.

    Args:
        t: [S, B, H, D]; any float dtype.
        freqs: angles [S, 1, 1, R], each twice: in both halves of the row, or in succession if
            interleaved. Also [S, B, 1, R], angles per sequence (M-RoPE).
        transpose_output_memory: no effect, as in the original.
        interleaved: pairs are adjacent elements instead of halves.

    Returns:
        A contiguous tensor of t's shape and dtype; differentiable in t.

    Raises:
        ValueError: shapes do not match, or freqs has too few rows.
        TypeError: an unsupported dtype.

    Example:
        >>> angle = torch.arange(9.0)[:, None] / 10000 ** (torch.arange(0, 32, 2) / 32)
        >>> freqs = torch.cat([angle, angle], -1)[:, None, None]
        >>> t = fused_apply_rotary_pos_emb(torch.randn(9, 2, 4, 64), freqs)
    """
    return transformer_engine.apply_rotary_pos_emb(t, freqs, interleaved=interleaved, fused=True)


def fused_apply_rotary_pos_emb_thd(
    t: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    cp_size: int = 1,
    cp_rank: int = 0,
    interleaved: bool = False,
) -> Tensor:
    """`fused_apply_rotary_pos_emb` for packed sequences, split among cp_size ranks.

    Args:
        t: [T, H, D]; any float dtype.
        cu_seqlens: int32 or int64 [N + 1], the start of each sequence before the split.
        freqs: angles [M, 1, 1, R], each twice; each sequence starts at row 0.
        cp_size, cp_rank: this rank holds chunks cp_rank and 2*cp_size - 1 - cp_rank of the
            2*cp_size chunks of each sequence.
        interleaved: pairs are adjacent elements instead of halves.

    Returns:
        A contiguous tensor of t's shape and dtype; differentiable in t.

    Raises:
        ValueError: shapes do not match.
        TypeError: an unsupported dtype.
        IndexError: a position without angles, or a sequence with an odd number of tokens on this
            rank (on CUDA a device-side assertion).

    Example:
        >>> angle = torch.arange(9.0)[:, None] / 10000 ** (torch.arange(0, 32, 2) / 32)
        >>> freqs = torch.cat([angle, angle], -1)[:, None, None]
        >>> cu_seqlens = torch.tensor([0, 9, 13])
        >>> t = fused_apply_rotary_pos_emb_thd(torch.randn(13, 4, 64), cu_seqlens, freqs)
    """
    return transformer_engine.apply_rotary_pos_emb(
        t,
        freqs,
        "thd",
        interleaved=interleaved,
        fused=True,
        cu_seqlens=cu_seqlens,
        cp_size=cp_size,
        cp_rank=cp_rank,
    )


def apply_rotary_pos_emb_bshd(
    t: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    mla_rotary_interleaved: bool = False,
    mscale: float = 1.0,
    inverse: bool = False,
    mla_output_remove_interleaving: bool = False,
    multi_latent_attention: bool | None = None,
) -> Tensor:
    """Rotates the first R elements of t with the roundings of Megatron's unfused function.

    Cosine, sine, products and sum are rounded to t's dtype. The original is
    `rope_utils._apply_rotary_pos_emb_bshd`, whose tensors are S-major in spite of its name.

    Args:
        t: [S, B, H, D] or [S, B, D]; any float dtype.
        freqs: angles [S, 1, 1, R], each twice, or [S, B, 1, R], angles per sequence (M-RoPE). A
            single row is that of all tokens.
        rotary_interleaved: pairs are adjacent elements instead of halves.
        mla_rotary_interleaved: pairs are adjacent elements, while the angles are repeated in
            halves; the result has the first elements of all pairs before the second ones.
        mscale: factor of cosine and sine.
        inverse: apply the inverse rotation.
        mla_output_remove_interleaving: with mla_rotary_interleaved, keep the order of elements.
        multi_latent_attention: an older name of mla_rotary_interleaved.

    Returns:
        A contiguous tensor of t's shape and dtype; differentiable in t.

    Raises:
        ValueError: shapes do not match, freqs has too few rows, or both kinds of interleaving.
        TypeError: an unsupported dtype.

    Example:
        >>> angle = torch.rand(9, 2, 1, 16)  # M-RoPE: other angles in each sequence
        >>> freqs = torch.cat([angle, angle], -1)
        >>> t = apply_rotary_pos_emb_bshd(torch.randn(9, 2, 4, 64), freqs)
    """
    name = "apply_rotary_pos_emb_bshd"
    heads = t.unsqueeze(2) if t.dim() == 3 else t
    freqs = freqs.unsqueeze(2) if freqs.dim() == 3 else freqs
    angle, rows = look_up(name, heads, freqs, "sbhd", None, None, 1, 0)
    angle = for_all_tokens(angle, heads.shape[0])
    rotated = _rotate(
        name,
        heads,
        angle,
        rows,
        rotary_interleaved,
        mla_rotary_interleaved if multi_latent_attention is None else multi_latent_attention,
        mscale,
        inverse,
        mla_output_remove_interleaving,
    )
    return rotated.view(t.shape)


def apply_rotary_pos_emb_thd(
    t: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    mla_rotary_interleaved: bool = False,
    mscale: float = 1.0,
    inverse: bool = False,
    mla_output_remove_interleaving: bool = False,
    cp_group: Any = None,
    multi_latent_attention: bool | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """`apply_rotary_pos_emb_bshd` for packed sequences (`rope_utils._apply_rotary_pos_emb_thd`).

    Args:
        t: [T, H, D]; any float dtype.
        cu_seqlens: int32 or int64 [N + 1], the start of each sequence before the split among the
            ranks of cp_group.
        freqs: angles [M, 1, 1, R], each twice. With M = cu_seqlens[-1], or M > max_seqlen if it is
            given, row i is that of token i of the whole batch; else each sequence starts at row 0.
        cp_group: the process group of context parallelism.
        max_seqlen: the length of the longest sequence before the split.

    The other arguments are those of `apply_rotary_pos_emb_bshd`.

    Returns:
        A contiguous tensor of t's shape and dtype; differentiable in t.

    Raises:
        ValueError: shapes do not match, both kinds of interleaving, or no cp_group.
        TypeError: an unsupported dtype.
        IndexError: a position without angles, or a sequence with an odd number of tokens on this
            rank (on CUDA a device-side assertion).
    """
    name = "apply_rotary_pos_emb_thd"
    if cp_group is None:
        raise ValueError(f"{name}: expected cp_group, got None")
    M = freqs.shape[0]
    by_batch = cu_seqlens[-1] == M if max_seqlen is None else max_seqlen < M
    angle, rows = look_up(
        name,
        t,
        freqs,
        "thd",
        cu_seqlens[:-1] * by_batch,  # not read on the host
        cu_seqlens,
        cp_group.size(),
        cp_group.rank(),
    )
    return _rotate(
        name,
        t,
        angle,
        rows,
        rotary_interleaved,
        mla_rotary_interleaved if multi_latent_attention is None else multi_latent_attention,
        mscale,
        inverse,
        mla_output_remove_interleaving,
    )


def _rotate(
    operator: str,
    t: Tensor,
    angle: Tensor,
    rows: dict[str, Any],
    interleaved: bool,
    mla: bool,
    mscale: float,
    inverse: bool,
    keep_order: bool,
) -> Tensor:
    if interleaved and mla:
        raise ValueError(
            f"{operator}: expected rotary_interleaved=False with mla_rotary_interleaved, got True"
        )
    rotated = functional.rotate(
        t,
        angle.cos() * mscale,
        angle.sin() * mscale,
        table_layout="repeated" if interleaved else "tiled",
        interleaved=interleaved or mla,
        inverse=inverse,
        precision="model",
        **rows,
    )
    if mla and not keep_order:
        R = angle.shape[-1]
        parts = rotated[..., 0:R:2], rotated[..., 1:R:2], rotated[..., R:]
        return torch.cat(parts, -1)
    return rotated.contiguous()


_IN_ROPE_UTILS: dict[str, Any] = {
    "fused_apply_rotary_pos_emb": fused_apply_rotary_pos_emb,
    "fused_apply_rotary_pos_emb_thd": fused_apply_rotary_pos_emb_thd,
    "_apply_rotary_pos_emb_bshd": apply_rotary_pos_emb_bshd,
    "_apply_rotary_pos_emb_thd": apply_rotary_pos_emb_thd,
}
_IN_ATTENTION: dict[str, Any] = {
    "apply_fused_qkv_rotary_pos_emb": transformer_engine.apply_fused_qkv_rotary_pos_emb,
    "HAVE_FUSED_QKV_ROPE": True,
}
_bindings = Bindings()


def patch() -> list[str]:
    """Binds the functions of this module in Megatron-LM, for every model of the process.

    With them `apply_rope_fusion` and `fused_single_qkv_rope` need no TransformerEngine. Call it
    before a TransformerConfig is made. A second call changes nothing.

    Returns:
        The names that are bound now, up to four of them in rope_utils. TransformerEngine's function
        for packed qkv is bound in `megatron.core.transformer.attention`, if this version calls it.

    Raises:
        ImportError: Megatron-LM is not installed.
    """
    root = "megatron.core"
    rope_utils = import_module(f"{root}.models.common.embeddings.rope_utils")
    wanted = {rope_utils: _IN_ROPE_UTILS}
    with suppress(ImportError):  # it needs Triton
        attention = import_module(f"{root}.transformer.attention")
        if hasattr(attention, "HAVE_FUSED_QKV_ROPE"):
            wanted[attention] = _IN_ATTENTION
    return _bindings.bind(wanted)


def unpatch() -> None:
    """Restores what `patch` replaced, where no other code has replaced it since."""
    _bindings.restore()
