"""norm_rotate under autograd, torch.func and compilers; its backward operator."""

import copy

import fused_rope
import pytest
import torch
import torch._dynamo.testing
from fused_rope import reference
from oracle import angles, norm_oracle, same, tensor
from test_norm import EACH_ORDER, weight_of
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

EPS = 1e-6
_backward = torch.ops.fused_rope.norm_rotate_qk_backward


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def draw(layout, D, dtype, device, batch=2, tokens=3):
    """q, k, their weights and the tables."""
    q, k = (tensor(layout, batch, tokens, heads, D, dtype, device) for heads in (2, 1))
    weights = [weight_of(D, dtype, device) for _ in range(2)]
    return q, k, *weights, *angles(6, D // 2, device, dtype)


CHECKED = {
    "half": dict(),
    "after": dict(after=True),
    "zero centered": dict(zero_centered=True, interleaved=True),
    "inverse after": dict(after=True, inverse=True, blocks=2),
    "offset": dict(offset=2, rotary_offset=1),
}


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "thd"])
@pytest.mark.parametrize("name", CHECKED)
def test_gradcheck(layout, name, device):
    """First and second derivatives by everything, the tables included, and forward mode."""
    options = CHECKED[name]
    D = 9 if "rotary_offset" in options else 8
    q, k, *weights = draw(layout, D, torch.float64, device, batch=1, tokens=2)[:4]
    cos, sin = angles(6, 4, device, torch.float64)

    def function(q, k, cos, sin, *weights):
        kw = dict(eps=0.1, layout=layout)
        return fused_rope.norm_rotate_qk(q, k, cos, sin, *weights, **kw, **options)

    inputs = leaves(q, k, cos, sin, *weights)
    modes = dict(check_forward_ad=True, check_batched_grad=True)
    assert gradcheck(function, inputs, nondet_tol=0.0, **modes)
    assert gradgradcheck(function, inputs, nondet_tol=0.0)
    tables = [t.detach() for t in inputs[2:4]]
    of_constant_tables = lambda q, k, *weights: function(q, k, *tables, *weights)  # noqa: E731
    own = (*inputs[:2], *inputs[4:])
    assert gradgradcheck(of_constant_tables, own, check_fwd_over_rev=True)


