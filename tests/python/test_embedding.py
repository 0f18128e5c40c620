"""RotaryEmbedding: its values, its growing table, casts, copies and saves of modules."""

import copy
import io
import pickle

import fused_rope
import pytest
import torch
import torch._dynamo.testing
from fused_rope import RotaryEmbedding
from oracle import LAYOUTS, bits, error_over_bound, same


def table(rows, R, device="cpu", base=10000.0):
    """The table of R elements, computed in float64 and rounded to float32."""
    inv_freq = 1.0 / base ** (torch.arange(0, R, 2, dtype=torch.float64) / R)
    angle = torch.arange(rows, dtype=torch.float64)[:, None] * inv_freq
    return angle.cos().float().to(device), angle.sin().float().to(device)


def tensor(layout, S, H=3, D=64, B=2, device="cpu", dtype=torch.float32):
    sizes = {"b": B, "s": S, "t": S, "h": H, "d": D}
    return torch.randn([sizes[letter] for letter in layout], device=device).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grows_when_the_rows_are_known_on_the_host(layout, device):
    rope = RotaryEmbedding(64, layout=layout, max_seq_len=4, device=device)
    q, k = tensor(layout, 21, 4, device=device), tensor(layout, 21, 2, device=device)
    for got, x in zip(rope(q, k), (q, k), strict=True):
        assert error_over_bound(got, x, *table(21, 64, device), layout=layout) <= 1.0
        same(got, bits(x, rope.cos, rope.sin, layout=layout))
    same(rope(q), rope(q, k)[0])
    same(rope(q, offset=30), bits(q, *rope_table(64, 51, device), layout=layout, offset=30))
    assert rope.cos.dtype == torch.float32 and rope.cos.shape[1] == 32


def rope_table(D, rows, device="cpu", **options):
    rope = RotaryEmbedding(D, max_seq_len=rows, device=device, **options)
    return rope.cos, rope.sin


def test_growth_doubles_the_rows_and_keeps_their_values():
    rope = RotaryEmbedding(64, max_seq_len=16)
    before = rope.cos
    rope(torch.randn(1, 17, 1, 64))
    assert rope.cos.shape == (32, 32)
    same(rope.cos[:16], before)
    rope(torch.randn(1, 100, 1, 64))
    assert rope.cos.shape == (128, 32)
    same(rope.cos, rope_table(64, 128)[0])


def test_decode_continues_prefill():
    rope = RotaryEmbedding(64, layout="bhsd", max_seq_len=8)
    q = tensor("bhsd", 30)
    steps = [rope(q[:, :, i : i + 1], offset=i) for i in range(30)]
    same(torch.cat(steps, 2), rope(q))


def test_positions_and_lengths_do_not_grow_the_table(device):
    rope = RotaryEmbedding(64, max_seq_len=10, device=device)
    q = tensor("bshd", 7, device=device)
    positions = torch.randint(-1, 10, (2, 7), device=device)
    same(rope(q, positions=positions), bits(q, rope.cos, rope.sin, positions=positions))
    lengths = torch.tensor([3, 0], dtype=torch.int32, device=device)
    same(rope(q, offset=lengths), bits(q, rope.cos, rope.sin, offset=lengths))
    rope.reserve(40)
    same(rope(q, positions=positions + 20), bits(q, rope.cos, rope.sin, positions=positions + 20))
    packed = RotaryEmbedding(64, layout="thd", max_seq_len=10, device=device)
    x = tensor("thd", 12, device=device)
    cu = torch.tensor([0, 5, 5, 11], dtype=torch.int32, device=device)
    want = bits(x, packed.cos, packed.sin, layout="thd", cu_seqlens=cu)
    same(packed(x, cu_seqlens=cu), want)
    if device == "cpu":
        with pytest.raises(IndexError):
            RotaryEmbedding(64, max_seq_len=5)(q, positions=positions.clamp(min=7))


