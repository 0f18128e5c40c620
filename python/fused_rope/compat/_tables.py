"""Views that turn other libraries' tensors into arguments of the operators."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def for_all_tokens(table: Tensor, S: int) -> Tensor:
    """A view with S rows of a table [1, P] or [B, 1, P], which has one row for all tokens."""
    if table.dim() in (2, 3) and table.shape[-2] == 1:
        return table.expand(*table.shape[:-2], S, -1)
    return table


def real_and_imaginary(operator: str, name: str, table: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the cosines and sines of a complex table.

    Raises:
        TypeError: the table is real, as after `.to(torch.bfloat16)` of its module, which drops the
            sine.
    """
    if not table.is_complex():
        raise TypeError(f"{operator}: expected a complex {name}, got {table.dtype}")
    return table.real, table.imag


def split_heads(
    operator: str, name: str, x: Tensor, tokens: Sequence[int], head_size: int
) -> Tensor:
    """A view [*tokens, H, D] of x, which is that or [*tokens, H*D].

    Raises:
        ValueError: x is neither.
    """
    dims = len(tokens)
    if x.dim() == dims + 1 and head_size > 0 and x.shape[-1] % head_size == 0:
        return x.view(*x.shape[:-1], x.shape[-1] // head_size, head_size)
    if x.dim() == dims + 2 and x.shape[-1] == head_size:
        return x
    raise ValueError(
        f"{operator}: expected {name} of {list(tokens)} tokens, each of "
        f"H*{head_size} or [H, {head_size}], got {list(x.shape)}"
    )
