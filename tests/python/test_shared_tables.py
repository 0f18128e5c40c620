"""Modules that keep tables: shared by threads and devices, traced, copied, recomputed.

Whatever happened before, a call returns what a fresh module returns for it.
"""

import copy
import gc
import pickle
import sys
import threading
import warnings
import weakref

import fused_rope
import pytest
import torch
from fused_rope import RotaryEmbedding, table
from fused_rope.compat import flash_attn, rotalabs, torchtune, triton_rotary
from oracle import same
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

D = 16
TRAINED = 16
SCALINGS = {
    "plain": None,
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * (D // 2),
        "long_factor": [4.0] * (D // 2),
        "original_max_position_embeddings": TRAINED,
        "factor": 4.0,
    },
    "dynamic": {
        "rope_type": "dynamic",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
}


def embedding(kind="plain", max_seq_len=8, **options):
    return RotaryEmbedding(D, scaling=SCALINGS[kind], max_seq_len=max_seq_len, **options)


def tensor(S, H=2, **options):
    return torch.randn(1, S, H, D, **options)


# Every module that keeps a table, and how it rotates x [1, S, H, D].
MODULES = {
    **{kind: (lambda kind=kind: embedding(kind), lambda m, x: m(x)) for kind in SCALINGS},
    "torchtune": (
        lambda: torchtune.RotaryPositionalEmbeddings(D, max_seq_len=8),
        lambda m, x: m(x),
    ),
    "rotalabs": (
        lambda: rotalabs.RotaryEmbedding(dim=D, max_seq_len=8),
        lambda m, x: m(x, x)[0],
    ),
    "triton_rotary": (
        lambda: triton_rotary.TritonRotary(D, 8),
        lambda m, x: m(x.transpose(1, 2), x.transpose(1, 2))[0].transpose(1, 2),
    ),
    "flash_attn": (
        lambda: flash_attn.RotaryEmbedding(D),
        lambda m, x: m(torch.stack([x, x, x], 2))[:, :, 0],
    ),
    "flash_attn xpos": (
        lambda: flash_attn.RotaryEmbedding(D, scale_base=512.0),
        lambda m, x: m(torch.stack([x, x, x], 2))[:, :, 0],
    ),
}
ALL = pytest.mark.parametrize("name", MODULES)


def fresh(name, x):
    make, call = MODULES[name]
    return call(make(), x)


# --- recomputation --------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("lengths", [(10, 40), (40, 10), (10, 40, 9, 100)], ids=str)
def test_recomputation_uses_the_tables_of_its_forward(name, lengths, device):
    make, call = MODULES[name]
    rope = make()
    xs = [tensor(S, device=device, requires_grad=True) for S in lengths]
    losses = [checkpoint(lambda x: call(rope, x.sin()).cos(), x, use_reentrant=False) for x in xs]
    sum(y.sum() for y in losses).backward()
    for x in xs:
        got, x.grad = x.grad, None
        fresh(name, x.sin()).cos().sum().backward()
        same(got, x.grad)


def test_positions_recompute_after_growth():
    rope = embedding(max_seq_len=32)
    x, positions = tensor(5, requires_grad=True), torch.randint(0, 32, (5,))
    y = checkpoint(lambda x: rope(x.sin(), positions=positions), x, use_reentrant=False)
    rope(tensor(200))
    y.sum().backward()
    assert x.grad is not None


def test_a_published_table_never_changes():
    rope = embedding()
    cos, sin = rope.cos, rope.sin
    kept = cos.clone(), sin.clone()
    for S in (100, 9, 1000):
        rope(tensor(S))
    same(cos, kept[0])
    same(sin, kept[1])
    assert cos._version == sin._version == 0


# --- what is active around a call -----------------------------------------------------------------


def under_fake_tensors(rope, S):
    with FakeTensorMode():
        assert rope(torch.empty(1, S, 2, D)).shape == (1, S, 2, D)


def under_fake_tensors_that_meet_real_ones(rope, S):
    with FakeTensorMode(allow_non_fake_inputs=True):
        rope(torch.empty(1, S, 2, D))


def on_a_fake_tensor_outside_its_mode(rope, S):
    with FakeTensorMode():
        x = torch.empty(1, S, 2, D)
    rope(x)


def under_make_fx(tracing_mode):
    def run(rope, S):
        x = tensor(S)
        graph = make_fx(lambda x: rope(x), tracing_mode=tracing_mode)(x)
        torch.testing.assert_close(graph(x), rope(x))

    return run


def under_jit_trace(rope, S):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(rope, tensor(S), check_trace=False)


def under_export(rope, S):
    rope.reserve(S)
    torch.export.export(rope, (tensor(S),), strict=False)


def under_inference_mode(rope, S):
    with torch.inference_mode():
        rope(tensor(S))


def compiled(backend, mode):
    def run(rope, S):
        torch._dynamo.reset()
        with mode():
            torch.compile(rope, backend=backend, fullgraph=True)(tensor(S))

    return run


AROUND = {
    "fake": under_fake_tensors,
    "fake among real ones": under_fake_tensors_that_meet_real_ones,
    "fake outside its mode": on_a_fake_tensor_outside_its_mode,
    "make_fx real": under_make_fx("real"),
    "make_fx fake": under_make_fx("fake"),
    "make_fx symbolic": under_make_fx("symbolic"),
    "jit.trace": under_jit_trace,
    "export": under_export,
    "inference mode": under_inference_mode,
    "compiled": compiled("aot_eager", torch.enable_grad),
    "compiled in inference mode": compiled("aot_eager", torch.inference_mode),
    "vmap": lambda rope, S: torch.func.vmap(rope)(tensor(S)[None]),
    "grad": lambda rope, S: torch.func.grad(lambda x: rope(x).sum())(tensor(S)),
    "jvp": lambda rope, S: torch.func.jvp(rope, (tensor(S),), (tensor(S),)),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", SCALINGS)
def test_tables_made_under_a_mode_are_normal_tensors(kind, around):
    rope = embedding(kind)
    for S in (5, 30):  # a table that is there, and one that has to grow
        AROUND[around](rope, S)
    for pair in (rope.cos, rope.sin):
        assert type(pair) is torch.Tensor and not pair.is_inference() and not pair.requires_grad
    x = tensor(30, requires_grad=True)
    got = rope(x)
    same(got, embedding(kind)(x))
    got.sum().backward()


@ALL
def test_made_under_fake_tensors(name):
    make, call = MODULES[name]
    with FakeTensorMode():
        rope = make()
        assert call(rope, tensor(5)).shape == (1, 5, 2, D)
        assert call(rope, tensor(50)).shape == (1, 50, 2, D)
    x = tensor(50)
    same(call(rope, x), fresh(name, x))


@ALL
def test_made_and_called_in_inference_mode_then_trained(name):
    make, call = MODULES[name]
    with torch.inference_mode():
        rope = make()
        call(rope, tensor(20))
    x = tensor(10, requires_grad=True)
    call(rope, x * 1).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", SCALINGS)
def test_traced_by_jit_at_other_lengths(kind):
    rope = embedding(kind, max_seq_len=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(rope, tensor(8))
    for S in (3, 8, TRAINED, TRAINED + 1, 40, 64):
        x = tensor(S)
        torch.testing.assert_close(traced(x), embedding(kind)(x), rtol=0, atol=2e-6)
    if kind == "plain":
        with pytest.raises(Exception, match=r"cos has 64 rows, but S \(100\) are needed"):
            traced(tensor(100))


def test_scripting_says_what_to_do_instead():
    for module in (embedding(), torch.nn.Sequential(embedding()), rotalabs.RotaryEmbedding(D)):
        with pytest.raises(RuntimeError, match=r"RotaryEmbedding: .*torch\.compile"):
            torch.jit.script(module)


# --- devices and dtypes ---------------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch):
    """The arguments of every table that the host builds from now on."""
    calls = []

    def counted(*arguments, **options):
        calls.append((arguments, options))
        return fused_rope.cos_sin_table(*arguments, **options)

    monkeypatch.setattr(table, "cos_sin_table", counted)
    return calls


def test_devices_that_alternate_build_once(builds):
    rope = RotaryEmbedding(D, max_seq_len=24, base=123.0)
    x = tensor(5)
    for _ in range(3):
        same(rope(x), RotaryEmbedding(D, base=123.0)(x))
        builds_so_far = len(builds)
        rope(x.to("meta"))
        assert rope(x.to("meta")).is_meta and rope.cos.is_meta
    assert len(builds) == builds_so_far == 2  # 24 rows and, for what is compared with, 2048


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_a_module(builds):
    rope = RotaryEmbedding(D, max_seq_len=24, base=321.0, device="cuda:0")
    x = tensor(50)
    want = rope(x)
    for _ in range(3):
        for device in ("cuda:0", "cuda:1"):
            got = rope(x.to(device))
            assert got.device == torch.device(device)
            same(got.cpu(), want)
    assert len(builds) == 2


def test_dtypes_that_alternate_build_once(builds):
    rope = flash_attn.RotaryEmbedding(D, base=77.0)
    for _ in range(3):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            rope(torch.randn(1, 9, 3, 2, D).to(dtype))
    assert len(builds) == 3


def test_modules_of_the_same_frequencies_share_a_table(builds):
    layers = [RotaryEmbedding(D, max_seq_len=500, base=55.0) for _ in range(80)]
    for layer in layers:
        layer(tensor(700))
    pointers = {layer.cos.data_ptr() for layer in layers} | {
        copy.deepcopy(layers[0]).cos.data_ptr(),
        pickle.loads(pickle.dumps(layers[0])).cos.data_ptr(),
    }
    assert len(pointers) == 1 and len(builds) == 2
    assert RotaryEmbedding(D, max_seq_len=500, base=56.0).cos.data_ptr() not in pointers


def test_shorter_tables_are_views_of_longer_ones():
    rope = RotaryEmbedding(D, max_seq_len=10, base=57.0)
    for S in (5, 1000, 5):
        rope(tensor(S))
    short = RotaryEmbedding(D, max_seq_len=10, base=57.0)
    assert short.cos.shape == (10, D // 2)
    assert short.cos.untyped_storage().data_ptr() == rope.cos.untyped_storage().data_ptr()


def test_a_table_is_freed_with_its_last_module():
    rope, other = (RotaryEmbedding(D, base=58.0) for _ in range(2))
    tables = weakref.ref(rope._tables.frequencies.span(0).table)
    del rope
    gc.collect()
    assert tables() is not None
    del other
    gc.collect()
    assert tables() is None


def test_copies_do_not_carry_the_table():
    rope = RotaryEmbedding(D, max_seq_len=100_000)
    rope(tensor(5))
    assert len(pickle.dumps(rope)) < 10_000


# --- threads --------------------------------------------------------------------------------------

LENGTHS = {"plain": (8, 9, 100, 600), "longrope": (10, 16, 17, 200), "dynamic": (10, 17, 200)}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("growing", [False, True], ids=["one module", "fresh modules"])
def test_threads_share_a_module(kind, growing):
    """Every thread gets its own call's numbers, while others grow and choose other tables."""
    xs = {S: tensor(S) for S in LENGTHS[kind]}
    want = {S: embedding(kind)(x) for S, x in xs.items()}
    shared, failures = [embedding(kind, 4)], []
    start = threading.Barrier(2 * len(xs))

    def serve(S):
        start.wait()
        for i in range(150):
            try:
                if growing and i % 10 == 0:
                    # Other frequencies than any before, so that tables are built meanwhile.
                    shared[0] = embedding(kind, 4)
                if not torch.equal(shared[0](xs[S]), want[S]):
                    failures.append(f"S={S}: wrong numbers")
            except Exception as error:
                failures.append(f"S={S}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=serve, args=(S,)) for S in xs for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures, failures[:3]


def test_threads_build_a_table_once(builds):
    ropes = [RotaryEmbedding(D, base=4321.0, max_seq_len=1) for _ in range(8)]
    builds.clear()
    start = threading.Barrier(8)

    def grow(rope):
        start.wait()
        rope(tensor(3000))

    threads = [threading.Thread(target=grow, args=(rope,)) for rope in ropes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


# --- CUDA -----------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@needs_cuda
def test_a_stream_waits_for_the_copy_that_another_one_issued():
    base = 999.0
    want = RotaryEmbedding(128, base=base, max_seq_len=20_000)(torch.ones(1, 20_000, 1, 128))
    for attempt in range(5):
        rope = RotaryEmbedding(128, base=base + 1e-9 * attempt, max_seq_len=4, device="cuda")
        x = torch.ones(1, 20_000, 1, 128, device="cuda")
        torch.cuda.synchronize()
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        with torch.cuda.stream(first):
            torch.cuda._sleep(50_000_000)  # the copy is issued behind this
            rope(x)
        with torch.cuda.stream(second):
            got = rope(x)
        torch.cuda.synchronize()
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-6)


@needs_cuda
def test_growth_in_a_graph_capture_says_what_to_do():
    rope = RotaryEmbedding(D, base=1234.5, max_seq_len=8, device="cuda")
    x = tensor(40, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"reserve"), torch.cuda.graph(graph):
        rope(x)
    torch.cuda.synchronize()
    rope.reserve(40)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = rope(x)
    graph.replay()
    same(got.cpu(), RotaryEmbedding(D, base=1234.5)(x.cpu()))
