"""diffusers' function: real and complex tables, both pairings, and joint tensors of two streams."""

import pytest
import torch
from formula import close, compiles, gradients, rotate_reference
from fused_rope.compat.diffusers import apply_rotary_emb
from oracle import DTYPES, same

B, S, H, D = 2, 7, 4, 32


def tables(rows=S, unbind_dim=-1, device="cpu"):
    """(cos, sin) [S, D] as get_1d_rotary_pos_embed makes them, and their halves."""
    angle = torch.rand(rows, D // 2, device=device) * 6.28
    cos, sin = angle.cos(), angle.sin()
    if unbind_dim == -1:
        return tuple(t.repeat_interleave(2, -1) for t in (cos, sin)), (cos, sin)
    return tuple(torch.cat([t, t], -1) for t in (cos, sin)), (cos, sin)


def inputs(sequence_dim, device, dtype=torch.float32):
    shape = (B, H, S, D) if sequence_dim == 2 else (B, S, H, D)
    return torch.randn(shape, device=device).to(dtype)


def rows(table, sequence_dim):
    return table if sequence_dim == 2 else table[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unbind_dim", [-1, -2])
@pytest.mark.parametrize("sequence_dim", [1, 2])
def test_real(sequence_dim, unbind_dim, dtype, device):
    freqs, half = tables(S, unbind_dim, device)
    x = inputs(sequence_dim, device, dtype)
    before = x.clone()
    c, s = (rows(t, sequence_dim) for t in half)
    want = rotate_reference(x, c, s, interleaved=unbind_dim == -1)
    options = dict(use_real_unbind_dim=unbind_dim, sequence_dim=sequence_dim)
    y = apply_rotary_emb(x, freqs, **options)
    assert y.dtype == dtype
    close(y, want)
    out = torch.empty_like(x)
    assert apply_rotary_emb(x, freqs, **options, out=out) is out
    same(out, y)
    same(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, B])
def test_complex(batch, dtype, device):
    angle = torch.rand(batch, S, D // 2, device=device) * 6.28
    freqs = torch.polar(torch.ones_like(angle), angle)
    x = inputs(1, device, dtype)
    y = apply_rotary_emb(x, freqs, use_real=False)
    assert y.dtype == dtype
    close(y, rotate_reference(x, freqs.real[:, :, None], freqs.imag[:, :, None], interleaved=True))
    with pytest.raises(TypeError, match="complex"):
        apply_rotary_emb(x, angle, use_real=False)
    with pytest.raises(TypeError, match="complex"):
        apply_rotary_emb(x, (angle, angle), use_real=False)


@pytest.mark.parametrize("unbind_dim", [-1, -2])
@pytest.mark.parametrize("sequence_dim", [1, 2])
def test_gradients(sequence_dim, unbind_dim, device):
    freqs, half = tables(S, unbind_dim, device)
    (given,), (got,) = gradients(
        lambda x: apply_rotary_emb(x, freqs, True, unbind_dim, sequence_dim),
        inputs(sequence_dim, device),
    )
    c, s = (rows(t, sequence_dim) for t in half)
    close(got, rotate_reference(given, c, -s, interleaved=unbind_dim == -1))


@pytest.mark.parametrize("sequence_dim", [1, 2])
def test_two_streams_into_one_tensor(sequence_dim, device):
    """Text and image, with tables of their own, each into its part of the joint sequence."""
    freqs, _ = tables(S + 5, device=device)
    text = inputs(sequence_dim, device)
    image = torch.randn(B, H, 5, D, device=device)
    image = image if sequence_dim == 2 else image.transpose(1, 2)
    joint = torch.full_like(torch.cat([text, image], sequence_dim), float("nan"))
    text_out, image_out = joint.split([S, 5], sequence_dim)
    parts = [tuple(t[:S] for t in freqs), tuple(t[S:] for t in freqs)]
    options = dict(sequence_dim=sequence_dim)
    for x, part, out in zip((text, image), parts, (text_out, image_out), strict=True):
        apply_rotary_emb(x, part, **options, out=out)
    same(joint, apply_rotary_emb(torch.cat([text, image], sequence_dim), freqs, **options))
    with pytest.raises(RuntimeError, match="out"):
        apply_rotary_emb(text.requires_grad_(), parts[0], **options, out=text_out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, S])
@pytest.mark.parametrize("unbind_dim", [-1, -2])
@pytest.mark.parametrize("sequence_dim", [1, 2])
def test_one_row_is_every_token_s(sequence_dim, unbind_dim, length, dtype, device):
    """[1, D] broadcasts over the tokens, as in Hunyuan-DiT: bitwise as a table that repeats it."""
    freqs, _ = tables(1, unbind_dim, device)
    repeated = tuple(t.repeat(length, 1) for t in freqs)
    x = inputs(sequence_dim, device, dtype).narrow(sequence_dim, 0, length)
    arguments = True, unbind_dim, sequence_dim
    want = apply_rotary_emb(x, repeated, *arguments)
    same(apply_rotary_emb(x, freqs, *arguments), want)
    same(apply_rotary_emb(x, (freqs[0], repeated[1]), *arguments), want)
    out = torch.empty_like(x)
    same(apply_rotary_emb(x, freqs, *arguments, out=out), want)
    given, got = gradients(lambda x: apply_rotary_emb(x, freqs, *arguments), x)
    same(got[0], apply_rotary_emb(given[0], (repeated[0], -repeated[1]), *arguments))
    empty = x.narrow(sequence_dim, 0, 0)
    assert apply_rotary_emb(empty, freqs, *arguments).shape == empty.shape


@pytest.mark.parametrize("shape", [(1,), (1, 1), (B, 1)], ids=["[1, P]", "[1, 1, P]", "[B, 1, P]"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_complex_row_is_every_token_s(shape, dtype, device):
    angle = torch.rand(*shape, D // 2, device=device) * 6.28
    freqs = torch.polar(torch.ones_like(angle), angle)
    repeated = freqs.expand(*shape[:-1], S, -1).contiguous()
    x = inputs(1, device, dtype)
    want = apply_rotary_emb(x, repeated, use_real=False)
    same(apply_rotary_emb(x, freqs, use_real=False), want)
    out = torch.empty_like(x)
    same(apply_rotary_emb(x, freqs, use_real=False, out=out), want)


def test_strided_inputs(device):
    """Heads of a projection, transposed: the usual x of a block."""
    freqs, half = tables(device=device)
    x = torch.randn(B, S, 3 * H * D, device=device)[..., : H * D].unflatten(-1, (H, D))
    x = x.transpose(1, 2)
    close(apply_rotary_emb(x, freqs), rotate_reference(x, *half, interleaved=True))


def test_errors():
    freqs, _ = tables()
    x = inputs(2, "cpu")
    with pytest.raises(ValueError, match="sequence_dim"):
        apply_rotary_emb(x, freqs, sequence_dim=3)
    with pytest.raises(ValueError, match="use_real_unbind_dim"):
        apply_rotary_emb(x, freqs, use_real_unbind_dim=-3)
    with pytest.raises(ValueError, match="rows"):
        apply_rotary_emb(x, tuple(t[:-1] for t in freqs))


def test_compiles():
    compiles(apply_rotary_emb, inputs(2, "cpu"), tables()[0])
    compiles(apply_rotary_emb, inputs(2, "cpu"), tables(1)[0])
    freqs = torch.polar(torch.ones(1, S, D // 2), torch.rand(1, S, D // 2))
    compiles(apply_rotary_emb, inputs(1, "cpu"), freqs, use_real=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_original(dtype, device):
    """Bitwise identical: it too computes in float32 and rounds once."""
    embeddings = pytest.importorskip("diffusers.models.embeddings", exc_type=ImportError)
    for unbind_dim in (-1, -2):
        for sequence_dim in (1, 2):
            freqs, _ = tables(S, unbind_dim, device)
            x = inputs(sequence_dim, device, dtype)
            arguments = x, freqs, True, unbind_dim, sequence_dim
            same(apply_rotary_emb(*arguments), embeddings.apply_rotary_emb(*arguments))
    freqs = torch.polar(torch.ones(B, S, D // 2), torch.rand(B, S, D // 2)).to(device)
    x = inputs(1, device, dtype)
    want = embeddings.apply_rotary_emb(x, freqs, use_real=False)
    close(apply_rotary_emb(x, freqs, use_real=False), want.double(), ulps=2)
