"""torch.func: vmap, grad, vjp, jvp, Jacobians, Hessians and gradients of each sample."""

import fused_rope
import pytest
import torch
from oracle import angles, bits, same, tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap


@pytest.fixture
def table(device):
    return angles(5, 8, device)


def stacked(n, sizes, device, dtype=torch.float32):
    return torch.randn(n, *sizes, dtype=dtype).to(device)


SIZES = (2, 5, 3, 16)


@pytest.mark.parametrize("axis", [0, 2, 4])
@pytest.mark.parametrize("out_axis", [0, 3])
def test_vmap_over_any_axis(axis, out_axis, device, table):
    xs = stacked(3, SIZES, device)
    want = torch.stack([bits(x, *table) for x in xs])
    f = vmap(lambda x: fused_rope.rotate(x, *table), in_dims=axis, out_dims=out_axis)
    same(f(xs.movedim(0, axis)).movedim(out_axis, 0), want)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "thd"])
def test_vmap_of_every_layout(layout, device):
    xs = torch.stack([tensor(layout, 1, 5, 3, 16, torch.float32, device) for _ in range(3)])
    cos, sin = angles(9, 8, device)
    each = torch.randint(-1, 9, (3, 5)).to(device)
    got = vmap(lambda x: fused_rope.rotate(x, cos, sin, layout=layout))(xs)
    same(got, torch.stack([bits(x, cos, sin, layout=layout) for x in xs]))
    f = vmap(lambda x, p: fused_rope.rotate(x, cos, sin, layout=layout, positions=p))
    want = [bits(x, cos, sin, layout=layout, positions=p) for x, p in zip(xs, each, strict=True)]
    same(f(xs, each), torch.stack(want))


def test_vmap_over_tables(device):
    x = tensor("bshd", 2, 5, 3, 16, torch.float32, device)
    cos, sin = (t.view(4, 5, 8) for t in angles(20, 8, device))
    got = vmap(lambda c, s: fused_rope.rotate(x, c, s))(cos, sin)
    same(got, torch.stack([bits(x, c, s) for c, s in zip(cos, sin, strict=True)]))


def test_vmap_over_one_of_two(device, table):
    qs, k = stacked(3, SIZES, device), tensor("bshd", 2, 5, 2, 16, torch.float32, device)
    got = vmap(lambda q: fused_rope.rotate_qk(q, k, *table))(qs)
    same(got[0], torch.stack([bits(q, *table) for q in qs]))
    same(got[1], bits(k, *table).expand(3, 2, 5, 2, 16))


def test_nested_vmap(device, table):
    xs = torch.randn(2, 3, *SIZES).to(device)
    got = vmap(vmap(lambda x: fused_rope.rotate(x, *table)))(xs)
    same(got, torch.stack([torch.stack([bits(x, *table) for x in row]) for row in xs]))


def test_grad_vjp_jvp(device, table):
    x, t = stacked(2, SIZES, device)
    f = lambda x: fused_rope.rotate(x, *table)  # noqa: E731
    back = bits(t, *table, inverse=True)
    same(grad(lambda x: (f(x) * t).sum())(x), back)
    primal, pull = vjp(f, x)
    same(primal, bits(x, *table))
    same(pull(t)[0], back)
    primal, tangent = jvp(f, (x,), (t,))
    same(primal, bits(x, *table))
    same(tangent, bits(t, *table))
    primal, push = linearize(f, x)
    same(push(t), bits(t, *table))


def test_transforms_of_q_and_k(device, table):
    q, tq = stacked(2, SIZES, device)
    k, tk = stacked(2, (2, 5, 1, 16), device)
    f = lambda q, k: fused_rope.rotate_qk(q, k, *table)  # noqa: E731
    _, pull = vjp(f, q, k)
    for got, t in zip(pull((tq, tk)), (tq, tk), strict=True):
        same(got, bits(t, *table, inverse=True))
    _, tangents = jvp(f, (q, k), (tq, tk))
    for got, t in zip(tangents, (tq, tk), strict=True):
        same(got, bits(t, *table))


def test_gradient_of_each_sample(device, table):
    xs, ts = stacked(4, SIZES, device), stacked(4, SIZES, device)
    got = vmap(grad(lambda x, t: (fused_rope.rotate(x, *table) * t).sum()))(xs, ts)
    same(got, torch.stack([bits(t, *table, inverse=True) for t in ts]))


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_jacobians(jacobian, interleaved, device):
    x = torch.randn(1, 2, 1, 6, device=device)
    cos, sin = angles(2, 2, device)
    kw = dict(interleaved=interleaved, rotary_offset=1)
    got = jacobian(lambda x: fused_rope.rotate(x, cos, sin, **kw))(x).reshape(12, 12)
    units = torch.eye(12, device=device).reshape(12, 1, 2, 1, 6)
    same(got.T, torch.stack([bits(e, cos, sin, **kw).flatten() for e in units]))


