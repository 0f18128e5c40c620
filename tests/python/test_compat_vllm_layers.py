"""vLLM's rotary embeddings after `register`, on a stand-in of its registry and on its own files."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import vllm_classes
from formula import close, compiles, rotate_reference
from fused_rope.compat import vllm
from oracle import same
from torch import Tensor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T, HQ, HK, D, M = 7, 4, 2, 48, 40


class Case(NamedTuple):
    """Arguments of a class, and what it does with positions and heads.

    Attributes:
        order: the axis of each pair, "t", "h" or "w", if positions have three axes.
        start: the first rotated element.
    """

    arguments: dict[str, Any]
    order: str = ""
    start: int = 0


YARN = {"scaling_factor": 2.0}
CASES = {
    "RotaryEmbedding": Case({}),
    "LinearScalingRotaryEmbedding": Case({"scaling_factors": 2.0}),
    "NTKScalingRotaryEmbedding": Case({"scaling_factor": 2.0}),
    "DynamicNTKScalingRotaryEmbedding": Case({"scaling_factor": 2.0, "max_trained_positions": 20}),
    "DynamicNTKAlphaRotaryEmbedding": Case({"scaling_alpha": 2.0}),
    "YaRNScalingRotaryEmbedding": Case(YARN),
    "Llama3RotaryEmbedding": Case(
        {"scaling_factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4, "orig_max_position": 9}
    ),
    "Gemma4RotaryEmbedding": Case({}),
    "DeepseekScalingRotaryEmbedding": Case(YARN),
    "DeepseekV4ScalingRotaryEmbedding": Case(YARN, start=D - 16),
    "MRotaryEmbedding": Case({"mrope_section": [2, 3, 3]}, "tthhhwww"),
    "MRotaryEmbedding, interleaved": Case(
        {"mrope_section": [4, 2, 2], "mrope_interleaved": True}, "thwthwtt"
    ),
    "MRotaryEmbeddingInterleaved": Case({"mrope_section": [3, 3, 2]}, "hwthwtht"),
    "BailingMRotaryEmbedding": Case({"mrope_section": [2, 3, 3]}, "hwhwhwtt"),
    "Ernie4_5_VLRotaryEmbedding": Case({"mrope_section": [3, 3, 2]}, "hwhwhwtt"),
}


@pytest.fixture(params=["stand-in", "original"])
def package(request, monkeypatch):
    """The package of rotary embeddings, nothing replaced."""
    root = vllm_classes.source()
    if request.param == "original" and root is None:
        pytest.skip("expected an installed vLLM, or a checkout named by FUSED_ROPE_VLLM")
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    chosen = vllm_classes.stand_in() if request.param == "stand-in" else vllm_classes.original(root)
    for name, module in chosen.items():
        monkeypatch.setitem(sys.modules, name, module)
    before = set(sys.modules)
    yield import_module(vllm_classes.PACKAGE)
    for name in set(sys.modules) - before:
        if name.startswith("vllm."):
            del sys.modules[name]


def find(package, name):
    for part in ("", ".common", ".ernie45_vl_rope"):
        module = import_module(package.__name__ + part)
        if hasattr(module, name):
            return getattr(module, name)
    pytest.skip(f"{name} is not part of this vLLM")


def make(package, name, *, is_neox=True, dtype=torch.float32, device="cpu"):
    sizes = {"head_size": D, "rotary_dim": 16, "max_position_embeddings": M, "base": 1e4}
    cls = find(package, name.split(",")[0])
    return cls(**sizes, is_neox_style=is_neox, dtype=dtype, **CASES[name].arguments).to(device)


class Call(NamedTuple):
    """A module, its arguments, and cos and sin [T, 1, P] of the tokens, by the module's table."""

    rope: Any
    positions: Tensor
    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor


def call(package, name, *, is_neox, dtype, device="cpu"):
    rope = make(package, name, is_neox=is_neox, dtype=dtype, device=device)
    order = CASES[name].order
    if name == "MRotaryEmbeddingInterleaved":  # its constructor chooses the order
        order = ["thw"[axis] for axis in rope.mrope_dim[:8]]
    # Slices of longer buffers, as with CUDA graphs.
    positions = torch.randint(0, M, (3, T + 5) if order else (T + 5,), device=device)[..., :T]
    q, k = (torch.randn(T, H, D, device=device).to(dtype) for H in (HQ, HK))
    cos, sin = rope.cos_sin_cache[positions].chunk(2, -1)
    if order:
        axes = torch.tensor(["thw".index(axis) for axis in order], device=device)
        cos, sin = (t.gather(0, axes.expand(1, T, -1))[0] for t in (cos, sin))
    return Call(rope, positions, q, k, cos[:, None], sin[:, None])


