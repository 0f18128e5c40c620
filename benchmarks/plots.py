"""Pictures of a file of figures: python benchmarks/plots.py results/h200.json

<name>_overview.png    time of a large and of a small call, one bar per provider
<name>_bandwidth.png   GB/s against the bytes that a call moves, and the baseline
<name>_call.png        host time of a call, one bar per provider and direction
<name>.png             fraction of a clone, one panel per sweep of a file of cliffs.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from table import NAMES

Row = dict[str, Any]
COPY = "copy"
OURS = "fused_rope"
WIDTH = 5.6  # inches: the text stays legible where a phone shrinks the picture
LABELS = {provider: name.replace("`", "") for provider, name in NAMES.items()}
OF_OTHER_SHAPE = (
    *("mha2", "d64", "wide256", "wide80", "wide96", "wide512", "mla", "dsv4"),
    *("vit72", "vit88", "d100", "neox20b", "pythia", "cpu_vit72", "cpu_neox20b"),
)
SWEEP_TITLES = {
    "head_dim": "head_dim D",
    "rotary_dim": "rotary_dim R",
    "storage_offset": "storage offset in elements",
    "sequences": "packed sequences N",
    "axes": "position axes",
}


def draw(path: Path) -> list[Path]:
    """Draws all figures of the file, in the same folder."""
    content = json.loads(path.read_text())
    device, rows = content["meta"]["device"], content["rows"]
    if any("sweep" in row for row in rows):
        return [draw_cliffs(path)]
    pictures = []
    large = [row for row in rows if row["metric"] == "gpu_us" and _key(row) == ("train", "")]
    calls = [row for row in rows if row["metric"] == "host_us" and _key(row) == ("call", "")]
    if large and calls:
        pictures.append(
            _overview(path.with_name(f"{path.stem}_overview.png"), device, large, calls)
        )
    timed = [row for row in rows if row["metric"] in ("gpu_us", "cpu_us") and _in_curves(row)]
    if timed:
        pictures.append(_bandwidth(path.with_name(f"{path.stem}_bandwidth.png"), device, timed))
    if calls:
        pictures.append(_calls(path.with_name(f"{path.stem}_call.png"), device, calls))
    return pictures


def _key(row: Row) -> tuple[str, str]:
    return row["case"], row["variant"]


def _overview(path: Path, device: str, large: list[Row], calls: list[Row]) -> Path:
    """For readers in a hurry: a training shape on the GPU, and the host's time for one call."""
    figure, axes = plt.subplots(2, 1, figsize=(WIDTH, 6))
    _bars(axes[0], large, "copy", "4 x 4096 tokens, 32 and 8 heads of 128, bfloat16: GPU us")
    _bars(axes[1], calls, "torch.add", "one call on one token: host us")
    figure.suptitle(f"Rotary embedding of q and k, {device}")
    return _save(figure, path)


def _bars(axis: Axes, rows: list[Row], baseline: str, title: str) -> None:
    """The forward call of each provider, or the one in place if there is no other."""
    bars = {baseline: sum(row["baseline"] for row in rows) / len(rows)}
    for way in ("forward", "in_place"):
        for row in rows:
            plain = row["provider"] == OURS or not row["provider"].startswith(f"{OURS}_")
            if row["direction"] == way and plain and row["provider"] != "reference":
                name = LABELS.get(row["provider"], row["provider"])
                if name not in bars and f"{name} (in place)" not in bars:
                    bars[name if way == "forward" else f"{name} (in place)"] = row["median"]
    ordered = dict(sorted(bars.items(), key=lambda bar: bar[1]))
    gray, blue = "tab:gray", "tab:blue"
    colors = [blue if name == LABELS[OURS] else gray for name in ordered]
    drawn = axis.barh(list(ordered), list(ordered.values()), color=colors)
    axis.bar_label(drawn, fmt=lambda x: f"{x:.0f}" if x >= 100 else f"{x:.1f}", padding=3)
    axis.margins(x=0.12)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=10, loc="right")
    axis.spines[["top", "right"]].set_visible(False)


def _in_curves(row: Row) -> bool:
    """Plain variants of the shapes that differ only in size; drop-ins run the same kernel."""
    plain = not row["variant"] and row["case"] not in OF_OTHER_SHAPE
    return plain and not row["provider"].startswith(f"{OURS}_")


