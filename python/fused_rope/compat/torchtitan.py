"""Drop-ins for torchtitan's rotary functions (torchtitan/models/common/rope.py).

    import fused_rope.compat.torchtitan

    fused_rope.compat.torchtitan.patch()  # before the model is built

or, on torchtitan's command line: --override.imports fused_rope.compat.torchtitan.override

`patch` binds `apply_rotary_emb` in ComplexRoPE and CosSinRoPE, and so in their subclasses and in
vision encoders; caches, positions and their checks remain torchtitan's. Results are those of the
originals: float32, each step rounded, then one rounding to the dtype of q and k. Differences:
inputs are not widened in memory, and of cosines and sines only one of the two copies in a row is
read.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

from torch import Tensor

from .. import functional
from ..types import Precision
from ._bindings import Bindings
from ._tables import real_and_imaginary

__all__ = ["apply_rotary_emb", "override", "patch", "unpatch"]


def apply_rotary_emb(
    query: Tensor,
    key: Tensor,
    rope_cache: Tensor,
    positions: Tensor | None = None,
    *,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor]:
    """Rotates query and key by complex numbers or by cosines and sines.

    This is the static method of torchtitan 0.3 and, with positions, the function of the model files
    of torchtitan 0.1 and 0.2.

    Args:
        query, key: [T, Hq, D] and [T, Hk, D], or [B, S, Hq, D] and [B, S, Hk, D].
        rope_cache: per token, [T, 1, W] or [B or 1, S, 1, W], or shared by all sequences, [M, W].
            Complex of W = D/2 columns, for pairs of adjacent elements; or real of W = 2*D columns,
            cosines and then sines, each twice, for pairs of halves.
        positions: the row of a shared cache that each token reads, int32 or int64, [S], [1, S] or
            [B, S]; None for token i to read row i.
        precision: "model" to round cosines, sines, products and sums to query's dtype, as
            torchtitan 0.2 does with real caches.

    Returns:
        query and key rotated, of their shapes and dtype.

    Raises:
        ValueError: shapes do not match.
        TypeError: an unsupported dtype.
        IndexError: the cache lacks the row of a position (on CUDA a device-side assertion).

    Example:
        >>> query, key = torch.randn(9, 4, 64), torch.randn(9, 2, 64)
        >>> angle = torch.arange(9.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> query, key = apply_rotary_emb(query, key, torch.polar(torch.ones_like(angle), angle))
    """
    name = "apply_rotary_emb"
    cos, sin = (
        real_and_imaginary(name, "rope_cache", rope_cache)
        if rope_cache.is_complex()
        else _halves(name, rope_cache, query.shape[-1])
    )
    if cos.dim() > 2:
        if cos.dim() != query.dim() or cos.shape[-2] != 1:
            raise ValueError(
                f"{name}: expected rope_cache of [M, W], [T, 1, W] or [B or 1, S, 1, W], got "
                f"{list(rope_cache.shape)} for query {list(query.shape)}"
            )
        cos, sin = cos.squeeze(-2), sin.squeeze(-2)
    return functional.rotate_qk(
        query,
        key,
        cos,
        sin,
        layout="thd" if query.dim() == 3 else "bshd",
        table_layout="half" if rope_cache.is_complex() else "tiled",
        positions=positions,
        interleaved=rope_cache.is_complex(),
        precision=precision,
    )


def _halves(operator: str, rope_cache: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """Views of the cosines and sines of a real cache."""
    if rope_cache.shape[-1] != 2 * D:
        raise ValueError(
            f"{operator}: expected a complex rope_cache, or a real one of 2*D={2 * D} columns, got "
            f"{list(rope_cache.shape)}"
        )
    cos, sin = rope_cache.split(D, -1)
    return cos, sin


_bindings = Bindings()
_static = staticmethod(apply_rotary_emb)


def patch() -> list[str]:
    """Binds `apply_rotary_emb` in torchtitan's rotary modules, for every model of the process.

    Call it before the model is built: vision encoders keep the function that they were built with.
    A second call changes nothing. torchtitan 0.1 and 0.2 define a function in each model file:
    assign `apply_rotary_emb` to it.

    Returns:
        The names that are bound now.

    Raises:
        ImportError: torchtitan 0.3 or later is not installed.
    """
    rope = import_module("torchtitan.models.common.rope")
    ours = {"apply_rotary_emb": _static}
    return _bindings.bind({rope.ComplexRoPE: ours, rope.CosSinRoPE: ours})


def unpatch() -> None:
    """Restores what `patch` replaced, in modules and in models that are built from then on.

    What other code has replaced since stays.
    """
    _bindings.restore()


def override(config: Any) -> Any:
    """Calls `patch`: an override, which torchtitan calls between the config and the model.

    Args:
        config: that of a rotary module, which is returned unchanged.

    Raises:
        ImportError: torchtitan 0.3 or later is not installed.
    """
    patch()
    return config


with suppress(ImportError, AttributeError):  # no torchtitan, or one without overrides
    _rope = import_module("torchtitan.models.common.rope")
    _register = import_module("torchtitan.config").override
    _register(target=_rope.RoPE.Config, description="fused-rope's operator")(override)
