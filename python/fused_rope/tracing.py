"""Tells whether a call runs, is recorded or only computes shapes; suspends recording."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "fake_mode_of",
    "in_dynamo",
    "is_capturing",
    "is_recorded",
    "is_recording",
    "is_strictly_fake",
    "is_traced",
    "outside_modes",
]

in_dynamo = torch.compiler.is_dynamo_compiling


@contextlib.contextmanager
def outside_modes() -> Iterator[None]:
    """Suspends fake tensors, tracers, functorch transforms, autograd and inference mode.

    A tensor that outlives the call that makes it must be made under this.
    """
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            _disable_current_modes(),
            torch._C.DisableTorchFunction(),
            torch._C._DisableFuncTorch(),
        ):
            yield
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


def is_traced(q: Tensor) -> bool:
    """Whether this call is recorded or only computes shapes."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        or (type(q) is not Tensor and torch._guards.detect_fake_mode(q) is not None)
    )


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: memory must not be kept, and values not read."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_recording() -> bool:
    """Whether a tracer records operators, or tensors are fake; modes that only observe are not."""
    keys = torch._C._TorchDispatchModeKey
    return (
        torch._C._is_tracing()
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
        or (
            torch._C._len_torch_dispatch_stack() > 0
            and any(
                torch._C._get_dispatch_mode(key) is not None
                for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)
            )
        )
    )


def is_recorded(device: torch.device) -> bool:
    """Whether calls on the device are captured, traced or fake, so that no value can be read."""
    return is_recording() or is_capturing(device)


def is_strictly_fake(q: Tensor) -> bool:
    """Whether q is a fake tensor that cannot be combined with real ones."""
    mode = None if in_dynamo() else torch._guards.detect_fake_mode(q)
    return mode is not None and not mode.allow_non_fake_inputs


def fake_mode_of(q: Tensor) -> AbstractContextManager[Any]:
    """The fake mode of q, to make tensors that can be combined with it; else a null context."""
    if in_dynamo() or type(q) is Tensor:
        return nullcontext()
    return torch._guards.detect_fake_mode(q) or nullcontext()
