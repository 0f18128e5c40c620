"""Mistakes in a call: the exception, a message that says what was expected, nothing written."""

import fused_rope
import pytest
import torch
from fused_rope.compat.liger import liger_rotary_pos_emb_vision
from fused_rope.compat.unsloth import fast_rope_embedding
from oracle import angles, same

V, T, R = ValueError, TypeError, RuntimeError


def bad_calls():
    """The word to find in the message, the exception, and the call."""
    x, k = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)
    c, s = angles(8, 8)
    p, cu = torch.arange(5), torch.tensor([0, 10])
    x_ok, qk_ok = dict(x=x, cos=c, sin=s), dict(q=x, k=k, cos=c, sin=s)
    thd = dict(x=torch.randn(10, 4, 16), cos=c, sin=s, layout="thd")
    token = torch.randn(2, 5, 8)
    head = torch.randn(2, 5, 4, 8)

    yield "x of 4 dimensions", V, x_ok | dict(x=x[0])
    yield "x of 3 dimensions", V, thd | dict(x=x)
    yield "x of dtype", T, x_ok | dict(x=x.int())
    yield "x of dtype", T, x_ok | dict(x=torch.complex(x, x))
    yield "layout", V, x_ok | dict(layout="shbd")
    yield "precision", V, x_ok | dict(precision="fast")

    yield "k of q's dtype", T, qk_ok | dict(k=k.double())
    yield "k with q's B=2", V, qk_ok | dict(k=k[:1])
    yield "k with q's B=2, S=5", V, qk_ok | dict(k=k[:, :4])
    yield "k with q's .*D=16", V, qk_ok | dict(k=torch.randn(2, 5, 2, 18))
    yield "k of 4 dimensions", V, qk_ok | dict(k=k[0])
    yield "k of dtype", T, qk_ok | dict(k=k.bool())

    yield "cos of shape", V, x_ok | dict(cos=c[0], sin=s[0])
    yield "cos of shape", V, x_ok | dict(cos=c[None, None, None], sin=s[None, None, None])
    yield "cos with P <= D/2", V, x_ok | dict(cos=torch.randn(8, 9), sin=torch.randn(8, 9))
    yield r"cos has 4 rows, but S \(5\) are needed", V, x_ok | dict(cos=c[:4], sin=s[:4])
    yield "cos of shape .*B=2", V, x_ok | dict(cos=torch.randn(3, 5, 8), sin=torch.randn(3, 5, 8))
    yield "cos of shape .*S=5", V, x_ok | dict(cos=token[:, :4], sin=token[:, :4])
    yield "cos of shape .*H=4", V, x_ok | dict(cos=head[:, :, :3], sin=head[:, :, :3])
    yield "cos of shape .*S=10", V, thd | dict(cos=token[:1], sin=token[:1])
    yield "cos of dtype", T, x_ok | dict(cos=c.long(), sin=s.long())
    yield "cos of dtype", T, x_ok | dict(cos=torch.complex(c, c), sin=torch.complex(s, s))
    yield "sin of cos's shape", V, x_ok | dict(sin=s[:, :4])
    yield "sin of cos's shape", V, x_ok | dict(sin=s[:7])
    yield "sin of cos's shape", V, x_ok | dict(sin=s[None])
    yield "sin of cos's dtype", T, x_ok | dict(sin=s.double())

    yield "rotary_offset", V, x_ok | dict(rotary_offset=1)
    yield "rotary_offset", V, x_ok | dict(rotary_offset=-1)
    yield "rotary_offset", V, x_ok | dict(rotary_offset=2**63 - 1)
    yield "blocks", V, x_ok | dict(blocks=3)
    yield "blocks", V, x_ok | dict(blocks=0)
    yield "blocks", V, x_ok | dict(blocks=-1)
    yield "blocks", V, x_ok | dict(blocks=2, interleaved=True)

    for dtype in (torch.float32, torch.int16, torch.uint8, torch.bool):
        yield "positions of dtype", T, x_ok | dict(positions=p.to(dtype))
        yield "offset of dtype", T, x_ok | dict(offset=torch.zeros(2, dtype=dtype))
        yield "cu_seqlens of dtype", T, thd | dict(cu_seqlens=cu.to(dtype))
    for sizes in ((4,), (6,), (10,), (2, 4)):
        yield "positions of shape", V, x_ok | dict(positions=torch.zeros(sizes, dtype=p.dtype))
    yield "positions of shape", V, x_ok | dict(positions=p.expand(3, 5))
    yield "positions of shape", V, x_ok | dict(positions=p.expand(1, 1, 5))
    yield "positions of shape", V, x_ok | dict(positions=p[0])
    yield "positions of shape", V, thd | dict(positions=p.expand(2, 5))
    yield "no positions", V, x_ok | dict(cos=token, sin=token, positions=p)
    yield "no positions", V, x_ok | dict(cos=head, sin=head, positions=p)
    yield "positions", IndexError, x_ok | dict(positions=p + 4)
    yield "positions", IndexError, x_ok | dict(positions=p - 2)

    words = r"cos has 8 rows, but offset \({}\) \+ S \(5\) = {} are needed"
    for offset in (4, 2**63 - 1):
        yield words.format(offset, offset + 5), V, x_ok | dict(offset=offset)
    yield "offset >= 0", V, x_ok | dict(offset=-1)
    yield "offset of shape", V, x_ok | dict(offset=torch.zeros(3, dtype=torch.int64))
    yield "offset of shape", V, x_ok | dict(offset=torch.zeros(2, 1, dtype=torch.int64))
    yield "offset of shape", V, thd | dict(cu_seqlens=cu, offset=torch.tensor([1, 2]))
    yield "no offset", V, x_ok | dict(cos=token, sin=token, offset=1)
    yield "no offset", V, x_ok | dict(cos=token, sin=token, offset=torch.tensor([0, 0]))

    yield "cu_seqlens with layout thd", V, x_ok | dict(cu_seqlens=torch.tensor([0, 5]))
    yield "cu_seqlens of shape", V, thd | dict(cu_seqlens=cu[None])
    yield "cu_seqlens of shape", V, thd | dict(cu_seqlens=cu[:0])
    yield "no cu_seqlens", V, thd | dict(cos=head[:1], sin=head[:1], cu_seqlens=cu)

    three = p.expand(3, 2, 5)
    axes = [0, 1, 2, 0, 1, 2, 0, 1]
    yield "axes", V, x_ok | dict(positions=three, axes=axes[:-1])
    yield "axes", V, x_ok | dict(positions=three, axes=[*axes, 0])
    yield "axes", V, x_ok | dict(positions=three, axes=[3, *axes[1:]])
    yield "axes", V, x_ok | dict(positions=three, axes=[-1, *axes[1:]])
    yield "positions with 1 <= A", V, x_ok | dict(positions=p.expand(9, 2, 5), axes=axes)
    yield "positions with a leading axis A", V, x_ok | dict(axes=axes)
    yield "positions of shape", V, x_ok | dict(positions=three)
    yield "positions of shape", V, x_ok | dict(positions=three[:, :, :4], axes=axes)
    yield "positions of shape", V, x_ok | dict(positions=p, axes=axes)

    yield "cos on device cpu", (V, R), x_ok | dict(cos=c.to("meta"), sin=s.to("meta"))
    yield "sin on device cpu", (V, R), x_ok | dict(sin=s.to("meta"))
    yield "k on device cpu", (V, R), qk_ok | dict(k=k.to("meta"))
    yield "positions on device cpu", (V, R), x_ok | dict(positions=p.to("meta"))


