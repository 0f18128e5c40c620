"""In place under compilers: what eager mode does, bitwise, on any view and for sizes that change.

FUSED_ROPE_COMPILED_PROGRAMS=200 runs as many random programs instead of a few.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fused_rope
import pytest
import torch
import torch._dynamo.testing
from fused_rope.compat import flash_attn, unsloth, vllm
from oracle import angles, same, tensor
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_caches")
slow = pytest.mark.slow
SHAPES = ((2, 8, 3, 4, 8), (2, 8, 3, 6, 8), (3, 9, 3, 5, 8))


@pytest.fixture
def no_caches() -> Iterator[None]:
    """Compiles anew: a cache of compiled code does not see how operators are functionalized."""
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def leaves(f: Callable[..., Any], inputs: list[Tensor], grad: bool) -> list[Tensor]:
    """What f(*inputs) returns, what is in the inputs afterwards, and the gradients."""
    inputs = [x.clone().requires_grad_(grad) for x in inputs]
    outputs = list(f(*inputs))
    if not grad:
        return outputs + inputs
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    return outputs + list(torch.autograd.grad(outputs, inputs, seeds))


def check(
    f: Callable[..., Any], calls: list[list[Tensor]], grad: bool, backend: str, **options: Any
) -> None:
    """f compiled returns, writes and differentiates what f does, for each call's inputs."""
    compiled = torch.compile(f, backend=backend, fullgraph=True, **options)
    for inputs in calls:
        want, got = leaves(f, inputs, grad), leaves(compiled, inputs, grad)
        wrong = [i for i, (g, w) in enumerate(zip(got, want, strict=True)) if not torch.equal(g, w)]
        assert not wrong, f"{wrong} of {len(got)} tensors differ, inputs {inputs[0].shape}"


# Views [B, S, H, D] of x [B, S, 3, H, D]; autograd refuses those of several views made by one call.
SINGLE_VIEWS = {
    "select": lambda x: x[:, :, 1],
    "select from the end": lambda x: x[:, :, -1],
    "narrow": lambda x: x.narrow(2, 1, 1).squeeze(2),
    "slice of a slice": lambda x: x[:, 1:][:, :, 1][:, ::2],
    "heads of a select": lambda x: x[:, :, 0, 1:],
    "select of a transpose": lambda x: x.transpose(1, 3)[:, :, 1],
    "permutation": lambda x: x.permute(2, 1, 0, 3, 4)[2].transpose(0, 1),
    "reshaped": lambda x: x.flatten(2, 3),
    "heads of a reshaped": lambda x: x.flatten(2, 3)[:, :, 2:5],
    "unflattened": lambda x: x.flatten(2, 3).unflatten(2, (3, -1))[:, :, 1],
    "every second head": lambda x: x.flatten(2, 3)[:, :, 1::2],
    "part of each head": lambda x: x[:, :, 1, :, 2:],
    "as_strided": lambda x: x.as_strided(
        (*x.shape[:2], *x.shape[3:]), (*x.stride()[:2], *x.stride()[3:]), x.stride(2)
    ),
    "whole": lambda x: x.flatten(2, 3).view(x.shape[0], x.shape[1], -1, x.shape[4]),
}
MULTIPLE_VIEWS = {
    "unbind": lambda x: x.unbind(2)[1],
    "chunk": lambda x: x.chunk(3, 2)[2].squeeze(2),
    "split": lambda x: x.flatten(2, 3).split([1, 2, 3 * x.shape[3] - 3], 2)[1],
    "split of an unbind": lambda x: x.unbind(2)[2].tensor_split(2, 2)[0],
}


# Views whose storage offset depends on a size.
SYMBOLIC_OFFSETS = ("select", "slice of a slice", "select of a transpose", "unbind")
ALL_VIEWS = (*SINGLE_VIEWS, *MULTIPLE_VIEWS)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize(
    "backend,dynamic,names",
    [
        pytest.param("aot_eager", False, ALL_VIEWS, id="aot_eager, static"),
        pytest.param("aot_eager", True, SYMBOLIC_OFFSETS[:2], id="aot_eager, symbolic offsets"),
        pytest.param("aot_eager", True, ALL_VIEWS, id="aot_eager, dynamic", marks=slow),
        pytest.param("aot_eager", None, ALL_VIEWS, id="aot_eager, automatic", marks=slow),
        pytest.param("inductor", True, SYMBOLIC_OFFSETS, id="inductor, dynamic", marks=slow),
    ],
)
def test_views(
    backend: str, dynamic: bool | None, names: tuple[str, ...], grad: bool, device: str
) -> None:
    """All views in one graph, each of a tensor of its own."""
    views = SINGLE_VIEWS if grad else SINGLE_VIEWS | MULTIPLE_VIEWS
    views = {name: view for name, view in views.items() if name in names}
    cos, sin = angles(64, 3, device)

    def f(*xs: Tensor) -> list[Tensor]:
        xs = [x * 1 for x in xs] if grad else xs
        for x, view in zip(xs, views.values(), strict=True):
            fused_rope.rotate_(view(x), cos, sin)
        return [x * 2 for x in xs]

    calls = [[torch.randn(shape, device=device) for _ in views] for shape in SHAPES]
    check(f, calls, grad, backend, dynamic=dynamic)