def test_gradcheck_of_rows(device):
    x, weight = leaves(torch.randn(1, 3, 2, 8).double(), torch.randn(8).double())
    cos, sin = leaves(*angles(6, 4, dtype=torch.float64))
    positions = torch.tensor([[[0, 4, -1]], [[2, -1, -1]]])
    kw = dict(eps=0.1, positions=positions, axes=[0, 1, 1, 0])
    for after in (False, True):
        f = lambda *t, after=after: fused_rope.norm_rotate(*t, after=after, **kw)  # noqa: E731
        assert gradcheck(f, (x, cos, sin, weight), check_forward_ad=True)
        assert gradgradcheck(f, (x, cos, sin, weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_dtype", ["own", "float32"])
@pytest.mark.parametrize("D,R,o", [(128, 128, 0), (80, 40, 40), (37, 34, 3)])
@EACH_ORDER
def test_gradients_against_float64(dtype, weight_dtype, D, R, o, after, device):
    x, g = (tensor("bshd", 2, 70, 5, D, dtype, device) for _ in range(2))
    weight = weight_of(D, dtype if weight_dtype == "own" else torch.float32, device)
    cos, sin = angles(70, R // 2, device)
    kw = dict(eps=EPS, after=after, rotary_offset=o)
    X, W = leaves(x, weight)
    dx, dw = torch.autograd.grad(fused_rope.norm_rotate(X, cos, sin, W, **kw), (X, W), g)
    assert dx.dtype == dtype and dw.dtype == weight.dtype
    X, W = leaves(x.double(), weight.double())
    exact = reference.norm_rotate(X, cos, sin, W, **kw)
    torch.testing.assert_close(
        exact.detach(), norm_oracle(X, cos, sin, W, **kw), rtol=1e-12, atol=1e-12
    )
    want_x, want_w = torch.autograd.grad(exact, (X, W), g.double())
    half_ulp = torch.finfo(dtype).eps / 2 * 1.02
    bound = half_ulp * want_x.abs() + 4e-6 * want_x.abs().amax(-1, keepdim=True) + 2**-25
    assert ((dx.double() - want_x).abs() <= bound).all()
    half_ulp = torch.finfo(weight.dtype).eps / 2 * 1.02
    bound = half_ulp * want_w.abs() + 2e-6 * want_w.abs().max()
    assert ((dw.double() - want_w).abs() <= bound).all()


@pytest.mark.parametrize("cast,precision", [("before", "model"), ("after", "model")])
def test_gradients_are_those_of_eager_code(cast, precision, device):
    """Within the rounding of the steps that eager code takes in bfloat16."""
    q, _, weight, _, cos, sin = draw("bshd", 128, torch.bfloat16, device, tokens=6)
    kw = dict(eps=EPS, cast=cast, precision=precision)
    g = torch.randn_like(q)
    found = []
    for function in (fused_rope.norm_rotate, reference.norm_rotate):
        X, W = leaves(q, weight)
        found.append(torch.autograd.grad(function(X, cos, sin, W, **kw), (X, W), g))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6 * float(want.abs().max()))


# Inputs and gradients of shape [3, 300, 5, 64] from values: the same ones in other memory.
MEMORY = {
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "elements first": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "unaligned": lambda t: torch.cat([t[..., :3], t, t[..., :2]], -1)[..., 3:-2],
    "a head's width between": lambda t: torch.stack([t, t], 3)[:, :, :, 1],
}
MORE = ["bhsd", "thd", "with k", "threads", "other heads"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("how", [*MEMORY, *MORE])
@EACH_ORDER
def test_gradients_do_not_depend_on(how, dtype, after, device):
    """Memory, layout, company and threads change no bit of dx and dw."""
    x, g = (tensor("bshd", 3, 300, 5, 64, dtype, device) for _ in range(2))
    weight, tables = weight_of(64, dtype, device), angles(300, 32, device)
    kw = dict(eps=EPS, after=after)

    def gradients(x, g, weight=weight, **more):
        X, W = leaves(x, weight)
        X = X if X.stride() == x.stride() else x.detach().requires_grad_()
        return torch.autograd.grad(fused_rope.norm_rotate(X, *tables, W, **kw, **more), (X, W), g)

    dx, dw = gradients(x, g)
    if how in MEMORY:
        found = gradients(MEMORY[how](x), g), gradients(x, MEMORY[how](g))
    elif how == "bhsd":
        first, second = gradients(x.transpose(1, 2), g.transpose(1, 2), layout="bhsd")
        found = [(first.transpose(1, 2), second)]
    elif how == "thd":
        positions = torch.arange(300, device=device).repeat(3)
        packed = (t.flatten(0, 1) for t in (x, g))
        first, second = gradients(*packed, layout="thd", positions=positions)
        found = [(first.view_as(x), second)]
    elif how == "with k":
        X, W = leaves(x, weight)
        k = tensor("bshd", 3, 300, 2, 64, dtype, device).requires_grad_()
        outs = fused_rope.norm_rotate_qk(X, k, *tables, W, None, **kw)
        found = [torch.autograd.grad(outs, (X, W, k), (g, k.detach()))[:2]]
    elif how == "threads":
        before = torch.get_num_threads()
        torch.set_num_threads(before + 3)
        found = [gradients(x, g)]
        torch.set_num_threads(before)
    else:  # of dx alone
        found = [
            (torch.cat([gradients(t, d)[0] for t, d in zip(*parts, strict=True)], 2), dw)
            for parts in [(x.split(1, 2), g.split(1, 2))]
        ]
    for first, second in found:
        same(first, dx)
        same(second, dw)


def test_gradients_of_zeros_and_expanded_gradients(device):
    x = torch.zeros(2, 3, 2, 16, device=device)
    x[1] = torch.randn(3, 2, 16)
    weight, tables = torch.randn(16, device=device), angles(3, 8, device)
    for after in (False, True):
        X, W = leaves(x, weight)
        y = fused_rope.norm_rotate(X, *tables, W, eps=EPS, after=after)
        expanded = torch.autograd.grad(y.sum(), (X, W), retain_graph=True)
        dense = torch.autograd.grad(y, (X, W), torch.ones_like(y))
        for got, want in zip(expanded, dense, strict=True):
            assert got.isfinite().all()
            same(got, want)


def test_gradient_of_an_expanded_weight(device):
    x, tables = torch.randn(2, 3, 2, 16, device=device), angles(3, 8, device)
    [scale] = leaves(torch.tensor(2.0, device=device))
    y = fused_rope.norm_rotate(x, *tables, scale.expand(16), eps=EPS)
    same(y, fused_rope.norm_rotate(x, *tables, torch.full_like(x[0, 0, 0], 2), eps=EPS))
    got = torch.autograd.grad(y.sum(), scale)[0]
    torch.testing.assert_close(got, y.detach().sum() / 2)


SUBSETS = [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 0, 0), (0, 1, 1, 0)]


@pytest.mark.parametrize("asked", SUBSETS, ids=str)
@pytest.mark.parametrize("used", [(1, 1), (1, 0), (0, 1)], ids=str)
def test_any_subset_of_gradients(asked, used, device):
    q, k, *weights = draw("bshd", 16, torch.bfloat16, device)[:4]
    cos, sin = angles(3, 8, device)
    gs = [torch.randn_like(x) for x in (q, k)]

    def gradients(asked):
        inputs = [
            t.clone().requires_grad_(bool(a)) for t, a in zip((q, k, *weights), asked, strict=True)
        ]
        outs = fused_rope.norm_rotate_qk(*inputs[:2], cos, sin, *inputs[2:], eps=EPS)
        # An output requires grad if its tensor or its weight does.
        for i, out in enumerate(outs):
            assert out.requires_grad == bool(asked[i] or asked[2 + i])
        pairs = [
            (out, g) for out, g, u in zip(outs, gs, used, strict=True) if u and out.requires_grad
        ]
        wanted = [t for t in inputs if t.requires_grad]
        if not pairs:
            return [None] * 4
        outs, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outs, wanted, grads, allow_unused=True))
        return [next(found) if t.requires_grad else None for t in inputs]

    for a, got, want in zip(asked, gradients(asked), gradients((1, 1, 1, 1)), strict=True):
        if a and got is not None:
            same(got, want)
        assert not a or (got is None) == (want is None)


