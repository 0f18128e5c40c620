"""FlashInfer's functions: ragged and per-token positions, both families of frequencies, caches."""

import gc
import math
import weakref

import pytest
import torch
from formula import close, compiles, rotate_reference, series
from fused_rope.compat import flashinfer
from oracle import DTYPES, same

HQ, HK, D = 4, 2, 48
INDPTR, OFFSETS = [0, 4, 4, 11], [0, 7, 25]
POSITIONS = [*range(4), *range(25, 32)]
ROWS = 64
# rope_scale, rope_theta; then also low_freq_factor, high_freq_factor, old_context_len
LINEAR = {"defaults": {}, "scaled": {"rope_scale": 4.0, "rope_theta": 5e5}}
LLAMA31 = {
    "defaults": {},
    "scaled": {
        "rope_scale": 2,
        "rope_theta": 1e4,
        "low_freq_factor": 2,
        "high_freq_factor": 3,
        "old_context_len": 64,
    },
}
FAMILIES = [("rope", name) for name in LINEAR] + [("llama31_rope", name) for name in LLAMA31]


def numbers(family, name):
    return (LINEAR if family == "rope" else LLAMA31)[name]


def frequencies(family, R, **given):
    """Both families written out; Llama 3.1's by wavelength, as Meta's code states it."""
    if family == "rope":
        return series(R, given.get("rope_theta", 1e4)) / given.get("rope_scale", 1)
    scale, old = given.get("rope_scale", 8), given.get("old_context_len", 8192)
    low, high = given.get("low_freq_factor", 1), given.get("high_freq_factor", 4)
    scaled = []
    for f in series(R, given.get("rope_theta", 5e5)).tolist():
        turns = old * f / (2 * math.pi)
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        scaled.append((1 - share) * f / scale + share * f)
    return torch.tensor(scaled, dtype=torch.float64)


def inputs(dtype, device):
    return [torch.randn(len(POSITIONS), H, D, device=device).to(dtype) for H in (HQ, HK)]


def positions_of(kind, itype, device):
    """The arguments that say where tokens are, in the forms of both kinds of functions."""
    values = (POSITIONS,) if kind == "_pos_ids" else (INDPTR, OFFSETS)
    return [torch.tensor(value, dtype=itype, device=device) for value in values]