@pytest.mark.parametrize(
    "backend,grad",
    [
        ("aot_eager", False),
        pytest.param("aot_eager", True, marks=slow),
        pytest.param("inductor", False, marks=slow),
    ],
)
def test_drop_ins(backend: str, grad: bool, device: str) -> None:
    cos, sin = angles(64, 4, device)
    cache = torch.cat((cos, sin), -1)

    def f(qkv: Tensor, kv: Tensor, packed: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
        if grad:
            qkv, kv, packed, x, y = (t * 1 for t in (qkv, kv, packed, x, y))
        H = qkv.shape[3]
        flash_attn.apply_rotary_emb_qkv_(qkv, cos, sin)
        flash_attn.apply_rotary_emb_qkv_(packed, cos, sin, num_heads_q=H, seqlen_offsets=5)
        flash_attn.apply_rotary_emb_kv_(kv[:, :, 1:], cos, sin)
        flash_attn.apply_rotary_emb(x[:, :, -1], cos, sin, inplace=True, interleaved=True)
        positions = torch.arange(y.shape[1], device=y.device).expand(y.shape[:2])
        vllm.rotary_embedding(positions, y[:, :, 0].flatten(2), y[:, :, 2], 8, cache, True)
        q, k = (y[:, :, i].transpose(1, 2) for i in (1, 2))
        unsloth.fast_rope_embedding(q, k, cos, sin, inplace=True)
        return [qkv, kv, packed, x, y]

    calls = [
        [
            torch.randn(*sizes, device=device)
            for sizes in (shape, shape, (B, S, 3 * H, D), shape, shape)
        ]
        for shape in SHAPES
        for B, S, _, H, D in [shape]
    ]
    check(f, calls, grad, backend)


@pytest.mark.parametrize("form", [pytest.param("rotate_", marks=slow), "rotate_qk_"])
def test_operators_called_directly(form: str, device: str) -> None:
    cos, sin = angles(64, 4, device)
    count = 2 if form == "rotate_qk_" else 1

    def f(x: Tensor) -> list[Tensor]:
        getattr(torch.ops.fused_rope, form)(*(x[:, :, i] for i in range(count)), cos, sin)
        return [x + 1]

    check(f, [[torch.randn(shape, device=device)] for shape in SHAPES], False, "inductor")


OUTPUTS = {
    "select": lambda x: x[:, :, 1],
    "slice of a select": lambda x: x[:, :, -1, 1:],
    "part of each head": lambda x: x[:, :, 1, :, 2:],
}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=slow)])
def test_outputs(backend: str, device: str) -> None:
    """out= a view of existing memory."""
    cos, sin = angles(64, 3, device)

    def f(*xs: Tensor) -> list[Tensor]:
        for x, view in zip(xs, OUTPUTS.values(), strict=True):
            fused_rope.rotate(view(x) * 2, cos, sin, out=view(x))
        return [x * 2 for x in xs]

    calls = [[torch.randn(shape, device=device) for _ in OUTPUTS] for shape in SHAPES]
    check(f, calls, False, backend, dynamic=True)


