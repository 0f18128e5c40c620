"""The kernels around the rotation in a decode step, captured in one CUDA graph.

    python benchmarks/decode_chain.py                       batches of 1 and 64, context of 512
    python benchmarks/decode_chain.py --label pdl --quick   label the rows of this build
    python benchmarks/decode_chain.py --tiny --device cpu   test the script

For each layer: RMS norm of each head of q and k (Qwen3), rotation, k and v into a cache of
rows [B * context, Hk, D], attention over the cache. There are five ways to rotate and write:

    eager_hf         Hugging Face's function, then index_copy_
    fused_copy       fused_rope.rotate_qk, then index_copy_
    fused_write      fused_rope.rotate_qk with out_rows, which writes k into the cache
    fused_cache      fused_rope.rotate_and_cache, which normalizes too, into pages
    fused_cache_fp8  the same into pages of float8_e4m3fn, which attention converts to bfloat16

The first three write v by index_copy_. Each is compared with float64 before it is timed.
Letters: B batch, Hq, Hk query and key heads, D head_dim.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fused_rope
import measure
import torch
import torch.nn.functional as F
from run import meta_of, slug, write
from torch import Tensor

HERE = Path(__file__).resolve().parent
Row = dict[str, Any]
EPS = 1e-6
TOLERANCE = 2e-2  # relative; bfloat16 norms, tables, products and attention
TOLERANCE_FP8 = 6e-2  # of k and v in float8_e4m3fn, too
SCALE = 1 / 32  # of float8_e4m3fn: keys reach 8 and values 5


@dataclass(frozen=True)
class Shape:
    """Sizes of a chain; every sequence has `context` tokens, including the one of this step."""

    batch: int
    context: int = 512
    query_heads: int = 32
    key_heads: int = 8
    head_dim: int = 128
    layers: int = 8
    page_size: int = 8


class Layer:
    """The tensors of one layer of the chain."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        B, Hq, Hk, D = shape.batch, shape.query_heads, shape.key_heads, shape.head_dim

        def randn(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device=device).bfloat16()

        self.q, self.k, self.v = randn(B, Hq + 2 * Hk, D).split([Hq, Hk, Hk], dim=1)
        self.q_weight, self.k_weight = 1 + randn(D) / 8, 1 + randn(D) / 8
        self.k_cache, self.v_cache = (randn(B * shape.context, Hk, D) for _ in range(2))
        self.slots = torch.arange(1, B + 1, device=device) * shape.context - 1
        self.positions = torch.full((B,), shape.context - 1, device=device)
        inv_freq = 1e6 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
        self.cos, self.sin = fused_rope.cos_sin_table(inv_freq, shape.context, device=device)
        full = [torch.cat([t, t], -1)[self.positions, None] for t in (self.cos, self.sin)]
        self.full_cos, self.full_sin = (t.bfloat16() for t in full)

    def normed(self) -> tuple[Tensor, Tensor]:
        """q [B, Hq, D] and k [B, Hk, D] after the RMS norm of each head."""
        D = (self.shape.head_dim,)
        return (
            F.rms_norm(self.q, D, self.q_weight, EPS),
            F.rms_norm(self.k, D, self.k_weight, EPS),
        )

    @cached_property
    def scale(self) -> Tensor:
        return torch.tensor(SCALE, device=self.q.device)

    @cached_property
    def fp8(self) -> tuple[Tensor, Tensor]:
        """The caches in 8 bits."""
        k, v = (cache.float() / self.scale for cache in (self.k_cache, self.v_cache))
        return k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)

    def write(self, caches: tuple[Tensor, Tensor], **scales: Tensor) -> Tensor:
        """q [B, Hq, D] normalized and rotated; k and v go to the pages of these caches."""
        k_pages, v_pages = (cache.unflatten(0, (-1, self.shape.page_size)) for cache in caches)
        return fused_rope.rotate_and_cache(
            *(self.q, self.k, self.v, self.cos, self.sin, k_pages, v_pages, self.slots),
            layout="thd",
            positions=self.positions,
            q_weight=self.q_weight,
            k_weight=self.k_weight,
            eps=EPS,
            **scales,
        )

    def attend(self, q: Tensor, caches: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attention [B, Hq, D] of q over the cache rows of its sequence."""
        k, v = (
            cache.unflatten(0, (self.shape.batch, -1)).transpose(1, 2)
            for cache in caches or (self.k_cache, self.v_cache)
        )
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def eager_hf(layer: Layer) -> Tensor:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = (x[:, :, None] for x in layer.normed())  # [B, H, S = 1, D]
    q, k = apply_rotary_pos_emb(q, k, layer.full_cos, layer.full_sin)
    layer.k_cache.index_copy_(0, layer.slots, k[:, :, 0])
    layer.v_cache.index_copy_(0, layer.slots, layer.v)
    return layer.attend(q[:, :, 0])


def fused_copy(layer: Layer) -> Tensor:
    q, k = fused_rope.rotate_qk(
        *layer.normed(), layer.cos, layer.sin, layout="thd", positions=layer.positions
    )
    layer.k_cache.index_copy_(0, layer.slots, k)
    layer.v_cache.index_copy_(0, layer.slots, layer.v)
    return layer.attend(q)


def fused_write(layer: Layer) -> Tensor:
    q, k = layer.normed()
    out = torch.empty_like(q)
    fused_rope.rotate_qk(
        *(q, k, layer.cos, layer.sin),
        layout="thd",
        positions=layer.positions,
        out=(out, layer.k_cache),
        out_rows=layer.slots,
    )
    layer.v_cache.index_copy_(0, layer.slots, layer.v)
    return layer.attend(out)


def fused_cache(layer: Layer) -> Tensor:
    return layer.attend(layer.write((layer.k_cache, layer.v_cache)))


def fused_cache_fp8(layer: Layer) -> Tensor:
    # The scale of k is a factor of q, that of v of the result.
    q = layer.write(layer.fp8, k_scale=layer.scale, v_scale=layer.scale) * layer.scale
    k, v = (cache.bfloat16() for cache in layer.fp8)
    return layer.attend(q.bfloat16(), (k, v)) * layer.scale


Way = Callable[[Layer], Tensor]
FP8_WAYS = ("fused_cache_fp8",)
WAYS: dict[str, Way] = {
    way.__name__: way for way in (eager_hf, fused_copy, fused_write, fused_cache, fused_cache_fp8)
}


def expected(layer: Layer) -> tuple[Tensor, Tensor]:
    """In float64: the result of attention [B, Hq, D], and k [B, Hk, D] in the cache."""

    def normed_and_rotated(x: Tensor, weight: Tensor) -> Tensor:
        x = x.double()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()
        pairs = torch.complex(*x.chunk(2, dim=-1))
        row = layer.shape.context - 1
        pairs = pairs * torch.complex(layer.cos[row].double(), layer.sin[row].double())
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    B, groups = layer.shape.batch, layer.shape.query_heads // layer.shape.key_heads
    q = normed_and_rotated(layer.q, layer.q_weight)
    new_k = normed_and_rotated(layer.k, layer.k_weight)
    k, v = layer.k_cache.double(), layer.v_cache.double()
    k[layer.slots], v[layer.slots] = new_k, layer.v.double()
    k, v = (x.unflatten(0, (B, -1)).repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bhd,blhd->bhl", q, k) / layer.shape.head_dim**0.5
    return torch.einsum("bhl,blhd->bhd", scores.softmax(-1), v), new_k


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def verify(
    layer: Layer, run: Callable[[], Tensor], want: tuple[Tensor, Tensor], is_fp8: bool
) -> None:
    """Raises AssertionError unless `run` writes k into the cache and attends to it."""
    cache, tolerance = (layer.fp8[0], TOLERANCE_FP8) if is_fp8 else (layer.k_cache, TOLERANCE)
    before = cache.clone()
    rows = cache.view(torch.uint8)  # indexing does not support all 8-bit floats
    rows[layer.slots] = 0xFF  # NaN
    out = run()
    keys = rows[layer.slots].view(cache.dtype).double() * (layer.scale if is_fp8 else 1)
    for what, a, b in zip(("attention", "keys"), (out, keys), want, strict=True):
        far = distance(a, b)
        if not far < tolerance:
            raise AssertionError(f"{what} are {far:.3g} away from float64")
    before.view(torch.uint8)[layer.slots] = rows[layer.slots]
    if not torch.equal(before.view(torch.uint8), rows):
        raise AssertionError("rows of other tokens were written")


class Chain:
    """All layers in one of the ways: a CUDA graph, or calls on the CPU."""

    def __init__(self, name: str, layers: Sequence[Layer], wants: Sequence[Any]) -> None:
        way, is_fp8 = WAYS[name], name in FP8_WAYS

        def bind(layer: Layer) -> Callable[[], Tensor]:
            return lambda: way(layer)

        self.calls = [bind(layer) for layer in layers]
        self.graph: measure.Graph | None = None
        for layer, call, want in zip(layers, self.calls, wants, strict=True):
            verify(layer, call, want, is_fp8)
        if layers[0].q.is_cuda:
            self.graph = graph = measure.Graph(self.calls)
            for number, (layer, want) in enumerate(zip(layers, wants, strict=True)):
                verify(layer, lambda number=number: self._replayed(graph, number), want, is_fp8)

    @staticmethod
    def _replayed(graph: measure.Graph, number: int) -> Tensor:
        graph.outputs[number].fill_(float("nan"))
        graph.replay()
        return graph.outputs[number]

    def time(self, effort: measure.Effort) -> measure.Figure:
        """Microseconds per layer."""
        return self.graph.time(effort) if self.graph else measure.cpu_time(self.calls, effort)


def contest(shape: Shape, args: argparse.Namespace, left_out: list[str]) -> list[Row]:
    """The rows of all ways, measured in alternation; a way that fails is named and left out."""
    device = torch.device(args.device)
    effort = measure.QUICK if args.quick else measure.FULL
    torch.manual_seed(0)
    layers = [Layer(shape, device) for _ in range(shape.layers)]
    wants = [expected(layer) for layer in layers]
    chains: dict[str, Chain] = {}
    for name in args.ways:
        try:
            chains[name] = Chain(name, layers, wants)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            left_out.append(f"chain{shape.batch} {name}: {reason}")
            print(f"left out: {left_out[-1]}", flush=True)
    samples: dict[str, list[float]] = {name: [] for name in chains}
    for _ in range(3 if args.quick else 9):
        for name, chain in chains.items():
            samples[name].append(chain.time(effort).median)
    figures = {name: measure.figure_of(values) for name, values in samples.items()}
    baseline = figures.get("eager_hf") or next(iter(figures.values()), None)
    return [
        {
            "case": f"chain{shape.batch}",
            "variant": args.label,
            "direction": "decode",
            "provider": name,
            "metric": "gpu_us" if device.type == "cuda" else "cpu_us",
            "median": figure.median,
            "baseline": baseline.median if baseline else figure.median,
            "quartiles": [figure.low, figure.high],
        }
        for name, figure in figures.items()
    ]


def markdown(rows: Sequence[Row]) -> str:
    """Microseconds per layer, and their ratio to the baseline."""
    lines = ["| chain | label | way | us a layer | of eager |", "| --- | --- | --- | ---: | ---: |"]
    for row in rows:
        ratio = row["median"] / row["baseline"]
        names = f"| {row['case']} | {row['variant']} | {row['provider']} "
        lines.append(f"{names}| {row['median']:.2f} | {ratio:.3f} |")
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--label", default=os.environ.get("FUSED_ROPE_LABEL", ""))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: results/<device>_chain.json")
    parser.add_argument("--quick", action="store_true", help="few repetitions, to try a run")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to test the script")
    parser.add_argument("--commit", help="recorded in the file where git is not available")
    return parser.parse_args(argv)


def shape_of(batch: int, args: argparse.Namespace) -> Shape:
    if args.tiny:
        return Shape(batch, context=8, query_heads=4, key_heads=2, head_dim=16, layers=2)
    return Shape(batch, context=args.context)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    device = torch.device(args.device)
    if device.type == "cuda":  # graphs cannot be captured on the default stream
        torch.cuda.set_stream(torch.cuda.Stream(device))
    out = args.out or HERE / "results" / f"{slug(device)}_chain.json"
    rows: list[Row] = []
    left_out: list[str] = []
    meta = meta_of(device, args.commit) | {"context": args.context, "left_out": left_out}
    for batch in args.batches:
        try:
            rows += contest(shape_of(batch, args), args, left_out)
        except Exception as error:
            left_out.append(f"chain{batch}: {type(error).__name__}: {error}".splitlines()[0])
            print(f"left out: {left_out[-1]}", flush=True)
        write(out, meta, rows)
    print(markdown(rows))
    print(f"{len(rows)} figures in {out}")
    return 0 if rows else 1


if __name__ == "__main__":
    raise SystemExit(main())