def test_the_backward_operator(device):
    """Computes what its mask asks for, of one tensor or two."""
    q, k, *weights = draw("bshd", 16, torch.float32, device)[:4]
    cos, sin = angles(3, 8, device)
    gs = [torch.randn_like(x) for x in (q, k)]
    inputs = leaves(q, k, *weights)
    outs = fused_rope.norm_rotate_qk(*inputs[:2], cos, sin, *inputs[2:], eps=EPS)
    want = torch.autograd.grad(outs, inputs, gs)
    for mask in ([True] * 4, [False, True, True, False], [False] * 4):
        found = _backward(*gs, q, k, cos, sin, *weights, eps=EPS, output_mask=mask)
        for asked, got, expected in zip(mask, found, want, strict=True):
            assert (got is not None) == asked
            if asked:
                same(got, expected)
    every = dict(eps=EPS, output_mask=[True] * 4)
    alone = _backward(gs[0], None, q, None, cos, sin, weights[0], **every)
    same(alone[0], want[0])
    same(alone[2], want[2])
    assert alone[1] is None and alone[3] is None
    half = _backward(None, gs[1], q, k, cos, sin, None, weights[1], **every)
    assert half[0] is None and half[2] is None
    same(half[1], want[1])
    same(half[3], want[3])
    with pytest.raises(ValueError, match="norm_rotate_qk_backward: expected the gradient"):
        _backward(gs[0][:1], gs[1], q, k, cos, sin, *weights, **every)
    with pytest.raises(TypeError, match="norm_rotate_qk_backward: expected the gradient"):
        _backward(gs[0].half(), gs[1], q, k, cos, sin, *weights, **every)


