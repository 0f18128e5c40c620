"""torch.compile, export and AOTInductor: one graph, few compilations, the eager bits."""

import fused_rope
import pytest
import torch
import torch._dynamo.testing
from oracle import angles, bits, same, tensor

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
LENGTHS = (5, 9, 17, 33, 64)


def counter(backend):
    return torch._dynamo.testing.CompileCounterWithBackend(backend)


def random_rows(device, S):
    """Every way to choose rows, for tensors [2, S, H, D] and a table of 128 rows."""
    return {
        "none": dict(),
        "offset": dict(offset=7),
        "lengths": dict(offset=torch.tensor([3, 50], device=device)),
        "positions": dict(positions=torch.randint(-1, 128, (2, S)).to(device)),
        "axes": dict(
            positions=torch.randint(-1, 128, (3, 2, S), dtype=torch.int32).to(device),
            axes=[0, 1, 2, 0] * 4,
        ),
    }


# Two by inductor; aot_eager traces the same graphs in a fraction of the time.
RECOMPILING = [("aot_eager", rows) for rows in random_rows("cpu", 5)]
RECOMPILING += [("inductor", "none"), ("inductor", "positions")]


@pytest.mark.parametrize("backend,rows", RECOMPILING)
def test_lengths_do_not_recompile(backend, rows, device):
    """Forward and backward, bitwise identical to eager mode."""
    cos, sin = angles(128, 16, device)
    count = counter(backend)

    def f(q, k, rows):
        a, b = fused_rope.rotate_qk(q * 2, k, cos, sin, **rows)
        return a.sin() + b.sum(2, keepdim=True), b

    compiled = torch.compile(f, backend=count, fullgraph=True)
    for S in LENGTHS:
        q, k = (tensor("bshd", 2, S, H, 32, torch.float32, device).requires_grad_() for H in (4, 2))
        kw = random_rows(device, S)[rows]
        got, want = compiled(q, k, kw), f(q, k, kw)
        same(got[1], want[1])
        gradients = torch.randn_like(want[0]), torch.randn_like(want[1])
        got = torch.autograd.grad(got, (q, k), gradients)
        for a, b in zip(got, torch.autograd.grad(want, (q, k), gradients), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert count.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "model"])
def test_eager_bits(dtype, precision, device):
    """Nothing is decomposed into operations that a compiler may contract or reorder."""
    x = tensor("bshd", 2, 9, 4, 64, dtype, device).requires_grad_()
    cos, sin = angles(9, 32, device)
    f = torch.compile(lambda x: fused_rope.rotate(x, cos, sin, precision=precision), fullgraph=True)
    g = torch.randn_like(x)
    y = f(x)
    same(y, bits(x, cos, sin, precision))
    same(torch.autograd.grad(y, x, g)[0], bits(g, cos, sin, precision, inverse=True))


def test_an_offset_that_grows_does_not_recompile(device):
    cos, sin = angles(64, 16, device)
    count = counter("aot_eager")
    f = torch.compile(
        lambda x, n: fused_rope.rotate(x, cos, sin, offset=n) + 1, backend=count, fullgraph=True
    )
    x = tensor("bshd", 2, 1, 4, 32, torch.float32, device)
    for n in (5, 6, 7, 8, 40, 63):
        same(f(x, n), bits(x, cos, sin, offset=n) + 1)
    assert count.frame_count <= 2


def test_a_decode_loop(device):
    """Prefill, then one token at a time, in a module that owns the table."""
    rope = fused_rope.RotaryEmbedding(32, max_seq_len=64, device=device)
    count = counter("aot_eager")
    f = torch.compile(rope, backend=count, fullgraph=True)
    x = tensor("bshd", 1, 30, 2, 32, torch.float32, device)
    want = rope(x)
    parts = [f(x[:, :20])] + [f(x[:, i : i + 1], offset=i) for i in range(20, 30)]
    same(torch.cat(parts, 1), want)
    assert count.frame_count <= 3  # length 1 is one more