@pytest.mark.parametrize(
    "backend,layout",
    [
        pytest.param("inductor", "bhsd", marks=slow),
        *(("aot_eager", layout) for layout in ("bshd", "thd")),
        *(pytest.param("aot_eager", layout, marks=slow) for layout in ("bhsd", "sbhd")),
    ],
)
def test_rows_of_a_cache(backend: str, layout: str, device: str) -> None:
    """Keys go into a half of [pages, 2, page_size, H, D] or [2, pages, page_size, H, D]."""
    cos, sin = angles(64, 4, device)
    batches = 1 if layout == "thd" else 2

    def f(q: Tensor, k: Tensor, pages: Tensor, slots: Tensor) -> list[Tensor]:
        q_out = torch.empty_like(q)
        kw: dict[str, Any] = {"layout": layout, "out_rows": slots}
        fused_rope.rotate_qk(q, k, cos, sin, out=(q_out, pages[1].flatten(0, 1)), **kw)
        fused_rope.rotate(q[..., :8], cos, sin, out=pages[:, 1, 0], **kw)
        return [q_out, pages * 2]

    compiled = torch.compile(f, backend=backend, fullgraph=True, dynamic=True)
    for S, H, kept in ((4, 3, 1.0), (5, 2, 0.5), (6, 4, 0.0)):
        q, k = (tensor(layout, batches, S, H, 8, torch.float32, device) for _ in range(2))
        pages = torch.randn(batches * S, 2 * S, 2, H, 8, device=device)
        slots = torch.randperm(batches * S)
        slots[torch.rand(slots.shape) >= kept] = -1
        slots = (slots if layout == "thd" else slots.view(batches, S)).to(device)
        inputs = [q, k, pages, slots]
        want, got = ([x.clone() for x in inputs] for _ in range(2))
        for a, b in zip(f(*want), compiled(*got), strict=True):
            same(b, a)
        same(got[2], want[2])


