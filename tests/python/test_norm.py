"""norm_rotate: values against float64, prescribed bits, forms, memory and errors."""

import fused_rope
import pytest
import torch
from fused_rope import reference
from oracle import (
    DENSE,
    DTYPES,
    HALF,
    LAYOUTS,
    OVERLAPPING,
    VIEWS,
    angles,
    norm_bits,
    norm_error_over_bound,
    same,
    tensor,
    view,
)
from test_reference import LAYOUT_ROWS, B, H, M, P, S, row_choice

EPS = 1e-6
# D, R, rotary_offset: heads of models, MLA, odd ones, no vector, no pair.
SPANS = [
    (128, 128, 0),
    (64, 64, 0),
    (256, 64, 0),
    (96, 96, 0),
    (80, 40, 40),
    (576, 64, 512),
    (512, 512, 0),
    (1024, 128, 0),
    (130, 2, 7),
    (37, 34, 3),
    (18, 18, 0),
    (6, 4, 1),
    (3, 2, 1),
    (2, 2, 0),
    (1, 0, 0),
    (16, 0, 5),
]
EACH_ORDER = pytest.mark.parametrize("after", [False, True], ids=["norm first", "norm last"])
CASTS = [
    ("fp32", "never"),
    ("fp32", "before"),
    ("fp32", "after"),
    ("model", "before"),
    ("model", "after"),
]


def weight_of(D, dtype, device="cpu"):
    return (1 + torch.randn(D, dtype=torch.float64) / 8).to(dtype).to(device)


