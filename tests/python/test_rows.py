"""Which row of a shared table a token reads: positions, offset, cu_seqlens, axes; bad rows."""

import fused_rope
import pytest
import torch
from oracle import DTYPES, LAYOUTS, angles, bits, same, same_bits, tensor

INTEGERS = [torch.int32, torch.int64]


def integers(low, high, sizes, dtype, device):
    return torch.randint(low, high, sizes, dtype=dtype).to(device)


def check_qk(q, k, cos, sin, **kw):
    for got, x in zip(fused_rope.rotate_qk(q, k, cos, sin, **kw), (q, k), strict=True):
        same(got, bits(x, cos, sin, **kw))


# --- positions and offset ----------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_positions(layout, dtype, device):
    B, S, M = (1, 7, 41) if layout == "thd" else (3, 7, 41)
    q, k = (tensor(layout, B, S, H, 32, torch.bfloat16, device) for H in (4, 2))
    cos, sin = angles(M, 16, device)
    one = integers(0, M - 3, (S,), dtype, device)
    each = integers(0, M - 3, (B, S), dtype, device)
    lengths = integers(0, 3, (B,), dtype, device)
    spaced = torch.stack([each, each * 0 + M], -1)[..., 0]
    choices = {
        "for all": dict(positions=one),
        "one row": dict(positions=one[None]),
        "each batch": dict(positions=each),
        "transposed memory": dict(positions=each.t().contiguous().t()),
        "expanded": dict(positions=one.expand(B, S)),
        "every second in memory": dict(positions=spaced),
        "one number for all": dict(positions=one[:1].expand(S)),
        "and an offset": dict(positions=each, offset=3),
        "and a negative offset": dict(positions=each + 3, offset=-3),
        "and lengths": dict(positions=each, offset=lengths),
        "offset": dict(offset=5),
        "lengths": dict(offset=lengths),
        "lengths in every second place": dict(offset=torch.stack([lengths, lengths - 9], 1)[:, 0]),
        "one length for all": dict(offset=lengths[:1].expand(B)),
    }
    if layout == "thd":  # offsets belong to sequences there
        choices = {n: kw for n, kw in choices.items() if "length" not in n}
    for kw in choices.values():
        check_qk(q, k, cos, sin, layout=layout, **kw)


def test_offset_beside_positions_may_come_to_any_row(device):
    """Only the sum must be a row."""
    x = tensor("bshd", 1, 3, 2, 8, torch.float32, device)
    cos, sin = angles(3, 4, device)
    far = torch.tensor([2**40, 2**40 + 2, -1], device=device)
    got = fused_rope.rotate(x, cos, sin, positions=far, offset=-(2**40))
    same(got, bits(x, cos, sin, positions=torch.tensor([0, 2, -1], device=device)))
    low = torch.tensor([-5, -4, -3], device=device)
    same(fused_rope.rotate(x, cos, sin, positions=low, offset=5), bits(x, cos, sin))


