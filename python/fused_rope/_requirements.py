"""Whether the running torch is one that the library can be loaded with."""

from __future__ import annotations

import torch

from . import _build


def torch_problem() -> str | None:
    """Why the library cannot be loaded, and what to do; None if it can."""
    running, built = str(torch.__version__), _build.TORCH_VERSION
    cuda, cuda_built = torch.version.cuda, _build.CUDA_VERSION
    same_torch = running.split(".")[:2] == built.split(".")[:2]
    same_cuda = cuda_built is None or cuda_built.split(".")[0] == (cuda or "").split(".")[0]
    if same_torch and same_cuda:
        return None
    why = "CUDA versions" if same_torch else "minor versions of torch"
    return (
        f"fused_rope was built against torch {built} but torch {running} is imported, and other "
        f"{why} are not compatible: rebuild it in this environment with `pip install "
        "--no-build-isolation --no-deps --force-reinstall .` in its source folder, or install its "
        "wheel for this torch"
    )
