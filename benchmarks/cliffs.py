"""Fraction of a clone's speed over sizes and alignments: shapes that fall off the fast path.

    python benchmarks/cliffs.py                              results/cliffs_<device>.json and .png
    python benchmarks/cliffs.py --device cpu                 the same on the CPU, with fewer tokens
    python benchmarks/cliffs.py --sweeps head_dim axes --providers fused_rope flash_attn

Each sweep varies one property of case `train` (on the CPU: case `cpu`): head_dim, rotary_dim, the
storage offset in elements, the number of packed sequences, or the order of the M-RoPE axes. Every
point is verified before it is timed. A run that is interrupted writes what it has. NOTES.md
describes the measurement.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import measure
import torch
from cases import CASES, DIRECTIONS, MROPE, Case, Work
from plots import draw_cliffs
from providers import PROVIDERS, load_providers
from run import HERE, Row, Runner, meta_of, plan, slug, write
from tqdm import tqdm

REST = 10  # seconds that a run waits for a throttled GPU, in all
BASES = {"cuda": CASES["train"], "cpu": CASES["cpu"]}
EFFORTS = {
    "cuda": measure.Effort(seconds=0.02, least=3, most=7),
    "cpu": measure.Effort(seconds=0.02, least=3, most=7, most_sets=6),  # normal numbers are slow
}


@dataclass(frozen=True)
class Point:
    """One place on the horizontal axis of one sweep."""

    sweep: str
    x: int | str
    work: Work


def head_dims(base: Case) -> Iterator[Point]:
    for D in range(16, 257, 4):
        yield Point("head_dim", D, Work(replace(base, name=f"d{D}", D=D)))


def rotary_dims(base: Case) -> Iterator[Point]:
    for R in range(4, base.D + 1, 4):
        yield Point("rotary_dim", R, Work(replace(base, name=f"r{R}", R=R)))


def storage_offsets(base: Case) -> Iterator[Point]:
    for offset in range(9):
        yield Point("storage_offset", offset, Work(base, f"unaligned{offset}"))


def sequence_counts(base: Case) -> Iterator[Point]:
    """Powers of four, and one sequence for every two tokens."""
    most = base.B * base.S // 2
    for count in (*(4**i for i in range(most.bit_length() // 2) if 4**i < most), most):
        yield Point("sequences", count, Work(base, f"thd cu_seqlens sequences{count}"))


def axis_orders(base: Case) -> Iterator[Point]:
    """One axis, then the orders of M-RoPE."""
    for word in ("positions64", *MROPE):
        yield Point("axes", word, Work(base, word))


SWEEPS = {
    "head_dim": head_dims,
    "rotary_dim": rotary_dims,
    "storage_offset": storage_offsets,
    "sequences": sequence_counts,
    "axes": axis_orders,
}


def measured(point: Point, args: argparse.Namespace, runner: Runner) -> list[Row]:
    """The rows of one point."""
    before = len(runner.rows)
    with tqdm(disable=True) as progress:
        for step in plan([point.work], args.directions, args.providers):
            runner.run(step, progress)
    return [{"sweep": point.sweep, "x": point.x, **row} for row in runner.rows[before:]]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweeps", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument(
        "--directions", nargs="+", choices=DIRECTIONS, default=["forward", "in_place"]
    )
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=["fused_rope"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: results/cliffs_<device>.json")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and points")
    parser.add_argument("--case", choices=list(CASES), help="default: train, on the CPU cpu")
    parser.add_argument("--commit", help="recorded in the file where git is not available")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    device = torch.device(args.device)
    if device.type == "cuda":  # graphs cannot be captured on the default stream
        torch.cuda.set_stream(torch.cuda.Stream(device))
    torch.manual_seed(0)
    args.providers, skipped = load_providers(args.providers, device)
    for name, reason in skipped.items():
        print(f"skipped: {name} ({reason})")
    runner = Runner(device, measure.QUICK if args.quick else EFFORTS[device.type])
    runner.rest = REST
    base = CASES[args.case] if args.case else BASES[device.type]
    every = 8 if args.quick else 1
    points = [point for name in args.sweeps for point in list(SWEEPS[name](base))[::every]]
    rows: list[Row] = []
    try:
        for point in tqdm(points, unit="point", mininterval=1):
            rows += measured(point, args, runner)
    except KeyboardInterrupt:
        print("interrupted: what was measured is written")
    out = args.out or HERE / "results" / f"cliffs_{slug(device)}.json"
    notes = {"skipped": skipped, "refused": runner.refused, "slowed": runner.slowed}
    write(out, meta_of(device, args.commit) | notes, rows)
    print(f"{len(rows)} figures in {out}")
    if not rows:
        return 1
    print("drawn:", draw_cliffs(out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
