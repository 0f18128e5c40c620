"""rotate_and_cache: what is in the caches, which tokens are stored, memory, errors, compilers."""

import fused_rope
import pytest
import torch
import torch._dynamo.testing
from fused_rope import reference
from oracle import (
    DTYPES,
    HALF,
    LAYOUTS,
    VIEWS,
    angles,
    as_bshd,
    bits,
    identical,
    quantized,
    same,
    tensor,
    view,
)
from test_reference import LAYOUT_ROWS, M, P, fallback, row_choice
from test_registration import NORM, OPTIONS, ROWS, WEIGHTS

EPS = 1e-6
EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
STORAGE = pytest.mark.parametrize("storage", ["own", *EIGHT_BITS], ids=str)
PAGES = pytest.mark.parametrize("page_size", [None, 1, 16, 17])


def filled(sizes, dtype, device="cpu"):
    """A cache whose old values have no NaN."""
    return torch.randint(0, 60, sizes, device=device).to(dtype)


def caches_of(k, v, layout, storage, page_size=None, rows=40):
    """k_cache and v_cache for these tensors."""
    dtype = k.dtype if storage == "own" else storage
    pages = () if page_size is None else (page_size,)
    rows = rows if page_size is None else -(-rows // page_size)
    heads = layout.index("h")
    return [filled((rows, *pages, x.shape[heads], x.shape[-1]), dtype, x.device) for x in (k, v)]


def scales_of(storage, Hk, device, per_head=True):
    if storage == "own":
        return {}
    sizes = (Hk,) if per_head else ()
    return {n: torch.rand(sizes, device=device) / 30 + 0.01 for n in ("k_scale", "v_scale")}


def random_slots(tokens, rows, device, dtype=torch.int64):
    """A slot of its own for each token, but none for the second one and one in five."""
    slots = torch.randperm(max(rows, tokens), device=device)[:tokens]
    slots[(slots >= rows) | (torch.arange(tokens, device=device) % 5 == 1)] = -1
    return slots.to(dtype)


def stored_in(cache, x, slots, layout, scale=None):
    """The cache after the tokens of x, rotated by the caller, are stored, one by one."""
    want = cache.clone(memory_format=torch.contiguous_format)
    rows = want.view(torch.uint8).flatten(0, -3)
    tokens = as_bshd(x, layout).flatten(0, 1)
    tokens = tokens if scale is None else quantized(tokens, scale, cache.dtype)
    tokens = tokens.contiguous().view(torch.uint8)
    for token, slot in zip(tokens, slots.flatten().tolist(), strict=True):
        if slot != -1:
            rows[slot] = token
    return want


def check(q, k, v, tables, caches, slots, *, want=None, scales=None, layout="bshd", **kw):
    """Compares q', k_out and both caches with the oracle and, on the CPU, with the reference."""
    scales = scales or {}
    inputs = [t.clone() for t in (q, k, v)]
    before = [c.clone() for c in caches]
    k_out = torch.empty_like(k)
    kw |= dict(layout=layout, **scales)
    got = fused_rope.rotate_and_cache(q, k, v, *tables, *caches, slots, **kw)
    again = [c.clone() for c in before]
    fused_rope.rotate_and_cache(q, k, v, *tables, *again, slots, k_out=k_out, **kw)
    if want is None:
        rotation = {n: o for n, o in kw.items() if n not in scales}
        want = [bits(x, *tables, **rotation) for x in (q, k)]
    same(got, want[0])
    same(k_out, want[1])
    pairs = zip(caches, again, before, (want[1], v), ("k_scale", "v_scale"), strict=True)
    for cache, other, old, x, name in pairs:
        expected = stored_in(old, x, slots, layout, scales.get(name))
        identical(cache, expected)
        identical(other, expected)
    for x, copy in zip((q, k, v), inputs, strict=True):
        same(x, copy)
    if q.device.type == "cpu":
        again = [c.clone() for c in before]
        same(reference.rotate_and_cache(q, k, v, *tables, *again, slots, **kw), got)
        for cache, other in zip(caches, again, strict=True):
            identical(other, cache)


def step(layout, dtype, device, *, S=5, heads=(3, 2), D=16, Dv=None):
    """q, k and v of two sequences, or of 2 * S packed tokens."""
    widths = (D, D, Dv or D)
    sizes = zip((heads[0], heads[1], heads[1]), widths, strict=True)
    return [tensor(layout, 2, S, H, width, dtype, device) for H, width in sizes]


@STORAGE
@PAGES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_head", [False, True], ids=["one scale", "scale per head"])
def test_values(layout, dtype, page_size, storage, per_head, device):
    q, k, v = step(layout, dtype, device)
    caches = caches_of(k, v, layout, storage, page_size)
    slots = random_slots(10, 40, device)
    slots = slots if layout == "thd" else slots.view(2, 5)
    scales = scales_of(storage, 2, device, per_head)
    check(q, k, v, angles(10, 8, device), caches, slots, scales=scales, layout=layout)


@STORAGE
@pytest.mark.parametrize("tokens", [0, 1, 2, 101])
@pytest.mark.parametrize("D,Dv", [(128, 128), (96, 64), (192, 128), (66, 1), (576, 512)])
def test_sizes(D, Dv, tokens, storage, device):
    q, k, v = (
        torch.randn(tokens, H, width, device=device).bfloat16()
        for H, width in ((5, D), (1, D), (1, Dv))
    )
    caches = caches_of(k, v, "thd", storage, 16, rows=200)
    slots = random_slots(tokens, 200, device, torch.int32)
    scales = scales_of(storage, 1, device)
    check(q, k, v, angles(101, D // 2, device), caches, slots, scales=scales, layout="thd")


@STORAGE
@pytest.mark.parametrize("sizes", [(0, 2, 8, 8), (3, 0, 8, 8), (3, 2, 0, 8), (3, 2, 8, 0)], ids=str)
def test_empty(sizes, storage, device):
    Hq, Hk, D, Dv = sizes
    q, k, v = (torch.randn(4, *s, device=device) for s in ((Hq, D), (Hk, D), (Hk, Dv)))
    caches = caches_of(k, v, "thd", storage)
    tables = angles(4, D // 2, device)
    slots = torch.tensor([5, -1, 0, 7], device=device)
    check(q, k, v, tables, caches, slots, scales=scales_of(storage, Hk, device), layout="thd")


@pytest.mark.parametrize("sizes", [(0,), (0, 4), (3, 0)], ids=str)
def test_cache_without_rows(sizes, device):
    q, k, v = step("thd", torch.bfloat16, device, D=64)
    caches = [x.new_zeros(*sizes, *x.shape[1:]) for x in (k, v)]
    slots = torch.full((10,), -1, device=device)
    tables = angles(10, 32, device)
    got = fused_rope.rotate_and_cache(q, k, v, *tables, *caches, slots, layout="thd")
    same(got, bits(q, *tables, layout="thd"))


@STORAGE
@pytest.mark.parametrize(
    "pairing",
    [
        dict(),
        dict(rotary_offset=7),
        dict(interleaved=True, rotary_offset=3),
        dict(blocks=2, inverse=True),
        dict(precision="model"),
    ],
    ids=str,
)
def test_pairs_and_spans(pairing, storage, device):
    q, k, v = step("bshd", torch.bfloat16, device, D=40)
    caches, slots = caches_of(k, v, "bshd", storage, 4), random_slots(10, 40, device).view(2, 5)
    scales = scales_of(storage, 2, device)
    check(q, k, v, angles(5, 16, device), caches, slots, scales=scales, **pairing)


@STORAGE
@pytest.mark.parametrize("layout,rows", LAYOUT_ROWS)
def test_rows(layout, rows, storage, device):
    """Positions, lengths, packed sequences and M-RoPE; a token at position -1 is stored too."""
    packed = layout == "thd"
    q, k, v = step(layout, torch.float16, device, S=3 if packed else 6, D=2 * P + 4)
    slots = random_slots(6 if packed else 12, 40, device)
    slots = slots if packed else slots.view(2, 6)
    caches, scales = caches_of(k, v, layout, storage, 16), scales_of(storage, 2, device)
    kw = dict(rotary_offset=3, **row_choice(layout, rows, device))
    check(q, k, v, angles(M, P, device), caches, slots, scales=scales, layout=layout, **kw)


@pytest.mark.parametrize("sizes", [(1, 5), (2, 5), (1, 5, 2), (2, 5, 2)], ids=str)
def test_tables_of_tokens(sizes, device):
    q, k, v = step("bshd", torch.bfloat16, device, heads=(2, 2))
    caches, slots = caches_of(k, v, "bshd", "own"), random_slots(10, 40, device).view(2, 5)
    tables = [t.view(*sizes, 8) for t in angles(torch.Size(sizes).numel(), 8, device)]
    check(q, k, v, tables, caches, slots)


@pytest.mark.parametrize("table_layout", ["tiled", "repeated"])
def test_full_width_tables(table_layout, device):
    q, k, v = step("bshd", torch.bfloat16, device)
    caches, slots = caches_of(k, v, "bshd", "own"), random_slots(10, 40, device).view(2, 5)
    tables = angles(5, 8, device)
    want = [bits(x, *tables) for x in (q, k)]
    if table_layout == "tiled":
        tables = [t.repeat(1, 2) for t in tables]
    else:
        tables = [t.repeat_interleave(2, 1) for t in tables]
    check(q, k, v, tables, caches, slots, want=want, table_layout=table_layout)


@STORAGE
@pytest.mark.parametrize("name", VIEWS)
def test_strides_of_inputs(name, storage, device):
    q, k, v = (view(name, torch.bfloat16, device) for _ in range(3))
    caches, slots = caches_of(k, v, "bshd", storage, 16), random_slots(10, 40, device).view(2, 5)
    scales = scales_of(storage, 4, device)
    check(q, k, v, angles(5, 8, device), caches, slots, scales=scales)


def halves_of(both, dim, Dv):
    k_cache, v_cache = both.unbind(dim)
    return k_cache, v_cache[..., :Dv]


# Two caches [5, 8, 2, D], from D of each and a function that draws dense ones.
CACHE_VIEWS = {
    "heads before places": lambda r, D, E: [r(5, 2, 8, n).transpose(1, 2) for n in (D, E)],
    "places before pages": lambda r, D, E: [r(8, 5, 2, n).transpose(0, 1) for n in (D, E)],
    "elements outermost": lambda r, D, E: [r(n, 5, 8, 2).permute(1, 2, 3, 0) for n in (D, E)],
    "one head": lambda r, D, E: r(5, 8, 2, D + E).split((D, E), -1),
    "one page": lambda r, D, E: halves_of(r(5, 2, 8, 2, D), 1, E),
    "one tensor": lambda r, D, E: halves_of(r(2, 5, 8, 2, D), 0, E),
    "every second page": lambda r, D, E: [r(10, 8, 2, n)[::2] for n in (D, E)],
    "every second element": lambda r, D, E: [r(5, 8, 2, 2 * n)[..., ::2] for n in (D, E)],
    "odd pitch": lambda r, D, E: [r(5, 8, 2, n + 1)[..., 1:] for n in (D, E)],
}


@STORAGE
@pytest.mark.parametrize("name", CACHE_VIEWS)
@pytest.mark.parametrize("Dv", [16, 12])
def test_strides_of_caches(name, Dv, storage, device):
    q, k, v = step("bshd", torch.bfloat16, device, Dv=Dv)
    dtype = torch.bfloat16 if storage == "own" else storage
    caches = CACHE_VIEWS[name](lambda *sizes: filled(sizes, dtype, device), 16, Dv)
    slots, scales = random_slots(10, 40, device).view(2, 5), scales_of(storage, 2, device)
    check(q, k, v, angles(5, 8, device), caches, slots, scales=scales)


def test_outputs(device):
    """q_out is returned, of any strides; without v, k alone is stored."""
    q, k, _ = step("bshd", torch.bfloat16, device)
    cos, sin = angles(5, 8, device)
    cache, slots = filled((40, 2, 16), q.dtype, device), random_slots(10, 40, device).view(2, 5)
    q_out = torch.zeros(2, 5, 16, 3, dtype=q.dtype, device=device).transpose(2, 3)
    k_out = torch.zeros(2, 5, 2, 20, dtype=q.dtype, device=device)
    want = stored_in(cache, bits(k, cos, sin), slots, "bshd")
    got = fused_rope.rotate_and_cache(
        q, k, None, cos, sin, cache, None, slots, q_out=q_out, k_out=k_out[..., 2:18]
    )
    assert got is q_out
    same(q_out, bits(q, cos, sin))
    same(k_out[..., 2:18], bits(k, cos, sin))
    assert (k_out[..., :2] == 0).all() and (k_out[..., 18:] == 0).all()
    identical(cache, want)


@pytest.mark.parametrize("name", VIEWS)
def test_strides_of_the_result(name, device):
    q = view(name, torch.bfloat16, device)
    cache, slots = filled((10, 4, 16), q.dtype, device), torch.arange(10, device=device).view(2, 5)
    tables = angles(5, 8, device)
    got = fused_rope.rotate_and_cache(q, q, None, *tables, cache, None, slots)
    assert got.stride() == fused_rope.rotate(q, *tables).stride()


@STORAGE
@pytest.mark.parametrize("cast", ["never", "before", "after"])
@pytest.mark.parametrize("after", [False, True], ids=["norm first", "norm last"])
@pytest.mark.parametrize("weights", ["both", "q", "none"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_norm(layout, weights, after, cast, storage, device):
    q, k, v = step(layout, torch.bfloat16, device, D=34)
    tables = angles(30, 16, device)
    of_q, of_k = (1 + torch.randn(2, 34, device=device).bfloat16() / 8).unbind()
    kw = dict(eps=EPS, cast=cast, after=after, zero_centered=weights == "q", rotary_offset=1)
    kw |= dict(layout=layout, offset=torch.tensor([3, 20], device=device))
    if weights != "none":
        kw |= dict(q_weight=of_q, k_weight=of_k if weights == "both" else None)
    want = fused_rope.norm_rotate_qk(q, k, *tables, **kw)
    caches, slots = caches_of(k, v, layout, storage), random_slots(10, 40, device).view(2, 5)
    check(q, k, v, tables, caches, slots, want=want, scales=scales_of(storage, 2, device), **kw)


@pytest.mark.parametrize("storage", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0**-9, 0.3, 7e-6, 300.0])
def test_every_value(scale, dtype, storage, device):
    """NaN, infinities, subnormals, halves between two numbers, and all the rest."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1, 64)
    x = x.to(device)
    tables = [torch.ones(1024, 32, device=device), torch.zeros(1024, 32, device=device)]
    caches = [filled((1024, 1, 64), storage, device) for _ in range(2)]
    slots, one = torch.arange(1024, device=device), torch.tensor(scale, device=device)
    kw = dict(layout="thd", k_scale=one, v_scale=one)
    fused_rope.rotate_and_cache(x, torch.zeros_like(x), x, *tables, *caches, slots, **kw)
    identical(caches[1], quantized(x, one, storage))


def test_saturation(device):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, -nan, inf, -inf, 1e38, -1e38, 0.5, 1.5, -2.5, 448.0, 464.0, 464.1])
    x = x.to(device).view(1, 1, 12)
    want = {
        torch.float8_e4m3fn: [nan, nan, 448, -448, 448, -448, 0.5, 1.5, -2.5, 448, 448, 448],
        torch.float8_e5m2: [nan, nan, 57344, -57344, 57344, -57344, 0.5, 1.5, -2.5, 448, 448, 448],
        torch.int8: [0, 0, 127, -128, 127, -128, 0, 2, -2, 127, 127, 127],
    }
    one = torch.tensor(1.0, device=device)
    tables, slots = angles(1, 6, device), torch.zeros(1, dtype=torch.int32, device=device)
    for dtype, values in want.items():
        caches = [filled((1, 1, 12), dtype, device) for _ in range(2)]
        kw = dict(layout="thd", k_scale=one, v_scale=one)
        fused_rope.rotate_and_cache(x, x, x, *tables, *caches, slots, **kw)
        same(caches[1].float().cpu().flatten(), torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("form", ["every second", "transposed", "one sequence", "none"])
def test_slots(form, dtype, device):
    """Strides of slots, [1, T] for packed tokens, and no token stored."""
    layout = "thd" if form == "one sequence" else "bshd"
    q, k, v = step(layout, torch.bfloat16, device)
    slots = random_slots(10, 40, device, dtype)
    slots = {
        "every second": lambda: slots.repeat_interleave(2)[::2].view(2, 5),
        "transposed": lambda: slots.view(5, 2).t(),
        "one sequence": lambda: slots[None],
        "none": lambda: torch.full((2, 5), -1, dtype=dtype, device=device),
    }[form]()
    caches = caches_of(k, v, layout, "own", 7)
    check(q, k, v, angles(10, 8, device), caches, slots, layout=layout)


def test_long_offsets():
    """An element beyond 2^31 of a cache whose other pages are never touched."""
    pages = 2**25 + 3
    caches = [torch.empty(pages, 1, 1, 64, dtype=torch.int8) for _ in range(2)]
    q, k, v = (torch.randn(2, 1, 64) for _ in range(3))
    one, slots = torch.tensor(0.02), torch.tensor([pages - 1, 1])
    tables = angles(2, 32)
    kw = dict(layout="thd", k_scale=one, v_scale=one)
    fused_rope.rotate_and_cache(q, k, v, *tables, *caches, slots, **kw)
    for cache, x in zip(caches, (bits(k, *tables, layout="thd"), v), strict=True):
        identical(cache[slots, 0], quantized(x, one, torch.int8))


# --- errors ------------------------------------------------------------------------------------


def arguments(device="cpu", storage=None, **changes):
    """A valid call by keywords, with changes."""
    q, k, v = step("bshd", torch.bfloat16, device)
    cos, sin = angles(5, 8, device)
    k_cache, v_cache = caches_of(k, v, "bshd", storage or "own", 4)
    slots = torch.arange(10, device=device).view(2, 5)
    kw = dict(q=q, k=k, v=v, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache, slots=slots)
    kw |= scales_of(storage or "own", 2, device)
    return {n: changes[n](kw.get(n)) if n in changes else x for n, x in kw.items()} | {
        n: change(None) for n, change in changes.items() if n not in kw
    }


def to(value):
    return lambda _: value


V, T, E4M3 = ValueError, TypeError, torch.float8_e4m3fn
MISTAKES = {
    "v without a cache": (V, "v_cache with v", dict(v_cache=to(None))),
    "a cache without v": (V, "no v_cache without v", dict(v=to(None))),
    "a scale without v": (
        V,
        "no v_scale",
        dict(v=to(None), v_cache=to(None), v_scale=to(torch.ones(()))),
    ),
    "v of another dtype": (T, "v of q's dtype", dict(v=lambda v: v.float())),
    "v of another rank": (V, "v of 4 dimensions", dict(v=lambda v: v[0])),
    "v of other tokens": (V, "v with k's", dict(v=lambda v: v[:, :4])),
    "v of other heads": (V, "v with k's", dict(v=lambda v: v[:, :, :1])),
    "cache of another dtype": (T, "k_cache of k's dtype", dict(k_cache=lambda c: c.half())),
    "cache of integers": (T, "k_cache of k's dtype", dict(k_cache=lambda c: c.to(torch.uint8))),
    "caches of two dtypes": (T, "v_cache of k_cache's dtype", dict(v_cache=lambda c: c.to(E4M3))),
    "cache of rank 2": (V, "k_cache of shape", dict(k_cache=lambda c: c[0, 0])),
    "cache of rank 5": (V, "k_cache of shape", dict(k_cache=lambda c: c[None])),
    "caches of two ranks": (V, "v_cache of shape", dict(v_cache=lambda c: c.flatten(0, 1))),
    "cache of other heads": (V, "k_cache of shape", dict(k_cache=lambda c: c[:, :, :1])),
    "cache of another width": (V, "v_cache of shape", dict(v_cache=lambda c: c[..., :8])),
    "heads before places": (
        V,
        "k_cache of shape .* transpose",
        dict(k_cache=lambda c: c.transpose(1, 2)),
    ),
    "caches of two sizes": (V, "v_cache with k_cache's pages", dict(v_cache=lambda c: c[1:])),
    "cache elsewhere": (V, "k_cache on device", dict(k_cache=lambda c: c.to("meta"))),
    "slots of floats": (T, "slots of dtype", dict(slots=lambda s: s.float())),
    "slots of another shape": (V, "slots of shape", dict(slots=lambda s: s[:, :4])),
    "slots in one dimension": (V, "slots of shape", dict(slots=lambda s: s.flatten())),
    "slots elsewhere": (V, "slots on device", dict(slots=lambda s: s.to("meta"))),
    "scale of k": (V, "no k_scale", dict(k_scale=to(torch.ones(())))),
    "scale of v": (V, "no v_scale", dict(v_scale=to(torch.ones(2)))),
    "q_out of another dtype": (T, "q_out of dtype", dict(q_out=to(torch.empty(2, 5, 3, 16)))),
    "q_out of another shape": (
        V,
        "q_out of shape",
        dict(q_out=to(torch.empty(2, 5, 2, 16, dtype=torch.bfloat16))),
    ),
    "k_out of another shape": (
        V,
        "k_out of shape",
        dict(k_out=to(torch.empty(2, 5, 3, 16, dtype=torch.bfloat16))),
    ),
    "weight without eps": (V, "eps with k_weight", dict(k_weight=to(torch.ones(16)))),
    "cast without eps": (V, "eps with cast", dict(cast=to("before"))),
    "order without eps": (V, "eps with after", dict(after=to(True))),
    "factors without eps": (V, "eps with zero_centered", dict(zero_centered=to(True))),
    "negative eps": (V, "a finite eps", dict(eps=to(-1.0))),
    "weight of another length": (
        V,
        "q_weight",
        dict(eps=to(EPS), q_weight=to(torch.ones(15))),
    ),
    "short table": (V, "cos has .* rows, but offset .* are needed", dict(offset=to(1))),
    "not a tensor": (T, "slots to be a Tensor", dict(slots=to([1, 2]))),
}
EIGHT_BIT_MISTAKES = {
    "no scale of k": (V, "k_scale with k_cache", dict(k_scale=to(None))),
    "no scale of v": (V, "v_scale with v_cache", dict(v_scale=to(None))),
    "scale of float64": (T, "k_scale of dtype float32", dict(k_scale=lambda s: s.double())),
    "scale of other heads": (V, "v_scale of shape", dict(v_scale=lambda s: s[:1])),
    "scale of rank 2": (V, "v_scale of shape", dict(v_scale=lambda s: s[None])),
    "scale elsewhere": (V, "k_scale on device", dict(k_scale=lambda s: s.to("meta"))),
}
ALL_MISTAKES = {n: (None, *m) for n, m in MISTAKES.items()}
ALL_MISTAKES |= {n: (E4M3, *m) for n, m in EIGHT_BIT_MISTAKES.items()}


@pytest.mark.parametrize("storage,kind,word,changes", ALL_MISTAKES.values(), ids=ALL_MISTAKES)
def test_errors(storage, kind, word, changes, device):
    fused_rope.rotate_and_cache(**arguments(device, storage))
    kw = arguments(device, storage, **changes)
    written = {n: kw[n] for n in ("k_cache", "v_cache") if kw[n] is not None and not kw[n].is_meta}
    before = {n: cache.clone() for n, cache in written.items()}
    for name, x in kw.items():
        if isinstance(x, torch.Tensor) and not x.is_meta:
            kw[name] = x.to(device)
    with pytest.raises(kind, match=f"rotate_and_cache: (expected )?{word}"):
        fused_rope.rotate_and_cache(**kw)
    for name, copy in before.items():
        identical(written[name], copy)


@pytest.mark.parametrize("bad", [40, -2, 2**40, -(2**62)])
@pytest.mark.parametrize("page_size", [None, 8])
@STORAGE
def test_slots_outside_the_cache(bad, page_size, storage):
    q, k, v = step("bshd", torch.bfloat16, "cpu")
    caches = caches_of(k, v, "bshd", storage, page_size)
    before = [c.clone() for c in caches]
    slots = torch.arange(10).view(2, 5)
    slots[1, 2] = bad
    scales, tables = scales_of(storage, 2, "cpu"), angles(5, 8)
    q_out = torch.zeros_like(q)
    with pytest.raises(IndexError, match=rf"expected slots in \[-1, 40\), got {bad} at b=1, s=2"):
        fused_rope.rotate_and_cache(q, k, v, *tables, *caches, slots, q_out=q_out, **scales)
    for cache, copy in zip(caches, before, strict=True):
        identical(cache, copy)
    assert (q_out == 0).all()
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        reference.rotate_and_cache(q, k, v, *tables, *caches, slots, **scales)


def test_rows_outside_the_table():
    kw = arguments(positions=to(torch.tensor([0, 1, 2, 3, 5])))
    before = kw["k_cache"].clone()
    with pytest.raises(IndexError, match="rotate_and_cache: expected positions"):
        fused_rope.rotate_and_cache(**kw)
    identical(kw["k_cache"], before)


GRADIENTS = ["q", "k", "v", "cos", "sin", "k_cache", "v_cache", "q_out", "k_out", "k_weight"]


@pytest.mark.parametrize("name", GRADIENTS)
def test_autograd_is_refused(name, device):
    kw = arguments(device)
    kw |= dict(q_out=torch.empty_like(kw["q"]), k_out=torch.empty_like(kw["k"]), eps=EPS)
    kw["k_weight"] = torch.ones(16, device=device)
    kw[name] = kw[name].clone().requires_grad_()
    before = kw["k_cache"].clone()
    with pytest.raises(RuntimeError, match=f"does not support autograd, but {name} requires grad"):
        fused_rope.rotate_and_cache(**kw)
    identical(kw["k_cache"].detach(), before)
    with torch.no_grad():
        assert not fused_rope.rotate_and_cache(**kw).requires_grad or name == "q_out"


def test_versions(device):
    written = ("k_cache", "v_cache", "q_out", "k_out")
    kw = arguments(device)
    kw |= dict(q_out=torch.empty_like(kw["q"]), k_out=torch.empty_like(kw["k"]))
    versions = {n: x._version for n, x in kw.items()}
    fused_rope.rotate_and_cache(**kw)
    assert {n: x._version - versions[n] for n, x in kw.items()} == {
        n: int(n in written) for n in kw
    }


OVERLAPS = {
    "k_cache and v_cache": lambda kw: dict(v_cache=kw["k_cache"]),
    "k_cache and k": lambda kw: dict(k=kw["k_cache"].flatten(0, 1)[:10].view(2, 5, 2, 16)),
    "v_cache and v": lambda kw: dict(v=kw["v_cache"].flatten(0, 1)[:10].view(2, 5, 2, 16)),
    "q_out and q": lambda kw: dict(q_out=kw["q"]),
    "k_out and k": lambda kw: dict(k_out=kw["k"]),
    "k_out and v": lambda kw: dict(k_out=kw["v"]),
    "q_out and v": lambda kw: dict(
        q=kw["k"], k=kw["k"].clone(), q_out=kw["v"], cos=kw["cos"], sin=kw["sin"]
    ),
    "k_cache and k_out": lambda kw: dict(k_out=kw["k_cache"].flatten(0, 1)[:10].view(2, 5, 2, 16)),
}


@pytest.mark.parametrize("change", OVERLAPS.values(), ids=OVERLAPS)
def test_overlap_is_refused(change, device):
    kw = arguments(device)
    kw |= change(kw)
    before = kw["k_cache"].clone()
    with pytest.raises(RuntimeError, match="share memory"):
        fused_rope.rotate_and_cache(**kw)
    identical(kw["k_cache"], before)


def test_caches_that_cannot_be_written(device):
    with pytest.raises(RuntimeError, match="k_cache without elements that share memory"):
        kw = arguments(device, k_cache=lambda c: c[:1].expand(c.shape))
        fused_rope.rotate_and_cache(**kw)
    with torch.inference_mode():
        inference = arguments(device)
    with pytest.raises(RuntimeError, match="not to be an inference tensor"):
        fused_rope.rotate_and_cache(**inference)
    with torch.inference_mode():
        fused_rope.rotate_and_cache(**inference)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nested", "jagged", "sparse", "quantized"])
@pytest.mark.parametrize("name", ["q", "k"])
def test_tensors_without_strides_are_refused(name, kind):
    make = {
        "nested": lambda x: torch.nested.nested_tensor(list(x)),
        "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
        "sparse": lambda x: x.to_sparse(),
        "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
    }[kind]
    with pytest.raises(TypeError, match="rotate_and_cache: expected"):
        fused_rope.rotate_and_cache(**arguments(**{name: make}))


@pytest.mark.parametrize("keyword", ["out", "out_rows"])
def test_there_is_no_out(keyword, device):
    with pytest.raises(TypeError, match=keyword):
        fused_rope.rotate_and_cache(**arguments(device), **{keyword: None})


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.functionalize])
def test_torch_func_is_refused(transform, device):
    kw = arguments(device)
    q = kw.pop("q")
    with pytest.raises(RuntimeError, match=r"rotate_and_cache: expected no torch.func transform"):
        transform(lambda q: fused_rope.rotate_and_cache(q, **kw).sum())(q)


# --- dispatch ----------------------------------------------------------------------------------


def test_registration():
    schema = (
        "fused_rope::rotate_and_cache(Tensor q, Tensor k, Tensor? v, Tensor cos, Tensor sin, "
        "Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor slots, Tensor(c!) q_out, "
        "Tensor(d!)? k_out=None, Tensor? k_scale=None, Tensor? v_scale=None, "
        f"{WEIGHTS[2]}, {ROWS}, {OPTIONS}, {NORM.replace('float eps', 'float? eps=None')}) -> ()"
    )
    operator = torch.ops.fused_rope.rotate_and_cache.default
    assert operator._schema == torch._C.parse_schema(schema)
    assert torch.Tag.pt2_compliant_tag in operator.tags
    has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    for key in ("CPU", "CUDA", "XPU", "Meta", "AutogradCPU", "ADInplaceOrView"):
        assert has("fused_rope::rotate_and_cache", key), key


@STORAGE
@pytest.mark.parametrize("form", ["plain", "norm", "k alone", "outputs"])
def test_opcheck(form, storage, device):
    kw = arguments(device, None if storage == "own" else storage)
    kw["q_out"] = torch.empty_like(kw["q"])
    if form == "norm":
        kw |= dict(eps=EPS, q_weight=torch.ones(16, device=device), after=True)
    elif form == "k alone":
        kw |= dict(v=None, v_cache=None)
        kw.pop("v_scale", None)
    elif form == "outputs":
        kw |= dict(k_out=torch.empty_like(kw["k"]), offset=0, positions=kw["slots"] % 5)
    tensors = [kw.pop(n) for n in ("q", "k", "v", "cos", "sin", "k_cache", "v_cache", "slots")]
    op = torch.ops.fused_rope.rotate_and_cache.default
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if storage not in (torch.float8_e4m3fn, torch.float8_e5m2):
        tests.append("test_schema")  # it computes with the tensors of a call
    torch.library.opcheck(op, (*tensors, kw.pop("q_out")), kw, test_utils=tests)


# How a model has its caches: as the tensors of the call, or as views made in the graph.
IN_GRAPH = {
    "as given": lambda c: c,
    "transposed": lambda c: c.transpose(1, 2).contiguous(),
    "half of a tensor": lambda c: torch.stack([c, c], 1),
    "one of two layers": lambda c: torch.stack([c, c]),
    "flat": lambda c: c.clone(),
}
OF_GRAPH = {
    "as given": lambda c: c,
    "transposed": lambda c: c.transpose(1, 2),
    "half of a tensor": lambda c: c[:, 1],
    "one of two layers": lambda c: c[1],
    "flat": lambda c: c.flatten(0, 1),
}


COMPILED = [("aot_eager", d, s) for d in (None, True) for s in ("own", E4M3)]
COMPILED += [("inductor", True, "own"), ("inductor", None, E4M3)]


@pytest.mark.parametrize("name", OF_GRAPH)
@pytest.mark.parametrize("backend,dynamic,storage", COMPILED)
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled(name, backend, dynamic, storage, device):
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    def layer(q, k, v, k_cache, v_cache, slots, cos, sin, scales):
        caches = OF_GRAPH[name](k_cache), OF_GRAPH[name](v_cache)
        q = fused_rope.rotate_and_cache(q * 2, k, v + 1, cos, sin, *caches, slots, **scales)
        return q + 1, caches[0].float().sum()

    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=dynamic)
    tables, scales = angles(20, 8, device), scales_of(storage, 2, device)
    for S in (5, 9, 17):
        q, k, v = step("bshd", torch.bfloat16, device, S=S)
        slots = random_slots(2 * S, 40, device).view(2, S)
        caches = [IN_GRAPH[name](c) for c in caches_of(k, v, "bshd", storage, 8)]
        again = [c.clone() for c in caches]
        got = compiled(q, k, v, *caches, slots, *tables, scales)
        want = layer(q, k, v, *again, slots, *tables, scales)
        same(got[0], want[0])
        torch.testing.assert_close(got[1], want[1])
        for a, b in zip(caches, again, strict=True):
            identical(a, b)
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_dynamo")
def test_exported(device):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, k_cache, v_cache, slots, cos, sin):
            return fused_rope.rotate_and_cache(q, k, v, cos, sin, k_cache, v_cache, slots)

    def inputs(S):
        q, k, v = step("bshd", torch.bfloat16, device, S=S)
        slots = random_slots(2 * S, 40, device).view(2, S)
        return [q, k, v, *caches_of(k, v, "bshd", "own"), slots, *angles(20, 8, device)]

    S = torch.export.Dim("S", min=2, max=16)
    dims = [{1: S}, {1: S}, {1: S}, {}, {}, {1: S}, {}, {}]
    program = torch.export.export(Layer(), tuple(inputs(5)), dynamic_shapes=dims)
    for length in (4, 9):
        given = inputs(length)
        again = [x.clone() for x in given]
        same(program.module()(*given), Layer()(*again))
        for a, b in zip(given, again, strict=True):
            same(a, b)


def test_fallback():
    q, k, v = step("bhsd", torch.bfloat16, "cpu")
    tables, slots = angles(9, 8), random_slots(10, 40, "cpu").view(2, 5)
    caches = caches_of(k, v, "bhsd", E4M3, 8)
    again = [c.clone() for c in caches]
    scales = scales_of(E4M3, 2, "cpu")
    lengths = torch.tensor([4, 0])
    kw = dict(layout="bhsd", eps=EPS, after=True, **scales)
    want = fused_rope.rotate_and_cache(q, k, v, *tables, *caches, slots, offset=lengths, **kw)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    arguments = (q, k, v, *tables, *again, slots, q_out)
    fallback("rotate_and_cache", *arguments, k_out=k_out, offsets=lengths, **kw)
    same(q_out, want)
    for cache, other in zip(caches, again, strict=True):
        identical(other, cache)
    with pytest.raises(ValueError, match="expected eps"):
        fallback("rotate_and_cache", *arguments, after=True, **scales)


def test_no_tensor_of_its_own_is_returned_on_meta():
    kw = {n: x.to("meta") for n, x in arguments().items()}
    assert fused_rope.rotate_and_cache(**kw).is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@STORAGE
def test_cuda_graph(storage):
    q, k, v = step("thd", torch.bfloat16, "cuda", S=32, heads=(8, 2), D=128)
    tables, scales = angles(64, 64, "cuda"), scales_of(storage, 2, "cuda")
    caches = caches_of(k, v, "thd", storage, 16, rows=200)
    slots, positions = random_slots(64, 200, "cuda"), torch.randint(0, 64, (64,), device="cuda")
    kw = dict(layout="thd", positions=positions, **scales)
    static = [c.clone() for c in caches]
    graph = torch.cuda.CUDAGraph()
    fused_rope.rotate_and_cache(q, k, v, *tables, *[c.clone() for c in caches], slots, **kw)
    with torch.cuda.graph(graph):
        rotated = fused_rope.rotate_and_cache(q, k, v, *tables, *static, slots, **kw)
    for _ in range(2):
        slots.copy_(random_slots(64, 200, "cuda"))
        positions.copy_(torch.randint(0, 64, (64,)))
        graph.replay()
        same(rotated, fused_rope.rotate_and_cache(q, k, v, *tables, *caches, slots, **kw))
        for cache, other in zip(caches, static, strict=True):
            identical(other, cache)
