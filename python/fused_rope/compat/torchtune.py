"""Drop-ins for torchtune's rotary modules.

    from fused_rope.compat.torchtune import RotaryPositionalEmbeddings  # was torchtune.modules

The arguments and results are the same, up to the originals' float32 angles. Differences: angles are
float64, casts of the model do not change the table, and it grows if the host knows the rows. An
original angle near 4096 radians may be off by 3e-4, and so are its cosine and sine: torchtune's own
tests compare sums of results that have this error, to 5 digits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import embedding
from ..functional import nested_error
from ..table import DeviceCopies
from ..tracing import fake_mode_of, is_traced, outside_modes

__all__ = [
    "Llama3ScaledRoPE",
    "Phi3RotaryPositionalEmbeddings",
    "Qwen2RotaryPositionalEmbeddings",
    "RotaryPositionalEmbeddings",
    "VisionRotaryPositionalEmbeddings",
]


class _Module(torch.nn.Module):
    """The base of all modules: it holds the `fused_rope.RotaryEmbedding`."""

    def __init__(self, dim: int, max_seq_len: int, base: float, **options: Any) -> None:
        super().__init__()
        self.dim = dim
        self.max_seq_len = max_seq_len
        self.base = base
        self.rope = embedding.RotaryEmbedding(dim, max_seq_len=max_seq_len, base=base, **options)

    def rope_init(self) -> None:
        """Makes the table on the default device; recipes call this after meta initialization."""
        self.rope._tables.move(torch.get_default_device())


class _TextModule(_Module):
    @property
    def cache(self) -> Tensor:
        """Cosines and sines [M, P, 2] of the longest table so far, as the originals' buffer."""
        return torch.stack([self.rope.cos, self.rope.sin], -1)


class RotaryPositionalEmbeddings(_TextModule):
    """Rotates pairs of adjacent elements of x [B, S, H, D].

    Args:
        dim: D.
        max_seq_len: the minimum number of rows of the table.
        base: base of the frequencies.

    Raises:
        ValueError: dim is odd.

    Example:
        >>> rope = RotaryPositionalEmbeddings(64, max_seq_len=128)
        >>> x = rope(torch.randn(2, 100, 4, 64), input_pos=torch.arange(100)[None])
    """

    def __init__(self, dim: int, max_seq_len: int = 4096, base: int = 10_000) -> None:
        super().__init__(dim, max_seq_len, base, interleaved=True)

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """Rotates x out of place.

        Args:
            x: [B, S, H, D]; any float dtype.
            input_pos: the position of each token, int32 or int64, [S], [1, S] or [B, S], below
                max_seq_len; None for 0 to S - 1.

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            ValueError: shapes do not match.
            TypeError: an unsupported dtype.
            IndexError: the table lacks the row of a position (on CUDA a device-side assertion).
        """
        rotated: Tensor = self.rope(x, positions=input_pos)
        return rotated.contiguous()


