"""The change between two files of figures: python benchmarks/compare.py A.json B.json

The last column is the change of time / baseline, which is comparable across runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Key = tuple[str, ...]
FIELDS = ("case", "variant", "direction", "provider", "metric")


def load(path: Path) -> dict[Key, dict[str, Any]]:
    rows = json.loads(path.read_text())["rows"]
    return {tuple(row[field] for field in FIELDS): row for row in rows}


def change(before: float, after: float) -> str:
    if before == 0:  # the peak memory of an in-place call
        return "from 0" if after else "0.0 %"
    return f"{100 * (after / before - 1):+.1f} %"


def compare(a: dict[Key, dict[str, Any]], b: dict[Key, dict[str, Any]]) -> str:
    """A markdown table of the figures in both files, then the keys that only one file has."""
    lines = [
        "| " + " | ".join((*FIELDS, "A", "B", "change", "change against baseline")) + " |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for key in (key for key in a if key in b):
        old, new = a[key], b[key]
        relative = (row["median"] / row["baseline"] for row in (old, new))
        times = f"{old['median']:.4g}", f"{new['median']:.4g}"
        cells = (*key, *times, change(old["median"], new["median"]), change(*relative))
        lines.append("| " + " | ".join(cells) + " |")
    for name, one, other in (("A", a, b), ("B", b, a)):
        lines += [
            f"only in {name}: {' '.join(filter(None, key))}" for key in one if key not in other
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    args = parser.parse_args()
    print(compare(load(args.a), load(args.b)))


if __name__ == "__main__":
    main()
