"""Megatron-LM's functions: the unfused bits, M-RoPE batches, MLA, packed sequences; the binding.

MEGATRON_LM names a checkout; its unfused functions are compared then.
"""

import inspect
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from formula import close, compiles, gradients, rotate_reference, series
from fused_rope.compat import megatron
from fused_rope.compat.megatron import (
    apply_rotary_pos_emb_bshd,
    apply_rotary_pos_emb_thd,
    fused_apply_rotary_pos_emb,
    fused_apply_rotary_pos_emb_thd,
)
from fused_rope.compat.transformer_engine import apply_fused_qkv_rotary_pos_emb
from oracle import DTYPES, bits, same

B, S, H, D, R, M = 2, 8, 4, 48, 32, 40
LENGTHS = [6, 0, 10, 2]  # of packed sequences


def angles(interleaved=False, batch=1, rows=M, device="cpu"):
    """[M, batch, 1, R], each sequence at positions of its own, and [M, batch, P]."""
    position = torch.arange(rows)[:, None] + 7 * torch.arange(batch)
    angle = (position[..., None].double() * series(R)).float().to(device)
    twice = angle.repeat_interleave(2, -1) if interleaved else angle.repeat(1, 1, 2)
    return twice[:, :, None], angle


class Group:
    """What the functions ask of a process group."""

    def __init__(self, size=1, rank=0):
        self._size, self._rank = size, rank

    def size(self):
        return self._size

    def rank(self):
        return self._rank


def deinterleaved(x):
    return torch.cat([x[..., 0:R:2], x[..., 1:R:2], x[..., R:]], -1)


# --- [S, B, H, D] -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batch", [1, B], ids=["shared", "mrope"])
def test_sbhd(batch, interleaved, dtype, device):
    freqs, angle = angles(interleaved, batch, S, device)
    t = torch.randn(S, B, H, D, device=device).to(dtype)
    tables = angle.transpose(0, 1).cos(), angle.transpose(0, 1).sin()
    wide = torch.float32 if dtype == torch.float64 else None  # the angles are float32
    options = dict(interleaved=interleaved)
    a = angle[:, :, None].double()

    def fused(t):
        return fused_apply_rotary_pos_emb(t, freqs, **options)

    def unfused(t):
        return apply_rotary_pos_emb_bshd(t, freqs, interleaved)

    close(fused(t), rotate_reference(t, a.cos(), a.sin(), **options), dtype=wide, ulps=8)
    same(unfused(t), bits(t, *tables, layout="sbhd", precision="model", **options))
    for function in (fused, unfused):
        assert function(t.transpose(0, 1).contiguous().transpose(0, 1)).is_contiguous()
        (given,), (got,) = gradients(function, t)
        back = rotate_reference(given, a.cos(), -a.sin(), **options)
        close(got, back, dtype=wide, ulps=8 if function is fused else 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("mla", [None, "permuted", "kept"])
def test_options_of_the_unfused_path(mla, inverse, dtype, device):
    """mscale and inverse; MLA's pairs are adjacent, its angles repeated in halves."""
    freqs, angle = angles(rows=S, device=device)
    t = torch.randn(S, B, H, D, device=device).to(dtype)
    got = apply_rotary_pos_emb_bshd(
        t,
        freqs,
        mla_rotary_interleaved=mla is not None,
        mscale=1.25,
        inverse=inverse,
        mla_output_remove_interleaving=mla == "kept",
    )
    tables = (1.25 * angle.cos())[:, 0], (1.25 * angle.sin())[:, 0]
    options = dict(layout="sbhd", interleaved=mla is not None, inverse=inverse, precision="model")
    want = bits(t, *tables, **options)
    same(got, deinterleaved(want) if mla == "permuted" else want)
    if mla != "kept":
        older = apply_rotary_pos_emb_bshd(t, freqs, False, mla is not None, 1.25, inverse)
        same(got, older)
        named = dict(multi_latent_attention=mla is not None, mscale=1.25, inverse=inverse)
        same(got, apply_rotary_pos_emb_bshd(t, freqs, **named))


def test_without_heads(device):
    """[S, B, D] of an MLA key, which has no dimension for heads."""
    freqs, _ = angles(batch=B, rows=S, device=device)
    t = torch.randn(S, B, D, device=device)
    for table in (freqs, freqs[:, :1], freqs[:, :, 0]):
        whole = table if table.dim() == 4 else table.unsqueeze(2)
        want = apply_rotary_pos_emb_bshd(t.unsqueeze(2), whole).squeeze(2)
        same(apply_rotary_pos_emb_bshd(t, table), want)


# --- packed sequences ---------------------------------------------------------------------------


def packed(cp_size, cp_rank, by_batch, device):
    """cu_seqlens before the split, and the row of each token of a rank."""
    lengths = [n * cp_size for n in LENGTHS]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    row = []
    for first, length in zip(cu.tolist(), lengths, strict=False):
        position = torch.arange(length) + first * by_batch
        if cp_size > 1:
            chunks = position.view(2 * cp_size, -1)
            position = torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])
        row.append(position)
    return cu.int().to(device), torch.cat(row).to(device)


