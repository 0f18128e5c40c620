"""One regression test for each fault known from other rotary kernels: none of them is to return.

A test's name and docstring say what is guaranteed here; where that helps, also whose fault it was.
"""

import fused_rope
import pytest
import torch
from oracle import DTYPES, HALF, angles, bits, error_over_bound, same, same_bits, tensor

INTEGERS = [torch.int32, torch.int64]


def graded(x, cos, sin, g, **kw):
    """The result and the gradient of x for the output gradient g."""
    x = x.clone().requires_grad_()
    y = fused_rope.rotate(x, cos, sin, **kw)
    return y.detach(), torch.autograd.grad(y, x, g)[0]


# --- packed sequences and rows -----------------------------------------------------------------


def test_backward_of_packed_sequences_keeps_their_offsets(device):
    """Start positions reach backward too (TransformerEngine's fused QKV backward drops them)."""
    x, g = (tensor("thd", 1, 9, 2, 16, torch.float32, device) for _ in range(2))
    cos, sin = angles(30, 8, device)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    kw = dict(layout="thd", cu_seqlens=cu, offset=torch.tensor([11, 20], device=device))
    same(graded(x, cos, sin, g, **kw)[1], bits(g, cos, sin, inverse=True, **kw))


@pytest.mark.parametrize("argument", ["positions", "offset", "cu_seqlens"])
def test_index_tensors_are_read_by_their_own_dtype(argument, device):
    """int64 is never read as int32; what is neither is refused (TransformerEngine, sglang)."""
    x, (cos, sin) = tensor("thd", 1, 6, 2, 16, torch.float32, device), angles(30, 8, device)
    values = dict(positions=[5, 0, 3, 3, 29, 1], offset=[7, 2], cu_seqlens=[0, 2, 6])
    kw = {n: torch.tensor(v, device=device) for n, v in values.items()}
    if argument == "positions":
        kw["offset"] = kw["offset"] * 0
    else:
        del kw["positions"]
    results = []
    for dtype in INTEGERS:
        kw[argument] = kw[argument].to(dtype)
        results.append(fused_rope.rotate(x, cos, sin, layout="thd", **kw))
        same(results[-1], bits(x, cos, sin, layout="thd", **kw))
    same(results[0], results[1])
    for dtype in (torch.float32, torch.int16, torch.uint8, torch.bool):
        kw[argument] = kw[argument].to(dtype)
        with pytest.raises(TypeError, match=f"rotate: expected {argument} of dtype int32 or int64"):
            fused_rope.rotate(x, cos, sin, layout="thd", **kw)


def test_padding_is_copied_in_results_and_gradients(device):
    """Tokens past cu_seqlens[-1] are copied through, never left uninitialised."""
    x, g = (tensor("thd", 1, 20, 2, 16, torch.float32, device) for _ in range(2))
    cu = torch.tensor([0, 3, 9], dtype=torch.int32, device=device)
    y, x_grad = graded(x, *angles(9, 8, device), g, layout="thd", cu_seqlens=cu)
    same_bits(y[9:], x[9:])
    same_bits(x_grad[9:], g[9:])


def test_a_cache_length_beyond_the_table_is_an_error():
    """Not a silent rotation by nothing (flash-attn), not a read beyond it (TransformerEngine)."""
    x, (cos, sin) = torch.randn(2, 5, 2, 16), angles(8, 8)
    for lengths in ([0, 4], [4, 0], [-1, 0], [2**31 - 1, 0]):
        for dtype in INTEGERS:
            with pytest.raises(IndexError):
                fused_rope.rotate(x, cos, sin, offset=torch.tensor(lengths, dtype=dtype))
    with pytest.raises(ValueError, match="rows"):
        fused_rope.rotate(x, cos, sin, offset=4)


def test_positions_must_match_the_tokens():
    """Their length is checked (FlashInfer reads on)."""
    x, (cos, sin) = torch.randn(2, 5, 2, 16), angles(8, 8)
    for sizes in ((4,), (6,), (2, 4), (10,), (3, 5)):
        with pytest.raises(ValueError, match="rotate: expected positions of shape"):
            fused_rope.rotate(x, cos, sin, positions=torch.zeros(sizes, dtype=torch.int64))


def test_positions_are_honoured_in_every_layout(device):
    """They are never accepted and ignored (Liger)."""
    for layout in ("bshd", "bhsd", "sbhd"):
        x, (cos, sin) = tensor(layout, 2, 5, 3, 16, torch.float32, device), angles(20, 8, device)
        positions = torch.randint(0, 20, (2, 5)).to(device)
        got = fused_rope.rotate(x, cos, sin, layout=layout, positions=positions)
        same(got, bits(x, cos, sin, layout=layout, positions=positions))
        assert not torch.equal(got, fused_rope.rotate(x, cos, sin, layout=layout))