def test_jacobian_of_the_table(device):
    x = torch.randn(1, 2, 1, 4, dtype=torch.float64, device=device)
    cos, sin = angles(2, 2, device, torch.float64)
    want = torch.autograd.functional.jacobian(lambda c: fused_rope.rotate(x, c, sin), cos)
    for jacobian in (jacrev, jacfwd):
        got = jacobian(lambda c: fused_rope.rotate(x, c, sin))(cos)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_hessian(device):
    """Of the cubes of a rotation: R' diag(6 R x) R."""
    x = torch.randn(1, 1, 1, 4, dtype=torch.float64, device=device)
    cos, sin = angles(1, 2, device, torch.float64)
    f = lambda x: fused_rope.rotate(x, cos, sin)  # noqa: E731
    rotation = jacrev(f)(x).reshape(4, 4)
    got = hessian(lambda x: f(x).pow(3).sum())(x).reshape(4, 4)
    want = rotation.T @ torch.diag(6 * f(x).flatten()) @ rotation
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_grad_of_grad(device):
    x = torch.randn(1, 1, 1, 4, dtype=torch.float64, device=device)
    cos, sin = angles(1, 2, device, torch.float64)
    first = grad(lambda x: fused_rope.rotate(x, cos, sin).pow(3).sum())
    got = grad(lambda x: first(x).sum())(x)
    dense = hessian(lambda x: fused_rope.rotate(x, cos, sin).pow(3).sum())(x).reshape(4, 4)
    torch.testing.assert_close(got.flatten(), dense.sum(0), rtol=1e-12, atol=1e-12)


def test_rows_under_transforms(device):
    """Positions, offsets and axes hold under transforms as they do outside."""
    x, t = stacked(2, SIZES, device)
    cos, sin = angles(40, 8, device)
    three = torch.randint(-1, 20, (3, 2, 5)).to(device)
    lengths = torch.tensor([3, 9], dtype=torch.int32, device=device)
    for kw in (
        dict(offset=7),
        dict(offset=lengths),
        dict(positions=three[0], offset=2, inverse=True),
        dict(positions=three, axes=[0, 1, 2, 2] * 2, precision="model"),
    ):
        back = dict(kw, inverse=not kw.get("inverse", False))
        _, pull = vjp(lambda x, kw=kw: fused_rope.rotate(x, cos, sin, **kw), x)
        same(pull(t)[0], bits(t, cos, sin, **back))
        got = vmap(lambda x, kw=kw: fused_rope.rotate(x, cos, sin, **kw))(torch.stack([x, t]))
        same(got[1], bits(t, cos, sin, **kw))


def test_in_place_under_transforms(device, table):
    x, t = stacked(2, SIZES, device)
    got = grad(lambda x: (fused_rope.rotate_(x.clone(), *table) * t).sum())(x)
    same(got, bits(t, *table, inverse=True))
    got = vmap(lambda x: fused_rope.rotate_(x.clone(), *table))(torch.stack([x, t]))
    same(got, torch.stack([bits(x, *table), bits(t, *table)]))


def test_out_is_refused_under_transforms(device, table):
    x = torch.randn(SIZES, device=device)
    with pytest.raises(RuntimeError, match="rotate_out"):
        vmap(lambda x: fused_rope.rotate(x, *table, out=torch.empty_like(x)))(x[None])


def test_errors_under_transforms(device, table):
    x = torch.randn(2, 9, 3, 16, device=device)
    with pytest.raises(ValueError, match="cos has 5 rows"):
        grad(lambda x: fused_rope.rotate(x, *table).sum())(x)


def test_a_module_under_functional_call(device):
    """Gradients of each sample of a model that holds a RotaryEmbedding."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.Linear(16, 16, device=device)
            self.rope = fused_rope.RotaryEmbedding(8, max_seq_len=8, device=device)

        def forward(self, x):
            return self.rope(self.project(x).unflatten(-1, (2, 8))).flatten(-2)

    block, xs = Block(), torch.randn(3, 5, 16, device=device)
    parameters = dict(block.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(block, parameters, (x[None],)).pow(2).sum()

    got = vmap(grad(loss), in_dims=(None, 0))(parameters, xs)
    for i, x in enumerate(xs):
        block.zero_grad()
        block(x[None]).pow(2).sum().backward()
        for name, p in parameters.items():
            torch.testing.assert_close(got[name][i], p.grad, rtol=1e-4, atol=1e-5)
