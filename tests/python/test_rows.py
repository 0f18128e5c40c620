"""Which row of a shared table a token reads: positions, offset, cu_seqlens, axes; bad rows."""

import fused_rope
import pytest
import torch
from oracle import DTYPES, LAYOUTS, angles, any_bits, bits, identical, same, tensor

INTEGERS = [torch.int32, torch.int64]


def integers(low, high, sizes, dtype, device):
    return torch.randint(low, high, sizes, dtype=dtype).to(device)


def check_qk(q, k, cos, sin, **kw):
    for got, x in zip(fused_rope.rotate_qk(q, k, cos, sin, **kw), (q, k), strict=True):
        same(got, bits(x, cos, sin, **kw))


# --- positions and offset ----------------------------------------------------------------------

M = 41

# From positions [S] and [B, S] in [0, M - 3) and lengths [B] in [0, 3).
CHOICES = {
    "positions [S]": lambda one, each, lengths: dict(positions=one),
    "positions [1, S]": lambda one, each, lengths: dict(positions=one[None]),
    "positions [B, S]": lambda one, each, lengths: dict(positions=each),
    "transposed": lambda one, each, lengths: dict(positions=each.t().contiguous().t()),
    "expanded": lambda one, each, lengths: dict(positions=one.expand(each.shape)),
    "every second": lambda one, each, lengths: dict(
        positions=torch.stack([each, each * 0 + M], -1)[..., 0]
    ),
    "one number": lambda one, each, lengths: dict(positions=one[:1].expand(one.shape)),
    "positions and offset": lambda one, each, lengths: dict(positions=each, offset=3),
    "negative offset": lambda one, each, lengths: dict(positions=each + 3, offset=-3),
    "positions and lengths": lambda one, each, lengths: dict(positions=each, offset=lengths),
    "offset": lambda one, each, lengths: dict(offset=5),
    "lengths": lambda one, each, lengths: dict(offset=lengths),
    "every second of lengths": lambda one, each, lengths: dict(
        offset=torch.stack([lengths, lengths - 9], 1)[:, 0]
    ),
    "expanded lengths": lambda one, each, lengths: dict(offset=lengths[:1].expand(lengths.shape)),
}


# The lengths of a packed batch belong to its sequences: test_packed_sequences.
LAYOUT_CHOICES = [(x, n) for x in LAYOUTS for n in CHOICES if x != "thd" or "lengths" not in n]


@pytest.mark.parametrize("layout,choice", LAYOUT_CHOICES)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_positions_and_offset_select_rows(layout, choice, dtype, device):
    B, S = (1, 7) if layout == "thd" else (3, 7)
    q, k = (tensor(layout, B, S, H, 32, torch.bfloat16, device) for H in (4, 2))
    cos, sin = angles(M, 16, device)
    one = integers(0, M - 3, (S,), dtype, device)
    each = integers(0, M - 3, (B, S), dtype, device)
    kw = CHOICES[choice](one, each, integers(0, 3, (B,), dtype, device))
    check_qk(q, k, cos, sin, layout=layout, **kw)


def test_only_the_sum_of_position_and_offset_must_be_a_row(device):
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


MINUS_ONE = ["positions", "and an offset", "and lengths", "and offset -1, inverse"]