def test_each_batch_has_tables_of_its_own(device):
    """Not the first batch's for all (Liger's Llama 4, aiter), not 2-D strides (rotalabs)."""
    x = tensor("bshd", 3, 5, 2, 16, torch.float32, device)
    cos, sin = (t.view(3, 5, 8) for t in angles(15, 8, device))
    got = fused_rope.rotate(x, cos, sin)
    for b in range(3):
        same(got[b : b + 1], fused_rope.rotate(x[b : b + 1], cos[b], sin[b]))


def test_interleaved_mrope_reads_one_axis_for_each_pair(device):
    """Of three axes, in Qwen3-VL's order (Megatron reshapes by the number of axes)."""
    axes = fused_rope.mrope_axes([3, 3, 2], interleaved=True)
    assert list(axes) == [0, 1, 2, 0, 1, 2, 0, 1]
    x, (cos, sin) = tensor("bshd", 2, 5, 2, 16, torch.float32, device), angles(30, 8, device)
    positions = torch.randint(0, 30, (3, 2, 5)).to(device)
    got = fused_rope.rotate(x, cos, sin, positions=positions, axes=axes)
    for j, axis in enumerate(axes):
        one = fused_rope.rotate(x, cos, sin, positions=positions[axis])
        same(got[..., [j, j + 8]], one[..., [j, j + 8]])


def test_a_grown_position_needs_a_grown_table():
    """A module's table is not read past its end by positions (rotalabs grows by length alone)."""
    rope = fused_rope.RotaryEmbedding(16, max_seq_len=8)
    x, far = torch.randn(1, 3, 2, 16), torch.tensor([0, 1, 100])
    with pytest.raises(IndexError, match="100"):
        rope(x, positions=far)
    rope.reserve(101)
    want = fused_rope.RotaryEmbedding(16, max_seq_len=101)(x, positions=far)
    same(rope(x, positions=far), want)


# --- lanes and heads ---------------------------------------------------------------------------


@pytest.mark.parametrize("P", [1, 3, 10, 12, 20, 24, 40, 48, 56])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_half_a_span_need_not_be_whole_vectors(P, dtype, interleaved, device):
    """80, 96, 24 or 20 rotated lanes (FlashInfer wraps inside a vector, vLLM's xor needs 2^n)."""
    for D in (2 * P, 2 * P + 1, 128):
        x, (cos, sin) = tensor("bshd", 2, 3, 3, D, dtype, device), angles(3, P, device)
        got = fused_rope.rotate(x, cos, sin, interleaved=interleaved)
        same(got, bits(x, cos, sin, interleaved=interleaved))


@pytest.mark.parametrize("D", [48, 80, 96, 160, 192, 256])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_in_place_does_not_race_with_itself(D, interleaved, device):
    """Partner lanes may lie in different threads or warps (FlashInfer, head sizes 96 and 192)."""
    x = tensor("bshd", 4, 65, 8, D, torch.bfloat16, device)
    cos, sin = angles(65, D // 2, device)
    want = fused_rope.rotate(x, cos, sin, interleaved=interleaved)
    for _ in range(3):
        same(fused_rope.rotate_(x.clone(), cos, sin, interleaved=interleaved), want)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 7, 9, 12, 17, 33])
def test_any_head_count_and_no_neighbour(heads, device):
    """No block size has to divide it (Megatron's MLA rotates the next token's heads)."""
    q, k = (tensor("bshd", 2, 3, H, 32, torch.bfloat16, device) for H in (heads, 1))
    cos, sin = angles(3, 16, device)
    want = bits(q, cos, sin), bits(k, cos, sin)
    fused_rope.rotate_qk_(q, k, cos, sin)
    same(q, want[0])
    same(k, want[1])


