"""Trains a small Hugging Face Llama twice: with its own rotary function, and with fused_rope's.

Then times both functions alone, on a layer of Llama 3 8B.

    python examples/train_llama.py [--steps 100] [--device cpu] [--out build/demo.png]

Both runs start from the same weights and read the same batches, so their losses are comparable.
Their steps alternate, so that other load on the machine slows both equally. The model is byte-level
and reads the sources of Python's standard library; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from fused_rope.compat.transformers import apply_rotary_pos_emb, patched
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

SEED = 0
BATCH, LENGTH = 8, 128
LAST = 10  # the final loss is the mean of this many steps, as one batch is noisy
TOKENS, WARM_UPS, REPETITIONS = 2048, 2, 10  # of the functions timed alone

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
    use_cache=False,
    attn_implementation="eager",  # deterministic order of sums, on CUDA too
)


def read_text() -> Tensor:
    """The top-level modules of the standard library, uint8 [bytes]."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(module.read_bytes() for module in modules)
    print(f"Text: Python's standard library, {len(modules)} modules, {len(text) / 1e6:.1f} MB")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batches(text: Tensor, steps: int, device: torch.device) -> Iterator[Tensor]:
    """Yields the same random excerpts on every call, int64 [BATCH, LENGTH] each."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=generator)
        yield text[starts + torch.arange(LENGTH)].to(device, torch.int64)


def make_model(device: torch.device) -> LlamaForCausalLM:
    """Returns a model with the same random weights on every call."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(CONFIG).to(device)


@contextmanager
def fused(model: LlamaForCausalLM) -> Iterator[str]:
    """Patches the model inside the context; yields the report of what was replaced."""
    with patched(model) as report:
        if not report.patched:
            raise SystemExit(f"this release of transformers could not be patched:\n{report}")
        yield str(report)