CALLS = list(bad_calls())
IDS = [f"{i}-{word}" for i, (word, _, _) in enumerate(CALLS)]


CALL_FORMS = ["new tensor", "in place", "out"]


@pytest.mark.parametrize("call", CALLS, ids=IDS)
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("form", CALL_FORMS)
def test_bad_call(call, form, grad):
    word, kind, arguments = call
    name = "rotate_qk" if "q" in arguments else "rotate"
    inputs = [n for n in ("x", "q", "k") if n in arguments]
    arguments = dict(arguments)
    if grad:
        for n in inputs:
            if arguments[n].is_floating_point() and not arguments[n].is_meta:
                arguments[n] = arguments[n].clone().requires_grad_() * 1
    function = getattr(fused_rope, name + ("_" if form == "in place" else ""))
    if form == "out":
        outs = tuple(torch.zeros_like(arguments[n]) for n in inputs)
        arguments["out"] = outs if "q" in arguments else outs[0]
    tensors = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor) and not t.is_meta}
    before = {n: (t.detach().clone(), t._version) for n, t in tensors.items()}
    operator = name + {"new tensor": "", "in place": "_", "out": "_out"}[form]
    expected = rf"(?s)^{operator}: " + (word if "needed" in word else f"expected {word}.*got")
    with torch.set_grad_enabled(form != "out"), pytest.raises(kind, match=expected):
        function(**arguments)
    for n, (value, version) in before.items():
        same(tensors[n], value)
        assert tensors[n]._version == version, n


def test_wording():
    x, (cos, sin) = torch.empty(2, 128, 4, 128), angles(100, 32)
    with pytest.raises(ValueError) as error:
        fused_rope.rotate(x, cos, sin)
    # Nothing follows, such as a C++ stack.
    want = "rotate: cos has 100 rows, but S (128) are needed"
    assert str(error.value) == want


