"""TransformerEngine's functions: unfused bits, layouts, each of its kernels' traps, packed qkv."""

import pytest
import torch
from formula import close, compiles, gradients, rotate_reference, series
from fused_rope.compat.transformer_engine import (
    apply_fused_qkv_rotary_pos_emb,
    apply_rotary_pos_emb,
)
from oracle import DTYPES, bits, identical, same

B, S, H, D, R, M = 2, 8, 4, 48, 32, 40
LENGTHS = [6, 0, 10, 2]  # of packed sequences


def angles(interleaved=False, rows=M, device="cpu"):
    """[M, 1, 1, R] as TransformerEngine and Megatron make them, and [M, P]."""
    angle = (torch.arange(rows, dtype=torch.float64)[:, None] * series(R)).float().to(device)
    twice = torch.stack([angle, angle], -1).flatten(-2) if interleaved else angle.repeat(1, 2)
    return twice[:, None, None], angle


def tensor(layout, device, dtype=torch.float32):
    shape = {"sbhd": (S, B, H, D), "bshd": (B, S, H, D), "thd": (sum(LENGTHS), H, D)}[layout]
    return torch.randn(shape, device=device).to(dtype)


def written_out(t, angle, row, layout, interleaved, sign=1):
    """`row`: [B or 1, S], or [T]."""
    a = angle[row.to(angle.device)].double()
    a = {"sbhd": lambda: a.transpose(0, 1), "bshd": lambda: a, "thd": lambda: a}[layout]()
    a = a.unsqueeze(-2)
    return rotate_reference(t, a.cos(), sign * a.sin(), interleaved=interleaved)


def mirrored(length, cp_size, cp_rank):
    """The positions of one sequence that a rank holds: chunk cp_rank and its mirror."""
    chunks = torch.arange(length).chunk(2 * cp_size) if length else (torch.arange(0),) * 2 * cp_size
    return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("swapped", [(0, 1), (1, 2)])
def test_results_are_contiguous(swapped, fused, device):
    """As the original's, whatever t's strides: its callers may view them."""
    freqs, _ = angles(device=device)
    for layout in ("sbhd", "bshd"):
        t = tensor(layout, device)
        strided = t.transpose(*swapped).contiguous().transpose(*swapped)
        got = apply_rotary_pos_emb(strided, freqs, tensor_format=layout, fused=fused)
        assert got.is_contiguous()
        same(got, apply_rotary_pos_emb(t, freqs, tensor_format=layout, fused=fused))


# --- [S, B, H, D] and [B, S, H, D] --------------------------------------------------------------


@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(layout, interleaved, dtype, device):
    freqs, angle = angles(interleaved, device=device)
    t = tensor(layout, device, dtype)
    before = t.clone()
    for start in (None, torch.tensor([3, 30], device=device)):
        row = torch.arange(S)[None] + (0 if start is None else start.cpu()[:, None])
        y = apply_rotary_pos_emb(t, freqs, layout, start, interleaved, fused=True)
        # Tables are float32.
        wide = torch.float32 if dtype == torch.float64 else None
        close(y, written_out(t, angle, row, layout, interleaved), dtype=wide, ulps=8)
        identical(y[..., R:], t[..., R:])
        # The unfused path rounds the table, the products and the sum to t's dtype.
        y = apply_rotary_pos_emb(t, freqs, layout, start, interleaved)
        tables = angle.cos(), angle.sin()
        kw = dict(layout=layout, interleaved=interleaved, offset=0 if start is None else start)
        same(y, bits(t, *tables, precision="model", **kw))
    same(t, before)


