"""`python -m fused_rope`: prints `build_info()`, checks the operators; exits with 1 on failure."""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import torch

from . import build_info, self_check


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, dict):
        return f"{value['name']} (capability {value['capability']}, kernels: {value['kernels']})"
    return "none" if value is None else str(value)


def main() -> int:
    info = build_info()
    for name, value in info.items():
        print(f"{name.replace('_', ' '):20}{_text(value)}")
    status = 0
    for device in ("cpu", *(f"cuda:{i}" for i in range(len(info["cuda_devices"])))):
        start = time.perf_counter()
        fallback = device.partition(":")[0].upper() not in info["kernels"]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the line below says so
                self_check(device)
                if device != "cpu":
                    torch.cuda.synchronize(device)
        except Exception as error:
            result, status = f"FAILED: {error}", 1
        else:
            result = f"passed in {time.perf_counter() - start:.1f} s"
        note = ", by the PyTorch reference: the library has no kernels for it" if fallback else ""
        print(f"{'self-check ' + device:20}{result}{note}")
    return status


if __name__ == "__main__":
    sys.exit(main())
