"""What needs a GPU: bitwise identity with the CPU, graphs, streams, synchronization, devices."""

import subprocess
import sys
import textwrap
from pathlib import Path

import fused_rope
import pytest
import torch
from oracle import DTYPES, LAYOUTS, VIEWS, angles, bits, same, tensor, view

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def no_synchronization():
    """Raises when the host synchronizes with the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(*tensors):
    return tuple(t.cuda() for t in tensors)


# --- the CPU's bits ----------------------------------------------------------------------------

WIDTHS = [(96, 40, 8), (128, 64, 0), (64, 32, 0), (80, 40, 0), (192, 32, 128), (34, 15, 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("precision", ["fp32", "model"])
@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_same_bits_as_on_the_cpu(dtype, interleaved, precision, width):
    D, P, o = width
    x, g = (tensor("bshd", 3, 65, 5, D, dtype) for _ in range(2))
    cos, sin = angles(65, P)
    kw = dict(interleaved=interleaved, rotary_offset=o, precision=precision)

    def results(x, g, cos, sin):
        leaf = x.clone().requires_grad_()
        y = fused_rope.rotate(leaf, cos, sin, **kw)
        in_place = fused_rope.rotate_(x.clone(), cos, sin, **kw)
        return y, in_place, torch.autograd.grad(y, leaf, g)[0]

    here, there = results(x, g, cos, sin), results(*on_gpu(x, g, cos, sin))
    for a, b in zip(here, there, strict=True):
        same(b.cpu(), a)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tensors_larger_than_the_cache(layout, dtype):
    """The plan is another one, the results are the same."""
    B, S = (1, 8192) if layout == "thd" else (4, 4096)
    q, k = (tensor(layout, B, S, H, 128, dtype, "cuda") for H in (32, 8))
    cos, sin = angles(S, 64, "cuda")
    for pairing in (dict(), dict(interleaved=True), dict(blocks=2)):
        kw = dict(layout=layout, **pairing)
        got = fused_rope.rotate_qk(q, k, cos, sin, **kw)
        for g, x in zip(got, (q, k), strict=True):
            assert torch.equal(g, bits(x, cos, sin, **kw))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "model"])
def test_partial_rotation_of_large_tensors_in_place(layout, dtype, precision):
    """Few elements of each head: vectors are shorter, the elements in between are unchanged."""
    B, S = (1, 8192) if layout == "thd" else (4, 2048)
    q, k = (tensor(layout, B, S, H, 96, dtype, "cuda") for H in (32, 8))
    for P, offset, inverse in ((8, 0, False), (16, 0, True), (16, 64, False), (32, 0, True)):
        cos, sin = angles(S, P, "cuda", torch.float32 if precision == "fp32" else dtype)
        for interleaved in (False, True):
            kw = dict(layout=layout, precision=precision)
            kw |= dict(rotary_offset=offset, interleaved=interleaved, inverse=inverse)
            got = q.clone(), k.clone()
            fused_rope.rotate_qk_(*got, cos, sin, **kw)
            for g, x in zip(got, (q, k), strict=True):
                assert torch.equal(g, bits(x, cos, sin, **kw))


@pytest.mark.parametrize("name", VIEWS)
def test_views_give_the_bits_of_the_cpu(name):
    x = view(name, torch.bfloat16)
    cos, sin = angles(5, 8)
    want = fused_rope.rotate(x, cos, sin)
    memory = x.as_strided((x.untyped_storage().nbytes() // 2,), (1,), 0).cuda()
    there = memory.as_strided(x.size(), x.stride(), x.storage_offset())
    same(fused_rope.rotate(there, *on_gpu(cos, sin)).cpu(), want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 2), (1, 1), (3, 5)], ids=str)
def test_adjacent_q_and_k_of_a_packed_tensor(layout, heads):
    """q and k in place, adjacent in memory: joined into one tensor; v is unchanged."""
    Hq, Hk = heads
    qkv = tensor(layout, 2, 65, Hq + 2 * Hk, 64, torch.bfloat16, "cuda")
    before, axis = qkv.clone(), layout.index("h")
    parts = (0, Hq), (Hq, Hk), (Hq + Hk, Hk)
    cos, sin = angles(130, 32, "cuda")
    index = torch.randint(-1, 130, (130 if layout == "thd" else 65,), device="cuda")
    for kw in (dict(), dict(interleaved=True), dict(blocks=2), dict(positions=index)):
        qkv.copy_(before)
        q, k, v = (qkv.narrow(axis, *part) for part in parts)
        fused_rope.rotate_qk_(q, k, cos, sin, layout=layout, **kw)
        x_q, x_k, x_v = (before.narrow(axis, *part) for part in parts)
        same(q, bits(x_q, cos, sin, layout=layout, **kw))
        same(k, bits(x_k, cos, sin, layout=layout, **kw))
        same(v, x_v)


def test_mixed_devices_are_errors():
    x, (cos, sin) = torch.randn(2, 5, 4, 16), angles(5, 8)
    with pytest.raises((ValueError, RuntimeError), match="device"):
        fused_rope.rotate(x.cuda(), cos, sin)
    with pytest.raises((ValueError, RuntimeError), match="device"):
        fused_rope.rotate(x, *on_gpu(cos, sin))


# --- graphs and streams ------------------------------------------------------------------------


def capture(f):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = f()
    return graph, out


@pytest.mark.parametrize("warm", [False, True], ids=["first use", "warm"])
def test_graph(warm):
    """Captured on first use too; replays read the tensors' present values."""
    cos, sin = angles(64, 32, "cuda")
    q, k = (tensor("bshd", 2, 5, H, 64, torch.float32, "cuda") for H in (4, 1))
    positions = torch.randint(0, 60, (2, 5)).cuda()
    lengths = torch.zeros(2, dtype=torch.int32, device="cuda")
    kw = dict(positions=positions, offset=lengths)
    if warm:
        fused_rope.rotate_qk(q, k, cos, sin, **kw)
    torch.cuda.synchronize()
    graph, out = capture(lambda: fused_rope.rotate_qk(q, k, cos, sin, **kw))
    for _ in range(3):
        q.normal_(), k.normal_(), positions.random_(-1, 60), lengths.random_(0, 4)
        graph.replay()
        for got, x in zip(out, (q, k), strict=True):
            same(got, bits(x, cos, sin, **kw))


