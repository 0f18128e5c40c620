"""What the dispatcher knows: schemas, kernels, Meta, and PyTorch's own checks of an operator."""

import doctest
import importlib
import inspect
import pkgutil
import re
from typing import ClassVar

import fused_rope
import pytest
import torch
from oracle import angles, same, tensor, views
from torch.library import opcheck

ROWS = "Tensor? positions=None, Tensor? offsets=None, Tensor? cu_seqlens=None"
OPTIONS = (
    'SymInt offset=0, str layout="bshd", int[]? axes=None, int rotary_offset=0, '
    'bool interleaved=False, int blocks=1, bool inverse=False, str precision="fp32", '
    'str table_layout="half"'
)
OUT = f"{ROWS}, Tensor? out_rows=None, {OPTIONS}"
SCHEMAS = {
    "rotate": f"(Tensor x, Tensor cos, Tensor sin, {ROWS}, {OPTIONS}) -> Tensor",
    "rotate_": f"(Tensor(a!) x, Tensor cos, Tensor sin, {ROWS}, {OPTIONS}) -> ()",
    "rotate_qk": f"(Tensor q, Tensor k, Tensor cos, Tensor sin, {ROWS}, {OPTIONS})"
    " -> (Tensor, Tensor)",
    "rotate_qk_": f"(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, {ROWS}, {OPTIONS}) -> ()",
    "rotate_out": f"(Tensor x, Tensor cos, Tensor sin, Tensor(a!) out, {OUT}) -> ()",
    "rotate_qk_out": "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor(a!) q_out, "
    f"Tensor(b!) k_out, {OUT}) -> ()",
}
NORM = "*, float eps, bool zero_centered=False, str cast='never', bool after=False"
WEIGHTS = {1: "Tensor? weight=None", 2: "Tensor? q_weight=None, Tensor? k_weight=None"}
for _name, _schema in list(SCHEMAS.items()):
    _weights = WEIGHTS[2 if "qk" in _name else 1]
    _schema = _schema.replace(ROWS, f"{_weights}, {ROWS}").replace(OPTIONS, f"{OPTIONS}, {NORM}")
    SCHEMAS[f"norm_{_name}"] = _schema
FUNCTIONAL = ("rotate", "rotate_qk", "norm_rotate", "norm_rotate_qk", "norm_rotate_qk_backward")
SCHEMAS["norm_rotate_qk_backward"] = (
    "(Tensor? q_grad, Tensor? k_grad, Tensor q, Tensor? k, Tensor cos, Tensor sin, "
    f"{WEIGHTS[2]}, {ROWS}, {OPTIONS}, {NORM}, bool[4] output_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def arguments(name, device, grad=False):
    q, k = (tensor("bshd", 2, 5, H, 16, torch.float32, device) for H in (4, 2))
    if grad:
        q.requires_grad_(), k.requires_grad_()
    inputs = (q, k) if "qk" in name else (q,)
    outputs = tuple(torch.empty_like(t) for t in inputs) if name.endswith("out") else ()
    grads = tuple(torch.randn_like(t) for t in inputs) if name.endswith("backward") else ()
    weights = ()
    if name.startswith("norm"):
        weights = tuple(torch.randn(16, device=device, requires_grad=grad) for _ in inputs)
    return (*grads, *inputs, *angles(9, 8, device), *outputs, *weights)


def required(name):
    """The keywords without a default."""
    kw = {"eps": 1e-6} if name.startswith("norm") else {}
    return kw | ({"output_mask": [True] * 4} if name.endswith("backward") else {})


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    schema = getattr(torch.ops.fused_rope, name).default._schema
    assert schema == torch._C.parse_schema(f"fused_rope::{name}{SCHEMAS[name]}")
    assert schema.is_mutable == (name not in FUNCTIONAL)


def test_schema_of_the_table():
    want = (
        "fused_rope::cos_sin_table(Tensor inv_freq, SymInt rows, SymInt first=0, float scale=1., "
        "ScalarType dtype=6, Device? device=None) -> (Tensor, Tensor)"
    )
    assert torch.ops.fused_rope.cos_sin_table.default._schema == torch._C.parse_schema(want)


@pytest.mark.parametrize("name", SCHEMAS)
def test_kernels(name):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = ["CPU", "Meta", "Autograd"]
    if torch.cuda.is_available():
        keys.append("CUDA")
    if name not in FUNCTIONAL:
        keys += ["ADInplaceOrView", "Functionalize"]
    for key in keys:
        assert has(f"fused_rope::{name}", key), key


@pytest.mark.parametrize("name", SCHEMAS)
def test_tag(name):
    assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.fused_rope, name).default.tags


# With gradients opcheck takes leaves, which in-place operators refuse, as out refuses gradients.
CHECKED = [(name, False) for name in SCHEMAS] + [(name, True) for name in FUNCTIONAL]