@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
@pytest.mark.parametrize("itype", [torch.int32, torch.int64])
@pytest.mark.parametrize("fused", [False, True])
def test_start_positions_reach_backward(layout, itype, fused, device):
    """The fused QKV backward of the original drops them; and int64 is not read as int32."""
    freqs, angle = angles(device=device)
    start = torch.tensor([3, 30], dtype=itype, device=device)
    (given,), (got,) = gradients(
        lambda t: apply_rotary_pos_emb(t, freqs, layout, start, fused=fused), tensor(layout, device)
    )
    row = start.cpu()[:, None] + torch.arange(S)[None]
    close(got, written_out(given, angle, row, layout, False, -1), ulps=8)


def test_positions_without_angles_are_errors():
    freqs, _ = angles()
    t = tensor("bshd", "cpu")
    with pytest.raises(IndexError, match=str(M)):
        apply_rotary_pos_emb(t, freqs, "bshd", torch.tensor([0, M - S + 1]))
    with pytest.raises(ValueError, match="rows"):
        apply_rotary_pos_emb(t, freqs[: S - 1], "bshd")
    with pytest.raises(IndexError, match="9"):
        cu = torch.tensor([0, 6, 6, 16, 18])
        apply_rotary_pos_emb(tensor("thd", "cpu"), freqs[:9], "thd", cu_seqlens=cu)


@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
@pytest.mark.parametrize("cp_size", [1, 2])
def test_angles_of_each_sequence(layout, cp_size, device):
    freqs, _ = angles(device=device)
    freqs = torch.cat([freqs, freqs.flip(0)], 1)
    t = tensor(layout, device)
    batch = layout.index("b")
    got = apply_rotary_pos_emb(t, freqs, layout, cp_size=cp_size)
    for b in range(B):
        alone = t.narrow(batch, b, 1), freqs[:, b : b + 1]
        want = apply_rotary_pos_emb(*alone, layout, cp_size=cp_size)
        same(got.narrow(batch, b, 1), want)
    with pytest.raises(ValueError, match="freqs"):
        apply_rotary_pos_emb(t, freqs, layout, torch.zeros(B).int())
    with pytest.raises(ValueError, match="freqs"):
        cu = packed(1, torch.int32, device)
        apply_rotary_pos_emb(tensor("thd", device), freqs, "thd", cu_seqlens=cu)


@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
@pytest.mark.parametrize("cp_size", [2, 5])
def test_context_parallel(layout, cp_size, device):
    freqs, angle = angles(rows=M, device=device)
    for cp_rank in range(cp_size):
        for start in (None, torch.tensor([0, 3 if cp_size == 2 else 0], device=device)):
            row = mirrored(cp_size * S, cp_size, cp_rank)[None]
            row = row if start is None else row + start.cpu()[:, None]
            t, options = tensor(layout, device), dict(cp_size=cp_size, cp_rank=cp_rank)

            def rotated(t, start=start, options=options):
                return apply_rotary_pos_emb(t, freqs, layout, start, **options)

            close(rotated(t), written_out(t, angle, row, layout, False), ulps=8)
            (given,), (got,) = gradients(rotated, t)
            close(got, written_out(given, angle, row, layout, False, -1), ulps=8)


# --- packed sequences ---------------------------------------------------------------------------


def packed(cp_size, itype, device):
    cu = torch.tensor([0, *LENGTHS]).cumsum(0) * cp_size
    return cu.to(device, itype)