def rotated(x, angle, interleave):
    cos, sin = angle.cos().to(x.device)[:, None], angle.sin().to(x.device)[:, None]
    return rotate_reference(x, cos, sin, interleaved=interleave)


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 24])
@pytest.mark.parametrize("kind", ["", "_pos_ids"])
@pytest.mark.parametrize("family, name", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(family, name, kind, rotary_dim, interleave, dtype, device):
    """In place and not are bitwise identical, and leave the right tensors alone."""
    q, k = inputs(dtype, device)
    before = q.clone(), k.clone()
    itype = torch.int32 if interleave else torch.int64
    where = positions_of(kind, itype, device)
    options = {"rotary_dim": rotary_dim, "interleave": interleave, **numbers(family, name)}
    function = getattr(flashinfer, f"apply_{family}{kind}")
    in_place = getattr(flashinfer, f"apply_{family}{kind}_inplace")
    got = function(q, k, *where, max_seq_len=ROWS, **options)
    same(q, before[0])
    same(k, before[1])
    assert in_place(q, k, *where, max_seq_len=ROWS, **options) is None
    inv_freq = frequencies(family, rotary_dim or D, **numbers(family, name))
    angle = torch.tensor(POSITIONS, dtype=torch.float64)[:, None] * inv_freq
    for x, y, out in zip(before, (q, k), got, strict=True):
        # The table is float32 for every dtype.
        close(out, rotated(x, angle, interleave), dtype=min_precision(dtype))
        same(y, out)


def min_precision(dtype):
    return torch.float32 if dtype == torch.float64 else dtype


def test_positional_arguments(device):
    """The originals' order of arguments."""
    q, k = inputs(torch.float32, device)
    pos_ids = positions_of("_pos_ids", torch.int64, device)
    by_name = {"rotary_dim": 24, "interleave": True, "rope_scale": 4.0, "rope_theta": 5e5}
    want = flashinfer.apply_rope_pos_ids(q, k, *pos_ids, **by_name)
    for got in (
        flashinfer.apply_rope(q, k, *positions_of("", torch.int64, device), *by_name.values()),
        flashinfer.apply_rope_pos_ids(q, k, *pos_ids, *by_name.values()),
    ):
        for x, y in zip(got, want, strict=True):
            same(x, y)
    factors = {"low_freq_factor": 2, "high_freq_factor": 3, "old_context_len": 64}
    want = flashinfer.apply_llama31_rope_pos_ids(q, k, *pos_ids, **by_name, **factors)
    arguments = *by_name.values(), *factors.values()
    for got in (
        flashinfer.apply_llama31_rope(q, k, *positions_of("", torch.int64, device), *arguments),
        flashinfer.apply_llama31_rope_pos_ids(q, k, *pos_ids, *arguments),
    ):
        for x, y in zip(got, want, strict=True):
            same(x, y)


def test_far_positions(device):
    """The last row of the default table, where float32 angles are off by 4e-3."""
    q, k = (torch.randn(1, H, D, device=device) for H in (HQ, HK))
    row = torch.tensor([131071], device=device)
    for got, x in zip(flashinfer.apply_rope_pos_ids(q, k, row), (q, k), strict=True):
        close(got, rotated(x, 131071.0 * series(D)[None], False))


def test_slices_of_packed_qkv(device):
    T = len(POSITIONS)
    qkv = torch.randn(T, HQ + 2 * HK, D, device=device)
    before = qkv.clone()
    q, k, _ = qkv.split([HQ, HK, HK], 1)
    want = flashinfer.apply_rope_pos_ids(q, k, *positions_of("_pos_ids", torch.int32, device))
    flashinfer.apply_rope_inplace(q, k, *positions_of("", torch.int32, device))
    same(q, want[0])
    same(k, want[1])
    same(qkv[:, -HK:], before[:, -HK:])


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cos_sin_cache(dtype, is_neox, device):
    """R < D, tables in float32, three dimensions as well as two."""
    T, cache = len(POSITIONS), torch.randn(ROWS, 32, device=device)
    positions = torch.tensor(POSITIONS, device=device)
    q, k = inputs(dtype, device)
    cos, sin = cache[positions][:, None].chunk(2, -1)
    want = [rotate_reference(x, cos, sin, interleaved=not is_neox) for x in (q, k)]
    for shape in [(T, -1), (T, -1, D)]:
        query, key = q.clone().view(shape), k.clone().view(shape)
        before = query.clone(), key.clone()
        got = flashinfer.apply_rope_with_cos_sin_cache(positions, query, key, D, cache, is_neox)
        same(query, before[0])
        same(key, before[1])
        flashinfer.apply_rope_with_cos_sin_cache_inplace(positions, query, key, D, cache, is_neox)
        for out, y, values in zip(got, (query, key), want, strict=True):
            close(out, values.view(out.shape), dtype=min_precision(dtype))
            same(y, out)


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def in_8_bits(x, factor, dtype):
    """What a cache in 8 bits stores: divided by a float32 scale, saturated, rounded to even."""
    scale = torch.tensor(1 / factor, device=x.device)
    largest = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-largest, largest).to(dtype)


class Quantized:
    """Random parts of queries and keys, of rotary width 16, and what each must become."""

    R = 16

    def __init__(self, mla, nope, dtype, device):
        T, self.factors = len(POSITIONS), (0.5, 3.0)
        self.table = torch.randn(ROWS, self.R, device=device)
        self.positions = torch.tensor(POSITIONS, device=device)
        heads = {"q": (HQ,), "k": () if mla else (HK,)}
        self.parts, self.want = [], []
        for width in (self.R, nope):
            for name, factor in zip("qk", self.factors, strict=True):
                x = torch.randn(T, *heads[name], width, device=device).bfloat16() if width else None
                self.parts.append(x)
                if x is not None and width == self.R:
                    x = x[:, None] if x.dim() == 2 else x
                    _, x = flashinfer.apply_rope_with_cos_sin_cache(
                        self.positions, x, x.clone(), self.R, self.table, is_neox=False
                    )
                    x = x.view(self.parts[-1].shape)
                self.want.append(None if x is None else in_8_bits(x, factor, dtype))


