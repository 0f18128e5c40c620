"""flash-attn's entry points: out of place and in place, packed, with offsets, and XPos."""

import pytest
import torch
from formula import close, compiles, gradients, rotate_reference, series
from fused_rope.compat.flash_attn import (
    ApplyRotaryEmb,
    ApplyRotaryEmbKV_,
    ApplyRotaryEmbQKV_,
    RotaryEmbedding,
    apply_rotary,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)
from oracle import DTYPES, angles, bits, identical, same

B, S, HQ, HK, D, R, M = 2, 7, 4, 2, 32, 24, 30


def offsets(device):
    return 0, 3, torch.tensor([1, 20], dtype=torch.int32, device=device)


def rows(offset, length=S):
    """The rows [B or 1, length] that the tokens read."""
    start = offset.cpu().long()[:, None] if isinstance(offset, torch.Tensor) else offset
    return start + torch.arange(length)[None]


def written_out(x, cos, sin, offset, interleaved, sign=1):
    row = rows(offset, x.shape[1]).to(cos.device)
    return rotate_reference(
        x, cos[row][:, :, None], sign * sin[row][:, :, None], interleaved=interleaved
    )


# --- one tensor ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_values(inplace, interleaved, dtype, device):
    """R < D; tables in x's dtype, as flash-attn has them, and in float32 (which fla refuses)."""
    assert apply_rotary_emb_func is apply_rotary_emb
    for offset in offsets(device):
        for table_dtype in (dtype, torch.float32):
            cos, sin = angles(M, R // 2, device, table_dtype)
            x = torch.randn(B, S, HQ, D, device=device).to(dtype)
            before = x.clone()
            y = apply_rotary_emb(x, cos, sin, interleaved, inplace, offset)
            close(y, written_out(before, cos, sin, offset, interleaved))
            identical(y[..., R:], before[..., R:])
            assert (y is x) == inplace
            same(x, y if inplace else before)


@pytest.mark.parametrize("itype", [torch.int32, torch.int64])
@pytest.mark.parametrize("inplace", [False, True])
def test_packed(inplace, itype, device):
    """Empty sequences, offsets of each, and padding, which is copied in results and gradients."""
    cos, sin = angles(M, R // 2, device)
    cu = torch.tensor([0, 5, 5, 12], dtype=itype, device=device)
    offset = torch.tensor([3, 9, 17], dtype=itype, device=device)
    x = torch.randn(15, HQ, D, device=device)
    row = torch.cat([3 + torch.arange(5), 17 + torch.arange(7)]).to(device)

    def want(x, sign):
        head = rotate_reference(x[:12], cos[row][:, None], sign * sin[row][:, None])
        return torch.cat([head, x[12:].double()])

    def rotated(x):
        x = x.clone() if inplace else x
        return apply_rotary_emb(
            x, cos, sin, inplace=inplace, seqlen_offsets=offset, cu_seqlens=cu, max_seqlen=7
        )

    close(rotated(x), want(x, 1))
    (given,), (got,) = gradients(rotated, x)
    close(got, want(given, -1))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradients(inplace, interleaved, device):
    """Backward has the offsets, and leaves the gradient it is given (the original rotates it)."""
    cos, sin = angles(M, R // 2, device)
    for offset in offsets(device):
        (given,), (got,) = gradients(
            lambda x, o=offset: apply_rotary_emb(
                x.clone() if inplace else x, cos, sin, interleaved, inplace, o
            ),
            torch.randn(B, S, HQ, D, device=device),
        )
        close(got, written_out(given, cos, sin, offset, interleaved, -1))


def test_in_place_is_seen_by_autograd(device):
    """The version is counted (which goes unnoticed in the original)."""
    cos, sin = angles(M, D // 2, device)
    x = torch.randn(B, S, HQ, D, device=device, requires_grad=True)
    y = x * 1
    squared = y**2
    apply_rotary_emb(y, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


LEAVES = {
    "x": ((B, S, HQ, D), lambda x, *table, **kw: apply_rotary_emb(x, *table, inplace=True, **kw)),
    "qkv": ((B, S, 3, HQ, D), apply_rotary_emb_qkv_),
    "qkv, own k": (
        (B, S, 3, HQ, D),
        lambda x, cos, sin, **kw: apply_rotary_emb_qkv_(x, cos, sin, cos * 1.5, sin * 1.5, **kw),
    ),
    "kv": ((B, S, 2, HQ, D), apply_rotary_emb_kv_),
}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("form", LEAVES)
def test_leaf_in_place(form, interleaved, compiled, device):
    """As in the original a leaf is overwritten, and the result has its gradient."""
    shape, rotate_ = LEAVES[form]
    cos, sin = angles(M, R // 2, device)
    options = {"interleaved": interleaved, "seqlen_offsets": offsets(device)[2]}
    leaf = torch.randn(shape, device=device, requires_grad=True)
    other = leaf.detach().clone().requires_grad_()
    want = rotate_(other * 1, cos, sin, **options)
    version = leaf._version
    function = torch.compile(rotate_, fullgraph=True) if compiled else rotate_
    got = function(leaf, cos, sin, **options)
    same(got, want)
    same(leaf, want)
    assert leaf.is_leaf and leaf._version > version
    given = torch.randn_like(got)
    before = given.clone()
    same(torch.autograd.grad(got, leaf, given)[0], torch.autograd.grad(want, other, given)[0])
    same(given, before)


def test_leaf_in_place_beyond_its_gradient(device):
    """Nothing is recorded under no_grad, an error leaves the leaf, and tables have gradients."""
    cos, sin = angles(M, D // 2, device)
    leaf = torch.randn(B, S, HQ, D, device=device, requires_grad=True)
    want = apply_rotary_emb(leaf.detach(), cos, sin)
    with torch.no_grad():
        assert apply_rotary_emb(leaf, cos, sin, inplace=True) is leaf
    same(leaf, want)
    with pytest.raises(ValueError, match="rows"):
        apply_rotary_emb(leaf, cos, sin, inplace=True, seqlen_offsets=M)
    with pytest.raises(RuntimeError, match="leaf"):
        apply_rotary_emb(leaf[:, :, :2], cos, sin, inplace=True)
    same(leaf, want)
    cos.requires_grad_()
    other = leaf.detach().clone()
    y = apply_rotary_emb(leaf, cos, sin, inplace=True)
    got = torch.autograd.grad(y.sum(), cos)[0]
    same(got, torch.autograd.grad(apply_rotary_emb(other, cos, sin).sum(), cos)[0])


def test_gradient_of_a_leaf_in_place_is_differentiable(device):
    cos, sin = angles(M, D // 2, device)
    x = torch.randn(B, S, HQ, D, device=device, dtype=torch.float64, requires_grad=True)
    given = torch.randn_like(x, requires_grad=True)
    y = apply_rotary_emb(x, cos, sin, inplace=True)
    (grad,) = torch.autograd.grad(y, x, given, create_graph=True)
    (again,) = torch.autograd.grad(grad, given, torch.ones_like(grad))
    same(again, apply_rotary_emb(torch.ones_like(grad), cos, sin))


def test_large_heads(device):
    """The original stops at 256 elements."""
    cos, sin = angles(M, 160, device)
    x = torch.randn(B, S, 1, 320, device=device)
    close(apply_rotary_emb(x, cos, sin), written_out(x, cos, sin, 0, False))


def test_rows_outside_the_table_are_errors():
    """The original leaves such tokens as they are where offsets are a tensor."""
    cos, sin = angles(M, D // 2)
    x = torch.randn(B, S, HQ, D)
    with pytest.raises(IndexError, match=str(M)):
        apply_rotary_emb(x, cos, sin, seqlen_offsets=torch.tensor([0, M - S + 1]))
    with pytest.raises(ValueError, match="rows"):
        apply_rotary_emb(x, cos, sin, seqlen_offsets=M - S + 1)
    with pytest.raises(TypeError, match="offset"):
        apply_rotary_emb(x, cos, sin, seqlen_offsets=torch.zeros(B))


def test_compiles():
    cos, sin = angles(M, D // 2)
    compiles(apply_rotary_emb, torch.randn(B, S, HQ, D), cos, sin, seqlen_offsets=3)


# --- the names below and around apply_rotary_emb ------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_kernel_entry(interleaved, inplace, conjugate, packed, device):
    """`apply_rotary`, all arguments in the original's order; conjugate undoes the rotation."""
    cos, sin = angles(M, R // 2, device)
    offset = torch.tensor([3, 9, 17] if packed else [1, 20], device=device)
    cu = torch.tensor([0, 5, 5, 14], device=device) if packed else None
    x = torch.randn((B * S, HQ, D) if packed else (B, S, HQ, D), device=device)
    before = x.clone()
    y = apply_rotary(x, cos, sin, offset, cu, 9, interleaved, inplace, conjugate)
    assert (y is x) == inplace
    same(x, y if inplace else before)
    s = -sin if conjugate else sin
    same(y, apply_rotary_emb(before, cos, s, interleaved, False, offset, cu, 9))
    back = apply_rotary(y, cos, sin, offset, cu, 9, interleaved, conjugate=not conjugate)
    torch.testing.assert_close(back, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_kernel_entry_in_an_autograd_function(inplace, device):
    """As callers use it: under a Function of their own, in place on its input and gradient."""
    cos, sin = angles(M, R // 2, device)

    class Rotate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(*[x] if inplace else [])
            return apply_rotary(x, cos, sin, inplace=inplace)

        @staticmethod
        def backward(ctx, g):
            return apply_rotary(g.clone(), cos, sin, inplace=inplace, conjugate=True)

    x = torch.randn(B, S, HQ, D, device=device)
    given, got = gradients(lambda x: Rotate.apply(x * 1), x)
    close(got[0], written_out(given[0], cos, sin, 0, False, -1))
    again = torch.autograd.grad(apply_rotary(x.requires_grad_(), cos, sin), x, given[0])[0]
    same(got[0], again)


@pytest.mark.parametrize("rank", ["[S, P]", "[B, S, P]", "[1, P]", "x of three dimensions"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_pytorch_reference(interleaved, dtype, rank, device):
    """`apply_rotary_emb_torch` rounds as its formula in PyTorch does, step by step."""
    for table_dtype in (dtype, torch.float32):
        shape = {"[B, S, P]": (B, S), "[1, P]": (1,)}.get(rank, (S,))
        angle = torch.rand(*shape, R // 2, device=device) * 6
        cos, sin = angle.cos().to(table_dtype), angle.sin().to(table_dtype)
        x = torch.randn((S, HQ, D) if "three" in rank else (B, S, HQ, D), device=device).to(dtype)
        wide = [
            t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1) for t in (cos, sin)
        ]
        c, s = (t[..., None, :] for t in wide)
        want = x[..., :R] * c + rotate_half(x[..., :R], interleaved) * s
        got = apply_rotary_emb_torch(x, cos, sin, interleaved)
        same(got[..., :R], want)
        same(got[..., R:], x[..., R:].to(want.dtype))
        close(
            got,
            rotate_reference(x, cos[..., None, :], sin[..., None, :], interleaved=interleaved),
            ulps=9,
        )


def test_names_of_the_autograd_functions(device):
    assert ApplyRotaryEmb.apply is apply_rotary_emb
    assert ApplyRotaryEmbQKV_.apply is apply_rotary_emb_qkv_
    assert ApplyRotaryEmbKV_.apply is apply_rotary_emb_kv_
    cos, sin = angles(M, R // 2, device)
    x = torch.randn(B, S, HQ, D, device=device)
    want = apply_rotary_emb(x, cos, sin, True, seqlen_offsets=3)
    same(ApplyRotaryEmb.apply(x, cos, sin, True, False, 3, None, None), want)
    qkv = torch.randn(B, S, 3, HQ, D, device=device)
    want = apply_rotary_emb_qkv_(qkv.clone(), cos, sin, None, None, True, 3)
    same(ApplyRotaryEmbQKV_.apply(qkv, cos, sin, None, None, True, 3, None), want)


# --- packed QKV and KV --------------------------------------------------------------------------


def packed(form, device, dtype=torch.float32):
    """A packed tensor, num_heads_q, and how many of its flat heads are queries and keys."""
    if form == "three":
        return torch.randn(B, S, 3, HQ, D, device=device).to(dtype), None, (HQ, HQ)
    if form == "three, strided":  # as from [3, B, S, H, D]
        return torch.randn(3, B, S, HQ, D, device=device).to(dtype).movedim(0, 2), None, (HQ, HQ)
    return torch.randn(B, S, HQ + 2 * HK, D, device=device).to(dtype), HQ, (HQ, HK)


FORMS = ["three", "three, strided", "grouped"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("own_k", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_qkv(form, own_k, interleaved, device):
    tables = angles(M, R // 2, device)
    k_tables = angles(M, R // 2, device) if own_k else tables
    for offset in offsets(device):
        qkv, num_heads_q, (hq, hk) = packed(form, device, torch.bfloat16)
        before = qkv.clone().reshape(B, S, -1, D)
        own = k_tables if own_k else (None, None)
        y = apply_rotary_emb_qkv_(qkv, *tables, *own, interleaved, offset, num_heads_q)
        assert y is qkv
        y = y.reshape(B, S, -1, D)
        close(y[:, :, :hq], written_out(before[:, :, :hq], *tables, offset, interleaved))
        keys = slice(hq, hq + hk)
        close(y[:, :, keys], written_out(before[:, :, keys], *k_tables, offset, interleaved))
        identical(y[:, :, hq + hk :], before[:, :, hq + hk :])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("own_k", [False, True])
def test_qkv_gradients(form, own_k, device):
    """Also of a scaled key table, whose gradient is not the inverse but the transpose."""
    cos, sin = angles(M, R // 2, device)
    k_tables = (cos * 1.5, sin * 1.5) if own_k else (cos, sin)
    own = k_tables if own_k else (None, None)
    qkv, num_heads_q, (hq, hk) = packed(form, device)
    offset = offsets(device)[2]

    def rotated(qkv):
        return apply_rotary_emb_qkv_(qkv * 1, cos, sin, *own, False, offset, num_heads_q)

    (given,), (got,) = gradients(rotated, qkv)
    given, got = given.reshape(B, S, -1, D), got.reshape(B, S, -1, D)
    close(got[:, :, :hq], written_out(given[:, :, :hq], cos, sin, offset, False, -1))
    keys = slice(hq, hq + hk)
    close(got[:, :, keys], written_out(given[:, :, keys], *k_tables, offset, False, -1))
    same(got[:, :, hq + hk :], given[:, :, hq + hk :])


@pytest.mark.parametrize("interleaved", [False, True])
def test_kv(interleaved, device):
    cos, sin = angles(M, R // 2, device)
    for offset in offsets(device):
        kv = torch.randn(B, S, 2, HK, D, device=device)
        before = kv.clone()
        assert apply_rotary_emb_kv_(kv, cos, sin, interleaved, offset) is kv
        close(kv[:, :, 0], written_out(before[:, :, 0], cos, sin, offset, interleaved))
        identical(kv[:, :, 1], before[:, :, 1])
        (given,), (got,) = gradients(
            lambda kv, o=offset: apply_rotary_emb_kv_(kv * 1, cos, sin, interleaved, o), before
        )
        close(got[:, :, 0], written_out(given[:, :, 0], cos, sin, offset, interleaved, -1))
        same(got[:, :, 1], given[:, :, 1])


def test_packed_errors():
    cos, sin = angles(M, R // 2)
    with pytest.raises(ValueError, match="num_heads_q"):
        apply_rotary_emb_qkv_(torch.randn(B, S, 8, D), cos, sin)
    with pytest.raises(ValueError, match="num_heads_q"):
        apply_rotary_emb_qkv_(torch.randn(B, S, 8, D), cos, sin, num_heads_q=3)
    with pytest.raises(ValueError, match="kv"):
        apply_rotary_emb_kv_(torch.randn(B, S, 3, HK, D), cos, sin)


# --- the module ---------------------------------------------------------------------------------


def expected_tables(row, dtype, scale_base=None, length=0):
    """cos, sin of queries and of keys, as the module rounds them."""
    row = row.double()
    angle = row[..., None] * series(R)
    scale = torch.ones(())
    if scale_base is not None:
        base = (torch.arange(0, R, 2).double() + 0.4 * R) / (1.4 * R)
        scale = base ** ((row - length // 2) / scale_base)[..., None]
    cos, sin = angle.cos(), angle.sin()
    return [t.to(dtype) for t in (cos * scale, sin * scale, cos / scale, sin / scale)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_base", [None, 512])
@pytest.mark.parametrize("interleaved", [False, True])
def test_module(interleaved, scale_base, dtype, device):
    rotary = RotaryEmbedding(R, interleaved=interleaved, scale_base=scale_base).to(device)
    assert not rotary.state_dict()
    for form in FORMS:
        for offset in (0, 3, 11):
            qkv, num_heads_q, (hq, hk) = packed(form, device, dtype)
            before = qkv.clone().reshape(B, S, -1, D)
            y = rotary(qkv, seqlen_offset=offset, num_heads_q=num_heads_q).reshape(B, S, -1, D)
            tables = expected_tables(rows(offset), dtype, scale_base, offset + S)
            c, s, c_k, s_k = (t[:, :, None].to(device) for t in tables)
            want = rotate_reference(before[:, :, :hq], c, s, interleaved=interleaved)
            close(y[:, :, :hq], want, ulps=8)
            want = rotate_reference(before[:, :, hq : hq + hk], c_k, s_k, interleaved=interleaved)
            close(y[:, :, hq : hq + hk], want, ulps=8)
            identical(y[:, :, hq + hk :], before[:, :, hq + hk :])


@pytest.mark.parametrize("scale_base", [None, 512])
def test_module_with_kv(scale_base, device):
    rotary = RotaryEmbedding(R, scale_base=scale_base)
    offset = torch.tensor([1, 20], device=device)
    q = torch.randn(B, S, HQ, D, device=device)
    kv = torch.randn(B, S, 2, HK, D, device=device)
    with pytest.raises(ValueError, match="max_seqlen"):
        rotary(q, kv, seqlen_offset=offset)
    before = q.clone(), kv.clone()
    got = rotary(q, kv, seqlen_offset=offset, max_seqlen=M)
    assert got[0] is q and got[1] is kv
    tables = expected_tables(rows(offset), torch.float32, scale_base, M)
    c, s, c_k, s_k = (t[:, :, None].to(device) for t in tables)
    close(q, rotate_reference(before[0], c, s), ulps=8)
    close(kv[:, :, 0], rotate_reference(before[1][:, :, 0], c_k, s_k), ulps=8)
    identical(kv[:, :, 1], before[1][:, :, 1])
    same(bits(before[0], *rotary._tables[:2], offset=offset), q)


@pytest.mark.parametrize("scale_base", [None, 512])
def test_module_compiles(scale_base):
    rotary = RotaryEmbedding(R, scale_base=scale_base)

    def rotated(qkv):
        return rotary(qkv.clone(), seqlen_offset=3)

    compiles(rotated, torch.randn(B, S, 3, HQ, D))


@pytest.mark.parametrize("scale_base", [None, 512])
def test_cached_tables_can_be_read(scale_base, device):
    """Callers hand `_cos_cached` to attention with a KV cache; None before the first call."""
    rotary = RotaryEmbedding(R, scale_base=scale_base)
    names = ["_cos_cached", "_sin_cached", "_cos_k_cached", "_sin_k_cached"]
    assert [getattr(rotary, name) for name in names] == [None] * 4
    assert rotary._seq_len_cached == 0
    rotary._update_cos_sin_cache(M, device=torch.device(device), dtype=torch.bfloat16)
    assert rotary._seq_len_cached >= M
    want = expected_tables(torch.arange(M), torch.bfloat16, scale_base, M)
    for index, (name, table) in enumerate(zip(names, want, strict=True)):
        if index < 2 or scale_base is not None:
            close(getattr(rotary, name)[:M], table.to(device).double(), ulps=1)
        else:
            assert getattr(rotary, name) is None
    x = torch.randn(B, S, 3, HQ, D, device=device).bfloat16()
    want = apply_rotary_emb(x[:, :, 0], rotary._cos_cached, rotary._sin_cached, seqlen_offsets=3)
    same(rotary(x.clone(), seqlen_offset=3, max_seqlen=M)[:, :, 0], want)


def test_module_trains(device):
    rotary = RotaryEmbedding(D)
    weight = torch.randn(D, 3 * D, device=device, requires_grad=True)
    qkv = (torch.randn(B, S, D, device=device) @ weight).view(B, S, 3, 1, D)
    rotary(qkv).square().sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


# --- the original -------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_original(dtype, interleaved, device):
    original = pytest.importorskip("flash_attn.layers.rotary", exc_type=ImportError)
    if device == "cpu":
        pytest.skip("its kernel is Triton's")
    cos, sin = angles(M, R // 2, device, dtype)
    x = torch.randn(B, S, HQ, D, device=device).to(dtype)
    cu = torch.tensor([0, 5, 5, 12], dtype=torch.int32, device=device)
    for offset in offsets(device):
        got = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offset)
        want = original.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offset)
        close(got, want.double(), ulps=1)
    options = dict(interleaved=interleaved, cu_seqlens=cu, max_seqlen=7)
    flat = x.flatten(0, 1)[:12]
    want = original.apply_rotary_emb(flat, cos, sin, **options)
    close(apply_rotary_emb(flat, cos, sin, **options), want.double(), ulps=1)
    for scale_base in (None, 512):
        qkv = torch.randn(B, S, 3, HQ, D, device=device).to(dtype)
        got, want = (
            module(R, interleaved=interleaved, scale_base=scale_base).to(device)(qkv.clone())
            for module in (RotaryEmbedding, original.RotaryEmbedding)
        )
        close(got, want.double(), ulps=4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
def test_xpos_of_other_lengths_than_the_traced_one():
    """The middle of the call, where the scale is 1, is that of each call."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rotary = RotaryEmbedding(R, scale_base=512.0)

        def forward(self, qkv):
            return self.rotary(qkv.clone())

    net, qkv = Net(), torch.randn(B, S, 3, HQ, D)
    traced = torch.jit.trace(net, qkv)
    for length in (3, S, 40):
        qkv = torch.randn(B, length, 3, HQ, D)
        same(traced(qkv), net(qkv))