def test_span_pairing_and_precision(device):
    x = tensor("bshd", 9, D=80, device=device, dtype=torch.bfloat16)
    cos, sin = rope_table(48, 9, device)
    options = {"rotary_offset": 16, "interleaved": True, "precision": "model"}
    rope = RotaryEmbedding(80, rotary_dim=48, device=device, **options)
    same(rope(x), bits(x, cos, sin, **options))
    assert RotaryEmbedding(80, rotary_offset=16).rotary_dim == 64


def test_blocks_repeat_the_frequencies(device):
    rope = RotaryEmbedding(64, blocks=2, device=device)
    x = tensor("bshd", 9, device=device)
    cos, sin = rope_table(32, 9, device)
    halves = [bits(half, cos, sin) for half in x.split(32, -1)]
    same(rope(x), torch.cat(halves, -1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_axes(layout, device):
    axes = fused_rope.mrope_axes([8, 12, 12])
    B = 1 if layout == "thd" else 2
    rope = RotaryEmbedding(64, layout=layout, axes=axes, max_seq_len=50, device=device)
    x = tensor(layout, 7, B=B, device=device)
    cos, sin = rope.cos, rope.sin
    three = torch.randint(-1, 50, (3, B, 7), device=device)
    want = bits(x, cos, sin, layout=layout, positions=three, axes=axes)
    same(rope(x, positions=three), want)
    shared = three[:, 0]
    want = bits(x, cos, sin, layout=layout, positions=shared, axes=axes)
    same(rope(x, positions=shared), want)
    for positions in (three[0], three[0, 0], three[0, :1]):
        want = bits(x, cos, sin, layout=layout, positions=positions)
        same(rope(x, positions=positions), want)
    same(rope(x), bits(x, cos, sin, layout=layout))


def surroundings():
    def make():
        return RotaryEmbedding(64, max_seq_len=16)

    def saved():
        file = io.BytesIO()
        torch.save(make(), file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    def on_meta():
        with torch.device("meta"):
            rope = make()
        assert rope.cos.is_meta
        return rope

    def in_a_parent():
        parent = torch.nn.Sequential(make(), torch.nn.Linear(2, 2)).to(torch.bfloat16)
        assert list(parent.state_dict()) == ["1.weight", "1.bias"]
        parent.load_state_dict(copy.deepcopy(parent).state_dict())
        return parent[0]

    def default_dtype():
        torch.set_default_dtype(torch.float16)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                return make()
        finally:
            torch.set_default_dtype(torch.float32)

    def inference():
        with torch.inference_mode():
            return make()

    return {
        "bfloat16": lambda: make().to(torch.bfloat16),
        "half and back": lambda: make().half().float(),
        "double": lambda: make().double(),
        "type": lambda: make().type(torch.float16),
        "deepcopy": lambda: copy.deepcopy(make()),
        "pickle": lambda: pickle.loads(pickle.dumps(make())),
        "torch.save": saved,
        "share_memory": lambda: make().share_memory(),
        "meta, to_empty": lambda: on_meta().to_empty(device="cpu"),
        "meta, cast, to_empty": lambda: on_meta().bfloat16().to_empty(device="cpu"),
        "meta, never materialised": on_meta,
        "there and back": lambda: make().to("meta").to_empty(device="cpu"),
        "in a parent": in_a_parent,
        "default dtype and autocast": default_dtype,
        "inference mode": inference,
    }


@pytest.mark.parametrize("name", surroundings())
def test_table_survives_casts_copies_and_saves(name):
    x = tensor("bshd", 40, dtype=torch.bfloat16).requires_grad_()
    rope = surroundings()[name]()
    got = rope(x)
    same(got, bits(x, *rope_table(64, 40)))
    got.sum().backward()
    assert list(rope.state_dict()) == [] and list(rope.parameters()) == []


def test_a_table_grown_in_inference_mode_trains():
    rope = RotaryEmbedding(64, max_seq_len=8)
    with torch.inference_mode():
        rope(tensor("bshd", 40))
    rope(tensor("bshd", 40).requires_grad_()).sum().backward()


def test_moves_its_table_to_the_device_of_q(device):
    rope = RotaryEmbedding(64, max_seq_len=8).to(device)
    assert rope.cos.device.type == device
    x = tensor("bshd", 6, device=device)
    elsewhere = RotaryEmbedding(64, max_seq_len=8, device="cpu")
    same(elsewhere(x), rope(x))
    assert elsewhere.cos.device.type == device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_growth_does_not_synchronize_cuda():
    rope = RotaryEmbedding(64, max_seq_len=8, device="cuda")
    x = tensor("bshd", 600, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = rope(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same(got.cpu(), RotaryEmbedding(64)(x.cpu()))


@pytest.mark.parametrize(
    "lengths", [(5, 9, 17, 33, 64), (5, 9, 12, 17, 20, 33, 65, 150, 7), (17, 20)]
)
def test_growth_compiles_once_more(lengths, device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    rope = RotaryEmbedding(64, max_seq_len=16, device=device)
    compiled = torch.compile(rope, backend=counter, fullgraph=True)
    for S in lengths:
        q, k = tensor("bshd", S, device=device), tensor("bshd", S, 1, device=device)
        for got, want in zip(compiled(q, k), RotaryEmbedding(64, device=device)(q, k), strict=True):
            same(got, want)
    assert counter.frame_count <= 3


def test_compiled_decode_does_not_recompile():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    rope = RotaryEmbedding(64, max_seq_len=64)
    compiled = torch.compile(rope, backend=counter, fullgraph=True)
    q = tensor("bshd", 1)
    for offset in (5, 6, 7, 8, 40):
        same(compiled(q, offset=offset), rope(q, offset=offset))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "word,options",
    [
        ("rotary_dim", {"rotary_dim": 7}),
        ("rotary_dim", {"rotary_dim": 66}),
        ("rotary_offset", {"rotary_offset": -2}),
        ("rotary_offset", {"rotary_dim": 64, "rotary_offset": 2}),
        ("blocks", {"blocks": 3}),
        ("blocks", {"blocks": 0}),
        ("blocks", {"blocks": 2, "interleaved": True}),
        ("axes", {"axes": [0, 1]}),
        (r"axes in \[0, 8\)", {"axes": [8] * 32}),
        (r"axes in \[0, 8\)", {"axes": [-1] * 32}),
        ("max_seq_len", {"max_seq_len": -1}),
        ("max_seq_len", {"max_seq_len": 2**40}),
        ("precision", {"precision": "fp16"}),
        ("layout", {"layout": "shbd"}),
        ("rope_type", {"scaling": {"rope_type": "spiral"}}),
        ("factor", {"scaling": {"rope_type": "linear"}}),
        ("base=500000.0", {"scaling": {"rope_type": "default", "rope_theta": 5e5}}),
        ("rotary_dim=32", {"scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("a number .*'0.5'", {"scaling": {"rope_type": "default", "partial_rotary_factor": "0.5"}}),
        ("finite", {"scaling": {"rope_type": "linear", "factor": 1e-320}}),
    ],
)
def test_errors(word, options):
    with pytest.raises(ValueError, match=word):
        RotaryEmbedding(64, **options)


@pytest.mark.parametrize(
    "name,options",
    [
        ("head_dim", {"head_dim": 64.0}),
        ("head_dim", {"head_dim": None}),
        ("rotary_dim", {"rotary_dim": 0.5}),
        ("rotary_offset", {"rotary_offset": "2"}),
        ("blocks", {"blocks": 1.0}),
        ("max_seq_len", {"max_seq_len": 2048.0}),
        ("max_seq_len", {"max_seq_len": None}),
        ("axes", {"axes": [0.5] * 32}),
    ],
)
def test_sizes_are_ints(name, options):
    with pytest.raises(TypeError, match=f"^RotaryEmbedding: .*{name} to be an int"):
        RotaryEmbedding(**{"head_dim": 64} | options)


@pytest.mark.parametrize(
    "message,options",
    [
        ("axes to be a sequence of ints, got int", {"axes": 3}),
        ("a mapping with rope_type, got list", {"scaling": []}),
        ("a mapping with rope_type, got bool", {"scaling": False}),
    ],
)
def test_collections_are_collections(message, options):
    with pytest.raises(TypeError, match=message):
        RotaryEmbedding(64, **options)


X = torch.ones(1, 5, 2, 64)
LATE = torch.full((5,), 2**40)
WRONG_CALLS = {
    "no tensor": (TypeError, "q to be a Tensor, got NoneType", (None,), {}),
    "array": (TypeError, "q to be a Tensor, got ndarray", (X.numpy(),), {}),
    "number": (ValueError, "q of 4 dimensions .*got \\(\\)", (torch.ones(()),), {}),
    "one head": (ValueError, "q of 4 dimensions .*got \\(64,\\)", (X[0, 0, 0],), {}),
    "no batch": (ValueError, "q of 4 dimensions .*got \\(5, 2, 64\\)", (X[0],), {}),
    "far offset": (ValueError, "offset \\+ S = 1099511627781", (X,), {"offset": 2**40}),
    "farther offset": (ValueError, "offset \\+ S = ", (X,), {"offset": 2**70}),
    "weight without eps": (ValueError, "eps with q_weight", (X,), {"q_weight": torch.ones(64)}),
    "option without eps": (ValueError, "eps with zero_centered", (X,), {"zero_centered": True}),
    "cast without eps": (ValueError, "eps with cast", (X,), {"cast": "after"}),
    "order without eps": (ValueError, "eps with after", (X,), {"after": True}),
    "weight without k": (
        ValueError,
        "k with k_weight",
        (X,),
        {"k_weight": torch.ones(64), "eps": 1e-6},
    ),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls(name):
    error, message, args, options = WRONG_CALLS[name]
    with pytest.raises(error, match=f"^RotaryEmbedding: .*{message}"):
        RotaryEmbedding(64)(*args, **options)


@pytest.mark.parametrize("offset", [None, "3", 1.5, [1]], ids=str)
def test_an_offset_that_is_no_int(offset):
    with pytest.raises(TypeError, match=r"^rotate: expected offset to be an int"):
        RotaryEmbedding(64)(X, offset=offset)


def test_no_advice_to_reserve_impossible_rows():
    with pytest.raises(IndexError, match=f"got {2**40} at b=0, s=0$"):
        RotaryEmbedding(64)(X, positions=LATE)


@pytest.mark.parametrize(
    "error,rows", [(TypeError, 4096.0), (TypeError, None), (ValueError, -1), (ValueError, 2**40)]
)
def test_reserve_refuses(error, rows):
    rope = RotaryEmbedding(64)
    with pytest.raises(error, match=r"^RotaryEmbedding: expected rows"):
        rope.reserve(rows)
    assert rope.max_seq_len == 2048


def test_reserve_of_a_tensor_keeps_an_int():
    rope = RotaryEmbedding(64)
    rope.reserve(torch.tensor(4096))
    assert type(rope.max_seq_len) is int and rope.max_seq_len == 4096


def test_another_head_dim_is_an_error():
    with pytest.raises(ValueError, match="D=64"):
        RotaryEmbedding(64)(tensor("bshd", 5, D=128))


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "yarn", "longrope", "llama3"])
@pytest.mark.parametrize("S", [16, 32, 96])
def test_config_equals_hugging_face(kind, S):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    trained = {"original_max_position_embeddings": 32}
    scaling = {
        "default": {},
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 8.0, **trained},
        "longrope": {
            "factor": 4.0,
            "short_factor": [1.0 + 0.1 * i for i in range(16)],
            "long_factor": [2.0 + 0.3 * i for i in range(16)],
            **trained,
        },
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **trained},
    }[kind]
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32}
    sizes["max_position_embeddings"] = 128 if trained.items() <= scaling.items() else 32
    scaling["rope_type"] = kind
    if int(transformers.__version__.split(".")[0]) >= 5:
        scaling["rope_theta"] = 10000.0
        config = transformers.LlamaConfig(**sizes, rope_parameters=scaling)
    else:
        scaling = None if kind == "default" else scaling
        config = transformers.LlamaConfig(**sizes, rope_scaling=scaling)
    x = torch.randn(1, 4, S, 32)
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(S)[None])
    want = bits(x, cos[..., :16], sin[..., :16], layout="bhsd")
    rope = RotaryEmbedding.from_config(config)
    torch.testing.assert_close(rope(x), want, rtol=0, atol=5e-5)
    rope(torch.randn(1, 4, 128, 32))  # a longer text before does not matter
    torch.testing.assert_close(rope(x), want, rtol=0, atol=5e-5)


def test_repr():
    text = repr(RotaryEmbedding(64, layout="bhsd", interleaved=True))
    assert "64" in text and "bhsd" in text and "interleaved" in text


# --- dynamic and longrope: frequencies that follow from the call's own rows ----------------------

TRAINED = 32
VARYING = {
    "dynamic": {
        "rope_type": "dynamic",
        "factor": 2.0,
        "original_max_position_embeddings": TRAINED,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "short_factor": [1.0 + 0.1 * i for i in range(16)],
        "long_factor": [2.0 + 0.3 * i for i in range(16)],
    },
}


def varying(kind, D=32, **options):
    return RotaryEmbedding(D, scaling=VARYING[kind], **options)


def at_rows(kind, rows, repeats=1, device="cpu"):
    """The table that `rows` positions in use ask for, long enough for all tests here."""
    inv_freq, scale = fused_rope.frequencies.frequencies(
        32 // repeats, 10000.0, VARYING[kind], rows=rows
    )
    angle = torch.arange(200, dtype=torch.float64)[:, None] * inv_freq.repeat(repeats)
    return [(t * scale).float().to(device) for t in (angle.cos(), angle.sin())]


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", VARYING)
@pytest.mark.parametrize("longest", [9, TRAINED - 1, TRAINED, 100])
def test_length_dependent_frequencies_depend_on_this_call_alone(kind, longest, device):
    rope = varying(kind, max_seq_len=4, device=device)
    cos, sin = at_rows(kind, longest + 1, device=device)
    positions = torch.randint(0, longest + 1, (2, 7), device=device)
    positions[1, 3] = longest
    positions[0, 2] = -1
    x = tensor("bshd", 7, D=32, device=device)
    rope(tensor("bshd", 150, D=32, device=device))  # a longer text before does not matter
    got = rope(x, positions=positions)
    close(got, bits(x, cos, sin, positions=positions))
    same(got[0, 2], x[0, 2])
    close(
        rope(x, positions=positions - 3 * (positions > 2), offset=0 * positions[:, 0]),
        rope(x, positions=positions - 3 * (positions > 2)),
    )
    for offset in (torch.tensor([3, longest - 6], device=device), longest - 6):
        close(rope(x, offset=offset), bits(x, cos, sin, offset=offset))
        q, k = rope(x, x[:, :, :1], positions=torch.arange(7, device=device)[None], offset=offset)
        close(q, bits(x, cos, sin, offset=offset))
        same(k, q[:, :, :1])


@pytest.mark.parametrize("kind", VARYING)
def test_length_dependent_frequencies_of_packed_sequences(kind, device):
    rope = varying(kind, layout="thd", device=device)
    cu = torch.tensor([0, 5, 5, 11], dtype=torch.int32, device=device)
    x = tensor("thd", 13, D=32, device=device)
    close(
        rope(x, cu_seqlens=cu),
        bits(x, *at_rows(kind, 6, device=device), layout="thd", cu_seqlens=cu),
    )
    offset = torch.tensor([50, 3, 40], device=device)
    where = {"cu_seqlens": cu, "offset": offset}
    got = rope(x, **where)
    close(got, bits(x, *at_rows(kind, 55, device=device), layout="thd", **where))
    same(got[11:], x[11:])
    where["positions"] = torch.arange(13, device=device).flip(0)
    close(rope(x, **where), bits(x, *at_rows(kind, 63, device=device), layout="thd", **where))
    with pytest.raises(ValueError):
        varying(kind, device=device)(tensor("bshd", 5, D=32, device=device), cu_seqlens=cu)


@pytest.mark.parametrize("kind", VARYING)
def test_length_dependent_frequencies_with_axes_and_blocks(kind, device):
    axes = fused_rope.mrope_axes([4, 6, 6])
    x = tensor("bshd", 7, D=32, device=device)
    positions = torch.randint(-1, 100, (3, 2, 7), device=device)
    positions[2, 0, 0] = 99
    want = bits(x, *at_rows(kind, 100, device=device), positions=positions, axes=axes)
    close(varying(kind, axes=axes, device=device)(x, positions=positions), want)
    if kind == "dynamic":
        want = bits(x, *at_rows(kind, 100, 2, device=device), positions=positions[2], blocks=2)
        close(varying(kind, blocks=2, device=device)(x, positions=positions[2]), want)


def test_positions_that_are_no_row_are_errors():
    rope, x = varying("dynamic"), tensor("bshd", 3, D=32)
    with pytest.raises(IndexError):
        rope(x, positions=torch.tensor([0, -3, 1]))
    with pytest.raises(IndexError):
        rope(x, positions=torch.tensor([0, 3, 1]), offset=-2)
    assert rope(x[:, :0], positions=torch.zeros(0, dtype=torch.int64)).numel() == 0


WRONG_ROWS = {
    "positions_of_one_token": ("bshd", {"positions": torch.tensor([3])}),
    "positions_scalar": ("bshd", {"positions": torch.tensor(3)}),
    "positions_too_few": ("bshd", {"positions": torch.arange(4)}),
    "positions_per_sequence": ("bshd", {"positions": torch.tensor([[3], [4]])}),
    "positions_transposed": ("bshd", {"positions": torch.zeros(5, 2, dtype=torch.int64)}),
    "positions_float": ("bshd", {"positions": torch.ones(5)}),
    "positions_list": ("bshd", {"positions": [0, 1, 2, 3, 4]}),
    "offset_scalar": ("bshd", {"offset": torch.tensor(3)}),
    "offset_of_one_sequence": ("bshd", {"offset": torch.tensor([3])}),
    "offset_float_tensor": ("bshd", {"offset": torch.ones(2)}),
    "offset_list": ("bshd", {"offset": [3, 3]}),
    "offset_float": ("bshd", {"offset": 3.0}),
    "offset_none": ("bshd", {"offset": None}),
    "offset_negative": ("bshd", {"offset": -1}),
    "cu_seqlens_descending": ("thd", {"cu_seqlens": torch.tensor([0, 4, 2])}),
    "cu_seqlens_start_late": ("thd", {"cu_seqlens": torch.tensor([2, 5])}),
    "cu_seqlens_scalar": ("thd", {"cu_seqlens": torch.tensor(5)}),
    "cu_seqlens_empty": ("thd", {"cu_seqlens": torch.empty(0, dtype=torch.int64)}),
    "cu_seqlens_2d": ("thd", {"cu_seqlens": torch.tensor([[0, 5]])}),
    "cu_seqlens_list": ("thd", {"cu_seqlens": [0, 5]}),
    "offset_of_few_sequences": (
        "thd",
        {"cu_seqlens": torch.tensor([0, 2, 5]), "offset": torch.tensor([1])},
    ),
}


@pytest.mark.parametrize("kind", VARYING)
@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_wrong_rows_are_the_same_errors_as_with_fixed_frequencies(kind, wrong):
    layout, where = WRONG_ROWS[wrong]
    # A host offset reaches no table only beyond the trained length.
    S = 5 if isinstance(next(iter(where.values())), torch.Tensor) else TRAINED + 5
    x = tensor(layout, S, D=32)
    with pytest.raises((TypeError, ValueError)) as expected:
        RotaryEmbedding(32, layout=layout)(x, **where)
    with pytest.raises((TypeError, ValueError)) as raised:
        varying(kind, layout=layout)(x, **where)
    assert (raised.type, str(raised.value)) == (expected.type, str(expected.value))


@pytest.mark.parametrize("kind", VARYING)
def test_length_dependent_frequencies_compile(kind, device):
    """One graph serves both sides of the trained length, without positions too."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    rope = varying(kind, device=device)
    compiled = torch.compile(rope, backend=counter, fullgraph=True)
    for longest in (9, TRAINED + 3, 100):
        x = tensor("bshd", 7, D=32, device=device).requires_grad_()
        positions = torch.arange(longest - 6, longest + 1, device=device)
        got = compiled(x, positions=positions)
        close(got, bits(x, *at_rows(kind, longest + 1, device=device), positions=positions))
        got.sum().backward()
    assert counter.frame_count == 1
    for S in (9, TRAINED + 3, 100, 20):
        x = tensor("bshd", S, D=32, device=device)
        close(compiled(x), bits(x, *at_rows(kind, S, device=device)))
    assert counter.frame_count <= 3


# An int and three kinds of tensors say where 7 tokens are, for a longest position in use.
PLACES = {
    "int offset": lambda longest: {"offset": longest - 6},
    "offsets": lambda longest: {"offset": torch.tensor([3, longest - 6])},
    "positions": lambda longest: {"positions": torch.arange(longest - 6, longest + 1)},
    "positions of each": lambda longest: {
        "positions": torch.tensor([[3] * 7, [-1, longest] + [0] * 5])
    },
}
LONGEST = (9, TRAINED - 1, TRAINED, 100, 20)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", VARYING)
def test_length_dependent_frequencies_compile_with_any_positions(kind, place):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    rope = varying(kind)
    compiled = torch.compile(rope, backend=counter, fullgraph=True)
    x = tensor("bshd", 7, D=32)
    for longest in LONGEST:
        where = PLACES[place](longest)
        close(compiled(x, **where), bits(x, *at_rows(kind, longest + 1), **where))
    assert counter.frame_count <= (2 if place == "int offset" else 1)


@pytest.mark.parametrize("kind", VARYING)
def test_length_dependent_frequencies_compile_with_packed_sequences(kind):
    torch._dynamo.reset()
    rope = varying(kind, layout="thd")
    compiled = torch.compile(rope, backend="aot_eager", fullgraph=True)
    x, cu = tensor("thd", 13, D=32), torch.tensor([0, 5, 5, 11])
    for offset in (torch.tensor([50, 3, 40]), torch.tensor([2, 0, 1])):
        where = {"cu_seqlens": cu, "offset": offset}
        close(compiled(x, **where), rope(x, **where))


class Calls(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rope = varying(kind)

    def forward(self, q, k, where):
        return self.rope(q, k, **where)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", VARYING)
def test_length_dependent_frequencies_export(kind, place, strict):
    """One exported program serves both sides of the trained length."""
    q, k = tensor("bshd", 7, D=32), tensor("bshd", 7, 1, D=32)
    where = PLACES[place](9)
    shapes = dict.fromkeys(where, torch.export.Dim.DYNAMIC if place == "int offset" else None)
    exported = torch.export.export(
        Calls(kind), (q, k, where), dynamic_shapes=(None, None, shapes), strict=strict
    ).module()
    for longest in LONGEST:
        where = PLACES[place](longest)
        cos, sin = at_rows(kind, longest + 1)
        for got, x in zip(exported(q, k, where), (q, k), strict=True):
            close(got, bits(x, cos, sin, **where))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", VARYING)
def test_length_dependent_frequencies_export_with_any_length(kind, strict):
    S = torch.export.Dim("S", min=2, max=4096)
    q, k = tensor("bshd", 9, D=32), tensor("bshd", 9, 1, D=32)
    exported = torch.export.export(
        Calls(kind), (q, k, {}), dynamic_shapes=({1: S}, {1: S}, {}), strict=strict
    ).module()
    for rows in (2, TRAINED, TRAINED + 1, 100, 9):
        q, k = tensor("bshd", rows, D=32), tensor("bshd", rows, 1, D=32)
        for got, x in zip(exported(q, k, {}), (q, k), strict=True):
            close(got, bits(x, *at_rows(kind, rows)))


@pytest.mark.parametrize("kind", VARYING)
def test_length_dependent_frequencies_survive_moves(kind):
    with torch.device("meta"):
        rope = varying(kind)
    rope = copy.deepcopy(rope.to_empty(device="cpu").to(torch.bfloat16))
    x, positions = tensor("bshd", 7, D=32), torch.arange(90, 97)
    close(rope(x, positions=positions), bits(x, *at_rows(kind, 97), positions=positions))


@pytest.mark.parametrize("kind", VARYING)
def test_writing_to_the_scaling_changes_no_copy(kind):
    scaling = copy.deepcopy(VARYING[kind])
    rope = RotaryEmbedding(32, scaling=scaling)
    x, positions = tensor("bshd", 7, D=32), torch.arange(90, 97)
    want = rope(x, positions=positions)
    for written in (scaling, rope.scaling):
        written["factor"] = 16.0
        written.get("long_factor", [])[:] = [9.0] * 16
    for copied in (rope, copy.deepcopy(rope), pickle.loads(pickle.dumps(rope))):
        same(copied(x, positions=positions), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", VARYING)
def test_length_dependent_frequencies_do_not_synchronize_cuda(kind):
    rope = varying(kind, device="cuda")
    x = tensor("bshd", 7, D=32, device="cuda")
    positions = torch.randint(0, 100, (2, 7), device="cuda")
    lengths = positions[:, 0].clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rope(x, positions=positions)
        rope(x, offset=lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")


EMPTY = {"bshd": (0, 9, 2, 64), "bhsd": (0, 2, 9, 64), "sbhd": (9, 0, 2, 64), "thd": (9, 0, 64)}


@pytest.mark.parametrize("kind", ["default", "dynamic", "longrope"])
@pytest.mark.parametrize("layout", EMPTY)
def test_empty_inputs_of_more_tokens_than_rows(kind, layout, device):
    factors = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    scaling = {"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 4, **factors}
    read = {"default": (), "dynamic": ("factor",), "longrope": ("factor", *factors)}[kind]
    keys = ("rope_type", "original_max_position_embeddings", *read)
    rope = RotaryEmbedding(
        64, layout=layout, scaling={key: scaling[key] for key in keys}, max_seq_len=4
    )
    q = torch.randn(EMPTY[layout], device=device, requires_grad=True)
    for offset in (0, 7):
        rotated = rope(q, offset=offset)
        assert rotated.shape == q.shape
        rotated.sum().backward()
        assert rope(q, q, offset=offset)[1].shape == q.shape
    with pytest.raises((ValueError, IndexError), match="-7"):
        rope(q, offset=-7)


@pytest.mark.parametrize("kind", VARYING)
def test_empty_inputs_on_another_device(kind):
    rope, q = varying(kind), torch.empty(0, 200, 2, 32, device="meta")
    for offset in (0, 7):
        assert rope(q, offset=offset).device == q.device


def test_a_layout_that_changes_later():
    """The length, on which dynamic frequencies depend, is that of the new layout."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 8}
    rope, q = RotaryEmbedding(64, scaling=scaling), torch.randn(1, 2, 40, 64)
    want = RotaryEmbedding(64, scaling=scaling, layout="bhsd")(q)
    rope.layout = "bhsd"
    same(rope(q), want)
    with pytest.raises(ValueError, match="layout"):
        rope.layout = "hbsd"


@pytest.mark.parametrize("name", ["rotary_dim", "base", "scaling", "blocks"])
def test_what_determines_the_table_cannot_be_changed(name):
    rope = RotaryEmbedding(64)
    with pytest.raises(AttributeError, match=f"^RotaryEmbedding: {name} determines the table"):
        setattr(rope, name, getattr(rope, name))
