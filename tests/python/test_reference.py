"""The reference: bitwise identical to the operator, with its gradients; the registered fallback."""

import fused_rope
import pytest
import torch
from fused_rope import reference
from oracle import DTYPES, LAYOUTS, angles, bits, same

B, S, H, P, M = 2, 6, 3, 6, 30


def tensor(layout, D, dtype, device):
    sizes = {"b": B, "s": S, "h": H, "d": D, "t": S}
    shape = [sizes[letter] for letter in layout]
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)


ROWS = ["none", "offset", "positions", "positions [S]", "axes", "axes of one sequence"]
PACKED_ROWS = ["packed", "no sequence", "packed, lengths", "packed, positions"]
LAYOUT_ROWS = [(x, n) for x in LAYOUTS for n in ROWS]
LAYOUT_ROWS += [("thd", n) for n in PACKED_ROWS]
LAYOUT_ROWS += [(x, n) for x in LAYOUTS if x != "thd" for n in ("lengths", "lengths, axes")]


def row_choice(layout, name, device):
    """Keywords that select the rows of the tokens."""
    batch = 1 if layout == "thd" else B
    each = torch.randint(-1, 20, (batch, S), device=device)
    axes = [0, 2, 1, 0, 2, 2]
    three = torch.randint(-1, 20, (3, batch, S), dtype=torch.int32, device=device)
    lengths = torch.tensor([7, 0], dtype=torch.int32, device=device)
    cu = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=device)
    past = torch.tensor([4, 0, 9], device=device)
    return {
        "none": {},
        "offset": {"offset": 5},
        "positions": {"positions": each, "offset": 3},
        "positions [S]": {"positions": each[0].int(), "offset": 0},
        "axes": {"positions": three, "axes": axes, "offset": 1},
        "axes of one sequence": {"positions": three[:, 0], "axes": axes},
        "packed": {"cu_seqlens": cu},
        "no sequence": {"cu_seqlens": cu[1:2]},
        "packed, lengths": {"cu_seqlens": cu, "offset": past},
        "packed, positions": {"cu_seqlens": cu, "offset": past, "positions": each[0]},
        "lengths": {"offset": lengths},
        "lengths, axes": {"positions": three, "axes": axes, "offset": lengths},
    }[name]


