"""The layers that the `kernels` package puts in the place of rotary functions, one for each form.

`kernel_layers` selects one for a model; the package for the Kernels Hub has them too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._patching.style import Pair, Style
from . import adapters

__all__ = [
    "Half",
    "HalfInFloat32",
    "HalfInverse",
    "HalfWidthTables",
    "InterleavedHalfWidthTables",
]


def _layer(style: Style) -> type[torch.nn.Module]:
    adapter = adapters.pair(style)

    class Layer(torch.nn.Module):
        """A layer without state, as the `kernels` package requires."""

        has_backward = True
        can_torch_compile = True

        def forward(
            self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
        ) -> Pair:
            q, k = adapter(q, k, cos, sin, unsqueeze_dim)
            return q, k

    return Layer


Half = _layer(Style())
HalfInFloat32 = _layer(Style(float32=True))
HalfInverse = _layer(Style(inverse=True))
HalfWidthTables = _layer(Style("half"))
InterleavedHalfWidthTables = _layer(Style("half", interleaved=True))