def check(x, cos, sin, weight=None, **kw):
    """The result of norm_rotate, after comparing it with the oracle and with the reference."""
    got = fused_rope.norm_rotate(x, cos, sin, weight, eps=EPS, **kw)
    assert got.shape == x.shape and got.dtype == x.dtype
    assert norm_error_over_bound(got, x, cos, sin, weight, eps=EPS, **kw) <= 1.0
    if x.device.type == "cpu":
        same(got, reference.norm_rotate(x, cos, sin, weight, eps=EPS, **kw))
    return got


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("interleaved,zero_centered", [(False, False), (True, True)])
@EACH_ORDER
def test_values(layout, dtype, span, interleaved, zero_centered, after, device):
    """q and k with weights of two dtypes, together and alone; the inputs are left alone."""
    D, R, o = span
    q, k = (tensor(layout, 2, 5, heads, D, dtype, device) for heads in (3, 2))
    cos, sin = angles(10 if layout == "thd" else 5, R // 2, device)
    weights = weight_of(D, dtype, device), weight_of(D, torch.float32, device)
    kw = dict(layout=layout, rotary_offset=o, interleaved=interleaved)
    kw |= dict(zero_centered=zero_centered, after=after)
    before = [t.clone() for t in (q, k, *weights)]
    both = fused_rope.norm_rotate_qk(q, k, cos, sin, *weights, eps=EPS, **kw)
    for x, w, got in zip((q, k), weights, both, strict=True):
        same(got, check(x, cos, sin, w, **kw))
    for x, copy in zip((q, k, *weights), before, strict=True):
        same(x, copy)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("precision,cast", CASTS)
@pytest.mark.parametrize("zero_centered", [False, True], ids=["w", "1 + w"])
@pytest.mark.parametrize("weighted", ["own", "float32", "none"])
@pytest.mark.parametrize("D", [16, 64, 128, 256])
@EACH_ORDER
def test_prescribed_bits(dtype, precision, cast, zero_centered, weighted, D, after, device):
    """Sums of squares that are exact in any order leave no freedom."""
    x = torch.randint(-1, 3, (2, 5, 3, D)).to(dtype).to(device)
    own = {"own": dtype, "float32": torch.float32}
    weight = None if weighted == "none" else weight_of(D, own[weighted], device)
    quarter_turns = torch.randint(0, 4, (5, D // 2), device=device)
    cos, sin = angles(5, D // 2, device)
    if after:  # rotated squares have exact sums too
        cos = torch.tensor([1.0, 0.0, -1.0, 0.0], device=device)[quarter_turns]
        sin = torch.tensor([0.0, 1.0, 0.0, -1.0], device=device)[quarter_turns]
    kw = dict(eps=EPS, precision=precision, cast=cast, zero_centered=zero_centered, after=after)
    if cast == "before" and weighted == "float32" and dtype != torch.float32:
        with pytest.raises(TypeError, match="weight"):
            fused_rope.norm_rotate(x, cos, sin, weight, **kw)
        return
    want = norm_bits(
        *(t.cpu() for t in (x, cos, sin)), None if weight is None else weight.cpu(), **kw
    )
    same(fused_rope.norm_rotate(x, cos, sin, weight, **kw).cpu(), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision,cast", CASTS)
@pytest.mark.parametrize("D", [2, 7, 30, 96, 128, 514])
@EACH_ORDER
def test_reference_has_the_same_bits(dtype, precision, cast, D, after):
    x, weight = tensor("bshd", 2, 5, 3, D, dtype), weight_of(D, dtype)
    kw = dict(eps=EPS, precision=precision, cast=cast, after=after)
    for tables in (angles(5, D // 2), angles(5, D // 2, dtype=dtype)):
        got = fused_rope.norm_rotate(x, *tables, weight, **kw)
        same(got, reference.norm_rotate(x, *tables, weight, **kw))


@pytest.mark.parametrize("layout,rows", LAYOUT_ROWS)
@EACH_ORDER
def test_rows(layout, rows, after, device):
    x = tensor(layout, B, S, H, 2 * P + 5, torch.float32, device)
    if layout == "thd":
        x = x[:S]
    cos, sin = angles(M, P, device)
    kw = row_choice(layout, rows, device) | dict(layout=layout, rotary_offset=3, after=after)
    check(x, cos, sin, weight_of(2 * P + 5, torch.float32, device), **kw)


@EACH_ORDER
def test_tokens_that_are_not_rotated_are_normalized(after, device):
    x, weight = tensor("thd", 1, 9, 3, 64, torch.bfloat16, device), weight_of(64, torch.float32)
    weight = weight.to(device)
    cos, sin = angles(9, 32, device)
    kw = dict(layout="thd", after=after)
    still = check(x, torch.ones_like(cos), torch.zeros_like(sin), weight, **kw)
    nowhere = torch.full((9,), -1, device=device)
    same(fused_rope.norm_rotate(x, cos, sin, weight, eps=EPS, positions=nowhere, **kw), still)
    ends = torch.tensor([0, 0], device=device)  # all tokens are padding
    same(fused_rope.norm_rotate(x, cos, sin, weight, eps=EPS, cu_seqlens=ends, **kw), still)


@pytest.mark.parametrize("form", ["per token", "per head", "tiled", "repeated", "bfloat16"])
@EACH_ORDER
def test_table_forms(form, after, device):
    x, weight = tensor("bshd", 2, 5, 3, 16, torch.bfloat16, device), weight_of(16, torch.float32)
    weight, kw = weight.to(device), dict(after=after)
    cos, sin = angles(5, 8, device)
    want = check(x, cos, sin, weight, **kw)
    expand = {
        "per token": lambda t: t.expand(2, 5, 8),
        "per head": lambda t: t[None, :, None].expand(2, 5, 3, 8),
        "tiled": lambda t: torch.cat([t, t], -1),
        "repeated": lambda t: t.repeat_interleave(2, -1),
        "bfloat16": lambda t: t.bfloat16(),
    }[form]
    if form in ("tiled", "repeated"):
        kw["table_layout"] = form
    if form == "bfloat16":
        want = check(x, cos.bfloat16(), sin.bfloat16(), weight, **kw)
    got = fused_rope.norm_rotate(x, expand(cos), expand(sin), weight, eps=EPS, **kw)
    same(got, want)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_memory(name, dtype, device):
    """Strides and alignment change no bit, of inputs, outputs and weights."""
    x = view(name, dtype, device)
    cos, sin = angles(5, 8, device)
    weight = weight_of(32, dtype, device)[::2]
    want = fused_rope.norm_rotate(x.contiguous(), cos, sin, weight.contiguous(), eps=EPS)
    got = fused_rope.norm_rotate(x, cos, sin, weight, eps=EPS)
    same(got, want)
    if name in DENSE:
        assert got.stride() == torch.empty_like(x).stride()
    if name in OVERLAPPING:
        return
    out = view(name, dtype, device)
    assert fused_rope.norm_rotate(x, cos, sin, weight, eps=EPS, out=out) is out
    same(out, want)
    assert fused_rope.norm_rotate_(x, cos, sin, weight, eps=EPS) is x
    same(x, want)


def test_forms(device):
    """Out of place, in place and out=, of one tensor and two, are one operator."""
    q, k = (tensor("bshd", 2, 5, heads, 16, torch.bfloat16, device) for heads in (3, 2))
    cos, sin = angles(9, 8, device)
    weights = weight_of(16, torch.bfloat16, device), weight_of(16, torch.float32, device)
    kw = dict(eps=EPS, offset=2, cast="after", precision="model", zero_centered=True)
    want = [
        fused_rope.norm_rotate(x, cos, sin, w, **kw) for x, w in zip((q, k), weights, strict=True)
    ]
    slots = torch.tensor([[7, -1, 0, 3, 11], [-1, 10, 5, 4, 9]], device=device)
    cache = torch.zeros(12, 2, 16, dtype=k.dtype, device=device)
    out = torch.empty_like(q), torch.empty_like(k)
    assert fused_rope.norm_rotate_qk(q, k, cos, sin, *weights, out=out, **kw) == out
    paged = torch.empty_like(q), cache
    fused_rope.norm_rotate_qk(q, k, cos, sin, *weights, out=paged, out_rows=slots, **kw)
    kept = slots >= 0
    same(cache[slots[kept]], want[1][kept])
    assert (cache[[1, 2, 6, 8]] == 0).all()
    results = [fused_rope.norm_rotate_qk(q, k, cos, sin, *weights, **kw), out, (paged[0], want[1])]
    packed = torch.cat([q, k], 2)
    own = packed[:, :, :3], packed[:, :, 3:]
    versions = packed._version
    assert fused_rope.norm_rotate_qk_(*own, cos, sin, *weights, **kw)[0] is own[0]
    assert packed._version > versions
    for result in (*results, own):
        for got, expected in zip(result, want, strict=True):
            same(got, expected)


@pytest.mark.parametrize("sizes", [(0, 5, 3, 16), (2, 0, 3, 16), (2, 5, 0, 16), (2, 5, 3, 0)])
def test_empty(sizes, device):
    x = torch.randn(sizes, device=device).requires_grad_()
    weight = torch.randn(sizes[-1], device=device).requires_grad_()
    y = fused_rope.norm_rotate(x, *angles(5, sizes[-1] // 2, device), weight, eps=EPS)
    dx, dw = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    assert y.shape == dx.shape == x.shape and dw.shape == weight.shape
    assert (dw == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("D", [6, 64, 128, 160, 514])
@EACH_ORDER
def test_does_not_depend_on_the_batch(dtype, D, after, device):
    """A head's result is bitwise the same alone."""
    x = tensor("bshd", 3, 70, 5, D, dtype, device)
    cos, sin = angles(70, D // 2, device)
    weight = weight_of(D, dtype, device)
    kw = dict(eps=EPS, after=after)
    whole = fused_rope.norm_rotate(x, cos, sin, weight, **kw)
    for b, token, head in [(0, 0, 0), (1, 33, 4), (2, 69, 2)]:
        alone = x[b, token, head][None, None, None]
        got = fused_rope.norm_rotate(alone, cos, sin, weight, offset=token, **kw)
        same(got[0, 0, 0], whole[b, token, head])
    same(fused_rope.norm_rotate(x[1:2, :, 1:3], cos, sin, weight, **kw), whole[1:2, :, 1:3])


def test_special_values(device):
    """A NaN and an infinity stay in their heads, forward and backward."""
    x = torch.ones(1, 5, 2, 8, device=device)
    x[0, 0], x[0, 1, 0, 3], x[0, 2, 0, 3] = 0, float("inf"), float("nan")
    x.requires_grad_()
    y = fused_rope.norm_rotate(x, *angles(5, 4, device), eps=EPS)
    [dx] = torch.autograd.grad(y, x, torch.ones_like(y))
    got, gradient = y[0, :, 0], dx[0, :, 0]
    assert (got[0] == 0).all() and got[1].isnan().any() and got[2].isnan().all()
    assert gradient[1].isnan().any() and gradient[2].isnan().all()
    for values in (y[0, :, 1], dx[0, :, 1], got[3:], gradient[3:], gradient[0]):
        assert values.isfinite().all()


def test_module(device):
    for layout in LAYOUTS:
        q, k = (tensor(layout, 1, 6, heads, 16, torch.bfloat16, device) for heads in (3, 2))
        weights = weight_of(16, torch.bfloat16, device), weight_of(16, torch.bfloat16, device)
        rope = fused_rope.RotaryEmbedding(16, layout=layout, precision="model", device=device)
        kw = dict(eps=EPS, cast="before", after=True)
        got = rope(q, k, offset=2, q_weight=weights[0], k_weight=weights[1], **kw)
        kw |= dict(layout=layout, precision="model", offset=2)
        want = fused_rope.norm_rotate_qk(q, k, rope.cos, rope.sin, *weights, **kw)
        for x, y in zip(got, want, strict=True):
            same(x, y)
        del kw["layout"], kw["precision"]
        same(rope(q, q_weight=weights[0], **kw), want[0])


@pytest.mark.parametrize(
    "option",
    [
        dict(q_weight=torch.ones(16)),
        dict(k_weight=torch.ones(16)),
        dict(zero_centered=True),
        dict(cast="before"),
        dict(after=True),
    ],
    ids=lambda option: next(iter(option)),
)
def test_module_refuses_what_has_no_effect(option):
    rope = fused_rope.RotaryEmbedding(16)
    q = torch.randn(1, 6, 3, 16)
    [name] = option
    with pytest.raises(ValueError, match=f"RotaryEmbedding: expected eps with {name}, got"):
        rope(q, q, **option)
    if name == "k_weight":
        with pytest.raises(ValueError, match="RotaryEmbedding: expected k with k_weight, got"):
            rope(q, eps=EPS, **option)


# --- errors ------------------------------------------------------------------------------------

NAMES = ["norm_rotate", "norm_rotate_", "norm_rotate_out"]
NAMES += ["norm_rotate_qk", "norm_rotate_qk_", "norm_rotate_qk_out"]


def arguments(name, device):
    """A valid call: tensors, weights, keywords."""
    count = 2 if "_qk" in name else 1
    xs = [tensor("bshd", 2, 5, heads, 16, torch.bfloat16, device) for heads in (3, 2)[:count]]
    weights = [weight_of(16, torch.bfloat16, device) for _ in xs]
    kw = dict(eps=EPS)
    if name.endswith("_out"):
        outs = tuple(torch.zeros_like(x) for x in xs)
        kw["out"] = outs if count == 2 else outs[0]
    return xs, list(angles(5, 8, device)), weights, kw


def call(name, xs, tables, weights, kw):
    return getattr(fused_rope, name.removesuffix("_out"))(*xs, *tables, *weights, **kw)


MISTAKES = {
    "weight of another length": (ValueError, "weight", {"weight": lambda w: w[:15]}),
    "weight of two dimensions": (ValueError, "weight", {"weight": lambda w: w[None]}),
    "weight of float64": (TypeError, "weight", {"weight": lambda w: w.double()}),
    "weight of int64": (TypeError, "weight", {"weight": lambda w: w.long()}),
    "weight elsewhere": (ValueError, "weight", {"weight": lambda w: w.to("meta")}),
    "float32 weight before": (
        TypeError,
        'weight .*cast="before"',
        {"weight": lambda w: w.float(), "cast": "before"},
    ),
    "cast": (ValueError, "cast", {"cast": "sometimes"}),
    "model precision": (ValueError, "cast", {"precision": "model"}),
    "negative eps": (ValueError, "eps", {"eps": -1e-6}),
    "eps not a number": (ValueError, "eps", {"eps": float("nan")}),
    "infinite eps": (ValueError, "eps", {"eps": float("inf")}),
    "short table": (ValueError, r"cos has 5 rows, but offset \(1\) \+ S \(5\) = 6", {"offset": 1}),
    "type of eps": (TypeError, "eps", {"eps": "small"}),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind,word,changes", MISTAKES.values(), ids=MISTAKES)
def test_errors(name, kind, word, changes, device):
    xs, tables, weights, kw = arguments(name, device)
    changes = dict(changes)
    change = changes.pop("weight", None)
    if change is not None:
        weights[-1] = change(weights[-1])
    written = [*xs, *(kw["out"] if isinstance(kw.get("out"), tuple) else [])]
    before = [x.clone() for x in written]
    expected = rf"^{name}: (expected (a finite )?(k_)?{word}|{word} are needed$)"
    with pytest.raises(kind, match=expected):
        call(name, xs, tables, weights, kw | changes)
    for x, copy in zip(written, before, strict=True):
        same(x, copy)


@pytest.mark.parametrize(
    "x,weight,expected",
    [
        (torch.float32, torch.bfloat16, "float32, got bfloat16"),
        (torch.bfloat16, torch.float16, "bfloat16 or float32, got float16"),
        (torch.float64, torch.bfloat16, "float64 or float32, got bfloat16"),
    ],
)
def test_dtypes_of_weights_that_are_named(x, weight, expected, device):
    xs = [torch.randn(2, 5, heads, 16, device=device).to(x) for heads in (3, 2)]
    weights = weight_of(16, x, device), weight_of(16, weight, device)
    with pytest.raises(TypeError, match=f"expected k_weight of k's dtype {expected}$"):
        fused_rope.norm_rotate_qk(*xs, *angles(5, 8, device), *weights, eps=EPS)


@pytest.mark.parametrize("name", NAMES)
def test_eps_has_no_default(name, device):
    xs, tables, weights, kw = arguments(name, device)
    del kw["eps"]
    with pytest.raises(TypeError, match="eps"):
        call(name, xs, tables, weights, kw)


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith(("_", "_out"))])
@pytest.mark.parametrize("which", ["input", "table", "weight"])
def test_gradients_that_are_refused(name, which, device):
    xs, tables, weights, kw = arguments(name, device)
    copy = xs[-1].clone()
    {"input": xs, "table": tables, "weight": weights}[which][-1].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name}: .* does not support autograd"):
        call(name, xs, tables, weights, kw)
    same(xs[-1].detach(), copy)
    with torch.no_grad():
        call(name, xs, tables, weights, kw)


def test_overlap_is_refused(device):
    x, weight = torch.randn(2, 5, 3, 16, device=device), torch.randn(16, device=device)
    cos, sin = angles(5, 8, device)
    with pytest.raises(RuntimeError, match="share memory"):
        fused_rope.norm_rotate_(x, cos, sin, x[0, 0, 0], eps=EPS)
    with pytest.raises(RuntimeError, match="share memory"):
        fused_rope.norm_rotate(x, cos, sin, weight, eps=EPS, out=weight.expand(2, 5, 3, 16))
    with pytest.raises(RuntimeError, match="share memory"):
        fused_rope.norm_rotate_qk_(x, x, cos, sin, eps=EPS)
    with pytest.raises(TypeError, match="pair"):
        fused_rope.norm_rotate_qk(x, x, cos, sin, eps=EPS, out=torch.empty_like(x))
    with pytest.raises(ValueError, match="out_rows"):
        fused_rope.norm_rotate(x, cos, sin, eps=EPS, out_rows=torch.zeros(2, 5, device=device))


@pytest.mark.parametrize("name", ["norm_rotate", "norm_rotate_qk"])
def test_rows_outside_the_table(name):
    xs, tables, weights, kw = arguments(name, "cpu")
    with pytest.raises(IndexError, match=f"{name}: expected positions"):
        call(name, xs, tables, weights, kw | dict(positions=torch.tensor([0, 1, 2, 3, 5])))