def test_graph_of_a_decode_step():
    """q rotated in place, k into its slots of the cache."""
    cos, sin = angles(64, 32, "cuda")
    q, k = (tensor("thd", 1, 7, H, 64, torch.bfloat16, "cuda") for H in (8, 2))
    cache = torch.zeros(32, 2, 64, dtype=torch.bfloat16, device="cuda")
    q_out, slots = torch.empty_like(q), torch.arange(7, dtype=torch.int32, device="cuda")
    positions = torch.zeros(7, dtype=torch.int64, device="cuda")

    def step():
        fused_rope.rotate_qk(
            q, k, cos, sin, layout="thd", positions=positions, out=(q_out, cache), out_rows=slots
        )

    graph, _ = capture(step)
    for i in range(3):
        positions.fill_(i), slots.add_(7), k.normal_()
        graph.replay()
        same(cache[slots.long()], bits(k, cos, sin, layout="thd", positions=positions))


def test_graph_of_forward_and_backward():
    cos, sin = angles(5, 32, "cuda")
    x = tensor("bshd", 2, 5, 4, 64, torch.float32, "cuda").requires_grad_()
    g = torch.randn_like(x)

    def step():
        return torch.autograd.grad(fused_rope.rotate(x, cos, sin), x, g)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph, grad = capture(step)
    g.normal_()
    graph.replay()
    same(grad, bits(g, cos, sin, inverse=True))


def test_the_current_stream_is_used():
    """The kernel runs after work queued before it on a stream that is not the default one."""
    cos, sin = angles(64, 32, "cuda")
    x = tensor("bshd", 2, 64, 4, 64, torch.float32, "cuda")
    positions = torch.randint(0, 64, (2, 64)).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        y = x * 2
        got = fused_rope.rotate(y, cos, sin, positions=positions)
    torch.cuda.synchronize()
    same(got, bits(x * 2, cos, sin, positions=positions))


