"""Gradients: backward is the inverse rotation, itself differentiable; tables and tangents too."""

import fused_rope
import pytest
import torch
from oracle import DTYPES, LAYOUTS, VIEWS, angles, bits, identical, same, tensor, view
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

OPTIONS = {
    "half": dict(),
    "interleaved": dict(interleaved=True),
    "blocks": dict(blocks=2),
    "inverse": dict(inverse=True),
}


def double_angles(rows, P, device):
    return angles(rows, P, device, torch.float64)


# --- of x --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(layout, name, device):
    """First and second order, forward over reverse, and batches of gradients at once."""
    q, k = (tensor(layout, 1, 3, H, 12, torch.float64, device).requires_grad_() for H in (2, 1))
    cos, sin = double_angles(6, 4, device)
    kw = dict(layout=layout, rotary_offset=2, **OPTIONS[name])
    for f, inputs in (
        (lambda q: fused_rope.rotate(q, cos, sin, **kw), (q,)),
        (lambda q, k: fused_rope.rotate_qk(q, k, cos, sin, **kw), (q, k)),
    ):
        assert gradcheck(f, inputs, fast_mode=False, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(f, inputs, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_gradients_of_any_strides(name, dtype, device):
    """Expanded, transposed and sliced gradients are read through their strides, never written."""
    cos, sin = angles(5, 8, device)
    g = view(name, dtype, device)
    before = g.clone()
    q = tensor("bshd", 2, 5, 4, 16, dtype, device).requires_grad_()
    k = tensor("bshd", 2, 5, 4, 16, dtype, device).requires_grad_()
    got = torch.autograd.grad(fused_rope.rotate(q, cos, sin), q, g)[0]
    identical(g, before)
    same(got, bits(g, cos, sin, inverse=True))
    out = fused_rope.rotate_qk(q, k, cos, sin)
    for x_grad in torch.autograd.grad(out, (q, k), (g, g)):
        same(x_grad, got)
    identical(g, before)


def test_gradient_of_a_sum(device):
    x = torch.randn(2, 5, 4, 16, device=device, requires_grad=True)
    cos, sin = angles(5, 8, device)
    fused_rope.rotate(x, cos, sin).sum().backward()
    same(x.grad, bits(torch.ones_like(x), cos, sin, inverse=True))


@pytest.mark.parametrize("which", [0, 1])
def test_only_one_input_requires_grad(which, device):
    cos, sin = angles(5, 8, device)
    xs = [torch.randn(2, 5, H, 16, device=device) for H in (4, 2)]
    xs[which].requires_grad_()
    out = fused_rope.rotate_qk(*xs, cos, sin)
    assert out[which].requires_grad and not out[1 - which].requires_grad
    out[which].sum().backward()
    assert xs[1 - which].grad is None
    same(xs[which].grad, bits(torch.ones_like(xs[which]), cos, sin, inverse=True))


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("table", [False, True], ids=["fixed table", "trained table"])
def test_only_one_output_is_used(used, table, device):
    """The other gradient is undefined, not a tensor of zeros that is rotated."""
    cos, sin = angles(5, 8, device)
    q, k = (torch.randn(2, 5, H, 16, device=device, requires_grad=True) for H in (4, 2))
    if table:
        cos.requires_grad_(), sin.requires_grad_()
    fused_rope.rotate_qk(q, k, cos, sin)[used].sum().backward()
    assert (k, q)[used].grad is None
    x = (q, k)[used]
    same(x.grad, bits(torch.ones_like(x), cos, sin, inverse=True))
    if table:
        alone = [t.detach().clone().requires_grad_() for t in (cos, sin)]
        fused_rope.rotate(x.detach(), *alone).sum().backward()
        torch.testing.assert_close(cos.grad, alone[0].grad)
        torch.testing.assert_close(sin.grad, alone[1].grad)


def test_no_grad_modes_record_nothing(device):
    x = torch.randn(2, 5, 4, 16, device=device, requires_grad=True)
    cos, sin = angles(5, 8, device)
    with torch.no_grad():
        assert fused_rope.rotate(x, cos, sin).grad_fn is None
    assert fused_rope.rotate(x.detach(), cos, sin).grad_fn is None
    with torch.inference_mode():
        y = torch.randn(2, 5, 4, 16, device=device)
        got = fused_rope.rotate(y, cos, sin)
        same(got, bits(y, cos, sin))
        assert got.is_inference()


def test_saves_tables_and_positions_only(device):
    cos, sin = angles(5, 8, device)
    positions = torch.arange(5, device=device)
    q, k = (torch.randn(2, 5, H, 16, device=device, requires_grad=True) for H in (4, 2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused_rope.rotate(q, cos, sin, positions=positions)
        fused_rope.rotate_qk(q, k, cos, sin, positions=positions)
        fused_rope.rotate_(q * 1, cos, sin, positions=positions)
    allowed = {t.data_ptr() for t in (cos, sin, positions)}
    assert kept and {t.data_ptr() for t in kept if t.numel() > 1} <= allowed


@pytest.mark.parametrize("form", ["rotate", "rotate_"])
def test_retain_graph_and_hooks(form, device):
    """Backward never writes to the gradients that it is given."""
    x = torch.randn(2, 5, 3, 16, device=device, requires_grad=True)
    cos, sin = angles(5, 8, device)
    y, seen = getattr(fused_rope, form)(x * 1, cos, sin), []
    y.register_hook(seen.append)
    g = torch.randn_like(y)
    before = g.clone()
    first = torch.autograd.grad(y, x, g, retain_graph=True)[0]
    second = torch.autograd.grad(y, x, g)[0]
    same(first, second)
    same(first, bits(g, cos, sin, inverse=True))
    assert len(seen) == 2
    for kept in (g, *seen):
        identical(kept, before)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, x, g)


def test_accumulates_where_one_tensor_is_q_and_k(device):
    x = torch.randn(2, 5, 3, 16, device=device, requires_grad=True)
    cos, sin = angles(5, 8, device)
    q, k = fused_rope.rotate_qk(x, x, cos, sin)
    (q + 2 * k).sum().backward()
    ones = torch.ones_like(x)
    want = bits(ones, cos, sin, inverse=True) + bits(2 * ones, cos, sin, inverse=True)
    same(x.grad, want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, device):
    x = torch.randn(2, 5, 3, 16, device=device, requires_grad=True)
    cos, sin = angles(5, 8, device)
    y = checkpoint(lambda x: fused_rope.rotate(x, cos, sin).sin(), x, use_reentrant=reentrant)
    y.sum().backward()
    want = bits(bits(x, cos, sin).cos(), cos, sin, inverse=True)
    torch.testing.assert_close(x.grad, want, rtol=1e-6, atol=1e-6)


def test_backward_detects_that_a_table_changed(device):
    x = torch.randn(2, 5, 3, 16, device=device, requires_grad=True)
    cos, sin = angles(5, 8, device)
    y = fused_rope.rotate(x, cos, sin)
    cos.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


ROWS = {
    "offset": dict(offset=3),
    "packed": dict(cu_seqlens=[0, 4, 4, 7]),
    "lengths": dict(cu_seqlens=[0, 4, 4, 7], offset=[9, 0, 20]),
    "positions and lengths": dict(positions=(9,), cu_seqlens=[0, 4, 4, 7], offset=[9, 0, 20]),
    "axes": dict(positions=(3, 9), axes=[0, 1, 2, 2, 1, 0, 0, 1], offset=5, inverse=True),
    "model": dict(positions=(9,), interleaved=True, precision="model"),
    "everything": dict(
        positions=(3, 9),
        offset=[3, 9],
        cu_seqlens=[0, 4, 7],
        axes=[0, 1, 2, 2] * 2,
        rotary_offset=3,
        blocks=2,
        precision="model",
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_backward_reads_the_rows_of_forward(case, device):
    """Every argument that selects rows reaches backward."""
    kw = dict(ROWS[case], layout="thd")
    for name in ("cu_seqlens", "offset"):
        if isinstance(kw.get(name), list):
            kw[name] = torch.tensor(kw[name], dtype=torch.int32, device=device)
    if "positions" in kw:
        kw["positions"] = torch.randint(-1, 10, kw["positions"]).to(device)
    x = tensor("thd", 1, 9, 3, 20, torch.float32, device).requires_grad_()
    cos, sin = angles(40, 8, device)
    g = torch.randn_like(x)
    y = fused_rope.rotate(x, cos, sin, **kw)
    same(y, bits(x, cos, sin, **kw))
    got = torch.autograd.grad(y, x, g)[0]
    same(got, bits(g, cos, sin, **kw | dict(inverse=not kw.get("inverse", False))))


# --- of the table ------------------------------------------------------------------------------


SHARED = ["shared", "offset", "positions", "positions [S] and offset", "axes"]
TABLES = [*SHARED, "per token", "one per token", "per head", "one per head"]
PACKED_TABLES = ["packed", "packed positions", "no sequence after padding"]
TABLE_CASES = [(x, n) for x in LAYOUTS for n in TABLES + (PACKED_TABLES if x == "thd" else [])]
TABLE_CASES += [(x, "lengths") for x in LAYOUTS if x != "thd"]


def table_case(layout, name, device):
    """cos and sin, and what selects their rows."""
    B, S = (1, 6) if layout == "thd" else (2, 3)
    batch = () if layout == "thd" else (B,)
    sizes = {"per token": (B, S), "one per token": (1, S)}
    sizes |= {"per head": (B, S, 2), "one per head": (1, S, 2)}
    leading = sizes.get(name, (7,))
    rows = torch.Size(leading).numel()
    table = [t.view(*leading, 4) for t in double_angles(rows, 4, device)]
    positions = torch.randint(-1, 5, (3, *batch, S)).to(device)
    starts = [3] if name == "no sequence after padding" else [0, 2, 2, 5]
    cu = torch.tensor(starts, device=device)
    padded = torch.tensor([3, -1, 0, 2, 0, 99], device=device)
    selection = {
        "offset": dict(offset=1),
        "positions": dict(positions=positions[0]),
        "positions [S] and offset": dict(positions=positions.view(-1, S)[0], offset=2),
        "axes": dict(positions=positions, axes=[0, 2, 1, 0]),
        "lengths": dict(offset=torch.tensor([1, 4], dtype=torch.int32, device=device)),
        "packed": dict(cu_seqlens=cu, offset=torch.tensor([1, 0, 4], device=device)),
        "packed positions": dict(cu_seqlens=cu, positions=padded),
        "no sequence after padding": dict(cu_seqlens=cu),
    }
    return table, selection.get(name, {})


@pytest.mark.parametrize("layout,rows", TABLE_CASES)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck_of_the_table(layout, rows, name, device):
    B, S = (1, 6) if layout == "thd" else (2, 3)
    x = tensor(layout, B, S, 2, 10, torch.float64, device).requires_grad_()
    table, selection = table_case(layout, rows, device)
    cos, sin = (t.clone().requires_grad_() for t in table)
    kw = dict(layout=layout, rotary_offset=1, **OPTIONS[name], **selection)

    def f(x, cos, sin):
        return fused_rope.rotate_qk(x, 2 * x, cos, sin, **kw)

    both = dict(check_forward_ad=True, check_batched_grad=True)
    assert gradcheck(f, (x, cos, sin), fast_mode=True, **both)
    assert gradgradcheck(f, (x, cos, sin), fast_mode=True)


@pytest.mark.parametrize("which", ["cos", "sin"])
def test_one_table_may_need_a_gradient_alone(which, device):
    x = tensor("bshd", 2, 5, 3, 16, torch.float64, device)
    tables = dict(zip(("cos", "sin"), double_angles(5, 8, device), strict=True))
    leaf = tables[which].requires_grad_()
    assert gradcheck(lambda t: fused_rope.rotate(x, **tables | {which: t}), (leaf,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table", DTYPES, ids=str)
def test_gradient_of_the_table_has_its_dtype(dtype, table, device):
    """Summed in float32 (float64 for float64 x), then rounded to the table's dtype."""
    x = tensor("bshd", 2, 5, 3, 16, dtype, device)
    cos, sin = (t.requires_grad_() for t in angles(5, 8, device, table))
    g = torch.randn_like(x)
    got = torch.autograd.grad(fused_rope.rotate(x, cos, sin), (cos, sin), g)
    xa, xb, ga, gb = (t.double() for v in (x, g) for t in v.chunk(2, -1))
    want = (ga * xa + gb * xb).sum((0, 2)), (gb * xa - ga * xb).sum((0, 2))
    tolerance = max(torch.finfo(table).eps, torch.finfo(torch.float32).eps * 10)
    if dtype == table == torch.float64:
        tolerance = 1e-13
    for a, b in zip(got, want, strict=True):
        assert a.dtype == table
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("sizes", [(0, 5, 3, 16), (2, 0, 3, 16), (2, 5, 0, 16)], ids=str)
@pytest.mark.parametrize("rows", ["consecutive", "positions", "axes"])
def test_empty_tensors_and_the_table(sizes, rows, device):
    """Gradients to the second order are empty or zero."""
    x, cos, sin = (torch.randn(n, device=device).requires_grad_() for n in (sizes, (9, 8), (9, 8)))
    positions = torch.zeros(2, sizes[1], dtype=torch.int64, device=device)
    kw = {
        "positions": dict(positions=positions[0]),
        "axes": dict(positions=positions, axes=[0, 1] * 4),
    }
    out = fused_rope.rotate(x, cos, sin, **kw.get(rows, {}))
    first = torch.autograd.grad(out, (x, cos, sin), torch.ones_like(out), create_graph=True)
    gs = [torch.ones_like(g) for g in first]
    second = torch.autograd.grad(first, (x, cos, sin), gs, allow_unused=True)
    for g in (*first, *second):
        assert g is None or (g == 0).all()


@pytest.mark.parametrize("S", [64, 2048])
@pytest.mark.parametrize("axes", [None, [0, 1] * 16], ids=["one axis", "two axes"])
def test_gradient_of_the_table_is_deterministic(S, axes, device):
    """Many tokens share a row: their sum has a fixed order."""
    x = torch.randn(4, S, 2, 64, device=device)
    positions = torch.randint(-1, 5, (2, 4, S) if axes else (4, S)).to(device)
    kw = dict(positions=positions, axes=axes)
    cos, sin = (t.requires_grad_() for t in angles(5, 32, device))
    g = torch.randn_like(x)
    runs = [
        torch.autograd.grad(fused_rope.rotate(x, cos, sin, **kw), (cos, sin), g) for _ in range(4)
    ]
    torch.use_deterministic_algorithms(True)  # no operation that PyTorch knows as nondeterministic
    try:
        runs.append(torch.autograd.grad(fused_rope.rotate(x, cos, sin, **kw), (cos, sin), g))
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        same(run[0], runs[0][0])
        same(run[1], runs[0][1])


def test_gradients_of_unread_rows_are_zero(device):
    x = torch.randn(1, 3, 2, 8, device=device)
    cos, sin = (t.requires_grad_() for t in angles(6, 4, device))
    positions = torch.tensor([1, -1, 4], device=device)
    fused_rope.rotate(x, cos, sin, positions=positions).sum().backward()
    read = torch.zeros(6, dtype=torch.bool, device=device)
    read[[1, 4]] = True
    for t in (cos, sin):
        assert not t.grad[~read].any() and t.grad[read].all()


@pytest.mark.parametrize("form", ["rotate", "rotate_"])
def test_trained_tables_raise_the_errors_of_fixed_ones(form, device):
    x = torch.randn(2, 5, 3, 16, device=device)
    f = getattr(fused_rope, form)
    for P, options, message in (
        (9, dict(), "P <= D/2"),
        (4, dict(rotary_offset=9), "rotary_offset"),
        (4, dict(blocks=3), "blocks that divide"),
    ):
        cos, sin = (t.requires_grad_() for t in angles(5, P, device))
        with pytest.raises(ValueError, match=message):
            f(x.clone(), cos, sin, **options)


def test_learned_frequencies(device):
    """Autograd reaches the frequencies behind a table built by PyTorch."""
    x = tensor("bshd", 1, 5, 2, 8, torch.float64, device)
    f = torch.rand(4, dtype=torch.float64, device=device, requires_grad=True)
    row = torch.arange(5, dtype=torch.float64, device=device)[:, None]
    assert gradcheck(lambda f: fused_rope.rotate(x, (row * f).cos(), (row * f).sin()), (f,))


# --- forward mode ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["rotate", "rotate_"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tangent_of_x(form, dtype, device):
    x, t = (tensor("bshd", 2, 5, 3, 20, dtype, device) for _ in range(2))
    cos, sin = angles(5, 8, device)
    kw = dict(rotary_offset=2)
    want = bits(x, cos, sin, **kw), bits(t, cos, sin, **kw)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x.clone(), t.clone())
        got = forward_ad.unpack_dual(getattr(fused_rope, form)(dual, cos, sin, **kw))
        assert got.tangent is not None
        same(got.primal, want[0])
        same(got.tangent, want[1])


def test_tangent_of_a_view_in_place(device):
    """The tangent of the whole follows that of its slice."""
    x, t = (tensor("bshd", 2, 5, 3, 16, torch.float32, device) for _ in range(2))
    cos, sin = angles(5, 8, device)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x.clone(), t.clone())
        fused_rope.rotate_(dual[:, :, :2], cos, sin)
        got = forward_ad.unpack_dual(dual)
        for g, w in ((got.primal, x), (got.tangent, t)):
            same(g[:, :, :2], bits(w[:, :, :2], cos, sin))
            same(g[:, :, 2:], w[:, :, 2:])


@pytest.mark.parametrize("form", ["rotate_qk", "rotate_qk_"])
@pytest.mark.parametrize("which", [0, 1])
def test_tangent_of_one_of_q_and_k(form, which, device):
    xs = [tensor("bshd", 2, 5, H, 16, torch.float32, device) for H in (4, 2)]
    t = torch.randn_like(xs[which])
    cos, sin = angles(5, 8, device)
    want = [bits(x, cos, sin) for x in xs]
    with forward_ad.dual_level():
        duals = list(xs)
        duals[which] = forward_ad.make_dual(xs[which], t.clone())
        got = [forward_ad.unpack_dual(y) for y in getattr(fused_rope, form)(*duals, cos, sin)]
        same(got[which].primal, want[which])
        same(got[which].tangent, bits(t, cos, sin))
        same(got[1 - which].primal, want[1 - which])
        assert got[1 - which].tangent is None


@pytest.mark.parametrize("form", ["rotate", "rotate_"])
def test_tangent_of_the_table(form, device):
    """Linear in cos and sin; zero for copied elements."""
    x = tensor("bshd", 2, 5, 3, 20, torch.float32, device)
    cos, sin = angles(5, 8, device)
    positions = torch.tensor([0, 4, -1, 2, 2], device=device)
    tc, ts = torch.randn_like(cos), torch.randn_like(sin)
    kw = dict(positions=positions, rotary_offset=2)
    with forward_ad.dual_level():
        duals = forward_ad.make_dual(cos, tc), forward_ad.make_dual(sin, ts)
        got = getattr(fused_rope, form)(x.clone(), *duals, **kw)
        tangent = forward_ad.unpack_dual(got).tangent
        want = bits(x, tc, ts, **kw)
        want[:, 2] = 0
        want[..., :2] = want[..., 18:] = 0
        torch.testing.assert_close(tangent, want, rtol=1e-6, atol=1e-6)


def test_tangent_of_everything_at_once(device):
    x = tensor("bshd", 1, 5, 2, 8, torch.float64, device)
    cos, sin = double_angles(5, 4, device)
    tangents = torch.randn_like(x), torch.randn_like(cos), torch.randn_like(sin)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*p) for p in zip((x, cos, sin), tangents, strict=True)]
        got = forward_ad.unpack_dual(fused_rope.rotate(*duals)).tangent
    want = bits(tangents[0], cos, sin) + bits(x, tangents[1], tangents[2])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_out_rejects_tangents(device):
    x, t = (tensor("bshd", 1, 5, 2, 8, torch.float32, device) for _ in range(2))
    out = torch.zeros_like(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="rotate_out"):
        fused_rope.rotate(forward_ad.make_dual(x, t), *angles(5, 4, device), out=out)
    assert not out.any()


def test_tangent_of_a_table_without_pairs(device):
    x, empty = torch.randn(2, 3, 2, 4, device=device), torch.empty(5, 0, device=device)
    positions = torch.zeros(2, 2, 3, dtype=torch.int64, device=device)
    with forward_ad.dual_level():
        cos = forward_ad.make_dual(empty, torch.empty(5, 0, device=device))
        got = fused_rope.rotate(x, cos, empty, positions=positions, axes=[])
        assert not forward_ad.unpack_dual(got).tangent.any()


def test_gradient_of_a_table_without_sequences(device):
    """No sequence, so no offset: every token is padding."""
    x = torch.randn(4, 2, 8, device=device)
    cos, sin = (t.requires_grad_() for t in angles(5, 4, device))
    none = torch.zeros(1, dtype=torch.int64, device=device)
    y = fused_rope.rotate(x, cos, sin, layout="thd", cu_seqlens=none, offset=none[:0])
    same(y.detach(), x)
    assert not any(g.any() for g in torch.autograd.grad(y.sum(), (cos, sin)))
