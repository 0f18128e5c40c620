"""Tables of cosines and sines: their forms, dtypes and views, and how they are built."""

import fused_rope
import mpmath
import pytest
import torch
from oracle import DTYPES, LAYOUTS, angles, bits, same, tensor

INV_FREQ = 1.0 / 10000 ** (torch.arange(0, 128, 2, dtype=torch.float64) / 128)


# --- forms and views ---------------------------------------------------------------------------


@pytest.mark.parametrize("table", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(table, dtype, device):
    """A table is read as it is; half precision beside another x is widened, which is exact."""
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
        "repeated lanes": tuple(t.repeat_interleave(2, -1)[:, ::2] for t in (cos, sin)),
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


# --- cos_sin_table -----------------------------------------------------------------------------

FAR = [0, 1, 2**11, 48_040, 2**16, 2**17, 2**20, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1]


def float32_ulp(value):
    return 2.0 ** (int(mpmath.floor(mpmath.log(max(abs(value), 2.0**-126), 2))) - 23)


@pytest.mark.parametrize("first", FAR)
@pytest.mark.parametrize("base", [10_000, 500_000])
def test_right_to_one_ulp(first, base):
    inv_freq = 1.0 / base ** (torch.arange(0, 128, 2, dtype=torch.float64) / 128)
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


def test_rows_from_the_middle():
    whole = fused_rope.cos_sin_table(INV_FREQ, 100)
    for got, want in zip(fused_rope.cos_sin_table(INV_FREQ, 60, first=40), whole, strict=True):
        same(got, want[40:])


@pytest.mark.parametrize("rows,P", [(0, 64), (5, 0), (0, 0), (1, 1)])
def test_edges(rows, P):
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


def test_surroundings_do_not_matter():
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
    (dict(dtype=torch.int32), TypeError, "dtype"),
]


@pytest.mark.parametrize("change,kind,word", BAD, ids=str)
def test_bad_calls(change, kind, word):
    call = dict(inv_freq=INV_FREQ, rows=2) | change
    with pytest.raises(kind, match=f"cos_sin_table: .*{word}"):
        fused_rope.cos_sin_table(**call)
