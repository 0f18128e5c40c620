"""patch(norms="fused") through what programs do to models: copies, casts, hooks, other weights."""

import copy
import io
import pickle

import pytest
import torch
from oracle import same

transformers = pytest.importorskip("transformers")

from fused_rope.compat.transformers import patch, unpatch  # noqa: E402
from test_transformers_norms import (  # noqa: E402
    Count,
    agree,
    attention,
    close,
    qwen3,
    run,
    untouched,  # noqa: F401
)
from torch.nn.utils import parametrizations, parametrize  # noqa: E402

IDS = torch.arange(3, 41).reshape(2, 19)


def normalized(model):
    """The number of calls of the operator with norms in a forward."""
    with Count() as count, torch.no_grad():
        model(input_ids=IDS)
    return count.fused


# --- norms that share -----------------------------------------------------------------------------


def one_weight(module):
    module.k_norm.weight = module.q_norm.weight


def one_module(module):
    module.k_norm = module.q_norm


@pytest.mark.parametrize("share", [one_weight, one_module])
def test_weights_of_both(share):
    model = qwen3()
    share(attention(model))
    original = run(model)
    patch(model, norms="fused")
    ours = run(model)
    assert ours[2].fused == 2
    agree(ours, original)


def test_weights_of_two_layers():
    model = qwen3()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_norm.weight = first.k_norm.weight
    original = run(model)
    patch(model, norms="fused")
    ours = run(model)
    assert ours[2].fused == 2
    agree(ours, original)


# --- norms that are more than their class ---------------------------------------------------------


def pre_hook_with_keywords(norm):
    norm.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True
    )


def hook_with_keywords(norm):
    norm.register_forward_hook(
        lambda module, args, kwargs, out: out * 2, with_kwargs=True, always_call=True
    )


def backward_pre_hook(norm):
    norm.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 2,))


def weight_norm(norm):
    parametrizations.weight_norm(norm)


def weight_norm_by_a_hook(norm):
    torch.nn.utils.weight_norm(norm)


def pruned(norm):
    from torch.nn.utils import prune

    prune.l1_unstructured(norm, "weight", amount=0.5)


def compiled(norm):
    norm.compile(backend="eager")


def subclass(norm):
    norm.__class__ = type("Subclass", (type(norm),), {})


def overridden(norm):
    kind = type(norm)
    norm.__class__ = type("Double", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})


def bfloat16_weight(norm):
    norm.weight.data = norm.weight.data.bfloat16()


