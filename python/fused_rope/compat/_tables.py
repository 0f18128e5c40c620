"""Views that turn other libraries' tables into tables of the operators."""

from __future__ import annotations

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
