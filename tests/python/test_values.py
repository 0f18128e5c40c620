"""Numbers: every layout, pairing, dtype and span, bitwise and within the documented bound."""

from concurrent.futures import ThreadPoolExecutor

import fused_rope
import pytest
import torch
from oracle import (
    DTYPES,
    LAYOUTS,
    angles,
    any_bits,
    bits,
    error_over_bound,
    identical,
    pair_elements,
    same,
    tensor,
)

# D, R, rotary_offset: head sizes of models, spans inside them, and the edges of a 16-byte vector.
SPANS = [
    (128, 128, 0),
    (64, 64, 0),
    (256, 256, 0),
    (80, 80, 0),
    (96, 48, 0),
    (192, 64, 128),  # the rotated end of an MLA head
    (128, 32, 16),
    (128, 96, 0),  # Phi-4-mini
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
# Spans that end inside a vector, or leave elements on both sides.
EDGES = [(D, 2 * P, 0) for P in (1, 3, 10, 12, 20, 24, 40, 48, 56) for D in (2 * P + 1, 128)]
EDGES += [(n + 32, 32, o) for n in (1, 3, 8, 30, 64, 100) for o in (0, n)]
BLOCKS = [(128, 128, 0, 2), (64, 48, 16, 2), (96, 96, 0, 3), (24, 24, 0, 4), (22, 20, 1, 5)]


def check(x, cos, sin, **kw):
    """The result of rotate, after comparing it with both oracles."""
    got = fused_rope.rotate(x, cos, sin, **kw)
    same(got, bits(x, cos, sin, **kw))
    assert error_over_bound(got, x, cos, sin, **kw) <= 1.0
    return got


EACH_PAIRING = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
EACH_DIRECTION = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


@pytest.mark.parametrize("layout", LAYOUTS)
@EACH_PAIRING
@EACH_DIRECTION
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_values_of_every_span(layout, interleaved, inverse, dtype, span, device):
    """q and k, together and alone; the inputs are left alone."""
    D, R, o = span
    B, S, Hq, Hk = 2, 5, 6, 2
    q, k = (tensor(layout, B, S, H, D, dtype, device) for H in (Hq, Hk))
    cos, sin = angles(B * S if layout == "thd" else S, R // 2, device)
    kw = dict(layout=layout, interleaved=interleaved, inverse=inverse, rotary_offset=o)
    before = q.clone(), k.clone()
    both = fused_rope.rotate_qk(q, k, cos, sin, **kw)
    identical(q, before[0])
    identical(k, before[1])
    for x, got in zip((q, k), both, strict=True):
        same(got, check(x, cos, sin, **kw))


@EACH_PAIRING
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", EDGES, ids=str)
def test_spans_of_any_size_inside_the_head(interleaved, dtype, span, device):
    D, R, o = span
    x = tensor("bshd", 2, 5, 3, D, dtype, device)
    x[..., :o] = any_bits((2, 5, 3, o), dtype, device)
    x[..., o + R :] = any_bits((2, 5, 3, D - o - R), dtype, device)
    cos, sin = angles(5, R // 2, device)
    got = fused_rope.rotate(x, cos, sin, interleaved=interleaved, rotary_offset=o)
    want = bits(x, cos, sin, interleaved=interleaved, rotary_offset=o)
    same(got[..., o : o + R], want[..., o : o + R])
    identical(got[..., :o], x[..., :o])
    identical(got[..., o + R :], x[..., o + R :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", BLOCKS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_equal_one_partial_rotation_each(layout, dtype, span, device):
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


def test_one_block_for_each_pair_equals_interleaved(device):
    x = tensor("bshd", 2, 5, 3, 32, torch.bfloat16, device)
    cos, sin = angles(5, 16, device)
    same(check(x, cos, sin, blocks=16), check(x, cos, sin, interleaved=True))


@EACH_PAIRING
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_quarter_turn(interleaved, dtype, device):
    """(a, b) becomes (-b, a)."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=dtype, device=device).view(1, 1, 1, 4)
    cos, sin = torch.zeros(1, 2, device=device), torch.ones(1, 2, device=device)
    want = [-2.0, 1.0, -4.0, 3.0] if interleaved else [-3.0, -4.0, 1.0, 2.0]
    got = fused_rope.rotate(x, cos, sin, interleaved=interleaved)
    assert got.flatten().tolist() == want


HEADS = [(1, 1), (7, 1), (32, 8), (3, 5), (1, 64), (13, 0), (0, 3), (8, 2), (2, 8), (5, 1), (1, 5)]
HEADS += [(H, 1) for H in (2, 3, 6, 9, 12, 17, 33)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("S", [1, 2, 31, 257])
def test_any_head_counts_of_q_and_k(heads, S, device):
    q, k = (tensor("bshd", 3, S, H, 64, torch.bfloat16, device) for H in heads)
    cos, sin = angles(S + 3, 32, device)
    want = bits(q, cos, sin), bits(k, cos, sin)
    for got in (fused_rope.rotate_qk(q, k, cos, sin), fused_rope.rotate_qk_(q, k, cos, sin)):
        same(got[0], want[0])
        same(got[1], want[1])


@pytest.mark.parametrize("sizes", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8), (0, 0, 0, 8)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_tensors_have_empty_results_and_gradients(sizes, layout, device):
    x = tensor(layout, *sizes, torch.float32, device).requires_grad_()
    cos, sin = (t.requires_grad_() for t in angles(8, 4, device))
    y = fused_rope.rotate(x, cos, sin, layout=layout)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert not cos.grad.any() and not sin.grad.any()
    with torch.no_grad():
        same(fused_rope.rotate_(x.detach(), cos, sin, layout=layout), x)


@pytest.mark.parametrize("D", [0, 8])
def test_tables_without_columns_rotate_nothing(D, device):
    x = tensor("bshd", 2, 3, 4, D, torch.float32, device)
    nothing = torch.empty(3, 0, device=device)
    for kw in ({}, {"interleaved": True}, {"blocks": 2}):
        identical(fused_rope.rotate(x, nothing, nothing, **kw), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_PAIRING
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
def test_every_value_of_half_precision(dtype, device):
    """Conversions to float32 and back round to nearest even and keep every number."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(dtype)
    x = x.view(1, -1, 1, 2)
    for angle in ([1.0, 0.0], [0.6, 0.8]):
        cos, sin = (torch.full((x.shape[1], 1), v, device=device) for v in angle)
        same(fused_rope.rotate(x, cos, sin), bits(x, cos, sin))


def test_inverse_restores_the_input(device):
    x = tensor("bshd", 2, 5, 3, 32, torch.float64, device)
    cos, sin = angles(5, 16, device, torch.float64)
    y = fused_rope.rotate(x, cos, sin)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)
    back = fused_rope.rotate(y, cos, sin, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-14, atol=1e-14)


@EACH_DIRECTION
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tables_may_be_scaled(dtype, inverse, device):
    """YaRN and longrope scale the table: the formula holds, and the bound grows with it."""
    x = tensor("bshd", 2, 5, 3, 32, dtype, device)
    check(x, *(1.37 * t for t in angles(5, 16, device)), inverse=inverse)


@pytest.mark.parametrize(
    "sizes", [(70_001, 1, 1, 8), (1, 70_001, 1, 8), (1, 1, 70_001, 8), (3, 2, 1, 4098)], ids=str
)
def test_long_axes(sizes, device):
    x = tensor("bshd", *sizes, torch.bfloat16, device)
    cos, sin = angles(sizes[1], sizes[3] // 2, device)
    check(x, cos, sin)


def test_results_do_not_depend_on_other_tokens(device):
    """Bitwise identical for every batch and launch shape, and on every run."""
    x = tensor("bshd", 4, 301, 8, 128, torch.bfloat16, device)
    cos, sin = angles(301, 64, device)
    whole = fused_rope.rotate(x, cos, sin)
    same(fused_rope.rotate(x, cos, sin), whole)
    for b, t, h in [(0, 0, 0), (3, 300, 7), (2, 77, 3)]:
        one = x[b : b + 1, t : t + 1, h : h + 1]
        row = slice(t, t + 1)
        same(fused_rope.rotate(one, cos[row], sin[row]), whole[b, t, h].view(1, 1, 1, 128))


def test_results_do_not_depend_on_the_number_of_threads():
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


def test_equals_the_pytorch_code_of_the_docstring(device):
    """With concatenated full-width tables."""
    x = tensor("bshd", 2, 5, 3, 32, torch.float32, device)
    cos, sin = angles(5, 16, device)
    c, s = (torch.cat([t, t], -1)[None, :, None] for t in (cos, sin))
    x1, x2 = x.chunk(2, -1)
    same(fused_rope.rotate(x, cos, sin), x * c + torch.cat([-x2, x1], -1) * s)


def test_threads_do_not_share_state():
    """Concurrent calls with different tables."""

    def work(i):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(2, 33, 4, 64, generator=generator)
        cos, sin = torch.randn(2, 33, 32, generator=generator).unbind()
        return all(
            torch.equal(fused_rope.rotate(x, cos, sin), bits(x, cos, sin)) for _ in range(10)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(device):
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB")
    S, H, D = 2**16 + 3, 258, 128
    x = torch.zeros(1, S, H, D, dtype=torch.bfloat16, device=device)
    tokens = [0, 65_535, 65_536, S - 1]
    for t in tokens:
        x[0, t] = torch.randn(H, D, device=device).bfloat16()
    cos, sin = angles(S, D // 2, device)
    before = {t: x[0, t].clone() for t in tokens}
    fused_rope.rotate_(x, cos, sin)
    for t in tokens:
        want = bits(before[t][None, None], cos[t : t + 1], sin[t : t + 1])
        same(x[0, t][None, None], want)
    assert not x[0, 1].any() and not x[0, S - 2].any()


def test_pairs_of_the_oracle():
    spelled = {
        (): ([0, 1, 2, 3], [4, 5, 6, 7]),
        (("interleaved", True),): ([0, 2, 4, 6], [1, 3, 5, 7]),
        (("blocks", 2), ("rotary_offset", 3)): ([3, 4, 7, 8], [5, 6, 9, 10]),
    }
    for options, want in spelled.items():
        assert tuple(t.tolist() for t in pair_elements(4, **dict(options))) == want