def test_a_position_out_of_range_is_named():
    x, (cos, sin) = torch.randn(2, 5, 4, 16), angles(8, 8)
    positions = torch.zeros(2, 5, dtype=torch.int64)
    positions[1, 3] = 17
    with pytest.raises(IndexError, match=r"rotate: .*M=8.*17.*b=1, s=3"):
        fused_rope.rotate(x, cos, sin, positions=positions)


def test_out_of_rotate_qk_must_be_a_pair():
    x, (cos, sin) = torch.randn(2, 5, 4, 16), angles(8, 8)
    for out in (torch.empty(2, 5, 4, 16), (x.clone(),), [x.clone() for _ in range(3)]):
        with pytest.raises(TypeError, match="rotate_qk: expected out to be a pair of tensors"):
            fused_rope.rotate_qk(x, x.clone(), cos, sin, out=out)


@pytest.mark.parametrize("name", ["rotate", "rotate_", "rotate_qk", "rotate_qk_"])
def test_no_positional_options_and_no_unknown_ones(name):
    x, (cos, sin) = torch.randn(2, 5, 4, 16), angles(8, 8)
    tensors = (x, x.clone(), cos, sin) if "qk" in name else (x, cos, sin)
    function = getattr(fused_rope, name)
    with pytest.raises(TypeError):
        function(*tensors, "bshd")
    with pytest.raises(TypeError):
        function(*tensors, position_ids=None)
    if name.endswith("_"):
        with pytest.raises(TypeError):
            function(*tensors, out=x)


WRONG_TYPES = [
    ("x to be a Tensor, got NoneType", dict(x=None)),
    ("x to be a Tensor, got list", dict(x=[1.0, 2.0])),
    ("sin to be a Tensor, got NoneType", dict(sin=None)),
    ("positions to be a Tensor, got list", dict(positions=[0, 1, 2, 3, 4])),
    ("offset to be an int, got float", dict(offset=1.5)),
    ("cu_seqlens to be a Tensor, got list", dict(cu_seqlens=[0, 10])),
    ("layout to be a str, got int", dict(layout=3)),
    ("axes to be a sequence of ints, got str", dict(axes="abc")),
    ("axes to be a sequence of ints, got list", dict(axes=[0.0] * 8)),
    ("interleaved to be a bool, got str", dict(interleaved="no")),
    ("blocks to be an int, got float", dict(blocks=1.0)),
    ("inverse to be a bool, got dict", dict(inverse={})),
    ("precision to be a str, got NoneType", dict(precision=None)),
    ("out to be a Tensor, got tuple", dict(out=(torch.empty(2, 5, 4, 16),))),
]


@pytest.mark.parametrize("message,wrong", WRONG_TYPES, ids=lambda w: "".join(w))
def test_wrong_types(message, wrong):
    x, (cos, sin) = torch.randn(2, 5, 4, 16), angles(8, 8)
    with pytest.raises(TypeError) as error:
        fused_rope.rotate(**dict(x=x, cos=cos, sin=sin) | wrong)
    name = "rotate_out" if "out" in wrong else "rotate"
    assert str(error.value) == f"{name}: expected {message}"


@pytest.mark.parametrize("name", ["offset", "rotary_offset", "blocks"])
@pytest.mark.parametrize("number", [2**63, -(2**63) - 1])
def test_numbers_too_large_for_the_operator(name, number):
    x, (cos, sin) = torch.randn(2, 5, 4, 16), angles(8, 8)
    with pytest.raises(ValueError, match=f"^rotate: expected {name} of 64 bits, got {number}$"):
        fused_rope.rotate(x, cos, sin, **{name: number})


@pytest.mark.parametrize("missing", ["q", "k", "cos", "sin"])
def test_none_instead_of_a_tensor(missing):
    q, (cos, sin) = torch.randn(2, 5, 4, 16), angles(5, 8)
    tensors = dict(q=q, k=q, cos=cos, sin=sin) | {missing: None}
    with pytest.raises(TypeError, match=f"^rotate_qk: expected {missing} to be a Tensor, got None"):
        fused_rope.rotate_qk(*tensors.values())


