"""RotaryEmbedding: a module that owns a table, selects its rows and calls the operators."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from .frequencies import rope_type, whole_number
from .functional import call, nested_error, refuse_scripting
from .hf_config import buffer_order, config_arguments
from .reference import table_rows
from .scaled_frequencies import ScaledFrequencies
from .table import MAX_ROWS
from .table_cache import TableCache
from .tracing import fake_mode_of, is_traced
from .types import Cast, Layout, Precision

__all__ = ["RotaryEmbedding"]

_DEFAULTS = {
    "rotary_offset": 0,
    "scaling": None,
    "interleaved": False,
    "blocks": 1,
    "axes": None,
    "precision": "fp32",
}


_FIXED = ("rotary_dim", "base", "scaling", "blocks")
_MAX_AXES = 8


class RotaryEmbedding(torch.nn.Module):
    """Rotates queries and keys by their positions, with a table of cosines and sines.

    The table is computed in float64 and kept in float32. It is neither a parameter nor a buffer:
    `state_dict()` is empty, and `.to(torch.bfloat16)`, autocast, checkpoints and FSDP do not change
    it. Tables are immutable, and modules with the same frequencies share them. Threads may share a
    module, and so may devices.

    The table of a call depends only on the arguments of the call. If the host knows the rows (no
    positions, no cu_seqlens, an int offset), the call uses max_seq_len rows, or the smallest of 2,
    4, 8, ... times as many that suffices, without synchronizing. Otherwise it uses max_seq_len
    rows; `reserve(rows)` raises that number.

    The frequencies of dynamic and longrope scaling depend on the largest position of the call. If
    only the device knows that position, and for dynamic scaling beyond the trained length, the call
    computes one row per token on the device, in float64, without synchronizing. Any position is
    valid then, and `reserve` is not needed.

    Args:
        head_dim: D.
        rotary_dim: R, even; None for all elements from rotary_offset on.
        rotary_offset: the first rotated element.
        max_seq_len: the minimum number of rows M of a table.
        base: base of the frequencies ("rope_theta").
        scaling: a mapping with "rope_type" and its keys, as in Hugging Face configs; see
            `fused_rope.frequencies.frequencies`.
        layout: "bshd", "bhsd" or "sbhd" for 4-D inputs, "thd" for packed 3-D ones.
        interleaved: pairs are adjacent elements (GPT-J) instead of halves (GPT-NeoX, Llama).
        blocks: pairs are halves of each of this many spans; each span has the frequencies of
            R/blocks elements.
        axes: M-RoPE: the position axis of each of the P pairs; see `fused_rope.mrope_axes`.
        precision: "fp32", or "model" for the roundings of eager Hugging Face.
        device: of `cos` and `sin`; None for the default device. Calls on other devices create and
            keep a copy there.

    Attributes:
        cos: float32 [M, P], the cosines of the longest table that a call has used so far.
        sin: the sines.
        max_seq_len: the minimum number of rows M of a table; `reserve` raises it.

    The other arguments are attributes, too. Those that determine the table (rotary_dim, base,
    scaling, blocks) cannot be changed.

    Raises:
        ValueError: sizes do not match, a number is out of range, the layout, precision or rope_type
            is unknown, or scaling is not what `fused_rope.frequencies.frequencies` reads.
        TypeError: a size or an axis is not an int, base not a number, or scaling not a mapping.

    Example:
        >>> rope = RotaryEmbedding(64, layout="bhsd")
        >>> q, k = torch.randn(2, 8, 100, 64), torch.randn(2, 2, 100, 64)
        >>> q_rotated, k_rotated = rope(q, k)
        >>> q_next, k_next = rope(q[:, :, :1], k[:, :, :1], offset=100)
        >>> weight = torch.ones(64)  # with a norm of each head
        >>> q_rotated, k_rotated = rope(q, k, q_weight=weight, k_weight=weight, eps=1e-6)
    """

    _buffer_order: tuple[int, ...] | None = None

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
        layout: Layout = "bshd",
        interleaved: bool = False,
        blocks: int = 1,
        axes: Sequence[int] | None = None,
        precision: Precision = "fp32",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = _int("head_dim", head_dim)
        self.rotary_offset = _int("rotary_offset", rotary_offset)
        self.rotary_dim = (
            self.head_dim - self.rotary_offset
            if rotary_dim is None
            else _int("rotary_dim", rotary_dim)
        )
        self.base = base
        rope_type({} if scaling is None else scaling)  # refuses what is not a mapping
        # A caller may write to its own mapping, and to the lists in it.
        self.scaling = None if scaling is None else copy.deepcopy(dict(scaling))
        self.layout = layout
        self.interleaved = interleaved
        self.blocks = _int("blocks", blocks)
        self.axes = None if axes is None else _axes(axes)
        self.precision = precision
        max_seq_len = _rows("max_seq_len", max_seq_len)
        self._check()
        frequencies = ScaledFrequencies(self.rotary_dim, base, self.scaling, blocks)
        self._tables = TableCache(frequencies, max_seq_len)
        self._tables.move(torch.get_default_device() if device is None else device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and name in vars(self):
            raise AttributeError(
                f"RotaryEmbedding: {name} determines the table and cannot be changed: make another "
                "module"
            )
        super().__setattr__(name, value)
        if name == "layout":
            self._check_layout()
            self._dims = len(self.layout)
            self._sequence_dim = self.layout.index("t" if self.layout == "thd" else "s")
            self._batch_dim = None if self.layout == "thd" else self.layout.index("b")

    @property
    def max_seq_len(self) -> int:
        return self._tables.min_rows

    @property
    def cos(self) -> Tensor:
        return self._tables.longest(self._tables.device).cos

    @property
    def sin(self) -> Tensor:
        return self._tables.longest(self._tables.device).sin

    @classmethod
    def from_config(
        cls,
        hf_config: Any,
        *,
        layer_type: str | None = None,
        layout: Layout = "bhsd",
        interleaved: bool | None = None,
        max_seq_len: int | None = None,
        device: torch.device | str | None = None,
    ) -> RotaryEmbedding:
        """The embedding that a Hugging Face config of transformers 4.57 or 5 describes.

        Frequencies, attention factor, pairing, rotary_dim and axes are those of the model's own
        code (docs/from_config.md lists the models). If neither the config nor its model_type
        determines one of them, that is an error.

        Args:
            hf_config: a config with rope_parameters, or with rope_theta and rope_scaling, or its
                `to_dict()`. Of a composed config pass the part that rotates, `config.text_config`.
            layer_type: one of the config's layer types, if their rotary parameters differ.
            layout: order of q's and k's dimensions.
            interleaved: pairs are adjacent elements (True) or halves (False); None for the pairing
                of the config's model_type. Required if transformers has no such model_type.
            max_seq_len: the minimum number of rows of a table; None for the smaller of the config's
                max_position_embeddings and 2048. A tensor of larger positions needs
                `reserve(rows)`.
            device: of `cos` and `sin`; None for the default device.

        Returns:
            A RotaryEmbedding.

        Raises:
            ValueError: as the constructor; the config has no rotary parameters, or has several
                models or layer types and none is named; an unknown model_type, rope_type or key of
                the rotary parameters; a rotation that this module does not compute.

        Example:
            >>> from transformers import LlamaConfig
            >>> RotaryEmbedding.from_config(LlamaConfig()).head_dim
            128
        """
        arguments = config_arguments(
            hf_config, layer_type, interleaved=interleaved, max_seq_len=max_seq_len
        )
        try:
            rope = cls(layout=layout, device=device, **arguments)
        except ValueError as error:
            raise ValueError(f"from_config: {type(hf_config).__name__}: {error}") from None
        rope._buffer_order = buffer_order(hf_config)
        return rope

    @overload
    def forward(
        self,
        q: Tensor,
        k: None = None,
        *,
        positions: Tensor | None = None,
        offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        eps: float | None = None,
        zero_centered: bool = False,
        cast: Cast = "never",
        after: bool = False,
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
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        eps: float | None = None,
        zero_centered: bool = False,
        cast: Cast = "never",
        after: bool = False,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        eps: float | None = None,
        zero_centered: bool = False,
        cast: Cast = "never",
        after: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates q and k out of place; with eps, normalizes them too.

        Args:
            q: [B, S, H, D] in the order of `layout`, or [T, H, D]; any float dtype.
            k: as q, with any number of heads; None for query-only layers.
            positions: int32 or int64, [S], [1, S], [B, S] or [T], [1, T]; -1 means no rotation.
                With axes, a leading dimension A before these; without it all axes share the
                positions. A shape that could be [A, S] or [B, S] is read as [B, S].
            offset: the number of tokens before these: an int, or an int32 or int64 tensor [B]
                ([N] with cu_seqlens).
            cu_seqlens: int32 or int64 [N + 1], "thd" only: the start of each packed sequence.
            q_weight, k_weight: [D], the weights of the RMS norm of each head.
            eps: of the norm; None for no norm.
            zero_centered, cast, after: as in `fused_rope.norm_rotate`.

        Returns:
            q and k rotated, or q rotated if k is None.

        Raises:
            ValueError: as `fused_rope.norm_rotate_qk`; a weight or an option of the norm without
                eps, or k_weight without k.
            TypeError, IndexError: as `fused_rope.norm_rotate_qk`.
        """
        if not isinstance(q, Tensor):
            raise TypeError(f"RotaryEmbedding: expected q to be a Tensor, got {type(q).__name__}")
        if q.is_nested:
            raise nested_error("RotaryEmbedding")
        shape = q.shape
        if len(shape) != self._dims or shape[-1] != self.head_dim:
            raise ValueError(
                f"RotaryEmbedding: expected q of {self._dims} dimensions in layout {self.layout} "
                f"with D={self.head_dim}, got {tuple(shape)}"
            )
        rows = None
        # Check for int first: a failing isinstance check against Tensor is slow.
        if (
            (
                type(offset) is int
                or (not isinstance(offset, Tensor) and hasattr(offset, "__index__"))
            )
            and positions is None
            and cu_seqlens is None
        ):
            rows = shape[self._sequence_dim] + offset
        axes = None if self.axes is None else self._axes_of(positions, q)
        pair = self._tables.pair(rows, q)
        if pair is None and (q.numel() == 0 or (cu_seqlens is not None and self.layout != "thd")):
            # The operator returns or raises before it reads the table.
            pair = self._tables.longest(q.device)
            if rows is not None and rows >= shape[self._sequence_dim]:  # a row that exists
                tokens = shape[self._sequence_dim]
                positions = torch.zeros(tokens, dtype=torch.int64, device=q.device)
                offset = 0
        options: tuple[Any, ...] = (
            self.layout,
            axes,
            self.rotary_offset,
            self.interleaved,
            self.blocks,
            False,
            self.precision,
            "half",
        )
        if pair is None:
            if rows is None or (not is_traced(q) and offset < 0):
                self._check_rows(q, positions, offset, cu_seqlens, options)
            with fake_mode_of(q):
                tokens = shape[self._sequence_dim]
                positions = _positions(positions, offset, cu_seqlens, tokens, q.device)
                pair, positions = self._tables.frequencies.per_token_table(positions)
            offset, cu_seqlens = 0, None
        name = "rotate" if k is None else "rotate_qk"
        tensors: tuple[Tensor | None, ...] = (q, *pair) if k is None else (q, k, *pair)
        if eps is not None:
            if k is None and k_weight is not None:
                raise ValueError("RotaryEmbedding: expected k with k_weight, got k=None")
            name = f"norm_{name}"
            tensors += (q_weight,) if k is None else (q_weight, k_weight)
            options += (eps, zero_centered, cast, after)
        elif not (q_weight is k_weight is None and cast == "never") or zero_centered or after:
            flags = {"zero_centered": zero_centered, "after": after, "cast": cast != "never"}
            weights = {"q_weight": q_weight is not None, "k_weight": k_weight is not None}
            given = ", ".join(name for name, is_given in (weights | flags).items() if is_given)
            raise ValueError(f"RotaryEmbedding: expected eps with {given}, got eps=None")
        rotated: Tensor | tuple[Tensor, Tensor]
        try:
            rotated = call(name, tensors, positions, offset, cu_seqlens, options)
        except IndexError as error:
            raise IndexError(f"{error}{self._advice_for_rows(str(error))}") from None
        return rotated

    if TYPE_CHECKING:  # torch types it as Callable[..., Any]

        @overload
        def __call__(
            self,
            q: Tensor,
            k: None = None,
            *,
            positions: Tensor | None = None,
            offset: int | Tensor = 0,
            cu_seqlens: Tensor | None = None,
            q_weight: Tensor | None = None,
            k_weight: Tensor | None = None,
            eps: float | None = None,
            zero_centered: bool = False,
            cast: Cast = "never",
            after: bool = False,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            q: Tensor,
            k: Tensor,
            *,
            positions: Tensor | None = None,
            offset: int | Tensor = 0,
            cu_seqlens: Tensor | None = None,
            q_weight: Tensor | None = None,
            k_weight: Tensor | None = None,
            eps: float | None = None,
            zero_centered: bool = False,
            cast: Cast = "never",
            after: bool = False,
        ) -> tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def reserve(self, rows: int) -> None:
        """Raises max_seq_len to at least `rows`, and builds that table on the module's device.

        Required if positions, cu_seqlens or a tensor offset ask for rows beyond max_seq_len, before
        export, and before a CUDA graph is captured. Recommended before torch.compile: compiled code
        that grows a table builds one for each module.

        Args:
            rows: the number of rows, such as the longest sequence.

        Raises:
            ValueError: rows is negative or above 2^31 + 1. TypeError: it is not an int.

        Example:
            >>> rope = RotaryEmbedding(64)
            >>> rope.reserve(8192)
            >>> q = rope(torch.randn(1, 1, 8, 64), positions=torch.tensor([8191]))
        """
        self._tables.reserve(_rows("rows", rows))

    def extra_repr(self) -> str:
        parts = [
            f"{self.head_dim}",
            f"rotary_dim={self.rotary_dim}",
            f"max_seq_len={self.max_seq_len}",
        ]
        parts += [f"base={self.base:g}", f"layout={self.layout!r}"]
        for name, default in _DEFAULTS.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)

    def _check_rows(
        self,
        q: Tensor,
        positions: Tensor | None,
        offset: int | Tensor,
        cu_seqlens: Tensor | None,
        options: tuple[Any, ...],
    ) -> None:
        """Raises what the operator raises for these arguments, by a call without heads.

        A table with one row per token hides them from the call that rotates.
        """
        no_heads = q.detach().narrow(self.layout.index("h"), 0, 0)
        with fake_mode_of(q):
            row = torch.empty(1, self.rotary_dim // 2, dtype=torch.float32, device=q.device)
        call("rotate", (no_heads, row, row), positions, offset, cu_seqlens, options)

    def _advice_for_rows(self, error: str) -> str:
        """What to do about a position beyond the table."""
        found = re.search(r"M=(\d+)\), got (\d+)", error)
        if found is None or int(found[2]) >= MAX_ROWS:
            return ""
        return (
            f": where tensors give positions, the module's table has max_seq_len={found[1]} rows: "
            f"call reserve({int(found[2]) + 1}) or more, or pass max_seq_len"
        )

    @property
    def _inv_freq(self) -> Tensor:
        """The frequencies of one block, in the order of the model's own buffer."""
        inv_freq = self._tables.frequencies.inv_freq[: self.rotary_dim // 2 // self.blocks]
        return inv_freq if self._buffer_order is None else inv_freq[list(self._buffer_order)]

    def _check(self) -> None:
        D, R, o = self.head_dim, self.rotary_dim, self.rotary_offset
        if R % 2 or R < 0 or o < 0 or o + R > D:
            odd = f"head_dim {D} is odd: pass an even rotary_dim; " if D % 2 and R == D else ""
            raise ValueError(
                f"RotaryEmbedding: {odd}expected an even rotary_dim R, rotary_offset o >= 0 and "
                f"o + R <= head_dim, got R={R}, o={o}, head_dim={D}"
            )
        if self.blocks < 1 or (R // 2) % self.blocks or (self.blocks > 1 and self.interleaved):
            raise ValueError(
                f"RotaryEmbedding: expected blocks that divide P={R // 2}, and only 1 with "
                f"interleaved, got blocks={self.blocks}, interleaved={self.interleaved}"
            )
        if self.axes is not None and len(self.axes) != R // 2:
            raise ValueError(
                f"RotaryEmbedding: expected axes of P={R // 2} ints, got {len(self.axes)} ints"
            )
        if self.axes and not 0 <= min(self.axes) <= max(self.axes) < _MAX_AXES:
            raise ValueError(
                f"RotaryEmbedding: expected axes in [0, {_MAX_AXES}), got {list(self.axes)}"
            )
        if self.precision not in ("fp32", "model"):
            raise ValueError(
                f"RotaryEmbedding: expected precision fp32 or model, got {self.precision!r}"
            )
        self._check_rotary_factor()

    def _check_layout(self) -> None:
        if self.layout not in ("bshd", "bhsd", "sbhd", "thd"):
            raise ValueError(
                f"RotaryEmbedding: expected layout bshd, bhsd, sbhd or thd, got {self.layout!r}"
            )

    def _check_rotary_factor(self) -> None:
        """Raises if a partial_rotary_factor of scaling contradicts rotary_dim."""
        part = (self.scaling or {}).get("partial_rotary_factor")
        if part is None or rope_type(self.scaling or {}) == "proportional":
            return  # proportional scaling reads it
        if not isinstance(part, (int, float)) or not 0 <= part <= 1:
            raise ValueError(
                "RotaryEmbedding: expected partial_rotary_factor of scaling to be a number in "
                f"[0, 1], got {part!r}"
            )
        if self.rotary_dim != int(self.head_dim * part):
            raise ValueError(
                f"RotaryEmbedding: scaling has partial_rotary_factor={part}, but rotary_dim is "
                f"{self.rotary_dim}: pass rotary_dim={int(self.head_dim * part)}"
            )

    def _axes_of(self, positions: Tensor | None, q: Tensor) -> tuple[int, ...] | None:
        """The axes to pass on; None if all of them share their positions."""
        if self.axes is None or positions is None or positions.dim() < 2:
            return None
        batch = 1 if self._batch_dim is None else q.shape[self._batch_dim]
        one_for_all = positions.dim() == 2 and positions.shape[0] in (1, batch)
        return None if one_for_all else self.axes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """Moves the tables; casts do not apply to them."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        try:
            device = fn(torch.empty(0, device=self._tables.device)).device
        except NotImplementedError:  # fn copies, and meta tensors have no data
            return self
        if device != self._tables.device:
            self._tables.move(device)
        return self


def _int(name: str, value: Any) -> int:
    return whole_number("RotaryEmbedding", name, value)


def _axes(axes: Any) -> tuple[int, ...]:
    if not hasattr(axes, "__iter__"):
        got = type(axes).__name__
        raise TypeError(f"RotaryEmbedding: expected axes to be a sequence of ints, got {got}")
    return tuple(_int("each of axes", axis) for axis in axes)


def _rows(name: str, value: Any) -> int:
    rows = _int(name, value)
    if not 0 <= rows <= MAX_ROWS:
        raise ValueError(f"RotaryEmbedding: expected {name} in [0, {MAX_ROWS}], got {rows}")
    return rows


def _positions(
    positions: Tensor | None,
    offset: int | Tensor,
    cu_seqlens: Tensor | None,
    S: int,
    device: torch.device,
) -> Tensor:
    """The row that each token would read, offset added; -1 for no rotation."""
    row, skip = table_rows(
        S,
        positions=_full(positions),
        offset=_full(offset),
        cu_seqlens=_full(cu_seqlens),
        device=device,
    )
    # The operator must refuse a negative row and not take it for -1, no rotation.
    row = torch.where(row < 0, row.clamp(max=-2), row)
    return torch.where(skip, -1, row)


def _full(value: Any) -> Any:
    """A DTensor as one tensor: the frequencies of a token depend on the positions of all."""
    is_distributed = isinstance(value, Tensor) and hasattr(value, "full_tensor")
    return value.full_tensor() if is_distributed else value
