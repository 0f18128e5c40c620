"""SGLang's functions and sgl_kernel's, with and without the write into the KV cache."""

import sys
from enum import Enum
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from formula import close, compiles, rotate_reference
from fused_rope.compat import sglang
from oracle import DTYPES, same

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T, HQ, HK, D, R, M, ROWS = 7, 4, 2, 48, 32, 40, 30


class Inputs:
    """Random arguments, and what q and k must become."""

    def __init__(self, dtype=torch.float32, device="cpu", is_neox=True):
        self.q, self.k, self.v = (
            torch.randn(T, H, D, device=device).to(dtype) for H in (HQ, HK, HK)
        )
        self.table = torch.randn(M, R, device=device)
        self.positions = torch.randint(0, M, (T,), device=device)
        self.rows = torch.randperm(ROWS, device=device)[:T]
        self.rows[2] = -1  # not stored
        self.k_buffer, self.v_buffer = torch.randn(2, ROWS, HK * D, device=device).to(dtype)
        cos, sin = self.table[self.positions][:, None].chunk(2, -1)
        self.want = [
            rotate_reference(x, cos, sin, interleaved=not is_neox) for x in (self.q, self.k)
        ]

    def check(self, q, k, v_before, buffers_before=None):
        for x, want in zip((q, k), self.want, strict=True):
            close(x.view(want.shape), want)
        same(self.v, v_before)
        if buffers_before is None:
            return
        for buffer, before, written in zip(
            (self.k_buffer, self.v_buffer), buffers_before, (k, self.v), strict=True
        ):
            stored = self.rows >= 0
            before[self.rows[stored]] = written.reshape(T, -1)[stored]
            same(buffer, before)


# SGLang's class has no scales.
ARGUMENTS = {"sgl_kernel": {"k_scale": None, "v_scale": None}, "sglang": {}}


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("heads", ["[T, H*D]", "[T, H, D]"])
@pytest.mark.parametrize("kv", [None, *ARGUMENTS])
def test_sgl_kernel(kv, heads, dtype, is_neox, device):
    given = Inputs(dtype, device, is_neox)
    q, k = given.q.clone(), given.k.clone()
    if heads == "[T, H*D]":
        q, k = q.flatten(1), k.flatten(1)
    cache = kv and SimpleNamespace(
        value=given.v,
        k_buffer=given.k_buffer,
        v_buffer=given.v_buffer,
        cache_loc=given.rows,
        **ARGUMENTS[kv],
    )
    v, buffers = given.v.clone(), (given.k_buffer.clone(), given.v_buffer.clone())
    function = sglang.apply_rope_with_cos_sin_cache_inplace
    assert function(given.positions, q, k, D, given.table, is_neox, cache, False) is None
    given.check(q, k, v, buffers if kv else None)


