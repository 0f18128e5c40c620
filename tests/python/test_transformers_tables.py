"""Rotary modules of patched models: the model's own cosines and sines, to the bit, for less."""

import copy
import doctest
import importlib
import io
import pickle

import pytest
import torch
from oracle import DTYPES, same
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from fused_rope.compat.transformers import patch, patching, unpatch  # noqa: E402
from fused_rope.frequencies import frequencies  # noqa: E402
from fused_rope.hf_config import config_arguments  # noqa: E402
from test_transformers import SIZES as SMALL  # noqa: E402

MODERN = int(transformers.__version__.split(".")[0]) >= 5
SIZES = SMALL | {"pad_token_id": 0}
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.3 * i for i in range(8)],
    },
}
# tiled, tiled in float32, repeated, half
FAMILIES = {"llama": "Llama", "olmo2": "Olmo2", "cohere": "Cohere", "gpt_oss": "GptOss"}


def config_of(family="llama", kind="default", **options):
    scaling = {"rope_type": kind, **SCALINGS[kind]}
    if MODERN:
        options["rope_parameters"] = {**scaling, "rope_theta": 10000.0}
    sizes = {"max_position_embeddings": 64, **SIZES}
    config = getattr(transformers, f"{FAMILIES[family]}Config")(**sizes, **options)
    if not MODERN:
        config.rope_scaling = None if kind == "default" else scaling
    return config


def modeling(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def rotary_of(family="llama", kind="default", device="cpu"):
    make = getattr(modeling(family), f"{FAMILIES[family]}RotaryEmbedding")
    return make(config_of(family, kind)).to(device)


def model_of(family="llama", device="cpu", dtype=torch.float32, **options):
    model = getattr(transformers, f"{FAMILIES[family]}ForCausalLM")(config_of(family, **options))
    return model.to(device, dtype).eval()


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operators(call, *args, **options):
    with Operators() as seen:
        call(*args, **options)
    return seen.names


@pytest.fixture
def patched():
    """Patches by any module of a family; everything is the models' own again afterwards."""
    patching._retired.clear()  # with what they found out in other tests
    models = []

    def patch_once(model, **options):
        models.append(model)
        return patch(model, **options)

    yield patch_once
    for model in models:
        unpatch(model)


def positions(device):
    """Prefill, decode steps, left padding, far and unordered ones, int32."""
    S = 33
    yield torch.arange(S)[None]
    yield torch.tensor([[0]])
    yield torch.tensor([[7], [40]])
    yield torch.stack([torch.arange(S), (torch.arange(S) - 5).clamp(min=0)])
    yield torch.randint(0, 1_000_000, (3, 7))
    yield torch.arange(S, dtype=torch.int32)[None]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [None, 1_000_000])
def test_same_bits(family, kind, dtype, rows, device, patched):
    rotary = rotary_of(family, kind, device)
    x = torch.zeros(1, 1, 64, device=device, dtype=dtype)
    ids = [p.to(device) for p in positions(device)]
    want = [rotary(x, p) for p in ids]
    assert len(patched(rotary, rows=rows).tables) == 1
    got = [rotary(x, p) for p in ids]
    for pair, stock in zip(got, want, strict=True):
        for a, b in zip(pair, stock, strict=True):
            same(a, b)
            assert not a.requires_grad
    names = operators(rotary, x, ids[0])
    assert "bmm" not in names and ("cos" in names) == (rows is None)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("rows", [None, 1000])
def test_frequencies_that_follow_the_length_are_the_module_s_own(kind, rows, device, patched):
    rotary, other = (rotary_of("llama", kind, device) for _ in range(2))
    x = torch.zeros(1, 1, 64, device=device)
    ids = [torch.arange(S, device=device)[None] for S in (16, 40, 100, 200, 20)]
    want = [other(x, p) for p in ids]
    patched(rotary, rows=rows)
    for p, stock in zip(ids, want, strict=True):
        for a, b in zip(rotary(x, p), stock, strict=True):
            same(a, b)


@pytest.mark.skipif(not MODERN, reason="transformers 4 has one module for each layer type")
def test_layer_types(device, patched):
    module = modeling("gemma3")
    config = transformers.Gemma3TextConfig(**SIZES | {"num_hidden_layers": 6})
    rotary = module.Gemma3RotaryEmbedding(config).to(device)
    x, p = torch.zeros(1, 1, 64, device=device).bfloat16(), torch.arange(40, device=device)[None]
    kinds = ("full_attention", "sliding_attention")
    want = [rotary(x, p, kind) for kind in kinds]
    patched(rotary, rows=64)
    for kind, stock in zip(kinds, want, strict=True):
        for a, b in zip(rotary(x, p, layer_type=kind), stock, strict=True):
            same(a, b)
        assert "bmm" not in operators(rotary, x, p, kind)


