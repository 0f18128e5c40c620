"""rotalabs-accel's entry points: its documentation's promises, and none of its kernel's faults."""

import pytest
import torch
from formula import close, compiles, gradients, rotate_reference, series
from fused_rope.compat.rotalabs import (
    RotaryEmbedding,
    apply_rope,
    build_rope_cache,
    rope_torch,
)
from oracle import DTYPES, same

B, S, HQ, HK, D, M = 2, 7, 4, 2, 32, 40
USE_TRITON = [None, False, True]


def inputs(device, dtype=torch.float32):
    return tuple(torch.randn(B, S, H, D, device=device).to(dtype) for H in (HQ, HK))


def written_out(x, position, interleaved=True, base=10000.0):
    """x [B, S, H, D] rotated by positions that broadcast as [B, S]."""
    angle = position.to(x.device, torch.float64)[..., None, None] * series(D, base).to(x.device)
    return rotate_reference(x, angle.cos(), angle.sin(), interleaved=interleaved)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use_triton", USE_TRITON)
def test_functions(use_triton, dtype, device):
    """Every element by the formula (half of the original's Triton results are not), GQA too."""
    q, k = inputs(device, dtype)
    before = q.clone(), k.clone()
    cos, sin = build_rope_cache(M, D, device=device)
    token = torch.arange(S)[None]
    for interleaved in (True, False):
        got = apply_rope(q, k, cos[:S], sin[:S], use_triton, interleaved=interleaved)
        for y, x, other in zip(
            got, (q, k), rope_torch(q, k, cos[:S], sin[:S], interleaved=interleaved), strict=True
        ):
            # The table is float32.
            want = written_out(x, token, interleaved)
            close(y, want, dtype=torch.float32 if dtype == torch.float64 else None, ulps=8)
            if device == "cpu":
                same(y, other)
    same(q, before[0])
    same(k, before[1])


@pytest.mark.parametrize("use_triton", USE_TRITON)
def test_tables_of_each_sequence(use_triton, device):
    """[B, S, P] and [B, S, 1, P] are read by batch, [1, S, 1, P] by all."""
    q, k = inputs(device)
    cos, sin = build_rope_cache(M, D, device=device)
    position = torch.randint(0, M, (B, S), device=device)
    for rows in (position, position[:1]):
        for dims in (3, 4):
            tables = [t[rows] if dims == 3 else t[rows][:, :, None] for t in (cos, sin)]
            for y, x in zip(apply_rope(q, k, *tables, use_triton), (q, k), strict=True):
                close(y, written_out(x, rows), ulps=8)


@pytest.mark.parametrize("use_triton", USE_TRITON)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (B, 1), (B, 1, 1)], ids=str)
def test_one_row_is_every_token_s(shape, use_triton, device):
    q, k = inputs(device)
    angle = torch.rand(*shape, D // 2, device=device)
    wide = angle.view(shape[0] if len(shape) > 1 else 1, 1, -1).expand(-1, S, -1).contiguous()
    want = apply_rope(q, k, wide.cos(), wide.sin(), use_triton)
    for y, z in zip(apply_rope(q, k, angle.cos(), angle.sin(), use_triton), want, strict=True):
        same(y, z)


def test_cache(device):
    cos, sin = build_rope_cache(seq_len=M, head_dim=D, base=500.0, device=device)
    angle = torch.arange(M, dtype=torch.float64)[:, None] * series(D, 500.0)
    close(cos, angle.cos().to(device), ulps=1)
    close(sin, angle.sin().to(device), ulps=1)
    same(build_rope_cache(M, dim=D, base=500.0, device=device)[0], cos)
    # The original counts positions in the table's dtype, and bfloat16 has no 257.
    far = build_rope_cache(300, D, dtype=torch.bfloat16)[1]
    assert far.dtype == torch.bfloat16
    close(far[257], (257 * series(D)).sin(), ulps=1)
    with pytest.raises(ValueError, match="head_dim"):
        build_rope_cache(4)
    with pytest.raises(ValueError, match="head_dim"):
        build_rope_cache(4, D, dim=D)


@pytest.mark.parametrize("use_triton", USE_TRITON)
def test_gradients(use_triton, device):
    """Backward works on every path (the original's Triton path detaches)."""
    q, k = inputs(device)
    cos, sin = build_rope_cache(S, D, device=device)
    given, got = gradients(lambda q, k: apply_rope(q, k, cos, sin, use_triton), q, k)
    for g, x_grad in zip(given, got, strict=True):
        close(x_grad, written_out(g, -torch.arange(S)[None]), ulps=8)


def test_module(device):
    rope = RotaryEmbedding(dim=D, max_seq_len=4).to(device)
    assert not rope.state_dict()
    q, k = inputs(device)
    whole = rope(q, k)
    assert rope.cos_cache.shape == rope.sin_cache.shape == (8, D // 2)
    for y, x in zip(whole, (q, k), strict=True):
        close(y, written_out(x, torch.arange(S)[None]), ulps=8)
    same(rope(q, k, seq_len=S)[0], whole[0])
    same(rope(q[:, 5:6], k[:, 5:6], seq_len=1, offset=5)[1], whole[1][:, 5:6])
    with pytest.raises(ValueError, match="seq_len"):
        rope(q, k, seq_len=S + 1)
    sequential = RotaryEmbedding(D, interleaved=False).to(device)
    close(sequential(q, k)[0], written_out(q, torch.arange(S)[None], interleaved=False), ulps=8)


def test_position_ids(device):
    rope = RotaryEmbedding(D, M, base=40000.0).to(device)
    q, k = inputs(device)
    position = torch.randint(0, M - 3, (B, S), device=device)
    for y, x in zip(rope(q, k, position), (q, k), strict=True):
        close(y, written_out(x, position, base=40000.0), ulps=8)
    lengths = torch.tensor([1, 3], device=device)
    want = written_out(k, position.cpu() + lengths.cpu()[:, None], base=40000.0)
    close(rope(q, k, position_ids=position, offset=lengths)[1], want, ulps=8)
    if device == "cpu":  # on CUDA a device-side assertion, which is final
        with pytest.raises(IndexError, match=str(M)):
            rope(q, k, position_ids=torch.full((B, S), M))


def test_errors():
    q, k = inputs("cpu")
    cos, sin = build_rope_cache(S, D)
    for use_triton in USE_TRITON:
        with pytest.raises(ValueError, match="rows"):
            apply_rope(q, k, cos[:-1], sin[:-1], use_triton)
    with pytest.raises(ValueError, match=r"apply_rope: expected cos"):
        apply_rope(q, k, cos[None, :, None].expand(1, S, HQ, -1), sin)


def test_compiles():
    q, k = inputs("cpu")
    compiles(RotaryEmbedding(D, M), q, k)


@pytest.mark.parametrize("use_positions", [False, True])
def test_original(use_positions):
    """Its PyTorch path; with position ids that differ it broadcasts over the wrong dimension."""
    original = pytest.importorskip("rotalabs_accel.kernels.rope")
    q, k = inputs("cpu")
    theirs, ours = original.RotaryEmbedding(D, M), RotaryEmbedding(D, M)
    if use_positions:
        position = torch.randint(0, M, (B, S))
        tables = [t[position][:, :, None] for t in (theirs.cos_cache, theirs.sin_cache)]
        want, got = original.rope_torch(q, k, *tables), ours(q, k, position)
    else:
        want, got = theirs(q, k), ours(q, k)
    for y, z in zip(got, want, strict=True):
        torch.testing.assert_close(y, z, rtol=0, atol=2e-5)  # its angles are float32
