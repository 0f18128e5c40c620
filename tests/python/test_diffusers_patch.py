"""diffusers: whole patched models against the originals, forward and backward."""

import functools
import gc
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import same

diffusers = pytest.importorskip("diffusers", exc_type=ImportError)

from diffusers.models import embeddings  # noqa: E402
from diffusers.models.transformers import transformer_flux as flux  # noqa: E402
from diffusers_models import CASES, B, D, Draw, H, pair  # noqa: E402
from fused_rope.compat._patching import replacements, style  # noqa: E402
from fused_rope.compat.diffusers import (  # noqa: E402
    coverage,
    is_patched,
    patch,
    patched,
    rewriting,
    unpatch,
)
from fused_rope.compat.diffusers.forms import FORMS  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs" / "diffusers.md"
INSTALLED = [name for name, case in CASES.items() if case.installed]


@pytest.fixture(autouse=True)
def untouched():
    """Every test leaves the classes as they were. More threads only slow tiny models down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for entry in list(replacements.current.values()):
        entry.remove()


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [t for part in values for t in tensors(part)] if hasattr(values, "__iter__") else []


def on_device(value, device):
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(on_device(part, device) for part in value)
    return value


def run(case, model, dtype=torch.float32, grad=True):
    """Outputs, and the gradients of all parameters and inputs but tables, which are read by half.

    That of a timestep passes through sines of large numbers: nothing is left of it in bfloat16.
    """
    device = next((p.device for p in model.parameters()), "cpu")
    arguments = {k: on_device(v, device) for k, v in case.arguments(Draw(dtype)).items()}
    given = {name: x for name, x in arguments.items() if not re.search("rope|rotary|pos", name)}
    inputs = [x for x in tensors(given) if x.is_floating_point() and x.dim() > 1]
    for x in inputs:
        x.requires_grad_(grad)
    model.zero_grad()
    with torch.set_grad_enabled(grad):
        outputs = tensors(model(**arguments))
        if grad:
            sum(o.float().square().mean() for o in outputs).backward()
    grads = [x.grad for x in (*model.parameters(), *inputs) if x.grad is not None]
    return [o.detach() for o in outputs], grads


def distance(ours, theirs):
    """The largest difference, over the largest element of its tensor."""
    pairs = list(zip(ours, theirs, strict=True))
    assert pairs
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-9)).item()
        for a, b in pairs
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", INSTALLED)
def test_outputs_and_gradients(name, dtype, device, monkeypatch):
    case = CASES[name]
    model = case.build(dtype).to(device)
    original, original_grads = run(case, model, dtype)
    report = patch(model)
    assert case.form in report.patched.values()
    ours, grads = run(case, model, dtype)
    if case.bitwise and device == "cpu":
        for a, b in zip(ours, original, strict=True):
            same(a, b)
    exact = dtype == torch.float32
    assert distance(ours, original) < (2e-6 if exact else 2e-2)
    assert distance(grads, original_grads) < (1e-5 if exact else 5e-2)

    # Copying instead of rotating must change the outputs, or the test shows nothing.
    def copies(name, tensors, *a):
        return (+tensors[0], +tensors[1]) if "qk" in name else +tensors[0]

    monkeypatch.setattr(style.functional, "call", copies)
    assert distance(run(case, model, dtype, grad=False)[0], original) > 1e-3
    assert not unpatch(model).left_alone
    monkeypatch.undo()
    if device == "cpu":
        for a, b in zip(run(case, model, dtype)[0], original, strict=True):
            same(a, b)


def test_every_form_has_a_model():
    assert {form.name for form in FORMS} == {case.form for case in CASES.values()}


# --- norms --------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The names of the operators that adapters call.

    Without those of `patch`, which compares with the originals the first time in a process.
    """
    names, call, original = [], style.functional.call, patch
    record = SimpleNamespace(call=lambda name, *a: names.append(name) or call(name, *a))

    def patch_unseen(*args, **options):
        before = len(names)
        report = original(*args, **options)
        del names[before:]
        return report

    monkeypatch.setattr(style, "functional", record)
    monkeypatch.setitem(globals(), "patch", patch_unseen)
    return names


def error(ours, truth):
    """The mean over tensors of the error, over the tensor's norm."""
    pairs = zip(ours, truth, strict=True)
    ratios = [
        (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-9) for a, b in pairs
    ]
    return torch.stack(ratios).mean().item()


