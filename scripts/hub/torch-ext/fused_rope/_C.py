"""The entries of the C++ fast path, which the Hub's builds lack: each leaves the call to
`functional.call`, which calls the operator."""

from typing import Any


def _dispatch(*args: Any) -> Any:
    return NotImplemented


rotate = rotate_ = rotate_qk = rotate_qk_ = rotate_out = rotate_qk_out = _dispatch
norm_rotate = norm_rotate_ = norm_rotate_qk = norm_rotate_qk_ = _dispatch
norm_rotate_out = norm_rotate_qk_out = _dispatch
