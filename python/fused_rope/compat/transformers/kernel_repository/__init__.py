"""What the `kernels` package loads as a local kernel repository; its layers are those next door."""

from fused_rope.compat.transformers import kernel_layers as layers

__all__ = ["layers"]
