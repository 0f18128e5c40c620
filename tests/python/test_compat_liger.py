"""Liger's entry points: text, vision, Qwen2-VL's M-RoPE and Llama 4, without their side effects."""

import pytest
import torch
from formula import close, compiles, gradients, rotate_reference
from fused_rope.compat.liger import (
    LigerLlama4RopeFunction,
    LigerQwen2VLMRopeFunction,
    LigerRopeFunction,
    liger_llama4_text_rotary_pos_emb,
    liger_llama4_vision_rotary_pos_emb,
    liger_multimodal_rotary_pos_emb,
    liger_qwen2vl_mrope,
    liger_rope,
    liger_rotary_pos_emb,
    liger_rotary_pos_emb_vision,
    rope_backward,
    rope_forward,
)
from oracle import DTYPES, angles, same

B, S, HQ, HK, D = 2, 7, 4, 2, 32


def inputs(device, dtype=torch.float32):
    """q and k [B, H, S, D], transposed views of projections."""
    return tuple(torch.randn(B, S, H, D, device=device).to(dtype).transpose(1, 2) for H in (HQ, HK))


def tables(*shape, device="cpu", dtype=torch.float32):
    """Half-width cos and sin of random angles."""
    angle = torch.rand(*shape, dtype=torch.float64, device=device) * 6.28
    return angle.cos().to(dtype), angle.sin().to(dtype)


def full(table):
    return torch.cat([table, table], -1)


def unit(*shape, device="cpu"):
    return torch.polar(torch.ones(shape), torch.rand(shape) * 6.28).to(device)


