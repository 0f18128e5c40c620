"""Trains a small Hugging Face Llama twice: with its own rotary function, and with fused_rope's.

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from fused_rope.compat.transformers import patch, unpatch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 0
BATCH, LENGTH = 8, 128
LAST = 10  # the final loss is the mean of this many steps, as one batch is noisy

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
def patched(model: LlamaForCausalLM) -> Iterator[str]:
    """Patches the model inside the context; yields the report of what was replaced."""
    report = patch(model)
    if not report.patched:
        raise SystemExit(f"this release of transformers could not be patched:\n{report}")
    try:
        yield str(report)
    finally:
        unpatch(model)


def logits_and_gradients(model: LlamaForCausalLM, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    output = model(input_ids=batch, labels=batch)
    output.loss.backward()
    return output.logits.detach(), [p.grad.clone() for p in model.parameters()]


def compare(model: LlamaForCausalLM, batch: Tensor) -> None:
    """Prints how far the patched model is from the original, with the same weights and batch."""
    original_logits, original_gradients = logits_and_gradients(model, batch)
    with patched(model) as report:
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
    original, fused = Run(device), Run(device)
    with tqdm(batches(text, steps, device), "Training", total=steps, unit="step") as progress:
        for batch in progress:
            original.step(batch)
            with patched(fused.model):
                fused.step(batch)
            progress.set_postfix(
                original=f"{original.losses[-1]:.3f}", patched=f"{fused.losses[-1]:.3f}"
            )
    return {"original": original, "patched": fused}


def draw(runs: dict[str, Run], path: Path) -> None:
    """Plots the loss curves and the times per step."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss_axes, time_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    # The curves coincide: a wide pale line stays visible under a thin dark one.
    styles = ({"color": "tab:orange", "lw": 5, "alpha": 0.5}, {"color": "tab:blue", "lw": 1.2})
    for style, (name, run) in zip(styles, runs.items(), strict=True):
        label = f"{name}: {run.final_loss:.4f} at the end"
        loss_axes.plot(range(1, len(run.losses) + 1), run.losses, label=label, **style)
    loss_axes.set(xlabel="step", ylabel="loss, nats per byte", title="Training loss")
    loss_axes.legend()

    labels = [f"{name}\nmedian {run.median_milliseconds:.1f} ms" for name, run in runs.items()]
    # The first step warms up caches and allocators. Whiskers: 10th and 90th percentile.
    times = [run.milliseconds[1:] for run in runs.values()]
    boxes = time_axes.boxplot(
        times,
        tick_labels=labels,
        whis=(10, 90),
        showfliers=False,
        widths=0.5,
        patch_artist=True,
        medianprops={"color": "black"},
    )
    for box, style in zip(boxes["boxes"], styles, strict=True):
        box.set(facecolor=style["color"], alpha=0.5)
    time_axes.set(ylabel="milliseconds", title="Time per step", ylim=(0, None))
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
    print("The rotation is a small part of a step; `make bench` times it alone.")
    draw(runs, arguments.out)
    print(f"Picture: {arguments.out}")


if __name__ == "__main__":
    main()