def _bandwidth(path: Path, device: str, rows: list[Row]) -> Path:
    directions = [
        d for d in ("forward", "backward", "in_place") if any(r["direction"] == d for r in rows)
    ]
    figure, axes = plt.subplots(
        len(directions), 1, figsize=(WIDTH, 3 * len(directions)), sharex=True, squeeze=False
    )
    providers = dict.fromkeys(row["provider"] for row in rows)
    colors = {provider: f"C{i}" for i, provider in enumerate(providers)}
    for axis, direction in zip(axes[:, 0], directions, strict=True):
        _curves(axis, [row for row in rows if row["direction"] == direction], colors)
        axis.set(title=direction.replace("_", " "), ylabel="GB/s", xscale="log")
    axes[-1][0].set_xlabel("MB read and written")
    figure.suptitle(f"Rotary embedding of q and k, {device}")
    return _save(figure, path)


def _curves(axis: Axes, rows: list[Row], colors: dict[str, str]) -> None:
    copy = sorted({row["bytes"]: row["baseline"] for row in rows}.items())
    sizes = [moved / 1e6 for moved, _ in copy]
    axis.plot(sizes, [b / us / 1e3 for b, us in copy], "k--", linewidth=1, label=COPY)
    for provider in dict.fromkeys(row["provider"] for row in rows):
        points = sorted((r["bytes"], r["median"]) for r in rows if r["provider"] == provider)
        sizes, rates = [b / 1e6 for b, _ in points], [b / us / 1e3 for b, us in points]
        width, order = (2.2, 3) if provider == OURS else (1, 2)
        (line,) = axis.plot(sizes, rates, "o-", markersize=3, label=LABELS.get(provider, provider))
        line.set(color=colors[provider], linewidth=width, zorder=order)
    axis.grid(alpha=0.3)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=9)


def _calls(path: Path, device: str, rows: list[Row]) -> Path:
    rows = sorted(rows, key=lambda row: row["median"])
    names = [
        f"{LABELS.get(row['provider'], row['provider'])}, {row['direction'].replace('_', ' ')}"
        for row in rows
    ]
    figure, axis = plt.subplots(figsize=(WIDTH, 1 + 0.25 * len(rows)))
    colors = ["tab:blue" if row["provider"].startswith(OURS) else "tab:gray" for row in rows]
    bars = axis.barh(names, [row["median"] for row in rows], color=colors)
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    add = sum(row["baseline"] for row in rows) / len(rows)
    axis.axvline(add, color="black", linestyle="--", linewidth=1, label=f"torch.add ({add:.1f})")
    axis.margins(x=0.2, y=0.01)
    axis.invert_yaxis()
    axis.set_xlabel("host microseconds per call")
    figure.suptitle(f"One decode-sized call, {device}")
    axis.legend(fontsize=8)
    return _save(figure, path)


def draw_cliffs(path: Path) -> Path:
    """One picture of a file of cliffs.py: fraction of the baseline's speed, one panel per sweep."""
    content = json.loads(path.read_text())
    rows = content["rows"]
    sweeps = [name for name in SWEEP_TITLES if any(row["sweep"] == name for row in rows)]
    figure, axes = plt.subplots(len(sweeps), 1, figsize=(WIDTH, 2.2 * len(sweeps)), squeeze=False)
    for axis, name in zip(axes[:, 0], sweeps, strict=True):
        _sweep(axis, [row for row in rows if row["sweep"] == name])
        axis.set_xlabel(SWEEP_TITLES[name])
        if name == "sequences":
            axis.set_xscale("log", base=2)
    baseline = "memcpy" if rows[0]["metric"] == "cpu_us" else "clone"
    figure.suptitle(f"Fraction of a {baseline} of as many bytes, {content['meta']['device']}")
    return _save(figure, path.with_suffix(".png"))


def _sweep(axis: Axes, rows: list[Row]) -> None:
    """A line per provider and direction; all providers of a direction share a line style."""
    lines = dict.fromkeys((row["provider"], row["direction"]) for row in rows)
    for provider, direction in lines:
        points = [
            row for row in rows if (row["provider"], row["direction"]) == (provider, direction)
        ]
        x = [str(r["x"]).removeprefix("mrope_") if r["sweep"] == "axes" else r["x"] for r in points]
        y = [r["baseline"] / r["median"] for r in points]
        axis.plot(x, y, "o-" if direction == "forward" else "s:", markersize=3)
        axis.lines[-1].set_label(f"{provider}, {direction}")
    axis.axhline(1, color="black", linestyle="--", linewidth=1)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _save(figure: Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    for picture in draw(parser.parse_args().file):
        print(picture)


if __name__ == "__main__":
    main()