@pytest.mark.parametrize("name,grad", CHECKED)
@pytest.mark.parametrize("rows", ["none", "positions", "offset", "lengths", "full width"])
def test_opcheck(name, grad, rows, device):
    kw = {
        "none": dict(),
        "positions": dict(positions=torch.tensor([[0, -1, 3, 2, 8], [1, 1, 1, 0, 4]])),
        "offset": dict(offset=3, interleaved=True),
        "full width": dict(table_layout="tiled"),
        "lengths": dict(offsets=torch.tensor([0, 4], dtype=torch.int32), precision="model"),
    }[rows]
    kw = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in kw.items()}
    kw |= required(name)
    if "eps" in kw and "precision" in kw:
        kw["cast"] = "before"
    opcheck(getattr(torch.ops.fused_rope, name).default, arguments(name, device, grad), kw)


@pytest.mark.parametrize("table_layout", ["half", "tiled", "repeated"])
@pytest.mark.parametrize("name", ["rotate", "rotate_qk", "norm_rotate", "norm_rotate_qk"])
def test_opcheck_of_trained_tables(name, table_layout, device):
    tensors = [t.requires_grad_() for t in arguments(name, device, grad=True)]
    op = getattr(torch.ops.fused_rope, name).default
    opcheck(op, tuple(tensors), dict(table_layout=table_layout, **required(name)))


def test_opcheck_of_out_rows(device):
    x, cache = torch.randn(7, 2, 16, device=device), torch.zeros(64, 2, 16, device=device)
    slots = torch.tensor([3, 2, -1, 60, 9, 0, 1], device=device)
    op = torch.ops.fused_rope.rotate_out.default
    opcheck(op, (x, *angles(7, 8, device), cache), dict(out_rows=slots, layout="thd"))


def test_opcheck_of_the_table(device):
    inv_freq = torch.rand(8, dtype=torch.float64, device=device)
    opcheck(torch.ops.fused_rope.cos_sin_table.default, (inv_freq, 10), dict(first=3))


# --- who intercepts a call ----------------------------------------------------------------------