@pytest.mark.parametrize("itype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(ROWS, HK * D), (ROWS, HK, D)], ids=str)
def test_kvcache(shape, itype, device):
    """SGLang's own function, caches with strides of a paged pool among them."""
    given = Inputs(torch.bfloat16, device)
    pool = torch.stack([given.k_buffer, given.v_buffer], 1)  # [ROWS, 2, Hk*D]
    before = [given.k_buffer.clone(), given.v_buffer.clone()]
    given.k_buffer, given.v_buffer = pool.unbind(1)
    q, k, v = given.q.clone(), given.k.clone(), given.v.clone()
    sglang.apply_rope_inplace_with_kvcache(
        q,
        k,
        given.v,
        given.k_buffer.view(shape),
        given.v_buffer.view(shape),
        given.table,
        given.positions.to(itype),
        given.rows.to(itype),
        is_neox=True,
        rope_dim=R,
    )
    given.check(q, k, v, before)


def test_rotary_part_of_heads(device):
    """SGLang passes slices [..., :R] of heads that it rotates in part."""
    given = Inputs(torch.bfloat16, device)
    q, k = given.q.clone(), given.k.clone()
    sglang.apply_rope_inplace(
        q[..., :R], k[..., :R], given.table, given.positions, is_neox=True, rope_dim=0
    )
    given.check(q, k, given.v)


def test_two_dtypes(device):
    """SGLang also passes a float16 q with a bfloat16 k."""
    given = Inputs(torch.bfloat16, device)
    q, k = given.q.clone().half(), given.k.clone()
    sglang.apply_rope_inplace(q, k, given.table, given.positions, is_neox=True)
    given.check(q, k, given.v)


def test_rotary_embedding(device):
    given = Inputs(torch.bfloat16, device)
    q, k = given.q.clone().flatten(1), given.k.clone().flatten(1)
    got = sglang.rotary_embedding(given.positions, q, k, D, given.table)
    assert got[0] is q and got[1] is k
    given.check(q, k, given.v)
    assert sglang.rotary_embedding(given.positions, q, None, D, given.table)[1] is None


def test_dataclass():
    """sgl_kernel's order of fields."""
    given = Inputs()
    arguments = given.v, given.k_buffer, given.v_buffer, None, None, given.rows
    cache = sglang.FusedSetKVBufferArg(*arguments)
    assert cache.cache_loc is given.rows and cache.v_buffer is given.v_buffer


def test_errors():
    given = Inputs()
    before = given.q.clone()
    function = sglang.apply_rope_with_cos_sin_cache_inplace
    head = given.positions, given.q, given.k, D, given.table
    with pytest.raises(ValueError, match="k_scale"):
        arguments = given.v, given.k_buffer, given.v_buffer, 0.5, None, given.rows
        function(*head, True, sglang.FusedSetKVBufferArg(*arguments))
    with pytest.raises(ValueError, match="inplace: expected query"):
        function(given.positions, given.q[..., 1:], given.k, D, given.table)
    with pytest.raises(ValueError, match="rope_dim"):
        sglang.apply_rope_inplace(
            given.q, given.k, given.table, given.positions, is_neox=True, rope_dim=D
        )
    with pytest.raises(IndexError, match=str(M)):
        function(given.positions + M, *head[1:])
    same(given.q, before)
    with pytest.raises(IndexError):
        arguments = given.v, given.k_buffer, given.v_buffer, None, None, given.rows + ROWS
        function(*head, True, sglang.FusedSetKVBufferArg(*arguments))


def test_compiles():
    given = Inputs()

    def step(q, k, k_cache, v_cache):
        q, k, k_cache, v_cache = (x.clone() for x in (q, k, k_cache, v_cache))
        sglang.apply_rope_inplace_with_kvcache(
            q, k, given.v, k_cache, v_cache, given.table, given.positions, given.rows, is_neox=True
        )
        return q, k, k_cache, v_cache

    compiles(step, given.q, given.k, given.k_buffer, given.v_buffer)


@pytest.mark.parametrize("variable", [None, "", "another", "fused_rope", "another, fused_rope"])
def test_plugin(monkeypatch, variable):
    """Only a variable that names the plugin switches SGLang; each hook replaces a function."""
    registered = {}

    class HookType(Enum):
        REPLACE = "replace"

    class HookRegistry:
        @classmethod
        def register(cls, target, hook, hook_type):
            assert hook_type is HookType.REPLACE
            registered[target] = hook

    module = ModuleType("sglang.srt.plugins.hook_registry")
    module.HookType, module.HookRegistry = HookType, HookRegistry
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    if variable is not None:
        monkeypatch.setenv("SGLANG_PLUGINS", variable)
    sglang.plugin()
    expected = sglang._REPLACEMENTS if variable and "fused_rope" in variable else ()
    assert list(registered.values()) == list(expected)
    assert all(target.startswith("sglang.kernels.ops.attention.rope.") for target in registered)


def test_entry_point():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for name, value in project["entry-points"]["sglang.srt.plugins"].items():
        assert name == "fused_rope"
        assert EntryPoint(name, value, "sglang.srt.plugins").load() is sglang.plugin
