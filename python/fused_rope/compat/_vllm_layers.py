"""The methods that replace those of vLLM's rotary embeddings; see `vllm.register`.

Each class is mixed in before a class of vLLM, whose constructor, tables and `forward_native` stay.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor

from .. import functional
from ..frequencies import mrope_axes
from ..types import Layout, Precision
from ._tables import real_and_imaginary, split_heads
from .vllm import rotary_embedding

_Rotated = tuple[Tensor, Tensor | None]


class Layer:
    """What all of them share: when vLLM calls `forward_cuda`."""

    name: ClassVar[str]
    precision: ClassVar[Precision]

    @classmethod
    def enabled(cls) -> bool:
        """On unless `custom_ops` has "-" and the name; vLLM's own default is off with Inductor."""
        config = import_module("vllm.config").get_cached_compilation_config()
        return f"-{cls.name}" not in config.custom_ops

    def forward_cpu(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_cuda(*args, **kwargs)

    def forward_cuda(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class Rotation(Layer):
    """Queries and keys by one position for each token, in place."""

    head_size: int
    rotary_dim: int
    is_neox_style: bool
    cos_sin_cache: Tensor

    def forward_cuda(
        self,
        positions: Tensor,
        query: Tensor,
        key: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> _Rotated:
        rotary_embedding(
            positions if offsets is None else positions + offsets,
            query,
            key,
            self.head_size,
            self.cos_sin_cache,
            self.is_neox_style,
            precision=self.precision,
        )
        return query, key


class LastElements(Rotation):
    """The last elements of each head, whose size is query's own (DeepSeek V4).

    Its table is float32, so that vLLM's own path rounds once, too.
    """

    def forward_cuda(
        self,
        positions: Tensor,
        query: Tensor,
        key: Tensor | None = None,
        offsets: Tensor | None = None,
        inverse: bool = False,
    ) -> _Rotated:
        D = query.shape[-1]
        rotary_embedding(
            positions if offsets is None else positions + offsets,
            query,
            key,
            D,
            self.cos_sin_cache,
            self.is_neox_style,
            D - self.rotary_dim,
            inverse,
        )
        return query, key


class MRope(Rotation):
    """Queries and keys by one position [T] for each token, or one [A, T] for each axis."""

    mrope_section: list[int] | None
    mrope_interleaved: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._axes = self._position_axes() if self.mrope_section else None

    def _position_axes(self) -> tuple[int, ...]:
        assert self.mrope_section is not None
        return mrope_axes(self.mrope_section, self.mrope_interleaved)

    def forward_cuda(
        self,
        positions: Tensor,
        query: Tensor,
        key: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> _Rotated:
        if offsets is not None:
            positions = positions + offsets
        if positions.dim() == 1:
            return super().forward_cuda(positions, query, key)
        cos, sin = self.cos_sin_cache.chunk(2, -1)
        options: dict[str, Any] = {
            "layout": "thd",
            "positions": positions,
            "axes": self._axes,
            "interleaved": not self.is_neox_style,
            "precision": self.precision,
        }
        name, tokens = type(self).__name__, positions.shape[1:]
        q = split_heads(name, "query", query, tokens, self.head_size)
        if key is None:
            functional.rotate_(q, cos, sin, **options)
        else:
            k = split_heads(name, "key", key, tokens, self.head_size)
            functional.rotate_qk_(q, k, cos, sin, **options)
        return query, key


class SpatialFirst(MRope):
    """Height and width alternate, then time follows (Ernie 4.5 VL, Bailing)."""

    def _position_axes(self) -> tuple[int, ...]:
        assert self.mrope_section is not None
        # Sections are (height, width, time) in one and (time, height, width) in the other.
        P = self.rotary_dim // 2
        spatial = getattr(self, "spatial_size", P - self.mrope_section[-1])
        return tuple(1 + j % 2 if j < spatial else 0 for j in range(P))


class ListedAxes(MRope):
    """An axis for each pair that the constructor lists (openPangu)."""

    mrope_dim: list[int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._enabled = self.enabled()

    def _position_axes(self) -> tuple[int, ...]:
        return tuple(self.mrope_dim[: self.rotary_dim // 2])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's class has no `forward_native` of its own, only this."""
        if self._enabled:
            return self.forward_cuda(*args, **kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class VisionRotation(Layer):
    """Image patches [B, S, H, D] by a complex table, not in place (Llama 4)."""

    cos_sin_cache: Tensor

    def forward_cuda(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = real_and_imaginary(type(self).__name__, "cos_sin_cache", self.cos_sin_cache)
        return functional.rotate_qk(
            query, key, cos.flatten(0, -2), sin.flatten(0, -2), interleaved=True
        )


class CallerTables(Layer):
    """x [S, H, D] or [B, S, H, D] by tables of the caller, not in place (vision encoders)."""

    is_neox_style: bool
    enable_fp32_compute: bool

    def forward_cuda(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        layout: Layout = "thd" if x.dim() == 3 else "bshd"
        return functional.rotate(
            x,
            cos,
            sin,
            layout=layout,
            interleaved=not self.is_neox_style,
            precision="fp32" if self.enable_fp32_compute else self.precision,
        )


# Every rotary embedding of vLLM's registry, but for those that change more than a rotation:
# DualChunkRotaryEmbedding (five queries), FourierRotaryEmbedding (its tables are weights).
LAYERS: dict[str, type[Layer]] = {
    "RotaryEmbedding": Rotation,
    "LinearScalingRotaryEmbedding": Rotation,
    "NTKScalingRotaryEmbedding": Rotation,
    "DynamicNTKScalingRotaryEmbedding": Rotation,
    "DynamicNTKAlphaRotaryEmbedding": Rotation,
    "YaRNScalingRotaryEmbedding": Rotation,
    "Llama3RotaryEmbedding": Rotation,
    "Gemma4RotaryEmbedding": Rotation,
    "DeepseekScalingRotaryEmbedding": Rotation,
    "DeepseekV4ScalingRotaryEmbedding": LastElements,
    "MRotaryEmbedding": MRope,
    "MRotaryEmbeddingInterleaved": ListedAxes,
    "BailingMRotaryEmbedding": SpatialFirst,
    "Ernie4_5_VLRotaryEmbedding": SpatialFirst,
    "Llama4VisionRotaryEmbedding": VisionRotation,
    "ApplyRotaryEmb": CallerTables,
}
