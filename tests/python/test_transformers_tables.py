"""Rotary modules of patched models: the model's own tables, bitwise, in fewer kernels."""

import copy
import doctest
import gc
import importlib
import io
import pickle
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from oracle import DTYPES, same
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

transformers = pytest.importorskip("transformers")

from fused_rope.compat._patching import replacements  # noqa: E402
from fused_rope.compat.transformers import patch, tables, unpatch  # noqa: E402
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
    models = []

    def patch_once(model, **options):
        models.append(model)
        return patch(model, **options)

    yield patch_once
    for model in models:
        unpatch(model)


def positions(device):
    """Prefill, decode steps, left padding (0 or negative there), far and unordered ones, int32."""
    S = 33
    yield torch.arange(S)[None]
    yield torch.tensor([[0]])
    yield torch.tensor([[7], [40]])
    yield torch.stack([torch.arange(S), (torch.arange(S) - 5).clamp(min=0)])
    yield torch.stack([torch.arange(S), torch.arange(S) - 5])
    yield torch.tensor([[-1]])
    yield torch.tensor([[-(2**24) - 1, 5, -999_999]])
    yield torch.randint(0, 1_000_000, (3, 7))
    yield torch.arange(S, dtype=torch.int32)[None]


@pytest.mark.parametrize(
    "family", [f if f == "llama" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
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
    for pair, original in zip(got, want, strict=True):
        for a, b in zip(pair, original, strict=True):
            same(a, b)
            assert not a.requires_grad
    names = operators(rotary, x, ids[0])
    assert "bmm" not in names and ("cos" in names) == (rows is None or device == "cuda")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("rows", [None, 1000])
def test_frequencies_that_follow_the_length_are_the_module_s_own(kind, rows, device, patched):
    rotary, other = (rotary_of("llama", kind, device) for _ in range(2))
    x = torch.zeros(1, 1, 64, device=device)
    ids = [torch.arange(S, device=device)[None] for S in (16, 40, 100, 200, 20)]
    want = [other(x, p) for p in ids]
    patched(rotary, rows=rows)
    for p, original in zip(ids, want, strict=True):
        for a, b in zip(rotary(x, p), original, strict=True):
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
    for kind, original in zip(kinds, want, strict=True):
        for a, b in zip(rotary(x, p, layer_type=kind), original, strict=True):
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


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("rows", [None, 64])
def test_traced(rows, checked, device, patched):
    """A tracer must see no reference check: it would find other operators when it traces again."""
    rotary = rotary_of(device=device)
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(9, device=device)[None]
    want = rotary(x, p + 3)
    patched(rotary, rows=rows)
    if checked:
        rotary(x, p)
    traced = torch.jit.trace(lambda ids: rotary(x, ids), p)
    for a, b in zip(traced(p + 3), want, strict=True):
        same(a, b)


def through_make_fx(mode, pre_dispatch=False):
    def made(rotary, x, p):
        options = {"tracing_mode": mode, "pre_dispatch": pre_dispatch}
        return make_fx(lambda i: rotary(x, i), _allow_non_fake_inputs=True, **options)(p)

    return made


def exported(rotary, x, p):
    return lambda ids: export(rotary, (x, p), strict=False).module()(x, ids)


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("rows", [None, 64])
@pytest.mark.parametrize(
    "make",
    [
        *(through_make_fx(mode) for mode in ("real", "fake", "symbolic")),
        through_make_fx("real", pre_dispatch=True),
        exported,
    ],
    ids=["real", "fake", "symbolic", "pre_dispatch", "export"],
)
def test_graphs(make, rows, checked, device, patched):
    """They hold the module's buffer, not rows that were kept of it."""
    rotary = rotary_of(device=device)
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(9, device=device)[None]
    want = rotary(x, p + 3)
    patched(rotary, rows=rows)
    if checked:
        rotary(x, p)
    graph = make(rotary, x, p)
    for got in (graph(p + 3), rotary(x, p + 3)):
        for a, b in zip(got, want, strict=True):
            same(a, b)
    rotary.inv_freq.mul_(0.5)
    for a, b in zip(graph(p), rotary(x, p), strict=True):
        same(a, b)


def fake(rotary, x, p):
    with FakeTensorMode(allow_non_fake_inputs=True):
        rotary(x, p)


def inference(rotary, x, p):
    with torch.inference_mode():
        rotary(x, p)


MODES = {
    "fake": fake,
    "inference": inference,
    "vmap": lambda rotary, x, p: torch.vmap(lambda ids: rotary(x, ids))(p[None]),
    "functionalize": lambda rotary, x, p: torch.func.functionalize(lambda i: rotary(x, i))(p),
    "jvp": lambda rotary, x, p: torch.func.jvp(lambda x: rotary(x, p)[0], (x,), (x,)),
    "traced": lambda rotary, x, p: torch.jit.trace(lambda i: rotary(x, i), p),
    "proxies": lambda rotary, x, p: through_make_fx("symbolic")(rotary, x, p),
    "exported": lambda rotary, x, p: export(rotary, (x, p), strict=False),
}


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("table", ["original", "float64"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_a_mode_is_kept(mode, table, checked, device, patched):
    rotary, other = (rotary_of(device=device) for _ in range(2))
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(9, device=device)[None]
    patched(rotary, rows=64, table=table)
    want = other(x, p)
    if checked:
        rotary(x, p)
    MODES[mode](rotary, x, p)
    got = rotary(x, p)
    for a, b in zip(got, want, strict=True):
        assert type(a) is torch.Tensor and not a.is_inference()
        same(a, b)
    sum(half.clone().requires_grad_() * half for half in got).sum().backward()


# --- which modules are left alone ---------------------------------------------------------------


class Plain(modeling("llama").LlamaRotaryEmbedding):
    def forward(self, x, position_ids):
        return super().forward(x, position_ids)


class Gain(Plain):
    """A setting of the instance decides."""

    gain = 1.0

    def forward(self, x, position_ids):
        cos, sin = super().forward(x, position_ids)
        return cos * self.gain, sin * self.gain


class Unscaled(Plain):
    """It has a scale and does not apply it."""

    def forward(self, x, position_ids):
        cos, sin = super().forward(x, position_ids)
        return cos / self.attention_scaling, sin / self.attention_scaling


class Noisy(Plain):
    def forward(self, x, position_ids):
        return super().forward(x, position_ids + self.training)


class Growing(Plain):
    """Its frequencies follow the length, whatever its rope_type says."""

    def forward(self, x, position_ids):
        if int(position_ids.max()) >= self.max_seq_len_cached:
            self.max_seq_len_cached = int(position_ids.max()) + 1
            self.inv_freq = self.inv_freq * 0.5
        return super().forward(x, position_ids)


class Registering(Plain):
    """It keeps the longest positions that it was given."""

    def forward(self, x, position_ids):
        last = getattr(self, "last", torch.tensor(0, device=x.device))
        self.register_buffer("last", torch.maximum(last, position_ids.max()))
        return super().forward(x, position_ids + (self.last > 50).long())


class Absolute(Plain):
    def forward(self, x, position_ids):
        return super().forward(x, position_ids.abs())


def instances(cls, device, change):
    rotary = cls(config_of()).to(device).eval()
    change(rotary)
    return rotary


@pytest.mark.parametrize("rows", [None, 16])
@pytest.mark.parametrize(
    "cls,change",
    [
        (Gain, lambda r: setattr(r, "gain", 2.0)),
        (Unscaled, lambda r: setattr(r, "attention_scaling", 2.0)),
        (Noisy, lambda r: r.train()),
        (Growing, lambda r: setattr(r, "max_seq_len_cached", 4)),
        (Registering, lambda r: None),
        (Absolute, lambda r: None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("late", [False, True])
def test_another_instance_decides_nothing(cls, change, late, rows, device):
    """Nor what the module was before it was changed."""
    own = instances(cls, device, change)
    ours = tables.Tables(cls.forward, rows)
    x = torch.zeros(1, 1, 64, device=device)
    ids = [torch.arange(S, device=device)[None] - 2 for S in (4, 12, 4)]
    ours(instances(cls, device, lambda r: None), x, ids[0], None)
    rotary = instances(cls, device, lambda r: None if late else change(r))
    if late:
        ours(rotary, x, ids[0], None)
        change(rotary)
    for p in ids:
        keys = list(rotary.state_dict())
        got, want = ours(rotary, x, p, None), own(x, p)
        assert list(rotary.state_dict()) == keys
        for a, b in zip(rotary(x, p) if got is None else got, want, strict=True):
            same(a, b)


@pytest.mark.parametrize("rows", [None, 16])
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_frequencies_decide_nothing(family, value, rows, device, patched):
    """As they are before weights are loaded: tiled and repeated tables of them are alike."""
    rotary = rotary_of(family, device=device)
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(9, device=device)[None]
    want = rotary(x, p)
    held = rotary.inv_freq.clone()
    patched(rotary, rows=rows)
    rotary.inv_freq.fill_(value)
    rotary(x, p)
    rotary.inv_freq.copy_(held)
    for a, b in zip(rotary(x, p), want, strict=True):
        same(a, b)
    assert "bmm" not in operators(rotary, x, p)


def test_the_reference_check_leaves_the_module_as_it_was(device, patched):
    rotary = rotary_of(device=device)
    before, buffers = dict(vars(rotary)), dict(rotary.named_buffers())
    patched(rotary, rows=16)
    rotary(torch.zeros(1, 1, 64, device=device), torch.arange(9, device=device)[None])
    assert vars(rotary) == before
    assert all(buffers[name] is buffer for name, buffer in rotary.named_buffers())


def test_a_setting_that_always_changes_does_not_fill_the_memory(device, patched):
    rotary, own = rotary_of(device=device), rotary_of(device=device)
    ours = tables.Tables(type(rotary).forward, 16)
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(9, device=device)[None]
    for step in range(50):
        rotary.attention_scaling = own.attention_scaling = 1 + step / 50
        for a, b in zip(ours(rotary, x, p, None), own(x, p), strict=True):
            same(a, b)
    found = ours._found[rotary]
    assert len(found.recipes) <= tables._SETTINGS_PER_MODULE and len(found.kept) <= 1


def test_selective_checkpointing_sees_the_same_operators_twice(device, patched):
    """What happens once for a module, the check and the rows, is not recorded with the first."""
    rotary = rotary_of(device=device)
    x, p = torch.ones(1, 9, 16, device=device, requires_grad=True), torch.arange(9, device=device)

    def run(x):
        cos, sin = rotary(x, p[None])
        return (x * cos).cos() * sin.sin()

    def gradient(**options):
        return torch.autograd.grad(checkpoint(run, x, use_reentrant=False, **options).sum(), x)[0]

    def save_all():
        policy = lambda *args, **options: CheckpointPolicy.MUST_SAVE  # noqa: E731
        return create_selective_checkpoint_contexts(policy)

    want = gradient()
    patched(rotary, rows=16)
    same(gradient(context_fn=save_all), want)
    unpatch(rotary), patch(rotary, rows=16)
    assert operators(rotary, x, p[None]) == operators(rotary, x, p[None])


# --- rows that are kept -------------------------------------------------------------------------


@pytest.fixture
def made_rows(monkeypatch):
    """A list that gets the bound of all rows that are made."""
    bounds, make_rows = [], tables.Recipe.make_rows

    def counted(self, frequencies, scale, bound, dtype):
        bounds.append(bound)
        return make_rows(self, frequencies, scale, bound, dtype)

    monkeypatch.setattr(tables.Recipe, "make_rows", counted)
    return bounds


def replace_buffer(rotary):
    del rotary.inv_freq
    rotary.register_buffer("inv_freq", rotary.original_inv_freq * 0.5, persistent=False)


def load(rotary):
    rotary.register_buffer("inv_freq", rotary.inv_freq, persistent=True)
    state = rotary.state_dict()
    rotary.load_state_dict(state | {"inv_freq": state["inv_freq"] * 0.5})


def offload(rotary):
    device = rotary.inv_freq.device
    rotary.to("meta").to_empty(device=device)
    for name in ("inv_freq", "original_inv_freq"):
        getattr(rotary, name).copy_(torch.arange(1, 9, device=device) / 9)


def inference_frequencies(rotary):
    with torch.inference_mode():
        rotary.inv_freq = rotary.inv_freq * 0.5


CHANGES = {
    "in place": lambda r: r.inv_freq.mul_(0.5),
    "one element": lambda r: r.inv_freq[-1:].zero_(),
    "detached": lambda r: r.inv_freq.detach().mul_(0.5),
    ".data in place": lambda r: r.inv_freq.data.mul_(0.5),
    ".data set": lambda r: setattr(r.inv_freq, "data", r.inv_freq * 0.5),
    "set_": lambda r: r.inv_freq.set_(r.inv_freq * 0.5),
    "storage": lambda r: r.inv_freq.untyped_storage().copy_((r.inv_freq * 0.5).untyped_storage()),
    "NumPy view": lambda r: np.multiply(r.inv_freq.numpy(), 0.5, out=r.inv_freq.numpy()),
    "DLPack": lambda r: torch.from_dlpack(r.inv_freq.detach()).mul_(0.5),
    "attribute": lambda r: setattr(r, "inv_freq", r.inv_freq * 0.5),
    "strided": lambda r: setattr(r, "inv_freq", torch.stack([r.inv_freq * 0.5] * 2, 1)[:, 0]),
    "buffer": replace_buffer,
    "_buffers": lambda r: r._buffers.update(inv_freq=r.inv_freq * 0.5),
    "load_state_dict": load,
    "bfloat16": lambda r: r.bfloat16(),
    "bfloat16 and back": lambda r: r.bfloat16().float(),
    "float64": lambda r: r.double(),
    "offload": offload,
    "inference": inference_frequencies,
    "attention_scaling": lambda r: setattr(r, "attention_scaling", 1.25),
    "NaN": lambda r: r.inv_freq.data[2:3].fill_(float("nan")),
    "no change": lambda r: None,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rows", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frequencies_may_change_in_any_way(change, rows, dtype, device, patched):
    if change == "NumPy view" and device == "cuda":
        pytest.skip("CUDA tensors have no NumPy view")
    rotary, own = rotary_of(device=device), rotary_of(device=device)
    x, p = torch.zeros(1, 1, 64, device=device, dtype=dtype), torch.arange(9, device=device)[None]
    CHANGES[change](own)
    want = own(x, p)
    patched(rotary, rows=rows)
    for _ in range(2):
        rotary(x, p)
    CHANGES[change](rotary)
    for _ in range(2):
        for a, b in zip(rotary(x, p), want, strict=True):
            same(a, b)


def test_rows_are_made_only_where_numbers_changed(device, patched, made_rows):
    rotary = rotary_of(device=device)
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(9, device=device)[None]
    patched(rotary, rows=16)
    made = 0 if device == "cuda" else 1  # there the comparison costs as much as the recipe
    for change, more in (
        (lambda r: None, made),
        (lambda r: r.inv_freq.mul_(1.0), 0),  # as in DistributedDataParallel's broadcasts
        (lambda r: setattr(r, "inv_freq", r.inv_freq.clone()), 0),  # as offloading hooks do
        (lambda r: r.inv_freq.data[2:3].fill_(float("nan")), made),
        (lambda r: r.inv_freq.mul_(0.5), made),
    ):
        before = len(made_rows)
        change(rotary)
        for _ in range(3):
            rotary(x, p + 1)
        assert len(made_rows) == before + more


def test_rows_get_no_gradient(device, patched):
    rotary = rotary_of(device=device)
    rotary.inv_freq.requires_grad_()
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(9, device=device)[None]
    want = rotary(x, p)
    patched(rotary, rows=16)
    for a, b in zip(rotary(x, p), want, strict=True):
        same(a, b)
        assert not a.requires_grad


@pytest.mark.parametrize("table", ["original", "float64"])
@pytest.mark.parametrize("ids", [[[16]], [[-1, 16, 3]], [[0, 1], [40, 2]]])
def test_rows_beyond_the_bound_are_errors(ids, table, patched):
    rotary = rotary_of()
    patched(rotary, rows=16, table=table)
    x, ids = torch.zeros(1, 1, 64), torch.tensor(ids)
    rotary(x, torch.tensor([[15]]))
    last = int(ids.max())
    message = (
        rf"patch\(model, rows=16\): position {last} has no row; pass rows= at least {last + 1}"
    )
    for call in (rotary, torch.inference_mode()(rotary)):
        with pytest.raises(IndexError, match=message):
            call(x, ids)
    rotary(x, torch.tensor([[15]]))


def test_any_position_is_valid_on_a_device_that_keeps_no_rows(patched):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    rotary = rotary_of(device="cuda")
    x, p = torch.zeros(1, 1, 64, device="cuda"), torch.tensor([[-3, 99]], device="cuda")
    want = rotary(x, p)
    patched(rotary, rows=16)
    for a, b in zip(rotary(x, p), want, strict=True):
        same(a, b)


def test_kept_rows_are_no_state_of_the_model(device, patched):
    model = model_of(device=device)
    ids = torch.randint(1, 97, (2, 19), device=device)
    keys = list(model.state_dict())
    patched(model, rows=64)
    size = len(pickle.dumps(model))
    want = model(ids).logits
    assert list(model.state_dict()) == keys
    assert abs(len(pickle.dumps(model)) - size) < 64
    for save in (pickle.dump, torch.save):
        buffer = io.BytesIO()
        save(model, buffer)
        buffer.seek(0)
        load = pickle.load if save is pickle.dump else lambda f: torch.load(f, weights_only=False)
        for other in (copy.deepcopy(model), load(buffer)):
            same(other(ids).logits, want)
            other.model.rotary_emb.inv_freq.data.mul_(0.5)
            assert not torch.equal(other(ids).logits, want)
            same(model(ids).logits, want)
    model.to(torch.float64).to(torch.float32)
    same(model(ids).logits, want)


ROWS = 4099  # a size that no other tensor has


def kept_tensors():
    gc.collect()
    return sum(type(t) is torch.Tensor and t.shape[:1] == (ROWS,) for t in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("table", ["original", "float64"])
def test_kept_rows_go_with_the_patch(table):
    rotary = rotary_of()
    forward = rotary.forward
    for rows in (ROWS, 7, ROWS):
        patch(rotary, rows=rows, table=table)
        captured = rotary.forward
        for dtype in (torch.float32, torch.bfloat16):
            captured(torch.zeros(1, 1, 64, dtype=dtype), torch.tensor([[3]]))
        assert kept_tensors() == (2 if rows == ROWS else 0)
        unpatch(rotary)
        assert kept_tensors() == 0
    x, beyond = torch.zeros(1, 1, 64), torch.tensor([[ROWS]])
    for a, b in zip(captured(x, beyond), forward(x, beyond), strict=True):
        same(a, b)  # the patched method, called afterwards, is the module's own
    assert kept_tensors() == 0


def test_kept_rows_go_with_a_patch_that_somebody_wrapped(monkeypatch):
    rotary, cls = rotary_of(), modeling("llama").LlamaRotaryEmbedding
    own = cls.forward
    patch(rotary, rows=ROWS)
    ours = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x, ids: ours(self, x, ids))
    rotary(torch.zeros(1, 1, 64), torch.tensor([[3]]))
    assert kept_tensors() == 1
    unpatch(rotary)
    rotary(torch.zeros(1, 1, 64), torch.tensor([[ROWS]]))
    assert kept_tensors() == 0
    monkeypatch.setattr(cls, "forward", own)


def test_kept_rows_go_with_the_model(patched):
    patched(rotary_of(), rows=ROWS)
    model = model_of()
    model(torch.tensor([[1, 2, 3]]))
    dead = weakref.ref(model.model.rotary_emb)
    assert kept_tensors() == 1
    del model
    assert kept_tensors() == 0 and dead() is None


def test_many_modules_of_equal_numbers_share_rows(patched):
    modules = [rotary_of() for _ in range(4)]
    modules.append(copy.deepcopy(modules[0]))
    modules[1].inv_freq.mul_(0.5)
    patched(modules[0], rows=ROWS)
    for rotary in modules:
        rotary(torch.zeros(1, 1, 64), torch.tensor([[3]]))
    assert kept_tensors() == 2


def test_patching_with_ever_other_rows_keeps_nothing():
    rotary = rotary_of()
    patch(rotary, rows=2), unpatch(rotary)
    before = len(replacements.retired)
    for rows in range(3, 30):
        patch(rotary, rows=rows)
        rotary(torch.zeros(1, 1, 64), torch.tensor([[rows - 1]]))
        unpatch(rotary)
    assert len(replacements.retired) == before


@pytest.mark.parametrize("table", ["original", "float64"])
def test_threads_share_a_module(table, device):
    """While they patch anew, in two dtypes, and while another replaces the frequencies."""
    torch.set_num_threads(1)
    rotary, own = rotary_of(device=device), [rotary_of(device=device) for _ in range(2)]
    held = [rotary.inv_freq, rotary.inv_freq * 0.5]
    own[1].inv_freq.mul_(0.5)
    kinds = [(dtype, S) for dtype in (torch.float32, torch.bfloat16) for S in (3, 200)]
    xs = [torch.zeros(1, 1, 64, device=device, dtype=dtype) for dtype, _ in kinds]
    ids = [torch.arange(S, device=device)[None] - 1 for _, S in kinds]
    options = {"rows": 256, "table": table}
    patch(own[0], **options) if table == "float64" else None
    want = [[r(x, p) for r in own] for x, p in zip(xs, ids, strict=True)]
    unpatch(own[0]) if table == "float64" else None
    other = [[r(x, p) for r in own] for x, p in zip(xs, ids, strict=True)]
    failures, calls, end = [], [0] * len(kinds), time.time() + 3

    def call(i):
        while time.time() < end:
            try:
                got, calls[i] = rotary(xs[i], ids[i]), calls[i] + 1
                if not any(
                    all(torch.equal(a, b) for a, b in zip(got, pair, strict=True))
                    for pair in want[i] + other[i]
                ):
                    failures.append(kinds[i])
            except Exception as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(kinds))]
    for thread in threads:
        thread.start()
    while time.time() < end:
        patch(rotary, **options)
        for inv_freq in held * 3:
            rotary.inv_freq = inv_freq
            time.sleep(0.002)
        unpatch(rotary)
    for thread in threads:
        thread.join()
    assert not failures and min(calls) > 10, (failures[:3], calls)


# --- rows of float64 angles ---------------------------------------------------------------------


@pytest.fixture(params=["kept", "selected"])
def frequencies_are(request, device, monkeypatch):
    """Rows are kept on the CPU; CUDA selects frequencies on the device, which the CPU can too."""
    if request.param == "selected":
        monkeypatch.setattr(tables, "_compares_on_host", lambda device: False)
    elif device == "cuda":
        pytest.skip("nothing is kept on CUDA")


def exact_frequencies(rotary, layer_type=None):
    said = config_arguments(rotary.config, layer_type, interleaved=False)
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
def test_float64_rows(family, kind, dtype, device, patched, frequencies_are):
    rotary = rotary_of(family, kind, device)
    x = torch.zeros(1, 1, 64, device=device, dtype=dtype)
    ids = torch.tensor([[0, -1, 2, 77], [-999, 65537, 99_999, 131_071]], device=device)
    original = rotary(x, ids)
    patched(rotary, rows=131_072, table="float64")
    got = rotary(x, ids)
    assert [a.dtype for a in got] == [b.dtype for b in original]
    want = exact_pair(exact_frequencies(rotary), ids, rotary.attention_scaling, family)
    within_an_ulp(got, want)
    assert "bmm" not in operators(rotary, x, ids)


def test_float64_rows_of_far_positions_are_closer_to_the_truth(device, patched, frequencies_are):
    rotary = rotary_of(device=device)
    x, far = torch.zeros(1, 1, 64, device=device), torch.tensor([[131_071]], device=device)
    original = rotary(x, far)
    patched(rotary, rows=131_072, table="float64")
    truth = exact_pair(10000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16), far)
    for ours, theirs, true in zip(rotary(x, far), original, truth, strict=True):
        off, original_off = ((a.cpu() - true).abs().max() for a in (ours, theirs))
        assert off < 1e-7 and original_off > 1e-4


def test_float64_rows_follow_the_module_s_frequencies(device, patched, frequencies_are):
    rotary = rotary_of(device=device)
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(64, device=device)[None]
    patched(rotary, rows=64, table="float64")
    rotary.bfloat16()  # what a cast lost, the config still knows
    within_an_ulp(rotary(x, p), exact_pair(exact_frequencies(rotary), p))
    rotary.float().inv_freq.mul_(0.5)
    within_an_ulp(rotary(x, p), exact_pair(rotary.inv_freq, p))
    rotary.inv_freq, rotary.config = rotary.inv_freq * 4, None
    within_an_ulp(rotary(x, p), exact_pair(rotary.inv_freq, p))


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "NaN"])
def test_float64_rows_follow_any_change(change, device, patched, frequencies_are):
    if change == "NumPy view" and device == "cuda":
        pytest.skip("CUDA tensors have no NumPy view")
    rotary = rotary_of(device=device)
    x, p = torch.zeros(1, 1, 64, device=device), torch.arange(64, device=device)[None] - 3
    patched(rotary, rows=64, table="float64")
    rotary(x, p)
    CHANGES[change](rotary)
    config, held = exact_frequencies(rotary), rotary.inv_freq.double().cpu()
    rtol = max(2e-6, torch.finfo(rotary.inv_freq.dtype).eps)
    used = torch.where((held - config).abs() <= rtol * config, config, held)
    for _ in range(2):
        within_an_ulp(rotary(x, p), exact_pair(used, p, rotary.attention_scaling))


def test_float64_rows_do_not_depend_on_other_positions(patched):
    """A padded sequence in the batch changes nothing in the others."""
    rotary = rotary_of()
    x, p = torch.zeros(1, 1, 64), torch.arange(4096)[None]
    patched(rotary, rows=4096, table="float64")
    for a, b in zip(rotary(x, torch.cat([p - 7, p])), rotary(x, p), strict=True):
        same(a[1:], b)


def test_float64_tables_in_a_cuda_graph(patched):
    """It outlives the patch, and follows the frequencies."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    rotary = rotary_of(device="cuda")
    x, p = torch.zeros(1, 1, 64, device="cuda"), torch.arange(64, device="cuda")[None]
    patch(rotary, rows=64, table="float64")
    rotary(x, p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = rotary(x, p)
    unpatch(rotary)
    torch.full((1000,), 7.0, device="cuda", dtype=torch.float64)
    graph.replay()
    within_an_ulp(got, exact_pair(exact_frequencies(rotary), p))
    rotary.inv_freq.data.mul_(0.5)
    graph.replay()
    within_an_ulp(got, exact_pair(rotary.inv_freq, p))


@pytest.mark.skipif(not MODERN, reason="transformers 4 has one module for each layer type")
def test_float64_rows_of_layer_types(device, patched, frequencies_are):
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
        pytest.param({"precision": "fp32"}, 2, marks=pytest.mark.slow),
        ({"compiled": "fused"}, 2),
        pytest.param({"compiled": "original", "precision": "fp32"}, 0, marks=pytest.mark.slow),
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
        for choice in ("fused", "original"):
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
        ({"table": "float32"}, "expected table 'original' or 'float64', got 'float32'"),
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
    original = rotary.forward
    first = patch(model)
    assert rotary.forward is not original and "LlamaRotaryEmbedding" in str(first)
    patch(model)
    unpatch(model)
    assert rotary.forward is not original
    unpatch(model)
    assert rotary.forward is original


def test_a_forward_that_somebody_else_replaced_is_left_alone(monkeypatch):
    """By whatever signature: the patch is taken back, and the next one may be another."""
    model, rotary = model_of(), modeling("llama").LlamaRotaryEmbedding
    key = f"{rotary.__module__}.LlamaRotaryEmbedding"
    original = rotary.forward
    patch(model)

    def theirs(*args, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(rotary, "forward", theirs)
    report = unpatch(model)
    assert rotary.forward is theirs
    assert report.tables == {key: "somebody else's"}
    monkeypatch.setattr(rotary, "forward", original)
    assert patch(model, rows=8).tables == {key: "ours"}
    assert unpatch(model).tables == {key: "its own"}


def test_example_of_the_documentation():
    patching = importlib.import_module("fused_rope.compat.transformers.patching")
    result = doctest.testmod(patching)
    assert result.attempted > 3 and result.failed == 0