@pytest.mark.parametrize("slot", [-2, 40])
def test_an_out_row_outside_the_cache(slot: int) -> None:
    cos, sin = angles(64, 4)
    x, cache = torch.randn(5, 2, 8), torch.randn(40, 2, 8)
    slots = torch.tensor([0, 1, slot, -1, 2])

    def f(x: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
        return fused_rope.rotate(x, cos, sin, layout="thd", out=cache, out_rows=slots)

    for call in (f, torch.compile(f, backend="aot_eager")):
        with pytest.raises(IndexError):
            call(x, cache, slots)


@slow
def test_views_as_inputs(device: str) -> None:
    """q and k of one packed tensor are arguments of the compiled function."""
    cos, sin = angles(64, 4, device)

    def f(q: Tensor, k: Tensor) -> None:
        fused_rope.rotate_qk_(q, k, cos, sin)
        fused_rope.rotate_(k[:, :, 1:], cos, sin)

    compiled = torch.compile(f, fullgraph=True)
    for shape in SHAPES:
        x = torch.randn(shape, device=device)
        y = x.clone()
        f(x[:, :, 0], x[:, :, 2])
        compiled(y[:, :, 0], y[:, :, 2])
        same(y, x)
        assert y._version > 0


def test_lengths_do_not_recompile_in_place(device: str) -> None:
    cos, sin = angles(64, 4, device)
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(x: Tensor) -> Tensor:
        fused_rope.rotate_qk_(x[:, :, 0], x[:, :, 1], cos, sin)
        return fused_rope.rotate_(x[:, :, 2], cos, sin)

    compiled = torch.compile(f, backend=count, fullgraph=True)
    for S in (5, 9, 17, 33, 64):
        x = torch.randn(2, S, 3, 4, 8, device=device)
        same(compiled(x.clone()), f(x))
    assert count.frame_count <= 2


# What is dynamic while q's sizes are static.
@pytest.mark.parametrize("dynamic", ["rows", "heads of k", "offset", "nothing"])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_sizes_that_change_while_those_of_q_do_not(dynamic: str, grad: bool, device: str) -> None:
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        return fused_rope.rotate_qk_(q * 1, k * 1, cos, sin, offset=past.shape[0])

    compiled = torch.compile(f, backend=count, fullgraph=True)
    for n in (3, 4, 5):
        rows = 60 + n if dynamic == "rows" else 64
        H = n if dynamic == "heads of k" else 2
        past = torch.empty(n if dynamic == "offset" else 3, device=device)
        cos, sin = angles(rows, 4, device)
        q, k = (torch.randn(2, 5, h, 8, device=device, requires_grad=grad) for h in (4, H))
        for x, dim in (
            {"rows": [(cos, 0), (sin, 0)], "heads of k": [(k, 2)], "offset": [(past, 0)]}
        ).get(dynamic, ()):
            torch._dynamo.mark_dynamic(x, dim)
        got, want = compiled(q, k, cos, sin, past), f(q, k, cos, sin, past)
        for g, w in zip(got, want, strict=True):
            same(g, w)
        if grad:
            seeds = [torch.randn_like(w) for w in want]
            for g, w in zip(
                torch.autograd.grad(got, (q, k), seeds),
                torch.autograd.grad(want, (q, k), seeds),
                strict=True,
            ):
                same(g, w)
    assert count.frame_count == 1


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_packed_sequences(dynamic: bool, grad: bool, device: str) -> None:
    cos, sin = angles(64, 4, device)
    starts = torch.tensor([0, 2, 6], device=device)

    def f(x: Tensor) -> tuple[Tensor]:
        return (fused_rope.rotate_(x * 1, cos, sin, layout="thd", cu_seqlens=starts),)

    check(f, [[torch.randn(7, 3, 8, device=device)]], grad, "aot_eager", dynamic=dynamic)


Program = Callable[[Tensor, Tensor, Tensor], Tensor]


def exported(f: Program, inputs: tuple[Tensor, ...], strict: bool) -> Program:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return f(x, cos, sin)

    sizes = {1: torch.export.Dim("S", min=2, max=64), 3: torch.export.Dim("H", min=2, max=64)}
    shapes = (sizes, None, None)
    program = torch.export.export(Module(), inputs, dynamic_shapes=shapes, strict=strict)
    return program.run_decompositions().module()


TRACERS = {
    "functionalize": lambda f, inputs: torch.func.functionalize(f),
    "make_fx": lambda f, inputs: make_fx(torch.func.functionalize(f), tracing_mode="symbolic")(
        *inputs
    ),
    "export": lambda f, inputs: exported(f, inputs, strict=False),
    "strict export": lambda f, inputs: exported(f, inputs, strict=True),
}


@pytest.mark.parametrize("direct", [False, True], ids=["function", "operator"])
@pytest.mark.parametrize("tracer", TRACERS)
def test_tracers(tracer: str, direct: bool, device: str) -> None:
    table = angles(64, 4, device)

    def f(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotate = torch.ops.fused_rope.rotate_qk_ if direct else fused_rope.rotate_qk_
        rotate(x[:, :, 1], x[:, :, -1], cos, sin)
        return x * 2

    program = TRACERS[tracer](f, (torch.randn(SHAPES[0], device=device), *table))
    for shape in (SHAPES[0], (2, 9, 3, 5, 8)):
        x = torch.randn(shape, device=device)
        y = x.clone()
        same(program(y, *table), f(x, *table))
        same(y, x)


def refused() -> dict[str, Callable[[Tensor], Any]]:
    cos, sin = angles(64, 4)
    narrow = fused_rope.rotate_
    both = fused_rope.rotate_qk_
    return {
        "expanded": lambda x: narrow(x[:, :, 0, :1].expand(-1, -1, 3, -1), cos, sin),
        "k is q": lambda x: both(*[x[:, :, 0]] * 2, cos, sin),
        "k overlaps q": lambda x: both(x.flatten(0, 2)[None, 2:], x.flatten(0, 2)[None], cos, sin),
        "dtype": lambda x: narrow(x[:, :, 0].int(), cos, sin),
        "rank": lambda x: narrow(x, cos, sin),
        "wide table": lambda x: narrow(x[:, :, 0, :, :6], cos, sin),
        "rows": lambda x: narrow(x[:, :, 0], cos[:3], sin[:3]),
        "row of -2": lambda x: narrow(
            x[:, :, 0], cos, sin, positions=torch.full((x.shape[1],), -2)
        ),
        "out of another shape": lambda x: fused_rope.rotate(x[:1, :, 0], cos, sin, out=x[:, :, 1]),
        "out is x": lambda x: fused_rope.rotate(x[0], cos, sin, out=x[0]),
        "out expanded": lambda x: fused_rope.rotate(
            x[:, :, 0], cos, sin, out=x[:1, :, 1].expand(2, -1, -1, -1)
        ),
        "leaf": lambda x: narrow(x[:, :, 0], cos, sin),
        "one of an unbind": lambda x: narrow((x * 1).unbind(2)[0], cos, sin),
    }


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", refused())
def test_errors_of_eager_mode(name: str, dynamic: bool) -> None:
    grad = name in ("leaf", "one of an unbind")
    x = torch.randn(SHAPES[0], requires_grad=grad)
    before = x.detach().clone()
    f = refused()[name]
    with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
        f(x)
    with pytest.raises(Exception, match=r"rotate|leaf|view"):
        torch.compile(f, backend="aot_eager", dynamic=dynamic)(x)
    same(x.detach(), before)


def test_inference_tensors_are_errors() -> None:
    cos, sin = angles(64, 4)
    with torch.inference_mode():
        x = torch.randn(SHAPES[0])
    f = torch.compile(lambda x: fused_rope.rotate_(x[:, :, 1], cos, sin), backend="aot_eager")
    with pytest.raises(RuntimeError, match="inference"):
        f(x)


# --- random programs ---------------------------------------------------------------------------


class Step(NamedTuple):
    """One view; `many` where it is one of several made by one call."""

    text: str
    view: Callable[[Tensor], Tensor]
    many: bool = False


def random_step(rng: random.Random, rank: int) -> Step:
    d = rng.randrange(rank - 1)
    e = rng.randrange(rank - 1)
    i = rng.choice((0, 1, -1, -2))
    if rank > 4 and rng.random() < 0.5:
        return rng.choice(
            (
                Step(f"select({d}, {i})", lambda x: x.select(d, i)),
                Step(f"unbind({d})[{i}]", lambda x: x.unbind(d)[i], many=True),
                Step(f"flatten({d}, {d + 1})", lambda x: x.flatten(d, d + 1)),
                Step(f"narrow({d}, 1, 1)[0]", lambda x: x.narrow(d, 1, 1).squeeze(d)),
            )
        )
    last = rank - 1
    return rng.choice(
        (
            Step(f"transpose({d}, {e})", lambda x: x.transpose(d, e)),
            Step(f"[1:] of {d}", lambda x: x.narrow(d, 1, x.shape[d] - 1)),
            Step(f"[:-1] of {d}", lambda x: x.narrow(d, 0, x.shape[d] - 1)),
            Step(f"[::2] of {d}", lambda x: x[(slice(None),) * d + (slice(None, None, 2),)]),
            Step(f"chunk(2, {d})[0]", lambda x: x.chunk(2, d)[0], many=True),
            Step(f"split(-1, {d})[0]", lambda x: x.split(x.shape[d] - 1, d)[0], many=True),
            Step("[..., 1:]", lambda x: x.narrow(last, 1, x.shape[last] - 1)),
            Step(f"unsqueeze({d}).squeeze({d})", lambda x: x.unsqueeze(d).squeeze(d)),
            Step(f"movedim({d}, {e})", lambda x: x.movedim(d, e)),
        )
    )


def random_view(rng: random.Random, shapes: list[tuple[int, ...]], grad: bool) -> list[Step]:
    """Steps from tensors of `shapes` to views of 4 dimensions that have room for 4 elements."""
    steps: list[Step] = []
    examples = [torch.empty(shape, device="meta") for shape in shapes]
    while examples[0].dim() > 4 or rng.random() < 0.6:
        step = random_step(rng, examples[0].dim())
        if step.many and grad:
            continue
        taken = [step.view(x) for x in examples]
        if all(t._is_view() and min(t.shape) > 1 and t.shape[-1] >= 4 for t in taken):
            steps.append(step)
            examples = taken
    return steps


def take(x: Tensor, steps: list[Step]) -> Tensor:
    for step in steps:
        x = step.view(x)
    return x


PROGRAMS = int(os.environ.get("FUSED_ROPE_COMPILED_PROGRAMS", 6))


@pytest.mark.slow
@pytest.mark.parametrize("program", range(PROGRAMS))
def test_random_programs(program: int, seed: int, device: str) -> None:
    """Views of views, in place one after the other, over shapes that change from call to call."""
    rng = random.Random(f"{seed}/{program}")
    grad, dynamic = rng.random() < 0.5, rng.choice((None, None, True))
    backend = "inductor" if program % 3 == 0 else "aot_eager"
    rank = rng.choice((5, 5, 6))
    shapes = [(2, *(rng.randint(5, 7) for _ in range(rank - 1)), 8) for _ in range(3)]
    options: list[dict[str, Any]] = [
        {},
        {"interleaved": True},
        {"blocks": 2, "inverse": True},
        {"precision": "model", "rotary_offset": 1},
        {"offset": 3},
        {"layout": "bhsd"},
    ]
    calls = []
    for _ in range(2 if backend == "inductor" else 4):
        steps = random_view(rng, [shape[1:] for shape in shapes], grad)
        calls.append((steps, rng.random() < 0.5, rng.choice(options)))
    cos, sin = angles(64, 2, device)

    def f(x: Tensor) -> list[Tensor]:
        x = x * 1 if grad else x
        for steps, pair, kw in calls:
            q, k = take(x[0], steps), take(x[1], steps)
            if pair:
                fused_rope.rotate_qk_(q, k, cos, sin, **kw)
            else:
                fused_rope.rotate_(k, cos, sin, **kw)
        return [x * 2]

    try:
        check(f, [[torch.randn(s, device=device)] for s in shapes], grad, backend, dynamic=dynamic)
    except AssertionError as error:
        texts = [".".join(s.text for s in steps) for steps, *_ in calls]
        raise AssertionError(f"{error}\n{backend} grad={grad} dynamic={dynamic} {texts}") from None
