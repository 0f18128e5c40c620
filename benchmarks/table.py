"""Rows of figures as markdown tables.

python benchmarks/table.py results/h100.json                        every figure
python benchmarks/table.py results/h100.json --readme README.md     the README's part, in its place
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import CASES, Work

Row = dict[str, Any]
UNITS = {"gpu_us": "GPU us", "host_us": "host us", "cpu_us": "CPU us", "peak_bytes": "peak MB"}
BASELINES = {"gpu_us": "clone", "host_us": "torch.add", "cpu_us": "memcpy", "peak_bytes": "copy"}
OURS = "fused_rope"
WAYS = ("forward", "backward", "in_place")
MARKS = "<!-- figures: benchmarks/table.py writes what follows -->", "<!-- end of figures -->"


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
        _line(["case", "variant", "direction", "GB/s", BASELINES[metric], *providers]),
        _line(["---"] * 3 + ["---:"] * (2 + len(providers))),
    ]
    for key, by_provider in groups.items():
        best = by_provider.get(OURS) or next(iter(by_provider.values()))
        cells = [_cell(metric, by_provider.get(provider)) for provider in providers]
        lines.append(_line([*key, _rate(metric, best), _number(metric, best["baseline"]), *cells]))
    return f"{UNITS[metric]} (in brackets: {_relation(metric)})\n\n" + "\n".join(lines)


def _relation(metric: str) -> str:
    timed = metric in ("gpu_us", "cpu_us")
    return f"{BASELINES[metric]} time / time" if timed else f"times {BASELINES[metric]}"


def _cell(metric: str, row: Row | None) -> str:
    if row is None:
        return ""
    ratio = row["median"] / row["baseline"]
    shown = 1 / ratio if metric in ("gpu_us", "cpu_us") else ratio
    return f"{_number(metric, row['median'])} ({shown:.3f})"


def _rate(metric: str, row: Row) -> str:
    """GB/s of our own figure, or of the first where ours is missing."""
    timed = metric in ("gpu_us", "cpu_us")
    return f"{row['bytes'] / row['median'] / 1e3:.0f}" if timed else ""


def _number(metric: str, value: float) -> str:
    return f"{value / 1e6:.1f}" if metric == "peak_bytes" else f"{value:.4g}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# --- the README's part -------------------------------------------------------------------------


def section(content: dict[str, Any], path: str) -> str:
    """What the README shows of the figures in `path`: tables, and the pictures of plots.py."""
    meta, rows = content["meta"], content["rows"]
    gpu = [row for row in rows if row["metric"] == "gpu_us"]
    calls = [row for row in rows if row["metric"] == "host_us"]
    stem = path.removesuffix(".json")
    parts = [
        f"{meta['device']}, torch {meta['torch']}, commit {meta['commit']}, bfloat16, GPU "
        "microseconds; in brackets\nthe fraction of the speed of a `clone` that moves as many "
        f"bytes in the same run ([{Path(path).name}]({path})).\n"
        "An asterisk: in place, where that is quicker. "
        "With partial rotation, in-place results are compared with a\nclone of the rotated part.",
        _shapes(gpu),
        f"The first shape, {_shape(Work(CASES['train']))}, in other memory, styles, tables and "
        "types:",
        _variants(gpu),
        f"![Bandwidth against size]({stem}_bandwidth.png)",
    ]
    if calls:
        parts += [
            "Host microseconds of one call on a decode-sized input; in brackets, in units of "
            "`torch.add` of one element:",
            _calls(calls),
            f"![Host time of a call]({stem}_call.png)",
        ]
    return "\n\n".join(parts)


def _found(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], Row]:
    return {(r["case"], r["variant"], r["direction"], r["provider"]): r for r in rows}


def _shape(work: Work) -> str:
    case = work.case
    span = f", R = {case.R}" if case.R else ""
    return f"{case.B}, {case.S}, {case.Hq}, {case.Hk}, {case.D}{span}"


def _shapes(rows: Sequence[Row]) -> str:
    """A line for each shape in the memory of "bshd" and "bhsd", with peers."""
    found = _found(rows)
    shown = [row for row in rows if row["variant"] in ("", "bhsd")]
    peers = [p for p in dict.fromkeys(r["provider"] for r in shown) if not p.startswith(OURS)]
    lines = [
        _line(["shape (B, S, Hq, Hk, D)", "memory", "clone", *_titles(WAYS), *peers]),
        _line(["---"] * 2 + ["---:"] * (1 + len(WAYS) + len(peers))),
    ]
    for name, case in CASES.items():
        for variant in ("", "bhsd"):
            ours = [found.get((name, variant, way, OURS)) for way in WAYS]
            if not any(ours):
                continue
            clone = next(row["baseline"] for row in ours if row)
            theirs = [
                _quickest(*(found.get((name, variant, way, p)) for way in ("forward", "in_place")))
                for p in peers
            ]
            cells = [_shape(Work(case)), variant or "bshd", _short(clone), *map(_fraction, ours)]
            lines.append(_line([*cells, *theirs]))
    return "\n".join(lines)


def _variants(rows: Sequence[Row]) -> str:
    found = _found(rows)
    names = dict.fromkeys(row["variant"] for row in rows if row["case"] == "train")
    lines = [_line(["variant", "clone", *_titles(WAYS)]), _line(["---"] + ["---:"] * 4)]
    for variant in (name for name in names if name not in ("", "bhsd")):
        ours = [found.get(("train", variant, way, OURS)) for way in WAYS]
        clone = next((row["baseline"] for row in ours if row), None)
        if clone is not None:
            lines.append(_line([variant, _short(clone), *map(_fraction, ours)]))
    return "\n".join(lines)


def _calls(rows: Sequence[Row]) -> str:
    found = _found(rows)
    ways = ("forward", "forward_grad", "in_place")
    lines = [_line(["", *_titles(ways)]), _line(["---"] + ["---:"] * len(ways))]
    for provider, variant in dict.fromkeys((row["provider"], row["variant"]) for row in rows):
        figures = (found.get(("call", variant, way, provider)) for way in ways)
        cells = (
            f"{_short(r['median'])} ({r['median'] / r['baseline']:.2f})" if r else "-"
            for r in figures
        )
        lines.append(_line([f"{provider} {variant}".strip(), *cells]))
    return "\n".join(lines)


def _titles(ways: Sequence[str]) -> list[str]:
    return [{"in_place": "in place", "forward_grad": "with grad"}.get(way, way) for way in ways]


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _fraction(row: Row | None) -> str:
    return f"{_short(row['median'])} ({row['baseline'] / row['median']:.2f})" if row else "-"


def _quickest(forward: Row | None, in_place: Row | None) -> str:
    if in_place and (forward is None or in_place["median"] < forward["median"]):
        return _short(in_place["median"]) + "*"
    return _short(forward["median"]) if forward else "-"


def replaced(text: str, figures: str) -> str:
    """The README's text with these figures between its marks."""
    first, last = map(re.escape, MARKS)
    part = f"{MARKS[0]}\n{figures}\n{MARKS[1]}"
    text, found = re.subn(f"{first}.*{last}", lambda _: part, text, flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"expected the marks {MARKS} once, got them {found} times")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--readme", type=Path, help="where its part is written anew")
    args = parser.parse_args()
    content = json.loads(args.file.read_text())
    if args.readme is None:
        print(markdown(content["rows"]))
        return
    path = args.file.resolve().relative_to(args.readme.resolve().parent).as_posix()
    args.readme.write_text(replaced(args.readme.read_text(), section(content, path)))


if __name__ == "__main__":
    main()
