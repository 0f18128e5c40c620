"""transformers' own way to other kernels, `use_kernels=True`, with ours from a local repository.

    model.set_use_kernels(True, kernel_config(model))                     # on CUDA, ROCm, XPU

    with kernels.use_kernel_mapping(kernel_mapping(model), inherit_mapping=False):
        kernels.kernelize(model, mode=mode)                               # on the CPU too

It reaches the functions that transformers has marked "rotary_pos_emb", as `patch` does those of all
families. Both name a layer by the form of the model's function, told as `patch` tells it: under
that one mark transformers has functions of several forms.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import shims
from .forms import find_form
from .patching import modules_of, rotary_functions
from .shims import Pair, Style

__all__ = ["REPOSITORY", "kernel_config", "kernel_mapping", "layer_name"]

REPOSITORY = Path(__file__).parent / "kernel_repository"
_MARK = "rotary_pos_emb"
_DEVICES = ("cpu", "cuda", "rocm", "xpu")


def _layer(style: Style) -> type[torch.nn.Module]:
    shim = shims.pair(style)

    class Layer(torch.nn.Module):
        """Stateless, as `kernels` wants its layers."""

        has_backward = True
        can_torch_compile = True

        def forward(
            self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
        ) -> Pair:
            q, k = shim(q, k, cos, sin, unsqueeze_dim)
            return q, k

    return Layer


Half = _layer(Style())
HalfInFloat32 = _layer(Style(float32=True))
HalfInverse = _layer(Style(inverse=True))
HalfWidthTables = _layer(Style("half"))
InterleavedHalfWidthTables = _layer(Style("half", interleaved=True))

_LAYERS = {
    "half": "Half",
    "half, in float32": "HalfInFloat32",
    "half, inverse": "HalfInverse",
    "half, half-width tables": "HalfWidthTables",
    "interleaved, half-width tables": "InterleavedHalfWidthTables",
}


def layer_name(model: torch.nn.Module) -> str:
    """Which layer of the repository rotates as the model does.

    Raises:
        ValueError: the model has no function that transformers has marked, or such of several forms
            or of one without a layer: use `patch`.
    """
    forms = set()
    for site in rotary_functions(modules_of(model)):
        if getattr(site.function, "kernel_layer_name", None) == _MARK:
            found = find_form(site.name, site.function)
            forms.add(found if isinstance(found, str) else found[0].name)
    if len(forms) != 1 or not forms <= _LAYERS.keys():
        raise ValueError(
            f"layer_name: expected functions marked {_MARK!r} of one known form, got "
            f"{sorted(forms)}"
        )
    return _LAYERS[forms.pop()]


def kernel_config(model: torch.nn.Module) -> Any:
    """A KernelConfig for `model.set_use_kernels(True, ...)`, on every device but the CPU.

    Raises:
        ValueError: as `layer_name`.
    """
    mapping = {_MARK: f"{REPOSITORY}:{layer_name(model)}"}
    return import_module("transformers").KernelConfig(mapping, use_local_kernel=True)


def kernel_mapping(model: torch.nn.Module) -> dict[str, Any]:
    """For `kernels.use_kernel_mapping` and `kernels.register_kernel_mapping`, on any device.

    Raises:
        ValueError: as `layer_name`.
    """
    local = import_module("kernels").LocalLayerRepository
    repository = local(REPOSITORY, layer_name=layer_name(model))
    return {_MARK: dict.fromkeys(_DEVICES, repository)}
