"""`patch` and `unpatch` where models and functions are not as transformers ships them."""

import copy
import functools
import gc
import importlib
import io
import sys
import threading
import types
import warnings
import weakref

import pytest
import torch
from oracle import same

transformers = pytest.importorskip("transformers")

from fused_rope.compat._patching import functions, replacements  # noqa: E402
from fused_rope.compat.transformers import is_patched, patch, patching, unpatch  # noqa: E402
from test_transformers import build, modeling  # noqa: E402

llama = modeling("llama")
KEY = "transformers.models.llama.modeling_llama.apply_rotary_pos_emb"
ORIGINAL, FORWARD = llama.apply_rotary_pos_emb, llama.LlamaRotaryEmbedding.forward

SOURCE = """
import torch

def swap(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)

def rotate(q, k, cos, sin):
    return q * cos + swap(q) * sin, k * cos + swap(k) * sin

def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    return rotate(q, k, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))

class Attention(torch.nn.Module):
    def forward(self, *args, **kwargs):
        return apply_rotary_pos_emb(*args, **kwargs)
"""


@pytest.fixture(autouse=True)
def untouched():
    """Every test begins with nothing patched and leaves the family as it was."""
    replacements.retired.clear()
    yield
    for entry in list(replacements.current.values()):
        entry.remove()
    assert llama.apply_rotary_pos_emb is ORIGINAL
    assert llama.LlamaRotaryEmbedding.forward is FORWARD


@pytest.fixture
def remote():
    """Makes modules as remote code is loaded, and a model of each."""
    names = []

    def make(more="", **values):
        module = types.ModuleType(f"transformers_modules.remote{len(names)}.modeling_remote")
        sys.modules[module.__name__] = module
        names.append(module.__name__)
        exec(SOURCE + more, module.__dict__)
        module.Attention.__module__ = module.__name__
        vars(module).update(values)
        return module, module.Attention()

    yield make
    for name in names:
        del sys.modules[name]


def key_of(module, name="apply_rotary_pos_emb"):
    return f"{module.__name__}.{name}"