@pytest.mark.parametrize("itype", [torch.int32, torch.int64])
@pytest.mark.parametrize("cp_size,cp_rank", [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("padding", [0, 3])
def test_packed(padding, cp_size, cp_rank, itype, device):
    """Padding is copied through in results and in gradients (the original never writes it)."""
    freqs, angle = angles(device=device)
    cu = packed(cp_size, itype, device)
    row = torch.cat([mirrored(n * cp_size, cp_size, cp_rank) for n in LENGTHS])
    T = len(row)
    t = torch.cat([tensor("thd", device), torch.randn(padding, H, D, device=device)])

    def rotated(t):
        return apply_rotary_pos_emb(
            t, freqs, "thd", cu_seqlens=cu, cp_size=cp_size, cp_rank=cp_rank
        )

    y = rotated(t)
    close(y[:T], written_out(t[:T], angle, row, "thd", False), ulps=8)
    identical(y[T:], t[T:])
    (given,), (got,) = gradients(rotated, t)
    close(got[:T], written_out(given[:T], angle, row, "thd", False, -1), ulps=8)
    identical(got[T:], given[T:])


@pytest.mark.parametrize("cp_size,cp_rank", [(1, 0), (2, 1)])
def test_packed_with_start_positions(cp_size, cp_rank, device):
    freqs, angle = angles(device=device)
    start = torch.tensor([1, 2, 20, 4], dtype=torch.int32, device=device)
    row = [
        s + mirrored(n * cp_size, cp_size, cp_rank)
        for s, n in zip(start.tolist(), LENGTHS, strict=True)
    ]
    t = tensor("thd", device)
    options = dict(cu_seqlens=packed(cp_size, torch.int32, device), cp_size=cp_size)
    y = apply_rotary_pos_emb(t, freqs, "thd", start, **options, cp_rank=cp_rank)
    close(y, written_out(t, angle, torch.cat(row), "thd", False), ulps=8)


def test_odd_shares_are_refused():
    """An assertion that release builds of the original leave out."""
    freqs, _ = angles()
    with pytest.raises(ValueError, match="even"):
        apply_rotary_pos_emb(tensor("bshd", "cpu")[:, 1:], freqs, "bshd", cp_size=2)
    with pytest.raises(ValueError, match="cp_size"):
        apply_rotary_pos_emb(tensor("bshd", "cpu"), freqs, "bshd", cp_size=6)
    cu = torch.tensor([0, 6, 8])  # shares of 3 and 1
    for start in (None, torch.tensor([2, 2])):
        with pytest.raises(IndexError):
            apply_rotary_pos_emb(
                torch.randn(4, H, D), freqs, "thd", start, cu_seqlens=cu, cp_size=2
            )


# --- the rest -----------------------------------------------------------------------------------


def test_errors():
    freqs, _ = angles()
    t = tensor("sbhd", "cpu")
    with pytest.raises(ValueError, match="tensor_format"):
        apply_rotary_pos_emb(t, freqs, "bhsd")
    with pytest.raises(ValueError, match="cu_seqlens"):
        apply_rotary_pos_emb(tensor("thd", "cpu"), freqs, "thd")
    with pytest.raises(ValueError, match="freqs"):
        apply_rotary_pos_emb(t, freqs[:, 0])
    with pytest.raises(TypeError):
        apply_rotary_pos_emb(t, freqs, start_positions=torch.zeros(B))
    for cp_size, cp_rank in ((2, 2), (2, -1), (0, 0), (1, 1)):
        with pytest.raises(ValueError, match=f"cp_rank in .*cp_size={cp_size}.*got cp_rank="):
            apply_rotary_pos_emb(t, freqs, cp_size=cp_size, cp_rank=cp_rank)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_compiles(cp_size):
    freqs, _ = angles()
    cu = packed(cp_size, torch.int32, "cpu")
    options = dict(cu_seqlens=cu, cp_size=cp_size, cp_rank=cp_size - 1)
    compiles(apply_rotary_pos_emb, tensor("thd", "cpu"), freqs, "thd", **options)
    compiles(apply_rotary_pos_emb, tensor("sbhd", "cpu"), freqs, cp_size=cp_size)


@pytest.mark.parametrize("fused", [False, True])
def test_original(fused, device):
    original = pytest.importorskip("transformer_engine.pytorch.attention.rope")
    if device == "cpu":
        pytest.skip("it needs a GPU")
    for interleaved in (False, True):
        freqs, _ = angles(interleaved, device=device)
        for layout in ("sbhd", "bshd", "thd"):
            t = tensor(layout, device, torch.bfloat16)
            options = dict(tensor_format=layout, interleaved=interleaved, fused=fused)
            if layout == "thd":
                options["cu_seqlens"] = packed(1, torch.int32, device)
            got = apply_rotary_pos_emb(t, freqs, **options)
            close(got, original.apply_rotary_pos_emb(t, freqs, **options).double(), ulps=1)


# --- packed qkv -----------------------------------------------------------------------------------

G, D_V = 3, 16  # groups of heads, and elements of a value


def packed_qkv(layout, device, dtype=torch.float32, heads=2):
    """A packed tensor and how it is split."""
    split = [heads * D, D, D_V]
    first = (S, B) if layout == "sbhd" else (B, S)
    return torch.randn(*first, G, sum(split), device=device).to(dtype), split


def by_slices(qkv, q_freqs, k_freqs, split, *arguments, **options):
    """What the original computes, by one call for each slice."""
    q, k, v = qkv.split(split, -1)
    q = q.reshape(*q.shape[:2], -1, split[1])
    q, k = (
        apply_rotary_pos_emb(x, freqs, *arguments, fused=True, **options)
        for x, freqs in ((q, q_freqs), (k, k_freqs))
    )
    return q, k, v


@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
@pytest.mark.parametrize("case", ["shared", "two", "start", "interleaved", "cp"])
@pytest.mark.parametrize("heads,dtype", [(1, torch.float32), (2, torch.bfloat16), (5, torch.half)])
def test_packed_qkv(heads, dtype, case, layout, device):
    """Bitwise those of the slices; one call when q and k share their angles, else two."""
    freqs, _ = angles(case == "interleaved", device=device)
    k_freqs = freqs.flip(0) if case == "two" else freqs
    qkv, split = packed_qkv(layout, device, dtype, heads)
    start = torch.tensor([3, 30], device=device) if case == "start" else None
    options = dict(interleaved=case == "interleaved")
    options |= dict(cp_size=2, cp_rank=1) if case == "cp" else {}
    arguments = freqs, k_freqs, split, layout, start

    def fused(x):
        return apply_fused_qkv_rotary_pos_emb(x, *arguments, **options)

    got, want = fused(qkv), by_slices(qkv, *arguments, **options)
    for x, y in zip(got, want, strict=True):
        assert x.is_contiguous() and x.data_ptr() != qkv.data_ptr()
        same(x, y)
    given, (gradient,) = gradients(fused, qkv)
    leaf = qkv.clone().requires_grad_()
    (want,) = torch.autograd.grad(by_slices(leaf, *arguments, **options), leaf, given)
    same(gradient, want)
    assert gradient.is_contiguous()


@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
def test_packed_qkv_of_any_strides(layout, device):
    """Gradients too may have any strides, or be missing."""
    freqs, _ = angles(device=device)
    qkv, split = packed_qkv(layout, device)
    strided = qkv.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    qkv.requires_grad_()
    q, k, v = apply_fused_qkv_rotary_pos_emb(strided, freqs, freqs, split, layout)
    q2, k2, v2 = by_slices(qkv, freqs, freqs, split, layout)
    same(q, q2)
    given = torch.randn(q.shape[::-1], device=device).permute(3, 2, 1, 0)
    for results, grads in ([(q, q2), given], [(k, k2), None], [(v, v2), None]):
        grads = torch.ones((), device=device).expand_as(results[0]) if grads is None else grads
        (got,) = torch.autograd.grad(results[0], strided, grads, retain_graph=True)
        (want,) = torch.autograd.grad(results[1], qkv, grads, retain_graph=True)
        same(got, want)


@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_empty_packed_qkv(empty, layout, device):
    freqs, _ = angles(device=device)
    qkv, split = packed_qkv(layout, device)
    qkv = qkv.narrow(empty, 0, 0).requires_grad_()
    results = apply_fused_qkv_rotary_pos_emb(qkv, freqs, freqs, split, layout)
    assert [x.shape[-1] for x in results] == split[1:2] * 2 + split[2:]
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in results), qkv)
    assert gradient.shape == qkv.shape