NESTED = r"nested tensor: pass the values\(\) .* cu_seqlens"
UNREADABLE = {
    "sparse": (lambda x: x.to_sparse(), "sparse"),
    "quantized": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "quantized .*dequantize",
    ),
    "nested": (lambda x: torch.nested.nested_tensor([x[0], x[1, 1:]]), NESTED),
    "jagged": (
        lambda x: torch.nested.nested_tensor([x[0], x[1, 1:]], layout=torch.jagged),
        NESTED,
    ),
}
FORMS = ["rotate", "rotate_", "rotate_qk", "rotate_qk_"]
UNREAD = [(kind, form, False) for kind in UNREADABLE for form in (*FORMS, "rotate_out")]
UNREAD += [(kind, form, True) for kind in ("nested", "jagged") for form in FORMS]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind,form,grad", UNREAD)
def test_tensors_without_strided_memory(kind, form, grad):
    cos, sin = angles(8, 8)
    other = torch.randn(2, 5, 4, 16)
    make, words = UNREADABLE[kind]
    x = make(other)
    if grad:
        x = x.requires_grad_() * 1
    inputs = (other, x) if "qk" in form else (x,)
    kw = dict(out=other) if form == "rotate_out" else {}
    with pytest.raises(TypeError, match=f"^{form}.*{words}"):
        getattr(fused_rope, form.removesuffix("_out"))(*inputs, cos, sin, **kw)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nested_positions_and_modules():
    parts = [torch.arange(3), torch.arange(2)]
    x, (cos, sin) = torch.randn(2, 5, 4, 16), angles(8, 8)
    for kw in ({}, {"layout": torch.jagged}):
        positions = torch.nested.nested_tensor(parts, **kw)
        with pytest.raises(TypeError, match=r"^rotate: .*nested"):
            fused_rope.rotate(x, cos, sin, positions=positions)
        nested = torch.nested.nested_tensor([torch.randn(n, 4, 16) for n in (3, 5)], **kw)
        with pytest.raises(TypeError, match=r"^RotaryEmbedding: .*nested"):
            fused_rope.RotaryEmbedding(16)(nested)


def test_the_advice_for_nested_tensors_works():
    parts = [torch.randn(n, 4, 16) for n in (3, 5)]
    x, (cos, sin) = torch.nested.nested_tensor(parts, layout=torch.jagged), angles(8, 8)
    got = fused_rope.rotate(x.values(), cos, sin, layout="thd", cu_seqlens=x.offsets())
    same(got, torch.cat([fused_rope.rotate(p, cos, sin, layout="thd") for p in parts]))


class Scripted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rope = fused_rope.RotaryEmbedding(16)

    def forward(self, x):
        return self.rope(x)


def scripted_call(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
    return fused_rope.rotate(x, cos, sin)


def scripted_operator(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
    return torch.ops.fused_rope.rotate(x, cos, sin)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripting():
    for module in (fused_rope.RotaryEmbedding(16), Scripted()):
        with pytest.raises(RuntimeError, match=r"^RotaryEmbedding: torch\.jit\.script cannot"):
            torch.jit.script(module)
    with pytest.raises(RuntimeError, match=r"^rotate: .* call torch\.ops\.fused_rope\.rotate"):
        torch.jit.script(scripted_call)
    x, (cos, sin) = torch.randn(2, 5, 4, 16), angles(8, 8)
    same(torch.jit.script(scripted_operator)(x, cos, sin), fused_rope.rotate(x, cos, sin))


def test_an_odd_head_dim():
    x, (cos, sin) = torch.randn(2, 5, 4, 7), angles(8, 4)
    with pytest.raises(ValueError, match=r"^rotate: .*D=7.*D is odd, so at most P=3 pairs fit"):
        fused_rope.rotate(x, cos, sin)
    same(fused_rope.rotate(x, cos[:, :3], sin[:, :3])[..., 6], x[..., 6])


def test_a_full_width_table_of_odd_width():
    q, k, (cos, sin) = torch.randn(5, 2, 7), torch.randn(5, 1, 7), angles(5, 7)
    with pytest.raises(ValueError, match=r"even number of columns .*, got \[5, 7\]"):
        liger_rotary_pos_emb_vision(q, k, cos, sin)
    with pytest.raises(ValueError, match=r"even number of columns .*, got \[5, 7\]"):
        fast_rope_embedding(q[None].transpose(1, 2), k[None].transpose(1, 2), cos, sin)


def test_errors_reach_callers_of_the_operators():
    """The checks are in the operators, not in the Python functions."""
    x, (cos, sin) = torch.randn(2, 5, 4, 16), angles(3, 8)
    for name in ("rotate", "rotate_"):
        with pytest.raises(ValueError, match=f"{name}: cos has 3 rows"):
            getattr(torch.ops.fused_rope, name)(x, cos, sin)


def test_an_error_in_another_thread_is_raised():
    """Rows are checked before any thread writes."""
    x, (cos, sin) = torch.randn(8, 512, 4, 64), angles(600, 32)
    positions = torch.arange(512).repeat(8, 1)
    positions[7, 511] = 600
    before = x.clone()
    with pytest.raises(IndexError, match="600"):
        fused_rope.rotate_(x, cos, sin, positions=positions)
    same(x, before)
