"""Rows of figures as markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
UNITS = {"gpu_us": "GPU us", "host_us": "host us", "cpu_us": "CPU us", "peak_bytes": "peak MB"}
YARDSTICKS = {"gpu_us": "clone", "host_us": "torch.add", "cpu_us": "memcpy", "peak_bytes": "copy"}
OURS = "fused_rope"


def markdown(rows: Sequence[Row]) -> str:
    """A table for each metric: lines are case, variant and direction, columns are providers."""
    metrics = [metric for metric in UNITS if any(row["metric"] == metric for row in rows)]
    return "\n\n".join(
        _table(metric, [row for row in rows if row["metric"] == metric]) for metric in metrics
    )


def _table(metric: str, rows: Sequence[Row]) -> str:
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        key = row["case"], row["variant"], row["direction"]
        groups.setdefault(key, {})[row["provider"]] = row
    lines = [
        _line(["case", "variant", "direction", "GB/s", YARDSTICKS[metric], *providers]),
        _line(["---"] * 3 + ["---:"] * (2 + len(providers))),
    ]
    for key, by_provider in groups.items():
        best = by_provider.get(OURS) or next(iter(by_provider.values()))
        cells = [_cell(metric, by_provider.get(provider)) for provider in providers]
        lines.append(_line([*key, _rate(metric, best), _number(metric, best["yardstick"]), *cells]))
    return f"{UNITS[metric]} (beside each: {_relation(metric)})\n\n" + "\n".join(lines)


def _relation(metric: str) -> str:
    timed = metric in ("gpu_us", "cpu_us")
    return f"{YARDSTICKS[metric]} time / time" if timed else f"times {YARDSTICKS[metric]}"


def _cell(metric: str, row: Row | None) -> str:
    if row is None:
        return ""
    ratio = row["median"] / row["yardstick"]
    beside = 1 / ratio if metric in ("gpu_us", "cpu_us") else ratio
    return f"{_number(metric, row['median'])} ({beside:.3f})"


def _rate(metric: str, row: Row) -> str:
    """GB/s of our own figure, or of the first where ours is missing."""
    timed = metric in ("gpu_us", "cpu_us")
    return f"{row['bytes'] / row['median'] / 1e3:.0f}" if timed else ""


def _number(metric: str, value: float) -> str:
    return f"{value / 1e6:.1f}" if metric == "peak_bytes" else f"{value:.4g}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