@pytest.mark.parametrize(
    "dtype,precision",
    [(torch.float32, "model"), (torch.bfloat16, "model"), (torch.bfloat16, "fp32")],
    ids=str,
)
@pytest.mark.parametrize("name", [name for name in INSTALLED if CASES[name].norms])
def test_norms(name, dtype, precision, calls):
    case = CASES[name]
    model = case.build(dtype)
    original, original_grads = run(case, model, dtype)
    report = patch(model, norms="fused", precision=precision)
    assert report.norms
    ours, grads = run(case, model, dtype)
    assert "norm_rotate_qk" in calls and not any("out" in called for called in calls)
    for a, b in zip(run(case, model, dtype, grad=False)[0], ours, strict=True):
        same(a, b)
    if dtype == torch.float32:
        assert distance(ours, original) < 5e-6 and distance(grads, original_grads) < 2e-5
        return
    assert distance(ours, original) < 3e-2
    unpatch(model)
    truth, true_grads = run(case, model.float())
    assert error(ours, truth) < 1.2 * error(original, truth)
    assert error(grads, true_grads) < 1.2 * error(original_grads, true_grads)


def attention(dtype=torch.float32, **options):
    """Flux' attention without projections: what it is given is normalized and rotated."""
    width = {"query_dim": H * D, "heads": H, "dim_head": D, "added_kv_proj_dim": H * D}
    layer = flux.FluxAttention(**width, **options)
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        setattr(layer, name, torch.nn.Identity())
    with torch.no_grad():
        for norm in (layer.norm_q, layer.norm_k, layer.norm_added_q, layer.norm_added_k):
            norm.weight.copy_(torch.randint(-4, 5, (D,)) / 4)
    return layer.to(dtype)


def rotated(layer, x, text, tables, monkeypatch):
    """The q and k that attention gets."""
    found = []

    def dispatch(q, k, v, **options):
        found.extend((q, k))
        return v

    monkeypatch.setattr(flux, "dispatch_attention_fn", dispatch)
    layer(x, text, image_rotary_emb=tables)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["without gradients", "with gradients"])
def test_joint_sequence_is_bitwise_the_original(dtype, grad, calls, monkeypatch):
    """Sums of squares of these numbers are exact, so that their order has no effect."""
    layer = attention(dtype)
    x, text = (torch.randint(-1, 3, (B, S, H * D)).to(dtype) for S in (9, 5))
    tables = pair("repeated", 14, D)
    with torch.set_grad_enabled(grad):
        original = rotated(layer, x, text, tables, monkeypatch)
        patch(layer, norms="fused")
        ours = rotated(layer, x, text, tables, monkeypatch)
    assert calls == ["norm_rotate_qk" + ("" if grad else "_out")] * 2
    for a, b in zip(ours, original, strict=True):
        same(a, b)


@pytest.mark.parametrize("tables", [(13, "few"), (15, "many")], ids=lambda t: t[1])
def test_another_number_of_rows_is_refused_as_by_the_original(tables, monkeypatch):
    layer = attention()
    patch(layer, norms="fused")
    x, text = torch.randn(B, 9, H * D), torch.randn(B, 5, H * D)
    with torch.no_grad(), pytest.raises(RuntimeError, match="size"):
        rotated(layer, x, text, pair("repeated", tables[0], D), monkeypatch)


def hook(layer):
    layer.norm_q.register_forward_hook(lambda module, args, result: result * 2)


def wider_weight(layer):
    layer.norm_k.weight.data = layer.norm_k.weight.data.float()


def other_class(layer):
    layer.norm_added_q = torch.nn.LayerNorm(D)


def other_eps(layer):
    layer.norm_k.eps = None


def no_norm(layer):
    layer.norm_q = torch.nn.Identity()


def test_norms_that_are_not_known_are_left_alone():
    layer = attention()
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        setattr(layer, name, torch.nn.LayerNorm(D))
    report = patch(layer, norms="fused")
    assert report.patched and not report.norms and "not known: LayerNorm" in str(report)