def test_packed_sequences(device):
    cos, sin = angles(64, 16, device)
    count = counter("aot_eager")

    def f(x, cu):
        return fused_rope.rotate(x, cos, sin, layout="thd", cu_seqlens=cu)

    compiled = torch.compile(f, backend=count, fullgraph=True)
    for lengths in ([3, 4], [5, 0, 9], [2, 2, 2, 2], [31, 7]):
        cu = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        x = tensor("thd", 1, sum(lengths) + 2, 4, 32, torch.float32, device)
        same(compiled(x, cu), bits(x, cos, sin, layout="thd", cu_seqlens=cu))
    assert count.frame_count <= 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_in_place(backend, grad, device):
    """On two slices of one packed tensor, within one graph."""
    cos, sin = angles(5, 8, device)

    def f(x):
        y = x * 2
        fused_rope.rotate_qk_(y[:, :, :4], y[:, :, 4:6], cos, sin)
        fused_rope.rotate_(y[:, :, 6:], cos, sin, interleaved=True)
        return y + 1

    x = tensor("bshd", 2, 5, 8, 16, torch.float32, device).requires_grad_(grad)
    got, want = torch.compile(f, backend=backend, fullgraph=True)(x), f(x)
    same(got, want)
    if grad:
        g = torch.randn_like(want)
        same(torch.autograd.grad(got, x, g)[0], torch.autograd.grad(want, x, g)[0])


def test_in_place_on_an_input(device):
    cos, sin = angles(5, 8, device)
    f = torch.compile(lambda x: fused_rope.rotate_(x, cos, sin), fullgraph=True)
    x = tensor("bshd", 2, 5, 8, 16, torch.float32, device)
    want = bits(x, cos, sin)
    same(f(x), want)
    same(x, want)


def test_out_and_out_rows(device):
    cos, sin = angles(90, 16, device)

    def f(q, k, positions, cache, slots):
        q_out = torch.empty_like(q)
        fused_rope.rotate_qk(
            q, k, cos, sin, layout="thd", positions=positions, out=(q_out, cache), out_rows=slots
        )
        return q_out + 1

    q, k = (tensor("thd", 1, 7, H, 32, torch.float32, device) for H in (8, 2))
    positions = torch.randint(0, 90, (7,)).to(device)
    slots = torch.tensor([30, 2, -1, 17, 0, 63, 5], device=device)
    caches = [torch.full((64, 2, 32), 7.0, device=device) for _ in range(2)]
    with torch.no_grad():
        want = f(q, k, positions, caches[0], slots)
        got = torch.compile(f, fullgraph=True)(q, k, positions, caches[1], slots)
    same(got, want)
    same(caches[1], caches[0])


def test_trained_table(device):
    x = tensor("bshd", 2, 5, 4, 16, torch.float32, device)
    cos, sin = (t.requires_grad_() for t in angles(9, 8, device))
    positions = torch.randint(-1, 9, (2, 5)).to(device)

    def f(x, cos, sin):
        return fused_rope.rotate(x, cos, sin, positions=positions)

    g = torch.randn_like(x)
    got = torch.autograd.grad(torch.compile(f, fullgraph=True)(x, cos, sin), (cos, sin), g)
    for a, b in zip(got, torch.autograd.grad(f(x, cos, sin), (cos, sin), g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "thd"])
@pytest.mark.parametrize(
    "pairing", [{}, {"interleaved": True}, {"blocks": 2, "rotary_offset": 3}], ids=str
)
def test_every_layout_and_pairing(layout, pairing, device):
    x = tensor(layout, 1, 5, 3, 40, torch.bfloat16, device)
    cos, sin = angles(9, 8, device)
    kw = dict(layout=layout, **pairing)
    f = lambda x: fused_rope.rotate(x, cos, sin, **kw)  # noqa: E731
    same(torch.compile(f, backend="aot_eager", fullgraph=True)(x), bits(x, cos, sin, **kw))


def test_errors_under_compile(device):
    x, (cos, sin) = tensor("bshd", 2, 9, 4, 16, torch.float32, device), angles(5, 8, device)
    f = torch.compile(lambda x: fused_rope.rotate(x, cos, sin), backend="aot_eager")
    with pytest.raises(Exception, match="cos has 5 rows"):
        f(x)


