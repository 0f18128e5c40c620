"""Views of the tables that other libraries keep, as the half-width tables of the operators."""

from __future__ import annotations

from torch import Tensor


def half_width(table: Tensor, interleaved: bool = False) -> Tensor:
    """The view [..., P] of a table [..., 2P] that has every number twice.

    The second half repeats the first, or, where pairs are interleaved, each number its neighbor.

    Raises:
        ValueError: an odd number of columns.
    """
    check_even(table)
    return table[..., ::2] if interleaved else table[..., : table.shape[-1] // 2]


def for_all_tokens(table: Tensor, S: int) -> Tensor:
    """The view of a table [1, P] or [B, 1, P], whose one row is every token's, with S rows."""
    if table.dim() in (2, 3) and table.shape[-2] == 1:
        return table.expand(*table.shape[:-2], S, -1)
    return table


def check_even(table: Tensor) -> None:
    """Raises ValueError where a full-width table cannot hold every number twice."""
    if table.shape[-1] % 2:
        raise ValueError(
            "rotate: expected full-width tables with an even number of columns, got "
            f"{table.shape[-1]}: an odd head_dim leaves one element of each head unrotated"
        )


def real_and_imaginary(operator: str, name: str, table: Tensor) -> tuple[Tensor, Tensor]:
    """Views of cosine and sine in a complex table.

    Raises:
        TypeError: the table is not complex: `.to(torch.bfloat16)` on a module that holds one drops
            the sine, and what is left is no rotation.
    """
    if not table.is_complex():
        raise TypeError(f"{operator}: expected a complex {name}, got {table.dtype}")
    return table.real, table.imag