def test_other_positions_and_settings_are_the_module_s_own(device, patched):
    rotary = rotary_of(device=device)
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(9, device=device)[None]
    patched(rotary)
    rotary(x, p)
    assert "bmm" not in operators(rotary, x, p)
    assert "bmm" in operators(rotary, x, p.double())
    backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    try:
        backend.matmul.fp32_precision = "tf32"
        assert "bmm" in operators(rotary, x, p)
    finally:
        backend.matmul.fp32_precision = before
    mapped = torch.vmap(lambda ids: rotary(x, ids))(torch.stack([p, p + 3]))
    for a, b in zip(mapped, rotary(x, p + 3), strict=True):
        same(a[1], b)
    if MODERN:  # transformers 4 asks for an autocast of the meta device
        meta = rotary_of().to("meta")
        assert meta(x.to("meta"), p.to("meta"))[0].shape == (1, 9, 16)


def test_a_module_with_numbers_of_its_own_is_left_alone(device, patched):
    class Twisted(modeling("llama").LlamaRotaryEmbedding):
        def forward(self, x, position_ids):
            cos, sin = super().forward(x, position_ids)
            return 2 * cos, sin

    rotary = Twisted(config_of()).to(device)
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(9, device=device)[None]
    want = rotary(x, p)
    patched(rotary, rows=9)
    for a, b in zip(rotary(x, p), want, strict=True):
        same(a, b)


@pytest.mark.parametrize("inference", [False, True])
def test_autocast_and_modes(inference, device, patched):
    rotary = rotary_of(device=device)
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(9, device=device)[None]
    want = rotary(x, p)
    patched(rotary, rows=64)
    with torch.autocast(device, torch.bfloat16), torch.inference_mode(inference):
        got = rotary(x, p)
    for other in (got, rotary(x, p)):
        for a, b in zip(other, want, strict=True):
            same(a, b)


@pytest.mark.parametrize("rows", [None, 64])
def test_traced_before_any_other_call(rows, device, patched):
    """A tracer must meet no probe, or would find other operators when it traces again."""
    rotary = rotary_of(device=device)
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(9, device=device)[None]
    want = rotary(x, p + 3)
    patched(rotary, rows=rows)
    traced = torch.jit.trace(lambda ids: rotary(x, ids), p)
    for a, b in zip(traced(p + 3), want, strict=True):
        same(a, b)


@pytest.mark.parametrize("rows", [None, 64])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_made_graphs_before_any_other_call(mode, rows, device, patched):
    rotary = rotary_of(device=device)
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(9, device=device)[None]
    want = rotary(x, p + 3)
    patched(rotary, rows=rows)
    make = make_fx(lambda ids: rotary(x, ids), tracing_mode=mode, _allow_non_fake_inputs=True)
    for got in (make(p)(p + 3), rotary(x, p + 3)):
        for a, b in zip(got, want, strict=True):
            same(a, b)


@pytest.mark.parametrize("probed", [False, True])
def test_nothing_fake_is_kept(probed, device, patched):
    rotary, other = (rotary_of(device=device) for _ in range(2))
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(9, device=device)[None]
    want = rotary(x, p)
    patched(rotary, rows=64)
    if probed:
        other(x, p)
    with FakeTensorMode(allow_non_fake_inputs=True):
        rotary(x, p)
    for a, b in zip(rotary(x, p), want, strict=True):
        same(a, b)


# --- rows that are kept -------------------------------------------------------------------------


def test_rows_are_kept_until_the_frequencies_change(device, patched):
    rotary, stock = rotary_of(device=device), rotary_of(device=device)
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(9, device=device)[None]
    patched(rotary, rows=16)
    rotary(x, p)
    assert "cos" not in operators(rotary, x, p + 1)
    for change in (lambda r: r.inv_freq.mul_(0.5), lambda r: r.bfloat16(), lambda r: r.float()):
        change(rotary), change(stock)
        assert "cos" in operators(rotary, x, p)
        assert "cos" not in operators(rotary, x, p)
        unpatch(rotary)
        want = stock(x, p)
        patch(rotary, rows=16)
        for a, b in zip(rotary(x, p), want, strict=True):
            same(a, b)


def test_rows_get_no_gradient(device, patched):
    rotary = rotary_of(device=device)
    rotary.inv_freq.requires_grad_()
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(9, device=device)[None]
    want = rotary(x, p)
    patched(rotary, rows=16)
    for a, b in zip(rotary(x, p), want, strict=True):
        same(a, b)
        assert not a.requires_grad