def in_dtype(x, cos, sin, is_neox):
    """The formula in x's dtype, each product and sum rounded to it."""
    P = cos.shape[-1]
    middle = x[..., : 2 * P]
    a, b = middle.chunk(2, -1) if is_neox else (middle[..., ::2], middle[..., 1::2])
    pair = a * cos - b * sin, b * cos + a * sin
    rotated = torch.cat(pair, -1) if is_neox else torch.stack(pair, -1).flatten(-2)
    return torch.cat([rotated, x[..., 2 * P :]], -1)


def flat(name, *xs):
    """[T, H*D], as vLLM's models pass them, but for those with latent attention: [T, H, D]."""
    return xs if name.startswith("Deepseek") else tuple(x.flatten(1) for x in xs)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_values(package, name, dtype, is_neox, device):
    """The formula in float64 with the module's own table, rounded once, in place."""
    assert name.split(",")[0] in vllm.register()
    rope, positions, q, k, cos, sin = call(
        package, name, is_neox=is_neox, dtype=dtype, device=device
    )
    options = {"interleaved": not is_neox, "start": CASES[name].start}
    want = [rotate_reference(x, cos, sin, **options) for x in (q, k)]
    given = flat(name, q, k)
    for x, y, values in zip(rope(positions, *given), given, want, strict=True):
        assert x.data_ptr() == y.data_ptr()
        close(x.view(values.shape), values)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("DeepseekV4")])
def test_model_precision(package, name, is_neox):
    """Bitwise the formula in bfloat16; with vLLM's files, its own `forward_native`, too."""
    vllm.register("model")
    rope, positions, q, k, cos, sin = call(package, name, is_neox=is_neox, dtype=torch.bfloat16)
    want = [in_dtype(x, cos, sin, is_neox) for x in (q, k)]
    given = flat(name, q, k)
    own = "forward" if name == "MRotaryEmbeddingInterleaved" else "forward_native"
    cls = find(package, name.split(",")[0])
    native = getattr(cls, own)(rope, positions, *(x.clone() for x in given))
    got = rope(positions, *given)
    for x, values in zip(got, want, strict=True):
        same(x.view(values.shape), values)
    if native != own:  # the stand-in's
        for x, y in zip(got, native, strict=True):
            same(x, y)


@pytest.mark.parametrize("inverse", [False, True])
def test_deepseek_v4(package, inverse):
    """Heads of another size than the module's, the inverse, no key; bitwise vLLM's own result."""
    vllm.register()
    rope = make(package, "DeepseekV4ScalingRotaryEmbedding", is_neox=False, dtype=torch.bfloat16)
    query, positions = torch.randn(T, HQ, 2 * D).bfloat16(), torch.randint(0, M, (T,))
    cos, sin = rope.cos_sin_cache[positions][:, None].chunk(2, -1)
    sin = -sin if inverse else sin
    want = rotate_reference(query, cos, sin, interleaved=True, start=2 * D - 16)
    native = rope.forward_native(positions, query, None, None, inverse)
    got, key = rope(positions, query, None, None, inverse)
    assert key is None
    close(got, want)
    if native != "forward_native":
        same(got, native[0])


def test_inference_mode(package):
    """vLLM's mode: modules and inputs are inference tensors, q and k parts of one split."""
    vllm.register()
    with torch.inference_mode():
        for name in ("RotaryEmbedding", "MRotaryEmbedding"):
            rope, positions, *_, cos, sin = call(package, name, is_neox=True, dtype=torch.bfloat16)
            qkv = torch.randn(T, (HQ + 2 * HK) * D).bfloat16()
            q, k, v = qkv.split([HQ * D, HK * D, HK * D], -1)
            before = v.clone()
            want = [rotate_reference(x.view(T, -1, D), cos, sin) for x in (q, k)]
            for x, values in zip(rope(positions, q, k), want, strict=True):
                close(x.view(T, -1, D), values)
            same(v, before)


def test_text_positions_and_offsets(package):
    """M-RoPE with one position for each token; positions of both kinds with offsets."""
    vllm.register()
    offsets, name = torch.arange(T), "MRotaryEmbedding"
    rope, positions, q, k, cos, sin = call(package, name, is_neox=True, dtype=torch.float32)
    row, text = positions[0] // 2, rope.cos_sin_cache
    text = text[row + offsets][:, None].chunk(2, -1)
    for where, tables in ((row, text), (positions - offsets, (cos, sin))):
        want = [rotate_reference(x, *tables) for x in (q, k)]
        got = rope(where, *flat(name, q.clone(), k.clone()), offsets)
        for x, values in zip(got, want, strict=True):
            close(x.view(values.shape), values)


