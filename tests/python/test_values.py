"""Numbers: every layout, lane map, dtype and span, to the bit and within the documented bound."""

import fused_rope
import pytest
import torch
from oracle import DTYPES, LAYOUTS, angles, bits, error_over_bound, lanes, same, same_bits, tensor

# D, R, rotary_offset: head sizes of models, spans inside them, and the edges of a 16-byte vector.
SPANS = [
    (128, 128, 0),
    (64, 64, 0),
    (256, 256, 0),
    (80, 80, 0),
    (96, 48, 0),
    (192, 64, 128),  # the rotated end of an MLA head
    (128, 32, 16),
    (14, 2, 3),
    (2, 2, 0),
    (3, 2, 1),
    (6, 6, 0),
    (14, 14, 0),
    (16, 16, 0),
    (18, 18, 0),
    (30, 30, 0),
    (32, 32, 0),
    (34, 34, 0),
    (37, 34, 3),
    (64, 46, 8),
    (1026, 1026, 0),
]
BLOCKS = [(128, 128, 0, 2), (64, 48, 16, 2), (96, 96, 0, 3), (24, 24, 0, 4), (22, 20, 1, 5)]


def check(x, cos, sin, **kw):
    """The result of rotate, after comparing it with both oracles."""
    got = fused_rope.rotate(x, cos, sin, **kw)
    same(got, bits(x, cos, sin, **kw))
    assert error_over_bound(got, x, cos, sin, **kw) <= 1.0
    return got


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_spans(layout, interleaved, dtype, span, device):
    D, R, o = span
    B, S, Hq, Hk = 2, 5, 6, 2
    q, k = (tensor(layout, B, S, H, D, dtype, device) for H in (Hq, Hk))
    cos, sin = angles(B * S if layout == "thd" else S, R // 2, device)
    for inverse in (False, True):
        kw = dict(layout=layout, interleaved=interleaved, inverse=inverse, rotary_offset=o)
        before = q.clone(), k.clone()
        both = fused_rope.rotate_qk(q, k, cos, sin, **kw)
        same_bits(q, before[0])
        same_bits(k, before[1])
        for x, got in zip((q, k), both, strict=True):
            same(got, check(x, cos, sin, **kw))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", BLOCKS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_are_that_many_partial_rotations(layout, dtype, span, device):
    D, R, o, blocks = span
    x = tensor(layout, 1, 9, 3, D, dtype, device)
    cos, sin = angles(9, R // 2, device)
    got = check(x, cos, sin, layout=layout, rotary_offset=o, blocks=blocks)
    want, width, pairs = x.clone(), R // blocks, R // 2 // blocks
    for i in range(blocks):
        part = slice(i * pairs, (i + 1) * pairs)
        want = fused_rope.rotate(
            want, cos[:, part], sin[:, part], layout=layout, rotary_offset=o + i * width
        )
    same(got, want)


def test_as_many_blocks_as_pairs_are_interleaved(device):
    x = tensor("bshd", 2, 5, 3, 32, torch.bfloat16, device)
    cos, sin = angles(5, 16, device)
    same(check(x, cos, sin, blocks=16), check(x, cos, sin, interleaved=True))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pair_by_hand(interleaved, dtype, device):
    """A quarter turn takes (a, b) to (-b, a)."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=dtype, device=device).view(1, 1, 1, 4)
    cos, sin = torch.zeros(1, 2, device=device), torch.ones(1, 2, device=device)
    want = [-2.0, 1.0, -4.0, 3.0] if interleaved else [-3.0, -4.0, 1.0, 2.0]
    got = fused_rope.rotate(x, cos, sin, interleaved=interleaved)
    assert got.flatten().tolist() == want


@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (32, 8), (3, 5), (1, 64), (13, 0), (0, 3)])
@pytest.mark.parametrize("S", [1, 2, 31, 257])
def test_any_two_head_counts(heads, S, device):
    q, k = (tensor("bshd", 3, S, H, 64, torch.bfloat16, device) for H in heads)
    cos, sin = angles(S + 3, 32, device)
    for got, x in zip(fused_rope.rotate_qk(q, k, cos, sin), (q, k), strict=True):
        same(got, bits(x, cos, sin))


@pytest.mark.parametrize("sizes", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8), (0, 0, 0, 8)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_to_rotate(sizes, layout, device):
    x = tensor(layout, *sizes, torch.float32, device).requires_grad_()
    cos, sin = angles(8, 4, device)
    y = fused_rope.rotate(x, cos, sin, layout=layout)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    same(fused_rope.rotate_(x.detach(), cos, sin, layout=layout), x)


@pytest.mark.parametrize("D", [0, 8])
def test_no_rotated_lanes(D, device):
    x = tensor("bshd", 2, 3, 4, D, torch.float32, device)
    nothing = torch.empty(3, 0, device=device)
    for kw in ({}, {"interleaved": True}, {"blocks": 2}):
        same_bits(fused_rope.rotate(x, nothing, nothing, **kw), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_special_values(dtype, interleaved, device):
    """Infinities, NaN, zeros of both signs, subnormals and the largest numbers follow IEEE 754."""
    info = torch.finfo(dtype)
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0]
    special += [info.tiny * info.eps, -info.tiny, info.max, -info.max]
    x = torch.cartesian_prod(*[torch.tensor(special, dtype=dtype)] * 2)
    x = x.view(1, -1, 1, 2).to(device)
    for angle in ([1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-0.6, 0.8]):
        cos, sin = (torch.full((x.shape[1], 1), v, device=device) for v in angle)
        for inverse in (False, True):
            kw = dict(interleaved=interleaved, inverse=inverse)
            same(fused_rope.rotate(x, cos, sin, **kw), bits(x, cos, sin, **kw))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_value_of_a_half_type(dtype, device):
    """Conversions to float32 and back round to nearest even and keep every number."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(dtype)
    x = x.view(1, -1, 1, 2)
    for angle in ([1.0, 0.0], [0.6, 0.8]):
        cos, sin = (torch.full((x.shape[1], 1), v, device=device) for v in angle)
        same(fused_rope.rotate(x, cos, sin), bits(x, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lanes_outside_the_span_keep_their_bits(dtype, device):
    """NaN payloads and signalling NaNs too: what is not rotated is copied, not computed."""
    size = torch.empty(0, dtype=dtype).element_size()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    low, high = torch.iinfo(integer).min, torch.iinfo(integer).max
    x = torch.randint(low, high, (2, 5, 3, 40), dtype=integer, device=device).view(dtype)
    cos, sin = angles(5, 8, device)
    for interleaved in (False, True):
        got = fused_rope.rotate(x, cos, sin, rotary_offset=8, interleaved=interleaved)
        same_bits(got[..., :8], x[..., :8])
        same_bits(got[..., 24:], x[..., 24:])


def test_inverse_undoes(device):
    x = tensor("bshd", 2, 5, 3, 32, torch.float64, device)
    cos, sin = angles(5, 16, device, torch.float64)
    back = fused_rope.rotate(fused_rope.rotate(x, cos, sin), cos, sin, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-14, atol=1e-14)


def test_tables_need_not_be_of_length_one(device):
    """YaRN and longrope scale the table: the formula holds, and the bound grows with it."""
    x = tensor("bshd", 2, 5, 3, 32, torch.bfloat16, device)
    cos, sin = (1.37 * t for t in angles(5, 16, device))
    check(x, cos, sin)
    check(x, cos, sin, inverse=True)


@pytest.mark.parametrize(
    "sizes", [(70_001, 1, 1, 8), (1, 70_001, 1, 8), (1, 1, 70_001, 8), (3, 2, 1, 4098)], ids=str
)
def test_long_axes(sizes, device):
    x = tensor("bshd", *sizes, torch.bfloat16, device)
    cos, sin = angles(sizes[1], sizes[3] // 2, device)
    check(x, cos, sin)


def test_a_token_is_rotated_the_same_in_any_company(device):
    """Bits do not depend on neighbours, on batch and launch shapes, or on the run."""
    x = tensor("bshd", 4, 301, 8, 128, torch.bfloat16, device)
    cos, sin = angles(301, 64, device)
    whole = fused_rope.rotate(x, cos, sin)
    same(fused_rope.rotate(x, cos, sin), whole)
    for b, t, h in [(0, 0, 0), (3, 300, 7), (2, 77, 3)]:
        one = x[b : b + 1, t : t + 1, h : h + 1]
        row = slice(t, t + 1)
        same(fused_rope.rotate(one, cos[row], sin[row]), whole[b, t, h].view(1, 1, 1, 128))


def test_number_of_threads_does_not_matter():
    x = tensor("bshd", 4, 301, 8, 128, torch.bfloat16)
    cos, sin = angles(301, 64)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(fused_rope.rotate(x, cos, sin))
    finally:
        torch.set_num_threads(threads)
    same(results[1], results[0])
    same(results[2], results[0])


def test_equals_the_four_lines_of_pytorch(device):
    """The docstring's promise, with concatenated full-width tables."""
    x = tensor("bshd", 2, 5, 3, 32, torch.float32, device)
    cos, sin = angles(5, 16, device)
    c, s = (torch.cat([t, t], -1)[None, :, None] for t in (cos, sin))
    x1, x2 = x.chunk(2, -1)
    same(fused_rope.rotate(x, cos, sin), x * c + torch.cat([-x2, x1], -1) * s)


def test_lane_maps_of_the_oracle():
    """The oracle's own lane maps, spelled out."""
    spelled = {
        (): ([0, 1, 2, 3], [4, 5, 6, 7]),
        (("interleaved", True),): ([0, 2, 4, 6], [1, 3, 5, 7]),
        (("blocks", 2), ("rotary_offset", 3)): ([3, 4, 7, 8], [5, 6, 9, 10]),
    }
    for options, want in spelled.items():
        assert tuple(t.tolist() for t in lanes(4, **dict(options))) == want