@pytest.mark.parametrize("change", [hook, wider_weight, other_class, other_eps, no_norm])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_norms_that_run_as_modules(change, monkeypatch):
    layer = attention(torch.bfloat16)
    change(layer)
    layer = layer.to(torch.bfloat16) if change is other_class else layer
    x, text = (torch.randint(-1, 3, (B, S, H * D)).bfloat16() for S in (9, 5))
    tables = pair("repeated", 14, D)
    with torch.no_grad():
        original = rotated(layer, x, text, tables, monkeypatch)
        patch(layer, norms="fused")
        for a, b in zip(rotated(layer, x, text, tables, monkeypatch), original, strict=True):
            same(a, b)


def test_norms_run_as_modules_under_autocast(calls, monkeypatch):
    layer = attention()
    x, text = torch.randn(B, 9, H * D), torch.randn(B, 5, H * D)
    tables = pair("repeated", 14, D)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        original = rotated(layer, x, text, tables, monkeypatch)
        patch(layer, norms="fused")
        ours = rotated(layer, x, text, tables, monkeypatch)
    assert set(calls) == {"rotate"}
    for a, b in zip(ours, original, strict=True):
        same(a, b)


def test_without_a_rotation_the_layer_only_normalizes(monkeypatch):
    layer = attention()
    x, text = torch.randn(B, 9, H * D), torch.randn(B, 5, H * D)
    original = rotated(layer, x, text, None, monkeypatch)
    patch(layer, norms="fused")
    for a, b in zip(rotated(layer, x, text, None, monkeypatch), original, strict=True):
        same(a, b)


# --- rewritten processors -----------------------------------------------------------------------

WAITING = {
    "joined": (
        "if flag:\n  k = attn.norm_b(k)\n  q = torch.cat([k, q], dim=1)\n"
        "q = rotary(q, c)\nreturn q, k"
    ),
    "condition": "if flag:\n  q = rotary(q, c)\n  k = rotary(k, c)\nreturn q, k",
    "else": "if flag:\n  q = rotary(q, c)\nelse:\n  k = rotary(k, c)\nreturn q, k",
    "one name alone": "q = rotary(q, c)\nreturn q, k",
    "other tables": "q = rotary(q, c)\nk = rotary(k, c + 1)\nreturn q, k",
    "rotated by another": "q = rotary(q, k)\nk = rotary(k, c)\nreturn q, k",
    "in between": "c = c + q\nq = rotary(q, c)\nk = rotary(k, c)\nreturn q, k",
    "loop": "for _ in range(2):\n  q = rotary(q, c)\nk = rotary(k, c)\nreturn q, k",
    "keyword": "q = rotary(q, table=c)\nk = rotary(k, table=c)\nreturn q, k",
}
NOT_WAITING = {
    "test": "if q + k:\n  q = rotary(q, c)\nreturn q, k",
    "captured": "f = lambda: q\nq = attn.norm_b(q)\nk = f()\nq = rotary(q, c)\nreturn q, k",
    "twice": "q = attn.norm_b(q)\nq = rotary(q, c)\nreturn q, k",
    "in place": "c.add_(1)\nq = rotary(q, c)\nreturn q, k",
}


