"""Views of the tables that other libraries keep, as the operators read them."""

from __future__ import annotations

from torch import Tensor


def for_all_tokens(table: Tensor, S: int) -> Tensor:
    """The view of a table [1, P] or [B, 1, P], whose one row is every token's, with S rows."""
    if table.dim() in (2, 3) and table.shape[-2] == 1:
        return table.expand(*table.shape[:-2], S, -1)
    return table


def real_and_imaginary(operator: str, name: str, table: Tensor) -> tuple[Tensor, Tensor]:
    """Views of cosine and sine in a complex table.

    Raises:
        TypeError: the table is not complex: `.to(torch.bfloat16)` on a module that holds one drops
            the sine, and what is left is no rotation.
    """
    if not table.is_complex():
        raise TypeError(f"{operator}: expected a complex {name}, got {table.dtype}")
    return table.real, table.imag