class Seen(torch.overrides.TorchFunctionMode):
    """Notes what is called, and calls it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


FUNCTION_NAMES = [name for name in SCHEMAS if not name.endswith("backward")]


def call_function(name, device, change=lambda x: x):
    """The function behind operator `name`, with an output of its own where it takes one."""
    tensors = arguments(name.removesuffix("_out"), device)
    count = 2 if "qk" in name else 1
    inputs, others = list(tensors[:count]), tensors[count:]
    inputs[-1] = change(inputs[-1])
    kw = required(name)
    if name.endswith("_out"):
        outputs = [torch.empty_like(x) for x in inputs]
        kw["out"] = outputs[0] if len(outputs) == 1 else tuple(outputs)
    return getattr(fused_rope, name.removesuffix("_out")), (*inputs, *others), kw


@pytest.mark.parametrize("name", FUNCTION_NAMES)
def test_a_function_mode_sees_the_operator(name, device):
    function, inputs, kw = call_function(name, device)
    with Seen() as mode:
        function(*inputs, offset=2, **kw)
    [(seen, args, kwargs)] = mode.calls
    assert seen is getattr(torch.ops.fused_rope, name)
    assert {id(t) for t in inputs} <= {id(a) for a in args}
    assert set(kwargs) == ({"eps", "zero_centered", "cast", "after"} if "norm" in name else set())
    if not name.endswith(("_", "_out")):
        results = pair(seen(*args, **kwargs)), pair(function(*inputs, offset=2, **kw))
        for got, want in zip(*results, strict=True):
            same(got, want)


@pytest.mark.parametrize("name", FUNCTION_NAMES)
def test_a_subclass_sees_the_operator(name, device):
    function, inputs, kw = call_function(name, device, lambda x: x.as_subclass(Subclass))
    Subclass.seen.clear()
    result = function(*inputs, **kw)
    assert Subclass.seen == [getattr(torch.ops.fused_rope, name)]
    if not name.endswith("_out"):
        assert type(pair(result)[-1]) is Subclass


def test_a_mode_of_the_default_device_under_transforms(device):
    """`with torch.device(...)` is a function mode, and torch.func still works in it."""
    x, cos, sin = arguments("rotate", device)
    with torch.device(device):
        got = torch.func.grad(lambda x: fused_rope.rotate(x, cos, sin).sum())(x)
    same(got, fused_rope.rotate(torch.ones_like(x), cos, sin, inverse=True))


def test_dispatch_modes_and_parameters(device):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x, cos, sin = arguments("rotate", device)
    parameter, seen = torch.nn.Parameter(x), []
    with Dispatched():
        got = fused_rope.rotate(parameter, cos, sin)
    assert seen == [torch.ops.fused_rope.rotate.default] and got.requires_grad
    same(got, fused_rope.rotate(x, cos, sin))


# --- Meta --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["rotate", "rotate_qk"])
def test_meta_strides_are_the_real_ones(form):
    cos, sin = angles(5, 8)
    for name, x in views(torch.bfloat16):
        tensors = (x,) if form == "rotate" else (x, x)
        real = getattr(fused_rope, form)(*tensors, cos, sin)
        # `.to("meta")` would keep the strides of dense tensors only.
        strided = tuple(
            torch.empty(10_000, dtype=t.dtype, device="meta").as_strided(t.shape, t.stride())
            for t in tensors
        )
        meta = getattr(fused_rope, form)(*strided, *meta_table(5, 8))
        for m, r in zip(pair(meta), pair(real), strict=True):
            assert m.device.type == "meta" and m.dtype == r.dtype, name
            assert m.shape == r.shape and m.stride() == r.stride(), name


def pair(result):
    return (result,) if isinstance(result, torch.Tensor) else result


def meta_table(rows, P):
    return torch.empty(rows, P, device="meta"), torch.empty(rows, P, device="meta")


@pytest.mark.parametrize("name", SCHEMAS)
def test_meta_runs(name):
    inputs = [t.to("meta") for t in arguments(name, "cpu")]
    getattr(torch.ops.fused_rope, name)(*inputs, **required(name))


META = torch.empty(2, 5, 4, 16, device="meta")
BAD_META = {
    "dtype of x": (TypeError, "x", META.int(), meta_table(5, 8)),
    "rank of x": (ValueError, "x", META[0], meta_table(5, 8)),
    "dtype of sin": (TypeError, "sin", META, (META[0, :, 0, :8], META[0, :, 0, :8].double())),
    "device of cos": (ValueError, "cos", META, (torch.ones(5, 8), torch.ones(5, 8))),
}


@pytest.mark.parametrize("kind,word,x,table", BAD_META.values(), ids=BAD_META)
def test_meta_checks_its_inputs(kind, word, x, table):
    with pytest.raises(kind, match=f"rotate: expected {word}"):
        fused_rope.rotate(x, *table)


def test_fake_tensors_propagate(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.randn(2, 4, 7, 16, device=device).transpose(1, 2)
        cos = torch.randn(9, 8, device=device)
        y = fused_rope.rotate(x, cos, cos)
    assert y.shape == x.shape and y.stride() == x.stride() and y.device == x.device


# --- the functions -----------------------------------------------------------------------------


FUNCTIONS = ["rotate", "rotate_", "rotate_qk", "rotate_qk_"]
FUNCTIONS += [f"norm_{name}" for name in FUNCTIONS]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_and_operator_take_the_same_keywords(name):
    """The functions fold offsets into offset and the out forms into out=."""
    keywords = set(inspect.signature(getattr(fused_rope, name)).parameters)
    schema = getattr(torch.ops.fused_rope, name).default._schema
    operator = {a.name for a in schema.arguments} - {"offsets"}
    assert keywords - {"out", "out_rows"} == operator
    assert ("out" in keywords) == (not name.endswith("_"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_leaves_dtypes_alone(dtype, device):
    q, k, cos, sin = arguments("rotate_qk", device, grad=True)
    want = fused_rope.rotate_qk(q, k, cos, sin)
    with torch.autocast(device, dtype):
        got = fused_rope.rotate_qk(q, k, cos, sin)
    for g, w in zip(got, want, strict=True):
        same(g, w)
    (got[0].sum() + got[1].sum()).backward()
    assert q.grad.dtype == q.dtype


def test_operators_return_what_functions_return(device):
    q, k, cos, sin = arguments("rotate_qk", device)
    for got, want in zip(
        torch.ops.fused_rope.rotate_qk(q, k, cos, sin),
        fused_rope.rotate_qk(q, k, cos, sin),
        strict=True,
    ):
        same(got, want)


def test_documentation():
    for name in (*FUNCTIONS, "cos_sin_table", "RotaryEmbedding"):
        doc = inspect.getdoc(getattr(fused_rope, name))
        assert doc and len(doc) > 200 and ">>>" in doc, name
    assert set(fused_rope.__all__) <= set(dir(fused_rope))


# The examples of these need another package or a process group.
NEEDS_MORE = ("fused_rope.compat.transformers.kernel_layers", "fused_rope.distributed")
MODULES = [m.name for m in pkgutil.walk_packages(fused_rope.__path__, "fused_rope.")]
MODULES = [m for m in MODULES if m not in (*NEEDS_MORE, "fused_rope._C", "fused_rope.__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_documentation(name):
    """The docstrings' examples run."""
    needed = r"transformers|diffusers"
    if package := re.search(needed, name):
        pytest.importorskip(package[0])
    module = importlib.import_module(name)
    source = inspect.getsource(module)
    for package in re.findall(rf">>> from ({needed})\b", source):
        pytest.importorskip(package)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    names = {"torch": torch, "fused_rope": fused_rope}
    result = doctest.testmod(module, extraglobs=names, optionflags=flags)
    assert result.failed == 0
    assert (result.attempted > 0) == (">>> " in source)
