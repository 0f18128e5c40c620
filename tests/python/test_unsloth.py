"""Unsloth's entry points: its callers' shapes, the operator's numbers, inputs left alone."""

import fused_rope
import pytest
import torch
from fused_rope.compat.unsloth import (
    Fast_RoPE_Embedding,
    Fast_RoPE_Embedding_QK,
    fast_qk_norm_rope,
    fast_rope_embedding,
    inplace_rope_embedding,
)
from oracle import angles, bits, same

B, HQ, HK, S, D, M = 2, 4, 2, 7, 32, 11


def inputs(device, dtype=torch.float16):
    """Q and K as attention code has them: a transposed view of the projection."""
    return tuple(torch.randn(B, S, H, D, device=device).to(dtype).transpose(1, 2) for H in (HQ, HK))


def table_forms(cos, sin):
    def full(t):
        return torch.cat([t, t], -1)

    yield cos, sin
    yield full(cos), full(sin)
    yield cos[None, None], sin[None, None]
    yield full(cos)[None, None], full(sin)[None, None]
    yield full(cos)[None], full(sin)[None]


@pytest.mark.parametrize("itype", [torch.int32, torch.int64])
def test_functions(itype, device):
    Q, K = inputs(device)
    before = Q.clone(), K.clone()
    cos, sin = angles(M, D // 2, device)
    indices = torch.randint(0, M, (B, S), dtype=itype, device=device)
    for tables in table_forms(cos, sin):
        for given, positions in [
            (None, None),
            (indices, indices),
            (indices.flatten(), indices),
            (indices[:1].expand(B, S), indices[:1]),
        ]:
            want = [bits(x, cos, sin, layout="bhsd", positions=positions) for x in (Q, K)]
            for function in (fast_rope_embedding, inplace_rope_embedding):
                for got, expected in zip(function(Q, K, *tables, given), want, strict=True):
                    same(got, expected)
            for got, expected in zip(
                Fast_RoPE_Embedding_QK.apply(Q, K, *tables, given), want, strict=True
            ):
                same(got, expected)
        same(Fast_RoPE_Embedding.apply(Q.transpose(1, 2), *tables), want_of(Q, cos, sin))
    same(Q, before[0])
    same(K, before[1])


def want_of(Q, cos, sin):
    return bits(Q, cos, sin, layout="bhsd").transpose(1, 2)


class Norm(torch.nn.Module):
    def __init__(self, eps, device):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(D, device=device))
        self.variance_epsilon = eps


@pytest.mark.parametrize("k_eps", [1e-6, 1e-3])
def test_norms(k_eps, device):
    Q, K = (x.transpose(1, 2) for x in inputs(device))
    cos, sin = angles(M, D // 2, device)
    norms = Norm(1e-6, device), torch.nn.RMSNorm(D, eps=k_eps, device=device)
    indices = torch.randint(0, M, (B, S), device=device)
    for tables in table_forms(cos, sin):
        for given, positions in [
            (None, None),
            (indices, indices),
            (indices.flatten(), indices),
            (indices[0], indices[:1]),
        ]:
            want = [
                fused_rope.norm_rotate(x, cos, sin, norm.weight, eps=eps, positions=positions)
                for x, norm, eps in zip((Q, K), norms, (1e-6, k_eps), strict=True)
            ]
            got = fast_qk_norm_rope(*norms, Q, K, *tables, given)
            for x, expected in zip(got, want, strict=True):
                same(x, expected.transpose(1, 2))
    sum(x.sum() for x in got).backward()
    assert all(norm.weight.grad is not None for norm in norms)


def test_one_row(device):
    cos, sin = angles(1, D // 2, device)
    Q, K = (torch.randn(B, H, 1, D, device=device) for H in (HQ, HK))
    same(fast_rope_embedding(Q, K, cos, sin)[0], bits(Q, cos, sin, layout="bhsd"))


@pytest.mark.parametrize("function", [fast_rope_embedding, inplace_rope_embedding])
def test_inplace_on_request(function, device):
    cos, sin = angles(M, D // 2, device)
    Q, K = inputs(device)
    want = [bits(x, cos, sin, layout="bhsd") for x in (Q, K)]
    got = function(Q, K, cos, sin, None, inplace=True)
    assert got[0].data_ptr() == Q.data_ptr() and got[1].data_ptr() == K.data_ptr()
    same(Q, want[0])
    same(K, want[1])


def test_gradients(device):
    cos, sin = angles(M, D // 2, device)
    indices = torch.randint(0, M, (B, S), dtype=torch.int32, device=device)
    Q, K = (x.detach().requires_grad_() for x in inputs(device, torch.float32))
    grads = [torch.randn_like(x) for x in (Q, K)]
    got = torch.autograd.grad(fast_rope_embedding(Q, K, cos, sin, indices), (Q, K), grads)
    for g, expected in zip(grads, got, strict=True):
        same(expected, bits(g, cos, sin, layout="bhsd", positions=indices, inverse=True))
    x = torch.randn(B, S, HQ, D, device=device, requires_grad=True)
    (got,) = torch.autograd.grad(Fast_RoPE_Embedding.apply(x, cos, sin).sum(), x)
    same(got, bits(torch.ones_like(x), cos, sin, inverse=True))


def test_compiles_without_a_graph_break():
    cos, sin = angles(M, D // 2)
    Q, K = inputs("cpu", torch.float32)
    compiled = torch.compile(fast_rope_embedding, backend="aot_eager", fullgraph=True)
    for got, want in zip(
        compiled(Q, K, cos, sin), fast_rope_embedding(Q, K, cos, sin), strict=True
    ):
        same(got, want)


def test_errors():
    cos, sin = angles(M, D // 2)
    Q, K = inputs("cpu")
    for function in (fast_rope_embedding, inplace_rope_embedding):
        with pytest.raises(ValueError, match="rows"):
            function(Q, K, cos[: S - 1], sin[: S - 1], None)
        with pytest.raises(ValueError, match="cos"):
            function(Q, K, cos[:, :3], sin[:, :3], None)
        with pytest.raises(ValueError, match="cos"):
            function(Q, K, cos.expand(2, M, D // 2), sin.expand(2, M, D // 2), None)
        with pytest.raises(IndexError, match=str(M)):
            function(Q, K, cos, sin, torch.full((B, S), M, dtype=torch.int32))
