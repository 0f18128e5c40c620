"""vLLM's operator: every shape that it takes, in place, and the traps of kernels like it."""

import pytest
import torch
from formula import close, compiles, rotate_reference
from fused_rope.compat.vllm import rotary_embedding, rotary_embedding_and_cache
from oracle import DTYPES, same

B, S, HQ, HK, D, M = 2, 5, 8, 2, 48, 40
SHAPES = {
    "[T, H*D]": lambda H: (B * S, H * D),
    "[T, H, D]": lambda H: (B * S, H, D),
    "[B, S, H*D]": lambda H: (B, S, H * D),
    "[B, S, H, D]": lambda H: (B, S, H, D),
}


def written_out(x, cache, positions, is_neox, start=0, inverse=False):
    cos, sin = cache[positions.long().flatten()][:, None].chunk(2, -1)
    sin = -sin if inverse else sin
    heads = x.reshape(B * S, -1, D)
    return rotate_reference(heads, cos, sin, interleaved=not is_neox, start=start).view(x.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("itype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(shape, is_neox, itype, dtype, device):
    """R of 32 and of 24, which is no power of two; cache in its own dtype and in float32."""
    for R in (32, 24):
        cache = torch.randn(M, R, device=device).to(dtype)
        cache = cache.float() if R == 24 else cache
        positions = torch.randint(0, M, (B, S) if "B" in shape else (B * S,), device=device)
        q, k = (torch.randn(SHAPES[shape](H), device=device).to(dtype) for H in (HQ, HK))
        want = [written_out(x, cache, positions, is_neox) for x in (q, k)]
        assert rotary_embedding(positions.to(itype), q, k, D, cache, is_neox) is None
        close(q, want[0])
        close(k, want[1])


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("inverse", [False, True])
def test_offset_inverse_and_no_key(is_neox, inverse, device):
    cache = torch.randn(M, 32, device=device)
    positions = torch.randint(0, M, (B * S,), device=device)
    q = torch.randn(B * S, HQ * D, device=device)
    want = written_out(q, cache, positions, is_neox, 16, inverse)
    rotary_embedding(positions, q, None, D, cache, is_neox, 16, inverse)
    close(q, want)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_model_precision(dtype, inverse, is_neox, device):
    """Bitwise the formula in query's dtype, as `forward_native` rounds; "fp32" rounds once."""
    cache = torch.randn(M, 32, device=device)
    positions = torch.randint(0, M, (B * S,), device=device)
    q, k = (torch.randn(B * S, H, D, device=device).to(dtype) for H in (HQ, HK))
    cos, sin = cache.to(dtype)[positions][:, None].chunk(2, -1)
    sin = -sin if inverse else sin
    want = []
    for x in (q, k):
        a, b = (x[..., :32:2], x[..., 1:32:2]) if not is_neox else (x[..., :16], x[..., 16:32])
        pair = a * cos - b * sin, b * cos + a * sin
        rotated = torch.cat(pair, -1) if is_neox else torch.stack(pair, -1).flatten(-2)
        want.append(torch.cat([rotated, x[..., 32:]], -1))
    once = q.clone()
    rotary_embedding(positions, once, None, D, cache.to(dtype), is_neox, 0, inverse)
    rotary_embedding(positions, q, k, D, cache, is_neox, inverse=inverse, precision="model")
    same(q, want[0])
    same(k, want[1])
    if dtype == torch.bfloat16:
        assert not torch.equal(once, q)
    with pytest.raises(ValueError, match="precision"):
        rotary_embedding(positions, q, k, D, cache, is_neox, precision="exact")


def test_slices_of_packed_qkv(device):
    """query and key are strided views with strides of their own; what lies between is untouched."""
    cache = torch.randn(M, D, device=device)
    positions = torch.randint(0, M, (B * S,), device=device)
    qkv = torch.randn(B * S, (HQ + 2 * HK) * D, device=device)
    before = qkv.clone()
    q, k, v = qkv.split([HQ * D, HK * D, HK * D], -1)
    want = [written_out(x, cache, positions, True) for x in (q, k)]
    rotary_embedding(positions, q, k, D, cache, True)
    close(q, want[0])
    close(k, want[1])
    same(v, before[:, -HK * D :])
    # Heads whose stride is not head_size, query's unlike key's.
    q = torch.randn(HQ, B * S, D, device=device).transpose(0, 1)
    k = torch.randn(B * S, HK, 2 * D, device=device)[..., :D]
    want = [written_out(x, cache, positions, True) for x in (q, k)]
    rotary_embedding(positions, q, k, D, cache, True)
    close(q, want[0])
    close(k, want[1])


def test_more_key_heads_and_no_tokens(device):
    cache = torch.randn(M, D, device=device)
    positions = torch.randint(0, M, (B * S,), device=device)
    q, k = (torch.randn(B * S, H * D, device=device) for H in (HK, HQ))
    want = written_out(k, cache, positions, True)
    rotary_embedding(positions, q, k, D, cache, True)
    close(k, want)
    rotary_embedding(positions[:0], q[:0], k[:0], D, cache, True)


def test_errors():
    cache, positions = torch.randn(M, D), torch.arange(B * S)
    q, k = torch.randn(B * S, HQ * D), torch.randn(B * S, HK * D)
    before = q.clone()
    with pytest.raises(IndexError, match=str(M)):
        rotary_embedding(torch.full((B * S,), M), q, k, D, cache, True)
    with pytest.raises(ValueError, match="query"):
        rotary_embedding(positions, q[:, :-1], k, D, cache, True)
    with pytest.raises(ValueError, match="key"):
        rotary_embedding(positions, q, k.view(1, B * S, -1, D), D, cache, True)
    with pytest.raises(ValueError, match="positions"):
        rotary_embedding(positions[None, None], q, k, D, cache, True)
    with pytest.raises(ValueError):
        rotary_embedding(positions[1:], q, k, D, cache, True)
    with pytest.raises(ValueError):  # R + offset > head_size
        rotary_embedding(positions, q, k, D, cache, True, 2)
    with pytest.raises(TypeError, match="positions"):
        rotary_embedding(positions.float(), q, k, D, cache, True)
    with pytest.raises(ValueError, match=r"query .*H\*0"):
        rotary_embedding(positions, q, k, 0, cache, True)
    same(q, before)


CACHE_DTYPES = {
    "auto": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@pytest.mark.parametrize("precision", ["fp32", "model"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("scale", [(), (1,), (HK,)], ids=str)
@pytest.mark.parametrize("name", CACHE_DTYPES)
def test_and_cache(name, scale, layout, precision, device):
    """The bits of vLLM's two steps; caches that are bytes; fewer slots than tokens."""
    dtype, pages, page_size = CACHE_DTYPES[name], 5, 3
    cache = torch.randn(M, 32, device=device)
    positions = torch.randint(0, M, (B * S,), device=device)
    q, k, v = (torch.randn(B * S, H * D, device=device).bfloat16() for H in (HQ, HK, HK))
    before = q.clone(), k.clone(), v.clone()
    slots = torch.randperm(pages * page_size, device=device)[: B * S - 2]
    slots[1] = -1
    scales = [torch.rand(scale, device=device) + 0.5 for _ in "kv"]
    # [pages, page_size, Hk, D], for HND a view.
    sizes = (pages, page_size, HK, D) if layout == "NHD" else (pages, HK, page_size, D)
    pools = [torch.randn(sizes, device=device).to(dtype) for _ in "kv"]
    pools = [pool if layout == "NHD" else pool.transpose(1, 2) for pool in pools]

    want_q, want_k = q.clone(), k.clone()
    rotary_embedding(positions, want_q, want_k, D, cache, True, precision=precision)
    want, largest = [], torch.finfo(dtype).max
    for x, pool, factor in zip((want_k, v), pools, scales, strict=True):
        x = x.view(-1, HK, D)[: len(slots)].float()
        x = x if name == "auto" else x / factor.expand(HK)[:, None]
        values = pool.float().flatten(0, 1)
        values[slots[slots >= 0]] = x[slots >= 0].clamp(-largest, largest).to(dtype).float()
        want.append(values.view(pool.shape))
    given = [pool if name == "auto" else pool.view(torch.uint8) for pool in pools]
    arguments = positions, q, k, v, D, cache, True, *given, slots, name, *scales
    same(rotary_embedding_and_cache(*arguments, precision=precision), want_q)
    for x, copy in zip((q, k, v), before, strict=True):
        same(x, copy)
    for pool, values in zip(pools, want, strict=True):
        same(pool.float(), values)


def test_and_cache_errors():
    cache, positions = torch.randn(M, D), torch.arange(B * S)
    q, k, v = (torch.randn(B * S, H * D) for H in (HQ, HK, HK))
    pools = torch.zeros(2, 5, 3, HK, D)
    with pytest.raises(ValueError, match="nvfp4"):
        rotary_embedding_and_cache(
            positions, q, k, v, D, cache, True, *pools, positions, "nvfp4", None, None
        )
    with pytest.raises(IndexError, match="slots"):
        rotary_embedding_and_cache(positions, q, k, v, D, cache, True, *pools, positions + 6)
    with pytest.raises(ValueError, match="rotary_embedding_and_cache: expected value"):
        rotary_embedding_and_cache(positions, q, k, v[:, 1:], D, cache, True, *pools, positions)


def test_compiles():
    cache, positions = torch.randn(M, D), torch.arange(B * S)

    def rotated(q, k):
        q, k = q.clone(), k.clone()
        rotary_embedding(positions, q, k, D, cache, True)
        return q, k

    compiles(rotated, torch.randn(B * S, HQ * D), torch.randn(B * S, HK * D))


@pytest.mark.parametrize("is_neox", [True, False])
def test_original(is_neox, device):
    original = pytest.importorskip("vllm._custom_ops")
    if device == "cpu":
        pytest.skip("the operator is CUDA's")
    cache = torch.randn(M, 32, device=device, dtype=torch.bfloat16)
    positions = torch.randint(0, M, (B * S,), device=device)
    ours = [torch.randn(B * S, H * D, device=device).bfloat16() for H in (HQ, HK)]
    theirs = [x.clone() for x in ours]
    rotary_embedding(positions, *ours, D, cache, is_neox)
    original.rotary_embedding(positions, *theirs, D, cache, is_neox)
    for x, y in zip(ours, theirs, strict=True):
        close(x, y.double(), ulps=1)
