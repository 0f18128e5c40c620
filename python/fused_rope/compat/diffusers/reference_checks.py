"""Arguments of the reference checks: for each form, calls whose results no other form returns."""

from __future__ import annotations

import torch
from torch import Tensor

from .._patching.reference_checks import Arguments, Check, Draw


def adjacent(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), draw.tables("repeated", 5, 4)


def halves(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), draw.tables("tiled", 5, 4), True, -2


# As many heads as tokens: the wrong layout raises no error but returns other numbers.
def adjacent_tokens_first(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), draw.tables("repeated", 5, 4), True, -1, 1


def halves_tokens_first(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), draw.tables("tiled", 5, 4), True, -2, 1


def one_row(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), draw.tables("repeated", 1, 4)


def complex_rows(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), draw.freqs(2, 5, 4), False


def complex_shared(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), draw.freqs(5, 4), False


def complex_nested(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), draw.freqs(2, 5, 4)


def complex_nested_shared(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), draw.freqs(1, 5, 4)


def complex_heads_first(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), draw.freqs(1, 1, 5, 4)


def complex_elements_first(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8).transpose(-1, -2), draw.freqs(1, 1, 5, 4)


def strided_tables(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), *draw.tables("half", 1, 5, 1, 8)


def strided_batched_tables(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), *draw.tables("half", 2, 5, 1, 8)


def joint_tables(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), torch.cat(draw.tables("half", 2, 5, 8), dim=-1)


def per_head(draw: Draw) -> Arguments:
    return draw.x(2, 5, 3, 8), *draw.tables("half", 5, 3, 4)


def all_heads(draw: Draw) -> Arguments:
    return draw.x(2, 5, 24), draw.tables("repeated", 2, 5, 12)


def split_heads(draw: Draw) -> Arguments:
    return draw.x(2, 5, 24), draw.tables("half", 2, 3, 5, 4)


def split_heads_first(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), draw.tables("half", 1, 3, 5, 4)


def _matrices(draw: Draw, *shape: int) -> Tensor:
    cos, sin = draw.tables("half", *shape)
    return torch.stack([cos, -sin, sin, cos], dim=-1).reshape(*cos.shape, 2, 2)


def matrices(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), _matrices(draw, 5, 1, 4)


def batched_matrices(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), _matrices(draw, 2, 5, 1, 4)


def packed_matrices(draw: Draw) -> Arguments:
    return draw.x(5, 3, 8), _matrices(draw, 5, 1, 4)


def matrices_heads_first(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), _matrices(draw, 2, 1, 5, 4)


def matrices_for_both(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), draw.x(2, 5, 5, 8), _matrices(draw, 2, 5, 1, 4)


def joint(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), draw.x(2, 5, 5, 8), draw.tables("repeated", 5, 4)


def joint_batched(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), draw.x(2, 5, 5, 8), draw.tables("repeated", 2, 5, 4)


def tiled(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), draw.tables("tiled", 5, 4)


def leading(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), *draw.tables("tiled", 5, 3)


def leading_of_pair(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), draw.tables("tiled", 5, 3)


def angles(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), draw.tables("tiled", 7, 3)[0]


def unsqueezed(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), *draw.tables("tiled", 2, 5, 4)


def unsqueezed_tokens_first(draw: Draw) -> Arguments:
    return draw.x(2, 5, 5, 8), *draw.tables("tiled", 1, 5, 4), 2


def axes(draw: Draw) -> Arguments:
    tables = tuple(draw.tables("tiled", rows, 2) for rows in (3, 4, 5))
    positions = tuple(
        torch.tensor(ids, device=draw.device)[None]
        for ids in ([0, 1, 2, 2, 1], [3, 1, 0, 2, 1], [4, 0, 1, 2, 3])
    )
    return draw.x(2, 3, 5, 12), tables, positions


SHARED: tuple[Check, ...] = (
    adjacent,
    halves,
    adjacent_tokens_first,
    halves_tokens_first,
    one_row,
)
