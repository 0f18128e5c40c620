"""patch(norms="fused"): attention classes whose norms of q and k run with the rotation."""

import builtins
import copy
import hashlib
import inspect
import random
import sys
import types

import pytest
import torch
from oracle import same
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from fused_rope import functional  # noqa: E402
from fused_rope.compat._patching import functions, norms, replacements  # noqa: E402
from fused_rope.compat.transformers import is_patched, patch, patching, unpatch  # noqa: E402
from fused_rope.compat.transformers.coverage import norm_entries  # noqa: E402
from fused_rope.compat.transformers.rewriting import Calls, rewrite  # noqa: E402
from transformers_models import CASES, MOE, Case, causal  # noqa: E402

FULL = {"layer_types": ["full_attention"] * 2}
LINEAR = {
    **MOE,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MODELS = {
    "afmoe": causal("afmoe", "Afmoe", **MOE),
    "apertus": causal("apertus", "Apertus"),
    "exaone4": causal("exaone4", "Exaone4", sliding_window=8, sliding_window_pattern=2),
    "doge": causal("doge", "Doge"),
    "dots1": causal("dots1", "Dots1", **MOE, first_k_dense_replace=2),
    "exaone_moe": causal("exaone_moe", "ExaoneMoe", **MOE),
    "gemma3": CASES["V1-gemma3"],
    "gemma4": CASES["V16-gemma4"],
    "gemma4-vision": CASES["V17-gemma4"],
    "glm4_moe": causal("glm4_moe", "Glm4Moe", **MOE, use_qk_norm=True, first_k_dense_replace=2),
    "hunyuan_v1_dense": causal("hunyuan_v1_dense", "HunYuanDenseV1"),
    "hunyuan_v1_moe": causal("hunyuan_v1_moe", "HunYuanMoEV1", **MOE, moe_topk=2),
    "hy_v3": causal("hy_v3", "HYV3", **MOE),
    "laguna": causal("laguna", "Laguna", **MOE),
    "lfm2": causal("lfm2", "Lfm2", layer_types=["conv", "full_attention"]),
    "mellum": causal("mellum", "Mellum", **MOE),
    "minimax_m3_vl": Case("minimax_m3_vl", "MiniMaxM3VLForCausalLM", "MiniMaxM3VLTextConfig", MOE),
    "muse_glimmer_assistant": CASES["muse_glimmer_assistant"],
    "nanochat": CASES["nanochat"],
    "neomme": Case("neomme", "NeoMMEModel", "NeoMMEConfig"),
    "pe_audio": CASES["pe_audio"],
    "qwen3": causal("qwen3", "Qwen3"),
    "qwen3_5": Case("qwen3_5", "Qwen3_5TextModel", "Qwen3_5TextConfig", FULL),
    "qwen3_moe": causal("qwen3_moe", "Qwen3Moe", **MOE),
    "qwen3_next": causal("qwen3_next", "Qwen3Next", **LINEAR),
    "qwen3_vl": CASES["V8-qwen3_vl"],
    "qwen4_exp": CASES["qwen4_exp"],
}


class Count(TorchDispatchMode):
    """Counts the operator's calls and the norms that a model computes itself."""

    def __init__(self):
        super().__init__()
        self.fused = self.own = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.fused += name.startswith("fused_rope.norm_rotate") and "backward" not in name
        self.own += name.startswith("aten.rsqrt") or name == "aten.pow.Tensor_Scalar"
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def untouched():
    """Every test leaves the families as they were."""
    yield
    for entry in list(replacements.current.values()):
        entry.remove()


def qwen3(dtype=torch.float32, **options):
    return causal("qwen3", "Qwen3", **options).build(dtype)


def attention(model):
    return model.model.layers[0].self_attn


def run(model, arguments=None):
    """The outputs, the gradients by name, and the counts of a forward."""
    if arguments is None:
        arguments = {"input_ids": torch.arange(3, 41).reshape(2, 19)}
    model.zero_grad()
    with Count() as count:
        outputs = model(**arguments)
    found = [t for t in outputs.values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    weights = torch.Generator().manual_seed(2)
    sum((t.float() * torch.randn(t.shape, generator=weights)).mean() for t in found).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return [t.detach() for t in found], grads, count


def close(ours, originals, rtol=2e-4):
    """Relative to each tensor; a gradient that is nothing but rounding, relative to the largest."""
    assert len(ours) == len(originals)
    largest = max(b.abs().max() for b in originals)
    for a, b in zip(ours, originals, strict=True):
        assert (a - b).abs().max() <= rtol * b.abs().max() + 1e-6 * largest


def agree(ours, original, rtol=2e-4):
    """Whether outputs and gradients are those of the original but for the order of a sum."""
    close(ours[0], original[0], rtol)
    assert ours[1].keys() == original[1].keys()
    close(list(ours[1].values()), list(original[1].values()), 10 * rtol)


# --- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    case = MODELS[name]
    if not case.installed:
        pytest.skip("this transformers does not have it")
    model, arguments = case.build(), case.arguments()
    original = run(model, arguments)
    report = patch(model, norms="fused")
    assert report.norms, str(report)
    ours = run(model, arguments)
    assert ours[2].fused and ours[2].own < original[2].own, str(report)
    agree(ours, original)
    unpatch(model)
    again = run(model, arguments)
    assert not again[2].fused
    for a, b in zip(again[0], original[0], strict=True):
        same(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_a_norm_that_waits_is_bitwise_the_original(name, monkeypatch):
    """The rewritten forward without the operator: norms run as modules where the rotation is."""
    case = MODELS[name]
    if not case.installed:
        pytest.skip("this transformers does not have it")
    model, arguments = case.build(torch.bfloat16), case.arguments(torch.bfloat16)
    patch(model)
    outputs, grads, _ = run(model, arguments)
    unpatch(model)
    waited = []

    def refuse(self, norm, args, kwargs):
        waited.append(norm)

    monkeypatch.setattr(functions.Rotation, "normalized", refuse)
    patch(model, norms="fused")
    got, got_grads, _ = run(model, arguments)
    assert waited
    for a, b in zip((*got, *got_grads.values()), (*outputs, *grads.values()), strict=True):
        same(a, b)


@pytest.mark.parametrize("norms", ["model", "fused"])
def test_half_precision_rounds_as_the_model(norms):
    """Sums of squares of {-1, 0, 1, 2} are exact, so all results are bitwise identical."""
    module = attention(qwen3(torch.bfloat16))
    x = torch.randint(-1, 3, (2, 9, 64)).bfloat16()
    with torch.no_grad():
        for projection in (module.q_proj, module.k_proj):
            projection.weight.copy_(torch.eye(64)[: len(projection.weight)])
    angle = torch.linspace(0, 7, 9 * 8).view(1, 9, 8).repeat(1, 1, 2)
    tables = angle.cos().bfloat16(), angle.sin().bfloat16()
    original = module(x, tables, None)[0]
    patch(module, norms=norms)
    same(module(x, tables, None)[0], original)


@pytest.mark.parametrize("precision,cast", [("model", "before"), ("fp32", "never")])
def test_precision_reaches_the_norm(precision, cast, monkeypatch):
    model = qwen3(torch.bfloat16)
    options, call = [], functional.call

    def recorded(*args):
        options.append(args[5])
        return call(*args)

    patch(model, norms="fused", precision=precision)
    monkeypatch.setattr(functional, "call", recorded)
    assert run(model)[2].fused == 2
    assert all(precision in given and cast in given for given in options)


def test_generates():
    model = qwen3()
    ids = torch.arange(3, 15).reshape(2, 6)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    original = model.generate(ids, **options)
    patch(model, norms="fused")
    same(model.generate(ids, **options), original)


@pytest.mark.parametrize("compiled,fused", [("original", False), ("fused", True)])
def test_compiles(compiled, fused):
    model = qwen3()
    original = run(model)
    patch(model, norms="fused", compiled=compiled)
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend=backend)
    ids = torch.arange(3, 41).reshape(2, 19)
    close([step(input_ids=ids).logits], original[0])
    assert ("norm_rotate_qk" in graphs[0]) == fused
    torch._dynamo.reset()


def test_default_keeps_the_model_s_own_norms():
    model = qwen3(torch.bfloat16)
    original = run(model)
    report = patch(model)
    ours = run(model)
    assert not report.norms and not ours[2].fused
    for a, b in zip(
        (*ours[0], *ours[1].values()), (*original[0], *original[1].values()), strict=True
    ):
        same(a, b)


# --- norms that are more than their class -------------------------------------------------------


def hook(norm):
    return norm.register_forward_hook(lambda module, args, out: out * 2)


def pre_hook(norm):
    return norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def backward_hook(norm):
    return norm.register_full_backward_hook(lambda module, grads, out: (grads[0] * 2,))


def global_hook(norm):
    def twice(module, args, out):
        return out * 2 if module is norm else None

    return torch.nn.modules.module.register_module_forward_hook(twice)


def replaced_forward(norm):
    norm.forward = lambda x: x * 3


def parametrized(norm):
    class Twice(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(norm, "weight", Twice())


def another_class(norm):
    norm.__class__ = type("Other", (type(norm),), {"forward": lambda self, x: x * self.weight})


def subclass_weight(norm):
    class Weight(torch.nn.Parameter):
        pass

    norm.weight = Weight(norm.weight.detach())


def weight_elsewhere(norm):  # as FSDP and torch.nn.utils.prune do
    weight = norm._parameters.pop("weight").detach()
    norm.weight = weight


def module_inside(norm):
    norm.extra = torch.nn.Identity()


def another_attribute(norm):
    norm.group_size = 8


CHANGES = {
    f.__name__: f
    for f in (
        hook,
        pre_hook,
        backward_hook,
        global_hook,
        replaced_forward,
        parametrized,
        another_class,
        subclass_weight,
        weight_elsewhere,
        module_inside,
        another_attribute,
    )
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_norms_run_as_modules(change, after):
    model = (
        causal("hunyuan_v1_dense", "HunYuanDenseV1") if after else causal("qwen3", "Qwen3")
    ).build()
    name = "query_layernorm" if after else "q_norm"
    undo = CHANGES[change](getattr(attention(model), name))
    try:
        original = run(model)
        patch(model, norms="fused")
        ours = run(model)
    finally:
        if undo is not None:
            undo.remove()
    assert ours[2].fused == (0 if change == "global_hook" else 1)  # the other layer
    agree(ours, original)


def test_a_norm_in_a_wrapper_runs_as_a_module():
    class Wrapper(torch.nn.Module):  # as PEFT's modules_to_save
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def forward(self, x):
            return self.inside(x) * 2

    model = qwen3()
    attention(model).k_norm = Wrapper(attention(model).k_norm)
    original = run(model)
    patch(model, norms="fused")
    ours = run(model)
    assert ours[2].fused == 1
    agree(ours, original)


@pytest.mark.parametrize("change", ["weight_elsewhere", "parametrized", "replaced_forward"])
def test_norms_that_change_after_they_ran(change):
    model = qwen3()
    patch(model, norms="fused")
    assert run(model)[2].fused == 2
    CHANGES[change](attention(model).q_norm)
    ours = run(model)
    assert ours[2].fused == 1
    unpatch(model)
    agree(ours, run(model))


def test_hooks_that_come_and_go():
    model = qwen3()
    patch(model, norms="fused")
    assert run(model)[2].fused == 2
    shapes = []
    norm = attention(model).q_norm
    handle = norm.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    assert run(model)[2].fused == 1
    assert shapes == [(2, 19, 4, 16)]  # as in the original, before the transposition
    handle.remove()
    assert run(model)[2].fused == 2


def test_float32_norms_under_autocast():
    model = qwen3()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        patch(model)
        original = run(model)
        unpatch(model)
        patch(model, norms="fused")
        ours = run(model)
    assert not ours[2].fused
    for a, b in zip(
        (*ours[0], *ours[1].values()), (*original[0], *original[1].values()), strict=True
    ):
        same(a, b)


def test_float64_models_normalize_in_float32_as_the_original():
    model = qwen3(torch.float64)
    original = run(model)
    patch(model, norms="fused")
    ours = run(model)
    assert not ours[2].fused
    agree(ours, original, 1e-6)


def test_frozen_norms():
    model = qwen3()
    frozen = attention(model).q_norm.weight.requires_grad_(False)
    original = run(model)
    patch(model, norms="fused")
    ours = run(model)
    assert ours[2].fused == 2 and frozen.grad is None
    agree(ours, original)


def test_different_norms_of_q_and_k():
    model = qwen3()
    attention(model).k_norm.variance_epsilon = 0.5
    original = run(model)
    patch(model, norms="fused")
    ours = run(model)
    assert ours[2].fused == 1
    agree(ours, original)


def test_checkpointed_copied_and_functional_calls():
    model = qwen3()
    original = run(model)
    patch(model, norms="fused")
    agree(run(copy.deepcopy(model)), original)
    model.gradient_checkpointing_enable()
    agree(run(model.train()), original)
    ids = torch.arange(3, 41).reshape(2, 19)
    weights = {n: p.detach() * 2 for n, p in model.named_parameters() if "q_norm" in n}
    got = torch.func.functional_call(model, weights, (ids,)).logits
    unpatch(model)
    close([got], [torch.func.functional_call(model, weights, (ids,)).logits])


# --- attention classes --------------------------------------------------------------------------


def test_replaced_attention_is_left_alone(monkeypatch):
    model = qwen3()
    kind = type(attention(model))
    theirs = kind.forward

    def forward(self, *args, **kwargs):
        return theirs(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    report = patch(model, norms="fused")
    assert not report.norms and kind.forward is forward
    assert not run(model)[2].fused


def test_replaced_norm_class_runs_as_it_is(monkeypatch):
    model = qwen3()
    kind = type(attention(model).q_norm)
    patch(model, norms="fused")
    monkeypatch.setattr(kind, "forward", lambda self, x: x * self.weight)
    ours = run(model)
    unpatch(model)
    assert not ours[2].fused
    agree(ours, run(model))


def test_a_reference_to_ours_outlives_the_patch():
    model = qwen3()
    original = run(model)
    patch(model, norms="fused")
    module = attention(model)
    module.forward = module.forward
    unpatch(model)
    ours = run(model)
    assert not ours[2].fused
    agree(ours, original, 0)
    assert not is_patched(model)


def test_options_of_a_family_agree():
    model = qwen3()
    with pytest.raises(ValueError, match="expected norms 'model' or 'fused', got 'ours'"):
        patch(model, norms="ours")
    patch(model, norms="fused")
    with pytest.raises(ValueError, match="expected norms 'fused'"):
        patch(model)


def test_traceback_names_the_original_lines():
    model = qwen3()
    kind = type(attention(model))
    code = inspect.unwrap(kind.forward).__code__
    patch(model, norms="fused")
    ours = kind.forward
    made = inspect.unwrap(ours).__code__
    assert made is not code
    assert (made.co_filename, ours.__qualname__) == (
        code.co_filename,
        "Qwen3Attention.forward",
    )
    with pytest.raises(AttributeError) as error:
        ours(attention(model), None, None, None)
    assert error.traceback[-1].lineno in range(code.co_firstlineno, code.co_firstlineno + 10)


HEAD = "def forward(self, x, cos, sin, flag=True):\n"
SOURCES = {
    "before": (
        "q = self.q_norm(x).transpose(1, 2); k = self.k_norm(x); v = x + 1\n"
        "q, k = rotary(q, k, cos, sin)\nreturn q, k",
        None,
    ),
    "after": (
        "q = k = x\nq, k = rotary(q, k, cos)\nq = self.q_norm(q)\nk = self.k_norm(k)\nreturn q",
        None,
    ),
    "one tensor": ("q = self.norm(x)\nq = rotary(q, cos, sin)\nreturn q", None),
    "used": ("q = self.norm(x)\nv = q\nq = rotary(q, cos)\nreturn q", "q is used between"),
    "scaled": ("q = self.norm(x)\nq = q * 2\nq = rotary(q, cos)\nreturn q", "q is used between"),
    "reshaped": ("q = self.norm(x)\nq = q.view(2)\nq = rotary(q, cos)\nreturn q", "reshape"),
    "clamped": ("q = self.norm(x)\nx.clamp_(0)\nq = rotary(q, cos)\nreturn q", "is changed"),
    "written": ("q = self.norm(x)\nx[0] = 1\nq = rotary(q, cos)\nreturn q", "is changed"),
    "tables": ("q = self.norm(x)\nq = rotary(q, q)\nreturn q", "q is used between"),
    "returned early": (
        "q = self.norm(x)\nif flag:\n  return q\nq = rotary(q, cos)\nreturn q",
        "q is used between",
    ),
    "other name": ("q = self.norm(x)\np = rotary(q, cos)\nreturn p", "no norm of q and k"),
    "loop": ("for q in x:\n  q = self.norm(x)\nq = rotary(q, cos)\nreturn q", "no norm of q and k"),
    "one of two": (
        "q = x; k = self.norm(x)\nq, k = rotary(q, k, cos)\nreturn q",
        "q is rotated without a norm",
    ),
    "never rotated": (
        "q = self.norm(x)\nif flag:\n  pass\nelse:\n  q = rotary(q, cos)\nreturn 1",
        None,
    ),
    "without norm": ("q = rotary(x, cos)\nreturn q", "none"),
}


def snippet(tmp_path, body):
    file = tmp_path / "snippet.py"
    lines = "".join(f"        {line}\n" for line in body.split("\n"))
    file.write_text(f"class Attention:\n    {HEAD}{lines}")
    module = types.ModuleType("snippet")
    module.__file__ = str(file)
    exec(compile(file.read_text(), str(file), "exec"), vars(module))
    return module


@pytest.mark.parametrize("name", SOURCES)
def test_structure(name, tmp_path, monkeypatch):
    body, refusal = SOURCES[name]
    module = snippet(tmp_path, body)
    monkeypatch.setitem(sys.modules, "snippet", module)
    kind = module.Attention
    found = rewrite(kind, kind.forward, {"rotary"})
    if refusal is None:
        assert callable(found.make)
    elif refusal == "none":
        assert found is None
    else:
        assert refusal in found


def test_conditions_run_in_the_original_order(tmp_path, monkeypatch):
    """Optional norms and rotations, with calls that record what they are given."""
    body = (
        "q, k = x, x + 1\nif self.normalize:\n  q = self.q_norm(q)\n  k = self.k_norm(k)\n"
        "if flag:\n  q, k = rotary(q, k, cos, sin)\nreturn q, k"
    )
    module = snippet(tmp_path, body)
    monkeypatch.setitem(sys.modules, "snippet", module)
    module.rotary = lambda q, k, cos, sin: (q * cos, k * sin)
    kind = module.Attention
    original = kind.forward

    def defer(norm):
        return norms.Deferred(norm, types.SimpleNamespace(fits=lambda norm, x: True))

    def rotate(function, calls, *args):
        return function(*map(norms.normalize, calls, args), *args[len(calls) :])

    ours = rewrite(kind, original, {"rotary"}).make(Calls(defer, rotate, None, norms.normalize))
    for normalize in (False, True):
        for flag in (False, True):
            self = kind()
            self.normalize, self.q_norm, self.k_norm = normalize, lambda q: q + 10, lambda k: k - 3
            assert ours(self, 2, 3, 5, flag) == original(self, 2, 3, 5, flag)


class Symbol:
    """A value that knows the expression that made it. Its truth follows from a seed."""

    seed = 0

    def __init__(self, operation, *parts):
        self.operation, self.parts = operation, parts
        text = f"{operation}({', '.join(map(repr, parts))})"
        self.text = hashlib.md5(text.encode()).hexdigest()

    def __repr__(self):
        return self.text

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Symbol("attribute", self, name)

    def __call__(self, *args, **kwargs):
        """A norm commutes with a view that keeps the last dimension, and stands outside of it."""
        if self.operation == "attribute" and self.parts[1] in ("transpose", "contiguous"):
            x = self.parts[0]
            if x.operation == "call" and "norm" in str(x.parts[0].parts[-1]):
                norm, inside = x.parts
                return norm(getattr(inside, self.parts[1])(*args))
        return Symbol("call", self, *args, *sorted(kwargs.items()))

    def __iter__(self):
        last = self.parts[-1] if self.operation == "attribute" else None
        unbound = self.operation == "call" and self.parts[0].parts[-1] == "unbind"
        count = 2 + Symbol.seed % 3 if last == "shape" else 3 if unbound else 2
        return (Symbol("item", self, index) for index in range(count))

    def __setitem__(self, index, value):
        pass

    def __bool__(self):
        return random.Random(f"{Symbol.seed} {self!r}").random() < 0.5

    def __contains__(self, item):
        return bool(Symbol("contains", self, item))

    def __index__(self):
        return 3

    def __len__(self):
        return 2

    def _operation(name):
        return lambda self, *others: Symbol(name, self, *others)

    __getitem__, __neg__, __hash__ = _operation("item"), _operation("neg"), object.__hash__
    __add__ = __radd__ = _operation("add")
    __sub__ = __rsub__ = _operation("sub")
    __mul__ = __rmul__ = _operation("mul")
    __pow__ = __rpow__ = _operation("pow")
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = _operation("div")
    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = _operation("compare")


def with_symbols(function, seed):
    """The expression that a function returns if all that it uses are symbols, or its error."""
    Symbol.seed = seed
    function = inspect.unwrap(function)
    names = {name for name in function.__code__.co_names if not hasattr(builtins, name)}
    found = {name: Symbol("global", name) for name in names}
    function = types.FunctionType(function.__code__, found, closure=function.__closure__)
    code = function.__code__
    count = code.co_argcount + code.co_kwonlyargcount
    arguments = {name: Symbol("argument", name) for name in code.co_varnames[1:count]}
    for name in arguments:
        if name != "hidden_states" and random.Random(f"{seed} {name}").random() < 0.3:
            arguments[name] = None
    try:
        result = function(Symbol("argument", "self"), **arguments)
    except (TypeError, AttributeError, ValueError, NameError) as error:  # as with real values
        return type(error), str(error)
    return [repr(part) for part in result] if isinstance(result, tuple) else repr(result)


def waiting_calls():
    """What a rewritten forward calls, on symbols; and the norms that waited."""
    waited = []

    def defer(norm):
        return norms.Deferred(norm, types.SimpleNamespace(fits=lambda norm, x: True))

    def rotate(function, calls, *args, **kwargs):
        waited.extend(call for call in calls if call is not None)
        xs = map(norms.normalize, calls, args)
        return function(*xs, *args[len(calls) :], **kwargs)

    def rotate_first(function, modules, *args, **kwargs):
        waited.extend(modules)
        rotated = function(*args, **kwargs)
        return tuple(norm(x) for norm, x in zip(modules, rotated, strict=True))

    return Calls(defer, rotate, rotate_first, norms.normalize), waited


def test_every_class_computes_the_expressions_of_the_original():
    """All rewritten forwards of the installed version, over random outcomes of conditions."""
    for entry in (entry for entry in norm_entries() if entry.fused):
        module, _, name = f"transformers.models.{entry.name}".rpartition(".")
        kind = getattr(sys.modules[module], name)
        rotary = {n for n in vars(sys.modules[module]) if patching._FUNCTION.match(n)}
        calls, waited = waiting_calls()
        ours = rewrite(kind, kind.forward, rotary).make(calls)
        answered = 0
        for seed in range(40):
            before = len(waited)
            original, made = with_symbols(kind.forward, seed), with_symbols(ours, seed)
            assert made == original, (entry.name, seed)
            answered += len(waited) > before and not isinstance(original[0], type)
        assert answered, entry.name


def test_classes_of_the_installed_version():
    entries = norm_entries()
    fused = [entry for entry in entries if entry.fused]
    assert all(entry.how for entry in entries)
    version = int(transformers.__version__.split(".")[0])
    assert len(fused) >= (50 if version >= 5 else 17)
    assert {entry.name.partition(".")[0] for entry in fused} >= {"qwen3", "gemma3n", "gemma3"}
