"""Facades with full-width tables: views that only C++ sees must not be missed by anyone else."""

import fused_rope
import pytest
import torch
from fused_rope import functional
from fused_rope.compat.transformers import apply_rotary_pos_emb
from fused_rope.compat.unsloth import fast_rope_embedding
from oracle import angles, same
from torch.fx.experimental.proxy_tensor import make_fx


def hugging_face(q, k, cos, sin):
    return apply_rotary_pos_emb(q, k, cos[None], sin[None], precision="fp32")


def unsloth(q, k, cos, sin):
    return fast_rope_embedding(q, k, cos, sin)


FACADES = pytest.mark.parametrize("facade", [hugging_face, unsloth])


@pytest.fixture
def inputs(device):
    """q, k [B, H, S, D], full-width tables, and q and k rotated."""
    cos, sin = (table.to(device) for table in angles(5, 8))
    q, k = torch.randn(2, 3, 5, 16, device=device), torch.randn(2, 1, 5, 16, device=device)
    expected = fused_rope.rotate_qk(q, k, cos, sin, layout="bhsd")
    return q, k, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1), expected


@FACADES
def test_plain_call_takes_the_short_way(facade, inputs, monkeypatch):
    q, k, cos, sin, expected = inputs
    monkeypatch.setattr(functional, "rotate_qk", None)
    for got, want in zip(facade(q, k, cos, sin), expected, strict=True):
        same(got, want)


@FACADES
def test_gradients_of_tables(facade, inputs):
    q, k, cos, sin, expected = inputs
    cos.requires_grad_()
    out = facade(q, k, cos, sin)
    same(out[0], expected[0])
    (grad,) = torch.autograd.grad(out[0].sum() + out[1].sum(), cos)
    assert grad.shape == cos.shape and grad[:, :8].abs().sum() > 0 and not grad[:, 8:].any()


@FACADES
def test_tangents_of_tables(facade, inputs):
    q, k, cos, sin, _ = inputs
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(cos, torch.ones_like(cos))
        tangent = torch.autograd.forward_ad.unpack_dual(facade(q, k, dual, sin)[0]).tangent
    torch.testing.assert_close(tangent, q)


@FACADES
def test_table_overwritten_before_backward(facade, inputs):
    """The view shares its base's version counter."""
    q, k, cos, sin, _ = inputs
    q.requires_grad_()
    out = facade(q, k, cos, sin)
    cos.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out[0].sum().backward()


@FACADES
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_traced_tables_are_inputs(facade, mode, inputs):
    q, k, cos, sin, _ = inputs
    traced = make_fx(facade, tracing_mode=mode)(q, k, cos, sin)
    for got, want in zip(traced(q, k, -cos, sin), facade(q, k, -cos, sin), strict=True):
        same(got, want)


@FACADES
def test_mapped_tables(facade, inputs):
    q, k, cos, sin, _ = inputs
    tables = torch.stack([cos, -cos])
    got = torch.func.vmap(facade, in_dims=(None, None, 0, None))(q, k, tables, sin)[0]
    for each, table in zip(got, tables, strict=True):
        same(each, facade(q, k, table, sin)[0])


@FACADES
def test_strided_and_offset_tables(facade, inputs):
    q, k, cos, sin, expected = inputs
    joint = torch.cat([torch.zeros_like(cos[:2]), cos]), torch.cat([torch.zeros_like(sin), sin], -1)
    same(facade(q, k, joint[0][2:], joint[1][:, 16:])[1], expected[1])


@FACADES
def test_inference_mode(facade, inputs):
    q, k, cos, sin, expected = inputs
    with torch.inference_mode():
        same(facade(q, k, cos.clone(), sin)[0], expected[0])