def logits_and_gradients(model: LlamaForCausalLM, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    output = model(input_ids=batch, labels=batch)
    output.loss.backward()
    return output.logits.detach(), [p.grad.clone() for p in model.parameters()]


def compare(model: LlamaForCausalLM, batch: Tensor) -> None:
    """Prints how far the patched model is from the original, with the same weights and batch."""
    original_logits, original_gradients = logits_and_gradients(model, batch)
    with fused(model) as report:
        print(report)
        logits, gradients = logits_and_gradients(model, batch)
    print("Largest difference between original and patched, same weights, same batch:")
    print("  logits   ", difference([logits], [original_logits]))
    print("  gradients", difference(gradients, original_gradients))


def difference(ours: list[Tensor], original: list[Tensor]) -> str:
    largest = max((x - y).abs().max().item() for x, y in zip(ours, original, strict=True))
    scale = max(y.abs().max().item() for y in original)
    return f"{largest:.2g}, of values up to {scale:.2g}"


class Run:
    """One training run: a model, its optimizer, and the loss and time of each step."""

    def __init__(self, device: torch.device) -> None:
        self.model = make_model(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        self.losses: list[float] = []
        self.milliseconds: list[float] = []

    def step(self, batch: Tensor) -> None:
        start = time.perf_counter()
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        if batch.is_cuda:
            torch.cuda.synchronize()
        self.milliseconds.append(1e3 * (time.perf_counter() - start))

    @property
    def final_loss(self) -> float:
        return statistics.mean(self.losses[-LAST:])

    @property
    def median_milliseconds(self) -> float:
        return statistics.median(self.milliseconds)


def train(text: Tensor, steps: int, device: torch.device) -> dict[str, Run]:
    original, ours = Run(device), Run(device)
    with tqdm(batches(text, steps, device), "Training", total=steps, unit="step") as progress:
        for batch in progress:
            original.step(batch)
            with fused(ours.model):
                ours.step(batch)
            progress.set_postfix(
                original=f"{original.losses[-1]:.3f}", patched=f"{ours.losses[-1]:.3f}"
            )
    return {"original": original, "patched": ours}


def time_functions(device: torch.device) -> dict[str, dict[str, float]]:
    """Median milliseconds of the two rotary functions, forward, and forward with backward."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k = (torch.randn(1, heads, TOKENS, 128, device=device, dtype=dtype) for heads in (32, 8))
    angles = torch.arange(TOKENS)[:, None] * 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    tables = [table.repeat(1, 2)[None].to(device, dtype) for table in (angles.cos(), angles.sin())]
    functions = {
        "original": modeling_llama.apply_rotary_pos_emb,
        "fused_rope": apply_rotary_pos_emb,
    }
    times: dict[str, dict[str, float]] = {}
    for way, needs_grad in (("forward", False), ("with backward", True)):
        q.requires_grad_(needs_grad)
        k.requires_grad_(needs_grad)

        def call(function: Callable[..., tuple[Tensor, Tensor]]) -> None:
            rotated = function(q, k, *tables)
            if rotated[0].requires_grad:
                torch.autograd.grad(rotated, (q, k), (q, k))

        samples: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(WARM_UPS + REPETITIONS):
            for name, function in functions.items():
                start = time.perf_counter()
                call(function)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                samples[name].append(1e3 * (time.perf_counter() - start))
        times[way] = {name: statistics.median(all_[WARM_UPS:]) for name, all_ in samples.items()}
    return times


def draw(runs: dict[str, Run], times: dict[str, dict[str, float]], path: Path) -> None:
    """Plots the loss curves, and the times of the rotary functions."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss_axes, time_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    # The curves coincide: a wide pale line stays visible under a thin dark one.
    styles = ({"color": "tab:orange", "lw": 5, "alpha": 0.5}, {"color": "tab:blue", "lw": 1.2})
    for style, (name, run) in zip(styles, runs.items(), strict=True):
        label = f"{name}: {run.final_loss:.4f} at the end"
        loss_axes.plot(range(1, len(run.losses) + 1), run.losses, label=label, **style)
    same = [run.losses for run in runs.values()]
    title = "Training loss: equal at every step" if same[0] == same[1] else "Training loss"
    loss_axes.set(xlabel="step", ylabel="loss, nats per byte", title=title)
    loss_axes.legend()

    for place, by_name in enumerate(times.values()):
        for side, (name, style) in enumerate(zip(by_name, styles, strict=True)):
            x = place + 0.4 * (side - 0.5)
            label = name if place == 0 else None
            time_axes.bar(x, by_name[name], 0.36, color=style["color"], alpha=0.7, label=label)
        factor = by_name["original"] / by_name["fused_rope"]
        time_axes.text(
            place + 0.2, by_name["fused_rope"], f"{factor:.1f}x", ha="center", va="bottom"
        )
    time_axes.set_xticks(range(len(times)), list(times))
    time_axes.set(
        xlabel=f"one layer of Llama 3 8B, {TOKENS} tokens",
        ylabel="milliseconds",
        title="Rotary function alone: speed-up",
        ylim=(0, None),
    )
    time_axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="of each run (default: 100)")
    parser.add_argument("--out", type=Path, default=Path("build/demo.png"), help="the picture")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=default, help="cpu or cuda")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("expected --steps of at least 2")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    device, steps = arguments.device, arguments.steps
    text = read_text()
    model = make_model(device)
    print(f"Model: Llama, {model.num_parameters() / 1e6:.1f} M parameters, float32, on {device}")
    compare(model, next(batches(text, 1, device)))
    runs = train(text, steps, device)
    for name, run in runs.items():
        print(
            f"{name:8} final loss {run.final_loss:.6f} (mean of the last {LAST} steps), "
            f"median time per step {run.median_milliseconds:.1f} ms"
        )
    times = time_functions(device)
    print(f"The rotary function alone, on a layer of Llama 3 8B with {TOKENS} tokens:")
    for way, by_name in times.items():
        factor = by_name["original"] / by_name["fused_rope"]
        print(
            f"  {way:14} original {by_name['original']:.2f} ms, fused_rope "
            f"{by_name['fused_rope']:.2f} ms: {factor:.1f} times as fast"
        )
    draw(runs, times, arguments.out)
    print(f"Picture: {arguments.out}")


if __name__ == "__main__":
    main()