@pytest.mark.parametrize("case", MINUS_ONE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("itype", INTEGERS, ids=str)
def test_position_minus_one_copies_the_token(case, dtype, itype, device):
    """Whatever the offset, in results and gradients; NaN payloads survive."""
    x = any_bits((2, 9, 3, 32), dtype, device)
    cos, sin = angles(20, 16, device)
    positions = integers(0, 17, (2, 9), itype, device)
    positions[0, :4] = positions[1, 7] = -1
    copied = positions == -1
    x[~copied] = torch.randn_like(x[~copied])
    kw = {
        "positions": dict(positions=positions),
        "and an offset": dict(positions=positions, offset=3),
        "and lengths": dict(positions=positions, offset=positions.new_tensor([1, 2])),
        "and offset -1, inverse": dict(
            positions=torch.where(copied, positions, positions + 1), offset=-1, inverse=True
        ),
    }[case]
    y = x.clone().requires_grad_()
    got = fused_rope.rotate(y, cos, sin, **kw)
    same(got, bits(x, cos, sin, **kw))
    identical(got[copied], x[copied])
    g = any_bits(x.shape, dtype, device)
    got.backward(g)
    identical(y.grad[copied], g[copied])
    same(fused_rope.rotate_(x.clone(), cos, sin, **kw), got.detach())


def test_positions_of_minus_one_need_no_table_row(device):
    x = tensor("bshd", 2, 3, 2, 8, torch.float32, device)
    empty = torch.empty(0, 4, device=device)
    nowhere = torch.full((3,), -1, device=device)
    identical(fused_rope.rotate(x, empty, empty, positions=nowhere), x)


# --- packed sequences --------------------------------------------------------------------------

LENGTHS = [[3, 0, 9, 1, 0, 6], [1], [0], [], [0, 0, 5], [17, 2], [1] * 12]


# From lengths [N] in [0, 3) already in a cache and positions [T] in [0, 15).
PACKED = {
    "none": lambda past, each: dict(),
    "offset": lambda past, each: dict(offset=2),
    "lengths": lambda past, each: dict(offset=past),
    "lengths, inverse": lambda past, each: dict(offset=past, inverse=True),
    "positions": lambda past, each: dict(positions=each),
    "positions and lengths": lambda past, each: dict(positions=each, offset=past),
    "positions [1, T] and offset": lambda past, each: dict(positions=each[None], offset=3),
}


@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("padding", [0, 1, 14])
@pytest.mark.parametrize("itype", INTEGERS, ids=str)
def test_packed_sequences(case, lengths, padding, itype, device):
    """Tokens after the last sequence are padding and copied."""
    cu = torch.tensor([0, *lengths]).cumsum(0).to(itype).to(device)
    T = sum(lengths) + padding
    q, k = (tensor("thd", 1, T, H, 32, torch.bfloat16, device) for H in (4, 1))
    q[T - padding :] = any_bits((padding, 4, 32), torch.bfloat16, device)
    cos, sin = angles(20, 16, device)
    past = integers(0, 3, (len(lengths),), itype, device)
    each = integers(0, 15, (T,), itype, device)
    kw = dict(layout="thd", cu_seqlens=cu, **PACKED[case](past, each))
    check_qk(q, k, cos, sin, **kw)
    identical(fused_rope.rotate(q, cos, sin, **kw)[T - padding :], q[T - padding :])


@pytest.mark.parametrize("start", [0, 3, 99])
@pytest.mark.parametrize("D", [32, 10, 9])
@pytest.mark.parametrize("itype", INTEGERS, ids=str)
def test_without_sequences_all_tokens_are_padding(start, D, itype, device):
    """Wherever the first sequence would start."""
    q, k = (any_bits((6, heads, D), torch.bfloat16, device) for heads in (4, 1))
    cos, sin = angles(7, D // 2, device)
    kw = dict(layout="thd", cu_seqlens=torch.tensor([start], dtype=itype, device=device))
    for x, got in zip((q, k), fused_rope.rotate_qk(q, k, cos, sin, **kw), strict=True):
        identical(got, x)


def test_packed_sequences_equal_separate_calls(device):
    lengths = [3, 5, 1]
    parts = [tensor("thd", 1, n, 2, 16, torch.float32, device) for n in lengths]
    cos, sin = angles(9, 8, device)
    cu = torch.tensor([0, 3, 8, 9], dtype=torch.int32, device=device)
    got = fused_rope.rotate(torch.cat(parts), cos, sin, layout="thd", cu_seqlens=cu)
    same(got, torch.cat([fused_rope.rotate(p, cos, sin, layout="thd") for p in parts]))


def test_cu_seqlens_may_be_strided(device):
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
    "an unused axis": [0, 2] * 32,
}


def test_mrope_axes():
    assert list(fused_rope.mrope_axes([16, 24, 24])) == AXES["qwen2-vl"]
    assert list(fused_rope.mrope_axes([24, 20, 20], interleaved=True)) == AXES["qwen3-vl"]
    assert list(fused_rope.mrope_axes([3, 3, 2], interleaved=True)) == [0, 1, 2, 0, 1, 2, 0, 1]
    with pytest.raises(ValueError, match="sections"):
        fused_rope.mrope_axes([4, -1])


AXES_SHAPES = [(x, n) for x in LAYOUTS for n in ("[A, S]", "[A, 1, S]", "[A, B, S]")]
AXES_SHAPES.remove(("thd", "[A, B, S]"))


@pytest.mark.parametrize("layout,shape", AXES_SHAPES)
@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("itype", INTEGERS, ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_each_pair_reads_its_axis(layout, shape, name, itype, strided, device):
    axes = AXES[name]
    B, S, A = (1, 14, max(axes) + 1) if layout == "thd" else (2, 7, max(axes) + 1)
    x = tensor(layout, B, S, 3, 128, torch.bfloat16, device)
    cos, sin = angles(50, 64, device)
    sizes = {"[A, S]": (A, S), "[A, 1, S]": (A, 1, S), "[A, B, S]": (A, B, S)}[shape]
    positions = integers(-1, 48, sizes, itype, device)
    kw = dict(layout=layout, axes=axes, positions=positions)
    if strided:
        positions = positions.movedim(0, -1).contiguous().movedim(-1, 0)
        kw |= dict(positions=positions, offset=2, interleaved=True)
    k = x.narrow(layout.index("h"), 0, 1)
    check_qk(x, k, cos, sin, **kw)
    y, g = x.clone().requires_grad_(), torch.randn_like(x)
    fused_rope.rotate(y, cos, sin, **kw).backward(g)
    same(y.grad, bits(g, cos, sin, inverse=True, **kw))
    same(fused_rope.rotate_(x.clone(), cos, sin, **kw), bits(x, cos, sin, **kw))


def test_axes_with_blocks_and_packed_sequences(device):
    axes = [0, 0, 1, 1, 2, 2, 0, 1]
    x = tensor("thd", 1, 9, 3, 20, torch.float32, device)
    cos, sin = angles(40, 8, device)
    positions = integers(-1, 30, (3, 9), torch.int64, device)
    cu = torch.tensor([0, 4, 4, 7], device=device)
    past = torch.tensor([1, 5, 9], dtype=torch.int32, device=device)
    kw = dict(layout="thd", positions=positions, axes=axes, cu_seqlens=cu, offset=past)
    kw |= dict(blocks=4, rotary_offset=2)
    same(fused_rope.rotate(x, cos, sin, **kw), bits(x, cos, sin, **kw))


def test_equal_positions_on_all_axes_equal_one_axis(device):
    x = tensor("bshd", 2, 7, 3, 32, torch.bfloat16, device)
    cos, sin = angles(40, 16, device)
    positions = integers(-1, 40, (2, 7), torch.int64, device)
    want = fused_rope.rotate(x, cos, sin, positions=positions)
    three = positions.expand(3, 2, 7)
    same(fused_rope.rotate(x, cos, sin, positions=three, axes=[0, 1, 2, 1] * 4), want)


# --- out of range ------------------------------------------------------------------------------


BAD_POSITIONS = [(i, bad) for i in INTEGERS for bad in (-2, -3, 8, 9, 2**31 - 1, -(2**31))]
BAD_POSITIONS += [(torch.int64, bad) for bad in (2**32, 2**63 - 1, -(2**63))]


@pytest.mark.parametrize("itype,bad", BAD_POSITIONS, ids=str)
@pytest.mark.parametrize("place", [(0, 0), (1, 4)])
def test_positions_out_of_range_are_named(itype, bad, place):
    x, (cos, sin) = torch.randn(2, 5, 3, 16), angles(8, 8)
    positions = torch.zeros(2, 5, dtype=itype)
    positions[place] = bad
    before = x.clone()
    for name in ("rotate", "rotate_"):
        with pytest.raises(IndexError, match=rf"{name}: .*positions.*M=8.*{bad}"):
            getattr(fused_rope, name)(x, cos, sin, positions=positions)
        same(x, before)


LAST, LARGEST = torch.full((5,), 7), 2**63 - 1
BAD_SUMS = {
    "position and offset": dict(positions=LAST, offset=1),
    "position and negative offset": dict(positions=LAST, offset=-8),
    "position and largest offset": dict(positions=LAST, offset=LARGEST),
    "overflow": dict(positions=LAST * 0 + LARGEST, offset=torch.full((2,), LARGEST)),
    "length of the last batch": dict(offset=torch.tensor([0, 4])),
    "length of the first batch": dict(offset=torch.tensor([4, 0])),
    "negative length": dict(offset=torch.tensor([-1, 0])),
    "int32 length": dict(offset=torch.tensor([4, 0], dtype=torch.int32)),
    "largest int32 length": dict(offset=torch.tensor([2**31 - 1, 0], dtype=torch.int32)),
    "axis": dict(positions=LAST[None].repeat(3, 2, 1) * 8, axes=[0, 1] * 4),
}


@pytest.mark.parametrize("kw", BAD_SUMS.values(), ids=BAD_SUMS)
def test_sums_out_of_range_are_errors(kw):
    x, (cos, sin) = torch.randn(2, 5, 3, 16), angles(8, 8)
    with pytest.raises(IndexError, match="rotate: "):
        fused_rope.rotate(x, cos, sin, **kw)


@pytest.mark.parametrize("offset", [0, torch.tensor([-2]), 5], ids=["none", "length", "offset"])
def test_packed_sequences_out_of_range_are_errors(offset):
    x, (cos, sin) = torch.randn(9, 3, 16), angles(8, 8)
    cu = torch.tensor([0, 9])
    with pytest.raises(IndexError, match="rotate: "):
        fused_rope.rotate(x, cos, sin, layout="thd", cu_seqlens=cu, offset=offset)


def test_minus_one_copies_and_a_sum_of_minus_one_is_out_of_range(device):
    x, (cos, sin) = tensor("bshd", 1, 2, 1, 8, torch.float32, device), angles(4, 4, device)
    nowhere = torch.tensor([-1, -1], device=device)
    identical(fused_rope.rotate(x, cos, sin, positions=nowhere, offset=2), x)
    if device == "cpu":
        with pytest.raises(IndexError):
            fused_rope.rotate(x, cos, sin, positions=torch.tensor([0, 1]), offset=-1)


def test_positions_of_an_unused_axis_are_not_checked(device):
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
        y, g = x.clone().requires_grad_(), torch.randn_like(x)
        got = fused_rope.rotate(y, cos, sin, layout="thd", cu_seqlens=cu, **kw)
        got.backward(g)
        identical(got[3:], x[3:])
        identical(y.grad[3:], g[3:])
