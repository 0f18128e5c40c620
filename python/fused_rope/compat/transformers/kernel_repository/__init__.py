"""The local kernel repository that the `kernels` package loads."""

from fused_rope.compat.transformers import kernel_layers as layers

__all__ = ["layers"]
