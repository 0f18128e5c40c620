"""Every variant of rotary embedding in transformers: a small real model, original and patched."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import bits, same

transformers = pytest.importorskip("transformers", minversion="4.57")

from fused_rope.compat._patching import style  # noqa: E402
from fused_rope.compat.transformers import adapters, coverage, patch, unpatch  # noqa: E402
from fused_rope.compat.transformers.forms import FORMS, find_form  # noqa: E402
from fused_rope.compat.transformers.patching import modules_of, rotary_functions  # noqa: E402
from transformers_models import CASES  # noqa: E402

CASES = {name: case for name, case in CASES.items() if case.installed}
# One family of each kind; `make test-all` has them all.
QUICK = ("V1-llama", "V5-glm", "V14-deepseek_v3", "V19-dinov3_vit", "V20-pixtral", "V26-sam3")
FAMILIES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
TEXT = [
    n if n == "V1-llama" else pytest.param(n, marks=pytest.mark.slow)
    for n, case in CASES.items()
    if case.generates
]
ON_CUDA_ONLY = "its form can be checked on CUDA only"  # version 4's ModernBERT with flash-attn
DOCS = Path(__file__).parents[2] / "docs" / "transformers.md"


def tensors(output):
    """The floating-point tensors of a model's output that carry a gradient."""
    if isinstance(output, torch.Tensor):
        return [output] if output.requires_grad else []
    if isinstance(output, dict):
        output = output.values()
    elif not isinstance(output, (list, tuple)):
        return []
    return [tensor for value in output for tensor in tensors(value)]


def forward_backward(model, arguments):
    model.zero_grad()
    outputs = tensors(model(**arguments))
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(o.shape, generator=generator).to(o.device) for o in outputs]
    sum((o.float() * w).sum() for o, w in zip(outputs, weights, strict=True)).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return [o.detach().clone() for o in outputs], grads


def distance(got, want):
    """The norm of the difference of lists of tensors, relative to that of `want`."""
    norms = [
        torch.stack([t.double().norm() for t in ts]).norm()
        for ts in ([a.double() - b.double() for a, b in zip(got, want, strict=True)], want)
    ]
    return float(norms[0] / norms[1])


@pytest.fixture
def patched():
    models = []

    def patch_once(model, **options):
        report = patch(model, **options)
        models.append(model)
        assert report.patched and not set(report.left_alone.values()) - {ON_CUDA_ONLY}
        return report

    yield patch_once
    for model in models:
        unpatch(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients(name, dtype, device, patched, monkeypatch):
    case = CASES[name]
    model, arguments = case.build(dtype, device), case.arguments(dtype, device)
    original, original_grads = forward_backward(model, arguments)
    patched(model)
    ours, grads = forward_backward(model, arguments)
    if case.bitwise and device == "cpu":
        for a, b in zip(ours, original, strict=True):
            same(a, b)
    exact = dtype == torch.float32
    assert distance(ours, original) < (2e-6 if exact else 1e-2)
    assert grads.keys() == original_grads.keys()
    assert distance(grads.values(), original_grads.values()) < (3e-6 if exact else 2e-2)

    # Copying instead of rotating must change the outputs, or the test shows nothing.
    def copies(name, tensors, *a):
        q, *rest = (+x for x in tensors[:-2])
        return (q, *rest) if rest else q

    monkeypatch.setattr(style, "functional", SimpleNamespace(call=copies))
    assert distance([o.detach() for o in tensors(model(**arguments))], original) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TEXT)