@pytest.mark.parametrize("heads", [(8, 2), (2, 8), (5, 1), (1, 5)], ids=str)
def test_k_has_a_head_count_and_strides_of_its_own(heads, device):
    """More or fewer heads, other memory: none skipped (Unsloth), none overrun (rotalabs)."""
    q = tensor("bshd", 2, 5, heads[0], 32, torch.bfloat16, device)
    memory = tensor("bhsd", 2, 5, heads[1] + 2, 40, torch.bfloat16, device)
    before, k = memory.clone(), memory[:, 1:-1, :, 4:36].transpose(1, 2)
    cos, sin = angles(5, 16, device)
    want = bits(k, cos, sin)
    same(fused_rope.rotate_qk(q, k, cos, sin)[1], want)
    fused_rope.rotate_qk_(q, k, cos, sin)
    same(k, want)
    before[:, 1:-1, :, 4:36].transpose(1, 2).copy_(want)
    same_bits(memory, before)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_the_second_lane_of_a_pair_turns_the_same_way(interleaved, device):
    """b*c + a*s, not b*c' + ... (rotalabs swaps cosine and sine on odd lanes); norms are kept."""
    x = tensor("bshd", 2, 5, 3, 32, torch.float64, device)
    cos, sin = angles(5, 16, device, torch.float64)
    y = fused_rope.rotate(x, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)
    same(y, bits(x, cos, sin, interleaved=interleaved))


@pytest.mark.parametrize("nope", [1, 3, 8, 30, 64, 100])
def test_any_number_of_lanes_beside_the_span(nope, device):
    """They are copied whole, whether or not they are a multiple of the span (FlashInfer)."""
    x, (cos, sin) = tensor("bshd", 2, 5, 3, nope + 32, torch.half, device), angles(5, 16, device)
    for o in (0, nope):
        got = fused_rope.rotate(x, cos, sin, rotary_offset=o)
        same(got, bits(x, cos, sin, rotary_offset=o))
        rest = slice(32, None) if o == 0 else slice(0, nope)
        same_bits(got[..., rest], x[..., rest])


def test_lanes_that_are_not_neighbours(device):
    """The last dimension's stride is honoured, not assumed (FlashInfer's llama 3.1 kernels)."""
    x = tensor("bshd", 2, 5, 3, 64, torch.bfloat16, device)[..., ::2]
    cos, sin = angles(5, 16, device)
    same(fused_rope.rotate(x, cos, sin), bits(x, cos, sin))


def test_partial_rotation_of_a_wide_head(device):
    """With half-width tables of the rotated lanes only (Liger on Phi-4-mini, factor 0.75)."""
    q, k = (tensor("bhsd", 2, 5, H, 128, torch.bfloat16, device) for H in (4, 2))
    cos, sin = angles(5, 48, device)
    for got, x in zip(fused_rope.rotate_qk(q, k, cos, sin, layout="bhsd"), (q, k), strict=True):
        same(got, bits(x, cos, sin, layout="bhsd"))


# --- tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("P", [1, 3, 8, 20, 64])
def test_nothing_is_read_behind_the_last_row(dtype, P, device):
    """A table that ends where the memory does (FlashInfer loads 16 bytes past a row)."""
    x = tensor("bshd", 1, 4, 2, 2 * P, torch.bfloat16, device)
    memory = torch.full((4 * P + 64,), float("nan"), dtype=dtype, device=device)
    cos, sin = angles(4, P, device, dtype)
    table = memory[16 : 16 + 4 * P].view(4, P)
    table.copy_(cos)
    for interleaved in (False, True):
        got = fused_rope.rotate(x, table, sin, interleaved=interleaved)
        same(got, bits(x, cos, sin, interleaved=interleaved))
        got = fused_rope.rotate(x, cos, table.copy_(sin), interleaved=interleaved)
        same(got, bits(x, cos, sin, interleaved=interleaved))
        table.copy_(cos)


def test_tables_of_any_strides(device):
    """Contiguity is not assumed (apex); sin's shape is checked against cos's."""
    x = tensor("bshd", 2, 5, 3, 32, torch.float32, device)
    cos, sin = angles(5, 16, device)
    strided = cos.t().contiguous().t(), torch.cat([sin, sin], -1)[:, :16]
    same(fused_rope.rotate(x, *strided), fused_rope.rotate(x, cos, sin))
    with pytest.raises(ValueError, match="rotate: expected sin of cos's shape"):
        fused_rope.rotate(x, cos, sin[:, :8])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_float32_table_beside_half_precision(dtype, device):
    """The normal case, read as it is (fla and the hub's rotary kernel refuse it)."""
    x, (cos, sin) = tensor("bshd", 2, 5, 3, 32, dtype, device), angles(5, 16, device)
    got = fused_rope.rotate(x, cos, sin)
    assert error_over_bound(got, x, cos, sin) <= 1
    assert not torch.equal(got, fused_rope.rotate(x, cos.to(dtype), sin.to(dtype)))


def test_float64_is_computed_in_float64(device):
    """Not in float32 (the hub's rotary kernel)."""
    x = tensor("bshd", 2, 5, 3, 32, torch.float64, device)
    cos, sin = angles(5, 16, device, torch.float64)
    assert error_over_bound(fused_rope.rotate(x, cos, sin), x, cos, sin) <= 1


