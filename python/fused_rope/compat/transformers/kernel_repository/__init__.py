"""The local kernel repository that the `kernels` package loads."""

from fused_rope.compat.transformers import layers

__all__ = ["layers"]