def test_left_padding(name, dtype, device, patched):
    case = CASES[name]
    model, arguments = case.build(dtype, device), case.arguments(device=device)
    mask = torch.ones_like(arguments["input_ids"])
    mask[0, :6] = 0
    arguments["attention_mask"] = mask
    arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        original = model(**arguments).logits
        patched(model)
        ours = model(**arguments).logits
    ours, original = ours[mask.bool()], original[mask.bool()]
    if case.bitwise and device == "cpu":
        same(ours, original)
    assert distance([ours], [original]) < (2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("name", TEXT)
def test_generate(name, device, patched):
    """Greedy tokens after a left-padded prompt, with the model's own cache."""
    case = CASES[name]
    model = case.build(device=device)
    ids = case.arguments(device=device)["input_ids"][:, :7]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    want = model.generate(ids, **options)
    patched(model)
    assert torch.equal(model.generate(ids, **options), want)


@pytest.mark.parametrize(
    "name,options",
    [
        ("V1-llama", {}),
        ("V1-llama", {"compiled": "fused"}),
        ("V5-glm", {"compiled": "fused"}),
        ("V4-cohere", {"rows": 64}),
        ("V14-deepseek_v3", {}),  # eager prefill and compiled steps share a cache of keys
    ],
)
def test_generate_compiled_with_a_static_cache(name, options, device, patched):
    """transformers compiles the decode step itself, on the CPU only if it is told to."""
    if name == "V14-deepseek_v3" and transformers.__version__ < "5":
        pytest.skip("static caches of transformers 4 want values as wide as keys")
    torch._dynamo.reset()
    case = CASES[name]
    model = case.build(device=device)
    ids = case.arguments(device=device)["input_ids"][:, :7]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    compile_config = transformers.CompileConfig(fullgraph=True, backend="aot_eager")
    compile_config._compile_all_devices = True
    how = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    want = model.generate(ids, **how)
    patched(model, **options)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    got = model.generate(ids, **how, cache_implementation="static", compile_config=compile_config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert torch.equal(got, want)


WITHOUT_A_BREAK = (
    "V1-llama",
    "V3-gpt_oss",
    "V5-glm",
    "V14-deepseek_v3",
    "V19-dinov3_vit",
    "V20-pixtral",
    "V24-wav2vec2_conformer",
    "V26-sam3",
)


@pytest.mark.parametrize(
    "name",
    [
        n if n == "V1-llama" else pytest.param(n, marks=pytest.mark.slow)
        for n in WITHOUT_A_BREAK
        if n in CASES
    ],
)
def test_adds_no_graph_break(name, device, patched):
    case = CASES[name]
    model, arguments = case.build(device=device), case.arguments(device=device)

    def breaks():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with torch.no_grad():
            torch.compile(model, backend="eager")(**arguments)
        return sum(torch._dynamo.utils.counters["graph_break"].values())

    original = breaks()
    patched(model)
    assert breaks() <= original


def test_tokens_without_a_batch(device, patched):
    """Qwen4's indexer rotates the keys of its blocks as [T, 1, D] with tables of [T, R]."""
    x, table = torch.randn(5, 3, 16, device=device), torch.randn(2, 5, 12, device=device)
    cos, sin = torch.cat([table, table], -1)[..., ::2]
    got = adapters.optional_key(adapters.HALF)(x, cos=cos, sin=sin)
    same(got, bits(x, cos[:, :6], sin[:, :6], layout="thd"))


def test_complex_tables_that_a_cast_made_real():
    model = CASES["V12-llama4-vision"].build()
    if not any(buffer.is_complex() for buffer in model.buffers()):
        pytest.skip(f"transformers {transformers.__version__} keeps the table out of casts' reach")
    patch(model)
    try:
        with pytest.raises(TypeError, match="complex"), pytest.warns(UserWarning):
            model.to(torch.float32)(**CASES["V12-llama4-vision"].arguments())
    finally:
        unpatch(model)


# --- forms that no model here reaches -----------------------------------------------------------


def test_packed_qkv_in_place(device):
    """ModernBERT's form with flash-attn (V28)."""
    qkv = torch.randn(11, 3, 4, 16, device=device)
    cos, sin = torch.randn(2, 6, 8, device=device)
    cu = torch.tensor([0, 5, 5, 10], dtype=torch.int32, device=device)
    want = qkv.clone()
    for part in (0, 1):
        want[:, part] = bits(qkv[:, part], cos, sin, layout="thd", cu_seqlens=cu)
    got = adapters.packed_qkv(qkv, cos, sin, cu, 5)
    assert got is qkv
    same(got, want)


def test_sliced_from_qkv_per_head(device):
    """Old GPT-NeoX (V29): q and k are strided slices of [B, S, H, 3D] and turn in part."""
    qkv = torch.randn(2, 7, 4, 3 * 16, device=device)
    q, k = (qkv[..., i * 16 : (i + 1) * 16].transpose(1, 2) for i in (0, 1))
    cos, sin = torch.randn(2, 1, 7, 4, device=device)
    tables = (torch.cat([t, t], -1) for t in (cos, sin))
    rotated = adapters.pair(adapters.HALF)(q, k, *tables)
    for got, x in zip(rotated, (q, k), strict=True):
        same(got, bits(x, cos, sin, layout="bhsd"))


@pytest.mark.parametrize("interleaved", [False, True])
def test_sections_of_axes(interleaved, device):
    """transformers 4's M-RoPE (V7, V9), whose tables have a leading axis."""
    q, k = torch.randn(2, 4, 7, 16, device=device), torch.randn(2, 2, 7, 16, device=device)
    cos, sin = torch.randn(2, 3, 2, 7, 6, device=device)
    tables = [torch.cat([t, t], -1) for t in (cos, sin)]
    adapter = adapters.sections(adapters.Style("half", interleaved=interleaved))
    merged = [torch.cat([t[0, ..., :1], t[1, ..., 1:3], t[2, ..., 3:]], -1) for t in (cos, sin)]
    for got, x in zip(adapter(q, k, *tables, [1, 2, 3]), (q, k), strict=True):
        same(got, bits(x, *merged, layout="bhsd", interleaved=interleaved))


# --- telling forms ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_form_is_the_only_one(name):
    """No function passes for two forms, unless the first does more or trusts the tables less."""
    for site in rotary_functions(modules_of(CASES[name].build(device="meta"))):
        forms = [f for f in FORMS if site.name in f.functions and f.fit(site.function)]
        found = find_form(site.name, site.function)
        if found == ON_CUDA_ONLY:
            continue
        assert found[0] is forms[0]
        assert len(forms) == 1 or forms[0].name.endswith(
            ("optional", "queries", "order preserved", "in place")
        )


def test_not_a_rotation_is_left_alone():
    importlib.import_module("transformers.models.vjepa2.modeling_vjepa2")
    report = patch()
    try:
        reasons = {k: v for k, v in report.left_alone.items() if "vjepa2" in k}
        assert len(reasons) == 1 and "no rotation" in next(iter(reasons.values()))
    finally:
        unpatch()


def test_patch_every_family():
    model = CASES["V1-llama"].build()
    ids = CASES["V1-llama"].arguments()["input_ids"]
    want = model(ids).logits
    report = patch()
    try:
        families = {key.split(".")[2] for key in report.patched}
        assert {"llama"} <= families and not any("unknown" in r for r in report.left_alone.values())
        same(model(ids).logits, want)
    finally:
        report = unpatch()
    assert len(report.restored) >= len(families)


# --- coverage -----------------------------------------------------------------------------------


def test_documented_coverage_is_that_of_the_installed_version():
    """docs/transformers.md: python -m fused_rope.compat.transformers > docs/transformers.md"""
    page = DOCS.read_text()
    version = re.search(r"transformers (\d+\.\d+\.\d+)", page)[1]
    entries = coverage.entries()
    assert not any("unknown" in entry.form for entry in entries)
    if version != transformers.__version__:
        pytest.skip(f"the page is that of transformers {version}")
    assert coverage.page(entries, coverage.norm_entries()) == page
