"""Memory: any strides in, the promised strides out, and one result whatever lies underneath."""

import fused_rope
import pytest
import torch
from oracle import (
    DENSE,
    DTYPES,
    OVERLAPPING,
    VIEWS,
    angles,
    as_bshd,
    bits,
    identical,
    same,
    tensor,
    view,
    views,
)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_views(name, dtype, interleaved, device):
    x = view(name, dtype, device)
    cos, sin = angles(5, 8, device)
    got = fused_rope.rotate(x, cos, sin, interleaved=interleaved)
    same(got, bits(x, cos, sin, interleaved=interleaved))
    like = torch.empty_like(x) if name in DENSE else torch.empty(x.shape)
    assert got.stride() == like.stride()


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_views_of_q_with_views_of_k(name, dtype, device):
    """Each tensor has strides of its own."""
    q = view(name, dtype, device)
    cos, sin = angles(5, 8, device)
    want = bits(q, cos, sin)
    for _, k in views(dtype, device):
        got = fused_rope.rotate_qk(q, k[:, :, :3], cos, sin)
        same(got[0], want)
        same(got[1], bits(k[:, :, :3], cos, sin))


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_in_place(name, dtype, device):
    x = view(name, dtype, device)
    cos, sin = angles(5, 4, device)
    before, want = x.clone(), bits(x, cos, sin, rotary_offset=3)
    if name in OVERLAPPING and name != "sliding windows":  # PyTorch cannot prove that one
        with pytest.raises(RuntimeError, match=r"rotate_.*memory"):
            fused_rope.rotate_(x, cos, sin, rotary_offset=3)
        same(x, before)
    elif name not in OVERLAPPING:
        fused_rope.rotate_(x, cos, sin, rotary_offset=3)
        same(x, want)


@pytest.mark.parametrize("layout", ["bhsd", "sbhd", "thd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layouts_are_permutations(layout, dtype, device):
    x = tensor(layout, 1, 7, 4, 32, dtype, device)
    cos, sin = angles(7, 16, device)
    want = fused_rope.rotate(as_bshd(x, layout), cos, sin)
    same(as_bshd(fused_rope.rotate(x, cos, sin, layout=layout), layout), want)


SIZE_ONE = [
    ((1, 4, 1, 16), (1, 16, 7, 1)),
    ((1, 1, 4, 16), (0, 5, 16, 1)),
    ((4, 1, 1, 16), (16, 0, 0, 1)),
    ((1, 1, 1, 16), (3, 3, 3, 1)),
    ((1, 4, 1, 16), (10**9, 16, 10**9 + 7, 1)),
]


@pytest.mark.parametrize("sizes,strides", SIZE_ONE, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dimensions_of_size_one_may_have_any_stride(sizes, strides, dtype, device):
    base = torch.randn(64, device=device).to(dtype)
    x = base.as_strided(sizes, strides)
    cos, sin = angles(sizes[1], 8, device)
    same(fused_rope.rotate(x, cos, sin), bits(x, cos, sin))
    want = bits(x, cos, sin)
    same(fused_rope.rotate_(x, cos, sin), want)


@pytest.mark.parametrize("shift", range(9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_alignment(shift, dtype, device):
    """Results do not depend on whether storage offsets keep 16-byte alignment."""
    x = tensor("bshd", 1, 3, 4, 64, dtype, device)
    moved = torch.cat([x.new_zeros(shift), x.flatten()])[shift:].view(x.shape)
    cos, sin = angles(3, 32, device)
    for interleaved in (False, True):
        kw = dict(interleaved=interleaved)
        want = fused_rope.rotate(x, cos, sin, **kw)
        same(fused_rope.rotate(moved, cos, sin, **kw), want)
        base = torch.cat([cos.new_zeros(2, shift), torch.stack([cos, sin]).flatten(1)], 1)
        c, s = base[:, shift:].view(2, 3, 32)
        same(fused_rope.rotate(x, c, s, **kw), want)


@pytest.mark.parametrize("pitch", [64, 65, 66, 68, 72, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_head_stride(pitch, dtype, device):
    x = tensor("bshd", 2, 3, 4, pitch, dtype, device)[..., :64]
    cos, sin = angles(3, 32, device)
    same(fused_rope.rotate(x, cos, sin), fused_rope.rotate(x.contiguous(), cos, sin))


def test_lazily_negated_memory(device):
    """The imaginary part of a conjugate is a view that PyTorch negates when it is read."""
    z = torch.view_as_complex(
        tensor("bshd", 2, 5, 3, 32, torch.float32, device).view(2, 5, 3, 16, 2)
    )
    x, before = z.conj().imag, z.clone()
    cos, sin = angles(5, 8, device)
    assert x.is_neg()
    want = bits(x, cos, sin)
    same(fused_rope.rotate(x, cos, sin), want)
    same(z, before)
    fused_rope.rotate_(x, cos, sin)
    same(z.imag, -want)
    same(z.real, before.real)


def test_strided_inputs_are_not_copied(device):
    """One output is allocated and nothing else: no hidden `.contiguous()` of a strided input."""
    x = tensor("bhsd", 2, 64, 8, 64, torch.bfloat16, device).transpose(1, 2)[..., :32]
    cos, sin = angles(64, 16, device)
    fused_rope.rotate(x, cos, sin)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU]) as profile:
        fused_rope.rotate(x, cos, sin)
    names = [event.name for event in profile.events()]
    assert not [n for n in names if "copy" in n or "clone" in n or "contiguous" in n], names


def test_an_input_is_never_written(device):
    storage = torch.randn(2 * 5 * 3 * 4 * 16, device=device)
    qkv = storage.view(2, 5, 3, 4, 16)
    before = storage.clone()
    cos, sin = angles(5, 8, device)
    got = fused_rope.rotate_qk(qkv[:, :, 0], qkv[:, :, 1], cos, sin)
    identical(storage, before)
    assert len({t.untyped_storage().data_ptr() for t in (storage, *got)}) == 3


@pytest.mark.slow
def test_strides_beyond_32_bits(device):
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB")
    stride = 2**32 + 8
    memory = torch.empty(stride + 1024, dtype=torch.int8, device=device).view(torch.bfloat16)
    x = memory.as_strided((2, 5, 2, 16), (stride // 2, 32, 16, 1))
    x.copy_(torch.randn(2, 5, 2, 16))
    cos, sin = angles(5, 8, device)
    want = bits(x, cos, sin)
    same(fused_rope.rotate(x, cos, sin), want)
    same(fused_rope.rotate_(x, cos, sin), want)
