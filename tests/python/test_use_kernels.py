"""transformers' `use_kernels=True` uses this library's kernels when `kernels` is installed.

scripts/test.sh installs that package outside the environment, for this file and
test_transformers.py alone: it makes layers of transformers' functions, and each of its versions
fits few versions of transformers.
"""

import json
import warnings

import pytest
import torch
from oracle import same

transformers = pytest.importorskip("transformers", minversion="5.17")
kernels = pytest.importorskip("kernels", minversion="0.16")

from fused_rope.compat.transformers import kernel_layers, patch, unpatch  # noqa: E402
from fused_rope.compat.transformers.kernel_layers import (  # noqa: E402
    kernel_config,
    kernel_mapping,
)
from kernels import Mode  # noqa: E402
from torch.profiler import profile  # noqa: E402
from transformers.utils import kernel_config as theirs  # noqa: E402
from transformers_models import CASES  # noqa: E402

MODELS = {
    "V1-llama": "Half",
    "V3-gpt_oss": "HalfWidthTables",
    "V3-openai_privacy_filter": "InterleavedHalfWidthTables",
    "V22-esm": "HalfInFloat32",
    "nanochat": "HalfInverse",
}


@pytest.fixture(autouse=True)
def quiet():
    """`kernels` warns of every layer that has no mapping."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def build(quiet):
    """Builds a model and its input_ids; its layers, which its whole family shares, get their own
    forward back."""
    models = []

    def built(name):
        models.append(CASES[name].build())
        return models[-1], CASES[name].arguments()["input_ids"]

    yield built
    for model in models:
        kernelize(model, Mode.INFERENCE, {})


def kernelize(model, mode, mapping=None, device="cpu"):
    mapping = kernel_mapping(model) if mapping is None else mapping
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(model, device=device, mode=mode)


def is_ours(model, ids):
    with profile() as run:
        model(ids)
    return any("fused_rope" in event.key for event in run.key_averages())


def forward_backward(model, ids):
    model.zero_grad()
    out = model(ids)[0]
    out.float().square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("mode", [Mode.INFERENCE, Mode.TRAINING | Mode.TORCH_COMPILE], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_kernelize(name, mode, build):
    model, ids = build(name)
    assert kernel_layers.layer_name(model) == MODELS[name]
    want = forward_backward(model, ids)
    assert not is_ours(model, ids)
    kernelize(model, mode)
    assert is_ours(model, ids)
    got = forward_backward(model, ids)
    same(got[0], want[0])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    kernelize(model, Mode.INFERENCE, {})
    assert not is_ours(model, ids)


def test_patch_with_kernels(build):
    model, ids = build("V1-llama")
    want = model(ids)[0]
    patch(model)
    assert is_ours(model, ids)
    same(model(ids)[0], want)
    unpatch(model)
    assert not is_ours(model, ids)


def test_compiles_without_a_graph_break(build):
    torch._dynamo.reset()
    model, ids = build("V1-llama")
    want = model(ids)[0]
    kernelize(model, Mode.TRAINING | Mode.TORCH_COMPILE)
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(ids)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_set_use_kernels(build):
    model, ids = build("V1-llama")
    want = model(ids)[0]
    with kernels.use_kernel_mapping(kernel_mapping(model)):
        model.set_use_kernels(True)
    assert is_ours(model, ids)
    same(model(ids)[0], want)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_kernel_config_names_layers_for_cuda(training, compiled, monkeypatch, build):
    """As a model on a GPU would be kernelized; a layer that could not, would be left as it is."""
    monkeypatch.setattr(theirs, "infer_device", lambda model: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    model, ids = build("V1-llama")
    model.train(training)
    config = kernel_config(model)
    config.sanitize_kernel_mapping(model)
    config.create_compatible_mapping(model, compile=compiled)
    ((mode, repository),) = config.kernel_mapping["rotary_pos_emb"]["cuda"].items()
    assert (Mode.TRAINING in mode, Mode.TORCH_COMPILE in mode) == (training, compiled)
    layer = repository.load()
    assert layer.has_backward and layer.can_torch_compile
    kernelize(model, mode, config.kernel_mapping, device="cuda")
    assert is_ours(model, ids)


def test_a_form_without_a_layer_is_refused():
    for name in ("V5-glm", "V21-gptj"):
        with pytest.raises(ValueError, match="rotary_pos_emb"):
            kernel_mapping(CASES[name].build(device="meta"))


def test_repository_says_what_it_is():
    metadata = json.loads((kernel_layers.REPOSITORY / "metadata.json").read_text())
    assert {"name", "id", "version", "license", "backend"} <= metadata.keys()