def test_rows_beyond_the_bound_are_errors(patched):
    rotary = rotary_of()
    patched(rotary, rows=16)
    x = torch.zeros(1, 1, 64)
    rotary(x, torch.tensor([[15]]))
    for beyond in (16, -1):
        with pytest.raises(IndexError):
            rotary(x, torch.tensor([[beyond]]))


def test_kept_rows_are_no_state_of_the_model(device, patched):
    model = model_of(device=device)
    ids = torch.randint(1, 97, (2, 19), device=device)
    keys = list(model.state_dict())
    patched(model, rows=64)
    want = model(ids).logits
    assert list(model.state_dict()) == keys
    buffer = io.BytesIO(pickle.dumps(model))
    for other in (copy.deepcopy(model), pickle.load(buffer)):
        same(other(ids).logits, want)
    model.to(torch.float64).to(torch.float32)
    same(model(ids).logits, want)


# --- rows of float64 angles ---------------------------------------------------------------------


def exact_frequencies(rotary, layer_type=None):
    said = config_arguments(rotary.config, layer_type)
    return frequencies(said["rotary_dim"], said["base"], said["scaling"])[0]


def exact_pair(inv_freq, ids, scale=1.0, family="llama"):
    """Float64 cosines and sines, in the columns of this family."""
    angles = ids.cpu().double()[..., None] * inv_freq.cpu().double()
    if family == "cohere":
        angles = angles.repeat_interleave(2, -1)
    elif family != "gpt_oss":
        angles = torch.cat([angles, angles], -1)
    return angles.cos() * scale, angles.sin() * scale


def within_an_ulp(got, want):
    """By got's dtype, and by what float64 angles of far positions lose themselves (1e-11)."""
    for a, b in zip(got, want, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a.cpu().double(), b, rtol=eps, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_float64_rows(family, kind, dtype, device, patched):
    rotary = rotary_of(family, kind, device)
    x = torch.zeros(1, 1, 64, device=device, dtype=dtype)
    ids = torch.tensor([[0, 1, 2, 77], [999, 65537, 99_999, 131_071]], device=device)
    stock = rotary(x, ids)
    patched(rotary, rows=131_072, table="float64")
    got = rotary(x, ids)
    assert [a.dtype for a in got] == [b.dtype for b in stock]
    want = exact_pair(exact_frequencies(rotary), ids, rotary.attention_scaling, family)
    within_an_ulp(got, want)
    assert not {"cos", "bmm"} & set(operators(rotary, x, ids))


def test_float64_rows_of_far_positions_are_closer_to_the_truth(device, patched):
    rotary = rotary_of(device=device)
    x, far = torch.zeros(1, 1, 64, device=device), torch.tensor([[131_071]], device=device)
    stock = rotary(x, far)
    patched(rotary, rows=131_072, table="float64")
    truth = exact_pair(10000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16), far)
    for ours, theirs, true in zip(rotary(x, far), stock, truth, strict=True):
        off, stock_off = ((a.cpu() - true).abs().max() for a in (ours, theirs))
        assert off < 1e-7 and stock_off > 1e-4


def test_float64_rows_follow_the_module_s_frequencies(device, patched):
    rotary = rotary_of(device=device)
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(64, device=device)[None]
    patched(rotary, rows=64, table="float64")
    rotary.bfloat16()  # what a cast lost, the config still knows
    within_an_ulp(rotary(x, p), exact_pair(exact_frequencies(rotary), p))
    rotary.float().inv_freq.mul_(0.5)
    within_an_ulp(rotary(x, p), exact_pair(rotary.inv_freq, p))
    rotary.inv_freq, rotary.config = rotary.inv_freq * 4, None
    within_an_ulp(rotary(x, p), exact_pair(rotary.inv_freq, p))


@pytest.mark.skipif(not MODERN, reason="transformers 4 has one module for each layer type")
def test_float64_rows_of_layer_types(device, patched):
    config = transformers.Gemma3TextConfig(**SIZES | {"num_hidden_layers": 6})
    rotary = modeling("gemma3").Gemma3RotaryEmbedding(config).to(device)
    x, p = torch.zeros(1, 1, 64, device=device), torch.tensor([[3, 4095]], device=device)
    patched(rotary, rows=4096, table="float64")
    full, sliding = "full_attention", "sliding_attention"
    for kind in (full, sliding):
        within_an_ulp(rotary(x, p, kind), exact_pair(exact_frequencies(rotary, kind), p))
    assert not torch.equal(rotary(x, p, full)[0], rotary(x, p, sliding)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_rows_in_a_model(family, device):
    model = model_of(family, device)
    ids = torch.randint(1, 97, (2, 19), device=device)
    want = model(ids).logits
    patch(model, rows=64, table="float64")
    try:
        got = model(ids).logits
    finally:
        unpatch(model)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    same(model(ids).logits, want)


# --- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, 64])
def test_prefill_and_decode_steps(dtype, rows, device, patched):
    model = model_of(device=device, dtype=dtype)
    ids = torch.randint(1, 97, (2, 19), device=device)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    padded = (mask.cumsum(-1) - 1).clamp(min=0)

    def run():
        cache, logits = transformers.DynamicCache(config=model.config), []
        for start, stop in ((0, 13), *((i, i + 1) for i in range(13, 19))):
            out = model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=padded[:, start:stop],
                past_key_values=cache,
            )
            logits.append(out.logits)
        return logits

    with torch.no_grad():
        want = run()
        patched(model, rows=rows)
        for a, b in zip(run(), want, strict=True):
            same(a, b)