@pytest.mark.parametrize("layout,rows", LAYOUT_ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "model"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_rows(layout, rows, dtype, precision, inverse, device):
    x = tensor(layout, 2 * P + 5, dtype, device)
    cos, sin = angles(M, P, device)
    options = {"layout": layout, "rotary_offset": 3, "precision": precision}
    options |= row_choice(layout, rows, device)
    y = x.clone().requires_grad_()
    got = reference.rotate(y, cos, sin, inverse=inverse, **options)
    want = bits(x, cos, sin, inverse=inverse, **options)
    same(got, want)
    g = torch.randn_like(x)
    got.backward(g)
    same(y.grad, bits(g, cos, sin, inverse=not inverse, **options))
    same(fused_rope.rotate(x, cos, sin, inverse=inverse, **options), want)


FORMS = ["[M, P]", "[1, S, P]", "[B, S, P]", "[1, S, H, P]", "[B, S, H, P]"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "pairing", [{}, {"interleaved": True}, {"blocks": 2}, {"blocks": 3}, {"blocks": 6}], ids=str
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_pairings_and_table_forms(layout, pairing, form, dtype, device):
    x = tensor(layout, 2 * P, torch.bfloat16, device)
    sizes = {"M": M, "B": 1 if layout == "thd" else B, "S": S, "H": H, "1": 1}
    leading = [sizes[letter] for letter in form.strip("[]").split(", ")[:-1]]
    cos, sin = (t.view(*leading, P) for t in angles(torch.Size(leading).numel(), P, device, dtype))
    got = reference.rotate(x, cos, sin, layout=layout, **pairing)
    same(got, bits(x, cos, sin, layout=layout, **pairing))


def test_all_forms(device):
    cos, sin = angles(M, P, device)
    q, k = (tensor("bhsd", 2 * P + 2, torch.float16, device) for _ in range(2))
    options = {"layout": "bhsd", "rotary_offset": 1, "offset": 4}
    want = bits(q, cos, sin, **options), bits(k, cos, sin, **options)
    for got, expected in zip(reference.rotate_qk(q, k, cos, sin, **options), want, strict=True):
        same(got, expected)
    out = torch.empty_like(q), torch.empty_like(k)
    assert reference.rotate_qk(q, k, cos, sin, out=out, **options) == out
    for got, expected in zip(out, want, strict=True):
        same(got, expected)
    q_ = q.clone()
    assert reference.rotate_(q_, cos, sin, **options) is q_
    assert reference.rotate_qk_(q, k, cos, sin, **options)[1] is k
    for got, expected in zip((q_, q, k), (want[0], *want), strict=True):
        same(got, expected)


@pytest.mark.parametrize("slots", [[3, 8, -1, 0, 5, -1], [-1] * 6, [0, 1, 2, 3, 4, 5]])
def test_out_rows(slots, device):
    cos, sin = angles(M, P, device)
    x = tensor("thd", 2 * P, torch.bfloat16, device)
    want = bits(x, cos, sin, layout="thd")
    cache = torch.full((9, H, 2 * P), 7.0, dtype=x.dtype, device=device)
    expected = cache.clone()
    rows = torch.tensor(slots, dtype=torch.int32, device=device)
    expected[rows[rows >= 0].long()] = want[rows >= 0]
    got = reference.rotate(x, cos, sin, layout="thd", out=cache, out_rows=rows)
    assert got is cache
    same(cache, expected)


@pytest.mark.parametrize("bad", [-2, M])
def test_rows_never_wrap(bad):
    cos, sin = angles(M, P)
    x = tensor("bshd", 2 * P, torch.float32, "cpu")
    positions = torch.full((S,), bad)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        reference.rotate(x, cos, sin, positions=positions)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        reference.rotate(x, cos, sin, positions=positions.expand(2, S), axes=[0, 1] * (P // 2))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        rows = torch.full((B, S), bad)
        reference.rotate(x, cos, sin, out=torch.zeros(M, H, 2 * P), out_rows=rows)
    with pytest.raises(ValueError, match="rows"):
        reference.rotate(x, cos, sin, offset=M - S + 1)


@pytest.mark.parametrize("sizes", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8)])
def test_empty(sizes, device):
    cos, sin = angles(8, 4, device)
    x = torch.randn(sizes, device=device)
    assert reference.rotate(x, cos, sin).shape == x.shape
    nothing = torch.empty(8, 0, device=device)
    same(reference.rotate(x, nothing, nothing), x)


def test_out_refuses_gradients(device):
    cos, sin = angles(M, P, device)
    x = tensor("bshd", 2 * P, torch.float32, device)
    with pytest.raises(RuntimeError, match="autograd"):
        reference.rotate(x.clone().requires_grad_(), cos, sin, out=torch.empty_like(x))


@pytest.mark.parametrize("key", ["XPU", "MPS", "HPU", "CUDA", "PrivateUse1"])
@pytest.mark.parametrize(
    "name", ["rotate", "rotate_", "rotate_qk", "rotate_qk_", "rotate_out", "rotate_qk_out"]
)
@pytest.mark.parametrize("norm", ["", "norm_"], ids=["rotation", "norm"])
def test_other_devices_have_a_kernel(name, norm, key):
    operator = f"fused_rope::{norm}{name}"
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator, key)


def fallback(name, *args, **kw):
    """Calls the operator as on a device without a kernel of this library, with CPU tensors."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    return getattr(torch.ops.fused_rope, name).default.redispatch(keys, *args, **kw)


def test_fallback_through_the_dispatcher():
    cos, sin = angles(M, P)
    q, k = (tensor("bhsd", 2 * P, torch.bfloat16, "cpu").transpose(1, 2) for _ in range(2))
    positions, lengths = torch.randint(0, 9, (B, S)), torch.tensor([3, 1])
    rows = {"positions": positions, "offset": lengths}
    pairing = {"interleaved": True, "inverse": True, "precision": "model"}
    want = [bits(x, cos, sin, **rows, **pairing) for x in (q, k)]
    tail = (0, "bshd", None, 0, True, 1, True, "model")

    got = fallback("rotate", q, cos, sin, positions, lengths, None, *tail)
    same(got, want[0])
    assert got.stride() == q.stride()
    got = fallback("rotate_qk", q, k, cos, sin, positions, lengths, None, *tail)
    out = torch.empty_like(q), torch.empty_like(k)
    fallback("rotate_qk_out", q, k, cos, sin, *out, positions, lengths, None, None, *tail)
    fallback("rotate_qk_", q, k, cos, sin, positions, lengths, None, *tail)
    for results in (got, out, (q, k)):
        for y, expected in zip(results, want, strict=True):
            same(y, expected)
    same(fallback("rotate", q, cos, sin), bits(q, cos, sin))  # every option at its default


def test_fallback_of_norms():
    cos, sin = angles(M, P)
    q, k = (tensor("bhsd", 2 * P, torch.bfloat16, "cpu").transpose(1, 2) for _ in range(2))
    weights = torch.randn(2, 2 * P).bfloat16().unbind()
    tail = (None, torch.tensor([3, 1]), None, 0, "bshd", None, 0, True)
    norm = {"eps": 1e-6, "cast": "before", "after": True}
    kw = {"offset": torch.tensor([3, 1]), "interleaved": True, **norm}
    want = fused_rope.norm_rotate_qk(q, k, cos, sin, *weights, **kw)
    got = fallback("norm_rotate_qk", q, k, cos, sin, *weights, *tail, **norm)
    assert [y.stride() for y in got] == [y.stride() for y in want]
    same(fallback("norm_rotate", q, cos, sin, weights[0], *tail, **norm), want[0])
    out = torch.empty_like(q), torch.empty_like(k)
    with_rows = (*tail[:3], None, *tail[3:])
    fallback("norm_rotate_qk_out", q, k, cos, sin, *out, *weights, *with_rows, **norm)
    fallback("norm_rotate_qk_", q, k, cos, sin, *weights, *tail, **norm)
    for results in (got, out, (q, k)):
        for y, expected in zip(results, want, strict=True):
            same(y, expected)
    with pytest.raises(ValueError, match="weight"):
        fallback("norm_rotate", q, cos, sin, weights[0][None], **norm)


def test_fallback_refuses_what_the_operator_refuses():
    cos, sin = angles(M, P)
    q = tensor("bshd", 2 * P, torch.float32, "cpu")
    with pytest.raises(ValueError, match="cos"):
        fallback("rotate", q, cos[: S - 1], sin[: S - 1])
    with pytest.raises(TypeError, match="sin"):
        fallback("rotate", q, cos, sin.double())
    with pytest.raises(ValueError, match="layout"):
        fallback("rotate", q, cos, sin, None, None, None, 0, "shbd")