def test_scaled_tables_and_the_opposite_direction(device):
    """Attention factors and inverse are part of the operator (TransformerEngine has neither)."""
    x, (cos, sin) = tensor("bshd", 2, 5, 3, 32, torch.float32, device), angles(5, 16, device)
    scaled = 1.3 * cos, 1.3 * sin
    for inverse in (False, True):
        got = fused_rope.rotate(x, *scaled, inverse=inverse)
        same(got, bits(x, *scaled, inverse=inverse))


@pytest.mark.parametrize("row", [1000, 131_071, 2**20, 2**24 + 1])
def test_large_positions_keep_their_angles(row, device):
    """No fast-math sine (FlashInfer), no float32 product of row and frequency."""
    rope = fused_rope.RotaryEmbedding(64, max_seq_len=4, device=device)
    x = tensor("bshd", 1, 1, 2, 64, torch.float64, device)
    inv_freq = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64, device=device) / 64)
    cos, sin = fused_rope.cos_sin_table(inv_freq, 1, first=row, dtype=torch.float64)
    got = fused_rope.rotate(x, cos, sin)
    angle = row * inv_freq
    want = bits(x, angle.cos()[None], angle.sin()[None])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-8)
    assert rope.cos.dtype == torch.float32


def test_positions_are_never_in_the_dtype_of_x(device):
    """bfloat16 cannot tell 256 from 257 (lucidrains); a module's table stays float32 (vLLM)."""
    rope = fused_rope.RotaryEmbedding(32, max_seq_len=600, device=device).to(torch.bfloat16)
    x = tensor("bshd", 1, 600, 2, 32, torch.bfloat16, device)
    assert rope.cos.dtype == torch.float32 and not torch.equal(rope.cos[256], rope.cos[257])
    same(rope(x), bits(x, rope.cos[:600], rope.sin[:600]))


# --- autograd ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["rotate_", "rotate_qk_"])
def test_in_place_is_known_to_autograd(form, device):
    """Versions are bumped, stale values are detected (quack, flash-attn, Liger: no mark_dirty)."""
    q, k = (torch.randn(2, 5, H, 16, device=device, requires_grad=True) for H in (4, 2))
    inputs = [q.exp(), k.exp()] if form == "rotate_qk_" else [q.exp()]
    getattr(fused_rope, form)(*inputs, *angles(5, 8, device))
    for x in inputs:
        assert x._version == 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            x.sum().backward()


def test_a_leaf_is_not_overwritten(device):
    """It is refused untouched (quack overwrites it silently)."""
    x, k = (torch.randn(2, 5, 4, 16, device=device, requires_grad=True) for _ in range(2))
    before = x.detach().clone()
    for call in (
        lambda: fused_rope.rotate_(x, *angles(5, 8, device)),
        lambda: fused_rope.rotate_qk_(x, k, *angles(5, 8, device)),
        lambda: fused_rope.rotate_qk_(k * 1, x, *angles(5, 8, device)),
    ):
        with pytest.raises(RuntimeError, match="leaf"):
            call()
        same_bits(x, before)


@pytest.mark.parametrize("form", ["rotate", "rotate_"])
def test_gradients_handed_to_backward_are_left_alone(form, device):
    """Under hooks, retain_graph and shared gradients too (quack, flash-attn, Liger, Unsloth)."""
    leaf = torch.randn(2, 5, 4, 16, device=device, requires_grad=True)
    cos, sin = angles(5, 8, device)
    y = getattr(fused_rope, form)(leaf * 1, cos, sin)
    g, seen = torch.randn_like(y), []
    y.register_hook(seen.append)
    before = g.clone()
    first = torch.autograd.grad(y, leaf, g, retain_graph=True)[0]
    second = torch.autograd.grad(y, leaf, g)[0]
    same_bits(g, before)
    for hooked in seen:
        same_bits(hooked, before)
    same(first, second)
    same(first, bits(g, cos, sin, inverse=True))


def test_inputs_of_the_plain_forms_are_left_alone(device):
    """Contiguous ones too (Unsloth and Liger write into q and k)."""
    q, k = (tensor("bhsd", 2, 5, H, 32, torch.float16, device) for H in (4, 2))
    before = q.clone(), k.clone()
    got = fused_rope.rotate_qk(q, k, *angles(5, 16, device), layout="bhsd")
    same_bits(q, before[0])
    same_bits(k, before[1])
    pointers = {t.untyped_storage().data_ptr() for t in (q, k, *got)}
    assert len(pointers) == 4