@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
def test_results_of_packed_qkv_may_be_modified(layout, device):
    freqs, _ = angles(device=device)
    qkv, split = packed_qkv(layout, device)
    leaf = qkv.clone().requires_grad_()
    results = apply_fused_qkv_rotary_pos_emb(leaf, freqs, freqs, split, layout)
    got = torch.autograd.grad(sum(x.mul_(2).sum() for x in results), leaf)
    want = torch.autograd.grad(
        sum((2 * x).sum() for x in by_slices(leaf, freqs, freqs, split, layout)), leaf
    )
    same(got[0], want[0])


@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
def test_gradient_of_packed_qkv_is_written_once(layout, device):
    """Backward allocates the packed gradient and nothing of the size of q or k."""
    freqs, _ = angles(device=device)
    qkv, split = packed_qkv(layout, device)
    results = apply_fused_qkv_rotary_pos_emb(qkv.requires_grad_(), freqs, freqs, split, layout)
    grads = [torch.randn_like(x) for x in results]
    with torch.profiler.profile() as profile:
        torch.autograd.grad(results, qkv, grads)
    names = {event.key for event in profile.key_averages()}
    assert any("rotate_qk_out" in name for name in names)
    assert not names & {"aten::cat", "aten::zeros", "aten::add", "aten::add_", "aten::clone"}


