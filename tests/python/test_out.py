"""Results written into memory that is there already: out=, and out_rows= into a paged cache."""

import fused_rope
import pytest
import torch
from oracle import (
    DTYPES,
    LAYOUTS,
    OVERLAPPING,
    VIEWS,
    angles,
    as_bshd,
    bits,
    identical,
    same,
    tensor,
    view,
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out(layout, dtype, device):
    q, k = (tensor(layout, 1, 5, H, 40, dtype, device) for H in (4, 1))
    cos, sin = angles(5, 12, device)
    kw = dict(layout=layout, rotary_offset=8)
    out = tuple(torch.full_like(t, float("nan")) for t in (q, k))
    got = fused_rope.rotate_qk(q, k, cos, sin, out=out, **kw)
    for g, o, x in zip(got, out, (q, k), strict=True):
        assert g is o
        same(o, bits(x, cos, sin, **kw))  # elements outside the span too
        again = torch.full_like(x, float("nan"))
        assert fused_rope.rotate(x, cos, sin, out=again, **kw) is again
        same(again, o)


@pytest.mark.parametrize("name", [n for n in VIEWS if n not in OVERLAPPING])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_out_of_any_strides(name, dtype, device):
    x, out = view("contiguous", dtype, device), view(name, dtype, device)
    whole = out.as_strided((out.untyped_storage().nbytes() // out.element_size(),), (1,), 0)
    before = whole.clone()
    cos, sin = angles(5, 4, device)
    fused_rope.rotate(x, cos, sin, rotary_offset=5, out=out)
    want = bits(x, cos, sin, rotary_offset=5)
    before.as_strided(out.size(), out.stride(), out.storage_offset()).copy_(want)
    identical(whole, before)


def test_rope_part_of_a_joint_key(device):
    """The one rotary key of MLA, expanded over heads, goes behind each head's other elements."""
    cos, sin = angles(9, 8, device)
    q, k = (tensor("bshd", 2, 9, H, 16, torch.bfloat16, device) for H in (4, 1))
    joint = torch.full((2, 9, 4, 48), 7.0, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(q), joint[..., 32:]
    fused_rope.rotate_qk(q, k.expand(2, 9, 4, 16), cos, sin, out=out)
    same(out[0], bits(q, cos, sin))
    same(joint[..., 32:], bits(k, cos, sin).expand(2, 9, 4, 16))
    assert (joint[..., :32] == 7).all()


def test_part_of_a_joint_sequence(device):
    x = tensor("bshd", 2, 9, 4, 16, torch.bfloat16, device)
    cos, sin = angles(9, 8, device)
    whole = torch.zeros(2, 12, 4, 16, dtype=torch.bfloat16, device=device)
    same(fused_rope.rotate(x, cos, sin, out=whole[:, 3:]), bits(x, cos, sin))
    assert not whole[:, :3].any()


def test_padding_and_skipped_tokens_are_written(device):
    x = tensor("thd", 1, 9, 2, 16, torch.float32, device)
    cos, sin = angles(9, 8, device)
    positions = torch.tensor([0, 1, -1, 3, 4, 5, 6, 7, 8], device=device)
    cu = torch.tensor([0, 4, 7], device=device)
    for kw in (dict(positions=positions), dict(cu_seqlens=cu)):
        out = torch.full_like(x, float("nan"))
        fused_rope.rotate(x, cos, sin, layout="thd", out=out, **kw)
        same(out, bits(x, cos, sin, layout="thd", **kw))


def test_versions(device):
    q, k = (tensor("bshd", 2, 5, H, 16, torch.float32, device) for H in (4, 2))
    cos, sin = angles(5, 8, device)
    out = torch.empty_like(q), torch.empty_like(k)
    fused_rope.rotate_qk(q, k, cos, sin, out=out)
    assert [t._version for t in (*out, q, k)] == [1, 1, 0, 0]
    fused_rope.rotate(q, cos, sin, out=out[0])
    assert out[0]._version == 2


# --- out_rows ----------------------------------------------------------------------------------

SLOTS = [30, 2, -1, 17, 0, 63, 5]


@pytest.mark.parametrize("itype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_into_a_paged_cache(itype, dtype, device):
    """q as usual, k straight into its slots, of which every second belongs to v."""
    cos, sin = angles(90, 16, device)
    q, k = (tensor("thd", 1, 7, H, 40, dtype, device) for H in (8, 2))
    positions = torch.randint(0, 90, (7,), dtype=itype).to(device)
    slots = torch.tensor(SLOTS, dtype=itype, device=device)
    pages = tensor("bshd", 64, 2, 2, 40, dtype, device)  # [slot, k or v, head, element]
    want = pages.clone()
    kept = slots >= 0
    kw = dict(layout="thd", positions=positions, rotary_offset=8)
    want[slots[kept].long(), 0] = bits(k, cos, sin, **kw)[kept]
    out = torch.empty_like(q), pages[:, 0]
    got = fused_rope.rotate_qk(q, k, cos, sin, out=out, out_rows=slots, **kw)
    assert got[1] is out[1]
    same(out[0], bits(q, cos, sin, **kw))
    identical(pages, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_rows_of_every_layout(layout, device):
    B, S = (1, 6) if layout == "thd" else (2, 3)
    x = tensor(layout, B, S, 2, 16, torch.float32, device)
    cos, sin = angles(S, 8, device)
    sizes = (S,) if layout == "thd" else (B, S)
    slots = torch.tensor([4, -1, 9, 0, 7, 2], device=device).view(sizes)
    strided = torch.stack([slots, slots * 0 - 9], -1)[..., 0]
    want = torch.full((10, 2, 16), 7.0, device=device)
    kept = slots.flatten() >= 0
    rotated = as_bshd(bits(x, cos, sin, layout=layout), layout).flatten(0, 1)
    want[slots.flatten()[kept]] = rotated[kept]
    for rows in (slots, strided):
        cache = torch.full((10, 2, 16), 7.0, device=device)
        fused_rope.rotate(x, cos, sin, layout=layout, out=cache, out_rows=rows)
        same(cache, want)


def test_skipped_tokens_and_padding_reach_their_rows(device):
    x = tensor("thd", 1, 5, 2, 16, torch.float32, device)
    cos, sin = angles(5, 8, device)
    slots = torch.tensor([4, 3, 2, 1, 0], device=device)
    kw = dict(layout="thd", cu_seqlens=torch.tensor([0, 3], device=device))
    cache = torch.empty(5, 2, 16, device=device)
    fused_rope.rotate(x, cos, sin, out=cache, out_rows=slots, **kw)
    same(cache, bits(x, cos, sin, **kw).flip(0))


@pytest.mark.parametrize("bad", [64, -2, 2**31 - 1])
def test_out_rows_out_of_range(bad):
    x, (cos, sin) = torch.randn(7, 2, 32), angles(7, 16)
    cache = torch.full((64, 2, 32), 7.0)
    slots = torch.tensor(SLOTS, dtype=torch.int32)
    slots[-1] = bad
    with pytest.raises(IndexError, match=rf"rotate_out: .*out_rows.*64.*{bad}"):
        fused_rope.rotate(x, cos, sin, layout="thd", out=cache, out_rows=slots)
    assert (cache == 7).all()


# --- refusals ----------------------------------------------------------------------------------


def bad_outs():
    x = torch.randn(2, 9, 4, 16)
    V, T, R = ValueError, TypeError, RuntimeError
    yield "shape", x, torch.empty(2, 8, 4, 16), V
    yield "rank", x, torch.empty(2, 9, 64), V
    yield "dtype", x, torch.empty_like(x).double(), T
    yield "device", x, torch.empty_like(x, device="meta"), (V, R)
    yield "expanded", x, torch.empty(2, 9, 1, 16).expand_as(x), R
    yield "the input itself", x, x, R


@pytest.mark.parametrize("case", list(bad_outs()), ids=lambda c: c[0])
def test_bad_out(case):
    _, x, out, kind = case
    cos, sin = angles(9, 8)
    before = x.clone()
    with pytest.raises(kind, match=r"rotate_out: expected out"):
        fused_rope.rotate(x, cos, sin, out=out)
    same(x, before)
    good = torch.empty_like(x)
    with pytest.raises(kind, match=r"rotate_qk_out: expected k_out"):
        fused_rope.rotate_qk(x.clone(), x, cos, sin, out=(good, out))


def test_provable_overlaps_are_errors():
    base = torch.randn(2, 9, 4, 16)
    cos, sin = angles(9, 8)
    flat = base.flatten()
    before = base.clone()
    x, out = (flat[i : i + 64].view(1, 1, 4, 16) for i in (0, 16))
    with pytest.raises(RuntimeError, match=r"rotate_out: .*overlap"):
        fused_rope.rotate(x, cos, sin, out=out)
    same(base, before)
    q_out = torch.empty_like(base)
    with pytest.raises(RuntimeError, match=r"rotate_qk_out: .*overlap"):
        fused_rope.rotate_qk(base, base.clone(), cos, sin, out=(q_out, q_out))
    table = torch.randn(4, 16)
    x = torch.randn(1, 1, 2, 16)
    out = table.flatten()[:32].view(1, 1, 2, 16)
    with pytest.raises(RuntimeError, match=r"rotate_out: .*overlap"):
        fused_rope.rotate(x, table[:1].view(2, 8), table[2:3].view(2, 8), out=out)


@pytest.mark.parametrize("which", ["x", "cos", "out"])
def test_out_rejects_tensors_that_require_grad(which, device):
    x = tensor("bshd", 2, 9, 4, 16, torch.float32, device)
    cos, sin = angles(9, 8, device)
    out = torch.zeros_like(x)
    dict(x=x, cos=cos, out=out)[which].requires_grad_()
    with pytest.raises(RuntimeError, match=r"rotate_out: .*grad"):
        fused_rope.rotate(x, cos, sin, out=out)
    assert not out.any()
    with torch.no_grad():
        same(fused_rope.rotate(x, cos, sin, out=out), bits(x, cos, sin))


def bad_rows():
    ok = dict(out=torch.empty(64, 2, 32), out_rows=torch.tensor(SLOTS))
    V, T = ValueError, TypeError
    yield "out_rows", V, dict(out_rows=ok["out_rows"])
    yield "out_rows", T, ok | dict(out_rows=ok["out_rows"].float())
    yield "out_rows", V, ok | dict(out_rows=ok["out_rows"][:6])
    yield "out_rows", V, ok | dict(out_rows=ok["out_rows"].view(1, 7, 1))
    yield "out_rows", V, ok | dict(out_rows=ok["out_rows"].to("meta"))
    yield "out", V, ok | dict(out=torch.empty(64, 3, 32))
    yield "out", V, ok | dict(out=torch.empty(64, 2, 31))
    yield "out", V, ok | dict(out=torch.empty(64, 64))
    yield "out", V, ok | dict(out=torch.empty(64, 1, 2, 32))


@pytest.mark.parametrize("case", list(bad_rows()), ids=lambda c: c[0])
def test_bad_out_rows(case):
    word, kind, kw = case
    x, (cos, sin) = torch.randn(7, 2, 32), angles(7, 16)
    with pytest.raises(kind, match=rf"rotate.*: expected .*{word}"):
        fused_rope.rotate(x, cos, sin, layout="thd", **kw)