def test_no_key(package):
    """Layers that share another layer's keys rotate queries only."""
    vllm.register()
    for name in ("RotaryEmbedding", "MRotaryEmbedding"):
        rope, positions, q, _, cos, sin = call(package, name, is_neox=True, dtype=torch.float32)
        want = rotate_reference(q, cos, sin)
        got, key = rope(positions, q, None)
        assert key is None
        close(got, want)


def test_llama4_vision(package):
    """Complex tables of patches in a grid; q and k are left alone."""
    vllm.register()
    cls = find(package, "Llama4VisionRotaryEmbedding")
    rope = cls(16, 8, 9, 1e4, False, torch.complex64)
    S = rope.cos_sin_cache.shape[0]
    q, k = (torch.randn(2, S, H, rope.cos_sin_cache.shape[-1] * 2) for H in (HQ, HK))
    before = q.clone()
    table = rope.cos_sin_cache.flatten(0, -2)[:, None]
    for x, out in zip((q, k), rope(q, k), strict=True):
        close(out, rotate_reference(x, table.real, table.imag, interleaved=True))
    same(q, before)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("fp32", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_tables_of_the_caller(package, batched, fp32, is_neox):
    """Vision encoders' function; with `enable_fp32_compute` also "model" rounds once."""
    vllm.register("model")
    rope = find(package, "ApplyRotaryEmb")(True, is_neox, fp32)
    x = torch.randn(2, T, HQ, 16).bfloat16()
    x = x if batched else x[0]
    before = x.clone()
    angle = torch.rand(T, 8)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    got = rope(x, cos[:, 0], sin[:, 0])
    if fp32:
        same(got, rotate_reference(x, cos, sin, interleaved=not is_neox).float().bfloat16())
    else:
        same(got, in_dtype(x, cos.bfloat16(), sin.bfloat16(), is_neox))
    same(x, before)


def test_register_again(package):
    """A second call changes the precision of modules that exist; vLLM refuses another plugin."""
    names = vllm.register("model")
    cls = find(package, "RotaryEmbedding")
    rope = make(package, "RotaryEmbedding", dtype=torch.bfloat16)
    assert isinstance(rope, cls) and type(rope) is not cls and rope.precision == "model"
    assert vllm.register() == names and rope.precision == "fp32"
    with pytest.raises(AssertionError, match="RotaryEmbedding"):
        cls.register_oot(type("Another", (cls,), {}))
    with pytest.raises(ValueError, match="exact"):
        vllm.register("exact")


@pytest.mark.parametrize("custom_ops", [["none"], ["all", "-rotary_embedding"]], ids=str)
@pytest.mark.parametrize("name", ["RotaryEmbedding", "MRotaryEmbeddingInterleaved"])
def test_custom_ops(package, name, custom_ops):
    """On with Inductor, whose default is "none", and off if vLLM's configuration says so."""
    vllm.register()
    sys.modules["vllm.config"].get_cached_compilation_config().custom_ops = custom_ops
    rope, positions, q, k, *_ = call(package, name, is_neox=True, dtype=torch.float32)
    assert type(rope).name == "rotary_embedding"
    calls = []
    rope.forward_cuda = lambda *args: calls.append(args)
    rope(positions, *flat(name, q, k))
    assert bool(calls) == (custom_ops == ["none"])


def test_compiles(package):
    vllm.register()
    for name in ("RotaryEmbedding", "MRotaryEmbedding"):
        rope, positions, q, k, *_ = call(package, name, is_neox=True, dtype=torch.float32)

        def rotated(q, k, rope=rope, positions=positions):
            return rope.forward_cuda(positions, q.clone(), k.clone())

        compiles(rotated, *flat(name, q, k))


@pytest.mark.parametrize(
    "variable, precision",
    [
        (None, None),
        ("", None),
        ("another", None),
        ("fused_rope", "fp32"),
        ("another, fused_rope_model", "model"),
    ],
)
def test_plugin(monkeypatch, variable, precision):
    """Only a variable that names the plugin switches vLLM, so that an installation does not."""
    calls = []
    monkeypatch.setattr(vllm, "register", lambda precision: calls.append(precision))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if variable is not None:
        monkeypatch.setenv("VLLM_PLUGINS", variable)
    vllm.plugin()
    assert calls == ([] if precision is None else [precision])


def test_two_plugins(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "fused_rope,fused_rope_model")
    with pytest.raises(ValueError, match="VLLM_PLUGINS"):
        vllm.plugin()


def test_entry_points():
    """What pyproject.toml declares, resolved as vLLM does."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for name, value in project["entry-points"]["vllm.general_plugins"].items():
        point = EntryPoint(name, value, "vllm.general_plugins")
        assert point.load() is vllm.plugin
        assert name in vllm._PLUGINS