class Llama3ScaledRoPE(_TextModule):
    """`RotaryPositionalEmbeddings` with Llama 3.1's scaling (torchtune.models.llama3_1).

    Args:
        dim, max_seq_len, base: as in `RotaryPositionalEmbeddings`.
        scale_factor: factor of the wavelengths that are stretched.
        low_freq_factor, high_freq_factor: wavelengths above old_context_len / low_freq_factor are
            stretched, those below old_context_len / high_freq_factor are not.
        old_context_len: the context length before the scaling.

    Raises:
        ValueError: dim is odd.

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
        """Rotates x [B, S, H, D]; see `RotaryPositionalEmbeddings.forward`."""
        rotated: Tensor = self.rope(x, positions=input_pos)
        return rotated.contiguous()


class Phi3RotaryPositionalEmbeddings(_TextModule):
    """`RotaryPositionalEmbeddings` with pairs of halves (torchtune.models.phi3).

    Args:
        dim, max_seq_len, base: as in `RotaryPositionalEmbeddings`.

    Raises:
        ValueError: dim is odd.

    Example:
        >>> x = Phi3RotaryPositionalEmbeddings(64, max_seq_len=128)(torch.randn(2, 100, 4, 64))
    """

    def __init__(self, dim: int, max_seq_len: int = 4096, base: int = 10_000) -> None:
        super().__init__(dim, max_seq_len, base)

    def forward(self, x: Tensor, input_pos: Tensor | None = None) -> Tensor:
        """Rotates x [B, S, H, D]; see `RotaryPositionalEmbeddings.forward`."""
        rotated: Tensor = self.rope(x, positions=input_pos)
        return rotated


class Qwen2RotaryPositionalEmbeddings(_TextModule):
    """`Phi3RotaryPositionalEmbeddings` with precision "model" (torchtune.models.qwen2).

    Args:
        dim, max_seq_len, base: as in `RotaryPositionalEmbeddings`.

    Raises:
        ValueError: dim is odd.

    Example:
        >>> x = Qwen2RotaryPositionalEmbeddings(64, max_seq_len=128)(torch.randn(2, 100, 4, 64))
    """

    def __init__(self, dim: int, max_seq_len: int = 4096, base: float = 1_000_000.0) -> None:
        super().__init__(dim, max_seq_len, base, precision="model")

    def forward(self, x: Tensor, input_pos: Tensor | None = None) -> Tensor:
        """Rotates x [B, S, H, D]; see `RotaryPositionalEmbeddings.forward`."""
        rotated: Tensor = self.rope(x, positions=input_pos)
        return rotated


class VisionRotaryPositionalEmbeddings(_Module):
    """Rotates the patches of image tiles by their column and row, which count from 1.

    The first half of the pairs reads the column, the second the row; the class token is copied.

    Args:
        patch_size, tile_size: a tile has (tile_size // patch_size)**2 patches.
        dim: D, a multiple of 4; with max_num_tiles D/2.
        base: base of the frequencies.
        append_cls_token: whether the class token is the last of its tile, not the first.
        max_num_tiles: as in torchtune 0.6, where dim is D/2; its value has no effect.

    Raises:
        ValueError: D is not a multiple of 4.

    Example:
        >>> rope = VisionRotaryPositionalEmbeddings(patch_size=10, tile_size=30, dim=32)
        >>> x = rope(torch.randn(2, 4 * (9 + 1), 4, 32))  # 4 tiles
    """

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
        with outside_modes():
            self._positions = DeviceCopies(self._tile_positions(torch.device("cpu")))

    def _tile_positions(self, device: torch.device) -> Tensor:
        """[2, 1, tokens of a tile]."""
        count = torch.arange(1, self.patch_grid_size + 1, device=device)
        patches = torch.stack(torch.meshgrid(count, count, indexing="xy")).flatten(1)
        cls_token = patches.new_full((2, 1), -1)
        tile = [patches, cls_token] if self.append_cls_token else [cls_token, patches]
        return torch.cat(tile, 1)[:, None]

    def _tile_positions_with(self, x: Tensor) -> Tensor:
        """The positions on x's device, and in its fake mode."""
        if not is_traced(x):
            return self._positions.on(x.device)[0]
        with fake_mode_of(x):
            return self._tile_positions(x.device)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Rotates x out of place.

        Args:
            x: [B, S, H, D], S a multiple of the tokens of a tile; any float dtype.
            kwargs: no effect, as in the original.

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            ValueError: shapes do not match.
            TypeError: an unsupported dtype.
        """
        if x.is_nested:
            raise nested_error("RotaryEmbedding")
        if x.dim() != 4:
            raise ValueError(f"RotaryEmbedding: expected x of [B, S, H, D], got {list(x.shape)}")
        tiles = x.shape[1] // self.seq_len
        positions = self._tile_positions_with(x).repeat(1, 1, tiles)
        rotated: Tensor = self.rope(x, positions=positions)
        return rotated.contiguous()
