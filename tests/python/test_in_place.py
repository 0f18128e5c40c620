"""In place: only rotated elements are written, versions bumped, autograd's rules enforced."""

import fused_rope
import pytest
import torch
from oracle import (
    DTYPES,
    LAYOUTS,
    OVERLAPPING,
    VIEWS,
    angles,
    any_bits,
    bits,
    identical,
    same,
    tensor,
    view,
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_values(layout, dtype, interleaved, device):
    q, k = (tensor(layout, 1, 5, H, 40, dtype, device) for H in (4, 1))
    cos, sin = angles(5, 12, device)
    kw = dict(layout=layout, interleaved=interleaved, rotary_offset=8)
    want = bits(q, cos, sin, **kw), bits(k, cos, sin, **kw)
    got = fused_rope.rotate_qk_(q, k, cos, sin, **kw)
    assert got[0] is q and got[1] is k
    same(q, want[0])
    same(k, want[1])
    assert fused_rope.rotate_(q, cos, sin, inverse=True, **kw) is q
    same(q, bits(want[0], cos, sin, inverse=True, **kw))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_elements_keep_their_bits(dtype, device):
    base = any_bits((2, 5, 4, 48), dtype, device)
    base[..., 32:] = torch.randn(2, 5, 4, 16).to(dtype).to(device)
    before = base.clone()
    cos, sin = angles(5, 8, device)
    fused_rope.rotate_qk_(base[:, :, :3], base[:, :, 3:], cos, sin, rotary_offset=32)
    identical(base[..., :32], before[..., :32])
    same(base[..., 32:], bits(before[..., 32:], cos, sin))


@pytest.mark.parametrize("name", [n for n in VIEWS if n not in OVERLAPPING])
def test_memory_around_a_view_is_left_alone(name, device):
    x = view(name, torch.bfloat16, device)
    whole = x.as_strided((x.untyped_storage().nbytes() // 2,), (1,), 0)
    before = whole.clone()
    cos, sin = angles(5, 8, device)
    want = bits(x, cos, sin)
    fused_rope.rotate_(x, cos, sin)
    before.as_strided(x.size(), x.stride(), x.storage_offset()).copy_(want)
    identical(whole, before)


def test_k_has_heads_and_strides_of_its_own(device):
    q = tensor("bshd", 2, 5, 8, 32, torch.bfloat16, device)
    memory = tensor("bhsd", 2, 5, 4, 40, torch.bfloat16, device)
    expected, k = memory.clone(), memory[:, 1:-1, :, 4:36].transpose(1, 2)
    cos, sin = angles(5, 16, device)
    expected[:, 1:-1, :, 4:36].transpose(1, 2).copy_(bits(k, cos, sin))
    fused_rope.rotate_qk_(q, k, cos, sin)
    identical(memory, expected)


@pytest.mark.parametrize("D", [48, 80, 96, 160, 192, 256])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_pairs_split_between_threads_do_not_race(D, interleaved, device):
    """The two elements of a pair may belong to different CUDA threads or warps."""
    x = tensor("bshd", 4, 65, 8, D, torch.bfloat16, device)
    cos, sin = angles(65, D // 2, device)
    want = fused_rope.rotate(x, cos, sin, interleaved=interleaved)
    for _ in range(3):
        same(fused_rope.rotate_(x.clone(), cos, sin, interleaved=interleaved), want)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("form", ["rotate_", "rotate_qk_"])
def test_versions(form, grad, device):
    q, k = (torch.randn(2, 5, H, 16, device=device, requires_grad=grad) * 1 for H in (4, 2))
    tensors = (q,) if form == "rotate_" else (q, k)
    before = [t._version for t in tensors]
    getattr(fused_rope, form)(*tensors, *angles(5, 8, device))
    assert all(t._version > v for t, v in zip(tensors, before, strict=True))


def test_a_view_bumps_its_base(device):
    base = torch.randn(2, 5, 8, 16, device=device)
    fused_rope.rotate_(base[:, :, :4], *angles(5, 8, device))
    assert base._version == 1


def test_inference_tensors(device):
    cos, sin = angles(5, 8, device)
    normal = torch.randn(2, 5, 4, 16, device=device)
    with torch.inference_mode():
        x = torch.randn(2, 5, 4, 16, device=device)
        want = bits(x, cos, sin), bits(normal, cos, sin)
        fused_rope.rotate_qk_(x, normal, cos, sin)
    same(x, want[0])
    same(normal, want[1])
    with pytest.raises(RuntimeError, match="inference"):
        fused_rope.rotate_(x, cos, sin)
    with pytest.raises(RuntimeError, match="inference"):
        fused_rope.rotate_qk_(normal, x, cos, sin)
    same(normal, want[1])


# --- autograd ----------------------------------------------------------------------------------


def test_gradient(device):
    cos, sin = angles(5, 8, device)
    leaf = torch.randn(2, 5, 4, 16, device=device, requires_grad=True)
    x = leaf * 1.0
    fused_rope.rotate_(x, cos, sin)
    g = torch.randn_like(x)
    x.backward(g)
    same(leaf.grad, bits(g, cos, sin, inverse=True))


@pytest.mark.parametrize("trained", [False, True], ids=["fixed table", "trained table"])
@pytest.mark.parametrize("form", ["rotate_", "rotate_qk_"])
def test_gradient_of_slices_of_one_packed_tensor(form, trained, device):
    cos, sin = (t.requires_grad_(trained) for t in angles(5, 8, device))
    leaf = torch.randn(2, 5, 8, 16, device=device, requires_grad=True)
    qkv = leaf * 1.0
    if form == "rotate_":
        fused_rope.rotate_(qkv[:, :, :6], cos, sin)
    else:
        fused_rope.rotate_qk_(qkv[:, :, :4], qkv[:, :, 4:6], cos, sin)
    same(qkv[:, :, :6], bits(leaf[:, :, :6], cos, sin))
    same(qkv[:, :, 6:], leaf[:, :, 6:])
    g = torch.randn_like(qkv)
    qkv.backward(g)
    want = torch.cat([bits(g[:, :, :6], cos, sin, inverse=True), g[:, :, 6:]], 2)
    same(leaf.grad, want)
    if trained:
        alone = [t.detach().requires_grad_() for t in (cos, sin)]
        fused_rope.rotate(leaf.detach()[:, :, :6], *alone).backward(g[:, :, :6])
        torch.testing.assert_close((cos.grad, sin.grad), tuple(t.grad for t in alone))


@pytest.mark.parametrize("which", [0, 1], ids=["q", "k"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "one of a split"])
def test_gradient_where_only_one_requires_it(which, split, device):
    """The other may be one of several views, as for PyTorch's own in-place operators."""
    cos, sin = angles(5, 8, device)
    leaf = torch.randn(2, 5, 4, 16, device=device, requires_grad=True)
    other = torch.randn(2, 5, 4, 16, device=device)
    if split:
        other = other.split(2, 2)[0]
    want = bits(other, cos, sin)
    x = leaf * 1.0
    fused_rope.rotate_qk_(*((x, other) if which == 0 else (other, x)), cos, sin)
    assert x.requires_grad and not other.requires_grad
    same(other, want)
    x.sum().backward()
    same(leaf.grad, bits(torch.ones_like(x), cos, sin, inverse=True))


def test_twice_in_a_row(device):
    cos, sin = angles(5, 8, device)
    leaf = torch.randn(2, 5, 4, 16, device=device, requires_grad=True)
    x = leaf * 1.0
    fused_rope.rotate_(x, cos, sin)
    fused_rope.rotate_(x, cos, sin, interleaved=True)
    want = bits(bits(leaf, cos, sin), cos, sin, interleaved=True)
    same(x, want)
    g = torch.randn_like(x)
    x.backward(g)
    back = bits(g, cos, sin, interleaved=True, inverse=True)
    same(leaf.grad, bits(back, cos, sin, inverse=True))


@pytest.mark.parametrize("form", ["rotate_", "rotate_qk_"])
def test_backward_detects_that_a_saved_result_was_rotated(form, device):
    """exp saves its result."""
    leaves = [torch.randn(2, 5, H, 16, device=device, requires_grad=True) for H in (4, 2)]
    saved = [leaf.exp() for leaf in leaves[: 2 if form == "rotate_qk_" else 1]]
    getattr(fused_rope, form)(*saved, *angles(5, 8, device))
    for x in saved:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            x.sum().backward()


def test_an_input_of_rotate_may_be_overwritten_before_backward(device):
    """rotate saves the tables only."""
    leaf = torch.randn(2, 5, 4, 16, device=device, requires_grad=True)
    cos, sin = angles(5, 8, device)
    x = leaf * 1
    y = fused_rope.rotate(x, cos, sin)
    fused_rope.rotate_(x, cos, sin)
    y.sum().backward()
    same(leaf.grad, bits(torch.ones_like(x), cos, sin, inverse=True))


def refused():
    leaf = lambda *sizes: torch.randn(sizes, requires_grad=True)  # noqa: E731
    yield "leaf", lambda: leaf(2, 5, 4, 16)
    yield "view of a leaf", lambda: leaf(2, 5, 4, 16)[:, :, :2]
    yield "one of a split", lambda: (leaf(2, 5, 4, 16) * 1).split(2, 2)[0]
    yield "one of an unbind", lambda: (leaf(2, 2, 5, 4, 16) * 1).unbind(0)[1]
    yield "one of a chunk", lambda: (leaf(2, 5, 4, 16) * 1).chunk(2, 2)[1]
    yield "expanded", lambda: torch.randn(2, 5, 1, 16).expand(2, 5, 4, 16)
    yield "expanded with history", lambda: (leaf(2, 5, 1, 16) * 1).expand(2, 5, 4, 16)


@pytest.mark.parametrize("make", list(refused()), ids=lambda c: c[0])
@pytest.mark.parametrize("form", ["rotate_", "q of rotate_qk_", "k of rotate_qk_"])
def test_rejected_before_anything_is_written(make, form, device):
    cos, sin = angles(5, 8, device)
    with torch.device(device):
        x, other = make[1](), torch.randn(2, 5, 3, 16)
    before, other_before, version = x.detach().clone(), other.clone(), x._version
    with pytest.raises(RuntimeError):
        if form == "rotate_":
            fused_rope.rotate_(x, cos, sin)
        elif form == "q of rotate_qk_":
            fused_rope.rotate_qk_(x, other, cos, sin)
        else:
            fused_rope.rotate_qk_(other, x, cos, sin)
    same(x, before)
    same(other, other_before)
    assert x._version == version and other._version == 0


@pytest.mark.parametrize("form", ["rotate_", "rotate_qk_"])
def test_the_operator_rejects_torch_func_before_anything_is_written(form, device):
    """The Python functions have a route of their own; the operator's Function does not."""
    cos, sin = angles(5, 8, device)
    xs = [torch.randn(2, 5, 4, 16, device=device) for _ in range(1 if form == "rotate_" else 2)]
    seen = []

    def f(*xs):
        copies = [x * 1 for x in xs]
        seen.extend((x, x.clone()) for x in copies)
        getattr(torch.ops.fused_rope, form)(*copies, cos, sin)

    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(f, argnums=tuple(range(len(xs))))(*xs)
    assert len(seen) == len(xs)
    for x, before in seen:
        same(*(torch._C._functorch.get_unwrapped(t) for t in (x, before)))


def test_a_leaf_may_be_rotated_without_gradients(device):
    leaf = torch.randn(2, 5, 4, 16, device=device, requires_grad=True)
    cos, sin = angles(5, 8, device)
    want = bits(leaf, cos, sin)
    with torch.no_grad():
        fused_rope.rotate_(leaf, cos, sin)
    same(leaf, want)
    assert leaf.is_leaf and leaf.requires_grad


@pytest.mark.parametrize("grad", [False, True])
def test_overlapping_q_and_k_are_errors(grad, device):
    base = torch.randn(2, 5, 8, 16, device=device, requires_grad=grad) * 1
    cos, sin = angles(5, 8, device)
    before = base.detach().clone()
    flat = base.flatten()
    shifted = flat[:640].view(2, 5, 4, 16), flat[16:656].view(2, 5, 4, 16)
    for q, k in [(base, base), (base[..., :16], base), shifted]:
        with pytest.raises((RuntimeError, ValueError), match="rotate_qk_"):
            fused_rope.rotate_qk_(q, k, cos, sin)
        same(base, before)


def test_gradient_of_the_table_in_place(device):
    """x is overwritten, so its rotated elements are saved; the others are not."""
    cos, sin = (t.requires_grad_() for t in angles(5, 4, device, torch.float64))
    leaf = torch.randn(2, 5, 4, 16, dtype=torch.float64, device=device, requires_grad=True)

    def in_place(x, c, s):
        return fused_rope.rotate_(x * 1.0, c, s, rotary_offset=3)

    assert torch.autograd.gradcheck(in_place, (leaf, cos, sin))
    kept = []
    x = leaf * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused_rope.rotate_(x, cos, sin, rotary_offset=3)
    assert sum(t.numel() for t in kept) == 2 * cos.numel() + x.numel() // 2


@pytest.mark.parametrize("form", ["rotate_", "rotate_qk_"])
def test_second_order_with_a_trained_table(form, device):
    """The table's gradient depends on x as it was, and can be differentiated by it."""
    q, k = (tensor("bshd", 1, 3, H, 8, torch.float64, device).requires_grad_() for H in (2, 1))
    cos, sin = (t.requires_grad_() for t in angles(3, 3, device, torch.float64))

    def f(q, k, cos, sin):
        tensors = (q * 1.0, k * 1.0) if form == "rotate_qk_" else (q * 1.0,)
        getattr(fused_rope, form)(*tensors, cos, sin, rotary_offset=1)
        return tensors

    assert torch.autograd.gradcheck(f, (q, k, cos, sin))
    assert torch.autograd.gradgradcheck(f, (q, k, cos, sin))


@pytest.mark.parametrize("which", ["cos", "sin"])
def test_memory_of_its_own_table_is_refused(which, device):
    x = torch.randn(1, 3, 2, 8, device=device)
    table = dict(zip(("cos", "sin"), angles(3, 4, device), strict=True))
    table[which] = x.view(-1)[:12].view(3, 4)
    before = x.clone()
    with pytest.raises(RuntimeError, match=f"rotate_.*x and {which} not to share memory"):
        fused_rope.rotate_(x, **table)
    same(x, before)


def test_a_bad_row_with_gradients_changes_neither_tensor(device):
    """One launch for q and k, with gradients too: the message names the operator called."""
    if device == "cuda":
        pytest.skip("a device-side assertion there: test_cuda.py")
    leaf = torch.randn(2, 3, 6, 16, requires_grad=True)
    qkv = leaf * 1.0
    before = qkv.detach().clone()
    positions = torch.tensor([0, 9, 1])
    with pytest.raises(IndexError, match=r"^rotate_qk_: .*got 9"):
        fused_rope.rotate_qk_(qkv[:, :, :4], qkv[:, :, 4:], *angles(5, 8), positions=positions)
    same(qkv.detach(), before)


def negative(x):
    """A view whose negative bit is set, of memory that holds -x: the values are x's."""
    memory = torch.complex(torch.zeros_like(x), -x)
    view = memory.conj().imag
    assert view.is_neg() and view.equal(x)
    return view, memory


NORM = {"eps": 1e-6}
WRITES = {
    "rotate_": lambda q, k, cs: fused_rope.rotate_(q, *cs),
    "rotate_qk_": lambda q, k, cs: fused_rope.rotate_qk_(q, k, *cs),
    "norm_rotate_": lambda q, k, cs: fused_rope.norm_rotate_(q, *cs, **NORM),
    "norm_rotate_qk_": lambda q, k, cs: fused_rope.norm_rotate_qk_(q, k, *cs, **NORM),
    "rotate out": lambda q, k, cs: fused_rope.rotate(k, *cs, out=q),
    "rotate_qk out": lambda q, k, cs: fused_rope.rotate_qk(q.clone(), k.clone(), *cs, out=(q, k)),
    "norm_rotate out": lambda q, k, cs: fused_rope.norm_rotate(k, *cs, **NORM, out=q),
    "norm_rotate_qk out": lambda q, k, cs: fused_rope.norm_rotate_qk(
        q.clone(), k.clone(), *cs, **NORM, out=(q, k)
    ),
    "cache": lambda q, k, cs: fused_rope.rotate_and_cache(
        *(k.clone() for _ in range(3)),
        *cs,
        q.view(10, 2, 16),
        k.view(10, 2, 16),
        torch.arange(10, device=k.device)[None],
    ),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("which", ["one", "both"])
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad mode"])
def test_views_with_the_negative_bit(name, which, grad, device):
    """PyTorch's own fallback reads a result that these operators do not return."""
    q, k = torch.randn(1, 10, 2, 16, device=device), torch.randn(1, 10, 2, 16, device=device)
    cos, sin = angles(10, 8, device)
    want_q, want_k = q.clone(), k.clone()
    with torch.set_grad_enabled(grad):
        WRITES[name](want_q, want_k, (cos, sin))
        written, memory = negative(q)
        other = negative(k)[0] if which == "both" else k
        version = written._version
        WRITES[name](written, other, (cos, sin))
    same(written.clone(), want_q)
    same(other.clone(), want_k)
    same(memory.imag, -want_q)
    assert written._version > version


def test_gradients_of_a_view_with_the_negative_bit():
    x = torch.randn(1, 5, 2, 16, requires_grad=True)
    cos, sin = angles(5, 8)
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    fused_rope.rotate_(view, cos, sin)
    view.sum().backward()
    want = fused_rope.rotate(torch.ones_like(x), cos, sin, inverse=True)
    torch.testing.assert_close(x.grad, want)