def test_offset_is_a_slice_of_the_table(device):
    x = tensor("bshd", 2, 5, 3, 16, torch.bfloat16, device)
    cos, sin = angles(20, 8, device)
    for n in (0, 1, 7, 15):
        want = fused_rope.rotate(x, cos[n:], sin[n:])
        same(fused_rope.rotate(x, cos, sin, offset=n), want)
        lengths = torch.full((2,), n, dtype=torch.int32, device=device)
        same(fused_rope.rotate(x, cos, sin, offset=lengths), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("itype", INTEGERS, ids=str)
def test_minus_one_is_no_rotation(dtype, itype, device):
    x = tensor("bshd", 2, 9, 3, 32, dtype, device)
    cos, sin = angles(20, 16, device)
    positions = integers(0, 17, (2, 9), itype, device)
    positions[0, :4] = positions[1, 7] = -1
    skipped = positions == -1
    lengths = torch.tensor([1, 2], dtype=itype, device=device)
    later = torch.where(skipped, positions, positions + 1)
    for kw in (
        dict(positions=positions),
        dict(positions=positions, offset=3),
        dict(positions=positions, offset=lengths),
        dict(positions=later, offset=-1, inverse=True),
    ):
        y = x.clone().requires_grad_()
        got = fused_rope.rotate(y, cos, sin, **kw)
        same(got, bits(x, cos, sin, **kw))
        same_bits(got[skipped], x[skipped])
        g = torch.randn_like(y)
        got.backward(g)
        same_bits(y.grad[skipped], g[skipped])
        untouched = x.clone()
        same(fused_rope.rotate_(untouched, cos, sin, **kw), got.detach())


def test_nothing_rotates_without_a_table_row(device):
    """All positions -1: an empty table will do."""
    x = tensor("bshd", 2, 3, 2, 8, torch.float32, device)
    empty = torch.empty(0, 4, device=device)
    nowhere = torch.full((3,), -1, device=device)
    same_bits(fused_rope.rotate(x, empty, empty, positions=nowhere), x)


# --- packed sequences --------------------------------------------------------------------------

LENGTHS = [[3, 0, 9, 1, 0, 6], [1], [0], [], [0, 0, 5], [17, 2], [1] * 12]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("padding", [0, 1, 14])
@pytest.mark.parametrize("itype", INTEGERS, ids=str)
def test_packed_sequences(lengths, padding, itype, device):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(itype).to(device)
    T = sum(lengths) + padding
    q, k = (tensor("thd", 1, T, H, 32, torch.bfloat16, device) for H in (4, 1))
    cos, sin = angles(20, 16, device)
    past = integers(0, 3, (len(lengths),), itype, device)
    each = integers(0, 15, (T,), itype, device)
    for kw in (
        dict(),
        dict(offset=2),
        dict(offset=past),
        dict(offset=past, inverse=True),
        dict(positions=each),
        dict(positions=each, offset=past),
        dict(positions=each[None], offset=3),
    ):
        kw = dict(layout="thd", cu_seqlens=cu, **kw)
        check_qk(q, k, cos, sin, **kw)
        got = fused_rope.rotate(q, cos, sin, **kw)
        same_bits(got[T - padding :], q[T - padding :])


def test_packed_sequences_are_single_ones_side_by_side(device):
    lengths = [3, 5, 1]
    parts = [tensor("thd", 1, n, 2, 16, torch.float32, device) for n in lengths]
    cos, sin = angles(9, 8, device)
    cu = torch.tensor([0, 3, 8, 9], dtype=torch.int32, device=device)
    got = fused_rope.rotate(torch.cat(parts), cos, sin, layout="thd", cu_seqlens=cu)
    same(got, torch.cat([fused_rope.rotate(p, cos, sin, layout="thd") for p in parts]))


def test_cu_seqlens_in_every_second_place(device):
    cu = torch.tensor([[0, 7], [3, 7], [8, 7]], device=device)[:, 0]
    x = tensor("thd", 1, 10, 2, 16, torch.float32, device)
    cos, sin = angles(9, 8, device)
    kw = dict(layout="thd", cu_seqlens=cu)
    same(fused_rope.rotate(x, cos, sin, **kw), bits(x, cos, sin, **kw))


# --- an axis for each pair ---------------------------------------------------------------------

AXES = {
    "qwen2-vl": [0] * 16 + [1] * 24 + [2] * 24,
    "qwen3-vl": [j % 3 if j < 60 else 0 for j in range(64)],
    "ernie-4.5-vl": [1, 2] * 22 + [0] * 20,
    "one axis": [0] * 64,
    "two axes": [0] * 32 + [1] * 32,
    "backwards": [3, 2, 1, 0] * 16,
    "eight axes": [j // 8 for j in range(64)],
    "an axis nobody reads": [0, 2] * 32,
}


def test_mrope_axes():
    assert list(fused_rope.mrope_axes([16, 24, 24])) == AXES["qwen2-vl"]
    assert list(fused_rope.mrope_axes([24, 20, 20], interleaved=True)) == AXES["qwen3-vl"]
    with pytest.raises(ValueError, match="sections"):
        fused_rope.mrope_axes([4, -1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("itype", INTEGERS, ids=str)
def test_axes(layout, name, itype, device):
    axes = AXES[name]
    B, S, A, M = (1, 14, max(axes) + 1, 50) if layout == "thd" else (2, 7, max(axes) + 1, 50)
    q, k = (tensor(layout, B, S, H, 128, torch.bfloat16, device) for H in (3, 1))
    cos, sin = angles(M, 64, device)
    shapes = [(A, S), (A, 1, S)] if layout == "thd" else [(A, S), (A, 1, S), (A, B, S)]
    for sizes in shapes:
        positions = integers(-1, M - 2, sizes, itype, device)
        strided = positions.movedim(0, -1).contiguous().movedim(-1, 0)
        for kw in (dict(positions=positions), dict(positions=strided, offset=2, interleaved=True)):
            kw = dict(layout=layout, axes=axes, **kw)
            check_qk(q, k, cos, sin, **kw)
            y, g = q.clone().requires_grad_(), torch.randn_like(q)
            fused_rope.rotate(y, cos, sin, **kw).backward(g)
            same(y.grad, bits(g, cos, sin, inverse=True, **kw))
            same(fused_rope.rotate_(q.clone(), cos, sin, **kw), bits(q, cos, sin, **kw))


def test_axes_beside_blocks_and_packed_sequences(device):
    axes = [0, 0, 1, 1, 2, 2, 0, 1]
    x = tensor("thd", 1, 9, 3, 20, torch.float32, device)
    cos, sin = angles(40, 8, device)
    positions = integers(-1, 30, (3, 9), torch.int64, device)
    cu = torch.tensor([0, 4, 4, 7], device=device)
    past = torch.tensor([1, 5, 9], dtype=torch.int32, device=device)
    kw = dict(layout="thd", positions=positions, axes=axes, cu_seqlens=cu, offset=past)
    kw |= dict(blocks=4, rotary_offset=2)
    same(fused_rope.rotate(x, cos, sin, **kw), bits(x, cos, sin, **kw))


def test_equal_axes_are_no_axes(device):
    x = tensor("bshd", 2, 7, 3, 32, torch.bfloat16, device)
    cos, sin = angles(40, 16, device)
    positions = integers(-1, 40, (2, 7), torch.int64, device)
    want = fused_rope.rotate(x, cos, sin, positions=positions)
    three = positions.expand(3, 2, 7)
    same(fused_rope.rotate(x, cos, sin, positions=three, axes=[0, 1, 2, 1] * 4), want)


# --- rows that there are none of ---------------------------------------------------------------


@pytest.mark.parametrize("bad", [-2, -3, 8, 9, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("itype", INTEGERS, ids=str)
@pytest.mark.parametrize("place", [(0, 0), (1, 4)])
def test_positions_out_of_range(bad, itype, place):
    x, (cos, sin) = torch.randn(2, 5, 3, 16), angles(8, 8)
    positions = torch.zeros(2, 5, dtype=itype)
    positions[place] = bad
    before = x.clone()
    for name in ("rotate", "rotate_"):
        with pytest.raises(IndexError, match=rf"{name}: .*positions.*M=8.*{bad}"):
            getattr(fused_rope, name)(x, cos, sin, positions=positions)
        same(x, before)


def test_sums_out_of_range():
    x, (cos, sin) = torch.randn(2, 5, 3, 16), angles(8, 8)
    packed = torch.randn(9, 3, 16)
    last = torch.full((5,), 7)
    cu = torch.tensor([0, 9])
    big = 2**63 - 1
    for kw in (
        dict(positions=last, offset=1),
        dict(positions=last, offset=-8),
        dict(positions=last, offset=big),
        dict(positions=torch.full((5,), big), offset=torch.full((2,), big)),
        dict(offset=torch.tensor([0, 4])),
        dict(offset=torch.tensor([-1, 0])),
        dict(positions=last[None].repeat(3, 2, 1) * 8, axes=[0, 1] * 4),
    ):
        with pytest.raises(IndexError, match="rotate: "):
            fused_rope.rotate(x, cos, sin, **kw)
    for kw in (dict(), dict(offset=torch.tensor([-2])), dict(offset=5)):
        with pytest.raises(IndexError, match="rotate: "):
            fused_rope.rotate(packed, cos, sin, layout="thd", cu_seqlens=cu, **kw)


def test_an_offset_does_not_bring_minus_one_back(device):
    """-1 is no rotation whatever the offset; a sum of -1 is out of range."""
    x, (cos, sin) = tensor("bshd", 1, 2, 1, 8, torch.float32, device), angles(4, 4, device)
    nowhere = torch.tensor([-1, -1], device=device)
    same_bits(fused_rope.rotate(x, cos, sin, positions=nowhere, offset=2), x)
    if device == "cpu":
        with pytest.raises(IndexError):
            fused_rope.rotate(x, cos, sin, positions=torch.tensor([0, 1]), offset=-1)


def test_an_axis_nobody_reads_may_hold_anything(device):
    x, (cos, sin) = tensor("bshd", 1, 2, 1, 8, torch.float32, device), angles(4, 4, device)
    positions = torch.tensor([[0, 1], [99, -7], [2, 3]], device=device)
    kw = dict(positions=positions, axes=[0, 2, 2, 0])
    same(fused_rope.rotate(x, cos, sin, **kw), bits(x, cos, sin, **kw))


def test_padding_reads_no_row(device):
    """Past cu_seqlens[-1] neither positions nor the table are looked at."""
    x, (cos, sin) = tensor("thd", 1, 6, 1, 8, torch.float32, device), angles(3, 4, device)
    cu = torch.tensor([0, 3], device=device)
    positions = torch.tensor([0, 1, 2, 99, -5, 3], device=device)
    for kw in (dict(), dict(positions=positions)):
        got = fused_rope.rotate(x, cos, sin, layout="thd", cu_seqlens=cu, **kw)
        same_bits(got[3:], x[3:])
