"""Small calls that reach every instance of the CUDA kernel, for compute-sanitizer.

    scripts/sanitize_gpu.sh

Each result must be bitwise identical to the CPU's. Inputs are made on the CPU, so that the
sanitizer sees few other kernels, and the memory of each tensor ends with its last element.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import fused_rope
import torch
from oracle import DTYPES, HALF, LAYOUTS, OVERLAPPING, VIEWS, angles, same, shape, view
from torch import Tensor

PAIRINGS: tuple[dict[str, Any], ...] = (dict(), dict(interleaved=True), dict(blocks=2))
INTEGERS = (torch.int32, torch.int64)


class Case:
    """One call: a form ("", "_", "out" or "backward"), x or q and k, the tables, and keywords.

    With eps among these, it normalizes, and `weights` are as many as there are xs. The form "cache"
    has q, k and v, and the caches and slots are keywords.
    """

    def __init__(
        self,
        form: str,
        xs: list[Tensor],
        tables: Sequence[Tensor],
        weights: Sequence[Tensor | None] = (),
        **kw: Any,
    ):
        self.form, self.xs, self.tables, self.weights, self.kw = form, xs, tables, weights, kw

    def __str__(self) -> str:
        words = [f"{name}={describe(value)}" for name, value in self.kw.items()]
        tensors = (*self.xs, *self.tables, *self.weights)
        return ", ".join([repr(self.form), *map(describe, tensors), *words])

    def run(self, device: str) -> list[Tensor]:
        """What the call returns or writes, copied to the CPU."""
        xs, tables = ([there(t, device) for t in group] for group in (self.xs, self.tables))
        kw = {
            name: there(value, device) if isinstance(value, Tensor) else value
            for name, value in self.kw.items()
        }
        weights = [None if w is None else there(w, device) for w in self.weights]
        if self.form == "cache":
            q, k, v = xs
            kw |= dict(zip(("q_weight", "k_weight"), weights, strict=False))
            written = [kw[n] for n in ("k_cache", "v_cache", "k_out") if n in kw]
            result = fused_rope.rotate_and_cache(q, k, v, *tables, **kw)
            return [y.cpu().view(torch.uint8) for y in (whole(result), *map(whole, written))]
        qk = "_qk" * (len(xs) == 2)
        name = "norm_" * ("eps" in kw) + "rotate" + qk
        if self.form == "backward":
            xs = [x.detach().requires_grad_() for x in xs]
            weights = [None if w is None else w.detach().requires_grad_() for w in weights]
            leaves = [t for t in (*xs, *weights) if t is not None]
            result = outputs(getattr(fused_rope, name)(*xs, *tables, *weights, **kw))
            return [g.cpu() for g in torch.autograd.grad(sum(y.sum() for y in result), leaves)]
        if self.form == "out":
            outs = [there(out, device) for out in kw.pop("outs")]
            kw["out"] = tuple(outs) if qk else outs[0]
            getattr(fused_rope, name)(*xs, *tables, *weights, **kw)
            return [whole(out).cpu() for out in outs]
        result = outputs(getattr(fused_rope, name + self.form)(*xs, *tables, *weights, **kw))
        return [y.cpu() for y in result] + [whole(x).cpu() for x in xs]


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}/{list(value.stride())}"
    return f"[{', '.join(map(describe, value))}]" if isinstance(value, list) else repr(value)


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def whole(x: Tensor) -> Tensor:
    """The whole storage of x."""
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


def there(x: Tensor, device: str) -> Tensor:
    """x in memory of its own on `device`, with its strides and offset."""
    return whole(x).to(device, copy=True).as_strided(x.size(), x.stride(), x.storage_offset())


def draw(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64).to(dtype)


def positions(*sizes: int, rows: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(-1, rows, sizes, dtype=dtype)


def qk(dtype: torch.dtype, D: int) -> list[Tensor]:
    return [draw(2, 5, H, D, dtype=dtype) for H in (4, 3)]


def instances() -> Iterator[Case]:
    """Element type, table type and form, precision, pairing, vectors or single elements.

    Rows are selected by token index, by position, by one axis for each eight pairs, by mixed axes.
    """
    widths = ((32, 16, 0), (48, 16, 16), (19, 6, 3))
    for dtype, (D, P, o), pairing in itertools.product(DTYPES, widths, PAIRINGS):
        tables = [torch.float32, torch.float64, *({*HALF} & {dtype})]
        precisions = ("fp32", "model") if dtype in HALF else ("fp32",)
        for table, precision in itertools.product(tables, precisions):
            kw = dict(rotary_offset=o, precision=precision, **pairing)
            cos_sin = angles(9, P, dtype=table)
            index, indices = (positions(*n, rows=9) for n in ((2, 5), (2, 2, 5)))
            mixed = [0, 1, 1] * (P // 3) + [0] * (P % 3)
            for pair in (cos_sin, torch.stack(cos_sin, -1).unbind(-1)):  # the latter as complex
                yield Case("", qk(dtype, D), pair, **kw)
                yield Case("", qk(dtype, D), pair, positions=index, **kw)
                for axes in ([j // 8 % 2 for j in range(P)], mixed):
                    yield Case("", qk(dtype, D), pair, positions=indices, axes=axes, **kw)


def forms() -> Iterator[Case]:
    """Every form in every layout, and gradients that are expanded."""
    spans = ((16, 0), (24, 3))
    for layout, dtype, pairing in itertools.product(
        LAYOUTS, (torch.bfloat16, torch.float32), PAIRINGS
    ):
        tables = angles(10 if layout == "thd" else 5, 8)
        for (D, o), inverse, count in itertools.product(spans, (False, True), (1, 2)):
            sizes = [shape(layout, 2, 5, H, D) for H in (3, 2)[:count]]
            xs, outs = ([draw(*n, dtype=dtype) for n in sizes] for _ in range(2))
            kw = dict(layout=layout, rotary_offset=o, inverse=inverse, **pairing)
            for form in ("", "_", "backward"):
                yield Case(form, xs, tables, **kw)
            yield Case("out", xs, tables, outs=outs, **kw)


def memory() -> Iterator[Case]:
    """Strides, alignments and sizes of inputs, outputs and tables."""
    for name, dtype, interleaved in itertools.product(VIEWS, DTYPES, (False, True)):
        kw = dict(interleaved=interleaved)
        yield Case("", [view(name, dtype)], angles(5, 8), **kw)
        if name not in OVERLAPPING:
            yield Case("_", [view(name, dtype)], angles(5, 4), rotary_offset=4, **kw)
            yield Case("out", [view("contiguous", dtype)], angles(5, 8), outs=[view(name, dtype)])
    for sizes in ((2, 5, 0, 16), (0, 5, 3, 16), (2, 0, 3, 16), (1, 1, 1, 2), (1, 300, 7, 16)):
        yield Case("", [draw(*sizes)], angles(300, sizes[-1] // 2))
    yield Case("", [draw(2, 5, 3, 16)], angles(5, 0))


def tables() -> Iterator[Case]:
    """Tables for each token and head, and views of wider and complex ones."""
    spans = ((40, 8), (32, 0))
    for dtype, (D, o), pairing in itertools.product(
        (torch.bfloat16, torch.float64), spans, PAIRINGS
    ):
        x = draw(2, 5, 3, D, dtype=dtype)
        views: list[Any] = [
            *([t.view(B, 5, 16) for t in angles(B * 5, 16)] for B in (1, 2)),
            *([t.view(B, 5, 3, 16) for t in angles(B * 15, 16)] for B in (1, 2)),
            [t[None, :, None].expand(1, 5, 3, 16) for t in angles(5, 16)],
            draw(5, 32, dtype=torch.float32).chunk(2, -1),
            [draw(5, 33, dtype=torch.float32)[:, i : i + 16] for i in (0, 17)],
            draw(5, 16, 2, dtype=torch.float32).unbind(-1),
            [t.T for t in angles(16, 5)],
            [draw(1, 5, width, dtype=torch.float32)[..., :16] for width in (16, 20)],
            [t.expand(5, 16) for t in angles(1, 16)],
        ]
        for pair in views:
            yield Case("", [x, x * 2], pair, rotary_offset=o, **pairing)
            yield Case("_", [x], pair, inverse=True, **pairing)


def rows() -> Iterator[Case]:
    """Positions, offsets, packed sequences with padding, and scattered outputs."""
    for dtype, integer in itertools.product((torch.bfloat16, torch.float32), INTEGERS):
        xs, table = [draw(2, 5, H, 16, dtype=dtype) for H in (3, 2)], angles(20, 8)
        offsets = torch.tensor([3, 11], dtype=integer)
        for form, sizes in itertools.product(("", "_", "backward"), ((5,), (1, 5), (2, 5))):
            index = positions(*sizes, rows=9, dtype=integer)
            yield Case(form, xs, table, positions=index)
            yield Case(form, xs, table, positions=index, offset=offsets)
        yield Case("", xs, table, positions=positions(2, 10, rows=20, dtype=integer)[:, ::2])
        yield Case("", xs, table, offset=offsets)
        yield Case("", xs, table, offset=15)

        packed = [x.flatten(0, 1) for x in xs]
        cu = torch.tensor([0, 0, 4, 4, 7], dtype=integer)
        sequences = dict(layout="thd", cu_seqlens=cu)
        four = torch.tensor([12, 0, 3, 16], dtype=integer)
        for form in ("", "_", "backward"):
            yield Case(form, packed, table, **sequences)
            yield Case(form, packed, table, offset=four, **sequences)
            index = positions(10, rows=4, dtype=integer)
            yield Case(form, packed, table, positions=index, offset=four, **sequences)

        slots = torch.tensor([[7, -1, 0, 3, 11], [-1, 10, 5, 4, 9]], dtype=integer)
        cache = draw(12, 2, 16, dtype=dtype)
        outs = [torch.zeros_like(xs[0]), cache]
        for pairing in PAIRINGS:
            yield Case("out", xs, table, outs=outs, out_rows=slots, **pairing)
            yield Case("out", xs[1:], table, outs=[cache[:, :, :]], out_rows=slots, **pairing)
        joint = draw(12, 2, 24, dtype=dtype)[..., 8:]
        yield Case(
            "out",
            packed,
            table,
            outs=[draw(10, 3, 16, dtype=dtype), joint],
            out_rows=slots.flatten(),
            **sequences,
        )


def norms() -> Iterator[Case]:
    """Element and weight types, casts, pairings, sizes and memory of heads, rows, all forms."""
    widths = ((32, 16, 0), (48, 16, 16), (19, 6, 3), (128, 64, 0), (576, 32, 512), (1026, 4, 1))
    rounding = (("never", "fp32"), ("before", "model"), ("after", "fp32"), ("after", "model"))
    for dtype, (D, P, o), pairing in itertools.product(DTYPES, widths, PAIRINGS):
        index = positions(2, 5, rows=9)
        for (cast, precision), after in itertools.product(rounding, (False, True)):
            other = dtype if cast == "before" else torch.float32
            weights = [draw(D, dtype=dtype), draw(D, dtype=other)]
            kw = dict(eps=1e-6, cast=cast, precision=precision, after=after)
            kw |= dict(rotary_offset=o, **pairing)
            for form in ("", "_", "backward"):
                yield Case(form, qk(dtype, D), angles(9, P), weights, **kw)
            yield Case("backward", qk(dtype, D), angles(9, P), [None, weights[1]], **kw)
            yield Case("", qk(dtype, D)[:1], angles(9, P), weights[:1], positions=index, **kw)
    for name, dtype, after in itertools.product(
        VIEWS, (torch.bfloat16, torch.float32), (False, True)
    ):
        kw = dict(eps=1e-6, after=after)
        weights = [draw(32, dtype=dtype)[::2]]
        for form in ("", "backward"):
            yield Case(form, [view(name, dtype)], angles(5, 8), weights, **kw)
        if name not in OVERLAPPING:
            yield Case("_", [view(name, dtype)], angles(5, 4), weights, rotary_offset=4, **kw)
            outs = [view(name, dtype)]
            yield Case("out", [view("contiguous", dtype)], angles(5, 8), weights, outs=outs, **kw)
    for layout, sizes in itertools.product(LAYOUTS, ((2, 5), (3, 300))):
        xs = [draw(*shape(layout, *sizes, H, 64)) for H in (3, 2)]
        table = angles(sizes[0] * sizes[1], 32)
        yield Case("backward", xs, table, [draw(64), draw(64)], layout=layout, eps=1e-6)
    packed = [draw(10, H, 16) for H in (3, 2)]
    cu = torch.tensor([0, 0, 4, 4, 7])
    weights = [draw(16), None]
    for form in ("", "_", "backward"):
        kw = dict(layout="thd", cu_seqlens=cu, eps=1e-6)
        yield Case(form, packed, angles(20, 8), weights, **kw)
        axes = [j % 2 for j in range(8)]
        index = positions(2, 10, rows=20)
        kw = dict(layout="thd", positions=index, axes=axes, eps=1e-6)
        yield Case(form, packed, angles(20, 8), weights, **kw)
    slots = torch.tensor([7, -1, 0, 3, 11, -1, 10, 5, 4, 9])
    outs = [torch.zeros_like(packed[0]), draw(12, 2, 16)]
    kw = dict(layout="thd", out_rows=slots, eps=1e-6)
    yield Case("out", packed, angles(10, 8), weights, outs=outs, **kw)
    for sizes in ((2, 5, 0, 16), (0, 5, 3, 16), (2, 0, 3, 16), (1, 1, 1, 1)):
        x = [draw(*sizes)]
        yield Case("backward", x, angles(5, sizes[-1] // 2), [draw(sizes[-1])], eps=1e-6)


def caches() -> Iterator[Case]:
    """Storage, element types, widths, pages and strides of caches, k alone stored, norms, rows."""
    eight = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
    slots = torch.tensor([[7, -1, 0, 3, 11], [-1, 10, 5, 4, 9]])
    widths = (
        (32, 16, 0, 32),
        (128, 64, 0, 64),
        (48, 16, 16, 19),
        (19, 6, 3, 16),
        (576, 32, 512, 8),
    )
    norms: tuple[dict[str, Any], ...] = ({}, dict(eps=1e-6), dict(eps=1e-6, after=True))
    for dtype, (D, P, o, Dv), pairing, norm in itertools.product(DTYPES, widths, PAIRINGS, norms):
        for storage in (None, *eight):
            kw = dict(rotary_offset=o, slots=slots, **pairing, **norm)
            if storage is not None:
                kw |= dict(k_scale=torch.tensor(0.03), v_scale=torch.tensor([0.1, 0.02, 3.0]))
            weights = [draw(D, dtype=dtype), draw(D, dtype=torch.float32)] if norm else []
            xs = [draw(2, 5, H, n, dtype=dtype) for H, n in ((4, D), (3, D), (3, Dv))]
            for rows in ((12,), (3, 4), (5, 3)):
                stored = [draw(*rows, 3, n).to(storage or dtype) for n in (D, Dv)]
                both = dict(k_cache=stored[0], v_cache=stored[1])
                yield Case("cache", xs, angles(9, P), weights, **both, **kw)
            k_out = torch.zeros_like(xs[1])
            heads_first = [draw(3, 3, 4, n).to(storage or dtype).transpose(1, 2) for n in (D, Dv)]
            both = dict(k_cache=heads_first[0], v_cache=heads_first[1])
            index = positions(2, 5, rows=9)
            yield Case(
                "cache", xs, angles(9, P), weights, k_out=k_out, positions=index, **both, **kw
            )
    for name, dtype in itertools.product(VIEWS, (torch.bfloat16, torch.float32)):
        xs = [view(name, dtype) for _ in range(3)]
        for storage in (dtype, torch.float8_e4m3fn):
            joint = draw(12, 4, 40).to(storage)
            kw = dict(k_cache=joint[..., :16], v_cache=joint[..., 20:36], slots=slots.int())
            if storage != dtype:
                kw |= dict(k_scale=torch.tensor(0.03), v_scale=torch.tensor(0.1))
            yield Case("cache", xs, angles(5, 8), **kw)
    packed = [draw(10, H, 16) for H in (3, 2, 2)]
    cache = [draw(3, 4, 2, 16) for _ in range(2)]
    kw = dict(k_cache=cache[0], v_cache=cache[1], slots=slots.flatten(), layout="thd")
    yield Case("cache", packed, angles(20, 8), cu_seqlens=torch.tensor([0, 0, 4, 4, 7]), **kw)
    yield Case(
        "cache", packed, angles(20, 8), positions=positions(2, 10, rows=20), axes=[0, 1] * 4, **kw
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    count = 0
    for case in itertools.chain(
        instances(), forms(), memory(), tables(), rows(), norms(), caches()
    ):
        for got, want in zip(case.run(device), case.run("cpu"), strict=True):
            try:
                same(got, want)
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from None
        count += 1
    print(f"{count} calls, bitwise identical to the CPU")


if __name__ == "__main__":
    main()
