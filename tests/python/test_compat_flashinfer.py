"""FlashInfer's functions: ragged and per-token positions, both families of frequencies, caches."""

import math

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


@pytest.mark.parametrize("family", ["rope", "llama31_rope"])
def test_compiles(family):
    """Also if the first call is a compiled one."""
    flashinfer._cache.cache_clear()
    indptr, offsets = positions_of("", torch.int64, "cpu")
    q, k = inputs(torch.float32, "cpu")
    function = getattr(flashinfer, f"apply_{family}")
    compiles(lambda q, k: function(q, k, indptr, offsets, max_seq_len=ROWS), q, k)