@pytest.mark.parametrize("given", [False, True], ids=["new", "given"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("nope", [0, 24])
@pytest.mark.parametrize("mla", [False, True], ids=["heads", "mla"])
def test_quantize(mla, nope, dtype, given, device):
    """All four parts, into memory of the caller or of its own."""
    case = Quantized(mla, nope, dtype, device)
    before = [x if x is None else x.clone() for x in case.parts]
    outputs = [None if x is None else torch.empty_like(x, dtype=dtype) for x in case.want]
    memory = outputs if given else [None] * 4
    arguments = *case.parts, case.table, case.positions, False, None if given else dtype
    got = flashinfer.rope_quantize_fp8(*arguments, *case.factors, *memory)
    for x, want, out, part, copy in zip(got, case.want, outputs, case.parts, before, strict=True):
        if want is None:
            assert x.numel() == 0 and x.dtype == dtype
            continue
        same(x.float(), want.float())
        same(part, copy)
        assert not given or x is out


def test_quantize_defaults(device):
    case = Quantized(True, 24, E4M3, device)
    got = flashinfer.mla_rope_quantize_fp8(*case.parts, case.table, case.positions, False)
    assert [x.dtype for x in got] == [E4M3] * 4
    same(got[2].float(), in_8_bits(case.parts[2], 1.0, E4M3).float())


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [4, 5])
@pytest.mark.parametrize("nope", [0, 24])
@pytest.mark.parametrize("mla", [False, True], ids=["heads", "mla"])
def test_append_to_pages(mla, nope, page_size, kv_layout, device):
    """Each token in its place of its sequence's pages; padding and other places are left alone."""
    case = Quantized(mla, nope, E4M3, device)
    T, D = len(POSITIONS), case.R + nope
    v = None if mla else torch.randn(T, HK, D, device=device).bfloat16()
    sequences = torch.tensor([0] * 4 + [1] * 6 + [-1], device=device)
    places = torch.tensor([*range(4), *range(3, 9), 0], device=device)
    indptr = torch.tensor([0, 1, 4], device=device, dtype=torch.int32)
    indices = torch.tensor([6, 2, 7, 3], device=device, dtype=torch.int32)
    if mla:
        caches = [torch.randn(8, page_size, width, device=device) for width in (nope, case.R)]
    else:
        sizes = (8, page_size, HK, D) if kv_layout == "NHD" else (8, HK, page_size, D)
        caches = [torch.randn(sizes, device=device) for _ in "kv"]
    caches = [cache.to(E4M3) for cache in caches]
    want = [cache.float() for cache in caches]
    key = [case.want[3], case.want[1]] if mla else [case.want[1], case.want[3]]
    for token in range(T - 1):
        page = indices[indptr[sequences[token]] + places[token] // page_size]
        place = places[token] % page_size
        for cache, part in zip(want, key, strict=True) if mla else ():
            if part is not None:
                cache[page, place] = part[token].float()
        if not mla:
            index = (page, place) if kv_layout == "NHD" else (page, slice(None), place)
            parts = [part[token].float() for part in key if part is not None]
            want[0][index] = torch.cat(parts, -1)
            want[1][index] = in_8_bits(v[token], case.factors[1], E4M3).float()
    got = flashinfer.rope_quantize_fp8_append_paged_kv_cache(
        *case.parts,
        v,
        case.table,
        case.positions,
        tuple(caches),
        indices,
        indptr,
        sequences,
        places,
        False,
        None,
        *case.factors,
        page_size,
        kv_layout,
    )
    same(got[0].float(), case.want[0].float())
    assert got[1].numel() == 0 if nope == 0 else got[1].float().equal(case.want[2].float())
    for cache, values in zip(caches, want, strict=True):
        same(cache.float(), values)


def test_append_errors():
    case = Quantized(False, 0, E4M3, "cpu")
    caches = tuple(torch.zeros(2, 8, 4, HK, case.R).to(E4M3))
    numbers = torch.arange(len(POSITIONS))
    pages = torch.arange(8), torch.tensor([0, 8]), numbers * 0, numbers
    append = flashinfer.rope_quantize_fp8_append_paged_kv_cache
    head = *case.parts, None, case.table, case.positions, caches, *pages
    with pytest.raises(ValueError, match="expected v to be a tensor"):
        append(*head, page_size=4)
    mla = Quantized(True, 0, E4M3, "cpu")
    with pytest.raises(ValueError, match="expected v to be None"):
        append(*mla.parts, case.parts[1], *head[5:], page_size=4)
    with pytest.raises(ValueError, match="kv_layout"):
        append(*case.parts, case.parts[1], *head[5:], page_size=4, kv_layout="DHN")


def test_gradients(device):
    q, k = (x.requires_grad_() for x in inputs(torch.float32, device))
    pos_ids = positions_of("_pos_ids", torch.int32, device)
    out = flashinfer.apply_rope_pos_ids(q, k, *pos_ids)
    given = [torch.randn_like(x) for x in out]
    got = torch.autograd.grad(out, (q, k), given)
    angle = -torch.tensor(POSITIONS, dtype=torch.float64)[:, None] * series(D)
    for g, x in zip(got, given, strict=True):
        close(g, rotated(x, angle, False))


def test_errors():
    q, k = inputs(torch.float32, "cpu")
    before = q.clone()
    pos_ids = torch.arange(len(POSITIONS))
    with pytest.raises(IndexError, match="8"):
        flashinfer.apply_rope_pos_ids_inplace(q, k, pos_ids, max_seq_len=8)
    with pytest.raises(ValueError, match="rotary_dim"):
        flashinfer.apply_rope_pos_ids_inplace(q, k, pos_ids, rotary_dim=7)
    with pytest.raises(ValueError):
        flashinfer.apply_rope_pos_ids_inplace(q, k, pos_ids, rotary_dim=D + 2)
    with pytest.raises(ValueError, match="positions"):
        flashinfer.apply_rope_pos_ids_inplace(q, k, pos_ids[1:])
    with pytest.raises(TypeError, match="cu_seqlens"):
        flashinfer.apply_rope_inplace(q, k, torch.tensor([0.0, 11.0]), torch.tensor([0]))
    cache = torch.randn(ROWS, D)
    with pytest.raises(ValueError, match="apply_rope_with_cos_sin_cache_inplace: expected key"):
        flashinfer.apply_rope_with_cos_sin_cache_inplace(pos_ids, q, k[..., 1:], D, cache)
    same(q, before)


@pytest.mark.parametrize(
    "error,message,options",
    [
        (TypeError, "rotary_dim to be an int, got str", {"rotary_dim": "8"}),
        (TypeError, "max_seq_len to be an int, got float", {"max_seq_len": 1e3}),
        (ValueError, "max_seq_len >= 1, got -1", {"max_seq_len": -1}),
        (ValueError, "base > 0, got 0", {"rope_theta": 0}),
        (ValueError, "factor to be a number > 0, got 0", {"rope_scale": 0}),
    ],
)
def test_wrong_options(error, message, options):
    q, k = inputs(torch.float32, "cpu")
    with pytest.raises(error, match=message):
        flashinfer.apply_rope_pos_ids(q, k, torch.arange(len(POSITIONS)), **options)


def test_few_tables_are_kept():
    """Dynamic scaling passes another theta for each length."""
    flashinfer._cache.cache_clear()
    q, k = inputs(torch.float32, "cpu")
    tables = []
    for step in range(40):
        options = {"rope_theta": 1e4 + step, "max_seq_len": ROWS}
        flashinfer.apply_rope_pos_ids(q, k, torch.arange(len(POSITIONS)), **options)
        tables.append(weakref.ref(flashinfer._cache(D, 1e4 + step, ROWS, 1).pair(None, q).cos))
    gc.collect()
    assert sum(table() is not None for table in tables) <= 16


@pytest.mark.parametrize("family", ["rope", "llama31_rope"])
def test_compiles(family):
    """Also if the first call is a compiled one."""
    flashinfer._cache.cache_clear()
    indptr, offsets = positions_of("", torch.int64, "cpu")
    q, k = inputs(torch.float32, "cpu")
    function = getattr(flashinfer, f"apply_{family}")
    compiles(lambda q, k: function(q, k, indptr, offsets, max_seq_len=ROWS), q, k)


@pytest.mark.parametrize("family", ["rope", "llama31_rope"])
def test_compiles_with_symbols(family):
    """Sizes are symbols from the first call on, and numbers once they have changed."""
    torch._dynamo.reset()
    indptr, offsets = positions_of("", torch.int64, "cpu")
    q, k = inputs(torch.float32, "cpu")

    def rotate(q, k, theta, scale):
        function = getattr(flashinfer, f"apply_{family}")
        options = {"rope_theta": theta, "rope_scale": scale, "max_seq_len": ROWS}
        return function(q, k, indptr, offsets, **options)

    compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True, dynamic=True)
    for theta, scale in ((10000, 1.0), (20000, 2.0), (500000.0, 8.0), (500000.1, 1)):
        want = rotate(q, k, theta, scale)
        for got, rotated in zip(compiled(q, k, theta, scale), want, strict=True):
            assert torch.equal(got, rotated)
