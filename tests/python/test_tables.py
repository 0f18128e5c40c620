"""Tables of cosines and sines: their forms, dtypes and views, and how they are built."""

import fused_rope
import mpmath
import pytest
import torch
from fused_rope import reference
from oracle import DTYPES, LAYOUTS, angles, as_bshd, bits, same, tensor

INV_FREQ = 1.0 / 10000 ** (torch.arange(0, 128, 2, dtype=torch.float64) / 128)


# --- forms and views ---------------------------------------------------------------------------


@pytest.mark.parametrize("table", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(table, dtype, device):
    """A table is read as it is; half precision with another x is widened, which is exact."""
    x = tensor("bshd", 2, 9, 3, 32, dtype, device)
    cos, sin = angles(9, 16, device, table)
    same(fused_rope.rotate(x, cos, sin), bits(x, cos, sin))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    same(fused_rope.rotate(x, cos, sin), fused_rope.rotate(x, cos.to(wide), sin.to(wide)))


def table_views(cos, sin):
    joint = torch.cat([cos, sin], -1)
    full_c, full_s = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    cis = torch.complex(cos.float(), sin.float())
    opposite = torch.complex(cos.float(), -sin.float()).conj()  # negated when it is read
    M, P = cos.shape
    shifted = torch.cat([cos.new_zeros(2, 1), torch.stack([cos, sin]).flatten(1)], 1)[:, 1:]
    return {
        "dense": (cos, sin),
        "columns of a joint cache": (joint[:, :P], joint[:, P:]),
        "first half of a full width": (full_c[:, :P], full_s[:, :P]),
        "real and imaginary": (cis.real.to(cos.dtype), cis.imag.to(cos.dtype)),
        "conjugated": (opposite.real.to(cos.dtype), opposite.imag.to(cos.dtype)),
        "every second column": tuple(t.repeat_interleave(2, -1)[:, ::2] for t in (cos, sin)),
        "transposed": (cos.t().contiguous().t(), sin.t().contiguous().t()),
        "unlike each other": (cos, sin.t().contiguous().t()),
        "unlike each other, one batch": (cos[None], sin.t().contiguous().t()[None]),
        "padded unlike each other, one batch": (cos[None], torch.cat((sin, sin), -1)[None, :, :P]),
        "one element off": tuple(shifted.view(2, M, P)),
        "every second row": tuple(t.repeat_interleave(2, 0)[::2] for t in (cos, sin)),
        "one batch": (cos[None], sin[None]),
        "expanded batch": (cos.expand(2, M, P), sin.expand(2, M, P)),
        "each batch": (cos.repeat(2, 1, 1), sin.repeat(2, 1, 1)),
        "expanded heads": tuple(t[None, :, None].expand(2, M, 3, P) for t in (cos, sin)),
    }


@pytest.mark.parametrize("name", table_views(torch.zeros(1, 1), torch.zeros(1, 1)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_views(name, dtype, device):
    x = tensor("bshd", 2, 9, 3, 32, dtype, device)
    cos, sin = angles(9, 16, device)
    same(fused_rope.rotate(x, *table_views(cos, sin)[name]), fused_rope.rotate(x, cos, sin))


def test_expanded_row(device):
    """One row for all tokens, stride 0."""
    x = tensor("bshd", 2, 9, 3, 32, torch.bfloat16, device)
    cos, sin = (t.expand(9, 16) for t in angles(1, 16, device))
    same(fused_rope.rotate(x, cos, sin), bits(x, cos, sin))


@pytest.mark.parametrize("which", ["cos", "sin"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("P", [1, 3, 8, 20, 64])
def test_nothing_is_read_beyond_the_last_row(which, interleaved, dtype, P, device):
    """The memory around the table is NaN."""
    x = tensor("bshd", 1, 4, 2, 2 * P, torch.bfloat16, device)
    tables = dict(zip(("cos", "sin"), angles(4, P, device, dtype), strict=True))
    memory = torch.full((4 * P + 64,), float("nan"), dtype=dtype, device=device)
    inner = memory[16 : 16 + 4 * P].view(4, P).copy_(tables[which])
    want = bits(x, **tables, interleaved=interleaved)
    got = fused_rope.rotate(x, **tables | {which: inner}, interleaved=interleaved)
    same(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batched", [False, True], ids=["one for all", "each batch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_per_token(layout, batched, dtype, device):
    B, S = (1, 10) if layout == "thd" else (2, 5)
    q, k = (tensor(layout, B, S, H, 32, dtype, device) for H in (4, 1))
    rows = B if batched else 1
    cos, sin = (t.view(rows, S, 16) for t in angles(rows * S, 16, device))
    for interleaved in (False, True):
        kw = dict(layout=layout, interleaved=interleaved)
        for got, x in zip(fused_rope.rotate_qk(q, k, cos, sin, **kw), (q, k), strict=True):
            same(got, bits(x, cos, sin, **kw))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batched", [False, True], ids=["one for all", "each batch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_per_head(layout, batched, dtype, device):
    B, S = (1, 10) if layout == "thd" else (2, 5)
    q, k = (tensor(layout, B, S, 4, 32, dtype, device) for _ in range(2))
    rows = B if batched else 1
    cos, sin = (t.view(rows, S, 4, 16) for t in angles(rows * S * 4, 16, device))
    for got, x in zip(fused_rope.rotate_qk(q, k, cos, sin, layout=layout), (q, k), strict=True):
        same(got, bits(x, cos, sin, layout=layout))
    moved = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (cos, sin))
    same(fused_rope.rotate(q, *moved, layout=layout), bits(q, cos, sin, layout=layout))
    one_head = q.narrow(layout.index("h"), 0, 1)
    with pytest.raises(ValueError, match="rotate_qk: expected cos"):
        fused_rope.rotate_qk(q, one_head, cos, sin, layout=layout)


def test_more_rows_than_tokens(device):
    x = tensor("bshd", 2, 5, 3, 32, torch.bfloat16, device)
    cos, sin = angles(50, 16, device)
    same(fused_rope.rotate(x, cos, sin), fused_rope.rotate(x, cos[:5], sin[:5]))


# --- full width --------------------------------------------------------------------------------


def full_width(table, table_layout, copy=None):
    """[..., P] as [..., 2P]; the copies are those of `copy` where it is given."""
    halves = [table, table if copy is None else torch.full_like(table, copy)]
    if table_layout == "tiled":
        return torch.cat(halves, -1)
    return torch.stack(halves, -1).flatten(-2)


def read(table, table_layout):
    """The columns that are read, and those that are not."""
    return table.chunk(2, -1) if table_layout == "tiled" else (table[..., ::2], table[..., 1::2])


FULL_WIDTH = pytest.mark.parametrize("table_layout", ["tiled", "repeated"])
SHAPES = {
    "shared": (9,),
    "one batch": (1, 9),
    "each batch": (2, 9),
    "per head, one batch": (1, 9, 3),
    "per head": (2, 9, 3),
}
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
PAIRINGS = {"half": {}, "interleaved": {"interleaved": True}, "blocks": {"blocks": 2}}
EACH_PAIRING = pytest.mark.parametrize("pairing", PAIRINGS.values(), ids=PAIRINGS)


def tables_of(shape, P, device, dtype=torch.float32):
    """cos and sin [*shape, P]."""
    rows = torch.Size(shape).numel()
    return [t.view(*shape, P) for t in angles(rows, P, device, dtype)]


@FULL_WIDTH
@EACH_SHAPE
@EACH_PAIRING
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "model"])
def test_full_width(table_layout, shape, pairing, dtype, precision, device):
    """Every function gives the bits of half-width tables; the copies are not even read."""
    q, k = (tensor("bshd", 2, 9, 3, 40, dtype, device) for _ in range(2))
    cos, sin = tables_of(shape, 16, device)
    kw = dict(**pairing, rotary_offset=4, precision=precision)
    want = [bits(x, cos, sin, **kw) for x in (q, k)]
    kw["table_layout"] = table_layout
    for copy in (None, float("nan")):
        full = [full_width(t, table_layout, copy) for t in (cos, sin)]
        outs = torch.empty_like(q), torch.empty_like(k)
        for got in (
            fused_rope.rotate_qk(q, k, *full, **kw),
            [fused_rope.rotate(x, *full, **kw) for x in (q, k)],
            fused_rope.rotate_qk_(q.clone(), k.clone(), *full, **kw),
            [fused_rope.rotate_(x.clone(), *full, **kw) for x in (q, k)],
            fused_rope.rotate_qk(q, k, *full, **kw, out=outs),
            [fused_rope.rotate(x, *full, **kw, out=torch.empty_like(x)) for x in (q, k)],
            reference.rotate_qk(q, k, *full, **kw),
            reference.rotate_qk_(q.clone(), k.clone(), *full, **kw),
        ):
            for g, w in zip(got, want, strict=True):
                same(g, w)


@FULL_WIDTH
@pytest.mark.parametrize("table", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_width_of_any_dtype_and_stride(table_layout, table, dtype, device):
    x = tensor("bshd", 2, 9, 3, 32, dtype, device)
    cos, sin = angles(9, 16, device, table)
    want = fused_rope.rotate(x, cos, sin)
    full = [full_width(t, table_layout) for t in (cos, sin)]
    joint = torch.cat([full[0][:2], full[0]])[2:], torch.cat([full[1], full[1]], -1)[:, 32:]
    moved = (t.t().contiguous().t() for t in full)
    for tables in (full, joint, moved):
        same(fused_rope.rotate(x, *tables, table_layout=table_layout), want)


@FULL_WIDTH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_width_with_row_selection(table_layout, layout, device):
    """positions, offset, axes, cu_seqlens and out_rows, forward and backward."""
    B, S = (1, 10) if layout == "thd" else (2, 5)
    x = tensor(layout, B, S, 3, 32, torch.float32, device)
    cos, sin = angles(12, 16, device)
    full = [full_width(t, table_layout, float("nan")) for t in (cos, sin)]
    each = torch.randint(-1, 9, (B, S), device=device)
    rows = [
        dict(positions=each, offset=3),
        dict(positions=torch.stack([each, 8 - each]), axes=[0, 1] * 8),
        dict(offset=torch.tensor([2] * B, device=device))
        if layout != "thd"
        else dict(cu_seqlens=torch.tensor([0, 3, 8], device=device)),
    ]
    for kw in rows:
        y = x.clone().requires_grad_()
        got = fused_rope.rotate(y, *full, layout=layout, table_layout=table_layout, **kw)
        same(got, bits(x, cos, sin, layout=layout, **kw))
        g = torch.randn_like(x)
        got.backward(g)
        same(y.grad, bits(g, cos, sin, layout=layout, inverse=True, **kw))
    cache = torch.zeros(20, 3, 32, device=device)
    slots = torch.randperm(20, device=device)[: B * S].view(B, S)
    fused_rope.rotate(x, *full, layout=layout, table_layout=table_layout, out=cache, out_rows=slots)
    want = as_bshd(bits(x, cos, sin, layout=layout), layout).flatten(0, 1)
    same(cache[slots.flatten()], want)


@FULL_WIDTH
@EACH_SHAPE
@EACH_PAIRING
@pytest.mark.parametrize("name", ["rotate_qk", "rotate_qk_"])
def test_gradients_of_full_width(table_layout, shape, pairing, name, device):
    """What is read gets the gradient, what is not gets 0."""
    q, k = (torch.randn(2, 9, 3, 40, device=device, requires_grad=True) for _ in range(2))
    half = [t.requires_grad_() for t in tables_of(shape, 16, device)]
    full = [full_width(t.detach(), table_layout).requires_grad_() for t in half]
    weights = torch.randn_like(q), torch.randn_like(k)

    def gradients(tables, **kw):
        inputs = [x + 0 for x in (q, k)]
        out = getattr(fused_rope, name)(*inputs, *tables, rotary_offset=4, **pairing, **kw)
        return torch.autograd.grad(out, (q, k, *tables), weights)

    want = gradients(half)
    got = gradients(full, table_layout=table_layout)
    for g, w in zip(got[:2], want[:2], strict=True):
        same(g, w)
    for g, w, table in zip(got[2:], want[2:], full, strict=True):
        assert g.shape == table.shape
        used, unused = read(g, table_layout)
        same(used, w)
        assert not unused.any() and w.any()


@FULL_WIDTH
@EACH_SHAPE
@EACH_PAIRING
def test_derivatives_of_full_width(table_layout, shape, pairing, device):
    """Gradients, double gradients and tangents against finite differences."""
    x = torch.randn(2, 9, 3, 8, dtype=torch.float64, device=device, requires_grad=True)
    tables = tables_of(shape, 4, device, torch.float64)
    full = [full_width(t, table_layout).requires_grad_() for t in tables]

    def f(x, cos, sin):
        return fused_rope.rotate(x[:, :, :, :], cos, sin, table_layout=table_layout, **pairing)

    inputs = (x, *full)
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@FULL_WIDTH
@EACH_SHAPE
def test_torch_func_of_full_width(table_layout, shape, device):
    x = torch.randn(2, 9, 3, 16, device=device)
    cos, sin = tables_of(shape, 8, device)
    full = full_width(cos, table_layout), full_width(sin, table_layout)

    def f(x, cos, sin):
        return fused_rope.rotate(x, cos, sin, table_layout=table_layout, interleaved=True)

    def g(x, cos, sin):
        return fused_rope.rotate(x, cos, sin, interleaved=True)

    for got, want in zip(
        torch.func.grad(lambda *a: f(*a).square().sum(), argnums=(0, 1, 2))(x, *full),
        torch.func.grad(lambda *a: g(*a).square().sum(), argnums=(0, 1, 2))(x, cos, sin),
        strict=True,
    ):
        if got.shape != want.shape:
            got, unused = read(got, table_layout)
            assert not unused.any()
        torch.testing.assert_close(got, want)
    tangents = torch.randn_like(x), *(torch.randn_like(t) for t in full)
    halves = tangents[0], *(read(t, table_layout)[0] for t in tangents[1:])
    got = torch.func.jvp(f, (x, *full), tangents)
    want = torch.func.jvp(g, (x, cos, sin), halves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    stacked = [torch.stack([t, -t]) for t in full]
    mapped = torch.func.vmap(f, in_dims=(None, 0, None))(x, stacked[0], full[1])
    same(mapped[1], f(x, -full[0], full[1]))


@FULL_WIDTH
@pytest.mark.parametrize("dims", [2, 3])
def test_compiled_full_width(table_layout, dims, device):
    """One graph for all lengths, gradients of x and of tables included."""
    torch._dynamo.reset()

    def step(x, cos, sin):
        y = fused_rope.rotate(x, cos, sin, table_layout=table_layout)
        return fused_rope.rotate_(y * 2, cos, sin, table_layout=table_layout)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for S in (5, 9):
        cos, sin = (
            full_width(t, table_layout).requires_grad_()
            for t in tables_of((S,) if dims == 2 else (1, S), 8, device)
        )
        x = torch.randn(2, S, 3, 16, device=device, requires_grad=True)
        inputs = (x, cos, sin)
        got, want = compiled(*inputs), step(*inputs)
        same(got, want)
        for g, w in zip(
            torch.autograd.grad(got.square().sum(), inputs),
            torch.autograd.grad(want.square().sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(g, w)


@FULL_WIDTH
def test_full_width_overwritten_before_backward(table_layout, device):
    cos, sin = (full_width(t, table_layout) for t in angles(5, 8, device))
    x = torch.randn(2, 5, 3, 16, device=device, requires_grad=True)
    out = fused_rope.rotate(x, cos, sin, table_layout=table_layout)
    cos.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


WRONG_WIDTHS = {
    "odd": ((9, 15), "tiled", r"even number of columns \(2P\) for table_layout=\"tiled\".* 15\]"),
    "odd, repeated": ((1, 9, 5), "repeated", 'even number of columns .*table_layout="repeated"'),
    "too wide": ((9, 34), "tiled", r'2P <= D columns, D=32, got \[9, 34\].*table_layout="tiled"'),
    "full width as half": ((9, 32), "half", r'P <= D/2 .* table_layout="tiled" or "repeated"'),
    "unknown": ((9, 32), "full", "expected table_layout to be one of .*tiled.*, got 'full'"),
}


@pytest.mark.parametrize("shape,table_layout,message", WRONG_WIDTHS.values(), ids=WRONG_WIDTHS)
@pytest.mark.parametrize("name", ["rotate", "rotate_", "rotate_qk", "rotate_qk_"])
def test_wrong_widths(name, shape, table_layout, message, device):
    x = torch.randn(2, 9, 3, 32, device=device)
    inputs = [x.clone() for _ in range(2 if "qk" in name else 1)]
    table = torch.randn(shape, device=device)
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        getattr(fused_rope, name)(*inputs, table, table, table_layout=table_layout)
    for each in inputs:
        same(each, x)


# --- cos_sin_table -----------------------------------------------------------------------------

FAR = [0, 1, 2**11, 48_040, 2**16, 2**17, 2**20, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1]


def float32_ulp(value):
    return 2.0 ** (int(mpmath.floor(mpmath.log(max(abs(value), 2.0**-126), 2))) - 23)


FREQUENCIES = [(1e4, torch.float64), (5e5, torch.float64), (1e7, torch.float32)]


@pytest.mark.parametrize("first", FAR)
@pytest.mark.parametrize("base,dtype", FREQUENCIES, ids=str)
def test_right_to_one_ulp(first, base, dtype):
    inv_freq = 1.0 / base ** (torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    inv_freq = inv_freq.to(dtype)
    cos, sin = fused_rope.cos_sin_table(inv_freq, 2, first=first)
    assert cos.shape == sin.shape == (2, 64) and cos.dtype == sin.dtype == torch.float32
    with mpmath.workdps(50):
        for i in range(2):
            for j, f in enumerate(inv_freq.tolist()):
                angle = mpmath.mpf(first + i) * mpmath.mpf(f)
                for table, function in ((cos, mpmath.cos), (sin, mpmath.sin)):
                    want = function(angle)
                    error = abs(mpmath.mpf(float(table[i, j])) - want)
                    assert error <= float32_ulp(want), (first + i, j)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_and_scale(dtype):
    """Rounded once, from float64, after scaling."""
    want = fused_rope.cos_sin_table(INV_FREQ, 100, dtype=torch.float64)
    got = fused_rope.cos_sin_table(INV_FREQ, 100, dtype=dtype, scale=1.25)
    for g, w in zip(got, want, strict=True):
        same(g, (1.25 * w).to(dtype))
        assert g.is_contiguous()


def test_rows_do_not_depend_on_the_first():
    whole = fused_rope.cos_sin_table(INV_FREQ, 100)
    for got, want in zip(fused_rope.cos_sin_table(INV_FREQ, 60, first=40), whole, strict=True):
        same(got, want[40:])


@pytest.mark.parametrize("rows,P", [(0, 64), (5, 0), (0, 0), (1, 1)])
def test_empty_tables(rows, P):
    cos, sin = fused_rope.cos_sin_table(INV_FREQ[:P], rows)
    assert cos.shape == sin.shape == (rows, P)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frequencies_of_any_dtype_and_stride(dtype):
    inv_freq = INV_FREQ.to(dtype)
    want = fused_rope.cos_sin_table(inv_freq.double(), 10)
    strided = torch.stack([inv_freq, inv_freq], 1)[:, 0]
    for got in (
        fused_rope.cos_sin_table(inv_freq, 10),
        fused_rope.cos_sin_table(strided, 10),
        fused_rope.cos_sin_table(inv_freq.clone().requires_grad_(), 10),
    ):
        same(got[0], want[0])
        same(got[1], want[1])
        assert not got[0].requires_grad


def test_tables_do_not_depend_on_modes_and_defaults():
    """Neither autocast, nor the default dtype, nor the default device, nor TF32 settings."""
    want = fused_rope.cos_sin_table(INV_FREQ, 100)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            got = fused_rope.cos_sin_table(INV_FREQ, 100)
    finally:
        torch.set_default_dtype(torch.float32)
    same(got[0], want[0])
    same(got[1], want[1])


def test_no_inference_tensors():
    with torch.inference_mode():
        cos, sin = fused_rope.cos_sin_table(INV_FREQ, 10)
        rope = fused_rope.RotaryEmbedding(64, max_seq_len=4)
        rope(torch.randn(1, 20, 2, 64))
    assert not cos.is_inference() and not sin.is_inference()
    x = torch.randn(1, 10, 2, 128, requires_grad=True)
    fused_rope.rotate(x, cos, sin).sum().backward()
    rope(torch.randn(1, 20, 2, 64, requires_grad=True)).sum().backward()


def test_same_bits_on_every_device(device):
    for got, want in zip(
        fused_rope.cos_sin_table(INV_FREQ, 3000, first=10**6, device=device),
        fused_rope.cos_sin_table(INV_FREQ, 3000, first=10**6),
        strict=True,
    ):
        assert got.device.type == device
        same(got.cpu(), want)
    here = fused_rope.cos_sin_table(INV_FREQ.to(device), 10)
    assert here[0].device.type == device


def test_meta_frequencies():
    cos, sin = fused_rope.cos_sin_table(INV_FREQ.to("meta"), 7)
    assert cos.device.type == sin.device.type == "meta" and cos.shape == (7, 64)


BAD = [
    (dict(inv_freq=INV_FREQ.long()), TypeError, "inv_freq"),
    (dict(inv_freq=INV_FREQ[None]), ValueError, "inv_freq"),
    (dict(rows=-1), ValueError, "rows"),
    (dict(first=-1), ValueError, "first"),
    (dict(first=2**31), ValueError, "first"),
    (dict(first=2**63 - 1), ValueError, "first"),
    (dict(rows=2**63 - 1), ValueError, "rows"),
    (dict(dtype=torch.int32), TypeError, "dtype"),
]


@pytest.mark.parametrize("change,kind,word", BAD, ids=str)
def test_bad_calls(change, kind, word):
    call = dict(inv_freq=INV_FREQ, rows=2) | change
    with pytest.raises(kind, match=f"cos_sin_table: .*{word}"):
        fused_rope.cos_sin_table(**call)