def test_packed_qkv_transforms(fresh_dynamo):
    freqs, _ = angles()
    qkv, split = packed_qkv("sbhd", "cpu", torch.float64)
    qkv = qkv[:3, :1].clone().requires_grad_()

    def fused(x):
        return apply_fused_qkv_rotary_pos_emb(x, freqs, freqs, split)

    def loss(x, function=fused):
        return sum(y.square().sum() for y in function(x))

    assert torch.autograd.gradcheck(fused, qkv, fast_mode=True)
    assert torch.autograd.gradgradcheck(fused, qkv, fast_mode=True)
    x = qkv.detach()
    same(torch.func.grad(loss)(x), torch.autograd.grad(loss(qkv), qkv)[0])
    for got, want in zip(torch.func.vmap(fused)(torch.stack([x, -x])), fused(x), strict=True):
        same(got, torch.stack([want, -want]))
    with torch.autograd.forward_ad.dual_level():
        dual = fused(torch.autograd.forward_ad.make_dual(x, x))
        for y in dual:
            same(*reversed(torch.autograd.forward_ad.unpack_dual(y)))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    same(compiled(qkv)[0], fused(qkv)[0])
    same(*(torch.autograd.grad(loss(qkv, f), qkv)[0] for f in (compiled, fused)))


def test_packed_qkv_errors():
    freqs, _ = angles()
    qkv, split = packed_qkv("sbhd", "cpu")
    with pytest.raises(ValueError, match="tensor_format"):
        apply_fused_qkv_rotary_pos_emb(qkv, freqs, freqs, split, "thd")
    with pytest.raises(ValueError, match="cp_size"):
        start = torch.zeros(B).int()
        apply_fused_qkv_rotary_pos_emb(qkv, freqs, freqs, split, "sbhd", start, cp_size=2)
    with pytest.raises(ValueError, match="gradients"):
        apply_fused_qkv_rotary_pos_emb(qkv, freqs, freqs.clone().requires_grad_(), split)
    for bad in ([2 * D, D], [2 * D, D, D], [D + 16, D, D], [D + D + D_V, 0, D]):
        with pytest.raises(ValueError, match="split"):
            apply_fused_qkv_rotary_pos_emb(qkv, freqs, freqs, bad)
    with pytest.raises(ValueError, match="freqs"):
        apply_fused_qkv_rotary_pos_emb(qkv, freqs.expand(-1, B, -1, -1), freqs, split)
    with pytest.raises(ValueError, match="rows"):
        apply_fused_qkv_rotary_pos_emb(qkv, freqs[: S - 1], freqs[: S - 1], split)