@pytest.mark.parametrize("rows", [None, 64])
def test_generate(rows, device, patched):
    model = model_of(device=device)
    ids = torch.randint(1, 97, (2, 7), device=device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    want = model.generate(ids, **options)
    patched(model, rows=rows)
    assert torch.equal(model.generate(ids, **options), want)


# --- under torch.compile ------------------------------------------------------------------------


class Graphs:
    """A backend that runs graphs as they are and remembers what they call."""

    def __init__(self):
        self.targets = []

    def __call__(self, graph, inputs):
        self.targets.append([str(n.target) for n in graph.graph.nodes if "call" in n.op])
        return graph.forward

    def fused(self):
        return [sum("fused_rope" in target for target in graph) for graph in self.targets]


@pytest.mark.parametrize(
    "options,fused",
    [
        ({}, 0),
        ({"precision": "fp32"}, 2),
        ({"compiled": "fused"}, 2),
        ({"compiled": "stock", "precision": "fp32"}, 0),
    ],
)
def test_what_the_compiler_is_given(options, fused, device, patched):
    torch._dynamo.reset()
    model = model_of(device=device)
    ids = torch.randint(0, 97, (2, 19), device=device)
    patched(model, **options, rows=64)
    want = model(ids).logits
    graphs = Graphs()
    got = torch.compile(model, backend=graphs, fullgraph=True)(ids).logits
    assert graphs.fused() == [fused]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_patching_again_compiles_nothing_anew(device):
    torch._dynamo.reset()
    model, graphs = model_of(device=device), Graphs()
    ids = torch.randint(0, 97, (2, 19), device=device)
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for _ in range(2):
        compiled(ids)
        for choice in ("fused", "stock"):
            patch(model, compiled=choice)
            try:
                compiled(ids)
            finally:
                unpatch(model)
    assert graphs.fused() == [0, 2, 0]


@pytest.mark.parametrize(
    "option,message",
    [
        ({"compiled": "eager"}, "expected compiled .* got 'eager'"),
        ({"rows": 0}, "expected rows >= 1 or None, got 0"),
        ({"table": "float32"}, "expected table 'stock' or 'float64', got 'float32'"),
        ({"table": "float64"}, "expected rows >= 1 with table 'float64', got None"),
    ],
)
def test_unknown_options_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        patch(model_of(), **option)


def test_one_choice_for_a_family(patched):
    model = model_of()
    patched(model, rows=8)
    for option in (
        {"rows": 9},
        {"rows": 8, "compiled": "fused"},
        {"rows": 8, "table": "float64"},
        {},
    ):
        with pytest.raises(ValueError, match="patched with"):
            patch(model, **option)


def test_unpatch_restores_the_module():
    model, rotary = model_of(), modeling("llama").LlamaRotaryEmbedding
    stock = rotary.forward
    first = patch(model)
    assert rotary.forward is not stock and "LlamaRotaryEmbedding" in str(first)
    patch(model)
    unpatch(model)
    assert rotary.forward is not stock
    unpatch(model)
    assert rotary.forward is stock


def test_a_forward_that_somebody_else_replaced_is_left_alone(monkeypatch):
    """By whatever signature: the patch is taken back, and the next one may be another."""
    model, rotary = model_of(), modeling("llama").LlamaRotaryEmbedding
    key = f"{rotary.__module__}.LlamaRotaryEmbedding"
    stock = rotary.forward
    patch(model)

    def theirs(*args, **kwargs):
        return stock(*args, **kwargs)

    monkeypatch.setattr(rotary, "forward", theirs)
    report = unpatch(model)
    assert rotary.forward is theirs
    assert report.tables == {key: "somebody else's"}
    monkeypatch.setattr(rotary, "forward", stock)
    assert patch(model, rows=8).tables == {key: "ours"}
    assert unpatch(model).tables == {key: "its own"}


def test_example_of_the_documentation():
    patching = importlib.import_module("fused_rope.compat.transformers.patching")
    result = doctest.testmod(patching)
    assert result.attempted > 3 and result.failed == 0
