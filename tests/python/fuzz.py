"""Random calls against the oracle: the exact bits, the error bound, no change where none is due.

    python tests/python/fuzz.py --cases 100000 --seed 0 --device cpu --jobs 2

Each case is drawn from the seed and its own number alone. A failing one prints what it was and the
command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import fused_rope
import torch
from oracle import DTYPES, LAYOUTS, as_bshd, bits, error_over_bound, shape
from torch import Tensor

FORMS = ("rotate", "rotate_", "rotate_qk", "rotate_qk_", "out", "out_qk", "out_rows", "backward")
GUARD = 16  # elements before and behind every tensor; whole vectors, so that alignment is drawn
FAR = 8  # largest offset; tables have as many rows to spare
INTEGERS = (torch.int32, torch.int64)


# --- memory ------------------------------------------------------------------------------------


def random_strides(rng: random.Random, sizes: Sequence[int], expand: bool) -> tuple[list[int], int]:
    """Strides that let no two elements meet (`expand` apart), and the elements they span."""
    order = list(range(len(sizes)))
    outer = order[:-1]
    if rng.random() < 0.4:
        rng.shuffle(outer)
    order = [*outer, order[-1]]
    if rng.random() < 0.1:
        rng.shuffle(order)
    strides, extent = [0] * len(sizes), 1
    pitch = rng.choice((1,) * 8 + (2, 3))
    for d in reversed(order):
        if sizes[d] <= 1:
            strides[d] = rng.choice((pitch, 0, 1, 7, 10**6))
        elif expand and rng.random() < 0.05:
            strides[d] = 0
        else:
            strides[d] = pitch
            extent += (sizes[d] - 1) * pitch
            pitch *= sizes[d]
            pitch += rng.choice((0, 0, 0, 0, 8, -pitch % 8, 1, pitch))
    return strides, extent


class Memory:
    """Tensors of random strides inside guard zones, and what all of that memory should hold."""

    def __init__(self, rng: random.Random, device: str) -> None:
        self.rng, self.device = rng, device
        self.generator = torch.Generator().manual_seed(rng.getrandbits(60))
        self.blocks: list[tuple[Tensor, Tensor]] = []

    def place(self, sizes: Sequence[int], expand: bool, fill: Callable[[int], Tensor]) -> Tensor:
        """A tensor in the middle of a block of memory with the values fill(elements)."""
        strides, extent = random_strides(self.rng, sizes, expand)
        offset = GUARD + self.rng.choice((0, 0, 0, 8, 1, 3))
        block = fill(offset + extent + GUARD).to(self.device)
        self.blocks.append((block, block.clone()))
        return block.as_strided(list(sizes), strides, offset)

    def floats(self, sizes: Sequence[int], dtype: torch.dtype, expand: bool = False) -> Tensor:
        return self.place(
            sizes, expand, lambda n: torch.randn(n, generator=self.generator).to(dtype)
        )

    def integers(self, values: Tensor, expand: bool = False) -> Tensor:
        """`values`; along an expanded dimension all are the first."""
        t = self.place(values.shape, expand, lambda n: torch.full((n,), -7, dtype=values.dtype))
        target = t
        for d, stride in enumerate(t.stride()):
            if stride == 0 and t.size(d) > 1:
                target, values = target.narrow(d, 0, 1), values.narrow(d, 0, 1)
        self.expect(target, values)
        target.copy_(values)
        return t

    def expect(self, t: Tensor, values: Tensor) -> None:
        for block, wanted in self.blocks:
            if block.untyped_storage().data_ptr() == t.untyped_storage().data_ptr():
                wanted.as_strided(t.size(), t.stride(), t.storage_offset()).copy_(values)

    def is_as_expected(self) -> bool:
        return all(same_bits(block, wanted) for block, wanted in self.blocks)


def same_bits(x: Tensor, y: Tensor) -> bool:
    if x.dtype.is_floating_point:
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        x, y = x.contiguous().view(integer), y.contiguous().view(integer)
    return torch.equal(x, y)


# --- cases -------------------------------------------------------------------------------------


class Case:
    """One call: its sizes, its tensors and its keywords."""

    def __init__(self, seed: int, index: int, device: str) -> None:
        self.rng = rng = random.Random(f"{seed}/{index}")
        self.memory = Memory(rng, device)
        self.device = device
        self.form = rng.choice(FORMS)
        self.pair = self.form in ("rotate_qk", "rotate_qk_", "out_qk", "out_rows", "backward")
        self.dtype = rng.choice(DTYPES)
        self.layout = rng.choice(LAYOUTS)
        self.D = rng.choice((2, 8, 16, 32, 64, rng.randint(1, 40), rng.randint(1, 140)))
        self.B = 1 if self.layout == "thd" else rng.choice((1, 2, 3, rng.randint(0, 4)))
        self.S = rng.choice((1, 2, 5, 7, rng.randint(0, 13)))
        self.H = [rng.choice((1, 2, 4, rng.randint(0, 9))) for _ in range(2 if self.pair else 1)]
        if device == "cuda" and rng.random() < 1 / 400:  # more than the cache holds
            self.B, self.S, self.D = (1 if self.layout == "thd" else 4), 4096, 128
            self.H = [32, 8][: len(self.H)]
        self.span()
        self.tables()
        if self.cos.dim() == 2:
            self.rows()
        self.kw["precision"] = rng.choice(("fp32", "fp32", "model"))
        self.kw["inverse"] = rng.random() < 0.5

    def span(self) -> None:
        rng, D = self.rng, self.D
        self.P = P = rng.choice((D // 2, D // 2, D // 4, rng.randint(0, D // 2)))
        self.kw: dict[str, Any] = {"layout": self.layout}
        self.kw["rotary_offset"] = rng.choice((0, D - 2 * P, rng.randint(0, D - 2 * P)))
        lane_map = rng.choice(("half", "interleaved", "blocks"))
        if lane_map == "interleaved":
            self.kw["interleaved"] = True
        elif lane_map == "blocks":
            self.kw["blocks"] = rng.choice([n for n in range(1, max(P, 1) + 1) if P % n == 0])

    def tables(self) -> None:
        rng, P = self.rng, self.P
        batch = rng.choice((1, self.B))
        forms = [(self.S + FAR + rng.randint(0, 3), P)] * 3 + [(batch, self.S, P)]
        if len(set(self.H)) == 1:
            forms.append((batch, self.S, self.H[0], P))
        sizes, dtype = rng.choice(forms), rng.choice((torch.float32, torch.float32, *DTYPES))
        self.cos, self.sin = (self.memory.floats(sizes, dtype, expand=True) for _ in range(2))

    def rows(self) -> None:
        """positions, offset, cu_seqlens and axes that stay inside the table."""
        rng, B, S, kw = self.rng, self.B, self.S, self.kw
        sequences = B
        if self.layout == "thd" and rng.random() < 0.5:
            ends = sorted(rng.randint(0, S) for _ in range(rng.randint(0, 4)))
            kw["cu_seqlens"] = self.integers([0, *ends])
            sequences = len(ends)
        shift = 0
        offset = rng.choice(("none", "int", "tensor"))
        if offset == "int":
            kw["offset"] = shift = rng.randint(0, FAR)
        elif offset == "tensor" and (self.layout != "thd" or "cu_seqlens" in kw):
            kw["offset"] = self.integers([rng.randint(0, FAR) for _ in range(sequences)])
            shift = FAR
        if rng.random() < 0.5:
            return
        if offset == "int" and rng.random() < 0.3:
            kw["offset"] = shift = -shift
        sizes = rng.choice(((S,), (1, S), (B, S)))
        if rng.random() < 0.4:
            A = rng.randint(1, 8)
            kw["axes"] = [rng.randrange(A) for _ in range(self.P)]
            sizes = (A, *sizes)
        low, high = max(0, -shift), self.cos.shape[0] - max(0, shift)
        values = torch.randint(low, max(high, low + 1), sizes, generator=self.memory.generator)
        skipped = torch.rand(sizes, generator=self.memory.generator)
        values[skipped < rng.choice((0, 0.1, 0.6))] = -1
        kw["positions"] = self.memory.integers(values.to(rng.choice(INTEGERS)), expand=True)

    def integers(self, values: list[int]) -> Tensor:
        return self.memory.integers(torch.tensor(values, dtype=self.rng.choice(INTEGERS)))

    def inputs(self, expand: bool) -> list[Tensor]:
        """x, or q and k: on their own, or heads of one packed tensor."""
        sizes = [shape(self.layout, self.B, self.S, H, self.D) for H in self.H]
        if self.rng.random() < 0.7:
            return [self.memory.floats(s, self.dtype, expand) for s in sizes]
        heads = self.layout.index("h")
        whole = list(sizes[0])
        whole[heads] = sum(self.H) + self.rng.randint(0, 3)
        packed = self.memory.floats(whole, self.dtype)
        starts = [0, self.H[0]]
        return [packed.narrow(heads, n, H) for n, H in zip(starts, self.H, strict=False)]

    def outputs(self, inputs: list[Tensor]) -> list[Tensor]:
        return [self.memory.floats(x.shape, self.dtype) for x in inputs]

    def __str__(self) -> str:
        def text(value: Any) -> str:
            if isinstance(value, Tensor):
                kind = str(value.dtype).removeprefix("torch.")
                return f"{kind}{list(value.shape)} strides {value.stride()}"
            return repr(value)

        sizes = f"B={self.B} S={self.S} H={self.H} D={self.D} P={self.P} {self.dtype}"
        named = {"cos": self.cos, "sin": self.sin, **self.kw}
        return "\n  ".join([f"{self.form} {sizes}", *(f"{n}={text(v)}" for n, v in named.items())])

    # --- what is called, and what must come of it ------------------------------------------------

    def run(self) -> list[str]:
        """What is wrong; nothing, if all is well."""
        in_place = self.form.endswith("_")
        inputs = self.inputs(expand=not (in_place or "out" in self.form))
        want = [bits(x, self.cos, self.sin, **self.kw) for x in inputs]
        copies = [x.clone() for x in inputs]
        if self.form == "backward":
            got, want = self.backward(inputs)
        elif self.form == "out_rows":
            got, want = self.out_rows(inputs, want)
        else:
            got = self.forward(inputs, want)
        faults = []
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            if g.shape != w.shape or g.dtype != w.dtype or not same_bits(g, w):
                faults.append(f"tensor {i} differs from the prescribed bits")
        if (
            not faults
            and self.kw["precision"] == "fp32"
            and self.form not in ("backward", "out_rows")
        ):
            kw = {n: v for n, v in self.kw.items() if n != "precision"}
            for g, x in zip(got, copies, strict=True):
                error = error_over_bound(g, x, self.cos, self.sin, **kw)
                if error > 1:
                    faults.append(f"error is {error:.3g} times the bound")
        if not self.memory.is_as_expected():
            faults.append("memory was changed that should not be")
        return faults

    def forward(self, inputs: list[Tensor], want: list[Tensor]) -> list[Tensor]:
        function = getattr(fused_rope, "rotate_qk" if self.pair else "rotate")
        if self.form.endswith("_"):
            function = getattr(fused_rope, self.form)
            for x, w in zip(inputs, want, strict=True):
                self.memory.expect(x, w)
        kw = self.kw
        if self.form.startswith("out"):
            out = self.outputs(inputs)
            for o, w in zip(out, want, strict=True):
                self.memory.expect(o, w)
            kw = kw | {"out": tuple(out) if self.pair else out[0]}
        got = function(*inputs, self.cos, self.sin, **kw)
        return list(got) if self.pair else [got]

    def out_rows(
        self, inputs: list[Tensor], want: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        rng, tokens = self.rng, self.B * self.S
        rows = tokens + rng.randint(0, 5)
        slots = torch.tensor(rng.sample(range(rows), tokens), dtype=rng.choice(INTEGERS))
        slots[torch.rand(tokens, generator=self.memory.generator) < 0.2] = -1
        one = self.layout == "thd" and rng.random() < 0.5
        slots = self.memory.integers(slots.view((tokens,) if one else (self.B, self.S)))
        q_out = self.outputs(inputs[:1])[0]
        cache = self.memory.floats((rows, self.H[1], self.D), self.dtype)
        self.memory.expect(q_out, want[0])
        kept, cached = slots.flatten() >= 0, cache.clone()
        rotated = as_bshd(want[1], self.layout).reshape(tokens, self.H[1], self.D)
        cached[slots.flatten()[kept].long()] = rotated[kept]
        self.memory.expect(cache, cached)
        out = (q_out, cache)
        got = fused_rope.rotate_qk(*inputs, self.cos, self.sin, out=out, out_rows=slots, **self.kw)
        return list(got), [want[0], cached]

    def backward(self, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        gradients = [self.memory.floats(x.shape, self.dtype, expand=True) for x in inputs]
        out = fused_rope.rotate_qk(*leaves, self.cos, self.sin, **self.kw)
        got = torch.autograd.grad(out, leaves, gradients)
        kw = self.kw | {"inverse": not self.kw["inverse"]}
        return list(got), [bits(g, self.cos, self.sin, **kw) for g in gradients]


def failure(seed: int, index: int, device: str) -> str | None:
    """What case `index` is and what is wrong with it, if anything is."""
    case: Case | None = None
    try:
        case = Case(seed, index, device)
        faults = case.run()
    except Exception as error:
        faults = [f"{type(error).__name__}: {error}"]
    if not faults:
        return None
    again = f"python tests/python/fuzz.py --seed {seed} --only {index} --device {device}"
    return "\n".join([f"case {index}: {case}", *(f"  ! {f}" for f in faults), f"  {again}"])


# --- the program -------------------------------------------------------------------------------


def run_chunk(seed: int, first: int, last: int, device: str) -> list[str]:
    torch.set_num_threads(1)
    return [f for i in range(first, last) if (f := failure(seed, i, device)) is not None]


def chunks(cases: int, size: int = 200) -> Iterator[tuple[int, int]]:
    for first in range(0, cases, size):
        yield first, min(first + size, cases)


def run(cases: int, seed: int, device: str, jobs: int) -> list[str]:
    """Runs cases 0 to cases - 1 with a progress bar; returns the failures."""
    from tqdm import tqdm

    failures: list[str] = []
    work = [(seed, first, last, device) for first, last in chunks(cases)]
    with tqdm(total=cases, unit=" cases", unit_scale=True) as bar:

        def note(found: list[str], done: int) -> None:
            failures.extend(found)
            for text in found[:3]:
                bar.write(text)
            bar.update(done)
            bar.set_postfix(failures=len(failures))

        if jobs == 1:
            for arguments in work:
                note(run_chunk(*arguments), arguments[2] - arguments[1])
        else:
            with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
                results = pool.map(run_chunk, *zip(*work, strict=True))
                for arguments, found in zip(work, results, strict=True):
                    note(found, arguments[2] - arguments[1])
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of a single case")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--jobs", type=int, help="processes; one for each CPU, one for a GPU")
    options = parser.parse_args()
    if options.only is not None:
        text = failure(options.seed, options.only, options.device)
        print(text or f"case {options.only} is right:\n{Case(options.seed, options.only, 'cpu')}")
        return int(text is not None)
    jobs = options.jobs or (1 if options.device == "cuda" else os.cpu_count() or 1)
    failures = run(options.cases, options.seed, options.device, jobs)
    print(f"{options.cases} cases, seed {options.seed}, {options.device}: {len(failures)} failures")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