@pytest.mark.parametrize(
    "kw",
    [
        dict(),
        dict(layout="bhsd", offset=3, rotary_offset=2, interleaved=True, inverse=True),
        dict(positions=[[4, -1, 0, 2], [1, 1, 8, 3]], axes=[0, 1, 1, 0], blocks=2),
        dict(offset=[3, 0], precision="model"),
        dict(layout="thd", cu_seqlens=[0, 3, 7]),
    ],
    ids=lambda kw: ", ".join(kw) or "defaults",
)
def test_compiled_autograd(kw, device):
    """Every saved field reaches a compiled backward."""
    kw = {k: torch.tensor(v, device=device) if _is_index(k, v) else v for k, v in kw.items()}
    layout = kw.get("layout", "bshd")
    B = 1 if layout == "thd" else 2
    x = tensor(layout, B, 8 if B == 1 else 4, 3, 16, torch.bfloat16, device).requires_grad_()
    cos, sin = angles(9, 4, device)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        fused_rope.rotate(x, cos, sin, **kw).sum().backward()
    inverse = kw | dict(inverse=not kw.get("inverse", False))
    same(x.grad, bits(torch.ones_like(x), cos, sin, **inverse))


def _is_index(name, value):
    return isinstance(value, list) and name != "axes"


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 3), (0, 1, 2, 3)], ids=str)
def test_compiled_autograd_of_both(trained, device):
    """Outputs of inputs that need no gradient have none; compiled autograd accepts the node."""
    q, k = (tensor("bshd", 2, 5, H, 16, torch.float32, device) for H in (4, 1))
    inputs = [q, k, *(t.clone() for t in angles(5, 8, device))]
    trained = [inputs[i].requires_grad_() for i in trained]

    def loss():
        return sum(x.square().sum() for x in fused_rope.rotate_qk(*inputs) if x.requires_grad)

    want = torch.autograd.grad(loss(), trained)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss().backward()
    for t, grad in zip(trained, want, strict=True):
        torch.testing.assert_close(t.grad, grad)


# --- export ------------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    def forward(self, q, k, cos, sin):
        q, k = fused_rope.rotate_qk(q, k, cos, sin, layout="bhsd")
        return torch.nn.functional.scaled_dot_product_attention(q, k, k)


def exported(device):
    q, k = (tensor("bhsd", 2, 9, 4, 32, torch.float32, device) for _ in range(2))
    S = torch.export.Dim("S", min=2, max=64)
    return torch.export.export(
        Attention().to(device),
        (q, k, *angles(64, 16, device)),
        dynamic_shapes=({2: S}, {2: S}, None, None),
    )


def test_export(device):
    """One node, any sequence length; saved and loaded again."""
    program = exported(device)
    nodes = [str(n.target) for n in program.graph.nodes if "fused_rope" in str(n.target)]
    assert nodes == ["fused_rope.rotate_qk.default"]
    cos, sin = angles(64, 16, device)
    for S in (2, 9, 33, 64):
        q, k = (tensor("bhsd", 2, S, 4, 32, torch.float32, device) for _ in range(2))
        want = Attention()(q, k, cos, sin)
        torch.testing.assert_close(program.module()(q, k, cos, sin), want)


def test_a_saved_program(tmp_path, device):
    path = tmp_path / "attention.pt2"
    torch.export.save(exported(device), path)
    program = torch.export.load(path).module()
    q, k = (tensor("bhsd", 2, 33, 4, 32, torch.float32, device) for _ in range(2))
    table = angles(64, 16, device)
    torch.testing.assert_close(program(q, k, *table), Attention()(q, k, *table))


def test_make_fx_keeps_a_symbolic_offset(device):
    """The eager entry must not replace a symbol by its value while tracing."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def f(x, cos, sin):
        return fused_rope.rotate(x, cos, sin, offset=x.shape[1])

    table = angles(64, 8, device)
    traced = make_fx(f, tracing_mode="symbolic")(torch.randn(2, 3, 4, 16, device=device), *table)
    x = torch.randn(2, 7, 4, 16, device=device)
    same(traced(x, *table), f(x, *table))