def test_the_backward_of_other_devices(device):
    """The registered fallback has the operator's arguments, results and memory orders."""
    q, k, *weights = draw("bhsd", 16, torch.float32, "cpu")[:4]
    cos, sin = angles(3, 8)
    gs = [torch.randn_like(x) for x in (q, k)]
    kw = dict(eps=EPS, after=True, output_mask=[True, True, False, True])
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    rest = (cos, sin, *weights, None, None, None, 0, "bhsd")
    for tensors in ((*gs, q, k), (gs[0], None, q, None), (None, gs[1], q, k)):
        want = _backward(*tensors, *rest, **kw)
        got = _backward.default.redispatch(keys, *tensors, *rest, **kw)
        for x, y in zip(got, want, strict=True):
            assert (x is None) == (y is None)
            if y is not None:
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
                assert x.stride() == y.stride()


def test_create_graph_gives_the_same_gradients(device):
    q, k, *weights = draw("bshd", 16, torch.float32, device)[:4]
    cos, sin = angles(3, 8, device)
    inputs = leaves(q, k, *weights)
    outs = fused_rope.norm_rotate_qk(*inputs[:2], cos, sin, *inputs[2:], eps=EPS)
    gs = [torch.randn_like(x) for x in outs]
    first = torch.autograd.grad(outs, inputs, gs, retain_graph=True)
    recorded = torch.autograd.grad(outs, inputs, gs, create_graph=True)
    for got, want in zip(recorded, first, strict=True):
        assert got.requires_grad
        torch.testing.assert_close(got.detach(), want, rtol=1e-5, atol=1e-6)


def test_weight_of_both(device):
    """One weight for q and k gets the sum of both gradients."""
    q, k, weight, _, cos, sin = draw("bshd", 16, torch.float64, device)
    cos, sin = cos[:3], sin[:3]
    [shared], separate = leaves(weight), leaves(weight, weight)
    kw = dict(eps=EPS)
    both = fused_rope.norm_rotate_qk(q, k, cos, sin, shared, shared, **kw)
    apart = fused_rope.norm_rotate_qk(q, k, cos, sin, *separate, **kw)
    got = torch.autograd.grad([y.sin().sum() for y in both], shared)[0]
    same(got, sum(torch.autograd.grad([y.sin().sum() for y in apart], separate)))


def test_saves_its_inputs_only(device):
    q, k, *weights = leaves(*draw("bshd", 16, torch.bfloat16, device)[:4])
    cos, sin = angles(9, 8, device)
    positions = torch.tensor([0, 8, -1], device=device)
    tensors = (q, k, *weights, cos, sin, positions)
    known = {t.untyped_storage().data_ptr() for t in tensors}
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (seen.append(t.untyped_storage().data_ptr()), t)[1], lambda t: t
    ):
        outs = fused_rope.norm_rotate_qk(q, k, cos, sin, *weights, eps=EPS, positions=positions)
    assert len(seen) == 7 and set(seen) == known
    torch.autograd.grad(outs, q, [torch.ones_like(y) for y in outs])
    with torch.no_grad():
        fused_rope.norm_rotate_(q, cos, sin, eps=EPS, positions=positions)
    outs = fused_rope.norm_rotate_qk(q * 1, k, cos, sin, *weights, eps=EPS, positions=positions)
    with torch.no_grad():
        weights[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outs, q, [torch.ones_like(y) for y in outs])


