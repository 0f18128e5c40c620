"""A comparison of kernel plans: one run.py per plan, because a process reads the plan once.

Only builds with the CMake option FUSED_ROPE_PLAN_OVERRIDES read FUSED_ROPE_PLAN.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VARIABLE = "FUSED_ROPE_PLAN"
CASES = ("train", "mid512", "decode256")
VARIANTS = ("", "bhsd", "interleaved")

Row = dict[str, Any]


def sweep(args: argparse.Namespace) -> int:
    """Measures the cases, variants and directions of args under each plan, and under none."""
    plans = list(dict.fromkeys(["", *args.sweep]))
    out = args.out or HERE / "results" / "sweep.json"
    rows: list[Row] = []
    for plan in plans:
        print(f"plan: {plan or 'none'}", flush=True)
        content = run(plan, args)
        rows += [{"plan": plan, **row} for row in content["rows"]]
        content["meta"] |= {"plans": plans}
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        out.write_text(f'{{"meta": {json.dumps(content["meta"])},\n "rows": [\n{lines}\n]}}\n')
        for refused in content["meta"]["refused"]:
            print(f"not timed: {refused}")
    print(table(rows, plans))
    print(f"{len(rows)} figures in {out}")
    return 0 if all(any(row["plan"] == plan for row in rows) for plan in plans) else 1


def run(plan: str, args: argparse.Namespace) -> dict[str, Any]:
    """The file that run.py writes in a process with this plan."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [
            *(sys.executable, str(HERE / "run.py"), "--providers", "fused_rope"),
            *("--device", args.device, "--out", str(out), *["--quick"] * args.quick),
            *("--cases", *(args.cases or CASES), "--variants", *(args.variants or VARIANTS)),
            *("--directions", *(args.directions or ["forward"])),
        ]
        environment = os.environ | {VARIABLE: plan}
        process = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
        if not out.exists():
            raise RuntimeError(f"{VARIABLE}={plan!r}: run.py ended with {process.returncode}")
        return json.loads(out.read_text())


def table(rows: Sequence[Row], plans: Sequence[str]) -> str:
    """A line per work, a column per plan: microseconds, and the fraction of the baseline."""
    timed = (row for row in rows if row["metric"] != "peak_bytes")
    found = {(row["case"], row["variant"], row["direction"], row["plan"]): row for row in timed}
    lines = [
        "| " + " | ".join(["work", *(plan or "none" for plan in plans)]) + " |",
        "| --- |" + " ---: |" * len(plans),
    ]
    for work in dict.fromkeys(key[:3] for key in found):
        cells = [_cell(found.get((*work, plan))) for plan in plans]
        lines.append("| " + " | ".join([" ".join(filter(None, work)), *cells]) + " |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    return f"{row['median']:.4g} ({row['baseline'] / row['median']:.3f})" if row else "refused"
