"""The function of Meta's Llama code: complex tables, shapes, gradients and errors."""

import pytest
import torch
from formula import close, compiles, gradients, rotate_reference, series
from fused_rope.compat.llama import apply_rotary_emb
from oracle import DTYPES, bits, same

B, S, HQ, HK, D, M = 2, 7, 4, 2, 32, 11


def table(device="cpu"):
    """[M, P], the angles and the complex numbers."""
    angle = (torch.arange(M, dtype=torch.float64)[:, None] * series(D)).float().to(device)
    return angle, torch.polar(torch.ones_like(angle), angle)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, device):
    angle, freqs_cis = table(device)
    xq, xk = (torch.randn(B, S, H, D, device=device).to(dtype) for H in (HQ, HK))
    for rows in (freqs_cis, freqs_cis[:S]):
        for got, x in zip(apply_rotary_emb(xq, xk, freqs_cis=rows), (xq, xk), strict=True):
            same(got, bits(x, freqs_cis.real, freqs_cis.imag, interleaved=True))
    a = angle[:S, None].double()
    given, got = gradients(lambda q, k: apply_rotary_emb(q, k, freqs_cis), xq, xk)
    wide = torch.float32 if dtype == torch.float64 else None  # the table is float32
    for back, g in zip(got, given, strict=True):
        want = rotate_reference(g, a.cos(), -a.sin(), interleaved=True)
        close(back, want, dtype=wide, ulps=8)


def test_errors():
    _, freqs_cis = table()
    xq = torch.randn(B, S, HQ, D)
    with pytest.raises(TypeError, match="complex freqs_cis"):
        apply_rotary_emb(xq, xq, freqs_cis.real)
    with pytest.raises(ValueError, match="rows"):
        apply_rotary_emb(xq, xq, freqs_cis[: S - 1])


def test_compiles():
    _, freqs_cis = table()
    compiles(apply_rotary_emb, torch.randn(B, S, HQ, D), torch.randn(B, S, HK, D), freqs_cis)