@pytest.mark.parametrize("cp_size,cp_rank", [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("max_seqlen", [None, "given"])
@pytest.mark.parametrize("by_batch", [False, True], ids=["by_sequence", "by_batch"])
def test_packed(by_batch, max_seqlen, cp_size, cp_rank, device):
    """Angles of the whole batch, one for each token, or of one sequence; padding is copied."""
    cu, row = packed(cp_size, cp_rank, by_batch, device)
    freqs, angle = angles(rows=cp_size * (sum if by_batch else max)(LENGTHS), device=device)
    t = torch.randn(len(row) + 3, H, D, device=device)
    longest = None if max_seqlen is None else cp_size * max(LENGTHS)
    cp = Group(cp_size, cp_rank)

    def rotated(t):
        return apply_rotary_pos_emb_thd(t, cu, freqs, cp_group=cp, max_seqlen=longest)

    a = angle[row].double()
    close(rotated(t)[:-3], rotate_reference(t[:-3], a.cos(), a.sin()), ulps=8)
    same(rotated(t)[-3:], t[-3:])
    (given,), (got,) = gradients(rotated, t)
    close(got[:-3], rotate_reference(given[:-3], a.cos(), -a.sin()), ulps=8)
    if not by_batch:
        fused = fused_apply_rotary_pos_emb_thd(t, cu, freqs, cp_size, cp_rank)
        same(fused, rotated(t))  # float32: the roundings are the same


def test_errors():
    freqs, _ = angles()
    t = torch.randn(S, B, H, D)
    cu = torch.tensor([0, S])
    with pytest.raises(ValueError, match="mla_rotary_interleaved"):
        apply_rotary_pos_emb_bshd(t, freqs, True, True)
    with pytest.raises(ValueError, match="cp_group"):
        apply_rotary_pos_emb_thd(t[:, 0], cu, freqs)
    with pytest.raises(IndexError, match="4"):
        apply_rotary_pos_emb_thd(t[:, 0], cu, freqs[:4], cp_group=Group(), max_seqlen=S)
    with pytest.raises(ValueError, match="rows"):
        fused_apply_rotary_pos_emb(t, freqs[:4])


def test_compiles():
    freqs, _ = angles(batch=B)
    t = torch.randn(S, B, H, D)
    compiles(apply_rotary_pos_emb_bshd, t, freqs, mla_rotary_interleaved=True, mscale=1.5)
    cu, one, cp = torch.tensor([0, 3, 8]), freqs[:, :1], Group()
    compiles(lambda t: apply_rotary_pos_emb_thd(t, cu, one, cp_group=cp), t[:, 0])
    compiles(fused_apply_rotary_pos_emb_thd, t[:, 0], cu, one)


# --- the binding ----------------------------------------------------------------------------------


@pytest.fixture
def modules(monkeypatch):
    """Empty modules under Megatron-LM's names, with the names that `patch` replaces."""
    rope_utils = ModuleType("megatron.core.models.common.embeddings.rope_utils")
    vars(rope_utils).update({name: None for name in megatron._IN_ROPE_UTILS})
    attention = ModuleType("megatron.core.transformer.attention")
    attention.HAVE_FUSED_QKV_ROPE = False
    for module in (rope_utils, attention):
        parts = module.__name__.split(".")
        for i in range(1, len(parts)):
            parent = ".".join(parts[:i])
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield rope_utils, attention
    megatron.unpatch()


def test_patch(modules):
    rope_utils, attention = modules
    names = megatron.patch()
    assert names == megatron.patch() and len(names) == 6
    assert rope_utils.fused_apply_rotary_pos_emb is fused_apply_rotary_pos_emb
    assert rope_utils._apply_rotary_pos_emb_thd is apply_rotary_pos_emb_thd
    assert attention.apply_fused_qkv_rotary_pos_emb is apply_fused_qkv_rotary_pos_emb
    assert attention.HAVE_FUSED_QKV_ROPE is True
    megatron.unpatch()
    assert rope_utils.fused_apply_rotary_pos_emb is None
    assert attention.HAVE_FUSED_QKV_ROPE is False
    assert not hasattr(attention, "apply_fused_qkv_rotary_pos_emb")


def test_patch_of_versions_without_packed_qkv(modules):
    del modules[1].HAVE_FUSED_QKV_ROPE
    assert len(megatron.patch()) == 4


@pytest.fixture
def original(monkeypatch):
    checkout = os.environ.get("MEGATRON_LM")
    if checkout is None:
        pytest.skip("MEGATRON_LM names no checkout of Megatron-LM")
    monkeypatch.syspath_prepend(checkout)
    yield pytest.importorskip("megatron.core.models.common.embeddings.rope_utils")
    megatron.unpatch()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mla", [False, True])
@pytest.mark.parametrize("batch", [1, B])
def test_original(batch, mla, dtype, original):
    """Bitwise, through its own router, before and after the binding."""
    freqs, _ = angles(batch=batch, rows=S)
    t = torch.randn(S, B, H, D, dtype=dtype)
    cu = torch.tensor([0, 3, S], dtype=torch.int32)
    fields = dict(apply_rope_fusion=False, rotary_interleaved=False, mrope_section=None)
    config = SimpleNamespace(**fields, multi_latent_attention=mla)
    options = dict(cp_group=Group(), mscale=1.25)
    if "mla_rotary_interleaved" in inspect.signature(original.apply_rotary_pos_emb).parameters:
        options["mla_rotary_interleaved"] = mla  # older versions read the config
    calls = [(t, None, freqs), (t[:, 0], cu, freqs[:, :1])]

    def routed():
        return [
            original.apply_rotary_pos_emb(x, table, config, cu_seqlens=cu, **options)
            for x, cu, table in calls
        ]

    want = routed()
    megatron.patch()
    for x, y in zip(routed(), want, strict=True):
        same(x, y)


def test_a_single_row_is_that_of_all_tokens(device):
    """As in the original, where angles broadcast."""
    t = torch.randn(S, B, H, D, device=device)
    for batch in (1, B):
        freqs = angles(batch=batch, rows=1, device=device)[0] + 0.5
        got = apply_rotary_pos_emb_bshd(t, freqs)
        same(got, apply_rotary_pos_emb_bshd(t, freqs.expand(S, -1, -1, -1).contiguous()))


def test_patch_leaves_what_other_code_bound(modules):
    """Neither reported as bound nor overwritten."""
    rope_utils, _ = modules
    megatron.patch()
    theirs = rope_utils.fused_apply_rotary_pos_emb = lambda t, freqs: t
    names = megatron.patch()
    assert rope_utils.fused_apply_rotary_pos_emb is theirs and len(names) == 5
    assert not any(name.endswith(".fused_apply_rotary_pos_emb") for name in names)
    megatron.unpatch()
    assert rope_utils.fused_apply_rotary_pos_emb is theirs
    assert rope_utils._apply_rotary_pos_emb_bshd is None


def test_patch_of_a_module_that_is_imported_again(modules, monkeypatch):
    rope_utils, _ = modules
    first = megatron.patch()
    again = ModuleType(rope_utils.__name__)
    vars(again).update({name: None for name in megatron._IN_ROPE_UTILS})
    monkeypatch.setitem(sys.modules, again.__name__, again)
    assert megatron.patch() == first
    assert again.fused_apply_rotary_pos_emb is fused_apply_rotary_pos_emb
    megatron.unpatch()
    assert again.fused_apply_rotary_pos_emb is None
    assert rope_utils.fused_apply_rotary_pos_emb is None
