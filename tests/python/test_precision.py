"""precision="model": bitwise identical to eager PyTorch in x's dtype."""

import fused_rope
import pytest
import torch
from oracle import DTYPES, HALF, LAYOUTS, angles, bits, same, tensor


def rotate_half(x):
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def rotate_every_two(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def eager(x, cos, sin, interleaved=False):
    """x * cos + rotated(x) * sin in x's dtype, with tables for [B, H, S, D]."""
    if interleaved:
        c, s = (t.repeat_interleave(2, -1).to(x.dtype) for t in (cos, sin))
        return x * c + rotate_every_two(x) * s
    c, s = (torch.cat([t, t], -1).to(x.dtype) for t in (cos, sin))
    return x * c + rotate_half(x) * s


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table", [torch.float32, torch.float64, "own"], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_eager_bits_forward_and_backward(dtype, table, interleaved, device):
    q, k = (tensor("bhsd", 2, 33, H, 64, dtype, device).requires_grad_() for H in (4, 2))
    cos, sin = angles(33, 32, device, dtype if table == "own" else table)
    kw = dict(layout="bhsd", interleaved=interleaved, precision="model")
    got = fused_rope.rotate_qk(q, k, cos, sin, **kw)
    want = [eager(x, cos, sin, interleaved) for x in (q, k)]
    gradients = [torch.randn_like(w) for w in want]
    got_gradients = torch.autograd.grad(got, (q, k), gradients)
    want_gradients = torch.autograd.grad(want, (q, k), gradients)
    for a, b in zip((*got, *got_gradients), (*want, *want_gradients), strict=True):
        same(a, b)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_hugging_face_bits(dtype, family, device):
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    cos, sin = (t.to(dtype) for t in angles(33, 32, device))
    if family == "llama":
        q = tensor("bhsd", 2, 33, 4, 64, dtype, device)
        tables = [torch.cat([t, t], -1)[None] for t in (cos, sin)]
        want = module.apply_rotary_pos_emb(q, q, *tables)[0]
        got = fused_rope.rotate(q, cos, sin, layout="bhsd", precision="model")
    else:
        q = tensor("bshd", 2, 33, 4, 64, dtype, device)
        want = module.apply_rotary_pos_emb(q, sin[None].expand(2, -1, -1), cos[None])
        got = fused_rope.rotate(q, cos, sin, interleaved=True, precision="model")
    same(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["rotate", "rotate_", "out"])
@pytest.mark.parametrize(
    "pairing", [{}, {"interleaved": True}, {"blocks": 3, "rotary_offset": 7}], ids=str
)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_every_form(dtype, layout, form, pairing, inverse, device):
    x = tensor(layout, 1, 9, 3, 40, dtype, device)
    cos, sin = angles(30, 12, device)
    positions = torch.randint(-1, 30, (9,)).to(device)
    kw = dict(layout=layout, precision="model", positions=positions, inverse=inverse, **pairing)
    want = bits(x, cos, sin, **kw)
    if form == "out":
        same(fused_rope.rotate(x, cos, sin, out=torch.empty_like(x), **kw), want)
    else:
        same(getattr(fused_rope, form)(x.clone(), cos, sin, **kw), want)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_table_is_rounded_first(dtype, device):
    x = tensor("bshd", 2, 33, 4, 64, dtype, device)
    cos, sin = angles(33, 32, device)
    model = fused_rope.rotate(x, cos, sin, precision="model")
    rounded = cos.to(dtype), sin.to(dtype)
    same(model, fused_rope.rotate(x, *rounded, precision="model"))
    exact = fused_rope.rotate(x, cos, sin)
    assert not torch.equal(model, exact)
    assert not torch.equal(fused_rope.rotate(x, *rounded), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_precisions_are_equal_for_float32_and_float64(dtype, device):
    x = tensor("bshd", 2, 33, 4, 64, dtype, device)
    for table in (torch.float32, torch.float64):
        cos, sin = angles(33, 32, device, table)
        model = fused_rope.rotate(x, cos, sin, precision="model")
        same(model, fused_rope.rotate(x, cos, sin))


def test_float16_products_overflow_and_underflow(device):
    """float16 products beyond 65504 are infinite and small ones vanish, as in eager PyTorch."""
    x = torch.tensor([6e4, 6e4, 6e-8, 6e-8], device=device).half().view(1, 1, 2, 2)
    cos, sin = torch.full((1, 1), 1.25, device=device), torch.full((1, 1), 0.4, device=device)
    same(fused_rope.rotate(x, cos, sin, precision="model"), eager(x, cos, sin))
    same(fused_rope.rotate(x, cos, sin), bits(x, cos, sin))
