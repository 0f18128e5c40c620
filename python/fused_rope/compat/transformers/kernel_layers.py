"""Layers for `use_kernels=True` of transformers, in a local kernel repository.

    model.set_use_kernels(True, kernel_config(model))  # on CUDA, ROCm, XPU

    with kernels.use_kernel_mapping(kernel_mapping(model), inherit_mapping=False):
        kernels.kernelize(model, mode=mode)  # also on the CPU

This replaces only functions that transformers marks "rotary_pos_emb"; `patch` replaces those of all
families. Functions of several forms have that mark, so the layer is selected by the form, which is
found as `patch` finds it.
"""

from __future__ import annotations

from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from .forms import find_form
from .patching import check_model, modules_of, rotary_functions

__all__ = ["REPOSITORY", "kernel_config", "kernel_mapping", "layer_name"]

REPOSITORY = Path(__file__).parent / "kernel_repository"
_MARK = "rotary_pos_emb"
_DEVICES = ("cpu", "cuda", "rocm", "xpu")


_LAYERS = {
    "half": "Half",
    "half, in float32": "HalfInFloat32",
    "half, inverse": "HalfInverse",
    "half, half-width tables": "HalfWidthTables",
    "interleaved, half-width tables": "InterleavedHalfWidthTables",
}


def layer_name(model: torch.nn.Module) -> str:
    """The name of the repository's layer for a model.

    Args:
        model: a model of transformers, which marks functions only if `kernels` is installed.

    Raises:
        TypeError: the model is a name, a config or a class.
        ValueError: the model has no marked function, or marked functions of several forms or of a
            form without a layer: use `patch`. Functions have no mark if transformers does not
            accept the installed version of `kernels`; the message says so.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> sizes = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
        >>> layer_name(LlamaModel(LlamaConfig(vocab_size=32, **sizes)))
        'Half'
    """
    check_model("layer_name", model)
    forms = set()
    for site in rotary_functions(modules_of(model)):
        if getattr(site.function, "kernel_layer_name", None) == _MARK:
            found = find_form(site.name, site.function)
            forms.add(found if isinstance(found, str) else found[0].name)
    if not forms and (refused := _refused_kernels()):
        raise ValueError(f"layer_name: {refused}, or use patch instead")
    if len(forms) != 1 or not forms <= _LAYERS.keys():
        raise ValueError(
            f"layer_name: expected functions marked {_MARK!r} of one form that has a layer, got "
            f"{sorted(forms)}: use patch instead"
        )
    return _LAYERS[forms.pop()]


def _refused_kernels() -> str | None:
    """Why transformers does not use the `kernels` package, and what to install."""
    theirs = import_module("transformers.utils.import_utils")
    if theirs.is_kernels_available():
        return None
    low, high = (getattr(theirs, f"KERNELS_{end}_VERSION", None) for end in ("MIN", "MAX"))
    accepted = f"kernels>={low}" + (f",<{high}" if high else "")
    try:
        got = f"got kernels {metadata.version('kernels')}"
    except metadata.PackageNotFoundError:
        got = "and none is installed"
    version = metadata.version("transformers")
    return f"transformers {version} expects {accepted}, {got}: pip install '{accepted}'"


def kernel_config(model: torch.nn.Module) -> Any:
    """A KernelConfig for `model.set_use_kernels(True, ...)`, on all devices except the CPU.

    Args:
        model: as in `layer_name`.

    Raises:
        ValueError: as `layer_name`.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> sizes = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
        >>> model = LlamaModel(LlamaConfig(vocab_size=32, **sizes))
        >>> config = kernel_config(model)  # on CUDA: model.set_use_kernels(True, config)
    """
    mapping = {_MARK: f"{REPOSITORY}:{layer_name(model)}"}
    return import_module("transformers").KernelConfig(mapping, use_local_kernel=True)


def kernel_mapping(model: torch.nn.Module) -> dict[str, Any]:
    """A mapping for `kernels.use_kernel_mapping` and `kernels.register_kernel_mapping`.

    Args:
        model: as in `layer_name`.

    Raises:
        ValueError: as `layer_name`.

    Example:
        >>> import kernels
        >>> from transformers import LlamaConfig, LlamaModel
        >>> sizes = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
        >>> model = LlamaModel(LlamaConfig(vocab_size=32, **sizes))
        >>> with kernels.use_kernel_mapping(kernel_mapping(model), inherit_mapping=False):
        ...     model = kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    """
    local = import_module("kernels").LocalLayerRepository
    repository = local(REPOSITORY, layer_name=layer_name(model))
    return {_MARK: dict.fromkeys(_DEVICES, repository)}