# --- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, B])
def test_text(batch, dtype, device):
    """Rows of each sequence are its own; inputs stay (the original writes into them)."""
    q, k = inputs(device, dtype)
    before = q.clone(), k.clone()
    cos, sin = tables(batch, S, D // 2, device=device)
    for t in (torch.float32, dtype):
        c, s = cos.to(t), sin.to(t)
        got = liger_rotary_pos_emb(q, k, full(c), full(s), None, 1)
        for y, x in zip(got, (q, k), strict=True):
            assert y.dtype == dtype
            close(y, rotate_reference(x, c[:, None], s[:, None]))
    same(q, before[0])
    same(k, before[1])


def test_unsqueeze_dim_has_its_effect(device):
    """A [B, S, H, D] caller gets his rotation; the original takes its heads for tokens."""
    q, k = inputs(device)
    cos, sin = tables(B, S, D // 2, device=device)
    want = liger_rotary_pos_emb(q, k, full(cos), full(sin))
    arguments = q.transpose(1, 2), k.transpose(1, 2), full(cos), full(sin)
    for dim in (2, -2):
        for y, z in zip(liger_rotary_pos_emb(*arguments, unsqueeze_dim=dim), want, strict=True):
            same(y.transpose(1, 2), z)
    with pytest.raises(ValueError, match="unsqueeze_dim"):
        liger_rotary_pos_emb(*arguments, unsqueeze_dim=0)


def test_position_ids_have_no_effect(device):
    q, k = inputs(device)
    cos, sin = tables(B, S, D // 2, device=device)
    positions = torch.zeros(B, S, dtype=torch.int64, device=device)
    got = liger_rotary_pos_emb(q, k, full(cos), full(sin), positions)
    same(got[0], liger_rotary_pos_emb(q, k, full(cos), full(sin))[0])


def test_partial_rotation(device):
    """R < D rotates the first R elements (Phi-4-mini); the original reads past the row."""
    q, k = inputs(device)
    cos, sin = tables(1, S, 12, device=device)
    for y, x in zip(liger_rotary_pos_emb(q, k, full(cos), full(sin)), (q, k), strict=True):
        close(y, rotate_reference(x, cos[:, None], sin[:, None]))
        same(y[..., 24:], x[..., 24:])


@pytest.mark.parametrize("rows", [1, B])
def test_odd_head_dim(rows, device):
    """Hugging Face's tables then have D + 1 columns; the original leaves the last element."""
    q, k = (torch.randn(B, H, S, 9, device=device, requires_grad=True) for H in (HQ, HK))
    cos, sin = tables(rows, S, 5, device=device)
    results = [
        liger_rotary_pos_emb(q, k, full(cos), full(sin)),
        LigerRopeFunction.apply(q, k, full(cos), full(sin)),
        rope_forward(q, k, full(cos), full(sin))[:2],
    ]
    c, s = (t[:, None, :, :4] for t in (cos, sin))
    for got in results:
        for y, x in zip(got, (q, k), strict=True):
            close(y[..., :8].detach(), rotate_reference(x[..., :8].detach(), c, s))
            same(y[..., 8], x[..., 8])
    given = [torch.randn_like(y) for y in results[0]]
    want = torch.autograd.grad(results[0], (q, k), given)
    for x, y in zip(rope_backward(*given, full(cos), full(sin)), want, strict=True):
        same(x, y)


def test_half_width_tables_are_never_guessed(device):
    """D/2 columns are half width (gpt-oss) or half of the elements: the caller says which."""
    q, k = inputs(device)
    cos, sin = tables(1, S, D // 2, device=device)
    with pytest.raises(ValueError, match="rotary_dim"):
        liger_rotary_pos_emb(q, k, cos, sin)
    got = liger_rotary_pos_emb(q, k, cos, sin, rotary_dim=D)
    close(got[0], rotate_reference(q, cos[:, None], sin[:, None]))
    quarter = cos[..., : D // 4], sin[..., : D // 4]
    got = liger_rotary_pos_emb(q, k, *map(full, quarter), rotary_dim=D // 2)
    close(got[1], rotate_reference(k, *(t[:, None] for t in quarter)))
    with pytest.raises(ValueError, match="R=24"):
        liger_rotary_pos_emb(q, k, cos, sin, rotary_dim=24)


def test_text_gradients(device):
    """Backward leaves the gradients that it is given (the original overwrites them)."""
    cos, sin = tables(B, S, D // 2, device=device)
    given, got = gradients(
        lambda q, k: liger_rotary_pos_emb(q, k, full(cos), full(sin)), *inputs(device)
    )
    for g, x_grad in zip(given, got, strict=True):
        close(x_grad, rotate_reference(g, cos[:, None], -sin[:, None]))


def test_text_compiles():
    compiles(liger_rotary_pos_emb, *inputs("cpu"), *map(full, tables(B, S, D // 2)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_vision(dtype, device):
    q, k = (torch.randn(S, H, D, device=device).to(dtype) for H in (HQ, HQ))
    cos, sin = tables(S, D // 2, device=device)
    for y, x in zip(liger_rotary_pos_emb_vision(q, k, full(cos), full(sin)), (q, k), strict=True):
        assert y.dtype == dtype
        close(y, rotate_reference(x, cos[:, None], sin[:, None]))


# --- M-RoPE -------------------------------------------------------------------------------------


def of_sections(table, sections):
    """[A, B, S, P] -> [B, S, P]: each section of the pairs from its own axis."""
    return torch.cat([part[axis] for axis, part in enumerate(table.split(sections, -1))], -1)


@pytest.mark.parametrize("sections", [[8, 4, 4], [16, 0, 0], [4, 6, 6]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_multimodal(sections, dtype, device):
    q, k = inputs(device, dtype)
    cos, sin = tables(3, B, S, D // 2, device=device)
    c, s = (of_sections(t, sections)[:, None] for t in (cos, sin))
    got = liger_multimodal_rotary_pos_emb(q, k, full(cos), full(sin), sections)
    for y, x in zip(got, (q, k), strict=True):
        close(y, rotate_reference(x, c, s))
    flipped = liger_multimodal_rotary_pos_emb(
        q.transpose(1, 2), k.transpose(1, 2), full(cos), full(sin), sections, 2
    )
    same(flipped[1].transpose(1, 2), got[1])
    # Tables whose axes do not follow one another in memory.
    strided = [full(t).movedim(0, 2).contiguous().movedim(2, 0) for t in (cos, sin)]
    same(liger_multimodal_rotary_pos_emb(q, k, *strided, sections)[0], got[0])


def test_multimodal_gradients_and_compile(device):
    sections = [8, 4, 4]
    cos, sin = tables(3, B, S, D // 2, device=device)
    c, s = (of_sections(t, sections)[:, None] for t in (cos, sin))

    def rotated(q, k):
        return liger_multimodal_rotary_pos_emb(q, k, full(cos), full(sin), sections)

    given, got = gradients(rotated, *inputs(device))
    for g, x_grad in zip(given, got, strict=True):
        close(x_grad, rotate_reference(g, c, -s))
    if device == "cpu":
        compiles(rotated, *inputs(device))


def test_multimodal_errors():
    q, k = inputs("cpu")
    cos, sin = map(full, tables(3, B, S, D // 2))
    with pytest.raises(ValueError, match="A=2"):
        liger_multimodal_rotary_pos_emb(q, k, cos, sin, [8, 8])
    with pytest.raises(ValueError):
        liger_multimodal_rotary_pos_emb(q, k, cos, sin, [8, 4, 5])


# --- Llama 4 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_llama4_text(dtype, device):
    """Each sequence has rows of its own (the original reads the first sequence's for all)."""
    xq, xk = (x.transpose(1, 2) for x in inputs(device, dtype))
    for shape in [(B, S, D // 2), (1, S, D // 2), (S, D // 2), (S + 3, D // 2)]:
        freqs = unit(*shape, device=device)
        rows = freqs[..., :S, None, :]
        for y, x in zip(liger_llama4_text_rotary_pos_emb(xq, xk, freqs), (xq, xk), strict=True):
            assert y.dtype == dtype
            close(y, rotate_reference(x, rows.real, rows.imag, interleaved=True))


@pytest.mark.parametrize("shape", [(S, D // 2), (S, 1, D // 2), (1, S, 1, D // 2)])
def test_llama4_vision(shape, device):
    query, key = (x.transpose(1, 2) for x in inputs(device))
    freqs = unit(*shape, device=device)
    rows = freqs.view(S, 1, D // 2)
    got = liger_llama4_vision_rotary_pos_emb(query, key, freqs)
    for y, x in zip(got, (query, key), strict=True):
        close(y, rotate_reference(x, rows.real, rows.imag, interleaved=True))


def test_llama4_gradients_and_compile(device):
    freqs = unit(B, S, D // 2, device=device)
    xs = [x.transpose(1, 2) for x in inputs(device)]
    given, got = gradients(lambda q, k: liger_llama4_text_rotary_pos_emb(q, k, freqs), *xs)
    for g, x_grad in zip(given, got, strict=True):
        rows = freqs[:, :, None]
        close(x_grad, rotate_reference(g, rows.real, -rows.imag, interleaved=True))
    if device == "cpu":
        compiles(liger_llama4_text_rotary_pos_emb, *xs, freqs)


def test_llama4_errors():
    xq, xk = (x.transpose(1, 2) for x in inputs("cpu"))
    for function in (liger_llama4_text_rotary_pos_emb, liger_llama4_vision_rotary_pos_emb):
        with pytest.raises(TypeError, match="complex"):
            function(xq, xk, torch.randn(S, D // 2))
    with pytest.raises(ValueError, match="freqs_ci"):
        liger_llama4_vision_rotary_pos_emb(xq, xk, unit(B, S, D // 2))


# --- the names below the functions --------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_names_of_the_autograd_functions(dtype, device):
    """With the arguments of the original's `.apply`, all positional; gradients flow."""
    assert liger_rope is liger_rotary_pos_emb
    assert liger_qwen2vl_mrope is liger_multimodal_rotary_pos_emb
    q, k = inputs(device, dtype)
    flat = [x.transpose(1, 2) for x in (q, k)]
    cos, sin = map(full, tables(B, S, D // 2, device=device))
    axes = [full(t) for t in tables(3, B, S, D // 2, device=device)]
    freqs = unit(S, D // 2, device=device)
    calls = [
        (LigerRopeFunction, liger_rotary_pos_emb, (q, k, cos, sin), (None, 1)),
        (
            LigerQwen2VLMRopeFunction,
            liger_multimodal_rotary_pos_emb,
            (q, k, *axes, [8, 4, 4]),
            (1,),
        ),
        (LigerLlama4RopeFunction, liger_llama4_text_rotary_pos_emb, (*flat, freqs), (None,)),
    ]
    for named, function, arguments, more in calls:
        want = function(*arguments)
        for extra in ((), more):
            for y, z in zip(named.apply(*arguments, *extra), want, strict=True):
                same(y, z)
        x, *rest = arguments
        assert named.apply(x.clone().requires_grad_(), *rest)[0].requires_grad


@pytest.mark.parametrize("rows", [S, S + 3])
def test_llama4_function_takes_real_and_imaginary_parts(rows, device):
    """[S or more, D/2, 2], as torch.view_as_real gives them; what a cast left is still refused."""
    xs = [x.transpose(1, 2) for x in inputs(device)]
    freqs = unit(rows, D // 2, device=device)
    want = LigerLlama4RopeFunction.apply(*xs, freqs)
    for y, z in zip(
        LigerLlama4RopeFunction.apply(*xs, torch.view_as_real(freqs)), want, strict=True
    ):
        same(y, z)
    with pytest.raises(TypeError, match="complex"):
        LigerLlama4RopeFunction.apply(*xs, freqs.real)


def test_forward_and_backward_by_hand(device):
    """`rope_forward` and `rope_backward`, which callers put into Functions of their own."""
    q, k = inputs(device)
    cos, sin = map(full, tables(B, S, D // 2, device=device))
    *rotated, same_cos, same_sin = rope_forward(q, k, cos, sin)
    assert same_cos is cos and same_sin is sin
    for y, z in zip(rotated, liger_rotary_pos_emb(q, k, cos, sin), strict=True):
        same(y, z)
    given, got = gradients(lambda q, k: liger_rotary_pos_emb(q, k, cos, sin), q, k)
    for y, z in zip(rope_backward(*given, cos, sin), got, strict=True):
        same(y, z)


# --- the original -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_original(dtype, device):
    """Within the roundings of its Triton kernels, which run on GPUs alone."""
    pytest.importorskip("triton")
    functional = pytest.importorskip("liger_kernel.transformers.functional", exc_type=ImportError)
    llama4 = pytest.importorskip("liger_kernel.transformers.llama4_rope")
    if device == "cpu":
        pytest.skip("its kernels are Triton's")
    q, k = inputs(device, dtype)
    cos, sin = map(full, tables(B, S, D // 2, device=device))
    axes = [full(t) for t in tables(3, B, S, D // 2, device=device)]
    freqs = unit(S, D // 2, device=device)
    flat = [x.transpose(1, 2) for x in (q, k)]
    pairs = [
        (liger_rotary_pos_emb, functional.liger_rope, (q, k, cos, sin)),
        (
            liger_multimodal_rotary_pos_emb,
            functional.liger_qwen2vl_mrope,
            (q, k, *axes, [8, 4, 4]),
        ),
        (
            liger_llama4_text_rotary_pos_emb,
            llama4.liger_llama4_text_rotary_pos_emb,
            (*flat, freqs),
        ),
    ]
    for ours, theirs, arguments in pairs:
        got = ours(*arguments)
        want = theirs(*(x.clone() if isinstance(x, torch.Tensor) else x for x in arguments))
        for y, z in zip(got, want, strict=True):
            close(y, z.double(), ulps=8)


def test_tables_are_read_where_they_are(device):
    """Half of a joint cos||sin cache, with strides of its own, is bitwise identical."""
    q, k = inputs(device)
    cos, sin = (t[None] for t in angles(S, D // 2, device))
    joint = torch.cat([full(cos), full(sin)], -1)
    got = liger_rotary_pos_emb(q, k, joint[..., :D], joint[..., D:])
    same(got[0], liger_rotary_pos_emb(q, k, full(cos), full(sin))[0])
