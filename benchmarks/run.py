"""The benchmark suite: all cases, variants and directions, for all installed providers.

    python benchmarks/run.py                           a full run, to results/<device>.json
    python benchmarks/run.py --cases train mid512 --providers fused_rope eager_hf --out a.json
    python benchmarks/run.py --cases train --variants "" bhsd "thd cu_seqlens" --directions forward
    python benchmarks/run.py --device cpu              the CPU kernel against memcpy
    python benchmarks/run.py --device cpu --quick      the same in two minutes, less precisely
    python benchmarks/run.py --targets                 only figures that have a target
    python benchmarks/run.py --peers FOLDER            peers that are not installed, from FOLDER
    python benchmarks/run.py --sweep "keep=0" "threads=64"                 compare kernel plans

NOTES.md describes the measurement.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch
from cases import (
    CASES,
    DIRECTIONS,
    Work,
    baseline_bytes,
    bytes_moved,
    default_directions,
    input_bytes,
    is_target,
    select,
)
from providers import PROVIDERS, Provider, load_providers
from sweep import sweep
from table import markdown
from tqdm import tqdm
from trial import Bench, Trial

HERE = Path(__file__).resolve().parent
Row = dict[str, Any]
Baseline = measure.CloneGraph | measure.Memcpy
PEAK_WORKS = (Work(CASES["train"]),)
SECONDS_A_FIGURE, SECONDS_A_COMPILATION = 0.4, 4
TRIES = 3  # measurements of a figure if the GPU is throttled meanwhile
REST = 60  # seconds that a run waits for a throttled GPU, in all
QUICK_SECONDS = 100  # after which a quick run begins no further work
PATIENCE = 3  # failures after which a provider without any figure is skipped


@dataclass(frozen=True)
class Step:
    """A work, and the directions and providers to measure."""

    work: Work
    pairs: tuple[tuple[str, tuple[Provider, ...]], ...]

    def __len__(self) -> int:
        return sum(len(providers) for _, providers in self.pairs)


class Runner:
    """Measures the figures of one run on one device."""

    def __init__(self, device: torch.device, effort: measure.Effort) -> None:
        self.device = device
        self.effort = effort
        self.cache = measure.cache_bytes(device)
        self.rows: list[Row] = []
        self.refused: list[str] = []
        self.slowed: list[str] = []
        self.failures: Counter[str] = Counter()
        self.on_gpu = device.type == "cuda"
        self.pace = measure.pace_of(device)
        self.rest = REST

    def run(self, step: Step, progress: tqdm) -> None:
        """Measures one step and frees its memory."""
        by_host = step.work.case.name == "call"
        count = 1 if by_host else measure.set_count(input_bytes(step.work), self.cache, self.effort)
        bench = Bench(step.work, count, self.device)
        for direction, providers in step.pairs:
            progress.set_postfix_str(f"{step.work.name} {direction}")
            clock = self._host if by_host else self._device
            for row in clock(bench, direction, providers, progress):
                self.rows.append(row)

    def _trials(
        self, bench: Bench, direction: str, providers: Sequence[Provider], progress: tqdm
    ) -> Iterator[Trial]:
        """The trials whose results are right; the others are recorded as refused."""
        for provider in providers:
            progress.update()
            if self.failures[provider.name] >= PATIENCE:
                continue
            try:
                trial = Trial(bench, provider, direction)
                trial.verify()
            except Exception as error:  # peers raise all kinds of exceptions
                self._refuse(bench.work, direction, provider, error)
                continue
            yield trial

    def _refuse(self, work: Work, direction: str, provider: Provider, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if all(row["provider"] != provider.name for row in self.rows):
            self.failures[provider.name] += 1
        self.refused.append(f"{work.name} {direction} {provider.name}: {reason}")
        tqdm.write(f"not timed: {self.refused[-1]}")

    def _host(
        self, bench: Bench, direction: str, providers: Sequence[Provider], progress: tqdm
    ) -> Iterator[Row]:
        for trial in self._trials(bench, direction, providers, progress):
            before = measure.add_time(self.device, self.effort)
            with trial.grad_mode():
                figure = measure.host_time(trial.calls[0], self.device, self.effort)
            after = measure.add_time(self.device, self.effort)
            yield row_of(trial, "host_us", figure, (before, after))

    def _device(
        self, bench: Bench, direction: str, providers: Sequence[Provider], progress: tqdm
    ) -> Iterator[Row]:
        baseline = self._baseline(baseline_bytes(bench.work, direction))
        before = self._settled(baseline)
        for trial in self._trials(bench, direction, providers, progress):
            try:
                row = self._steady(trial, baseline, before)
            except Exception as error:
                self._refuse(bench.work, direction, trial.provider, error)
                continue
            before = self._settled(baseline) if "slowed" in row else row["baselines"][1]
            yield row
            if self.on_gpu and bench.work in PEAK_WORKS:
                yield self._peak(trial)

    def _steady(self, trial: Trial, baseline: Baseline, before: float) -> Row:
        """One figure between two baselines, repeated if the GPU is throttled meanwhile.

        After `REST` seconds of waiting, figures of a throttled GPU are only marked.
        """
        for left in reversed(range(TRIES)):
            figure, extra = self._replayed(trial) if self.on_gpu else self._passed(trial)
            after = baseline.time(self.effort).median
            slowed = self._slowed()
            if not (slowed and left and self.rest):
                break
            before = self._settled(baseline)
        row = row_of(trial, "gpu_us" if self.on_gpu else "cpu_us", figure, (before, after)) | extra
        if slowed:
            row["slowed"] = True
            work = trial.bench.work
            self.slowed.append(f"{work.name} {trial.direction} {trial.provider.name}")
        return row

    def _slowed(self) -> bool:
        return self.pace is not None and self.pace.slowed()

    def _settled(self, baseline: Baseline) -> float:
        """The baseline, after waiting until the GPU is not throttled or `REST` is used up."""
        while self.rest and self._slowed():
            time.sleep(1)
            self.rest -= 1
        return baseline.time(self.effort).median

    def _baseline(self, moved: int) -> Baseline:
        if self.on_gpu:
            return measure.CloneGraph(moved, self.cache, self.device, self.effort)
        return measure.Memcpy(moved, self.cache, self.effort)

    def _passed(self, trial: Trial) -> tuple[measure.Figure, Row]:
        with trial.grad_mode():
            return measure.cpu_time(trial.calls, self.effort), {}

    def _replayed(self, trial: Trial) -> tuple[measure.Figure, Row]:
        """GPU time of a call, and the number of kernels per call in the timed graph."""
        graph = trial.capture()
        try:
            trial.verify_graph(graph)
            return graph.time(self.effort), {"kernels": graph.kernels}
        finally:
            del graph
            torch.cuda.empty_cache()

    def _peak(self, trial: Trial) -> Row:
        """Peak memory of a call; the baseline is the size of q and k."""
        with trial.grad_mode():
            peak = float(measure.peak_bytes(trial.calls[0], self.device))
        copy = float(input_bytes(trial.bench.work))
        return row_of(trial, "peak_bytes", measure.Figure(peak, peak, peak), (copy, copy))


def row_of(
    trial: Trial, metric: str, figure: measure.Figure, baselines: tuple[float, float]
) -> Row:
    """One figure. The baseline is the mean of its measurements before and after the figure."""
    work = trial.bench.work
    return {
        "case": work.case.name,
        "variant": work.variant,
        "direction": trial.direction,
        "provider": trial.provider.name,
        "metric": metric,
        "median": figure.median,
        "baseline": sum(baselines) / 2,
        "bytes": bytes_moved(work, trial.direction),
        "quartiles": [figure.low, figure.high],
        "baselines": list(baselines),
    }


def plan(
    works: Sequence[Work],
    directions: Sequence[str] | None,
    providers: Sequence[Provider],
    wanted: Callable[[Work, str, str], bool] = lambda work, direction, provider: True,
) -> list[Step]:
    """The steps of a run, in order, without those that no provider supports."""

    def able(work: Work, direction: str) -> tuple[Provider, ...]:
        asked = (p for p in providers if wanted(work, direction, p.name))
        return tuple(p for p in asked if p.supports(work, direction))

    steps = []
    for work in works:
        pairs = ((d, able(work, d)) for d in directions or default_directions(work))
        step = Step(work, tuple((d, some) for d, some in pairs if some))
        if step.pairs:
            steps.append(step)
    return steps


def estimate(steps: Sequence[Step]) -> str:
    """The number of figures, and their approximate duration on a GPU."""
    compiled = sum(p.name == "inductor" for s in steps for _, some in s.pairs for p in some)
    figures = sum(map(len, steps))
    seconds = SECONDS_A_FIGURE * figures + SECONDS_A_COMPILATION * compiled
    return f"{figures} figures, {compiled} of them compiled: about {seconds / 60:.1f} minutes"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def slug(device: torch.device) -> str:
    """The device's part of a file name: h100 for "NVIDIA H100 80GB HBM3"."""
    model = re.search(r"\b[A-Z]*\d+[A-Z]*", device_name(device))
    return model.group().lower() if model else "cpu"


