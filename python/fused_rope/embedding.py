"""RotaryEmbedding: a module that owns a table, picks its rows and calls the operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .frequencies import (
    config_arguments,
    frequencies,
    regime,
    rope_type,
    varying_constants,
    varying_frequencies,
)
from .functional import cos_sin_table, nested_error, refuse_scripting, rotate, rotate_qk

__all__ = ["RotaryEmbedding"]

_USUAL = {
    "rotary_offset": 0,
    "scaling": None,
    "interleaved": False,
    "blocks": 1,
    "axes": None,
    "precision": "fp32",
}


class RotaryEmbedding(torch.nn.Module):
    """Rotates queries and keys by their positions, from a table of its own.

    The table is computed in float64 and kept in float32. It is no parameter and no buffer:
    `state_dict()` is empty, and `.to(torch.bfloat16)`, autocast, checkpoints and FSDP leave its
    numbers alone; `.to(device)` and `to_empty` move it, and so does a call with q elsewhere. Where
    the rows are known on the host (no positions, no cu_seqlens, an int offset) it grows by itself,
    without waiting for the device; otherwise it has `max_seq_len` rows until `reserve(rows)`.

    The frequencies of dynamic and longrope scaling follow from the largest position of the very
    call, and from nothing before it. Where only the device knows that position, and wherever they
    change from row to row (dynamic, past the trained length), the call computes a row for each of
    its tokens on the device, in float64, without waiting: then no row is too far, and positions
    need no `reserve`.

    Letters: B batch, S sequence length, T packed tokens, N packed sequences, H heads, D head_dim,
    R rotary_dim, P = R/2 pairs, M table rows, A position axes.

    Args:
        head_dim: D.
        rotary_dim: R, even; None for all lanes from rotary_offset on.
        rotary_offset: the first rotated lane.
        max_seq_len: M, to begin with.
        base: base of the frequencies ("rope_theta").
        scaling: a mapping with "rope_type" and its keys, as in Hugging Face configs; see
            `fused_rope.frequencies.frequencies`.
        layout: "bshd", "bhsd" or "sbhd" for 4-D inputs, "thd" for packed 3-D ones.
        interleaved: pairs are neighbours (GPT-J) instead of halves (GPT-NeoX, Llama).
        blocks: rotate halves inside each of this many spans, each with the frequencies of R/blocks
            lanes.
        axes: M-RoPE: for each of the P pairs the position axis it follows; see
            `fused_rope.mrope_axes`.
        precision: "fp32", or "model" for the roundings of eager Hugging Face.
        device: where the table lies; None for the default device.

    Attributes:
        cos, sin: float32 [M, P].

    Raises:
        ValueError: sizes that do not fit each other, an unknown layout or rope_type, a missing key.

    Example:
        >>> rope = RotaryEmbedding(64, layout="bhsd")
        >>> q, k = torch.randn(2, 8, 100, 64), torch.randn(2, 2, 100, 64)
        >>> q_rotated, k_rotated = rope(q, k)
        >>> q_next, k_next = rope(q[:, :, :1], k[:, :, :1], offset=100)
    """

    cos: Tensor
    sin: Tensor

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        head_dim: int,
        *,
        rotary_dim: int | None = None,
        rotary_offset: int = 0,
        max_seq_len: int = 2048,
        base: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        layout: str = "bshd",
        interleaved: bool = False,
        blocks: int = 1,
        axes: Sequence[int] | None = None,
        precision: str = "fp32",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rotary_dim = head_dim - rotary_offset if rotary_dim is None else rotary_dim
        self.rotary_offset = rotary_offset
        self.base = base
        self.scaling = None if scaling is None else dict(scaling)
        self.layout = layout
        self.interleaved = interleaved
        self.blocks = blocks
        self.axes = None if axes is None else tuple(axes)
        self.precision = precision
        self._check()
        self._sequence_dim = layout.index("t" if layout == "thd" else "s")
        self._batch_dim = None if layout == "thd" else layout.index("b")
        self._varies = rope_type(self.scaling or {}) in ("dynamic", "longrope")
        self._choose_frequencies(0)
        self._choose_constants()
        self._build(max_seq_len, torch.get_default_device() if device is None else device)

    @classmethod
    def from_config(
        cls,
        hf_config: Any,
        *,
        layer_type: str | None = None,
        layout: str = "bhsd",
        device: torch.device | str | None = None,
    ) -> RotaryEmbedding:
        """The embedding that a Hugging Face config describes, transformers 4.57 or 5.

        Args:
            hf_config: a config with rope_parameters, or with rope_theta and rope_scaling.
            layer_type: which of the config's layer types, where their rotary parameters differ.
            layout: order of q's and k's dimensions.
            device: where the table lies; None for the default device.

        Raises:
            ValueError: as the constructor; or the layer types differ and none of them is named.

        Example:
            >>> from transformers import LlamaConfig
            >>> RotaryEmbedding.from_config(LlamaConfig()).head_dim
            128
        """
        return cls(layout=layout, device=device, **config_arguments(hf_config, layer_type))

    @overload
    def forward(
        self,
        q: Tensor,
        k: None = None,
        *,
        positions: Tensor | None = None,
        offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        *,
        positions: Tensor | None = None,
        offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """q and k rotated; neither is changed.

        Args:
            q: [B, S, H, D] in the order of `layout`, or [T, H, D]; any float dtype.
            k: as q, with any number of heads; None for query-only layers.
            positions: int32 or int64, [S], [1, S], [B, S] or [T], [1, T]; -1 means no rotation.
                With axes, a leading axis A before these; without it all axes share the positions.
                What could be [A, S] as well as [B, S] is read as [B, S].
            offset: tokens before these, an int, or an int tensor [B] or [N].
            cu_seqlens: int32 or int64 [N + 1], "thd" only: where the packed sequences begin.

        Raises:
            ValueError, TypeError, IndexError: as `fused_rope.rotate_qk`.
        """
        if q.is_nested:
            raise nested_error("RotaryEmbedding")
        if q.shape[-1] != self.head_dim:
            raise ValueError(
                f"RotaryEmbedding: expected q with D={self.head_dim}, got {tuple(q.shape)}"
            )
        rows = None
        if positions is None and cu_seqlens is None and not isinstance(offset, Tensor):
            rows = q.shape[self._sequence_dim] + offset
        where: dict[str, Any] = {
            "positions": positions,
            "offset": offset,
            "cu_seqlens": cu_seqlens,
            "axes": self._axes_of(positions, q),
        }
        if self._needs_rows_of_its_own(q, rows, cu_seqlens):
            self._prepare(None, q.device)
            cos, sin, where["positions"] = self._rows_of_this_call(q, positions, offset, cu_seqlens)
            where.update(offset=0, cu_seqlens=None)
        else:
            self._prepare(rows, q.device)
            cos, sin = self.cos, self.sin
        options: dict[str, Any] = {
            **where,
            "layout": self.layout,
            "rotary_offset": self.rotary_offset,
            "interleaved": self.interleaved,
            "blocks": self.blocks,
            "precision": self.precision,
        }
        if k is None:
            return rotate(q, cos, sin, **options)
        return rotate_qk(q, k, cos, sin, **options)

    def reserve(self, rows: int) -> None:
        """Makes sure that the table has `rows` rows.

        Wanted before what cannot grow it: positions, cu_seqlens or an offset that is a tensor,
        export, and the capture of a CUDA graph.
        """
        self._prepare(rows, self.cos.device)

    def extra_repr(self) -> str:
        parts = [f"{self.head_dim}", f"rotary_dim={self.rotary_dim}", f"rows={self.cos.shape[0]}"]
        parts += [f"base={self.base:g}", f"layout={self.layout!r}"]
        for name, usual in _USUAL.items():
            if getattr(self, name) != usual:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)

    def _check(self) -> None:
        D, R, o = self.head_dim, self.rotary_dim, self.rotary_offset
        if R % 2 or R < 0 or o < 0 or o + R > D:
            raise ValueError(
                "RotaryEmbedding: expected an even rotary_dim R, rotary_offset o >= 0 and "
                f"o + R <= head_dim, got R={R}, o={o}, head_dim={D}"
            )
        if self.blocks < 1 or (R // 2) % self.blocks or (self.blocks > 1 and self.interleaved):
            raise ValueError(
                f"RotaryEmbedding: expected blocks that divide P={R // 2}, and only 1 with "
                f"interleaved, got blocks={self.blocks}, interleaved={self.interleaved}"
            )
        if self.axes is not None and len(self.axes) != R // 2:
            raise ValueError(
                f"RotaryEmbedding: expected axes of P={R // 2} ints, got {len(self.axes)}"
            )
        if self.layout not in ("bshd", "bhsd", "sbhd", "thd"):
            raise ValueError(
                f"RotaryEmbedding: expected layout bshd, bhsd, sbhd or thd, got {self.layout!r}"
            )

    def _prepare(self, rows: int | None, device: torch.device) -> None:
        """Makes the table right for `rows` rows, None where they are unknown, on `device`."""
        stale = device != self.cos.device
        if self._varies and rows is not None and regime(self.scaling, rows) != self._regime:
            self._choose_frequencies(rows)
            stale = True
        here = self.cos.shape[0]
        if rows is not None and rows > here:
            self._build(max(rows, 2 * here), device)
        elif stale:
            self._build(here, device)

    def _needs_rows_of_its_own(
        self, q: Tensor, rows: int | None, cu_seqlens: Tensor | None
    ) -> bool:
        """Whether this call's frequencies are no table's, for `rows`, None where unknown."""
        if not self._varies or q.numel() == 0 or (cu_seqlens is not None and self.layout != "thd"):
            return False
        if rows is None or torch.compiler.is_compiling():
            return True
        return self._stretches and regime(self.scaling, rows) > 0

    def _rows_of_this_call(
        self,
        q: Tensor,
        positions: Tensor | None,
        offset: int | Tensor,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A table of a row for each token (and axis), and the positions that name these rows."""
        positions = _positions(positions, offset, cu_seqlens, q.shape[self._sequence_dim], q.device)
        rows = positions.max() + 1
        inv_freq = varying_frequencies(rows, self._constants, self._trained, self._factor)
        angle = positions.reshape(-1, 1).double() * inv_freq
        numbers = torch.arange(positions.numel(), device=q.device).view(positions.shape)
        return (
            (angle.cos() * self._scale).float(),
            (angle.sin() * self._scale).float(),
            torch.where(positions < 0, positions, numbers),
        )

    def _choose_constants(self) -> None:
        self._stretches = False
        if self._varies:
            assert self.scaling is not None
            lanes = self.rotary_dim // self.blocks
            constants, self._trained, self._factor = varying_constants(
                lanes, self.base, self.scaling
            )
            self._constants = self._host_constants = constants.repeat(1, self.blocks)
            self._stretches = self._factor > 0

    def _choose_frequencies(self, rows: int) -> None:
        lanes = self.rotary_dim // self.blocks
        inv_freq, self._scale = frequencies(lanes, self.base, self.scaling, rows=rows)
        self._inv_freq = inv_freq.repeat(self.blocks)
        self._regime = regime(self.scaling, rows)

    def _build(self, rows: int, device: torch.device | str) -> None:
        self.cos, self.sin = cos_sin_table(
            self._inv_freq, rows, scale=self._scale, dtype=torch.float32, device=device
        )
        if self._varies:
            self._constants = self._host_constants.to(device, non_blocking=True)
        if not torch.compiler.is_compiling():
            # What torch._dynamo.maybe_mark_dynamic does, without the second that its import takes:
            # the table's growths then cost one compilation in all.
            for table in (self.cos, self.sin):
                table._dynamo_weak_dynamic_indices = {0}  # type: ignore[attr-defined]
                table._has_dynamo_dim_marking = True  # type: ignore[attr-defined]

    def _axes_of(self, positions: Tensor | None, q: Tensor) -> tuple[int, ...] | None:
        """The axes to hand on: none where one position serves them all."""
        if self.axes is None or positions is None or positions.dim() < 2:
            return None
        batch = 1 if self._batch_dim is None else q.shape[self._batch_dim]
        one_for_all = positions.dim() == 2 and positions.shape[0] in (1, batch)
        return None if one_for_all else self.axes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """Follows moves, not casts, and builds the table anew: `to_empty` would leave it unset."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        try:
            device = fn(torch.empty(0, device=self.cos.device)).device
        except NotImplementedError:  # out of meta there is nothing to copy: the next call builds it
            return self
        if device != self.cos.device:
            self._build(self.cos.shape[0], device)
        return self


def _positions(
    positions: Tensor | None,
    offset: int | Tensor,
    cu_seqlens: Tensor | None,
    tokens: int,
    device: torch.device,
) -> Tensor:
    """The position of every token as the operator finds it, offset added; -1 for no rotation."""
    for name, given in (("positions", positions), ("offset", offset), ("cu_seqlens", cu_seqlens)):
        if isinstance(given, Tensor) and given.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"RotaryEmbedding: expected {name} of dtype int32 or int64, got {given.dtype}"
            )
    counted = torch.arange(tokens, device=device)
    skipped = None if positions is None else positions == -1
    if cu_seqlens is not None:
        starts = cu_seqlens.long()
        sequence = torch.searchsorted(starts, counted, right=True) - 1
        sequence = sequence.clamp(max=starts.shape[0] - 2)
        padding = counted >= starts[-1]
        skipped = padding if skipped is None else skipped | padding
        counted = counted - starts[sequence]
        offset = offset[sequence] if isinstance(offset, Tensor) else offset
    elif isinstance(offset, Tensor):
        offset = offset[:, None]
    found = (counted if positions is None else positions.long()) + offset
    # A sum that is no row must not look like -1: the operator is to refuse it.
    found = torch.where(found < 0, found.clamp(max=-2), found)
    return found if skipped is None else torch.where(skipped, -1, found)