def test_a_result_is_never_detached(device):
    """Gradients flow for every input that asks (rotalabs' kernel detaches silently)."""
    q, k = (torch.randn(2, 5, H, 16, device=device, requires_grad=True) for H in (4, 2))
    cos, sin = angles(5, 8, device)
    got = fused_rope.rotate_qk(q, k, cos, sin)
    assert all(t.requires_grad and t.grad_fn is not None for t in got)


def test_rotating_a_clone_in_place_has_the_true_gradient(device):
    """Not the identity's (a mutating operator without an autograd formula)."""
    x = torch.randn(2, 5, 4, 16, device=device, requires_grad=True)
    cos, sin = angles(5, 8, device)
    g = torch.randn_like(x)
    fused_rope.rotate_(x.clone(), cos, sin).backward(g)
    same(x.grad, bits(g, cos, sin, inverse=True))
    assert not torch.equal(x.grad, g)


def test_backward_with_every_argument_given(device):
    """As many gradients as inputs, whichever optional ones there are (aiter returns too few)."""
    x, g = (tensor("thd", 1, 9, 2, 20, torch.float32, device) for _ in range(2))
    cos, sin = angles(40, 8, device)
    kw = dict(
        layout="thd",
        positions=torch.randint(-1, 20, (3, 9)).to(device),
        offset=torch.tensor([3, 9], device=device),
        cu_seqlens=torch.tensor([0, 4, 7], device=device),
        axes=[0, 1, 2, 2] * 2,
        rotary_offset=3,
        blocks=2,
        precision="model",
    )
    got = graded(x, cos, sin, g, **kw)
    same(got[0], bits(x, cos, sin, **kw))
    same(got[1], bits(g, cos, sin, inverse=True, **kw))


# --- compilers, devices, sizes -----------------------------------------------------------------


def test_no_graph_break(fresh_dynamo, device):
    """fullgraph compiles (Unsloth disables the compiler, FlashInfer registers nothing)."""
    x, (cos, sin) = tensor("bshd", 2, 5, 3, 16, torch.float32, device), angles(5, 8, device)
    f = torch.compile(lambda x: fused_rope.rotate(x, cos, sin), backend="aot_eager", fullgraph=True)
    same(f(x), bits(x, cos, sin))


def test_mistakes_are_checked_in_every_build():
    """By exceptions, not by assertions that NDEBUG removes; k is compared with q."""
    q, (cos, sin) = torch.randn(2, 5, 4, 16), angles(5, 8)
    for k in (q.double(), q.half(), q[:, :4], q[:1], q[..., :8]):
        with pytest.raises((TypeError, ValueError), match="rotate_qk: expected k"):
            fused_rope.rotate_qk(q, k, cos, sin)


def test_more_than_65535_batches_and_heads(device):
    """No axis lies in a grid dimension that ends there (quack)."""
    cos, sin = angles(1, 2, device)
    for sizes in ((66_000, 1, 1, 4), (1, 1, 66_000, 4)):
        x = tensor("bshd", *sizes, torch.bfloat16, device)
        same(fused_rope.rotate(x, cos, sin), bits(x, cos, sin))


def test_threads_do_not_share_state():
    """Two threads with tables of their own (FlashInfer caches one set of frequencies)."""
    from concurrent.futures import ThreadPoolExecutor

    def work(i):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(2, 33, 4, 64, generator=generator)
        cos, sin = torch.randn(2, 33, 32, generator=generator).unbind()
        return all(
            torch.equal(fused_rope.rotate(x, cos, sin), bits(x, cos, sin)) for _ in range(10)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.slow
def test_strides_beyond_32_bits(device):
    """Strides and offsets are 64-bit throughout (FlashInfer narrows them)."""
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


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(device):
    """No 32-bit index anywhere (TransformerEngine, vLLM, flash-attn, Liger)."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB")
    S, H, D = 2**16 + 3, 258, 128
    x = torch.zeros(1, S, H, D, dtype=torch.bfloat16, device=device)
    tokens = [0, 65_535, 65_536, S - 1]
    for t in tokens:
        x[0, t] = torch.randn(H, D, device=device).bfloat16()
    cos, sin = angles(S, D // 2, device)
    before = {t: x[0, t].clone() for t in tokens}
    fused_rope.rotate_(x, cos, sin)
    for t in tokens:
        want = bits(before[t][None, None], cos[t : t + 1], sin[t : t + 1])
        same(x[0, t][None, None], want)
    assert not x[0, 1].any() and not x[0, S - 2].any()