@pytest.mark.parametrize("case", [*WAITING, *NOT_WAITING])
def test_rewriting_changes_no_value(case, tmp_path, monkeypatch):
    """Waiting numbers are wrapped, so that any use of one before its norm raises."""
    body = {**WAITING, **NOT_WAITING}[case]
    lines = ("q = attn.norm_a(q)\nk = attn.norm_b(k)\n" + body).splitlines()
    source = "import torch\n\nclass Processor:\n  def __call__(self, attn, q, k, c, flag):\n"
    (tmp_path / "snippet.py").write_text(source + "".join(f"    {line}\n" for line in lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "snippet", raising=False)
    module = importlib.import_module("snippet")
    module.torch = SimpleNamespace(cat=lambda xs, dim: sum(x * 10**i for i, x in enumerate(xs)))
    module.rotary = lambda x, table: x * 7 + table

    class Number(int):
        def add_(self, other):
            """Changes nothing; a name that ends with an underscore may."""

    attn = SimpleNamespace(norm_a=lambda x: x + 100, norm_b=lambda x: x - 3)
    waited = []

    def normalize(x):
        return x.now() if isinstance(x, Waits) else x

    class Waits:
        def __init__(self, now):
            self.now = now

    def rotate(function, xs, *args, **kwargs):
        waited.extend(x for x in xs if isinstance(x, Waits))
        return tuple(function(normalize(x), *args, **kwargs) for x in xs)

    calls = rewriting.Calls(
        defer=lambda norm, x: Waits(lambda: norm(x)),
        join=lambda xs, dim: Waits(lambda: module.torch.cat([normalize(x) for x in xs], dim)),
        rotate=rotate,
        normalize=normalize,
    )
    kind = module.Processor
    made = rewriting.rewrite(kind, kind.__call__, (), {"rotary"}, True)
    ours = made.make(calls, {})
    for flag in (False, True):
        assert ours(kind(), attn, 2, 3, Number(5), flag) == kind()(attn, 2, 3, Number(5), flag)
    assert bool(waited) == bool(made.norms) == (case in WAITING)


# --- patch and unpatch --------------------------------------------------------------------------


def wan():
    return CASES["wan"].build()


def test_models_that_share_a_function(monkeypatch):
    """It is restored with the last model, and options that it does not depend on may differ."""
    first, second = CASES["cosmos"].build(), CASES["cosmos"].build()
    original = embeddings.apply_rotary_emb
    patch(first)
    patch(first)
    with pytest.raises(ValueError, match="precision 'model'"):
        patch(second, precision="fp32")
    with patched(second, norms="fused") as report:
        assert report.norms and is_patched(second)
    assert "2 more models" in str(unpatch(second) or unpatch(first)) or is_patched(first)
    unpatch(first)
    unpatch(first)
    assert embeddings.apply_rotary_emb is original and not is_patched()


def test_dead_models_are_forgotten():
    original = flux.apply_rotary_emb
    patch(CASES["flux"].build())
    gc.collect()
    assert not is_patched()
    unpatch()
    assert flux.apply_rotary_emb is original


def test_pipeline():
    model = CASES["flux"].build()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    others = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = diffusers.FluxPipeline(scheduler=scheduler, transformer=model, **others)
    with patched(pipeline, norms="fused") as report:
        assert report.patched and report.norms and not report.left_alone
        assert is_patched(pipeline) and is_patched(model)
    assert not is_patched(pipeline)


@pytest.mark.parametrize(
    "given,match",
    [
        ("black-forest-labs/FLUX.1-dev", "a str"),
        (diffusers.FluxPipeline, "the class FluxPipeline"),
        (3, "a int"),
    ],
    ids=["name", "class", "number"],
)
@pytest.mark.parametrize("function", [patch, unpatch, is_patched])
def test_what_is_no_model(function, given, match):
    with pytest.raises(TypeError, match=f"expected a model or pipeline .*, got {match}"):
        function(given)


@pytest.mark.parametrize("option", ["precision", "compiled", "norms"])
def test_unknown_options(option):
    with pytest.raises(ValueError, match=f"expected {option}"):
        patch(torch.nn.Linear(1, 1), **{option: "other"})
    assert not replacements.current


def test_a_model_without_rotations():
    report = patch(torch.nn.Linear(1, 1))
    assert str(report) == "found no rotary function"


def test_devices_without_kernels(monkeypatch):
    monkeypatch.setattr(replacements, "has_kernels", lambda device: device != "CPU")
    model = wan()
    report = patch(model)
    assert not report.patched and "no kernels for cpu" in str(report)
    assert patch(model, fallback=True).patched


def test_tables_whose_halves_differ(monkeypatch):
    """The original is restored, and its results are returned."""
    layer = CASES["kandinsky-5"].build()
    x, rope = torch.randn(B, 12, H * D), torch.randn(12, 1, D // 2, 2, 2)
    original = layer(x, rotary_emb=rope)
    patch(layer)
    with pytest.warns(UserWarning, match="tables differ"):
        same(layer(x, rotary_emb=rope), original)
    assert not is_patched(layer)

    x, tables = torch.randn(B, H, 5, D), torch.randn(2, 5, D).unbind()
    expected = embeddings.apply_rotary_emb(x, tables)
    model = CASES["cosmos"].build()
    patch(model)
    with pytest.warns(UserWarning, match="tables differ"):
        same(embeddings.apply_rotary_emb(x, tables), expected)


def test_real_tables_in_place_of_complex_ones_run_the_original(calls):
    """PyTorch multiplies complex numbers by real ones, too."""
    x, table = torch.randn(B, 5, H, D), torch.randn(B, 5, D // 2)
    expected = flux.apply_rotary_emb(x, table, use_real=False)
    model = CASES["flux"].build()
    patch(model)
    same(flux.apply_rotary_emb(x, table, use_real=False), expected)
    assert is_patched(model) and not calls


@pytest.mark.parametrize("name", ["cosmos", "joyimage", "longcat-audio"])
def test_keywords_in_any_order(name, calls):
    """The tables that are compared are found by their name."""
    case = CASES[name]
    module = (
        embeddings
        if name == "cosmos"
        else importlib.import_module(f"diffusers.models.{case.module}")
    )
    function = "apply_rotary_emb" if name == "cosmos" else "_apply_rotary_emb"
    x, tables = torch.randn(B, 5, 5, D), pair("tiled" if name[0] == "l" else "repeated", 5, D)
    names = list(inspect.signature(getattr(module, function)).parameters)
    given = {n: x for n in names if n in ("x", "xq", "xk", "hidden_states")}
    given = {next(n for n in names if n not in given): tables, **given}
    expected = getattr(module, function)(**given)
    with patched(case.build()):
        ours = getattr(module, function)(**given)
        for a, b in zip(tensors(ours), tensors(expected), strict=True):
            same(a, b)
        assert calls


def test_forward_mode_gradients_of_a_joint_sequence(monkeypatch):
    """`out=` would drop the tangent."""
    layer = attention().requires_grad_(False)
    x, text = torch.randn(B, 9, H * D), torch.randn(B, 5, H * D)
    patch(layer, norms="fused")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        q, _ = rotated(layer, dual, text, pair("repeated", 14, D), monkeypatch)
        tangent = torch.autograd.forward_ad.unpack_dual(q).tangent
    assert tangent[:, 5:].abs().max() > 0 and tangent[:, :5].abs().max() == 0


def test_float64_runs_the_original(calls):
    case = CASES["wan"]
    model = case.build(torch.float64)
    original = run(case, model, torch.float64, grad=False)[0]
    patch(model)
    for a, b in zip(run(case, model, torch.float64, grad=False)[0], original, strict=True):
        same(a, b)
    assert not calls


def test_a_processor_that_other_code_replaced(monkeypatch):
    """Its functions are left alone, with a reason, and nothing of ours stands there."""
    model = wan()
    processor = type(model.blocks[0].attn1.processor)
    original = processor.__call__

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(processor, "__call__", wrapper)
    report = patch(model)
    assert not report.patched and "wrapped by other code" in str(report)
    assert processor.__call__ is wrapper


def test_captured_replacements_call_the_original(calls):
    case, model = CASES["wan"], wan()
    processor = type(model.blocks[0].attn1.processor)
    original = processor.__call__
    patch(model)
    captured = processor.__call__
    assert captured.__code__.co_filename == original.__code__.co_filename
    assert captured.__code__.co_firstlineno == original.__code__.co_firstlineno
    unpatch(model)
    assert processor.__call__ is original
    processor.__call__ = captured
    try:
        run(case, model, grad=False)
    finally:
        processor.__call__ = original
    assert not calls


def test_processor_that_is_set_later(calls):
    """A function belongs to a Python module, whose other processors call it, too."""
    model = CASES["flux"].build()
    patch(model)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.set_processor(flux.FluxAttnProcessor())
    run(CASES["flux"], model, grad=False)
    assert set(calls) == {"rotate"}


# --- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,options",
    [
        ("flux", {}),
        ("flux", {"compiled": "fused", "norms": "fused"}),
        ("wan", {"compiled": "fused"}),
    ],
    ids=["flux, original", "flux, norms", "wan, operator"],
)
def test_compiles_without_graph_break(name, options):
    case = CASES[name]
    model = case.build()
    original = run(case, model, grad=False)[0]
    patch(model, **options)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for a, b in zip(run(case, compiled, grad=False)[0], original, strict=True):
        assert distance([a], [b]) < 1e-5


# --- coverage -----------------------------------------------------------------------------------


def test_documented_coverage_is_that_of_the_installed_version():
    """docs/diffusers.md: python -m fused_rope.compat.diffusers > docs/diffusers.md"""
    page = DOCS.read_text()
    version = re.search(r"diffusers (\d+\.\d+\.\d+)", page)[1]
    entries = coverage.entries()
    reasons = [reason for entry in entries for reason in entry.left_alone.values()]
    assert not any("unknown" in reason for reason in reasons)
    if version != diffusers.__version__:
        pytest.skip(f"the page is that of diffusers {version}")
    assert coverage.page(entries) == page
