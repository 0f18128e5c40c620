"""What the library was built for, what this machine has, and whether the two agree."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch
from torch import Tensor

from . import _build, functional, reference
from .frequencies import inv_freq

__all__ = ["build_info", "self_check"]

_FORMS = ("rotate", "rotate_", "rotate_qk", "rotate_qk_", "rotate_out", "rotate_qk_out")
_OPERATORS = (*_FORMS, *(f"norm_{form}" for form in _FORMS), "norm_rotate_qk_backward")


def build_info() -> dict[str, Any]:
    """What the library was built for, and what runs it. `python -m fused_rope` prints it.

    Returns:
        A dict of str, int, lists and None, with these keys.

            ===================  ===============================================================
            version              of fused_rope
            python, platform     that run it
            torch_built          the torch version that the library was built against
            torch                the torch version that runs it
            cuda_built           the CUDA toolkit of the kernels, or None without kernels
            cuda                 the CUDA version of the running torch, or None
            cuda_architectures   compiled into the library: "90-real" is machine code for compute
                                 capability 9.0, "120-virtual" is PTX for 12.0 and later
            cuda_devices         name, capability and kernels ("machine code", "PTX" or "none") of
                                 each visible GPU
            kernels              the devices with kernels: "CPU", "CUDA"
            cpu_capability       the CPU's instruction set that the kernel uses
            threads              of the CPU kernel
            ===================  ===============================================================

    Example:
        >>> build_info()["kernels"][0]
        'CPU'
    """
    return {
        "version": _build.VERSION,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "torch_built": _build.TORCH_VERSION,
        "torch": str(torch.__version__),
        "cuda_built": _build.CUDA_VERSION,
        "cuda": torch.version.cuda,
        "cuda_architectures": list(_build.CUDA_ARCHITECTURES),
        "cuda_devices": _cuda_devices(),
        "kernels": [name for name in ("CPU", "CUDA") if has_kernels(name)],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def has_kernels(dispatch_key: str) -> bool:
    """Whether the operators have kernels of their own for a device, such as "CPU" or "CUDA"."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return all(has(f"fused_rope::{name}", dispatch_key) for name in _OPERATORS)


def self_check(device: torch.device | str = "cpu") -> None:
    """Compares the operators with the reference, forward and backward, in a second or two.

    Args:
        device: where the operators run. The reference runs on the CPU.

    Raises:
        AssertionError: a result differs from the reference.

    Example:
        >>> self_check("cpu")
    """
    generator = torch.Generator().manual_seed(0)
    cos, sin = functional.cos_sin_table(inv_freq(64), 40)
    positions = torch.tensor([5, 0, -1, 39, 2, 17, 8])
    options: tuple[dict[str, Any], ...] = (
        {},
        {"layout": "bhsd", "offset": 30},
        {"interleaved": True, "positions": positions},
        {"blocks": 2, "rotary_offset": 8, "inverse": True},
        {"layout": "sbhd", "precision": "model"},
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for option in options:
            tokens = {"bhsd": (2, 3, 7), "sbhd": (7, 2, 3)}.get(option.get("layout", ""), (2, 7, 3))
            x, gradient = torch.randn((2, *tokens, 72), generator=generator).to(dtype).unbind()
            expected = _results(reference.rotate, x, gradient, cos, sin, option)
            moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in option.items()}
            x, gradient = x.to(device), gradient.to(device)
            results = _results(
                functional.rotate, x, gradient, cos.to(device), sin.to(device), moved
            )
            for what, got, want in zip(("forward", "backward"), results, expected, strict=True):
                if not torch.equal(got.cpu(), want):
                    raise AssertionError(
                        f"self_check: the {what} pass of rotate on {device} differs from the "
                        f"reference for {dtype} and {option}"
                    )


def _results(
    function: Any, x: Tensor, gradient: Tensor, cos: Tensor, sin: Tensor, option: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """x rotated, and the gradient of x."""
    x = x.detach().clone().requires_grad_()
    y = function(x, cos, sin, **option)
    (x_gradient,) = torch.autograd.grad(y, x, gradient)
    return y.detach(), x_gradient


def _cuda_devices() -> list[dict[str, str]]:
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        devices.append(
            {
                "name": torch.cuda.get_device_name(index),
                "capability": "{}.{}".format(*capability),
                "kernels": _kernels_for(capability, _build.CUDA_ARCHITECTURES),
            }
        )
    return devices


def _kernels_for(capability: tuple[int, int], architectures: tuple[str, ...]) -> str:
    """How the library runs on a GPU: machine code runs on later minor versions, PTX on all."""
    found = "none"
    for architecture in architectures:
        number, _, kind = architecture.partition("-")
        major, minor = divmod(int(number.rstrip("af")), 10)
        if kind != "virtual" and major == capability[0] and minor <= capability[1]:
            return "machine code"
        if kind != "real" and (major, minor) <= capability:
            found = "PTX"
    return found