CHANGES = {
    f.__name__: f
    for f in (
        pre_hook_with_keywords,
        hook_with_keywords,
        backward_pre_hook,
        weight_norm,
        weight_norm_by_a_hook,
        pruned,
        compiled,
        subclass,
        overridden,
        bfloat16_weight,
    )
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("late", [False, True], ids=["before the patch", "after a forward"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_norms_run_as_modules(change, late):
    model = qwen3()
    if not late:
        CHANGES[change](attention(model).q_norm)
    patch(model, norms="fused")
    if late:
        assert normalized(model) == 2
        CHANGES[change](attention(model).q_norm)
    ours = run(model)
    assert ours[2].fused == 1
    unpatch(model)
    agree(ours, run(model))


def test_a_parametrization_that_is_removed():
    model = qwen3()
    norm = attention(model).q_norm
    parametrizations.weight_norm(norm)
    patch(model, norms="fused")
    assert normalized(model) == 1
    parametrize.remove_parametrizations(norm, "weight")
    ours = run(model)
    assert ours[2].fused == 2
    unpatch(model)
    agree(ours, run(model))


def other_eps(module):
    module.q_norm.variance_epsilon = module.k_norm.variance_epsilon = 0.25


def whole_eps(module):  # an int, as some configs have
    module.q_norm.variance_epsilon = module.k_norm.variance_epsilon = 1


def tensor_eps(module):
    eps = torch.tensor(0.25)
    module.q_norm.variance_epsilon = module.k_norm.variance_epsilon = eps


def no_norm(module):
    module.q_norm = torch.nn.Identity()


def layer_norm(module):
    module.k_norm = torch.nn.LayerNorm(16)


def torch_norm(module):
    module.q_norm = torch.nn.RMSNorm(16, eps=0.1)


def function(module):
    module.__dict__["q_norm"] = lambda x: x * 3
    del module._modules["q_norm"]


SWAPS = {
    f.__name__: f
    for f in (other_eps, whole_eps, tensor_eps, no_norm, layer_norm, torch_norm, function)
}


@pytest.mark.parametrize("swap", SWAPS)
def test_norms_that_are_swapped_after_the_patch(swap):
    model = qwen3()
    patch(model, norms="fused")
    assert normalized(model) == 2
    SWAPS[swap](attention(model))
    ours = run(model)
    assert ours[2].fused >= 1
    unpatch(model)
    agree(ours, run(model))


# --- the life of a model --------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_gradient_checkpointing(reentrant):
    model = qwen3().train()
    original = run(model)
    patch(model, norms="fused")
    options = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    ours = run(model)
    assert ours[2].fused == 2
    agree(ours, original)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch])
def test_copies(duplicate):
    """A copy of a patched model runs with the operator while the family is patched."""
    model = qwen3()
    original = run(model)
    patch(model, norms="fused")
    assert run(model)[2].fused == 2
    other = duplicate(model)
    ours = run(other)
    assert ours[2].fused == 2
    agree(ours, original)
    unpatch(model)
    theirs = run(other)
    assert theirs[2].fused == 0
    agree(theirs, original, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_cast_after_the_patch(dtype):
    model = qwen3()
    patch(model, norms="fused")
    assert normalized(model) == 2
    model.to(dtype)
    ours = run(model)
    assert ours[2].fused == (0 if dtype == torch.float64 else 2)
    unpatch(model)
    agree(ours, run(model), 16 * torch.finfo(dtype).eps)


def test_float32_norms_in_a_bfloat16_model():
    """Their results are float32 in the original, so q and k are rotated in float32."""
    module = attention(qwen3(torch.bfloat16))
    x, angle = torch.randn(2, 9, 64).bfloat16(), torch.randn(1, 9, 8).repeat(1, 1, 2)
    seen = []

    def attend(module, q, k, v, *args, **kwargs):
        seen.append((q, k))
        return torch.zeros(2, 9, 4, 16, dtype=x.dtype), None

    for norm in (module.q_norm, module.k_norm):
        norm.float()
    interface = transformers.AttentionInterface()
    interface.register("seen", attend)
    module.config._attn_implementation = "seen"
    tables = angle.cos().bfloat16(), angle.sin().bfloat16()
    module(x, tables, None)
    patch(module, norms="fused")
    module(x, tables, None)
    for theirs, ours in zip(*seen, strict=True):
        assert theirs.dtype == torch.float32
        same(ours, theirs)


def test_made_on_meta_and_loaded():
    model = qwen3()
    original = run(model)
    with torch.device("meta"):
        late = transformers.Qwen3ForCausalLM(model.config)
    patch(late, norms="fused")
    late.load_state_dict(model.state_dict(), assign=True)
    late.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    ours = run(late.train(model.training))
    assert ours[2].fused == 2
    agree(ours, original)


def test_meta_tensors():
    pytest.importorskip("transformers", minversion="5.0")  # before: autocast refuses meta
    config = qwen3().config
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(config)
    patch(model, norms="fused")
    assert model(input_ids=IDS.to("meta")).logits.shape[:2] == IDS.shape


def test_training_then_evaluation():
    model = qwen3()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    reference = copy.deepcopy(model)
    patch(model, norms="fused")
    for step in range(3):
        ours = run(model.train())
        unpatch(model)
        assert step == 0 or not torch.equal(
            attention(model).q_norm.weight, attention(reference).q_norm.weight
        )
        agree(ours, run(model))
        patch(model, norms="fused")
        run(model)
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        ours = model(input_ids=IDS).logits
        unpatch(model)
        close([ours], [model(input_ids=IDS).logits])


def test_inference_mode_then_training():
    model = qwen3()
    original = run(model)
    patch(model, norms="fused")
    with torch.inference_mode():
        assert normalized(model) == 2
    agree(run(model), original)


@pytest.mark.parametrize("mode", ["original", "fused"])
def test_training_of_compiled_models(mode):
    model = qwen3()
    original = run(model)
    patch(model, norms="fused", compiled=mode)
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    logits = step(input_ids=IDS).logits
    weights = torch.Generator().manual_seed(2)
    (logits * torch.randn(logits.shape, generator=weights)).mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    agree(([logits.detach()], grads), (original[0][:1], original[1]))
    torch._dynamo.reset()


def test_transforms_of_a_functional_call():
    model = qwen3()
    weights = {n: p.detach() for n, p in model.named_parameters() if "norm" in n}

    def loss(weights, ids):
        return torch.func.functional_call(model, weights, (ids[None],)).logits.sin().mean()

    def gradients():
        return [torch.func.grad(loss)(weights, ids) for ids in IDS]

    original = gradients()
    patch(model, norms="fused")
    with Count() as count:
        ours = gradients()
    assert count.fused == 4
    for a, b in zip(ours, original, strict=True):
        close(list(a.values()), list(b.values()), 1e-3)


def test_traced_models():
    model = qwen3().eval()
    model.config.use_cache = False
    want = model(input_ids=IDS).logits
    patch(model, norms="fused")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids).logits

    program = torch.export.export(Logits(), (IDS,))
    close([program.module()(IDS)], [want])


def test_frozen_model():
    """Neither norms nor inputs require grad: nothing is recorded."""
    model = qwen3().requires_grad_(False)
    want = model(input_ids=IDS).logits
    patch(model, norms="fused")
    got = model(input_ids=IDS).logits
    assert not got.requires_grad
    close([got], [want])


def test_only_norms_require_grad():
    model = qwen3()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_norm" in name)
    original = run(model)
    patch(model, norms="fused")
    ours = run(model)
    assert ours[2].fused == 2 and any("q_norm" in name for name in ours[1])
    agree(ours, original)


def test_hooks_on_weights():
    model = qwen3()
    seen = []
    weight = attention(model).q_norm.weight
    weight.register_hook(lambda grad: grad * 3)
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    original = run(model)
    patch(model, norms="fused")
    ours = run(model)
    assert len(seen) == 2
    close(seen[1:], seen[:1], 2e-3)
    agree(ours, original)


# --- other libraries ------------------------------------------------------------------------------


def test_accelerate_offload():
    """Weights stand on meta between forwards and come with a hook."""
    accelerate = pytest.importorskip("accelerate")
    model = qwen3().eval()
    want = model(input_ids=IDS).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    assert attention(model).q_norm.weight.device.type == "meta"
    patch(model, norms="fused")
    same(model(input_ids=IDS).logits, want)
    assert normalized(model) == 0


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("kind", ["lora", "saved", "layer norm tuning"])
def test_peft(kind):
    peft = pytest.importorskip("peft")
    model = qwen3()
    config = {
        "lora": lambda: peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
        "saved": lambda: peft.LoraConfig(
            target_modules=["q_proj"], modules_to_save=["q_norm"], init_lora_weights=False
        ),
        "layer norm tuning": lambda: peft.LNTuningConfig(target_modules=["q_norm", "k_norm"]),
    }[kind]()
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "norm" in name:
                parameter.mul_(torch.linspace(1, 2, parameter.numel()))
    original = run(adapted)
    patch(adapted, norms="fused")
    ours = run(adapted)
    assert ours[2].fused == (2 if kind == "lora" else 0)
    agree(ours, original)
    with adapted.disable_adapter(), torch.no_grad():
        ours = adapted(input_ids=IDS).logits
        unpatch(adapted)
        close([ours], [adapted(input_ids=IDS).logits])


def test_norms_of_a_library_that_needs_a_gpu(monkeypatch):
    """As Liger's: they cannot be compared with the operator, so they stay."""
    from transformers.models.qwen3 import modeling_qwen3

    class LigerRMSNorm(torch.nn.Module):
        runs = False

        def __init__(self, hidden_size, eps=1e-6):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(hidden_size))
            self.variance_epsilon = eps

        def forward(self, x):
            if not type(self).runs:
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
            return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, 1e-6)

    monkeypatch.setattr(modeling_qwen3, "Qwen3RMSNorm", LigerRMSNorm)
    model = qwen3()
    report = patch(model, norms="fused")
    assert report.patched and not report.norms
    assert "LigerRMSNorm is not an RMS norm of each head that the operator knows" in str(report)
    monkeypatch.setattr(LigerRMSNorm, "runs", True)
    ours = run(model)
    assert ours[2].fused == 0
    unpatch(model)
    agree(ours, run(model), 0)