def test_forward_mode_of_some(device):
    q, k, weight, _, cos, sin = draw("bshd", 16, torch.float64, device)
    cos, sin = cos[:3], sin[:3]
    tangent = torch.randn_like(weight)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, tangent)
        outs = fused_rope.norm_rotate_qk(q, k, cos, sin, dual, None, eps=EPS)
        first, second = (forward_ad.unpack_dual(y) for y in outs)
    same(first.primal, fused_rope.norm_rotate(q, cos, sin, weight, eps=EPS))
    want = fused_rope.norm_rotate(q, cos, sin, tangent, eps=EPS)
    torch.testing.assert_close(first.tangent, want, rtol=1e-12, atol=1e-12)
    assert second.tangent is None


# --- torch.func ---------------------------------------------------------------------------------


@EACH_ORDER
def test_transforms(after, device):
    q, k, *weights = draw("bshd", 8, torch.float64, device)[:4]
    cos, sin = angles(3, 4, device, torch.float64)
    kw = dict(eps=0.1, after=after)

    def function(q, k, cos, sin, *weights):
        return fused_rope.norm_rotate_qk(q, k, cos, sin, *weights, **kw)

    inputs = (q, k, cos, sin, *weights)
    outs, pull = vjp(function, *inputs)
    gs = [torch.randn_like(y) for y in outs]
    own = leaves(*inputs)
    recorded = function(*own)
    for got, want in zip(outs, recorded, strict=True):
        same(got, want)
    close = dict(rtol=1e-10, atol=1e-10)
    for got, want in zip(pull(tuple(gs)), torch.autograd.grad(recorded, own, gs), strict=True):
        torch.testing.assert_close(got, want, **close)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    _, pushed = jvp(function, inputs, tangents)
    inner = sum((g * t).sum() for g, t in zip(gs, pushed, strict=True))
    outer = sum((g * t).sum() for g, t in zip(pull(tuple(gs)), tangents, strict=True))
    torch.testing.assert_close(inner, outer, **close)

    loss = lambda q, w: fused_rope.norm_rotate(q, cos, sin, w, **kw).pow(3).sum()  # noqa: E731
    for jacobian in (jacrev, jacfwd):
        got = jacobian(grad(loss))(q[:1, :, :1], weights[0])
        dense = torch.autograd.functional.hessian(
            lambda x: fused_rope.norm_rotate(x, cos, sin, weights[0], **kw).pow(3).sum(),
            q[:1, :, :1],
        )
        torch.testing.assert_close(got, dense, **close)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap(in_dims, device):
    q = torch.randn(4, 2, 3, 2, 16, device=device)
    weight = torch.randn(4, 16, device=device)
    cos, sin = angles(3, 8, device)
    x, w = (t if d is not None else t[0] for t, d in zip((q, weight), in_dims, strict=True))
    f = lambda x, w: fused_rope.norm_rotate(x, cos, sin, w, eps=EPS)  # noqa: E731
    sample = lambda t, d, i: t if d is None else t[i]  # noqa: E731
    want = [f(sample(x, in_dims[0], i), sample(w, in_dims[1], i)) for i in range(4)]
    same(vmap(f, in_dims)(x, w), torch.stack(want))
    gradients = vmap(grad(lambda x, w: f(x, w).sin().sum(), argnums=(0, 1)), in_dims)(x, w)
    for i in range(4):
        X, W = leaves(sample(x, in_dims[0], i), sample(w, in_dims[1], i))
        expected = torch.autograd.grad(f(X, W).sin().sum(), (X, W))
        for got, one in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got[i], one, rtol=1e-4, atol=1e-5)


def test_in_place_under_transforms(device):
    x, cos, sin = torch.randn(3, 2, 3, 2, 16, device=device), *angles(3, 8, device)
    got = vmap(lambda x: fused_rope.norm_rotate_(x.clone(), cos, sin, eps=EPS))(x)
    same(got, torch.stack([fused_rope.norm_rotate(t, cos, sin, eps=EPS) for t in x]))


