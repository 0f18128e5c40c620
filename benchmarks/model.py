"""Hugging Face models, original and patched: one-token steps, prefill, and training steps.

    python benchmarks/model.py                         Llama and Qwen3, eager and compiled
    python benchmarks/model.py --models qwen3_8b --modes eager --variants patched norms_fused
    python benchmarks/model.py --compile-mode reduce-overhead --modes compiled --phases decode
    python benchmarks/model.py --tiny --device cpu --backend aot_eager      test the script

Eight layers of 8B width with random bfloat16 weights; the vocabulary is 1024, so the layers take
nearly all of the time. Blocks of the original and the patched model alternate in one process, and
their results are compared before they are timed. NOTES.md describes the measurement.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure
import torch
import transformers
from fused_rope.compat.transformers import patch, unpatch
from run import meta_of, slug, write
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
Row = dict[str, Any]
Model = torch.nn.Module

# The options of patch(); None: the original model.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "original": None,
    "patched": {},
    "patched_rows": {"rows": 8192},
    "patched_fused": {"compiled": "fused"},
    "norms_fused": {"compiled": "fused", "norms": "fused"},
}
MODES = {
    "eager": ("original", "patched", "patched_rows", "norms_fused"),
    "compiled": ("original", "patched", "patched_fused", "norms_fused"),
}
TOLERANCE = 5e-2  # relative to the original in the same mode; bfloat16 through all layers


@dataclass(frozen=True)
class Sizes:
    """The number of tokens of each phase, and widths that override the model's."""

    prompt: int = 256
    cache: int = 512
    steps: int = 40
    prefill: tuple[int, int] = (1, 2048)
    train: tuple[int, int] = (4, 2048)
    widths: dict[str, int] = field(default_factory=dict)


FULL = Sizes()
TINY = Sizes(
    prompt=8,
    cache=32,
    steps=6,
    prefill=(1, 16),
    train=(2, 16),
    widths={
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 2,
    },
)
MODELS = {
    "llama3_8b": ("Llama", {"intermediate_size": 14336, "head_dim": 128}, 500_000.0),
    "qwen3_8b": ("Qwen3", {"intermediate_size": 12288, "head_dim": 128}, 1_000_000.0),
}
NORMS = ("q_norm", "k_norm")
NORMALIZED = ("qwen3_8b",)  # those with norms of q and k; the others lack the variants of norms
WIDTHS = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}


def build(name: str, sizes: Sizes, layers: int, device: torch.device) -> Model:
    """A model with random weights on the device."""
    family, widths, theta = MODELS[name]
    options = {"num_hidden_layers": layers, **WIDTHS, **widths, **sizes.widths}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=1024,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        attn_implementation="sdpa",
        **options,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return getattr(transformers, f"{family}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(before)


class Phase:
    """One kind of step. `call` is the model or the compiled model."""

    by_host = False  # host time matters: measure blocks of steps

    def __init__(self, model: Model, sizes: Sizes, device: torch.device) -> None:
        self.model = model.eval()
        self.sizes = sizes
        self.device = device

    def ids(self, shape: tuple[int, int]) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        vocabulary = self.model.config.vocab_size
        return torch.randint(1, vocabulary, shape, generator=generator).to(self.device)

    def rewind(self) -> None:
        """Resets the cache to the end of the prompt."""

    def step(self, call: Callable[..., Any]) -> Any:
        raise NotImplementedError

    def results(self, call: Callable[..., Any]) -> list[Tensor]:
        """The results that are compared with the original model's."""
        raise NotImplementedError


class Decode(Phase):
    """One token after a prompt, with a static cache."""

    by_host = True

    def __init__(self, model: Model, sizes: Sizes, device: torch.device) -> None:
        super().__init__(model, sizes, device)
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=sizes.cache)
        self.token = self.ids((1, 1))
        with torch.no_grad():
            model(self.ids((1, sizes.prompt)), past_key_values=self.cache, use_cache=True)

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.sizes.prompt)

    @torch.no_grad()
    def step(self, call: Callable[..., Any]) -> Tensor:
        return call(self.token, past_key_values=self.cache, use_cache=True).logits

    def results(self, call: Callable[..., Any]) -> list[Tensor]:
        self.rewind()
        return [self.step(call).clone() for _ in range(3)]


class Prefill(Phase):
    """A prompt without a cache; the logits of its last token."""

    def __init__(self, model: Model, sizes: Sizes, device: torch.device) -> None:
        super().__init__(model, sizes, device)
        self.prompt = self.ids(sizes.prefill)

    @torch.no_grad()
    def step(self, call: Callable[..., Any]) -> Tensor:
        return call(self.prompt, use_cache=False, logits_to_keep=1).logits

    def results(self, call: Callable[..., Any]) -> list[Tensor]:
        return [self.step(call).clone()]