def test_calls_do_not_synchronize(no_synchronization):
    """Forward, backward, every source of rows, table gradients and growing tables."""
    cos, sin = angles(64, 32, "cpu")
    cos, sin = (t.pin_memory().cuda(non_blocking=True).requires_grad_() for t in (cos, sin))
    x = torch.randn(2, 16, 4, 64, device="cuda", requires_grad=True)
    thd = torch.randn(32, 4, 64, device="cuda", requires_grad=True)
    each = torch.zeros(2, 16, dtype=torch.int32, device="cuda")
    lengths = torch.ones(2, dtype=torch.int64, device="cuda")
    cu = torch.arange(0, 33, 16, device="cuda")
    calls = [
        fused_rope.rotate(x, cos, sin, positions=each, offset=lengths),
        fused_rope.rotate(thd, cos, sin, layout="thd", cu_seqlens=cu, offset=lengths),
        fused_rope.rotate_qk(x, x * 2, cos.double(), sin.double(), offset=3)[1],
        fused_rope.rotate(x, cos, sin, positions=each.expand(3, 2, 16), axes=[0, 1, 2, 0] * 8),
    ]
    for y in calls:
        y.sum().backward()
    rope = fused_rope.RotaryEmbedding(64, max_seq_len=4, device="cuda")
    rope(x.detach())
    rope(x.detach(), offset=1000)


def test_one_launch_for_q_and_k():
    q, k = (tensor("bshd", 2, 64, H, 64, torch.bfloat16, "cuda") for H in (32, 8))
    cos, sin = angles(64, 32, "cuda")
    calls = {
        "rotate_qk": lambda: fused_rope.rotate_qk(q, k, cos, sin),
        "rotate_qk_": lambda: fused_rope.rotate_qk_(q, k, cos, sin),
    }
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        kernels = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
        assert len(kernels) == 1, (name, kernels)


# --- devices -----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current():
    cos, sin = angles(5, 8, "cuda:1")
    x = tensor("bshd", 2, 5, 3, 16, torch.float32, "cuda:1").requires_grad_()
    with torch.cuda.device(0):
        y = fused_rope.rotate(x, cos, sin)
        y.sum().backward()
        table = fused_rope.cos_sin_table(torch.rand(8), 5, device="cuda:1")
        assert torch.cuda.current_device() == 0
    assert y.device == x.grad.device == table[0].device == torch.device("cuda:1")
    same(y, bits(x, cos, sin))
    same(x.grad, bits(torch.ones_like(x), cos, sin, inverse=True))
    with pytest.raises((ValueError, RuntimeError), match="device"):
        fused_rope.rotate(x, cos.to("cuda:0"), sin.to("cuda:0"))


# --- rows that there are none of ---------------------------------------------------------------

OUT_OF_RANGE = {
    "positions": "fused_rope.rotate(x, t, t, positions=index)",
    "offset": "fused_rope.rotate(x, t, t, positions=index * 0, offset=index[:, 3])",
    "backward": "fused_rope.rotate(x.requires_grad_(), t, t, positions=index).sum().backward()",
    "in place": "fused_rope.rotate_(x, t, t, positions=index)",
    "axes": "fused_rope.rotate(x, t, t, positions=index[None], axes=[0] * 8)",
    "cu_seqlens": "fused_rope.rotate(x[0], t[:3], t[:3], layout='thd', cu_seqlens=index[1, 2:4])",
    "out_rows": "fused_rope.rotate(x, t, t, out=torch.empty(8, 3, 16, device='cuda'), "
    "out_rows=index)",
}


FAR_OUT = [("positions", 2**31 - 1, "int32"), ("positions", -(2**31), "int64")]
BAD_ROWS = [(name, *bad) for name in OUT_OF_RANGE for bad in ((8, "int64"), (-2, "int32"))]
# A negative end of the last sequence is no fault: all tokens are padding.
BAD_ROWS.remove(("cu_seqlens", -2, "int32"))


@pytest.mark.parametrize("name,bad,dtype", BAD_ROWS + FAR_OUT)
def test_a_device_assertion(name, bad, dtype):
    """As PyTorch's own indexing; in a process of its own, which cannot use the GPU any more."""
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(fused_rope.__file__).parents[1])!r})
        import torch, fused_rope

        x, t = torch.randn(2, 5, 3, 16, device="cuda"), torch.randn(8, 8, device="cuda")
        index = torch.zeros(2, 5, dtype=torch.{dtype}, device="cuda")
        index[1, 3] = {bad}
        {OUT_OF_RANGE[name]}
        torch.cuda.synchronize()
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert run.returncode != 0 and "device-side assert" in run.stderr, run.stderr
