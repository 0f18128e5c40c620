"""Drop-ins for torchtune's rotary modules.

    from fused_rope.compat.torchtune import RotaryPositionalEmbeddings  # was torchtune.modules

The arguments and results are the same, up to the originals' float32 angles. What differs: the table
is float64 before it is rounded, no cast of the model touches it, and it grows where the host knows
the rows.

Letters: B batch, S sequence length, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import embedding

__all__ = [
    "Llama3ScaledRoPE",
    "Phi3RotaryPositionalEmbeddings",
    "Qwen2RotaryPositionalEmbeddings",
    "RotaryPositionalEmbeddings",
    "VisionRotaryPositionalEmbeddings",
]


class _Module(torch.nn.Module):
    """What all of them share: the embedding that has the table."""

    def __init__(self, dim: int, max_seq_len: int, base: float, **options: Any) -> None:
        super().__init__()
        self.dim = dim
        self.max_seq_len = max_seq_len
        self.base = base
        self.rope = embedding.RotaryEmbedding(dim, max_seq_len=max_seq_len, base=base, **options)

    def rope_init(self) -> None:
        """Makes the table on the default device, as recipes want it after meta initialization."""
        self.rope._tables.move(torch.get_default_device())


class RotaryPositionalEmbeddings(_Module):
    """Rotates neighboring elements of x [B, S, H, D].

    Args:
        dim: D.
        max_seq_len: rows of the table to begin with.
        base: base of the frequencies.

    Example:
        >>> rope = RotaryPositionalEmbeddings(64, max_seq_len=128)
        >>> x = rope(torch.randn(2, 100, 4, 64), input_pos=torch.arange(100)[None])
    """

    def __init__(self, dim: int, max_seq_len: int = 4096, base: int = 10_000) -> None:
        super().__init__(dim, max_seq_len, base, interleaved=True)

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """x rotated.

        Args:
            x: [B, S, H, D].
            input_pos: the position of each token, int32 or int64, [S], [1, S] or [B, S], below
                max_seq_len; None for 0 to S - 1.

        Raises:
            ValueError: shapes that do not fit.
            IndexError: a position that is no row (on CUDA a device-side assertion).
        """
        rotated: Tensor = self.rope(x, positions=input_pos)
        return rotated.contiguous()


class Llama3ScaledRoPE(_Module):
    """`RotaryPositionalEmbeddings` with Llama 3.1's scaling (torchtune.models.llama3_1).

    Args:
        dim, max_seq_len, base: as there.
        scale_factor: how much the long waves are stretched.
        low_freq_factor, high_freq_factor: waves longer than old_context_len / low_freq_factor are
            stretched, those shorter than old_context_len / high_freq_factor are not.
        old_context_len: tokens that the model was trained on first.

    Example:
        >>> x = Llama3ScaledRoPE(64, max_seq_len=128, base=500_000)(torch.randn(2, 100, 4, 64))
    """

    def __init__(
        self,
        dim: int,
        max_seq_len: int = 4096,
        base: int = 10_000,
        scale_factor: int = 8,
        low_freq_factor: int = 1,
        high_freq_factor: int = 4,
        old_context_len: int = 8192,
    ) -> None:
        scaling = {
            "rope_type": "llama3",
            "factor": scale_factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": old_context_len,
        }
        super().__init__(dim, max_seq_len, base, scaling=scaling, interleaved=True)

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """x [B, S, H, D] rotated; see `RotaryPositionalEmbeddings.forward`."""
        rotated: Tensor = self.rope(x, positions=input_pos)
        return rotated.contiguous()


class Phi3RotaryPositionalEmbeddings(_Module):
    """Pairs halves instead of neighbors (torchtune.models.phi3); arguments as above.

    Example:
        >>> x = Phi3RotaryPositionalEmbeddings(64, max_seq_len=128)(torch.randn(2, 100, 4, 64))
    """

    def __init__(self, dim: int, max_seq_len: int = 4096, base: int = 10_000) -> None:
        super().__init__(dim, max_seq_len, base)

    def forward(self, x: Tensor, input_pos: Tensor | None = None) -> Tensor:
        """x [B, S, H, D] rotated; see `RotaryPositionalEmbeddings.forward`."""
        rotated: Tensor = self.rope(x, positions=input_pos)
        return rotated


class Qwen2RotaryPositionalEmbeddings(_Module):
    """As Phi-3's, and rounds where the original does, in x's dtype (torchtune.models.qwen2).

    Example:
        >>> x = Qwen2RotaryPositionalEmbeddings(64, max_seq_len=128)(torch.randn(2, 100, 4, 64))
    """

    def __init__(self, dim: int, max_seq_len: int = 4096, base: float = 1_000_000.0) -> None:
        super().__init__(dim, max_seq_len, base, precision="model")

    def forward(self, x: Tensor, input_pos: Tensor | None = None) -> Tensor:
        """x [B, S, H, D] rotated; see `RotaryPositionalEmbeddings.forward`."""
        rotated: Tensor = self.rope(x, positions=input_pos)
        return rotated


class VisionRotaryPositionalEmbeddings(_Module):
    """Rotates the patches of image tiles by their column and row, counted from 1.

    The first half of the pairs follows the column, the second the row; the class token is copied.

    Args:
        patch_size, tile_size: a tile has (tile_size // patch_size)**2 patches.
        dim: D, a multiple of 4; with max_num_tiles D/2.
        base: base of the frequencies.
        append_cls_token: whether the class token is the last of its tile, not the first.
        max_num_tiles: has no other effect; torchtune 0.6 has it, and means D/2 by dim.

    Example:
        >>> rope = VisionRotaryPositionalEmbeddings(patch_size=10, tile_size=30, dim=32)
        >>> x = rope(torch.randn(2, 4 * (9 + 1), 4, 32))  # 4 tiles
    """

    positions: Tensor

    def __init__(
        self,
        patch_size: int,
        tile_size: int,
        dim: int,
        base: int = 10_000,
        append_cls_token: bool = True,
        *,
        max_num_tiles: int | None = None,
    ) -> None:
        grid = tile_size // patch_size
        D = dim if max_num_tiles is None else 2 * dim
        super().__init__(
            D,
            grid + 1,
            base,
            scaling={"rope_type": "axial"},
            interleaved=True,
            axes=(0,) * (D // 4) + (1,) * (D // 4),
        )
        self.patch_grid_size = grid
        self.seq_len = grid**2 + 1
        self.append_cls_token = append_cls_token
        self.rope_init()

    def rope_init(self) -> None:
        """Makes table and positions on the default device."""
        super().rope_init()
        self._make_positions(torch.get_default_device())

    @torch.inference_mode(False)
    def _make_positions(self, device: torch.device) -> None:
        count = torch.arange(1, self.patch_grid_size + 1, device=device)
        patches = torch.stack(torch.meshgrid(count, count, indexing="xy")).flatten(1)
        cls_token = patches.new_full((2, 1), -1)
        tile = [patches, cls_token] if self.append_cls_token else [cls_token, patches]
        self.register_buffer("positions", torch.cat(tile, 1)[:, None], persistent=False)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> VisionRotaryPositionalEmbeddings:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # `to_empty` leaves the memory of buffers uninitialized.
        self._make_positions(self.positions.device)
        return self

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """x rotated.

        Args:
            x: [B, S, H, D], S a multiple of the tokens of a tile.
            kwargs: have no effect, as in the original.

        Raises:
            ValueError: shapes that do not fit.
        """
        tiles = x.shape[1] // self.seq_len
        rotated: Tensor = self.rope(x, positions=self.positions.repeat(1, 1, tiles))
        return rotated.contiguous()
