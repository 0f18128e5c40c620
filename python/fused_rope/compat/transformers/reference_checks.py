"""Arguments of the reference checks: for each form, calls whose results no other form returns."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from .._patching.reference_checks import Arguments, Check, Draw


def pairs(width: str, partial_heads: bool = True) -> tuple[Check, ...]:
    """q, k and tables for each unsqueeze_dim, and for R < D if the form allows it."""

    def heads_first(draw: Draw) -> Arguments:
        return draw.x(2, 3, 5, 8), draw.x(2, 1, 5, 8), *draw.tables(width, 2, 5, 4)

    def heads_first_from_the_end(draw: Draw) -> Arguments:
        return *heads_first(draw), -3

    def tokens_first(draw: Draw) -> Arguments:
        return draw.x(2, 5, 3, 8), draw.x(2, 5, 1, 8), *draw.tables(width, 1, 5, 4), 2

    def tokens_first_from_the_end(draw: Draw) -> Arguments:
        return draw.x(2, 5, 3, 8), draw.x(2, 5, 1, 8), *draw.tables(width, 2, 5, 4), -2

    def partial(draw: Draw) -> Arguments:
        return draw.x(2, 3, 5, 8), draw.x(2, 1, 5, 8), *draw.tables(width, 2, 5, 3)

    def one_token(draw: Draw) -> Arguments:
        return draw.x(1, 3, 1, 160), draw.x(1, 1, 1, 160), *draw.tables(width, 1, 1, 80)

    # As many heads as tokens: the wrong layout raises no error but returns other numbers.
    def without_batch(draw: Draw) -> Arguments:
        return draw.x(2, 5, 5, 8), draw.x(2, 5, 5, 8), *draw.tables(width, 5, 4)

    def heads_first_without_batch(draw: Draw) -> Arguments:
        return *without_batch(draw), 0

    return (
        heads_first,
        heads_first_from_the_end,
        tokens_first,
        tokens_first_from_the_end,
        one_token,
        without_batch,
        heads_first_without_batch,
        *([partial] if partial_heads else []),
    )


def singles(width: str) -> tuple[Check, ...]:
    """The arguments of `pairs` without k."""

    def without_key(check: Check) -> Check:
        def single(draw: Draw) -> Arguments:
            q, _, *rest = check(draw)
            return q, *rest

        return single

    return tuple(map(without_key, pairs(width)))


def no_key(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), None, *draw.tables("tiled", 2, 5, 4)


def last_queries(draw: Draw) -> Arguments:
    return draw.x(2, 3, 2, 8), draw.x(2, 1, 5, 8), *draw.tables("tiled", 2, 5, 4)


def last_queries_tokens_first(draw: Draw) -> Arguments:
    return draw.x(2, 5, 3, 8), draw.x(2, 5, 1, 8), *draw.tables("tiled", 2, 5, 4), 2


def sections(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), draw.x(2, 1, 5, 8), *draw.tables("tiled", 3, 2, 5, 4), [1, 2, 1]


def partial_sections(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), draw.x(2, 1, 5, 8), *draw.tables("tiled", 3, 2, 5, 3), [1, 1, 1]


def sections_tokens_first(draw: Draw) -> Arguments:
    return draw.x(2, 5, 3, 8), draw.x(2, 5, 1, 8), *draw.tables("tiled", 3, 2, 5, 4), [1, 2, 1], 2


def packed_tokens(draw: Draw) -> Arguments:
    return draw.x(5, 3, 8), draw.x(5, 3, 8), *draw.tables("tiled", 5, 4)


def batched_tokens(draw: Draw) -> Arguments:
    return draw.x(2, 5, 3, 8), draw.x(2, 5, 3, 8), *draw.tables("tiled", 5, 3)


def prefixed(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), draw.x(2, 3, 5, 8), *draw.tables("tiled", 3, 4)


def plane(draw: Draw) -> Arguments:
    return draw.x(2, 3, 4, 8), draw.x(2, 3, 4, 8), *draw.tables("repeated", 4, 4)


def memory(draw: Draw) -> Arguments:
    return draw.x(2, 3, 4, 8), draw.x(2, 3, 10, 8), *draw.tables("repeated", 4, 4), 2, True


def repeated_memory(draw: Draw) -> Arguments:
    return draw.x(2, 3, 4, 8), draw.x(2, 3, 8, 8), *draw.tables("repeated", 4, 4), 0, True


def excluded_memory(draw: Draw) -> Arguments:
    return draw.x(2, 3, 4, 8), draw.x(2, 3, 6, 8), *draw.tables("repeated", 4, 4), 2


def grouped_memory(draw: Draw) -> Arguments:
    q, k = draw.x(2, 3, 4, 8), draw.x(2, 3, 12, 8)
    tables = (*draw.tables("repeated", 4, 4), *draw.tables("repeated", 3, 4))
    return q, k, *tables, 2, 2


def separate_tables(draw: Draw) -> Arguments:
    tables = (*draw.tables("repeated", 4, 4), *draw.tables("repeated", 6, 4))
    return draw.x(2, 3, 4, 8), draw.x(2, 3, 6, 8), *tables


def blocks_heads_first(draw: Draw) -> Arguments:
    x, *rest = blocks(draw)
    return x.transpose(1, 2), *rest, 1


def blocks(draw: Draw) -> Arguments:
    first, second = draw.tables("tiled", 2, 5, 2), draw.tables("tiled", 2, 5, 2)
    tables = (torch.cat([a, b], dim=-1) for a, b in zip(first, second, strict=True))
    return draw.x(2, 5, 3, 8), *tables, torch.zeros(2, 5, 2, dtype=torch.int64, device=draw.device)


def swapped(draw: Draw) -> Arguments:
    return draw.x(2, 5, 3, 8), *draw.tables("half", 2, 5, 4)


def cached_rows(draw: Draw) -> Arguments:
    return draw.x(2, 3, 5, 8), *draw.tables("tiled", 1, 1, 7, 4)


def angles(draw: Draw) -> Arguments:
    return draw.x(1, 5, 3, 8), draw.tables("half", 5, 4)[0].float()


def gathered(draw: Draw) -> Arguments:
    ids = torch.tensor([[3, 1, 4, 1, 5], [0, -1, 2, 6, -7]], device=draw.device)
    return draw.x(2, 3, 5, 8), draw.x(2, 3, 5, 8), *draw.tables("tiled", 7, 4), ids


def gathered_tokens_first(draw: Draw) -> Arguments:
    q, k, *rest = gathered(draw)
    return q.transpose(1, 2), k.transpose(1, 2), *rest, 2


def with_values(check: Check) -> Check:
    def with_values(draw: Draw) -> Arguments:
        q, k, *rest = check(draw)
        return q, k, draw.x(*q.shape), *rest

    return with_values


def without_ids(check: Check) -> Check:
    """As `check`, with as many rows as tokens and position_ids=None."""

    def without_ids(draw: Draw) -> Arguments:
        *tensors, cos, sin, _ = check(draw)
        return *tensors, cos[:5], sin[:5], None

    return without_ids


def complex_tables(*table: int, layout: str) -> Check:
    shape = (2, 3, 5, 8) if layout == "bhsd" else (2, 5, 3, 8)
    return lambda draw: (draw.x(*shape), draw.x(*shape), draw.freqs(*table))


def conformer(draw: Draw) -> Arguments:
    tables = torch.stack(draw.tables("tiled", 7, 1, 1, 4))
    return SimpleNamespace(num_heads=3, head_size=8), draw.x(2, 5, 24), tables


def sinusoidal(draw: Draw) -> Arguments:
    sin_cos = torch.cat(draw.tables("half", 1, 1, 5, 4), dim=-1)
    return sin_cos, draw.x(2, 3, 5, 8), draw.x(2, 3, 5, 8)


def sinusoidal_values(draw: Draw) -> Arguments:
    return *sinusoidal(draw), draw.x(2, 3, 5, 8)


def time(draw: Draw) -> Arguments:
    return draw.x(2, 5, 8), *draw.tables("repeated", 2, 5, 3)


def packed_qkv(draw: Draw) -> Arguments:
    lengths = torch.tensor([0, 2, 6], dtype=torch.int32, device=draw.device)
    return draw.x(6, 3, 2, 16), *draw.tables("half", 4, 8), lengths, 4


GATHERED = (gathered, gathered_tokens_first, without_ids(gathered))
