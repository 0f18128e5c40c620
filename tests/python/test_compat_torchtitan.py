"""torchtitan's functions: both caches, all shapes of them, bits, gradients; and the binding."""

import dataclasses
import sys
from types import ModuleType

import pytest
import torch
from formula import close, compiles, gradients, rotate_reference, series
from fused_rope.compat import torchtitan
from fused_rope.compat.torchtitan import apply_rotary_emb
from oracle import DTYPES, bits, same

B, S, HQ, HK, D, M = 2, 7, 4, 2, 32, 11


def caches(device="cpu"):
    """[M, P], the angles; and the two caches of the original, [M, P] complex and [M, 2D]."""
    angle = (torch.arange(M, dtype=torch.float64)[:, None] * series(D)).float().to(device)
    twice = angle.repeat(1, 2)
    real = torch.cat([twice.cos(), twice.sin()], -1)
    return angle, {"complex": torch.polar(torch.ones_like(angle), angle), "real": real}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["complex", "real"])
@pytest.mark.parametrize("packed", [False, True])
def test_values(packed, kind, dtype, device):
    angle, cache = caches(device)
    cache = cache[kind]
    shape = (S,) if packed else (B, S)
    q, k = (torch.randn(*shape, H, D, device=device).to(dtype) for H in (HQ, HK))
    position = torch.randint(0, M, shape, device=device)
    per_token = cache[position].unsqueeze(-2)
    cos, sin = angle.cos(), angle.sin()
    if kind == "complex":
        cos, sin = cache.real, cache.imag
    options = dict(layout="thd" if packed else "bshd", interleaved=kind == "complex")
    for table, positions, row in [
        (per_token, None, position),
        (cache, position, position),
        (cache, None, None),
        (cache[:S].unsqueeze(-2) if packed else cache[None, :S, None], None, None),
    ]:
        got = apply_rotary_emb(q, k, table, positions)
        for y, x in zip(got, (q, k), strict=True):
            same(y, bits(x, cos, sin, positions=row, **options))
    got = apply_rotary_emb(q, k, cache, position, precision="model")
    same(got[0], bits(q, cos, sin, positions=position, precision="model", **options))
    a = angle[position].unsqueeze(-2).double()
    wide = torch.float32 if dtype == torch.float64 else None  # caches are float32
    given, got = gradients(lambda q, k: apply_rotary_emb(q, k, per_token), q, k)
    for back, g in zip(got, given, strict=True):
        want = rotate_reference(g, a.cos(), -a.sin(), interleaved=kind == "complex")
        close(back, want, dtype=wide, ulps=8)


def test_errors():
    _, cache = caches()
    q = torch.randn(S, HQ, D)
    with pytest.raises(ValueError, match="2\\*D=64"):
        apply_rotary_emb(q, q, cache["real"][:, :-1])
    with pytest.raises(ValueError, match="rope_cache"):
        apply_rotary_emb(q, q, cache["real"][None, :S, None])
    with pytest.raises(IndexError, match=str(M)):
        apply_rotary_emb(q, q, cache["complex"], torch.full((S,), M))


def test_compiles():
    _, cache = caches()
    q, k = torch.randn(S, HQ, D), torch.randn(S, HK, D)
    for table in cache.values():
        compiles(apply_rotary_emb, q, k, table[:S].unsqueeze(-2))


@pytest.fixture
def rope(monkeypatch):
    """The original's module of rotary modules, or one with classes of the same names."""
    name = "torchtitan.models.common.rope"
    module = ModuleType(name)
    for kind in ("ComplexRoPE", "CosSinRoPE"):
        original = staticmethod(lambda query, key, rope_cache: (query, key))
        setattr(module, kind, type(kind, (), {"apply_rotary_emb": original, "__module__": name}))
    for parent in ("torchtitan", "torchtitan.models", "torchtitan.models.common"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    yield module
    torchtitan.unpatch()


def test_patch(rope):
    _, cache = caches()
    q = torch.randn(S, HQ, D)

    class MRoPE(rope.CosSinRoPE):
        pass

    names = torchtitan.patch()
    assert names == torchtitan.patch()
    assert names[0] == "torchtitan.models.common.rope.ComplexRoPE.apply_rotary_emb"
    tables = cache["complex"][:S, None], cache["real"][:S, None]
    for module, table in zip((rope.ComplexRoPE, MRoPE), tables, strict=True):
        same(module().apply_rotary_emb(q, q, table)[0], apply_rotary_emb(q, q, table)[0])
    torchtitan.unpatch()
    assert MRoPE().apply_rotary_emb(q, q, tables[1])[0] is q


def test_patch_leaves_what_other_code_bound(rope):
    torchtitan.patch()
    theirs = staticmethod(lambda query, key, rope_cache: (key, query))
    rope.ComplexRoPE.apply_rotary_emb = theirs
    assert torchtitan.patch() == ["torchtitan.models.common.rope.CosSinRoPE.apply_rotary_emb"]
    torchtitan.unpatch()
    assert vars(rope.ComplexRoPE)["apply_rotary_emb"] is theirs
    assert rope.CosSinRoPE.apply_rotary_emb is not apply_rotary_emb


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_original(dtype):
    """Bitwise on the CPU, forward and backward, through its modules."""
    original = pytest.importorskip("torchtitan.models.common.rope", exc_type=ImportError)
    fields = {field.name for field in dataclasses.fields(original.RoPE.Config)}
    packed = "max_context_length" in fields  # later than 0.3.0
    shape = (S,) if packed else (B, S)
    rows = {"max_context_length" if packed else "max_seq_len": M}
    position = torch.randint(0, M, shape)
    for kind in (original.ComplexRoPE, original.CosSinRoPE):
        module = kind.Config(dim=D, **rows).build()
        q, k = (torch.randn(*shape, H, D, dtype=dtype, requires_grad=True) for H in (HQ, HK))
        want = module(q, k, position)
        grads = [torch.randn_like(x) for x in want]
        want += torch.autograd.grad(want, (q, k), grads)
        torchtitan.patch()
        try:
            got = module(q, k, position)
            got += torch.autograd.grad(got, (q, k), grads)
        finally:
            torchtitan.unpatch()
        for x, y in zip(got, want, strict=True):
            same(x, y)


def test_original_override():
    """Its override mechanism finds ours by name, and the built module uses the operator."""
    original = pytest.importorskip("torchtitan.models.common.rope", exc_type=ImportError)
    config = pytest.importorskip("torchtitan.config", exc_type=ImportError)

    @dataclasses.dataclass(kw_only=True)
    class Config(config.Configurable.Config):
        rope: original.RoPE.Config

    fields = {field.name for field in dataclasses.fields(original.RoPE.Config)}
    rows = {"max_context_length" if "max_context_length" in fields else "max_seq_len": M}
    root = Config(rope=original.CosSinRoPE.Config(dim=D, **rows))
    imports = ["fused_rope.compat.torchtitan.override"]
    try:
        lines = config.apply_overrides(config.OverrideConfig(imports=imports), root)
        assert len(lines) == 1 and root.rope.build().apply_rotary_emb is apply_rotary_emb
    finally:
        torchtitan.unpatch()