class Train(Phase):
    """Forward, loss and backward, without an optimizer."""

    def __init__(self, model: Model, sizes: Sizes, device: torch.device) -> None:
        super().__init__(model, sizes, device)
        self.model.train()
        self.tokens = self.ids(sizes.train)

    def step(self, call: Callable[..., Any]) -> Tensor:
        loss = call(self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        return loss.detach()

    def results(self, call: Callable[..., Any]) -> list[Tensor]:
        """The loss, and gradients that depend on norms and rotation of every layer."""
        loss = call(self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        attention = self.model.model.layers[0].self_attn
        layers = [getattr(attention, name, None) for name in ("q_proj", "k_proj", *NORMS)]
        grads = [layer.weight.grad.clone() for layer in layers if layer is not None]
        self.model.zero_grad(set_to_none=True)
        return [loss.detach(), *grads]


PHASES: dict[str, type[Phase]] = {"decode": Decode, "prefill": Prefill, "train": Train}


@contextmanager
def applied(model: Model, variant: str) -> Iterator[None]:
    """Applies a variant's patch. Repeated patching installs the same functions, so nothing is
    recompiled."""
    options = VARIANTS[variant]
    if options is None:
        yield
        return
    report = patch(model, **options)
    try:
        assert report.patched and not report.left_alone, str(report)
        assert bool(report.norms) == ("norms" in options), str(report)
        yield
    finally:
        unpatch(model)


def fits(variant: str, name: str) -> bool:
    """Whether a model has what the variant replaces."""
    return name in NORMALIZED or "norms" not in (VARIANTS[variant] or {})


def distance(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest relative error in norm."""
    return max(
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
        for a, b in zip(got, want, strict=True)
    )


class NormCalls(TorchDispatchMode):
    """Counts forward calls of the operator that normalizes and rotates."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function is torch.ops.fused_rope.norm_rotate_qk.default
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Effort:
    """The number of rounds, and of device-bound steps per block."""

    rounds: int
    steps: int


EFFORT = Effort(rounds=8, steps=3)
QUICK = Effort(rounds=3, steps=2)


class Contest:
    """The variants of one phase of one model in one mode."""

    def __init__(self, phase: Phase, call: Callable[..., Any], effort: Effort) -> None:
        self.phase = phase
        self.call = call
        self.effort = effort
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.distances: dict[str, float] = {}
        self._want: list[Tensor] = []

    def enter(self, variant: str) -> None:
        """Compiles and verifies a variant. The first one is the reference for the others."""
        with applied(self.phase.model, variant):
            got = self._results("norms" in (VARIANTS[variant] or {}))
            self._want = self._want or got
            far = distance(got, self._want)
            if not far < TOLERANCE:
                raise AssertionError(f"results are {far:.3g} away from the original")
            self._block()
        self.distances[variant] = far
        self.samples[variant] = {}

    def _results(self, normalizes: bool) -> list[Tensor]:
        """The phase's results; an eager call must use the fused norms in all layers."""
        eager = self.call is self.phase.model
        if not (eager and normalizes):
            return self.phase.results(self.call)
        with NormCalls() as calls:
            got = self.phase.results(self.call)
        layers = self.phase.model.config.num_hidden_layers
        if not calls.count or calls.count % layers:
            raise AssertionError(f"{calls.count} calls with norms in {layers} layers")
        return got

    def round(self) -> None:
        """Measures one block of each variant."""
        for variant, samples in self.samples.items():
            with applied(self.phase.model, variant):
                self.phase.rewind()
                self.phase.step(self.call)
                for metric, values in self._block().items():
                    samples.setdefault(metric, []).extend(values)

    def _block(self) -> dict[str, list[float]]:
        with measure.no_collection():
            return self._host_block() if self.phase.by_host else self._device_block()

    def _host_block(self) -> dict[str, list[float]]:
        """Microseconds per step, of the host alone and until the device has finished."""
        steps = self.phase.sizes.steps
        self.phase.rewind()
        measure.synchronize(self.phase.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.phase.step(self.call)
        enqueued = time.perf_counter() - start
        measure.synchronize(self.phase.device)
        done = time.perf_counter() - start
        return {"wall_us": [done * 1e6 / steps], "host_us": [enqueued * 1e6 / steps]}

    def _device_block(self) -> dict[str, list[float]]:
        """Microseconds of each step, between CUDA events."""
        steps = self.effort.steps
        if self.phase.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(steps):
                self.phase.step(self.call)
            return {"wall_us": [(time.perf_counter() - start) * 1e6 / steps]}
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for event in events[1:]:
            self.phase.step(self.call)
            event.record()
        torch.cuda.synchronize()
        pairs = itertools.pairwise(events)
        return {"wall_us": [a.elapsed_time(b) * 1e3 for a, b in pairs]}

    def peaks(self) -> dict[str, float]:
        """Peak bytes that a step allocates, on CUDA."""
        if self.phase.device.type != "cuda":
            return {}
        found = {}
        for variant in self.samples:
            with applied(self.phase.model, variant):
                self.phase.rewind()
                self.phase.step(self.call)
                step = self.phase.step
                found[variant] = float(
                    measure.peak_bytes(lambda step=step: step(self.call), self.phase.device)
                )
        return found


class Suite:
    """All contests of a run; those that fail or start after the deadline are named and left out."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.sizes = TINY if args.tiny else FULL
        self.effort = QUICK if args.quick else EFFORT
        self.deadline = time.monotonic() + args.seconds
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        self.out = args.out or HERE / "results" / f"{slug(self.device)}_model.json"
        self.meta = meta_of(self.device, args.commit) | {
            "transformers": transformers.__version__,
            "layers": args.layers,
            "compile_mode": args.compile_mode,
        }

    def run(self) -> None:
        for name in self.args.models:
            try:
                model = build(name, self.sizes, self.args.layers, self.device)
            except Exception as error:
                self._leave_out(name, error)
                continue
            for mode in self.args.modes:
                for phase in self.args.phases:
                    self._contest(name, model, mode, phase)
                    self._write()
            del model
            self._clean()

    def _contest(self, name: str, model: Model, mode: str, phase: str) -> None:
        where = f"{name} {mode} {phase}"
        if time.monotonic() > self.deadline:
            self._leave_out(where, "out of time")
            return
        self._clean()
        start = time.monotonic()
        try:
            call = self._call(model, mode)
            contest = Contest(PHASES[phase](model, self.sizes, self.device), call, self.effort)
            variants = [v for v in self.args.variants or MODES[mode] if fits(v, name)]
            self._enter(contest, where, variants)
            entered = time.monotonic() - start
            for number in range(self.effort.rounds):
                if number < 2 or time.monotonic() < self.deadline:
                    contest.round()
            self.rows += rows_of(name, mode, phase, contest)
        except Exception as error:
            self._leave_out(where, error)
            return
        total = time.monotonic() - start
        print(f"{where}: {total:.0f} s, of these {entered:.0f} s before timing", flush=True)

    def _enter(self, contest: Contest, where: str, variants: Sequence[str]) -> None:
        """Enters all variants. One that fails is left out; if the original fails, it raises."""
        contest.enter("original")
        for variant in (v for v in variants if v != "original"):
            try:
                contest.enter(variant)
            except Exception as error:
                self._leave_out(f"{where} {variant}", error)

    def _call(self, model: Model, mode: str) -> Callable[..., Any]:
        if mode == "eager":
            return model
        options = {} if self.args.backend != "inductor" else {"mode": self.args.compile_mode}
        return torch.compile(model, backend=self.args.backend, dynamic=False, **options)

    def _clean(self) -> None:
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _leave_out(self, where: str, why: object) -> None:
        lines = (f"{type(why).__name__}: {why}" if isinstance(why, Exception) else why).splitlines()
        self.left_out.append(f"{where}: {lines[0]}")
        print(f"left out: {self.left_out[-1]}", flush=True)

    def _write(self) -> None:
        write(self.out, self.meta | {"left_out": self.left_out}, self.rows)


def rows_of(name: str, mode: str, phase: str, contest: Contest) -> list[Row]:
    """One row per figure; the baseline is the original's figure of the same contest."""
    figures = {
        variant: {metric: measure.figure_of(values) for metric, values in samples.items()}
        for variant, samples in contest.samples.items()
    }
    for variant, peak in contest.peaks().items():
        figures[variant]["peak_bytes"] = measure.Figure(peak, peak, peak)
    return [
        {
            "case": name,
            "variant": mode,
            "direction": phase,
            "provider": variant,
            "metric": metric,
            "median": figure.median,
            "baseline": figures["original"][metric].median,
            "quartiles": [figure.low, figure.high],
            "distance": contest.distances[variant],
        }
        for variant, by_metric in figures.items()
        for metric, figure in by_metric.items()
    ]


def markdown(rows: Sequence[Row]) -> str:
    """A line per contest and metric; in parentheses, the ratio to the original."""
    variants = list(dict.fromkeys(row["provider"] for row in rows))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("case", "variant", "direction", "metric"))
        ratio = row["median"] / row["baseline"] if row["baseline"] else 1.0
        unit = 1e6 if row["metric"] == "peak_bytes" else 1e3
        cell = f"{row['median'] / unit:.4g} ({ratio:.3f})"
        lines.setdefault(key, {})[row["provider"]] = cell
    head = ["model", "mode", "phase", "ms; peak in MB", *variants]
    table = [head, ["---"] * 4 + ["---:"] * len(variants)]
    table += [[*key, *(cells.get(v, "") for v in variants)] for key, cells in lines.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, choices in (("models", MODELS), ("modes", MODES), ("phases", PHASES)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(choices), default=list(choices))
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), help="in addition to the original"
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--compile-mode", default="default", help="of torch.compile")
    parser.add_argument("--seconds", type=float, default=220, help="no contest starts after these")
    parser.add_argument("--out", type=Path, help="default: results/<device>_model.json")
    parser.add_argument("--quick", action="store_true", help="few repetitions, to try a run")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to test the script")
    parser.add_argument("--commit", help="recorded in the file where git is not available")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    suite = Suite(arguments(argv))
    suite.run()
    print(markdown(suite.rows))
    print(f"{len(suite.rows)} figures in {suite.out}")
    return 0 if suite.rows else 1


if __name__ == "__main__":
    raise SystemExit(main())