def meta_of(device: torch.device, commit: str | None) -> dict[str, Any]:
    """The device, versions, commit and date of the figures."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit or current_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def current_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(
            command, cwd=HERE, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(path: Path, meta: dict[str, Any], rows: Sequence[Row]) -> None:
    """Writes one row per line, so that files can be compared as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.write_text(f'{{"meta": {json.dumps(meta)},\n "rows": [\n{lines}\n]}}\n')


def run_steps(
    runner: Runner, steps: Sequence[Step], quick: bool, out: Path, meta: dict[str, Any]
) -> list[str]:
    """Runs the steps and writes the figures after each; returns the works that were left out.

    An interrupt ends the run, and so do `QUICK_SECONDS` of a quick one.
    """
    end = time.monotonic() + QUICK_SECONDS if quick else math.inf
    done = 0

    def save() -> None:
        write(out, meta | {"refused": runner.refused, "slowed": runner.slowed}, runner.rows)

    with tqdm(total=sum(map(len, steps)), unit="figure", mininterval=1) as progress:
        try:
            for step in steps:
                if time.monotonic() > end:
                    break
                runner.run(step, progress)
                done += 1
                save()
        except KeyboardInterrupt:
            pass
    save()
    return [step.work.name for step in steps[done:]]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), metavar="CASE")
    parser.add_argument("--variants", nargs="+", metavar="WORDS", help='"" is no word')
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, metavar="DIRECTION")
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), metavar="PROVIDER")
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="FOLDER",
        help="packages here take precedence over installed ones",
    )
    parser.add_argument("--targets", action="store_true", help="only figures that have a target")
    parser.add_argument(
        "--sweep", nargs="+", metavar="PLAN", help="values of FUSED_ROPE_PLAN, compared with none"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: results/<device>.json in this folder")
    parser.add_argument("--quick", action="store_true", help="few repetitions, two minutes at most")
    parser.add_argument(
        "--plots", action="store_true", help="also draw PNG files into the folder of --out"
    )
    parser.add_argument("--commit", help="recorded in the file where git is not available")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.sweep:
        return sweep(args)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_stream(
            torch.cuda.Stream(device)
        )  # graphs cannot be captured on the default one
    if args.peers:
        if not args.peers.is_dir():
            raise SystemExit(f"--peers: expected a folder of packages, got {args.peers}")
        sys.path.insert(0, str(args.peers.resolve()))
    providers, skipped = load_providers(args.providers, device)
    for name, reason in skipped.items():
        print(f"skipped: {name} ({reason})")
    works, wanted = select(device.type, args.cases, args.variants), [is_target] * args.targets
    steps = plan(works, args.directions, providers, *wanted)
    if device.type == "cuda":
        print(estimate(steps))
    out = args.out or HERE / "results" / f"{slug(device)}.json"
    meta = meta_of(device, args.commit) | {"skipped": skipped}
    runner = Runner(device, measure.QUICK if args.quick else measure.FULL)
    left_out = run_steps(runner, steps, args.quick, out, meta)
    print(markdown(runner.rows))
    for name in runner.slowed:
        print(f"measured while the GPU was throttled: {name}")
    print(f"{len(runner.rows)} figures in {out}")
    if left_out:
        print("left out:", *left_out, sep="\n  ")
    if args.plots:
        from plots import draw

        print("drawn:", *draw(out))
    return 0 if runner.rows else 1


if __name__ == "__main__":
    raise SystemExit(main())