def tables(rows=9, R=16, twisted=False):
    angle = torch.arange(float(rows))[:, None] * torch.linspace(1, 0.1, R // 2)
    angle = torch.cat([angle, angle * angle if twisted else angle], -1)[None]
    return angle.cos(), angle.sin()


def queries(S=9, R=16):
    return torch.randn(2, 4, S, R), torch.randn(2, 2, S, R)


# --- what is not a plain function ---------------------------------------------------------------


def plain(q, k, cos, sin, unsqueeze_dim=1):
    return q, k


def misleading(*args):
    return args


misleading.__signature__ = "no signature"


class Callable:
    __signature__ = property(lambda self: 1 / 0)

    def __call__(self, q, k, cos, sin, unsqueeze_dim=1):
        return q, k


@torch.jit.script
def scripted(q: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
    return q * cos


UNREADABLE = {
    "scripted": scripted,
    "builtin": torch._C._nn.gelu,
    "c function": len,
    "class": Callable,
    "callable": Callable(),
    "property": property(lambda self: plain),
    "cached_property": functools.cached_property(lambda self: plain),
    "classmethod": classmethod(lambda cls, q, k, cos, sin, unsqueeze_dim=1: (q, k)),
    "staticmethod": staticmethod(plain),
    "staticmethod of None": staticmethod(None),
    "partial": functools.partial(plain, unsqueeze_dim=1),
    "lru_cache": functools.lru_cache(plain),
    "None": None,
    "bool": True,
    "module": torch,
    "bound method": torch.nn.Linear(2, 2).forward,
    "autograd": torch.autograd.Function.apply,
    "signature raises": misleading,
    "arguments": lambda *args, **kwargs: args,
    "raises": lambda q, k, cos, sin, unsqueeze_dim=1: 1 / 0,
    "compiled": torch.compile(plain),
}


@pytest.mark.parametrize("place", ["module", "class"])
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_left_alone(name, place, remote):
    module, model = remote()
    value = UNREADABLE[name]
    if place == "module":
        owner, key = module, key_of(module, "apply_rotary_pos_emb_vision")
        module.apply_rotary_pos_emb_vision = value
    else:
        owner, key = module.Attention, key_of(module, "Attention.apply_rotary_pos_emb_vision")
        type.__setattr__(owner, "apply_rotary_pos_emb_vision", value)
    before = dict(vars(owner))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = patch(model)
    assert report.left_alone.keys() == {key} and report.left_alone[key]
    assert report.patched.keys() == {key_of(module)}
    unpatch(model)
    assert {n: v for n, v in vars(owner).items() if v is not before[n]} == {}


@pytest.mark.parametrize("forward", [None, property(lambda self: plain), torch.relu, scripted])
def test_rotary_modules_that_cannot_be_read(forward, remote):
    module, model = remote("class TheRotaryEmbedding(torch.nn.Module): pass\n")
    module.TheRotaryEmbedding.__module__ = module.__name__
    module.TheRotaryEmbedding.forward = forward
    assert patch(model).tables == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_replaced_when_patch_fails(error, remote, monkeypatch):
    module, model = remote()
    module.apply_rotary_pos_emb_vision = module.apply_rotary_pos_emb
    before = dict(vars(module))
    install = replacements.Replacement.install

    def second_fails(self):
        if module.apply_rotary_pos_emb is not before["apply_rotary_pos_emb"]:
            raise error
        install(self)

    monkeypatch.setattr(patching, "find_form", lambda name, f: find("apply_rotary_pos_emb", f))
    find = importlib.import_module("fused_rope.compat.transformers.forms").find_form
    monkeypatch.setattr(replacements.Replacement, "install", second_fails)
    with pytest.raises(error):
        patch(model)
    assert dict(vars(module)) == before and not replacements.current


def test_what_cannot_be_replaced_is_left_alone(remote):
    module, model = remote()

    class Sealed(types.ModuleType):
        def __setattr__(self, name, value):
            raise AttributeError("sealed")

    module.__class__ = Sealed
    report = patch(model)
    assert not report.patched and "sealed" in report.left_alone[key_of(module)]


def test_a_class_with_two_names_is_patched_once(remote):
    module, model = remote(
        """
class WithMethod(torch.nn.Module):
    @staticmethod
    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        return rotate(q, k, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))
"""
    )
    module.WithMethod.__module__ = module.__name__
    module.OtherName = module.WithMethod
    original = vars(module.WithMethod)["apply_rotary_pos_emb"]
    assert len(patch(model).patched) == 2
    q, k = queries()
    same(module.WithMethod.apply_rotary_pos_emb(q, k, *tables())[0], model(q, k, *tables())[0])
    unpatch(model)
    assert vars(module.WithMethod)["apply_rotary_pos_emb"] is original


# --- optional arguments -------------------------------------------------------------------------

OPTIONAL = {
    "rows of gathered tables": (
        "position_ids=None, unsqueeze_dim=1",
        "if position_ids is not None: cos, sin = cos[:, position_ids[0]], sin[:, position_ids[0]]",
        {"position_ids": torch.arange(8, -1, -1)[None]},
    ),
    "rows of flat positions": (
        "position_ids=None, unsqueeze_dim=1",
        "if position_ids is not None: cos, sin = cos[:, position_ids], sin[:, position_ids]",
        {"position_ids": torch.arange(8, -1, -1)},
    ),
    "rows of positions of a batch": (
        "position_ids=None, unsqueeze_dim=1",
        "if position_ids is not None: cos, sin = cos[0][position_ids], sin[0][position_ids]",
        {"position_ids": torch.arange(8, -1, -1)[None].expand(2, 9)},
    ),
    "positions that cut": (
        "position_ids=None, unsqueeze_dim=1",
        "if position_ids is not None: cos, sin = cos * (position_ids < 5)[..., None], sin",
        {"position_ids": torch.arange(9)[None]},
    ),
    "offset": (
        "unsqueeze_dim=1, offset=0",
        "cos, sin = cos.roll(offset, 1), sin.roll(offset, 1)",
        {"offset": 3},
    ),
    "scale": ("unsqueeze_dim=1, scale=1.0", "cos, sin = cos * scale, sin * scale", {"scale": 2.0}),
    "flag": ("unsqueeze_dim=1, inverse=False", "sin = -sin if inverse else sin", {"inverse": True}),
    "unsqueeze_dim with another meaning": (
        "unsqueeze_dim=1",
        "cos, sin = (cos * 2, sin * 2) if unsqueeze_dim < 0 else (cos, sin)",
        {"unsqueeze_dim": -3},
    ),
    "unsqueeze_dim that ours does not know": (
        "unsqueeze_dim=1",
        "unsqueeze_dim = 1 if unsqueeze_dim is None else unsqueeze_dim",
        {"unsqueeze_dim": None},
    ),
    "unsqueeze_dim by name only": (
        "*, unsqueeze_dim=1",
        "cos, sin = (cos * 2, sin * 2) if unsqueeze_dim == -3 else (cos, sin)",
        {"unsqueeze_dim": -3},
    ),
    "another default": ("unsqueeze_dim=-3", "", {}),
    "ignored": ("position_ids=None, unsqueeze_dim=1", "", {"position_ids": torch.arange(9)[None]}),
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_arguments_keep_their_meaning(name, remote):
    parameters, body, given = OPTIONAL[name]
    module, model = remote(
        f"""
def apply_rotary_pos_emb(q, k, cos, sin, {parameters}):
    {body or "pass"}
    return rotate(q, k, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))
"""
    )
    arguments = *queries(), *tables()
    want, plainly = model(*arguments, **given), model(*arguments)
    report = patch(model)
    assert (key_of(module) in report.patched) != (key_of(module) in report.left_alone)
    for a, b in zip(
        (*model(*arguments, **given), *model(*arguments)), (*want, *plainly), strict=True
    ):
        same(a, b)
    if name in ("ignored", "unsqueeze_dim that ours does not know"):
        assert report.patched


# Bodies whose calls differ from a rotation that returns new tensors only where the name says.
SPECIAL = {
    "one token": "if q.shape[-2] == 1: sin = -sin",
    "one sequence": "if q.shape[0] == 1: sin = -sin",
    "wide heads": "cos, sin = cos.clone(), sin.clone(); cos[..., 64:], sin[..., 64:] = 1, 0",
    "in place": "a, b = rotate(q, k, cos, sin); q.copy_(a); k.copy_(b); return q, k",
    "key in place": "a, b = rotate(q, k, cos, sin); k.copy_(b); return a, k",
    "widened": "q, k = q.float(), k.float()",
}


@pytest.mark.parametrize("name", SPECIAL)
def test_what_functions_do_to_special_calls(name, remote):
    _, model = remote(
        f"""
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    {SPECIAL[name]}
    return rotate(q, k, cos, sin)
"""
    )
    wide, many = tables(9, 160), tables()
    calls = {
        "usual": (*queries(), *many),
        "one token": (*queries(1), *(t[:, 5:6] for t in many)),
        "one sequence": (*(x[:1] for x in queries()), *many),
        "wide": (*queries(9, 160), *wide),
        "bfloat16": tuple(t.bfloat16() for t in (*queries(), *many)),
    }
    given = {key: [t.clone() for t in call] for key, call in calls.items()}
    want = {key: model(*call) for key, call in given.items()}
    report = patch(model)
    assert report.left_alone and not report.patched
    for key, call in calls.items():
        results = *model(*call), *call[:2]
        for a, b in zip(results, (*want[key], *given[key][:2]), strict=True):
            same(a, b)


def test_keywords_that_a_form_ignores_are_the_original_s(remote):
    _, model = remote(
        """
def apply_rotary_pos_emb(q, k, cos, sin, **kwargs):
    n = q.shape[-2] - cos.shape[-2]
    scale = kwargs.get("scale", 1)
    q2, k2 = rotate(q[..., n:, :] * scale, k[..., n:, :] * scale, cos, sin)
    return torch.cat([q[..., :n, :], q2], -2), torch.cat([k[..., :n, :], k2], -2)
"""
    )
    q, k = queries()
    cos, sin = (table[0, 2:] for table in tables())
    want = [model(q, k, cos, sin, scale=scale) for scale in (1, 3)]
    assert patch(model).patched
    for scale, (a, b) in zip((1, 3), want, strict=True):
        for got, expected in zip(model(q, k, cos, sin, scale=scale), (a, b), strict=True):
            same(got, expected)


def test_shapes_that_only_the_original_takes(remote):
    """One row of a table for all tokens: the original broadcasts it."""
    _, model = remote()
    (q, k), (cos, sin) = queries(), tables(1)
    want = model(q, k, cos, sin)
    assert patch(model).patched
    for a, b in zip(model(q, k, cos, sin), want, strict=True):
        same(a, b)
    with pytest.raises(RuntimeError, match="size"):  # the original's own error
        model(q, k, *tables(4))


# --- tables whose halves differ -----------------------------------------------------------------


class OwnTables(torch.nn.Module):
    """The halves agree at positions 0 and 1 alone."""

    def __init__(self, first=0):
        super().__init__()
        self.first = first

    def forward(self, x, position_ids):
        p, f = position_ids[..., None].float(), torch.linspace(1, 0.1, 8)
        angle = torch.cat([p * f, torch.where(p < self.first, p, p * p) * f], -1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def model_of(rotary=None, family="llama"):
    torch.manual_seed(0)
    model = build(family)
    if rotary is not None:
        model.model.rotary_emb = rotary
    return model


LOOKS = {
    "one token": lambda model, ids: model(ids[:, :1]),
    "two tokens": lambda model, ids: model(ids[:, :2]),
    "no token": lambda model, ids: llama.apply_rotary_pos_emb(
        *queries(0), *(t[:, :0] for t in tables())
    ),
    "equal rows": lambda model, ids: llama.apply_rotary_pos_emb(
        *queries(), *(torch.ones(1, 9, 16) for _ in range(2))
    ),
    "another model": lambda model, ids: model_of()(ids),
    "meta": lambda model, ids: llama.apply_rotary_pos_emb(
        *(t.to("meta") for t in (*queries(), *tables()))
    ),
    "trace": lambda model, ids: torch.jit.trace(
        lambda q: llama.apply_rotary_pos_emb(q, q, *tables()), queries()[0], check_trace=False
    ),
    "names": lambda model, ids: llama.apply_rotary_pos_emb(
        *queries(), **dict(zip(("cos", "sin"), tables(), strict=True))
    ),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("first", LOOKS)
def test_data_that_does_not_tell_ends_no_look(first, mode):
    ids = torch.randint(97, (2, 12))
    want = model_of(OwnTables())(ids).logits
    model = model_of(OwnTables())
    patch(model)
    with warnings.catch_warnings(), mode():
        warnings.simplefilter("ignore")
        LOOKS[first](model, ids)
        same(model(ids).logits, want)


def test_tables_that_differ_later():
    """The halves agree at the first 30 positions, in many steps, and differ afterwards."""
    ids = torch.randint(97, (1, 40))
    model, lengths = model_of(OwnTables(30)), (1, 2, 7, 30)
    want, *starts = (model(ids[:, :length]).logits for length in (40, *lengths))
    patch(model)
    for length, start in zip(lengths, starts, strict=True):
        same(model(ids[:, :length]).logits, start)
    assert llama.apply_rotary_pos_emb is not ORIGINAL
    with pytest.warns(UserWarning, match="tables"):
        same(model(ids).logits, want)


def test_a_cache_of_keys_in_our_order_stays_readable(remote):
    """DeepSeek's function permutes, ours does not: attention scores agree across a fallback."""
    module, model = remote(
        """
def apply_rotary_pos_emb_interleave(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    q, k = (torch.cat([x[..., ::2], x[..., 1::2]], -1) for x in (q, k))
    return rotate(q, k, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))
"""
    )
    name = "apply_rotary_pos_emb_interleave"
    (q, _), original = queries(), getattr(module, name)
    assert "order preserved" in patch(model).patched[key_of(module, name)]
    ours = getattr(module, name)
    cached = ours(q, q, *tables())[1]
    with pytest.warns(UserWarning, match="tables"):
        later = ours(q, q, *tables(twisted=True))[0]
    want = original(q, q, *tables(twisted=True))[0] @ original(q, q, *tables())[1].mT
    torch.testing.assert_close(later @ cached.mT, want)
    assert getattr(module, name) is ours


def test_tables_written_to_between_calls():
    q, k = queries()
    cos, sin = tables()
    model = model_of()
    patch(model)
    for write in (
        lambda: cos.mul_(torch.arange(16)),
        lambda: torch.mul(cos, torch.arange(16), out=cos),
    ):
        cos.copy_(tables()[0])
        llama.apply_rotary_pos_emb(q, k, cos, sin)
        write()
        with pytest.warns(UserWarning, match="tables"):
            got = llama.apply_rotary_pos_emb(q, k, cos, sin)
        for a, b in zip(got, ORIGINAL(q, k, cos, sin), strict=True):
            same(a, b)
        patch(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_rotary_module_that_is_known_is_looked_at_once(mode, monkeypatch):
    """Neither later forwards nor layers compare anything, whatever the position."""
    model, looks = model_of(), []
    compare = functions.all_equal
    monkeypatch.setattr(functions, "all_equal", lambda pairs: looks.append(0) or compare(pairs))
    ids = torch.randint(97, (2, 12))
    patch(model)
    with mode():
        model(ids)
        before = len(looks)
        assert before > 0
        for length in (1, 5, 12):
            model(ids[:, :length])
    assert len(looks) == before


def test_a_hook_that_changes_the_tables_is_seen():
    def hook(module, inputs, output):
        return output[0] * torch.arange(16), output[1]

    ids = torch.randint(97, (2, 12))
    original, model = model_of(), model_of()
    original.model.rotary_emb.register_forward_hook(hook)
    want = original(ids).logits
    patch(model)
    model(ids)
    model.model.rotary_emb.register_forward_hook(hook)
    with pytest.warns(UserWarning, match="tables"):
        same(model(ids).logits, want)


def test_the_compiler_s_graph_asserts_what_it_cannot_look_at():
    torch._dynamo.reset()
    ids = torch.randint(97, (2, 12))
    want = model_of()(ids).logits
    for rotary in (None, OwnTables()):
        model = model_of(rotary)
        patch(model, compiled="fused")
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        if rotary is None:
            torch.testing.assert_close(compiled(ids).logits, want, rtol=1e-4, atol=1e-5)
        else:
            with pytest.raises(RuntimeError, match="tables"):
                compiled(ids)
        unpatch(model)
    torch._dynamo.reset()


# --- the report says what stands there ----------------------------------------------------------


def test_the_original_put_back_by_hand_is_replaced_again():
    first, second = model_of(), model_of()
    patch(first)
    llama.apply_rotary_pos_emb = ORIGINAL
    assert KEY in patch(second).patched and llama.apply_rotary_pos_emb is not ORIGINAL
    assert unpatch(second).left_alone == {KEY: "1 more models are patched"}
    assert unpatch(first).restored == [KEY]


def test_somebody_else_s_function_is_left_alone(monkeypatch):
    def theirs(*args, **kwargs):
        return ORIGINAL(*args, **kwargs)

    first, second = model_of(), model_of()
    patch(first)
    with monkeypatch.context() as context:
        context.setattr(llama, "apply_rotary_pos_emb", theirs)
        report = patch(second)
        assert not report.patched and "somebody else" in report.left_alone[KEY]
        assert llama.apply_rotary_pos_emb is theirs
        assert "somebody else" in unpatch(second).left_alone[KEY]
    assert unpatch(first).restored == [KEY]


def test_a_wrapper_of_ours_is_not_ours():
    """functools.wraps copies our attributes; another library's wrapper is what stands there."""
    first = model_of()
    patch(first)

    @functools.wraps(llama.apply_rotary_pos_emb)
    def theirs(*args, **kwargs):
        return args[0], args[1]

    llama.apply_rotary_pos_emb = theirs
    report = unpatch(first)
    assert KEY in report.left_alone and llama.apply_rotary_pos_emb is theirs
    assert "unknown" in patch(first).left_alone[KEY]
    unpatch(first)
    llama.apply_rotary_pos_emb = ORIGINAL


def test_a_function_that_was_deleted(remote):
    module, model = remote()
    patch(model)
    del module.apply_rotary_pos_emb
    assert key_of(module) in unpatch(model).left_alone


def test_a_class_defined_anew_is_not_the_old_one(remote):
    module, model = remote()
    definition = """
class TheRotaryEmbedding(torch.nn.Module):
    def forward(self, x, position_ids):
        return x, x
"""
    for _ in range(2):
        exec(definition, module.__dict__)
        module.TheRotaryEmbedding.__module__ = module.__name__
        own = module.TheRotaryEmbedding.forward
        assert patch(model).tables == {key_of(module, "TheRotaryEmbedding"): "ours"}
        assert module.TheRotaryEmbedding.forward is not own


# --- models are counted -------------------------------------------------------------------------


def test_a_model_takes_back_its_own_patches_alone():
    first, second = model_of(), model_of()
    patch(first), patch(second), patch(second)
    assert not unpatch(first).restored
    assert not unpatch(first).restored
    assert not unpatch(model_of()).restored
    assert not unpatch(second).restored
    assert llama.apply_rotary_pos_emb is not ORIGINAL
    assert unpatch(second).restored == [KEY]


@pytest.mark.parametrize("around", [torch.nn.Sequential, torch.nn.DataParallel])
def test_a_wrapped_model_is_the_model(around):
    model = model_of()
    patch(model)
    assert unpatch(around(model)).restored == [KEY]
    patch(around(model))  # the wrapper is gone, the model is not
    gc.collect()
    assert is_patched(model)
    assert unpatch(model).restored == [KEY]


def test_models_that_are_gone_count_no_more():
    first, second = model_of(), model_of()
    patch(first), patch(second)
    del first
    gc.collect()
    assert unpatch(second).restored == [KEY]
    patch(second, precision="fp32")
    del second
    gc.collect()
    third = model_of()
    assert patch(third, precision="model").patched  # nobody is left with the other precision
    assert unpatch(third).restored == [KEY]


@pytest.mark.parametrize("options", [{}, {"precision": "fp32"}, {"rows": 8}, {"norms": "fused"}])
@pytest.mark.parametrize("again", [False, True])
def test_the_last_model_that_is_gone_takes_the_patch_with_it(options, again):
    """Other models of the family would meet its options, such as the bound of positions."""
    other = model_of()
    ids = torch.randint(97, (2, 12))
    original, want = llama.apply_rotary_pos_emb, other(ids).logits
    first, second = model_of(), model_of()
    for model in (first, second, first):
        patch(model, **options)
    del model, first
    gc.collect()
    assert is_patched(second) and llama.apply_rotary_pos_emb is not original
    if again:
        unpatch(second)
        patch(second, **options)
    del second
    gc.collect()
    assert not is_patched(other) and llama.apply_rotary_pos_emb is original
    assert torch.equal(other(ids).logits, want)


def test_a_model_that_is_gone_while_another_thread_patches():
    """The collector does not wait; the next call removes what is left."""
    original, other, model = llama.apply_rotary_pos_emb, model_of(), model_of()
    patch(model)
    held, done = threading.Event(), threading.Event()

    def hold():
        with replacements.lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    del model
    gc.collect()
    done.set()
    thread.join()
    assert not is_patched(other)
    assert unpatch(other).restored and llama.apply_rotary_pos_emb is original


def test_nothing_is_kept_alive():
    model = model_of()
    for _ in range(3):
        patch(model)
        model(torch.randint(97, (2, 12)))
        unpatch(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.slow
def test_cycles_of_patches_keep_a_bounded_number_of_functions():
    model = model_of()

    def count():
        gc.collect()
        return sum(isinstance(o, replacements.Replacement) for o in gc.get_objects())

    counts = []
    for rows in range(16, 32):
        patch(model, rows=rows)
        model(torch.randint(97, (2, 12)))
        unpatch(model)
        counts.append(count())
    assert len(set(counts[4:])) == 1


# --- nothing of ours is reached afterwards ------------------------------------------------------


@pytest.fixture
def forbidden(monkeypatch):
    """After unpatch a call of the operator or of a table of ours is an error."""

    def forbid():
        def reached(*args, **kwargs):
            raise AssertionError("reached")

        style = importlib.import_module("fused_rope.compat._patching.style")
        for name in ("call", "rotate", "rotate_qk"):
            monkeypatch.setattr(style.functional, name, reached)
        monkeypatch.setattr(patching.Tables, "__call__", reached)

    return forbid


def test_captured_functions_are_the_original(forbidden, remote):
    model, (q, k) = model_of(), queries()
    patch(model)
    captured = {
        "name": llama.apply_rotary_pos_emb,
        "partial": functools.partial(llama.apply_rotary_pos_emb, unsqueeze_dim=1),
        "copy": copy.deepcopy(llama.apply_rotary_pos_emb),
    }
    module, other = remote(apply_rotary_pos_emb=llama.apply_rotary_pos_emb)
    for function in captured.values():
        function(q, k, *tables())
    unpatch(model)
    forbidden()
    for function in (*captured.values(), other):
        for a, b in zip(function(q, k, *tables()), ORIGINAL(q, k, *tables()), strict=True):
            same(a, b)
    assert module.apply_rotary_pos_emb is captured["name"]


def test_imported_while_it_stood_there_and_patched_itself(forbidden, remote):
    model, (q, k) = model_of(), queries()
    patch(model)
    module, other = remote(apply_rotary_pos_emb=llama.apply_rotary_pos_emb)
    assert patch(other).patched == {key_of(module): "half"}
    unpatch(model)
    other(q, k, *tables())
    unpatch(other)
    assert module.apply_rotary_pos_emb is ORIGINAL


def test_captured_methods_are_the_original(forbidden):
    model = model_of()
    rotary, x, ids = model.model.rotary_emb, torch.randn(2, 9, 64), torch.arange(9)[None]
    want = rotary(x, ids)
    patch(model)
    bound, unbound = rotary.forward, type(rotary).forward
    rotary._old_forward = rotary.forward  # as accelerate's hooks hold it

    def new_forward(module, *args, **kwargs):
        return module._old_forward(*args, **kwargs)

    rotary.forward = functools.partial(new_forward, rotary)
    hook = rotary.register_forward_hook(lambda module, inputs, output: bound(*inputs))
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    hook.remove()
    del rotary.forward
    torch.save(model, buffer)
    rotary.forward = functools.partial(new_forward, rotary)
    unpatch(model)
    forbidden()
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for call in (
        rotary,
        bound,
        functools.partial(unbound, rotary),
        copied.model.rotary_emb,
        loaded.model.rotary_emb,
        loaded.model.rotary_emb._old_forward,
    ):
        for a, b in zip(call(x, ids), want, strict=True):
            same(a, b)


def test_captured_by_the_compiler():
    torch._dynamo.reset()
    model, (q, k) = model_of(), queries()
    patch(model, compiled="fused")
    captured = llama.apply_rotary_pos_emb
    compiled = torch.compile(lambda *a: captured(*a), backend="aot_eager", fullgraph=True)
    want = ORIGINAL(q, k, *tables())
    for _ in range(2):
        for a, b in zip(compiled(q, k, *tables()), want, strict=True):
            torch.testing.assert_close(a, b)
        unpatch(model)
    torch._dynamo.reset()


# --- rows by position_ids -----------------------------------------------------------------------

clvp = importlib.import_module("transformers.models.clvp.modeling_clvp")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("ids", [[-1, -1, 0, 1, 2], [-2, -7, 0, 6, 2], [3, 1, 4, 1, 5]], ids=str)
def test_negative_position_ids_count_from_the_end(ids, dtype):
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    arguments = q, k, v, *(t[0] for t in tables(7, 8)), torch.tensor([ids], dtype=dtype)
    want = clvp.apply_rotary_pos_emb(*arguments)
    patch()
    for a, b in zip(clvp.apply_rotary_pos_emb(*arguments), want, strict=True):
        same(a, b)


@pytest.mark.parametrize("beyond", [7, -8, -100])
def test_position_ids_beyond_the_rows_are_errors(beyond):
    q = torch.randn(1, 2, 5, 8)
    ids = torch.tensor([[0, 1, beyond, 2, 3]])
    patch()
    with pytest.raises(IndexError, match=f"rotate_qk.*{beyond}"):
        clvp.apply_rotary_pos_emb(q, q, q, *(t[0] for t in tables(7, 8)), ids)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 5)], ids=str)
def test_other_shapes_of_position_ids_are_the_original_s(shape):
    q = torch.randn(2, 5, 5, 8)  # as many heads as tokens: the original broadcasts [S] over heads
    arguments = q, q, q, *(t[0] for t in tables(7, 8)), torch.randint(7, shape)
    want = clvp.apply_rotary_pos_emb(*arguments)
    patch()
    for a, b in zip(clvp.apply_rotary_pos_emb(*arguments), want, strict=True):
        same(a, b)