# --- compilers ----------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """Projection, norms and rotation."""

    def __init__(self, device):
        super().__init__()
        self.project = torch.nn.Linear(16, 48, device=device)
        self.q_weight, self.k_weight = (
            torch.nn.Parameter(weight_of(16, torch.float32, device)) for _ in range(2)
        )
        self.rope = fused_rope.RotaryEmbedding(16, max_seq_len=64, device=device)

    def forward(self, x):
        q, k = self.project(x).unflatten(-1, (3, 16)).split((2, 1), -2)
        weights = dict(q_weight=self.q_weight, k_weight=self.k_weight)
        return self.rope(q, k, eps=EPS, after=True, **weights)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend, device, fresh_dynamo):
    """No graph break, two compilations for all lengths, eager's values and gradients."""
    block = Block(device)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(copy.deepcopy(block), backend=counter, fullgraph=True)
    for tokens in (5, 9, 17, 30):
        x = torch.randn(2, tokens, 16, device=device)
        for module in (block, compiled):
            module.zero_grad()
        got, want = compiled(x), block(x)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        for outs in (got, want):
            sum(y.sin().sum() for y in outs).backward()
        for a, b in zip(compiled.parameters(), block.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    assert counter.frame_count <= 2


def test_compiled_forms(device, fresh_dynamo):
    """In place and out=, bitwise identical."""
    q, k, *weights = draw("bshd", 16, torch.bfloat16, device)[:4]
    cos, sin = angles(3, 8, device)
    slots = torch.tensor([[1, -1, 4], [0, 3, 2]], device=device)

    def function(q, k, cache):
        kw = dict(eps=EPS, cast="after")
        first = fused_rope.norm_rotate_qk(q, k, cos, sin, *weights, **kw)
        q, k = q * 2, k * 2
        fused_rope.norm_rotate_qk_(q, k, cos, sin, *weights, **kw)
        fused_rope.norm_rotate(k, cos, sin, weights[1], out=cache, out_rows=slots, **kw)
        return *first, q, k, cache

    cache = torch.zeros(5, 1, 16, dtype=k.dtype, device=device)
    want = function(q, k, cache.clone())
    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    for got, expected in zip(compiled(q, k, cache), want, strict=True):
        same(got, expected)


def test_compiled_autograd(device, fresh_dynamo):
    q, k, *weights = leaves(*draw("bshd", 16, torch.float32, device)[:4])
    cos, sin = leaves(*angles(3, 8, device))

    def gradients():
        inputs = (q, k, *weights, cos, sin)
        outs = fused_rope.norm_rotate_qk(q, k, cos, sin, *weights, eps=EPS)
        sum(y.sin().sum() for y in outs).backward()
        found = [t.grad for t in inputs]
        for t in inputs:
            t.grad = None
        return found

    want = gradients()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        got = gradients()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_export(device):
    block = Block(device)
    x = torch.randn(2, 7, 16, device=device)
    dynamic = ({1: torch.export.Dim("tokens", min=2, max=60)},)
    program = torch.export.export(block, (x,), dynamic_shapes=dynamic)
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("fused_rope.norm_rotate_qk.default") == 1
    other = torch.randn(2, 23, 16, device=device)
    for got, want in zip(program.module()(other), block(other), strict=True):
        torch.testing.assert_close(got, want)


def test_functional_call(device):
    block = Block(device)
    parameters = dict(block.named_parameters())
    xs = torch.randn(3, 1, 5, 16, device=device)

    def loss(parameters, x):
        return sum(y.sin().sum() for y in functional_call(block, parameters, (x,)))

    got = vmap(grad(loss), in_dims=(None, 0))(parameters, xs)
    for i, x in enumerate(xs):
        block.zero_grad()
        loss(parameters, x).backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(got[name][i], parameter.grad, rtol=1e-4, atol=1e-5)
