"""Random calls against the oracle: exact results, the error bound, nothing else written.

    python tests/python/fuzz.py --cases 100000 --seed 0 --device cuda

Each case depends only on the seed and its own number. A failing case is printed with the command
that repeats it.

The memory of a case, its guards and its expected results are drawn on the CPU, many cases in one
block, so that one copy takes them to a GPU and back. One process owns the GPU; the others draw.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import fused_rope
import numpy as np
import torch
from fused_rope import reference
from oracle import (
    DTYPES,
    HALF,
    LAYOUTS,
    as_bshd,
    bits,
    error_over_bound,
    norm_error_over_bound,
    quantized,
    shape,
)
from torch import Tensor

FORMS = ("rotate", "rotate_", "rotate_qk", "rotate_qk_", "out", "out_qk", "out_rows", "backward")
FORMS += ("cache",)
PAIRS = ("rotate_qk", "rotate_qk_", "out_qk", "out_rows", "backward", "cache")
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
GUARD = 16  # elements before and after every tensor; whole vectors, so that alignment is random
ALIGNMENT = 64  # elements, of every tensor's block of memory: more than any vector
FAR = 8  # largest offset; tables have as many rows to spare
FAR_SHARE = 0.2  # of positions and offsets of which only the sum is near
INTEGERS = (torch.int32, torch.int64)
LARGE_TOKENS = 8192  # of 32 heads with D=128: more than the caches hold


def is_large(index: int, device: str) -> bool:
    """Whether the case is large enough for another kernel plan; it is then drawn on the device."""
    return device == "cuda" and index % 400 == 399


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


class View(NamedTuple):
    """A tensor's place in the memory of its case; the offset in elements."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Memory:
    """Tensors of random strides inside guard zones, and what all of that memory should hold."""

    def __init__(self, rng: random.Random, device: str) -> None:
        self.rng = rng
        self.generator = torch.Generator(device).manual_seed(rng.getrandbits(60))
        self.blocks: dict[int, tuple[int, Tensor, Tensor]] = {}  # by address: start, now, then
        self.bytes = 0

    def place(self, sizes: Sequence[int], expand: bool, fill: Callable[[int], Tensor]) -> Tensor:
        """A tensor in the middle of a block of memory with the values fill(elements)."""
        strides, extent = random_strides(self.rng, sizes, expand)
        offset = GUARD + self.rng.choice((0, 0, 0, 8, 1, 3))
        block = fill(-(offset + extent + GUARD) // ALIGNMENT * -ALIGNMENT)
        self.blocks[block.data_ptr()] = self.bytes, block, block.clone()
        self.bytes += block.nbytes
        return block.as_strided(list(sizes), strides, offset)

    def floats(
        self, sizes: Sequence[int], dtype: torch.dtype, expand: bool = False, zeros: bool = True
    ) -> Tensor:
        # Now and then zeros of either sign, or subnormal numbers. The bounds do not hold for
        # subnormal float32 and float64, whose products lose bits.
        has_zeros = zeros and self.rng.random() < 0.1
        tiny = self.rng.random() < 0.1 and dtype in HALF

        def normal(n: int) -> Tensor:
            device = self.generator.device
            x = torch.randn(n, generator=self.generator, device=device)
            x = (x.sign() * torch.relu(x.abs() - 0.5 * has_zeros)).to(dtype)
            return x * torch.finfo(dtype).tiny if tiny else x

        return self.place(sizes, expand, normal)

    def integers(self, values: Tensor, expand: bool = False) -> Tensor:
        """`values`; along an expanded dimension all are the first."""
        kind = {"dtype": values.dtype, "device": self.generator.device}
        t = self.place(values.shape, expand, lambda n: torch.full((n,), -7, **kind))
        target = t
        for d, stride in enumerate(t.stride()):
            if stride == 0 and t.size(d) > 1:
                target, values = target.narrow(d, 0, 1), values.narrow(d, 0, 1)
        self.expect(target, values)
        target.copy_(values)
        return t

    def block(self, t: Tensor) -> tuple[int, Tensor, Tensor]:
        return self.blocks[t.untyped_storage().data_ptr()]

    def expect(self, t: Tensor, values: Tensor) -> None:
        *_, wanted = self.block(t)
        wanted.as_strided(t.size(), t.stride(), t.storage_offset()).copy_(values)

    def view(self, t: Tensor) -> View:
        offset = self.block(t)[0] // t.element_size() + t.storage_offset()
        return View(t.dtype, tuple(t.shape), t.stride(), offset)

    def joined(self) -> tuple[Tensor, Tensor]:
        """All blocks end to end, in bytes: as they are, and as they should become."""
        _, now, then = zip(*self.blocks.values(), strict=True)
        return tuple(torch.cat([t.view(torch.uint8) for t in ts]) for ts in (now, then))


def views(memory: Tensor) -> Callable[[View, int], Tensor]:
    """Finds the tensors of a case in bytes where its memory begins at `start`."""
    typed = {dtype: memory.view(dtype) for dtype in (*DTYPES, *INTEGERS, *EIGHT_BITS)}
    return lambda view, start: typed[view.dtype].as_strided(
        view.size, view.stride, start // view.dtype.itemsize + view.offset
    )


def identical(x: Tensor, y: Tensor) -> bool:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.equal(x.contiguous().view(integer), y.contiguous().view(integer))


# --- cases -------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A case without its memory: what is called with which views, and where its results belong."""

    form: str
    inputs: list[View]
    tables: list[View]
    kw: dict[str, Any]
    gradients: list[View]
    results: list[View]
    weights: list[View | None]  # of a norm, which is among the keywords then


class Case:
    """One call: its sizes, its tensors and its keywords."""

    def __init__(self, seed: int, index: int, device: str) -> None:
        self.rng = rng = random.Random(f"{seed}/{index}")
        large = is_large(index, device)
        self.memory = Memory(rng, device if large else "cpu")
        self.form = rng.choice(FORMS)
        self.pair = self.form in PAIRS
        self.dtype = rng.choice(DTYPES)
        self.layout = rng.choice(LAYOUTS)
        self.D = rng.choice((2, 8, 16, 32, 64, rng.randint(1, 40), rng.randint(1, 140)))
        self.B = 1 if self.layout == "thd" else rng.choice((1, 2, 3, rng.randint(0, 4)))
        self.S = rng.choice((1, 2, 5, 7, rng.randint(0, 13)))
        self.H = [rng.choice((1, 2, 4, rng.randint(0, 9))) for _ in range(2 if self.pair else 1)]
        if rng.random() < 0.05:
            self.D = rng.choice((256, 512, 1024, rng.randint(141, 1024)))
        elif rng.random() < 0.1 and self.layout != "thd":  # decode
            self.B, self.S = rng.randint(5, 40), 1
        elif rng.random() < 0.1:
            self.H = [rng.randint(10, 40) for _ in self.H]
        if large:
            self.B = 1 if self.layout == "thd" else 4
            self.S, self.D, self.H = LARGE_TOKENS // self.B, 128, [32, 8][: len(self.H)]
        self.span()
        self.tables()
        if self.cos.dim() == 2:
            self.rows()
        self.kw["precision"] = rng.choice(("fp32", "fp32", "model"))
        self.kw["inverse"] = rng.random() < 0.5
        self.norm: dict[str, Any] = {}
        self.weights: list[Tensor | None] = []
        if rng.random() < 0.5:
            self.norms()

    def norms(self) -> None:
        rng = self.rng
        cast = rng.choice(("never", "never", "before", "after"))
        if cast == "never":
            self.kw["precision"] = "fp32"
        self.norm = {"eps": rng.choice((1e-6, 1e-5, 0.1)), "cast": cast}
        self.norm |= {name: rng.random() < 0.5 for name in ("zero_centered", "after")}
        for _ in self.H:
            own = cast == "before" or rng.random() < 0.5
            dtype = self.dtype if own else torch.float32
            absent = rng.random() < 0.2
            self.weights.append(None if absent else self.memory.floats((self.D,), dtype, True))

    def span(self) -> None:
        rng, D = self.rng, self.D
        self.P = P = rng.choice((D // 2, D // 2, D // 4, rng.randint(0, D // 2)))
        self.kw: dict[str, Any] = {"layout": self.layout}
        self.kw["rotary_offset"] = rng.choice((0, D - 2 * P, rng.randint(0, D - 2 * P)))
        pairing = rng.choice(("half", "interleaved", "blocks"))
        if pairing == "interleaved":
            self.kw["interleaved"] = True
        elif pairing == "blocks":
            self.kw["blocks"] = rng.choice([n for n in range(1, max(P, 1) + 1) if P % n == 0])

    def tables(self) -> None:
        rng, P = self.rng, self.P
        batch = rng.choice((1, self.B))
        forms = [(self.S + FAR + rng.randint(0, 3), P)] * 3 + [(batch, self.S, P)]
        if len(set(self.H)) == 1:
            forms.append((batch, self.S, self.H[0], P))
        sizes, dtype = rng.choice(forms), rng.choice((torch.float32, torch.float32, *DTYPES))
        self.kw["table_layout"] = table_layout = rng.choice(("half", "half", "tiled", "repeated"))
        columns = {"half": (P, slice(P)), "tiled": (2 * P, slice(P))}
        width, read = columns.get(table_layout, (2 * P, slice(0, 2 * P, 2)))
        sizes = (*sizes[:-1], width)
        self.full = tuple(self.memory.floats(sizes, dtype, expand=True) for _ in range(2))
        self.cos, self.sin = (t[..., read] for t in self.full)

    def rows(self) -> None:
        """positions, offset, cu_seqlens and axes that stay inside the table."""
        rng, B, S, kw = self.rng, self.B, self.S, self.kw
        sequences = B
        if self.layout == "thd" and rng.random() < 0.5:
            ends = sorted(rng.randint(0, S) for _ in range(rng.randint(0, 4)))
            start = 0 if ends else rng.randint(0, S)  # of no sequence
            kw["cu_seqlens"] = self.integers([start, *ends])
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
        far = 0
        if offset == "int" and rng.random() < FAR_SHARE:  # the sum of both is near
            far = rng.choice((-1, 1)) * 2 ** rng.randint(20, 62)
            kw["offset"] -= far
        sizes = rng.choice(((S,), (1, S), (B, S)))
        unused: set[int] = set()
        if rng.random() < 0.4:
            A = rng.randint(1, 8)
            kw["axes"] = [rng.randrange(A) for _ in range(self.P)]
            unused = set(range(A)).difference(kw["axes"] or [0])  # without pairs, axis 0 is checked
            sizes = (A, *sizes)
        low, high = max(0, -shift), self.cos.shape[0] - max(0, shift)
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        values = torch.randint(low, max(high, low + 1), sizes, generator=generator) + far
        skipped = torch.rand(sizes, generator=generator)
        values[skipped < rng.choice((0, 0.1, 0.6))] = -1
        for axis in unused:
            values[axis] = rng.choice((0, -7, 10**6))
        values = values.to(rng.choice(INTEGERS) if abs(far) < 2**30 else torch.int64)
        kw["positions"] = self.memory.integers(values, expand=not unused)

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

    def __str__(self) -> str:
        def text(value: Any) -> str:
            if isinstance(value, Tensor):
                kind = str(value.dtype).removeprefix("torch.")
                return f"{kind}{list(value.shape)} strides {value.stride()}"
            return repr(value)

        sizes = f"B={self.B} S={self.S} H={self.H} D={self.D} P={self.P} {self.dtype}"
        named = {"cos": self.full[0], "sin": self.full[1], **self.kw, **self.norm}
        named |= {f"weight {i}": weight for i, weight in enumerate(self.weights)}
        return "\n  ".join([f"{self.form} {sizes}", *(f"{n}={text(v)}" for n, v in named.items())])

    # --- what is called, and what must come of it ------------------------------------------------

    def call(self) -> Call:
        """What to call; the memory then expects the results. Raises if they miss the bound."""
        in_place = self.form.endswith("_")
        inputs = self.inputs(expand=not (in_place or "out" in self.form))
        gradients = self.gradients(inputs) if self.form == "backward" else []
        kw = self.kw | {"inverse": self.kw["inverse"] != (self.form == "backward")}
        del kw["table_layout"]
        if self.norm:
            want = self.normalized(inputs, gradients)
        else:
            want = [bits(x, self.cos, self.sin, **kw) for x in gradients or inputs]
            if self.kw["precision"] == "fp32":
                self.check_bound(gradients or inputs, want, kw)
        view = self.memory.view
        if self.form == "cache":
            stored = self.stored(want)
            keywords = {**self.kw, **self.norm, **stored}
            results = [keywords.pop("q'"), stored["k_cache"], stored["v_cache"]]
            results += [stored[n] for n in ("q_out", "k_out") if n in stored]
            return Call(
                self.form,
                [view(x) for x in inputs],
                [view(t) for t in self.full],
                {n: view(v) if isinstance(v, Tensor) else v for n, v in keywords.items()},
                [],
                [view(t) for t in results],
                [w if w is None else view(w) for w in self.weights],
            )
        to_cache = self.form == "out_rows"
        dense = want[:1] if to_cache else want
        results = inputs if in_place else [self.memory.floats(w.shape, w.dtype) for w in dense]
        if to_cache:
            cache, want[1] = self.cache(want[1])
            results.append(cache)
        for t, w in zip(results, want, strict=True):
            self.memory.expect(t, w)
        return Call(
            self.form,
            [view(x) for x in inputs],
            [view(t) for t in self.full],
            {n: view(v) if isinstance(v, Tensor) else v for n, v in (self.kw | self.norm).items()},
            [view(g) for g in gradients],
            [view(t) for t in results],
            [w if w is None else view(w) for w in self.weights],
        )

    def normalized(self, inputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """The results of a norm and rotation, or the gradients of q, k and the weights.

        Computed by the reference, or by the CPU's backward in dense memory.
        """
        device = self.cos.device
        cos, sin = self.cos.cpu(), self.sin.cpu()
        kw = {n: v.cpu() if isinstance(v, Tensor) else v for n, v in self.kw.items()} | self.norm
        del kw["table_layout"]
        xs = [x.cpu().contiguous() for x in inputs]
        weights = [w if w is None else w.cpu().contiguous() for w in self.weights]
        if gradients:
            return [g.to(device) for g in self.norm_gradients(xs, weights, gradients, kw)]
        want = []
        for x, weight in zip(xs, weights, strict=True):
            want.append(reference.norm_rotate(x, cos, sin, weight, **kw))
            if self.norm["cast"] != "never":
                continue
            bounded = {n: v for n, v in kw.items() if n not in ("precision", "cast")}
            error = norm_error_over_bound(want[-1], x, cos, sin, weight, **bounded)
            if error > 1:
                raise AssertionError(f"the prescribed bits are {error:.3g} times the bound off")
        return [w.to(device) for w in want]

    def norm_gradients(
        self,
        xs: list[Tensor],
        weights: list[Tensor | None],
        gradients: list[Tensor],
        kw: dict[str, Any],
    ) -> list[Tensor]:
        """The gradients of the inputs, then those of the weights that are there."""

        def leaves(wide: torch.dtype | None) -> list[Tensor | None]:
            every = (*xs, *weights)
            return [t if t is None else t.to(wide or t.dtype).requires_grad_() for t in every]

        cos, sin = self.cos.cpu(), self.sin.cpu()
        gs = [g.cpu().contiguous() for g in gradients]
        *_, first, second = own = leaves(None)
        outs = fused_rope.norm_rotate_qk(*own[:2], cos, sin, first, second, **kw)
        found = list(torch.autograd.grad(outs, [t for t in own if t is not None], gs))
        if self.norm["cast"] == "never":
            *_, first, second = wide = leaves(torch.float64)
            tables = (t.float().double() for t in (cos, sin))
            if self.dtype == torch.float64:
                tables = (cos.double(), sin.double())
            outs = reference.norm_rotate_qk(*wide[:2], *tables, first, second, **kw)
            wanted = [t for t in wide if t is not None]
            exact = torch.autograd.grad(outs, wanted, [g.double() for g in gs])
            self.check_gradients(found, exact, xs, gs, kw)
        return found

    def check_gradients(
        self,
        found: list[Tensor],
        exact: Sequence[Tensor],
        xs: list[Tensor],
        gs: list[Tensor],
        kw: dict[str, Any],
    ) -> None:
        """Fails unless they are within float32 rounding of what their sums are made of."""
        double = self.dtype == torch.float64
        unit = 64 * torch.finfo(torch.float64 if double else torch.float32).eps
        factor = max(
            [1.0] + [float(w.detach().abs().max()) + 1 for w in self.weights if w is not None]
        )
        table = max([1.0] + [float(t.abs().max()) for t in (self.cos, self.sin) if t.numel()])
        for i, (got, want) in enumerate(zip(found, exact, strict=True)):
            if got.numel() == 0 or xs[0].numel() == 0 or xs[1].numel() == 0:
                continue
            scale = table**2 * factor * max(float(g.abs().max()) for g in gs)
            if i < 2:
                x = xs[i].double()
                mean = x.pow(2).mean(-1, keepdim=True)
                least = 1 / max(1.0, table) ** 2 if kw["after"] else 1.0
                scale = scale * self.D**0.5 / (mean * least + kw["eps"]).sqrt()
            else:
                scale = scale * self.D**0.5 * self.B * self.S * max(self.H)
            half_ulp = torch.finfo(got.dtype).eps / 2 * want.abs() * 1.02
            tiny = torch.finfo(got.dtype).tiny
            if not ((got.double() - want).abs() <= half_ulp + unit * scale + tiny).all():
                raise AssertionError(f"gradient {i} is far from the one in float64")

    def gradients(self, inputs: list[Tensor]) -> list[Tensor]:
        return [self.memory.floats(x.shape, self.dtype, expand=True) for x in inputs]

    def check_bound(self, inputs: list[Tensor], want: list[Tensor], kw: dict[str, Any]) -> None:
        kw = {n: v for n, v in kw.items() if n != "precision"}
        for x, w in zip(inputs, want, strict=True):
            error = error_over_bound(w, x, self.cos, self.sin, **kw)
            if error > 1:
                raise AssertionError(f"the prescribed bits are {error:.3g} times the bound off")

    def cache(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """A cache, with `out_rows` for the rows of k in it, and what it is to hold then."""
        rng, tokens = self.rng, self.B * self.S
        rows = tokens + rng.randint(0, 5)
        slots = torch.tensor(rng.sample(range(rows), tokens), dtype=rng.choice(INTEGERS))
        slots[[rng.random() < 0.2 for _ in range(tokens)]] = -1
        one = self.layout == "thd" and rng.random() < 0.5
        slots = self.memory.integers(slots.view((tokens,) if one else (self.B, self.S)))
        self.kw["out_rows"] = slots
        cache = self.memory.floats((rows, self.H[1], self.D), self.dtype)
        kept, want = slots.flatten() >= 0, cache.clone()
        rotated = as_bshd(k, self.layout).reshape(tokens, self.H[1], self.D)
        want[slots.flatten()[kept].long()] = rotated[kept]
        return cache, want

    def stored(self, want: list[Tensor]) -> dict[str, Tensor]:
        """What rotate_and_cache takes besides q, k and the tables; the memory expects its results.

        The entry q' is memory for a result that the call allocates.
        """
        rng, memory, tokens = self.rng, self.memory, self.B * self.S
        page_size = rng.randint(1, 5)
        pages = -(-(tokens + rng.randint(0, 5)) // page_size)
        slots = torch.tensor(rng.sample(range(pages * page_size), tokens), dtype=torch.int64)
        slots[[rng.random() < 0.2 for _ in range(tokens)]] = -1
        one = self.layout == "thd" and rng.random() < 0.5
        sizes = (tokens,) if one else (self.B, self.S)
        found = {"slots": memory.integers(slots.to(rng.choice(INTEGERS)).view(sizes))}
        width = rng.choice((self.D, rng.randint(0, 70)))
        v_sizes = shape(self.layout, self.B, self.S, self.H[1], width)
        found["v"] = memory.floats(v_sizes, self.dtype, expand=True)
        dtype = self.dtype if rng.random() < 0.4 else rng.choice(EIGHT_BITS)
        rows = (pages, page_size) if rng.random() < 0.7 else (pages * page_size,)
        for name, x in (("k", want[1]), ("v", found["v"])):
            found |= self.cache_of(name, x, slots, rows, dtype)
        for name, result in (("q_out", want[0]), ("k_out", want[1])):
            if rng.random() < 0.5:
                found[name] = memory.floats(result.shape, self.dtype)
                memory.expect(found[name], result)
        found["q'"] = memory.floats(want[0].shape, self.dtype)
        if "q_out" not in found:
            memory.expect(found["q'"], want[0])
        return found

    def cache_of(
        self, name: str, x: Tensor, slots: Tensor, rows: Sequence[int], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The cache of k or v, and its scale if it has 8 bits; the memory expects the tokens."""
        Hk, D = self.H[1], x.shape[-1]
        tokens = as_bshd(x, self.layout).reshape(slots.numel(), Hk, D)
        found = {f"{name}_cache": self.memory.floats((*rows, Hk, D), dtype)}
        if dtype in EIGHT_BITS:
            per_head = self.rng.random() < 0.5
            # 0 / 0 is a NaN of either sign.
            heads = (Hk if per_head else 1,)
            scale = self.memory.floats(heads, torch.float32, expand=True, zeros=False)
            found[f"{name}_scale"] = scale = scale if per_head else scale[0]
            tokens = quantized(tokens, scale, dtype)
        kept = slots >= 0
        after = found[f"{name}_cache"].clone(memory_format=torch.contiguous_format)
        tokens = tokens.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        after.view(torch.uint8).flatten(0, -3)[slots[kept].to(x.device)] = tokens[kept.to(x.device)]
        self.memory.expect(found[f"{name}_cache"], after)
        return found


# --- drawing and calling -----------------------------------------------------------------------


class Drawn(NamedTuple):
    """One case: where its memory lies in that of its chunk, and its call, or what came instead."""

    index: int
    start: int
    end: int
    call: Call | None
    error: str | None


class Chunk(NamedTuple):
    """Some cases and all of their memory: as it is, and as it should become."""

    now: np.ndarray
    then: np.ndarray
    cases: list[Drawn]


def draw(seed: int, first: int, last: int, device: str) -> Chunk:
    """The cases of a chunk; of a large one only its number."""
    edge = torch.zeros(8 * GUARD, dtype=torch.uint8)
    now, then, cases, end = [edge], [edge], [], edge.nbytes
    for index in range(first, last):
        start, call, error = end, None, None
        if not is_large(index, device):
            try:
                case = Case(seed, index, device)
                call = case.call()
                for whole, part in zip((now, then), case.memory.joined(), strict=True):
                    whole.append(part)
                end += case.memory.bytes
            except Exception as raised:
                call, error = None, f"{type(raised).__name__}: {raised}"
        cases.append(Drawn(index, start, end, call, error))
    return Chunk(torch.cat(now).numpy(), torch.cat(then).numpy(), cases)


def perform(call: Call, find: Callable[[View], Tensor]) -> str | None:
    """Calls the operator and puts its results where they belong; what is wrong with them."""
    inputs, tables, gradients = (
        [find(v) for v in views] for views in (call.inputs, call.tables, call.gradients)
    )
    weights = [v if v is None else find(v) for v in call.weights]
    kw = {n: find(v) if isinstance(v, View) else v for n, v in call.kw.items()}
    if call.form == "cache":
        kw |= dict(zip(("q_weight", "k_weight"), weights, strict=False))
        (q, k), (cos, sin) = inputs, tables
        got = fused_rope.rotate_and_cache(q=q, k=k, cos=cos, sin=sin, **kw)
        if "q_out" not in kw:
            find(call.results[0]).copy_(got)
        elif got is not kw["q_out"]:
            return "the result is not q_out"
        return None
    in_place, out = call.form.endswith("_"), call.form.startswith("out")
    results = inputs if in_place else [find(v) for v in call.results]
    if out:
        kw["out"] = tuple(results) if len(results) > 1 else results[0]
    if gradients:
        inputs = [x.detach().requires_grad_() for x in inputs]
        weights = [w if w is None else w.detach().requires_grad_() for w in weights]
    name = "norm_" * bool(weights) + ("rotate" if len(inputs) == 1 else "rotate_qk")
    got = getattr(fused_rope, name + "_" * in_place)(*inputs, *tables, *weights, **kw)
    got = list(got) if len(inputs) > 1 else [got]
    if gradients:
        leaves = [*inputs, *(w for w in weights if w is not None)]
        got = torch.autograd.grad(got, leaves, gradients)
    for i, (g, t) in enumerate(zip(got, results, strict=True)):
        if in_place or out:
            if g is not t:
                return f"tensor {i} is not the one that was given"
        elif (g.shape, g.dtype, g.device) != (t.shape, t.dtype, t.device):
            return f"tensor {i} is {g.dtype} {list(g.shape)} on {g.device}"
        else:
            t.copy_(g)
    return None


def compare(case: Drawn, got: Tensor, want: Tensor) -> list[str]:
    """What is wrong in the memory of a case."""
    mine = slice(case.start, case.end)
    if case.call is None or torch.equal(got[mine], want[mine]):
        return []
    find_got, find_want = views(got), views(want)
    faults = []
    for i, view in enumerate(case.call.results):
        g, w = find_got(view, case.start), find_want(view, case.start)
        if not identical(g, w):
            faults.append(f"tensor {i} differs from the prescribed bits")
            g.copy_(w)
    if not torch.equal(got[mine], want[mine]):
        faults.append("memory was changed that should not be")
    return faults


def run_drawn(seed: int, chunk: Chunk, device: str) -> list[str]:
    """Makes the calls of a chunk on the device; returns what failed."""
    host, want = torch.from_numpy(chunk.now), torch.from_numpy(chunk.then)
    if device == "cuda":
        host = host.pin_memory()
    memory = host.to(device, non_blocking=True)
    find = views(memory)
    errors = {case.index: attempt(case, find) for case in chunk.cases}
    host.copy_(memory, non_blocking=True)
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:  # nothing more can be had of this device
            cases = f"cases {chunk.cases[0].index} to {chunk.cases[-1].index}"
            hint = "with CUDA_LAUNCH_BLOCKING=1 the first to fail is the one"
            failed = [report(seed, i, device, [e]) for i, e in errors.items() if e]
            raise RuntimeError("\n".join([f"one of {cases}; {hint}", *failed[:1]])) from error
    faults = {i: [error] for i, error in errors.items() if error}
    if not torch.equal(host, want):
        for case in chunk.cases:
            faults.setdefault(case.index, compare(case, host, want))
    for case in chunk.cases:
        if is_large(case.index, device):
            faults[case.index] = run_large(seed, case.index, device)
    return [report(seed, i, device, found) for i, found in faults.items() if found]


def attempt(case: Drawn, find: Callable[[View, int], Tensor]) -> str | None:
    if case.call is None:
        return case.error
    try:
        return perform(case.call, lambda view: find(view, case.start))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def run_large(seed: int, index: int, device: str) -> list[str]:
    """Draws, calls and compares one case on the device itself."""
    try:
        case = Case(seed, index, device)
        call = case.call()
        drawn = Drawn(index, 0, case.memory.bytes, call, None)
        now, then = case.memory.joined()
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    error = attempt(drawn, views(now))
    return [error] if error else compare(drawn, now, then)


def report(seed: int, index: int, device: str, faults: list[str]) -> str:
    try:
        case = str(Case(seed, index, device))
    except Exception as error:
        case = f"cannot be drawn, {error}"
    again = f"python tests/python/fuzz.py --seed {seed} --only {index} --device {device}"
    return "\n".join([f"case {index}: {case}", *(f"  ! {f}" for f in faults), f"  {again}"])


# --- the program -------------------------------------------------------------------------------


def run_chunk(seed: int, first: int, last: int, device: str) -> list[str]:
    """Draws and calls cases `first` to `last - 1`; returns what failed."""
    return run_drawn(seed, draw(seed, first, last, device), device)


def chunks(cases: int, size: int = 200) -> Iterator[tuple[int, int]]:
    for first in range(0, cases, size):
        yield first, min(first + size, cases)


def spread(jobs: int, function: Callable[..., Any], work: list[tuple[Any, ...]]) -> Iterator[Any]:
    """The function's results in order, from `jobs` processes that run a little ahead."""
    pending: deque[Future[Any]] = deque()
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        for arguments in work:
            pending.append(pool.submit(function, *arguments))
            if len(pending) > 2 * jobs:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def run(cases: int, seed: int, device: str, jobs: int, one_caller: bool) -> list[str]:
    """Runs cases 0 to cases - 1 with a progress bar; returns what failed.

    With `one_caller` all calls are made by this process, and the others only draw.
    """
    from tqdm import tqdm

    failures: list[str] = []
    work = [(seed, first, last, device) for first, last in chunks(cases)]
    if jobs == 1:
        results = (run_chunk(*arguments) for arguments in work)
    elif one_caller:
        results = (run_drawn(seed, chunk, device) for chunk in spread(jobs, draw, work))
    else:
        results = spread(jobs, run_chunk, work)
    with tqdm(total=cases, unit=" cases", unit_scale=True) as bar:
        for (_, first, last, _), found in zip(work, results, strict=True):
            failures.extend(found)
            for text in found[:3]:
                bar.write(text)
            bar.update(last - first)
            bar.set_postfix(failures=len(failures))
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of a single case")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args()
    seed, device = options.seed, options.device
    torch.set_num_threads(1)
    if options.only is not None:
        failures = run_chunk(seed, options.only, options.only + 1, device)
        text = f"case {options.only} is right:\n{Case(seed, options.only, device)}"
        print(failures[0] if failures else text)
        return int(bool(failures))
    failures = run(options.cases, seed, device, options.jobs, one_caller=device == "cuda")
    print(f"{options.cases} cases, seed {seed}, {device}: {len(failures)} failures")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
